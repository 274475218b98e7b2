"""Where the text of each message lies in a conversation that a chat template rendered.

Templates look into messages: they split them at ``</think>``, strip them, and move or drop thoughts. Therefore a
message is not replaced by a mark. Its own letters are exchanged for others, and the conversation is rendered again: the
characters that differ between the two renderings are the letters of that message.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

#: The fields that hold thoughts; engines and templates disagree on the name.
THOUGHT_FIELDS = ("reasoning_content", "reasoning", "thinking")
#: The tags around thoughts in a content.
_THOUGHT_TAGS = (
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),
    ("<reasoning>", "</reasoning>"),
    ("<seed:think>", "</seed:think>"),
    ("[THINK]", "[/THINK]"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<|inner_prefix|>", "<|inner_suffix|>"),
    ("<|channel>thought", "<channel|>"),
    ("◁think▷", "◁/think▷"),
)
#: Text that may be a tag which the template looks for.
_TAG = re.compile(r"<[^<>\s]{1,60}>|\[[^\[\]\s]{1,60}\]|◁[^◁▷\s]{1,60}▷|<\|channel>thought")
#: Characters that a template may escape, so that the rendering has another length.
_ESCAPED = frozenset("<>\"'&\\")

Message = Mapping[str, Any]
Render = Callable[[Sequence[Message]], str]


@dataclass(frozen=True)
class MessageSpan:
    """The characters of a message's text, and of its thoughts. A range is empty if there is nothing to find."""

    text: range
    thoughts: range


def find_spans(render: Render, messages: Sequence[Message]) -> tuple[str, list[MessageSpan]]:
    """Renders a conversation, and finds the characters of each message.

    Parameters
    ----------
    render
        raises ValueError for messages that the template refuses.
    messages
        with a string as ``content`` each.

    Raises
    ------
    ValueError
        the template refuses the messages, leaves out a text, or changes a text so that it cannot be found for certain.
    """
    rendering = _Rendering(render, messages)
    return rendering.text, [_find_message(rendering, index) for index in range(len(messages))]


def depends_on(render: Render, messages: Sequence[Message], text: str, index: int, field: str) -> bool:
    """Whether the rendering ``text`` of the messages changes without a field of one message."""
    reduced = {key: value for key, value in messages[index].items() if key != field}
    try:
        return render([*messages[:index], reduced, *messages[index + 1 :]]) != text
    except ValueError:
        return True


def _find_message(rendering: _Rendering, index: int) -> MessageSpan:
    message = rendering.messages[index]
    error = ValueError(f"leaves out message {index + 1} ({message['role']})")
    for text_part, thought_part in _split_content(message["role"], message["content"]):
        try:
            text = rendering.find(index, ("content",), text_part)
        except _UncertainError:
            error = ValueError(
                f"changes message {index + 1} ({message['role']}), so that its tokens cannot be found for certain"
            )
            continue
        if text is not None:
            return MessageSpan(text, _find_thoughts(rendering, index, thought_part))
    raise error


def _find_thoughts(rendering: _Rendering, index: int, part: slice) -> range:
    fields = tuple(field for field in THOUGHT_FIELDS if rendering.messages[index].get(field))
    try:
        thoughts = rendering.find(index, ("content",), part)
        if not thoughts and fields:
            thoughts = rendering.find(index, fields, slice(0, len(rendering.messages[index][fields[0]])))
    except _UncertainError:
        return range(0)
    return thoughts or range(0)


def _split_content(role: str, content: str) -> list[tuple[slice, slice]]:
    """The possible splits of a content into its text and its thoughts, the most likely first."""
    undivided = (slice(0, len(content)), slice(0, 0))
    if role != "assistant":
        return [undivided]
    likely: list[tuple[slice, slice]] = []
    unlikely: list[tuple[slice, slice]] = []
    for begin, end in _THOUGHT_TAGS:
        opening, closing = content.find(begin), content.find(end)
        is_first = opening >= 0 and not content[:opening].strip()
        if closing >= 0:
            # The prompt of some models ends with the opening tag, which is then not in the answer.
            is_likely = is_first or not 0 <= opening < closing
            (likely if is_likely else unlikely).extend(_split_at_tags(content, begin, end))
        elif is_first:  # the thoughts were cut off
            likely.append((slice(len(content), len(content)), slice(opening + len(begin), len(content))))
    return [*likely, undivided, *unlikely]


def _split_at_tags(content: str, begin: str, end: str) -> list[tuple[slice, slice]]:
    """The text behind the first closing tag and behind the last, since thoughts may recur and a text may name a tag."""
    opening, closing = content.find(begin), content.find(end)
    thoughts = slice(opening + len(begin) if 0 <= opening < closing else 0, closing)
    first, last = closing + len(end), content.rfind(end) + len(end)
    reopening = content.find(begin, last)
    behind_first = slice(first, len(content)), thoughts
    behind_last = slice(last, reopening if reopening >= 0 else len(content)), thoughts
    return [behind_last, behind_first] if begin in content[first:] else [behind_first, behind_last]


class _UncertainError(Exception):
    """A text cannot be found for certain."""


class _Rendering:
    """A rendered conversation."""

    def __init__(self, render: Render, messages: Sequence[Message]) -> None:
        self._render = render
        self.messages = messages
        self.text = render(messages)

    def find(self, index: int, fields: Sequence[str], part: slice) -> range | None:
        """The characters of a part of a message's fields, which have the same value; None if it is not rendered.

        Whitespace around the part belongs to it if it lies at an end of the field and the template renders it.

        Raises
        ------
        _UncertainError
            the part is rendered several times, or every exchange of letters changes the choices of the template.
        """
        value: str = self.messages[index][fields[0]]
        core = value[part].strip()
        if not core:
            return range(0)
        start = part.start + value[part].index(core)
        stop = start + len(core)
        span = None
        for attempt, exchanged in enumerate(_exchanges(core)):
            changed = self._render_with(index, fields, value[:start] + exchanged + value[stop:])
            if changed == self.text and attempt == 0:
                return None
            if changed is not None:
                span = _find_exchange(self.text, changed, core, exchanged)
                if span is None and attempt == 0:
                    span = _find_letters(self.text, changed, core, exchanged)
            if span is not None:
                break
        if span is None:
            raise _UncertainError
        kept_before = kept_behind = 0
        if part.start == 0 and start > 0:
            kept_before = self._count_kept(index, fields, slice(0, start), span.start, -1)
        if part.stop == len(value) and stop < len(value):
            kept_behind = self._count_kept(index, fields, slice(stop, len(value)), span.stop, 1)
        return range(span.start - kept_before, span.stop + kept_behind)

    def _count_kept(self, index: int, fields: Sequence[str], part: slice, position: int, direction: int) -> int:
        """How much of a value's whitespace the template keeps before (-1) or behind (1) a position."""
        value: str = self.messages[index][fields[0]]
        whitespace = value[part]
        for replacement in ("x" * len(whitespace), ""):
            changed = self._render_with(index, fields, value[: part.start] + replacement + value[part.stop :])
            count = len(whitespace) if replacement else len(self.text) - len(changed or self.text)
            if not 0 < count <= len(whitespace):
                continue
            start, stop = (position - count, position) if direction < 0 else (position, position + count)
            expected = whitespace[-count:] if direction < 0 else whitespace[:count]
            if self.text[start:stop] == expected and changed == self.text[:start] + replacement + self.text[stop:]:
                return count
        return 0

    def _render_with(self, index: int, fields: Sequence[str], value: str) -> str | None:
        message = {**self.messages[index], **dict.fromkeys(fields, value)}
        try:
            return self._render([*self.messages[:index], message, *self.messages[index + 1 :]])
        except ValueError:
            return None


def _find_exchange(text: str, changed: str, core: str, exchanged: str) -> range | None:
    """Where ``core`` lies in a text, if that is where ``exchanged`` lies in the changed text, and all else is equal."""
    if len(text) != len(changed):
        return None
    start = _first_difference(text, changed) - _first_difference(core, exchanged)
    stop = start + len(core)
    is_exchange = start >= 0 and text[start:stop] == core and changed == text[:start] + exchanged + text[stop:]
    return range(start, stop) if is_exchange else None


def _find_letters(text: str, changed: str, core: str, exchanged: str) -> range | None:
    """Where the letters of ``core`` lie in a text that has them in another form, for example with escapes between.

    All letters were exchanged. Each must be in the text once.
    """
    if len(text) != len(changed):
        return None
    positions = [position for position, (old, new) in enumerate(zip(text, changed, strict=True)) if old != new]
    if len(positions) != sum(old != new for old, new in zip(core, exchanged, strict=True)):
        return None
    start, stop = positions[0], positions[-1] + 1
    first, last = _first_difference(core, exchanged), len(core) - _first_difference(core[::-1], exchanged[::-1])
    for character in reversed(core[:first]):
        start -= next((len(form) for form in _written(character) if text.endswith(form, 0, start)), 0)
    for character in core[last:]:
        stop += next((len(form) for form in _written(character) if text.startswith(form, stop)), 0)
    return range(start, stop)


def _written(character: str) -> tuple[str, str]:
    """The forms of a character in a rendering: as a string of JSON has it, and as it is."""
    return json.dumps(character, ensure_ascii=False)[1:-1], character


def _first_difference(first: str, second: str) -> int:
    """The length of the common prefix of two strings of one length."""
    low, high = 0, len(first)
    while low < high:
        middle = (low + high) // 2
        if first[low : middle + 1] == second[low : middle + 1]:
            low = middle + 1
        else:
            high = middle
    return low


def _exchanges(core: str) -> Iterator[str]:
    """Texts of the same length with other characters, from those that change most and no tag, to the last resort."""
    tags = {position for match in _TAG.finditer(core) for position in range(*match.span())}
    letters = [position for position, character in enumerate(core) if character.isalnum()]
    outside = [position for position in letters if position not in tags]
    others = [position for position, character in enumerate(core) if not (character.isspace() or character in _ESCAPED)]
    choices = (outside, outside[:1] + outside[-1:], outside[:1], outside[-1:], letters) if letters else (others,)
    for positions in choices:
        exchanged = _exchange(core, positions)
        if exchanged != core:
            yield exchanged
    yield "x" * len(core) if core.strip("x") else "y" * len(core)


def _exchange(core: str, positions: Sequence[int]) -> str:
    characters = list(core)
    for position in positions:
        characters[position] = _neighbour(core[position])
    return "".join(characters)


@cache
def _neighbour(character: str) -> str:
    """Another character of the same kind."""
    for step in (1, -1, 2, -2, 3, -3):
        code = ord(character) + step
        if not 0 <= code <= 0x10FFFF:
            continue
        neighbour = chr(code)
        is_alike = unicodedata.category(neighbour) == unicodedata.category(character)
        if is_alike and neighbour.isascii() == character.isascii() and neighbour not in _ESCAPED:
            return neighbour
    return character
