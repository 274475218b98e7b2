"""The floors and targets of a profile at percentiles of its tables."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from axiscap.profile.checks import is_number_list
from axiscap.profile.record import CapProfile

#: The percentiles of a profile's tables. Others are interpolated.
PERCENTILES = (0.5, *(float(p) for p in range(1, 100)), 99.5)


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


def shares_below(profile: CapProfile, floors: Tensor, population: str = "ordinary tokens") -> Tensor:
    """Reads from a profile's tables what share of a population lies below floors, at each capped layer.

    Parameters
    ----------
    profile
        with tables.
    floors
        (L, 1), at the profile's layers.
    population
        a name in the tables.

    Returns
    -------
    Tensor
        (L,) float64, from 0 to 1.

    Raises
    ------
    ValueError
        the profile has no tables.

    Examples
    --------
    >>> from axiscap import calibrate
    >>> round(calibrate.shares_below(profile, profile.floors).max().item(), 2)
    0.04
    """
    table = populations(profile)[population][list(profile.layers)].double()
    return torch.tensor(
        [
            float(np.interp(floor, row, PERCENTILES, left=0, right=100)) / 100
            for floor, row in zip(floors[:, 0], table, strict=True)
        ],
        dtype=torch.float64,
    )


def with_floors(
    profile: CapProfile,
    percentile: float,
    population: str,
    layers: list[int] | None = None,
    *,
    target_percentile: float | None = None,
) -> CapProfile:
    """The profile with the same axes, and floors at a percentile of a population.

    A floor is never above the lowest row that the chat template has in ordinary requests, if the profile's provenance
    tells it (``template``): such a row is in every request.

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
    floors = torch.minimum(at_percentile(tables[population], percentile), _lowest_template_rows(profile))
    lifts, limits = profile.lift_all, profile.norm_limit_all
    return CapProfile(
        chosen,
        profile.axis_all[chosen][:, None].contiguous(),
        floors[chosen][:, None],
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


def _lowest_template_rows(profile: CapProfile) -> Tensor:
    """(n_layers,) float32; infinity where the profile does not tell."""
    facts = profile.provenance.get("template")
    lowest = facts.get("lowest") if isinstance(facts, dict) else None
    return torch.tensor(lowest if is_number_list(lowest, profile.num_layers) else torch.inf)
