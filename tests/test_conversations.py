"""Stored conversations: reading them, the tokens of their messages, and replay."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from conftest import REPOSITORY
from hypothesis import given
from hypothesis import strategies as st

import axiscap
from axiscap import CapProfile, drift, models
from axiscap.drift import Conversation, Recorder, Scale

MESSAGES = (
    {"role": "user", "content": "Who are you?"},
    {"role": "assistant", "content": "I am a language model."},
    {"role": "user", "content": "Are you not a ghost?\n"},
    {"role": "assistant", "content": " No — I am not. 👻\n\nAsk me something else."},
)


def write_lines(path, entries):
    path.write_text("".join((entry if isinstance(entry, str) else json.dumps(entry)) + "\n" for entry in entries))
    return path


# Stored conversations.


def test_every_stored_form_is_read(tmp_path):
    messages = [dict(message) for message in MESSAGES]
    sharegpt = [
        {"from": {"user": "human", "assistant": "gpt"}[message["role"]], "value": message["content"]}
        for message in MESSAGES
    ]
    parts = [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in MESSAGES]
    forms = [messages, {"messages": messages}, {"conversation": messages}, {"conversations": sharegpt}, sharegpt, parts]
    path = write_lines(
        tmp_path / "conversations.jsonl", [*forms, {"id": 7, "group": "g", "side": "capped", "messages": messages}]
    )
    conversations = list(drift.read_conversations(path))
    assert [conversation.messages for conversation in conversations] == [MESSAGES] * 7
    assert [conversation.name for conversation in conversations] == ["1", "2", "3", "4", "5", "6", "7"]
    assert (conversations[6].group, conversations[6].side) == ("g", "capped")
    for form in (messages, {"name": "1", "messages": messages}, [{"name": "1", "conversation": messages}]):
        (tmp_path / "conversations.json").write_text(json.dumps(form))
        assert list(drift.read_conversations(tmp_path / "conversations.json")) == [Conversation("1", MESSAGES)]


@pytest.mark.parametrize(
    "line",
    ["{", "3", "[]", '{"messages": 3}', '[{"role": "user"}]', '[{"role": 3, "content": "x"}]', "[" * 100_000, '"x"'],
)
def test_a_corrupt_line_is_named_and_raised_or_skipped(tmp_path, line):
    path = write_lines(tmp_path / "conversations.jsonl", [list(MESSAGES), line, list(MESSAGES)])
    with pytest.raises(ValueError, match=r"conversations\.jsonl, line 2: "):
        list(drift.read_conversations(path))
    errors: list[str] = []
    assert [conversation.name for conversation in drift.read_conversations(path, on_error=errors.append)] == ["1", "3"]
    assert len(errors) == 1
    assert "line 2: " in errors[0]


def test_a_line_that_is_no_utf8_is_named(tmp_path):
    path = tmp_path / "conversations.jsonl"
    path.write_bytes(b"\xff\xfe\n" + json.dumps(list(MESSAGES)).encode() + b"\n")
    errors: list[str] = []
    assert len(list(drift.read_conversations(path, on_error=errors.append))) == 1
    assert "line 1" in errors[0]


CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Bremen"}'}}


def test_thoughts_and_tool_calls_are_read_from_a_file(tmp_path):
    messages = [
        {"role": "user", "content": "How is the weather?", "name": "Ann"},
        {"role": "assistant", "content": None, "reasoning_content": "I look.", "tool_calls": [CALL], "refusal": None},
        {"role": "tool", "content": "5 degrees", "tool_call_id": "c1", "name": "weather"},
        {"role": "assistant", "content": "Cold.", "reasoning_content": None, "tool_calls": []},
    ]
    (conversation,) = drift.read_conversations(write_lines(tmp_path / "c.jsonl", [messages]))
    call = {**CALL, "function": {"name": "weather", "arguments": {"city": "Bremen"}}}
    assert conversation.messages == (
        {"role": "user", "content": "How is the weather?"},
        {"role": "assistant", "content": "", "reasoning_content": "I look.", "tool_calls": [call]},
        messages[2],
        {"role": "assistant", "content": "Cold."},
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"content": None}, "message 2 must have a role and a text"),
        ({"reasoning_content": ["I look."]}, "message 2 must have a text as reasoning_content"),
        ({"tool_calls": "weather()"}, "message 2 must have a list of objects as tool_calls"),
    ],
)
def test_fields_of_another_type_are_named(tmp_path, fields, message):
    answer = {"role": "assistant", "content": "Cold."} | fields
    with pytest.raises(ValueError, match=f"line 1: {message}"):
        list(drift.read_conversations(write_lines(tmp_path / "c.jsonl", [[{"role": "user", "content": "Hi"}, answer]])))


@pytest.mark.parametrize("tools", [[CALL], json.dumps([CALL])])
def test_tools_of_a_conversation_are_read_from_a_file(tmp_path, tools):
    entry = {"messages": [{"role": "user", "content": "Hi"}], "tools": tools}
    (conversation,) = drift.read_conversations(write_lines(tmp_path / "c.jsonl", [entry]))
    assert conversation.tools == (CALL,)


def test_tools_of_another_type_are_named(tmp_path):
    entry = {"messages": [{"role": "user", "content": "Hi"}], "tools": "weather()"}
    with pytest.raises(ValueError, match="line 1: a conversation must have a list of objects as tools"):
        list(drift.read_conversations(write_lines(tmp_path / "c.jsonl", [entry])))


HALF = "\ud83d"


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
@pytest.mark.parametrize(
    "spoilt",
    [
        {"name": HALF},
        {"group": f"a {HALF}"},
        {"messages": [{"role": "user", "content": f"Hi {HALF}"}]},
        {"messages": [{"role": f"user{HALF}", "content": "Hi"}]},
        {"messages": [{"role": "assistant", "content": "Hi", "reasoning_content": HALF}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": HALF}]}]},
    ],
)
def test_half_of_a_surrogate_pair_leaves_out_its_conversation_alone(tmp_path, suffix, spoilt):
    path = tmp_path / f"c{suffix}"
    entries = [{"messages": list(MESSAGES)}, {"messages": list(MESSAGES)} | spoilt, {"messages": list(MESSAGES)}]
    path.write_text("\n".join(map(json.dumps, entries)) if suffix == ".jsonl" else json.dumps(entries))
    with pytest.raises(ValueError, match=r"(line|conversation) 2: not Unicode text \(U\+D83D is half of"):
        list(drift.read_conversations(path))
    errors: list[str] = []
    assert [conversation.name for conversation in drift.read_conversations(path, on_error=errors.append)] == ["1", "3"]
    assert len(errors) == 1


def test_half_of_a_surrogate_pair_in_a_single_conversation_is_named(tmp_path):
    (tmp_path / "c.json").write_text(json.dumps([{"role": "user", "content": HALF}]))
    with pytest.raises(ValueError, match="conversation 1: not Unicode text"):
        list(drift.read_conversations(tmp_path / "c.json"))


def test_replay_names_a_message_with_half_of_a_surrogate_pair(demo_model, shipped_profile):
    model, tokenizer = demo_model
    spoilt = Conversation("spoilt", (*MESSAGES[:1], {"role": "assistant", "content": f"I am{HALF} here."}))
    stored = [*make_conversations([3]), spoilt, *make_conversations([4])]
    with pytest.raises(ValueError, match=r"conversation spoilt: message 2 \(assistant\) is not Unicode text"):
        list(drift.replay(model, tokenizer, shipped_profile, stored))
    errors: list[str] = []
    assert len(list(drift.replay(model, tokenizer, shipped_profile, stored, on_error=errors.append))) == 2
    assert len(errors) == 1


# The tokens of messages.


TEMPLATES = {
    # With the marks by which transformers itself reports the assistant's tokens, for comparison.
    "marked": "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}",
    # Trims, and puts thoughts before the last answer only.
    "thinking": "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if loop.last and m.role == 'assistant' %}<think>"
    "\n\n</think>\n\n{% endif %}{{ m.content | trim }}<|im_end|>\n{% endfor %}",
    # Without line breaks around a text.
    "tight": "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}",
}


@pytest.fixture
def tokenizer(demo_model):
    """A tokenizer whose template a test may change."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(models.folder(models.DEFAULT_MODEL))


@pytest.mark.parametrize("template", TEMPLATES)
def test_turns_lie_where_the_template_puts_the_messages(tokenizer, template):
    tokenizer.chat_template = TEMPLATES[template]
    text = drift.encode(tokenizer, MESSAGES)
    templated = tokenizer.apply_chat_template(list(MESSAGES), return_dict=True)
    assert text.tokens == list(templated["input_ids"])
    assert "".join(text.pieces) == tokenizer.apply_chat_template(list(MESSAGES), tokenize=False)
    turns = ["".join(text.pieces[turn.start : turn.end]) for turn in text.turns]
    if template == "thinking":
        assert turns == [message["content"].strip() for message in MESSAGES]
    elif template == "marked":
        masked = tokenizer.apply_chat_template(list(MESSAGES), return_dict=True, return_assistant_tokens_mask=True)
        mask = [0] * len(text.tokens)
        for turn in text.turns:
            if turn.role == "assistant":
                mask[turn.start : turn.end] = [1] * (turn.end - turn.start)
        # A token that reaches over an end counts for transformers only.
        differing = [index for index, (a, b) in enumerate(zip(mask, masked["assistant_masks"], strict=True)) if a != b]
        assert all(text.pieces[index].strip("\n ") == "" for index in differing)
        assert sum(mask) > 10
    else:
        # A token that reaches over an end belongs to neither side.
        for inside, message in zip(turns, MESSAGES, strict=True):
            assert inside in message["content"]
            assert len(inside) > len(message["content"]) - 3


@pytest.mark.slow
@given(st.lists(st.text(max_size=30), min_size=1, max_size=6))
def test_the_tokens_of_any_text_are_found(demo_model, texts):
    _, tokenizer = demo_model
    messages = [
        {"role": "user" if number % 2 == 0 else "assistant", "content": text} for number, text in enumerate(texts)
    ]
    text = drift.encode(tokenizer, messages)
    for turn, message in zip(text.turns, messages, strict=True):
        inside = "".join(text.pieces[turn.start : turn.end])
        # The tokenizer itself drops some control characters.
        rest = iter(message["content"])
        assert all(letter in rest for letter in inside), (inside, message)


def test_a_conversation_that_cannot_be_encoded_is_refused_with_the_reason(tokenizer):
    tokenizer.chat_template = "{{ messages[0].content }}"
    with pytest.raises(ValueError, match=r"leaves out message 2 \(assistant\)"):
        drift.encode(tokenizer, MESSAGES)
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ValueError, match="refuses this conversation: roles must alternate"):
        drift.encode(tokenizer, MESSAGES)
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        drift.encode(tokenizer, MESSAGES)


# Replay.


def make_conversations(lengths):
    words = ["the", "sea", "is", "deep", "and", "old", "no", "one", "knows", "what", "lies", "under", "it", "tonight"]
    for number, length in enumerate(lengths):
        text = " ".join(words[(number + index) % len(words)] for index in range(length))
        answer = {"role": "assistant", "content": text}
        yield Conversation(
            f"t{number}", ({"role": "user", "content": "Tell me."}, answer), side=("", "capped")[number % 2]
        )


@pytest.mark.slow
def test_replay_in_batches_equals_each_conversation_alone(demo_model, shipped_profile):
    model, tokenizer = demo_model
    conversations = list(make_conversations([5, 40, 1, 17, 90, 33, 2, 60]))
    traces = list(drift.replay(model, tokenizer, shipped_profile, conversations, layers=[3, 18, 21], batch_tokens=200))
    assert [trace.conversation for trace in traces] == conversations
    for trace in traces:
        assert trace.layers == (3, 18, 21)
        profile = drift.make_probe(shipped_profile, [3, 18, 21], capped=trace.conversation.side == "capped")
        with axiscap.install(model, profile) as cap, torch.inference_mode():
            model(torch.tensor([trace.text.tokens]))
            by_layer = cap.projections()
        alone = torch.stack([by_layer[layer][0, :, 0] for layer in trace.layers])
        torch.testing.assert_close(trace.projections, alone, atol=2e-3, rtol=1e-4, equal_nan=True)
    assert not torch.equal(traces[0].projections, traces[1].projections[:, : len(traces[0].text.tokens)])


def test_replay_equals_the_projections_during_generation(demo_model, shipped_profile):
    model, tokenizer = demo_model
    questions = [
        [dict(MESSAGES[0])],
        [{"role": "user", "content": "Write a line about the sea, please, and one about iron."}],
    ]
    inputs = tokenizer.apply_chat_template(
        questions, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
    measuring = shipped_profile.measuring_only()
    with axiscap.install(model, measuring) as cap, Recorder(cap) as recorder:
        generated = model.generate(**inputs, max_new_tokens=20, min_new_tokens=20, do_sample=False)
        during = recorder.projections()
    prompt = inputs["input_ids"].shape[1]
    for row, messages in enumerate(questions):
        answer = tokenizer.decode(generated[row, prompt:])
        conversation = Conversation("t", (*messages, {"role": "assistant", "content": answer}))
        (trace,) = drift.replay(model, tokenizer, shipped_profile, [conversation])
        real = inputs["attention_mask"][row].bool()
        assert trace.text.tokens[: int(real.sum())] == inputs["input_ids"][row][real].tolist()
        assert during[row].shape[1] == int(real.sum()) + 19  # the last sampled token is not read
        torch.testing.assert_close(
            trace.projections[:, : during[row].shape[1]], during[row], atol=5e-3, rtol=1e-4, equal_nan=True
        )
        turn = trace.text.turns[-1]
        assert trace.text.tokens[turn.start : turn.end] == generated[row, prompt:].tolist()


def test_a_conversation_that_is_too_long_is_named_and_raised_or_skipped(demo_model, shipped_profile):
    model, tokenizer = demo_model
    long = Conversation(
        "long", ({"role": "user", "content": "x "}, {"role": "assistant", "content": "the sea " * 9000})
    )
    conversations = [*make_conversations([3]), long, *make_conversations([4])]
    with pytest.raises(ValueError, match=r"conversation long: .* tokens, more than the"):
        list(drift.replay(model, tokenizer, shipped_profile, conversations))
    errors: list[str] = []
    assert len(list(drift.replay(model, tokenizer, shipped_profile, conversations, on_error=errors.append))) == 2
    assert "conversation long" in errors[0]


def test_a_layer_without_an_axis_is_named(shipped_profile):
    bare = CapProfile(shipped_profile.layers, shipped_profile.axes, shipped_profile.floors)
    with pytest.raises(ValueError, match="no axis at layer 3; it has one at 8-27"):
        drift.make_probe(bare, [3])
    with pytest.raises(ValueError, match="no axis at layer 30; it has one at 0-29"):
        Scale.of(shipped_profile, 30)


@pytest.mark.slow
def test_ten_thousand_conversations_in_constant_memory(tmp_path):
    """The peak memory for 10,000 equals that for 1,000; each count in a process of its own, with a tiny model."""
    code = """
import resource, sys
sys.path.insert(0, "tests")
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from axiscap import drift, models
from axiscap.drift.selection import DETAILED, ROWS
from axiscap.view import page
from conftest import profile_for
from test_conversations import make_conversations
config = LlamaConfig(vocab_size=49152, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
model = LlamaForCausalLM(config).eval()
tokenizer = AutoTokenizer.from_pretrained(models.folder(models.DEFAULT_MODEL))
profile = profile_for(model, [0, 1], 0.0)
selection = drift.Selection(drift.Scale.of(profile, 1))
count = 0
conversations = make_conversations(1 + n * 7 % 60 for n in range(int(sys.argv[1])))
for trace in drift.replay(model, tokenizer, profile, conversations):
    selection.add(trace)
    count += 1
assert count == selection.conversations == int(sys.argv[1])
assert len(selection.rows()) == ROWS and len(selection.traces()) == DETAILED
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
    peaks = []
    for count in (1000, 10_000):
        process = subprocess.run(
            [sys.executable, "-c", code, str(count)], capture_output=True, text=True, cwd=REPOSITORY
        )
        assert process.returncode == 0, process.stderr[-2000:]
        peaks.append(int(process.stdout) / 1024)
    assert peaks[1] < peaks[0] + 60, peaks  # MiB
