"""Was the role taken on? 0 to 3, as published; an answer of 3 counts."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from axiscap.calibrate.data import DEFAULT_ROLE, Role, Task
from axiscap.calibrate.endpoint import CONCURRENT, Endpoint
from axiscap.calibrate.store import Shard
from axiscap.jsonl import read_lines

#: The score from which an answer is one of the role.
TAKEN_ON = 3
#: From a question to a score, or to None where the reply had none.
Judge = Callable[[str], int | None]


def question_to_the_judge(role: Role, task: Task, answer: str) -> str:
    """The role's ``eval_prompt`` about one answer.

    Raises
    ------
    ValueError
        the role has none.
    """
    if not role.eval_prompt:
        raise ValueError(f"the role {role.name} has no eval_prompt to ask a judge with; use --judge none")
    return role.eval_prompt.replace("{question}", task.text).replace("{answer}", answer)


def read_score(text: str) -> int | None:
    """The first number from 0 to 3 in a judge's reply; None where there is none."""
    found = re.search(r"(?<![\d.])[0-3](?![\d.]*\d)", text)
    return int(found.group()) if found else None


def endpoint(model: str, base_url: str | None = None) -> Judge:
    """A judge behind an OpenAI-compatible endpoint; see :class:`Endpoint`."""
    behind = Endpoint(base_url)

    def ask(question: str) -> int | None:
        return read_score(behind.chat(model, [{"role": "user", "content": question}], max_tokens=10, temperature=0))

    return ask


def local(model: Any, tokenizer: Any) -> Judge:
    """The model itself: the likeliest of the four numbers as the first token of its reply. A small one judges badly."""
    numbers = [tokenizer.encode(str(n), add_special_tokens=False)[-1] for n in range(4)]

    @torch.inference_mode()
    def ask(question: str) -> int:
        inputs = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        ).to(model.device)
        return int(model(**inputs, logits_to_keep=1).logits[0, -1, numbers].argmax())

    return ask


def scores(
    judge: Judge,
    shards: Iterable[Shard],
    roles: Mapping[str, Role],
    path: Path,
    progress: Callable[[int], None] = lambda _: None,
    concurrent: int = CONCURRENT,
) -> dict[str, int | None]:
    """The scores of all roles' answers, by rollout; None where the judge's reply had no number from 0 to 3.

    They are kept in a file, line by line, so that none is asked twice.

    Parameters
    ----------
    judge
        whom to ask.
    shards
        the answers.
    roles
        with their ``eval_prompt``.
    path
        the file, JSONL ``{"id", "score"}``.
    progress
        called with each number judged.
    concurrent
        questions under way at once.

    Raises
    ------
    ValueError
        more than half of the replies had no number, once there were 32.
    """
    known: dict[str, int | None] = {}
    if path.exists():
        for line in read_lines(path, complete=True):
            entry = line.parse()
            known[entry["id"]] = entry["score"]
        path.write_text("".join(json.dumps({"id": i, "score": s}) + "\n" for i, s in known.items()))
    unreadable = list(known.values()).count(None)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file, ThreadPoolExecutor(concurrent) as pool:
        for shard in shards:
            asked = [(t, a) for t, a in zip(shard.tasks, shard.texts, strict=True) if t.role != DEFAULT_ROLE]
            asked = [(task, answer) for task, answer in asked if task.id not in known]
            questions = [question_to_the_judge(roles[task.role], task, answer) for task, answer in asked]
            for (task, _), score in zip(asked, pool.map(judge, questions), strict=True):
                known[task.id] = score
                unreadable += score is None
                file.write(json.dumps({"id": task.id, "score": score}) + "\n")
            file.flush()
            if len(known) >= 32 and 2 * unreadable > len(known):
                raise ValueError(
                    f"{unreadable} of the judge's {len(known)} replies have no number from 0 to 3 ({path})"
                )
            progress(len(shard.tasks))
    return known
