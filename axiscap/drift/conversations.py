"""Stored conversations: reading them from files, and encoding them by the chat template."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from axiscap.data import jsonl
from axiscap.data.jsonl import to_label
from axiscap.drift.spans import THOUGHT_FIELDS
from axiscap.drift.template import render_spans, with_arguments

#: The sides of a conversation that was generated twice: without a profile, and under one.
UNCAPPED, CAPPED = "uncapped", "capped"


@dataclass(frozen=True)
class Conversation:
    """A stored conversation: messages of ``role`` and ``content``, as chat templates take them.

    Parameters
    ----------
    name
        a label for tables.
    messages
        ``role`` and ``content`` each.
    group
        a label that several conversations share, such as a domain.
    side
        ``capped`` or ``uncapped``, if the conversation was generated so.
    tools
        the tools that the model was offered, as chat templates take them.

    Examples
    --------
    >>> from axiscap import drift
    >>> messages = {"role": "user", "content": "Who are you?"}, {"role": "assistant", "content": "An assistant."}
    >>> drift.Conversation("first", messages).messages[1]["content"]
    'An assistant.'
    """

    name: str
    messages: tuple[dict[str, Any], ...]
    group: str = ""
    side: str = ""
    tools: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True)
class Turn:
    """The tokens of one message, from ``start`` to before ``end``, without what the template adds around it.

    ``thoughts`` are the tokens of the model's thoughts, which are no part of its answer. They are empty if there are no
    thoughts, or if the template drops them.
    """

    role: str
    start: int
    end: int
    thoughts: range = range(0)


def read_conversations(path: Path, *, on_error: Callable[[str], None] | None = None) -> Iterator[Conversation]:
    """Reads the conversations of a file one at a time. Memory does not grow with their number in a ``.jsonl`` file.

    A ``.jsonl`` file has a conversation on each line. Any other file is one JSON value: a conversation, or a list of
    them. A conversation is a list of messages, or an object that has such a list as ``messages``, ``conversation`` or
    ``conversations``, and optionally ``name`` (or ``id``), ``group``, ``side`` and ``tools`` (a list of objects, or its
    JSON). A message is ``{"role", "content"}`` (the content a string or a list of text parts), or ShareGPT's ``{"from",
    "value"}``; it may have thoughts as ``reasoning_content``, ``reasoning`` or ``thinking``, and ``tool_calls``.

    Parameters
    ----------
    path
        of the file.
    on_error
        called with a sentence for each entry that is no conversation, which is then left out.

    Yields
    ------
    Conversation
        In the file's order.

    Raises
    ------
    ValueError
        without ``on_error``: the same sentence, which names the file and the line or the conversation's number.
    OSError
        the file cannot be read.

    Examples
    --------
    >>> from axiscap import drift
    >>> _ = (folder / "one.json").write_text('[{"role": "user", "content": "Hello"}]')
    >>> [len(conversation.messages) for conversation in drift.read_conversations(folder / "one.json")]
    [1]
    """
    unit = "line" if path.suffix == ".jsonl" else "conversation"
    for number, entry in _entries(path):
        try:
            if isinstance(entry, jsonl.NotJsonError):
                raise entry
            conversation = _to_conversation(entry, str(number))
        except ValueError as error:
            if on_error is None:
                raise ValueError(f"{path}, {unit} {number}: {error}") from None
            on_error(f"{path}, {unit} {number}: {error}")
        else:
            yield conversation


def count_conversations(path: Path) -> int | None:
    """The number of conversations in a ``.jsonl`` file; None for another file, which is one JSON value."""
    return sum(1 for _ in jsonl.read_lines(path)) if path.suffix == ".jsonl" else None


def _entries(path: Path) -> Iterator[tuple[int, object]]:
    """The entries of a file with their numbers. The error stands for an entry that is no JSON."""
    if path.suffix == ".jsonl":
        for line in jsonl.read_lines(path):
            yield line.number, _try(line.parse)
        return
    value = _try(lambda: jsonl.parse_json(path.read_bytes()))
    if not isinstance(value, list) or (value and isinstance(value[0], dict) and _is_message(value[0])):
        value = [value]
    for number, entry in enumerate(value, start=1):
        is_json = not isinstance(entry, jsonl.NotJsonError)
        yield number, _try(partial(jsonl.check_characters, entry)) if is_json else entry


def _try(parse: Callable[[], object]) -> object:
    try:
        return parse()
    except jsonl.NotJsonError as error:
        return error


def _is_message(entry: Mapping[str, Any]) -> bool:
    return "role" in entry or "from" in entry


#: The roles of a message by the names that ShareGPT and its kin have for them.
_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "chatgpt": "assistant", "model": "assistant"}


def _to_conversation(entry: object, default_name: str) -> Conversation:
    facts: Mapping[str, Any] = entry if isinstance(entry, dict) else {}
    lists = [facts[key] for key in ("messages", "conversation", "conversations") if facts.get(key) is not None]
    entries = lists[0] if lists else entry
    if not isinstance(entries, list) or not entries:
        raise ValueError("a conversation must be a non-empty list of messages, or an object that has one as messages")
    messages = tuple(_to_message(message, number) for number, message in enumerate(entries, start=1))
    labels = [facts[key] for key in ("name", "id") if facts.get(key) is not None]
    name = labels[0] if labels else default_name
    group, side = to_label(facts.get("group")), to_label(facts.get("side"))
    return Conversation(str(name), messages, group, side, _tools(facts.get("tools")))


def _tools(value: Any) -> tuple[dict[str, Any], ...]:
    tools = _parse_json(value) if value else []
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ValueError("a conversation must have a list of objects as tools")
    return tuple(tools)


def _to_message(entry: object, number: int) -> dict[str, Any]:
    facts: Mapping[str, Any] = entry if isinstance(entry, dict) else {}
    role = facts.get("role", facts.get("from"))
    content = facts.get("content", facts.get("value"))
    fields = _optional_fields(facts, number)
    if content is not None or fields:
        content = _join_parts(content)
    if not isinstance(role, str) or not role.strip() or not isinstance(content, str):
        raise ValueError(f"message {number} must have a role and a text")
    if role == "tool":
        fields |= {key: facts[key] for key in ("name", "tool_call_id") if isinstance(facts.get(key), str)}
    return {"role": _ROLES.get(role, role), "content": content, **fields}


def _join_parts(content: Any) -> Any:
    """A list of text parts as one string, and null as an empty one; other contents as they are."""
    if content is None:
        return ""
    if isinstance(content, list) and all(
        isinstance(part, dict) and isinstance(part.get("text"), str) for part in content
    ):
        return "".join(part["text"] for part in content)
    return content


def _optional_fields(facts: Mapping[str, Any], number: int) -> dict[str, Any]:
    """The thoughts and the tool calls of a message, in the form that chat templates take."""
    fields: dict[str, Any] = {field: facts[field] for field in THOUGHT_FIELDS if facts.get(field)}
    for field, thoughts in fields.items():
        if not isinstance(thoughts, str):
            raise ValueError(f"message {number} must have a text as {field}")
    calls = facts.get("tool_calls")
    if calls:
        if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
            raise ValueError(f"message {number} must have a list of objects as tool_calls")
        fields["tool_calls"] = [with_arguments(call, _parse_json) for call in calls]
    return fields


def _parse_json(arguments: Any) -> Any:
    """The arguments of a tool call, or a list of tools, as objects; many files have them as a string of JSON."""
    try:
        parsed = jsonl.parse_json(arguments.encode()) if isinstance(arguments, str) else arguments
    except jsonl.NotJsonError:
        return arguments
    return parsed if isinstance(parsed, dict | list) else arguments


@dataclass(frozen=True)
class Encoded:
    """A conversation in tokens: their ids, the text of each, and the turns that they belong to."""

    tokens: list[int]
    pieces: list[str]
    turns: list[Turn]


def encode(tokenizer: Any, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = ()) -> Encoded:
    """A conversation's tokens by the model's chat template, and those of each message.

    The template describes the tools at the beginning, in tokens that belong to no message. The messages may have
    thoughts (as ``<think>`` in the content, or as ``reasoning_content``, ``reasoning`` or ``thinking``) and
    ``tool_calls``. A token that reaches over an end of a message belongs to none.

    Raises
    ------
    ValueError
        the tokenizer has no chat template or does not give offsets, or the template refuses the conversation, leaves
        out a message, or changes one so that it cannot be found.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError("the model's tokenizer has no chat template, so that it cannot read a conversation")
    if not tokenizer.is_fast:
        raise ValueError("the model's tokenizer does not tell where in the text its tokens are; a fast one does")
    entries = [{**message, "content": _join_parts(message["content"])} for message in messages]
    for number, entry in enumerate(entries, start=1):
        try:
            jsonl.check_characters(entry)
        except jsonl.NotJsonError as error:
            raise ValueError(f"message {number} ({entry['role']}) is {error}") from None
    text, spans = render_spans(tokenizer, entries, tools)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    begins = [begin for begin, _ in encoded["offset_mapping"]]
    ends = [end for _, end in encoded["offset_mapping"]]

    def tokens_in(span: range) -> range:
        start, stop = bisect_left(begins, span.start), bisect_left(ends, span.stop + 1)
        return range(start, max(start, stop))

    turns = []
    for entry, span in zip(entries, spans, strict=True):
        answer = tokens_in(span.text)
        turns.append(Turn(entry["role"], answer.start, answer.stop, tokens_in(span.thoughts)))
    # Where one character is several tokens, the first has it.
    pieces = [text[max(begin, last) : end] for begin, last, end in zip(begins, [0, *ends], ends, strict=False)]
    return Encoded(list(encoded["input_ids"]), pieces, turns)
