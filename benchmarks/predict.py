"""What the CUDA kernels should take on GPUs that they have not run on: predicted, not measured.

    python benchmarks/predict.py

Counts instructions and sectors by executing the kernels' PTX (tests/ptx), and sets them against published rates. A call
takes the longest of: its bytes at the memory's bandwidth; what its blocks wait for, one thing behind the other (a trip
for the first slot, then rows, of which one stream's are on their way two at a time and those of two streams alone); its
instructions at one a clock and scheduler. Moves between registers are left out, since ptxas leaves them out. Writes
docs/gpu-predicted.md and docs/gpu-predicted.png. Needs nvcc.
"""

from __future__ import annotations

import functools
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import torch
from matplotlib import pyplot

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "ptx")]

from conftest import unit  # noqa: E402
from emulated import Device, kernel_name, nvcc  # noqa: E402

from axiscap import _C  # noqa: E402


@dataclass(frozen=True)
class Gpu:
    """Published rates; latency: a memory access under load, of the order that micro-benchmarks plots."""

    name: str
    architecture: int
    processors: int
    bandwidth: float  # bytes a second
    clock: float  # Hz
    threads: int  # a processor holds at most
    shared: int  # bytes of shared memory, a processor
    latency: float  # seconds


GPUS = (
    Gpu("A100 80GB", 80, 108, 2.04e12, 1.41e9, 2048, 164 << 10, 600e-9),
    Gpu("L40S", 89, 142, 0.864e12, 2.52e9, 1536, 100 << 10, 600e-9),
    Gpu("H100 SXM", 90, 132, 3.35e12, 1.98e9, 2048, 228 << 10, 650e-9),
    Gpu("H200", 90, 132, 4.8e12, 1.98e9, 2048, 228 << 10, 700e-9),
    Gpu("B200", 100, 148, 8.0e12, 1.97e9, 2048, 228 << 10, 800e-9),
    Gpu("RTX 5090", 120, 170, 1.79e12, 2.41e9, 1536, 100 << 10, 700e-9),
)
CASES = (
    ("cap, none fire", "cap", -1e9),
    ("cap, all fire", "cap", 1e3),
    ("cap_residual, none fire", "cap_residual", -1e9),
    ("cap_residual, all fire", "cap_residual", 1e3),
    ("norm with cap, none fire", "norm", -1e9),
    ("norm with cap, all fire", "norm", 1e3),
    ("norm in fp8 with cap, none fire", "norm_fp8", -1e9),
    ("norm in fp8 with cap, all fire", "norm_fp8", 1e3),
)
SHOWN = ("cap, none fire", "cap, all fire", "norm with cap, none fire")  # row by row
#: Clocks from a row's arrival to its place being free for the next: some fifteen shuffles and shared-memory accesses of
#: the sums, a barrier, and the arithmetic of one thread.
CHAIN = 600
ROWS = (1, 8, 64, 512, 4096)
SIZES = (576, 2048, 4096, 8192, 16384)


INTRODUCTION = (
    "Bytes moved: the bytes of the streams, relative to one read of each and one write of those that changed.",
    "Issue slots: the instructions of a row, at one per clock and scheduler, relative to the memory time of its",
    "bytes at full bandwidth; the goal is at most a third, which leaves room for effects that the count ignores.",
    "In flight: the bytes that the resident blocks have requested while they wait, relative to latency times",
    "bandwidth.",
)


@functools.cache
def registers(architecture: int) -> dict[str, int]:
    """Registers a thread of each kernel, from ptxas."""
    with tempfile.TemporaryDirectory() as folder:
        command = [nvcc(), "-std=c++17", "-O3", "-cubin", f"-arch=sm_{architecture}", "-Xptxas", "-v"]
        source = [f"-I{ROOT / 'csrc'}", str(ROOT / "csrc/launchers/cuda.cu"), "-o", f"{folder}/out"]
        said = subprocess.run([*command, *source], check=True, capture_output=True, text=True).stderr
    found = re.findall(r"entry function '(\S+)'.*?Used (\d+) registers", said, re.S)
    return {name: int(count) for name, count in found}


def sources(op: str) -> int:
    """Streams that an op reads."""
    return 1 if op == "cap" else 2


def least(op: str, floor: float, size: int) -> float:
    """Bytes that a row must move: every stream is read once; what fires is written, and the norm writes both, a stream
    in fp8 with half of the bytes.
    """
    written = {"norm": 2, "norm_fp8": 1.5}.get(op, int(floor > 0))
    return size * 2 * (sources(op) + written)


def count(op: str, floor: float, size: int) -> tuple[float, float]:
    """Instructions of warps and bytes moved, a row, of a block in the middle of its rows (bfloat16)."""
    totals = []
    for turns in (4, 8):  # the difference leaves out what a block does once
        rows = turns * (128 // min(128, _C.plan("bfloat16", size, 1, 1)[0]) if size <= 1024 else 1)
        hidden = torch.randn(rows, size).bfloat16()
        second = {} if op == "cap" else {"residual": hidden.clone()}
        if op in ("norm", "norm_fp8"):
            second["weight"] = torch.ones(size).bfloat16()
        if op == "norm_fp8":  # with scales of the rows' own, which takes the most
            second |= {"quantized": torch.zeros(rows, size).to(torch.float8_e4m3fn), "scales": torch.zeros(rows)}
        device = Device(resident=1)
        device.call([hidden], unit(1, 1, 1, size), torch.full((1, 1, 1), floor), **second)
        work = sum(n for name, n in device.launch.counts.items() if not name.startswith(("mov", "cvta")))
        streams = [b for b in device.memory.buffers if b.name in ("hidden0", "residual", "quantized")]
        totals.append((rows, work, sum(sum(b.sectors.values()) for b in streams) * 32))
    (rows, work, moved), (rows2, work2, moved2) = totals
    return (work2 - work) / (rows2 - rows), (moved2 - moved) / (rows2 - rows)


def resident(gpu: Gpu, used: int, size: int) -> int:
    """Blocks that a processor holds at once: by registers, threads, shared memory and their number."""
    _, block, shared, _ = _C.plan("bfloat16", size, 1, 1)
    allocated = -(-used // 8) * 8
    return min(65536 // (allocated * block), gpu.threads // block, gpu.shared // (shared + 1024), 24)


def in_flight(gpu: Gpu, used: int, size: int) -> int:
    """Bytes that a processor has asked the memory for while its blocks wait: all of their places in shared memory."""
    threads_per_row, block, _, _ = _C.plan("bfloat16", size, 1, 1)
    rows = block // threads_per_row
    return resident(gpu, used, size) * rows * size * 2 * 2  # two rows of one stream, or one of two


def predict(gpu: Gpu, used: int, op: str, size: int, rows: int, work: float, moved: float) -> tuple[float, str, float]:
    """(seconds, the limiting resource, fraction of the memory bound)."""
    threads_per_row, block, _, _ = _C.plan("bfloat16", size, rows, 1)
    grid = _C.plan("bfloat16", size, rows, resident(gpu, used, size) * gpu.processors)[3]
    groups = min(grid * (block // threads_per_row), rows)
    memory = rows * moved / gpu.bandwidth
    # A place in shared memory is filled, its row worked on, and the next one sent for; a write waits for nothing.
    places = 2 // sources(op)
    # A block's first row waits for its slot, which is read before it; the slots behind are read ahead.
    flight = gpu.latency + max(1, -(-rows // groups) / places) * (gpu.latency + CHAIN / gpu.clock)
    busy = min(grid, gpu.processors)
    issue = rows * work / (4 * busy * gpu.clock)
    seconds, why = max((memory, "bandwidth"), (flight, "latency"), (issue, "instructions"))
    return seconds, why, memory / seconds


def demands(per_row: dict[tuple[str, float, int], tuple[float, float]]) -> list[str]:
    """The table of the kernels' resources."""
    shown = [gpu for gpu in GPUS if gpu.name in ("H100 SXM", "B200")]
    lines = [
        "| op | H | bytes moved / least | instructions per row | "
        + " | ".join(f"{gpu.name}: issue slots / memory time | {gpu.name}: KiB in flight / needed" for gpu in shown)
        + " |",
        "|---|---|---|---|" + "---|---|" * len(shown),
    ]
    for title, op, floor in CASES:
        for size in SIZES:
            work, moved = per_row[op, floor, size]
            cells = [title, str(size), f"{moved / least(op, floor, size):.2f}", f"{work:.0f}"]
            for gpu in shown:
                used = used_by(gpu, op)
                slots = work / 4 / gpu.clock / (moved / (gpu.bandwidth / gpu.processors))
                needed = gpu.bandwidth * gpu.latency / gpu.processors
                cells += [f"{slots:.2f}", f"{in_flight(gpu, used, size) / 1024:.0f} / {needed / 1024:.0f}"]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


#: How a layer ends in an engine's step: the launches behind its last matrix product, and those of ours among them.
PATHS = (
    ("not capped", 1, (), "norm"),
    ("hook: cap_residual_, then the engine's norm", 2, ("cap_residual",), "norm"),
    ("fused: the cap inside the norm", 1, ("norm",), "norm"),
    ("fp8, not capped", 1, (), "norm_fp8"),
    ("fp8, hook: cap_residual_, then the engine's norm", 2, ("cap_residual",), "norm_fp8"),
    ("fp8, fused: the cap inside the norm", 1, ("norm_fp8",), "norm_fp8"),
)


def of_a_step(per_row: dict[tuple[str, float, int], tuple[float, float]], size: int = 4096) -> list[str]:
    """What a capped layer adds to one step of an engine: launches, counted bytes, predicted time."""
    shown = [gpu for gpu in GPUS if gpu.name in ("H100 SXM", "B200")]
    lines = [
        "The launches at the end of a layer, and the bytes of the streams that they move per row. The engine's own",
        "norm reads and writes both streams, one of them in one byte instead of two if the next matrix is in fp8.",
        f"H = {size}; microseconds of the capped launch without the cost of the launch itself. Only the hook needs",
        "one more launch.",
        "",
        "| path | rows that fire | launches | bytes per row | over not capped | "
        + " | ".join(f"{gpu.name}, {rows} rows" for gpu in shown for rows in (8, 4096))
        + " |",
        "|---|---|---|---|---|" + "---|" * 2 * len(shown),
    ]
    for path, launches, ops, engines in PATHS:
        norm = least(engines, -1e9, size)
        for fires, floor in [("none", -1e9), ("all", 1e3)] if ops else [("", 0.0)]:
            moved = sum(per_row[op, floor, size][1] for op in ops) + norm * (engines not in ops)
            cells = [path, fires, str(launches), f"{moved:.0f}", f"{moved / norm:.2f}"]
            for gpu in shown:
                for rows in (8, 4096):
                    seconds = sum(
                        predict(gpu, used_by(gpu, op), op, size, rows, *per_row[op, floor, size])[0] for op in ops
                    )
                    cells.append(f"{seconds * 1e6:.2f}" if ops else "")
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def used_by(gpu: Gpu, op: str) -> int:
    return registers(gpu.architecture)[kernel_name(torch.bfloat16, op, False, True)]


def main() -> None:
    per_row = {(op, floor, size): count(op, floor, size) for _, op, floor in CASES for size in SIZES}
    lines = [
        "# Predicted times on GPUs",
        "",
        "**Predicted, not measured**: `python benchmarks/predict.py` executes the PTX of the kernels, counts",
        "instructions and memory sectors, and compares them with published rates. Nothing here has run on a GPU, and",
        "effects that the model ignores can only make it slower. bfloat16, one direction, one layer. Each cell has",
        "the microseconds without the launch, the limiting resource, and the fraction of the speed at full memory",
        "bandwidth.",
    ]
    lines += ["", "## Resources of the kernels", "", *INTRODUCTION, "", *demands(per_row)]
    lines += ["", "## A capped layer in an engine's step", "", *of_a_step(per_row)]
    curves = {}
    for title, op, floor in CASES:
        if title not in SHOWN:
            continue
        lines += ["", f"## {title}", "", "| GPU | H | " + " | ".join(f"{rows} rows" for rows in ROWS) + " |"]
        lines += ["|---|---|" + "---|" * len(ROWS)]
        for gpu in GPUS:
            used = used_by(gpu, op)
            for size in SIZES:
                cells = []
                for rows in ROWS:
                    seconds, why, share = predict(gpu, used, op, size, rows, *per_row[op, floor, size])
                    cells.append(f"{seconds * 1e6:.2f}, {why}, {share:.2f}")
                    curves.setdefault((title, gpu.name, size), []).append(share)
                lines.append(f"| {gpu.name} | {size} | {' | '.join(cells)} |")
    (ROOT / "docs" / "gpu-predicted.md").write_text("\n".join(lines) + "\n")

    matplotlib.use("Agg")
    figure, panels = pyplot.subplots(1, len(SHOWN), figsize=(13, 3.8), sharey=True, layout="constrained")
    for panel, title in zip(panels, SHOWN, strict=True):
        for gpu, marker in zip(GPUS, "os^Dv*", strict=True):
            panel.plot(ROWS, curves[title, gpu.name, 4096], marker=marker, label=gpu.name)
        panel.set_xscale("log", base=8)
        panel.set_xticks(ROWS, [str(rows) for rows in ROWS])
        panel.set(title=f"{title}, H = 4096", xlabel="rows", ylim=(0, 1.05))
        panel.grid(alpha=0.25)
    panels[0].set_ylabel("fraction of the memory bound")
    panels[-1].legend(fontsize=8)
    figure.suptitle("Predicted, not measured: the CUDA kernels against the memory's bandwidth (bfloat16)")
    figure.savefig(ROOT / "docs" / "gpu-predicted.png", dpi=140)


if __name__ == "__main__":
    main()
