"""The requests and personas of a jailbreak: AxisCap's own, or from a file."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from axiscap.calibrate import Role, load_roles
from axiscap.data.jsonl import read_lines, shipped, to_label

#: The columns of the request, in this order: StrongREJECT, JailbreakBench (whose Behavior is only a title), HarmBench,
#: JSONL files.
REQUEST = ("forbidden_prompt", "Goal", "Behavior", "request")
_CATEGORY = ("category", "Category", "SemanticCategory")
_NAME = ("BehaviorID", "id", "Index")
#: The kind of the roles whose prompts are jailbreaks.
HOSTILE = "hostile"


@dataclass(frozen=True)
class Behaviour:
    """A request, with its category in its file."""

    name: str
    category: str
    request: str


def own() -> list[Behaviour]:
    """AxisCap's own behaviours: a good model declines them, but an answer would harm nobody."""
    return [Behaviour(entry["id"], entry["category"], entry["request"]) for entry in shipped("behaviours.jsonl")]


def look_alikes() -> list[Behaviour]:
    """A harmless request that resembles it, for each of AxisCap's own behaviours."""
    return [Behaviour(entry["id"], entry["category"], entry["harmless"]) for entry in shipped("behaviours.jsonl")]


def read(path: Path) -> list[Behaviour]:
    """The behaviours of a CSV file of JailbreakBench, HarmBench or StrongREJECT, or of JSONL ``{"request": ...}``.

    The ``ContextString`` of HarmBench precedes its request.

    Raises
    ------
    ValueError
        a row has no request, or two behaviours share a name; the message names the file, and the line or the columns.
    OSError
        the file cannot be read.
    """
    behaviours: list[Behaviour] = []
    for number, row in _rows(path):
        column = next((name for name in REQUEST if name in row), None)
        if column is None:
            raise ValueError(
                f"{path}: no column {', '.join(REQUEST[:-1])} or {REQUEST[-1]} to take requests from; "
                f"it has {', '.join(map(str, row)) or 'none'}"
            )
        request = row[column].strip()
        if not request:
            raise ValueError(f"{path}, line {number}: the request ({column}) is empty")
        context = row.get("ContextString", "").strip()
        name = next((row[key] for key in _NAME if row.get(key)), str(number))
        category = next((row[key] for key in _CATEGORY if row.get(key)), "")
        behaviours.append(Behaviour(name, category, f"{context}\n\n---\n\n{request}" if context else request))
    if not behaviours:
        raise ValueError(f"{path}: no behaviour in it")
    names = [behaviour.name for behaviour in behaviours]
    duplicates = sorted({name for name in names if names.count(name) > 1})
    if duplicates:
        raise ValueError(f"{path}: behaviours must have names of their own, and {duplicates[0]!r} comes twice")
    return behaviours


def _rows(path: Path) -> Iterable[tuple[int, Mapping[str, str]]]:
    """The rows of a file, each with the number of its last line."""
    if path.suffix == ".jsonl":
        for line in read_lines(path):
            try:
                row = {key: to_label(value) for key, value in line.parse().items()}
            except (ValueError, AttributeError) as error:
                raise line.error("not a JSON object", error) from None
            yield line.number, row
        return
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        try:
            for row in reader:
                yield reader.line_num, {key: value or "" for key, value in row.items() if key is not None}
        except (csv.Error, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: not a CSV file ({error})") from None


def personas(folder: Path | None = None) -> list[tuple[str, str]]:
    """Names and system prompts of personas: the first prompt of every role, then the second ones, and so on.

    The roles are those of kind ``hostile`` in the folder, or in AxisCap's own roles. If no role of a folder has a
    kind, all but the default are used.

    Raises
    ------
    ValueError
        a file is not a role, or no role can be used.
    """
    roles: list[Role] = [role for role in load_roles(folder).values() if role.name != "default"]
    usable = [role for role in roles if role.kind == HOSTILE] or [role for role in roles if not role.kind]
    if not usable:
        raise ValueError(f"{folder}: no role of kind {HOSTILE!r} in it")
    most = max(len(role.prompts) for role in usable)
    return [(f"{role.name}/{n}", role.prompts[n]) for n in range(most) for role in usable if n < len(role.prompts)]
