"""Attention sinks: the norm beyond which a row is one, and how many rows of texts are."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from operator import or_
from typing import Any

import torch
from torch import Tensor

from axiscap.calibrate.data import DEFAULT_ROLE, Plan, Task, even_sample
from axiscap.calibrate.rollouts import TransformersEngine
from axiscap.calibrate.store import Store
from axiscap.calibrate.tokens import Text, read
from axiscap.calibrate.work import Work, load_prose

#: A limit lies between these multiples of the median norm of its layer, at one of this many points.
LOWEST, HIGHEST, POINTS = 1.6, 3.0, 61
#: A row is near a limit if the logarithms of its norm and of the limit differ by less.
NEAR = 0.1
#: Texts of roles, and of ordinary work or of the default, that limits are found on, beside the shipped prose.
TEXTS = 160


@dataclass(frozen=True)
class NormLimits:
    """The norms beyond which a row is an attention sink.

    Parameters
    ----------
    medians
        the median norm of the rows of each layer.
    limits
        of each layer, float32 numbers.

    Examples
    --------
    >>> from axiscap import calibrate
    >>> calibrate.NormLimits((10.0,), (22.0,)).limits
    (22.0,)
    """

    medians: tuple[float, ...]
    limits: tuple[float, ...]


def find_norm_limits(model: Any, tokenizer: Any, plan: Plan, store: Store, work: Work | None = None) -> NormLimits:
    """The limits of a model, from a few hundred texts that are there before it answers: prose, and prompts.

    At each layer the limit is at the multiple of the median norm, from 1.6 to 3, at which rows are rarest. The store
    keeps the limits: whoever goes on with its answers finds the same ones.

    Parameters
    ----------
    model
        a transformers causal LM in evaluation mode.
    tokenizer
        its tokenizer.
    plan
        of whose roles' tasks some are read, and of the default's if there is no ordinary work.
    store
        where the answers are kept.
    work
        ordinary work, whose first turns are read.

    Returns
    -------
    NormLimits
        For :class:`Settings`.

    Examples
    --------
    >>> from axiscap import calibrate
    >>> roles = calibrate.load_roles()
    >>> few = {name: roles[name] for name in ("default", *sorted(set(roles) - {"default"})[:2])}
    >>> asked = calibrate.plan(few, calibrate.load_questions()[:3], per_role=3)
    >>> store = calibrate.Store(str(folder / "rollouts"), calibrate.Settings("SmolLM2-135M", "float32", 4))
    >>> limits = calibrate.find_norm_limits(model, tokenizer, asked, store)
    >>> len(limits.limits)
    30
    """
    store = Store(store.url, dataclasses.replace(store.settings, norm_limits=()))
    texts = _texts(TransformersEngine(model, tokenizer, store.settings), plan, work)
    name = store.name_of("limits", [dataclasses.astuple(text) for text in texts])
    kept = store.kept(name)
    if kept is None:
        limits = measure_norm_limits(model, texts)
        store.keep(name, dataclasses.asdict(limits), {})
        return limits
    return NormLimits(**{key: tuple(values) for key, values in kept[0].items()})


def _texts(engine: TransformersEngine, plan: Plan, work: Work | None) -> list[Text]:
    """Prompts as the engine encodes them, and the shipped prose. None of them is held out."""
    roles = [task for task in plan.tasks if task.role != DEFAULT_ROLE and plan.makes_the_axis(task)]
    if work is None:
        others = [task for task in plan.tasks if task.role == DEFAULT_ROLE and not plan.is_held_out(task)]
    else:
        first = [Task("work", 0, number, "", request.turns[0]) for number, request in enumerate(work.requests)]
        others = [task for task in first if not work.is_held_out(task)]
    texts = [
        Text("prompt", engine.prompts([task])[0], [])
        for task in (*even_sample(roles, TEXTS), *even_sample(others, TEXTS))
    ]
    for _, paragraph in load_prose():
        texts.append(Text("prose", engine.tokenizer(paragraph)["input_ids"], []))
    return texts


def measure_norm_limits(model: Any, texts: Sequence[Text]) -> NormLimits:
    """The limits by the rows of some texts."""
    norms: dict[int, list[Tensor]] = {}
    read(model, texts, lambda layer, rows, *_: norms.setdefault(layer, []).append(rows.float().norm(dim=-1)))
    by_layer = [torch.cat(norms[layer]) for layer in sorted(norms)]
    medians = [rows.median().item() for rows in by_layer]
    ratios = [rarest_ratio(rows / median) for rows, median in zip(by_layer, medians, strict=True)]
    limits = torch.tensor(medians) * torch.tensor(ratios)
    return NormLimits(tuple(medians), tuple(limits.tolist()))


def rarest_ratio(ratios: Tensor) -> float:
    """The multiple of the median, from :data:`LOWEST` to :data:`HIGHEST`, near which the fewest of ratios (n,) are.

    Of equals, as in an empty stretch, the one nearest to the middle of the range.
    """
    low, high = math.log(LOWEST), math.log(HIGHEST)
    points = torch.linspace(low, high, POINTS, dtype=torch.float64)
    ordered = ratios.double().log().sort().values
    near = torch.searchsorted(ordered, points + NEAR) - torch.searchsorted(ordered, points - NEAR, right=True)
    off_centre = (points - (low + high) / 2).abs()
    best = min(range(POINTS), key=lambda at: (int(near[at]), float(off_centre[at])))
    return math.exp(points[best])


@dataclass
class SinkCounts:
    """By layer: how many rows of texts are beyond the limits and near them, the largest norm within and the smallest
    beyond (0 and infinity without such rows), and which tokens are beyond. Parts add up.
    """

    norm_limits: Sequence[float]
    texts: int = 0
    rows: int = 0
    beyond: list[int] = field(default_factory=list)
    near: list[int] = field(default_factory=list)
    largest_ordinary: list[float] = field(default_factory=list)
    smallest_sink: list[float] = field(default_factory=list)
    tokens: list[Counter[int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        depth = len(self.norm_limits)
        self.beyond, self.near = self.beyond or [0] * depth, self.near or [0] * depth
        self.largest_ordinary = self.largest_ordinary or [0.0] * depth
        self.smallest_sink = self.smallest_sink or [math.inf] * depth
        self.tokens = self.tokens or [Counter() for _ in range(depth)]

    def add(self, layer: int, rows: Tensor, tokens: Tensor) -> Tensor:
        """Counts a layer's rows (n, H) of tokens (n,); returns which rows (n,) are ordinary."""
        norms, limit = rows.float().norm(dim=-1), self.norm_limits[layer]
        ordinary: Tensor = norms <= limit
        self.beyond[layer] += int((~ordinary).sum())
        self.near[layer] += int(((norms / limit).log().abs() < NEAR).sum())
        largest = torch.where(ordinary, norms, 0.0).max().item()
        smallest = torch.where(ordinary, math.inf, norms).min().item()
        self.largest_ordinary[layer] = max(self.largest_ordinary[layer], largest)
        self.smallest_sink[layer] = min(self.smallest_sink[layer], smallest)
        self.tokens[layer].update(tokens[~ordinary].tolist())
        return ordinary

    def merge(self, other: SinkCounts) -> SinkCounts:
        """Adds another's; returns itself."""
        self.texts += other.texts
        self.rows += other.rows
        self.beyond = [a + b for a, b in zip(self.beyond, other.beyond, strict=True)]
        self.near = [a + b for a, b in zip(self.near, other.near, strict=True)]
        self.largest_ordinary = list(map(max, self.largest_ordinary, other.largest_ordinary))
        self.smallest_sink = list(map(min, self.smallest_sink, other.smallest_sink))
        self.tokens = [a + b for a, b in zip(self.tokens, other.tokens, strict=True)]
        return self

    def to_json(self) -> dict[str, Any]:
        """The counts as JSON can say them; :meth:`from_json` reads them."""
        return {**vars(self), "tokens": [list(tokens.items()) for tokens in self.tokens]}

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> SinkCounts:
        tokens = [Counter(dict(pairs)) for pairs in stored["tokens"]]
        return cls(**{**stored, "norm_limits": tuple(stored["norm_limits"]), "tokens": tokens})

    def describe(self, limits: NormLimits, layers: Sequence[int], tokenizer: Any) -> dict[str, Any]:
        """The entry for sinks in a profile's provenance, by layer of the model; norms are multiples of the median.

        ``tokens``: the commonest tokens that are sinks at the capped layers, each counted at the layer where it is one
        most often.
        """

        def to_median(norms: Sequence[float]) -> list[float | None]:
            pairs = zip(norms, limits.medians, strict=True)
            return [round(norm / median, 3) if math.isfinite(norm) else None for norm, median in pairs]

        tokens: Counter[int] = reduce(or_, (self.tokens[layer] for layer in layers))
        return {
            "texts": self.texts,
            "rows": self.rows,
            "share": [round(count / self.rows, 5) for count in self.beyond],
            "tokens": {tokenizer.decode([token]): count for token, count in tokens.most_common(8)},
            "median_norm": [round(norm, 3) for norm in limits.medians],
            "limit_ratio": to_median(limits.limits),
            "largest_ordinary": to_median(self.largest_ordinary),
            "smallest_sink": to_median(self.smallest_sink),
            "near_the_limit": [round(count / self.rows, 5) for count in self.near],
        }
