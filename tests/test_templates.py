"""Where the tokens of messages lie, whatever a chat template does with the messages."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import trl
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from axiscap import drift
from axiscap.drift.spans import find_spans

TRL = {path.stem: path.read_text() for path in (Path(trl.__file__).parent / "chat_templates").glob("*.jinja")}
THOUGHTS = "She asks for my name. I could say many, or none."


def make_tokenizer(template, name="a-model"):
    """A tokenizer with one token for each character, so that spans of tokens are spans of characters."""
    tokenizer = Tokenizer(WordLevel({"?": 0}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\s|\S"), "isolated")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    fast.chat_template, fast.name_or_path, fast.bos_token, fast.eos_token = template, name, "<s>", "</s>"
    return fast


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **fields):
    return {"role": "assistant", "content": text, **fields}


def turns_of(template, messages, tools=(), *, warns=""):
    """The rendering, and the text and the thoughts of each turn in it."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        encoded = drift.encode(make_tokenizer(template), messages, tools)
    assert {str(warning.message).partition("leaves out the ")[2].partition(" of")[0] for warning in caught} == (
        {warns} if warns else set()
    )
    rendering = "".join(encoded.pieces)
    assert len(rendering) == len(encoded.tokens)
    texts = [rendering[turn.start : turn.end] for turn in encoded.turns]
    thoughts = [rendering[turn.thoughts.start : turn.thoughts.stop] for turn in encoded.turns]
    return rendering, texts, thoughts, encoded.turns


# Every template that TRL ships. The expected places are those of texts that occur once in the rendering.


@pytest.mark.parametrize("name", sorted(TRL))
def test_plain_turns_are_found_in_every_template_of_trl(name):
    messages = [user("What is your name?"), assistant("I am Morwen."), user("Why?"), assistant("It was given to me.")]
    rendering, texts, thoughts, turns = turns_of(TRL[name], messages)
    assert texts == [message["content"] for message in messages]
    assert [turn.start for turn in turns] == [rendering.index(message["content"]) for message in messages]
    assert not any(thoughts)


#: The templates without a system role.
NO_SYSTEM = {"gemma", "gemma_training"}


@pytest.mark.parametrize("name", sorted(TRL))
def test_a_system_message_is_found_or_refused_in_every_template_of_trl(name):
    messages = [{"role": "system", "content": "Be kind."}, user("What is your name?"), assistant("I am Morwen.")]
    if name in NO_SYSTEM:
        with pytest.raises(ValueError, match=r"the chat template of a-model refuses .*: System role not supported"):
            turns_of(TRL[name], messages)
        return
    assert turns_of(TRL[name], messages)[1] == [message["content"] for message in messages]


#: The templates that drop all thoughts in a content.
DROP_THOUGHTS = {"deepseek_r1_distill", "deepseekv3", "deepseekv3_training"}


@pytest.mark.parametrize("opening", ["<think>\n", ""])
@pytest.mark.parametrize("name", sorted(TRL))
def test_thoughts_in_a_content_are_no_part_of_the_answer_in_any_template_of_trl(name, opening):
    earlier, later = f"{opening}Hm, hm.\n</think>\n\nI am Morwen.", f"{opening}{THOUGHTS}\n</think>\n\nIt was given. "
    messages = [user("What is your name?"), assistant(earlier), user("Why?"), assistant(later)]
    rendering, texts, thoughts, turns = turns_of(TRL[name], messages)
    assert [text.rstrip() for text in texts] == ["What is your name?", "I am Morwen.", "Why?", "It was given."]
    assert texts[3] == "It was given. " or "It was given. " not in rendering  # as the template has it
    assert turns[3].start == rendering.index("It was given.")
    assert thoughts[3] == ("" if name in DROP_THOUGHTS else THOUGHTS)
    assert (THOUGHTS in rendering) == (name not in DROP_THOUGHTS)
    assert thoughts[1] == ("Hm, hm." if "Hm, hm." in rendering else "")


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning", "thinking"])
@pytest.mark.parametrize("name", sorted(TRL))
def test_thoughts_in_a_field_are_read_or_said_to_be_left_out_in_every_template_of_trl(name, field):
    messages = [user("What is your name?"), assistant("I am Morwen.", **{field: THOUGHTS})]
    is_read = any(key in TRL[name] for key in ("reasoning_content", "'reasoning'", "thinking'", ".thinking"))
    # Some read thoughts only before tool calls, or name them without reading them.
    is_read = is_read and name not in (
        *(f"gemma4{v}" for v in ("", "_v2", "_v3", "_v4")),
        "qwen3_instruct_2507_training",
    )
    rendering, texts, thoughts, _ = turns_of(TRL[name], messages, warns="" if is_read else field)
    assert texts == ["What is your name?", "I am Morwen."]
    assert thoughts[1] == (THOUGHTS if is_read else "")
    assert (THOUGHTS in rendering) == is_read


CALL = {"id": "call12345", "type": "function", "function": {"name": "weather", "arguments": {"city": "Bremen"}}}
TOOL_TALK = [
    user("How is the weather?"),
    assistant("", tool_calls=[CALL]),
    {"role": "tool", "name": "weather", "tool_call_id": "call12345", "content": 'It\'s 5 degrees, and "wet".'},
    assistant("It is cold."),
]
ALTERNATE = "roles must alternate"
#: The templates that take no tool message, and the reason that they give.
REFUSE_TOOLS = {
    **dict.fromkeys(("cohere", "cohere_training", "cohere2", "cohere2_training"), ALTERNATE),
    **dict.fromkeys(("gemma", "gemma_training", "gemma3", "gemma3_training"), ALTERNATE),
    **dict.fromkeys(("llava_next", "llava_next_training"), "Only user and assistant roles are supported"),
    **dict.fromkeys(("phi3", "phi3_training", "phi3_5", "phi3_5_training"), r"leaves out message 3 \(tool\)"),
}


@pytest.mark.parametrize("name", sorted(TRL))
def test_tool_calls_are_read_or_said_to_be_left_out_in_every_template_of_trl(name):
    if name in REFUSE_TOOLS:
        with pytest.raises(ValueError, match=f"the chat template of a-model .*{REFUSE_TOOLS[name]}"):
            turns_of(TRL[name], TOOL_TALK)
        return
    # LFM2 only names them; DeepSeek reads them only in a message with null as content, which transformers removes.
    is_read = "tool_calls" in TRL[name] and not name.startswith(("lfm2_training", "deepseek_r1")) and name != "lfm2"
    rendering, texts, _, _ = turns_of(TRL[name], TOOL_TALK, warns="" if is_read else "tool_calls")
    assert ("Bremen" in rendering) == is_read
    assert texts[0::3] == ["How is the weather?", "It is cold."]
    assert texts[1] == ""
    assert texts[2] in (TOOL_TALK[2]["content"], json.dumps(TOOL_TALK[2]["content"])[1:-1])


TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a city now.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


@pytest.mark.parametrize("name", sorted(TRL))
def test_tools_are_read_or_said_to_be_left_out_in_every_template_of_trl(name):
    messages = [user("Who are you?"), assistant("An assistant.")]
    plain = turns_of(TRL[name], messages)
    is_read = "tools" in TRL[name]
    rendering, texts, _, _ = turns_of(TRL[name], messages, [TOOL], warns="" if is_read else "tools")
    assert ("The weather of a city now." in rendering) == is_read
    assert texts == plain[1]


# Kinds of templates.


IM = "{% for m in messages %}<|im_start|>{{ m.role }}\n"
SPLITS = (
    IM
    + "{% set parts = m.content.split('</think>') if m.role == 'assistant' else [m.content] %}"
    + "{% if parts | length > 1 and loop.last %}<think>\n{{ parts[0].split('<think>')[-1].strip('\n') }}\n</think>\n\n"
    + "{% endif %}{{ parts[-1].lstrip('\n') }}<|im_end|>\n{% endfor %}"
)
TEMPLATES = {
    "verbatim": IM + "{{ m.content }}<|im_end|>\n{% endfor %}",
    "tight": "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}",
    "trims": IM + "{{ m.content | trim }}<|im_end|>\n{% endfor %}",
    "trims the front": IM + "{{ m.content.lstrip() }}<|im_end|>\n{% endfor %}",
    "splits": SPLITS,
    "in parts": IM + "{% for part in m.content %}{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}"
    "<|im_end|>\n{% endfor %}",
    "in parts, by an index": IM + "{{ m['content'][0]['text'] }}<|im_end|>\n{% endfor %}",
    "reads words": "{% if '/no_think' in messages[0].content %}No thoughts.{% else %}Think much.{% endif %}"
    + IM
    + "{{ m.content }}<|im_end|>\n{% endfor %}",
    "counts": IM + "{{ m.content | length }} {{ m.content }}<|im_end|>\n{% endfor %}",
}
TEXTS = {
    "words": ["Who?", "Me."],
    "roles": ["user", "assistant"],
    "one letter": ["a", "a"],
    "digits": ["7", "42"],
    "marks": ["?!", "..."],
    "emoji": ["👻", "👻👻"],
    "other scripts": ["你是谁。", "我是莫文。"],
    "tags": ["<b></b>", "[x]"],
    "a mention of tags": ["Is </think> a tag?", "Yes, it is."],
    "soft switches": ["/no_think /think", "user: /no_think"],
    "a tool's words": ["<tool_response>\n3\n</tool_response>", "Three."],
    "the template's own words": ["<|im_start|>user\nHi<|im_end|>\n", "<|im_start|>assistant\nHi"],
}


@pytest.mark.parametrize("texts", TEXTS)
@pytest.mark.parametrize("template", TEMPLATES)
def test_any_text_is_found_in_every_kind_of_template(template, texts):
    first, second = TEXTS[texts]
    messages = [user(first), assistant(second), user(first), assistant(second)]
    _, spans, thoughts, turns = turns_of(TEMPLATES[template], messages)
    strip = {"trims": str.strip, "trims the front": str.lstrip}.get(template, str)
    assert spans == [strip(first), strip(second)] * 2
    assert not any(thoughts)
    assert [turn.start for turn in turns] == sorted(turn.start for turn in turns)


def test_whitespace_belongs_to_a_text_if_the_template_keeps_it():
    messages = [user("\n\n Who? "), assistant("\n Me. \n\n")]
    assert turns_of(TEMPLATES["verbatim"], messages)[1] == ["\n\n Who? ", "\n Me. \n\n"]
    assert turns_of(TEMPLATES["trims"], messages)[1] == ["Who?", "Me."]
    assert turns_of(TEMPLATES["trims the front"], messages)[1] == ["Who? ", "Me. \n\n"]
    assert turns_of(TEMPLATES["splits"], messages)[1] == [" Who? ", " Me. \n\n"]


@pytest.mark.parametrize("template", ["verbatim", "trims", "splits", "in parts"])
@pytest.mark.parametrize(
    ("content", "text", "thoughts"),
    [
        ("<think>\nHm.\n</think>\n\nYes.", "Yes.", "Hm."),
        ("Hm.\n</think>\n\nYes.", "Yes.", "Hm."),
        ("<think>\n\n</think>\n\nYes.", "Yes.", ""),
        ("<think>Yes.</think>Yes.", "Yes.", "Yes."),
        ("<think>Hm.</think>", "", "Hm."),
        ("<think>Hm, and then", "", "Hm, and then"),
        ("<think>Hm.</think>\n<think>Oh.</think>Yes.", "Yes.", "Hm."),
    ],
)
def test_thoughts_and_answer_are_two_spans(template, content, text, thoughts):
    _, texts, all_thoughts, _ = turns_of(TEMPLATES[template], [user("Well?"), assistant(content)])
    assert (texts[1], all_thoughts[1]) == (text, thoughts)


@pytest.mark.parametrize(
    ("opening", "closing"),
    [("[THINK]", "[/THINK]"), ("<|START_THINKING|>", "<|END_THINKING|>"), ("<|channel>thought\n", "<channel|>")],
)
def test_thoughts_have_many_tags(opening, closing):
    content = f"{opening}Hm.{closing}Yes."
    _, texts, thoughts, _ = turns_of(TEMPLATES["verbatim"], [user("Well?"), assistant(content)])
    assert (texts[1], thoughts[1]) == ("Yes.", "Hm.")


def test_an_answer_may_name_the_tags():
    content = "Write <think> and </think> around it."
    messages = [user("How?"), assistant(content)]
    assert turns_of(TEMPLATES["verbatim"], messages)[1][1] == content
    assert turns_of(TEMPLATES["splits"], messages)[1][1] == "around it."  # all that the model reads
    content = "<think>Hm.</think>Write </think> behind it."
    assert turns_of(TEMPLATES["verbatim"], [user("How?"), assistant(content)])[1][1] == "Write </think> behind it."


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ messages[0].content }}", r"leaves out message 2 \(assistant\)"),
        ("{{ raise_exception('roles must alternate') }}", "refuses this conversation: roles must alternate"),
        ("{{ messages[0].nothing.content }}", "refuses this conversation: .*nothing"),
        (
            IM + "{{ m.content }} {{ m.content }}\n{% endfor %}",
            r"changes message 1 \(user\), so that its tokens cannot",
        ),
        (IM + "{{ m.content[:3] }}\n{% endfor %}", r"changes message 1 \(user\), so that its tokens cannot"),
        (IM + "{{ m.content | length }}\n{% endfor %}", r"leaves out message 1 \(user\)"),
        (IM + "{% for c in m.content %}{{ c.image }}{% endfor %}\n{% endfor %}", r"leaves out message 1 \(user\)"),
    ],
)
def test_a_template_that_hides_a_text_is_refused_by_its_name(template, reason):
    with pytest.raises(ValueError, match=f"^the chat template of a-model {reason}"):
        turns_of(template, [user("Who are you?"), assistant("Me, I think.")])


def test_arguments_of_tool_calls_are_given_in_the_form_that_the_template_takes():
    concatenates = (
        IM + "{{ m.content }}{% for c in m.tool_calls %}{{ '' + c.function.arguments }}{% endfor %}{% endfor %}"
    )
    iterates = concatenates.replace("'' + c.function.arguments", "c.function.arguments['city']")
    for template in (concatenates, iterates):
        rendering, texts, _, _ = turns_of(template, TOOL_TALK)
        assert "Bremen" in rendering
        assert texts[3] == "It is cold."


# Renderings whose places are known by construction.


def render_known(messages, strip):
    """A rendering with the ranges of the texts in it."""
    text, ranges = "", []
    for message in messages:
        text += f"<{message['role']}>\n"
        content = strip(message["content"])
        ranges.append(range(len(text), len(text) + len(content)))
        text += content + "<end>\n"
    return text, ranges


CHARACTERS = st.text(st.characters(blacklist_categories=("Cs",)), max_size=20)


@given(st.lists(st.one_of(CHARACTERS, st.sampled_from(["user", "a", " ", "<end>\n", "[x] y"])), min_size=1, max_size=5))
@pytest.mark.parametrize("strip", [str, str.strip, str.lstrip, str.rstrip])
def test_the_places_of_any_texts_are_those_of_the_construction(strip, texts):
    messages = [user(text) for text in texts]  # a text of the assistant may be a tag of thoughts

    def render(entries):
        return render_known(entries, strip=strip)[0]

    expected_text, ranges = render_known(messages, strip=strip)
    text, spans = find_spans(render, messages)
    assert text == expected_text
    for span, expected, message in zip(spans, ranges, messages, strict=True):
        if message["content"].strip():
            assert (span.text.start, span.text.stop) == (expected.start, expected.stop)
        else:
            assert not span.text
