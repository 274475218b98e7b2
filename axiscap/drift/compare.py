"""The same conversation, generated uncapped and capped side by side, with what the axis saw."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from axiscap.drift.conversations import CAPPED, UNCAPPED
from axiscap.profile import CapProfile
from axiscap.stats import LayerStats
from axiscap.transformers import install


@dataclass(frozen=True)
class Script:
    """What the user says, turn by turn."""

    name: str
    turns: tuple[str, ...]
    group: str = ""
    topic: str = ""


@dataclass
class Answer:
    """One answer: its text, the projection of each of its tokens at each capped layer, and how it was generated."""

    text: str
    projections: Tensor  # (layers, tokens) float32, first direction, before the cap
    seconds: float


@dataclass
class Track:
    """One of the two sides of a conversation."""

    answers: list[Answer] = field(default_factory=list)
    stats: dict[int, LayerStats] | None = None

    @property
    def tokens_per_second(self) -> float:
        tokens = sum(answer.projections.shape[1] for answer in self.answers)
        return tokens / sum(answer.seconds for answer in self.answers)

    def turn_means(self, layer_index: int) -> list[float]:
        """The mean projection of each answer at the profile's layer of that index."""
        return [answer.projections[layer_index].mean().item() for answer in self.answers]


@dataclass
class Comparison:
    conversation: Script
    uncapped: Track
    capped: Track

    def transcripts(self) -> Iterator[dict[str, Any]]:
        """Both sides as stored conversations, in the form that :func:`axiscap.drift.read_conversations` reads."""
        conversation = self.conversation
        for side, track in ((UNCAPPED, self.uncapped), (CAPPED, self.capped)):
            messages = []
            for said, answer in zip(conversation.turns, track.answers, strict=True):
                messages += [{"role": "user", "content": said}, {"role": "assistant", "content": answer.text}]
            yield {
                "name": conversation.name,
                "group": conversation.topic or conversation.group,
                "side": side,
                "messages": messages,
            }


@dataclass(frozen=True)
class GroupSummary:
    """A group of conversations at the capped layers: how many of its turns and tokens lie below the floor.

    Shares are of (turn, layer) and (token, layer) pairs; those of the capped side are before the cap, behind which none
    lies below. ``mean`` is of the uncapped conversations' mean projections less the floor, with a 95 % interval of the
    mean (bootstrap over conversations).
    """

    name: str
    conversations: int
    turns: tuple[float, float]  # uncapped, capped
    tokens: tuple[float, float]
    mean: float
    interval: tuple[float, float]


def by_group(results: Sequence[Comparison], profile: CapProfile) -> list[GroupSummary]:
    """A summary of each group that the conversations name, in their order."""
    floors = profile.floors[:, :1]
    generator = torch.Generator().manual_seed(0)
    groups = []
    for name in dict.fromkeys(result.conversation.group for result in results):
        mine = [result for result in results if result.conversation.group == name]
        sides = [
            [answer.projections for track in tracks for answer in track.answers]
            for tracks in ([r.uncapped for r in mine], [r.capped for r in mine])
        ]
        turns = [torch.cat([p.mean(1, keepdim=True) < floors for p in side], 1).double().mean() for side in sides]
        tokens = [torch.cat([p < floors for p in side], 1).double().mean() for side in sides]
        levels = torch.tensor(
            [torch.stack([(a.projections - floors).mean() for a in r.uncapped.answers]).mean() for r in mine]
        )
        draws = levels[torch.randint(len(levels), (1000, len(levels)), generator=generator)].mean(1)
        low, high = torch.quantile(draws, torch.tensor([0.025, 0.975])).tolist()
        groups.append(
            GroupSummary(
                name,
                len(mine),
                (turns[0].item(), turns[1].item()),
                (tokens[0].item(), tokens[1].item()),
                levels.mean().item(),
                (low, high),
            )
        )
    return groups


def load_scripts(path: Path | None = None) -> list[Script]:
    """The conversations of a JSONL file; AxisCap's own without one.

    A line is ``{"name": ..., "turns": [user message, ...]}``, with a ``group`` where conversations are compared by it.

    Raises
    ------
    ValueError
        naming the line that is not a conversation.
    """
    source = path or Path(str(files("axiscap.data") / "conversations.jsonl"))
    result = []
    for number, line in enumerate(source.read_text("utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            turns = tuple(entry["turns"])
            if not turns or not all(isinstance(turn, str) for turn in turns):
                raise TypeError
            kinds = (str(entry.get(key, "")) for key in ("group", "topic"))
            result.append(Script(str(entry["name"]), turns, *kinds))
        except (ValueError, KeyError, TypeError):
            raise ValueError(f'{source}, line {number}: must be {{"name": ..., "turns": [text, ...]}}') from None
    if not result:
        raise ValueError(f"{source}: no conversation in it")
    return result


def compare(
    model: Any,
    tokenizer: Any,
    profile: CapProfile,
    conversation: Script,
    *,
    max_new_tokens: int = 48,
) -> Comparison:
    """Generates both sides, turn about, by greedy decoding with a repetition penalty of 1.15.

    Each side goes on from its own answers. The uncapped side is generated without any hook; its projections come from a
    second pass over the finished text, as do those of the capped side.
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
    result.capped.stats = {layer: _sum([stats[layer] for stats in totals]) for layer in profile.layers}
    return result


def _sum(parts: Sequence[LayerStats]) -> LayerStats:
    """Counts added up; the other figures belong to single runs and are left out (NaN)."""
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
        begin = time.perf_counter()
        tokens = model.generate(**inputs, **options, pad_token_id=tokenizer.pad_token_id)
        return tokens, time.perf_counter() - begin

    stats = None
    if cap is None:
        tokens, seconds = generate()
    else:
        with install(model, cap) as installation:
            tokens, seconds = generate()
            (stats,) = installation.stats().values()
    with install(model, cap or profile.measuring_only()) as installation:
        model(tokens, use_cache=False, logits_to_keep=1)
        seen = installation.projections()
    projections = torch.stack([seen[layer][0, prompt:, 0] for layer in profile.layers]).float().cpu()
    text = tokenizer.decode(tokens[0, prompt:], skip_special_tokens=True).strip()
    return Answer(text, projections, seconds), stats
