"""Runs the same Inspect tasks under the uncapped model and under profiles. An interrupted run resumes."""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio
from inspect_ai import Task, eval_set
from inspect_ai._util.error import PrerequisiteError
from inspect_ai.log import EvalLog, read_eval_log
from inspect_ai.model import Model, get_model

from axiscap import CapProfile
from axiscap.evaluate import tasks as own
from axiscap.evaluate.pairs import Run, read_logs

#: AxisCap's own tasks, in the order of the table.
OWN = ("persona_jailbreak", "over_refusal", "arithmetic", "instructions", "choices", "code")
UNCAPPED = "uncapped"
#: The repetitions of a request that a server does not answer.
_RETRIES = 3


@dataclass(frozen=True)
class Side:
    """One model to run: its name in tables, Inspect's name for it, its arguments, and a digest of its profile."""

    name: str
    model: str
    arguments: Mapping[str, Any]
    digest: str = ""
    base_url: str | None = None

    def facts(self) -> dict[str, Any]:
        """The facts that determine its answers. The batch size and the path of the profile do not."""
        facts = {name: value for name, value in self.arguments.items() if name != "batch_size"}
        return {**facts, "model": self.model, "profile": self.digest or self.arguments.get("profile")}


@dataclass(frozen=True)
class Options:
    """The options of every side. ``tasks`` are names of :data:`OWN`, or tasks as ``inspect eval`` takes them."""

    tasks: Sequence[str] = OWN
    behaviours: Path | None = None
    harmless: Path | None = None
    personas: Path | None = None
    judge: str | None = None
    attempts: int = own.ATTEMPTS
    first_turn: bool = False
    max_tokens: int | None = None
    epochs: int | None = None
    limit: int | None = None
    seed: int = 0

    def own_tasks(self) -> list[Task]:
        """Those of the tasks that are AxisCap's own."""

        def text(path: Path | None) -> str | None:
            return None if path is None else str(path)

        result = []
        for name in self.tasks:
            if name == "persona_jailbreak":
                files = text(self.behaviours), text(self.personas)
                result.append(own.persona_jailbreak(*files, self.attempts, self.first_turn, self.judge))
            elif name == "over_refusal":
                result.append(own.over_refusal(text(self.harmless)))
            elif name in OWN:
                result.append(getattr(own, name)())
        return result

    @property
    def other_tasks(self) -> list[str]:
        """Those of the tasks that are not AxisCap's."""
        return [name for name in self.tasks if name not in OWN]

    def facts(self) -> dict[str, Any]:
        """The facts that determine the answers, with a digest for each file."""
        facts = {name: value for name, value in vars(self).items() if not isinstance(value, Path | None)}
        for name in ("behaviours", "harmless", "personas"):
            path: Path | None = getattr(self, name)
            if path is not None:
                files = sorted(path.glob("*.json")) if path.is_dir() else [path]
                facts[name] = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
        return json.loads(json.dumps(facts))  # type: ignore[no-any-return]


def local_sides(model: str, dtype: str, batch_size: int, profiles: Sequence[Path]) -> list[Side]:
    """The uncapped model and each profile, in this process.

    Raises
    ------
    ValueError
        a file is no profile, or two profiles have the same name.
    OSError
        a file cannot be read.
    """
    name, arguments = f"axiscap/{model}", {"dtype": dtype, "batch_size": batch_size}
    sides = [Side(UNCAPPED, name, arguments)]
    for path in profiles:
        digest = CapProfile.load(path).digest
        sides.append(Side(path.stem, name, {**arguments, "profile": str(path)}, digest))
    return _check_names(sides)


def served_sides(model: str, base_url: str, engine: str, profiles: Sequence[str]) -> list[Side]:
    """The uncapped model and each profile of a server, whose operator must let requests choose them and ``off``.

    Raises
    ------
    ValueError
        two profiles have the same name.
    """
    sides = []
    for side, profile in [(UNCAPPED, "off"), *((name, name) for name in profiles)]:
        arguments = {"engine": engine, "profile": profile}
        sides.append(Side(side, f"axiscap-server/{model}", arguments, base_url=base_url))
    return _check_names(sides)


def _check_names(sides: list[Side]) -> list[Side]:
    names = [side.name for side in sides]
    duplicates = [name for name in names if names.count(name) > 1]
    if duplicates:
        raise ValueError(f"each run must have a name of its own, and {duplicates[0]!r} comes twice")
    return sides


def run(sides: Sequence[Side], options: Options, folder: Path, at_once: int) -> list[Run]:
    """Runs the tasks under each side, and reads the logs.

    Each side has a folder of logs of its name, which ``inspect view`` shows. Finished samples do not run again.

    Parameters
    ----------
    folder
        the folder of all logs.
    at_once
        the number of concurrent requests.

    Raises
    ------
    ValueError
        the folder holds the logs of another run, or a task cannot be made.
    RuntimeError
        a task did not finish. The message names it, the reason, and the folder of the finished samples.
    """
    options.own_tasks()  # raises for an invalid file before a model is loaded
    _claim(folder, {"options": options.facts(), "sides": {side.name: side.facts() for side in sides}})
    return [_run(side, options, folder / side.name, at_once) for side in sides]


def _claim(folder: Path, facts: dict[str, Any]) -> None:
    """Reserves the folder for this run, so that samples of another profile or task are not mistaken for its own."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "run.json"
    if path.exists():
        stored = json.loads(path.read_text("utf-8"))
        for part in facts:
            changed = sorted(key for key in facts[part] | stored[part] if facts[part].get(key) != stored[part].get(key))
            if changed:
                raise ValueError(
                    f"{folder} holds a run with other {part} ({', '.join(changed)}); keep this one elsewhere with --out"
                )
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(facts, indent=1), encoding="utf-8")
    partial.replace(path)


def _run(side: Side, options: Options, folder: Path, at_once: int) -> Run:
    model = get_model(side.model, base_url=side.base_url, memoize=False, **side.arguments)
    try:
        for tasks in (options.own_tasks(), options.other_tasks):
            if tasks:
                _eval(tasks, model, side, options, folder, at_once)
    finally:
        anyio.run(model.api.aclose)
    return read_logs(side.name, folder)


def _eval(
    tasks: list[Task] | list[str], model: Model, side: Side, options: Options, folder: Path, at_once: int
) -> None:
    try:
        finished, logs = eval_set(
            tasks,
            log_dir=str(folder),
            model=[model],
            retry_attempts=0,
            retry_immediate=False,
            max_tasks=1,
            seed=options.seed,
            epochs=options.epochs,
            limit=options.limit,
            max_tokens=options.max_tokens,
            max_retries=_RETRIES,
            max_connections=at_once,
            display="rich" if sys.stdout.isatty() else "plain",
            log_dir_allow_dirty=True,
        )
    except PrerequisiteError as error:
        raise ValueError(f"{', '.join(map(str, tasks))}: {error.message}") from None
    if not finished:
        raise _unfinished(next(log for log in logs if log.status != "success"), side, folder)


def _unfinished(log: EvalLog, side: Side, folder: Path) -> RuntimeError:
    reason = log.error.message.strip().splitlines()[0] if log.error else log.status
    # Tenacity's message has the memory address of a future instead of the number of tries.
    reason = re.sub(r"RetryError\(<Future .* raised (\w+)>\)", rf"{_RETRIES + 1} tries ended with \1", reason)
    kept = sum(sample.error is None for sample in read_eval_log(log.location).samples or [])
    return RuntimeError(
        f"the task {log.eval.task} under {side.name} did not finish: {reason}; {kept} finished samples of it are kept "
        f"in {folder}, and the same command goes on from there"
    )
