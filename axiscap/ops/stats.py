"""Statistics of a capped layer, from the sums that the kernels add up."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from axiscap import _C
from axiscap.profile import CapProfile, target_gaps


@dataclass(frozen=True)
class LayerStats:
    """The effect of one profile at one layer. Projections are read before the cap.

    ``mean``, ``min``, ``max``, ``mean_shortfall`` and ``mean_added`` have one entry per direction. They are NaN without
    rows; the last two, which are means over the rows below the floor, also if no row was below.

    Parameters
    ----------
    rows
        rows that were measured.
    fired
        rows that were lifted.
    nonfinite
        rows that were left alone: not finite, or of a larger norm than the profile's limit, as attention sinks are.
    mean, min, max
        of the projections of the other rows.
    mean_shortfall
        floor - projection, over the rows below the floor.
    mean_added
        what the correction added to the projections of these rows: (target - projection) * strength.

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
    """(K,): the distance from each floor to its target, in a bank of K directions; 0 for a direction that is off."""
    slot = profile.slot_at(layer, directions)
    return target_gaps(slot.floors, slot.targets)


def layer_stats(sums: Tensor, gap: Tensor, strength: float) -> LayerStats:
    """The statistics of one layer from the kernels' sums (K, F), the profile's :func:`target_gap` and its strength."""
    fields = {name: sums[:, i].tolist() for i, name in enumerate(_C.STAT_FIELDS)}
    rows, nonfinite = int(fields["seen"][0]), int(fields["nonfinite"][0])
    finite = rows - nonfinite
    shortfalls, below = fields["shortfall"], fields["below"]
    added = [
        (shortfall + count * distance) * strength
        for shortfall, count, distance in zip(shortfalls, below, gap.tolist(), strict=True)
    ]
    return LayerStats(
        rows=rows,
        fired=int(sum(fields["fired"])),
        nonfinite=nonfinite,
        mean=_divide(fields["sum"], [float(finite)] * len(sums)),
        min=tuple(value if finite else math.nan for value in fields["min"]),
        max=tuple(value if finite else math.nan for value in fields["max"]),
        mean_shortfall=_divide(shortfalls, below),
        mean_added=_divide(added, below),
    )


def _divide(values: list[float], counts: list[float]) -> tuple[float, ...]:
    return tuple(value / count if count else math.nan for value, count in zip(values, counts, strict=True))
