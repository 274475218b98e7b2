"""What a persona jailbreak asks for: behaviours of AxisCap's own, and of the files that people have."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from axiscap.calibrate import Role, load_roles
from axiscap.calibrate.data import shipped
from axiscap.jsonl import read_lines, to_label

#: Columns that hold the request, in order: StrongREJECT's, JailbreakBench's (which has a Behavior too, a mere title),
#: HarmBench's, and those of a JSONL file.
REQUEST = ("forbidden_prompt", "Goal", "Behavior", "request")
_CATEGORY = ("category", "Category", "SemanticCategory")
_NAME = ("BehaviorID", "id", "Index")
#: Kind of the roles that jailbreak.
HOSTILE = "hostile"


@dataclass(frozen=True)
class Behaviour:
    """A request, and the category that its file puts it in."""

    name: str
    category: str
    request: str


def own() -> list[Behaviour]:
    """AxisCap's own, which a good model declines and whose answer harms nobody."""
    return [Behaviour(entry["id"], entry["category"], entry["request"]) for entry in shipped("behaviours.jsonl")]


def look_alikes() -> list[Behaviour]:
    """For each of AxisCap's own, a harmless request that looks like it."""
    return [Behaviour(entry["id"], entry["category"], entry["harmless"]) for entry in shipped("behaviours.jsonl")]


def read(path: Path) -> list[Behaviour]:
    """The behaviours of a CSV file of JailbreakBench, HarmBench or StrongREJECT, or of JSONL ``{"request": ...}``.

    HarmBench's ``ContextString`` goes before the request that refers to it.

    Raises
    ------
    ValueError
        naming the file, and the line or the columns that it lacks.
    OSError
        the file cannot be read.
    """
    found: list[Behaviour] = []
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
        found.append(Behaviour(name, category, f"{context}\n\n---\n\n{request}" if context else request))
    if not found:
        raise ValueError(f"{path}: no behaviour in it")
    names = [behaviour.name for behaviour in found]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"{path}: behaviours must have names of their own, and {twice[0]!r} comes twice")
    return found


def _rows(path: Path) -> Iterable[tuple[int, Mapping[str, str]]]:
    """The rows of a file with the line that each ends on."""
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
    """System prompts that ask for a persona, each with a name: the first prompts of all roles, then the second ones.

    Without a folder they are AxisCap's hostile roles; of a folder, those of kind ``hostile``, or where none has a kind
    all but the default.

    Raises
    ------
    ValueError
        naming the file that is not a role, or that there is none to use.
    """
    roles: list[Role] = [role for role in load_roles(folder).values() if role.name != "default"]
    chosen = [role for role in roles if role.kind == HOSTILE] or [role for role in roles if not role.kind]
    if not chosen:
        raise ValueError(f"{folder}: no role of kind {HOSTILE!r} in it")
    most = max(len(role.prompts) for role in chosen)
    return [(f"{role.name}/{at}", role.prompts[at]) for at in range(most) for role in chosen if at < len(role.prompts)]
