"""Floors: quantiles of projections, from mergeable sketches (KLL, by Apache DataSketches)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from axiscap.profile import CapProfile

#: The percentiles of a profile's tables. Others are interpolated.
PERCENTILES = (0.5, *(float(p) for p in range(1, 100)), 99.5)
#: A sketch of up to about this many values is exact. Beyond, its ranks are off by at most ``error``.
SKETCH_SIZE = 2048


class Sketch:
    """The distribution of projections at each layer, in bounded memory."""

    def __init__(self, depth: int) -> None:
        try:
            import datasketches
        except ModuleNotFoundError:
            raise ModuleNotFoundError("floors need datasketches: pip install 'axiscap[calibrate]'") from None
        self.layers = [datasketches.kll_floats_sketch(SKETCH_SIZE) for _ in range(depth)]

    def add(self, projections: Tensor) -> Sketch:
        """Adds (n, n_layers) values; returns itself."""
        for layer in range(len(self.layers)):
            self.add_at(layer, projections[:, layer])
        return self

    def add_at(self, layer: int, projections: Tensor) -> None:
        """Adds (n,) values of one layer."""
        self.layers[layer].update(projections.float().contiguous().numpy())

    def merge(self, other: Sketch) -> Sketch:
        """Adds another sketch's values; returns itself."""
        for sketch, other_sketch in zip(self.layers, other.layers, strict=True):
            sketch.merge(other_sketch)
        return self

    def __getstate__(self) -> list[bytes]:
        return [sketch.serialize() for sketch in self.layers]

    def __setstate__(self, state: list[bytes]) -> None:
        import datasketches

        self.layers = [datasketches.kll_floats_sketch.deserialize(data) for data in state]

    @property
    def count(self) -> int:
        """The smallest number of values at any layer."""
        return min(int(sketch.n) for sketch in self.layers)

    @property
    def error(self) -> float:
        """The largest error of a quantile's rank, from 0 to 1, with 99 % confidence; 0 while the sketch is exact."""
        errors = [sketch.normalized_rank_error(False) for sketch in self.layers if sketch.is_estimation_mode()]
        return float(max(errors, default=0.0))

    def table(self) -> Tensor:
        """The quantiles at :data:`PERCENTILES`, (n_layers, len(PERCENTILES)) float32."""
        ranks = [p / 100 for p in PERCENTILES]
        return torch.tensor([sketch.get_quantiles(ranks) for sketch in self.layers], dtype=torch.float32)


def check_percentile(percentile: float) -> None:
    """Raises a ValueError if the percentile is outside the tables."""
    if not PERCENTILES[0] <= percentile <= PERCENTILES[-1]:
        raise ValueError(f"percentile must be from {PERCENTILES[0]} to {PERCENTILES[-1]}, got {percentile}")


def check_percentiles(percentile: float, target_percentile: float | None) -> None:
    """Raises a ValueError if a percentile is outside the tables, or targets would be below their floors."""
    check_percentile(percentile)
    if target_percentile is not None:
        check_percentile(target_percentile)
        if target_percentile < percentile:
            raise ValueError(
                f"the targets' percentile must be at least the floors', {percentile:g}, got {target_percentile:g}"
            )


def at_percentile(table: Tensor, percentile: float) -> Tensor:
    """(n_layers,) float32: the quantiles at a percentile, interpolated between the table's columns.

    Raises
    ------
    ValueError
        the percentile is outside the table.
    """
    check_percentile(percentile)
    right = next(i for i, p in enumerate(PERCENTILES) if p >= percentile)
    left = max(0, right - 1)
    span = PERCENTILES[right] - PERCENTILES[left]
    share = (percentile - PERCENTILES[left]) / span if span else 0.0
    return torch.lerp(table[:, left], table[:, right], share)


def describe(sketches: Mapping[str, Sketch]) -> dict[str, Any]:
    """The entry for the tables in a profile's provenance."""
    populations = {name: {"count": s.count, "rank_error": round(s.error, 5)} for name, s in sketches.items()}
    return {"percentiles": list(PERCENTILES), "populations": populations}


def populations(profile: CapProfile) -> dict[str, Tensor]:
    """The quantile tables of a profile, (n_layers, Q) each, by population.

    Raises
    ------
    ValueError
        the profile has no tables.
    """
    tables = profile.tables
    if not tables or profile.percentiles != PERCENTILES:
        raise ValueError("the profile has no quantile tables; it was not made by this version's calibration")
    return tables


def with_floors(
    profile: CapProfile,
    percentile: float,
    population: str,
    layers: list[int] | None = None,
    *,
    target_percentile: float | None = None,
) -> CapProfile:
    """The profile with the same axes, and floors at a percentile of a population.

    Parameters
    ----------
    profile
        a profile with quantile tables and the axis at every layer.
    percentile
        of the projections on the axis, which points towards the Assistant.
    population
        a name in the profile's tables; see :func:`calibrate`.
    layers
        the layers to cap; None: those that the profile caps.
    target_percentile
        of the same population, at least ``percentile``. A row below its floor is lifted to it. None: to its floor.

    Returns
    -------
    CapProfile
        With the percentiles and the population in its provenance.

    Raises
    ------
    ValueError
        the profile has no such table, a percentile is outside it, or targets would be below their floors.

    Examples
    --------
    >>> from axiscap import calibrate
    >>> other = calibrate.with_floors(profile, 1.0, profile.population)
    >>> bool((other.floors <= profile.floors).all())
    True
    """
    tables = populations(profile)
    check_percentiles(percentile, target_percentile)
    if population not in tables:
        raise ValueError(f"population must be one of {', '.join(tables)}, got {population}")
    if profile.axis_all is None:
        raise ValueError("the profile has no axis outside its capped layers")
    chosen = sorted(layers if layers is not None else profile.layers)
    if not chosen or not 0 <= chosen[0] <= chosen[-1] < len(profile.axis_all):
        raise ValueError(f"layers must be from 0 to {len(profile.axis_all) - 1}, got {chosen}")
    facts: dict[str, Any] = {
        "population": population,
        "percentile": percentile,
        "count": profile.population_count(population),
        "sign": "towards the Assistant",
    }
    targets = None
    if target_percentile is not None:
        facts["target_percentile"] = target_percentile
        targets = at_percentile(tables[population], target_percentile)[chosen][:, None]
    lifts, limits = profile.lift_all, profile.norm_limit_all
    return CapProfile(
        chosen,
        profile.axis_all[chosen][:, None].contiguous(),
        at_percentile(tables[population], percentile)[chosen][:, None],
        {**profile.provenance, "floors": facts},
        targets=targets,
        lifts=None if lifts is None else lifts[chosen][:, None].contiguous(),
        norm_limits=None if limits is None else limits[chosen],
        axis_all=profile.axis_all,
        lift_all=lifts,
        norm_limit_all=limits,
        quantiles=tables[population].clone(),
        populations=profile.populations,
    )
