"""What compilers say about the Triton kernels, without a GPU: every kernel and default configuration, for five chips.

    python benchmarks/gpu_static.py                    the table
    python benchmarks/gpu_static.py --targets sm_90 --json FILE

Registers, spilled bytes and shared memory are read from the binary, the width of loads and the bytes of one logit are
counted in its instructions, occupancy follows from registers, threads and shared memory. The times in the second table
are bytes divided by the bandwidth in the chip's data sheet: predicted, measured on no GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from amtss_fast._triton import launch


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

# Types of student and teachers. Every configuration with the first, those of each regime with the others.
TYPES = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float32, torch.uint8),
]
CLASSES = [2, 3, 8, 15, 32, 64, 100, 256, 500, 1024, 2000, 4000, 5000, 250_002]
CLASSES_OF_OTHER_TYPES = [3, 100, 1024, 5000, 250_002]

_SHORT = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.uint8: "u8",
    torch.int64: "i64",
    torch.bool: "i1",
}


class Static(NamedTuple):
    """One kernel in one configuration on one chip."""

    kernel: str
    config: str
    target: str
    registers: int
    spill_bytes: int
    shared_bytes: int
    fits_shared: bool
    load_bits: int
    read_bytes_per_logit: float
    written_bytes_per_logit: float
    occupancy: float


def _on_device(n_rows: int, n_classes: int, dtype: torch.dtype) -> torch.Tensor:
    """A tensor that begins where a GPU's allocator would let it begin."""
    size = n_rows * n_classes * dtype.itemsize
    memory = torch.empty(size + 512, dtype=torch.uint8)
    begin = -memory.data_ptr() % 512
    return memory[begin : begin + size].view(dtype).view(n_rows, n_classes)


def launches(
    n_classes: int, student: torch.dtype, teacher: torch.dtype, full: bool = True, n_rows: int = 16
) -> list[launch.Launch]:
    """What the library would launch for two teachers; `full`: with cross entropy, labels and statistics."""
    case = [_on_device(n_rows, n_classes, dtype) for dtype in (student, teacher, teacher)]
    rows = torch.empty(n_rows)
    scales = [rows, rows] if teacher == torch.uint8 else []
    planned: list[launch.Launch]
    planned, _, _ = launch.prepare(
        case[0], case[1:], scales, scales, torch.zeros(n_rows, dtype=torch.int64) if full else None, None, None, None,
        None, 2.0, "label_margin", 1.0, 1.0, 0.5 if full else 0.0, 0.1, -100, -1, "mean", True, full,
    )  # fmt: skip
    return planned


def compile_for(planned: launch.Launch, chip: Chip) -> Any:
    """The launch as Triton's just-in-time compiler would compile it on that chip."""
    signature, constants = {}, {}
    for parameter in planned.kernel.params:
        value = planned.arguments[parameter.name]
        if parameter.is_constexpr or value is None:
            signature[parameter.name] = "constexpr"
            constants[parameter.name] = value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = "*" + _SHORT[value.dtype]
        else:
            signature[parameter.name] = parameter.annotation_type
    source = ASTSource(fn=planned.kernel, signature=signature, constexprs=constants)
    options = planned.options(chip.target.warp_size, chip.target.backend)
    return triton.compile(source, target=chip.target, options=options)


def examine(planned: launch.Launch, target: str) -> Static:
    """Compile a launch and count."""
    chip = CHIPS[target]
    compiled = compile_for(planned, chip)
    nvidia = chip.target.backend == "cuda"
    registers, spilled = _nvidia_usage(compiled.asm["cubin"]) if nvidia else _amd_usage(compiled.asm["amdgcn"])
    moves = _nvidia_moves(compiled.asm["ptx"]) if nvidia else _amd_moves(compiled.asm["amdgcn"])
    arguments = planned.arguments
    threads = max(planned.threads, chip.target.warp_size)
    columns = arguments.get("ROWS", 1) * arguments.get("CLASSES", 0)
    item = {t: s.itemsize for s, t in launch.KINDS.items()}
    loaded = [item[arguments["STUDENT"]], item[arguments["TEACHER"]]]
    stored = [] if arguments.get("grad") is None else [arguments["grad"].element_size()]
    load_bits, read = _width(moves["load"], threads, columns, loaded)
    _, written = _width(moves["store"], threads, columns, stored)
    shared = compiled.metadata.shared
    warps = threads // chip.target.warp_size
    # Registers are given out in eights to each thread.
    programs = min(
        chip.programs,
        chip.warps // warps,
        chip.registers // (-(-registers // 8) * 8 * threads),
        chip.shared // shared if shared else chip.programs,
    )
    rows = f"{arguments['ROWS']} x " if "ROWS" in arguments else ""
    config = f"{arguments['STUDENT']}/{arguments['TEACHER']} {rows}{arguments.get('CLASSES', arguments.get('CHUNKS'))}"
    return Static(
        planned.kernel.fn.__name__,
        f"{config}, {planned.threads} threads",
        target,
        registers,
        spilled,
        shared,
        shared <= chip.shared_per_program,
        load_bits,
        # One student's and one teacher's logit.
        read / columns / 2 if columns else 0.0,
        written / columns if columns else 0.0,
        programs * warps / chip.warps,
    )


def _width(moved: dict[int, int], threads: int, columns: int, sizes: list[int]) -> tuple[int, int]:
    """The narrowest of the widest accesses that move tiles of `sizes` bytes an element, and what these move."""
    for size in sizes:
        # The code for incomplete groups, element by element: it runs for a few elements of a row.
        moved[8 * size] = moved.get(8 * size, 0) - columns // threads
    total = 0
    for bits in sorted(moved, reverse=True):
        if total >= columns * sum(sizes):
            break
        total += moved[bits] * threads * bits // 8
        narrowest = bits
    return (narrowest, total) if total else (0, 0)


def _nvidia_usage(cubin: bytes) -> tuple[int, int]:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [os.fspath(tool), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", text)
    assert found is not None, text
    # No kernel here has arrays of its own: what lies on the stack was spilled.
    return int(found[1]), int(found[2]) + int(found[3])


def _amd_usage(assembly: str) -> tuple[int, int]:
    def number(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", assembly)
        assert found is not None, name
        return int(found[1])

    return number("vgpr_count"), number("private_segment_fixed_size")


def _count(matches: Iterator[tuple[str, int]]) -> dict[str, dict[int, int]]:
    moves: dict[str, dict[int, int]] = {"load": {}, "store": {}}
    for kind, bits in matches:
        moves[kind][bits] = moves[kind].get(bits, 0) + 1
    return moves


def _nvidia_moves(ptx: str) -> dict[str, dict[int, int]]:
    found = re.finditer(r"\b(ld|st)\.global[.\w:]*?(?:\.v(\d))?\.[busf](\d+)", ptx)
    return _count(({"ld": "load", "st": "store"}[m[1]], int(m[2] or 1) * int(m[3])) for m in found)


def _amd_moves(assembly: str) -> dict[str, dict[int, int]]:
    sizes = {"dword": 32, "dwordx2": 64, "dwordx3": 96, "dwordx4": 128, "short": 16, "ushort": 16, "byte": 8}
    sizes |= {"ubyte": 8, "sbyte": 8, "sshort": 16}
    found = re.finditer(r"\b(?:global|buffer|flat)_(load|store)_(\w+?)(?:_d16(?:_hi)?)?\s", assembly)
    return _count((m[1], sizes[m[2].removesuffix("_d16").removesuffix("_d16_hi")]) for m in found)


def survey(targets: list[str]) -> Iterator[Static]:
    """Every kernel in every default configuration."""
    for student, teacher in TYPES:
        for n_classes in CLASSES if (student, teacher) == TYPES[0] else CLASSES_OF_OTHER_TYPES:
            for full in (True, False):
                for planned in launches(n_classes, student, teacher, full):
                    for target in targets:
                        yield examine(planned, target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", default=",".join(CHIPS), help="comma-separated (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    targets = args.targets.split(",")
    if unknown := set(targets) - set(CHIPS):
        parser.error(f"--targets must be among {list(CHIPS)}, got {sorted(unknown)}")
    columns = ("registers", "spilled", "shared", "fits", "load bits", "read/logit", "written", "occupancy")
    print(f"{'kernel':17}{'configuration':42}{'target':7}", *(f"{c:>10}" for c in columns))
    results = []
    for s in survey(targets):
        results.append(s)
        figures = (s.registers, s.spill_bytes, s.shared_bytes, "yes" if s.fits_shared else "NO", s.load_bits)
        print(
            f"{s.kernel:17}{s.config:42}{s.target:7}", *(f"{x:>10}" for x in figures),
            f"{s.read_bytes_per_logit:10.2f} {s.written_bytes_per_logit:10.2f} {s.occupancy:10.0%}", flush=True,
        )  # fmt: skip

    # Imported here: the cases know the CPU's kernel too, which compilation does not need.
    from cases import NAMED

    print("\npredicted milliseconds, forward and backward: bytes / bandwidth of the data sheet")
    print(f"{'case':36}", *(f"{CHIPS[t].name:>10}" for t in targets))
    for case in NAMED:
        logits = case.n * case.c * (case.k + 1) * case.dtype.itemsize
        # Chunks are read a second time for the gradient.
        bytes_moved = case.bytes + (logits if case.c > launch.LONGEST else 0)
        print(f"{case!s:36}", *(f"{bytes_moved / CHIPS[t].bytes_per_second * 1e3:10.4f}" for t in targets))
    if args.json:
        temporary = args.json.with_suffix(".tmp")
        temporary.write_text(json.dumps([{**s._asdict(), "source": "predicted"} for s in results], indent=1) + "\n")
        os.replace(temporary, args.json)


if __name__ == "__main__":
    main()
