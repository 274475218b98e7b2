"""Where a calibration keeps its rollouts: shards of them, in a folder or an object store."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import fsspec
import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from axiscap.calibrate.data import Task
from axiscap.profile import CapProfile


@dataclass
class Shard:
    """Finished rollouts: what was asked, the prompts' and answers' tokens, and the answers' mean activations."""

    tasks: list[Task]
    prompts: list[list[int]]
    answers: list[list[int]]
    texts: list[str]
    means: Tensor  # (N, n_layers, H) float32


@dataclass(frozen=True)
class Settings:
    """What an answer depends on beside its task."""

    model: str
    dtype: str
    max_new_tokens: int = 40
    seed: int = 0
    engine: str = "transformers"  # who answers

    @classmethod
    def of(cls, profile: CapProfile, model: str) -> Settings:
        """Those by which the answers that made a profile were sampled.

        Raises:
            ValueError: the profile does not say.
        """
        facts = profile.provenance.get("sampling")
        known = facts if isinstance(facts, Mapping) else {}
        kinds = {"dtype": str, "max_new_tokens": int, "seed": int, "engine": str}
        if not all(isinstance(known.get(name), kind) for name, kind in kinds.items()):
            raise ValueError(
                "the profile does not say how its answers were sampled; it was not made by axiscap calibrate"
            )
        return cls(model, **{name: known[name] for name in kinds})

    def seed_of(self, task: Task) -> int:
        """For an engine that samples by seeds of its own, 0 to 2^31 - 1."""
        return int(self.numbers(task.id, 1)[0] * 2**31)

    def numbers(self, rollout: str, count: int) -> np.ndarray[Any, np.dtype[np.float64]]:
        """Numbers in [0, 1) that a rollout's name and the seed determine."""
        key = int.from_bytes(hashlib.sha256(f"{self.seed}/{rollout}".encode()).digest()[:16], "little")
        return np.random.Generator(np.random.Philox(key=key)).random(count)


class Store:
    """The shards of a calibration, in a folder: local, or anything that fsspec opens (``s3://...``).

    A shard's name is a digest of its tasks and of the settings. It is there as a whole or not at all, whenever the
    process that wrote it was killed, and whoever wants it again finds it, in whatever process.
    """

    def __init__(self, url: str, settings: Settings) -> None:
        self.url, self.settings = url, settings
        self.files, self.folder = fsspec.core.url_to_fs(url)

    def name(self, tasks: Sequence[Task]) -> str:
        what = json.dumps([asdict(self.settings), [asdict(task) for task in tasks]])
        return hashlib.sha256(what.encode()).hexdigest()[:24]

    def _path(self, name: str) -> str:
        return f"{self.folder}/{name}.safetensors"

    def has(self, name: str) -> bool:
        return self.read(name) is not None

    def read(self, name: str) -> Shard | None:
        """A shard, or None where there is none or a damaged one."""
        found = self.kept(name)
        if found is None or "tasks" not in found[0]:
            return None
        facts, tensors = found
        tasks = [Task(**{**task, "history": tuple(task["history"])}) for task in facts["tasks"]]
        return Shard(tasks, facts["prompts"], facts["answers"], facts["texts"], tensors["means"])

    def write(self, name: str, shard: Shard) -> None:
        facts = {
            "tasks": [asdict(task) for task in shard.tasks],
            "prompts": shard.prompts,
            "answers": shard.answers,
            "texts": shard.texts,
        }
        self.keep(name, facts, {"means": shard.means.contiguous()})

    def kept(self, name: str) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        """What :meth:`keep` wrote under a name; None where there is nothing, or something damaged."""
        try:
            tensors = safetensors.torch.load(self.files.cat_file(self._path(name)))
            return json.loads(tensors.pop("facts").numpy().tobytes()), tensors
        except (FileNotFoundError, safetensors.SafetensorError, KeyError, ValueError):
            return None

    def keep(self, name: str, facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Writes facts, as JSON, and tensors, whole or not at all."""
        text = torch.frombuffer(bytearray(json.dumps(facts).encode()), dtype=torch.uint8)
        data = safetensors.torch.save({**tensors, "facts": text})
        self.files.makedirs(self.folder, exist_ok=True)
        if "file" in np.atleast_1d(self.files.protocol):
            partial_path = f"{self._path(name)}.{os.getpid()}.partial"
            with open(partial_path, "wb") as file:
                file.write(data)
            os.replace(partial_path, self._path(name))
        else:  # an object store shows an object when it is whole
            self.files.pipe_file(self._path(name), data)

    def shards(self, batches: Sequence[Sequence[Task]]) -> Iterator[Shard]:
        """Each finished shard in turn; one at a time is in memory."""
        for batch in batches:
            shard = self.read(self.name(batch))
            if shard is None:
                raise ValueError(f"{self.url}: the rollouts of {batch[0].id} and {len(batch) - 1} more are missing")
            yield shard
