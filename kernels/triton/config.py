"""Which regime runs rows of C classes, and with which configuration.

Up to `FEW_CLASSES` a program has a tile of several rows, beyond that one row as long as that pays, `LONGEST` at most
(`tile.py`); longer rows are cut into chunks (`stream.py`). The numbers are
the best of some hundred combinations tried on an H100, of those that do without spilling: `benchmarks/gpu_static.py`
compiles them all.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

import triton

# Types of logits, in the order of their numbers in a kernel.
KINDS = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16", torch.uint8: "uint8"}
# Elements of a tile of several rows, and the longest row that is a tile of its own.
TILE, LONGEST = 512, 8192
# Up to here a tile has several rows.
FEW_CLASSES = 128


class Config(NamedTuple):
    """How a kernel is cut: the tile of one program, its threads, and the registers that each may take."""

    rows: int
    classes: int
    threads: int
    registers: int


class Layout(NamedTuple):
    """How memory is walked, see `common.py`."""

    # Elements that are moved at once; 0: any strides.
    group: int
    # Elements before a row that a tile may begin at.
    slack: int


def choose_config(n_classes: int, layout: Layout, teacher: str, extras: bool = False) -> Config | None:
    """The default configuration for rows of `n_classes` that fit on chip; None: they are cut into chunks.

    `teacher`: a type among `KINDS`, or "mixed". `extras`: whether statistics or the cross entropy are computed as well.

    Sixteen elements of a tile per thread, and as few registers as do without spilling: what a multiprocessor holds at
    once hides how long memory takes.
    """
    classes = triton.next_power_of_2(n_classes)
    # Offsets of 64 bits for each element, or code for every type, take registers.
    laborious = layout.group == 0 or teacher == "mixed"

    def registers(plain: int, extra: int, most: int) -> int:
        return most if laborious else extra if extras or teacher == "uint8" else plain

    if classes <= FEW_CLASSES:
        if classes <= 4:
            return Config(64, classes, 64, registers(64, 96, 128))
        if classes <= 16:
            # A row per thread: with fewer the labels, as large as two logits, are read several times.
            return Config(64, classes, 64, registers(96, 128, 255))
        if classes == 32:
            return Config(8, classes, 32, registers(88, 128, 168))
        return Config(TILE // classes, classes, 64, registers(80, 112, 144))
    classes = triton.next_power_of_2(n_classes + layout.slack)
    if classes <= 256:
        return Config(1, classes, 32, registers(64, 80, 96))
    if classes <= 4096:
        return Config(1, classes, classes // 16, registers(80, 128, 144))
    # Longer rows of half precision are read twice in less time than it takes such a tile to work on them; and so are
    # rows that fill little of the tile.
    if classes == LONGEST and n_classes > 3 * LONGEST // 4 and teacher == "float32" and not laborious:
        return Config(1, classes, classes // 32, 255)
    return None


def choose_chunks(layout: Layout, teacher: str, extras: bool = False) -> tuple[Config, Config]:
    """The configurations for the statistics and for the gradient of longer rows; arguments as above.

    A warp by itself needs no exchange with others for its sums, which are most of the work of the statistics.
    """
    if layout.group == 0 or teacher == "mixed":
        return Config(1, 1024, 32, 255), Config(1, 2048, 128, 168)
    return Config(1, 1024, 32, 152 if extras else 128), Config(1, 2048, 128, 96 if extras else 64)


def choose_layout(n_classes: int, tensors: Sequence[Tensor]) -> Layout:
    """The fastest way to walk all of `tensors` [N, C] in step."""
    several = n_classes <= FEW_CLASSES
    if any(t.stride(1) != 1 or (several and t.stride(0) != n_classes) for t in tensors):
        return Layout(0, 0)
    # A sector of memory in the narrowest type (half of one for codes); a group of a wider type takes several.
    narrowest = min(t.element_size() for t in tensors)
    group = min(16, 32 // narrowest)
    positions = [(t.data_ptr() // t.element_size(), t.stride(0)) for t in tensors]
    if not several and narrowest == 2 and all(p % 8 == 0 and stride % 8 == 0 for p, stride in positions):
        # Half a sector where every row fills them: none has incomplete groups, which are moved element by element.
        group = 8
    places = {(p % group, stride % group) for p, stride in positions}
    if len(places) > 1:
        return Layout(1, 0)
    ((offset, stride),) = places
    if several:
        # Every tile begins where a group does, if the first does and its rows fill groups.
        config = choose_config(n_classes, Layout(group, 0), "float32")
        assert config is not None
        rows, classes, *_ = config
        slack = group - 1 if offset or rows * n_classes % group else 0
        return Layout(group, slack) if rows * (classes - n_classes) >= slack else Layout(1, 0)
    slack = group - 1 if offset or stride else 0
    return Layout(group, slack)
