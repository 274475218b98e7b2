"""What capping did, in figures: from the sums that the kernels add to."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from axiscap import _C


@dataclass(frozen=True)
class LayerStats:
    """What one profile did at one layer. Projections are those of the rows as they came, before the cap.

    ``mean``, ``min``, ``max`` and ``mean_shortfall`` have one entry for each direction; they are NaN without rows, and
    mean_shortfall (floor - projection, over the rows below the floor) is NaN where no row was below.

    Parameters
    ----------
    rows
        how many were measured.
    fired
        how many of them were lifted.
    nonfinite
        how many were left alone, since they were not finite or beyond their limit.
    mean
        of the projections, by direction.
    min
        the smallest, by direction.
    max
        the largest, by direction.
    mean_shortfall
        of the rows below the floor, by direction: floor less projection.

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


def layer_stats(stats: Tensor) -> LayerStats:
    """From (K, F) float64."""
    field = {name: stats[:, i].tolist() for i, name in enumerate(_C.STAT_FIELDS)}
    seen, nonfinite = int(field["seen"][0]), int(field["nonfinite"][0])
    finite = seen - nonfinite

    def each(values: list[float], counts: list[float]) -> tuple[float, ...]:
        return tuple(value / count if count else math.nan for value, count in zip(values, counts, strict=True))

    finites = [float(finite)] * len(stats)
    return LayerStats(
        rows=seen,
        fired=int(sum(field["fired"])),
        nonfinite=nonfinite,
        mean=each(field["sum"], finites),
        min=tuple(value if finite else math.nan for value in field["min"]),
        max=tuple(value if finite else math.nan for value in field["max"]),
        mean_shortfall=each(field["shortfall"], field["below"]),
    )
