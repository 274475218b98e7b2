"""Finished texts read again, token by token: where the sinks are, how ordinary tokens scatter, how far they project."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from axiscap.installation import SINK_NORM
from axiscap.models import watched_layers

#: Tokens of one pass, with padding.
BATCH_TOKENS = 4096


@dataclass(frozen=True)
class Text:
    """A prompt and the answer to it, in tokens, and the group that its tokens count for."""

    group: str
    prompt: Sequence[int]
    answer: Sequence[int]


#: What sees the rows of one layer in one pass: layer, rows (n, H) of any dtype, each row's text (n,), its position in
#: that text (n,), and whether it is of the answer (n,).
See = Callable[[int, Tensor, Tensor, Tensor, Tensor], None]


@torch.inference_mode()
def read(model: Any, texts: Sequence[Text], see: See, progress: Callable[[int], None] = lambda _: None) -> None:
    """Has a model read texts, many at a time, and shows every layer's rows, without padding.

    Args:
        progress: called with each number of texts read.
    """
    for batch in _batches(texts):
        longest = max(len(texts[at].prompt) + len(texts[at].answer) for at in batch)
        ids = torch.zeros(len(batch), longest, dtype=torch.long)
        begins, lengths = [], []
        for row, at in zip(ids, batch, strict=True):
            tokens = [*texts[at].prompt, *texts[at].answer]
            row[: len(tokens)] = torch.tensor(tokens)
            begins.append(len(texts[at].prompt))
            lengths.append(len(tokens))
        place = torch.arange(longest).expand(len(batch), -1)
        # Padding stands behind, where no token that counts can see it.
        real = place < torch.tensor(lengths)[:, None]
        of_answer = (place >= torch.tensor(begins)[:, None])[real]
        owner = torch.tensor(batch)[:, None].expand(-1, longest)[real]

        def look(
            layer: int,
            hidden: Tensor,
            real: Tensor = real,
            owner: Tensor = owner,
            place: Tensor = place,
            of_answer: Tensor = of_answer,
        ) -> None:
            see(layer, hidden[real.to(hidden.device)].cpu(), owner, place[real], of_answer)

        with watched_layers(model, look):
            model(
                input_ids=ids.to(model.device),
                attention_mask=real.long().to(model.device),
                use_cache=False,
                logits_to_keep=1,
            )
        progress(len(batch))


def _batches(texts: Sequence[Text]) -> Iterator[list[int]]:
    """The longest first: if memory does not suffice, it shows soon."""
    batch: list[int] = []
    lengths = [len(text.prompt) + len(text.answer) for text in texts]
    for at in sorted(range(len(texts)), key=lambda at: -lengths[at]):
        if batch and (len(batch) + 1) * lengths[batch[0]] > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(at)
    if batch:
        yield batch


@dataclass
class Scatter:
    """One layer's rows by group: counts, sums, and the sum of their outer products, in float64. Parts add up."""

    size: int
    counts: dict[str, int] = field(default_factory=dict)
    sums: dict[str, Tensor] = field(default_factory=dict)  # (H,) each
    outer: Tensor = field(init=False)  # (H, H), of the groups that scatter

    def __post_init__(self) -> None:
        self.outer = torch.zeros(self.size, self.size, dtype=torch.float64)

    def add(self, group: str, rows: Tensor, *, scatters: bool) -> None:
        """Adds rows (n, H); those of a group that scatters make the covariance."""
        rows = rows.double()
        self.counts[group] = self.counts.get(group, 0) + len(rows)
        self.sums[group] = self.sums.get(group, torch.zeros(self.size, dtype=torch.float64)) + rows.sum(0)
        if scatters:
            self.outer += rows.T @ rows

    def merge(self, other: Scatter) -> Scatter:
        """Adds another's; returns itself."""
        for group, count in other.counts.items():
            self.counts[group] = self.counts.get(group, 0) + count
            self.sums[group] = self.sums.get(group, torch.zeros(self.size, dtype=torch.float64)) + other.sums[group]
        self.outer += other.outer
        return self

    def mean(self, group: str) -> Tensor:
        """(H,) float64."""
        return self.sums[group] / self.counts[group]

    def within(self, groups: Sequence[str]) -> Tensor:
        """(H, H) float64: the covariance within groups, all of those that scattered, about each one's own mean."""
        about = torch.stack([torch.outer(self.sums[group], self.mean(group)) for group in groups]).sum(0)
        covariance: Tensor = (self.outer - about) / sum(self.counts[group] for group in groups)
        return covariance


@dataclass
class Sinks:
    """Rows of massive norm, by layer: where they stand, and how large ordinary rows are. Parts add up.

    ``bounds``: the norm from which a row of a layer is a sink, :data:`~axiscap.installation.SINK_NORM` times the median
    of the first pass.
    """

    bounds: dict[int, float] = field(default_factory=dict)
    medians: dict[int, float] = field(default_factory=dict)
    largest: dict[int, float] = field(default_factory=dict)  # norm of a row that is none
    texts: set[int] = field(default_factory=set)
    found: dict[int, dict[tuple[int, int], float]] = field(default_factory=dict)  # by layer: (text, position): norm

    def ordinary(self, layer: int, rows: Tensor, owner: Tensor, place: Tensor) -> Tensor:
        """Which rows (n,) are none, having noted those that are."""
        norms = rows.float().norm(dim=-1)
        if layer not in self.bounds:
            self.medians[layer] = norms.median().item()
            self.bounds[layer] = SINK_NORM * self.medians[layer]
        usual: Tensor = norms <= self.bounds[layer]
        for at in (~usual).nonzero().flatten().tolist():
            self.found.setdefault(layer, {})[int(owner[at]), int(place[at])] = norms[at].item()
        self.texts |= set(owner.tolist())
        self.largest[layer] = max(self.largest.get(layer, 0.0), norms[usual].max().item())
        return usual

    def describe(self, texts: Sequence[Text], tokenizer: Any, layers: Sequence[int]) -> dict[str, Any]:
        """What a profile's provenance says of them: where and which, and how much larger than the median row."""
        tokens: dict[str, int] = {}
        for text, position in {key for layer in layers for key in self.found.get(layer, {})}:
            whole = [*texts[text].prompt, *texts[text].answer]
            name = tokenizer.decode([whole[position]])
            tokens[name] = tokens.get(name, 0) + 1
        most = sorted(tokens.items(), key=lambda item: -item[1])[:8]
        times = [
            round(max(self.found[layer].values()) / self.medians[layer], 1) if self.found.get(layer) else 0.0
            for layer in layers
        ]
        return {
            "texts": len(self.texts),
            "positions": list(self.usual(layers)),
            "tokens": dict(most),
            "times_the_median_norm": times,
            "largest_ordinary_norm": [round(self.largest[layer], 3) for layer in layers],
        }

    def usual(self, layers: Sequence[int]) -> tuple[int, ...]:
        """The positions at which half of the texts or more have a sink at one of the layers."""
        counts: dict[int, set[int]] = {}
        for layer in layers:
            for text, position in self.found.get(layer, {}):
                counts.setdefault(position, set()).add(text)
        return tuple(sorted(position for position, texts in counts.items() if 2 * len(texts) >= len(self.texts)))
