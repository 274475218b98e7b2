"""Roles and questions, in the layout published with the paper, and the plan of which role is asked which question."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import TypeVar

from axiscap.data.jsonl import parse_json, read_lines, to_label, to_text

#: The role that stands for the Assistant itself.
DEFAULT_ROLE = "default"
#: One role in this many, and one question in this many, is held out: it tests the axis and does not make it.
HOLD_OUT = 4

Item = TypeVar("Item")


@dataclass(frozen=True)
class Role:
    """A character: its name, its system prompts (an empty one: no system prompt), and the judge's prompt."""

    name: str
    prompts: tuple[str, ...]
    kind: str = ""
    eval_prompt: str = ""


def load_roles(folder: Path | None = None, model_name: str = "an AI model") -> dict[str, Role]:
    """The roles of a folder of JSON files, by name; without a folder, those that AxisCap ships.

    Parameters
    ----------
    folder
        of files ``{"instruction": [{"pos": prompt}, ...]}``, which may also have ``kind`` and ``eval_prompt``.
    model_name
        replaces ``{model_name}`` in prompts.

    Returns
    -------
    dict[str, Role]
        With the Assistant as ``default``.

    Raises
    ------
    ValueError
        a file is not a role, ``default.json`` is missing, or there are fewer than two roles beside it.

    Examples
    --------
    >>> from axiscap import calibrate
    >>> "default" in calibrate.load_roles()
    True
    """
    source = folder or Path(str(files("axiscap.data") / "roles"))
    roles = {}
    for path in sorted(source.glob("*.json")):
        try:
            content = parse_json(path.read_bytes())
            prompts = [entry["pos"].replace("{model_name}", model_name) for entry in content["instruction"]]
            kind, judge = to_label(content.get("kind")), to_label(content.get("eval_prompt"))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: not a role, it must have an 'instruction' list with 'pos' ({error})") from None
        if not prompts:
            raise ValueError(f"{path}: the role has no prompt")
        roles[path.stem] = Role(path.stem, tuple(prompts), kind, judge)
    if DEFAULT_ROLE not in roles:
        raise ValueError(f"{source}: no {DEFAULT_ROLE}.json, the role of the Assistant itself")
    if len(roles) < 3:
        raise ValueError(f"{source}: at least two roles beside the default are needed, got {len(roles) - 1}")
    return roles


def load_questions(path: Path | None = None) -> list[str]:
    """The questions of a JSONL file ``{"question": ..., "id": ...}``; without a file, those that AxisCap ships.

    Parameters
    ----------
    path
        the file.

    Returns
    -------
    list[str]
        In the file's order.

    Raises
    ------
    ValueError
        a line is not a question, or there are fewer than four.

    Examples
    --------
    >>> from axiscap import calibrate
    >>> len(calibrate.load_questions()) > 20
    True
    """
    source = path or Path(str(files("axiscap.data") / "questions.jsonl"))
    questions = []
    for line in read_lines(source):
        try:
            questions.append(to_text(line.parse()["question"], "question"))
        except (ValueError, KeyError, TypeError) as error:
            raise line.error('not a question, it must be {"question": ...}', error) from None
    if len(questions) < 4:
        raise ValueError(f"{source}: at least four questions are needed, got {len(questions)}")
    return questions


@dataclass(frozen=True)
class Task:
    """One question to one role under one of its prompts (an empty one: no system prompt).

    ``history``: the turns before the question, the user's first, then the model's, and so on. The names of shards are
    digests of these fields in order.
    """

    role: str
    prompt: int
    question: int
    system: str
    text: str
    history: tuple[str, ...] = ()

    @property
    def id(self) -> str:
        """The task's name, which also seeds its sampling."""
        return f"{self.role}/{self.prompt}/{self.question}"

    def messages(self, system_role: bool) -> list[dict[str, str]]:
        """The conversation for a chat template. Without a system role, the system prompt joins the first turn."""
        turns = [*self.history, self.text]
        if self.system and not system_role:
            turns[0] = f"{self.system}\n\n{turns[0]}"
        messages = [
            {"role": ("user", "assistant")[number % 2], "content": content} for number, content in enumerate(turns)
        ]
        if self.system and system_role:
            messages.insert(0, {"role": "system", "content": self.system})
        return messages

    def completion(self) -> str:
        """The conversation as a text for a base model to continue."""
        turns = [*self.history, self.text]
        lines = [f"{('Question', 'Answer')[number % 2]}: {content}" for number, content in enumerate(turns)]
        return f"{self.system}\n\n" * bool(self.system) + "\n".join([*lines, "Answer:"])


@dataclass(frozen=True)
class Plan:
    """The questions of each role. Held-out roles are asked held-out questions only; neither makes the axis.

    The default answers all questions, for the floors. The axis and its tests compare only the default's answers to
    questions that roles are asked too. Otherwise the axis would also point from some questions to others.
    """

    roles: Mapping[str, Role]
    questions: Sequence[str]
    train_roles: tuple[str, ...]
    held_roles: tuple[str, ...]
    held_questions: frozenset[int]
    tasks: tuple[Task, ...]

    @cached_property
    def role_questions(self) -> dict[int, int]:
        """The questions that roles are asked, each with its position: first those that make the axis, then held-out."""
        questions = {task.question for task in self.tasks if task.role != DEFAULT_ROLE}
        ordered = sorted(questions, key=lambda question: (question in self.held_questions, question))
        return {question: position for position, question in enumerate(ordered)}

    def is_held_out(self, task: Task) -> bool:
        return task.question in self.held_questions or task.role in self.held_roles

    def makes_the_axis(self, task: Task) -> bool:
        return not self.is_held_out(task) and task.question in self.role_questions

    def tests_the_axis(self, task: Task) -> bool:
        """Whether a test of the axis compares this answer, of the default or of a held-out role."""
        return task.question in self.held_questions and task.question in self.role_questions

    @property
    def digest(self) -> str:
        """SHA-256 of the roles' prompts and the questions."""
        sources = {
            "roles": {name: role.prompts for name, role in self.roles.items()},
            "questions": list(self.questions),
        }
        return hashlib.sha256(json.dumps(sources, sort_keys=True).encode()).hexdigest()


def plan(roles: Mapping[str, Role], questions: Sequence[str], per_role: int | None = None) -> Plan:
    """Plans every question to the default under each of its prompts, and `per_role` tasks for every role.

    Parameters
    ----------
    roles
        the roles by name, the default included.
    questions
        the questions.
    per_role
        the tasks of a role, spread over its prompts and the questions; None: each prompt with each question.

    Returns
    -------
    Plan
        The same arguments give the same tasks in the same order.

    Examples
    --------
    >>> from axiscap import calibrate
    >>> roles = calibrate.load_roles()
    >>> few = {name: roles[name] for name in ("default", *sorted(set(roles) - {"default"})[:2])}
    >>> plan = calibrate.plan(few, calibrate.load_questions()[:3], per_role=3)
    """
    # The roles are sorted by kind and name, so that a quarter of each kind is held out.
    names = sorted((name for name in roles if name != DEFAULT_ROLE), key=lambda name: (roles[name].kind, name))
    held_roles = names[HOLD_OUT - 1 :: HOLD_OUT]
    held_questions = list(range(HOLD_OUT - 1, len(questions), HOLD_OUT))
    train_questions = [i for i in range(len(questions)) if i not in held_questions]
    tasks = []
    for name in [DEFAULT_ROLE, *names]:
        prompts = roles[name].prompts
        numbers = list(range(len(questions)))
        if name != DEFAULT_ROLE:
            numbers = held_questions if name in held_roles else train_questions
        pairs = [(p, q) for p in range(len(prompts)) for q in numbers]
        if name != DEFAULT_ROLE and per_role is not None and per_role < len(pairs):
            # Every role gets the same questions, so that roles do not differ by their questions.
            pairs = [(i % len(prompts), numbers[i * len(numbers) // per_role % len(numbers)]) for i in range(per_role)]
            pairs = list(dict.fromkeys(pairs))
        tasks += [Task(name, p, q, prompts[p], questions[q]) for p, q in pairs]
    train_roles = [name for name in names if name not in held_roles]
    return Plan(roles, questions, tuple(train_roles), tuple(held_roles), frozenset(held_questions), tuple(tasks))


#: The most rollouts in a batch, which is generated at once and written as one shard.
BATCH = 32


def batches(plan: Plan) -> list[list[Task]]:
    """A plan's tasks in batches; see :func:`in_batches`."""
    return in_batches(plan.tasks)


def even_sample(items: list[Item], most: int) -> list[Item]:
    """At most `most` of the items, at equal distances."""
    return items[:: -(-len(items) // most)] if items else []


def in_batches(tasks: Sequence[Task]) -> list[list[Task]]:
    """Tasks in batches of similar length, so that there is little padding."""
    ordered = sorted(tasks, key=lambda task: (len(task.system) + len(task.text), task.id))
    return [ordered[start : start + BATCH] for start in range(0, len(ordered), BATCH)]
