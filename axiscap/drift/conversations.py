"""Stored conversations: reading them from files, and encoding them by the chat template."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from axiscap import jsonl
from axiscap.jsonl import to_label

#: The sides of a conversation that was generated twice: without a profile, and under one.
UNCAPPED, CAPPED = "uncapped", "capped"
#: What stands in a message's place while the chat template is asked where it puts it.
_MARK = "\u2402axiscap\u2403"


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

    Examples
    --------
    >>> from axiscap import drift
    >>> said = {"role": "user", "content": "Who are you?"}, {"role": "assistant", "content": "An assistant."}
    >>> drift.Conversation("first", said).messages[1]["content"]
    'An assistant.'
    """

    name: str
    messages: tuple[dict[str, str], ...]
    group: str = ""
    side: str = ""


@dataclass(frozen=True)
class Turn:
    """The tokens of one message, from ``start`` to before ``end``, without what the template adds around it."""

    role: str
    start: int
    end: int


def read_conversations(path: Path, *, on_error: Callable[[str], None] | None = None) -> Iterator[Conversation]:
    """Reads the conversations of a file one at a time. Memory does not grow with their number in a ``.jsonl`` file.

    A ``.jsonl`` file has a conversation on each line. Any other file is one JSON value: a conversation, or a list of
    them. A conversation is a list of messages, or an object that has such a list as ``messages``, ``conversation`` or
    ``conversations``, and optionally ``name`` (or ``id``), ``group`` and ``side``. A message is ``{"role",
    "content"}`` (the content a string or a list of text parts), or ShareGPT's ``{"from", "value"}``.

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


def _entries(path: Path) -> Iterator[tuple[int, object]]:
    """The entries of a file with their numbers. The error stands for an entry that is no JSON."""
    if path.suffix == ".jsonl":
        for line in jsonl.read_lines(path):
            yield line.number, _try(line.parse)
        return
    value = _try(lambda: jsonl.parse_json(path.read_bytes()))
    is_list = isinstance(value, list) and not (value and isinstance(value[0], dict) and _is_message(value[0]))
    yield from enumerate(value if is_list and isinstance(value, list) else [value], start=1)


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
    lists = [facts[key] for key in ("messages", "conversation", "conversations") if key in facts]
    entries = lists[0] if lists else entry
    if not isinstance(entries, list) or not entries:
        raise ValueError("a conversation must be a non-empty list of messages, or an object that has one as messages")
    messages = tuple(_to_message(message, number) for number, message in enumerate(entries, start=1))
    labels = [facts[key] for key in ("name", "id") if facts.get(key) is not None]
    name = labels[0] if labels else default_name
    return Conversation(str(name), messages, to_label(facts.get("group")), to_label(facts.get("side")))


def _to_message(entry: object, number: int) -> dict[str, str]:
    facts: Mapping[str, Any] = entry if isinstance(entry, dict) else {}
    role = facts.get("role", facts.get("from"))
    content = facts.get("content", facts.get("value"))
    if isinstance(content, list) and all(
        isinstance(part, dict) and isinstance(part.get("text"), str) for part in content
    ):
        content = "".join(part["text"] for part in content)
    if not isinstance(role, str) or not role.strip() or not isinstance(content, str):
        raise ValueError(f"message {number} must have a role and a text")
    return {"role": _ROLES.get(role, role), "content": content}


@dataclass(frozen=True)
class Encoded:
    """A conversation in tokens: their ids, the text of each, and the turns that they belong to."""

    tokens: list[int]
    pieces: list[str]
    turns: list[Turn]


def encode(tokenizer: Any, messages: Sequence[Mapping[str, str]]) -> Encoded:
    """A conversation's tokens by the model's chat template, and where each message's own are.

    The template is asked for each message: what it renders with a mark in the message's place says where the message
    begins and how much follows it. Tokens that reach over an end of a message belong to none.

    Raises
    ------
    ValueError
        there is no chat template, it refuses the messages, or the tokenizer cannot tell where tokens are.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError("the model's tokenizer has no chat template, so that it cannot read a conversation")
    if not tokenizer.is_fast:
        raise ValueError("the model's tokenizer does not tell where in the text its tokens are; a fast one does")

    def render(content: Sequence[Mapping[str, str]]) -> str:
        try:
            return str(tokenizer.apply_chat_template([dict(message) for message in content], tokenize=False))
        except Exception as error:  # the template's own; which class it is depends on the template
            raise ValueError(f"the model's chat template refuses this conversation: {error}") from None

    text = render(messages)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    begins = [begin for begin, _ in encoded["offset_mapping"]]
    ends = [end for _, end in encoded["offset_mapping"]]
    # Where one character is several tokens, the first has it.
    pieces = [text[max(begin, last) : end] for begin, last, end in zip(begins, [0, *ends], ends, strict=False)]
    turns = []
    for at, message in enumerate(messages):
        marked = render([*messages[:at], {**message, "content": _MARK}, *messages[at + 1 :]])
        first = marked.find(_MARK)
        if first < 0:
            raise ValueError(f"the model's chat template leaves out message {at + 1} ({message['role']})")
        last = len(text) - (len(marked) - first - len(_MARK))
        start, end = bisect_left(begins, first), bisect_left(ends, last + 1)
        turns.append(Turn(message["role"], start, max(start, end)))
    return Encoded(list(encoded["input_ids"]), pieces, turns)
