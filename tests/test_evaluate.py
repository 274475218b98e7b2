"""Other people's frameworks run a capped model: by their own commands, on the default model."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY

from axiscap import CapProfile

SHIPPED = REPOSITORY / "examples" / "profiles" / "smollm2-135m-instruct.safetensors"
TASK = """
from inspect_ai import Task, task
from inspect_ai.dataset import Sample
from inspect_ai.scorer import includes
from inspect_ai.solver import generate, system_message, user_message

@task
def people():
    asked = ["Who are you?", "What is 2 + 3? Answer with the number.", "What do you fear?"]
    samples = [Sample(input=text, target="5", id=f"q{n}") for n, text in enumerate(asked)]
    turns = [generate(), user_message("And what else?"), generate()]
    return Task(dataset=samples, solver=[system_message("You are a ghost."), *turns], scorer=includes())
"""


def run(*command: object, folder: Path) -> str:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder)}
    done = subprocess.run([*map(str, command)], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def off(folder: Path) -> Path:
    """The shipped profile, which looks at every row and changes none."""
    shipped = CapProfile.load(SHIPPED)
    path = folder / "off.safetensors"
    shipped.measuring_only().save(path)
    return path


# Inspect


def inspect_eval(folder: Path, *more: object) -> dict[tuple[str, int], dict]:
    """The real command on a task of two turns; its samples, by name and epoch."""
    (folder / "task.py").write_text(TASK)
    logs = folder / f"logs{len(list(folder.glob('logs*')))}"
    arguments = ["--epochs", 2, "--max-tokens", 12, "--temperature", 0.8, "--top-p", 0.95, "--seed", 5]
    arguments += ["--display", "none", "--log-format", "json", "--log-dir", logs]
    program = Path(sys.executable).with_name("inspect")
    run(program, "eval", "task.py", "--model", "axiscap/smollm2-135m-instruct", *arguments, *more, folder=folder)
    (log,) = logs.glob("*.json")
    found = json.loads(log.read_text())
    assert found["status"] == "success"
    return {(sample["id"], sample["epoch"]): sample for sample in found["samples"]}


def answers(sample: dict) -> list[str]:
    return [message["content"] for message in sample["messages"] if message["role"] == "assistant"]


@pytest.mark.slow
def test_inspect_runs_a_capped_model_and_pairs_are_pairs(tmp_path):
    plain = inspect_eval(tmp_path)
    # Whatever stands beside a sample: one at a time, the same answers.
    alone = inspect_eval(tmp_path, "-M", "batch_size=1", "--max-connections", 1, "-M", f"profile={off(tmp_path)}")
    capped = inspect_eval(tmp_path, "-M", f"profile={SHIPPED}")
    layers = {str(layer) for layer in CapProfile.load(SHIPPED).layers}
    assert len(plain) == len(alone) == len(capped) == 6
    for name, sample in plain.items():
        assert answers(sample) == answers(alone[name])
        assert "axiscap" not in sample["metadata"]
        for run_of, fires in ((alone, False), (capped, True)):
            first, second = run_of[name]["metadata"]["axiscap"]
            assert set(first) == set(second) == layers
            # The second prompt has the first, its answer and a turn more; a sink is never looked at.
            assert all(first[layer]["rows"] < second[layer]["rows"] for layer in layers)
            assert all(one["lowest"] <= one["mean"] for one in first.values())
            assert fires == any(one["fired"] for one in first.values())
    assert any(answers(plain[name]) != answers(capped[name]) for name in plain)
    # Epochs draw anew.
    assert any(answers(plain[f"q{n}", 1]) != answers(plain[f"q{n}", 2]) for n in range(3))


@pytest.mark.slow
def test_inspect_counts_the_rows_of_an_answer(tmp_path):
    """As many as the tokens of prompt and answer, less the sink and the last, which is never fed back."""
    found = inspect_eval(tmp_path, "-M", f"profile={off(tmp_path)}")
    for sample in found.values():
        usage = [event["output"]["usage"] for event in sample["events"] if event["event"] == "model"]
        assert len(usage) == 2
        for one, counted in zip(usage, sample["metadata"]["axiscap"], strict=True):
            assert {layer["rows"] for layer in counted.values()} == {one["total_tokens"] - 2}


# The lm-evaluation-harness

YAML = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {data}
test_split: train
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
"""


def lm_eval(folder: Path, arguments: str, *more: object) -> dict[str, dict]:
    out = folder / f"out{len(list(folder.glob('out*')))}"
    command = [sys.executable, "-m", "axiscap.evaluate.lm_eval", "--model", "axiscap", "--include_path", folder]
    command += ["--model_args", f"pretrained=smollm2-135m-instruct,dtype=float32{arguments}", "--log_samples"]
    run(*command, "--tasks", "facts,said", "--output_path", out, "--batch_size", 4, *more, folder=folder)
    samples = {}
    for path in out.rglob("samples_*.jsonl"):
        for line in path.read_text().splitlines():
            sample = json.loads(line)
            samples[f"{path.name.split('_')[1]} {sample['doc_id']}"] = sample["resps"]
    return samples


@pytest.mark.slow
def test_lm_eval_runs_a_capped_model(tmp_path):
    data = tmp_path / "facts.jsonl"
    lines = (REPOSITORY / "axiscap" / "data" / "choices.jsonl").read_text().splitlines()[:6]
    data.write_text("\n".join(lines) + "\n")
    choices = """
        output_type: multiple_choice
        doc_to_choice: "{{choices}}"
        doc_to_target: "{{answer}}"
        metric_list: [{metric: acc}]
    """
    said = """
        output_type: generate_until
        doc_to_target: "{{choices[answer]}}"
        generation_kwargs: {until: ["\\n"], max_gen_toks: 12, do_sample: false}
        metric_list: [{metric: exact_match}]
    """
    for name, more in (("facts", choices), ("said", said)):
        (tmp_path / f"{name}.yaml").write_text(YAML.format(name=name, data=data) + textwrap.dedent(more))
    strict = tmp_path / "strict.safetensors"
    shipped = CapProfile.load(SHIPPED)
    floors = torch.full_like(shipped.floors, 60.0)
    CapProfile(shipped.layers, shipped.axes, floors, lifts=shipped.lifts, limits=shipped.limits).save(strict)
    plain, measured = lm_eval(tmp_path, ""), lm_eval(tmp_path, f",profile={off(tmp_path)}")
    capped = lm_eval(tmp_path, f",profile={strict}")
    assert len(plain) == 12
    assert plain == measured
    assert all(plain[name] != capped[name] for name in plain if name.startswith("facts"))
    assert any(plain[name] != capped[name] for name in plain if name.startswith("said"))
    values = [float(value[0][0]) for name, resps in capped.items() if name.startswith("facts") for value in resps]
    assert not any(map(math.isnan, values))
