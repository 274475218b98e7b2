"""``axiscap inspect``: the contents of a profile."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.markup import escape

from axiscap import CapProfile, Evidence, ProfileError
from axiscap.cli.console import console, print_line, print_table
from axiscap.cli.options import ProfileArgument


def inspect(
    profile: ProfileArgument,
    other: Annotated[
        str | None, typer.Argument(help="A profile of another model, to compare role loadings with.")
    ] = None,
) -> None:
    """Print the contents of a profile and where they come from."""
    from axiscap.view import tables
    from axiscap.view.sinks import sink_warnings

    loaded = CapProfile.load(profile)
    console.print(f"[bold]{escape(profile)}[/bold]")
    console.print(tables.profile_summary(loaded))
    for warning in sink_warnings(loaded):
        console.print(f"[yellow]{escape(warning)}[/yellow]", soft_wrap=True)
    evidence, problem = _readable_evidence(loaded)
    print_table("capped layers", tables.layer_table(loaded, evidence))
    if evidence is not None:
        print_table("evidence", tables.evidence_table(evidence))
    if problem:
        print_line(problem)
    if other is not None:
        _compare_loadings(loaded, profile, other)


def _readable_evidence(profile: CapProfile) -> tuple[Evidence | None, str]:
    """The evidence, or the sentence that says why it cannot be read."""
    try:
        return profile.evidence, ""
    except ProfileError as error:
        return None, str(error)


def _compare_loadings(profile: CapProfile, path: str, other: str) -> None:
    from axiscap.calibrate import loadings_correlation

    correlation, count = loadings_correlation(_loadings(profile, path), _loadings(CapProfile.load(other), other))
    console.print(f"correlation of role loadings with {escape(other)}: {correlation:.3f} ({count} roles)")


def _loadings(profile: CapProfile, path: str) -> dict[str, float]:
    try:
        evidence = profile.evidence
    except ProfileError as error:
        raise ProfileError(f"{path}: {error}") from None
    if evidence is None:
        raise ValueError(f"{path}: no role loadings in it; it was not made by this version's calibration")
    return evidence.loadings
