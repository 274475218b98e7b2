"""Stored conversations: read from files, and encoded as the model's chat template has them."""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

#: The sides of a conversation that was generated without a profile in force and with it.
UNCAPPED, CAPPED = "uncapped", "capped"
#: What stands in a message's place while the chat template is asked where it puts it.
_MARK = "\u2402axiscap\u2403"


@dataclass(frozen=True)
class Conversation:
    """A stored conversation: messages of ``role`` and ``content``, as chat templates take them.

    Parameters
    ----------
    name
        by which people know it.
    messages
        ``role`` and ``content`` each.
    group
        what it belongs to, such as a domain.
    side
        ``capped`` or ``uncapped``, where it is known which it was.

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
    side: str = ""  # UNCAPPED or CAPPED, where the same conversation was generated uncapped and capped


@dataclass(frozen=True)
class Turn:
    """One message: its role, and its tokens from ``start`` to before ``end``, without what the template puts around."""

    role: str
    start: int
    end: int


def read_conversations(path: Path, *, on_error: Callable[[str], None] | None = None) -> Iterator[Conversation]:
    """The conversations of a file, one after another, in memory that does not grow with their number.

    ``.jsonl`` has one on each line, any other file is one JSON value: a conversation, or a list of them. A conversation
    is a list of messages, or an object that has one under ``messages``, ``conversation`` or ``conversations``, and
    perhaps ``name`` (or ``id``), ``group`` and ``side``. A message is ``{"role", "content"}`` (content also as a list
    of text parts), or ShareGPT's ``{"from", "value"}``.

    Parameters
    ----------
    path
        of the file.
    on_error
        called with a sentence for each entry that is none, which is then left out.

    Yields
    ------
    Conversation
        In the file's order.

    Raises
    ------
    ValueError
        without ``on_error``, the same sentence; it names the file and the line or entry.
    OSError
        the file cannot be read.

    Examples
    --------
    >>> from axiscap import drift
    >>> _ = (folder / "one.json").write_text('[{"role": "user", "content": "Hello"}]')
    >>> [len(conversation.messages) for conversation in drift.read_conversations(folder / "one.json")]
    [1]
    """
    lines = path.suffix == ".jsonl"
    for number, entry in _entries(path) if lines else enumerate(_listed(path), start=1):
        where = f"{path}, {'line' if lines else 'conversation'} {number}"
        try:
            if isinstance(entry, ValueError):
                raise entry
            conversation = _conversation(entry, f"{number}")
        except ValueError as error:
            if on_error is None:
                raise ValueError(f"{where}: {error}") from None
            on_error(f"{where}: {error}")
        else:
            yield conversation


def _entries(path: Path) -> Iterator[tuple[int, object]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield number, _parsed(line)


def _parsed(text: bytes) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        return ValueError(f"not JSON ({error})")


def _listed(path: Path) -> list[object]:
    found = _parsed(path.read_bytes())
    is_many = isinstance(found, list) and not (found and isinstance(found[0], dict) and _is_message(found[0]))
    return list(found) if is_many and isinstance(found, list) else [found]


def _is_message(entry: Mapping[str, Any]) -> bool:
    return "role" in entry or "from" in entry


_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "chatgpt": "assistant", "model": "assistant"}


def _conversation(entry: object, name: str) -> Conversation:
    facts: Mapping[str, Any] = entry if isinstance(entry, dict) else {}
    found = [facts[key] for key in ("messages", "conversation", "conversations") if key in facts]
    listed = found[0] if found else entry
    if not isinstance(listed, list) or not listed:
        raise ValueError("a conversation must be a non-empty list of messages, or an object that has one as messages")
    messages = tuple(_message(message, at) for at, message in enumerate(listed, start=1))
    label = facts.get("name", facts.get("id", name))
    return Conversation(str(label), messages, str(facts.get("group", "")), str(facts.get("side", "")))


def _message(entry: object, at: int) -> dict[str, str]:
    facts: Mapping[str, Any] = entry if isinstance(entry, dict) else {}
    role = facts.get("role", facts.get("from"))
    content = facts.get("content", facts.get("value"))
    if isinstance(content, list) and all(
        isinstance(part, dict) and isinstance(part.get("text"), str) for part in content
    ):
        content = "".join(part["text"] for part in content)
    if not isinstance(role, str) or not isinstance(content, str):
        raise ValueError(f"message {at} must have a role and a text")
    return {"role": _ROLES.get(role, role), "content": content}


@dataclass(frozen=True)
class Encoded:
    """A conversation in tokens: their ids, the text that each stands for, and the messages' places."""

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
