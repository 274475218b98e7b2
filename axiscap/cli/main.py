"""The command ``axiscap``. Each command does its work in a module of its own; here are their options and tables."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

import axiscap
from axiscap import bench as bench_module
from axiscap import drift, models
from axiscap.profile import CapProfile, Evidence, ProfileError

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
# In a file or a pipe there is no width to fit; tables then stay readable.
console = Console(width=None if sys.stdout.isatty() else 140)

ModelOption = Annotated[str, typer.Option(help="The model: a local folder or a hub name.")]
ProfileArgument = Annotated[
    str, typer.Argument(help="The profile: a file or a URL, such as hf://org/name/profile.safetensors.")
]


def _with_folder(path: Path | None) -> Path | None:
    """The path of what a command writes, whose folder is made: hours of work shall not end for want of one."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
    return path


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
    """Activation capping along the Assistant Axis: calibrate, serve, monitor and evaluate."""


def _show(title: str, table: Table) -> None:
    """A table under its title, on one line of its own: a table's own title breaks at the table's width."""
    console.print(f"\n[bold]{escape(title)}[/bold]")
    console.print(table)


class _Rate(ProgressColumn):
    """Finished a second."""

    def render(self, task: Task) -> Text:
        return Text(f"{task.speed:.1f}/s" if task.speed else "")


def _progress(rate: bool = False) -> Progress:
    parts = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        *([_Rate()] if rate else []),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    return Progress(*parts, console=console)


@app.command()
def inspect(
    profile: ProfileArgument,
    other: Annotated[
        str | None, typer.Argument(help="A profile of another model, to compare role loadings with.")
    ] = None,
) -> None:
    """Print the contents of a profile and where they come from."""
    from axiscap.view.sinks import describe_sinks, sink_warnings

    loaded = CapProfile.load(profile)
    facts = loaded.provenance
    console.print(f"[bold]{escape(profile)}[/bold]")
    model = loaded.model_facts
    depth = loaded.num_layers
    summary = Table(show_header=False, box=None)
    known = f"{model.get('id', 'unknown')} ({model.get('architecture', 'unknown architecture')})"
    summary.add_row("model", escape(known))
    summary.add_row("digest", loaded.digest)
    summary.add_row("layers", f"{len(loaded.layers)} of {depth or 'unknown'} capped; hidden size {loaded.hidden_size}")
    if loaded.strength != 1:
        summary.add_row("strength", f"{loaded.strength:.3g}: a row is lifted by this share of its shortfall")
    summary.add_row("attention sinks", describe_sinks(loaded))
    for key in ("axis", "floors", "sampling", "created", "axiscap", "source"):
        if key in facts:
            value = facts[key]
            text = value if isinstance(value, str) else json.dumps(value)
            summary.add_row(key, escape(text if len(text) <= 300 else text[:297] + "..."))
    console.print(summary)
    for warning in sink_warnings(loaded):
        console.print(f"[yellow]{escape(warning)}[/yellow]", soft_wrap=True)

    unreadable = ""
    try:
        evidence = loaded.evidence
    except ProfileError as error:
        evidence, unreadable = None, str(error)
    table = Table()
    for name in ("layer", "direction", "floor", *(["target"] if loaded.targets is not None else [])):
        table.add_column(name, justify="right")
    percentiles = loaded.percentiles if loaded.quantiles is not None else ()
    shown = [p for p in percentiles if p in (1, 5, 10, 25, 50, 75, 90, 95, 99)]
    for percentile in shown:
        table.add_column(f"p{percentile:g}", justify="right")
    if evidence is not None:
        table.add_column("held-out AUC", justify="right")
    for index, layer in enumerate(loaded.layers):
        for k in range(loaded.directions):
            row = [str(layer), str(k), f"{loaded.floors[index, k].item():.4g}"]
            if loaded.targets is not None:
                row.append(f"{loaded.targets[index, k].item():.4g}")
            if loaded.quantiles is not None:
                values = dict(zip(percentiles, loaded.quantiles[layer].tolist(), strict=False))
                row += [f"{values[p]:.4g}" if p in values else "" for p in shown]
            if evidence is not None:
                row.append(f"{evidence.auc[layer]:.3f}")
            table.add_row(*row)
    _show("capped layers", table)
    if evidence is not None:
        _show_evidence(evidence)
    if unreadable:
        console.print(escape(unreadable), soft_wrap=True)
    if other is not None:
        from axiscap.calibrate import loadings_correlation

        both = [_loadings(loaded, profile), _loadings(CapProfile.load(other), other)]
        correlation, count = loadings_correlation(*both)
        console.print(f"correlation of role loadings with {escape(other)}: {correlation:.3f} ({count} roles)")


def _loadings(profile: CapProfile, path: str) -> dict[str, float]:
    try:
        evidence = profile.evidence
    except ProfileError as error:
        raise ProfileError(f"{path}: {error}") from None
    if evidence is None:
        raise ValueError(f"{path}: no role loadings in it; it was not made by this version's calibration")
    return evidence.loadings


def _show_evidence(facts: Evidence) -> None:
    """What says whether the axis is real, at the best layer, in the middle and over all."""
    best = facts.best_layer
    middle = range(len(facts.auc) // 3, -(-2 * len(facts.auc) // 3))
    cosines = [abs(facts.pc1_cosine[layer]) for layer in middle]
    strong = sorted(facts.auc_by_kind.items(), key=lambda item: -max(item[1]))
    table = Table(show_header=False)
    low, high = facts.auc_interval
    held = f"{len(facts.held_roles)} roles, {facts.held_questions} questions"
    table.add_row(f"held-out AUC ({held}), layer {best}", f"{facts.auc[best]:.3f} (95 %: {low:.3f} to {high:.3f})")
    for kind, values in strong:
        table.add_row(f"  {escape(kind)}", f"{values[best]:.3f}; best {max(values):.3f}")
    table.add_row("d'", f"{facts.d_prime[best]:.2f}")
    low, high = facts.null_auc_interval
    table.add_row("with labels permuted", f"{facts.null_auc[best]:.3f} (95 %: {low:.3f} to {high:.3f})")
    table.add_row(
        f"|cos| of the first component with the axis, layers {middle[0]}-{middle[-1]}",
        f"{min(cosines):.2f} to {max(cosines):.2f}",
    )
    table.add_row("components that hold 70 % of the roles' variance", str(facts.components_70[best]))
    table.add_row("cosine of the axes of both halves of the questions", f"{facts.halves[best]:.3f}")
    low, high = facts.axis_interval
    table.add_row("cosine with the axes of resampled roles", f"95 %: {low:.3f} to {high:.3f}")
    ordered = sorted(facts.loadings.items(), key=lambda item: item[1])
    table.add_row("least Assistant-like roles", escape(", ".join(name for name, _ in ordered[:6])))
    table.add_row("most Assistant-like roles", escape(", ".join(name for name, _ in reversed(ordered[-6:]))))
    _show("evidence", table)


RolesOption = Annotated[Path | None, typer.Option(help="A folder of roles (JSON). Default: AxisCap's own roles.")]
QuestionsOption = Annotated[Path | None, typer.Option(help="Questions (JSONL). Default: AxisCap's own questions.")]
PopulationOption = Annotated[
    str | None,
    typer.Option(
        help="The projections that a percentile is of: means of answers (assistant, pooled, work), or single tokens "
        "('assistant tokens', 'pooled tokens', 'ordinary tokens'). Default: the profile's, or ordinary tokens."
    ),
]
TargetOption = Annotated[
    float | None,
    typer.Option(
        "--target",
        help="The percentile of the same population that a row below its floor is lifted to, at least that of the "
        "floors. Default: a row is lifted to its floor.",
    ),
]
MethodOption = Annotated[
    str,
    typer.Option(
        help="How to compute the axis. discriminant: the direction that separates roles from ordinary work. "
        "difference: the published mean difference."
    ),
]
WorkOption = Annotated[Path | None, typer.Option(help="Ordinary requests (JSONL). Default: AxisCap's own requests.")]
PublishedOption = Annotated[
    bool, typer.Option("--published", help="Use the published convention: the 75th percentile of the pooled answers.")
]
#: Their "p0.25" is the 25th percentile on the negated axis.
PUBLISHED = (75.0, "pooled")


@app.command()
def calibrate(
    out: Annotated[Path, typer.Argument(help="The profile to write.", callback=_with_folder)],
    model: ModelOption = models.DEFAULT_MODEL,
    roles: RolesOption = None,
    questions: QuestionsOption = None,
    per_role: Annotated[
        int,
        typer.Option(
            help="Answers to generate for each role. 0: one for each pair of prompt and question, as published."
        ),
    ] = 16,
    percentile: Annotated[
        float | None,
        typer.Option(
            help="The percentile of the population at which the floors lie. Default: 4, lifted to 15, or 25 with "
            "--method difference."
        ),
    ] = None,
    target: TargetOption = None,
    population: PopulationOption = None,
    published: PublishedOption = False,
    layers: Annotated[
        int | None,
        typer.Option(
            help="The number of layers to cap. Default: two thirds of the layers, or a fifth with --method "
            "difference, but at least 8."
        ),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="The most tokens of an answer.")] = 40,
    dtype: Annotated[
        str, typer.Option(help="The dtype of the weights. auto: that of the files on a GPU, float32 on a CPU.")
    ] = "auto",
    seed: Annotated[int, typer.Option(help="The seed of the sampling.")] = 0,
    judge: Annotated[
        str,
        typer.Option(
            help="What judges whether an answer takes on its role: none, local, or the name of a model at "
            "OPENAI_BASE_URL."
        ),
    ] = "none",
    minimum: Annotated[
        int, typer.Option(help="A role counts if the judge kept at least this many of its answers.")
    ] = 1,
    engine: Annotated[
        str,
        typer.Option(
            help="What generates the answers: transformers, vllm, ray, or endpoint (the server at OPENAI_BASE_URL)."
        ),
    ] = "transformers",
    workers: Annotated[int, typer.Option(help="The number of Ray workers.")] = 2,
    rollouts: Annotated[
        str | None,
        typer.Option(
            help="Where to keep the answers: a folder or a URL. Default: beside the profile, until it is written."
        ),
    ] = None,
    method: MethodOption = "discriminant",
    work: WorkOption = None,
    vectors: Annotated[
        Path | None,
        typer.Option(help="A folder to write the vectors of the default and of the roles to, in the published layout."),
    ] = None,
) -> None:
    """Find a model's Assistant Axis and floors, and write them as a profile.

    The command keeps finished answers until it has written the profile: after an interruption it resumes.
    """
    from axiscap import calibrate as calibration

    if engine not in ("transformers", "vllm", "endpoint", "ray"):
        raise ValueError(f"--engine must be transformers, vllm, endpoint or ray, got {engine}")
    ordinary = _work(method, work)
    if percentile is None:
        percentile, target = (25.0, target) if ordinary is None else (4.0, 15.0 if target is None else target)
    population = population or ("assistant" if ordinary is None else "ordinary tokens")
    if published:
        percentile, population = PUBLISHED
    plan = _plan(roles, questions, per_role, model)
    folder = out.with_suffix(".rollouts")
    loaded, tokenizer = models.load(model, dtype)
    who = "transformers" if engine == "ray" else engine  # Ray's workers answer as this process does
    settings = calibration.Settings(model, str(loaded.dtype), max_new_tokens, seed, who)
    store = calibration.Store(rollouts or str(folder), settings)
    with console.status("finding attention sinks"):
        limits = calibration.find_norm_limits(loaded, tokenizer, plan, store, ordinary).limits
    settings = dataclasses.replace(settings, norm_limits=limits)
    store = calibration.Store(store.url, settings)
    crew: calibration.Workers
    if engine != "ray":
        engines = {"vllm": calibration.VllmEngine, "endpoint": calibration.EndpointEngine}
        crew = calibration.Here(engines.get(engine, calibration.TransformersEngine)(loaded, tokenizer, settings))
    else:
        crew = calibration.RayWorkers(model, workers, gpus=int(loaded.device.type == "cuda"))
    with _progress(rate=True) as progress:
        advance = _Stages(progress)
        keep = None
        if judge != "none":
            crew.rollouts(store, calibration.batches(plan), lambda done: advance("answers", done, len(plan.tasks)))
            keep = _judged(judge, loaded, tokenizer, store, plan, folder, progress)
        profile = calibration.calibrate(
            loaded,
            tokenizer,
            plan,
            store,
            percentile=percentile,
            target_percentile=target,
            population=population,
            count=layers,
            keep=keep,
            judge=judge,
            minimum=minimum,
            workers=crew,
            vectors=vectors,
            progress=advance,
            work=ordinary,
        )
    profile.save(out)
    if rollouts is None:
        shutil.rmtree(folder, ignore_errors=True)
    if profile.evidence is not None:
        _show_evidence(profile.evidence)
    capped = f"layers {profile.layers[0]}-{profile.layers[-1]}, {population}, {_percentiles(percentile, target)}"
    console.print(f"wrote {escape(str(out))}: {capped}", soft_wrap=True)


def _percentiles(percentile: float, target: float | None) -> str:
    return f"percentile {percentile:g}" + ("" if target is None else f", lifted to percentile {target:g}")


def _plan(roles: Path | None, questions: Path | None, per_role: int, model: str) -> Any:
    from axiscap import calibrate as calibration

    found = calibration.load_roles(roles, model_name=Path(model).name)
    return calibration.plan(found, calibration.load_questions(questions), per_role or None)


def _work(method: str, path: Path | None) -> Any:
    """Ordinary work for the discriminant; None for the published method, which knows none."""
    from axiscap import calibrate as calibration

    if method not in ("discriminant", "difference"):
        raise ValueError(f"--method must be discriminant or difference, got {method}")
    if method == "difference":
        if path is not None:
            raise ValueError("--work is for --method discriminant; the published method knows no ordinary work")
        return None
    return calibration.load_work(path)


class _Stages:
    """Progress through stages that follow each other, each with a bar of its own. Where the output is no terminal, a
    line every minute instead, with the rate and the time that is left.
    """

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._tasks: dict[str, Any] = {}
        self._said = time.monotonic()

    def __call__(self, what: str, done: int, total: int) -> None:
        if what not in self._tasks:
            self._tasks[what] = self._progress.add_task(what, total=total)
        number = self._tasks[what]
        self._progress.advance(number, done)
        now = time.monotonic()
        if console.is_terminal or now - self._said < 60:
            return
        self._said = now
        task = next(task for task in self._progress.tasks if task.id == number)
        rate = f", {task.speed:.1f}/s" if task.speed else ""
        left = f", {task.time_remaining / 60:.0f} min left" if task.time_remaining else ""
        print(f"{what}: {task.completed:.0f} of {total}{rate}{left}", file=sys.stderr, flush=True)


def _judged(judge: str, model: Any, tokenizer: Any, store: Any, plan: Any, folder: Path, progress: Progress) -> Any:
    from axiscap import calibrate as calibration
    from axiscap.calibrate import judge as judges

    ask = judges.local(model, tokenizer) if judge == "local" else judges.endpoint(judge)
    task = progress.add_task(f"judged by {judge}", total=len(plan.tasks))
    path = folder / f"scores-{judge.replace('/', '_')}.jsonl"
    scores = judges.scores(
        ask,
        store.shards(calibration.batches(plan)),
        plan.roles,
        path,
        lambda count: progress.advance(task, count),
        **({"concurrent": 1} if judge == "local" else {}),
    )
    return calibration.Keep(scores)


def _layers(text: str) -> list[int]:
    """``17-24`` or ``17,18,20``."""
    if "-" in text:
        (found,) = _bands(text, "--layers")
        return list(range(found[0], found[1] + 1))
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"--layers must look like 17-24 or 17,18,20, got {text}") from None


def _bands(text: str, option: str) -> list[tuple[int, int]]:
    """``12-19,14-21``."""
    found = [re.fullmatch(r"\s*(\d+)-(\d+)\s*", part) for part in text.split(",")]
    bands = [(int(match[1]), int(match[2])) for match in found if match is not None]
    if len(bands) < len(found) or any(first > last for first, last in bands):
        raise ValueError(f"{option} must look like 17-24, first to last, got {text}")
    return bands


@app.command()
def floors(
    profile: ProfileArgument,
    out: Annotated[Path, typer.Argument(help="The profile to write.", callback=_with_folder)],
    percentile: Annotated[
        float | None, typer.Option(help="The percentile of the population, counted towards the Assistant. Default: 25.")
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
    fiction_budget: Annotated[float, typer.Option(help="The same for stories, poems and dialogue.")] = 0.05,
    changed: Annotated[
        float | None,
        typer.Option(
            help="Instead of --budget or with it: the largest share of most likely tokens that may change in any "
            "domain."
        ),
    ] = None,
    rollouts: Annotated[
        str | None, typer.Option(help="For a budget: the answers that `calibrate --rollouts` kept.")
    ] = None,
    model: ModelOption = models.DEFAULT_MODEL,
    work: WorkOption = None,
) -> None:
    """Write a profile with other floors or other layers. Only a budget needs the model."""
    from axiscap.calibrate import effects
    from axiscap.calibrate.floors import PERCENTILES, with_floors

    if published:
        percentile, population = PUBLISHED
    loaded = CapProfile.load(profile)
    chosen = _layers(layers) if layers else None
    if strength is not None and (percentile, target, population, budget, changed) == (None,) * 5:
        made = (loaded if chosen is None else loaded.at_layers(chosen)).with_strength(strength)
        made.save(out)
        what = f"the same floors, strength {strength:g}" if strength else "no floors: rows are measured, and left alone"
        console.print(f"wrote {escape(str(out))}: {what}", soft_wrap=True)
        return
    population = population or loaded.population or "assistant"
    if budget is not None or changed is not None:
        if rollouts is None:
            raise ValueError("a budget needs --rollouts, where the answers to ordinary work are")
        limits = [math.inf if limit is None else limit for limit in (budget, fiction_budget, changed)]
        lowest = with_floors(loaded, PERCENTILES[0], population, chosen)
        levels, lifted = ("" if number is None else f"{number:g}" for number in (percentile, target))
        tried = _settings_to_try(lowest, "", levels, lifted, population)
        made = _within(lowest, population, effects.Budget(*limits), tried, rollouts, model, work)
        percentile, target = (made.provenance["floors"].get(name) for name in ("percentile", "target_percentile"))
    else:
        percentile = 25.0 if percentile is None else percentile
        made = with_floors(loaded, percentile, population, chosen, target_percentile=target)
    if strength is not None:
        made = made.with_strength(strength)
    made.save(out)
    console.print(f"wrote {escape(str(out))}: {population}, {_percentiles(percentile, target)}", soft_wrap=True)


def _within(
    profile: CapProfile,
    population: str,
    budget: Any,
    tried: Sequence[Any],
    rollouts: str,
    model: str,
    work: Path | None,
) -> CapProfile:
    """The floors and targets that hold most within a budget, and a table of what was measured."""
    from axiscap import calibrate as calibration
    from axiscap.calibrate import effects

    sampling = calibration.Settings.of(profile, model)
    ordinary = calibration.load_work(work)
    loaded, tokenizer = models.load(model, sampling.dtype.removeprefix("torch."))
    settings = dataclasses.replace(sampling, dtype=str(loaded.dtype))
    points = []
    with _progress() as progress:
        task = progress.add_task("settings", total=len(tried))
        costs = effects.Costs(loaded, tokenizer, ordinary, calibration.Store(rollouts, settings))
        holds = effects.Holds(loaded, calibration.TransformersEngine(loaded, tokenizer, settings))
        for setting in tried:
            points.append(effects.measure(costs, holds, setting, setting.of(profile, population)))
            progress.advance(task)
    admitted = [point for point in points if budget.admits(point.domains)]
    chosen = max(admitted, key=lambda point: point.hold, default=None)
    _show_points(points, {id(chosen): "chosen"})
    if chosen is None:
        raise ValueError(f"every setting costs more than {budget}")
    assert chosen.setting is not None
    made: CapProfile = chosen.setting.of(profile, population)
    limits = {name: most for name, most in dataclasses.asdict(budget).items() if math.isfinite(most)}
    made.provenance["floors"]["budget"] = limits
    return made


def _show_points(points: Sequence[Any], marks: Mapping[int, str]) -> None:
    """A table of what caps do and cost; ``marks`` by a point's id."""
    table = Table()
    table.add_column("setting")
    columns = ("hold", "fired", "mean", "worst domain", "worst fiction", "changed", "uptake", "checks", "declines", "")
    for column in columns:
        table.add_column(column, justify="right")
    for point in points:
        changed = max((1 - cost.agreement for cost in point.domains.values() if not cost.fiction), default=0.0)
        tests = point.tests
        low, high = point.hold_interval
        table.add_row(
            point.name,
            f"{point.hold:.1f} ({low:.1f}-{high:.1f})",
            f"{point.fired:.1%}",
            f"{point.mean:.4f}",
            *(f"{value:.3f} {escape(name)}" for name, value in (point.worst, point.worst_fiction)),
            f"{changed:.1%}",
            "" if tests is None else f"{tests.uptake:.3f}",
            "" if tests is None else f"{tests.checks[0]}/{tests.checks[1]}",
            "" if tests is None else f"{tests.declines:+.2f}",
            marks.get(id(point), ""),
            style="bold" if marks.get(id(point)) in ("chosen", "mild") else None,
        )
    if not console.is_terminal:
        console.width = 180
    _show("perplexity over the uncapped model's, hold in nats (95 %)", table)


@app.command()
def sweep(
    profile: ProfileArgument,
    out: Annotated[Path, typer.Argument(help="The profile to write, of the chosen setting.", callback=_with_folder)],
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
    fiction_budget: Annotated[float, typer.Option(help="The same for stories, poems and dialogue.")] = 0.05,
    mild: Annotated[
        Path | None,
        typer.Option(
            help="A second profile to write: the most hold at a cost of at most 0.003 in any domain.",
            callback=_with_folder,
        ),
    ] = None,
    work: WorkOption = None,
    ask: Annotated[int, typer.Option(help="Questions to ask each held-out role.")] = 4,
    picture: Annotated[
        Path, typer.Option(help="The picture to write: hold against cost.", callback=_with_folder)
    ] = Path("sweep.png"),
) -> None:
    """Measure what capping does at percentiles of floors and targets, and write the profile of the best setting.

    The best setting holds personas most within the budget. It must not lead to more role-play, to fewer right answers,
    or to requests that are declined less. What was measured is kept beside OUT: after an interruption the command
    resumes.
    """
    from axiscap import calibrate as calibration
    from axiscap.calibrate import effects
    from axiscap.calibrate import sweep as sweeps
    from axiscap.view import plots

    plots.pyplot()
    loaded_profile = CapProfile.load(profile)
    sampling = calibration.Settings.of(loaded_profile, model)
    population = population or loaded_profile.population or "assistant"
    tried = _settings_to_try(loaded_profile, bands, percentiles, targets, population)
    plan = _plan(roles, questions, per_role, model)
    loaded, tokenizer = models.load(model, sampling.dtype.removeprefix("torch."))
    settings = dataclasses.replace(sampling, dtype=str(loaded.dtype))
    store = calibration.Store(rollouts, settings)
    with console.status("training the text classifier"):
        judge = sweeps.UptakeJudge(store.shards(calibration.batches(plan)), plan)
        knows_work = loaded_profile.lifts is not None or work is not None
        ordinary = calibration.load_work(work) if knows_work else None
        bench = sweeps.Bench(loaded, tokenizer, plan, settings, judge, store, ask, ordinary)
    console.print(f"text classifier: held-out AUC {judge.auc:.3f}")
    runs = sweeps.Sweep(bench, loaded_profile, population, out.with_suffix(".points.jsonl"))
    budgets = {out: effects.Budget(budget, fiction_budget)} | ({} if mild is None else {mild: effects.MILD})
    chosen = {}
    with _progress() as progress:
        task = progress.add_task("settings", total=len(tried))
        for setting in tried:
            runs.point(setting)
            progress.advance(task)
        task = progress.add_task("profiles tested", total=len(budgets))
        for path, limits in budgets.items():
            chosen[path] = runs.choose([runs.point(setting) for setting in tried], limits)
            progress.advance(task)
    uncapped, points = runs.point(None), [runs.point(setting) for setting in tried]
    marks = {id(point): "frontier" for point in effects.frontier(points)}
    marks |= {id(point): "mild" if path == mild else "chosen" for path, point in chosen.items()}
    _show_points([uncapped, *points], marks)
    plots.draw_sweep(uncapped, points, [point for point in chosen.values() if point], picture)
    console.print(f"picture: {escape(str(picture))}", soft_wrap=True)
    for path, point in chosen.items():
        if point is None:
            raise ValueError(f"no setting is within {budgets[path]} and passes the tests; {path} was not written")
        assert point.setting is not None
        made = point.setting.of(loaded_profile, population)
        made.provenance["sweep"] = {
            "judge_auc": round(judge.auc, 4),
            "uncapped": dataclasses.asdict(uncapped),
            "chosen": dataclasses.asdict(point),
        }
        made.save(path)
        console.print(f"wrote {escape(str(path))}: {point.name}", soft_wrap=True)


def _settings_to_try(profile: CapProfile, bands: str, percentiles: str, targets: str, population: str) -> list[Any]:
    """Settings in the words of the options; a wrong one raises before anything is measured."""
    from axiscap.calibrate import sweep as sweeps

    def numbers(text: str, option: str) -> list[float]:
        try:
            return [float(number) for number in text.split(",")]
        except ValueError:
            raise ValueError(f"{option} must be numbers, such as 2,4,6, got {text}") from None

    levels, lifted = sweeps.defaults(population)
    tried = sweeps.settings_to_try(
        _bands(bands, "--bands") if bands else [(profile.layers[0], profile.layers[-1])],
        numbers(percentiles, "--percentiles") if percentiles else levels,
        numbers(targets, "--targets") if targets else lifted,
    )
    if not tried:
        raise ValueError("no target lies above a percentile")
    for setting in tried:
        setting.of(profile, population)
    return tried


@app.command()
def report(
    profile: ProfileArgument,
    out: Annotated[
        Path,
        typer.Argument(
            help="The file to write: a page (.html), or a picture of the evidence alone (.png, .svg).",
            callback=_with_folder,
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
        from axiscap.view import page

        selection = drift.Selection(drift.Scale.of(loaded_profile, layer))
        if conversations is not None:
            every = drift.known_layers(loaded_profile)
            with _progress(rate=True) as progress:
                for trace in _replayed(progress, loaded_profile, conversations, model, every, None, None):
                    selection.add(trace)
        page.write(out, loaded_profile, selection)
    else:
        from axiscap.view import plots

        plots.draw_calibration(loaded_profile, out)
    console.print(f"wrote {escape(str(out))}", soft_wrap=True)


def _replayed(
    progress: Progress,
    profile: CapProfile,
    conversations: Path,
    model: str,
    layers: list[int],
    capped: bool | None,
    on_error: Callable[[str], None] | None,
) -> Iterator[drift.Trace]:
    # Each line a conversation; of other files the number is known only when all was read.
    total = sum(1 for line in conversations.open("rb") if line.strip()) if conversations.suffix == ".jsonl" else None
    loaded, tokenizer = models.load(model)
    task = progress.add_task("conversations read", total=total)
    stored = drift.read_conversations(conversations, on_error=on_error)
    for trace in drift.replay(loaded, tokenizer, profile, stored, layers=layers, capped=capped, on_error=on_error):
        yield trace
        progress.advance(task)


@app.command()
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
            help="A file to write, with a record for each turn and layer (.jsonl, .parquet).", callback=_with_folder
        ),
    ] = None,
    report: Annotated[
        Path | None, typer.Option(help="A page to write, with curves and transcripts (.html).", callback=_with_folder)
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
    measured = sorted({*(loaded_profile.layers if layers is None else _layers(layers)), scale.layer})
    if report:
        sheet.plotly()
    bad: list[str] = []

    def leave_out(problem: str) -> None:
        bad.append(problem)
        Console(stderr=True).print(f"left out: {escape(problem)}", highlight=False, soft_wrap=True)

    selection, below = drift.Selection(scale), 0
    scales = [drift.Scale.of(loaded_profile, number) for number in measured]
    with _progress(rate=True) as progress, drift.writing_records(out, scales) as write:
        on_error = leave_out if skip_bad else None
        for trace in _replayed(progress, loaded_profile, conversations, model, measured, capped, on_error):
            path = selection.add(trace)
            below += fail_below is not None and path is not None and path.lowest_percentile < fail_below
            write(trace)
    if not selection.groups:
        raise ValueError(f"{conversations}: no conversation in it has an answer of the model's")
    _show_turns(selection, show)
    _show_groups(selection)
    if bad:
        console.print(f"{len(bad)} left out, for the reasons above")
    if out:
        console.print(f"records: {escape(str(out))}", soft_wrap=True)
    if report:
        page.write(report, loaded_profile, selection)
        console.print(f"page: {escape(str(report))}", soft_wrap=True)
    if below:
        console.print(f"{below} conversations have an answer below percentile {fail_below:g} of normal answers")
        raise typer.Exit(3)


def _show_turns(selection: drift.Selection, show: int) -> None:
    scale, rows = selection.scale, selection.rows()[:show]
    table = Table()
    for name in ("conversation", "answer", "tokens", "mean", "percentile", "tokens below floor"):
        table.add_column(name, justify="left" if name == "conversation" else "right")
    for row in rows:
        name, path = f"{row.name} ({row.side})" if row.side else row.name, row.drift
        for number, (mean, tokens, below) in enumerate(row.answers, start=1):
            mark = " (below)" if mean < scale.floor else ""
            share = f"{below / tokens:.0%}" if math.isfinite(scale.floor) else ""
            table.add_row(
                escape(name) if number == 1 else "",
                str(number),
                str(tokens),
                f"{mean:.4g}{mark}",
                _rank(scale.percentile(mean)),
                share,
            )
        share = f"{path.below:.0%}" if math.isfinite(path.below) else ""
        slope = f", slope {path.slope:+.3g}" if math.isfinite(path.slope) else ""
        level = f"level {path.level:.4g}{slope}"
        table.add_row("", "all", str(path.tokens), level, _rank(path.percentile), share, end_section=True)
    total = selection.conversations
    which = (
        f"the lowest {len(rows)} of {total} conversations" if len(rows) < total else "conversations, the lowest first"
    )
    floor = f"; floor {scale.floor:.4g}" if math.isfinite(scale.floor) else ""
    _show(f"{which}, at layer {scale.layer}{floor}; percentiles among the model's normal answers", table)


def _rank(percentile: float) -> str:
    return "" if math.isnan(percentile) else f"{percentile:.3g}"


def _show_groups(selection: drift.Selection) -> None:
    table = Table()
    for name in ("group", "side", "conversations", "mean level (95 %)", "answers below floor", "below percentile 1"):
        table.add_column(name, justify="left" if name in ("group", "side") else "right")
    for (name, side), group in sorted(selection.groups.items()):
        counts = (f"{count} of {group.answers}" for count in (group.below, group.abnormal))
        table.add_row(escape(name), escape(side), str(group.conversations), group.described(), *counts)
    _show("by group", table)


@app.command()
def chat(
    profiles: Annotated[list[Path], typer.Argument(help="One or more profiles to choose from on the page.")],
    model: Annotated[
        str | None,
        typer.Option(help="The model: a local folder or a hub name. With --base-url, it only measures the answers."),
    ] = None,
    base_url: Annotated[
        str | None, typer.Option(help="An OpenAI-compatible server with AxisCap, such as http://127.0.0.1:8000/v1.")
    ] = None,
    uncapped: Annotated[
        str,
        typer.Option(help="With --base-url: the profile of the left side, which is off or a profile of strength 0."),
    ] = "off",
    terminal: Annotated[
        bool, typer.Option("--terminal", help="Chat in this terminal, with the first profile, and not in a browser.")
    ] = False,
    port: Annotated[int, typer.Option(help="The port of the page, which this machine alone can reach.")] = 7860,
    max_new_tokens: Annotated[int, typer.Option(help="The most tokens of an answer.")] = 64,
) -> None:
    """Chat with a model, uncapped and capped side by side, and see where its answers lie along the axis."""
    from axiscap.view import chat as chats

    loaded = {path.stem: CapProfile.load(path) for path in profiles}
    if len(loaded) < len(profiles):
        raise ValueError("the profiles must have different names")
    if not terminal:
        chats.gradio()
    here = None
    if model is not None or base_url is None:
        here = chats.Local(*models.load(model or models.DEFAULT_MODEL))
    responder = here if base_url is None else chats.Remote(base_url, here, uncapped)
    assert responder is not None
    if terminal:
        console.print("Write a line; an empty line, or the end of the input, ends the conversation.")
        lines = iter(_line, "")
        chats.converse(responder, next(iter(loaded.values())), console, lines, most=max_new_tokens)
    else:
        console.print(f"http://127.0.0.1:{port}  (Ctrl-C ends it)")
        chats.launch(chats.build(responder, loaded, most=max_new_tokens), port)


def _line() -> str:
    try:
        return console.input("[bold]> [/bold]").strip()
    except EOFError:
        return ""


@app.command("import")
def import_(
    config: Annotated[Path, typer.Argument(help="A published capping config (.pt).")],
    experiment: Annotated[str, typer.Argument(help="The setting in the config, such as layers_46:54-p0.25.")],
    out: Annotated[Path, typer.Argument(help="The profile to write.", callback=_with_folder)],
) -> None:
    """Write a profile from one setting of a published capping config."""
    from axiscap import interop

    profile = interop.read_capping_config(config, experiment)
    profile.save(out)
    console.print(f"wrote {escape(str(out))}: layers {', '.join(map(str, profile.layers))}", soft_wrap=True)


@app.command()
def export(
    profile: ProfileArgument,
    out: Annotated[
        Path,
        typer.Argument(
            help="The file to write: a capping config (.pt) or a control vector (.gguf).", callback=_with_folder
        ),
    ],
    experiment: Annotated[str, typer.Option(help="The id of the setting in a capping config.")] = "axiscap",
) -> None:
    """Write a profile as a published capping config, or its directions as a control vector for llama.cpp."""
    from axiscap import interop

    if out.suffix == ".gguf":
        interop.write_control_vector(CapProfile.load(profile), out)
        console.print(f"wrote {escape(str(out))}: directions alone, which cap nothing by themselves", soft_wrap=True)
        return
    interop.write_capping_config(CapProfile.load(profile), out, experiment)
    console.print(f"wrote {escape(str(out))}: experiment {escape(experiment)}", soft_wrap=True)


@app.command()
def run(
    profile: ProfileArgument,
    model: ModelOption = models.DEFAULT_MODEL,
    conversations: Annotated[
        Path | None,
        typer.Option(
            help='Conversations to hold (JSONL with "name", "turns", "group"). Default: AxisCap\'s own three.'
        ),
    ] = None,
    picture: Annotated[
        Path, typer.Option(help="The picture of the trajectories to write.", callback=_with_folder)
    ] = Path("drift.png"),
    max_new_tokens: Annotated[int, typer.Option(help="The most tokens of an answer.")] = 48,
    transcripts: Annotated[
        Path | None,
        typer.Option(help="A file to write both sides to, as JSONL for `axiscap replay`.", callback=_with_folder),
    ] = None,
) -> None:
    """Run conversations with a model, uncapped and capped side by side, and draw their path along the axis."""
    from axiscap.drift import compare
    from axiscap.view import plots

    # What would fail at the end fails before the minutes of work.
    plots.pyplot()
    if transcripts:
        transcripts.write_text("")
    loaded_profile = CapProfile.load(profile)
    scripts = compare.load_scripts(conversations)
    loaded, tokenizer = models.load(model)
    shown = len(loaded_profile.layers) // 2
    layer = loaded_profile.layers[shown]
    floor = loaded_profile.floors[shown, 0].item()
    results = []
    for script in scripts:
        with console.status(f"generating the conversation '{script.name}' twice"):
            result = compare.compare(loaded, tokenizer, loaded_profile, script, max_new_tokens=max_new_tokens)
        results.append(result)
        if transcripts:
            with transcripts.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(entry) + "\n" for entry in result.transcripts())
        texts = Table(show_lines=True)
        for column in ("user", "uncapped", "capped"):
            texts.add_column(column, ratio=1)
        for turn, said in enumerate(script.turns):
            answers = result.uncapped.answers[turn].text, result.capped.answers[turn].text
            texts.add_row(*(escape(text) for text in (said, *answers)))
        _show(f"conversation: {script.name}", texts)
        means = Table()
        for column in ("turn", "uncapped", "capped"):
            means.add_column(column, justify="right")
        both = zip(result.uncapped.turn_means(shown), result.capped.turn_means(shown), strict=True)
        for turn, pair in enumerate(both, start=1):
            means.add_row(str(turn), *(f"{value:.4g}{' (below)' if value < floor else ''}" for value in pair))
        _show(f"mean projection of each answer before the cap, layer {layer}; floor {floor:.4g}", means)

    fired = Table()
    fired.add_column("layer", justify="right")
    # By conversation, or by group where they name some.
    columns: dict[str, list[Any]] = {}
    for result in results:
        label = result.conversation.group or result.conversation.name
        columns.setdefault(label, []).append(result.capped.stats or {})
    for label in columns:
        fired.add_column(label, justify="right")
    for index in loaded_profile.layers:
        cells = []
        for held in columns.values():
            count, rows = (sum(getattr(stats[index], part) for stats in held) for part in ("fired", "rows"))
            cells.append(f"{count} of {rows} ({count / max(1, rows):.0%})")
        fired.add_row(str(index), *cells)
    _show("rows fired in the capped conversations (prompts included)", fired)
    if any(script.group for script in scripts):
        groups = Table()
        for column in ("group", "conversations", "turns below", "capped", "tokens below", "capped", "mean less floor"):
            groups.add_column(column, justify="left" if column == "group" else "right")
        for group in compare.by_group(results, loaded_profile):
            shares = (f"{share:.1%}" for pair in (group.turns, group.tokens) for share in pair)
            low, high = group.interval
            mean = f"{group.mean:.3g} (95 %: {low:.3g} to {high:.3g})"
            groups.add_row(escape(group.name), str(group.conversations), *shares, mean)
        _show("below the floor at the capped layers, uncapped and before the cap of the capped", groups)
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
    plots.draw_trajectories(results, loaded_profile, shown, picture)
    console.print(f"picture: {escape(str(picture))}", soft_wrap=True)


@app.command()
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
    seed: Annotated[int, typer.Option(help="The seed of the sampling.")] = 0,
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
        from axiscap.evaluate import judges, pairs, run
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(f"evaluation needs Inspect: pip install 'axiscap[evaluate]' ({error})") from None
    from axiscap.view import scores, sheet

    sheet.plotly()
    facts: dict[str, Any] = {}
    if garak:
        if len(profiles) != 2:
            raise ValueError(f"--garak compares two reports, got {len(profiles)}")
        runs = [pairs.read_garak(name, Path(name)) for name in profiles]
        facts["reports"] = profiles
    else:
        options = run.Options(
            tasks=[name for name in tasks.split(",") if name] or run.OWN,
            behaviours=behaviours,
            harmless=harmless,
            personas=personas,
            judge=judge,
            attempts=(64 if quick else run.Options.attempts) if attempts is None else attempts,
            first_turn=first_turn,
            max_tokens=64 if quick and max_tokens is None else max_tokens,
            epochs=epochs,
            limit=limit,
            seed=seed,
        )
        sides = (
            run.local_sides(model, dtype, batch_size, [Path(name) for name in profiles])
            if base_url is None
            else run.served_sides(model, base_url, engine, profiles)
        )
        runs = run.run(sides, options, out, batch_size)
        facts = {"model": model, **{f"run {side.name}": dict(side.arguments) for side in sides}, **options.facts()}
    before, *others = runs
    found = {one.name: pairs.compare(before, one, [name for name in lower.split(",") if name]) for one in others}
    notes = judges.notes({one.scorer for differences in found.values() for one in differences})
    for name, differences in found.items():
        table = Table()
        for head in scores.HEADS:
            is_name = head in ("task", "score")
            table.add_column(head, justify="left" if is_name else "right", no_wrap=is_name or head == "95 %")
        for one in differences:
            table.add_row(*map(escape, scores.cells(one)))
        _show(f"{name} against {before.name}", table)
    for note in notes:
        console.print(escape(note))
    out.mkdir(parents=True, exist_ok=True)
    kept = {name: [pairs.described(one) for one in differences] for name, differences in found.items()}
    (out / "scores.json").write_text(json.dumps({"before": before.name, **facts, "after": kept}, indent=1), "utf-8")
    scores.write(out / "scores.html", found, before.name, notes, facts)
    console.print(f"wrote {escape(str(out / 'scores.json'))} and {escape(str(out / 'scores.html'))}", soft_wrap=True)
    dropped = [
        f"{one.task}, {one.scorer} under {name} by {one.worst_drop:.3f}"
        for name, differences in found.items()
        for one in differences
        if at_most_drop is not None and one.worst_drop > at_most_drop
    ]
    if dropped:
        console.print("[red]worse by more than allowed, failed answers counted as worse:[/red]")
        for line in dropped:
            console.print(f"  {escape(line)}")
        raise typer.Exit(3)


@app.command()
def verify(
    url: Annotated[
        str, typer.Argument(help="The URL of a running vLLM or SGLang server, such as http://localhost:8000.")
    ],
    profile: Annotated[str, typer.Option(help="The profile that the server should apply: a file or a URL.")],
    api_key: Annotated[
        str | None, typer.Option(envvar="OPENAI_API_KEY", help="The API key of the server, if it has one.")
    ] = None,
    admin_key: Annotated[
        str | None,
        typer.Option(
            envvar="AXISCAP_ADMIN_KEY",
            help="The admin key that the server was started with, if it has one. With it, the profile is loaded once "
            "more for a moment, with floors far above its own, to see their effect.",
        ),
    ] = None,
) -> None:
    """Check that a running server caps under a profile, and that the cap has an effect. Exits with status 1 if not.

    For probes and CI: a server without the plug-in answers requests, too, but uncapped. The effect is seen in the
    log-probabilities of the same tokens uncapped, under another profile, or under floors far above; where the server
    allows a client none of these, the command says so.
    """
    from axiscap.serving import verify as serving

    source = str(Path(profile).absolute()) if Path(profile).exists() else profile
    keys = {"api_key": api_key, "admin_key": admin_key}
    for found in serving.verify(url, CapProfile.load(profile), source=source, **keys):
        console.print(escape(found), soft_wrap=True)


@app.command()
def rollout(
    name: Annotated[str, typer.Argument(help="The name of the profile in the servers, such as that of the default.")],
    profile: Annotated[
        str,
        typer.Argument(
            help="The profile: a path or a URL that the servers can read. #DIGEST behind it pins the content."
        ),
    ],
    urls: Annotated[list[str], typer.Argument(help="The URLs of the replicas.")],
    admin_key: Annotated[
        str, typer.Option(envvar="AXISCAP_ADMIN_KEY", help="The admin key that the servers were started with.")
    ],
) -> None:
    """Load a profile into running replicas, one after the other. Exits with status 0 if all of them have it.

    A request that has begun keeps the old content. If a replica fails, the others go on; run the command again for the
    rest.
    """
    from axiscap.serving import verify as serving

    failed = 0
    for url in urls:
        try:
            console.print(escape(f"{url}: {name} is {serving.roll_out(url, name, profile, admin_key)}"), soft_wrap=True)
        except serving.NotCapped as error:
            failed += 1
            console.print(f"[red]{escape(url)}: {escape(str(error))}[/red]", soft_wrap=True)
    console.print(f"{len(urls) - failed} of {len(urls)} replicas have it")
    if failed:
        raise typer.Exit(1)


@app.command()
def bench(
    out: Annotated[
        Path, typer.Option(help="The file to write, with every figure (JSON).", callback=_with_folder)
    ] = Path("bench.json"),
    picture: Annotated[
        Path | None,
        typer.Option(
            help="The picture to write: the fraction of the memory bound against the number of rows.",
            callback=_with_folder,
        ),
    ] = None,
    model: ModelOption = models.DEFAULT_MODEL,
    quick: Annotated[bool, typer.Option(help="Measure one size and dtype, with few repetitions.")] = False,
    decode: Annotated[bool, typer.Option(help="Also measure the decoding speed of a real model, on the CPU.")] = True,
    device: Annotated[str, typer.Option(help="The device to measure: cpu or cuda.")] = "cpu",
) -> None:
    """Measure the kernels against eager torch, torch.compile, the published hook and the memory bound."""
    # What would fail at the end fails before the minutes of work.
    if device not in ("cpu", "cuda"):
        raise ValueError(f"--device must be cpu or cuda, got {device}")
    if device == "cuda":
        bench_module.check_cuda()
    if picture:
        from axiscap.view import plots

        plots.pyplot()
    with _progress() as progress:
        results = bench_module.measure(progress, quick=quick, model=model if decode else None, device=device)
    bench_module.print_tables(console, results)
    out.write_text(json.dumps(results, indent=1) + "\n")
    console.print(f"figures: {escape(str(out))}", soft_wrap=True)
    if picture:
        plots.draw_bench(results, picture)
        console.print(f"picture: {escape(str(picture))}", soft_wrap=True)


@app.command()
def doctor() -> None:
    """Check the installation: the machine, torch, the kernels and the extras, with a fix for each problem."""
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
