"""Which regime runs rows of C classes, and with which configuration.

Up to `FEW_CLASSES` a program has a tile of several rows, up to `LONGEST` one row (:mod:`~amtss_fast._triton.tile`);
longer rows are cut into chunks (:mod:`~amtss_fast._triton.stream`). `benchmarks/gpu_static.py` compiles them all.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
from torch import Tensor

# Types of logits, in the order of their numbers in a kernel.
KINDS = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16", torch.uint8: "uint8"}
# Elements of a tile of several rows, the longest row that is a tile of its own, and the chunk of a longer one.
TILE, LONGEST, CHUNK = 512, 8192, 2048
# Elements of a tile per thread: twice as many would need twice the registers, and halve what a multiprocessor holds.
PER_THREAD = 8
# Up to here a tile has several rows.
FEW_CLASSES = 128


class Config(NamedTuple):
    """How a kernel is cut: the tile of one program, its threads, and the registers that each may take."""

    rows: int
    classes: int
    threads: int
    registers: int


class Layout(NamedTuple):
    """How memory is walked, see :mod:`amtss_fast._triton.common`."""

    # Elements that are moved at once; 0: any strides.
    group: int
    # Elements before a row that a tile may begin at.
    slack: int


def choose_config(n_classes: int, layout: Layout, teacher: str) -> Config:
    """The default configuration for rows of `n_classes`; a row that is longer than `classes` is cut into chunks.

    `teacher`: a type among `KINDS`, or "mixed".
    """
    classes = triton.next_power_of_2(n_classes)
    if classes <= FEW_CLASSES:
        # A row per thread where rows are short: with fewer the labels, as large as two logits, are read several times.
        rows = 64 if classes <= 16 else TILE // classes
        if classes in (32, 64):
            # A second warp would read the labels of its rows again: 8 % of the bytes of bfloat16 at 32 classes.
            return Config(rows // 2, classes, 32, 128)
        return Config(rows, classes, 64, {8: 144, 16: 224}.get(classes, 128))
    classes = triton.next_power_of_2(n_classes + layout.slack)
    # Offsets of 64 bits for each element, or code for every type, take registers.
    laborious = layout.group == 0 or teacher == "mixed"
    if classes > (LONGEST // 2 if laborious else LONGEST):
        # Twice the elements per thread: what belongs to the row is read again by every warp.
        return Config(1, CHUNK, CHUNK // (2 * PER_THREAD), 200)
    if classes == LONGEST or (teacher == "uint8" and classes > 256):
        # A program of 1,024 threads has 64 registers for each, a few too few. And sixteen codes are 128 bits.
        return Config(1, classes, classes // (2 * PER_THREAD), 128)
    return Config(1, classes, max(32, classes // PER_THREAD), 104 if laborious or classes == 256 else 80)


def choose_layout(n_classes: int, tensors: Sequence[Tensor]) -> Layout:
    """The fastest way to walk all of `tensors` [N, C] in step."""
    several = n_classes <= FEW_CLASSES
    if any(t.stride(1) != 1 or (several and t.stride(0) != n_classes) for t in tensors):
        return Layout(0, 0)
    # A sector of memory in the narrowest type (half of one for codes); a group of a wider type takes several.
    group = min(16, 32 // min(t.element_size() for t in tensors))
    positions = {(t.data_ptr() // t.element_size() % group, t.stride(0) % group) for t in tensors}
    if len(positions) > 1:
        return Layout(1, 0)
    ((offset, stride),) = positions
    if several:
        # Every tile begins where a group does, if the first does and its rows fill groups.
        rows, classes, *_ = choose_config(n_classes, Layout(group, 0), "float32")
        slack = group - 1 if offset or rows * n_classes % group else 0
        return Layout(group, slack) if rows * (classes - n_classes) >= slack else Layout(1, 0)
    slack = group - 1 if offset or stride else 0
    return Layout(group, slack)
