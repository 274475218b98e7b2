"""A second pass over finished texts, token by token, and the covariance of their rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from axiscap.models import watched_layers

#: The most tokens of one forward pass, padding included.
BATCH_TOKENS = 4096


@dataclass(frozen=True)
class Text:
    """The tokens of a prompt and of its answer, and the group that they count for."""

    group: str
    prompt: Sequence[int]
    answer: Sequence[int]


#: Receives the rows of one layer in one pass: the layer, rows (n, H) of any dtype, and for each row (n,) the number of
#: its text, its position there, and whether it belongs to the answer.
UseRows = Callable[[int, Tensor, Tensor, Tensor, Tensor], None]

#: A statistic of texts, computed by the model that reads them. It is pickled for other processes.
Collect = Callable[[Any, Sequence[Text]], Any]


@torch.inference_mode()
def read(model: Any, texts: Sequence[Text], use_rows: UseRows) -> None:
    """Runs a model over texts in batches, and passes the rows of every layer on, without padding."""
    for batch in _batches(texts):
        lengths = torch.tensor([len(texts[number].prompt) + len(texts[number].answer) for number in batch])
        answer_starts = torch.tensor([len(texts[number].prompt) for number in batch])
        longest = int(lengths.max())
        ids = torch.zeros(len(batch), longest, dtype=torch.long)
        for row, number in zip(ids, batch, strict=True):
            tokens = [*texts[number].prompt, *texts[number].answer]
            row[: len(tokens)] = torch.tensor(tokens)
        position = torch.arange(longest).expand(len(batch), -1)
        # Padding stands behind the text, so causal attention hides it from the text's tokens.
        is_real = position < lengths[:, None]
        in_answer = (position >= answer_starts[:, None])[is_real]
        text = torch.tensor(batch)[:, None].expand(-1, longest)[is_real]

        def pass_rows_on(
            layer: int,
            hidden: Tensor,
            is_real: Tensor = is_real,
            text: Tensor = text,
            position: Tensor = position,
            in_answer: Tensor = in_answer,
        ) -> None:
            use_rows(layer, hidden[is_real.to(hidden.device)].cpu(), text, position[is_real], in_answer)

        with watched_layers(model, pass_rows_on):
            model(
                input_ids=ids.to(model.device),
                attention_mask=is_real.long().to(model.device),
                use_cache=False,
                logits_to_keep=1,
            )


def are_ordinary(rows: Tensor, layer: int, norm_limits: Sequence[float]) -> Tensor:
    """The mask of the rows (..., H) of a layer within its norm limit: no attention sinks. All, without limits."""
    limit = norm_limits[layer] if norm_limits else torch.inf
    is_ordinary: Tensor = rows.float().norm(dim=-1) <= limit
    return is_ordinary


def _batches(texts: Sequence[Text]) -> Iterator[list[int]]:
    """The numbers of the texts in batches, the longest texts first, so that a lack of memory shows early."""
    batch: list[int] = []
    lengths = [len(text.prompt) + len(text.answer) for text in texts]
    for number in sorted(range(len(texts)), key=lambda number: -lengths[number]):
        if batch and (len(batch) + 1) * lengths[batch[0]] > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(number)
    if batch:
        yield batch


@dataclass
class Scatter:
    """One layer's rows by group, in float64: counts, sums, and the sum of outer products. Several scatters merge."""

    size: int
    counts: dict[str, int] = field(default_factory=dict)
    sums: dict[str, Tensor] = field(default_factory=dict)  # (H,) each
    outer: Tensor = field(init=False)  # (H, H), of the groups that scatter

    def __post_init__(self) -> None:
        self.outer = torch.zeros(self.size, self.size, dtype=torch.float64)

    def add(self, group: str, rows: Tensor, *, scatters: bool) -> None:
        """Adds rows (n, H). The rows of a group with `scatters` count in the covariance."""
        rows = rows.double()
        self.counts[group] = self.counts.get(group, 0) + len(rows)
        self.sums[group] = self.sums.get(group, torch.zeros(self.size, dtype=torch.float64)) + rows.sum(0)
        if scatters:
            self.outer += rows.T @ rows

    def merge(self, other: Scatter) -> Scatter:
        """Adds another scatter; returns itself."""
        for group, count in other.counts.items():
            self.counts[group] = self.counts.get(group, 0) + count
            self.sums[group] = self.sums.get(group, torch.zeros(self.size, dtype=torch.float64)) + other.sums[group]
        self.outer += other.outer
        return self

    def mean(self, *groups: str) -> Tensor:
        """(H,) float64: the mean of all rows of these groups."""
        total = torch.stack([self.sums[group] for group in groups]).sum(0)
        return total / sum(self.counts[group] for group in groups)

    def within(self, groups: Sequence[str]) -> Tensor:
        """(H, H) float64: the covariance within the groups, which must be all that were added with `scatters`."""
        of_means = torch.stack([torch.outer(self.sums[group], self.mean(group)) for group in groups]).sum(0)
        covariance: Tensor = (self.outer - of_means) / sum(self.counts[group] for group in groups)
        return covariance
