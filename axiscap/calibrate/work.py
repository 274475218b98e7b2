"""Ordinary work: requests that have nothing to do with personas, by domain, and the model's own answers to them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from axiscap.calibrate.data import HOLD_OUT, Task, in_batches, shipped
from axiscap.calibrate.rollouts import Workers
from axiscap.calibrate.store import Settings, Shard, Store
from axiscap.jsonl import read_lines, to_text

#: Tokens of an answer, where a request does not say otherwise: code and stories need them.
TOKENS = 200
#: The kinds of a request's check, of which "number" is followed by the right one.
CHECKS = ("json", "python", "number")
_PREFIX = "work "


@dataclass(frozen=True)
class Request:
    """What is asked: the user's turns, which the model answers one after the other.

    ``check``: what an answer must be to be right, one of :data:`CHECKS`; empty where nothing can be said exactly.
    ``tokens``: of an answer, at most. ``fiction``: stories, poems and dialogue, which may cost a little more.
    """

    domain: str
    turns: tuple[str, ...]
    check: str = ""
    tokens: int = TOKENS
    fiction: bool = False


@dataclass(frozen=True)
class Work:
    """Requests, and which of them make nothing but test what was made: every fourth domain, and of the others every
    fourth request.
    """

    requests: tuple[Request, ...]

    @property
    def domains(self) -> list[str]:
        return list(dict.fromkeys(request.domain for request in self.requests))

    @property
    def fiction(self) -> set[str]:
        """Domains of fiction on request."""
        return {request.domain for request in self.requests if request.fiction}

    @property
    def answers(self) -> int:
        """How many turns are answered."""
        return sum(len(request.turns) for request in self.requests)

    @property
    def digest(self) -> str:
        """Of the requests."""
        return hashlib.sha256(
            json.dumps([dataclasses.astuple(request) for request in self.requests]).encode()
        ).hexdigest()

    @property
    def held_domains(self) -> list[str]:
        return self.domains[HOLD_OUT - 1 :: HOLD_OUT]

    def is_held_out(self, task: Task) -> bool:
        """Whether a task of :func:`answer` tests what the others made."""
        domain = self.requests[task.question].domain
        if domain in self.held_domains:
            return True
        place = sum(request.domain == domain for request in self.requests[: task.question])
        return place % HOLD_OUT == HOLD_OUT - 1

    def domain(self, task: Task) -> str:
        return self.requests[task.question].domain


def load_work(path: Path | None = None) -> Work:
    """The requests of a JSONL file ``{"domain": name, "turns": [text, ...]}``; AxisCap's own without one.

    A line may have a ``check``, ``tokens`` and ``fiction``; see :class:`Request`.

    Parameters
    ----------
    path
        of the file.

    Returns
    -------
    Work
        By domain.

    Raises
    ------
    ValueError
        naming the line that is none, or that there are too few domains to hold one out.

    Examples
    --------
    >>> from axiscap import calibrate
    >>> work = calibrate.load_work()
    """
    source = path or Path(str(files("axiscap.data") / "work.jsonl"))
    requests = []
    for line in read_lines(source):
        try:
            entry = line.parse()
            turns, check, tokens = entry["turns"], entry.get("check", ""), entry.get("tokens", TOKENS)
            fiction = entry.get("fiction", False)
            fits = isinstance(turns, list) and turns and all(isinstance(turn, str) and turn.strip() for turn in turns)
            if not fits or type(tokens) is not int or tokens < 1:
                raise TypeError
            to_text(entry["domain"], "domain")
            if check and check.split()[0] not in CHECKS:
                raise ValueError
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise line.error(
                'must be {"domain": name, "turns": [text, ...]}, with a check of '
                f"{', '.join(CHECKS)} and a number of tokens where it has them",
                error,
            ) from None
        requests.append(Request(entry["domain"], tuple(turns), check or "", tokens, bool(fiction)))
    work = Work(tuple(requests))
    if len(work.domains) < HOLD_OUT:
        raise ValueError(f"{source}: requests of at least {HOLD_OUT} domains are needed, got {len(work.domains)}")
    return work


def load_prose() -> list[tuple[str, str]]:
    """AxisCap's own paragraphs of prose, each with its register (story, diary, news, ...): what people write, and no
    model of conversations does.
    """
    return [(entry["register"], entry["text"]) for entry in shipped("prose.jsonl")]


def settings_of(settings: Settings, tokens: int) -> Settings:
    """Those of answers to ordinary work, which are longer than the roles'."""
    return dataclasses.replace(settings, max_new_tokens=tokens)


def answer(work: Work, workers: Workers, store: Store, progress: Callable[[int], None]) -> None:
    """Has every request answered, turn by turn; what the store has is not answered again.

    Parameters
    ----------
    store
        where answers are kept; its settings are those of the roles' rollouts.
    progress
        called with each number of answers finished.
    """
    for tokens, todo in _waves(work, store):
        workers.rollouts(Store(store.url, settings_of(store.settings, tokens)), todo, progress)


def shards(work: Work, store: Store) -> Iterator[Shard]:
    """The finished answers, one shard at a time in memory."""
    for tokens, todo in _waves(work, store):
        yield from Store(store.url, settings_of(store.settings, tokens)).shards(todo)


def _waves(work: Work, store: Store) -> Iterator[tuple[int, list[list[Task]]]]:
    """Batches of tasks by the length of their answers, all first turns, then all second ones. Later turns carry what
    was answered before them, so that a wave is only known when the one before it was answered.
    """
    said: dict[int, tuple[str, ...]] = {}
    for turn in range(max(len(request.turns) for request in work.requests)):
        by_tokens: dict[int, list[Task]] = {}
        for number, request in enumerate(work.requests):
            if turn < len(request.turns):
                task = Task(f"{_PREFIX}{request.domain}", turn, number, "", request.turns[turn], said.get(number, ()))
                by_tokens.setdefault(request.tokens, []).append(task)
        for tokens, tasks in sorted(by_tokens.items()):
            todo = in_batches(tasks)
            yield tokens, todo
            _remember(said, Store(store.url, settings_of(store.settings, tokens)), todo, work, turn)


def _remember(
    said: dict[int, tuple[str, ...]], store: Store, todo: Sequence[Sequence[Task]], work: Work, turn: int
) -> None:
    going_on = [[task for task in batch if turn + 1 < len(work.requests[task.question].turns)] for batch in todo]
    if not any(going_on):
        return
    for shard in store.shards(todo):
        for task, text in zip(shard.tasks, shard.texts, strict=True):
            said[task.question] = (*task.history, task.text, text)
