"""Decoding steps of a capped vLLM engine against those of an uncapped one, step by step in turn.

On a shared machine, whole runs of a server differ by more than the cost of a cap. Two steps within a tenth of a second
meet the same conditions, and there are many such pairs. The engines take turns in beginning. The addresses of their
memory also make two engines differ for as long as they live. So the script starts several pairs of engines, and prints
the median of each pair beside the median of all.
Run it where vLLM is: ``PYTHONPATH=. python benchmarks/serving_steps.py``.
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
import time
from multiprocessing.connection import Connection

import torch
from rich.console import Console
from rich.table import Table

from axiscap import models
from benchmarks.serving import DTYPE, PROFILE

STARTS = 5
#: The numbers of concurrent requests.
CONCURRENCIES = (8, 32, 128)
PAIRS = 99
#: Steps that compute the prompts, and the first ones after them.
BEFORE = 20


def engine(ask: Connection, config: dict[str, object]) -> None:
    begun = time.perf_counter()
    from vllm import LLM, SamplingParams

    # Two engines share a GPU. On a CPU the environment sets their memory.
    room = {"gpu_memory_utilization": 0.4} if torch.cuda.is_available() else {}
    llm = LLM(
        models.folder("smollm2-135m-instruct"), dtype=DTYPE, max_model_len=1024, enable_prefix_caching=False,
        async_scheduling=False, additional_config=config, **room,
    )  # fmt: skip
    ask.send(time.perf_counter() - begun)
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
    # A waiting engine must leave its cores to the engine that is measured.
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "KMP_BLOCKTIME": "0"}
    os.environ |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_WAIT_POLICY": "PASSIVE"}
    ratios: dict[int, list[list[float]]] = {requests: [] for requests in CONCURRENCIES}
    starts = []
    for start in range(STARTS):
        configs: list[dict[str, object]] = [{}, {"axiscap": {"profiles": {"p": str(PROFILE)}}}]
        ready, steps = measured(configs, swap=start % 2 == 1)
        starts.append(ready)
        for requests, pairs in steps.items():
            ratios[requests].append([uncapped / capped for uncapped, capped in pairs])

    table = Table(title=f"uncapped over capped, {STARTS} starts of {PAIRS} pairs of steps")
    for column in ("requests", "median", "median of each start", "quartiles of all"):
        table.add_column(column, justify="right")
    for requests, of_starts in ratios.items():
        every = [ratio for start in of_starts for ratio in start]
        quartiles = statistics.quantiles(every, n=4)
        table.add_row(
            str(requests),
            f"{statistics.median(every):.3f}",
            " ".join(f"{median:.3f}" for median in sorted(map(statistics.median, of_starts))),
            f"{quartiles[0]:.3f}-{quartiles[2]:.3f}",
        )
    Console(width=100).print(table)
    added = sorted(capped - uncapped for uncapped, capped in starts)
    taken = statistics.median(uncapped for uncapped, _ in starts)
    print(f"starting side by side: {taken:.0f} s, and capped {added[len(added) // 2]:+.1f} s "
          f"({added[0]:+.1f} to {added[-1]:+.1f})")  # fmt: skip


def measured(configs: list[dict[str, object]], *, swap: bool) -> tuple[list[float], dict[int, list[tuple[float, ...]]]]:
    """The seconds in which an engine of each configuration was ready; and for each number of requests, pairs of the
    seconds that a step took.
    """
    spawn = multiprocessing.get_context("spawn")
    order = (1, 0) if swap else (0, 1)
    ends: dict[int, Connection] = {}
    for at in order:
        ends[at], other = spawn.Pipe()
        spawn.Process(target=engine, args=(other, configs[at])).start()
    ready = {at: end.recv() for at, end in ends.items()}  # they start side by side

    def step(number: int, requests: int = 0) -> tuple[float, ...]:
        seconds = [0.0, 0.0]
        for at in order if number % 2 else order[::-1]:
            ends[at].send(requests)
            seconds[at], _ = ends[at].recv()
        return tuple(seconds)

    pairs = {}
    for requests in CONCURRENCIES:
        step(0, requests)
        pairs[requests] = [step(number) for number in range(1, BEFORE + PAIRS)][BEFORE - 1 :]
        for end in ends.values():  # to the requests' end
            left = True
            while left:
                end.send(0)
                _, left = end.recv()
    for end in ends.values():
        end.send(None)
    return [ready[0], ready[1]], pairs


if __name__ == "__main__":
    main()
