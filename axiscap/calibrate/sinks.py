"""Attention sinks: the norm limit of each layer, and counts of the rows beyond it."""

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

from axiscap.calibrate.roles import DEFAULT_ROLE, Plan, Task, even_sample
from axiscap.calibrate.rollouts import TransformersEngine
from axiscap.calibrate.store import Store
from axiscap.calibrate.tokens import Text, read
from axiscap.calibrate.work import Work, load_prose

#: A limit is at one of POINTS multiples of its layer's median norm, from LOWEST to HIGHEST.
LOWEST, HIGHEST, POINTS = 1.6, 3.0, 61
#: A row is near a limit if the natural logarithms of its norm and of the limit differ by less than this.
NEAR = 0.1
#: Limits are found on this many prompts of roles, as many of ordinary work or of the default, and the shipped prose.
TEXTS = 160


@dataclass(frozen=True)
class NormLimits:
    """The norm of each layer beyond which a row is an attention sink.

    Parameters
    ----------
    medians
        the median norm of the rows of each layer.
    limits
        the limit of each layer, a float32 number.

    Examples
    --------
    >>> from axiscap import calibrate
    >>> calibrate.NormLimits((10.0,), (22.0,)).limits
    (22.0,)
    """

    medians: tuple[float, ...]
    limits: tuple[float, ...]


def find_norm_limits(model: Any, tokenizer: Any, plan: Plan, store: Store, work: Work | None = None) -> NormLimits:
    """The limits of a model, from a few hundred prompts and paragraphs of prose, which exist before it answers.

    The limit of a layer is the multiple of its median norm, from 1.6 to 3, near which rows are rarest. The store keeps
    the limits, so that a resumed calibration has the same ones.

    Parameters
    ----------
    model
        a transformers causal LM in evaluation mode.
    tokenizer
        its tokenizer.
    plan
        gives the roles' prompts, and the default's if there is no ordinary work.
    store
        keeps the limits, beside the answers.
    work
        ordinary work; the first turns of its requests are read.

    Returns
    -------
    NormLimits
        Its ``limits`` are for :class:`Settings`.

    Examples
    --------
    >>> from axiscap import calibrate
    >>> roles = calibrate.load_roles()
    >>> few = {name: roles[name] for name in ("default", *sorted(set(roles) - {"default"})[:2])}
    >>> plan = calibrate.plan(few, calibrate.load_questions()[:3], per_role=3)
    >>> store = calibrate.Store(str(folder / "rollouts"), calibrate.Settings("SmolLM2-135M", "float32", 4))
    >>> limits = calibrate.find_norm_limits(model, tokenizer, plan, store)
    >>> len(limits.limits)
    30
    """
    store = Store(store.url, dataclasses.replace(store.settings, norm_limits=()))
    texts = _limit_texts(TransformersEngine(model, tokenizer, store.settings), plan, work)
    name = store.name_of("limits", [dataclasses.astuple(text) for text in texts])
    kept = store.kept(name)
    if kept is None:
        limits = measure_norm_limits(model, texts)
        store.keep(name, dataclasses.asdict(limits), {})
        return limits
    return NormLimits(**{key: tuple(values) for key, values in kept[0].items()})


def _limit_texts(engine: TransformersEngine, plan: Plan, work: Work | None) -> list[Text]:
    """Prompts that are not held out, as the engine encodes them, and the shipped prose."""
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
    """The limits from the rows of these texts."""
    norms: dict[int, list[Tensor]] = {}
    read(model, texts, lambda layer, rows, *_: norms.setdefault(layer, []).append(rows.float().norm(dim=-1)))
    by_layer = [torch.cat(norms[layer]) for layer in sorted(norms)]
    medians = [rows.median().item() for rows in by_layer]
    ratios = [rarest_ratio(rows / median) for rows, median in zip(by_layer, medians, strict=True)]
    limits = torch.tensor(medians) * torch.tensor(ratios)
    return NormLimits(tuple(medians), tuple(limits.tolist()))


def rarest_ratio(ratios: Tensor) -> float:
    """The multiple of the median, from :data:`LOWEST` to :data:`HIGHEST`, near which the fewest of the ratios (n,) lie.

    Of several such points, as in an empty stretch, the one that is nearest to the middle of the range.
    """
    low, high = math.log(LOWEST), math.log(HIGHEST)
    points = torch.linspace(low, high, POINTS, dtype=torch.float64)
    ordered = ratios.double().log().sort().values
    near = torch.searchsorted(ordered, points + NEAR) - torch.searchsorted(ordered, points - NEAR, right=True)
    off_centre = (points - (low + high) / 2).abs()
    best = min(range(POINTS), key=lambda point: (int(near[point]), float(off_centre[point])))
    return math.exp(points[best])


@dataclass
class SinkCounts:
    """Counts of texts and rows, and by layer: rows beyond the limit, rows near it, the largest norm within it (0
    without such rows) and the smallest beyond it (infinity without such rows), and the tokens beyond it. Several counts
    merge.

    The store keeps the fields by their names.
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
        """Counts a layer's rows (n, H), whose tokens are (n,); returns which rows (n,) are ordinary."""
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
        """Adds other counts; returns itself."""
        self.texts += other.texts
        self.rows += other.rows
        self.beyond = [a + b for a, b in zip(self.beyond, other.beyond, strict=True)]
        self.near = [a + b for a, b in zip(self.near, other.near, strict=True)]
        self.largest_ordinary = list(map(max, self.largest_ordinary, other.largest_ordinary))
        self.smallest_sink = list(map(min, self.smallest_sink, other.smallest_sink))
        self.tokens = [a + b for a, b in zip(self.tokens, other.tokens, strict=True)]
        return self

    def to_json(self) -> dict[str, Any]:
        """The counts as JSON types, for :meth:`from_json`."""
        return {**vars(self), "tokens": [list(tokens.items()) for tokens in self.tokens]}

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> SinkCounts:
        tokens = [Counter(dict(pairs)) for pairs in stored["tokens"]]
        return cls(**{**stored, "norm_limits": tuple(stored["norm_limits"]), "tokens": tokens})

    def describe(self, limits: NormLimits, layers: Sequence[int], tokenizer: Any) -> dict[str, Any]:
        """The entry for sinks in a profile's provenance. Norms are multiples of the median norm of their layer.

        ``tokens`` are the commonest sinks at the capped layers. A token's count is that of the layer where it is a sink
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
