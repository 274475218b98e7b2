"""Rendering of conversations by a model's chat template, in the form that the template takes."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from axiscap.drift.spans import THOUGHT_FIELDS, MessageSpan, depends_on, find_spans


def render_spans(
    tokenizer: Any, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]
) -> tuple[str, list[MessageSpan]]:
    """The rendering of a conversation, and the characters of each message.

    Warns of tools and tool calls that the template leaves out, and of thoughts of the last answer.

    Raises
    ------
    ValueError
        naming the template, which refuses the conversation, leaves out a message, or changes one so that it cannot be
        found.
    """
    name = f"the chat template of {getattr(tokenizer, 'name_or_path', '') or 'the model'}"
    errors: list[ValueError] = []
    renderings = []
    for form in _FORMS:
        template = _Template(tokenizer, form, tools)
        try:
            text, spans = find_spans(template.render, messages)
        except ValueError as error:
            errors.append(error)
            continue
        left_out = _fields_left_out(template, messages, text, spans)
        renderings.append((left_out, text, spans))
        if not left_out:
            break
    if not renderings:
        # An error of the template language may only say that the template does not take the form.
        raise ValueError(f"{name} {min(errors, key=lambda error: isinstance(error, _LanguageError))}")
    left_out, text, spans = min(renderings, key=lambda rendering: len(rendering[0]))
    for field in left_out:
        warnings.warn(f"{name} leaves out the {field}: the model does not read it", stacklevel=3)
    return text, spans


def with_arguments(call: Mapping[str, Any], convert: Callable[[Any], Any]) -> dict[str, Any]:
    """A tool call with its arguments converted."""
    if isinstance(call.get("function"), Mapping):
        return {**call, "function": with_arguments(call["function"], convert)}
    return {**call, "arguments": convert(call["arguments"])} if "arguments" in call else dict(call)


@dataclass(frozen=True)
class _Form:
    """The form of contents, and of the arguments of tool calls."""

    has_parts: bool = False
    has_json_arguments: bool = False

    def apply(self, message: Mapping[str, Any]) -> dict[str, Any]:
        entry = dict(message)
        thoughts = [message[field] for field in THOUGHT_FIELDS if message.get(field)]
        if thoughts:
            entry = dict.fromkeys(THOUGHT_FIELDS, thoughts[0]) | entry
        if self.has_parts:
            entry["content"] = [{"type": "text", "text": message["content"]}]
        if self.has_json_arguments and message.get("tool_calls"):
            entry["tool_calls"] = [with_arguments(call, _to_json) for call in message["tool_calls"]]
        return entry


#: Most templates take the first form.
_FORMS = (_Form(), _Form(has_json_arguments=True), _Form(has_parts=True))


class _LanguageError(ValueError):
    """A template fails, and not by ``raise_exception``."""


@dataclass(frozen=True)
class _Template:
    """The chat template of a tokenizer, with messages in one form."""

    tokenizer: Any
    form: _Form
    tools: Sequence[Mapping[str, Any]]

    def render(self, messages: Sequence[Mapping[str, Any]]) -> str:
        entries = [self.form.apply(message) for message in messages]
        try:
            text = str(self.tokenizer.apply_chat_template(entries, tools=list(self.tools) or None, tokenize=False))
        except Exception as error:  # each template raises classes of its own
            is_deliberate = type(error).__name__ == "TemplateError"
            raise (ValueError if is_deliberate else _LanguageError)(f"refuses this conversation: {error}") from None
        if self.form.has_parts and any(str(entry["content"]) in text for entry in entries):
            raise _LanguageError("refuses this conversation: it prints a list of parts as it is")
        return text


def _to_json(arguments: Any) -> str:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def _fields_left_out(
    template: _Template, messages: Sequence[Mapping[str, Any]], text: str, spans: Sequence[MessageSpan]
) -> list[str]:
    fields = []
    if template.tools and replace(template, tools=()).render(messages) == text:
        fields.append("tools of a conversation")
    for index, message in enumerate(messages):
        if message.get("tool_calls") and not depends_on(template.render, messages, text, index, "tool_calls"):
            fields.append("tool_calls of a message")
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    # Many templates drop the thoughts of earlier answers, as a server does while the conversation goes on.
    if answers and not spans[answers[-1]].thoughts:
        fields += [f"{field} of a message" for field in THOUGHT_FIELDS if messages[answers[-1]].get(field)]
    return list(dict.fromkeys(fields))
