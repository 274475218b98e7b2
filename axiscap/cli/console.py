"""The terminal that all commands print to: titled tables, and progress bars."""

from __future__ import annotations

import sys
import time
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

#: A file or a pipe has no width, so the tables get a fixed one.
console = Console(width=None if sys.stdout.isatty() else 140)
_SECONDS_BETWEEN_LINES = 60


def print_line(text: str, style: str | None = None) -> None:
    """Prints a text as it is: without markup, and without line breaks inside paths."""
    console.print(escape(text), style=style, soft_wrap=True)


def print_error_line(text: str) -> None:
    Console(stderr=True).print(text, highlight=False, soft_wrap=True)


def print_table(title: str, table: Table) -> None:
    """Prints a table below its title. The title has its own line, because rich breaks a table's title at its width."""
    console.print(f"\n[bold]{escape(title)}[/bold]")
    console.print(table)


class _Rate(ProgressColumn):
    """Finished items per second."""

    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:.1f}/s" if task.speed else "")


def progress_bar(rate: bool = False) -> Progress:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        *([_Rate()] if rate else []),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=console)


class Stages:
    """Progress through successive stages: one bar for each stage in a terminal, else one line a minute on stderr."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._tasks: dict[str, Any] = {}
        self._last_line = time.monotonic()

    def __call__(self, stage: str, done: int, total: int) -> None:
        if stage not in self._tasks:
            self._tasks[stage] = self._progress.add_task(stage, total=total)
        task_id = self._tasks[stage]
        self._progress.advance(task_id, done)
        now = time.monotonic()
        if console.is_terminal or now - self._last_line < _SECONDS_BETWEEN_LINES:
            return
        self._last_line = now
        task = next(task for task in self._progress.tasks if task.id == task_id)
        rate = f", {task.speed:.1f}/s" if task.speed else ""
        left = f", {task.time_remaining / 60:.0f} min left" if task.time_remaining else ""
        print(f"{stage}: {task.completed:.0f} of {total}{rate}{left}", file=sys.stderr, flush=True)
