"""The cost of calibration: batches against single answers, reading the answers, memory, Ray workers.

    python benchmarks/calibration.py

Speeds are ratios of pairs within one run (median and range). Memory is the peak of a process that calibrates on stored
rollouts, so that only their number differs. Takes about five minutes on two cores.
"""

from __future__ import annotations

import multiprocessing
import resource
import statistics
import tempfile
import time

import torch

from axiscap import calibrate, models
from axiscap.calibrate import cluster, pipeline, rollouts, space

SETTINGS = calibrate.Settings(models.DEFAULT_MODEL, "torch.float32")


def seconds(call) -> float:
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def ratios(name: str, pairs: list[tuple[float, float]]) -> None:
    found = [a / b for a, b in pairs]
    print(
        f"{name}: {statistics.median(found):.3f} ({min(found):.3f} to {max(found):.3f}, {len(found)} pairs)", flush=True
    )


def speeds() -> None:
    model, tokenizer = models.load()
    plan = calibrate.plan(calibrate.load_roles(), calibrate.load_questions(), 16)
    batches = calibrate.batches(plan)
    engine = rollouts.TransformersEngine(model, tokenizer, SETTINGS)
    chosen = batches[:: len(batches) // 6][:6]
    engine.answer(chosen[0][:4])  # warms up
    ratios(
        "time to answer and to read the answers over time to answer",
        [(seconds(lambda b=b: list(engine.stream([b]))), seconds(lambda b=b: engine.answer(b))) for b in chosen],
    )
    alone = []
    for batch in chosen[:3]:
        together = seconds(lambda b=batch: engine.answer(b))
        one = seconds(lambda b=batch: [engine.answer([task]) for task in b[::8]]) * 8
        alone.append((one, together))
        print(
            f"  {len(batch) / together:.2f} answers a second in a batch of {len(batch)}, {len(batch) / one:.2f} alone"
        )
    ratios("speed in batches over one at a time", alone)


def peak(count: int) -> int:
    """Peak memory in MiB of the stages behind the rollouts, over `count` of them."""
    roles = {name: calibrate.Role(name, ("a",)) for name in ("default", "a", "b", "c", "d")}
    plan = calibrate.plan(roles, [f"q{i}" for i in range(count // 5 * 4 // 3)])
    batches = calibrate.batches(plan)
    with tempfile.TemporaryDirectory() as folder:
        store = calibrate.Store(folder, SETTINGS)
        for i, batch in enumerate(batches):
            means = torch.randn(len(batch), 30, 576, generator=torch.Generator().manual_seed(i))
            n = len(batch)
            store.write(store.name(batch), calibrate.Shard(batch, [[1]] * n, [[2]] * n, ["x"] * n, means))
        keep = pipeline.Keep()
        sums = pipeline.CollectSums(plan, keep)(store, batches)
        found = space.Space.of(sums, plan, 1)
        projections, _ = pipeline.CollectProjections(plan, keep, found.axis, found.null)(store, batches)
    assert len(projections.tasks) == len(plan.tasks)
    print(
        f"  {len(plan.tasks)} rollouts: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB", flush=True
    )


def workers() -> None:
    plan = calibrate.plan(calibrate.load_roles(), calibrate.load_questions(), 1)
    batches = calibrate.batches(plan)[::3][:6]
    times = {}
    for count in (1, 2):
        crew = cluster.RayWorkers(models.DEFAULT_MODEL, count, cpus=1)
        with tempfile.TemporaryDirectory() as folder:
            times[count] = seconds(
                lambda f=folder, c=crew: c.rollouts(calibrate.Store(f, SETTINGS), batches, lambda n: None)
            )
        answers = sum(map(len, batches))
        print(
            f"  {count} workers of one core: {answers / times[count]:.2f} answers a second, loading included",
            flush=True,
        )
    print(f"Ray, 1 to 2 workers: {times[1] / times[2]:.2f}")


if __name__ == "__main__":
    context = multiprocessing.get_context("spawn")
    print("peak memory of the stages behind the rollouts:")
    for number in (100, 2000, 8000):
        process = context.Process(target=peak, args=(number,))
        process.start()
        process.join()
    speeds()
    workers()
