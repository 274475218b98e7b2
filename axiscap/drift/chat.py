"""A conversation, uncapped and capped side by side: who answers (:class:`Local`, :class:`Remote`).

Both sides get the same messages of the user, and each continues from its own answers. A model in this process answers
both sides as two rows of one batch, so that they grow together. Otherwise a server with AxisCap answers.
"""

from __future__ import annotations

import json
import math
import queue
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from axiscap.drift.conversations import CAPPED, UNCAPPED, Conversation
from axiscap.drift.recorder import Recorder
from axiscap.drift.replay import make_probe, replay
from axiscap.models import stop_tokens, text_config
from axiscap.profile import CapProfile
from axiscap.transformers import install

SIDES = (UNCAPPED, CAPPED)
#: A growing answer is measured again after this many tokens.
_MEASURING_INTERVAL = 8


@dataclass
class Turn:
    """One message of the user, and the answers of both sides.

    ``texts``, ``projections`` and ``server_means`` have the side as key. ``projections`` are (layers, tokens), at
    ``layers``. ``server_means`` is what a server reports about an answer: ``layer`` and ``mean``.
    """

    message: str
    layers: tuple[int, ...] = ()
    texts: dict[str, str] = field(default_factory=lambda: dict.fromkeys(SIDES, ""))
    projections: dict[str, Tensor] = field(default_factory=dict)
    server_means: dict[str, Mapping[str, float]] = field(default_factory=dict)


def conversations(turns: Sequence[Turn], message: str | None = None) -> list[Conversation]:
    """Both sides as stored conversations, in the order of :data:`SIDES`; ``message`` is the user's next one."""
    result = []
    for side in SIDES:
        messages = []
        for turn in turns:
            messages += [{"role": "user", "content": turn.message}, {"role": "assistant", "content": turn.texts[side]}]
        if message is not None:
            messages.append({"role": "user", "content": message})
        result.append(Conversation("conversation", tuple(messages), side=side))
    return result


def mean_at(turn: Turn, side: str, layer: int) -> float:
    """The mean projection of one answer; NaN if it was not measured at that layer."""
    reported = turn.server_means.get(side, {})
    if side not in turn.projections and reported.get("layer") == layer:
        return reported.get("mean", math.nan)
    projections = turn.projections.get(side)
    if projections is None or layer not in turn.layers or not projections.shape[1]:
        return math.nan
    return projections[turn.layers.index(layer)].double().mean().item()


class Responder(Protocol):
    """Answers both sides of a conversation."""

    def answer(self, turns: Sequence[Turn], message: str, profile: CapProfile, max_new_tokens: int) -> Iterator[Turn]:
        """Yields the new turn again and again as it grows. Projections can come later than texts.

        Raises
        ------
        ValueError
            the conversation is too long.
        """
        ...


class Local:
    """A model in this process, which answers one conversation at a time."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        if not tokenizer.chat_template:
            raise ValueError("the model's tokenizer has no chat template, so that it cannot hold a conversation")
        self.model, self.tokenizer = model, tokenizer
        self._lock = threading.Lock()

    def answer(self, turns: Sequence[Turn], message: str, profile: CapProfile, max_new_tokens: int) -> Iterator[Turn]:
        """Both sides as two rows of a batch; see :meth:`Responder.answer`."""
        inputs = self._encode(conversations(turns, message), max_new_tokens)
        prompt_lengths = inputs["attention_mask"].sum(1).tolist()
        turn, rows = Turn(message, profile.layers), [_Row(self.model) for _ in SIDES]
        with (
            self._lock,
            install(self.model, {UNCAPPED: make_probe(profile), CAPPED: profile}) as cap,
            Recorder(cap) as recorder,
        ):
            cap.select(list(SIDES))
            steps = _Steps(self.model, inputs, max_new_tokens, self.tokenizer.pad_token_id)
            try:
                for number, tokens in enumerate(steps, start=1):
                    for side, row, token in zip(SIDES, rows, tokens, strict=True):
                        row.add(token)
                        turn.texts[side] = self.tokenizer.decode(row.tokens, skip_special_tokens=True).strip()
                    if number % _MEASURING_INTERVAL == 0:
                        turn.projections = _answer_projections(recorder, prompt_lengths, rows)
                    yield turn
            finally:
                steps.stop()
            turn.projections = _answer_projections(recorder, prompt_lengths, rows)
        yield turn

    def _encode(self, sides: Sequence[Conversation], max_new_tokens: int) -> Any:
        """The prompts of both sides as one padded batch."""
        inputs = self.tokenizer.apply_chat_template(
            [list(conversation.messages) for conversation in sides],
            add_generation_prompt=True,
            padding=True,
            return_tensors="pt",
            return_dict=True,
        ).to(self.model.device)
        limit = getattr(text_config(self.model), "max_position_embeddings", None)
        if limit is not None and inputs["input_ids"].shape[1] + max_new_tokens > limit:
            raise ValueError(
                f"the conversation is longer than the {limit} tokens that the model reads: begin a new one"
            )
        return inputs


class _Row:
    """The tokens of one side's answer, up to the token that ends it."""

    def __init__(self, model: Any) -> None:
        self._stop_tokens = set(stop_tokens(model))
        self._ended = False
        self.tokens: list[int] = []

    def add(self, token: int) -> None:
        self._ended = self._ended or token in self._stop_tokens
        if not self._ended:
            self.tokens.append(token)


def _answer_projections(recorder: Recorder, prompt_lengths: Sequence[int], rows: Sequence[_Row]) -> dict[str, Tensor]:
    """The projections (layers, tokens) of the answers' tokens, by side."""
    return {
        side: projections[:, length:][:, : len(row.tokens)]
        for side, length, row, projections in zip(SIDES, prompt_lengths, rows, recorder.projections(), strict=True)
    }


class _Steps:
    """Runs ``generate`` in a thread, and iterates over the tokens of each step.

    ``put`` and ``end`` are the interface of a streamer of transformers.
    """

    def __init__(self, model: Any, inputs: Mapping[str, Any], max_new_tokens: int, pad_token_id: int) -> None:
        self._queue: queue.Queue[list[int] | BaseException | None] = queue.Queue()
        self._stopped = False
        self._prompt_came = False

        def run() -> None:
            try:
                model.generate(
                    **inputs,
                    max_new_tokens=max_new_tokens,
                    do_sample=False,
                    repetition_penalty=1.15,
                    pad_token_id=pad_token_id,
                    streamer=self,
                    stopping_criteria=[lambda ids, _: torch.full((len(ids),), self._stopped, device=ids.device)],
                )
            except BaseException as error:  # the thread that iterates raises it
                self._queue.put(error)

        self._thread = threading.Thread(target=run, daemon=True)
        self._thread.start()

    def put(self, value: Tensor) -> None:
        """``generate`` calls it with the prompt first, then with the tokens of each step."""
        if self._prompt_came:
            self._queue.put(value.tolist())
        self._prompt_came = True

    def end(self) -> None:
        self._queue.put(None)

    def stop(self) -> None:
        self._stopped = True
        self._thread.join()

    def __iter__(self) -> Iterator[list[int]]:
        while (item := self._queue.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item


#: A part of a streamed answer: its text, or what the server reports of its projections.
_Part = str | Mapping[str, float]


class Remote:
    """A server with OpenAI's protocol and AxisCap. The capped side runs under the server's default profile.

    Parameters
    ----------
    url
        the base URL, such as ``http://127.0.0.1:8000/v1``.
    reader
        the same model in this process, which measures the finished answers. Without it, the means are those that the
        server reports (``tell_drift``).
    uncapped
        what the requests of the uncapped side ask for, which the operator must allow: ``"off"``, or the name of a
        profile, such as one of strength 0. The server measures nothing under ``"off"``.

    Raises
    ------
    OSError
        no such server answers at the URL.
    """

    def __init__(self, url: str, reader: Local | None = None, uncapped: str = "off") -> None:
        import httpx

        self._client = httpx.Client(base_url=url.rstrip("/"), timeout=httpx.Timeout(300, connect=10))
        self.reader, self._uncapped = reader, uncapped
        try:
            response = self._client.get("/models")
            response.raise_for_status()
            self._model = response.json()["data"][0]["id"]
        except (httpx.HTTPError, ValueError, KeyError, IndexError) as error:
            raise OSError(f"no OpenAI-compatible server with a model answers at {url}: {error}") from None

    def answer(self, turns: Sequence[Turn], message: str, profile: CapProfile, max_new_tokens: int) -> Iterator[Turn]:
        """Both sides as two concurrent streams; see :meth:`Responder.answer`.

        Raises
        ------
        ValueError
            the server refuses a side.
        OSError
            the server stopped in the middle of an answer.
        """
        turn = Turn(message, profile.layers)
        for side, part in self._stream(conversations(turns, message), max_new_tokens):
            if isinstance(part, str):
                turn.texts[side] += part
            else:
                turn.server_means[side] = part
            yield turn
        if self.reader is not None:
            self._measure(turns, turn, profile)
            yield turn

    def _stream(self, sides: Sequence[Conversation], max_new_tokens: int) -> Iterator[tuple[str, _Part]]:
        """The parts of both answers in the order in which they arrive, each with its side."""
        stopped = threading.Event()
        arrived: queue.Queue[tuple[str, _Part | BaseException | None]] = queue.Queue()

        def request(conversation: Conversation) -> None:
            for item in self._items(conversation, max_new_tokens):
                if stopped.is_set():
                    return
                arrived.put((conversation.side, item))

        for conversation in sides:
            threading.Thread(target=request, args=(conversation,), daemon=True).start()
        try:
            running = len(sides)
            while running:
                side, item = arrived.get()
                if isinstance(item, BaseException):
                    raise item
                if item is None:
                    running -= 1
                else:
                    yield side, item
        finally:
            stopped.set()

    def _items(self, conversation: Conversation, max_new_tokens: int) -> Iterator[_Part | BaseException | None]:
        """The parts of an answer, then None; or the error that ends it, for the thread that collects the parts."""
        import httpx

        try:
            yield from self._parts(conversation, max_new_tokens)
            yield None
        except httpx.HTTPError as error:
            yield OSError(f"the server did not answer to the end: {error!r}")
        except Exception as error:
            yield error

    def _parts(self, conversation: Conversation, max_new_tokens: int) -> Iterator[_Part]:
        requested = {"axiscap": self._uncapped}
        # vLLM reads `vllm_xargs`, SGLang reads `custom_params`.
        profile = {"vllm_xargs": requested, "custom_params": requested} if conversation.side == UNCAPPED else {}
        body = {
            "model": self._model,
            "messages": list(conversation.messages),
            "temperature": 0,
            "max_tokens": max_new_tokens,
            "stream": True,
            **profile,
        }
        with self._client.stream("POST", "/chat/completions", json=body) as response:
            if response.status_code != 200:
                raise ValueError(f"the server refuses the {conversation.side} side: {response.read().decode()[:500]}")
            for line in response.iter_lines():
                if line.startswith("data: ") and line != "data: [DONE]":
                    event = json.loads(line[6:])
                    for choice in event["choices"]:
                        yield choice["delta"].get("content") or ""
                    yield from event.get("axiscap", {}).get("drift", ())

    def _measure(self, turns: Sequence[Turn], turn: Turn, profile: CapProfile) -> None:
        """Reads both finished answers with the model in this process."""
        assert self.reader is not None
        sides = conversations([*turns, turn])
        for trace in replay(self.reader.model, self.reader.tokenizer, profile, sides):
            *_, answer = (part for part in trace.text.turns if part.role == "assistant")
            turn.projections[trace.conversation.side] = trace.projections[:, answer.start : answer.end]
