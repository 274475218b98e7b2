"""Compares the cost of a call of ``cap_`` in two builds, for each way to call it.

``python benchmarks/call_overhead.py ../before .`` takes two checkouts whose extensions are built in place. It calls
them in turn, each in one long-lived process, and prints the medians over the rounds and the quartiles of the ratios
within a round. The times include the kernel.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROUNDS = 31
CALLS = 20_000


def calls() -> dict[str, Callable[[], object]]:
    import torch

    import axiscap
    from axiscap import _C

    torch.set_num_threads(1)
    hidden, projections = torch.randn(1, 576), torch.empty(1, 1)
    axes = torch.nn.functional.normalize(torch.randn(2, 1, 576), dim=-1)
    floors, slots = torch.full((2, 1), -1e9), torch.zeros(1, dtype=torch.int32)
    bank, op = _C.Bank(axes, floors), torch.ops.axiscap.cap_.default
    return {
        "`bank.cap_(hidden)`": lambda: bank.cap_(hidden),
        "`bank.cap_(hidden, slots, projections)`": lambda: bank.cap_(hidden, slots, projections),
        "`ops.cap_(hidden, axes, floors, slots)`": lambda: axiscap.ops.cap_(hidden, axes, floors, slots),
        "`torch.ops.axiscap.cap_(hidden, axes, floors, slots)`": lambda: op(hidden, axes, floors, slots),
    }


def serve() -> None:
    import torch

    measured = calls()
    with torch.no_grad():
        for line in sys.stdin:
            call = measured[line.rstrip("\n")]
            begun = time.perf_counter()
            for _ in range(CALLS):
                call()
            print((time.perf_counter() - begun) / CALLS * 1e9, flush=True)


def main(folders: list[str]) -> None:
    servers = []
    for folder in folders:
        environment = os.environ | {"PYTHONPATH": str(Path(folder).resolve()), "PYTHONSAFEPATH": "1"}
        command = [sys.executable, __file__, "serve"]
        servers.append(subprocess.Popen(command, env=environment, stdin=-1, stdout=-1, text=True, bufsize=1))

    def nanoseconds(server: subprocess.Popen, name: str) -> float:
        print(name, file=server.stdin, flush=True)
        return float(server.stdout.readline())

    print(f"| call | {folders[0]}, ns | {folders[1]}, ns | ratio |\n|---|---|---|---|")
    for name in calls():
        pairs = [[nanoseconds(server, name) for server in servers] for _ in range(ROUNDS + 1)][1:]
        before, now = (statistics.median(side) for side in zip(*pairs, strict=True))
        low, middle, high = statistics.quantiles([b / a for a, b in pairs], n=4)
        print(f"| {name} | {before:.0f} | {now:.0f} | {middle:.2f} ({low:.2f}-{high:.2f}) |", flush=True)
    for server in servers:
        server.stdin.close()


if __name__ == "__main__":
    serve() if sys.argv[1:] == ["serve"] else main(sys.argv[1:])
