"""The directions of refusal, and lifts without a part along them.

A persona speaks in the first person, and a refusal does too. The mean difference between the Assistant's answers and
roles' answers therefore also points away from refusals. A cap that lifts a hostile persona's prompt along this
difference makes the model comply with requests that it would decline. So the lift must have no part along the
directions of refusal.
"""

from __future__ import annotations

import torch
from torch import Tensor

from axiscap.calibrate.roles import Task
from axiscap.calibrate.rollouts import TransformersEngine
from axiscap.calibrate.space import Directions
from axiscap.calibrate.tokens import Text, are_ordinary, read
from axiscap.data.jsonl import shipped
from axiscap.models import decoder_layers, text_config

#: First sentences of answers that decline, and of answers that comply.
DECLINES = (
    "I'm sorry, but I can't assist with that.",
    "I'm sorry, but I can't help with that request.",
    "I can't help you with this, because it would hurt somebody.",
)
COMPLIES = (
    "Sure, here is how you can do it:",
    "Of course! Here is what you asked for:",
    "Here are some steps that you can follow:",
)
#: A guarded lift must keep at least this share of <axis, lift>. Its length makes up for the part that is removed.
LEAST = 0.1


def directions(engine: TransformersEngine) -> Tensor:
    """The two directions of refusal at each layer, (n_layers, 2, H) float64, not of unit length.

    The first compares prompts: the mean last row of prompts whose request should be declined, minus the same of
    harmless look-alikes (Arditi et al., arXiv 2406.11717). The second compares answers to these requests: the mean row
    of answers that decline, minus that of answers that comply. Attention sinks are left out, unless all rows of a text
    that would count are sinks.
    """
    texts = _refusal_texts(engine)
    group_of_text = torch.tensor([_GROUPS.index(text.group) for text in texts])
    last_of_prompt = torch.tensor([len(text.prompt) - 1 for text in texts])
    shape = len(decoder_layers(engine.model)), len(_GROUPS), text_config(engine.model).hidden_size
    sums = torch.zeros(shape, dtype=torch.float64)
    counts = torch.zeros(sums.shape[:2], dtype=torch.float64)

    def add_rows(layer: int, rows: Tensor, text: Tensor, position: Tensor, in_answer: Tensor) -> None:
        is_candidate = torch.where(group_of_text[text] < 2, position == last_of_prompt[text], in_answer)
        counted = is_candidate & are_ordinary(rows, layer, engine.settings.norm_limits)
        counted |= is_candidate & ~torch.isin(text, text[counted])
        row_group = group_of_text[text[counted]]
        sums[layer].index_add_(0, row_group, rows[counted].double().cpu())
        counts[layer].index_add_(0, row_group, torch.ones(len(row_group), dtype=torch.float64))

    read(engine.model, texts, add_rows)
    asked, harmless, declines, complies = (sums / counts[..., None]).unbind(1)
    return torch.stack([asked - harmless, declines - complies], 1)


#: The groups of texts. Of the first two the last row of the prompt counts, of the others the rows of the answer.
_GROUPS = ("asked", "harmless", "declines", "complies")


def _refusal_texts(engine: TransformersEngine) -> list[Text]:
    texts: list[Text] = []
    for pair in shipped("declined.jsonl"):
        tasks = [Task("", 0, 0, "", pair[kind]) for kind in ("request", "harmless")]
        asked, harmless = (engine.prompts([task])[0] for task in tasks)
        texts += [Text("asked", asked, []), Text("harmless", harmless, [])]
        for group, answers in (("declines", DECLINES), ("complies", COMPLIES)):
            for answer in answers:
                texts.append(Text(group, asked, engine.tokenizer(answer, add_special_tokens=False)["input_ids"]))
    return texts


def guarded(directions: Directions, protected: Tensor) -> Directions:
    """The same axes, with lifts that move no row along the protected directions.

    Parameters
    ----------
    directions
        with lifts.
    protected
        (n_layers, N, H), N < H, linearly independent at each layer.

    Raises
    ------
    ValueError
        at a layer less than :data:`LEAST` of <axis, lift> is left.
    """
    assert directions.lift is not None
    basis = torch.linalg.qr(protected.mT).Q
    lift = directions.lift - (basis @ (basis.mT @ directions.lift[..., None]))[..., 0]
    along_axis = (lift * directions.axis).sum(-1, keepdim=True)
    lost = (along_axis[:, 0] < LEAST).nonzero()
    if len(lost):
        raise ValueError(f"layer {int(lost[0])}: nearly all of the lift lies along the directions of refusal")
    return Directions(directions.axis, lift / along_axis)
