"""Loading and storing tiles of logits.

A tile is [CLASSES, ROWS] logits: CLASSES columns of ROWS rows, with -inf in columns outside the row. Classes are the
first dimension, so that with few classes one thread holds whole rows and reduces them without other threads. A value
of each row is a tensor [ROWS]. With ROWS = 1 a tile is [CLASSES] and a value of the row is a scalar. A tile is moved
in one of two ways:

- GROUP > 0, packed: one stretch of memory (a row, a chunk of one, or several consecutive rows) in aligned groups of
  GROUP elements, 16 bytes or a multiple. The stretch may then begin up to GROUP - 1 elements before the row. Only the
  elements of incomplete groups are moved one by one. Several rows are distributed to the threads through shared memory.
- GROUP = 0, strided: element by element, with any strides.
"""

import triton
import triton.language as tl

# The code of -inf in 8-bit logits.
MASKED = tl.constexpr(255)


@triton.jit
def across(x):
    """A value of each row, in a shape that broadcasts with a tile."""
    if len(x.shape) == 1:
        x = x[None, :]
    return x


@triton.jit
def find_shift(pointer, GROUP: tl.constexpr):
    """Elements from the start of a group to `pointer`."""
    return (pointer.to(tl.int64).to(tl.uint32) // (pointer.dtype.element_ty.primitive_bitwidth // 8) % GROUP).to(
        tl.int32
    )


@triton.jit
def place_tile(
    pointer, first, chunk, row_stride, n_rows, n_classes,
    GROUP: tl.constexpr, ROWS: tl.constexpr, CLASSES: tl.constexpr,
):  # fmt: skip
    """Chunk `chunk` of the rows from `first` on: its rows, columns, which elements exist, the size of its stretch."""
    if ROWS == 1:
        rows = first
        size = n_classes
        columns = chunk * CLASSES + tl.arange(0, CLASSES)
        if GROUP > 1:
            columns -= find_shift(pointer + first * row_stride, GROUP)
        inside = (columns >= 0) & (columns < n_classes)
    else:
        rows = first + tl.arange(0, ROWS)
        size = (tl.minimum(n_rows - first, ROWS) * n_classes).to(tl.int32)
        columns = tl.arange(0, CLASSES)[:, None]
        inside = (columns < n_classes) & (rows < n_rows)[None, :]
    return first, chunk, rows, columns, inside, size


@triton.jit
def walk(pointer, start, size, GROUP: tl.constexpr, LENGTH: tl.constexpr):
    """LENGTH elements from `start` on, of `size` at `pointer`: the aligned start, their pointers, whether all exist."""
    if GROUP > 1:
        start -= find_shift(pointer, GROUP)
        pointer = tl.multiple_of(pointer + start, 16)
    else:
        pointer += start
    return start, pointer + tl.arange(0, LENGTH), (start >= 0) & (start + LENGTH <= size)


@triton.jit
def mask_existing(start, size, LENGTH: tl.constexpr):
    """Which elements of :func:`walk` exist."""
    position = start + tl.arange(0, LENGTH)
    return (position >= 0) & (position < size)


@triton.jit
def mask_groups(start, size, GROUP: tl.constexpr, LENGTH: tl.constexpr):
    """Which elements of :func:`walk` are in complete groups, and whether any are in incomplete ones."""
    group = start + tl.arange(0, LENGTH) // GROUP * GROUP
    # Only the first and the last group can be incomplete.
    has_edges = False
    if GROUP > 1:
        has_edges = (start < 0) | ((start + LENGTH > size) & ((size - start) % GROUP != 0))
    return (group >= 0) & (group + GROUP <= size), has_edges


@triton.jit
def columns_of(x, start):
    """The columns of the elements of a tile that begins at column `start`."""
    columns = start + tl.arange(0, x.shape[0])
    if len(x.shape) == 2:
        columns = columns[:, None]
    return columns


@triton.jit
def load_as(
    pointer, strides, wanted, tile, n_classes, OUTSIDE: tl.constexpr, GROUP: tl.constexpr, EVICTION: tl.constexpr
):  # fmt: skip
    first, chunk, rows, columns, inside, size = tile
    row_stride, class_stride = strides
    start = chunk * inside.shape[0]
    if GROUP == 0:
        strided = across(rows) * row_stride + columns * class_stride
        x = tl.load(pointer + strided, inside & across(wanted), other=OUTSIDE, eviction_policy=EVICTION)
        x = x.to(tl.float32)
    else:
        LENGTH: tl.constexpr = inside.shape[0] * (inside.shape[1] if len(inside.shape) == 2 else 1)
        start, pointers, is_complete = walk(pointer + first * row_stride, start, size, GROUP, LENGTH)
        whole, has_edges = mask_groups(start, size, GROUP, LENGTH)
        if len(inside.shape) == 2:
            # Usually only the last of many tiles has edges.
            if has_edges:
                x = tl.load(pointers, mask_existing(start, size, LENGTH), other=OUTSIDE)
            else:
                x = tl.load(pointers, whole, other=OUTSIDE)
        elif is_complete & wanted:
            x = tl.load(pointers, eviction_policy=EVICTION)
        else:
            x = tl.load(pointers, whole & wanted, other=OUTSIDE, eviction_policy=EVICTION)
            if has_edges:
                x = tl.load(pointers, mask_existing(start, size, LENGTH) & (whole == 0) & wanted, other=x)
        x = x.to(tl.float32)
        if len(inside.shape) == 2:
            into = tl.minimum(columns, n_classes - 1) + (rows - first).to(tl.int32)[None, :] * n_classes - start
            x = tl.gather(x, into.reshape(LENGTH), 0).reshape(inside.shape)
            x = tl.where(inside, x, OUTSIDE)
            start = 0
    return x, start


@triton.jit
def load_kind(
    address, strides, kind, wanted, tile, n_classes, KIND: tl.constexpr, GROUP: tl.constexpr, EVICTION: tl.constexpr
):  # fmt: skip
    """Logits (or codes) of the type KIND; of the type number `kind` if KIND is "mixed"."""
    if KIND == "float32":
        pointer = address.to(tl.pointer_type(tl.float32))
        x, start = load_as(pointer, strides, wanted, tile, n_classes, float("-inf"), GROUP, EVICTION)
    elif KIND == "bfloat16":
        pointer = address.to(tl.pointer_type(tl.bfloat16))
        x, start = load_as(pointer, strides, wanted, tile, n_classes, float("-inf"), GROUP, EVICTION)
    elif KIND == "float16":
        pointer = address.to(tl.pointer_type(tl.float16))
        x, start = load_as(pointer, strides, wanted, tile, n_classes, float("-inf"), GROUP, EVICTION)
    elif KIND == "uint8":
        pointer = address.to(tl.pointer_type(tl.uint8))
        x, start = load_as(pointer, strides, wanted, tile, n_classes, MASKED, GROUP, EVICTION)
    elif kind < 2:
        if kind == 0:
            x, start = load_kind(address, strides, kind, wanted, tile, n_classes, "float32", GROUP, EVICTION)
        else:
            x, start = load_kind(address, strides, kind, wanted, tile, n_classes, "bfloat16", GROUP, EVICTION)
    else:
        if kind == 2:
            x, start = load_kind(address, strides, kind, wanted, tile, n_classes, "float16", GROUP, EVICTION)
        else:
            x, start = load_kind(address, strides, kind, wanted, tile, n_classes, "uint8", GROUP, EVICTION)
    return x, start


@triton.jit
def load_tile(source, wanted, tile, n_classes, KIND: tl.constexpr, GROUP: tl.constexpr, EVICTION: tl.constexpr):
    """The logits of a tile in float32, -inf outside, and the column of its first element.

    Rows that are not wanted hold arbitrary values. `source`: address, row stride, class stride, kind, row_max, step.
    EVICTION: when it leaves the second-level cache, as in `tl.load`.
    """
    address, row_stride, class_stride, kind, row_max, step = source
    # In Triton's interpreter, a comparison of float scalars gives a float.
    wanted = wanted.to(tl.int32) != 0
    x, start = load_kind(address, (row_stride, class_stride), kind, wanted, tile, n_classes, KIND, GROUP, EVICTION)
    if KIND == "uint8" or KIND == "mixed":
        logits = tl.where(x >= MASKED, float("-inf"), across(row_max) - across(step) * x)
        x = logits if KIND == "uint8" else tl.where(kind == 3, logits, x)
    return x, start


@triton.jit
def store_tile(pointer, x, tile, n_classes, GROUP: tl.constexpr, EVICTION: tl.constexpr):
    """Writes a tile to rows of a contiguous [N, C]."""
    first, chunk, rows, columns, inside, size = tile
    x = x.to(pointer.dtype.element_ty)
    if GROUP == 0:
        strided = across(rows) * n_classes + columns
        tl.store(pointer + strided, x, inside, eviction_policy=EVICTION)
    else:
        LENGTH: tl.constexpr = inside.shape[0] * (inside.shape[1] if len(inside.shape) == 2 else 1)
        start, pointers, is_complete = walk(pointer + first * n_classes, chunk * inside.shape[0], size, GROUP, LENGTH)
        if len(inside.shape) == 2:
            held = tl.minimum(tl.maximum(tl.arange(0, LENGTH) + start, 0), size - 1)
            # In float, because an integer division takes ten times as long. The quotient is at least 0.5 / 128 away
            # from an integer, so rounding cannot change the row.
            row = ((held.to(tl.float32) + 0.5) / n_classes).to(tl.int32)
            x = tl.gather(x.reshape(LENGTH), (held - row * n_classes) * inside.shape[1] + row, 0)
        whole, has_edges = mask_groups(start, size, GROUP, LENGTH)
        if len(inside.shape) == 2:
            if has_edges:
                tl.store(pointers, x, mask_existing(start, size, LENGTH))
            else:
                tl.store(pointers, x, whole)
        elif is_complete:
            tl.store(pointers, x, eviction_policy=EVICTION)
        else:
            tl.store(pointers, x, whole, eviction_policy=EVICTION)
            if has_edges:
                tl.store(pointers, x, mask_existing(start, size, LENGTH) & (whole == 0))
