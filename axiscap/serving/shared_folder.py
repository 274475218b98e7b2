"""The folder where the processes of one server on this machine meet: the registry, and the totals for its metrics.

Each process that uses a folder leaves a claim there, its number and when it began. A folder goes with the last of them;
where they were killed, the next server that starts takes it away. (Of Linux, like the engines.)
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
#: A folder without a claim may be one that is just being made, for so many seconds.
_FRESH = 60
#: Seconds that an answer's word waits for who asks for it.
_KEPT = 120


def folder_path(instance: str) -> Path:
    """Where a server's folder is, or will be."""
    return Path(tempfile.gettempdir()) / f"axiscap-{os.getuid()}" / re.sub(r"[^A-Za-z0-9._-]", "_", instance)


def folder(instance: str) -> Path:
    """The folder of a server, made where it is not there, which this process leaves when it ends.

    Raises
    ------
    SettingsError
        it is somebody else's.
    """
    found = folder_path(instance)
    _make(found)
    _leave_at_exit(found, os.getpid())
    for other in found.parent.iterdir():
        if other != found and not _is_used(other):
            shutil.rmtree(other, ignore_errors=True)
    return found


@functools.cache  # once in each process: after a fork the number is another
def _leave_at_exit(found: Path, pid: int) -> None:
    def leave() -> None:
        if pid != os.getpid():  # a fork's inheritance
            return
        (found / _claim(pid)).unlink(missing_ok=True)
        if not _is_claimed(found):
            shutil.rmtree(found, ignore_errors=True)

    atexit.register(leave)


def _claim(pid: int) -> str:
    """The name of a process's claim, which another process of the same number, begun later, has not. Empty: it has
    ended.
    """
    try:
        begun = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return ""
    return f"{_CLAIM}{pid}-{begun}"


def _is_claimed(found: Path) -> bool:
    """Whether a process that uses the folder lives."""
    names = [claim.name for claim in found.glob(f"{_CLAIM}*-*")]
    return any(_claim(int(name.removeprefix(_CLAIM).split("-")[0])) == name for name in names)


def _is_used(found: Path) -> bool:
    with contextlib.suppress(OSError):  # it may go away meanwhile
        claimed = next(found.glob(f"{_CLAIM}*-*"), None) is not None
        return _is_claimed(found) if claimed else time.time() - found.stat().st_mtime < _FRESH
    return True


def write(file: Path, content: object) -> None:
    """Writes JSON in one step, into a folder that :func:`folder` gave; it is made and claimed anew where it was cleaned
    away.

    Raises
    ------
    OSError
        it cannot be written.
    SettingsError
        the folder is somebody else's now.
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
    """Leaves word of an answer for the process that has its client, which names it by a ticket of its own making.

    Raises
    ------
    OSError, SettingsError
        see :func:`write`.
    """
    write(folder / f"answer-{ticket}-{time.monotonic_ns()}.json", content)


def drop_answers(folder: Path) -> None:
    """Takes away what nobody came for, since the client was gone: what lies there longer than anybody waits."""
    for file in folder.glob("answer-*.json"):
        with contextlib.suppress(OSError):  # taken meanwhile
            if time.time() - file.stat().st_mtime > _KEPT:
                file.unlink()


async def await_answers(folder: Path, tickets: Mapping[str, int], seconds: float) -> dict[str, list[dict[str, Any]]]:
    """What was left under each ticket, once there are as many answers as it says, or when the time is up."""
    found: dict[str, list[dict[str, Any]]] = {ticket: [] for ticket in tickets}
    until = time.monotonic() + seconds
    while missing := [ticket for ticket, answers in tickets.items() if len(found[ticket]) < answers]:
        if time.monotonic() > until:
            break
        await asyncio.sleep(0.005)
        for ticket in missing:
            found[ticket] += take_answers(folder, ticket)
    return found


def take_answers(folder: Path, ticket: str) -> list[dict[str, Any]]:
    """What was left under a ticket, oldest first; it is gone then."""
    found = []
    for file in sorted(folder.glob(f"answer-{ticket}-*.json")):
        with contextlib.suppress(OSError, ValueError):
            found.append(json.loads(file.read_text()))
            file.unlink()
    return found


def _make(found: Path) -> None:
    base = found.parent
    base.mkdir(mode=0o700, parents=True, exist_ok=True)
    owner = base.lstat()
    if owner.st_uid != os.getuid() or base.is_symlink() or owner.st_mode & 0o077:
        raise SettingsError(f"axiscap: {base} must be a folder of this user's own that nobody else may enter")
    found.mkdir(mode=0o700, exist_ok=True)
    (found / _claim(os.getpid())).touch()
