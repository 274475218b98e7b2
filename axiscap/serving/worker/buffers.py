"""The tensors that a capped graph reads and writes, at fixed addresses."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from axiscap.ops.stats import target_gap
from axiscap.profile import CapProfile
from axiscap.profile.scale import Scale
from axiscap.serving.settings import Settings

#: No projection of a real row: a layer that measures its rows overwrites it.
UNSEEN = 12345.0

Counts = np.ndarray[Any, np.dtype[np.int32]]


class Buffers:
    """All capped layers of one worker: slots of profiles, the slot of each row of the step, and its projections.

    Parameters
    ----------
    settings
        the server's configuration, for all workers.
    layers
        the capped layers that this worker holds.
    max_rows
        the most rows of one step.
    """

    def __init__(self, settings: Settings, layers: Sequence[int], max_rows: int, device: torch.device) -> None:
        shape = (settings.slots, settings.directions)
        self.layers = list(layers)
        self._settings = settings
        self.axes = torch.eye(1, settings.hidden_size, device=device).repeat(len(self.layers), *shape, 1)
        self.lifts = self.axes.clone()
        self.floors = torch.full((len(self.layers), *shape), -math.inf, device=device)
        self.targets = self.floors.clone()
        self.norm_limits = torch.full(self.floors.shape[:2], math.inf, device=device)
        #: What a slot holds, in the order of :class:`axiscap.profile.Slot`.
        self._slots = self.axes, self.lifts, self.floors, self.targets, self.norm_limits
        self.rows = torch.full((max_rows,), -1, dtype=torch.int32, device=device)
        self.all_projections = torch.zeros(len(self.layers), max_rows, settings.directions, device=device)
        # The same memory by layer, each a storage of its own: a graph that writes several views of one copies them.
        self.projections = [from_dlpack(projections) for projections in self.all_projections]
        self.slot_of: dict[str, int] = {}
        #: By digest: the reference range of answers' projections, at one layer.
        self.scales: dict[str, Scale] = {}
        #: By digest: the gap of each layer and the strength, as :func:`axiscap.ops.stats.layer_stats` takes them.
        self.gains: dict[str, tuple[list[Tensor], float]] = {}
        self._filled = 0

    def copy_profile(self, slot: int, profile: CapProfile) -> None:
        """Copies a profile into a slot, in place of its content."""
        self._settings.check_room(profile)
        for at, layer in enumerate(self.layers):
            for tensor, part in zip(self._slots, profile.slot_at(layer, self._settings.directions), strict=True):
                tensor[at, slot].copy_(part)
        self.slot_of = {digest: other for digest, other in self.slot_of.items() if other != slot}
        self.slot_of[profile.digest] = slot
        gaps = [target_gap(profile, layer, self._settings.directions) for layer in self.layers]
        self.scales = {digest: self.scales[digest] for digest in self.slot_of if digest in self.scales}
        self.scales[profile.digest] = Scale.of(profile)
        self.gains = {digest: self.gains[digest] for digest in self.slot_of if digest in self.gains}
        self.gains[profile.digest] = gaps, profile.strength

    def tensors(self, at: int) -> tuple[Tensor, ...]:
        """The arguments of the ops ``.buffers`` for a layer, after the streams."""
        more = self.targets[at], self.lifts[at], self.norm_limits[at]
        return self.axes[at], self.floors[at], self.rows, self.projections[at], *more

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """Restores the content of all slots, and the slots of all rows, when the context ends."""
        tensors = (*self._slots, self.rows)
        copies = [tensor.clone() for tensor in tensors]
        try:
            yield
        finally:
            for tensor, copy in zip(tensors, copies, strict=True):
                tensor.copy_(copy)

    def fill(self, slots: Counts) -> None:
        """Sets the slots of the step's rows. The rows after them are left alone."""
        copy_in(self.rows, slots)
        if self._filled > len(slots):
            self.rows[len(slots) : self._filled].fill_(-1)
        self._filled = len(slots)

    def leave(self, alone: Tensor) -> None:
        """Leaves rows of the step alone.

        Parameters
        ----------
        alone
            (rows,) bool, on the device.
        """
        self.rows[: len(alone)].masked_fill_(alone, -1)

    def clear(self) -> None:
        """No row is capped until the next fill: dummy and padded steps."""
        self.rows.fill_(-1)
        self._filled = 0


def copy_in(buffer: Tensor, values: Counts) -> None:
    """Writes values to the front of a buffer, without waiting for the device."""
    buffer[: len(values)].copy_(_pinned(values, buffer.device), non_blocking=True)


def copied(values: np.ndarray[Any, Any], device: torch.device) -> Tensor:
    """Values on the device, without waiting for it."""
    return _pinned(values, device).to(device, non_blocking=True)


def _pinned(values: np.ndarray[Any, Any], device: torch.device) -> Tensor:
    # Pinned memory is not reused before the copy is done: torch's allocator sees to that.
    host = torch.from_numpy(values)
    return host.pin_memory() if device.type == "cuda" else host
