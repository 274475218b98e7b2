"""Finished texts read again, token by token: where the sinks are, how ordinary tokens scatter, how far they project."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
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

#: What a worker makes of texts and the model that reads them; it travels to other processes.
Collect = Callable[[Any, Sequence[Text]], Any]


@torch.inference_mode()
def read(model: Any, texts: Sequence[Text], see: See) -> None:
    """Has a model read texts, many at a time, and shows every layer's rows, without padding."""
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

    def mean(self, *groups: str) -> Tensor:
        """(H,) float64: of the rows of these groups together."""
        total = torch.stack([self.sums[group] for group in groups]).sum(0)
        return total / sum(self.counts[group] for group in groups)

    def within(self, groups: Sequence[str]) -> Tensor:
        """(H, H) float64: the covariance within groups, all of those that scattered, about each one's own mean."""
        about = torch.stack([torch.outer(self.sums[group], self.mean(group)) for group in groups]).sum(0)
        covariance: Tensor = (self.outer - about) / sum(self.counts[group] for group in groups)
        return covariance


@dataclass
class Sinks:
    """Rows of massive norm, more than :data:`~axiscap.installation.SINK_NORM` times the median of their layer: where
    they stand, and how large ordinary rows are. Parts add up.

    ``usual``, ``massive``: the largest norm of a layer's ordinary rows, and of its sinks (0 where there is none).
    ``positions``: how many texts have a sink there at some layer. ``tokens``: the same of token numbers.
    """

    medians: list[float]
    texts: int = 0
    usual: list[float] = field(init=False)
    massive: list[float] = field(init=False)
    positions: Counter[int] = field(default_factory=Counter)
    tokens: Counter[int] = field(default_factory=Counter)
    _found: set[tuple[int, int]] = field(default_factory=set)  # (text, position), since the last count

    def __post_init__(self) -> None:
        self.usual, self.massive = [0.0] * len(self.medians), [0.0] * len(self.medians)

    @classmethod
    def of(cls, model: Any, texts: Sequence[Text]) -> Sinks:
        """What is usual at each layer, from one pass over the longest texts; none of them is counted."""
        medians: list[float] = []
        few = [texts[at] for at in next(_batches(texts))]
        read(model, few, lambda layer, rows, *_: medians.append(rows.float().norm(dim=-1).median().item()))
        return cls(medians)

    def ordinary(self, layer: int, rows: Tensor, owner: Tensor, place: Tensor) -> Tensor:
        """Which rows (n,) are none, having noted those that are."""
        norms = rows.float().norm(dim=-1)
        usual: Tensor = norms <= SINK_NORM * self.medians[layer]
        self._found |= set(zip(owner[~usual].tolist(), place[~usual].tolist(), strict=True))
        for largest, mine in ((self.usual, norms[usual]), (self.massive, norms[~usual])):
            if len(mine):
                largest[layer] = max(largest[layer], mine.max().item())
        return usual

    def count(self, texts: Sequence[Text]) -> Sinks:
        """Those that were noted in texts, each of which was read whole; returns itself."""
        for text, position in self._found:
            self.positions[position] += 1
            self.tokens[[*texts[text].prompt, *texts[text].answer][position]] += 1
        self._found.clear()
        self.texts += len(texts)
        return self

    def merge(self, other: Sinks) -> Sinks:
        """Adds another's; returns itself."""
        self.texts += other.texts
        self.positions += other.positions
        self.tokens += other.tokens
        self.usual = list(map(max, self.usual, other.usual))
        self.massive = list(map(max, self.massive, other.massive))
        return self

    def to_json(self) -> dict[str, Any]:
        """What :meth:`from_json` reads."""
        counts = {name: list(getattr(self, name).items()) for name in ("positions", "tokens")}
        return {"medians": self.medians, "texts": self.texts, "usual": self.usual, "massive": self.massive, **counts}

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Sinks:
        made = cls(stored["medians"], stored["texts"])
        made.usual, made.massive = stored["usual"], stored["massive"]
        made.positions, made.tokens = (Counter(dict(stored[name])) for name in ("positions", "tokens"))
        return made

    @property
    def regular(self) -> tuple[int, ...]:
        """The positions at which half of the texts or more have a sink at one of the layers."""
        return tuple(sorted(position for position, count in self.positions.items() if 2 * count >= self.texts))

    def describe(self, tokenizer: Any) -> dict[str, Any]:
        """What a profile's provenance says of them: where and which, and how much larger than the median row."""
        return {
            "texts": self.texts,
            "positions": list(self.regular),
            "tokens": {tokenizer.decode([token]): count for token, count in self.tokens.most_common(8)},
            "times_the_median_norm": [round(most / of, 1) for most, of in zip(self.massive, self.medians, strict=True)],
            "largest_ordinary_norm": [round(norm, 3) for norm in self.usual],
        }
