"""Calibration on Ray: a model in each worker, on one machine or a cluster (the extra ``axiscap[ray]``).

Workers write their shards to the store, which all of them must reach: a shared folder, or an object store. If a worker
dies, another one repeats its unfinished batch; its finished shards are in the store.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from axiscap import models
from axiscap.calibrate.roles import Task
from axiscap.calibrate.rollouts import TransformersEngine, run
from axiscap.calibrate.store import Store
from axiscap.calibrate.tokens import Collect, Text


class RayWorkers:
    """Workers in the Ray cluster that ``RAY_ADDRESS`` names, or on this machine. See :class:`Workers` in rollouts.

    Parameters
    ----------
    model
        the name or folder that each worker loads.
    workers
        the number of workers.
    gpus
        GPUs of each worker.
    cpus
        CPUs of each worker; 0: an equal share of all.
    """

    def __init__(self, model: str, workers: int, *, gpus: float = 0, cpus: int = 0) -> None:
        try:
            import ray
        except ModuleNotFoundError:
            raise ModuleNotFoundError("--engine ray needs Ray: pip install 'axiscap[ray]'") from None
        if workers < 1:
            raise ValueError(f"workers must be at least 1, got {workers}")
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        self.ray, self.model, self.workers, self.gpus = ray, model, workers, gpus
        if not ray.is_initialized():
            ray.init(include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        self.cpus = cpus or max(1, int(ray.cluster_resources().get("CPU", workers)) // workers)

    def rollouts(self, store: Store, todo: Sequence[Sequence[Task]], progress: Callable[[int], None]) -> None:
        for _ in self._spread(store, "answer", todo, progress):
            pass

    def over_texts(
        self,
        work: Collect,
        store: Store,
        parts: Sequence[Sequence[Text]],
        progress: Callable[[int], None],
    ) -> Iterator[Any]:
        shared = self.ray.put(work)
        return self._spread(store, "read", parts, progress, shared)

    def _spread(
        self, store: Store, method: str, parts: Sequence[Any], progress: Callable[[int], None], *arguments: Any
    ) -> Iterator[Any]:
        """Yields a worker method's result on every part, in the order of the parts. A free worker takes the next part.

        Ray restarts a dead worker and gives it its part again.
        """
        ray = self.ray
        options = {"num_cpus": self.cpus, "num_gpus": self.gpus, "max_restarts": -1, "max_task_retries": -1}
        actors = [
            ray.remote(**options)(_Worker).remote(self.model, store.url, store.settings, self.cpus)
            for _ in range(min(self.workers, max(1, len(parts))))
        ]
        waiting = deque(enumerate(parts))
        busy: dict[Any, tuple[Any, int]] = {}

        def send(actor: Any) -> None:
            if waiting:
                number, part = waiting.popleft()
                busy[getattr(actor, method).remote(part, *arguments)] = actor, number

        finished: dict[int, Any] = {}
        try:
            for actor in actors:
                send(actor)
            for number in range(len(parts)):
                while number not in finished:
                    (ready,), _ = ray.wait(list(busy), num_returns=1)
                    actor, done = busy.pop(ready)
                    finished[done] = ray.get(ready)
                    progress(len(parts[done]))
                    send(actor)
                yield finished.pop(number)
        finally:
            for actor in actors:
                ray.kill(actor)

    def over_shards(self, work: Callable[[Store, Sequence[Sequence[Task]]], Any], store: Store, todo: Any) -> list[Any]:
        """The results of `work` on one part of `todo` per worker. Ray repeats a task whose process dies."""
        ray = self.ray
        shared = ray.put(work)
        task = ray.remote(num_cpus=self.cpus, max_retries=-1)(_run_on_store)
        parts = [todo[i :: self.workers] for i in range(self.workers)]
        return list(ray.get([task.remote(shared, store.url, store.settings, part) for part in parts if part]))


class _Worker:
    def __init__(self, model: str, url: str, settings: Any, threads: int) -> None:
        torch.set_num_threads(threads)
        loaded, tokenizer = models.load(model, settings.dtype.removeprefix("torch."))
        self.store = Store(url, settings)
        self.engine = TransformersEngine(loaded, tokenizer, settings)

    def answer(self, batch: Sequence[Task]) -> None:
        run(self.engine, self.store, [batch])

    def read(self, part: Sequence[Text], work: Collect) -> Any:
        return work(self.engine.model, part)


def _run_on_store(work: Any, url: str, settings: Any, part: Any) -> Any:
    return work(Store(url, settings), part)
