"""Roles and questions, in the layout published with the paper."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

#: The role that stands for the Assistant itself.
DEFAULT_ROLE = "default"


@dataclass(frozen=True)
class Role:
    """A character: its name and the system prompts that ask for it. An empty prompt is no system prompt."""

    name: str
    prompts: tuple[str, ...]


def load_roles(folder: Path | None = None) -> dict[str, Role]:
    """The roles of a folder of JSON files ``{"instruction": [{"pos": prompt}, ...]}``, by name; without one, AxisCap's.

    Raises:
        ValueError: naming the file that is not a role, or that ``default.json`` is missing.
    """
    source = folder or Path(str(files("axiscap.data") / "roles"))
    roles = {}
    for path in sorted(source.glob("*.json")):
        try:
            prompts = tuple(str(entry["pos"]) for entry in json.loads(path.read_text("utf-8"))["instruction"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: not a role, it must have an 'instruction' list with 'pos' ({error})") from None
        if not prompts:
            raise ValueError(f"{path}: the role has no prompt")
        roles[path.stem] = Role(path.stem, prompts)
    if DEFAULT_ROLE not in roles:
        raise ValueError(f"{source}: no {DEFAULT_ROLE}.json, the role of the Assistant itself")
    if len(roles) < 3:
        raise ValueError(f"{source}: at least two roles beside the default are needed, got {len(roles) - 1}")
    return roles


def load_questions(path: Path | None = None) -> list[str]:
    """The questions of a JSONL file ``{"question": ..., "id": ...}``; AxisCap's own without one.

    Raises:
        ValueError: naming the line that is not a question.
    """
    source = path or Path(str(files("axiscap.data") / "questions.jsonl"))
    questions = []
    for number, line in enumerate(source.read_text("utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            questions.append(str(json.loads(line)["question"]))
        except (ValueError, KeyError, TypeError):
            raise ValueError(f'{source}, line {number}: not a question, it must be {{"question": ...}}') from None
    if len(questions) < 4:
        raise ValueError(f"{source}: at least four questions are needed, got {len(questions)}")
    return questions
