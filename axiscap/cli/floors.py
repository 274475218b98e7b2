"""``axiscap floors``: a profile with other floors or layers."""

from __future__ import annotations

import dataclasses
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from axiscap import CapProfile, models
from axiscap.cli.console import Stages, print_line, progress_bar
from axiscap.cli.options import (
    FictionBudgetOption,
    ModelOption,
    PopulationOption,
    ProfileArgument,
    ProfileOutput,
    PublishedOption,
    TargetOption,
    WorkOption,
    describe_percentiles,
    floor_rule,
    load_plan,
    parse_layers,
    parse_settings,
)
from axiscap.cli.sweep import print_points

#: If more ordinary tokens than this share lie below a floor, a sentence says so.
MOST_BELOW = 0.1


def floors(
    profile: ProfileArgument,
    out: ProfileOutput,
    percentile: Annotated[
        float | None,
        typer.Option(
            help="The percentile of the population, counted towards the Assistant. Default: 4 of ordinary tokens, "
            "lifted to 15, or 25 of another population."
        ),
    ] = None,
    target: TargetOption = None,
    population: PopulationOption = None,
    published: PublishedOption = False,
    layers: Annotated[
        str | None, typer.Option(help="The layers to cap, such as 17-24. Default: those of the profile.")
    ] = None,
    strength: Annotated[
        float | None,
        typer.Option(
            help="The share of its shortfall that a row is corrected by, such as 0.5. 0: measure only. Given alone, "
            "the floors stay."
        ),
    ] = None,
    budget: Annotated[
        float | None,
        typer.Option(
            help="Instead of a percentile: the most that perplexity may rise in any domain of ordinary work, such as "
            "0.01."
        ),
    ] = None,
    fiction_budget: FictionBudgetOption = 0.05,
    changed: Annotated[
        float | None,
        typer.Option(
            help="Instead of --budget or with it: the largest share of most likely tokens that may change in any "
            "domain."
        ),
    ] = None,
    measure: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="First measure ordinary work on this model, a local folder or a hub name: for an axis without "
            "floors, or a model that changed.",
        ),
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="For --measure: the dtype of the weights. auto: as `calibrate` takes it.")
    ] = "auto",
    rollouts: Annotated[
        str | None,
        typer.Option(
            help="For a budget: the answers that `calibrate --rollouts` kept. For --measure: where to keep them. "
            "Default: beside the profile, until it is written."
        ),
    ] = None,
    model: ModelOption = models.DEFAULT_MODEL,
    work: WorkOption = None,
) -> None:
    """Write a profile with other floors or other layers. Only a budget and --measure need the model."""
    from axiscap.calibrate import effects, shares_below, with_floors

    loaded = CapProfile.load(profile)
    if measure is not None:
        loaded = _measure(loaded, out, measure, dtype, rollouts, work)
    layer_list = parse_layers(layers) if layers else None
    if strength is not None and (percentile, target, population, budget, changed) == (None,) * 5:
        _write_weaker(out, loaded if layer_list is None else loaded.at_layers(layer_list), strength)
        return
    has_work = _knows(loaded)
    if budget is not None or changed is not None:
        population = population or loaded.population or "assistant"
        if rollouts is None:
            raise ValueError("a budget needs --rollouts, where the answers to ordinary work are")
        limits = [math.inf if limit is None else limit for limit in (budget, fiction_budget, changed)]
        lowest = with_floors(loaded, loaded.percentiles[0], population, layer_list)
        percentiles, targets = ("" if number is None else f"{number:g}" for number in (percentile, target))
        settings = parse_settings(lowest, "", percentiles, targets, population)
        result = _best_within_budget(lowest, population, effects.Budget(*limits), settings, rollouts, model, work)
        percentile, target = (result.provenance["floors"].get(name) for name in ("percentile", "target_percentile"))
    else:
        default = loaded.population or ("ordinary tokens" if has_work else "assistant")
        percentile, target, population = floor_rule(percentile, target, population, published, default)
        result = with_floors(loaded, percentile, population, layer_list, target_percentile=target)
    if strength is not None:
        result = result.with_strength(strength)
    result.save(out)
    if measure is not None and rollouts is None:
        shutil.rmtree(_answer_folder(out), ignore_errors=True)
    print_line(f"wrote {out}: {population}, {describe_percentiles(percentile, target)}")
    if has_work and (most := shares_below(result, result.floors).max().item()) > MOST_BELOW:
        print_line(
            f"At one layer, {most:.0%} of ordinary tokens lie below their floor. Above {MOST_BELOW:.0%}, ordinary work "
            "pays for the cap"
        )


def _answer_folder(out: Path) -> Path:
    return out.with_suffix(".rollouts")


def _measure(
    profile: CapProfile, out: Path, model: str, dtype: str, rollouts: str | None, work: Path | None
) -> CapProfile:
    """The profile with tables of this model, and the old floors' share of ordinary tokens in a sentence."""
    from axiscap import calibrate as calibration

    loaded, tokenizer = models.load(model, dtype)
    plan = load_plan(None, None, 1, model)
    store = calibration.Store(rollouts or str(_answer_folder(out)), calibration.Settings(model, str(loaded.dtype)))
    with progress_bar(rate=True) as progress:
        measured = calibration.measure(
            loaded, tokenizer, profile, plan, store, calibration.load_work(work), progress=Stages(progress)
        )
    if bool(profile.floors.isfinite().any()):
        now = calibration.shares_below(measured, profile.floors)
        former = calibration.shares_below(profile, profile.floors).mean() if _knows(profile) else None
        before = "" if former is None else f"; when they were found, {former:.1%}"
        print_line(f"Below the old floors: {now.mean():.1%} of this model's ordinary tokens{before}")
    return measured


def _knows(profile: CapProfile) -> bool:
    return "ordinary tokens" in profile.tables


def _write_weaker(out: Path, profile: CapProfile, strength: float) -> None:
    profile.with_strength(strength).save(out)
    effect = f"the same floors, strength {strength:g}" if strength else "no floors: rows are measured, and left alone"
    print_line(f"wrote {out}: {effect}")


def _best_within_budget(
    profile: CapProfile,
    population: str,
    budget: Any,
    settings: Sequence[Any],
    rollouts: str,
    model: str,
    work: Path | None,
) -> CapProfile:
    """Measures all settings, prints them, and returns the profile of the admitted one that holds most."""
    points = _measure_settings(profile, population, settings, rollouts, model, work)
    admitted = [point for point in points if budget.admits(point.domains)]
    best = max(admitted, key=lambda point: point.hold, default=None)
    print_points(points, {id(best): "chosen"})
    if best is None:
        raise ValueError(f"every setting costs more than {budget}")
    assert best.setting is not None
    result: CapProfile = best.setting.of(profile, population)
    limits = {name: limit for name, limit in dataclasses.asdict(budget).items() if math.isfinite(limit)}
    result.provenance["floors"]["budget"] = limits
    return result


def _measure_settings(
    profile: CapProfile, population: str, settings: Sequence[Any], rollouts: str, model: str, work: Path | None
) -> list[Any]:
    from axiscap import calibrate as calibration
    from axiscap.calibrate import effects

    sampling = calibration.Settings.of(profile, model)
    ordinary_work = calibration.load_work(work)
    loaded, tokenizer = models.load(model, sampling.dtype.removeprefix("torch."))
    sampling = dataclasses.replace(sampling, dtype=str(loaded.dtype))
    points = []
    with progress_bar() as progress:
        task = progress.add_task("settings", total=len(settings))
        costs = effects.Costs(loaded, tokenizer, ordinary_work, calibration.Store(rollouts, sampling))
        holds = effects.Holds(loaded, calibration.TransformersEngine(loaded, tokenizer, sampling))
        for setting in settings:
            points.append(effects.measure(costs, holds, setting, setting.of(profile, population)))
            progress.advance(task)
    return points
