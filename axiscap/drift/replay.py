"""Stored conversations read again: the projection of every token, at the layers that were asked for."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from axiscap.drift.conversations import CAPPED, Conversation, Encoded, encode
from axiscap.drift.scale import Drift, Scale, check_layers, drift_of, summed
from axiscap.models import text_config
from axiscap.profile import CapProfile
from axiscap.transformers import install

#: Conversations that are read ahead and sorted by length, so that a batch has little padding.
_WINDOW = 128
#: Tokens of one pass, with padding.
BATCH_TOKENS = 4096


@dataclass
class Trace:
    """A conversation as the model read it.

    Parameters
    ----------
    conversation
        what was read.
    text
        its tokens, and which of them the model said.
    layers
        where it was measured.
    projections
        (layers, tokens) float32.

    Examples
    --------
    >>> from axiscap import drift
    >>> said = {"role": "user", "content": "Who are you?"}, {"role": "assistant", "content": "An assistant."}
    >>> (trace,) = drift.replay(model, tokenizer, profile, [drift.Conversation("first", said)])
    >>> trace.projections.shape[0] == len(trace.layers)
    True
    """

    conversation: Conversation
    text: Encoded
    layers: tuple[int, ...]
    projections: Tensor  # (layers, tokens) float32

    def answers(self, layer: int) -> list[Tensor]:
        """The projections of each of the model's turns at a layer, (tokens,) each; empty turns are left out.

        Parameters
        ----------
        layer
            one of ``layers``.

        Returns
        -------
        list[Tensor]
            float32, in order.

        Examples
        --------
        >>> from axiscap import drift
        >>> said = {"role": "user", "content": "Who are you?"}, {"role": "assistant", "content": "An assistant."}
        >>> (trace,) = drift.replay(model, tokenizer, profile, [drift.Conversation("first", said)])
        >>> len(trace.answers(trace.layers[0]))
        1
        """
        row = self.projections[self.layers.index(layer)]
        said = [turn for turn in self.text.turns if turn.role == "assistant" and turn.end > turn.start]
        return [row[turn.start : turn.end] for turn in said]

    def drift(self, scale: Scale) -> Drift | None:
        """The path in figures, or None where the model says nothing in it.

        Parameters
        ----------
        scale
            of one of ``layers``.

        Returns
        -------
        Drift or None
            Of the model's turns.

        Examples
        --------
        >>> from axiscap import drift
        >>> said = {"role": "user", "content": "Who are you?"}, {"role": "assistant", "content": "An assistant."}
        >>> (trace,) = drift.replay(model, tokenizer, profile, [drift.Conversation("first", said)])
        >>> trace.drift(drift.Scale.of(profile)).turns
        1
        """
        return drift_of(self.sums(scale), scale)

    def sums(self, scale: Scale) -> list[tuple[float, int, int]]:
        """Each of the model's turns: its mean projection, its tokens, and how many of them are below the floor.

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
        >>> said = {"role": "user", "content": "Who are you?"}, {"role": "assistant", "content": "An assistant."}
        >>> (trace,) = drift.replay(model, tokenizer, profile, [drift.Conversation("first", said)])
        >>> [(mean, tokens, below)] = trace.sums(drift.Scale.of(profile))
        >>> tokens > 0
        True
        """
        return [summed(values, scale.floor) for values in self.answers(scale.layer)]


def measuring(profile: CapProfile, layers: Sequence[int] | None = None, *, capped: bool = False) -> CapProfile:
    """A profile that measures at the layers given (the profile's own without them), and caps only where asked to.

    Raises
    ------
    ValueError
        the profile has no axis at a layer.
    """
    if layers is not None:
        check_layers(profile, layers)
    wanted = sorted(set(profile.layers if layers is None else layers) | set(profile.layers if capped else ()))
    slots = []
    for layer in wanted:
        slot = profile.slot_at(layer, profile.directions)
        if layer not in profile.layers:
            assert profile.axis_all is not None
            axis = profile.axis_all[layer].expand(profile.directions, -1)
            limits = profile.norm_limit_all
            slot = slot._replace(axes=axis, lifts=axis, norm_limit=slot.norm_limit if limits is None else limits[layer])
        slots.append(slot if capped else slot._replace(floors=torch.full_like(slot.floors, -math.inf)))
    axes, lifts, floors, targets, limits = (torch.stack(part).contiguous() for part in zip(*slots, strict=True))
    model = {"model": dict(profile.model_facts)}
    return CapProfile(wanted, axes, floors, model, targets=targets, lifts=lifts, norm_limits=limits)


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
    """Has the model read stored conversations, in order, and yields what the axis saw of each.

    All tokens are given (teacher forcing), many conversations at a time. Memory does not grow with their number.

    Parameters
    ----------
    model
        a causal language model of transformers.
    tokenizer
        the model's, with a chat template.
    profile
        whose axes are measured, and whose floors hold.
    conversations
        in any number.
    layers
        where to measure; the profile's own without them.
    capped
        whether the profile is in force while the model reads; without it, in those whose side is "capped".
    batch_tokens
        at most in one pass, with padding; a longer conversation has a pass for itself.
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
    >>> said = {"role": "user", "content": "Who are you?"}, {"role": "assistant", "content": "An assistant."}
    >>> [trace.conversation.name for trace in drift.replay(model, tokenizer, profile, [drift.Conversation("a", said)])]
    ['a']
    """
    wanted = tuple(profile.layers if layers is None else sorted(set(layers)))
    probes = {cap: measuring(profile, wanted, capped=cap) for cap in (False, True)}
    longest = getattr(text_config(model), "max_position_embeddings", None)
    waiting = iter(conversations)
    while window := list(islice(waiting, _WINDOW)):
        known: list[tuple[Conversation, Encoded]] = []
        for conversation in window:
            try:
                text = encode(tokenizer, conversation.messages)
                if longest is not None and len(text.tokens) > longest:
                    raise ValueError(f"{len(text.tokens)} tokens, more than the {longest} that the model reads")
            except ValueError as error:
                if on_error is None:
                    raise ValueError(f"conversation {conversation.name}: {error}") from None
                on_error(f"conversation {conversation.name}: {error}")
            else:
                known.append((conversation, text))
        seen: dict[int, Tensor] = {}
        for cap, probe in probes.items():
            mine = [
                at
                for at, (conversation, _) in enumerate(known)
                if cap == (conversation.side == CAPPED if capped is None else capped)
            ]
            rows = [probe.layers.index(layer) for layer in wanted]
            for batch in batches({at: len(known[at][1].tokens) for at in mine}, batch_tokens):
                found = read(model, probe, [known[at][1].tokens for at in batch])
                seen |= {at: projections[rows] for at, projections in zip(batch, found, strict=True)}
        for at, (conversation, text) in enumerate(known):
            yield Trace(conversation, text, wanted, seen[at])


def batches(lengths: Mapping[int, int], limit: int) -> Iterator[list[int]]:
    """Which conversations are read together, the longest first: if memory does not suffice, it shows soon."""
    batch: list[int] = []
    for at in sorted(lengths, key=lambda at: -lengths[at]):
        if batch and (len(batch) + 1) * lengths[batch[0]] > limit:
            yield batch
            batch = []
        batch.append(at)
    if batch:
        yield batch


def turn_records(trace: Trace, scales: Sequence[Scale]) -> list[dict[str, Any]]:
    """A flat record for each of the model's turns at each of some layers: what tables are made of."""
    conversation, records = trace.conversation, []
    for scale in scales:
        for number, (mean, tokens, below) in enumerate(trace.sums(scale), start=1):
            facts = {
                "conversation": conversation.name,
                "group": conversation.group,
                "side": conversation.side,
                "turn": number,
            }
            facts["layer"] = scale.layer
            share = below / tokens if math.isfinite(scale.floor) else None
            rank = scale.percentile(mean)
            facts |= {"tokens": tokens, "mean": mean, "below_floor": share}
            records.append({**facts, "percentile": None if math.isnan(rank) else rank})
    return records


@contextlib.contextmanager
def writing_records(out: Path | None, scales: Sequence[Scale]) -> Iterator[Callable[[Trace], object]]:
    """Gives what writes a trace's records (:func:`turn_records`) to a file; without a file it does nothing.

    Parameters
    ----------
    out
        ``.jsonl`` or ``.parquet``; its folder is made.
    scales
        of the layers that the records are of.

    Raises
    ------
    ValueError
        another suffix.
    ModuleNotFoundError
        pyarrow is missing, for Parquet.
    """
    if out is None:
        yield lambda trace: None
        return
    if out.suffix not in (".jsonl", ".parquet"):
        raise ValueError(f"records are written as .jsonl or .parquet, got {out}")
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.suffix == ".jsonl":
        with out.open("w", encoding="utf-8") as file:
            yield lambda trace: file.writelines(json.dumps(record) + "\n" for record in turn_records(trace, scales))
        return
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ModuleNotFoundError:
        raise ModuleNotFoundError("Parquet needs pyarrow: pip install 'axiscap[report]'") from None
    kinds = {
        "conversation": "string", "group": "string", "side": "string", "turn": "int32", "layer": "int32",
        "tokens": "int32", "mean": "float64", "below_floor": "float64", "percentile": "float64",
    }  # fmt: skip
    schema = pyarrow.schema([(name, pyarrow.type_for_alias(kind)) for name, kind in kinds.items()])
    with parquet.ParquetWriter(out, schema) as writer:
        waiting: list[dict[str, Any]] = []

        def flush() -> None:
            writer.write_table(pyarrow.Table.from_pylist(waiting, schema))
            waiting.clear()

        def write(trace: Trace) -> None:
            waiting.extend(turn_records(trace, scales))
            if len(waiting) > 10_000:
                flush()

        yield write
        flush()


@torch.inference_mode()
def read(model: Any, probe: CapProfile, sequences: Sequence[Sequence[int]]) -> list[Tensor]:
    """Each sequence's projections at the layers of a profile that is in force meanwhile: (layers, tokens) float32."""
    longest = max(len(tokens) for tokens in sequences)
    # Padding stands behind, where no token that counts can see it.
    ids = torch.zeros(len(sequences), longest, dtype=torch.long)
    for row, tokens in zip(ids, sequences, strict=True):
        row[: len(tokens)] = torch.tensor(tokens)
    with install(model, probe) as installation:
        model(input_ids=ids.to(model.device), use_cache=False, logits_to_keep=1)
        found = installation.projections()
    stacked = torch.stack([found[layer][..., 0].cpu() for layer in probe.layers])  # (layers, batch, tokens)
    return [stacked[:, row, : len(tokens)].contiguous() for row, tokens in enumerate(sequences)]
