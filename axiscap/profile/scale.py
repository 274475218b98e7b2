"""The reference range of a layer's projections.

Projections are of the rows before the cap of their own layer. Their unit is that of the residual stream, so that
values of different layers do not compare. Percentiles among the model's own normal answers do.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from axiscap.profile.checks import ProfileError, format_layers
from axiscap.profile.record import CapProfile

#: Upper bounds of a histogram of percentiles.
BUCKETS = (0.0, 1.0, 5.0, 10.0, 25.0, 50.0, 75.0, 90.0, 100.0)


def bucket_of(percentile: float) -> int:
    """The index in :data:`BUCKETS` of a percentile, 0 to 100."""
    return bisect_left(BUCKETS, percentile)


def cumulate(counts: Sequence[float]) -> list[tuple[str, float]]:
    """The counts of buckets as cumulative pairs (upper bound, count), the form of a Prometheus histogram."""
    bounds = [*(f"{bound:g}" for bound in BUCKETS[:-1]), "+Inf"]
    return list(zip(bounds, accumulate(counts), strict=True))


@dataclass(frozen=True)
class Scale:
    """The reference range of a layer's projections: the profile's floor, and the quantiles of normal answers.

    Parameters
    ----------
    layer
        counted from 0.
    floor
        -inf if the profile does not cap this layer.
    ranks
        percentiles, ascending.
    values
        the mean projections of normal answers at these percentiles.

    Examples
    --------
    >>> from axiscap import drift
    >>> scale = drift.Scale(18, floor=1.0, ranks=(10.0, 50.0), values=(2.0, 4.0))
    >>> scale.percentile(3.0)
    30.0
    """

    layer: int
    floor: float
    ranks: tuple[float, ...]
    values: tuple[float, ...]

    @classmethod
    def of(cls, profile: CapProfile, layer: int | None = None) -> Scale:
        """The scale of a layer. Default: the capped layer that separates best, or the middle one without evidence.

        Parameters
        ----------
        profile
            without quantiles, all percentiles are NaN.
        layer
            counted from 0.

        Returns
        -------
        Scale
            At that layer.

        Raises
        ------
        ValueError
            the profile has no axis at that layer.

        Examples
        --------
        >>> from axiscap import drift
        >>> drift.Scale.of(profile).layer in profile.layers
        True
        """
        if layer is None:
            layer = _default_layer(profile)
        check_layers(profile, [layer])
        floor = profile.floors[profile.layers.index(layer), 0].item() if layer in profile.layers else -math.inf
        table = profile.tables.get("assistant")
        if table is None or layer >= len(table):
            return cls(layer, floor, (), ())
        return cls(layer, floor, profile.percentiles, tuple(table[layer].tolist()))

    def at(self, percentile: float) -> float:
        """The mean projection of normal answers at a percentile; NaN if the table does not have that percentile.

        Parameters
        ----------
        percentile
            one of ``ranks``.

        Returns
        -------
        float
            In the units of the floors.

        Examples
        --------
        >>> from axiscap import drift
        >>> drift.Scale(18, 1.0, (10.0, 50.0), (2.0, 4.0)).at(50.0)
        4.0
        """
        return self.values[self.ranks.index(percentile)] if percentile in self.ranks else math.nan

    def percentile(self, projection: float) -> float:
        """The percentile of a mean projection among normal answers, interpolated; NaN without a table.

        Parameters
        ----------
        projection
            in the units of the floors.

        Returns
        -------
        float
            0 to 100; beyond the ends of the table 0 or 100.

        Examples
        --------
        >>> from axiscap import drift
        >>> drift.Scale(18, 1.0, (10.0, 50.0), (2.0, 4.0)).percentile(9.0)
        100.0
        """
        if not self.values or not math.isfinite(projection):
            return math.nan
        if projection < self.values[0] or projection > self.values[-1]:
            return 0.0 if projection < self.values[0] else 100.0
        right = max(1, bisect_left(self.values, projection))
        low, high = self.values[right - 1], self.values[right]
        share = (projection - low) / (high - low) if high > low else 1.0
        return self.ranks[right - 1] + share * (self.ranks[right] - self.ranks[right - 1])


def _default_layer(profile: CapProfile) -> int:
    try:
        evidence = profile.evidence
    except ProfileError:  # a default layer exists without evidence too
        evidence = None
    if evidence is None:
        return profile.layers[len(profile.layers) // 2]
    return max(profile.layers, key=evidence.auc.__getitem__)


def measurable_layers(profile: CapProfile) -> list[int]:
    """The layers at which the profile has an axis: the capped ones, and all others if it has ``axis_all``."""
    return sorted({*profile.layers, *range(0 if profile.axis_all is None else len(profile.axis_all))})


def check_layers(profile: CapProfile, layers: Sequence[int]) -> None:
    measurable = measurable_layers(profile)
    missing = sorted(set(layers) - set(measurable))
    if missing:
        raise ValueError(f"the profile has no axis at layer {missing[0]}; it has one at {format_layers(measurable)}")


def describe_percentile(percentile: float) -> str:
    """A percentile as text: "below 99 % of normal answers"."""
    if math.isnan(percentile):
        return "not known"
    side, share = ("below", 100 - percentile) if percentile < 50 else ("above", percentile)
    return f"{side} {'more than 99.5' if share > 99.5 else f'{share:.3g}'} % of normal answers"
