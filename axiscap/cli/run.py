"""``axiscap run``: conversations that are generated twice, uncapped and capped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from axiscap import CapProfile, models
from axiscap.cli.console import console, print_line, print_table
from axiscap.cli.options import AnswerTokensOption, ModelOption, ProfileArgument, make_folder


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
        Path, typer.Option(help="The picture of the trajectories to write.", callback=make_folder)
    ] = Path("drift.png"),
    max_new_tokens: AnswerTokensOption = 48,
    transcripts: Annotated[
        Path | None,
        typer.Option(help="A file to write both sides to, as JSONL for `axiscap replay`.", callback=make_folder),
    ] = None,
) -> None:
    """Run conversations with a model, uncapped and capped side by side, and draw their path along the axis."""
    from axiscap.drift import compare
    from axiscap.view import plots

    # A missing package and an unwritable file must fail before the minutes of work.
    plots.pyplot()
    if transcripts:
        transcripts.write_text("")
    loaded_profile = CapProfile.load(profile)
    scripts = compare.load_scripts(conversations)
    loaded, tokenizer = models.load(model)
    layer_index = len(loaded_profile.layers) // 2
    results = []
    for script in scripts:
        with console.status(f"generating the conversation '{script.name}' twice"):
            result = compare.compare(loaded, tokenizer, loaded_profile, script, max_new_tokens=max_new_tokens)
        results.append(result)
        if transcripts:
            _append_transcripts(transcripts, result)
        _print_conversation(result, loaded_profile, layer_index)
    _print_results(results, loaded_profile)
    plots.draw_trajectories(results, loaded_profile, layer_index, picture)
    print_line(f"picture: {picture}")


def _append_transcripts(path: Path, result: Any) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(entry) + "\n" for entry in result.transcripts())


def _print_conversation(result: Any, profile: CapProfile, layer_index: int) -> None:
    from axiscap.view import tables

    layer, floor = profile.layers[layer_index], profile.floors[layer_index, 0].item()
    print_table(f"conversation: {result.conversation.name}", tables.answer_table(result))
    print_table(
        f"mean projection of each answer before the cap, layer {layer}; floor {floor:.4g}",
        tables.mean_table(result, layer_index, floor),
    )


def _print_results(results: list[Any], profile: CapProfile) -> None:
    from axiscap.view import tables

    print_table(
        "rows fired in the capped conversations (prompts included)", tables.fired_table(results, profile.layers)
    )
    if any(result.conversation.group for result in results):
        print_table(
            "below the floor at the capped layers, uncapped and before the cap of the capped",
            tables.below_table(results, profile),
        )
    print_table("generated tokens per second (prompts included; one run, so noisy)", tables.speed_table(results))
