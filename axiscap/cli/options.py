"""Options that several commands share, and how their texts are read."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

import typer

from axiscap import CapProfile


def make_folder(path: Path | None) -> Path | None:
    """Creates the folder of an output file, so that its absence does not end a long run at the last step."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
    return path


ModelOption = Annotated[str, typer.Option(help="The model: a local folder or a hub name.")]
ProfileArgument = Annotated[
    str, typer.Argument(help="The profile: a file or a URL, such as hf://org/name/profile.safetensors.")
]
ProfileOutput = Annotated[Path, typer.Argument(help="The profile to write.", callback=make_folder)]
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
WorkOption = Annotated[Path | None, typer.Option(help="Ordinary requests (JSONL). Default: AxisCap's own requests.")]
PublishedOption = Annotated[
    bool, typer.Option("--published", help="Use the published convention: the 75th percentile of the pooled answers.")
]
FictionBudgetOption = Annotated[float, typer.Option(help="The same for stories, poems and dialogue.")]
SeedOption = Annotated[int, typer.Option(help="The seed of the sampling.")]
AnswerTokensOption = Annotated[int, typer.Option(help="The most tokens of an answer.")]

#: Percentile and population. The paper's "p0.25" is the 25th percentile on the negated axis.
PUBLISHED = (75.0, "pooled")


def parse_layers(text: str) -> list[int]:
    """``17-24`` or ``17,18,20``."""
    if "-" in text:
        ((first, last),) = parse_bands(text, "--layers")
        return list(range(first, last + 1))
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"--layers must look like 17-24 or 17,18,20, got {text}") from None


def parse_bands(text: str, option: str) -> list[tuple[int, int]]:
    """``12-19,14-21``."""
    matches = [re.fullmatch(r"\s*(\d+)-(\d+)\s*", part) for part in text.split(",")]
    bands = [(int(match[1]), int(match[2])) for match in matches if match is not None]
    if len(bands) < len(matches) or any(first > last for first, last in bands):
        raise ValueError(f"{option} must look like 17-24, first to last, got {text}")
    return bands


def parse_numbers(text: str, option: str) -> list[float]:
    """``2,4,6``."""
    try:
        return [float(number) for number in text.split(",")]
    except ValueError:
        raise ValueError(f"{option} must be numbers, such as 2,4,6, got {text}") from None


def parse_settings(profile: CapProfile, bands: str, percentiles: str, targets: str, population: str) -> list[Any]:
    """The settings that the options describe. Raises before anything is measured if a setting is invalid."""
    from axiscap.calibrate import sweep

    default_percentiles, default_targets = sweep.defaults(population)
    settings = sweep.settings_to_try(
        parse_bands(bands, "--bands") if bands else [(profile.layers[0], profile.layers[-1])],
        parse_numbers(percentiles, "--percentiles") if percentiles else default_percentiles,
        parse_numbers(targets, "--targets") if targets else default_targets,
    )
    if not settings:
        raise ValueError("no target lies above a percentile")
    for setting in settings:
        setting.of(profile, population)
    return settings


def load_plan(roles: Path | None, questions: Path | None, per_role: int, model: str) -> Any:
    """The calibration's plan for the roles and questions of the options."""
    from axiscap import calibrate

    loaded_roles = calibrate.load_roles(roles, model_name=Path(model).name)
    return calibrate.plan(loaded_roles, calibrate.load_questions(questions), per_role or None)


def floor_rule(
    percentile: float | None, target: float | None, population: str | None, published: bool, default: str
) -> tuple[float, float | None, str]:
    """Percentile, target percentile and population. ``default``: the population if none is named."""
    if published:
        return PUBLISHED[0], target, PUBLISHED[1]
    population = population or default
    if percentile is None and population == "ordinary tokens":
        return 4.0, 15.0 if target is None else target, population
    return 25.0 if percentile is None else percentile, target, population


def describe_percentiles(percentile: float, target: float | None) -> str:
    return f"percentile {percentile:g}" + ("" if target is None else f", lifted to percentile {target:g}")
