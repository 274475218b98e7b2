"""Calibration: its data, its arithmetic, and a small run of the real thing that is killed and goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest
import torch
from conftest import REPOSITORY

from axiscap import CapProfile, calibrate, models
from axiscap.calibrate import axis, rollouts


def test_the_data_that_ships():
    roles, questions = calibrate.load_roles(), calibrate.load_questions()
    assert len(roles) >= 13
    assert len(set(questions)) == len(questions) >= 24
    for name, role in roles.items():
        assert len(set(role.prompts)) == len(role.prompts) >= 2, name
        assert all(role.prompts) or name == "default"


def test_the_published_layout_is_read(tmp_path):
    for name in ("default", "ghost", "doctor"):
        content = {"instruction": [{"pos": f"You are {name}."}] * 5, "questions": ["?"] * 40, "eval_prompt": "..."}
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    assert list(calibrate.load_roles(tmp_path)) == ["default", "doctor", "ghost"]
    lines = [json.dumps({"question": f"What is {n}?", "id": n}) for n in range(5)]
    (tmp_path / "questions.jsonl").write_text("\n".join(lines) + "\n\n")
    assert calibrate.load_questions(tmp_path / "questions.jsonl")[4] == "What is 4?"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"default.json": "{"}, r"default\.json: not a role"),
        ({"default.json": '{"instruction": []}'}, r"default\.json: the role has no prompt"),
        ({"a.json": '{"instruction": [{"pos": "x"}]}'}, r"no default\.json"),
        (
            {"default.json": '{"instruction": [{"pos": "x"}]}'},
            "at least two roles .* needed, got 0",
        ),
    ],
)
def test_roles_that_are_none(tmp_path, files, message):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        calibrate.load_roles(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [('{"question": "a"}\nnonsense\n', "line 2: not a question"), ('{"question": "a"}\n', "at least four questions")],
)
def test_questions_that_are_none(tmp_path, content, message):
    (tmp_path / "q.jsonl").write_text(content)
    with pytest.raises(ValueError, match=message):
        calibrate.load_questions(tmp_path / "q.jsonl")


def test_auc_is_the_share_of_pairs_in_order():
    low, high = torch.tensor([0.0, 1.0, 2.0]), torch.tensor([1.0, 3.0])
    # Pairs (low, high): (0,1) (0,3) (1,3) (2,3) in order, (1,1) a tie, (2,1) not.
    assert calibrate.auc(low, high).item() == pytest.approx(4.5 / 6)
    assert calibrate.auc(torch.zeros(3, 2), torch.tensor([[1.0, -1.0]])).tolist() == [1.0, 0.0]


@pytest.mark.parametrize(
    ("depth", "count", "best", "expected"),
    [
        (30, 8, range(19, 27), list(range(19, 27))),
        (30, 8, range(8), list(range(15, 23))),  # early layers are not looked at
        (4, 4, range(4), [0, 1, 2, 3]),
        (4, 1, range(3, 4), [3]),
        (2, 2, range(2), [0, 1]),
    ],
)
def test_layers_are_the_best_run_of_the_middle_to_late_ones(depth, count, best, expected):
    separation = torch.zeros(depth)
    separation[list(best)] = 1.0
    assert axis.choose_layers(separation, count) == expected


@pytest.mark.parametrize("count", [0, 31])
def test_a_number_of_layers_that_cannot_be(count):
    with pytest.raises(ValueError, match=f"from 1 to 30, got {count}"):
        axis.choose_layers(torch.zeros(30), count)


def test_a_quarter_is_held_out():
    train, held = axis.split([str(i) for i in range(10)])
    assert held == ["3", "7"]
    assert sorted(train + held) == [str(i) for i in range(10)]


def test_activations_are_the_means_over_exactly_the_answer(demo_model, monkeypatch):
    """What is averaged while generating is what a second pass over the finished text gives."""
    model, tokenizer = demo_model
    generated = []
    generate = model.generate

    def listen(**inputs):
        generated.append((inputs, generate(**inputs)))
        return generated[-1][1]

    monkeypatch.setattr(model, "generate", listen)
    # Three words make some answers end before the limit.
    prompts = [
        rollouts.Prompt("", "Say only: yes."),
        rollouts.Prompt("You are a ghost of few words.", "Who are you? Answer in three words."),
        rollouts.Prompt("", "Tell me a long story about the sea and the people who live by it."),
    ]
    found = rollouts.run(model, tokenizer, prompts, max_new_tokens=24, seed=3)
    ((inputs, tokens),) = generated
    start = inputs["input_ids"].shape[1]
    lengths = []
    for row in range(3):
        real = inputs["attention_mask"][row].sum().item()
        answer = tokens[row, start : start + 24].tolist()
        stop = model.generation_config.eos_token_id
        if stop in answer:
            answer = answer[: answer.index(stop)]
        lengths.append(len(answer))
        whole = torch.cat([inputs["input_ids"][row, start - real :], torch.tensor(answer)])[None]
        outputs = []
        handles = [
            layer.register_forward_hook(lambda m, a, output, outputs=outputs: outputs.append(output))
            for layer in models.decoder_layers(model)
        ]
        with torch.no_grad():
            model(whole)
        for handle in handles:
            handle.remove()
        wanted = torch.stack([output[0, real:].double().mean(0) for output in outputs])
        torch.testing.assert_close(found.activations[row].double(), wanted, atol=2e-3, rtol=1e-3)
        assert found.answers[row] == tokenizer.decode(answer, skip_special_tokens=True).strip()
    assert min(lengths) < 24 == max(lengths)


def small(folder):
    (folder / "roles").mkdir()
    prompts = {
        "default": ["", "You are a helpful assistant."],
        "ghost": ["You are a ghost."],
        "hermit": ["You are a hermit in the desert."],
        "oracle": ["You are an oracle, veiled in smoke."],
        "void": ["You are the void."],
    }
    for name, texts in prompts.items():
        (folder / "roles" / f"{name}.json").write_text(json.dumps({"instruction": [{"pos": text} for text in texts]}))
    things = "rain", "time", "bread", "night", "work", "music", "fear", "salt"
    questions = [f"What do you think of {thing}?" for thing in things]
    (folder / "questions.jsonl").write_text("".join(json.dumps({"question": q}) + "\n" for q in questions))
    return ["--roles", str(folder / "roles"), "--questions", str(folder / "questions.jsonl"), "--max-new-tokens", "4"]


def run_command(*arguments):
    command = [sys.executable, "-c", "from axiscap.cli import main; main()", "calibrate", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=REPOSITORY)


def test_a_calibration_that_is_killed_goes_on(tmp_path, demo_model):
    options = small(tmp_path)
    whole = run_command(tmp_path / "whole.safetensors", *options)
    output, _ = whole.communicate()
    assert whole.returncode == 0, output
    assert "separation from the default on held-out roles and questions" in output
    assert "36/36" in output.replace(" ", "")

    killed = run_command(tmp_path / "killed.safetensors", *options)
    work = tmp_path / "killed.rollouts"
    while not list(work.glob("*.safetensors")):
        assert killed.poll() is None, killed.stdout.read()
        time.sleep(0.05)
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    assert not (tmp_path / "killed.safetensors").exists()
    finished = {path: path.stat().st_mtime_ns for path in work.glob("*.safetensors")}
    # A batch whose writing was cut off counts for nothing, and a damaged one is made again.
    (work / "half.partial").write_bytes(b"half")

    again = run_command(tmp_path / "killed.safetensors", *options)
    while again.poll() is None:
        for path, time_ns in finished.items():
            if path.exists():
                assert path.stat().st_mtime_ns == time_ns, "a finished batch was made again"
        time.sleep(0.05)
    assert again.returncode == 0, again.stdout.read()
    first, second = (CapProfile.load(tmp_path / f"{name}.safetensors") for name in ("whole", "killed"))
    assert first.layers == second.layers
    for name in ("axes", "floors", "axis_all", "quantiles"):
        assert torch.equal(getattr(first, name), getattr(second, name))
    assert not work.exists()


def test_what_a_profile_says_of_its_making(tmp_path, demo_model):
    model, tokenizer = demo_model
    small(tmp_path)
    roles = calibrate.load_roles(tmp_path / "roles")
    questions = calibrate.load_questions(tmp_path / "questions.jsonl")
    seen: list[int] = []
    result = calibrate.calibrate(
        model, tokenizer, roles, questions, model_id="m", percentile=10, count=3, max_new_tokens=3, progress=seen.append
    )
    profile = result.profile
    facts = profile.provenance
    # 2 prompts x 8 questions for the default, 6 for each of three roles, 2 for the one held out.
    assert sum(seen) == 16 + 3 * 6 + 2
    assert facts["model"] == {"id": "m", "architecture": "LlamaForCausalLM", "hidden_size": 576, "num_layers": 30}
    assert facts["floors"] == {"population": "assistant, answer means", "percentile": 10, "count": 16}
    assert facts["axis"]["roles"] == ["ghost", "hermit", "oracle"]
    assert facts["separation"]["roles"] == ["void"]
    assert len(profile.layers) == 3
    assert profile.axis_all is not None
    assert profile.quantiles is not None
    column = facts["quantiles"]["percentiles"].index(10.0)
    torch.testing.assert_close(profile.quantiles[list(profile.layers), column], profile.floors[:, 0])
    torch.testing.assert_close(profile.axis_all[list(profile.layers)], profile.axes[:, 0])
    with pytest.raises(ValueError, match="percentile must be between 0 and 100, got 100"):
        calibrate.calibrate(model, tokenizer, roles, questions, model_id="m", percentile=100)


def test_a_base_model_is_refused_with_a_sentence(demo_model, monkeypatch):
    model, tokenizer = demo_model
    monkeypatch.setattr(tokenizer, "chat_template", None)
    with pytest.raises(ValueError, match="the tokenizer has no chat template"):
        rollouts.run(model, tokenizer, [rollouts.Prompt("", "Hello")])


def test_templates_without_a_system_role_get_the_prompt_with_the_question():
    class Template:
        def apply_chat_template(self, messages, tokenize):
            if messages[0]["role"] == "system":
                raise RuntimeError("system role not supported")

    assert not rollouts._accepts_system_role(Template())
    messages = rollouts.Prompt("You are a ghost.", "Who?").messages(False)
    assert messages == [{"role": "user", "content": textwrap.dedent("You are a ghost.\n\nWho?")}]
