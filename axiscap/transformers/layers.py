"""A capped layer of a running model: its bank, its statistics, and the two ways to cap its output."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from axiscap import _C, ops
from axiscap.ops.banks import CappedLayer
from axiscap.profile import CapProfile
from axiscap.transformers.rows import ThreadState


class BankTensors(NamedTuple):
    """The bank of a layer, as the ops take it."""

    axes: Tensor
    floors: Tensor
    options: dict[str, Tensor | None]


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

    def set_floors(self, slot: int, floors: Tensor, targets: Tensor) -> None:
        """Changes the floors and targets (K,) of a slot. Passes that have begun keep theirs for backward."""
        self.floors = self.floors.clone()
        self.floors[slot] = floors.to(self.floors.device)
        if (all_targets := self.options["targets"]) is not None:
            all_targets = all_targets.clone()
            all_targets[slot] = targets.to(self.floors.device)
            self.options = self.options | {"targets": all_targets}
        self.move_to(self.axes.device)

    def cap(self, hidden: Tensor, slots: Tensor | None, thread: ThreadState) -> Tensor:
        """The capped copy of hidden (batch, tokens, H), whose rows are counted."""
        if hidden.device != self.axes.device:
            self.move_to(hidden.device)
        compiling = torch.compiler.is_compiling()
        # Do not count in an exported program: the statistics would be traced, not recorded. (The flag, since
        # torch.compile of 2.10 and 2.11 takes is_exporting() for true.)
        is_counted = not (compiling and torch.compiler._is_exporting_flag)
        projections = self._projection_buffer(hidden, thread, compiling) if is_counted else None
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

    def cap_again(self, hidden: Tensor, slots: Tensor | None, bank: BankTensors) -> Tensor:
        """The capped copy of hidden under the bank of an earlier pass, in which its rows were counted."""
        return ops.cap(hidden.contiguous(), bank.axes, bank.floors, slots, **bank.options)

    @property
    def tensors(self) -> BankTensors:
        """The bank of now, which no later change of floors changes."""
        return BankTensors(self.axes, self.floors, self.options)

    def _projection_buffer(self, hidden: Tensor, thread: ThreadState, compiling: bool) -> Tensor:
        """(rows, K) for the projections of one pass: that of the last pass, if it has as many rows."""
        rows = hidden.numel() // hidden.shape[-1]
        buffer, _ = thread.projections.get(self.index, (None, None))
        if compiling or buffer is None or buffer.shape[0] != rows or buffer.device != hidden.device:
            buffer = self.floors.new_empty((rows, self.floors.shape[1]))
        thread.projections[self.index] = buffer, hidden.shape[:-1]
        return buffer
