"""Which profiles a forward pass runs under: the selections of threads and of asynchronous tasks."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import threading
from collections.abc import Iterator

import torch


class _ThreadSelection:
    """The selections that one thread has made, for compiled code, which cannot read a context variable."""

    def __init__(self) -> None:
        self.slots: list[int] | None = None
        self.task: int | None = None  # that made the last one
        self.has_several_tasks = False
        self.is_pinned = False


class _PerThread(threading.local):
    """An object inside, since torch.compile loses changes of a thread-local's own attributes."""

    def __init__(self) -> None:
        self.mine = _ThreadSelection()


class Selection:
    """The slots of the sequences of a pass: one for all of them, or one for each; -1 leaves a sequence uncapped.

    A pass has, in this order:

    1. the slots that its own context selected: its task, its thread, or what copied their context;
    2. slot 0, the first profile, if nobody has selected any;
    3. the slots of the one thread or task that has selected;
    4. none, and is refused, if several have.
    """

    def __init__(self) -> None:
        self._last: list[int] = [0]
        self._last_author: tuple[int, int] | None = None  # the thread and the task
        self._has_several_authors = False
        self._in_context: contextvars.ContextVar[list[int] | None] = contextvars.ContextVar("selection", default=None)
        self._threads = _PerThread()

    def select(self, slots: list[int]) -> None:
        """Selects the slots of the passes that this thread or task runs from now on."""
        task, thread = _current_task(), self._threads.mine
        author = threading.get_ident(), task
        thread.has_several_tasks |= thread.task not in (None, task)
        thread.slots, thread.task = slots, task
        self._has_several_authors |= self._last_author not in (None, author)
        self._last, self._last_author = slots, author
        self._in_context.set(slots)

    def current(self) -> list[int]:
        """The slots of a pass that this thread and task begins.

        Raises
        ------
        RuntimeError
            Several threads or tasks have selected and this one has not, or compiled code cannot tell them apart.
        """
        slots = self._of_thread() if torch.compiler.is_compiling() else self._in_context.get()
        if slots is not None:
            return slots
        if self._has_several_authors:
            raise RuntimeError(
                "several threads or tasks chose profiles with select(), and this one has not: call select() here too"
            )
        return self._last

    def _of_thread(self) -> list[int] | None:
        thread = self._threads.mine
        if thread.has_several_tasks and not thread.is_pinned:
            raise RuntimeError("several tasks of one thread choose profiles, which compiled code cannot tell apart")
        return thread.slots

    @contextlib.contextmanager
    def pinned(self) -> Iterator[None]:
        """Holds the selection of this context for compiled code, as long as the caller runs no other task."""
        thread = self._threads.mine
        before = thread.slots, thread.is_pinned
        thread.slots, thread.is_pinned = self._in_context.get() or thread.slots, True
        try:
            yield
        finally:
            thread.slots, thread.is_pinned = before


def slots_of_sequences(selected: list[int], sequences: int) -> list[int]:
    """The slot of each sequence.

    Raises
    ------
    ValueError
        The selection is for another number of sequences.
    """
    if len(selected) > 1 and len(selected) != sequences:
        raise ValueError(f"profiles are selected for {len(selected)} sequences, but there are {sequences}")
    return selected if len(selected) == sequences else selected * sequences


def _current_task() -> int:
    """A number for the asynchronous task that runs; 0 outside any."""
    try:
        task = asyncio.current_task()
    except RuntimeError:
        return 0
    return 0 if task is None else id(task)
