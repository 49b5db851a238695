"""The kernels for rows of C classes, and their configurations.

Up to `FEW_CLASSES` classes, a program has a tile of several rows. Up to at most `LONGEST`, it has a tile of one row
(`device/tile.py`). Longer rows are divided into chunks (`device/stream.py`). The numbers are the fastest of some
hundred combinations that were run on an H100 and do not spill registers.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

import triton

# The types of logits, in the order of their numbers in a kernel.
KINDS = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16", torch.uint8: "uint8"}
# Logits of a tile of several rows, and of the longest row that is one tile.
TILE, LONGEST = 512, 8192
# Up to this many classes, a tile has several rows.
FEW_CLASSES = 128
# Places of the longest list that a program for a chunk compares.
LONGEST_LIST_OF_A_CHUNK = 512
# Of a multiprocessor of NVIDIA; AMD's have about as many programs.
_REGISTERS = 65536


class Logits(NamedTuple):
    """The properties of a tensor [N, C] that its layout depends on; of its address only the last bits."""

    dtype: torch.dtype
    strides: tuple[int, ...]
    address: int

    def element_size(self) -> int:
        return self.dtype.itemsize

    def stride(self, dim: int) -> int:
        return self.strides[dim]

    def data_ptr(self) -> int:
        return self.address


class Config(NamedTuple):
    """The tile of a program, its threads, and the registers that a thread may have."""

    rows: int
    classes: int
    threads: int
    registers: int


class Layout(NamedTuple):
    """How tiles are moved, see `device/memory.py`."""

    group: int
    """Elements that are moved at once; 0: one by one, with any strides."""
    slack: int
    """How many elements before a row its tile may begin."""


class Demands(NamedTuple):
    """What a call asks of its kernels, as far as their configurations depend on it."""

    layout: Layout
    teacher: str
    """A type among `KINDS`, or "mixed"."""
    divergence: str = "forward_kl"
    ce: bool = False
    stats: bool = False
    list_length: int = 0
    """Places of a list; 0: no teacher lists some classes."""

    @property
    def extras(self) -> bool:
        return self.ce or self.stats

    @property
    def laborious(self) -> bool:
        """A 64-bit offset for each element, or code for several types, needs registers."""
        return self.layout.group == 0 or self.teacher == "mixed"


def choose_config(n_classes: int, demands: Demands) -> Config | None:
    """The default configuration for rows of `n_classes` that fit on chip; None: rows are divided into chunks.

    A thread has up to 16 logits of a tile (32 of the longest), and the fewest registers without spilling: the more
    programs a multiprocessor holds, the better they hide the latency of memory. Divergences other than the forward KL
    hold more values of each logit.
    """
    if demands.list_length:
        return None
    stats, laborious = demands.stats, demands.laborious
    classes = triton.next_power_of_2(n_classes)
    forward = demands.divergence == "forward_kl"
    is_8_bit = demands.teacher == "uint8"

    def registers(plain: int, extra: int, most: int, other: int) -> int:
        """`other`: for the other divergences."""
        if not forward:
            return 255 if laborious else other + 24 * is_8_bit
        return most if laborious else extra if demands.extras or is_8_bit else plain

    if classes <= FEW_CLASSES:
        if classes <= 4:
            return Config(64, classes, 64, registers(64, 96, 144 if stats else 128, 112))
        if classes <= 16:
            # One row per thread: otherwise several threads read a label, which is as large as two logits.
            return Config(64 if forward else 32, classes, 64, registers(104, 144, 255, 168))
        if classes == 32:
            return Config(8, classes, 32, registers(88, 128, 168, 168))
        return Config(TILE // classes, classes, 64, registers(88, 112, 144, 168))
    classes = triton.next_power_of_2(n_classes + demands.layout.slack)
    if classes <= 256:
        return Config(1, classes, 32, registers(72, 112, 144, 120))
    if classes <= 4096:
        # Their tiles of 16 logits a thread spill up to 24 bytes on sm_120.
        per_thread = 8 if demands.divergence.startswith("skew") and classes <= 2048 else 16
        return Config(
            1, classes, classes // per_thread, registers(104, 168 if stats else 136, 200 if stats else 152, 176)
        )
    # Reading rows twice is faster than such a tile in half precision, and where a row fills little of the tile.
    plain = demands.teacher == "float32" and forward and not stats and not laborious
    if classes == LONGEST and n_classes > 3 * LONGEST // 4 and plain:
        return Config(1, classes, classes // 32, 255)
    return None


class Chunks(NamedTuple):
    """The configurations for longer rows, see `device/stream.py`."""

    one_read: Config | None
    statistics: Config
    terms: Config
    gradient: Config
    rows: Config


def choose_chunks(demands: Demands) -> Chunks:
    """The configurations for longer rows.

    The statistics are mostly sums, and a program of a single warp need not exchange them between warps. A list is one
    tile, for which the threads of a chunk are too few if it is long.
    """
    stats, divergence, length = demands.stats, demands.divergence, demands.list_length
    forward = divergence == "forward_kl"
    rows = Config(1, 1024, min(256, max(64, length // 8)), 255)
    one_read = None
    if length <= LONGEST_LIST_OF_A_CHUNK:
        # A program of a single warp takes 23 instructions for each logit, one of two warps 32, and fewer registers.
        plain = forward and not (stats or demands.laborious or length)
        registers = 216 if length else 192 if demands.laborious else 144
        one_read = Config(1, 1024, 32, 192 if demands.ce else 168) if plain else Config(1, 1024, 64, registers)
    if demands.laborious or length:
        gradient = Config(1, 2048, 128, 168 if forward else 192)
        return Chunks(one_read, Config(1, 1024, 32, 255), Config(1, 1024, 64, 255), gradient, rows)
    fewest = 168 if stats else 152 if demands.extras else 128
    statistics = Config(1, 1024, 32, fewest if forward else 255)
    gradient = Config(1, 2048, 128, (96 if demands.extras else 64) if forward else 144)
    # A warp of 32 logits a thread would spill with the last of them.
    warps = 2 if divergence == "skew_reverse_kl" else 1
    terms = Config(1, 1024, 32 * warps, 224 if demands.teacher == "uint8" else 176)
    return Chunks(one_read, statistics, terms, gradient, rows)


def choose_lag(n_chunks: int, config: Config, multiprocessors: int) -> int:
    """By how many rows the steps of one read follow each other.

    With half of the programs that run at once in between, hardly one waits, and the logits of all are in the cache.
    """
    resident = multiprocessors * min(32, _REGISTERS // (config.threads * config.registers))
    return max(1, resident // 2 // n_chunks)


def choose_layout(
    n_classes: int,
    tensors: Sequence[Tensor | Logits],
    routed: bool = False,
    divergence: str = "forward_kl",
    lists: bool = False,
) -> Layout:
    """The fastest layout that all of `tensors` [N, C] allow; `routed`: a row may have another place in each of them.

    `lists`: whether a teacher lists some classes.
    """
    several = n_classes <= FEW_CLASSES and not lists
    if (several and routed) or any(t.stride(1) != 1 or (several and t.stride(0) != n_classes) for t in tensors):
        return Layout(0, 0)
    # A sector of memory in the narrowest type (half of one for codes); a group of a wider type has several.
    narrowest = min(t.element_size() for t in tensors)
    group = min(16, 32 // narrowest)
    positions = [(t.data_ptr() // t.element_size(), t.stride(0)) for t in tensors]
    if not several and narrowest == 2 and all(p % 8 == 0 and stride % 8 == 0 for p, stride in positions):
        # Half a sector: every row consists of complete groups, and no element is moved by itself.
        group = 8
    places = {(p % group, stride % group) for p, stride in positions}
    if len(places) > 1:
        return Layout(1, 0)
    ((offset, stride),) = places
    if routed and stride:
        return Layout(1, 0)
    if several:
        # Every tile begins at a group if the first one does and the rows of a tile fill groups.
        config = choose_config(n_classes, Demands(Layout(group, 0), "float32", divergence))
        assert config is not None
        rows, classes, *_ = config
        slack = group - 1 if offset or rows * n_classes % group else 0
        return Layout(group, slack) if rows * (classes - n_classes) >= slack else Layout(1, 0)
    slack = group - 1 if offset or stride else 0
    return Layout(group, slack)
