"""The store of a calibration's rollouts: shards in a folder or an object store."""

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

import axiscap
from axiscap.calibrate.roles import Task
from axiscap.profile import CapProfile


@dataclass
class Shard:
    """Finished rollouts: the tasks, the tokens of prompts and answers, and the answers' mean activations."""

    tasks: list[Task]
    prompts: list[list[int]]
    answers: list[list[int]]
    texts: list[str]
    means: Tensor  # (N, n_layers, H) float32


@dataclass(frozen=True)
class Settings:
    """Everything beside its task that an answer depends on. The names of shards are digests of these fields in order.

    Parameters
    ----------
    model
        a hub's name, or a digest of the weights.
    dtype
        of the weights.
    max_new_tokens
        of an answer.
    seed
        of the sampling.
    engine
        ``transformers``, or the serving engine that writes the answers.
    norm_limits
        one for each layer: a row with a larger norm is an attention sink, and does not count in an answer's means.
        Empty: no limits.

    Examples
    --------
    >>> from axiscap import calibrate
    >>> calibrate.Settings("SmolLM2-135M", "float32").max_new_tokens
    40
    """

    model: str
    dtype: str
    max_new_tokens: int = 40
    seed: int = 0
    engine: str = "transformers"
    norm_limits: tuple[float, ...] = ()

    @classmethod
    def of(cls, profile: CapProfile, model: str) -> Settings:
        """The settings by which the answers that made a profile were sampled.

        Parameters
        ----------
        profile
            made by :func:`calibrate`.
        model
            the model's name for the new settings.

        Returns
        -------
        Settings
            The same seed, dtype, length, engine and limits.

        Raises
        ------
        ValueError
            the profile's provenance has no sampling settings.

        Examples
        --------
        >>> from axiscap import calibrate
        >>> calibrate.Settings.of(profile, "SmolLM2-135M").max_new_tokens > 0
        True
        """
        facts = profile.provenance.get("sampling")
        sampling = facts if isinstance(facts, Mapping) else {}
        kinds = {"dtype": str, "max_new_tokens": int, "seed": int, "engine": str}
        if not all(isinstance(sampling.get(name), kind) for name, kind in kinds.items()):
            raise ValueError(
                "the profile does not say how its answers were sampled; it was not made by axiscap calibrate"
            )
        limits = () if profile.norm_limit_all is None else tuple(profile.norm_limit_all.tolist())
        return cls(model, **{name: sampling[name] for name in kinds}, norm_limits=limits)

    def seed_of(self, task: Task) -> int:
        """A seed from 0 to 2^31 - 1, for an engine that draws its own random numbers.

        Parameters
        ----------
        task
            of a plan.

        Returns
        -------
        int
            The same for the same task and settings.

        Examples
        --------
        >>> from axiscap import calibrate
        >>> roles = calibrate.load_roles()
        >>> few = {name: roles[name] for name in ("default", *sorted(set(roles) - {"default"})[:2])}
        >>> task = calibrate.plan(few, calibrate.load_questions()[:3], per_role=3).tasks[0]
        >>> settings = calibrate.Settings("SmolLM2-135M", "float32")
        >>> settings.seed_of(task) == settings.seed_of(task)
        True
        """
        return int(self.numbers(task.id, 1)[0] * 2**31)

    def numbers(self, rollout: str, count: int) -> np.ndarray[Any, np.dtype[np.float64]]:
        """Random numbers in [0, 1), a function of the seed and the rollout's name.

        Parameters
        ----------
        rollout
            its name, :attr:`Task.id`.
        count
            how many.

        Returns
        -------
        np.ndarray
            (count,) float64.

        Examples
        --------
        >>> from axiscap import calibrate
        >>> calibrate.Settings("SmolLM2-135M", "float32").numbers("ghost-0", 3).shape
        (3,)
        """
        key = int.from_bytes(hashlib.sha256(f"{self.seed}/{rollout}".encode()).digest()[:16], "little")
        return np.random.Generator(np.random.Philox(key=key)).random(count)


class Store:
    """The shards of a calibration, in a folder: local, or anything that fsspec opens (``s3://...``).

    A shard's name is a digest of its tasks and of the settings, so that any process finds it again. A shard is written
    completely or not at all, even if the writing process is killed.

    Parameters
    ----------
    url
        of the folder; a local one is made if it does not exist.
    settings
        of the answers.

    Examples
    --------
    >>> from axiscap import calibrate
    >>> store = calibrate.Store(str(folder / "rollouts"), calibrate.Settings("SmolLM2-135M", "float32"))
    >>> store.has("nothing")
    False
    """

    def __init__(self, url: str, settings: Settings) -> None:
        self.url, self.settings = url, settings
        self.files, self.folder = fsspec.core.url_to_fs(url)

    def name(self, tasks: Sequence[Task]) -> str:
        """The name of the shard of these tasks: a digest of them and of the settings.

        Parameters
        ----------
        tasks
            of one shard, in order.

        Returns
        -------
        str
            Equal only for equal tasks and settings.

        Examples
        --------
        >>> from axiscap import calibrate
        >>> store = calibrate.Store(str(folder / "rollouts"), calibrate.Settings("SmolLM2-135M", "float32"))
        >>> store.name([]) == store.name([])
        True
        """
        content = json.dumps([asdict(self.settings), [asdict(task) for task in tasks]])
        return hashlib.sha256(content.encode()).hexdigest()[:24]

    def name_of(self, kind: str, *content: Any) -> str:
        """The name of an entry that is no shard: its kind, and a digest of the settings and of what it depends on.

        Parameters
        ----------
        kind
            the beginning of the name.
        *content
            what the entry depends on, as JSON types.

        Returns
        -------
        str
            Equal only for equal content, settings and version of AxisCap.

        Examples
        --------
        >>> from axiscap import calibrate
        >>> store = calibrate.Store(str(folder / "rollouts"), calibrate.Settings("SmolLM2-135M", "float32"))
        >>> store.name_of("means", 3).startswith("means-")
        True
        """
        text = json.dumps([axiscap.__version__, asdict(self.settings), *content])
        return f"{kind}-{hashlib.sha256(text.encode()).hexdigest()[:24]}"

    def _path(self, name: str) -> str:
        return f"{self.folder}/{name}.safetensors"

    def has(self, name: str) -> bool:
        """Whether the store has a shard and can read it.

        Parameters
        ----------
        name
            from :meth:`name`.

        Returns
        -------
        bool
            False also for a damaged shard.

        Examples
        --------
        >>> from axiscap import calibrate
        >>> store = calibrate.Store(str(folder / "rollouts"), calibrate.Settings("SmolLM2-135M", "float32"))
        >>> store.has("nothing")
        False
        """
        return self.read(name) is not None

    def read(self, name: str) -> Shard | None:
        """A shard, or None if it is missing or damaged.

        Parameters
        ----------
        name
            from :meth:`name`.

        Returns
        -------
        Shard or None
            The rollouts.

        Examples
        --------
        >>> from axiscap import calibrate
        >>> store = calibrate.Store(str(folder / "rollouts"), calibrate.Settings("SmolLM2-135M", "float32"))
        >>> store.read("nothing") is None
        True
        """
        entry = self.kept(name)
        if entry is None or "tasks" not in entry[0]:
            return None
        facts, tensors = entry
        tasks = [Task(**{**task, "history": tuple(task["history"])}) for task in facts["tasks"]]
        return Shard(tasks, facts["prompts"], facts["answers"], facts["texts"], tensors["means"])

    def write(self, name: str, shard: Shard) -> None:
        """Writes a shard, completely or not at all.

        Parameters
        ----------
        name
            from :meth:`name`.
        shard
            the finished rollouts.

        Examples
        --------
        >>> from axiscap import calibrate
        >>> store = calibrate.Store(str(folder / "rollouts"), calibrate.Settings("SmolLM2-135M", "float32"))
        >>> store.write("some", shard)
        >>> store.has("some")
        True
        """
        facts = {
            "tasks": [asdict(task) for task in shard.tasks],
            "prompts": shard.prompts,
            "answers": shard.answers,
            "texts": shard.texts,
        }
        self.keep(name, facts, {"means": shard.means.contiguous()})

    def kept(self, name: str) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
        """The entry that :meth:`keep` wrote under a name; None if it is missing or damaged.

        Parameters
        ----------
        name
            of the entry.

        Returns
        -------
        tuple or None
            The facts and the tensors.

        Examples
        --------
        >>> from axiscap import calibrate
        >>> store = calibrate.Store(str(folder / "rollouts"), calibrate.Settings("SmolLM2-135M", "float32"))
        >>> store.keep("means", {"count": 3}, {"mean": torch.ones(2)})
        >>> store.kept("means")[0]["count"]
        3
        """
        try:
            tensors = safetensors.torch.load(self.files.cat_file(self._path(name)))
            return json.loads(tensors.pop("facts").numpy().tobytes()), tensors
        except (FileNotFoundError, safetensors.SafetensorError, KeyError, ValueError):
            return None

    def keep(self, name: str, facts: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Writes an entry of facts (as JSON) and tensors, completely or not at all.

        Parameters
        ----------
        name
            of the entry.
        facts
            JSON types.
        tensors
            by name.

        Examples
        --------
        >>> from axiscap import calibrate
        >>> store = calibrate.Store(str(folder / "rollouts"), calibrate.Settings("SmolLM2-135M", "float32"))
        >>> store.keep("means", {"count": 3}, {"mean": torch.ones(2)})
        """
        text = torch.frombuffer(bytearray(json.dumps(facts).encode()), dtype=torch.uint8)
        data = safetensors.torch.save({**tensors, "facts": text})
        self.files.makedirs(self.folder, exist_ok=True)
        if "file" in np.atleast_1d(self.files.protocol):
            partial_path = f"{self._path(name)}.{os.getpid()}.partial"
            with open(partial_path, "wb") as file:
                file.write(data)
            os.replace(partial_path, self._path(name))
        else:  # an object store shows only complete objects
            self.files.pipe_file(self._path(name), data)

    def shards(self, batches: Sequence[Sequence[Task]]) -> Iterator[Shard]:
        """Yields the finished shards, with one at a time in memory.

        Parameters
        ----------
        batches
            of tasks, one for each shard.

        Yields
        ------
        Shard
            In the order of the batches.

        Raises
        ------
        ValueError
            a shard is missing.

        Examples
        --------
        >>> from axiscap import calibrate
        >>> store = calibrate.Store(str(folder / "rollouts"), calibrate.Settings("SmolLM2-135M", "float32"))
        >>> list(store.shards([]))
        []
        """
        for batch in batches:
            shard = self.read(self.name(batch))
            if shard is None:
                raise ValueError(f"{self.url}: the rollouts of {batch[0].id} and {len(batch) - 1} more are missing")
            yield shard
