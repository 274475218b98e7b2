"""The folder in which the processes of one server on this machine exchange files: the registry, totals, and answers.

Each process leaves a claim there: its number and its start time. The last process removes the folder. If all were
killed, the next server that starts removes it. Claims need Linux, as the engines do.
"""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import functools
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from axiscap.serving.request import SettingsError

#: What a worker writes, by the names of the failures that the totals count.
WRITTEN = ("totals", "log", "answers")
_CLAIM = "process-"
#: Seconds for which a folder without a claim may be one that is just being created.
_FRESH = 60
#: Seconds for which an answer is kept for its client.
_KEPT = 120


def folder_path(instance: str) -> Path:
    """The path of a server's folder, which need not exist yet."""
    return Path(tempfile.gettempdir()) / f"axiscap-{os.getuid()}" / re.sub(r"[^A-Za-z0-9._-]", "_", instance)


def folder(instance: str) -> Path:
    """The folder of a server. It is created if necessary, and released when this process ends.

    Raises
    ------
    SettingsError
        The folder belongs to another user.
    """
    path = folder_path(instance)
    _make(path)
    _leave_at_exit(path, os.getpid())
    for other in path.parent.iterdir():
        if other != path and not _is_used(other):
            shutil.rmtree(other, ignore_errors=True)
    return path


@functools.cache  # once in each process: after a fork the number is another
def _leave_at_exit(path: Path, pid: int) -> None:
    def leave() -> None:
        if pid != os.getpid():  # a fork's inheritance
            return
        (path / _claim(pid)).unlink(missing_ok=True)
        if not _is_claimed(path):
            shutil.rmtree(path, ignore_errors=True)

    atexit.register(leave)


def _claim(pid: int) -> str:
    """The name of a process's claim, with its start time, since numbers are reused. Empty if the process has ended."""
    try:
        begun = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return ""
    return f"{_CLAIM}{pid}-{begun}"


def _is_claimed(path: Path) -> bool:
    """Whether a process with a claim still runs."""
    names = [claim.name for claim in path.glob(f"{_CLAIM}*-*")]
    return any(_claim(int(name.removeprefix(_CLAIM).split("-")[0])) == name for name in names)


def _is_used(path: Path) -> bool:
    with contextlib.suppress(OSError):  # it may go away meanwhile
        claimed = next(path.glob(f"{_CLAIM}*-*"), None) is not None
        return _is_claimed(path) if claimed else time.time() - path.stat().st_mtime < _FRESH
    return True


def write(file: Path, content: object) -> None:
    """Writes JSON in one step. A folder that was cleaned away is created and claimed again.

    Raises
    ------
    OSError
        The file cannot be written.
    SettingsError
        The folder belongs to another user now.
    """
    _make(file.parent)
    partial = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        partial.write_text(json.dumps(content))
        os.replace(partial, file)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def write_answer(folder: Path, ticket: str, content: Mapping[str, Any]) -> None:
    """Leaves the readings of an answer for the process that has its client, under the ticket of that process.

    Raises
    ------
    OSError, SettingsError
        see :func:`write`.
    """
    write(folder / f"answer-{ticket}-{time.monotonic_ns()}.json", content)


def drop_answers(folder: Path) -> None:
    """Removes answers that no client fetched: those older than the longest wait."""
    for file in folder.glob("answer-*.json"):
        with contextlib.suppress(OSError):  # taken meanwhile
            if time.time() - file.stat().st_mtime > _KEPT:
                file.unlink()


async def await_answers(folder: Path, tickets: Mapping[str, int], seconds: float) -> dict[str, list[dict[str, Any]]]:
    """The answers under each ticket, once there are as many as its number, or when the time is up."""
    answers: dict[str, list[dict[str, Any]]] = {ticket: [] for ticket in tickets}
    until = time.monotonic() + seconds
    while missing := [ticket for ticket, count in tickets.items() if len(answers[ticket]) < count]:
        if time.monotonic() > until:
            break
        await asyncio.sleep(0.005)
        for ticket in missing:
            answers[ticket] += take_answers(folder, ticket)
    return answers


def take_answers(folder: Path, ticket: str) -> list[dict[str, Any]]:
    """Removes and returns the answers under a ticket, oldest first."""
    answers = []
    for file in sorted(folder.glob(f"answer-{ticket}-*.json")):
        with contextlib.suppress(OSError, ValueError):
            answers.append(json.loads(file.read_text()))
            file.unlink()
    return answers


def _make(path: Path) -> None:
    base = path.parent
    base.mkdir(mode=0o700, parents=True, exist_ok=True)
    owner = base.lstat()
    if owner.st_uid != os.getuid() or base.is_symlink() or owner.st_mode & 0o077:
        raise SettingsError(f"axiscap: {base} must be a folder of this user's own that nobody else may enter")
    path.mkdir(mode=0o700, exist_ok=True)
    (path / _claim(os.getpid())).touch()
