"""What capping did, in figures: from the sums that the kernels add to."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from axiscap import _C
from axiscap.profile import CapProfile, target_gaps


@dataclass(frozen=True)
class LayerStats:
    """What one profile did at one layer. Projections are those of the rows as they came, before the cap.

    ``mean``, ``min``, ``max``, ``mean_shortfall`` and ``mean_added`` have one entry for each direction. They are NaN
    without rows; the last two, which are means over the rows below the floor, also if no row was below.

    Parameters
    ----------
    rows
        how many were measured.
    fired
        how many of them were lifted.
    nonfinite
        how many were left alone: not finite, or of a larger norm than the profile's limit, as attention sinks are.
    mean
        of the projections, by direction.
    min
        the smallest, by direction.
    max
        the largest, by direction.
    mean_shortfall
        of the rows below the floor, by direction: floor less projection.
    mean_added
        of the same rows, by direction: what the correction added to the projection, (target less projection) times
        the profile's strength.

    Examples
    --------
    >>> with axiscap.install(model, profile) as cap:
    ...     _ = model(**inputs)
    >>> stats = cap.stats()["default"][18]
    >>> 0 <= stats.fired <= stats.rows
    True
    """

    rows: int
    fired: int
    nonfinite: int
    mean: tuple[float, ...]
    min: tuple[float, ...]
    max: tuple[float, ...]
    mean_shortfall: tuple[float, ...]
    mean_added: tuple[float, ...]


def target_gap(profile: CapProfile, layer: int, directions: int) -> Tensor:
    """(K,), of a bank of K directions: how far each target is above its floor; 0 for a direction that is off."""
    slot = profile.slot_at(layer, directions)
    return target_gaps(slot.floors, slot.targets)


def layer_stats(sums: Tensor, gap: Tensor, strength: float) -> LayerStats:
    """
    Parameters
    ----------
    sums
        (K, F) float64, what the kernels added up.
    gap
        (K,), :func:`target_gap` of the profile.
    strength
        the profile's.
    """
    field = {name: sums[:, i].tolist() for i, name in enumerate(_C.STAT_FIELDS)}
    seen, nonfinite = int(field["seen"][0]), int(field["nonfinite"][0])
    finite = seen - nonfinite

    def each(values: list[float], counts: list[float]) -> tuple[float, ...]:
        return tuple(value / count if count else math.nan for value, count in zip(values, counts, strict=True))

    finites = [float(finite)] * len(sums)
    shortfalls, below = field["shortfall"], field["below"]
    directions = zip(shortfalls, below, gap.tolist(), strict=True)
    added = [(shortfall + rows * above) * strength for shortfall, rows, above in directions]
    return LayerStats(
        rows=seen,
        fired=int(sum(field["fired"])),
        nonfinite=nonfinite,
        mean=each(field["sum"], finites),
        min=tuple(value if finite else math.nan for value in field["min"]),
        max=tuple(value if finite else math.nan for value in field["max"]),
        mean_shortfall=each(shortfalls, below),
        mean_added=each(added, below),
    )
