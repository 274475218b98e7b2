"""Ordinary work: requests by domain that have nothing to do with personas, and the model's own answers to them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from axiscap.calibrate.roles import HOLD_OUT, Task, even_sample, in_batches
from axiscap.calibrate.rollouts import Workers
from axiscap.calibrate.store import Settings, Shard, Store
from axiscap.data.jsonl import read_lines, shipped, to_text

#: The most tokens of an answer, unless a request has its own limit. Code and stories need this many.
TOKENS = 200
#: The kinds of checks. "number" is followed by the right number.
CHECKS = ("json", "python", "number")
_PREFIX = "work "


@dataclass(frozen=True)
class Request:
    """The user's turns, which the model answers one after the other.

    ``check``: the form of a right answer, one of :data:`CHECKS`; empty: the answer cannot be checked exactly.
    ``tokens``: the most tokens of an answer. ``fiction``: whether it is a story, a poem or a dialogue, where a cap may
    cost a little more.
    """

    domain: str
    turns: tuple[str, ...]
    check: str = ""
    tokens: int = TOKENS
    fiction: bool = False


@dataclass(frozen=True)
class Work:
    """Requests. Every fourth domain is held out, and every fourth request of the other domains; these only test."""

    requests: tuple[Request, ...]
    #: False for a sample, none of which is held out.
    holds_out: bool = True

    @property
    def domains(self) -> list[str]:
        return list(dict.fromkeys(request.domain for request in self.requests))

    @property
    def fiction(self) -> set[str]:
        """The domains of fiction on request."""
        return {request.domain for request in self.requests if request.fiction}

    @property
    def answers(self) -> int:
        """The number of turns, each of which gets an answer."""
        return sum(len(request.turns) for request in self.requests)

    @property
    def digest(self) -> str:
        """SHA-256 of the requests."""
        return hashlib.sha256(
            json.dumps([dataclasses.astuple(request) for request in self.requests]).encode()
        ).hexdigest()

    @property
    def held_domains(self) -> list[str]:
        return self.domains[HOLD_OUT - 1 :: HOLD_OUT]

    def is_held_out(self, task: Task) -> bool:
        """Whether a task of :func:`answer` belongs to a held-out request."""
        if not self.holds_out:
            return False
        domain = self.requests[task.question].domain
        if domain in self.held_domains:
            return True
        position = sum(request.domain == domain for request in self.requests[: task.question])
        return position % HOLD_OUT == HOLD_OUT - 1

    def domain(self, task: Task) -> str:
        return self.requests[task.question].domain

    def sample(self, requests: int, tokens: int) -> Work:
        """About this many of the requests that are not held out, their first turns alone, with short answers."""
        first = [Task("", 0, number, "", "") for number in range(len(self.requests))]
        chosen = even_sample([self.requests[task.question] for task in first if not self.is_held_out(task)], requests)
        return Work(
            tuple(replace(request, turns=request.turns[:1], tokens=min(request.tokens, tokens)) for request in chosen),
            holds_out=False,
        )


def load_work(path: Path | None = None) -> Work:
    """The requests of a JSONL file ``{"domain": name, "turns": [text, ...]}``; without a file, those that AxisCap
    ships.

    A line may have a ``check``, ``tokens`` and ``fiction``; see :class:`Request`.

    Parameters
    ----------
    path
        the file.

    Returns
    -------
    Work
        The requests in the file's order.

    Raises
    ------
    ValueError
        a line is not a request, or there are too few domains to hold one out.

    Examples
    --------
    >>> from axiscap import calibrate
    >>> work = calibrate.load_work()
    """
    source = path or Path(str(files("axiscap.data") / "work.jsonl"))
    requests = []
    for line in read_lines(source):
        try:
            requests.append(_parse_request(line.parse()))
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise line.error(
                'must be {"domain": name, "turns": [text, ...]}, with a check of '
                f"{', '.join(CHECKS)} and a number of tokens where it has them",
                error,
            ) from None
    work = Work(tuple(requests))
    if len(work.domains) < HOLD_OUT:
        raise ValueError(f"{source}: requests of at least {HOLD_OUT} domains are needed, got {len(work.domains)}")
    return work


def _parse_request(entry: Any) -> Request:
    """The request of an entry. Any of the errors that :func:`load_work` catches means that it is none."""
    turns, check, tokens = entry["turns"], entry.get("check", ""), entry.get("tokens", TOKENS)
    has_turns = isinstance(turns, list) and turns and all(isinstance(turn, str) and turn.strip() for turn in turns)
    if not has_turns or type(tokens) is not int or tokens < 1:
        raise TypeError
    to_text(entry["domain"], "domain")
    if check and check.split()[0] not in CHECKS:
        raise ValueError
    return Request(entry["domain"], tuple(turns), check or "", tokens, bool(entry.get("fiction", False)))


def load_prose() -> list[tuple[str, str]]:
    """The shipped paragraphs of prose by people, each with its register (story, diary, news, ...)."""
    return [(entry["register"], entry["text"]) for entry in shipped("prose.jsonl")]


def settings_of(settings: Settings, tokens: int) -> Settings:
    """The settings of answers to ordinary work, which are longer than the roles' answers."""
    return dataclasses.replace(settings, max_new_tokens=tokens)


def answer(work: Work, workers: Workers, store: Store, progress: Callable[[int], None]) -> None:
    """Has every request answered, turn by turn, except the turns that the store has already.

    Parameters
    ----------
    store
        keeps the answers; its settings are those of the roles' rollouts.
    progress
        called with the number of answers of each finished batch.
    """
    for tokens, todo in _waves(work, store):
        workers.rollouts(Store(store.url, settings_of(store.settings, tokens)), todo, progress)


def shards(work: Work, store: Store) -> Iterator[Shard]:
    """Yields the finished answers, with one shard at a time in memory."""
    for tokens, todo in _waves(work, store):
        yield from Store(store.url, settings_of(store.settings, tokens)).shards(todo)


def _waves(work: Work, store: Store) -> Iterator[tuple[int, list[list[Task]]]]:
    """Yields a number of tokens and the batches of tasks with this limit: all first turns, then all second ones, ...

    A later turn carries the answers before it. So the caller must have a wave answered before it takes the next one.
    """
    histories: dict[int, tuple[str, ...]] = {}  # by request: the turns so far
    for turn in range(max(len(request.turns) for request in work.requests)):
        by_tokens: dict[int, list[Task]] = {}
        for number, request in enumerate(work.requests):
            if turn < len(request.turns):
                history = histories.get(number, ())
                task = Task(f"{_PREFIX}{request.domain}", turn, number, "", request.turns[turn], history)
                by_tokens.setdefault(request.tokens, []).append(task)
        for tokens, tasks in sorted(by_tokens.items()):
            todo = in_batches(tasks)
            yield tokens, todo
            if any(turn + 1 < len(work.requests[task.question].turns) for task in tasks):
                _extend_histories(histories, Store(store.url, settings_of(store.settings, tokens)).shards(todo))


def _extend_histories(histories: dict[int, tuple[str, ...]], shards: Iterator[Shard]) -> None:
    for shard in shards:
        for task, text in zip(shard.tasks, shard.texts, strict=True):
            histories[task.question] = (*task.history, task.text, text)
