"""Floors: quantiles of projections, from sketches that merge (Apache DataSketches' KLL)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from axiscap.profile import CapProfile

#: Percentiles of a profile's tables; others lie between.
PERCENTILES = (0.5, *(float(p) for p in range(1, 100)), 99.5)
#: Up to about this many values a sketch is exact; beyond, its ranks are off by at most ``error``.
SKETCH_SIZE = 2048


class Sketch:
    """The distribution of projections at each layer, in memory that does not grow with their number."""

    def __init__(self, depth: int) -> None:
        try:
            import datasketches
        except ModuleNotFoundError:
            raise ModuleNotFoundError("floors need datasketches: pip install 'axiscap[calibrate]'") from None
        self.layers = [datasketches.kll_floats_sketch(SKETCH_SIZE) for _ in range(depth)]

    def add(self, projections: Tensor) -> Sketch:
        """Adds (n, n_layers) values; returns itself."""
        for sketch, column in zip(self.layers, projections.float().T, strict=True):
            sketch.update(column.contiguous().numpy())
        return self

    def merge(self, other: Sketch) -> Sketch:
        for sketch, more in zip(self.layers, other.layers, strict=True):
            sketch.merge(more)
        return self

    def __getstate__(self) -> list[bytes]:
        return [sketch.serialize() for sketch in self.layers]

    def __setstate__(self, state: list[bytes]) -> None:
        import datasketches

        self.layers = [datasketches.kll_floats_sketch.deserialize(data) for data in state]

    @property
    def count(self) -> int:
        return int(self.layers[0].n)

    @property
    def error(self) -> float:
        """How far the rank of a quantile may be off, as a share of 1, with 99 % confidence; 0 while exact."""
        first = self.layers[0]
        return float(first.normalized_rank_error(False)) if first.is_estimation_mode() else 0.0

    def table(self) -> Tensor:
        """(n_layers, len(PERCENTILES)) float32."""
        ranks = [p / 100 for p in PERCENTILES]
        return torch.tensor([sketch.get_quantiles(ranks) for sketch in self.layers], dtype=torch.float32)


def check_percentile(percentile: float) -> None:
    """Raises a ValueError where the tables do not reach."""
    if not PERCENTILES[0] <= percentile <= PERCENTILES[-1]:
        raise ValueError(f"percentile must be from {PERCENTILES[0]} to {PERCENTILES[-1]}, got {percentile}")


def at_percentile(table: Tensor, percentile: float) -> Tensor:
    """(n_layers,) float32: the quantiles at a percentile, between the table's columns by interpolation.

    Raises
    ------
    ValueError
        the percentile lies outside the table.
    """
    check_percentile(percentile)
    right = next(i for i, p in enumerate(PERCENTILES) if p >= percentile)
    left = max(0, right - 1)
    span = PERCENTILES[right] - PERCENTILES[left]
    share = (percentile - PERCENTILES[left]) / span if span else 0.0
    return torch.lerp(table[:, left], table[:, right], share)


def describe(sketches: Mapping[str, Sketch]) -> dict[str, Any]:
    """What a profile's provenance says of its tables."""
    populations = {name: {"count": s.count, "rank_error": round(s.error, 5)} for name, s in sketches.items()}
    return {"percentiles": list(PERCENTILES), "populations": populations}


def populations(profile: CapProfile) -> dict[str, Tensor]:
    """The quantile tables of a profile, (n_layers, Q) each, by population.

    Raises
    ------
    ValueError
        the profile has none.
    """
    tables = profile.tables
    if not tables or profile.percentiles != PERCENTILES:
        raise ValueError("the profile has no quantile tables; it was not made by this version's calibration")
    return tables


def with_floors(profile: CapProfile, percentile: float, population: str, layers: list[int] | None = None) -> CapProfile:
    """The same axes with floors at another percentile of another population, and perhaps at other layers.

    Parameters
    ----------
    profile
        one that has quantile tables and the axis at every layer.
    percentile
        of the projections, on the axis that points towards the Assistant.
    population
        ``assistant``, ``pooled`` or ``work``, or the same of single ``... tokens``.
    layers
        to cap; the profile's own without them.

    Returns
    -------
    CapProfile
        With the floors' percentile and population in its provenance.

    Raises
    ------
    ValueError
        the profile has no such table, or the percentile lies outside.

    Examples
    --------
    >>> from axiscap import calibrate
    >>> other = calibrate.with_floors(profile, 1.0, profile.population)
    >>> bool((other.floors <= profile.floors).all())
    True
    """
    tables = populations(profile)
    if population not in tables:
        raise ValueError(f"population must be one of {', '.join(tables)}, got {population}")
    if profile.axis_all is None:
        raise ValueError("the profile has no axis outside its capped layers")
    chosen = sorted(layers if layers is not None else profile.layers)
    if not chosen or not 0 <= chosen[0] <= chosen[-1] < len(profile.axis_all):
        raise ValueError(f"layers must be from 0 to {len(profile.axis_all) - 1}, got {chosen}")
    floors = at_percentile(tables[population], percentile)
    facts = {
        **profile.provenance,
        "floors": {
            "population": population,
            "percentile": percentile,
            "count": profile.population_count(population),
            "sign": "towards the Assistant",
        },
    }

    def at(whole: Tensor | None) -> Tensor | None:
        return None if whole is None else whole[chosen][:, None].contiguous()

    axes, made = at(profile.axis_all), at(floors)
    assert axes is not None
    assert made is not None
    return CapProfile(
        chosen,
        axes,
        made,
        facts,
        lifts=at(profile.lift_all),
        limits=at(profile.limit_all),
        sinks=profile.sinks,
        axis_all=profile.axis_all,
        lift_all=profile.lift_all,
        limit_all=profile.limit_all,
        quantiles=tables[population].clone(),
        populations=profile.populations,
    )
