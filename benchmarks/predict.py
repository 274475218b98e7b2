"""What the CUDA kernels should take on GPUs that they have not run on: predicted, not measured.

    python benchmarks/predict.py

Counts instructions and sectors by executing the kernels' PTX (tests/ptx), and sets them against published rates. A call
takes the longest of: its bytes at the memory's bandwidth; its bytes at what the resident rows keep in flight (Little's
law); its instructions at one a clock and scheduler. Moves between registers are left out, since ptxas leaves them out.
Writes docs/gpu-predicted.md and docs/gpu-predicted.png. Needs nvcc.
"""

from __future__ import annotations

import functools
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "ptx")]

from conftest import unit  # noqa: E402
from emulated import Device, kernel_name, nvcc  # noqa: E402

from axiscap import _C, report  # noqa: E402


@dataclass(frozen=True)
class Gpu:
    """Published rates; latency: a memory access under load, of the order that micro-benchmarks report."""

    name: str
    architecture: int
    processors: int
    bandwidth: float  # bytes a second
    clock: float  # Hz
    threads: int  # a processor holds at most
    latency: float  # seconds


GPUS = (
    Gpu("A100 80GB", 80, 108, 2.04e12, 1.41e9, 2048, 600e-9),
    Gpu("L40S", 89, 142, 0.864e12, 2.52e9, 1536, 600e-9),
    Gpu("H100 SXM", 90, 132, 3.35e12, 1.98e9, 2048, 650e-9),
    Gpu("H200", 90, 132, 4.8e12, 1.98e9, 2048, 700e-9),
    Gpu("B200", 100, 148, 8.0e12, 1.97e9, 2048, 800e-9),
    Gpu("RTX 5090", 120, 170, 1.79e12, 2.41e9, 1536, 700e-9),
)
CASES = (("cap, none fire", "cap", -1e9), ("cap, all fire", "cap", 1e3), ("norm with cap, none fire", "norm", -1e9))
ROWS = (1, 8, 64, 512, 4096)
SIZES = (576, 2048, 4096, 8192, 16384)


@functools.cache
def registers(architecture: int) -> dict[str, int]:
    """Registers a thread of each kernel, from ptxas."""
    with tempfile.TemporaryDirectory() as folder:
        command = [nvcc(), "-std=c++17", "-O3", "-cubin", f"-arch=sm_{architecture}", "-Xptxas", "-v"]
        source = [f"-I{ROOT / 'csrc/include'}", str(ROOT / "csrc/cuda/launch.cu"), "-o", f"{folder}/out"]
        said = subprocess.run([*command, *source], check=True, capture_output=True, text=True).stderr
    found = re.findall(r"entry function '(\S+)'.*?Used (\d+) registers", said, re.S)
    return {name: int(count) for name, count in found}


def count(op: str, floor: float, size: int) -> tuple[float, float]:
    """Instructions of warps and bytes moved, a row, of a block in the middle of its rows (bfloat16)."""
    totals = []
    for turns in (4, 8):  # the difference leaves out what a block does once
        rows = turns * (128 // min(128, _C.plan("bfloat16", size, 1, 1)[0]) if size <= 1024 else 1)
        hidden = torch.randn(rows, size).bfloat16()
        second = {"residual": hidden.clone(), "weight": torch.ones(size).bfloat16()} if op == "norm" else {}
        device = Device(resident=1)
        device.call([hidden], unit(1, 1, 1, size), torch.full((1, 1, 1), floor), **second)
        work = sum(n for name, n in device.launch.counts.items() if not name.startswith(("mov", "cvta")))
        streams = [b for b in device.memory.buffers if b.name in ("hidden0", "residual")]
        totals.append((rows, work, sum(sum(b.sectors.values()) for b in streams) * 32))
    (rows, work, moved), (rows2, work2, moved2) = totals
    return (work2 - work) / (rows2 - rows), (moved2 - moved) / (rows2 - rows)


def predict(gpu: Gpu, used: int, op: str, size: int, rows: int, work: float, moved: float) -> tuple[float, str, float]:
    """(seconds, what binds, fraction of the memory bound)."""
    threads_per_row, block, _, _ = _C.plan("bfloat16", size, rows, 1)
    allocated = -(-used // 8) * 8
    blocks = min(65536 // (allocated * block), gpu.threads // block, 24)
    grid = _C.plan("bfloat16", size, rows, blocks * gpu.processors)[3]
    at_once = min(grid * (block // threads_per_row), rows)
    memory = rows * moved / gpu.bandwidth
    # Each row in turn waits for its reading; what is in flight is the rows of the resident blocks.
    read = size * 2 * (2 if op == "norm" else 1)
    flight = rows * moved * gpu.latency / (at_once * read)
    busy = min(grid, gpu.processors)
    issue = rows * work / (4 * busy * gpu.clock)
    seconds, why = max((memory, "bandwidth"), (flight, "latency"), (issue, "instructions"))
    return seconds, why, memory / seconds


def main() -> None:
    per_row = {(op, floor, size): count(op, floor, size) for _, op, floor in CASES for size in SIZES}
    lines = [
        "# Predicted times on GPUs",
        "",
        "**Predicted, not measured**: made by `python benchmarks/predict.py`, which executes the kernels' PTX,",
        "counts its instructions and the sectors that it moves, and sets them against published rates. Nothing here",
        "has run on a GPU, and what the model leaves out can only make it slower. bfloat16, one direction, one layer;",
        "microseconds without the launch, what binds, and the fraction of the speed of the memory's full bandwidth.",
    ]
    curves = {}
    for title, op, floor in CASES:
        lines += ["", f"## {title}", "", "| GPU | H | " + " | ".join(f"{rows} rows" for rows in ROWS) + " |"]
        lines += ["|---|---|" + "---|" * len(ROWS)]
        for gpu in GPUS:
            used = registers(gpu.architecture)[kernel_name(torch.bfloat16, op, False, True)]
            for size in SIZES:
                cells = []
                for rows in ROWS:
                    seconds, why, share = predict(gpu, used, op, size, rows, *per_row[op, floor, size])
                    cells.append(f"{seconds * 1e6:.2f}, {why}, {share:.2f}")
                    curves.setdefault((title, gpu.name, size), []).append(share)
                lines.append(f"| {gpu.name} | {size} | {' | '.join(cells)} |")
    (ROOT / "docs" / "gpu-predicted.md").write_text("\n".join(lines) + "\n")

    plot = report.pyplot()
    figure, panels = plot.subplots(1, len(CASES), figsize=(13, 3.8), sharey=True, layout="constrained")
    for panel, (title, _, _) in zip(panels, CASES, strict=True):
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
