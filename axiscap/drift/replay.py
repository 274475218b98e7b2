"""Drift: where conversations go along the axis, read again from stored texts, or followed as they are written.

A *talk* is a stored conversation. Reading it (:func:`replay`) gives a *trace*: the projection of every token at the
layers that were asked for, and where each message's tokens are. A :class:`Monitor` follows many conversations at once
in memory that does not grow with their length, and says when one falls below normal and when it comes back.

Projections are those of the rows as they came, before the cap of their own layer. Their unit is that of the residual
stream, so that two layers do not compare; percentiles of the model's own normal answers do.
"""

from __future__ import annotations

import json
import math
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from axiscap.installation import Installation, install
from axiscap.models import text_config
from axiscap.profile import CapProfile

#: The sides of a talk that was held twice, without a profile in force and with it.
UNCAPPED, CAPPED = "uncapped", "capped"
#: What stands in a message's place while the chat template is asked where it puts it.
_MARK = "\u2402axiscap\u2403"
#: Talks that are read ahead and sorted by length, so that a batch has little padding.
_WINDOW = 128
#: Tokens of one pass, with padding.
BATCH_TOKENS = 4096


@dataclass(frozen=True)
class Talk:
    """A stored conversation: messages of ``role`` and ``content``, as chat templates take them."""

    name: str
    messages: tuple[dict[str, str], ...]
    group: str = ""
    side: str = ""  # UNCAPPED or CAPPED, where the same conversation was held twice


@dataclass(frozen=True)
class Turn:
    """One message: its role, and its tokens from ``start`` to before ``end``, without what the template puts around."""

    role: str
    start: int
    end: int


@dataclass(frozen=True)
class Drift:
    """A conversation's path in figures, at one layer.

    Attributes:
        turns: the model's, and how many ``tokens`` they have.
        level: mean of the turns' mean projections.
        slope: of the turns' mean projections by least squares, a turn; NaN with one turn.
        lowest: the lowest turn's mean projection; ``lowest_turn`` counts the model's turns from 1.
        below: share of tokens below the floor; NaN where the layer has none.
        percentile: of the level among the means of the model's own normal answers, 0 to 100; NaN where the profile does
            not know them. ``lowest_percentile`` is the lowest turn's.
    """

    turns: int
    tokens: int
    level: float
    slope: float
    lowest: float
    lowest_turn: int
    below: float
    percentile: float
    lowest_percentile: float


@dataclass
class Trace:
    """A talk as the model read it."""

    talk: Talk
    text: Encoded
    layers: tuple[int, ...]
    projections: Tensor  # (layers, tokens) float32

    def answers(self, layer: int) -> list[Tensor]:
        """The projections of each of the model's turns at a layer, (tokens,) each; empty turns are left out."""
        row = self.projections[self.layers.index(layer)]
        said = [turn for turn in self.text.turns if turn.role == "assistant" and turn.end > turn.start]
        return [row[turn.start : turn.end] for turn in said]

    def drift(self, scale: Scale) -> Drift | None:
        """The path in figures, or None where the model says nothing in it."""
        return drift_of(self.sums(scale), scale)

    def sums(self, scale: Scale) -> list[tuple[float, int, int]]:
        """Each of the model's turns: its mean projection, its tokens, and how many of them are below the floor."""
        return [summed(values, scale.floor) for values in self.answers(scale.layer)]


@dataclass(frozen=True)
class Scale:
    """What a layer's projections are held against: the profile's floor there, and its model's normal answers.

    Args:
        layer: the layer.
        floor: the profile's, -inf where it does not cap this layer.
        ranks: percentiles, ascending, and ``values``: the normal answers' mean projections at them.
    """

    layer: int
    floor: float
    ranks: tuple[float, ...]
    values: tuple[float, ...]

    @classmethod
    def of(cls, profile: CapProfile, layer: int | None = None) -> Scale:
        """The scale of a layer; without one, of the capped layer that separates best, or else of the middle one.

        Raises:
            ValueError: the profile has no axis at that layer.
        """
        if layer is None:
            layer = _telling_layer(profile)
        _check_layers(profile, [layer])
        floor = profile.floors[profile.layers.index(layer), 0].item() if layer in profile.layers else -math.inf
        table = profile.tables.get("assistant")
        if table is None or layer >= len(table):
            return cls(layer, floor, (), ())
        return cls(layer, floor, profile.percentiles, tuple(table[layer].tolist()))

    def at(self, percentile: float) -> float:
        """The normal answers' mean projection at one of the table's percentiles; NaN where that is not known."""
        return self.values[self.ranks.index(percentile)] if percentile in self.ranks else math.nan

    def percentile(self, projection: float) -> float:
        """Of a turn's mean projection among normal answers; beyond the table's ends 0 or 100, NaN without a table."""
        if not self.values or not math.isfinite(projection):
            return math.nan
        if projection < self.values[0] or projection > self.values[-1]:
            return 0.0 if projection < self.values[0] else 100.0
        right = max(1, bisect_left(self.values, projection))
        low, high = self.values[right - 1], self.values[right]
        share = (projection - low) / (high - low) if high > low else 1.0
        return self.ranks[right - 1] + share * (self.ranks[right] - self.ranks[right - 1])


def _telling_layer(profile: CapProfile) -> int:
    evidence = profile.provenance.get("evidence")
    auc = evidence.get("auc") if isinstance(evidence, Mapping) else None
    if isinstance(auc, list) and len(auc) > profile.layers[-1]:
        return max(profile.layers, key=lambda layer: float(auc[layer]))
    return profile.layers[len(profile.layers) // 2]


def known_layers(profile: CapProfile) -> list[int]:
    """Where the profile has an axis to measure on: the capped layers, and all others where it keeps theirs."""
    return sorted({*profile.layers, *range(0 if profile.axis_all is None else len(profile.axis_all))})


def _check_layers(profile: CapProfile, layers: Sequence[int]) -> None:
    known = known_layers(profile)
    unknown = sorted(set(layers) - set(known))
    if unknown:
        raise ValueError(f"the profile has no axis at layer {unknown[0]}; it has one at {_ranges(known)}")


def _ranges(numbers: Iterable[int]) -> str:
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(f"{first}-{last}" if last > first else str(first) for first, last in runs)


def summed(projections: Tensor, floor: float) -> tuple[float, int, int]:
    """Mean, number and number below the floor of a turn's projections, (tokens,)."""
    return projections.double().mean().item(), len(projections), int((projections < floor).sum())


class _Path:
    """One conversation's running sums."""

    def __init__(self) -> None:
        self.turns = self.tokens = self.below = 0
        self._sum = self._sum_by_turn = 0.0
        self.lowest, self.lowest_turn = math.inf, 0

    def add(self, mean: float, tokens: int, below: int) -> None:
        """A turn: its mean projection, its tokens, and how many of them were below the floor."""
        self.turns += 1
        self.tokens += tokens
        self.below += below
        self._sum += mean
        self._sum_by_turn += self.turns * mean
        if mean < self.lowest:
            self.lowest, self.lowest_turn = mean, self.turns

    def drift(self, scale: Scale) -> Drift:
        level, n = self._sum / self.turns, self.turns
        # Least squares on 1, 2, ..., n, whose squared distances from their mean add up to n (n^2 - 1) / 12.
        slope = (self._sum_by_turn - level * n * (n + 1) / 2) / (n * (n * n - 1) / 12) if n > 1 else math.nan
        return Drift(
            turns=n,
            tokens=self.tokens,
            level=level,
            slope=slope,
            lowest=self.lowest,
            lowest_turn=self.lowest_turn,
            below=self.below / self.tokens if math.isfinite(scale.floor) else math.nan,
            percentile=scale.percentile(level),
            lowest_percentile=scale.percentile(self.lowest),
        )


def drift_of(turns: Iterable[tuple[float, int, int]], scale: Scale) -> Drift | None:
    """The drift of turns as :func:`summed` gives them; None where there are none."""
    path = _Path()
    for turn in turns:
        path.add(*turn)
    return path.drift(scale) if path.turns else None


# Stored conversations.


def read_talks(path: Path, *, on_error: Callable[[str], None] | None = None) -> Iterator[Talk]:
    """The conversations of a file, one after another, in memory that does not grow with their number.

    ``.jsonl`` has one on each line, any other file is one JSON value: a conversation, or a list of them. A conversation
    is a list of messages, or an object that has one under ``messages``, ``conversation`` or ``conversations``, and
    perhaps ``name`` (or ``id``), ``group`` and ``side``. A message is ``{"role", "content"}`` (content also as a list
    of text parts), or ShareGPT's ``{"from", "value"}``.

    Args:
        on_error: called with a sentence for each entry that is none, which is then left out.

    Raises:
        ValueError: without ``on_error``, the same sentence; it names the file and the line or entry.
        OSError: the file cannot be read.
    """
    lines = path.suffix == ".jsonl"
    for number, entry in _entries(path) if lines else enumerate(_listed(path), start=1):
        where = f"{path}, {'line' if lines else 'conversation'} {number}"
        try:
            if isinstance(entry, ValueError):
                raise entry
            talk = _talk(entry, f"{number}")
        except ValueError as error:
            if on_error is None:
                raise ValueError(f"{where}: {error}") from None
            on_error(f"{where}: {error}")
        else:
            yield talk


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


def _talk(entry: object, name: str) -> Talk:
    facts: Mapping[str, Any] = entry if isinstance(entry, dict) else {}
    found = [facts[key] for key in ("messages", "conversation", "conversations") if key in facts]
    listed = found[0] if found else entry
    if not isinstance(listed, list) or not listed:
        raise ValueError("a conversation must be a non-empty list of messages, or an object that has one as messages")
    messages = tuple(_message(message, at) for at, message in enumerate(listed, start=1))
    label = facts.get("name", facts.get("id", name))
    return Talk(str(label), messages, str(facts.get("group", "")), str(facts.get("side", "")))


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

    Raises:
        ValueError: there is no chat template, it refuses the messages, or the tokenizer cannot tell where tokens are.
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


# Reading again.


def measuring(profile: CapProfile, layers: Sequence[int] | None = None, *, capped: bool = False) -> CapProfile:
    """A profile that measures at the layers given (the profile's own without them), and caps only where asked to.

    Raises:
        ValueError: the profile has no axis at a layer.
    """
    if layers is not None:
        _check_layers(profile, layers)
    wanted = sorted(set(profile.layers if layers is None else layers) | set(profile.layers if capped else ()))
    axes, floors = [], []
    for layer in wanted:
        axis, floor = profile.slot_at(layer, profile.directions)
        if layer not in profile.layers:
            assert profile.axis_all is not None
            axis = profile.axis_all[layer].expand(profile.directions, -1)
        axes.append(axis)
        floors.append(floor if capped else torch.full_like(floor, -math.inf))
    model = {"model": dict(profile.model_facts)}
    return CapProfile(wanted, torch.stack(axes).contiguous(), torch.stack(floors).contiguous(), model)


def replay(
    model: Any,
    tokenizer: Any,
    profile: CapProfile,
    talks: Iterable[Talk],
    *,
    layers: Sequence[int] | None = None,
    capped: bool | None = None,
    batch_tokens: int = BATCH_TOKENS,
    on_error: Callable[[str], None] | None = None,
) -> Iterator[Trace]:
    """Has the model read stored conversations, in order, and yields what the axis saw of each.

    All tokens are given (teacher forcing), many conversations at a time. Memory does not grow with their number.

    Args:
        model: a causal language model of transformers.
        layers: where to measure; the profile's own without them.
        capped: whether the profile is in force while the model reads; without it, in those whose side is "capped".
        batch_tokens: at most in one pass, with padding; a longer conversation has a pass for itself.
        on_error: called with a sentence for each conversation that cannot be read, which is then left out.

    Raises:
        ValueError: a layer without an axis; without ``on_error``, the sentence about a conversation.
    """
    wanted = tuple(profile.layers if layers is None else sorted(set(layers)))
    probes = {cap: measuring(profile, wanted, capped=cap) for cap in (False, True)}
    longest = getattr(text_config(model), "max_position_embeddings", None)
    waiting = iter(talks)
    while window := list(islice(waiting, _WINDOW)):
        known: list[tuple[Talk, Encoded]] = []
        for talk in window:
            try:
                text = encode(tokenizer, talk.messages)
                if longest is not None and len(text.tokens) > longest:
                    raise ValueError(f"{len(text.tokens)} tokens, more than the {longest} that the model reads")
            except ValueError as error:
                if on_error is None:
                    raise ValueError(f"conversation {talk.name}: {error}") from None
                on_error(f"conversation {talk.name}: {error}")
            else:
                known.append((talk, text))
        seen: dict[int, Tensor] = {}
        for cap, probe in probes.items():
            mine = [
                at for at, (talk, _) in enumerate(known) if cap == (talk.side == CAPPED if capped is None else capped)
            ]
            rows = [probe.layers.index(layer) for layer in wanted]
            for batch in batches({at: len(known[at][1].tokens) for at in mine}, batch_tokens):
                found = read(model, probe, [known[at][1].tokens for at in batch])
                seen |= {at: projections[rows] for at, projections in zip(batch, found, strict=True)}
        for at, (talk, text) in enumerate(known):
            yield Trace(talk, text, wanted, seen[at])


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
    talk, records = trace.talk, []
    for scale in scales:
        for number, (mean, tokens, below) in enumerate(trace.sums(scale), start=1):
            facts = {"conversation": talk.name, "group": talk.group, "side": talk.side, "turn": number}
            facts["layer"] = scale.layer
            share = below / tokens if math.isfinite(scale.floor) else None
            rank = scale.percentile(mean)
            facts |= {"tokens": tokens, "mean": mean, "below_floor": share}
            records.append({**facts, "percentile": None if math.isnan(rank) else rank})
    return records


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


# As it happens.


class Recorder:
    """Keeps every token's projections while a model with an installation generates::

        with axiscap.install(model, profile) as cap, Recorder(cap) as seen:
            model.generate(**inputs)
        seen.projections()[0]  # of the first sequence: (layers, tokens), of the prompt and of the answer

    The last token that is sampled is not read by the model, and has none. Beam search reorders sequences, and is not
    for this.
    """

    def __init__(self, installation: Installation) -> None:
        self._installation = installation
        self._parts: list[Tensor] = []

    def __enter__(self) -> Recorder:
        self._undo = self._installation.watch(self._see)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._undo()

    def _see(self, found: dict[int, Tensor]) -> None:
        self._parts.append(torch.stack([found[layer][..., 0].cpu() for layer in sorted(found)]))

    def projections(self) -> list[Tensor]:
        """By sequence, (layers, tokens) float32; tokens that were left alone (padding) are not in it."""
        if not self._parts:
            return []
        whole = torch.cat(self._parts, 2)
        return [whole[:, row][:, ~whole[:, row].isnan().all(0)] for row in range(whole.shape[1])]


@dataclass
class _Following:
    path: _Path = field(default_factory=_Path)
    drifting: bool = False


class Monitor:
    """Follows many conversations turn by turn, and says when one drifts and when it is back.

    A conversation drifts from the first turn whose percentile among normal answers is below ``low``, until a turn is
    above ``high``. Memory is bounded: of more than ``most`` conversations, those silent longest are forgotten.

    Args:
        profile: with quantiles, as ``axiscap calibrate`` makes it.
        layer: whose projections are followed; see :meth:`Scale.of`.
        low, high: percentiles, 0 to 100, low at most high.
        on_change: called with the conversation's name, whether it drifts now, and its drift so far.
        most: conversations that are remembered.
        name: the label ``profile`` of the metrics.

    Raises:
        ValueError: the profile does not know its model's normal answers, or the percentiles are in the wrong order.
    """

    def __init__(
        self,
        profile: CapProfile,
        *,
        layer: int | None = None,
        low: float = 1.0,
        high: float = 10.0,
        on_change: Callable[[str, bool, Drift], None] | None = None,
        most: int = 10_000,
        name: str = "default",
    ) -> None:
        self.scale = Scale.of(profile, layer)
        if not self.scale.values:
            raise ValueError("the profile has no quantiles of normal answers; it was not made by axiscap calibrate")
        if not 0 <= low <= high <= 100:
            raise ValueError(f"low and high must be percentiles with low <= high, got {low} and {high}")
        self.low, self.high, self.name = low, high, name
        self._on_change = on_change
        self._most = most
        self._known: OrderedDict[str, _Following] = OrderedDict()
        self.drifting = 0
        self.turns = self.tokens = self.tokens_below = self.alarms = 0
        self.percentiles = [0] * len(BUCKETS)
        self.percentile_sum = 0.0

    def turn(self, conversation: str, projections: Tensor) -> Drift:
        """One turn of the model's: the projections of its tokens at the monitor's layer, (tokens,) float32.

        Raises:
            ValueError: there is none.
        """
        values = projections.reshape(-1)
        values = values[values.isfinite()]
        if not len(values):
            raise ValueError("a turn must have at least one finite projection")
        return self._add(conversation, *summed(values, self.scale.floor))

    def record(self, conversation: str, record: Mapping[str, Any]) -> Drift | None:
        """One turn of the model's, from a serving engine: a line of its log, as docs/serving.md describes it.

        Args:
            conversation: to which the request belonged; the record's own ``id`` names the request.
            record: the parsed line.

        Returns:
            The conversation's drift so far; None where the engine counted no row of the answer.

        Raises:
            ValueError: it is no such record, or says nothing of the monitor's layer.
        """
        try:
            counted = record["answer"][str(self.scale.layer)]
            rows, fired, mean = int(counted["rows"]), int(counted["fired"]), counted["mean_projection"][0]
        except (KeyError, TypeError, IndexError):
            raise ValueError(f"the record must be of a finished request, with layer {self.scale.layer}") from None
        return None if not rows or mean is None else self._add(conversation, float(mean), rows, fired)

    def _add(self, conversation: str, mean: float, tokens: int, below: int) -> Drift:
        entry = self._known.setdefault(conversation, _Following())
        self._known.move_to_end(conversation)
        while len(self._known) > self._most:
            _, gone = self._known.popitem(last=False)
            self.drifting -= gone.drifting
        entry.path.add(mean, tokens, below)
        percentile = self.scale.percentile(mean)
        self.turns += 1
        self.tokens += tokens
        self.tokens_below += below
        self.percentiles[bisect_left(BUCKETS, percentile)] += 1
        self.percentile_sum += percentile
        drift = entry.path.drift(self.scale)
        now = percentile <= self.high if entry.drifting else percentile < self.low
        if now != entry.drifting:
            entry.drifting = now
            self.drifting += 1 if now else -1
            self.alarms += now
            if self._on_change is not None:
                self._on_change(conversation, now, drift)
        return drift

    def drift(self, conversation: str) -> Drift | None:
        """A conversation's drift so far; None where it is not known, or forgotten."""
        entry = self._known.get(conversation)
        return None if entry is None else entry.path.drift(self.scale)

    def register(self, registry: Any = None) -> None:
        """Puts the monitor's counts on a Prometheus page, labelled by the profile's name alone.

        Args:
            registry: prometheus_client's own without one.

        Raises:
            ModuleNotFoundError: prometheus_client is missing.
        """
        try:
            import prometheus_client
        except ModuleNotFoundError:
            raise ModuleNotFoundError("metrics need prometheus-client: pip install prometheus-client") from None
        (registry or prometheus_client.REGISTRY).register(self)

    def collect(self) -> Iterator[Any]:
        """For prometheus_client, which calls it at every scrape."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

        label = [self.name]
        counters = {
            "axiscap_monitor_turns": ("The model's turns that were followed.", self.turns),
            "axiscap_monitor_tokens": ("Tokens of those turns.", self.tokens),
            "axiscap_monitor_tokens_below_floor": ("Tokens whose projection was below the floor.", self.tokens_below),
            "axiscap_monitor_alarms": ("Times that a conversation began to drift.", self.alarms),
        }
        for name, (text, value) in counters.items():
            counter = CounterMetricFamily(name, text, labels=["profile"])
            counter.add_metric(label, value)
            yield counter
        gauges = {
            "axiscap_monitor_conversations": ("Conversations that are remembered.", len(self._known)),
            "axiscap_monitor_drifting_conversations": ("Those of them that drift now.", self.drifting),
        }
        for name, (text, value) in gauges.items():
            gauge = GaugeMetricFamily(name, text, labels=["profile"])
            gauge.add_metric(label, value)
            yield gauge
        text = "Percentile (0 to 100) of a turn's mean projection among normal answers."
        histogram = HistogramMetricFamily("axiscap_monitor_turn_percentile", text, labels=["profile"])
        counts, total = [], 0
        for bound, count in zip(BUCKETS, self.percentiles, strict=True):
            total += count
            counts.append(("+Inf" if bound == BUCKETS[-1] else f"{bound:g}", total))
        histogram.add_metric(label, counts, sum_value=self.percentile_sum)
        yield histogram


#: Upper bounds of the histogram of percentiles.
BUCKETS = (0.0, 1.0, 5.0, 10.0, 25.0, 50.0, 75.0, 90.0, 100.0)


def percentile_in_words(percentile: float) -> str:
    """A percentile in words, for people."""
    if math.isnan(percentile):
        return "not known"
    side, share = ("below", 100 - percentile) if percentile < 50 else ("above", percentile)
    return f"{side} {'more than 99.5' if share > 99.5 else f'{share:.3g}'} % of normal answers"
