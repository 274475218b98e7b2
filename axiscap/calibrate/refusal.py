"""What moves a model towards declining a request, and lifts that leave that alone.

A persona speaks in the first person, and so does a refusal. The difference of the Assistant's answers to anything and
of roles' answers therefore points away from refusals as well: a cap that lifts the rows of a hostile persona's prompt
along it makes the model do what it would have declined. So the lift has no part along the directions of refusal.
"""

from __future__ import annotations

import torch
from torch import Tensor

from axiscap.calibrate.data import Task, shipped
from axiscap.calibrate.rollouts import TransformersEngine
from axiscap.calibrate.space import Directions
from axiscap.calibrate.tokens import Text, are_ordinary, read
from axiscap.models import decoder_layers, text_config

#: How an answer begins that declines, and one that complies.
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
#: A lift that is guarded must keep this share of what it does to the reading; the rest would be made up by its length.
LEAST = 0.1


def directions(engine: TransformersEngine) -> Tensor:
    """The two directions of refusal at each layer, (n_layers, 2, H) float64, not of unit length.

    Of what is asked: the mean of the last row of prompts whose request should be declined, less that of harmless
    look-alikes (Arditi et al., arXiv 2406.11717). Of what is answered: the mean row of answers that decline those
    requests, less that of answers that comply with them. Attention sinks are left out; where all of a text's rows that
    would count are sinks, they count.
    """
    texts: list[Text] = []
    for pair in shipped("declined.jsonl"):
        tasks = [Task("", 0, 0, "", pair[kind]) for kind in ("request", "harmless")]
        asked, harmless = (engine.prompts([task])[0] for task in tasks)
        texts += [Text("asked", asked, []), Text("harmless", harmless, [])]
        for kind, answers in (("declines", DECLINES), ("complies", COMPLIES)):
            for answer in answers:
                texts.append(Text(kind, asked, engine.tokenizer(answer, add_special_tokens=False)["input_ids"]))
    groups = ("asked", "harmless", "declines", "complies")
    group_of = torch.tensor([groups.index(text.group) for text in texts])
    last = torch.tensor([len(text.prompt) - 1 for text in texts])
    shape = len(decoder_layers(engine.model)), len(groups), text_config(engine.model).hidden_size
    sums = torch.zeros(shape, dtype=torch.float64)
    counts = torch.zeros(sums.shape[:2], dtype=torch.float64)

    def see(layer: int, rows: Tensor, owner: Tensor, place: Tensor, of_answer: Tensor) -> None:
        whole = torch.where(group_of[owner] < 2, place == last[owner], of_answer)
        use = whole & are_ordinary(rows, layer, engine.settings.norm_limits)
        use |= whole & ~torch.isin(owner, owner[use])
        mine = group_of[owner[use]]
        sums[layer].index_add_(0, mine, rows[use].double().cpu())
        counts[layer].index_add_(0, mine, torch.ones(len(mine), dtype=torch.float64))

    read(engine.model, texts, see)
    asked_mean, harmless_mean, declines, complies = (sums / counts[..., None]).unbind(1)
    return torch.stack([asked_mean - harmless_mean, declines - complies], 1)


def guarded(found: Directions, against: Tensor) -> Directions:
    """The same readings, with lifts that move no row along some directions.

    Parameters
    ----------
    found
        with lifts.
    against
        (n_layers, N, H), N < H, linearly independent at each layer.

    Raises
    ------
    ValueError
        at a layer less than :data:`LEAST` of what the lift does to the reading is left.
    """
    assert found.lift is not None
    basis = torch.linalg.qr(against.mT).Q
    lift = found.lift - (basis @ (basis.mT @ found.lift[..., None]))[..., 0]
    along = (lift * found.axis).sum(-1, keepdim=True)
    lost = (along[:, 0] < LEAST).nonzero()
    if len(lost):
        raise ValueError(f"layer {int(lost[0])}: nearly all of the lift lies along the directions of refusal")
    return Directions(found.axis, lift / along)
