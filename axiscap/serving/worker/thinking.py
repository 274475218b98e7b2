"""The rows of a step that lie in a reasoning model's thinking, between the tokens that begin and end it.

The token of the previous step may exist on the device only, so rows are classified there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from axiscap.serving.request import SettingsError
from axiscap.serving.worker.buffers import Counts, copied


class Tokens(NamedTuple):
    """The tokens of a step: the ids of its rows (rows,), on the device; and a function that gives the first ids of a
    request's sequence on the host, by the request's number in the step and their count.
    """

    ids: Tensor
    before: Callable[[int, int], Sequence[int]]


class Thinking:
    """
    Parameters
    ----------
    begin, end
        token ids.
    requests
        the number of requests that run at once; it grows if there are more.
    """

    def __init__(self, begin: int, end: int, device: torch.device, requests: int) -> None:
        self._begin, self._end = begin, end
        self._inside = torch.zeros(requests, dtype=torch.int64, device=device)  # where each request's last row stood
        self._index: dict[str, int] = {}
        self._next: dict[str, int] = {}  # the position of a request's next row, if it goes on
        self._free = list(range(requests))

    def finish(self, requests: Iterable[str]) -> None:
        for name in requests:
            if name in self._index:
                self._free.append(self._index.pop(name))
                del self._next[name]

    def rows(self, names: Sequence[str], counts: Counts, starts: Counts, tokens: Tokens) -> Tensor:
        """(rows,) bool, on the device: the row's token, or the last marker before it, begins the thinking.

        Parameters
        ----------
        names, counts, starts
            as in :class:`axiscap.serving.worker.model.Rows`.
        """
        known = [self._known(number, name, int(starts[number]), tokens) for number, name in enumerate(names)]
        for name, start, count in zip(names, starts.tolist(), counts.tolist(), strict=True):
            self._next[name] = start + count
        ends = np.cumsum(counts)
        index = np.array([self._index[name] for name in names])
        spans = np.stack([index, ends - counts, ends - 1, np.array(known)]).astype(np.int64)
        of, first, last, from_host = copied(spans, self._inside.device)
        before = torch.where(from_host < 0, self._inside[of], from_host)
        # Each marker as twice its row, and 1 where it begins: the largest so far is the last. A request's first row has
        # one in any case, so that none is taken from the request before.
        row = 2 * torch.arange(int(ends[-1]), device=tokens.ids.device)
        begins, ends_ = tokens.ids == self._begin, tokens.ids == self._end
        marks = torch.where(begins, row + 1, torch.where(ends_, row, -1))
        marks[first] = torch.where(marks[first] < 0, row[first] + before, marks[first])
        inside = marks.cummax(0).values & 1
        self._inside[of] = inside[last]
        return inside.bool()

    def _known(self, number: int, name: str, start: int, tokens: Tokens) -> int:
        """Whether the row before a request's first one was inside, if the host has to say so; -1: the device knows."""
        if name not in self._index:
            if not self._free:
                known = len(self._inside)
                self._inside = torch.cat([self._inside, torch.zeros_like(self._inside)])
                self._free = list(range(known, 2 * known))
            self._index[name] = self._free.pop()
        elif self._next[name] == start:
            return -1
        # It came just now, behind what a cache held; or it comes again, since its blocks were taken away.
        for token in reversed(tokens.before(number, start)):
            if token in (self._begin, self._end):
                return int(token == self._begin)
        return 0


def marker_ids(markers: Sequence[str], tokenizer: str, **options: Any) -> tuple[int, int]:
    """The token ids of the text that begins and the text that ends the thinking.

    Parameters
    ----------
    tokenizer, options
        as transformers' ``AutoTokenizer.from_pretrained`` takes them.

    Raises
    ------
    SettingsError
        A marker is not one token of the model.
    """
    from transformers import AutoTokenizer

    known = AutoTokenizer.from_pretrained(tokenizer, **options)
    encoded = [known.encode(marker, add_special_tokens=False) for marker in markers]
    for marker, ids in zip(markers, encoded, strict=True):
        if len(ids) != 1:
            raise SettingsError(
                f"axiscap: {marker!r} is not one token of this model's, but {len(ids)}; markers must name those that "
                "begin and end its thinking"
            )
    return encoded[0][0], encoded[1][0]
