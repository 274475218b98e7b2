"""Calibration: its data, its arithmetic, and small runs that are killed and resumed."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
import torch.nn.functional as F
from conftest import REPOSITORY, template_rows_that_fire, unit
from hypothesis import example, given
from hypothesis import strategies as st

from axiscap import CapProfile, calibrate, install, interop, models
from axiscap.calibrate import effects, judge, pipeline, rollouts, space, sweep, template, tokens
from axiscap.calibrate import roles as roles_module
from axiscap.calibrate.effects import Budget, DomainCost, Outcome, Point, Setting
from axiscap.calibrate.sketch import Sketch
from axiscap.calibrate.work import Work
from axiscap.drift import compare
from axiscap.profile import floors


def test_shipped_roles_and_questions_are_complete():
    roles, questions = calibrate.load_roles(), calibrate.load_questions()
    assert len(roles) > 100
    assert len(set(questions)) == len(questions) >= 120
    kinds = {role.kind for role in roles.values()}
    assert kinds == {"default", "helper", "professional", "archetype", "fantastical", "hostile"}
    for name, role in roles.items():
        assert len(set(role.prompts)) == len(role.prompts) == 5, name
        assert all(role.prompts) or name == "default"
        assert ("{question}" in role.eval_prompt and "{answer}" in role.eval_prompt) or name == "default"
    lines = (REPOSITORY / "axiscap" / "data" / "drift.jsonl").read_text().splitlines()
    conversations = [json.loads(line) for line in lines]
    assert {conversation["group"] for conversation in conversations} == {"drift", "normal"}
    loaded = compare.load_scripts(REPOSITORY / "axiscap" / "data" / "drift.jsonl")
    assert all(len(conversation.turns) == 5 for conversation in loaded)


def test_roles_and_questions_are_read_from_the_published_layout(tmp_path):
    for name in ("default", "ghost", "doctor"):
        content = {"instruction": [{"pos": f"You are {name}, {{model_name}}."}] * 5, "questions": ["?"] * 40}
        (tmp_path / f"{name}.json").write_text(json.dumps(content | {"eval_prompt": "..."}))
    roles = calibrate.load_roles(tmp_path, "a model")
    assert list(roles) == ["default", "doctor", "ghost"]
    assert roles["ghost"].prompts[0] == "You are ghost, a model."
    lines = [json.dumps({"question": f"What is {n}?", "id": n}) for n in range(5)]
    (tmp_path / "questions.jsonl").write_text("\n".join(lines) + "\n\n")
    assert calibrate.load_questions(tmp_path / "questions.jsonl")[4] == "What is 4?"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"default.json": "{"}, r"default\.json: not a role"),
        ({"default.json": "[1]"}, r"default\.json: not a role"),
        ({"default.json": '{"instruction": []}'}, r"default\.json: the role has no prompt"),
        ({"a.json": '{"instruction": [{"pos": "x"}]}'}, r"no default\.json"),
        ({"default.json": '{"instruction": [{"pos": "x"}]}'}, "at least two roles .* needed, got 0"),
    ],
)
def test_invalid_roles_are_an_error(tmp_path, files, message):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        calibrate.load_roles(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [('{"question": "a"}\nnonsense\n', "line 2: not a question"), ('{"question": "a"}\n', "at least four questions")],
)
def test_invalid_questions_are_an_error(tmp_path, content, message):
    (tmp_path / "q.jsonl").write_text(content)
    with pytest.raises(ValueError, match=message):
        calibrate.load_questions(tmp_path / "q.jsonl")


@pytest.mark.parametrize("per_role", [None, 1, 7, 32])
def test_held_out_roles_and_questions_do_not_make_the_axis(per_role):
    plan = calibrate.plan(calibrate.load_roles(), calibrate.load_questions(), per_role)
    assert not set(plan.train_roles) & set(plan.held_roles)
    assert len({task.id for task in plan.tasks}) == len(plan.tasks)
    for task in plan.tasks:
        assert (task.system, task.text) == (plan.roles[task.role].prompts[task.prompt], plan.questions[task.question])
        if task.role in plan.held_roles:
            assert task.question in plan.held_questions
        elif task.role != "default":
            assert plan.makes_the_axis(task)
    held_kinds = {plan.roles[name].kind for name in plan.held_roles}
    assert held_kinds == {"professional", "helper", "archetype", "fantastical", "hostile"}
    asked = {name: sorted(t.question for t in plan.tasks if t.role == name) for name in plan.train_roles}
    assert len({tuple(questions) for questions in asked.values()}) == 1  # the same for all
    if per_role:
        assert all(len(questions) == per_role for questions in asked.values())
    batches = calibrate.batches(plan)
    assert sorted(t.id for b in batches for t in b) == sorted(t.id for t in plan.tasks)


# Arithmetic.


def test_auc_is_the_share_of_pairs_in_order():
    low, high = torch.tensor([[0.0], [1.0], [2.0]]), torch.tensor([[1.0], [3.0]])
    # Pairs (low, high): (0,1) (0,3) (1,3) (2,3) in order, (1,1) a tie, (2,1) not.
    assert space.auc(low, high).item() == pytest.approx(4.5 / 6)
    assert space.auc(torch.zeros(3, 2), torch.tensor([[1.0, -1.0]])).tolist() == [1.0, 0.0]


def shard_of(tasks, means):
    return calibrate.Shard(tasks, [[1]] * len(tasks), [[2]] * len(tasks), ["x"] * len(tasks), means)


def synthetic(shift=3.0, depth=4, size=16, seed=0):
    """Answers around a mean for each role. The means lie along one direction, with the default at its end."""
    generator = torch.Generator().manual_seed(seed)
    names = ["default", *(f"r{i}" for i in range(12))]
    roles = {name: calibrate.Role(name, ("a", "b"), "kind") for name in names}
    plan = calibrate.plan(roles, [f"q{i}" for i in range(40)])
    direction = unit(depth, size, seed=5)
    shards = []
    for batch in calibrate.batches(plan):
        means = torch.randn(len(batch), depth, size, generator=generator)
        for i, task in enumerate(batch):
            distance = 0.0 if task.role == "default" else shift * (1 + int(task.role[1:]) / 12)
            means[i] -= distance * direction
        shards.append(shard_of(batch, means))
    return plan, shards, direction


def test_the_axis_and_its_evidence_match_synthetic_rollouts():
    plan, shards, direction = synthetic()
    keep = pipeline.Keep()
    sums = space.Sums().add(shards, plan, keep)
    persona_space = space.Space.of(sums, plan, 1)
    train = [(t, m) for s in shards for t, m in zip(s.tasks, s.means, strict=True) if plan.makes_the_axis(t)]
    means = {
        n: torch.stack([m for t, m in train if t.role == n]).double().mean(0) for n in ["default", *plan.train_roles]
    }
    expected = means["default"] - torch.stack([means[name] for name in plan.train_roles]).mean(0)
    torch.testing.assert_close(persona_space.axis, torch.nn.functional.normalize(expected, dim=-1))
    assert bool(((persona_space.axis * direction).sum(-1) > 0.95).all())
    values = space.Projections(4).add(shards, persona_space.axis, persona_space.null, plan, keep)
    facts = space.evidence(persona_space, values, plan)
    assert min(facts.auc) > 0.95
    assert all(0.2 < value < 0.8 for value in facts.null_auc)
    low, high = facts.auc_interval
    assert low <= facts.auc[facts.best_layer] <= high
    assert set(facts.auc_by_role) == set(plan.held_roles)
    assert min(facts.pc1_cosine) > 0.5
    assert abs(sum(persona_space.components()[0][0].tolist()) - 1) < 1e-9
    json.dumps(dataclasses.asdict(facts))
    # Without a shift there is no separation.
    plan, shards, _ = synthetic(shift=0.0)
    blank = space.Space.of(space.Sums().add(shards, plan, pipeline.Keep()), plan, 1)
    facts = space.evidence(blank, space.Projections(4).add(shards, blank.axis, blank.null, plan, keep), plan)
    assert all(0.25 < value < 0.75 for value in facts.auc)


def test_merged_sums_equal_the_sums_of_all_shards():
    plan, shards, _ = synthetic()
    sums = space.Sums().add(shards, plan, pipeline.Keep())
    parts = space.Sums()
    for shard in reversed(shards):
        parts.merge(pickle.loads(pickle.dumps(space.Sums().add([shard], plan, pipeline.Keep()))))
    assert parts.counts == sums.counts
    for key in sums.sums:
        torch.testing.assert_close(parts.sums[key], sums.sums[key], rtol=1e-13, atol=1e-13)


def test_projections_are_the_inner_products():
    means, axes = torch.randn(9, 3, 24), unit(3, 5, 24)
    expected = torch.einsum("nlh,lkh->nlk", means.double(), axes.double())
    torch.testing.assert_close(space.project(means, axes).double(), expected, atol=1e-5, rtol=1e-5)


def test_too_few_roles_are_an_error():
    plan, shards, _ = synthetic()
    sums = space.Sums().add(shards, plan, pipeline.Keep())
    with pytest.raises(ValueError, match=r"only 0 of 9 roles have 1000 answers that were kept"):
        space.Space.of(sums, plan, 1000)


@given(st.integers(1, 5000), st.integers(0, 2**31))
@example(521, 2115)  # has two equal values
def test_sketches_are_exact_when_small_and_within_their_bound(count, seed):
    values = torch.randn(count, 2, generator=torch.Generator().manual_seed(seed))
    half = count // 2
    merged = Sketch(2).add(values[:half]).merge(pickle.loads(pickle.dumps(Sketch(2).add(values[half:]))))
    assert merged.count == count
    table = merged.table()
    for layer in range(2):
        ordered = values[:, layer].sort().values
        for percentile, quantile in zip(floors.PERCENTILES, table[layer], strict=True):
            # A repeated value has all ranks from its first to its last.
            first, last = (torch.searchsorted(ordered, quantile, right=side).item() / count for side in (False, True))
            off = max(first - percentile / 100, percentile / 100 - last, 0)
            assert off <= 3 * merged.error + 1 / count + 1e-9
    if count <= 1000:
        assert merged.error == 0


def test_floors_leave_the_rows_of_the_template_alone(shipped_profile, demo_model):
    model, tokenizer = demo_model
    whole = calibrate.load_work()
    work = Work(tuple(request for request in whole.requests if request.domain in whole.domains[:4])[::4])
    engine = calibrate.TransformersEngine(model, tokenizer, calibrate.Settings("m", "torch.float32"))
    limits = shipped_profile.norm_limit_all.tolist()
    lowest = template.lowest_template_rows(engine, work, shipped_profile.axis_all, limits)
    plain, knows = (shipped_profile.with_floors(shipped_profile.floors) for _ in range(2))
    plain.provenance["template"], knows.provenance["template"] = {}, {"lowest": lowest.tolist()}
    read = [
        request.turns[0]
        for number, request in enumerate(work.requests)
        if not work.is_held_out(roles_module.Task("work", 0, number, "", ""))
    ]
    plain, knows = (calibrate.with_floors(profile, 70.0, profile.population) for profile in (plain, knows))
    assert template_rows_that_fire(model, tokenizer, plain, read)
    margin = knows.with_floors(knows.floors - 1e-3)  # of float32, in another batch
    assert template_rows_that_fire(model, tokenizer, margin, read) == []
    assert torch.equal(knows.floors[:, 0], torch.minimum(plain.floors[:, 0], lowest[list(knows.layers)]))


def test_percentiles_between_columns_are_interpolated():
    table = torch.tensor([list(floors.PERCENTILES)])
    for percentile in (0.5, 1, 25, 33.3, 99.5):
        assert floors.at_percentile(table, percentile).item() == pytest.approx(percentile, rel=1e-6)
    with pytest.raises(ValueError, match=r"percentile must be from 0\.5 to 99\.5, got 100"):
        floors.at_percentile(table, 100)


def test_targets_are_at_another_percentile_of_the_same_population(shipped_profile):
    population = shipped_profile.population
    columns = shipped_profile.tables[population][12:15]
    lifted = calibrate.with_floors(shipped_profile, 5.0, population, [12, 13, 14], target_percentile=33.5)
    assert torch.equal(lifted.floors[:, 0], columns[:, floors.PERCENTILES.index(5.0)])
    torch.testing.assert_close(
        lifted.targets[:, 0],
        (columns[:, floors.PERCENTILES.index(33.0)] + columns[:, floors.PERCENTILES.index(34.0)]) / 2,
    )
    assert torch.equal(lifted.norm_limits, shipped_profile.norm_limit_all[12:15])
    assert lifted.provenance["floors"]["target_percentile"] == 33.5
    plain = calibrate.with_floors(lifted, 5.0, population)
    assert plain.targets is None
    assert "target_percentile" not in plain.provenance["floors"]
    same = calibrate.with_floors(lifted, 5.0, population, target_percentile=5.0)
    assert torch.equal(same.targets, same.floors)
    with pytest.raises(ValueError, match=r"the targets' percentile must be at least the floors', 5, got 4\.5"):
        calibrate.with_floors(shipped_profile, 5.0, population, target_percentile=4.5)
    with pytest.raises(ValueError, match=r"percentile must be from 0\.5 to 99\.5, got 100"):
        calibrate.with_floors(shipped_profile, 5.0, population, target_percentile=100.0)


@pytest.mark.parametrize(
    ("depth", "count", "best", "expected"),
    [
        (30, 8, range(19, 27), list(range(19, 27))),
        (30, 8, range(8), list(range(15, 23))),  # early layers do not count
        (4, 4, range(4), [0, 1, 2, 3]),
        (4, 1, range(3, 4), [3]),
        (2, 2, range(2), [0, 1]),
    ],
)
def test_layers_are_the_best_run_of_the_middle_to_late_ones(depth, count, best, expected):
    separation = torch.zeros(depth)
    separation[list(best)] = 1.0
    assert pipeline.choose_layers(separation, count) == expected


@pytest.mark.parametrize("count", [0, 31])
def test_an_impossible_number_of_layers_is_an_error(count):
    with pytest.raises(ValueError, match=f"from 1 to 30, got {count}"):
        pipeline.choose_layers(torch.zeros(30), count)


def test_loadings_are_compared_over_the_roles_in_common():
    first = {"a": 1.0, "b": 2.0, "c": 3.0, "d": 9.0}
    second = {"a": -1.0, "b": -2.0, "c": -3.0, "e": 0.0}
    assert calibrate.loadings_correlation(first, second) == (pytest.approx(-1.0), 3)
    with pytest.raises(ValueError, match="at least three roles in common"):
        calibrate.loadings_correlation(first, {"a": 1.0})


# Rollouts.


@pytest.mark.slow
def test_activations_are_the_means_over_exactly_the_answer(demo_model):
    """The means of a shard equal the mean layer outputs of each finished text alone."""
    model, tokenizer = demo_model
    tasks = [
        calibrate.Task("default", 0, 0, "", "Say only: yes."),
        calibrate.Task("ghost", 0, 1, "You are a ghost of few words.", "Who are you? Answer in three words."),
        calibrate.Task("default", 0, 2, "", "Tell me a long story about the sea and the people who live by it."),
    ]
    (shard,) = rollouts.TransformersEngine(model, tokenizer, calibrate.Settings("m", "f", 24, 3)).stream([tasks])
    stop = model.generation_config.eos_token_id
    for row, (prompt, answer) in enumerate(zip(shard.prompts, shard.answers, strict=True)):
        assert stop not in answer
        outputs = []
        handles = [
            layer.register_forward_hook(lambda m, a, output, outputs=outputs: outputs.append(output))
            for layer in models.decoder_layers(model)
        ]
        with torch.no_grad():
            model(torch.tensor([[*prompt, *answer]]))
        for handle in handles:
            handle.remove()
        expected = torch.stack([output[0, len(prompt) :].double().mean(0) for output in outputs])
        torch.testing.assert_close(shard.means[row].double(), expected, atol=2e-3, rtol=1e-3)
        assert shard.texts[row] == tokenizer.decode(answer, skip_special_tokens=True).strip()
    assert min(map(len, shard.answers)) < 24 == max(map(len, shard.answers))


@pytest.mark.slow
def test_a_rollout_does_not_depend_on_its_batch(demo_model):
    model, tokenizer = demo_model
    engine = rollouts.TransformersEngine(model, tokenizer, calibrate.Settings("m", "f", 12, 0))
    tasks = [calibrate.Task("r", 0, i, "You are a hermit.", f"What is {thing}?") for i, thing in enumerate("abcdef")]
    together = dict(zip([t.id for t in tasks], engine.answer(tasks).answers, strict=True))
    for some in (tasks[:1], tasks[3:], tasks[::-1]):
        for task, answer in zip(some, engine.answer(some).answers, strict=True):
            assert answer == together[task.id]
    other = rollouts.TransformersEngine(model, tokenizer, calibrate.Settings("m", "f", 12, 1))
    assert other.answer(tasks).answers != list(together.values())


def test_sampling_is_the_published_one():
    """Frequencies match temperature 0.7 and a nucleus of 0.9, also for a nucleus wider than the first attempt."""
    settings = calibrate.Settings("m", "f", 4000, 0)
    for logits in (torch.tensor([2.0, 1.0, 0.0, -1.0, -8.0]), torch.zeros(400)):
        probabilities = torch.softmax(logits.double() / 0.7, 0)
        order = probabilities.sort(descending=True)
        inside = (order.values.cumsum(0) - order.values) < 0.9 - 1e-9
        nucleus = torch.zeros_like(probabilities).scatter(0, order.indices[inside], order.values[inside])
        nucleus /= nucleus.sum()
        sampler, counts = rollouts._Sampler(["a"], settings), torch.zeros(len(logits))
        for _ in range(4000):
            scores = sampler(torch.zeros(1, 1), logits[None])
            assert scores.isfinite().sum() == 1
            counts[scores.argmax()] += 1
        frequencies = counts / 4000
        allowed = 5 * (nucleus * (1 - nucleus) / 4000).sqrt() + 1e-9
        if len(logits) == 5:
            assert bool(((frequencies - nucleus).abs() <= allowed).all())
        else:  # of equal tokens, only the number in the nucleus is defined
            assert 340 <= (counts > 0).sum() <= 361


def test_templates_without_a_system_role_get_the_prompt_with_the_question():
    class Template:
        def apply_chat_template(self, messages, tokenize):
            if messages[0]["role"] == "system":
                raise RuntimeError("system role not supported")

    assert not rollouts._accepts_system_role(Template())
    task = calibrate.Task("ghost", 0, 0, "You are a ghost.", "Who?")
    assert task.messages(False) == [{"role": "user", "content": "You are a ghost.\n\nWho?"}]
    assert task.completion() == "You are a ghost.\n\nQuestion: Who?\nAnswer:"
    assert calibrate.Task("default", 0, 0, "", "Who?").completion() == "Question: Who?\nAnswer:"


def test_a_base_model_continues_a_text(demo_model):
    model, tokenizer = demo_model
    template, tokenizer.chat_template = tokenizer.chat_template, None
    try:
        task = calibrate.Task("ghost", 0, 0, "You are a ghost.", "Who are you?")
        (shard,) = rollouts.TransformersEngine(model, tokenizer, calibrate.Settings("m", "f", 5, 0)).stream([[task]])
    finally:
        tokenizer.chat_template = template
    assert tokenizer.decode(shard.prompts[0]) == task.completion()
    assert shard.means.shape == (1, 30, 576)


@pytest.mark.slow
def test_a_base_models_answer_ends_with_its_line(demo_model):
    """The next question is no part of the answer, and its activations do not count in the means."""
    model, tokenizer = demo_model
    template, tokenizer.chat_template = tokenizer.chat_template, None
    try:
        engine = rollouts.TransformersEngine(model, tokenizer, calibrate.Settings("m", "f", 40, 0))
        tasks = [
            calibrate.Task("r", 0, i, "", f"What is {thing}?") for i, thing in enumerate(("rain", "bread", "love"))
        ]
        (shard,) = engine.stream([tasks])
    finally:
        tokenizer.chat_template = template
    pieces = {token for token in engine.stops if "\n" in tokenizer.decode([token])}
    assert len(pieces) > 5
    assert min(map(len, shard.answers)) < 40
    for row, (prompt, answer) in enumerate(zip(shard.prompts, shard.answers, strict=True)):
        assert not pieces & set(answer[1:])
        torch.testing.assert_close(
            shard.means[row], rollouts.read_means(model, [prompt], [answer])[0], atol=2e-3, rtol=1e-3
        )


@pytest.mark.parametrize("layer", [5, 20])
def test_means_leave_out_attention_sinks(demo_model, layer):
    """A limit at the median norm leaves out half of the rows. If all rows are beyond the limit, all count."""
    model, tokenizer = demo_model
    prompts = [tokenizer(text)["input_ids"] for text in ("Who are you?", "What is the sea, and who lives by it?")]
    answers = [tokenizer(text)["input_ids"] for text in ("A ghost.", "The sea is wide, and fishermen live by it.")]
    rows = []
    for prompt, answer in zip(prompts, answers, strict=True):
        with torch.inference_mode():
            states = model(torch.tensor([[*prompt, *answer]]), output_hidden_states=True).hidden_states
        rows.append(states[layer + 1][0, len(prompt) :].double())
    median = torch.cat(rows).norm(dim=-1).median().item()
    limits = [math.inf] * 30
    for limit, counted in (
        (median, [part[part.norm(dim=-1) <= median] for part in rows]),
        (median / 1e3, rows),
    ):
        limits[layer] = limit
        means = rollouts.read_means(model, prompts, answers, limits)
        for row, part in enumerate(counted):
            assert len(part) > 0
            torch.testing.assert_close(means[row, layer].double(), part.mean(0), atol=2e-3, rtol=1e-3)
        assert torch.equal(means[:, layer + 1], rollouts.read_means(model, prompts, answers)[:, layer + 1])
    assert sum(map(len, rows)) > 2 * sum(len(part[part.norm(dim=-1) <= median]) for part in rows) - 2


def test_an_incomplete_shard_is_missing(tmp_path):
    settings = calibrate.Settings("m", "f", 4, 0)
    store = calibrate.Store(str(tmp_path / "s"), settings)
    tasks = [calibrate.Task("r", 0, i, "s", "t") for i in range(3)]
    shard = shard_of(tasks, torch.randn(3, 2, 4))
    name = store.name(tasks)
    assert not store.has(name)
    store.write(name, shard)
    again = store.read(name)
    assert again.tasks == tasks
    assert torch.equal(again.means, shard.means)
    for other in (calibrate.Settings("m", "f", 4, 1), dataclasses.replace(settings, norm_limits=(2.0, 3.0))):
        assert calibrate.Store(store.url, other).name(tasks) != name
    path = tmp_path / "s" / f"{name}.safetensors"
    content = path.read_bytes()
    for cut in (0, 7, 100, len(content) - 1):
        path.write_bytes(content[:cut])
        assert not store.has(name)
    with pytest.raises(ValueError, match=r"the rollouts of r/0/0 and 2 more are missing"):
        list(store.shards([tasks]))
    memory = calibrate.Store("memory://calibration", settings)  # fsspec treats it as an object store
    memory.write(name, shard)
    assert torch.equal(memory.read(name).means, shard.means)


# An OpenAI-compatible server that answers with the real model.


class ServedModel(BaseHTTPRequestHandler):
    model = tokenizer = None
    requests: list[dict] = []  # noqa: RUF012

    def reply(self, content):
        content = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def do_GET(self):
        self.reply({"data": [{"id": "smollm2"}]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        ServedModel.requests.append(body)
        inputs = self.tokenizer.apply_chat_template(
            body["messages"], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        with torch.inference_mode():
            tokens = self.model.generate(**inputs, do_sample=False, max_new_tokens=body["max_tokens"])
        text = self.tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        self.reply({"choices": [{"message": {"content": text}}]})

    def log_message(self, *arguments):
        pass


def test_texts_from_an_endpoint_are_read_by_the_model(demo_model, monkeypatch):
    model, tokenizer = demo_model
    ServedModel.model, ServedModel.tokenizer, ServedModel.requests = model, tokenizer, []
    server = ThreadingHTTPServer(("127.0.0.1", 0), ServedModel)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("OPENAI_BASE_URL", f"http://127.0.0.1:{server.server_port}/v1")
    tasks = [calibrate.Task("ghost", 0, i, "You are a ghost.", f"What is {thing}?") for i, thing in enumerate("ab")]
    try:
        (shard,) = rollouts.EndpointEngine(model, tokenizer, calibrate.Settings("m", "f", 8, 0)).stream([tasks])
    finally:
        server.shutdown()
    assert {(b["model"], b["max_tokens"], b["temperature"], b["top_p"]) for b in ServedModel.requests} == {
        ("smollm2", 8, 0.7, 0.9)
    }
    assert len({body["seed"] for body in ServedModel.requests}) == 2
    for i, task in enumerate(tasks):
        assert tokenizer.decode(shard.answers[i]).strip() == shard.texts[i] != ""
        alone = rollouts.read_means(model, [shard.prompts[i]], [shard.answers[i]])
        torch.testing.assert_close(shard.means[i], alone[0], atol=2e-3, rtol=1e-3)
        assert "ghost" in tokenizer.decode(shard.prompts[i])
        assert task.text in tokenizer.decode(shard.prompts[i])


# The judge.


class FakeEndpoint(BaseHTTPRequestHandler):
    """An OpenAI-compatible judge whose first calls fail."""

    questions: list[str] = []  # noqa: RUF012
    failures = 3

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        question = body["messages"][0]["content"]
        if FakeEndpoint.failures > 0:
            FakeEndpoint.failures -= 1
            self.send_response(503)
            self.end_headers()
            return
        FakeEndpoint.questions.append(question)
        reply = "I would say 3." if "ghostly" in question else "1"
        content = json.dumps({"choices": [{"message": {"content": reply}}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def endpoint():
    server = ThreadingHTTPServer(("127.0.0.1", 0), FakeEndpoint)
    FakeEndpoint.questions, FakeEndpoint.failures = [], 3
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()


def test_a_judge_behind_an_endpoint_is_asked_once(endpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_BASE_URL", endpoint)
    roles = calibrate.load_roles()
    tasks = [calibrate.Task(role, 0, 0, "", "Who?") for role in ("ghost", "doctor", "default")]
    shard = calibrate.Shard(
        tasks, [[1]] * 3, [[2]] * 3, ["ghostly {answer}", "plainly", "default"], torch.zeros(3, 1, 1)
    )
    path = tmp_path / "scores.jsonl"
    scores = judge.scores(judge.endpoint("m"), [shard], roles, path)
    assert scores == {"ghost/0/0": 3, "doctor/0/0": 1}
    assert len(FakeEndpoint.questions) == 2
    path.write_bytes(path.read_bytes()[:-5])  # killed while writing the last line
    assert judge.scores(judge.endpoint("m"), [shard], roles, path) == scores
    assert len(FakeEndpoint.questions) == 3
    keep = pipeline.Keep(scores)
    assert [keep(task) for task in tasks] == [True, False, True]


def test_unusable_judges_are_an_error(monkeypatch):
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    with pytest.raises(ValueError, match="set OPENAI_BASE_URL"):
        judge.endpoint("m")
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    with pytest.raises(ConnectionError, match="does not answer"):
        judge.endpoint("m", "http://127.0.0.1:9/v1")("x")
    with pytest.raises(ValueError, match="has no eval_prompt"):
        judge.question_to_the_judge(calibrate.Role("r", ("x",)), calibrate.Task("r", 0, 0, "", ""), "")


@pytest.mark.parametrize(("text", "score"), [("3", 3), (" 2\n", 2), ("Score: 0.", 0), ("**1**", 1), ("10 or 2", 2)])
def test_scores_are_read(text, score):
    assert judge.read_score(text) == score


@pytest.mark.parametrize("text", ["", "none", "4", "17"])
def test_replies_without_a_score_give_none(text):
    assert judge.read_score(text) is None


def test_a_judge_without_scores_is_an_error(tmp_path):
    roles = calibrate.load_roles()
    tasks = [calibrate.Task("ghost", 0, i, "", "Who?") for i in range(40)]
    shard = calibrate.Shard(tasks, [[1]] * 40, [[2]] * 40, [str(i % 4) for i in range(40)], torch.zeros(40, 1, 1))
    one_in_three = iter([None, 3, 0] * 14)
    scores = judge.scores(lambda q: next(one_in_three), [shard], roles, tmp_path / "a.jsonl", concurrent=1)
    assert [scores[task.id] for task in tasks[:3]] == [None, 3, 0]
    assert [pipeline.Keep(scores)(task) for task in tasks[:3]] == [False, True, False]
    assert judge.scores(lambda q: 1 / 0, [shard], roles, tmp_path / "a.jsonl") == scores  # the kept scores are used
    with pytest.raises(ValueError, match="40 of the judge's 40 replies have no number from 0 to 3"):
        judge.scores(lambda q: None, [shard], roles, tmp_path / "b.jsonl")


def test_the_model_judges_itself(demo_model):
    ask = judge.local(*demo_model)
    assert ask("Reply with one number from 0 to 3.") in range(4)


# Small calibrations by the command.


def write_small_inputs(folder):
    """Writes five roles, eight questions and sixteen requests; returns the options that use them."""
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
    requests = [
        {"domain": domain, "turns": [f"{verb} {thing}.", "Go on."][: 1 + (thing == "rain")], "tokens": 4}
        for domain, verb in (("code", "Program"), ("facts", "Explain"), ("letters", "Write of"), ("poems", "Rhyme on"))
        for thing in things[:4]
    ]
    for request in requests:
        request["fiction"] = request["domain"] == "poems"
    (folder / "work.jsonl").write_text("".join(json.dumps(request) + "\n" for request in requests))
    options = [
        "--roles",
        str(folder / "roles"),
        "--questions",
        str(folder / "questions.jsonl"),
        "--max-new-tokens",
        "4",
    ]
    return [*options, "--work", str(folder / "work.jsonl")]


#: The command with batches of 3, so that there are many moments to kill it.
SMALL_BATCHES = "from axiscap.calibrate import roles; roles.BATCH = 3; from axiscap.cli import main; main()"


def run_command(*arguments):
    command = [sys.executable, "-c", SMALL_BATCHES, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=REPOSITORY)


@pytest.fixture(scope="module")
def small_calibration(tmp_path_factory, demo_model):
    """A small calibration without interruption: its folder, its options and its profile."""
    folder = tmp_path_factory.mktemp("whole")
    options = write_small_inputs(folder)
    process = run_command("calibrate", folder / "whole.safetensors", *options, "--rollouts", folder / "work")
    output, _ = process.communicate()
    assert process.returncode == 0, output
    assert "36/36" in output.replace(" ", "")
    assert "held-out AUC" in output
    return folder, options, CapProfile.load(folder / "whole.safetensors")


def assert_same_tables(first, second, slack=0.0):
    """Asserts equal quantiles, up to four times the rank error that the profile states (a full sketch is random).

    The bounds are the next outer columns of the other table, because interpolation is poor at the ends of the tails.
    """
    columns = torch.tensor(first.percentiles)
    for name, facts in first.provenance["quantiles"]["populations"].items():
        rank_slack = 400 * facts["rank_error"]
        table = F.pad(second.tables[name], (1, 1), value=math.inf)
        table[:, 0] = -math.inf
        for column, percentile in enumerate(first.percentiles):
            low = table[:, int((columns <= percentile - rank_slack).sum())]
            high = table[:, len(columns) + 1 - int((columns >= percentile + rank_slack).sum())]
            quantiles = first.tables[name][:, column]
            slacks = slack * (1 + 0.1 * quantiles.abs())
            assert ((quantiles >= low - slacks) & (quantiles <= high + slacks)).all(), (name, percentile)


def assert_same_profile(first, second):
    assert first.layers == second.layers
    for name in ("axes", "lifts", "norm_limits", "axis_all", "lift_all", "norm_limit_all"):
        assert torch.equal(getattr(first, name), getattr(second, name)), name
    assert_same_tables(first, second)
    assert first.provenance["evidence"] == second.provenance["evidence"]


@pytest.mark.slow
def test_a_killed_calibration_resumes_to_the_same_profile(small_calibration, tmp_path):
    _, options, expected = small_calibration
    chance, out = random.Random(4), tmp_path / "killed.safetensors"
    work = tmp_path / "killed.rollouts"
    finished: dict = {}
    kills = 0
    while True:
        process = run_command("calibrate", out, *options)
        shards_before = len(list(work.glob("*.safetensors")))
        while process.poll() is None and kills < 10 and len(list(work.glob("*.safetensors"))) == shards_before:
            time.sleep(0.01)
        if process.poll() is None and kills < 10:
            time.sleep(chance.random() * 0.3)
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            kills += 1
            for path in work.glob("*.safetensors"):
                time_ns = path.stat().st_mtime_ns
                assert finished.setdefault(path, time_ns) == time_ns, "a finished batch was made again"
            continue
        output, _ = process.communicate()
        assert process.returncode == 0, output
        break
    assert kills >= 5
    assert_same_profile(CapProfile.load(out), expected)
    assert not work.exists()


@pytest.mark.slow
def test_a_resumed_calibration_does_not_read_its_texts_again(small_calibration, tmp_path):
    """The command cannot read texts, and succeeds with the reading that the folder of a finished calibration has."""
    folder, options, expected = small_calibration
    break_reading = "from axiscap.calibrate import pipeline; del pipeline.CollectScatter.__call__; "
    command = [
        sys.executable,
        "-c",
        break_reading + SMALL_BATCHES,
        "calibrate",
        tmp_path / "again.safetensors",
        *options,
    ]
    process = subprocess.run([*command, "--rollouts", folder / "work"], cwd=REPOSITORY, capture_output=True, text=True)
    assert process.returncode == 0, process.stdout + process.stderr
    assert_same_profile(CapProfile.load(tmp_path / "again.safetensors"), expected)
    shutil.copytree(folder / "work", tmp_path / "damaged")
    for path in (tmp_path / "damaged").glob("reading-*.safetensors"):
        path.write_bytes(path.read_bytes()[:-100])
    process = subprocess.run(
        [*command, "--rollouts", tmp_path / "damaged"], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert process.returncode != 0  # a damaged reading is not used


def test_the_provenance_describes_the_calibration(small_calibration, refusals):
    _, _, profile = small_calibration
    facts = profile.provenance
    assert facts["model"]["architecture"] == "LlamaForCausalLM"
    assert facts["floors"]["population"] == "ordinary tokens"
    assert facts["floors"]["percentile"] == 4.0
    assert facts["axis"]["work"]["domains"] == ["code", "facts", "letters", "poems"]
    assert facts["axis"]["work"]["held_out"] == ["poems"]
    assert profile.layers == tuple(range(8, 28))
    torch.testing.assert_close((profile.axes * profile.lifts).sum(-1), torch.ones(20, 1), atol=1e-5, rtol=0)
    cosines = F.cosine_similarity(refusals, profile.lift_all[:, None].double(), dim=-1)
    assert cosines.abs().max() < 1e-3
    sinks = facts["sinks"]
    assert torch.equal(profile.norm_limits, profile.norm_limit_all[8:28])
    medians, ratios = torch.tensor(sinks["median_norm"]), torch.tensor(sinks["limit_ratio"])
    torch.testing.assert_close(profile.norm_limit_all, medians * ratios, atol=0, rtol=1e-3)
    assert all(1.6 <= ratio <= 3 for ratio in sinks["limit_ratio"])
    # From layer 12 on only the first token of each text is a sink. Before, a few other rows are large.
    assert [round(share * sinks["rows"]) for share in sinks["share"][12:28]] == [sinks["texts"]] * 16
    assert sinks["near_the_limit"][12:28] == [0.0] * 16
    assert max(sinks["largest_ordinary"][12:28]) < 2.1
    assert min(sinks["smallest_sink"][12:28]) > 20
    assert sinks["near_the_limit"][9] > 0.001
    assert sinks["tokens"]["<|im_start|>"] > 30
    assert facts["axis"]["roles"] == ["ghost", "hermit", "oracle"]
    assert facts["axis"]["judge"] == "none"
    # 2 prompts x 6 questions of the default, 6 questions to each of three roles.
    assert facts["axis"]["rollouts"] == 12 + 18
    assert facts["evidence"]["held_roles"] == ["void"]
    answer_populations, token_populations = (
        {"assistant", "pooled", "work"},
        {"assistant tokens", "pooled tokens", "ordinary tokens"},
    )
    assert set(facts["quantiles"]["populations"]) == answer_populations | token_populations
    assert facts["quantiles"]["populations"]["pooled"]["count"] == 36
    torch.testing.assert_close(profile.axis_all[list(profile.layers)], profile.axes[:, 0])


@pytest.mark.slow
def test_the_difference_method_is_the_published_one(small_calibration, tmp_path, monkeypatch):
    """The axis is the difference of means, without a lift, with floors at percentile 25 of the default's answers."""
    folder, options, _ = small_calibration
    out = tmp_path / "difference.safetensors"
    arguments = [*options[:6], "--method", "difference", "--rollouts", folder / "work"]
    process = run_command("calibrate", out, *arguments)
    output, _ = process.communicate()
    assert process.returncode == 0, output
    profile = CapProfile.load(out)
    assert profile.lifts is None
    assert profile.lift_all is None
    facts = profile.provenance
    assert (facts["floors"]["population"], facts["floors"]["percentile"]) == ("assistant", 25.0)
    plan = calibrate.plan(
        calibrate.load_roles(folder / "roles", models.DEFAULT_MODEL),
        calibrate.load_questions(folder / "questions.jsonl"),
        16,
    )
    store = calibrate.Store(str(folder / "work"), calibrate.Settings.of(profile, models.DEFAULT_MODEL))
    means: dict[str, list] = {}
    assert store.settings.norm_limits == tuple(profile.norm_limit_all.tolist())
    monkeypatch.setattr(roles_module, "BATCH", 3)
    for shard in store.shards(calibrate.batches(plan)):
        for task, mean in zip(shard.tasks, shard.means, strict=True):
            if task.role in plan.roles and plan.makes_the_axis(task):
                means.setdefault(task.role, []).append(mean.double())
    default = torch.stack(means.pop("default")).mean(0)
    expected = default - torch.stack([torch.stack(rows).mean(0) for rows in means.values()]).mean(0)
    expected = torch.nn.functional.normalize(expected, dim=-1).float()
    torch.testing.assert_close(profile.axis_all, expected, atol=1e-5, rtol=1e-5)
    refused = run_command("calibrate", out, *options, "--method", "difference")
    assert "the published method knows no ordinary work" in refused.communicate()[0]


@pytest.mark.slow
def test_an_axis_without_floors_is_measured(shipped_profile, demo_model, tmp_path, monkeypatch):
    model, tokenizer = demo_model
    monkeypatch.setattr(roles_module, "BATCH", 3)
    write_small_inputs(tmp_path)
    axis, out = tmp_path / "axis.pt", tmp_path / "out.safetensors"
    interop.write_axis(shipped_profile.lift_all, axis)
    imported = run_command("import", axis, tmp_path / "axis.safetensors", "--model", models.DEFAULT_MODEL)
    assert "`axiscap floors" in imported.communicate()[0]
    arguments = [
        "--measure",
        models.DEFAULT_MODEL,
        "--work",
        tmp_path / "work.jsonl",
        "--rollouts",
        tmp_path / "answers",
    ]
    process = run_command("floors", tmp_path / "axis.safetensors", out, *arguments)
    output, _ = process.communicate()
    assert process.returncode == 0, output
    profile = CapProfile.load(out)
    assert profile.knows_sinks
    assert profile.provenance["floors"] | {"count": 0} == {
        "population": "ordinary tokens", "percentile": 4.0, "target_percentile": 15.0, "count": 0,
        "sign": "towards the Assistant",
    }  # fmt: skip

    # The rows of the same texts, read plainly.
    settings = calibrate.Settings(models.DEFAULT_MODEL, "torch.float32")
    limits = tuple(profile.norm_limit_all.tolist())
    store = calibrate.Store(str(tmp_path / "answers"), replace(settings, norm_limits=limits))
    sample = calibrate.load_work(tmp_path / "work.jsonl").sample(160, 100)
    texts = pipeline.ordinary_texts(sample, store, tokenizer)
    projections = {layer: [] for layer in profile.layers}
    with torch.inference_mode():
        for text in texts:
            rows = model(torch.tensor([[*text.prompt, *text.answer]]), output_hidden_states=True).hidden_states
            for layer, axis_row in zip(profile.layers, profile.axes[:, 0], strict=True):
                ordinary = rows[layer + 1][0][rows[layer + 1][0].norm(dim=-1) <= limits[layer]]
                projections[layer].append(ordinary @ axis_row)
    below = [
        (torch.cat(projections[layer]) < floor).float().mean().item()
        for layer, floor in zip(profile.layers, profile.floors[:, 0], strict=True)
    ]
    assert max(below) == pytest.approx(0.04, abs=0.01)  # a floor is lower where the template's rows are
    assert floors.shares_below(profile, profile.floors).max().item() <= 0.04 + 1e-6
    assert floors.shares_below(profile, profile.floors - 1e6).tolist() == [0] * len(profile.layers)


@pytest.mark.slow
def test_other_floors_need_no_model(small_calibration, tmp_path):
    folder, _, profile = small_calibration
    out = tmp_path / "other.safetensors"
    arguments = [out, "--population", "assistant tokens", "--percentile", "40", "--layers", "3-5"]
    process = run_command("floors", folder / "whole.safetensors", *arguments)
    assert process.wait() == 0, process.stdout.read()
    result = CapProfile.load(out)
    assert result.layers == (3, 4, 5)
    column = floors.PERCENTILES.index(40.0)
    table = floors.populations(profile)["assistant tokens"]
    lowest = torch.tensor(profile.provenance["template"]["lowest"][3:6])
    assert torch.equal(result.floors[:, 0], torch.minimum(table[3:6, column], lowest))
    assert torch.equal(result.norm_limits, profile.norm_limit_all[3:6])
    assert result.targets is None
    lifted = run_command("floors", folder / "whole.safetensors", *arguments, "--target", "50")
    assert lifted.wait() == 0
    result = CapProfile.load(out)
    assert torch.equal(result.targets[:, 0], table[3:6, floors.PERCENTILES.index(50.0)])
    assert result.provenance["floors"]["target_percentile"] == 50.0
    refused = run_command("floors", folder / "whole.safetensors", *arguments, "--target", "39")
    assert "the targets' percentile must be at least the floors', 40, got 39" in refused.communicate()[0]
    published = run_command("floors", folder / "whole.safetensors", out, "--published")
    assert published.wait() == 0
    result = CapProfile.load(out)
    assert (result.provenance["floors"]["population"], result.provenance["floors"]["percentile"]) == ("pooled", 75.0)
    for percentile, population, layers, message in (
        (25.0, "nobody", None, "population must be one of assistant"),
        (100.0, "pooled", None, "percentile must be from"),
        (25.0, "pooled", [40], "layers must be from 0 to 29"),
    ):
        with pytest.raises(ValueError, match=message):
            calibrate.with_floors(profile, percentile, population, layers)
    with pytest.raises(ValueError, match="no quantile tables"):
        calibrate.with_floors(CapProfile([0], unit(1, 1, 4), torch.zeros(1, 1)), 25, "pooled")


def test_token_projections_are_those_of_the_installation(small_calibration, demo_model):
    """A second way to the same numbers: the hooks of an installation, over the finished texts."""
    folder, _, profile = small_calibration
    model, _ = demo_model
    plan = calibrate.plan(
        calibrate.load_roles(folder / "roles"), calibrate.load_questions(folder / "questions.jsonl"), 32
    )
    settings = calibrate.Settings.of(profile, models.DEFAULT_MODEL)
    roles_module.BATCH, before = 3, roles_module.BATCH
    try:
        store = calibrate.Store(str(folder / "work"), settings)
        shard = next(store.shards(calibrate.batches(plan)))
    finally:
        roles_module.BATCH = before
    texts = [tokens.Text("role x", *pair) for pair in zip(shard.prompts, shard.answers, strict=True)]
    sketch = pipeline.CollectSketches(profile.axis_all, (math.inf,) * 30)(model, texts)["pooled tokens"]
    count = sum(map(len, shard.answers))
    assert sketch.count == count
    off = CapProfile(range(30), profile.axis_all[:, None].contiguous(), torch.full((30, 1), -math.inf))
    projections = []
    for prompt, answer in zip(shard.prompts, shard.answers, strict=True):
        with install(model, off) as cap, torch.inference_mode():
            model(torch.tensor([[*prompt, *answer]]), use_cache=False)
            by_layer = cap.projections()
        projections.append(torch.stack([by_layer[layer][0, len(prompt) :, 0] for layer in range(30)], dim=1))
    values = torch.cat(projections).sort(0).values
    quantiles = [layer.get_quantiles([(i + 0.5) / count for i in range(count)]) for layer in sketch.layers]
    torch.testing.assert_close(torch.tensor(quantiles).T, values, atol=1e-3, rtol=1e-3)


@pytest.mark.slow
@pytest.mark.nightly
def test_ray_gives_the_same_profile_if_workers_die(small_calibration, tmp_path):
    pytest.importorskip("ray", reason="--engine ray needs ray")
    _, options, expected = small_calibration
    out = tmp_path / "ray.safetensors"
    process = run_command("calibrate", out, *options, "--engine", "ray", "--workers", "2")
    work, chance, kills = tmp_path / "ray.rollouts", random.Random(5), 0
    shards_before: set = set()
    while process.poll() is None and kills < 10:
        if len(shards := set(work.glob("*.safetensors"))) > len(shards_before):
            shards_before = shards
            time.sleep(chance.random() * 0.3)
            # The workers are found by their process name.
            workers = subprocess.run(["pgrep", "-f", "ray::_Worker"], capture_output=True, text=True).stdout.split()
            if workers:
                os.kill(int(chance.choice(workers)), signal.SIGKILL)
                kills += 1
        time.sleep(0.02)
    output, _ = process.communicate()
    assert process.returncode == 0, output
    assert kills >= 5
    result = CapProfile.load(out)
    assert result.layers == expected.layers
    torch.testing.assert_close(result.axis_all, expected.axis_all, atol=1e-5, rtol=1e-5)
    assert_same_tables(result, expected, slack=1e-2)


@pytest.mark.slow
def test_published_files_survive_import_and_export(tmp_path):
    """A capping config of 64 layers keeps its bits through import, export and import, and is installed."""
    vectors = {f"l{i}": {"vector": -3 * unit(32, seed=i), "layer": i} for i in range(46, 54)}
    steps = [{"vector": f"l{i}", "cap": 0.5 * i} for i in range(46, 54)]
    config = tmp_path / "config.pt"
    torch.save({"vectors": vectors, "experiments": [{"id": "layers_46:54-p0.25", "interventions": steps}]}, config)
    first, second, again = (tmp_path / name for name in ("a.safetensors", "b.safetensors", "c.pt"))
    assert run_command("import", config, "layers_46:54-p0.25", first).wait() == 0
    assert run_command("export", first, again, "--experiment", "mine").wait() == 0
    assert interop.experiments(again) == ["mine"]
    assert run_command("import", again, "mine", second).wait() == 0
    one, two = CapProfile.load(first), CapProfile.load(second)
    assert one.layers == two.layers == tuple(range(46, 54))
    assert torch.equal(one.floors, two.floors)
    torch.testing.assert_close(one.axes, two.axes)
    assert torch.equal(one.floors[:, 0], torch.tensor([-0.5 * i for i in range(46, 54)]))
    from transformers import LlamaConfig, LlamaForCausalLM

    tiny = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=64,
                                        num_attention_heads=2, num_key_value_heads=2))  # fmt: skip
    with install(tiny, one) as cap, torch.inference_mode():
        tiny(torch.arange(8)[None])
        assert cap.stats()["default"][46].rows == 8


# The sweep.


def point(percentile, cost, hold, **tests):
    domains = {"code": DomainCost(cost, 0.1, 0.9, fiction=False), "poems": DomainCost(1.01, 0.1, 0.9, fiction=True)}
    results = {"uptake": 0.1, "uptake_interval": (0.05, 0.2), "default_uptake": 0, "choices": 1, "checks": (9, 12)}
    outcome = Outcome(**results | {"declines": 0.5, "declines_interval": (0.1, 0.9)} | tests)
    return Point(Setting(1, 2, percentile), domains, hold, (hold - 1, hold + 1), outcome)


def test_the_frontier_has_no_point_that_another_one_beats():
    """A point is off the frontier if a cheaper one holds as much or more."""
    points = [
        point(6, 1.02, 9.0),
        point(1, 1.001, 4.0),
        point(2, 1.012, 3.0),
        point(4, 1.015, 7.0),
        point(5, 1.03, 9.0),
    ]
    assert effects.frontier(points) == [points[1], points[3], points[0]]


def test_a_harmful_point_is_not_chosen(tmp_path):
    """Of the points within a budget, the one with the most hold that passes its tests is chosen. All points are
    stored.
    """
    points = [
        point(1, 1.001, 4.0),
        point(2, 1.01, 6.0),
        point(4, 1.015, 9.0, declines_interval=(-0.9, -0.2)),
        point(5, 1.016, 8.0, checks=(4, 12)),
        point(6, 1.017, 7.0, uptake=0.6),
        point(8, 1.03, 12.0),
    ]
    uncapped = replace(point(0, 1.0, 10.0, uptake=0.4, uptake_interval=(0.3, 0.5)), setting=None)
    path = tmp_path / "points.jsonl"
    path.write_text("".join(json.dumps(asdict(single)) + "\n" for single in (uncapped, *points)))
    runs = sweep.Sweep(None, None, "ordinary tokens", path)
    assert runs.choose(points, Budget()) == points[1]
    assert runs.choose(points, Budget(0.05)) == points[5]
    assert runs.choose(points, Budget(0.003, 0.02)) == points[0]
    assert runs.choose(points, Budget(0.0001)) is None


def test_settings_have_targets_above_their_floors():
    settings = sweep.settings_to_try([(1, 4)], [2.0, 15.0], [6.0, 25.0])
    assert [(setting.percentile, setting.target) for setting in settings] == [(2, 6), (2, 25), (15, 25)]
    assert [setting.name for setting in sweep.settings_to_try([(1, 4)], [5.0], [])] == ["layers 1-4, p5"]


def last_points(out):
    """The last point of each setting. A point is kept again once it was tested; the next run drops the first line."""
    points = map(json.loads, out.with_suffix(".points.jsonl").read_text().splitlines())
    return {json.dumps(point["setting"]): point for point in points}


@pytest.mark.slow
@pytest.mark.nightly
def test_a_sweep_chooses_a_point_and_measures_it_once(small_calibration, tmp_path):
    folder, options, _ = small_calibration
    out, picture = tmp_path / "best.safetensors", tmp_path / "sweep.png"
    arguments = [
        folder / "whole.safetensors",
        out,
        "--rollouts",
        folder / "work",
        *options[:4],
        *options[6:],
        "--ask",
        "1",
    ]
    arguments += ["--bands", "17-24", "--percentiles", "25", "--targets", "40", "--picture", picture]
    arguments += ["--budget", "9", "--fiction-budget", "9"]
    first = run_command("sweep", *arguments)
    output, _ = first.communicate()
    assert first.returncode == 0, output
    assert "chosen" in output
    assert picture.read_bytes().startswith(b"\x89PNG")
    profile = CapProfile.load(out)
    assert profile.layers == tuple(range(17, 25))
    assert bool((profile.targets > profile.floors).all())
    uncapped, capped = (Point.from_json(profile.provenance["sweep"][name]) for name in ("uncapped", "chosen"))
    assert uncapped.hold > 0
    assert uncapped.tests.declines == 0
    assert 0.4 <= uncapped.tests.choices <= 1  # guessing gives 0.25
    assert capped.setting == Setting(17, 24, 25.0, 40.0)
    assert capped.mean != 1
    assert 0 < capped.fired < 1
    assert capped.tests.declines != 0
    # A second run measures nothing again.
    points = last_points(out)
    again = run_command("sweep", *arguments)
    assert again.wait() == 0
    assert last_points(out) == points


@pytest.mark.slow
def test_the_example_of_other_models_lists_its_models():
    process = subprocess.run(
        [sys.executable, "examples/models.py", "gpt-17"], capture_output=True, text=True, cwd=REPOSITORY
    )
    assert process.returncode == 2
    assert "gpt-17 is none of" in process.stderr
    assert "gemma-3-270m" in process.stderr


def test_the_axis_is_no_direction_between_questions():
    """If answers depend on the question only, roles that are asked a few questions do not differ from the default."""
    roles = {name: calibrate.Role(name, ("a",)) for name in ("default", *(f"r{i}" for i in range(12)))}
    plan = calibrate.plan(roles, [f"q{i}" for i in range(80)], per_role=8)
    assert len({task.question for task in plan.tasks if plan.makes_the_axis(task)}) == 8
    offsets = 5 * torch.randn(80, 1, 16, generator=torch.Generator().manual_seed(0))
    noise = torch.Generator().manual_seed(1)
    shards = []
    for batch in calibrate.batches(plan):
        means = torch.stack([offsets[task.question] for task in batch])
        shards.append(shard_of(batch, means + 0.1 * torch.randn(means.shape, generator=noise)))
    persona_space = space.Space.of(space.Sums().add(shards, plan, pipeline.Keep()), plan, 1)
    projections = space.Projections(1).add(shards, persona_space.axis, persona_space.null, plan, pipeline.Keep())
    tested = [task for task in projections.tasks if plan.tests_the_axis(task)]
    assert {task.question for task in tested if task.role == "default"} == {
        task.question for task in tested if task.role != "default"
    }
    # A role's mean over eight answers differs from the default's only by the noise of 0.1.
    assert (persona_space.default - persona_space.roles.mean(0)).norm() < 0.5
    assert 0.3 < space.evidence(persona_space, projections, plan).auc[0] < 0.7


def test_conversations_are_summarized_by_group():
    profile = CapProfile([0, 1], unit(2, 1, 4), torch.tensor([[1.0], [2.0]]))

    def side(*turns):
        return compare.Track([compare.Answer("", torch.tensor(turn), 1.0) for turn in turns])

    low = side([[0.0, 0.5], [3.0, 5.0]], [[0.0, 4.0], [1.0, 1.0]])  # turn 1 is below at layer 0, turn 2 at layer 1
    high = side([[2.0, 2.0], [3.0, 3.0]], [[2.0, 2.0], [3.0, 1.0]])
    results = [
        compare.Comparison(compare.Script("a", ("x", "y"), "drift"), low, high),
        compare.Comparison(compare.Script("b", ("x", "y"), "normal"), high, high),
    ]
    drift, normal = compare.by_group(results, profile)
    assert (drift.name, drift.conversations, normal.name) == ("drift", 1, "normal")
    assert drift.turns == pytest.approx((2 / 4, 0))
    assert drift.tokens == pytest.approx((5 / 8, 1 / 8))
    # Less the floor: -1, -0.5, 1, 3; -1, 3, -1, -1. And 1 everywhere but for one -1.
    assert drift.mean == pytest.approx(2.5 / 8)
    assert normal.mean == pytest.approx(6 / 8)
    assert drift.interval[0] == drift.interval[1] == pytest.approx(drift.mean)
