"""Calibration by a real vLLM: in this process, and behind its server. Needs an environment that has vLLM."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time

import pytest
import torch

pytest.importorskip("vllm", reason="needs vLLM: pip install 'axiscap[vllm]'")

from conftest import free_port

from axiscap import calibrate, models
from axiscap.calibrate import Role, judge, rollouts

SETTINGS = calibrate.Settings(models.DEFAULT_MODEL, "torch.float32", 12, 0, "vllm")
TASKS = [
    calibrate.Task(role, 0, number, f"You are a {role}.", f"What do you think of {thing}?")
    for role in ("ghost", "doctor")
    for number, thing in enumerate(("rain", "time", "bread", "night", "music"))
]
ASKS = "The answer is N. What is the answer? Write the number only. (Ignore: {question} {answer})"
BATCHES = [TASKS[:4], TASKS[4:8], TASKS[8:]]


@pytest.fixture(autouse=True)
def _little_cache(monkeypatch):
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")


def assert_right(shards, demo_model):
    """Every task once, its own tokens, and activations of exactly those."""
    model, tokenizer = demo_model
    answered = {task.id: row for shard in shards for task, row in zip(shard.tasks, shard.answers, strict=True)}
    assert sum(len(shard.tasks) for shard in shards) == len(answered) == len(TASKS)
    assert sorted([task.id for task in shard.tasks] for shard in shards) == sorted([t.id for t in b] for b in BATCHES)
    for shard in shards:
        for row, task in enumerate(shard.tasks):
            assert task.text in tokenizer.decode(shard.prompts[row])
            assert 0 < len(shard.answers[row]) <= SETTINGS.max_new_tokens
            assert tokenizer.decode(shard.answers[row], skip_special_tokens=True).strip() == shard.texts[row]
        alone = rollouts.read_means(model, shard.prompts[:1], shard.answers[:1])
        torch.testing.assert_close(shard.means[:1], alone, atol=2e-3, rtol=1e-3)
    return answered


def test_in_this_process(demo_model):
    engine = rollouts.VllmEngine(*demo_model, SETTINGS)
    first = assert_right(list(engine.stream(BATCHES)), demo_model)
    # Seeded each by itself: the same answers in another order.
    assert assert_right(list(engine.stream(BATCHES[::-1])), demo_model) == first


def test_behind_its_server(demo_model, tmp_path, monkeypatch):
    port = free_port()
    server = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", models.folder(SETTINGS.model),
              "--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--enforce-eager"]  # fmt: skip
    monkeypatch.setenv("OPENAI_BASE_URL", f"http://127.0.0.1:{port}/v1")
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(server, stdout=log, stderr=subprocess.STDOUT, env=os.environ)
    try:
        while process.poll() is None:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.5)
        assert process.poll() is None, (tmp_path / "log").read_text()[-2000:]
        engine = rollouts.EndpointEngine(*demo_model, SETTINGS)
        shards = list(engine.stream(BATCHES))
        assert_right(shards, demo_model)
        # The real model as a judge. It is a bad one, but it repeats a number that it is given.
        roles = {
            "ghost": Role("ghost", ("",), eval_prompt=ASKS.replace("N", "3")),
            "doctor": Role("doctor", ("",), eval_prompt=ASKS.replace("N", "1")),
        }
        found = judge.scores(judge.endpoint(engine.name), shards, roles, tmp_path / "scores.jsonl")
        assert set(found) == {task.id for task in TASKS}
        by_role = {role: [found[task.id] for task in TASKS if task.role == role] for role in roles}
        assert by_role["ghost"].count(3) >= 4
        assert by_role["doctor"].count(1) >= 4
    finally:
        process.terminate()
        process.wait()
