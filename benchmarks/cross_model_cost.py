"""The cost and the hold of floors and targets on answers that another model gave.

    python benchmarks/cross_model_cost.py PROFILE SETTINGS --model MODEL --answers OTHER --rollouts STORE --per-role N

`axiscap sweep` measures costs on the model's own samples. Every change of a model makes its own samples less likely, so
that those costs are upper bounds. Here the texts are another model's answers to the held-out requests of ordinary work,
which a calibration of that model keeps in STORE: four of each domain, 200 tokens at most.

SETTINGS are percentiles of floors and targets, such as 0.5/15,4/15.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table

from axiscap import CapProfile, calibrate, install, models
from axiscap.calibrate.effects import DomainCost, Holds, losses, worst
from axiscap.calibrate.work import shards

PER_DOMAIN, LONGEST, SHORTEST = 4, 200, 20

Texts = dict[str, list[tuple[list[int], list[int]]]]


def load_answers(options: argparse.Namespace, work: calibrate.Work, engine: calibrate.TransformersEngine) -> Texts:
    """The other model's answers, as prompts and tokens of the model that is measured, by domain."""
    other, tokenizer = models.load(options.answers, options.answers_dtype)
    settings = calibrate.Settings(options.answers, str(other.dtype))
    roles = calibrate.load_roles(model_name=Path(options.answers).name)
    plan = calibrate.plan(roles, calibrate.load_questions(), options.per_role)
    limits = calibrate.find_norm_limits(other, tokenizer, plan, calibrate.Store(options.rollouts, settings), work)
    store = calibrate.Store(options.rollouts, dataclasses.replace(settings, norm_limits=limits.limits))
    texts: Texts = {}
    for shard in shards(work, store):
        for task, tokens, text in zip(shard.tasks, shard.answers, shard.texts, strict=True):
            answers = texts.setdefault(work.domain(task), [])
            if work.is_held_out(task) and len(tokens) >= SHORTEST and len(answers) < PER_DOMAIN:
                ids = engine.tokenizer(text, add_special_tokens=False)["input_ids"][:LONGEST]
                answers.append((engine.prompts([task])[0], ids))
    return {domain: answers for domain, answers in texts.items() if answers}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("profile")
    parser.add_argument("settings")
    parser.add_argument("--model", default=models.DEFAULT_MODEL)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--answers", required=True)
    parser.add_argument("--answers-dtype", default="auto")
    parser.add_argument("--rollouts", required=True)
    parser.add_argument("--per-role", type=int, default=16)
    options = parser.parse_args()
    model, tokenizer = models.load(options.model, options.dtype)
    engine = calibrate.TransformersEngine(model, tokenizer, calibrate.Settings(options.model, str(model.dtype)))
    work = calibrate.load_work()
    texts = load_answers(options, work, engine)
    uncapped = {domain: losses(model, answers)[0] for domain, answers in texts.items()}
    holds = Holds(model, engine)
    profile = CapProfile.load(options.profile)
    table = Table("setting", title=f"{sum(map(len, texts.values()))} answers of {Path(options.answers).name}")
    for column in ("hold", "mean", "worst domain", "worst fiction"):
        table.add_column(column, justify="right")
    table.add_row("uncapped", f"{holds.taken.mean():.1f}", "1.0000")
    for setting in track(options.settings.split(","), console=Console(stderr=True)):
        percentile, target = map(float, setting.split("/"))
        with install(model, calibrate.with_floors(profile, percentile, "ordinary tokens", target_percentile=target)):
            hold = holds.measure().mean()
            ratios = {d: (losses(model, answers)[0] - uncapped[d]).mean().exp().item() for d, answers in texts.items()}
        costs = {d: DomainCost(ratio, 0.0, 1.0, d in work.fiction) for d, ratio in ratios.items()}
        cells = [f"{ratio:.4f} {domain}" for domain, ratio in (worst(costs, fiction=kind) for kind in (False, True))]
        mean = sum(ratios.values()) / len(ratios)
        table.add_row(f"p{percentile:g} lifted to {target:g}", f"{hold:.1f}", f"{mean:.4f}", *cells)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
