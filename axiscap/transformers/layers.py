"""A capped layer of a running model: its bank, its statistics, and the two ways to cap its output."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from axiscap import _C, ops
from axiscap.banks import CappedLayer
from axiscap.profile import CapProfile
from axiscap.transformers.rows import ThreadState


class ModelLayer(CappedLayer):
    """A layer whose hidden states are torch tensors.

    ``cap_announced(hidden)`` caps hidden states in place, keeps their projections and counts them, in one call of the
    extension. It returns False, with nothing done, for all but the plain case: no gradient, and the shape and device of
    the pass that was announced last.

    Parameters
    ----------
    announced
        by device, the announced pass, which the layers share.
    position
        of the layer's projections among those of the announced pass.
    """

    def __init__(
        self,
        index: int,
        profiles: Sequence[CapProfile],
        directions: int,
        device: torch.device,
        announced: dict[torch.device, Any],
        position: int,
    ) -> None:
        self._announced, self._position = announced, position
        super().__init__(index, profiles, directions, device)

    def move_to(self, device: torch.device) -> None:
        super().move_to(device)
        announced = self._announced.setdefault(self.axes.device, _C.Pass())
        self.cap_announced: Callable[[object], bool] = _C.layer(self.bank, self.stats, announced, self._position)

    def cap(self, hidden: Tensor, slots: Tensor | None, thread: ThreadState, *, count: bool = True) -> Tensor:
        """The capped copy of hidden (batch, tokens, H)."""
        if hidden.device != self.axes.device:
            self.move_to(hidden.device)
        compiling = torch.compiler.is_compiling()
        # Do not count in an exported program: the statistics would be traced, not recorded. (The flag, since
        # torch.compile of 2.10 and 2.11 takes is_exporting() for true.)
        count = count and not (compiling and torch.compiler._is_exporting_flag)
        projections = self._projection_buffer(hidden, thread, compiling) if count else None
        if hidden.requires_grad and torch.is_grad_enabled():
            capped = ops.cap(
                hidden.contiguous(), self.axes, self.floors, slots, **self.options, projections=projections
            )
        else:
            capped = hidden.clone(memory_format=torch.contiguous_format)
            if compiling:
                ops.cap_(capped, self.axes, self.floors, slots, **self.options, projections=projections)
            else:
                self.bank.cap_(capped, slots, projections)
        if projections is not None:
            ops.accumulate_(self.stats, projections, self.floors, slots)
        return capped

    def _projection_buffer(self, hidden: Tensor, thread: ThreadState, compiling: bool) -> Tensor:
        """(rows, K) for the projections of one pass: that of the last pass, if it has as many rows."""
        rows = hidden.numel() // hidden.shape[-1]
        buffer, _ = thread.projections.get(self.index, (None, None))
        if compiling or buffer is None or buffer.shape[0] != rows or buffer.device != hidden.device:
            buffer = self.floors.new_empty((rows, self.floors.shape[1]))
        thread.projections[self.index] = buffer, hidden.shape[:-1]
        return buffer
