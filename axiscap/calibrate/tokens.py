"""Finished texts read again, token by token, and how their rows scatter."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

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


def are_ordinary(rows: Tensor, layer: int, norm_limits: Sequence[float]) -> Tensor:
    """Which rows (..., H) of a layer are no attention sinks: those within the layer's limit. All without limits."""
    limit = norm_limits[layer] if norm_limits else torch.inf
    within: Tensor = rows.float().norm(dim=-1) <= limit
    return within


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
