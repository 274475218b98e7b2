"""A slot: the part of a profile that a bank holds at one layer."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Slot(NamedTuple):
    """One profile's part of one layer's bank: axes, lifts (K, H), floors, targets (K,), norm_limit (), in float32."""

    axes: Tensor
    lifts: Tensor
    floors: Tensor
    targets: Tensor
    norm_limit: Tensor

    @classmethod
    def off(cls, hidden_size: int) -> Slot:
        """A slot of one direction that never fires and has no norm limit."""
        axis, floor = torch.eye(1, hidden_size), torch.tensor([-math.inf])
        return cls(axis, axis, floor, floor, torch.tensor(math.inf))

    def padded(self, directions: int) -> Slot:
        """The same slot with directions that never fire added, up to K = ``directions``."""
        missing = directions - len(self.axes)
        off = self.floors.new_full((missing,), -math.inf)
        return Slot(
            torch.cat([self.axes, self.axes[-1:].expand(missing, -1)]),
            torch.cat([self.lifts, self.lifts[-1:].expand(missing, -1)]),
            torch.cat([self.floors, off]),
            torch.cat([self.targets, off]),
            self.norm_limit,
        )


def target_gaps(floors: Tensor, targets: Tensor) -> Tensor:
    """How far targets are above their floors, of the same shape; 0 for a direction that is off."""
    return torch.where(floors.isneginf(), 0.0, targets - floors)
