"""``axiscap replay``: where stored conversations lie along the axis."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.progress import Progress

from axiscap import CapProfile, drift, models
from axiscap.cli.console import console, print_error_line, print_line, print_table, progress_bar
from axiscap.cli.options import ModelOption, make_folder, parse_layers


def replay(
    conversations: Annotated[Path, typer.Argument(help="Stored conversations: JSONL, JSON, or ShareGPT's format.")],
    profile: Annotated[str, typer.Option(help="The profile: a file or a URL.")],
    model: ModelOption = models.DEFAULT_MODEL,
    layers: Annotated[
        str | None, typer.Option(help="The layers to measure, such as 17-24. Default: the capped layers.")
    ] = None,
    layer: Annotated[
        int | None,
        typer.Option(help="The layer of the printed figures. Default: the capped layer that separates best."),
    ] = None,
    capped: Annotated[
        bool | None,
        typer.Option(help="Whether the profile is in force. Default: for conversations whose side is 'capped'."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="A file to write, with a record for each turn and layer (.jsonl, .parquet).", callback=make_folder
        ),
    ] = None,
    report: Annotated[
        Path | None, typer.Option(help="A page to write, with curves and transcripts (.html).", callback=make_folder)
    ] = None,
    show: Annotated[int, typer.Option(help="How many conversations to print turn by turn, the lowest first.")] = 10,
    fail_below: Annotated[
        float | None,
        typer.Option(help="Exit with status 3 if an answer is below this percentile (0 to 100) of normal answers."),
    ] = None,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Skip conversations that cannot be read, and name them.")
    ] = False,
) -> None:
    """Measure stored conversations: where each turn lies along the axis."""
    from axiscap.view import page, sheet

    loaded_profile = CapProfile.load(profile)
    scale = drift.Scale.of(loaded_profile, layer)
    if fail_below is not None and not (scale.values and 0 <= fail_below <= 100):
        raise ValueError("--fail-below must be a percentile from 0 to 100, of a profile that axiscap calibrate made")
    measured_layers = sorted({*(loaded_profile.layers if layers is None else parse_layers(layers)), scale.layer})
    if report:
        sheet.plotly()  # its absence must not end the command after the measurement
    skipped: list[str] = []

    def skip(problem: str) -> None:
        skipped.append(problem)
        print_error_line(f"left out: {escape(problem)}")

    selection, below = drift.Selection(scale), 0
    scales = [drift.Scale.of(loaded_profile, number) for number in measured_layers]
    with progress_bar(rate=True) as progress, drift.open_records(out, scales) as write:
        for trace in replay_file(
            progress, loaded_profile, conversations, model, measured_layers, capped, skip if skip_bad else None
        ):
            path = selection.add(trace)
            below += fail_below is not None and path is not None and path.lowest_percentile < fail_below
            write(trace)
    if not selection.groups:
        raise ValueError(f"{conversations}: no conversation in it has an answer of the model's")
    _print_selection(selection, show)
    if skipped:
        console.print(f"{len(skipped)} left out, for the reasons above")
    if out:
        print_line(f"records: {out}")
    if report:
        page.write(report, loaded_profile, selection)
        print_line(f"page: {report}")
    if below:
        console.print(f"{below} conversations have an answer below percentile {fail_below:g} of normal answers")
        raise typer.Exit(3)


def replay_file(
    progress: Progress,
    profile: CapProfile,
    conversations: Path,
    model: str,
    layers: list[int],
    capped: bool | None = None,
    on_error: Callable[[str], None] | None = None,
) -> Iterator[drift.Trace]:
    """Loads the model and replays the conversations of a file, with a progress bar."""
    loaded, tokenizer = models.load(model)
    task = progress.add_task("conversations read", total=drift.count_conversations(conversations))
    stored = drift.read_conversations(conversations, on_error=on_error)
    for trace in drift.replay(loaded, tokenizer, profile, stored, layers=layers, capped=capped, on_error=on_error):
        yield trace
        progress.advance(task)


def _print_selection(selection: drift.Selection, show: int) -> None:
    from axiscap.view import tables

    scale, rows, total = selection.scale, selection.rows()[:show], selection.conversations
    which = "conversations, the lowest first"
    if len(rows) < total:
        which = f"the lowest {len(rows)} of {total} conversations"
    floor = f"; floor {scale.floor:.4g}" if math.isfinite(scale.floor) else ""
    title = f"{which}, at layer {scale.layer}{floor}; percentiles among the model's normal answers"
    print_table(title, tables.turn_table(rows, scale))
    print_table("by group", tables.group_table(selection))
