"""Where a profile is loaded from: a path or a URL, optionally followed by ``#`` and the digest of its content."""

from __future__ import annotations

import contextlib
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

from axiscap.profile.checks import ProfileError, require
from axiscap.profile.file import MAX_FILE_BYTES

_DIGEST = re.compile("(.*)#([0-9a-f]{32})", re.DOTALL)


def is_url(location: str) -> bool:
    """Whether a location is a URL of fsspec, and not a path."""
    return re.match(r"[a-zA-Z][\w+.-]*://", location) is not None


def split_digest(location: str) -> tuple[str, str | None]:
    """The location without its digest, and the digest if it has one."""
    match = _DIGEST.fullmatch(location)
    return (match[1], match[2]) if match else (location, None)


@contextlib.contextmanager
def open_location(location: str) -> Iterator[Path]:
    """The path of a local file; for a URL, of a temporary copy.

    Raises
    ------
    FileNotFoundError
        the URL's store has no such file.
    ProfileError
        the URL cannot be fetched, or its content is larger than a profile may be.
    """
    if not is_url(location):
        yield Path(location)
        return
    with tempfile.NamedTemporaryFile(suffix=".safetensors") as file:
        file.write(_fetch(location))
        file.flush()
        yield Path(file.name)


def _fetch(url: str) -> bytes:
    import fsspec

    try:
        with fsspec.open(url, "rb") as source:
            content: bytes = source.read(MAX_FILE_BYTES + 1)
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no {url}") from None
    except Exception as error:  # each store raises classes of its own; the store's package may be missing too
        raise ProfileError(f"it cannot be fetched: {error}") from None
    require(len(content) <= MAX_FILE_BYTES, f"more than the {MAX_FILE_BYTES} bytes that it may have")
    return content
