"""What a cap costs ordinary work, domain by domain, and how far it holds a persona: what a sweep judges by."""

from __future__ import annotations

import ast
import json
import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from axiscap.calibrate.data import Task, in_batches, shipped
from axiscap.calibrate.floors import PERCENTILES, with_floors
from axiscap.calibrate.rollouts import TransformersEngine
from axiscap.calibrate.store import Store
from axiscap.calibrate.work import Request, Work, shards
from axiscap.installation import Installation, install
from axiscap.profile import CapProfile

#: Texts of each domain, and tokens of a text that are looked at.
PER_DOMAIN, LONGEST = 8, 256


#: The name of plain prose among the domains.
PLAIN = "plain prose"


def plain_prose(tokenizer: Any) -> list[tuple[list[int], list[int]]]:
    """Paragraphs without a conversation around them, from which no calibration learns: first token, and the others."""
    return [
        ([first], rest) for first, *rest in (tokenizer(entry["text"])["input_ids"] for entry in shipped("plain.jsonl"))
    ]


@torch.inference_mode()
def losses(model: Any, texts: Sequence[tuple[Sequence[int], Sequence[int]]]) -> tuple[Tensor, list[Tensor]]:
    """Mean negative log-likelihood of each continuation of its prompt (N,), and the likeliest token at each place."""
    found, likeliest = [], []
    for prompt, answer in texts:
        ids = torch.tensor([[*prompt, *answer]], device=model.device)
        logits = model(ids, use_cache=False, logits_to_keep=len(answer) + 1).logits[0, :-1].float().cpu()
        found.append(torch.nn.functional.cross_entropy(logits, torch.tensor(answer)))
        likeliest.append(logits.argmax(-1))
    return torch.stack(found).double(), likeliest


def agreement(found: Sequence[Tensor], base: Sequence[Tensor]) -> float:
    """Share of likeliest tokens that are the uncapped model's, the mean over texts; both as :func:`losses` gives."""
    return torch.stack([(a == b).double().mean() for a, b in zip(found, base, strict=True)]).mean().item()


def share_fired(cap: Installation) -> float:
    """Of the rows that the one installed profile has seen at its layers."""
    (stats,) = cap.stats().values()
    return sum(s.fired for s in stats.values()) / max(1, sum(s.rows for s in stats.values()))


@dataclass(frozen=True)
class DomainCost:
    """Of one domain: perplexity of its answers over the uncapped model's, share of its rows that fired, agreement of
    the likeliest next token with the uncapped model's, and whether it is fiction on request.
    """

    perplexity: float
    fired: float
    agreement: float
    fiction: bool


class Costs:
    """Plain prose and the model's own uncapped answers to held-out requests, and what a profile does to their
    perplexity.

    Parameters
    ----------
    model
        a causal LM.
    tokenizer
        its tokenizer.
    work
        the requests; without them there is plain prose alone.
    store
        where their answers are.
    per_domain
        texts of each domain.
    """

    def __init__(
        self, model: Any, tokenizer: Any, work: Work | None, store: Store, per_domain: int = PER_DOMAIN
    ) -> None:
        self.model = model
        self.fiction = work.fiction if work else set()
        self.texts = {PLAIN: plain_prose(tokenizer)}
        if work:
            self._add(work, store, per_domain)
            silent = sorted({request.domain for request in work.requests} - self.texts.keys())
            if silent:
                warnings.warn(
                    f"the model's answers to held-out requests of {', '.join(silent)} have less than two tokens: what "
                    "a cap costs there is not measured",
                    stacklevel=2,
                )
        self.base = {domain: losses(model, texts) for domain, texts in self.texts.items()}

    def _add(self, work: Work, store: Store, per_domain: int) -> None:
        for shard in shards(work, store):
            for task, prompt, said in zip(shard.tasks, shard.prompts, shard.answers, strict=True):
                if work.is_held_out(task) and len(said) > 1:
                    mine = self.texts.setdefault(work.domain(task), [])
                    if len(mine) < per_domain:
                        mine.append((prompt, said[:LONGEST]))

    def measure(self, profile: CapProfile) -> dict[str, DomainCost]:
        """By domain."""
        found = {}
        with install(self.model, profile) as cap:
            for domain, texts in self.texts.items():
                cap.reset_stats()
                values, tokens = losses(self.model, texts)
                base, likeliest = self.base[domain]
                found[domain] = DomainCost(
                    (values - base).mean().exp().item(),
                    share_fired(cap),
                    agreement(tokens, likeliest),
                    domain in self.fiction,
                )
        return found


def worst(costs: Mapping[str, DomainCost], *, fiction: bool) -> tuple[str, float]:
    """The domain whose perplexity rises most, and how far; of fiction, or of all else. ("", 1) where there is none."""
    mine = {name: cost.perplexity for name, cost in costs.items() if cost.fiction == fiction}
    return max(mine.items(), key=lambda item: item[1], default=("", 1.0))


class Holds:
    """Paired answers to questions, in a persona's character and as the Assistant, and which one the model expects.

    The log-odds of a pair are log p(Assistant's answer) - log p(answer in character), in nats. A persona (in a system
    prompt, or in the user's own words) takes some away; a cap gives some back.
    """

    MODES = ("system", "user")

    def __init__(self, model: Any, engine: TransformersEngine) -> None:
        self.model = model
        self.texts: dict[str, list[tuple[list[int], list[int]]]] = {}
        for pair in shipped("pairs.jsonl"):
            as_user = f"{pair['persona'].replace('You are', 'For this conversation you are', 1)} {pair['question']}"
            asked = {
                "none": Task("", 0, 0, "", pair["question"]),
                "system": Task("", 0, 0, pair["persona"], pair["question"]),
                "user": Task("", 0, 0, "", as_user),
            }
            for mode, task in asked.items():
                prompt = engine.prompts([task])[0]
                for kind in ("assistant", "in_character"):
                    said = engine.tokenizer(pair[kind], add_special_tokens=False)["input_ids"]
                    self.texts.setdefault(mode, []).append((prompt, said))
        self.base = {mode: self._odds(mode) for mode in ("none", *self.MODES)}

    def _odds(self, mode: str) -> Tensor:
        """(pairs,) nats."""
        texts = self.texts[mode]
        total = losses(self.model, texts)[0] * torch.tensor([len(said) for _, said in texts], dtype=torch.float64)
        return total[1::2] - total[0::2]

    @property
    def taken(self) -> Tensor:
        """(pairs,) nats that the persona takes away, the mean of both modes."""
        return torch.stack([self.base["none"] - self.base[mode] for mode in self.MODES]).mean(0)

    def measure(self) -> Tensor:
        """(pairs,) nats that whatever is in force in the model now gives back, the mean of both modes."""
        return torch.stack([self._odds(mode) - self.base[mode] for mode in self.MODES]).mean(0)


def fenced(answer: str) -> list[str]:
    """What stands in an answer's fenced blocks; the last one may be cut off."""
    return re.findall(r"```\w*\n(.*?)(?:```|\Z)", answer, re.DOTALL)


def numbers(answer: str) -> list[str]:
    """The decimal numbers of an answer, in order and as they are written."""
    return re.findall(r"-?\d+(?:\.\d+)?", answer.replace(",", ""))


def passes(request: Request, answer: str) -> bool:
    """Whether an answer is right, by the request's check. Code that a model wrote is parsed, and not run."""
    kind, _, wanted = request.check.partition(" ")
    blocks = fenced(answer)
    body = "\n".join(blocks) if blocks else answer
    if kind == "number":
        return float(wanted) in map(float, numbers(answer))
    try:
        if kind == "json":
            json.loads(body)
            return True
        return bool(ast.parse(body).body)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return False


def checks(engine: TransformersEngine, work: Work) -> tuple[int, int]:
    """How many answers to held-out requests with a check are right, of how many; under whatever is in force."""
    tasks = [
        Task(f"check {request.domain}", 0, number, "", request.turns[0])
        for number, request in enumerate(work.requests)
        if request.check
    ]
    tasks = [task for task in tasks if work.is_held_out(task)]
    right = 0
    for batch in in_batches(tasks):
        shard = engine.answer(batch)
        right += sum(
            passes(work.requests[task.question], text) for task, text in zip(shard.tasks, shard.texts, strict=True)
        )
    return right, len(tasks)


@dataclass(frozen=True)
class Budget:
    """What floors may cost ordinary work, in its worst domain: how far the perplexity may rise (0.01 for one percent),
    how far that of fiction on request, and what share of the likeliest tokens may be others, fiction left out.
    """

    perplexity: float
    fiction: float
    changed: float

    def admits(self, costs: Mapping[str, DomainCost]) -> bool:
        return (
            worst(costs, fiction=False)[1] <= 1 + self.perplexity
            and worst(costs, fiction=True)[1] <= 1 + self.fiction
            and all(1 - cost.agreement <= self.changed for cost in costs.values() if not cost.fiction)
        )


def floors_for_budget(
    costs: Costs,
    profile: CapProfile,
    population: str,
    budget: Budget,
    progress: Callable[[float, Mapping[str, DomainCost]], None] = lambda percentile, found: None,
    *,
    target_percentile: float | None = None,
) -> CapProfile:
    """The highest percentile of a population at which no domain costs more than the budget, at most that of targets.

    Found by halving, since higher floors fire on more tokens; each step is a measurement by the model itself.

    Raises
    ------
    ValueError
        even the lowest percentile costs more.
    """
    low, high = 0, len(PERCENTILES) - 1
    if target_percentile is not None:
        high = sum(percentile <= target_percentile for percentile in PERCENTILES) - 1
    best: CapProfile | None = None
    while low <= high:
        middle = (low + high) // 2
        made = with_floors(profile, PERCENTILES[middle], population, target_percentile=target_percentile)
        found = costs.measure(made)
        progress(PERCENTILES[middle], found)
        if budget.admits(found):
            best, low = made, middle + 1
        else:
            high = middle - 1
    if best is None:
        raise ValueError(f"even floors at percentile {PERCENTILES[0]:g} cost more than {budget}")
    best.provenance["floors"]["budget"] = {name: most for name, most in asdict(budget).items() if math.isfinite(most)}
    return best
