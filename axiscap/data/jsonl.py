"""Reading JSONL: one JSON value on each line, in UTF-8. Only a line feed ends a line."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

#: An escape sequence of a surrogate. JSON writes a character beyond U+FFFF as a pair of two.
_SURROGATE_ESCAPE = re.compile(rb"\\u[dD][89a-fA-F]")
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


class NotJsonError(ValueError):
    """Bytes are no JSON; the message says why."""


@dataclass(frozen=True)
class Line:
    """A line of a file that is not blank; ``number`` counts from 1, with the blank lines."""

    path: Path
    number: int
    content: bytes

    def parse(self) -> Any:
        """The line's value.

        Raises
        ------
        NotJsonError
            without the file and the line, which :meth:`error` adds.
        """
        value = parse_json(self.content)
        return check_characters(value) if _SURROGATE_ESCAPE.search(self.content) else value

    def error(self, reason: str, cause: Exception | None = None) -> ValueError:
        """The error to raise about this line. It names the file and the line, and the cause if the line is no JSON."""
        detail = f": {cause}" if isinstance(cause, NotJsonError) else ""
        return ValueError(f"{self.path}, line {self.number}: {reason}{detail}")


def read_lines(path: Path, *, complete: bool = False) -> Iterator[Line]:
    """The lines of a file that are not blank, one at a time in memory. A byte order mark is no part of the first line.

    Parameters
    ----------
    complete
        leaves out a last line without a line feed, which remains of a process that was killed while it wrote.
    """
    with path.open("rb") as file:
        for number, content in enumerate(file, start=1):
            if number == 1:
                content = content.removeprefix(codecs.BOM_UTF8)
            if content.strip() and (content.endswith(b"\n") or not complete):
                yield Line(path, number, content)


def shipped(name: str) -> list[dict[str, Any]]:
    """The entries of a JSONL file that AxisCap ships."""
    return [line.parse() for line in read_lines(Path(str(files("axiscap.data") / name)))]


def parse_json(content: bytes) -> Any:
    """The value of a JSON text in UTF-8, after a byte order mark if there is one.

    Raises
    ------
    NotJsonError
        naming the reason.
    """
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in content:
        raise NotJsonError("not JSON (its encoding must be UTF-8, and seems to be UTF-16)")
    try:
        return json.loads(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise NotJsonError(f"not JSON (its encoding must be UTF-8: {error.reason})") from None
    except (ValueError, RecursionError) as error:
        raise NotJsonError(f"not JSON ({error})") from None


def check_characters(value: Any) -> Any:
    """The value itself, if all its strings consist of characters; JSON also allows half of a surrogate pair.

    Raises
    ------
    NotJsonError
        naming the half.
    """
    half = _LONE_SURROGATE.search(json.dumps(value, ensure_ascii=False, default=str))
    if half is not None:
        raise NotJsonError(f"not Unicode text (U+{ord(half[0]):04X} is half of a surrogate pair)")
    return value


def to_text(value: Any, name: str) -> str:
    """The value itself, if it is a string that is not blank.

    Raises
    ------
    ValueError
        naming the value.
    """
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{name} must be a text that is not blank")
    return value


def to_label(value: Any) -> str:
    """A string or a number as text. Null, a missing value (None), a list and an object are no label, and give ""."""
    return str(value) if isinstance(value, str | int | float) else ""
