"""From rollouts to a profile: the axis, its separation on what it has not seen, the layers and the floors."""

from __future__ import annotations

import datetime
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import axiscap
from axiscap.calibrate.data import DEFAULT_ROLE, Role
from axiscap.calibrate.rollouts import Prompt, run
from axiscap.models import decoder_layers
from axiscap.profile import CapProfile

#: Columns of a profile's quantile table.
PERCENTILES = (1.0, 5.0, 10.0, 25.0, 50.0, 75.0, 90.0, 95.0, 99.0)
#: One in this many roles, and one in this many questions, makes no axis but tests it.
HOLD_OUT = 4


@dataclass
class Calibration:
    """A profile and the evidence for it: per layer, how well the axis separates what it has not seen.

    ``auc``: (n_layers,), of held-out roles' answers against the default's, both to held-out questions.
    ``auc_by_role``: the same for each held-out role alone.
    """

    profile: CapProfile
    auc: Tensor
    auc_by_role: dict[str, Tensor]


def auc(low: Tensor, high: Tensor) -> Tensor:
    """P(a value of high is above one of low), ties counting half: (n, ...), (m, ...) -> (...)."""
    difference = high[:, None] - low[None, :]
    return ((difference > 0).double() + 0.5 * (difference == 0).double()).mean(dim=(0, 1))


def split(names: Sequence[str]) -> tuple[list[str], list[str]]:
    """What makes the axis, and what tests it: every HOLD_OUT-th."""
    held = list(names[HOLD_OUT - 1 :: HOLD_OUT])
    return [name for name in names if name not in held], held


def choose_layers(separation: Tensor, count: int) -> list[int]:
    """The run of `count` layers with the highest mean separation among the middle-to-late ones.

    Those are the layers from half of the depth to nine tenths, where the paper's best settings lie (layers 46-53 of 64,
    56-71 of 80): earlier the character is not formed yet, later it is already spoken.
    """
    depth = len(separation)
    if not 1 <= count <= depth:
        raise ValueError(f"the number of layers to cap must be from 1 to {depth}, got {count}")
    first, last = depth // 2, -(-9 * depth // 10)
    starts = range(min(first, depth - count), max(last - count, min(first, depth - count)) + 1)
    best = max(starts, key=lambda start: separation[start : start + count].mean().item())
    return list(range(best, best + count))


def calibrate(
    model: Any,
    tokenizer: Any,
    roles: Mapping[str, Role],
    questions: Sequence[str],
    *,
    model_id: str,
    percentile: float = 25.0,
    count: int | None = None,
    max_new_tokens: int = 40,
    seed: int = 0,
    work: Path | None = None,
    start: Callable[[int], None] = lambda _: None,
    progress: Callable[[int], None] = lambda _: None,
) -> Calibration:
    """Makes a profile for a model.

    Args:
        model: a transformers causal LM in evaluation mode.
        tokenizer: its tokenizer (see :func:`axiscap.models.load`).
        roles: the characters, with the default among them.
        questions: what they are asked.
        model_id: the model's name, for the provenance.
        percentile: of the default's answers that the floors are at.
        count: how many layers to cap; a fifth of them, or 8 where that is more.
        max_new_tokens: an answer's length at most.
        seed: of the sampling.
        work: where finished batches are kept, so that a stopped run goes on.
        start: called once with the number of rollouts.
        progress: called with each number finished.
    """
    if not 0 < percentile < 100:
        raise ValueError(f"percentile must be between 0 and 100, got {percentile}")
    depth = len(decoder_layers(model))
    count = min(max(8, depth // 5), depth) if count is None else count
    train_roles, held_roles = split([name for name in roles if name != DEFAULT_ROLE])
    train_questions, held_questions = split(list(questions))

    plan: list[tuple[str, str, Prompt]] = []
    for name, role in roles.items():
        asked = questions if name == DEFAULT_ROLE else (held_questions if name in held_roles else train_questions)
        for index, question in enumerate(asked):
            # The default is asked under each of its prompts, since the floors come from it; a role under one at a time.
            chosen = role.prompts if name == DEFAULT_ROLE else [role.prompts[index % len(role.prompts)]]
            plan += [(name, question, Prompt(prompt, question)) for prompt in chosen]
    start(len(plan))
    prompts = [prompt for _, _, prompt in plan]
    rollouts = run(model, tokenizer, prompts, max_new_tokens=max_new_tokens, seed=seed, work=work, progress=progress)
    activations = rollouts.activations.double()

    def pick(names: Sequence[str], asked: Sequence[str]) -> Tensor:
        chosen = [i for i, (name, question, _) in enumerate(plan) if name in names and question in asked]
        return activations[chosen]

    # Each role weighs the same, as published: the mean over roles of the mean over a role's answers.
    role_means = torch.stack([pick([name], train_questions).mean(0) for name in train_roles])
    direction = pick([DEFAULT_ROLE], train_questions).mean(0) - role_means.mean(0)
    axis = direction / direction.norm(dim=-1, keepdim=True)

    def project(names: Sequence[str], asked: Sequence[str]) -> Tensor:
        return torch.einsum("nlh,lh->nl", pick(names, asked), axis)

    assistant_held = project([DEFAULT_ROLE], held_questions)
    by_role = {name: auc(project([name], held_questions), assistant_held) for name in held_roles}
    separation = auc(project(held_roles, held_questions), assistant_held)
    layers = choose_layers(separation, count)
    assistant = project([DEFAULT_ROLE], questions)
    table = torch.quantile(assistant, torch.tensor(PERCENTILES, dtype=torch.float64) / 100, dim=0).T
    floors = torch.quantile(assistant[:, layers], percentile / 100, dim=0)

    sources = {"roles": {name: roles[name].prompts for name in roles}, "questions": list(questions)}
    provenance = {
        "model": {
            "id": model_id,
            "architecture": type(model).__name__,
            "hidden_size": axis.shape[1],
            "num_layers": depth,
        },
        "floors": {"population": "assistant, answer means", "percentile": percentile, "count": len(assistant)},
        "quantiles": {"population": "assistant, answer means", "percentiles": PERCENTILES, "count": len(assistant)},
        "axis": {
            "method": "mean(default) - mean(roles), unit length",
            "roles": train_roles,
            "questions": len(train_questions),
            "digest": hashlib.sha256(json.dumps(sources, sort_keys=True).encode()).hexdigest(),
        },
        "separation": {
            "roles": held_roles,
            "questions": len(held_questions),
            "auc": [round(value, 4) for value in separation.tolist()],
            "auc_by_role": {name: [round(value, 4) for value in row.tolist()] for name, row in by_role.items()},
        },
        "sampling": {"temperature": 0.7, "top_p": 0.9, "max_new_tokens": max_new_tokens, "seed": seed},
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "axiscap": axiscap.__version__,
    }
    unit = axis.float()
    profile = CapProfile(
        layers,
        unit[layers][:, None].contiguous(),
        floors.float()[:, None].contiguous(),
        provenance,
        axis_all=unit,
        quantiles=table.float(),
    )
    return Calibration(profile, separation, by_role)
