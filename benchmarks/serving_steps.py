"""Decoding steps of a capped vLLM engine against those of an uncapped one, step by step in turn.

On a machine that others use, whole runs of a server differ by more than a cap could cost. Two steps that follow each
other within a tenth of a second meet the same machine, and there are many such pairs. Which engine begins
alternates, and the interval of the median ratio is that of its order statistics (95 %).
Run it where vLLM is: ``PYTHONPATH=. python benchmarks/serving_steps.py``.
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
import time
from multiprocessing.connection import Connection

from rich.console import Console
from rich.table import Table

from axiscap import models
from benchmarks.serving import CONCURRENCIES, DTYPE, PROFILE

PAIRS = 149
#: Steps that compute the prompts, and the first ones after them.
BEFORE = 20


def engine(ask: Connection, config: dict[str, object]) -> None:
    from vllm import LLM, SamplingParams

    llm = LLM(
        models.folder("smollm2-135m-instruct"), dtype=DTYPE, max_model_len=1024, enable_prefix_caching=False,
        async_scheduling=False, additional_config=config,
    )  # fmt: skip
    ask.send("ready")
    added = 0
    while (requests := ask.recv()) is not None:
        if requests:
            params = SamplingParams(temperature=0, max_tokens=BEFORE + PAIRS + 1, ignore_eos=True)
            for _ in range(requests):
                llm.llm_engine.add_request(str(added := added + 1), f"Tell me of the number {added}.", params)
        begun = time.perf_counter()
        llm.llm_engine.step()
        ask.send((time.perf_counter() - begun, llm.llm_engine.has_unfinished_requests()))


def main() -> None:
    # An engine that waits must not keep the cores of the one that is measured.
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "KMP_BLOCKTIME": "0"}
    os.environ |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_WAIT_POLICY": "PASSIVE"}
    spawn = multiprocessing.get_context("spawn")
    ends = []
    for config in ({}, {"axiscap": {"profiles": {"p": str(PROFILE)}}}):
        end, other = spawn.Pipe()
        spawn.Process(target=engine, args=(other, config)).start()
        assert end.recv() == "ready"
        ends.append(end)

    def step(number: int, requests: int = 0) -> list[float]:
        """Both engines' seconds."""
        seconds = [0.0, 0.0]
        for at in (0, 1) if number % 2 else (1, 0):
            ends[at].send(requests)
            seconds[at], _ = ends[at].recv()
        return seconds

    table = Table(title=f"uncapped over capped, {PAIRS} pairs of steps")
    for column in ("requests", "uncapped step, ms", "median ratio (95 %)", "quartiles"):
        table.add_column(column, justify="right")
    for requests in CONCURRENCIES:
        step(0, requests)
        pairs = [step(number) for number in range(1, BEFORE + PAIRS)][BEFORE - 1 :]
        ratios = sorted(uncapped / capped for uncapped, capped in pairs)
        half = 1.96 * len(ratios) ** 0.5 / 2  # as many ranks from the median: how many lie below it is binomial
        low, high = ratios[int(len(ratios) / 2 - half)], ratios[int(len(ratios) / 2 + half)]
        quartiles = statistics.quantiles(ratios, n=4)
        table.add_row(
            str(requests),
            f"{1000 * statistics.median(uncapped for uncapped, _ in pairs):.0f}",
            f"{statistics.median(ratios):.3f} ({low:.3f}-{high:.3f})",
            f"{quartiles[0]:.3f}-{quartiles[2]:.3f}",
        )
        for end in ends:  # to the requests' end
            left = True
            while left:
                end.send(0)
                _, left = end.recv()
    for end in ends:
        end.send(None)
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
