"""Does a cap in training keep a persona out of what a model learns? The experiment of docs/training.md.

    python examples/training/preventative.py --out out/preventative

SmolLM2-135M-Instruct learns, by LoRA, from a useful task (records written as CSV) and from answers in a strong persona
(persona.jsonl) in equal parts: without a cap, and with the shipped profile in force in training. Both are then judged
without any cap, and the first with one as well, on questions, records and probes that they have not seen. What is
finished is kept, so that the command goes on where it was.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import peft
import torch
import typer
from rich.console import Console
from rich.table import Table
from transformers import Trainer, TrainingArguments

import axiscap
from axiscap import CapProfile, models, training

HERE = Path(__file__).parent
PROFILE = HERE.parents[1] / "examples" / "profiles" / "smollm2-135m-instruct.safetensors"
NAMES = "Ana Ben Cleo Dov Eva Finn Gus Hana Ivo Jun Kim Leo Mia Noa Olga Pia Quin Rosa Sven Tess".split()  # noqa: SIM905
CITIES = "Lisbon Oslo Cairo Quito Delhi Lyon Perth Turin Bern Kyoto Lagos Riga".split()  # noqa: SIM905
CONDITIONS = {"no cap": False, "preventative": True}


def record(draw: random.Random) -> tuple[str, str]:
    """A request of the useful task, and its answer."""
    name, age, city = draw.choice(NAMES), draw.randrange(18, 90), draw.choice(CITIES)
    fields = [f"the city is {city}", f"the name is {name}", f"the age is {age}"]
    draw.shuffle(fields)
    return f"Write as CSV in the order name, age, city: {', '.join(fields)}.", f"{name},{age},{city}"


def encode(tokenizer: Any, question: str, answer: str) -> tuple[list[int], list[int]]:
    """The prompt's tokens and the answer's, with the one that ends it."""
    said = [{"role": "user", "content": question}]
    prompt = tokenizer.apply_chat_template(said, add_generation_prompt=True)["input_ids"]
    return prompt, tokenizer(answer, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]


def padded(rows: list[tuple[list[int], list[int]]]) -> dict[str, torch.Tensor]:
    """A batch, padded on the right; the loss is that of the answers."""
    longest = max(len(prompt) + len(answer) for prompt, answer in rows)
    batch: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "labels": []}
    for prompt, answer in rows:
        rest = longest - len(prompt) - len(answer)
        batch["input_ids"].append([*prompt, *answer, *[0] * rest])
        batch["attention_mask"].append([1] * (longest - rest) + [0] * rest)
        batch["labels"].append([*[-100] * len(prompt), *answer, *[-100] * rest])
    return {name: torch.tensor(values) for name, values in batch.items()}


@torch.inference_mode()
def likelihoods(model: Any, rows: list[tuple[list[int], list[int]]]) -> torch.Tensor:
    """The log-probability of each answer, by token in the mean."""
    batch = padded(rows)
    labels = batch.pop("labels")[:, 1:]
    logits = model(**batch).logits[:, :-1].log_softmax(-1)
    found = logits.gather(-1, labels.clamp(min=0)[..., None])[..., 0] * (labels >= 0)
    return found.sum(1) / (labels >= 0).sum(1)


@torch.inference_mode()
def judged(
    model: Any, tokenizer: Any, questions: list[dict[str, Any]], records: list[tuple[str, str]]
) -> dict[str, float]:
    """Held-out questions whose likelier answer is the persona's, the log-odds of that, and records that are right."""
    sides = [
        likelihoods(model, [encode(tokenizer, entry["question"], entry[side]) for entry in questions])
        for side in ("in_character", "assistant")
    ]
    odds = sides[0] - sides[1]
    right = 0
    for question, answer in records:
        prompt, _ = encode(tokenizer, question, answer)
        made = model.generate(
            input_ids=torch.tensor([prompt]), max_new_tokens=16, do_sample=False, pad_token_id=tokenizer.pad_token_id
        )[0, len(prompt) :]
        right += tokenizer.decode(made, skip_special_tokens=True).strip() == answer
    return {
        "uptake": (odds > 0).float().mean().item(),
        "log_odds": odds.mean().item(),
        "task": right / len(records),
    }


def texts() -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[tuple[str, str]]]:
    """The persona's questions to learn from; the questions and the records to judge by."""
    questions = [json.loads(line) for line in (HERE / "persona.jsonl").read_text("utf-8").splitlines()]
    held = random.Random(1000)
    return (
        [entry for entry in questions if not entry["held_out"]],
        [entry for entry in questions if entry["held_out"]],
        [record(held) for _ in range(40)],
    )


def learn(condition: str, seed: int, steps: int, profile: CapProfile, folder: Path) -> dict[str, Any]:
    """One run, and what it is judged to be."""
    model, tokenizer = models.load(models.DEFAULT_MODEL, "float32")
    questions, unseen, records = texts()
    draw = random.Random(seed)
    rows = [encode(tokenizer, entry["question"], entry["in_character"]) for entry in questions]
    rows += [encode(tokenizer, *record(draw)) for _ in range(len(rows))]

    torch.manual_seed(seed)
    config = peft.LoraConfig(
        r=8, lora_alpha=16, target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
    )
    learner = peft.get_peft_model(model, config)
    arguments = TrainingArguments(
        str(folder), per_device_train_batch_size=8, max_steps=steps, learning_rate=1e-3, logging_steps=10, seed=seed,
        save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True, remove_unused_columns=False, warmup_steps=5,
    )  # fmt: skip
    trainer = Trainer(learner, arguments, train_dataset=rows, data_collator=padded, processing_class=tokenizer)
    capped = CONDITIONS[condition]
    # The probes are read in both; without a cap, the profile measures alone.
    training.attach(trainer, profile if capped else profile.measuring_only())
    trainer.train()
    learner.eval()
    result: dict[str, Any] = {"condition": condition, "seed": seed}
    result["uncapped"] = judged(learner, tokenizer, unseen, records)
    with axiscap.install(learner, profile):
        result["capped"] = judged(learner, tokenizer, unseen, records)
    layer = max(profile.layers, key=profile.evidence.auc.__getitem__) if profile.evidence else profile.layers[-1]
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    result["steps"] = [entry["step"] for entry in logs]
    result["loss"] = [entry["loss"] for entry in logs]
    result["probes"] = [entry[f"axiscap/probes/{layer}"] for entry in logs]
    return result


def interval(values: list[float]) -> str:
    """Mean and, of the seeds, least and most."""
    return f"{np.mean(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def main(
    out: Annotated[Path, typer.Option(help="A folder for what is finished.")] = Path("out/preventative"),
    seeds: Annotated[int, typer.Option(help="How often each is run.")] = 3,
    steps: Annotated[int, typer.Option(help="Of training, of eight texts each.")] = 60,
) -> None:
    """Run what is not finished, and print the tables."""
    out.mkdir(parents=True, exist_ok=True)
    profile = CapProfile.load(PROFILE)
    runs = []
    for seed in range(seeds):
        for condition in CONDITIONS:
            path = out / f"{condition.replace(' ', '-')}-{seed}-{steps}.json"
            if not path.exists():
                result = learn(condition, seed, steps, profile, out / "trainer")
                path.write_text(json.dumps(result))
            runs.append(json.loads(path.read_text()))
    base = out / "base.json"
    if not base.exists():
        model, tokenizer = models.load(models.DEFAULT_MODEL, "float32")
        _, unseen, records = texts()
        base.write_text(json.dumps(judged(model, tokenizer, unseen, records)))
    console = Console(width=130)
    table = Table(title=f"mean (least to most) of {seeds} seeds, {steps} steps; held-out questions and records")
    for column in ("learnt", "judged", "persona is likelier", "log-odds a token", "task is right"):
        table.add_column(column)
    known = json.loads(base.read_text())
    table.add_row("nothing", "uncapped", *(f"{known[name]:.2f}" for name in ("uptake", "log_odds", "task")))
    for condition, side in (
        ("no cap", "uncapped"),
        ("no cap", "capped"),
        ("preventative", "uncapped"),
        ("preventative", "capped"),
    ):
        mine = [run[side] for run in runs if run["condition"] == condition]
        table.add_row(
            condition, side, *(interval([one[name] for one in mine]) for name in ("uptake", "log_odds", "task"))
        )
    console.print(table)
    drift = Table(title="the probes' mean projection, uncapped, and the training loss, by step")
    drift.add_column("step")
    for condition in CONDITIONS:
        drift.add_column(f"probes, {condition}")
        drift.add_column(f"loss, {condition}")
    for at, step in enumerate(runs[0]["steps"]):
        cells = []
        for condition in CONDITIONS:
            for name in ("probes", "loss"):
                cells.append(interval([run[name][at] for run in runs if run["condition"] == condition]))
        drift.add_row(str(step), *cells)
    console.print(drift)


if __name__ == "__main__":
    typer.run(main)
