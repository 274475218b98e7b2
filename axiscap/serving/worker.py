"""One worker's part, whatever the engine: its buffers, which rows of a step are whose, and what is counted of them."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from axiscap.serving.buffers import Buffers, Counts
from axiscap.serving.control import read_profile
from axiscap.serving.settings import ANSWER, Choice, Settings
from axiscap.serving.streams import UNSEEN
from axiscap.serving.telemetry import Telemetry, Writer
from axiscap.serving.thinking import Thinking, Tokens

_LOGGER = logging.getLogger("axiscap")

#: One step in this many is watched: it shows whether every layer still measures its rows, and waits for the device.
_WATCHED_EVERY = 64


class Worker:
    """
    Parameters
    ----------
    layers
        the capped layers that this worker holds.
    max_rows
        of one step.
    requests
        that run at once, as a first guess.
    totals
        a file for this worker's totals; None: another worker counts the same rows.
    markers
        the token ids that begin and end the thinking, where the settings tell rows apart by that.
    """

    def __init__(
        self,
        settings: Settings,
        layers: Sequence[int],
        max_rows: int,
        device: torch.device,
        requests: int,
        totals: Path | None,
        markers: tuple[int, int] | None = None,
    ) -> None:
        self.buffers = Buffers(settings, layers, max_rows, device)
        self._settings = settings
        assert settings.tells_thinking == (markers is not None)
        self._thinking = None if markers is None else Thinking(*markers, device, requests)
        # The step that the buffers hold: while a batch goes on writing, its next one is the same.
        self._step: tuple[list[str], bytes, bytes, bytes] | None = None
        self._to_count = False
        self._steps, self._is_watching = 0, False
        self._looked_at: set[str] = set()
        slots = list(dict.fromkeys(settings.digests.values()))
        for name, digest in settings.digests.items():
            self.place(slots.index(digest), digest, settings.profiles[name])
        self._choices: dict[str, Choice] = {}
        self._telemetry: Telemetry | None = None
        if totals is not None and layers:
            log = None if settings.log is None else Path(settings.log)
            self._telemetry = Telemetry(self.buffers, requests, Writer(totals, log))

    @property
    def reads_tokens(self) -> bool:
        """Whether :meth:`fill` has to be told what the rows are of."""
        return self._thinking is not None

    def place(self, slot: int, digest: str, path: str, floors: list[list[float]] | None = None) -> None:
        """Puts a profile into a slot of every layer."""
        self.buffers.place(slot, read_profile(path, floors, digest))
        self._last_sink = max((max(sinks, default=-1) for sinks in self.buffers.sinks.values()), default=-1)
        self._step = None

    def look_for_sinks(self, digest: str, first: Tensor) -> None:
        """Warns, once, where a profile lifts the first token of a sequence, in most models an attention sink.

        Parameters
        ----------
        first
            (layers, directions) of the layers that this worker holds: the first token's projections on that
            profile's axes, before the cap.
        """
        if digest in self._looked_at:
            return
        self._looked_at.add(digest)
        first, slot = first.cpu(), self.buffers.slot_of[digest]
        floors, limits = self.buffers.floors[:, slot].cpu(), self.buffers.limits[:, slot].cpu()
        lifted = ((first < floors) & (first.abs() <= limits)).nonzero().tolist()
        if lifted and 0 not in self.buffers.sinks[digest]:
            at, direction = lifted[0]
            _LOGGER.warning(
                "axiscap: profile %s lifts the first token of every sequence, an attention sink in most models "
                "(layer %d: projection %.4g, floor %.4g); a profile with sinks or limits leaves it alone",
                digest,
                self.buffers.layers[at],
                first[at, direction],
                floors[at, direction],
            )

    def unseen(self, name: str) -> str | None:
        """The profile of a request, where :meth:`look_for_sinks` has not looked at it yet."""
        digest = self._choices[name].digest
        return None if digest in self._looked_at else digest

    def clear(self) -> None:
        """Rows that the engine makes up, to warm up or to capture a graph: none is capped."""
        self.buffers.clear()
        self._step = None

    def begin(self, finished: Iterable[str], new: Iterable[tuple[str, Choice]]) -> None:
        """Before a step: which requests are gone, and which come for the first time (or again: that is no news)."""
        gone = [name for name in finished if self._choices.pop(name, None) is not None]
        if self._telemetry:
            self._telemetry.finish(gone)
        if self._thinking:
            self._thinking.finish(gone)
        for name, choice in new:
            if name in self._choices:
                continue
            self._choices[name] = choice
            self._step = None  # a name may come again, with another choice
            if self._telemetry and choice.digest is not None:
                self._telemetry.start(name, choice)

    def fill(
        self,
        names: Sequence[str],
        counts: Counts,
        prompts: Counts,
        starts: Counts,
        view: Mapping[str, str | None] | None = None,
        tokens: Tokens | None = None,
    ) -> None:
        """Before the model runs: whose rows the step computes, in order.

        Parameters
        ----------
        prompts
            how many of each request's rows are of its prompt; the others the model wrote.
        starts
            the position in its sequence of each request's first row.
        view
            for the checking mode, the digest of each request as the scheduler knows it.
        tokens
            what the rows are of, where a row's place in the thinking decides.
        """
        left = self._left(names, counts, prompts, starts)
        step = list(names), counts.tobytes(), prompts.tobytes(), left.tobytes()
        if step != self._step or self._thinking:
            digests = [self._choices[name].digest for name in names]
            each = [-1 if digest is None else self.buffers.slot_of[digest] for digest in digests]
            slots = np.repeat(np.array(each, np.int32), counts)
            slots[left] = -1
            self.buffers.fill(slots)
            if self._telemetry:
                self._telemetry.fill(names, counts, prompts, left)
            self._step = step
        if self._thinking and len(names):  # an idle rank of several has none
            assert tokens is not None
            inside = self._thinking.rows(names, counts, starts, tokens)
            alone = inside if self._settings.positions == ANSWER else ~inside
            self.buffers.leave(alone)
            if self._telemetry:
                self._telemetry.leave(alone)
        self._to_count = True
        if view is not None:
            self._check(names, counts, left, view)

    def _left(self, names: Sequence[str], counts: Counts, prompts: Counts, starts: Counts) -> Counts:
        """The rows of the step that are left alone: sinks of the sequence that they are in, by its profile; and of
        prompts, where only what the model wrote is capped.
        """
        found: list[int] = []
        if self._settings.written_only and prompts.any():
            begins = np.cumsum(counts) - counts
            places = np.arange(int(counts.sum())) - np.repeat(begins, counts)
            found += np.flatnonzero(places < np.repeat(prompts, counts)).tolist()
        for at in np.flatnonzero(starts <= self._last_sink).tolist():
            digest = self._choices[names[at]].digest
            first, start, count = int(counts[:at].sum()), int(starts[at]), int(counts[at])
            positions = () if digest is None else self.buffers.sinks[digest]
            found += [first + position - start for position in positions if 0 <= position - start < count]
        return np.array(found, np.int32)

    def watch(self) -> None:
        """Before the model runs on the rows of :meth:`fill`: has :meth:`end` check every layer, now and then."""
        self._is_watching = self._steps % _WATCHED_EVERY == 0
        self._steps += 1
        if self._is_watching:
            self.buffers.all_projections[:, 0].fill_(UNSEEN)

    def end(self) -> None:
        """After a step, whether or not it had rows.

        Raises
        ------
        RuntimeError
            A layer did not measure the rows of a watched step.
        """
        if self._is_watching:
            self._is_watching = False
            first = self.buffers.all_projections[:, 0, 0].tolist()
            for layer, projection in zip(self.buffers.layers, first, strict=True):
                if projection == UNSEEN:
                    raise RuntimeError(f"axiscap: layer {layer} no longer measures the rows of a step: its cap is gone")
        if self._telemetry:
            if self._to_count:
                self._telemetry.count()
            self._telemetry.settle(idle=not self._choices)
        self._to_count = False

    def _check(self, names: Sequence[str], counts: Counts, alone: Counts, view: Mapping[str, str | None]) -> None:
        """Every row's slot holds what the scheduler says of its request; rows that are left alone, and those behind the
        step, have none.
        """
        at = 0
        rows = self.buffers.rows.tolist()
        left = set(alone.tolist())
        content = {slot: digest for digest, slot in self.buffers.slot_of.items()}
        if any(rows[row] != -1 for row in left):
            raise RuntimeError(f"axiscap: of the rows {sorted(left)}, which are left alone, some are capped")
        for name, count in zip(names, counts.tolist(), strict=True):
            found = {content.get(rows[row]) for row in range(at, at + count) if row not in left}
            if found - {view[name], *([None] if self._thinking else [])}:
                raise RuntimeError(f"axiscap: rows {at} to {at + count - 1} of {name} have {found}, not {view[name]}")
            at += count
        if set(rows[at:]) - {-1}:
            raise RuntimeError(f"axiscap: rows behind the {at} of this step are capped")
