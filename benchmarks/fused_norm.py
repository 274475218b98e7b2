"""Compares two places for the cap of a serving engine: before the norm of the next block, or inside that norm.

The first is ``cap_residual_`` followed by the add and norm that inductor fuses, the second is ``add_rms_norm_cap_``,
compiled as an engine compiles them. They are timed in turn on the same input; a ratio is the speed of the second over
the speed of the first, within a round.
"""

from __future__ import annotations

import statistics
import time

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import axiscap  # noqa: F401 - registers torch.ops.axiscap

ROUNDS, CALLS = 15, 40


def apart(hidden: Tensor, residual: Tensor, weight: Tensor, axes: Tensor, floors: Tensor, slots: Tensor) -> Tensor:
    torch.ops.axiscap.cap_residual_(hidden, residual, axes, floors, slots)
    total = hidden.float() + residual.float()
    residual.copy_(total)
    return (total * torch.rsqrt(total.pow(2).mean(-1, keepdim=True) + 1e-5)).to(hidden.dtype) * weight


def fused(hidden: Tensor, residual: Tensor, weight: Tensor, axes: Tensor, floors: Tensor, slots: Tensor) -> Tensor:
    torch.ops.axiscap.add_rms_norm_cap_(hidden, residual, weight, 1e-5, axes, floors, slots)
    return hidden


def seconds(function, *inputs: Tensor) -> float:
    begin = time.perf_counter()
    for _ in range(CALLS):
        function(*inputs)
    return time.perf_counter() - begin


def main() -> None:
    table = Table(title="add_rms_norm_cap_ over cap_residual_ and inductor's norm: speed, median (quartiles)")
    for column in ("rows", "H = 576", "H = 4096"):
        table.add_column(column, justify="right")
    for rows in (1, 8, 32, 512):
        cells = []
        for size in (576, 4096):
            axes = nn.functional.normalize(torch.randn(4, 1, size), dim=-1)
            floors = torch.full((4, 1), -1e9)  # no row fires, as in ordinary work
            slots = torch.zeros(rows, dtype=torch.int32)
            hidden, residual = torch.randn(2, rows, size, dtype=torch.bfloat16)
            inputs = (hidden, residual, torch.ones(size, dtype=torch.bfloat16), axes, floors, slots)
            ways = [torch.compile(way, dynamic=True, fullgraph=True) for way in (apart, fused)]
            with torch.inference_mode():
                for way in ways:
                    seconds(way, *inputs)
                ratios = []
                for _ in range(ROUNDS):
                    residual.copy_(torch.randn(rows, size))
                    ratios.append(seconds(ways[0], *inputs) / seconds(ways[1], *inputs))
            low, middle, high = statistics.quantiles(ratios, n=4)
            cells.append(f"{middle:.2f} ({low:.2f}-{high:.2f})")
        table.add_row(str(rows), *cells)
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
