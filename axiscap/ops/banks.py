"""Named profiles as one bank per layer, with their statistics: the base of every installation."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from axiscap import _C
from axiscap.ops.library import new_stats
from axiscap.ops.stats import LayerStats, layer_stats, target_gap
from axiscap.profile import CapProfile

#: The name of a profile that was installed without one.
DEFAULT_NAME = "default"


def by_name(profile: CapProfile | Mapping[str, CapProfile]) -> dict[str, CapProfile]:
    """The profiles of an installation by name, from one profile or a mapping.

    Raises
    ------
    TypeError
        Not a profile, nor a mapping of names to profiles.
    ValueError
        An empty mapping.
    """
    if not isinstance(profile, CapProfile | Mapping):
        raise TypeError(
            f"profile must be a CapProfile or a mapping of names to them, got {type(profile).__name__}; "
            "read a file with CapProfile.load"
        )
    profiles = {DEFAULT_NAME: profile} if isinstance(profile, CapProfile) else dict(profile)
    if not profiles:
        raise ValueError("profile must be a CapProfile or a mapping with at least one")
    for name, value in profiles.items():
        if not isinstance(value, CapProfile):
            raise TypeError(f"profile {name!r} must be a CapProfile, got {type(value).__name__}")
    return profiles


class CappedLayer:
    """The bank of one layer, with a slot for each profile, and its statistics.

    The tensors are copies of the profiles': a profile that its owner changes later does not change the model.
    """

    def __init__(self, index: int, profiles: Sequence[CapProfile], directions: int, device: torch.device) -> None:
        self.index = index
        slots = zip(*(profile.slot_at(index, directions) for profile in profiles), strict=True)
        self.axes, lifts, self.floors, targets, norm_limits = (torch.stack(part) for part in slots)
        self.options = {
            "targets": targets if any(profile.targets is not None for profile in profiles) else None,
            "lifts": lifts if any(profile.lifts is not None for profile in profiles) else None,
            "norm_limits": norm_limits if bool(norm_limits.isfinite().any()) else None,
        }
        self.stats = new_stats(len(profiles), directions)
        self.move_to(device)

    def move_to(self, device: torch.device) -> None:
        self.axes, self.floors, self.stats = self.axes.to(device), self.floors.to(device), self.stats.to(device)
        self.options = {name: None if tensor is None else tensor.to(device) for name, tensor in self.options.items()}
        self.bank = _C.Bank(self.axes, self.floors, **self.options)


class Installed(ABC):
    """Profiles in force in a running model, until :meth:`remove` or the end of the ``with`` block.

    The adapter of an engine answers five questions:

    - *Where* is a block's output complete, and how are its rows changed there?
    - *Whose* rows are in a step: which sequence has each of them?
    - *When* is the profile of a sequence decided? From then on it stays the same.
    - *How* are caches of keys and values kept apart? Rows that ran under one content must not serve another.
    - *What* leaves the engine? Statistics by profile and layer here, and by request in a server.

    ``axiscap.transformers`` and ``axiscap.llamacpp`` answer them in this process; vLLM and SGLang in several, by the
    parts in ``axiscap.serving.engine`` (``docs/other-stacks.md``).
    """

    _profiles: dict[str, CapProfile]
    _layers: Mapping[int, CappedLayer]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    @abstractmethod
    def remove(self) -> None:
        """Takes the capping out. The statistics stay. A second call does nothing."""

    def stats(self) -> dict[str, dict[int, LayerStats]]:
        """The exact statistics so far, by profile and layer. Waits for the device if it is not the CPU.

        Returns
        -------
        dict[str, dict[int, LayerStats]]
            By the profile's name and the layer.

        Examples
        --------
        >>> with axiscap.install(model, profile) as cap:
        ...     _ = model(**inputs)
        >>> list(cap.stats()["default"]) == list(profile.layers)
        True
        """
        return {name: self._stats_of(name, self._sums(name)) for name in self._profiles}

    def _sums(self, name: str) -> dict[int, Tensor]:
        """The kernels' sums of a profile, (K, F) on the device, by layer."""
        profile, slot = self._profiles[name], self._slot(name)
        return {index: self._layers[index].stats[slot, : profile.directions] for index in profile.layers}

    def _stats_of(self, name: str, sums: Mapping[int, Tensor]) -> dict[int, LayerStats]:
        """The statistics of a profile by layer, from its sums in this process or in several."""
        profile = self._profiles[name]
        return {
            index: layer_stats(part.cpu(), target_gap(profile, index, profile.directions), profile.strength)
            for index, part in sums.items()
        }

    def reset_stats(self) -> None:
        """Sets the statistics back to no rows.

        Examples
        --------
        >>> with axiscap.install(model, profile) as cap:
        ...     _ = model(**inputs)
        ...     cap.reset_stats()
        >>> cap.stats()["default"][18].rows
        0
        """
        for layer in self._layers.values():
            slots, directions = layer.floors.shape
            layer.stats.copy_(new_stats(slots, directions, layer.stats.device))

    def _slot(self, name: str | None) -> int:
        """The slot of a profile, or -1 for None: rows that are left alone.

        Raises
        ------
        KeyError
            No profile of this name is installed.
        """
        names = list(self._profiles)
        if name is not None and name not in names:
            raise KeyError(f"no profile {name!r} is installed; there are {', '.join(names)}")
        return -1 if name is None else names.index(name)
