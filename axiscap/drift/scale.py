"""What a layer's projections are held against, and a conversation's path along the axis in figures.

Projections are those of the rows as they came, before the cap of their own layer. Their unit is that of the residual
stream, so that two layers do not compare; percentiles of the model's own normal answers do.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate

from torch import Tensor

from axiscap.profile import CapProfile, ProfileError, format_layers

#: Upper bounds of a histogram of percentiles.
BUCKETS = (0.0, 1.0, 5.0, 10.0, 25.0, 50.0, 75.0, 90.0, 100.0)


def bucket_of(percentile: float) -> int:
    """Which of the BUCKETS a percentile, 0 to 100, belongs to."""
    return bisect_left(BUCKETS, percentile)


def cumulated(counts: Sequence[float]) -> list[tuple[str, float]]:
    """Counts by bucket, as a histogram of Prometheus has them: of each upper bound, what is not above it."""
    bounds = [*(f"{bound:g}" for bound in BUCKETS[:-1]), "+Inf"]
    return list(zip(bounds, accumulate(counts), strict=True))


@dataclass(frozen=True)
class Drift:
    """A conversation's path in figures, at one layer.

    Parameters
    ----------
    turns
        how many turns the model has.
    tokens
        how many tokens they have.
    level
        mean of the turns' mean projections.
    slope
        of the turns' mean projections by least squares, a turn; NaN with one turn.
    lowest
        the lowest turn's mean projection.
    lowest_turn
        which one that is, counted from 1.
    below
        share of tokens below the floor; NaN where the layer has none.
    percentile
        of the level among the means of the model's own normal answers, 0 to 100; NaN where the profile does not know
        them.
    lowest_percentile
        the lowest turn's.

    Examples
    --------
    >>> from axiscap import drift
    >>> scale = drift.Scale.of(profile)
    >>> path = drift.drift_of([(scale.floor + 2, 10, 0), (scale.floor - 1, 10, 7)], scale)
    >>> path.turns, path.lowest_turn, path.slope
    (2, 2, -3.0)
    """

    turns: int
    tokens: int
    level: float
    slope: float
    lowest: float
    lowest_turn: int
    below: float
    percentile: float
    lowest_percentile: float


@dataclass(frozen=True)
class Scale:
    """What a layer's projections are held against: the profile's floor there, and its model's normal answers.

    Parameters
    ----------
    layer
        the layer.
    floor
        the profile's, -inf where it does not cap this layer.
    ranks
        percentiles, ascending.
    values
        the normal answers' mean projections at them.

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
        """The scale of a layer; without one, of the capped layer that separates best, or else of the middle one.

        Parameters
        ----------
        profile
            with quantiles, for percentiles that are not NaN.
        layer
            counted from 0.

        Returns
        -------
        Scale
            Of that layer.

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
            layer = _telling_layer(profile)
        check_layers(profile, [layer])
        floor = profile.floors[profile.layers.index(layer), 0].item() if layer in profile.layers else -math.inf
        table = profile.tables.get("assistant")
        if table is None or layer >= len(table):
            return cls(layer, floor, (), ())
        return cls(layer, floor, profile.percentiles, tuple(table[layer].tolist()))

    def at(self, percentile: float) -> float:
        """The normal answers' mean projection at one of the table's percentiles; NaN where that is not known.

        Parameters
        ----------
        percentile
            0 to 100, one of ``ranks``.

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
        """Of a turn's mean projection among normal answers; beyond the table's ends 0 or 100, NaN without a table.

        Parameters
        ----------
        projection
            in the units of the floors.

        Returns
        -------
        float
            0 to 100.

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


def _telling_layer(profile: CapProfile) -> int:
    try:
        evidence = profile.evidence
    except ProfileError:  # a default for want of a better one needs no evidence
        evidence = None
    if evidence is None:
        return profile.layers[len(profile.layers) // 2]
    return max(profile.layers, key=evidence.auc.__getitem__)


def known_layers(profile: CapProfile) -> list[int]:
    """Where the profile has an axis to measure on: the capped layers, and all others where it keeps theirs."""
    return sorted({*profile.layers, *range(0 if profile.axis_all is None else len(profile.axis_all))})


def check_layers(profile: CapProfile, layers: Sequence[int]) -> None:
    known = known_layers(profile)
    unknown = sorted(set(layers) - set(known))
    if unknown:
        raise ValueError(f"the profile has no axis at layer {unknown[0]}; it has one at {format_layers(known)}")


def summed(projections: Tensor, floor: float) -> tuple[float, int, int]:
    """Mean, number and number below the floor of a turn's projections, (tokens,); NaN, a row left alone, is no part."""
    projections = projections[projections.isfinite()]
    return projections.double().mean().item(), len(projections), int((projections < floor).sum())


class Path:
    """One conversation's running sums."""

    def __init__(self) -> None:
        self.turns = self.tokens = self.below = 0
        self._sum = self._sum_by_turn = 0.0
        self.lowest, self.lowest_turn = math.inf, 0

    def add(self, mean: float, tokens: int, below: int) -> None:
        """A turn: its mean projection, its tokens, and how many of them were below the floor."""
        self.turns += 1
        self.tokens += tokens
        self.below += below
        self._sum += mean
        self._sum_by_turn += self.turns * mean
        if mean < self.lowest:
            self.lowest, self.lowest_turn = mean, self.turns

    def drift(self, scale: Scale) -> Drift:
        level, n = self._sum / self.turns, self.turns
        # Least squares on 1, 2, ..., n, whose squared distances from their mean add up to n (n^2 - 1) / 12.
        slope = (self._sum_by_turn - level * n * (n + 1) / 2) / (n * (n * n - 1) / 12) if n > 1 else math.nan
        return Drift(
            turns=n,
            tokens=self.tokens,
            level=level,
            slope=slope,
            lowest=self.lowest,
            lowest_turn=self.lowest_turn,
            below=self.below / self.tokens if math.isfinite(scale.floor) else math.nan,
            percentile=scale.percentile(level),
            lowest_percentile=scale.percentile(self.lowest),
        )


def drift_of(turns: Iterable[tuple[float, int, int]], scale: Scale) -> Drift | None:
    """The drift of turns as :func:`summed` gives them; None where there are none.

    Parameters
    ----------
    turns
        of each turn its mean projection, its tokens, and how many of them are below the floor.
    scale
        of the layer that they were measured at.

    Returns
    -------
    Drift or None
        Over all of them.

    Examples
    --------
    >>> from axiscap import drift
    >>> drift.drift_of([], drift.Scale.of(profile)) is None
    True
    """
    path = Path()
    for turn in turns:
        path.add(*turn)
    return path.drift(scale) if path.turns else None


def percentile_in_words(percentile: float) -> str:
    """A percentile in words, for people."""
    if math.isnan(percentile):
        return "not known"
    side, share = ("below", 100 - percentile) if percentile < 50 else ("above", percentile)
    return f"{side} {'more than 99.5' if share > 99.5 else f'{share:.3g}'} % of normal answers"
