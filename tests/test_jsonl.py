"""JSONL as its specification has it, in every reader of the package; each refusal names the file and the line."""

from __future__ import annotations

import json

import pytest

from axiscap import calibrate, drift
from axiscap.data import jsonl
from axiscap.drift.compare import load_scripts
from axiscap.evaluate import behaviours, pairs


def read_garak(path):
    return pairs.read_garak("run", path)


def read_conversations(path):
    return list(drift.read_conversations(path))


ATTEMPT = {
    "entry_type": "attempt", "status": 2, "probe_classname": "p", "prompt": {"turns": [{"content": {"text": "Hi"}}]},
    "outputs": [{"text": "No."}], "detector_results": {"d": [0.0]},
}  # fmt: skip
#: Each reader, and an entry that it reads.
READERS = {
    "questions": (calibrate.load_questions, {"question": "Why?"}),
    "work": (calibrate.load_work, {"domain": "d", "turns": ["Do it."]}),
    "scripts": (load_scripts, {"name": "n", "turns": ["Hi"]}),
    "behaviours": (behaviours.read, {"request": "r", "category": "c"}),
    "conversations": (read_conversations, {"messages": [{"role": "user", "content": "Hi"}]}),
    "garak": (read_garak, ATTEMPT),
}


def entries(reader, **changes):
    """Six entries, of which the fourth has the changes."""
    rows = [READERS[reader][1] | {"name": f"n{number}"} for number in range(6)]
    if reader == "work":
        rows = [row | {"domain": f"d{number}"} for number, row in enumerate(rows)]
    rows[3] |= changes
    return [json.dumps(row, ensure_ascii=False) for row in rows]


@pytest.mark.parametrize("character", ["\u2028", "\u2029", "\x85"])
@pytest.mark.parametrize("reader", READERS)
def test_only_a_line_feed_ends_a_line(tmp_path, reader, character):
    path = tmp_path / "file.jsonl"
    path.write_text("\n".join(entries(reader, note=f"two{character}lines")), "utf-8")
    READERS[reader][0](path)


@pytest.mark.parametrize("reader", READERS)
def test_a_byte_order_mark_and_carriage_returns_are_no_content(tmp_path, reader):
    path = tmp_path / "file.jsonl"
    path.write_text("\r\n".join(entries(reader)) + "\r\n\r\n", "utf-8-sig", newline="")
    READERS[reader][0](path)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"nonsense", "Expecting value"),
        (b"{} {}", "Extra data"),
        (b'{"a": 1,}', ""),
        (b"[" * 100_000, "recursion"),
        (b'{"a": "\xe9"}', "its encoding must be UTF-8"),
        (b'{"a": "\xed\xa0\xbd"}', "its encoding must be UTF-8"),
        (b'{"name": "\\ud83d"}', r"U\+D83D is half of a surrogate pair"),
        (b'{"\\uDE00\\uD83D": 1}', r"U\+DE00 is half of a surrogate pair"),
        ("\ufeff{}".encode("utf-16-le"), "its encoding must be UTF-8, and seems to be UTF-16"),
        ("{}".encode("utf-16-be"), "its encoding must be UTF-8, and seems to be UTF-16"),
    ],
)
@pytest.mark.parametrize("reader", READERS)
def test_a_line_that_is_no_json_is_named_with_the_reason(tmp_path, reader, content, reason):
    path = tmp_path / "file.jsonl"
    path.write_bytes(entries(reader)[0].encode() + b"\n\n" + content + b"\n")
    with pytest.raises(ValueError, match=rf"file\.jsonl, line 3: .*{reason}") as caught:
        READERS[reader][0](path)
    assert "\n" not in str(caught.value)
    assert not isinstance(caught.value, UnicodeError)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("reader", READERS)
def test_a_file_in_another_encoding_is_named(tmp_path, reader, encoding):
    path = tmp_path / "file.jsonl"
    path.write_text("\n".join(entries(reader)), encoding)
    with pytest.raises(ValueError, match=r"file\.jsonl, line 1: .*its encoding must be UTF-8, and seems to be UTF-16"):
        READERS[reader][0](path)


@pytest.mark.parametrize("value", [None, "", "  ", ["x"], {}])
@pytest.mark.parametrize(
    ("reader", "key"),
    [
        ("questions", "question"),
        ("work", "domain"),
        ("work", "turns"),
        ("scripts", "name"),
        ("scripts", "turns"),
        ("behaviours", "request"),
        ("conversations", "messages"),
    ],
)
def test_a_value_that_is_no_text_is_refused(tmp_path, reader, key, value):
    changes = {key: [value] if key == "turns" else value}
    if reader == "conversations":
        changes = {"messages": [{"role": value, "content": "Hi"}]}
    path = tmp_path / "file.jsonl"
    path.write_text("\n".join(entries(reader, **changes)))
    with pytest.raises(ValueError, match=r"file\.jsonl, line 4: "):
        READERS[reader][0](path)


def test_null_is_no_label(tmp_path):
    labels = dict.fromkeys(("name", "id", "group", "side", "topic"))
    path = tmp_path / "file.jsonl"
    path.write_text("\n".join(entries("conversations", **labels)))
    conversation = read_conversations(path)[3]
    assert (conversation.name, conversation.group, conversation.side) == ("4", "", "")
    path.write_text("\n".join(entries("scripts", group=None, topic=None)))
    assert (load_scripts(path)[3].group, load_scripts(path)[3].topic) == ("", "")
    path.write_text("\n".join(entries("behaviours", category=None, ContextString=None, name=None)))
    assert behaviours.read(path)[3] == behaviours.Behaviour("4", "", "r")


def test_turns_are_a_list(tmp_path):
    path = tmp_path / "file.jsonl"
    path.write_text("\n".join(entries("scripts", turns="Hi")))
    with pytest.raises(ValueError, match=r"file\.jsonl, line 4: must be"):
        load_scripts(path)


@pytest.mark.parametrize(
    "content", ['{"instruction": [{"pos": null}]}', '{"instruction": [{"pos": ["x"]}]}', "\ufeffno"]
)
def test_a_role_whose_prompt_is_no_text_is_named(tmp_path, content):
    (tmp_path / "default.json").write_text(content)
    with pytest.raises(ValueError, match=r"default\.json: not a role"):
        calibrate.load_roles(tmp_path)


def test_a_role_may_begin_with_a_byte_order_mark(tmp_path):
    for name in ("default", "ghost", "hermit"):
        content = {"instruction": [{"pos": f"You are a {name}."}], "kind": None}
        (tmp_path / f"{name}.json").write_text(json.dumps(content), "utf-8-sig")
    assert calibrate.load_roles(tmp_path)["ghost"] == calibrate.Role("ghost", ("You are a ghost.",))


def test_pairs_of_surrogates_are_one_character(tmp_path):
    path = tmp_path / "file.jsonl"
    path.write_text(r'{"text": "\ud83d\ude00 \\ud83d"}')
    assert [line.parse() for line in jsonl.read_lines(path)] == [{"text": "\U0001f600 \\ud83d"}]


def test_a_line_that_was_cut_off_is_not_complete(tmp_path):
    path = tmp_path / "file.jsonl"
    path.write_text('{"a": 1}\n{"a": 2}\n{"a"')
    assert [line.parse() for line in jsonl.read_lines(path, complete=True)] == [{"a": 1}, {"a": 2}]
    assert len(list(jsonl.read_lines(path))) == 3
