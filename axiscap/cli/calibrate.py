"""``axiscap calibrate``: from a model to a profile."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import Progress

from axiscap import models
from axiscap.cli.console import Stages, console, print_line, print_table, progress_bar
from axiscap.cli.options import (
    AnswerTokensOption,
    ModelOption,
    PopulationOption,
    ProfileOutput,
    PublishedOption,
    QuestionsOption,
    RolesOption,
    SeedOption,
    TargetOption,
    WorkOption,
    describe_percentiles,
    floor_rule,
    load_plan,
)

_ENGINES = ("transformers", "vllm", "endpoint", "ray")
MethodOption = Annotated[
    str,
    typer.Option(
        help="How to compute the axis. discriminant: the direction that separates roles from ordinary work. "
        "difference: the published mean difference."
    ),
]


def calibrate(
    out: ProfileOutput,
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
            help="The percentile of the population at which the floors lie. Default: 4 of ordinary tokens, lifted to "
            "15, or 25 of another population."
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
    max_new_tokens: AnswerTokensOption = 40,
    dtype: Annotated[
        str, typer.Option(help="The dtype of the weights. auto: that of the files on a GPU, float32 on a CPU.")
    ] = "auto",
    seed: SeedOption = 0,
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

    if engine not in _ENGINES:
        raise ValueError(f"--engine must be transformers, vllm, endpoint or ray, got {engine}")
    ordinary_work = _load_ordinary_work(method, work)
    default = "assistant" if ordinary_work is None else "ordinary tokens"
    percentile, target, population = floor_rule(percentile, target, population, published, default)
    plan = load_plan(roles, questions, per_role, model)
    answer_folder = out.with_suffix(".rollouts")
    loaded, tokenizer = models.load(model, dtype)
    answering = "transformers" if engine == "ray" else engine  # a Ray worker answers as this process does
    settings = calibration.Settings(model, str(loaded.dtype), max_new_tokens, seed, answering)
    store = calibration.Store(rollouts or str(answer_folder), settings)
    with console.status("finding attention sinks"):
        limits = calibration.find_norm_limits(loaded, tokenizer, plan, store, ordinary_work).limits
    settings = dataclasses.replace(settings, norm_limits=limits)
    store = calibration.Store(store.url, settings)
    crew = _workers(engine, model, loaded, tokenizer, settings, workers)
    with progress_bar(rate=True) as progress:
        stages, keep = Stages(progress), None
        if judge != "none":
            crew.rollouts(store, calibration.batches(plan), lambda done: stages("answers", done, len(plan.tasks)))
            keep = _judge_answers(judge, loaded, tokenizer, store, plan, answer_folder, progress)
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
            progress=stages,
            work=ordinary_work,
        )
    profile.save(out)
    if rollouts is None:
        shutil.rmtree(answer_folder, ignore_errors=True)
    _report(out, profile, f"{population}, {describe_percentiles(percentile, target)}")


def _report(path: Path, profile: Any, floor_rule: str) -> None:
    from axiscap.view import tables

    if profile.evidence is not None:
        print_table("evidence", tables.evidence_table(profile.evidence))
    print_line(f"wrote {path}: layers {profile.layers[0]}-{profile.layers[-1]}, {floor_rule}")


def _load_ordinary_work(method: str, path: Path | None) -> Any:
    """Ordinary work for the discriminant; None for the published method, which does not use it."""
    from axiscap import calibrate as calibration

    if method not in ("discriminant", "difference"):
        raise ValueError(f"--method must be discriminant or difference, got {method}")
    if method == "difference":
        if path is not None:
            raise ValueError("--work is for --method discriminant; the published method knows no ordinary work")
        return None
    return calibration.load_work(path)


def _workers(engine: str, model: str, loaded: Any, tokenizer: Any, settings: Any, count: int) -> Any:
    """The processes that answer and read: this one, or Ray workers."""
    from axiscap import calibrate as calibration

    if engine == "ray":
        return calibration.RayWorkers(model, count, gpus=int(loaded.device.type == "cuda"))
    engines = {"vllm": calibration.VllmEngine, "endpoint": calibration.EndpointEngine}
    return calibration.Here(engines.get(engine, calibration.TransformersEngine)(loaded, tokenizer, settings))


def _judge_answers(
    judge: str, model: Any, tokenizer: Any, store: Any, plan: Any, folder: Path, progress: Progress
) -> Any:
    """The filter of answers by the scores of a judge."""
    from axiscap import calibrate as calibration
    from axiscap.calibrate import judge as judges

    ask = judges.local(model, tokenizer) if judge == "local" else judges.endpoint(judge)
    task = progress.add_task(f"judged by {judge}", total=len(plan.tasks))
    scores = judges.scores(
        ask,
        store.shards(calibration.batches(plan)),
        plan.roles,
        folder / f"scores-{judge.replace('/', '_')}.jsonl",
        lambda count: progress.advance(task, count),
        **({"concurrent": 1} if judge == "local" else {}),
    )
    return calibration.Keep(scores)
