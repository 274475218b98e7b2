"""The drift statistics of a conversation at one layer, from its turns."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from axiscap.profile.scale import Scale


@dataclass(frozen=True)
class Drift:
    """The drift statistics of a conversation at one layer. Only the model's turns count.

    Parameters
    ----------
    turns
        the number of turns.
    tokens
        the number of tokens in these turns.
    level
        mean of the turns' mean projections.
    slope
        of the turns' mean projections by least squares, per turn; NaN with one turn.
    lowest
        mean projection of the lowest turn.
    lowest_turn
        its number, counted from 1.
    below
        share of tokens below the floor; NaN if the layer has no floor.
    percentile
        of the level among the mean projections of normal answers, 0 to 100; NaN if the profile has no quantiles of
        them.
    lowest_percentile
        of the lowest turn, likewise.

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


def summarise_turn(projections: Tensor, floor: float) -> tuple[float, int, int]:
    """A turn's mean projection, its tokens, and the number of them below the floor. Sinks (NaN) do not count.

    Parameters
    ----------
    projections
        (tokens,).
    """
    projections = projections[projections.isfinite()]
    return projections.double().mean().item(), len(projections), int((projections < floor).sum())


class RunningDrift:
    """The sums of a conversation, turn by turn, from which its drift is computed."""

    def __init__(self) -> None:
        self.turns = self.tokens = self.below = 0
        self._sum = self._sum_by_turn = 0.0
        self.lowest, self.lowest_turn = math.inf, 0

    def add(self, mean: float, tokens: int, below: int) -> None:
        """Adds a turn, as :func:`summarise_turn` returns it."""
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
    """The drift of a conversation; None without turns.

    Parameters
    ----------
    turns
        for each turn its mean projection, its tokens, and the number of tokens below the floor.
    scale
        of the layer at which the turns were measured.

    Returns
    -------
    Drift or None
        Over all turns.

    Examples
    --------
    >>> from axiscap import drift
    >>> drift.drift_of([], drift.Scale.of(profile)) is None
    True
    """
    running = RunningDrift()
    for turn in turns:
        running.add(*turn)
    return running.drift(scale) if running.turns else None
