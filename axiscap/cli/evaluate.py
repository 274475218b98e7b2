"""``axiscap evaluate``: the same tasks uncapped and capped."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from axiscap import models
from axiscap.cli.console import console, print_line, print_table
from axiscap.cli.options import ModelOption, SeedOption

#: The attempts and the tokens of an answer with --quick.
_QUICK = 64


def evaluate(
    profiles: Annotated[
        list[str],
        typer.Argument(
            help="Profiles, each compared with the uncapped model; with --base-url, names that the server knows; "
            "with --garak, two of its reports."
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(
            help="A folder for the logs, scores.json and scores.html. A run that was interrupted resumes from it."
        ),
    ] = Path("evaluation"),
    model: ModelOption = models.DEFAULT_MODEL,
    dtype: Annotated[str, typer.Option(help="The dtype of the weights, as for `calibrate`.")] = "auto",
    tasks: Annotated[
        str,
        typer.Option(
            help="Tasks to run, separated by commas: AxisCap's, or any task of Inspect by name or FILE.py. Default: "
            "AxisCap's."
        ),
    ] = "",
    quick: Annotated[
        bool, typer.Option("--quick", help="Run 64 jailbreak attempts, with answers of at most 64 tokens.")
    ] = False,
    attempts: Annotated[
        int | None, typer.Option(help="The number of pairs of persona and behaviour. Default: 320.")
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(help="The most tokens of an answer. Default: what each task says.")
    ] = None,
    behaviours: Annotated[
        Path | None,
        typer.Option(
            help="Harmful behaviours: a CSV of JailbreakBench, HarmBench or StrongREJECT, or JSONL. Default: "
            "AxisCap's own."
        ),
    ] = None,
    harmless: Annotated[
        Path | None, typer.Option(help="Harmless requests that resemble them. Default: AxisCap's own.")
    ] = None,
    personas: Annotated[
        Path | None, typer.Option(help="A folder of personas (JSON). Default: AxisCap's hostile roles.")
    ] = None,
    first_turn: Annotated[
        bool, typer.Option("--first-turn", help="Put the persona into the first turn, and not into the system prompt.")
    ] = False,
    judge: Annotated[
        str | None,
        typer.Option(help="A model that judges harm by a rubric, as Inspect names it, such as openai/gpt-5."),
    ] = None,
    lower: Annotated[
        str,
        typer.Option(help="Names of other tasks or scorers for which lower is better, such as strong_reject."),
    ] = "",
    epochs: Annotated[int | None, typer.Option(help="How many times to answer each sample.")] = None,
    limit: Annotated[int | None, typer.Option(help="The most samples of each task.")] = None,
    seed: SeedOption = 0,
    batch_size: Annotated[int, typer.Option(help="How many answers to generate at once.")] = 32,
    base_url: Annotated[
        str | None, typer.Option(help="The URL of a server that lets requests choose a profile, or off.")
    ] = None,
    engine: Annotated[str, typer.Option(help="The engine of the server: vllm or sglang.")] = "vllm",
    at_most_drop: Annotated[
        float | None, typer.Option(help="Exit with status 3 if a score gets worse by more than this, such as 0.02.")
    ] = None,
    garak: Annotated[bool, typer.Option("--garak", help="Compare two reports of garak, and run nothing.")] = False,
) -> None:
    """Run the same Inspect tasks uncapped and capped, and compare the answers pair by pair."""
    try:
        from axiscap.evaluate import run
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"evaluation needs Inspect: pip install 'axiscap[evaluate]' ({error})") from None
    from axiscap.view import sheet

    sheet.plotly()  # its absence must not end the command after the evaluation
    better_low = _split(lower)
    if garak:
        _compare(*_read_garak_reports(profiles), better_low, out, at_most_drop)
        return
    options = run.Options(
        tasks=_split(tasks) or run.OWN,
        behaviours=behaviours,
        harmless=harmless,
        personas=personas,
        judge=judge,
        attempts=(_QUICK if quick else run.Options.attempts) if attempts is None else attempts,
        first_turn=first_turn,
        max_tokens=_QUICK if quick and max_tokens is None else max_tokens,
        epochs=epochs,
        limit=limit,
        seed=seed,
    )
    sides = (
        run.local_sides(model, dtype, batch_size, [Path(name) for name in profiles])
        if base_url is None
        else run.served_sides(model, base_url, engine, profiles)
    )
    facts = {"model": model, **{f"run {side.name}": dict(side.arguments) for side in sides}, **options.facts()}
    _compare(run.run(sides, options, out, batch_size), facts, better_low, out, at_most_drop)


def _split(names: str) -> list[str]:
    return [name for name in names.split(",") if name]


def _read_garak_reports(paths: Sequence[str]) -> tuple[list[Any], dict[str, Any]]:
    from axiscap.evaluate import pairs

    if len(paths) != 2:
        raise ValueError(f"--garak compares two reports, got {len(paths)}")
    return [pairs.read_garak(path, Path(path)) for path in paths], {"reports": paths}


def _compare(
    runs: Sequence[Any], facts: Mapping[str, Any], better_low: Sequence[str], out: Path, at_most_drop: float | None
) -> None:
    """Compares every run with the first: prints the tables, writes the files, and checks the drops."""
    from axiscap.evaluate import judges, pairs
    from axiscap.view import scores

    before, *others = runs
    comparisons = {after.name: pairs.compare(before, after, better_low) for after in others}
    notes = judges.notes({difference.scorer for differences in comparisons.values() for difference in differences})
    for name, differences in comparisons.items():
        print_table(f"{name} against {before.name}", scores.terminal_table(differences))
    for note in notes:
        console.print(escape(note))
    out.mkdir(parents=True, exist_ok=True)
    stored = {name: [pairs.described(difference) for difference in list_] for name, list_ in comparisons.items()}
    (out / "scores.json").write_text(json.dumps({"before": before.name, **facts, "after": stored}, indent=1), "utf-8")
    scores.write(out / "scores.html", comparisons, before.name, notes, facts)
    print_line(f"wrote {out / 'scores.json'} and {out / 'scores.html'}")
    if at_most_drop is not None:
        _check_drops(comparisons, at_most_drop)


def _check_drops(comparisons: Mapping[str, Sequence[Any]], at_most: float) -> None:
    drops = list(_large_drops(comparisons, at_most))
    if drops:
        console.print("[red]worse by more than allowed, failed answers counted as worse:[/red]")
        for line in drops:
            console.print(f"  {escape(line)}")
        raise typer.Exit(3)


def _large_drops(comparisons: Mapping[str, Sequence[Any]], at_most: float) -> Iterator[str]:
    for name, differences in comparisons.items():
        for difference in differences:
            if difference.worst_drop > at_most:
                yield f"{difference.task}, {difference.scorer} under {name} by {difference.worst_drop:.3f}"
