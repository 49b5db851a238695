"""Figures of the compiled Triton kernels, without a GPU: every kernel and default configuration, for five chips.

    python benchmarks/gpu_static.py                    the table
    python benchmarks/gpu_static.py --targets sm_90 --json FILE --times FILE

Registers, spilled bytes and shared memory are read from the binary. The narrowest load of logits and the bytes per
logit are counted in its instructions. Occupancy follows from registers, threads and shared memory. The times in the
second table are bytes divided by the bandwidth in the chip's data sheet: predicted, not measured.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple, get_args
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from amtss_fast._system.files import write_atomically
from amtss_fast.loss import LossOptions
from amtss_fast.loss.backends.triton import launch
from amtss_fast.loss.backends.triton.binary import Launch
from amtss_fast.loss.backends.triton.device import memory
from amtss_fast.loss.contract import LossInputs
from amtss_fast.loss.options import Divergence


class Chip(NamedTuple):
    """A compilation target, and the limits of one of its multiprocessors."""

    target: GPUTarget
    name: str
    bytes_per_second: float
    registers: int
    shared: int
    shared_per_program: int
    warps: int
    programs: int


# Bandwidths: NVIDIA's and AMD's data sheets. gfx942: 4 SIMDs of 512 registers and 8 waves of 64 threads.
CHIPS = {
    "sm_80": Chip(GPUTarget("cuda", 80, 32), "A100 80 GB", 2.04e12, 65536, 167936, 166912, 64, 32),
    "sm_90": Chip(GPUTarget("cuda", 90, 32), "H100 SXM", 3.35e12, 65536, 233472, 232448, 64, 32),
    "sm_100": Chip(GPUTarget("cuda", 100, 32), "B200", 8.0e12, 65536, 233472, 232448, 64, 32),
    "sm_120": Chip(GPUTarget("cuda", 120, 32), "RTX 5090", 1.79e12, 65536, 102400, 101376, 48, 24),
    "gfx942": Chip(GPUTarget("hip", "gfx942", 64), "MI300X", 5.3e12, 4 * 512 * 64, 65536, 65536, 32, 16),
}

# Types of student and teachers. The first is compiled in every configuration for the usual calls; other types and calls
# in one of each kind.
TYPES = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float32, torch.uint8),
]
CLASSES = [2, 3, 8, 15, 32, 64, 100, 256, 500, 1024, 2000, 4000, 5000, 8000, 250_002]
CLASSES_OF_OTHERS = [3, 100, 256, 1024, 5000, 250_002]
# Divergences other than the forward KL, and classes for one of each kind of their tiles and chunks.
OTHER_DIVERGENCES: tuple[Divergence, ...] = get_args(Divergence)[1:]
CLASSES_OF_DIVERGENCES = [3, 15, 32, 100, 256, 1024, 250_002]
# Classes that a teacher with a list gives of a row, and how many classes there are.
LISTED, CLASSES_OF_LISTS = 64, 250_002
# Ways to call the loss, see `launches`.
CALLS = ["loss", "labels", "all", "two reads", "strided", "mixed"]

_SHORT = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.uint8: "u8",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.bool: "i1",
}


class Static(NamedTuple):
    """One kernel in one configuration on one chip."""

    kernel: str
    config: str
    call: str
    """See `launches`."""
    divergence: str
    target: str
    registers: int
    spill_bytes: int
    shared_bytes: int
    fits_shared: bool
    load_bits: int
    read_bytes_per_logit: float | None
    """By each step of a row. None: the kernel reads no logits, or several types of them."""
    written_bytes_per_logit: float | None
    occupancy: float


def _on_device(n_rows: int, n_classes: int, dtype: torch.dtype) -> torch.Tensor:
    """A tensor that begins where a GPU's allocator would let it begin."""
    size = n_rows * n_classes * dtype.itemsize
    memory = torch.empty(size + 512, dtype=torch.uint8)
    begin = -memory.data_ptr() % 512
    return memory[begin : begin + size].view(dtype).view(n_rows, n_classes)


def loss_inputs(
    student: torch.Tensor,
    teachers: list[torch.Tensor],
    row_max: list[torch.Tensor | None],
    step: list[torch.Tensor | None],
    **given: Any,
) -> LossInputs:
    """What a backend gets, with None for what is not `given`."""
    lists: dict[str, Any] = {"teacher_rows": [], "teacher_indices": [], "teacher_bucket": []}
    nothing: dict[str, Any] = dict.fromkeys(LossInputs._fields[4:])
    return LossInputs(student, teachers, row_max, step, **(nothing | lists | given))


def launches(
    n_classes: int,
    student: torch.dtype,
    teacher: torch.dtype,
    call: str = "all",
    divergence: Divergence = "forward_kl",
) -> list[Launch]:
    """What the library would launch.

    `call`: "loss" and its gradient, without labels and weights; "labels": with both, as in training; "all" options and
    outputs at once; "two reads": the same, but long rows are read twice, none for others; "strided": the same as "all"
    with logits of any strides; "mixed": the same with 17 teachers of any type and strides, beside a student of type
    `student`; "lists": the same with a teacher that lists `LISTED` classes beside one with logits.
    """
    n_rows, n_teachers = 16, 17 if call == "mixed" else 2
    kinds = [*_SHORT][:4] * 5 if call == "mixed" else [teacher] * n_teachers
    logits = [_on_device(n_rows, n_classes, dtype) for dtype in (student, *kinds[:n_teachers])]
    if call == "strided":
        logits = [_on_device(n_classes, n_rows, t.dtype).t() for t in logits]
    elif call == "mixed":
        logits[-1] = _on_device(n_classes, n_rows, logits[-1].dtype).t()
    rows = torch.empty(n_rows)
    scales = [rows if t.dtype == torch.uint8 else None for t in logits[1:]]
    rest: dict[str, Any] = {"num_items": torch.tensor(16.0)}
    if call == "labels":
        rest |= {"labels": torch.zeros(n_rows, dtype=torch.int64), "sample_weight": rows}
    elif call != "loss":
        prior = torch.empty(n_teachers, n_rows)
        rest |= {"labels": torch.zeros(n_rows, dtype=torch.int64), "teacher_prior": prior, "teacher_mask": prior > 0}
        rest["sample_weight"] = rows
    if call == "lists":
        logits[1], scales[0] = torch.empty(n_rows, LISTED), None
        rest["teacher_indices"] = [torch.empty(n_rows, LISTED, dtype=torch.int64), None]
        rest["teacher_bucket"] = [True, False]
    planned: list[Launch]
    inputs = loss_inputs(logits[0], logits[1:], scales, scales, **rest)
    options = LossOptions(ce_weight=0.0 if call == "loss" else 0.5, label_smoothing=0.1, divergence=divergence)
    with mock.patch.dict(os.environ, AMTSS_TWO_READS="1" if call == "two reads" else ""):
        planned, _ = launch.prepare(inputs, options, need_grad=True, need_stats=call not in ("loss", "labels"))
    # Without the kernels that write the table of teachers and sum over the rows.
    planned = [p for p in planned if "n_classes" in p.arguments]
    return [] if call == "two reads" and len(planned) == 1 else planned


def name_of(planned: Launch) -> str:
    """What the launch does: "tile", "one read", or one of the steps of two reads."""
    arguments = planned.arguments
    if "STEP" not in arguments:
        return "tile"
    if arguments["STEP"] == "all":
        return "one read"
    steps = ["statistics", "terms", "gradient"] if arguments["COMPARES"] else ["statistics", "gradient"]
    name = steps[arguments["ROLE"]]
    return name if arguments["STEP"] == "chunks" else f"join {name}"


def compile_for(planned: Launch, chip: Chip) -> Any:
    """The launch as Triton's just-in-time compiler would compile it on that chip."""
    signature, constants = {}, {}
    binary, arguments = planned.binary, planned.arguments
    for parameter in binary.kernel.params:
        value = arguments[parameter.name]
        if parameter.is_constexpr or value is None:
            signature[parameter.name] = "constexpr"
            constants[parameter.name] = value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = "*" + _SHORT[value.dtype]
        else:
            signature[parameter.name] = parameter.annotation_type
    source = ASTSource(fn=binary.kernel, signature=signature, constexprs=constants)
    options = binary.options(chip.target)
    return triton.compile(source, target=chip.target, options=options)


def examine(planned: Launch, target: str, call: str) -> Static:
    """Compile a launch and count."""
    chip = CHIPS[target]
    compiled = compile_for(planned, chip)
    nvidia = chip.target.backend == "cuda"
    registers, spilled = _nvidia_usage(compiled.asm["cubin"]) if nvidia else _amd_usage(compiled.asm["amdgcn"])
    moves = _moves(compiled.asm["ptx" if nvidia else "amdgcn"])
    arguments, name = planned.arguments, name_of(planned)
    threads = max(planned.binary.threads, chip.target.warp_size)
    shared = compiled.metadata.shared
    warps = threads // chip.target.warp_size
    # A thread gets a multiple of eight registers.
    programs = min(
        chip.programs,
        chip.warps // warps,
        chip.registers // (-(-registers // 8) * 8 * threads),
        chip.shared // shared if shared else chip.programs,
    )
    joins = name.startswith("join")
    rows = arguments.get("ROWS", 1)
    cut = f"{arguments['STUDENT']}/{arguments['TEACHER']} {rows} x {arguments['CLASSES']}"
    if joins:
        cut = f"{arguments['CHUNKS']} chunks"
    # A kernel for mixed types contains the loads of all types and executes those of one.
    counted = not joins and arguments["TEACHER"] != "mixed"
    # With one read, each step of a row has its own programs.
    steps = 1 if name != "one read" else 3 if arguments["COMPARES"] else 2
    logits = rows * arguments["CLASSES"] * steps
    return Static(
        name,
        f"{cut}, {planned.binary.threads} threads",
        call,
        arguments["DIVERGENCE"],
        target,
        registers,
        spilled,
        shared,
        shared <= chip.shared_per_program,
        min(moves["load"], default=0),
        # One student's and one teacher's logit.
        sum(moves["load"]) / 8 * threads / logits / 2 if counted else None,
        sum(moves["store"]) / 8 * threads / logits * steps if counted else None,
        programs * warps / chip.warps,
    )


def _nvidia_usage(cubin: bytes) -> tuple[int, int]:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [os.fspath(tool), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    assert found is not None, text
    # No kernel here has local arrays: the stack holds only spilled registers.
    return int(found[1]), int(found[2]) + int(found[3])


def _amd_usage(assembly: str) -> tuple[int, int]:
    def number(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", assembly)
        assert found is not None, name
        return int(found[1])

    return number("vgpr_count"), number("private_segment_fixed_size")


@cache
def _moving_lines() -> dict[int, str]:
    """The lines of memory.py that load and store tiles of logits, each element of a tile once.

    Without those for elements of incomplete groups, and those that move tiles of complete groups without a mask.
    """
    lines = Path(memory.__file__).read_text().splitlines()
    texts = {
        "x = tl.load(pointers, whole, other=OUTSIDE)": "load",
        "x = tl.load(pointers, whole & wanted, other=OUTSIDE, eviction_policy=EVICTION)": "load",
        "x = tl.load(pointer + strided, inside & across(wanted), other=OUTSIDE, eviction_policy=EVICTION)": "load",
        "tl.store(pointers, x, whole)": "store",
        "tl.store(pointers, x, whole, eviction_policy=EVICTION)": "store",
        "tl.store(pointer + strided, x, inside, eviction_policy=EVICTION)": "store",
    }
    found = {number: line.strip() for number, line in enumerate(lines, 1) if line.strip() in texts}
    assert set(found.values()) == set(texts), "memory.py has other lines that move tiles"
    return {number: texts[line] for number, line in found.items()}


_LOCATION = re.compile(r"\.loc\s.*?[;/]+ (\w+)\.py:(\d+):")
_NVIDIA = re.compile(r"\b(?:ld|st)\.global[.\w:]*?(?:\.v(\d))?\.[busf](\d+)\b")
_AMD = re.compile(r"\b(?:global|buffer|flat)_(?:load|store)_(\w+)")
_AMD_BITS = {"dword": 32, "dwordx2": 64, "dwordx3": 96, "dwordx4": 128, "short": 16, "ushort": 16, "sshort": 16}
_AMD_BITS |= {"byte": 8, "ubyte": 8, "sbyte": 8}


def _moves(assembly: str) -> dict[str, list[int]]:
    """Bits of each instruction that moves logits: those that the compiler attributes to `_moving_lines`.

    Where it makes several versions of a loop, all of them count, though one runs.
    """
    moves: dict[str, list[int]] = {"load": [], "store": []}
    place = ("", 0)
    for line in assembly.splitlines():
        if location := _LOCATION.search(line):
            place = (location[1], int(location[2]))
        kind = _moving_lines().get(place[1]) if place[0] == "memory" else None
        if kind is None:
            continue
        if found := _NVIDIA.search(line):
            moves[kind].append(int(found[1] or 1) * int(found[2]))
        elif found := _AMD.search(line):
            moves[kind].append(_AMD_BITS[re.sub(r"_d16.*", "", found[1])])
    return moves


def survey(targets: list[str]) -> Iterator[Static]:
    """Every kernel in every default configuration."""
    for student, teacher in TYPES:
        first = (student, teacher) == TYPES[0]
        for call in CALLS:
            # "mixed" has its own types of teachers.
            if call == "mixed" and not first:
                continue
            usual = first and call in ("loss", "all")
            for n_classes in CLASSES if usual else CLASSES_OF_OTHERS:
                for planned in launches(n_classes, student, teacher, call):
                    for target in targets:
                        yield examine(planned, target, call)
    for divergence in OTHER_DIVERGENCES:
        for n_classes in CLASSES_OF_DIVERGENCES:
            for call in ("all", "two reads"):
                for planned in launches(n_classes, *TYPES[0], call, divergence):
                    for target in targets:
                        yield examine(planned, target, call)
    for divergence in ("forward_kl", *OTHER_DIVERGENCES):
        for planned in launches(CLASSES_OF_LISTS, *TYPES[0], "lists", divergence):
            for target in targets:
                yield examine(planned, target, "lists")


def _bytes(x: float | None) -> str:
    return f"{'-':>10}" if x is None else f"{x:10.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", default=",".join(CHIPS), help="comma-separated (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="the table")
    parser.add_argument("--times", type=Path, metavar="FILE", help="the predicted times")
    args = parser.parse_args()
    targets = args.targets.split(",")
    if unknown := set(targets) - set(CHIPS):
        parser.error(f"--targets must be among {list(CHIPS)}, got {sorted(unknown)}")
    columns = ("registers", "spilled", "shared", "fits", "load bits", "read/logit", "written", "occupancy")
    print(f"{'kernel':17}{'configuration':42}{'call':8}{'divergence':17}{'target':7}", *(f"{c:>10}" for c in columns))
    results = []
    for s in survey(targets):
        results.append(s)
        figures = (s.registers, s.spill_bytes, s.shared_bytes, "yes" if s.fits_shared else "NO", s.load_bits)
        print(
            f"{s.kernel:17}{s.config:42}{s.call:8}{s.divergence:17}{s.target:7}", *(f"{x:>10}" for x in figures),
            f"{_bytes(s.read_bytes_per_logit)} {_bytes(s.written_bytes_per_logit)} {s.occupancy:10.0%}", flush=True,
        )  # fmt: skip

    print("\npredicted milliseconds, forward and backward: bytes / bandwidth of the data sheet")
    print(f"{'case':36}", *(f"{CHIPS[t].name:>10}" for t in targets))
    times = list(predict(targets))
    for case, row in groupby(times, key=lambda time: time["case"]):
        print(f"{case:36}", *(f"{time['milliseconds']:10.4f}" for time in row))
    versions = {"triton": triton.__version__, "source": "predicted"}
    if args.json:
        write_json([s._asdict() | versions for s in results], args.json)
    if args.times:
        write_json([time | versions for time in times], args.times)


def predict(targets: list[str]) -> Iterator[dict[str, Any]]:
    """For each case of the benchmark, what its bytes would take on each chip."""
    # Imported here, because the cases need the CPU kernel and compiling does not.
    from cases import NAMED

    for case in NAMED:
        for target in targets:
            chip = CHIPS[target]
            milliseconds = case.bytes / chip.bytes_per_second * 1e3
            yield {"case": str(case), "chip": chip.name, "bytes": case.bytes, "milliseconds": milliseconds}


def write_json(rows: list[dict[str, Any]], path: Path) -> None:
    # One row per line, so that diffs show what changed.
    write_atomically(path, "[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")


if __name__ == "__main__":
    main()
