"""The command ``axiscap``. Each command does its work in a module of its own; here are their options and tables."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

import axiscap
from axiscap import bench as bench_module
from axiscap import models
from axiscap.profile import CapProfile

app = typer.Typer(no_args_is_help=True, add_completion=False, help=__doc__, pretty_exceptions_enable=False)
# In a file or a pipe there is no width to fit; tables then stay readable.
console = Console(width=None if sys.stdout.isatty() else 140)

ModelOption = Annotated[str, typer.Option(help="A local folder or a hub name.")]
ProfileArgument = Annotated[Path, typer.Argument(help="A profile, as `axiscap calibrate` writes it.")]


def _version(wanted: bool) -> None:
    if wanted:
        console.print(axiscap.__version__)
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Activation capping along the Assistant Axis."""


def _show(title: str, table: Table) -> None:
    """A table under its title, on one line of its own: a table's own title breaks at the table's width."""
    console.print(f"\n[bold]{escape(title)}[/bold]")
    console.print(table)


def _progress() -> Progress:
    parts = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    return Progress(*parts, console=console)


def _numbers(facts: Mapping[str, Any], key: str, part: str) -> list[float]:
    """A list of numbers in a profile's provenance, which anyone may have written; empty where it is none."""
    entry = facts.get(key)
    values = entry.get(part) if isinstance(entry, Mapping) else None
    is_list = isinstance(values, list) and all(isinstance(value, int | float) for value in values)
    return list(values) if is_list and values is not None else []


@app.command()
def inspect(profile: ProfileArgument) -> None:
    """Print what a profile holds and where it comes from."""
    loaded = CapProfile.load(profile)
    facts = loaded.provenance
    console.print(f"[bold]{escape(profile.name)}[/bold]")
    model = loaded.model_facts
    depth = loaded.num_layers
    summary = Table(show_header=False, box=None)
    known = f"{model.get('id', 'unknown')} ({model.get('architecture', 'unknown architecture')})"
    summary.add_row("model", escape(known))
    summary.add_row("layers", f"{len(loaded.layers)} of {depth or 'unknown'} capped; hidden size {loaded.hidden_size}")
    for key in ("axis", "floors", "sampling", "created", "axiscap", "source"):
        if key in facts:
            value = facts[key]
            text = value if isinstance(value, str) else json.dumps(value)
            summary.add_row(key, escape(text if len(text) <= 300 else text[:297] + "..."))
    console.print(summary)

    separation = _numbers(facts, "separation", "auc")
    if len(separation) <= loaded.layers[-1]:
        separation = []
    table = Table()
    for name in ("layer", "direction", "floor"):
        table.add_column(name, justify="right")
    percentiles = _numbers(facts, "quantiles", "percentiles") if loaded.quantiles is not None else []
    for percentile in percentiles:
        table.add_column(f"p{percentile:g}", justify="right")
    if separation:
        table.add_column("held-out AUC", justify="right")
    for index, layer in enumerate(loaded.layers):
        for k in range(loaded.directions):
            row = [str(layer), str(k), f"{loaded.floors[index, k].item():.4g}"]
            if loaded.quantiles is not None and percentiles:
                row += [f"{value:.4g}" for value in loaded.quantiles[layer].tolist()]
            if separation:
                row.append(f"{separation[layer]:.3f}")
            table.add_row(*row)
    _show("capped layers", table)


@app.command()
def calibrate(
    out: Annotated[Path, typer.Argument(help="The profile to write.")],
    model: ModelOption = models.DEFAULT_MODEL,
    roles: Annotated[Path | None, typer.Option(help="A folder of roles (JSON); AxisCap's own without it.")] = None,
    questions: Annotated[Path | None, typer.Option(help="Questions (JSONL); AxisCap's own without it.")] = None,
    percentile: Annotated[float, typer.Option(help="Of the default's answers that the floors are at.")] = 25.0,
    layers: Annotated[
        int | None, typer.Option(help="How many layers to cap; 8, or a fifth where that is more.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="An answer's length at most.")] = 40,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
) -> None:
    """Find a model's Assistant Axis and floors, and write them as a profile.

    Finished batches are kept beside the profile until it is written: started again, the command goes on where it was.
    """
    from axiscap import calibrate as calibration

    role_set, question_list = calibration.load_roles(roles), calibration.load_questions(questions)
    out.parent.mkdir(parents=True, exist_ok=True)
    work = out.with_suffix(".rollouts")
    loaded, tokenizer = models.load(model)
    with _progress() as progress:
        task = progress.add_task("answers")
        result = calibration.calibrate(
            loaded,
            tokenizer,
            role_set,
            question_list,
            model_id=model,
            percentile=percentile,
            count=layers,
            max_new_tokens=max_new_tokens,
            seed=seed,
            work=work,
            start=lambda total: progress.update(task, total=total),
            progress=lambda count: progress.advance(task, count),
        )
    result.profile.save(out)
    shutil.rmtree(work, ignore_errors=True)

    table = Table()
    table.add_column("layer", justify="right")
    table.add_column("all", justify="right")
    for name in result.auc_by_role:
        table.add_column(name, justify="right")
    table.add_column("floor", justify="right")
    for layer, value in enumerate(result.auc.tolist()):
        is_capped = layer in result.profile.layers
        each = [f"{row[layer].item():.3f}" for row in result.auc_by_role.values()]
        floor = f"{result.profile.floors[result.profile.layers.index(layer), 0].item():.4g}" if is_capped else ""
        table.add_row(str(layer), f"{value:.3f}", *each, floor, style="bold" if is_capped else None)
    _show("separation from the default on held-out roles and questions (AUC; 0.5 = none)", table)
    capped = f"layers {result.profile.layers[0]}-{result.profile.layers[-1]}, bold above"
    console.print(f"wrote {escape(str(out))}: {capped}", soft_wrap=True)


@app.command()
def run(
    profile: ProfileArgument,
    model: ModelOption = models.DEFAULT_MODEL,
    conversations: Annotated[
        Path | None, typer.Option(help='JSONL, {"name", "turns"}; AxisCap\'s own two without it.')
    ] = None,
    picture: Annotated[Path, typer.Option(help="Where to draw the trajectories.")] = Path("drift.png"),
    max_new_tokens: Annotated[int, typer.Option(help="An answer's length at most.")] = 48,
) -> None:
    """Hold a conversation with a model, uncapped and capped side by side, and draw its path along the axis."""
    from axiscap import compare, report

    # What would fail at the end fails before the minutes of work.
    report.pyplot()
    picture.parent.mkdir(parents=True, exist_ok=True)
    loaded_profile = CapProfile.load(profile)
    talks = compare.load_conversations(conversations)
    loaded, tokenizer = models.load(model)
    shown = len(loaded_profile.layers) // 2
    layer = loaded_profile.layers[shown]
    floor = loaded_profile.floors[shown, 0].item()
    results = []
    for talk in talks:
        with console.status(f"generating the conversation '{talk.name}' twice"):
            result = compare.compare(loaded, tokenizer, loaded_profile, talk, max_new_tokens=max_new_tokens)
        results.append(result)
        texts = Table(show_lines=True)
        for column in ("user", "uncapped", "capped"):
            texts.add_column(column, ratio=1)
        for turn, said in enumerate(talk.turns):
            answers = result.uncapped.answers[turn].text, result.capped.answers[turn].text
            texts.add_row(*(escape(text) for text in (said, *answers)))
        _show(f"conversation: {talk.name}", texts)
        means = Table()
        for column in ("turn", "uncapped", "capped"):
            means.add_column(column, justify="right")
        both = zip(result.uncapped.turn_means(shown), result.capped.turn_means(shown), strict=True)
        for turn, pair in enumerate(both, start=1):
            means.add_row(str(turn), *(f"{value:.4g}{' (below)' if value < floor else ''}" for value in pair))
        _show(f"mean projection of each answer before the cap, layer {layer}; floor {floor:.4g}", means)

    fired = Table()
    fired.add_column("layer", justify="right")
    for talk in talks:
        fired.add_column(talk.name, justify="right")
    for index in loaded_profile.layers:
        cells = []
        for result in results:
            stats = (result.capped.stats or {})[index]
            cells.append(f"{stats.fired} of {stats.rows} ({stats.fired / max(1, stats.rows):.0%})")
        fired.add_row(str(index), *cells)
    _show("rows fired in the capped conversations (prompts included)", fired)
    speed = Table()
    for column in ("conversation", "uncapped", "capped"):
        speed.add_column(column, justify="left" if column == "conversation" else "right")
    for result in results:
        speed.add_row(
            result.conversation.name,
            f"{result.uncapped.tokens_per_second:.1f}",
            f"{result.capped.tokens_per_second:.1f}",
        )
    _show("generated tokens per second (prompts included; one run, so noisy)", speed)
    report.draw_trajectories(results, loaded_profile, shown, picture)
    console.print(f"picture: {escape(str(picture))}", soft_wrap=True)


@app.command()
def bench(
    out: Annotated[Path, typer.Option(help="JSON with every figure.")] = Path("bench.json"),
    picture: Annotated[Path | None, typer.Option(help="Fraction of the memory bound against rows.")] = None,
    model: ModelOption = models.DEFAULT_MODEL,
    quick: Annotated[bool, typer.Option(help="One size and dtype, few repetitions.")] = False,
    decode: Annotated[bool, typer.Option(help="Also the decoding speed of a real model, on the CPU.")] = True,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
) -> None:
    """Measure the kernels beside eager torch, torch.compile, the published hook and the memory bound, in one run."""
    # What would fail at the end fails before the minutes of work.
    if device not in ("cpu", "cuda"):
        raise ValueError(f"--device must be cpu or cuda, got {device}")
    if device == "cuda":
        bench_module.check_cuda()
    out.parent.mkdir(parents=True, exist_ok=True)
    if picture:
        from axiscap import report

        report.pyplot()
        picture.parent.mkdir(parents=True, exist_ok=True)
    with _progress() as progress:
        results = bench_module.measure(progress, quick=quick, model=model if decode else None, device=device)
    bench_module.print_tables(console, results)
    out.write_text(json.dumps(results, indent=1) + "\n")
    console.print(f"figures: {escape(str(out))}", soft_wrap=True)
    if picture:
        report.draw_bench(results, picture)
        console.print(f"picture: {escape(str(picture))}", soft_wrap=True)


@app.command()
def doctor() -> None:
    """Say what is here, what is not, and what to do about it."""
    from axiscap import doctor as checks

    table = Table()
    for column in ("what", "found", "what to do"):
        table.add_column(column)
    for check in checks.run():
        cells = (escape(text) for text in (check.what, check.found, check.advice))
        table.add_row(*cells, style="yellow" if check.advice else None)
    console.print(table)


def main() -> None:
    """The console script: an error that a user can do something about is a sentence, not a traceback."""
    try:
        app()
    except (ValueError, OSError, ModuleNotFoundError, RuntimeError) as error:
        Console(stderr=True).print(f"[red]axiscap:[/red] {escape(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(1)
