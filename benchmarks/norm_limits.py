"""The speed of ``cap_`` with limits on the norm of rows, as a multiple of its speed without them.

    python benchmarks/norm_limits.py

Nothing fires, as in most rows of real work. Both calls are timed in turn on the same rows, on one thread; the ratio is
taken within a round. 8 to 512 rows lie in the caches, where the number of instructions is the limit; 4096 rows lie in
memory.
"""

from __future__ import annotations

import statistics
import time

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import axiscap

ROUNDS, SECONDS = 25, 0.004


def seconds(hidden: Tensor, bank: tuple[Tensor, Tensor], norm_limits: Tensor | None, calls: int) -> float:
    begin = time.perf_counter()
    for _ in range(calls):
        axiscap.ops.cap_(hidden, *bank, norm_limits=norm_limits)
    return time.perf_counter() - begin


def ratios(rows: int, size: int, dtype: torch.dtype) -> list[float]:
    hidden = torch.randn(rows, size, dtype=dtype)
    bank = nn.functional.normalize(torch.randn(1, 1, size), dim=-1), torch.full((1, 1), -1e9)
    limits = torch.full((1,), 1e9)
    once = seconds(hidden, bank, limits, 3) / 3
    calls = max(1, int(SECONDS / once))
    return [seconds(hidden, bank, None, calls) / seconds(hidden, bank, limits, calls) for _ in range(ROUNDS)]


def main() -> None:
    torch.set_num_threads(1)
    table = Table(title="cap_ with norm limits: its speed over that without, median (quartiles)")
    sizes = (896, 4096, 8192)
    for column in ("dtype", "rows", *(f"H = {size}" for size in sizes)):
        table.add_column(column, justify="right")
    for dtype in (torch.bfloat16, torch.float32):
        for rows in (1, 8, 64, 512, 4096):
            cells = []
            for size in sizes:
                low, middle, high = statistics.quantiles(ratios(rows, size, dtype), n=4)
                cells.append(f"{middle:.2f} ({low:.2f}-{high:.2f})")
            table.add_row(str(dtype).removeprefix("torch."), str(rows), *cells)
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
