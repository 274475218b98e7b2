"""Ordinary work: its requests and the model's answers, and the statistics of single tokens."""

from __future__ import annotations

import dataclasses
import json
import math
from importlib.resources import files

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from axiscap import calibrate, models
from axiscap.calibrate import effects, pipeline, refusal, sinks, space, tokens, work
from axiscap.data.jsonl import shipped


def test_the_shipped_requests_are_complete():
    ordinary = calibrate.load_work()
    assert len(ordinary.domains) >= 20
    for domain in ordinary.domains:
        requests = [request for request in ordinary.requests if request.domain == domain]
        assert len(requests) == 30, domain
    assert len({request.turns for request in ordinary.requests}) == len(ordinary.requests)
    assert {"json", "python", "number"} == {request.check.split()[0] for request in ordinary.requests if request.check}
    assert max(request.tokens for request in ordinary.requests) >= 400
    assert max(len(request.turns) for request in ordinary.requests) >= 3
    assert not any(turn.lower().startswith(("you are", "act as")) for r in ordinary.requests for turn in r.turns)


def test_a_quarter_is_held_out():
    ordinary = calibrate.load_work()
    tasks = [
        calibrate.Task("work", 0, number, "", request.turns[0]) for number, request in enumerate(ordinary.requests)
    ]
    held = [ordinary.is_held_out(task) for task in tasks]
    assert len(ordinary.held_domains) == len(ordinary.domains) // 4
    for domain in ordinary.domains:
        is_held = [out for task, out in zip(tasks, held, strict=True) if ordinary.domain(task) == domain]
        assert all(is_held) if domain in ordinary.held_domains else sum(is_held) == 7


def test_the_shipped_prose_is_complete_and_apart_from_the_sweeps():
    prose = work.load_prose()
    assert len({register for register, _ in prose}) >= 10
    paragraphs = [text for _, text in prose]
    assert len(set(paragraphs)) == len(paragraphs) >= 60
    # The prose that a sweep measures costs by is not in it.
    measured_by = (files("axiscap.data") / "plain.jsonl").read_text().splitlines()
    assert not set(paragraphs) & {json.loads(line)["text"] for line in measured_by}


@pytest.mark.parametrize(
    "line",
    ["no json", "[]", '{"domain": "d"}', '{"domain": "d", "turns": []}', '{"domain": "d", "turns": [3]}',
     '{"domain": 3, "turns": ["x"]}', '{"domain": "d", "turns": ["x"], "check": "poetry"}',
     '{"domain": "d", "turns": ["x"], "tokens": 0}'],
)  # fmt: skip
def test_invalid_requests_are_an_error(tmp_path, line):
    path = tmp_path / "work.jsonl"
    path.write_text('{"domain": "d", "turns": ["x"]}\n\n' + line + "\n")
    with pytest.raises(ValueError, match=r"work.jsonl, line 3: must be"):
        calibrate.load_work(path)


def test_too_few_domains_are_an_error(tmp_path):
    path = tmp_path / "work.jsonl"
    path.write_text('{"domain": "d", "turns": ["x"]}\n' * 9)
    with pytest.raises(ValueError, match="at least 4 domains are needed, got 1"):
        calibrate.load_work(path)


class Echo:
    """An engine whose answers repeat the question, and which records its tasks and their token limits."""

    def __init__(self) -> None:
        self.settings = calibrate.Settings("m", "f", 3)
        self.requests: list[tuple[int, calibrate.Task]] = []

    def stream(self, todo):
        for batch in todo:
            self.requests += [(self.settings.max_new_tokens, task) for task in batch]
            texts = [f"re: {task.text}" for task in batch]
            means = torch.zeros(len(batch), 1, 1)
            yield calibrate.Shard(list(batch), [[1]] * len(batch), [[2]] * len(batch), texts, means)


def test_turns_are_answered_in_order_and_only_once(tmp_path):
    requests = [("a", ["one", "two", "three"]), ("b", ["only"]), ("c", ["first", "second"]), ("d", ["x"])]
    path = tmp_path / "work.jsonl"
    options = {"b": {"tokens": 7}}
    path.write_text(
        "".join(json.dumps({"domain": d, "turns": turns, **options.get(d, {})}) + "\n" for d, turns in requests)
    )
    ordinary_work, engine = calibrate.load_work(path), Echo()
    store = calibrate.Store(str(tmp_path / "s"), calibrate.Settings("m", "f", 3))
    counted = []
    work.answer(ordinary_work, calibrate.Here(engine), store, counted.append)
    assert sum(counted) == ordinary_work.answers == 7
    assert {tokens for tokens, task in engine.requests if task.text == "only"} == {7}
    assert {tokens for tokens, task in engine.requests if task.text != "only"} == {work.TOKENS}
    (third,) = (task for _, task in engine.requests if task.text == "three")
    assert third.history == ("one", "re: one", "two", "re: two")
    assert [message["role"] for message in third.messages(True)] == ["user", "assistant"] * 2 + ["user"]
    assert third.completion().endswith("Answer: re: two\nQuestion: three\nAnswer:")
    again = Echo()
    work.answer(ordinary_work, calibrate.Here(again), store, lambda n: None)
    assert again.requests == []
    shards = list(work.shards(ordinary_work, store))
    assert sum(len(shard.tasks) for shard in shards) == 7
    assert all(isinstance(task.history, tuple) for shard in shards for task in shard.tasks)


@pytest.fixture(scope="module")
def texts(demo_model):
    _, tokenizer = demo_model
    answers = [
        "The sea is wide.",
        "Iron rusts where it is wet, and so do nails.",
        "No.",
        "A hat is worn on the head " * 9,
    ]
    return [
        tokens.Text(("default", "role ghost")[n % 2], tokenizer("What is it?")["input_ids"], tokenizer(s)["input_ids"])
        for n, s in enumerate(answers)
    ]


def test_texts_read_together_give_the_rows_of_each_text_alone(demo_model, texts, monkeypatch):
    model, _ = demo_model
    monkeypatch.setattr(tokens, "BATCH_TOKENS", 64)
    rows_by_text: dict[tuple[int, int], list] = {}

    def add_rows(layer, rows, text_numbers, positions, in_answer):
        for row, text, position, answer in zip(
            rows, text_numbers.tolist(), positions.tolist(), in_answer.tolist(), strict=True
        ):
            rows_by_text.setdefault((layer, text), []).append((position, answer, row))

    tokens.read(model, texts, add_rows)
    for number, text in enumerate(texts):
        ids = torch.tensor([[*text.prompt, *text.answer]])
        with torch.inference_mode():
            states = model(ids, output_hidden_states=True).hidden_states
        for layer in (0, 13, 28):
            text_rows = rows_by_text[layer, number]
            assert [position for position, _, _ in text_rows] == list(range(ids.shape[1]))
            assert [answer for _, answer, _ in text_rows] == [at >= len(text.prompt) for at in range(ids.shape[1])]
            torch.testing.assert_close(
                torch.stack([row for _, _, row in text_rows]), states[layer + 1][0], atol=2e-2, rtol=1e-3
            )


def ordered_norms(*parts: tuple[float, float, int]) -> torch.Tensor:
    """Norms with evenly spaced logarithms, for parts of (lowest, highest, count)."""
    return torch.cat([torch.logspace(math.log10(low), math.log10(high), count) for low, high, count in parts])


MIDDLE = math.sqrt(1.6 * 3)


@pytest.mark.parametrize(
    ("norms", "lowest", "highest"),
    [
        (ordered_norms((0.6, 1.5, 999), (20.0, 30.0, 50)), MIDDLE, MIDDLE),  # rows and sinks are far apart
        (ordered_norms((0.6, 1.5, 999)), MIDDLE, MIDDLE),  # no sinks
        (ordered_norms((0.6, 1.55, 999), (1.95, 3.5, 200)), 1.71, 1.77),  # the gap is narrower than twice NEAR
        (ordered_norms((0.6, 2.4, 999), (2.96, 9.0, 300)), 2.64, 2.69),
        (ordered_norms((0.5, 2.2, 900), (2.2, 2.6, 2), (2.6, 9.0, 300)), 2.3, 2.5),  # rows and sinks overlap
    ],
)
def test_a_limit_is_where_rows_are_rarest(norms, lowest, highest):
    ratio = sinks.rarest_ratio(norms)
    assert lowest - 1e-9 <= ratio <= highest + 1e-9
    points = torch.logspace(math.log10(1.6), math.log10(3), 61, dtype=torch.float64)
    near = ((norms.double().log() - points[:, None].log()).abs() < 0.1).sum(1)
    assert ((norms.double() / ratio).log().abs() < 0.1).sum() == near.min()


@pytest.fixture(scope="module")
def limits(demo_model) -> calibrate.NormLimits:
    """The limits of SmolLM2, from every twelfth text that a calibration reads."""
    plan = calibrate.plan(calibrate.load_roles(), calibrate.load_questions(), 16)
    engine = calibrate.TransformersEngine(*demo_model, calibrate.Settings("m", "f"))
    texts = sinks._limit_texts(engine, plan, calibrate.load_work())
    assert 300 < len(texts) < 500
    return sinks.measure_norm_limits(demo_model[0], texts[::12])


def test_the_limits_of_the_demo_model_separate_sinks_from_other_rows(demo_model, limits):
    """At the later layers, only the first token's row of a chat prompt is beyond the limit."""
    model, tokenizer = demo_model
    for question in ("Who are you?", "Write a poem on the sea.\n\nMake it short, please: four lines, or so."):
        chat = [{"role": "user", "content": question}]
        inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        with torch.inference_mode():
            states = model(**inputs, output_hidden_states=True).hidden_states
        for layer in range(11, 28):
            beyond = states[layer + 1][0].norm(dim=-1) > limits.limits[layer]
            assert beyond.nonzero().flatten().tolist() == [0], layer
    assert all(torch.tensor(limit).item() == limit for limit in limits.limits)  # float32 numbers
    ratios = [limit / median for limit, median in zip(limits.limits, limits.medians, strict=True)]
    assert all(1.59 < ratio < 3.01 for ratio in ratios)


def test_limits_are_found_once_and_kept_with_the_answers(demo_model, tmp_path, monkeypatch):
    plan = calibrate.plan(calibrate.load_roles(), calibrate.load_questions()[:4], 1)
    texts = [tokens.Text("prompt", demo_model[1](text)["input_ids"], []) for text in ("What is it?", "No, no, no.")]
    monkeypatch.setattr(sinks, "_limit_texts", lambda *_: texts)
    store = calibrate.Store(str(tmp_path), calibrate.Settings("m", "f"))
    limits = calibrate.find_norm_limits(*demo_model, plan, store)
    monkeypatch.delattr(sinks, "measure_norm_limits")
    store_with_limits = calibrate.Store(store.url, dataclasses.replace(store.settings, norm_limits=limits.limits))
    for again in (store, store_with_limits):
        assert calibrate.find_norm_limits(*demo_model, plan, again) == limits
    with pytest.raises(NameError):
        calibrate.find_norm_limits(
            *demo_model, plan, calibrate.Store(store.url, dataclasses.replace(store.settings, model="another"))
        )


def test_sinks_are_counted_and_left_out_of_the_scatter(demo_model, texts, limits):
    model, tokenizer = demo_model
    scatters, counts = pipeline.CollectScatter(limits.limits)(model, texts)
    halves = [pipeline.CollectScatter(limits.limits)(model, texts[half::2])[1] for half in (0, 1)]
    assert halves[0].merge(halves[1]).to_json() == counts.to_json()
    assert sinks.SinkCounts.from_json(json.loads(json.dumps(counts.to_json()))).to_json() == counts.to_json()
    rows = sum(len(text.prompt) + len(text.answer) for text in texts)
    assert (counts.texts, counts.rows) == (len(texts), rows)
    assert counts.beyond[11:28] == [len(texts)] * 17
    for scatter, beyond in zip(scatters, counts.beyond, strict=True):
        assert sum(scatter.counts.values()) == rows - beyond
    facts = counts.describe(limits, range(11, 28), tokenizer)
    first = tokenizer.decode([texts[0].prompt[0]])
    assert facts["tokens"] == {first: len(texts)}
    assert facts["share"][20] == pytest.approx(len(texts) / rows, abs=1e-5)
    for layer in range(11, 28):
        limit = facts["limit_ratio"][layer]
        assert facts["largest_ordinary"][layer] < limit < 20 < facts["smallest_sink"][layer]
    # Sketches of single tokens leave out sinks too, but only at the layers where they are sinks.
    axis = torch.nn.functional.normalize(torch.ones(30, 576), dim=-1)
    sketch = pipeline.CollectSketches(axis, limits.limits)(model, texts)["ordinary tokens"]
    default_texts = [text for text in texts if text.group == "default"]
    sizes = [sketch.layers[layer].n for layer in range(30)]
    assert sizes[20] == sum(len(text.prompt) + len(text.answer) for text in default_texts) - len(default_texts)
    assert sizes[0] == sizes[20] + len(default_texts)
    assert sketch.count == min(sizes)


def test_merged_scatters_give_covariances():
    generator = torch.Generator().manual_seed(0)
    groups = {name: torch.randn(40 + 10 * n, 5, generator=generator) + n for n, name in enumerate("abc")}
    all_rows, first, second = (tokens.Scatter(5) for _ in range(3))
    for name, rows in groups.items():
        all_rows.add(name, rows, scatters=name != "c")
        first.add(name, rows[:7], scatters=name != "c")
        second.add(name, rows[7:], scatters=name != "c")
    first.merge(second)
    centred = torch.cat([groups[name].double() - groups[name].double().mean(0) for name in "ab"])
    for scatter in (all_rows, first):
        torch.testing.assert_close(scatter.within(["a", "b"]), centred.T @ centred / len(centred))
        torch.testing.assert_close(scatter.mean("c"), groups["c"].double().mean(0))


@given(st.integers(0, 1000), st.integers(1, 3))
def test_a_guarded_lift_moves_no_row_along_protected_directions(seed, count):
    generator = torch.Generator().manual_seed(seed)
    axis = F.normalize(torch.randn(5, 16, generator=generator, dtype=torch.float64), dim=-1)
    lift = axis + 0.05 * torch.randn(5, 16, generator=generator, dtype=torch.float64)
    protected = torch.randn(5, count, 16, generator=generator, dtype=torch.float64)
    guarded = refusal.guarded(space.Directions(axis, lift / (lift * axis).sum(-1, keepdim=True)), protected)
    assert torch.equal(guarded.axis, axis)
    torch.testing.assert_close((guarded.lift * axis).sum(-1), torch.ones(5, dtype=torch.float64))
    torch.testing.assert_close((protected @ guarded.lift[..., None]).abs().max().item(), 0.0, atol=1e-9, rtol=0)
    with pytest.raises(ValueError, match="layer 0: nearly all of the lift"):
        refusal.guarded(space.Directions(axis, axis), axis[:, None])


def test_the_directions_of_refusal_are_differences_of_means(demo_model, refusals):
    """The expected means come from transformers, text by text, in float64."""
    model, tokenizer = demo_model
    rows: dict[str, list[torch.Tensor]] = {}
    for pair in shipped("declined.jsonl"):
        for kind in ("request", "harmless"):
            prompt = tokenizer.apply_chat_template(
                [{"role": "user", "content": pair[kind]}], add_generation_prompt=True, tokenize=False
            )
            length = len(tokenizer(prompt)["input_ids"])
            texts = {kind: ""}
            if kind == "request":
                texts |= {f"no {at}": text for at, text in enumerate(refusal.DECLINES)}
                texts |= {f"yes {at}": text for at, text in enumerate(refusal.COMPLIES)}
            for name, answer in texts.items():
                ids = tokenizer(prompt + answer, return_tensors="pt")
                with torch.no_grad():
                    hidden = model(**ids, output_hidden_states=True).hidden_states[20]  # the output of layer 19
                rows.setdefault(name.split()[0], []).append(hidden[0, length if answer else length - 1 :].double())
    mean = {name: torch.cat(parts).mean(0) for name, parts in rows.items()}
    for at, difference in enumerate((mean["request"] - mean["harmless"], mean["no"] - mean["yes"])):
        torch.testing.assert_close(refusals[19, at], difference, atol=1e-3, rtol=1e-3)


def test_shipped_profiles_do_not_move_rows_along_refusals(refusals, shipped_profile):
    cosines = F.cosine_similarity(refusals, shipped_profile.lift_all[:, None].double(), dim=-1)
    assert cosines.abs().max() < 1e-3
    # The axis itself has a part along refusals.
    assert F.cosine_similarity(refusals, shipped_profile.axis_all[:, None].double(), dim=-1).abs().max() > 0.1


def test_the_discriminant_avoids_directions_in_which_ordinary_tokens_scatter():
    """Roles differ along one direction, and ordinary tokens scatter along another that is not orthogonal to it."""
    generator = torch.Generator().manual_seed(1)
    size = 12
    difference = torch.nn.functional.normalize(torch.randn(size, generator=generator), dim=0)
    aside = torch.randn(size, generator=generator)
    aside = torch.nn.functional.normalize(aside - (aside @ difference) * difference, dim=0)
    noise = (difference + aside) / 2**0.5

    def rows(count, lean):
        along = 6 * torch.randn(count, 1, generator=generator) * noise
        return along + 0.3 * torch.randn(count, size, generator=generator) + lean * difference

    scatter = tokens.Scatter(size)
    ordinary, roles = rows(4000, 0.0), rows(4000, -2.0)
    for part in space.PARTS:
        scatter.add(space.group("work a", part), ordinary, scatters=True)
        scatter.add(space.group("default", part), rows(4000, 0.1), scatters=True)
        scatter.add(space.group("role b", part), roles, scatters=False)
    separation = {}
    for shrink in (0.01, 1.0):
        directions = space.discriminant([scatter], shrink)
        assert directions.lift is not None
        assert (directions.axis * directions.lift).sum().item() == pytest.approx(1)
        cosine = torch.nn.functional.cosine_similarity(directions.lift[0], difference.double(), dim=0)
        assert cosine > 0.9
        values = [part.double() @ directions.axis[0] for part in (roles, ordinary)]
        separation[shrink] = space.auc(*(value[:, None] for value in values)).item()
    assert separation[0.01] > 0.99
    assert separation[1.0] < 0.9


def test_the_personas_of_pairs_are_no_roles():
    lines = (models.Path(calibrate.__file__).parent.parent / "data" / "pairs.jsonl").read_text().splitlines()
    pairs = [json.loads(line) for line in lines]
    assert len(pairs) >= 60
    assert len({pair["persona"] for pair in pairs}) >= 10
    prompts = {prompt for role in calibrate.load_roles().values() for prompt in role.prompts}
    assert not {pair["persona"] for pair in pairs} & prompts


@pytest.mark.parametrize(
    ("check", "answer", "right"),
    [
        ("json", 'Here it is:\n```json\n{"a": [1, 2]}\n```\nDone.', True),
        ("json", '{"a": 1}', True),
        ("json", "```json\n{'a': 1}\n```", False),
        ("json", "I cannot do that.", False),
        ("python", "Sure!\n```python\ndef f(x):\n    return x\n```", True),
        ("python", "```python\ndef f(x)\n    return x\n```", False),
        ("python", "```python\n", False),
        ("python", "(" * 5000, False),
        ("number 1275", "The sum is 1,275.", True),
        ("number 1275", "The sum is 12750.", False),
        ("number 0.5", "It is 1/2, or 0.50", True),
    ],
)
def test_answers_are_checked(check, answer, right):
    assert effects.passes(work.Request("d", ("x",), check), answer) == right


def cost(perplexity: float, fiction: bool = False) -> effects.DomainCost:
    return effects.DomainCost(perplexity, 0.1, 0.99, fiction)


def test_the_worst_domain_and_the_worst_of_fiction_are_separate():
    costs = {"code": cost(1.001), "letters": cost(1.013), "poems": cost(1.2, True)}
    assert effects.worst(costs, fiction=False) == ("letters", 1.013)
    assert effects.worst(costs, fiction=True) == ("poems", 1.2)
    assert effects.worst({}, fiction=True) == ("", 1.0)


def test_a_budget_of_changed_tokens_covers_all_domains_but_fiction():
    def admits(code: float, poems: float) -> bool:
        costs = {"code": effects.DomainCost(9, 0, code, False), "poems": effects.DomainCost(1, 0, poems, True)}
        return effects.Budget(float("inf"), 0.05, 0.01).admits(costs)

    assert admits(0.991, 0.5)
    assert not admits(0.98, 1.0)


def test_a_cap_that_changes_nothing_costs_nothing_and_holds_nothing(demo_model, shipped_profile, tmp_path, monkeypatch):
    """A profile that only measures has no cost and no hold. A persona lowers the log-odds."""
    model, tokenizer = demo_model
    path = tmp_path / "work.jsonl"
    lines = [{"domain": d, "turns": [f"Say something of {d} {n}."], "tokens": 6} for d in "abcd" for n in range(4)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    ordinary_work = calibrate.load_work(path)
    settings = calibrate.Settings(models.DEFAULT_MODEL, str(model.dtype), 6)
    engine, store = calibrate.TransformersEngine(model, tokenizer, settings), calibrate.Store(str(tmp_path), settings)
    work.answer(ordinary_work, calibrate.Here(engine), store, lambda n: None)
    costs_of_domains = effects.Costs(model, tokenizer, ordinary_work, store, 1).measure(
        shipped_profile.measuring_only()
    )
    assert {name: (c.perplexity, c.fired, c.agreement) for name, c in costs_of_domains.items()} == dict.fromkeys(
        [effects.PLAIN, *"abcd"], (1, 0, 1)
    )

    # The answers of one domain have one token each, as those of a base model may.
    def silent(*arguments):
        for shard in work.shards(*arguments):
            answers = [answer[:1] if ordinary_work.domain(task) == "d" else answer
                    for task, answer in zip(shard.tasks, shard.answers, strict=True)]  # fmt: skip
            yield dataclasses.replace(shard, answers=answers)

    monkeypatch.setattr(effects, "shards", silent)
    with pytest.warns(UserWarning, match="the model's answers to held-out requests of d have less than two tokens"):
        costs = effects.Costs(model, tokenizer, ordinary_work, store, 1)
    assert set(costs.measure(shipped_profile.measuring_only())) == {effects.PLAIN, *"abc"}
    holds = effects.Holds(model, engine)
    assert len(holds.taken) >= 60
    assert holds.taken.mean() > 5
    assert float((holds.taken > 0).double().mean()) > 0.8
    assert not holds.measure().any()
