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

import axiscap
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
    """What an answer depends on beside its task.

    Parameters
    ----------
    model
        what names it: a hub's name, or a digest of its weights.
    dtype
        of the weights.
    max_new_tokens
        of an answer.
    seed
        of the sampling.
    engine
        ``transformers``, or the serving engine that writes the answers.
    norm_limits
        of each layer of the model: a row with a larger norm is an attention sink, and is no part of an answer's means.
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
    engine: str = "transformers"  # who answers
    norm_limits: tuple[float, ...] = ()

    @classmethod
    def of(cls, profile: CapProfile, model: str) -> Settings:
        """Those by which the answers that made a profile were sampled.

        Parameters
        ----------
        profile
            made by :func:`calibrate`.
        model
            what names the model now.

        Returns
        -------
        Settings
            The same seed, dtype, length, engine and limits.

        Raises
        ------
        ValueError
            the profile does not say.

        Examples
        --------
        >>> from axiscap import calibrate
        >>> calibrate.Settings.of(profile, "SmolLM2-135M").max_new_tokens > 0
        True
        """
        facts = profile.provenance.get("sampling")
        known = facts if isinstance(facts, Mapping) else {}
        kinds = {"dtype": str, "max_new_tokens": int, "seed": int, "engine": str}
        if not all(isinstance(known.get(name), kind) for name, kind in kinds.items()):
            raise ValueError(
                "the profile does not say how its answers were sampled; it was not made by axiscap calibrate"
            )
        limits = () if profile.norm_limit_all is None else tuple(profile.norm_limit_all.tolist())
        return cls(model, **{name: known[name] for name in kinds}, norm_limits=limits)

    def seed_of(self, task: Task) -> int:
        """For an engine that samples by seeds of its own, 0 to 2^31 - 1.

        Parameters
        ----------
        task
            one of a plan's.

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
        """Numbers in [0, 1) that a rollout's name and the seed determine.

        Parameters
        ----------
        rollout
            its name.
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

    A shard's name is a digest of its tasks and of the settings. It is there as a whole or not at all, whenever the
    process that wrote it was killed, and whoever wants it again finds it, in whatever process.

    Parameters
    ----------
    url
        of the folder, made where it is local and not there.
    settings
        what its answers depend on beside their tasks.

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
        """The name of the shard that tasks make: a digest of them and of the settings.

        Parameters
        ----------
        tasks
            of one shard, in order.

        Returns
        -------
        str
            Equal for equal tasks and settings alone.

        Examples
        --------
        >>> from axiscap import calibrate
        >>> store = calibrate.Store(str(folder / "rollouts"), calibrate.Settings("SmolLM2-135M", "float32"))
        >>> store.name([]) == store.name([])
        True
        """
        what = json.dumps([asdict(self.settings), [asdict(task) for task in tasks]])
        return hashlib.sha256(what.encode()).hexdigest()[:24]

    def name_of(self, kind: str, *content: Any) -> str:
        """The name under which something else is kept: its kind, and a digest of the settings and its content.

        Parameters
        ----------
        kind
            what it is, the beginning of the name.
        *content
            what it depends on, as JSON can say it.

        Returns
        -------
        str
            Equal for equal content, settings and version of AxisCap alone.

        Examples
        --------
        >>> from axiscap import calibrate
        >>> store = calibrate.Store(str(folder / "rollouts"), calibrate.Settings("SmolLM2-135M", "float32"))
        >>> store.name_of("means", 3).startswith("means-")
        True
        """
        what = json.dumps([axiscap.__version__, asdict(self.settings), *content])
        return f"{kind}-{hashlib.sha256(what.encode()).hexdigest()[:24]}"

    def _path(self, name: str) -> str:
        return f"{self.folder}/{name}.safetensors"

    def has(self, name: str) -> bool:
        """Whether a shard is there.

        Parameters
        ----------
        name
            of :meth:`name`.

        Returns
        -------
        bool
            True where it is, damaged or not.

        Examples
        --------
        >>> from axiscap import calibrate
        >>> store = calibrate.Store(str(folder / "rollouts"), calibrate.Settings("SmolLM2-135M", "float32"))
        >>> store.has("nothing")
        False
        """
        return self.read(name) is not None

    def read(self, name: str) -> Shard | None:
        """A shard, or None where there is none or a damaged one.

        Parameters
        ----------
        name
            of :meth:`name`.

        Returns
        -------
        Shard or None
            Its answers.

        Examples
        --------
        >>> from axiscap import calibrate
        >>> store = calibrate.Store(str(folder / "rollouts"), calibrate.Settings("SmolLM2-135M", "float32"))
        >>> store.read("nothing") is None
        True
        """
        found = self.kept(name)
        if found is None or "tasks" not in found[0]:
            return None
        facts, tensors = found
        tasks = [Task(**{**task, "history": tuple(task["history"])}) for task in facts["tasks"]]
        return Shard(tasks, facts["prompts"], facts["answers"], facts["texts"], tensors["means"])

    def write(self, name: str, shard: Shard) -> None:
        """Writes a shard, whole or not at all.

        Parameters
        ----------
        name
            of :meth:`name`.
        shard
            the answers to its tasks.

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
        """What :meth:`keep` wrote under a name; None where there is nothing, or something damaged.

        Parameters
        ----------
        name
            of what was kept.

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
        """Writes facts, as JSON, and tensors, whole or not at all.

        Parameters
        ----------
        name
            under which it is found again.
        facts
            what JSON can say.
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
        else:  # an object store shows an object when it is whole
            self.files.pipe_file(self._path(name), data)

    def shards(self, batches: Sequence[Sequence[Task]]) -> Iterator[Shard]:
        """Each finished shard in turn; one at a time is in memory.

        Parameters
        ----------
        batches
            of tasks, one for each shard.

        Yields
        ------
        Shard
            In the order of the batches.

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
