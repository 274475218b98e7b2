"""Drift: stored conversations, replay, the monitor and its metrics."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
import threading
import urllib.request

import prometheus_client
import pytest
import torch
import yaml
from conftest import REPOSITORY, unit
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

import axiscap
from axiscap import CapProfile, drift, models
from axiscap.drift import BUCKETS, Conversation, Monitor, Recorder, Scale

SAID = (
    {"role": "user", "content": "Who are you?"},
    {"role": "assistant", "content": "I am a language model."},
    {"role": "user", "content": "Are you not a ghost?\n"},
    {"role": "assistant", "content": " No — I am not. 👻\n\nAsk me something else."},
)


def lines(path, entries):
    path.write_text("".join((entry if isinstance(entry, str) else json.dumps(entry)) + "\n" for entry in entries))
    return path


# Stored conversations.


def test_each_stored_form_is_read(tmp_path):
    messages = [dict(message) for message in SAID]
    sharegpt = [
        {"from": {"user": "human", "assistant": "gpt"}[message["role"]], "value": message["content"]}
        for message in SAID
    ]
    parts = [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in SAID]
    forms = [messages, {"messages": messages}, {"conversation": messages}, {"conversations": sharegpt}, sharegpt, parts]
    path = lines(
        tmp_path / "conversations.jsonl", [*forms, {"id": 7, "group": "g", "side": "capped", "messages": messages}]
    )
    conversations = list(drift.read_conversations(path))
    assert [conversation.messages for conversation in conversations] == [SAID] * 7
    assert [conversation.name for conversation in conversations] == ["1", "2", "3", "4", "5", "6", "7"]
    assert (conversations[6].group, conversations[6].side) == ("g", "capped")
    for form in (messages, {"name": "1", "messages": messages}, [{"name": "1", "conversation": messages}]):
        (tmp_path / "conversations.json").write_text(json.dumps(form))
        assert list(drift.read_conversations(tmp_path / "conversations.json")) == [Conversation("1", SAID)]


@pytest.mark.parametrize(
    "bad",
    ["{", "3", "[]", '{"messages": 3}', '[{"role": "user"}]', '[{"role": 3, "content": "x"}]', "[" * 100_000, '"x"'],
)
def test_a_corrupt_line_is_named_and_stops_or_is_skipped(tmp_path, bad):
    path = lines(tmp_path / "conversations.jsonl", [list(SAID), bad, list(SAID)])
    with pytest.raises(ValueError, match=r"conversations\.jsonl, line 2: "):
        list(drift.read_conversations(path))
    said: list[str] = []
    assert [conversation.name for conversation in drift.read_conversations(path, on_error=said.append)] == ["1", "3"]
    assert len(said) == 1
    assert "line 2: " in said[0]


def test_bytes_that_are_no_text_are_named_too(tmp_path):
    path = tmp_path / "conversations.jsonl"
    path.write_bytes(b"\xff\xfe\n" + json.dumps(list(SAID)).encode() + b"\n")
    said: list[str] = []
    assert len(list(drift.read_conversations(path, on_error=said.append))) == 1
    assert "line 1" in said[0]


# Where messages are.


TEMPLATES = {
    # With what transformers itself can report, to compare with.
    "marked": "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}",
    # Trims, and thinks before the last answer only, as some models' do.
    "thinking": "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if loop.last and m.role == 'assistant' %}<think>"
    "\n\n</think>\n\n{% endif %}{{ m.content | trim }}<|im_end|>\n{% endfor %}",
    # No line break between role and text, and none behind it.
    "tight": "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}",
}


@pytest.fixture
def tokenizer(demo_model):
    """One whose template may be changed."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(models.folder(models.DEFAULT_MODEL))


@pytest.mark.parametrize("template", TEMPLATES)
def test_messages_are_found_by_the_template(tokenizer, template):
    tokenizer.chat_template = TEMPLATES[template]
    text = drift.encode(tokenizer, SAID)
    whole = tokenizer.apply_chat_template(list(SAID), return_dict=True)
    assert text.tokens == list(whole["input_ids"])
    assert "".join(text.pieces) == tokenizer.apply_chat_template(list(SAID), tokenize=False)
    found = ["".join(text.pieces[turn.start : turn.end]) for turn in text.turns]
    if template == "thinking":
        assert found == [message["content"].strip() for message in SAID]
    elif template == "marked":
        masked = tokenizer.apply_chat_template(list(SAID), return_dict=True, return_assistant_tokens_mask=True)
        mine = [0] * len(text.tokens)
        for turn in text.turns:
            if turn.role == "assistant":
                mine[turn.start : turn.end] = [1] * (turn.end - turn.start)
        # Where a token reaches over an end, transformers counts it and we do not.
        differ = [at for at, (a, b) in enumerate(zip(mine, masked["assistant_masks"], strict=True)) if a != b]
        assert all(text.pieces[at].strip("\n ") == "" for at in differ)
        assert sum(mine) > 10
    else:
        # Tokens that reach over an end belong to neither side.
        for inside, message in zip(found, SAID, strict=True):
            assert inside in message["content"]
            assert len(inside) > len(message["content"]) - 3


@pytest.mark.slow
@given(st.lists(st.text(max_size=30), min_size=1, max_size=6))
def test_any_text_is_found(demo_model, texts):
    _, tokenizer = demo_model
    said = [{"role": "user" if number % 2 == 0 else "assistant", "content": text} for number, text in enumerate(texts)]
    text = drift.encode(tokenizer, said)
    for turn, message in zip(text.turns, said, strict=True):
        inside = "".join(text.pieces[turn.start : turn.end])
        # The tokenizer itself drops some control characters.
        rest = iter(message["content"])
        assert all(letter in rest for letter in inside), (inside, message)


def test_what_cannot_be_encoded_says_why(tokenizer):
    tokenizer.chat_template = "{{ messages[0].content }}"
    with pytest.raises(ValueError, match=r"leaves out message 2 \(assistant\)"):
        drift.encode(tokenizer, SAID)
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ValueError, match="refuses this conversation: roles must alternate"):
        drift.encode(tokenizer, SAID)
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        drift.encode(tokenizer, SAID)


# Reading again.


def conversations_of(lengths):
    words = ["the", "sea", "is", "deep", "and", "old", "no", "one", "knows", "what", "lies", "under", "it", "tonight"]
    for number, length in enumerate(lengths):
        text = " ".join(words[(number + at) % len(words)] for at in range(length))
        answer = {"role": "assistant", "content": text}
        yield Conversation(
            f"t{number}", ({"role": "user", "content": "Tell me."}, answer), side=("", "capped")[number % 2]
        )


@pytest.mark.slow
def test_replay_gives_what_each_conversation_gives_alone(demo_model, shipped_profile):
    model, tokenizer = demo_model
    conversations = list(conversations_of([5, 40, 1, 17, 90, 33, 2, 60]))
    traces = list(drift.replay(model, tokenizer, shipped_profile, conversations, layers=[3, 18, 21], batch_tokens=200))
    assert [trace.conversation for trace in traces] == conversations
    for trace in traces:
        assert trace.layers == (3, 18, 21)
        profile = drift.make_probe(shipped_profile, [3, 18, 21], capped=trace.conversation.side == "capped")
        with axiscap.install(model, profile) as cap, torch.inference_mode():
            model(torch.tensor([trace.text.tokens]))
            seen = cap.projections()
        alone = torch.stack([seen[layer][0, :, 0] for layer in trace.layers])
        torch.testing.assert_close(trace.projections, alone, atol=2e-3, rtol=1e-4, equal_nan=True)
    assert not torch.equal(traces[0].projections, traces[1].projections[:, : len(traces[0].text.tokens)])


def test_replay_equals_what_was_seen_while_it_was_generated(demo_model, shipped_profile):
    model, tokenizer = demo_model
    asked = [[dict(SAID[0])], [{"role": "user", "content": "Write a line about the sea, please, and one about iron."}]]
    inputs = tokenizer.apply_chat_template(
        asked, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
    watching = shipped_profile.measuring_only()
    with axiscap.install(model, watching) as cap, Recorder(cap) as seen:
        made = model.generate(**inputs, max_new_tokens=20, min_new_tokens=20, do_sample=False)
        during = seen.projections()
    prompt = inputs["input_ids"].shape[1]
    for row, said in enumerate(asked):
        answer = tokenizer.decode(made[row, prompt:])
        conversation = Conversation("t", (*said, {"role": "assistant", "content": answer}))
        (trace,) = drift.replay(model, tokenizer, shipped_profile, [conversation])
        real = inputs["attention_mask"][row].bool()
        assert trace.text.tokens[: int(real.sum())] == inputs["input_ids"][row][real].tolist()
        assert during[row].shape[1] == int(real.sum()) + 19  # the last is sampled, and not read
        torch.testing.assert_close(
            trace.projections[:, : during[row].shape[1]], during[row], atol=5e-3, rtol=1e-4, equal_nan=True
        )
        turn = trace.text.turns[-1]
        assert trace.text.tokens[turn.start : turn.end] == made[row, prompt:].tolist()


def test_a_conversation_that_is_too_long_is_named_and_stops_or_is_skipped(demo_model, shipped_profile):
    model, tokenizer = demo_model
    long = Conversation(
        "long", ({"role": "user", "content": "x "}, {"role": "assistant", "content": "the sea " * 9000})
    )
    conversations = [*conversations_of([3]), long, *conversations_of([4])]
    with pytest.raises(ValueError, match=r"conversation long: .* tokens, more than the"):
        list(drift.replay(model, tokenizer, shipped_profile, conversations))
    said: list[str] = []
    assert len(list(drift.replay(model, tokenizer, shipped_profile, conversations, on_error=said.append))) == 2
    assert "conversation long" in said[0]


def test_a_layer_without_an_axis_is_named(shipped_profile):
    bare = CapProfile(shipped_profile.layers, shipped_profile.axes, shipped_profile.floors)
    with pytest.raises(ValueError, match="no axis at layer 3; it has one at 8-27"):
        drift.make_probe(bare, [3])
    with pytest.raises(ValueError, match="no axis at layer 30; it has one at 0-29"):
        Scale.of(shipped_profile, 30)


@pytest.mark.slow
def test_ten_thousand_conversations_in_constant_memory(tmp_path):
    """Peak memory of 10,000 is that of 1,000: each in a process of its own, by a model of a few weights."""
    code = """
import resource, sys
sys.path.insert(0, "tests")
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from axiscap import drift, models
from axiscap.drift.selection import DETAILED, ROWS
from axiscap.view import page
from conftest import profile_for
from test_monitor import conversations_of
config = LlamaConfig(vocab_size=49152, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
model = LlamaForCausalLM(config).eval()
tokenizer = AutoTokenizer.from_pretrained(models.folder(models.DEFAULT_MODEL))
profile = profile_for(model, [0, 1], 0.0)
selection = drift.Selection(drift.Scale.of(profile, 1))
count = 0
for trace in drift.replay(model, tokenizer, profile, conversations_of(1 + n * 7 % 60 for n in range(int(sys.argv[1])))):
    selection.add(trace)
    count += 1
assert count == selection.conversations == int(sys.argv[1])
assert len(selection.rows()) == ROWS and len(selection.traces()) == DETAILED
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
    peaks = []
    for count in (1000, 10_000):
        done = subprocess.run([sys.executable, "-c", code, str(count)], capture_output=True, text=True, cwd=REPOSITORY)
        assert done.returncode == 0, done.stderr[-2000:]
        peaks.append(int(done.stdout) / 1024)
    assert peaks[1] < peaks[0] + 60, peaks  # MiB


# Drift in figures.


def test_a_percentile_is_where_the_table_says(shipped_profile):
    scale = Scale.of(shipped_profile)
    assert scale.layer in shipped_profile.layers
    for rank, value in zip(scale.ranks, scale.values, strict=True):
        assert scale.percentile(value) == pytest.approx(rank, abs=1e-6)
    assert scale.percentile(scale.values[0] - 1) == 0
    assert scale.percentile(scale.values[-1] + 1) == 100
    between = (scale.values[9] + scale.values[10]) / 2
    assert scale.percentile(between) == pytest.approx((scale.ranks[9] + scale.ranks[10]) / 2)
    bare = CapProfile([2], unit(1, 1, 8), torch.zeros(1, 1))
    assert math.isnan(Scale.of(bare).percentile(0.0))
    assert drift.describe_percentile(1.0) == "below 99 % of normal answers"
    assert drift.describe_percentile(0.0) == "below more than 99.5 % of normal answers"
    assert drift.describe_percentile(60.0) == "above 60 % of normal answers"


@given(st.lists(st.lists(st.floats(-50, 50, width=32), min_size=1, max_size=9), min_size=1, max_size=9))
def test_the_figures_are_those_of_the_definition(turns):
    profile = CapProfile([0], unit(1, 1, 8), torch.tensor([[1.5]]))
    pieces = [drift.Turn("user", 0, 0)]
    at = 0
    for turn in turns:
        pieces.append(drift.Turn("assistant", at, at + len(turn)))
        at += len(turn)
    flat = torch.tensor([[value for turn in turns for value in turn]])
    trace = drift.Trace(Conversation("t", ()), drift.Encoded([0] * at, [""] * at, pieces), (0,), flat)
    path = trace.drift(Scale.of(profile))
    means = torch.tensor([torch.tensor(turn, dtype=torch.float64).mean() for turn in turns], dtype=torch.float64)
    assert (path.turns, path.tokens) == (len(turns), at)
    assert path.level == pytest.approx(means.mean().item(), abs=1e-6)
    assert path.lowest == pytest.approx(means.min().item())
    assert means[path.lowest_turn - 1] == means.min()
    assert path.below == pytest.approx((flat < 1.5).double().mean().item())
    if len(turns) == 1:
        assert math.isnan(path.slope)
    else:
        x = torch.arange(1, len(turns) + 1, dtype=torch.float64)
        slope = ((x - x.mean()) * (means - means.mean())).sum() / ((x - x.mean()) ** 2).sum()
        assert path.slope == pytest.approx(slope.item(), abs=1e-5)


def test_a_conversation_in_which_the_model_says_nothing_has_no_drift():
    trace = drift.Trace(
        Conversation("t", ()), drift.Encoded([1], ["x"], [drift.Turn("user", 0, 1)]), (0,), torch.ones(1, 1)
    )
    assert trace.drift(Scale(0, 0.0, (), ())) is None


# The monitor.


def test_hysteresis(shipped_profile):
    said = []
    watch = Monitor(shipped_profile, low=5, high=20, on_change=lambda *news: said.append(news[:2]))
    value = dict(zip(watch.scale.ranks, watch.scale.values, strict=True))
    for percentile, drifts in ((50, False), (6, False), (4, True), (6, True), (19, True), (21, False), (6, False)):
        watch.turn("a", torch.full((3,), value[float(percentile)]))
        assert watch.drifting == drifts, percentile
    assert said == [("a", True), ("a", False)]
    watch.turn("b", torch.tensor([value[1.0]]))
    assert (watch.drifting, watch.alarms) == (1, 2)
    assert watch.drift("a").turns == 7
    assert watch.drift("nobody") is None
    with pytest.raises(ValueError, match="low <= high"):
        Monitor(shipped_profile, low=30, high=20)
    with pytest.raises(ValueError, match="at least one finite projection"):
        watch.turn("a", torch.tensor([math.nan]))
    with pytest.raises(ValueError, match="no quantiles of normal answers"):
        Monitor(CapProfile([2], unit(1, 1, 8), torch.zeros(1, 1)))


def test_those_silent_longest_are_forgotten(shipped_profile):
    watch = Monitor(shipped_profile, most=3)
    low = torch.tensor([watch.scale.values[0] - 1])
    for name in ("a", "b", "c", "a", "d"):
        watch.turn(name, low)
    assert watch.drift("b") is None
    assert watch.drift("a").turns == 2
    assert watch.drifting == 3


def test_a_serving_record_is_a_turn(shipped_profile):
    watch = Monitor(shipped_profile)
    counted = {"rows": 7, "fired": 3, "mean_projection": [-4.5], "mean_shortfall": [1.0]}
    layers = {str(layer): counted for layer in shipped_profile.layers}
    path = watch.record("c", {"id": "r", "name": "p", "layers": layers, "answer": layers})
    assert (path.turns, path.tokens, path.level, path.below) == (1, 7, -4.5, pytest.approx(3 / 7))
    nothing = {"answer": {key: {**value, "rows": 0, "mean_projection": [None]} for key, value in layers.items()}}
    assert watch.record("c", nothing) is None
    for bad in ({}, {"answer": {}}, {"answer": {str(watch.scale.layer): 3}}, {"answer": None}):
        with pytest.raises(ValueError, match="must be of a finished request"):
            watch.record("c", bad)


def test_metrics_survive_a_scrape_under_load(shipped_profile):
    registry = prometheus_client.CollectorRegistry()
    watch = Monitor(shipped_profile, name="strict", most=100)
    watch.register(registry)
    server, thread = prometheus_client.start_http_server(0, addr="127.0.0.1", registry=registry)
    url = f"http://127.0.0.1:{server.server_port}/metrics"
    stop = threading.Event()

    def load() -> None:
        number = 0
        while not stop.is_set():
            watch.turn(f"c{number % 300}", torch.randn(5) * 30)
            number += 1

    worker = threading.Thread(target=load)
    worker.start()
    try:
        pages = [urllib.request.urlopen(url).read().decode() for _ in range(30)]
    finally:
        stop.set()
        worker.join()
        server.shutdown()
        thread.join()
    families = {family.name: family for family in text_string_to_metric_families(pages[-1])}
    assert set(families) == {
        f"axiscap_monitor_{name}"
        for name in ("turns", "tokens", "tokens_below_floor", "alarms", "conversations", "drifting_conversations",
                     "turn_percentile")
    }  # fmt: skip
    for family in families.values():
        assert family.documentation.endswith(".")
        assert all(sample.labels["profile"] == "strict" for sample in family.samples)
        assert {key for sample in family.samples for key in sample.labels} <= {"profile", "le"}
    histogram = families["axiscap_monitor_turn_percentile"].samples
    counts = [sample.value for sample in histogram if sample.name.endswith("_bucket")]
    assert counts == sorted(counts)
    assert counts[-1] == next(sample.value for sample in histogram if sample.name.endswith("_count"))
    assert families["axiscap_monitor_conversations"].samples[0].value == 100


@pytest.fixture
def scraped(shipped_profile, tmp_path) -> set[str]:
    """The names of all samples of a page with a server's metrics and a monitor's."""
    from axiscap.serving.metrics import Totals
    from axiscap.serving.telemetry import FAILS

    totals = {"rows": 5.0, "fired": 1.0, "nonfinite": 0.0, "projection": -3.0, "shortfall": 2.0}
    answers = {"strict": {"counts": [1] * len(BUCKETS), "sum": 300.0}}
    written = {"profiles": {"strict": {"answer": {"14": totals}}}, "answers": answers}
    (tmp_path / "totals-0.json").write_text(json.dumps({**written, "failures": dict.fromkeys(FAILS, 0), "lost": 0}))
    registry = prometheus_client.CollectorRegistry()
    registry.register(Totals(tmp_path))
    Monitor(shipped_profile).register(registry)
    page = prometheus_client.generate_latest(registry).decode()
    return {sample.name for family in text_string_to_metric_families(page) for sample in family.samples}


def test_the_dashboard_asks_for_metrics_that_are_there(scraped):
    board = json.loads((REPOSITORY / "examples" / "grafana.json").read_text())
    asked = [target["expr"] for panel in board["panels"] for target in panel.get("targets", [])]
    used = {name for expression in asked for name in re.findall(r"axiscap_\w+", expression)}
    assert used <= scraped
    assert len(used) >= 8
    for panel in board["panels"]:
        assert panel["title"]
        assert panel["description"]
        assert panel["fieldConfig"]["defaults"]["unit"]
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])


def test_the_alerts_ask_for_metrics_that_are_there(scraped):
    (group,) = yaml.safe_load((REPOSITORY / "examples" / "alerts.yml").read_text())["groups"]
    for rule in group["rules"]:
        used = set(re.findall(r"axiscap_\w+", rule["expr"]))
        assert used
        assert used <= scraped
        assert rule["annotations"]["summary"]


def test_the_alerts_come_when_they_should():
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("Prometheus' own tester is not here: apt install prometheus")
    for command in (["check", "rules", "alerts.yml"], ["test", "rules", "alerts_test.yml"]):
        done = subprocess.run([promtool, *command], cwd=REPOSITORY / "examples", capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr


def test_an_installation_can_be_watched_and_left(demo_model, shipped_profile):
    model, _ = demo_model
    seen = []
    with axiscap.install(model, shipped_profile) as cap, torch.inference_mode():
        leave = cap.watch(seen.append)
        model(torch.tensor([[1, 2, 3]]))
        leave()
        model(torch.tensor([[1, 2, 3]]))
    assert len(seen) == 1
    assert set(seen[0]) == set(shipped_profile.layers)
