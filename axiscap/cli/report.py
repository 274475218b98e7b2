"""``axiscap report``: a page or a picture of a profile's evidence."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from axiscap import CapProfile, drift, models
from axiscap.cli.console import print_line, progress_bar
from axiscap.cli.options import ModelOption, ProfileArgument, make_folder
from axiscap.cli.replay import replay_file


def report(
    profile: ProfileArgument,
    out: Annotated[
        Path,
        typer.Argument(
            help="The file to write: a page (.html), or a picture of the evidence alone (.png, .svg).",
            callback=make_folder,
        ),
    ] = Path("report.html"),
    conversations: Annotated[
        Path | None, typer.Option(help="Stored conversations to show on the page, in a format that `replay` reads.")
    ] = None,
    model: ModelOption = models.DEFAULT_MODEL,
    layer: Annotated[
        int | None, typer.Option(help="The layer of the curves. Default: the one that separates best.")
    ] = None,
) -> None:
    """Write a page with a profile's evidence (separation, persona space, floors) and the drift of conversations."""
    loaded_profile = CapProfile.load(profile)
    if out.suffix == ".html":
        _write_page(out, loaded_profile, conversations, model, layer)
    else:
        from axiscap.view import plots

        plots.draw_calibration(loaded_profile, out)
    print_line(f"wrote {out}")


def _write_page(out: Path, profile: CapProfile, conversations: Path | None, model: str, layer: int | None) -> None:
    from axiscap.view import page

    selection = drift.Selection(drift.Scale.of(profile, layer))
    if conversations is not None:
        layers = drift.measurable_layers(profile)
        with progress_bar(rate=True) as progress:
            for trace in replay_file(progress, profile, conversations, model, layers):
                selection.add(trace)
    page.write(out, profile, selection)
