"""Counts by request and layer: totals for the metrics page, readings for clients, and a log of finished requests."""

from __future__ import annotations

import copy
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from axiscap import _C, ops
from axiscap.ops.stats import LayerStats, layer_stats
from axiscap.profile.scale import BUCKETS, Scale, bucket_of
from axiscap.serving.request import Assignment
from axiscap.serving.worker.buffers import Buffers, Counts, copy_in
from axiscap.serving.worker.writer import TOTALS_EVERY, Writer

_LOGGER = logging.getLogger("axiscap")

#: The rows of a request: those of its prompt, and those that were written.
PARTS = ("prompt", "answer")


@dataclass
class _Running:
    """A request that runs.

    ``index``: its row in the counts. ``scale``: the reference range of its answer. ``at``: the index of that layer, or
    None if another worker holds it. ``gaps`` and ``strength``: see
    :attr:`axiscap.serving.worker.buffers.Buffers.gains`.
    """

    index: int
    assignment: Assignment
    scale: Scale
    at: int | None
    gaps: list[Tensor]
    strength: float

    def stats(self, sums: Tensor, at: int) -> LayerStats:
        """The statistics of one layer, from sums (layers, K, F)."""
        return layer_stats(sums[at], self.gaps[at], self.strength)


@dataclass
class _Answers:
    """Percentiles of finished answers: how many in each of the buckets, and their sum."""

    counts: list[int]
    sum: float = 0.0


class Telemetry:
    """Counts per request and layer, of its prompt and of its answer, from the projections that the capped graph leaves.

    No step waits for a GPU: counts are copied to the host and read some steps later. Rows that a speculative step
    discards are counted, and so are rows that a preempted request computes again.
    """

    def __init__(self, buffers: Buffers, requests: int, writer: Writer) -> None:
        self.buffers = buffers
        self._writer = writer
        self._rows = torch.full_like(buffers.rows, -1)
        self._to_add: tuple[Tensor, Tensor, Tensor, Tensor]  # what a call of accumulate_ takes
        self._running: dict[str, _Running] = {}
        self._free: list[int] = []
        self._stats: Tensor  # (layers, requests, 2, K, F): the prompt's and the answer's
        self._floors: Tensor  # (layers, requests, 2, K)
        self._totals: dict[str, Tensor] = {}  # by profile, (layers, 2, K, F)
        self._answers: dict[str, _Answers] = {}
        # What was copied away, and what to do with it when it is there: in order, so that totals never fall.
        self._copies: deque[tuple[torch.Event | None, Tensor, Callable[[Tensor], None]]] = deque()
        self._written = -math.inf
        self._changed = True
        self._grow(requests)

    def _grow(self, requests: int) -> None:
        layers, _, directions = self.buffers.floors.shape
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
        layers, _, directions = self.buffers.floors.shape
        stats = ops.new_stats(layers * requests * 2, directions, self.buffers.floors.device)
        return stats.reshape(layers, requests, 2, directions, -1)

    def start(self, request: str, assignment: Assignment) -> None:
        """Begins to count a capped request."""
        assert assignment.digest is not None
        if not self._free:  # preempted requests keep theirs while others run
            self._grow(2 * self._stats.shape[1])
        index = self._free.pop()
        self._floors[:, index] = self.buffers.floors[:, self.buffers.slot_of[assignment.digest], None]
        scale = self.buffers.scales[assignment.digest]
        at = self.buffers.layers.index(scale.layer) if scale.layer in self.buffers.layers else None
        self._running[request] = _Running(index, assignment, scale, at, *self.buffers.gains[assignment.digest])

    def fill(self, requests: Sequence[str], counts: Counts, prompts: Counts, slots: Counts) -> None:
        """Sets the requests of the next step's rows, in order. The first ``prompts`` rows of each belong to its prompt.

        Parameters
        ----------
        slots
            the slots of the rows. Rows without one are not counted.
        """
        index = np.array([self._running[name].index if name in self._running else -1 for name in requests], np.int32)
        parts = np.stack([2 * index, 2 * index + 1], 1)
        parts[index < 0] = -1
        rows = np.repeat(parts.reshape(-1), np.stack([prompts, counts - prompts], 1).reshape(-1))
        rows[slots < 0] = -1
        copy_in(self._rows, rows)
        projections = self.buffers.all_projections[:, : len(rows)]
        self._to_add = self._stats.flatten(1, 2), projections, self._floors.flatten(1, 2), self._rows[: len(rows)]

    def leave(self, alone: Tensor) -> None:
        """Does not count the rows (rows,) that :meth:`axiscap.serving.worker.buffers.Buffers.leave` leaves alone."""
        self._rows[: len(alone)].masked_fill_(alone, -1)

    def count(self) -> None:
        """Adds the rows of the step that just ran."""
        ops.accumulate_(*self._to_add)
        self._changed = True

    def finish(self, requests: Sequence[str]) -> None:
        gone = [self._running.pop(name) for name in requests if name in self._running]
        if not gone:
            return
        index = [entry.index for entry in gone]
        self._copy_away(index, partial(self._add_finished, gone))
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
        """Logs finished requests, and writes the totals if they are due or no request runs."""
        now = time.monotonic()
        if self._changed and (idle or now - self._written >= TOTALS_EVERY):
            self._written, self._changed = now, False
            running = list(self._running.values())
            self._copy_away([one.index for one in running], partial(self._write, [one.assignment for one in running]))
        while self._copies and (idle or self._copies[0][0] is None or self._copies[0][0].query()):
            event, copied, then = self._copies.popleft()
            if event is not None:
                event.synchronize()
            then(copied)

    def _add_finished(self, gone: Sequence[_Running], left: Tensor) -> None:
        _add(self._totals, [entry.assignment for entry in gone], left)
        answers = [_answer(entry, left[:, at, 1]) for at, entry in enumerate(gone)]
        for entry, answer in zip(gone, answers, strict=True):
            if answer is None:
                continue
            assignment = entry.assignment
            if assignment.ticket is not None:
                self._writer.report(assignment.ticket, answer)
            if "percentile" in answer and assignment.name is not None:
                known = self._answers.setdefault(assignment.name, _Answers([0] * len(BUCKETS)))
                known.counts[bucket_of(answer["percentile"])] += 1
                known.sum += answer["percentile"]
        if self._writer.logs:
            self._log(left, gone, answers)

    def _write(self, assignments: Sequence[Assignment], running: Tensor) -> None:
        totals = dict(self._totals)
        _add(totals, assignments, running)
        profiles = {name: self._counts(sums) for name, sums in totals.items()}
        answers = {name: vars(known) for name, known in self._answers.items()}
        self._writer.totals({"profiles": profiles, "answers": copy.deepcopy(answers)})

    def _counts(self, sums: Tensor) -> dict[str, dict[str, dict[str, float]]]:
        """Of each part and layer, from sums (layers, 2, K, F)."""
        field = {name: at for at, name in enumerate(_C.STAT_FIELDS)}
        first, all_directions = sums[:, :, 0].tolist(), sums.sum(2).tolist()
        return {
            part: {
                str(layer): {
                    "rows": first[at][number][field["seen"]],
                    "fired": all_directions[at][number][field["fired"]],
                    "nonfinite": first[at][number][field["nonfinite"]],
                    "projection": first[at][number][field["sum"]],
                    "shortfall": all_directions[at][number][field["shortfall"]],
                }
                for at, layer in enumerate(self.buffers.layers)
            }
            for number, part in enumerate(PARTS)
        }

    def _log(self, left: Tensor, gone: Sequence[_Running], answers: Sequence[Mapping[str, float] | None]) -> None:
        records = []
        for at, (entry, answer) in enumerate(zip(gone, answers, strict=True)):
            parts = {"layers": left[:, at].sum(1), "answer": left[:, at, 1]}
            counted = {
                part: {layer: _described(entry.stats(sums, number)) for number, layer in enumerate(self.buffers.layers)}
                for part, sums in parts.items()
            }
            facts = {name: value for name, value in vars(entry.assignment).items() if name != "ticket"}
            records.append({**facts, "time": time.time(), **counted, "drift": answer})
        self._writer.log(records)


def _add(totals: dict[str, Tensor], assignments: Sequence[Assignment], stats: Tensor) -> None:
    """Sums by profile alone: minima and maxima do not add, and the totals have no use for them."""
    of_name: dict[str, list[int]] = {}
    for at, assignment in enumerate(assignments):
        assert assignment.name is not None
        of_name.setdefault(assignment.name, []).append(at)
    for name, index in of_name.items():
        sums = stats[:, index].sum(1)
        totals[name] = totals[name] + sums if name in totals else sums


def _answer(entry: _Running, stats: Tensor) -> dict[str, float] | None:
    """An answer's drift, from its statistics (layers, K, F), at the layer of its profile's scale: its mean projection,
    the percentile of that among the model's normal answers (left out where the profile does not know those), and the
    share of its rows that fired. None: it has no rows, or another worker holds that layer.
    """
    if entry.at is None:
        return None
    counts = entry.stats(stats, entry.at)
    if not counts.rows:
        return None
    percentile = entry.scale.percentile(counts.mean[0])
    known = {"percentile": round(percentile, 2)} if math.isfinite(percentile) else {}
    if math.isfinite(counts.mean[0]):
        known["mean"] = round(counts.mean[0], 4)
    return {**known, "fired": round(counts.fired / counts.rows, 4), "rows": counts.rows, "layer": entry.scale.layer}


def _described(stats: LayerStats) -> dict[str, Any]:
    return {
        "rows": stats.rows,
        "fired": stats.fired,
        "mean_projection": [_finite(value) for value in stats.mean],
        "mean_shortfall": [_finite(value) for value in stats.mean_shortfall],
        "mean_added": [_finite(value) for value in stats.mean_added],
    }


def _finite(value: float) -> float | None:
    """JSON has no NaN, which is what the mean of nothing is."""
    return value if math.isfinite(value) else None
