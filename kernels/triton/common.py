"""What the kernels share: where teachers lie, how a tile of logits is loaded and stored, margins and weights.

A tile is [CLASSES, ROWS] logits: CLASSES columns, of which those outside the row hold -inf, of ROWS rows. Classes come
first so that with few of them a thread holds whole rows and reduces them without its neighbours. What belongs to a row
is [ROWS]. With one row a tile is [CLASSES], and what belongs to the row is a scalar. A tile is moved

- packed: a stretch of memory (one row, a chunk of one, or several rows that lie next to each other) in groups of GROUP
  elements, 16 bytes or a multiple, aligned. The stretch then begins up to GROUP - 1 elements before the row,
  and only elements of incomplete groups are moved one by one. Several rows are dealt out through shared memory;
- or, with GROUP = 0, element by element with any strides.
"""

import inspect
from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl

LN2 = tl.constexpr(0.6931471805599453)
# The code of -inf in 8-bit logits.
MASKED = tl.constexpr(255)


def kernel(function: Callable[..., Any]) -> Any:
    """`triton.jit` that compiles once for all values of the runtime arguments: alignment is stated by GROUP instead."""
    names = [p.name for p in inspect.signature(function).parameters.values() if p.annotation is not tl.constexpr]
    return triton.jit(function, do_not_specialize=names, do_not_specialize_on_alignment=names)


@triton.jit
def pick(k, slots):
    """The address of one of eight tensors."""
    t0, t1, t2, t3, t4, t5, t6, t7 = slots
    odd = (k & 1) != 0
    a = tl.where(odd, t1.to(tl.int64), t0.to(tl.int64))
    b = tl.where(odd, t3.to(tl.int64), t2.to(tl.int64))
    c = tl.where(odd, t5.to(tl.int64), t4.to(tl.int64))
    d = tl.where(odd, t7.to(tl.int64), t6.to(tl.int64))
    return tl.where((k & 4) != 0, tl.where((k & 2) != 0, d, c), tl.where((k & 2) != 0, b, a))


@triton.jit
def locate_teacher(k, teachers):
    """Address, row stride, class stride (elements) and kind of teacher k.

    The addresses of the first sixteen teachers are arguments: eight, and eight more or None. A further teacher lies
    `stack_stride` bytes beyond the one sixteen before it, or as far beyond it as the table says, which then holds the
    strides and kinds of all.
    """
    slots, more_slots, stack_stride, row_stride, class_stride, kinds, table = teachers
    address = pick(k, slots)
    if more_slots[0] is not None:
        address = tl.where((k & 8) != 0, pick(k, more_slots), address)
    kind = ((kinds >> (2 * k)) & 3).to(tl.int32)
    if table is not None:
        address += tl.load(table + 4 * k)
        row_stride = tl.load(table + 4 * k + 1)
        class_stride = tl.load(table + 4 * k + 2)
        kind = tl.load(table + 4 * k + 3).to(tl.int32)
    else:
        address += (k // 16) * stack_stride
    return address, row_stride, class_stride, kind


@triton.jit
def read_row_inputs(labels, sample_weight, rows, n_rows, n_classes, ignore_index, unlabeled_index):
    """Per row: does it count, its label (-1: none), is the label impossible, its weight."""
    counts = rows < n_rows
    target = (rows * 0 - 1).to(tl.int32)
    invalid = counts & False
    if labels is not None:
        label = tl.load(labels + rows, counts, other=ignore_index)
        counts = counts & (label != ignore_index)
        possible = (label >= 0) & (label < n_classes)
        invalid = counts & (label != unlabeled_index) & (possible == 0)
        target = tl.where(counts & possible, label, -1).to(tl.int32)
    weight = counts.to(tl.float32)
    if sample_weight is not None:
        weight = tl.load(sample_weight + rows, counts, other=0).to(tl.float32)
    return counts, target, invalid, weight


@triton.jit
def read_prior(priors, k, rows, counts):
    """The prior of teacher k; 0: it does not teach this row."""
    prior, stride_k, stride_n = priors
    alpha = counts.to(tl.float32)
    if prior is not None:
        alpha = tl.load(prior + k * stride_k + rows * stride_n, counts, other=0).to(tl.float32)
    return tl.where(alpha > 0, alpha, 0.0)


@triton.jit
def read_scales(scales, k, rows, counts, n_rows, n_teachers):
    """row_max and step of an 8-bit teacher; `scales`: [2, K, N] or None."""
    row_max = (rows * 0).to(tl.float32)
    step = row_max
    if scales is not None:
        row_max = tl.load(scales + k * n_rows + rows, counts, other=0)
        step = tl.load(scales + (n_teachers + k) * n_rows + rows, counts, other=0)
    return row_max, step


@triton.jit
def across(x):
    """What belongs to rows, beside a tile."""
    if len(x.shape) == 1:
        x = x[None, :]
    return x


@triton.jit
def find_shift(pointer, GROUP: tl.constexpr):
    """Elements from the start of a group to `pointer`."""
    return (pointer.to(tl.int64) // (pointer.dtype.element_ty.primitive_bitwidth // 8) % GROUP).to(tl.int32)


@triton.jit
def place_tile(
    pointer, first, chunk, row_stride, n_rows, n_classes,
    GROUP: tl.constexpr, ROWS: tl.constexpr, CLASSES: tl.constexpr,
):  # fmt: skip
    """Chunk `chunk` of the rows from `first` on: its rows, its columns, what of it exists, elements of its stretch."""
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
    """LENGTH elements from `start` on, of `size` at `pointer`: the true start, their pointers, do all of them exist."""
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
    """Which elements of :func:`walk` lie in complete groups; and are there any in incomplete ones."""
    group = start + tl.arange(0, LENGTH) // GROUP * GROUP
    # A group is incomplete at the first or last element only.
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
def load_as(pointer, strides, wanted, tile, n_classes, OUTSIDE: tl.constexpr, GROUP: tl.constexpr):
    first, chunk, rows, columns, inside, size = tile
    row_stride, class_stride = strides
    start = chunk * inside.shape[0]
    if GROUP == 0:
        strided = across(rows) * row_stride + columns * class_stride
        x = tl.load(pointer + strided, inside & across(wanted), other=OUTSIDE)
        x = x.to(tl.float32)
    else:
        LENGTH: tl.constexpr = inside.shape[0] * (inside.shape[1] if len(inside.shape) == 2 else 1)
        start, pointers, is_complete = walk(pointer + first * row_stride, start, size, GROUP, LENGTH)
        whole, has_edges = mask_groups(start, size, GROUP, LENGTH)
        if len(inside.shape) == 2:
            # As a rule that is the last of many tiles.
            if has_edges:
                x = tl.load(pointers, mask_existing(start, size, LENGTH), other=OUTSIDE)
            else:
                x = tl.load(pointers, whole, other=OUTSIDE)
        elif is_complete & wanted:
            x = tl.load(pointers)
        else:
            x = tl.load(pointers, whole & wanted, other=OUTSIDE)
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
def load_kind(address, strides, kind, wanted, tile, n_classes, KIND: tl.constexpr, GROUP: tl.constexpr):
    """Logits (or codes) of the type that KIND says, or that `kind` says where KIND is "mixed"."""
    if KIND == "float32":
        pointer = address.to(tl.pointer_type(tl.float32))
        x, start = load_as(pointer, strides, wanted, tile, n_classes, float("-inf"), GROUP)
    elif KIND == "bfloat16":
        pointer = address.to(tl.pointer_type(tl.bfloat16))
        x, start = load_as(pointer, strides, wanted, tile, n_classes, float("-inf"), GROUP)
    elif KIND == "float16":
        pointer = address.to(tl.pointer_type(tl.float16))
        x, start = load_as(pointer, strides, wanted, tile, n_classes, float("-inf"), GROUP)
    elif KIND == "uint8":
        pointer = address.to(tl.pointer_type(tl.uint8))
        x, start = load_as(pointer, strides, wanted, tile, n_classes, MASKED, GROUP)
    elif kind < 2:
        if kind == 0:
            x, start = load_kind(address, strides, kind, wanted, tile, n_classes, "float32", GROUP)
        else:
            x, start = load_kind(address, strides, kind, wanted, tile, n_classes, "bfloat16", GROUP)
    else:
        if kind == 2:
            x, start = load_kind(address, strides, kind, wanted, tile, n_classes, "float16", GROUP)
        else:
            x, start = load_kind(address, strides, kind, wanted, tile, n_classes, "uint8", GROUP)
    return x, start


@triton.jit
def load_tile(source, wanted, tile, n_classes, KIND: tl.constexpr, GROUP: tl.constexpr):
    """The logits of a tile in float32, -inf outside, and the column that it begins at. Unwanted rows hold anything."""
    address, row_stride, class_stride, kind, row_max, step = source
    # Triton's interpreter takes the result of a comparison of float scalars for a float.
    wanted = wanted.to(tl.int32) != 0
    x, start = load_kind(address, (row_stride, class_stride), kind, wanted, tile, n_classes, KIND, GROUP)
    if KIND == "uint8" or KIND == "mixed":
        logits = tl.where(x >= MASKED, float("-inf"), across(row_max) - across(step) * x)
        x = logits if KIND == "uint8" else tl.where(kind == 3, logits, x)
    return x, start


@triton.jit
def store_tile(pointer, x, tile, n_classes, GROUP: tl.constexpr):
    """Write a tile to rows of a contiguous [N, C]."""
    first, chunk, rows, columns, inside, size = tile
    x = x.to(pointer.dtype.element_ty)
    if GROUP == 0:
        strided = across(rows) * n_classes + columns
        tl.store(pointer + strided, x, inside)
    else:
        LENGTH: tl.constexpr = inside.shape[0] * (inside.shape[1] if len(inside.shape) == 2 else 1)
        start, pointers, is_complete = walk(pointer + first * n_classes, chunk * inside.shape[0], size, GROUP, LENGTH)
        if len(inside.shape) == 2:
            held = tl.minimum(tl.maximum(tl.arange(0, LENGTH) + start, 0), size - 1)
            # A division of floats: one of integers takes ten times as long. Its result lies 0.5 / 128 off an integer.
            row = ((held.to(tl.float32) + 0.5) / n_classes).to(tl.int32)
            x = tl.gather(x.reshape(LENGTH), (held - row * n_classes) * inside.shape[1] + row, 0)
        whole, has_edges = mask_groups(start, size, GROUP, LENGTH)
        if len(inside.shape) == 2:
            if has_edges:
                tl.store(pointers, x, mask_existing(start, size, LENGTH))
            else:
                tl.store(pointers, x, whole)
        elif is_complete:
            tl.store(pointers, x)
        else:
            tl.store(pointers, x, whole)
            if has_edges:
                tl.store(pointers, x, mask_existing(start, size, LENGTH) & (whole == 0))


@triton.jit
def stand_out(x, start, target):
    """The largest logit; the one that a margin is about (the label's, or the largest); the largest other one.

    Where the label of a chunk's row is not in it, its logit is -inf.
    """
    if len(x.shape) == 2:
        top = tl.max(x, 0)
        own, rest = stand_out_of_rows(x, top, start, target)
    elif target >= 0:
        if (target >= start) & (target < start + x.shape[0]):
            chosen = columns_of(x, start) == target
            own = tl.max(tl.where(chosen, x, float("-inf")), 0)
            rest = tl.max(tl.where(chosen, float("-inf"), x), 0)
        else:
            rest = tl.max(x, 0)
            own = tl.full((), float("-inf"), tl.float32)
        top = tl.maximum(own, rest)
    else:
        top = tl.max(x, 0)
        chosen = x == top
        rest = tl.max(tl.where(chosen, float("-inf"), x), 0)
        rest = tl.where(tl.sum(chosen.to(tl.int32), 0) > 1, top, rest)
        own = top
    return top, own, rest


@triton.jit
def stand_out_of_rows(x, top, start, target):
    """The last two of :func:`stand_out`, where only some rows have a label."""
    labelled = target >= 0
    chosen = tl.where(across(labelled), columns_of(x, start) == across(target), x == across(top))
    rest = tl.max(tl.where(chosen, float("-inf"), x), 0)
    # Never so, but unknown to the compiler: what is chosen is found out again, where to remember it would take a
    # register for each logit.
    never = rest > top
    top = tl.where(never, rest, top)
    target = tl.where(never, target + 1, target)
    chosen = tl.where(across(labelled), columns_of(x, start) == across(target), x == across(top))
    # One sum for two questions: the label's logit, or how often the largest occurs.
    answer = tl.sum(tl.where(chosen, tl.where(across(labelled), x, 1.0), 0.0), 0)
    own = tl.where(labelled, answer, top)
    return own, tl.where(labelled | (answer == 1), rest, top)


@triton.jit
def margin_of(own, rest, top, total, inverse, exponent, WEIGHTING: tl.constexpr):
    """The margin, from logits relative to `top`, total = sum exp2((x - top) exponent) and inverse = 1 / total."""
    if WEIGHTING == "label_nll":
        margin = ((own - top) * exponent - tl.log2(total)) * LN2
    else:
        margin = (tl.exp2((own - top) * exponent) - tl.exp2((rest - top) * exponent)) * inverse
    return margin


@triton.jit
def admit(margin, alpha, best, mass, sharpness, CHOICE: tl.constexpr):
    """One step of the softmax over teachers: the new one's share, the factor of all before it, the best score so far.

    `mass`: the shares until now. Shares are relative to the best score; equal scores differ by 0, also at -inf.
    """
    if CHOICE == "hard":
        # Of equal ones the first stays.
        wins = (alpha > 0) & ((mass == 0) | (margin > best))
        share = tl.where(wins, 1.0, 0.0)
        keep = 1.0 - share
        best = tl.where(wins, margin, best)
        # No comparison finds NaN, and it may not be passed over.
        share = tl.where((alpha > 0) & (margin != margin), margin, share)
    else:
        score = alpha * 0
        if CHOICE == "soft":
            score = margin * sharpness
        higher = tl.where(alpha > 0, tl.maximum(best, score), best)
        share = alpha * tl.exp(tl.where(score == higher, 0.0, score - higher))
        share = tl.where(alpha > 0, share, 0.0)
        keep = tl.exp(tl.where(best == higher, 0.0, best - higher))
        best = higher
    return share, keep, best
