"""Stored conversations, read again by the model: the projection of every token at the requested layers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from axiscap.drift.conversations import CAPPED, Conversation, Encoded, encode
from axiscap.drift.statistics import Drift, drift_of, summarise_turn
from axiscap.models import text_config
from axiscap.profile import CapProfile, Slot
from axiscap.profile.scale import Scale, check_layers
from axiscap.transformers import install

#: Conversations that are encoded ahead and sorted by length, so that a batch has little padding.
_WINDOW = 128
#: The most tokens of one forward pass, with padding.
BATCH_TOKENS = 4096


@dataclass
class Trace:
    """The projections of a conversation's tokens.

    Parameters
    ----------
    conversation
        as it was stored.
    text
        its tokens, and the turns that they belong to.
    layers
        the layers of the rows of ``projections``.
    projections
        (layers, tokens) float32.

    Examples
    --------
    >>> from axiscap import drift
    >>> messages = {"role": "user", "content": "Who are you?"}, {"role": "assistant", "content": "An assistant."}
    >>> (trace,) = drift.replay(model, tokenizer, profile, [drift.Conversation("first", messages)])
    >>> trace.projections.shape[0] == len(trace.layers)
    True
    """

    conversation: Conversation
    text: Encoded
    layers: tuple[int, ...]
    projections: Tensor

    def answers(self, layer: int) -> list[Tensor]:
        """The projections of the model's turns at a layer. Turns without tokens are left out.

        Parameters
        ----------
        layer
            one of ``layers``.

        Returns
        -------
        list[Tensor]
            (tokens,) float32 for each turn.

        Examples
        --------
        >>> from axiscap import drift
        >>> messages = {"role": "user", "content": "Who are you?"}, {"role": "assistant", "content": "An assistant."}
        >>> (trace,) = drift.replay(model, tokenizer, profile, [drift.Conversation("first", messages)])
        >>> len(trace.answers(trace.layers[0]))
        1
        """
        row = self.projections[self.layers.index(layer)]
        turns = [turn for turn in self.text.turns if turn.role == "assistant" and turn.end > turn.start]
        return [row[turn.start : turn.end] for turn in turns]

    def drift(self, scale: Scale) -> Drift | None:
        """The drift statistics of the model's turns; None if the model has no turn.

        Parameters
        ----------
        scale
            of one of ``layers``.

        Returns
        -------
        Drift or None
            At the scale's layer.

        Examples
        --------
        >>> from axiscap import drift
        >>> messages = {"role": "user", "content": "Who are you?"}, {"role": "assistant", "content": "An assistant."}
        >>> (trace,) = drift.replay(model, tokenizer, profile, [drift.Conversation("first", messages)])
        >>> trace.drift(drift.Scale.of(profile)).turns
        1
        """
        return drift_of(self.sums(scale), scale)

    def sums(self, scale: Scale) -> list[tuple[float, int, int]]:
        """For each of the model's turns its mean projection, its tokens, and the number of them below the floor.

        Parameters
        ----------
        scale
            of one of ``layers``.

        Returns
        -------
        list[tuple[float, int, int]]
            As :func:`drift_of` takes them.

        Examples
        --------
        >>> from axiscap import drift
        >>> messages = {"role": "user", "content": "Who are you?"}, {"role": "assistant", "content": "An assistant."}
        >>> (trace,) = drift.replay(model, tokenizer, profile, [drift.Conversation("first", messages)])
        >>> [(mean, tokens, below)] = trace.sums(drift.Scale.of(profile))
        >>> tokens > 0
        True
        """
        return [summarise_turn(values, scale.floor) for values in self.answers(scale.layer)]


def replay(
    model: Any,
    tokenizer: Any,
    profile: CapProfile,
    conversations: Iterable[Conversation],
    *,
    layers: Sequence[int] | None = None,
    capped: bool | None = None,
    batch_tokens: int = BATCH_TOKENS,
    on_error: Callable[[str], None] | None = None,
) -> Iterator[Trace]:
    """Lets the model read stored conversations, and yields the projections of each.

    All tokens are given (teacher forcing), many conversations in one pass. Memory does not grow with their number.

    Parameters
    ----------
    model
        a causal language model of transformers.
    tokenizer
        the model's, with a chat template.
    profile
        whose axes are measured, and whose floors hold.
    conversations
        any number.
    layers
        to measure at. Default: the capped layers.
    capped
        whether the profile caps while the model reads. Default: only in conversations whose side is "capped".
    batch_tokens
        the most tokens of one pass, with padding; a longer conversation has a pass for itself.
    on_error
        called with a sentence for each conversation that cannot be read, which is then left out.

    Yields
    ------
    Trace
        In the order of the conversations.

    Raises
    ------
    ValueError
        a layer without an axis; without ``on_error``, the sentence about a conversation.

    Examples
    --------
    >>> from axiscap import drift
    >>> messages = {"role": "user", "content": "Who are you?"}, {"role": "assistant", "content": "An assistant."}
    >>> traces = drift.replay(model, tokenizer, profile, [drift.Conversation("a", messages)])
    >>> [trace.conversation.name for trace in traces]
    ['a']
    """
    measured = tuple(profile.layers if layers is None else sorted(set(layers)))
    probes = {is_capped: make_probe(profile, measured, capped=is_capped) for is_capped in (False, True)}
    pending = iter(conversations)
    while window := list(islice(pending, _WINDOW)):
        encoded = list(_encode_all(model, tokenizer, window, on_error))
        projections: dict[int, Tensor] = {}
        for is_capped, probe in probes.items():
            lengths = {
                index: len(text.tokens)
                for index, (conversation, text) in enumerate(encoded)
                if is_capped == (conversation.side == CAPPED if capped is None else capped)
            }
            rows = [probe.layers.index(layer) for layer in measured]
            for batch in group_by_length(lengths, batch_tokens):
                sequences = [encoded[index][1].tokens for index in batch]
                for index, values in zip(batch, project_sequences(model, probe, sequences), strict=True):
                    projections[index] = values[rows]
        for index, (conversation, text) in enumerate(encoded):
            yield Trace(conversation, text, measured, projections[index])


def make_probe(profile: CapProfile, layers: Sequence[int] | None = None, *, capped: bool = False) -> CapProfile:
    """A profile that measures at any layers with an axis, and caps at the profile's layers only if ``capped``.

    Parameters
    ----------
    layers
        to measure at. Default: the capped layers.

    Raises
    ------
    ValueError
        the profile has no axis at a layer.
    """
    if layers is not None:
        check_layers(profile, layers)
    probed = sorted(set(profile.layers if layers is None else layers) | set(profile.layers if capped else ()))
    slots = [_probe_slot(profile, layer, capped=capped) for layer in probed]
    axes, lifts, floors, targets, limits = (torch.stack(part).contiguous() for part in zip(*slots, strict=True))
    facts = {"model": dict(profile.model_facts)}
    return CapProfile(probed, axes, floors, facts, targets=targets, lifts=lifts, norm_limits=limits)


def _probe_slot(profile: CapProfile, layer: int, *, capped: bool) -> Slot:
    slot = profile.slot_at(layer, profile.directions)
    if layer not in profile.layers:
        assert profile.axis_all is not None
        axes = profile.axis_all[layer].expand(profile.directions, -1)
        limits = profile.norm_limit_all
        slot = slot._replace(axes=axes, lifts=axes, norm_limit=slot.norm_limit if limits is None else limits[layer])
    return slot if capped else slot._replace(floors=torch.full_like(slot.floors, -math.inf))


def _encode_all(
    model: Any, tokenizer: Any, conversations: Iterable[Conversation], on_error: Callable[[str], None] | None
) -> Iterator[tuple[Conversation, Encoded]]:
    longest = getattr(text_config(model), "max_position_embeddings", None)
    for conversation in conversations:
        try:
            text = encode(tokenizer, conversation.messages, conversation.tools)
            if longest is not None and len(text.tokens) > longest:
                raise ValueError(f"{len(text.tokens)} tokens, more than the {longest} that the model reads")
        except ValueError as error:
            if on_error is None:
                raise ValueError(f"conversation {conversation.name}: {error}") from None
            on_error(f"conversation {conversation.name}: {error}")
        else:
            yield conversation, text


def group_by_length(lengths: Mapping[int, int], limit: int) -> Iterator[list[int]]:
    """Groups the keys into batches of at most ``limit`` tokens with padding.

    The longest come first: if memory does not suffice, the first batch fails.
    """
    batch: list[int] = []
    for index in sorted(lengths, key=lambda index: -lengths[index]):
        if batch and (len(batch) + 1) * lengths[batch[0]] > limit:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


@torch.inference_mode()
def project_sequences(model: Any, probe: CapProfile, sequences: Sequence[Sequence[int]]) -> list[Tensor]:
    """The projections of sequences in one pass under a profile: (layers, tokens) float32 each."""
    longest = max(len(tokens) for tokens in sequences)
    # Padding stands behind the tokens: a causal model's rows do not see what follows them.
    ids = torch.zeros(len(sequences), longest, dtype=torch.long)
    for row, tokens in zip(ids, sequences, strict=True):
        row[: len(tokens)] = torch.tensor(tokens)
    with install(model, probe) as installation:
        model(input_ids=ids.to(model.device), use_cache=False, logits_to_keep=1)
        by_layer = installation.projections()
    stacked = torch.stack([by_layer[layer][..., 0].cpu() for layer in probe.layers])  # (layers, batch, tokens)
    return [stacked[:, row, : len(tokens)].contiguous() for row, tokens in enumerate(sequences)]
