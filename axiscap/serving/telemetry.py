"""The tensors that a capped graph reads and writes, at fixed addresses, and what is counted from them."""

from __future__ import annotations

import json
import math
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from axiscap import _C, ops
from axiscap.installation import layer_stats
from axiscap.profile import CapProfile
from axiscap.serving.settings import KEY, Settings, write

Counts = np.ndarray[Any, np.dtype[np.int32]]

#: How often the totals are written for the metrics, in seconds.
TOTALS_EVERY = 5.0


@dataclass(frozen=True)
class Choice:
    """What a request carries through the engine once its profile is chosen: a name for people, a digest for the bank.

    ``digest`` None: the request is left alone.
    """

    name: str | None
    digest: str | None
    id: str

    @classmethod
    def of(cls, extra: Mapping[str, Any] | None) -> Choice:
        """Reads it from a request's extra arguments, where :meth:`put` left it.

        Raises:
            RuntimeError: it is not there, so that nobody decided about this request.
        """
        stored = (extra or {}).get(KEY)
        if not isinstance(stored, dict):
            raise RuntimeError("axiscap: a request reached the model without a decision about its profile")
        return cls(**stored)

    def put(self, extra: Mapping[str, Any] | None) -> dict[str, Any]:
        return {**(extra or {}), KEY: vars(self)}

    @property
    def salt(self) -> str:
        """What separates this request's blocks in a prefix cache from those of requests that are capped differently."""
        return f"{KEY}={self.digest or '-'}"


class Bank:
    """All capped layers of one worker: slots of profiles, the slot of each row of the step, and its projections.

    Args:
        settings: layers that this worker does not hold are left out by ``layers``.
        layers: the capped layers that this worker holds.
        max_rows: of one step.
    """

    def __init__(self, settings: Settings, layers: Sequence[int], max_rows: int, device: torch.device) -> None:
        shape = (settings.slots, settings.directions)
        self.layers = list(layers)
        self.hidden_size = settings.hidden_size
        self.axes = torch.eye(1, settings.hidden_size, device=device).repeat(len(self.layers), *shape, 1)
        self.floors = torch.full((len(self.layers), *shape), -math.inf, device=device)
        self.rows = torch.full((max_rows,), -1, dtype=torch.int32, device=device)
        self.all_projections = torch.zeros(len(self.layers), max_rows, settings.directions, device=device)
        # The same memory by layer, each a storage of its own: a graph that writes several views of one copies them.
        self.projections = [from_dlpack(projections) for projections in self.all_projections]
        self.slot_of: dict[str, int] = {}
        self._filled = 0

    def place(self, slot: int, profile: CapProfile) -> None:
        """Puts a profile into a slot; what lay there is gone."""
        directions = self.floors.shape[2]
        if profile.directions > directions or profile.hidden_size != self.hidden_size:
            raise ValueError(
                f"the server's bank is for hidden size {self.hidden_size} and at most {directions} directions; the "
                f"profile has hidden size {profile.hidden_size} and {profile.directions}"
            )
        for at, layer in enumerate(self.layers):
            axes, floors = profile.slot_at(layer, directions)
            self.axes[at, slot].copy_(axes)
            self.floors[at, slot].copy_(floors)
        self.slot_of = {digest: other for digest, other in self.slot_of.items() if other != slot}
        self.slot_of[profile.digest] = slot

    def fill(self, slots: Counts) -> None:
        """The slots of the step's rows; those behind them are left alone."""
        _copy_in(self.rows, slots)
        if self._filled > len(slots):
            self.rows[len(slots) : self._filled].fill_(-1)
        self._filled = len(slots)

    def clear(self) -> None:
        """No row is capped until the next fill: dummy and padded steps."""
        self.rows.fill_(-1)
        self._filled = 0


def _copy_in(buffer: Tensor, values: Counts) -> None:
    host = torch.from_numpy(values)
    # Pinned memory is not reused before the copy is done: torch's allocator sees to that.
    buffer[: len(values)].copy_(host.pin_memory() if buffer.is_cuda else host, non_blocking=True)


@dataclass
class _Running:
    index: int
    choice: Choice


class Telemetry:
    """Counts per request and layer, of its prompt and of its answer, from the projections that the capped graph leaves.

    Nothing here waits for a GPU in a step: what is to be read is copied away and read some steps later. Rows that a
    speculative step computed and threw away count, and so do those that a preempted request computes again.
    """

    def __init__(self, bank: Bank, requests: int, totals: Path | None, log: Path | None) -> None:
        self.bank = bank
        self._totals_path = totals
        self._log_path = log
        self._rows = torch.full_like(bank.rows, -1)
        self._to_add: tuple[Tensor, Tensor, Tensor, Tensor]  # what a call of accumulate_ takes
        self._running: dict[str, _Running] = {}
        self._free: list[int] = []
        self._stats: Tensor  # (layers, requests, 2, K, F): the prompt's and the answer's
        self._floors: Tensor  # (layers, requests, 2, K)
        self._totals: dict[str, Tensor] = {}
        # What was copied away, and what to do with it when it is there: in order, so that totals never fall.
        self._copies: deque[tuple[torch.Event | None, Tensor, Callable[[Tensor], None]]] = deque()
        self._written = -math.inf
        self._changed = True
        self._grow(requests)

    def _grow(self, requests: int) -> None:
        layers, _, directions = self.bank.floors.shape
        fresh = self._new(requests)
        floors = torch.zeros(layers, requests, 2, directions, device=fresh.device)
        known = 0
        if self._running or self._free:
            known = self._stats.shape[1]
            fresh[:, :known] = self._stats
            floors[:, :known] = self._floors
        self._stats, self._floors = fresh, floors
        self._free += range(known, requests)

    def _new(self, requests: int) -> Tensor:
        layers, _, directions = self.bank.floors.shape
        stats = ops.new_stats(layers * requests * 2, directions, self.bank.floors.device)
        return stats.reshape(layers, requests, 2, directions, -1)

    def start(self, request: str, choice: Choice) -> None:
        """A capped request came into the batch for the first time."""
        assert choice.digest is not None
        if not self._free:  # preempted requests keep theirs while others run
            self._grow(2 * self._stats.shape[1])
        index = self._free.pop()
        self._floors[:, index] = self.bank.floors[:, self.bank.slot_of[choice.digest], None]
        self._running[request] = _Running(index, choice)

    def fill(self, requests: Sequence[str], counts: Counts, prompts: Counts) -> None:
        """Whose rows the coming step computes, in order; of each request's, the first ``prompts`` are of its prompt."""
        index = np.array([self._running[name].index if name in self._running else -1 for name in requests], np.int32)
        parts = np.stack([2 * index, 2 * index + 1], 1)
        parts[index < 0] = -1
        rows = np.repeat(parts.reshape(-1), np.stack([prompts, counts - prompts], 1).reshape(-1))
        _copy_in(self._rows, rows)
        projections = self.bank.all_projections[:, : len(rows)]
        self._to_add = self._stats.flatten(1, 2), projections, self._floors.flatten(1, 2), self._rows[: len(rows)]

    def count(self) -> None:
        """Adds the step that was just computed."""
        ops.accumulate_(*self._to_add)
        self._changed = True

    def finish(self, requests: Sequence[str]) -> None:
        gone = [self._running.pop(name) for name in requests if name in self._running]
        if not gone:
            return
        index = [entry.index for entry in gone]
        self._copy_away(index, partial(self._add_finished, [entry.choice for entry in gone]))
        self._stats[:, index] = self._new(len(gone))
        self._free += index

    def _copy_away(self, index: list[int], then: Callable[[Tensor], None]) -> None:
        """These requests' statistics, (layers, requests, 2, K, F) on the CPU, go to ``then`` in :meth:`settle`."""
        copied, event = self._stats[:, index], None
        if copied.is_cuda:
            copied = torch.empty(copied.shape, dtype=copied.dtype, pin_memory=True).copy_(copied, non_blocking=True)
            event = torch.Event(device=self._stats.device)
            event.record()
        self._copies.append((event, copied, then))

    def settle(self, *, idle: bool) -> None:
        """Logs what finished requests left, and writes the totals when it is time, or when nothing runs any more."""
        now = time.monotonic()
        if self._totals_path is not None and self._changed and (idle or now - self._written >= TOTALS_EVERY):
            self._written, self._changed = now, False
            running = list(self._running.values())
            self._copy_away([one.index for one in running], partial(self._write, [one.choice for one in running]))
        while self._copies and (idle or self._copies[0][0] is None or self._copies[0][0].query()):
            event, copied, then = self._copies.popleft()
            if event is not None:
                event.synchronize()
            then(copied)

    def _add_finished(self, choices: Sequence[Choice], left: Tensor) -> None:
        _add(self._totals, choices, left)
        if self._log_path is not None:
            self._log(left, choices)

    def _write(self, choices: Sequence[Choice], running: Tensor) -> None:
        assert self._totals_path is not None
        totals = dict(self._totals)
        _add(totals, choices, running)
        write(self._totals_path, {name: self._counts(sums) for name, sums in totals.items()})

    def _counts(self, sums: Tensor) -> dict[str, dict[str, float]]:
        """Of each layer, from sums (layers, K, F)."""
        field = {name: at for at, name in enumerate(_C.STAT_FIELDS)}
        first, all_directions = sums[:, 0].tolist(), sums.sum(1).tolist()
        return {
            str(layer): {
                "rows": first[at][field["seen"]],
                "fired": all_directions[at][field["fired"]],
                "nonfinite": first[at][field["nonfinite"]],
                "projection": first[at][field["sum"]],
                "shortfall": all_directions[at][field["shortfall"]],
            }
            for at, layer in enumerate(self.bank.layers)
        }

    def _log(self, left: Tensor, choices: Sequence[Choice]) -> None:
        assert self._log_path is not None
        lines = []
        for at, choice in enumerate(choices):
            parts = {"layers": left[:, at].sum(1), "answer": left[:, at, 1]}
            counted = {
                part: {layer: _described(stats[number]) for number, layer in enumerate(self.bank.layers)}
                for part, stats in parts.items()
            }
            lines.append(json.dumps({**vars(choice), "time": time.time(), **counted}) + "\n")
        with self._log_path.open("a") as file:
            file.write("".join(lines))


def _add(totals: dict[str, Tensor], choices: Sequence[Choice], stats: Tensor) -> None:
    """Sums by profile alone: minima and maxima do not add, and the totals have no use for them."""
    of_name: dict[str, list[int]] = {}
    for at, choice in enumerate(choices):
        assert choice.name is not None
        of_name.setdefault(choice.name, []).append(at)
    for name, index in of_name.items():
        sums = stats[:, index].sum((1, 2))
        totals[name] = totals[name] + sums if name in totals else sums


def _described(sums: Tensor) -> dict[str, Any]:
    stats = layer_stats(sums)
    return {
        "rows": stats.rows,
        "fired": stats.fired,
        "mean_projection": [_finite(value) for value in stats.mean],
        "mean_shortfall": [_finite(value) for value in stats.mean_shortfall],
    }


def _finite(value: float) -> float | None:
    """JSON has no NaN, which is what the mean of nothing is."""
    return value if math.isfinite(value) else None
