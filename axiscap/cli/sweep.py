"""``axiscap sweep``: the best setting of floors and targets."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from axiscap import CapProfile, models
from axiscap.cli.console import console, print_line, print_table, progress_bar
from axiscap.cli.options import (
    FictionBudgetOption,
    ModelOption,
    PopulationOption,
    ProfileArgument,
    QuestionsOption,
    RolesOption,
    WorkOption,
    load_plan,
    make_folder,
    parse_settings,
)

#: The columns of the table of points in a file or a pipe.
_POINTS_WIDTH = 180


def sweep(
    profile: ProfileArgument,
    out: Annotated[Path, typer.Argument(help="The profile to write, of the chosen setting.", callback=make_folder)],
    rollouts: Annotated[str, typer.Option(help="The answers that `axiscap calibrate --rollouts` kept.")],
    model: ModelOption = models.DEFAULT_MODEL,
    roles: RolesOption = None,
    questions: QuestionsOption = None,
    per_role: Annotated[int, typer.Option(help="Answers of each role that the calibration generated.")] = 16,
    bands: Annotated[
        str, typer.Option(help="Bands of layers to try, such as 12-19,14-21. Default: that of the profile.")
    ] = "",
    percentiles: Annotated[
        str,
        typer.Option(
            help="Percentiles of floors to try. Default: 0.5,2,4,6 of single tokens, or 5,10,25,50 of means of answers."
        ),
    ] = "",
    targets: Annotated[
        str,
        typer.Option(help="Percentiles of targets to try. Default: 15,25 of single tokens; the floors of means."),
    ] = "",
    population: PopulationOption = None,
    budget: Annotated[
        float, typer.Option(help="The most that perplexity may rise in any domain of ordinary work, such as 0.01.")
    ] = 0.02,
    fiction_budget: FictionBudgetOption = 0.05,
    mild: Annotated[
        Path | None,
        typer.Option(
            help="A second profile to write: the most hold at a cost of at most 0.003 in any domain.",
            callback=make_folder,
        ),
    ] = None,
    work: WorkOption = None,
    ask: Annotated[int, typer.Option(help="Questions to ask each held-out role.")] = 4,
    picture: Annotated[
        Path, typer.Option(help="The picture to write: hold against cost.", callback=make_folder)
    ] = Path("sweep.png"),
) -> None:
    """Measure what capping does at percentiles of floors and targets, and write the profile of the best setting.

    The best setting holds personas most within the budget. It must not lead to more role-play, to fewer right answers,
    or to requests that are declined less. What was measured is kept beside OUT: after an interruption the command
    resumes.
    """
    from axiscap.calibrate import effects
    from axiscap.calibrate import sweep as sweeps
    from axiscap.view import plots

    plots.pyplot()
    loaded_profile = CapProfile.load(profile)
    population = population or loaded_profile.population or "assistant"
    settings = parse_settings(loaded_profile, bands, percentiles, targets, population)
    plan = load_plan(roles, questions, per_role, model)
    bench = _load_bench(loaded_profile, plan, model, rollouts, work, ask)
    console.print(f"text classifier: held-out AUC {bench.judge.auc:.3f}")
    measured = sweeps.Sweep(bench, loaded_profile, population, out.with_suffix(".points.jsonl"))
    budgets = {out: effects.Budget(budget, fiction_budget)} | ({} if mild is None else {mild: effects.MILD})
    best = _measure(measured, settings, budgets)
    uncapped, points = measured.point(None), [measured.point(setting) for setting in settings]
    frontier = effects.frontier(points)
    marks = {id(point): "frontier" for point in frontier}
    marks |= {id(point): "mild" if path == mild else "chosen" for path, point in best.items()}
    print_points([uncapped, *points], marks)
    plots.draw_sweep(uncapped, points, frontier, [point for point in best.values() if point], picture)
    print_line(f"picture: {picture}")
    for path, point in best.items():
        if point is None:
            raise ValueError(f"no setting is within {budgets[path]} and passes the tests; {path} was not written")
        assert point.setting is not None
        result = point.setting.of(loaded_profile, population)
        result.provenance["sweep"] = {
            "judge_auc": round(bench.judge.auc, 4),
            "uncapped": dataclasses.asdict(uncapped),
            "chosen": dataclasses.asdict(point),
        }
        result.save(path)
        print_line(f"wrote {path}: {point.name}")


def _load_bench(profile: CapProfile, plan: Any, model: str, rollouts: str, work: Path | None, ask: int) -> Any:
    """The model and all that measures it: costs, holds, and the judge of role-play."""
    from axiscap import calibrate as calibration
    from axiscap.calibrate import sweep as sweeps

    sampling = calibration.Settings.of(profile, model)
    loaded, tokenizer = models.load(model, sampling.dtype.removeprefix("torch."))
    sampling = dataclasses.replace(sampling, dtype=str(loaded.dtype))
    store = calibration.Store(rollouts, sampling)
    with console.status("training the text classifier"):
        judge = sweeps.UptakeJudge(store.shards(calibration.batches(plan)), plan)
        uses_work = profile.lifts is not None or work is not None
        ordinary_work = calibration.load_work(work) if uses_work else None
        return sweeps.Bench(loaded, tokenizer, plan, sampling, judge, store, ask, ordinary_work)


def _measure(measured: Any, settings: Sequence[Any], budgets: Mapping[Path, Any]) -> dict[Path, Any]:
    """Measures every setting, and returns the best point within each budget, or None if no point is."""
    best = {}
    with progress_bar() as progress:
        task = progress.add_task("settings", total=len(settings))
        for setting in settings:
            measured.point(setting)
            progress.advance(task)
        task = progress.add_task("profiles tested", total=len(budgets))
        for path, budget in budgets.items():
            best[path] = measured.choose([measured.point(setting) for setting in settings], budget)
            progress.advance(task)
    return best


def print_points(points: Sequence[Any], marks: Mapping[int, str]) -> None:
    """Prints the table of measured settings; ``marks`` by the point's ``id()``."""
    from axiscap.view import tables

    if not console.is_terminal:
        console.width = _POINTS_WIDTH
    print_table("perplexity over the uncapped model's, hold in nats (95 %)", tables.point_table(points, marks))
