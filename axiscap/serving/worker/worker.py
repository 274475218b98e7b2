"""The engine-independent part of a worker: its buffers, the requests of a step's rows, and their counts."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from axiscap.serving.request import Assignment
from axiscap.serving.settings import ANSWER, Settings, read_profile
from axiscap.serving.worker.buffers import UNSEEN, Buffers, Counts
from axiscap.serving.worker.telemetry import Telemetry
from axiscap.serving.worker.thinking import Thinking, Tokens
from axiscap.serving.worker.writer import Writer

_LOGGER = logging.getLogger("axiscap")

#: One step in so many is checked: every layer must have measured its rows. The check waits for the device.
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
        the number of requests that run at once; it grows if there are more.
    totals
        the file of this worker's totals; None if another worker counts the same rows.
    markers
        the token ids that begin and end the thinking, if the settings depend on it.
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
        assert settings.separates_thinking == (markers is not None)
        self._thinking = None if markers is None else Thinking(*markers, device, requests)
        # The step that the buffers hold. While a batch decodes, its next step is the same.
        self._step: tuple[list[str], bytes, bytes] | None = None
        self._to_count = False
        self._steps, self._is_watching = 0, False
        self._looked_at: set[str] = set()
        slots = list(dict.fromkeys(settings.digests.values()))
        for name, digest in settings.digests.items():
            self.copy_profile(slots.index(digest), digest, settings.profiles[name])
        self._assignments: dict[str, Assignment] = {}
        self._telemetry: Telemetry | None = None
        if totals is not None and layers:
            log = None if settings.log is None else Path(settings.log)
            self._telemetry = Telemetry(self.buffers, requests, Writer(totals, log))

    @property
    def reads_tokens(self) -> bool:
        """Whether :meth:`fill` needs the rows' tokens."""
        return self._thinking is not None

    def copy_profile(self, slot: int, digest: str, path: str, floors: list[list[float]] | None = None) -> None:
        """Copies a profile into a slot of every layer."""
        profile = read_profile(path, floors, digest)
        self.buffers.copy_profile(slot, profile)
        if profile.knows_sinks:
            self._looked_at.add(digest)
        self._step = None

    def look_for_sinks(self, digest: str, first: Tensor) -> None:
        """Warns, once, if a profile without norm_limits lifts the first token of a sequence, a sink in most models.

        Parameters
        ----------
        first
            (layers, directions) of the layers that this worker holds: the first token's projections on that
            profile's axes, before the cap.
        """
        if digest in self._looked_at:
            return
        self._looked_at.add(digest)
        first, floors = first.cpu(), self.buffers.floors[:, self.buffers.slot_of[digest]].cpu()
        lifted = (first < floors).nonzero().tolist()
        if lifted:
            at, direction = lifted[0]
            _LOGGER.warning(
                "axiscap: profile %s lifts the first token of every sequence, an attention sink in most models "
                "(layer %d: projection %.4g, floor %.4g); a profile with norm_limits leaves it alone",
                digest,
                self.buffers.layers[at],
                first[at, direction],
                floors[at, direction],
            )

    def unseen(self, name: str) -> str | None:
        """The profile of a request if :meth:`look_for_sinks` has not checked it yet, else None."""
        digest = self._assignments[name].digest
        return None if digest in self._looked_at else digest

    def clear(self) -> None:
        """No row is capped until the next fill: the engine runs dummy rows, to warm up or to capture a graph."""
        self.buffers.clear()
        self._step = None

    def begin(self, finished: Iterable[str], new: Iterable[tuple[str, Assignment]]) -> None:
        """Before a step: the requests that ended, and the new ones. A request that is known already is ignored."""
        gone = [name for name in finished if self._assignments.pop(name, None) is not None]
        if self._telemetry:
            self._telemetry.finish(gone)
        if self._thinking:
            self._thinking.finish(gone)
        for name, assignment in new:
            if name in self._assignments:
                continue
            self._assignments[name] = assignment
            self._step = None  # a name may come again, with another assignment
            if self._telemetry and assignment.digest is not None:
                self._telemetry.start(name, assignment)

    def fill(
        self,
        names: Sequence[str],
        counts: Counts,
        prompts: Counts,
        starts: Counts,
        view: Mapping[str, str | None] | None = None,
        tokens: Tokens | None = None,
    ) -> None:
        """Before the model runs: sets the slots of the step's rows, which are ordered by request.

        Parameters
        ----------
        prompts
            the number of each request's rows that belong to its prompt; the others are written ones.
        starts
            the position of each request's first row in its sequence, if the settings depend on the thinking.
        view
            for the checking mode, the digest of each request as the scheduler knows it.
        tokens
            the rows' tokens, if the settings depend on the thinking.
        """
        step = list(names), counts.tobytes(), prompts.tobytes()
        if step != self._step or self._thinking:
            slots = self._slots(names, counts, prompts)
            self.buffers.fill(slots)
            if self._telemetry:
                self._telemetry.fill(names, counts, prompts, slots)
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
            self._check(names, counts, prompts, view)

    def _slots(self, names: Sequence[str], counts: Counts, prompts: Counts) -> Counts:
        """The slot of each row; -1 for rows of prompts if only what the model wrote is capped."""
        digests = [self._assignments[name].digest for name in names]
        written = np.array([-1 if digest is None else self.buffers.slot_of[digest] for digest in digests], np.int32)
        of_prompts = np.full_like(written, -1) if self._settings.caps_written_only else written
        return np.repeat(np.stack([of_prompts, written], 1), np.stack([prompts, counts - prompts], 1).ravel())

    def watch(self) -> None:
        """Before the model runs: marks every layer's projections now and then, so that :meth:`end` can check them."""
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
            self._telemetry.settle(idle=not self._assignments)
        self._to_count = False

    def _check(self, names: Sequence[str], counts: Counts, prompts: Counts, view: Mapping[str, str | None]) -> None:
        """Raises if a row has another content than the scheduler assigned to its request, or has one and must be left
        alone.
        """
        at = 0
        rows = self.buffers.rows.tolist()
        content = {slot: digest for digest, slot in self.buffers.slot_of.items()}
        for name, count, prompt in zip(names, counts.tolist(), prompts.tolist(), strict=True):
            written = at + (prompt if self._settings.caps_written_only else 0)
            if set(rows[at:written]) - {-1}:
                raise RuntimeError(f"axiscap: of the prompt of {name}, which is left alone, some rows are capped")
            contents = {content.get(row) for row in rows[written : at + count]}
            if contents - {view[name], *([None] if self._thinking else [])}:
                raise RuntimeError(
                    f"axiscap: rows {at} to {at + count - 1} of {name} have {contents}, not {view[name]}"
                )
            at += count
        if set(rows[at:]) - {-1}:
            raise RuntimeError(f"axiscap: rows behind the {at} of this step are capped")
