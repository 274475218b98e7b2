"""Scores of whether an answer takes on its role, from 0 to 3 as published. Answers with a score of 3 count."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from axiscap.calibrate.endpoint import CONCURRENT, Endpoint
from axiscap.calibrate.roles import DEFAULT_ROLE, Role, Task
from axiscap.calibrate.store import Shard
from axiscap.data.jsonl import read_lines

#: The score of an answer that counts as the role's.
TAKEN_ON = 3
#: Maps a question to a score, or to None if the reply has no score.
Judge = Callable[[str], int | None]


def question_to_the_judge(role: Role, task: Task, answer: str) -> str:
    """The role's ``eval_prompt`` with a question and its answer filled in.

    Raises
    ------
    ValueError
        the role has no ``eval_prompt``.
    """
    if not role.eval_prompt:
        raise ValueError(f"the role {role.name} has no eval_prompt to ask a judge with; use --judge none")
    return role.eval_prompt.replace("{question}", task.text).replace("{answer}", answer)


def read_score(text: str) -> int | None:
    """The first number from 0 to 3 in a judge's reply, or None."""
    match = re.search(r"(?<![\d.])[0-3](?![\d.]*\d)", text)
    return int(match.group()) if match else None


def endpoint(model: str, base_url: str | None = None) -> Judge:
    """A judge behind an OpenAI-compatible endpoint; see :class:`Endpoint`."""
    client = Endpoint(base_url)

    def ask(question: str) -> int | None:
        return read_score(client.chat(model, [{"role": "user", "content": question}], max_tokens=10, temperature=0))

    return ask


def local(model: Any, tokenizer: Any) -> Judge:
    """The model itself as judge: the likeliest of the four numbers as its first token. Small models judge badly."""
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
    """The scores of all roles' answers, by rollout; None if the judge's reply has no number from 0 to 3.

    The scores are kept in a file, line by line, so that no answer is judged twice.

    Parameters
    ----------
    judge
        gives the scores.
    shards
        the answers.
    roles
        by name, with their ``eval_prompt``.
    path
        the file, JSONL ``{"id", "score"}``.
    progress
        called with the number of answers of each shard.
    concurrent
        the most calls of the judge at once.

    Raises
    ------
    ValueError
        more than half of at least 32 replies have no number.
    """
    score_by_id = _read_scores(path)
    unreadable = list(score_by_id.values()).count(None)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file, ThreadPoolExecutor(concurrent) as pool:
        for shard in shards:
            answers = zip(shard.tasks, shard.texts, strict=True)
            todo = [(t, answer) for t, answer in answers if t.role != DEFAULT_ROLE and t.id not in score_by_id]
            questions = [question_to_the_judge(roles[task.role], task, answer) for task, answer in todo]
            for (task, _), score in zip(todo, pool.map(judge, questions), strict=True):
                score_by_id[task.id] = score
                unreadable += score is None
                file.write(_score_line(task.id, score))
            file.flush()
            if len(score_by_id) >= 32 and 2 * unreadable > len(score_by_id):
                raise ValueError(
                    f"{unreadable} of the judge's {len(score_by_id)} replies have no number from 0 to 3 ({path})"
                )
            progress(len(shard.tasks))
    return score_by_id


def _read_scores(path: Path) -> dict[str, int | None]:
    """The scores in a file. A last line that was cut off is removed, so that its answer is judged again."""
    score_by_id: dict[str, int | None] = {}
    if path.exists():
        for line in read_lines(path, complete=True):
            entry = line.parse()
            score_by_id[entry["id"]] = entry["score"]
        path.write_text("".join(_score_line(name, score) for name, score in score_by_id.items()))
    return score_by_id


def _score_line(name: str, score: int | None) -> str:
    return json.dumps({"id": name, "score": score}) + "\n"
