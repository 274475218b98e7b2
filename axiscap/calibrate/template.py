"""The rows of the chat template around a request: how far against the axis ordinary requests take them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile

import torch
from torch import Tensor

from axiscap.calibrate.roles import Task, even_sample
from axiscap.calibrate.rollouts import TransformersEngine
from axiscap.calibrate.tokens import Text, are_ordinary, read
from axiscap.calibrate.work import Work

#: How many requests are read.
REQUESTS = 160


def lowest_template_rows(engine: TransformersEngine, work: Work, axis: Tensor, norm_limits: Sequence[float]) -> Tensor:
    """(n_layers,) float32: the lowest projection on the axis (n_layers, H) of a row of the template.

    Over a sample of first turns of ordinary work that are not held out, without fiction and without attention sinks;
    infinity without a template.
    """
    first = [Task("work", 0, number, "", request.turns[0]) for number, request in enumerate(work.requests)]
    tasks = [task for task in first if not work.is_held_out(task) and not work.requests[task.question].fiction]
    tasks = even_sample(tasks, REQUESTS)
    prompts = [engine.prompts([task])[0] for task in tasks]
    # The rows that all prompts begin and end with are the template's.
    before, after = _count_shared(prompts), _count_shared([prompt[::-1] for prompt in prompts])
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    lowest = torch.full((len(axis),), torch.inf)

    def use_rows(layer: int, rows: Tensor, text: Tensor, position: Tensor, in_answer: Tensor) -> None:
        is_counted = (position < before) | (position >= lengths[text] - after)
        is_counted &= are_ordinary(rows, layer, norm_limits)
        values = torch.where(is_counted, rows.float() @ axis[layer].float(), torch.inf)
        lowest[layer] = torch.minimum(lowest[layer], values.min())

    read(engine.model, [Text("template", prompt, []) for prompt in prompts], use_rows)
    return lowest


def _count_shared(prompts: Sequence[Sequence[int]]) -> int:
    """How many tokens at their beginning the prompts share."""
    return sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, zip(*prompts, strict=False)))
