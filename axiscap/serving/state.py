"""The folder where the processes of one server on this machine meet: the registry, and the totals for its metrics."""

from __future__ import annotations

import json
import os
import re
import tempfile
from pathlib import Path

from axiscap.serving.settings import SettingsError


def path(instance: str) -> Path:
    """Where a server's folder is, or will be."""
    return Path(tempfile.gettempdir()) / f"axiscap-{os.getuid()}" / re.sub(r"[^A-Za-z0-9._-]", "_", instance)


def folder(instance: str) -> Path:
    """The folder of a server, made where it is not there.

    Raises:
        SettingsError: it is somebody else's.
    """
    found = path(instance)
    _make(found)
    return found


def write(file: Path, content: object) -> None:
    """Writes JSON in one step, into a folder that :func:`folder` gave; it is made anew where it was cleaned away.

    Raises:
        OSError: it cannot be written.
        SettingsError: the folder is somebody else's now.
    """
    _make(file.parent)
    partial = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        partial.write_text(json.dumps(content))
        os.replace(partial, file)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def _make(found: Path) -> None:
    base = found.parent
    base.mkdir(mode=0o700, parents=True, exist_ok=True)
    owner = base.lstat()
    if owner.st_uid != os.getuid() or base.is_symlink() or owner.st_mode & 0o077:
        raise SettingsError(f"axiscap: {base} must be a folder of this user's own that nobody else may enter")
    found.mkdir(mode=0o700, exist_ok=True)
