"""What capping did, counted per request and layer: totals for the metrics page, and a log of finished requests."""

from __future__ import annotations

import atexit
import copy
import json
import logging
import math
import os
import threading
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

from axiscap import _C, ops
from axiscap.drift import BUCKETS, Scale, bucket_of
from axiscap.serving import state
from axiscap.serving.buffers import Buffers, Counts, copy_in
from axiscap.serving.settings import Choice
from axiscap.stats import LayerStats, layer_stats

_LOGGER = logging.getLogger("axiscap")

#: How often the totals are written for the metrics, and what could not be written is tried again, in seconds.
TOTALS_EVERY = 5.0
#: After so many words of answers, those that nobody came for are looked for.
_DROP_EVERY = 256
#: What may fail to be written.
FAILS = ("totals", "log", "answers")
#: The rows of a request: those of its prompt, and those that were written.
PARTS = ("prompt", "answer")
#: Of the log, what waits at most for a disk that takes nothing; records beyond it are lost, and counted.
WAITING_BYTES = 16 << 20


class Writer:
    """Writes the totals and the log, in a thread of its own: a disk that is full, gone or slow holds up no step.

    What cannot be written is said once, counted on the metrics page, and tried again. Capping goes on meanwhile.

    Parameters
    ----------
    totals
        a file of the server's own folder (:func:`axiscap.serving.state.folder`), replaced as a whole.
    log
        a file that gets a line for each record; None: no log.
    """

    def __init__(self, totals: Path, log: Path | None) -> None:
        self.logs = log is not None
        self._paths = {"totals": totals, "log": log, "answers": totals.parent}
        self._news = threading.Condition()
        self._totals: Mapping[str, Any] | None = None  # the newest; an older one is of no use
        self._lines = bytearray()
        self._told: deque[tuple[str, Mapping[str, float]]] = deque()
        self._writing = threading.Lock()
        self._answers_written = 0
        self._failures = dict.fromkeys(FAILS, 0)
        self._failing: set[str] = set()
        self._lost = 0
        threading.Thread(target=self._run, name="axiscap-telemetry", daemon=True).start()
        atexit.register(self.flush)

    def totals(self, totals: Mapping[str, Any]) -> None:
        """What the metrics page shows, in place of what it was given before."""
        with self._news:
            self._totals = totals
            self._news.notify()

    def tell(self, ticket: str, answer: Mapping[str, float]) -> None:
        """Word of an answer for its client, who does not wait long for it: what cannot be written is not kept."""
        with self._news:
            self._told.append((ticket, answer))
            self._news.notify()

    def log(self, records: Sequence[Mapping[str, Any]]) -> None:
        """One line each, behind those before."""
        lines = [json.dumps(record).encode() + b"\n" for record in records]
        with self._news:
            for line in lines:
                if len(self._lines) + len(line) <= WAITING_BYTES:
                    self._lines += line
                else:
                    self._lost += 1
            self._news.notify()

    def flush(self) -> bool:
        """Writes what waits, once, in this thread; returns whether nothing is left."""
        with self._writing:
            # The totals last, so that the others' failures are in them.
            parts = {"answers": self._answer, "log": self._append, "totals": self._replace}
            done = [self._attempt(what, write) for what, write in parts.items()]
            return all(done)

    def _run(self) -> None:
        while True:
            with self._news:
                self._news.wait_for(lambda: self._totals is not None or self._lines or self._told)
            if not self.flush():
                time.sleep(TOTALS_EVERY)

    def _attempt(self, what: str, write: Callable[[], None]) -> bool:
        try:
            write()
        except Exception as error:  # whatever it is, the thread must live, and try again
            self._failures[what] += 1
            if what not in self._failing:
                self._failing.add(what)
                told = "axiscap: the %s cannot be written to %s, and will be tried again; capping goes on: %s"
                _LOGGER.warning(told, what, self._paths[what], error)
            return False
        if what in self._failing:
            self._failing.discard(what)
            _LOGGER.warning("axiscap: the %s can be written again", what)
        return True

    def _answer(self) -> None:
        folder = self._paths["answers"]
        assert folder is not None
        while self._told:
            state.write_answer(folder, *self._told.popleft())
            self._answers_written += 1
            if self._answers_written % _DROP_EVERY == 0:
                state.drop_answers(folder)

    def _append(self) -> None:
        path = self._paths["log"]
        if path is None or not self._lines:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        # Opened each time, since it may have been moved away; a pipe that nobody reads is an error, not a wait.
        file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK, 0o644)
        try:
            while self._lines:
                with self._news:
                    waiting = bytes(self._lines)
                written = os.write(file, waiting)  # on a full disk a part, whose rest goes first the next time
                with self._news:
                    del self._lines[:written]
        finally:
            os.close(file)

    def _replace(self) -> None:
        with self._news:
            totals = self._totals
        path = self._paths["totals"]
        if totals is None or path is None:
            return
        state.write(path, {**totals, "failures": self._failures, "lost": self._lost})
        with self._news:
            if self._totals is totals:
                self._totals = None


@dataclass
class _Running:
    """A request that is counted at ``index``; what its answer is held against, and at which of the layers (None:
    another worker holds it); and what its profile adds (:attr:`axiscap.serving.buffers.Buffers.gains`).
    """

    index: int
    choice: Choice
    scale: Scale
    at: int | None
    gaps: list[Tensor]
    strength: float

    def stats(self, sums: Tensor, at: int) -> LayerStats:
        """What it did at one layer, from the statistics (layers, K, F)."""
        return layer_stats(sums[at], self.gaps[at], self.strength)


@dataclass
class _Answers:
    """Percentiles of finished answers: how many in each of the buckets, and their sum."""

    counts: list[int]
    sum: float = 0.0


class Telemetry:
    """Counts per request and layer, of its prompt and of its answer, from the projections that the capped graph leaves.

    Nothing here waits for a GPU in a step: what is to be read is copied away and read some steps later. Rows that a
    speculative step computed and threw away count, and so do those that a preempted request computes again.
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

    def start(self, request: str, choice: Choice) -> None:
        """A capped request came into the batch for the first time."""
        assert choice.digest is not None
        if not self._free:  # preempted requests keep theirs while others run
            self._grow(2 * self._stats.shape[1])
        index = self._free.pop()
        self._floors[:, index] = self.buffers.floors[:, self.buffers.slot_of[choice.digest], None]
        scale = self.buffers.scales[choice.digest]
        at = self.buffers.layers.index(scale.layer) if scale.layer in self.buffers.layers else None
        self._running[request] = _Running(index, choice, scale, at, *self.buffers.gains[choice.digest])

    def fill(self, requests: Sequence[str], counts: Counts, prompts: Counts, slots: Counts) -> None:
        """Whose rows the coming step computes, in order; of each request's, the first ``prompts`` are of its prompt.

        Parameters
        ----------
        slots
            of the rows, as the buffers have them: those without one are not counted.
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
        """As :meth:`axiscap.serving.buffers.Buffers.leave`: what is left alone is not counted."""
        self._rows[: len(alone)].masked_fill_(alone, -1)

    def count(self) -> None:
        """Adds the step that was just computed."""
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
        """Logs what finished requests left, and writes the totals when it is time, or when nothing runs any more."""
        now = time.monotonic()
        if self._changed and (idle or now - self._written >= TOTALS_EVERY):
            self._written, self._changed = now, False
            running = list(self._running.values())
            self._copy_away([one.index for one in running], partial(self._write, [one.choice for one in running]))
        while self._copies and (idle or self._copies[0][0] is None or self._copies[0][0].query()):
            event, copied, then = self._copies.popleft()
            if event is not None:
                event.synchronize()
            then(copied)

    def _add_finished(self, gone: Sequence[_Running], left: Tensor) -> None:
        _add(self._totals, [entry.choice for entry in gone], left)
        answers = [_answer(entry, left[:, at, 1]) for at, entry in enumerate(gone)]
        for entry, answer in zip(gone, answers, strict=True):
            if answer is None:
                continue
            choice = entry.choice
            if choice.ticket is not None:
                self._writer.tell(choice.ticket, answer)
            if "percentile" in answer and choice.name is not None:
                known = self._answers.setdefault(choice.name, _Answers([0] * len(BUCKETS)))
                known.counts[bucket_of(answer["percentile"])] += 1
                known.sum += answer["percentile"]
        if self._writer.logs:
            self._log(left, gone, answers)

    def _write(self, choices: Sequence[Choice], running: Tensor) -> None:
        totals = dict(self._totals)
        _add(totals, choices, running)
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
            said = {name: value for name, value in vars(entry.choice).items() if name != "ticket"}
            records.append({**said, "time": time.time(), **counted, "drift": answer})
        self._writer.log(records)


def _add(totals: dict[str, Tensor], choices: Sequence[Choice], stats: Tensor) -> None:
    """Sums by profile alone: minima and maxima do not add, and the totals have no use for them."""
    of_name: dict[str, list[int]] = {}
    for at, choice in enumerate(choices):
        assert choice.name is not None
        of_name.setdefault(choice.name, []).append(at)
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
    found = entry.stats(stats, entry.at)
    if not found.rows:
        return None
    percentile = entry.scale.percentile(found.mean[0])
    known = {"percentile": round(percentile, 2)} if math.isfinite(percentile) else {}
    if math.isfinite(found.mean[0]):
        known["mean"] = round(found.mean[0], 4)
    return {**known, "fired": round(found.fired / found.rows, 4), "rows": found.rows, "layer": entry.scale.layer}


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
