"""A conversation generated twice, uncapped and capped, with the projections of the answers."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from axiscap import LayerStats
from axiscap.data.jsonl import read_lines, to_label, to_text
from axiscap.drift.conversations import CAPPED, UNCAPPED
from axiscap.profile import CapProfile
from axiscap.transformers import install


@dataclass(frozen=True)
class Script:
    """The user's side of a conversation, turn by turn."""

    name: str
    turns: tuple[str, ...]
    group: str = ""
    topic: str = ""


@dataclass
class Answer:
    """One answer and the projections of its tokens before the cap, at the capped layers: (layers, tokens) float32."""

    text: str
    projections: Tensor
    seconds: float


@dataclass
class Track:
    """One side of a conversation. Only the capped side has statistics."""

    answers: list[Answer] = field(default_factory=list)
    stats: dict[int, LayerStats] | None = None

    @property
    def tokens_per_second(self) -> float:
        tokens = sum(answer.projections.shape[1] for answer in self.answers)
        return tokens / sum(answer.seconds for answer in self.answers)

    def turn_means(self, layer_index: int) -> list[float]:
        """The mean projection of each answer at one of the capped layers, by its index."""
        return [answer.projections[layer_index].mean().item() for answer in self.answers]


@dataclass
class Comparison:
    """Both sides of a conversation."""

    conversation: Script
    uncapped: Track
    capped: Track

    def transcripts(self) -> Iterator[dict[str, Any]]:
        """Both sides as stored conversations, in the form that :func:`axiscap.drift.read_conversations` reads."""
        conversation = self.conversation
        for side, track in ((UNCAPPED, self.uncapped), (CAPPED, self.capped)):
            messages = []
            for text, answer in zip(conversation.turns, track.answers, strict=True):
                messages += [{"role": "user", "content": text}, {"role": "assistant", "content": answer.text}]
            yield {
                "name": conversation.name,
                "group": conversation.topic or conversation.group,
                "side": side,
                "messages": messages,
            }


@dataclass(frozen=True)
class GroupSummary:
    """The statistics of a group of conversations at the capped layers.

    ``turns`` and ``tokens`` are the shares of (turn, layer) and (token, layer) pairs below the floor, uncapped and
    capped. Those of the capped side are measured before the cap. ``mean`` is the mean of the uncapped conversations'
    mean projections less the floor, and ``interval`` its 95 % interval (bootstrap over conversations).
    """

    name: str
    conversations: int
    turns: tuple[float, float]
    tokens: tuple[float, float]
    mean: float
    interval: tuple[float, float]


def by_group(comparisons: Sequence[Comparison], profile: CapProfile) -> list[GroupSummary]:
    """A summary of each group, in the order in which the conversations name them."""
    generator = torch.Generator().manual_seed(0)
    names = dict.fromkeys(comparison.conversation.group for comparison in comparisons)
    return [
        _summarise_group(name, [c for c in comparisons if c.conversation.group == name], profile, generator)
        for name in names
    ]


def _summarise_group(
    name: str, comparisons: Sequence[Comparison], profile: CapProfile, generator: torch.Generator
) -> GroupSummary:
    floors = profile.floors[:, :1]
    turns, tokens = [], []
    for tracks in ([c.uncapped for c in comparisons], [c.capped for c in comparisons]):
        projections = [answer.projections for track in tracks for answer in track.answers]
        turns.append(_share_below([values.mean(1, keepdim=True) for values in projections], floors))
        tokens.append(_share_below(projections, floors))
    levels = torch.tensor(
        [torch.stack([(a.projections - floors).mean() for a in c.uncapped.answers]).mean() for c in comparisons]
    )
    draws = levels[torch.randint(len(levels), (1000, len(levels)), generator=generator)].mean(1)
    low, high = torch.quantile(draws, torch.tensor([0.025, 0.975])).tolist()
    return GroupSummary(
        name, len(comparisons), (turns[0], turns[1]), (tokens[0], tokens[1]), levels.mean().item(), (low, high)
    )


def _share_below(projections: Sequence[Tensor], floors: Tensor) -> float:
    return torch.cat([values < floors for values in projections], 1).double().mean().item()


def load_scripts(path: Path | None = None) -> list[Script]:
    """Reads scripts from a JSONL file. Default: AxisCap's own.

    A line is ``{"name": ..., "turns": [user message, ...]}``, optionally with a ``group``, by which conversations are
    compared, and a ``topic``.

    Raises
    ------
    ValueError
        naming the line that is not a script.
    """
    source = path or Path(str(files("axiscap.data") / "conversations.jsonl"))
    scripts = []
    for line in read_lines(source):
        try:
            entry = line.parse()
            name, *labels = (to_label(entry.get(key)) for key in ("name", "group", "topic"))
            if not isinstance(entry["turns"], list) or not entry["turns"] or not name.strip():
                raise ValueError
            turns = tuple(to_text(turn, "turn") for turn in entry["turns"])
            scripts.append(Script(name, turns, *labels))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise line.error('must be {"name": ..., "turns": [text, ...]}', error) from None
    if not scripts:
        raise ValueError(f"{source}: no conversation in it")
    return scripts


def compare(
    model: Any,
    tokenizer: Any,
    profile: CapProfile,
    conversation: Script,
    *,
    max_new_tokens: int = 48,
) -> Comparison:
    """Generates both sides by greedy decoding with a repetition penalty of 1.15.

    Each side continues from its own answers. The uncapped side is generated without any hook. The projections of both
    sides come from a second pass over the finished text.
    """
    result = Comparison(conversation, Track(), Track())
    sides = ((result.uncapped, None), (result.capped, profile))
    messages: tuple[list[dict[str, str]], ...] = ([], [])
    totals: list[dict[int, LayerStats]] = []
    for turn in conversation.turns:
        for (track, cap), history in zip(sides, messages, strict=True):
            history.append({"role": "user", "content": turn})
            answer, stats = _answer(model, tokenizer, profile, cap, history, max_new_tokens)
            history.append({"role": "assistant", "content": answer.text})
            track.answers.append(answer)
            if stats is not None:
                totals.append(stats)
    result.capped.stats = {layer: _sum_counts([stats[layer] for stats in totals]) for layer in profile.layers}
    return result


def _sum_counts(parts: Sequence[LayerStats]) -> LayerStats:
    """The sums of the counts. The other statistics belong to single runs, and are NaN."""
    none = (float("nan"),) * len(parts[0].mean)
    rows, fired, nonfinite = (sum(getattr(p, name) for p in parts) for name in ("rows", "fired", "nonfinite"))
    return LayerStats(rows, fired, nonfinite, none, none, none, none, none)


@torch.inference_mode()
def _answer(
    model: Any,
    tokenizer: Any,
    profile: CapProfile,
    cap: CapProfile | None,
    history: Sequence[dict[str, str]],
    max_new_tokens: int,
) -> tuple[Answer, dict[int, LayerStats] | None]:
    inputs = tokenizer.apply_chat_template(
        list(history), add_generation_prompt=True, return_tensors="pt", return_dict=True
    ).to(model.device)
    prompt = inputs["input_ids"].shape[1]
    options = {"do_sample": False, "repetition_penalty": 1.15, "max_new_tokens": max_new_tokens}

    def generate() -> tuple[Tensor, float]:
        start = time.perf_counter()
        tokens = model.generate(**inputs, **options, pad_token_id=tokenizer.pad_token_id)
        return tokens, time.perf_counter() - start

    stats = None
    if cap is None:
        tokens, seconds = generate()
    else:
        with install(model, cap) as installation:
            tokens, seconds = generate()
            (stats,) = installation.stats().values()
    with install(model, cap or profile.measuring_only()) as installation:
        model(tokens, use_cache=False, logits_to_keep=1)
        by_layer = installation.projections()
    projections = torch.stack([by_layer[layer][0, prompt:, 0] for layer in profile.layers]).float().cpu()
    text = tokenizer.decode(tokens[0, prompt:], skip_special_tokens=True).strip()
    return Answer(text, projections, seconds), stats
