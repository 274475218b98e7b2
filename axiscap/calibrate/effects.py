"""The effects by which a sweep compares caps: the cost in each domain of ordinary work, and the hold on personas."""

from __future__ import annotations

import ast
import json
import math
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from axiscap.calibrate.refusal import COMPLIES, DECLINES
from axiscap.calibrate.roles import Task, in_batches
from axiscap.calibrate.rollouts import TransformersEngine
from axiscap.calibrate.space import percentile_interval
from axiscap.calibrate.store import Store
from axiscap.calibrate.work import Request, Work, shards
from axiscap.data.jsonl import shipped
from axiscap.profile import CapProfile
from axiscap.profile.floors import with_floors
from axiscap.transformers import Installation, install

#: The most texts of a domain, and the most tokens of each answer.
PER_DOMAIN, LONGEST = 8, 256
#: The names of two more domains: prose without a conversation around it, and the default's answers.
PLAIN, OWN = "plain prose", "own answers"
#: The number of samples that a bootstrap draws.
DRAWS = 1000


def plain_prose(tokenizer: Any) -> list[tuple[list[int], list[int]]]:
    """Paragraphs that no calibration reads, each as its first token and the others, without a conversation."""
    return [
        ([first], rest) for first, *rest in (tokenizer(entry["text"])["input_ids"] for entry in shipped("plain.jsonl"))
    ]


@torch.inference_mode()
def losses(model: Any, texts: Sequence[tuple[Sequence[int], Sequence[int]]]) -> tuple[Tensor, list[Tensor]]:
    """The mean negative log-likelihood (N,) of each answer after its prompt, and the likeliest tokens in its place."""
    means, likeliest = [], []
    for prompt, answer in texts:
        ids = torch.tensor([[*prompt, *answer]], device=model.device)
        logits = model(ids, use_cache=False, logits_to_keep=len(answer) + 1).logits[0, :-1].float().cpu()
        means.append(torch.nn.functional.cross_entropy(logits, torch.tensor(answer)))
        likeliest.append(logits.argmax(-1))
    return torch.stack(means).double(), likeliest


def log_odds(model: Any, texts: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Tensor:
    """(N,) float64, nats: of 2N texts, log p(text 2i) - log p(text 2i + 1)."""
    total = losses(model, texts)[0] * torch.tensor([len(answer) for _, answer in texts], dtype=torch.float64)
    return total[1::2] - total[0::2]


def agreement(capped: Sequence[Tensor], uncapped: Sequence[Tensor]) -> float:
    """The share of equal likeliest tokens (see :func:`losses`), as a mean over texts."""
    return torch.stack([(a == b).double().mean() for a, b in zip(capped, uncapped, strict=True)]).mean().item()


def share_fired(cap: Installation) -> float:
    """The share of rows at its layers that the one installed profile lifted."""
    (stats,) = cap.stats().values()
    return sum(s.fired for s in stats.values()) / max(1, sum(s.rows for s in stats.values()))


@dataclass(frozen=True)
class DomainCost:
    """The cost of a cap in one domain. ``perplexity``: of its answers, divided by the uncapped model's. ``fired``: the
    share of its rows that fired. ``agreement``: the share of likeliest tokens that are the uncapped model's.
    ``fiction``: whether it is fiction on request.
    """

    perplexity: float
    fired: float
    agreement: float
    fiction: bool


class Costs:
    """The costs of a profile on plain prose and on the model's own uncapped answers to held-out requests.

    Parameters
    ----------
    model
        a causal LM.
    tokenizer
        its tokenizer.
    work
        the requests, or None.
    store
        has their answers.
    per_domain
        the most texts of a domain.
    own
        the default's answers to held-out questions, each as its prompt and its answer.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        work: Work | None,
        store: Store,
        per_domain: int = PER_DOMAIN,
        own: Sequence[tuple[list[int], list[int]]] = (),
    ) -> None:
        self.model = model
        self.fiction = work.fiction if work else set()
        self.texts = {PLAIN: plain_prose(tokenizer)} | ({OWN: list(own)} if own else {})
        if work:
            self._add_work(work, store, per_domain)
            silent = sorted({request.domain for request in work.requests} - self.texts.keys())
            if silent:
                warnings.warn(
                    f"the model's answers to held-out requests of {', '.join(silent)} have less than two tokens: what "
                    "a cap costs there is not measured",
                    stacklevel=2,
                )
        self.base = {domain: losses(model, texts) for domain, texts in self.texts.items()}

    def _add_work(self, work: Work, store: Store, per_domain: int) -> None:
        for shard in shards(work, store):
            for task, prompt, answer in zip(shard.tasks, shard.prompts, shard.answers, strict=True):
                if work.is_held_out(task) and len(answer) > 1:
                    domain_texts = self.texts.setdefault(work.domain(task), [])
                    if len(domain_texts) < per_domain:
                        domain_texts.append((prompt, answer[:LONGEST]))

    def measure(self, profile: CapProfile) -> dict[str, DomainCost]:
        """The costs of a profile by domain."""
        costs = {}
        with install(self.model, profile) as cap:
            for domain, texts in self.texts.items():
                cap.reset_stats()
                values, tokens = losses(self.model, texts)
                base, likeliest = self.base[domain]
                costs[domain] = DomainCost(
                    (values - base).mean().exp().item(),
                    share_fired(cap),
                    agreement(tokens, likeliest),
                    domain in self.fiction,
                )
        return costs


def worst(costs: Mapping[str, DomainCost], *, fiction: bool) -> tuple[str, float]:
    """The domain of fiction, or not of fiction, whose perplexity rises most, and its ratio; ("", 1) without domains."""
    ratios = {name: cost.perplexity for name, cost in costs.items() if cost.fiction == fiction}
    return max(ratios.items(), key=lambda item: item[1], default=("", 1.0))


class Holds:
    """How far a cap holds the Assistant against personas, by pairs of answers: the Assistant's, and one in character.

    The log-odds of a pair are log p(Assistant's answer) - log p(answer in character), in nats. A persona (in a system
    prompt, or in the user's turn) lowers the log-odds; a cap raises them again.
    """

    MODES = ("system", "user")

    def __init__(self, model: Any, engine: TransformersEngine) -> None:
        self.model = model
        self.texts: dict[str, list[tuple[list[int], list[int]]]] = {}
        for pair in shipped("pairs.jsonl"):
            as_user = f"{pair['persona'].replace('You are', 'For this conversation you are', 1)} {pair['question']}"
            tasks = {
                "none": Task("", 0, 0, "", pair["question"]),
                "system": Task("", 0, 0, pair["persona"], pair["question"]),
                "user": Task("", 0, 0, "", as_user),
            }
            for mode, task in tasks.items():
                prompt = engine.prompts([task])[0]
                for kind in ("assistant", "in_character"):
                    answer = engine.tokenizer(pair[kind], add_special_tokens=False)["input_ids"]
                    self.texts.setdefault(mode, []).append((prompt, answer))
        self.base = {mode: self._odds(mode) for mode in ("none", *self.MODES)}

    def _odds(self, mode: str) -> Tensor:
        return log_odds(self.model, self.texts[mode])

    @property
    def taken(self) -> Tensor:
        """(pairs,): the nats by which the persona lowers the log-odds, as a mean over the modes."""
        return torch.stack([self.base["none"] - self.base[mode] for mode in self.MODES]).mean(0)

    def measure(self) -> Tensor:
        """(pairs,): the nats by which the installed cap raises the log-odds, as a mean over the modes."""
        return torch.stack([self._odds(mode) - self.base[mode] for mode in self.MODES]).mean(0)


class Declines:
    """Requests that should be declined, after each of the system prompts (an empty one: no system prompt)."""

    def __init__(self, model: Any, engine: TransformersEngine, system_prompts: Sequence[str]) -> None:
        self.model = model
        answers = [engine.tokenizer(text, add_special_tokens=False)["input_ids"] for text in (DECLINES[0], COMPLIES[0])]
        self.texts: list[tuple[list[int], list[int]]] = []
        for pair in shipped("declined.jsonl"):
            for system in system_prompts:
                prompt = engine.prompts([Task("", 0, 0, system, pair["request"])])[0]
                self.texts += [(prompt, answer) for answer in answers]
        self.base = log_odds(model, self.texts)

    def measure(self) -> Tensor:
        """(N,): the nats by which the installed cap raises the log-odds of declining."""
        return log_odds(self.model, self.texts) - self.base


def fenced(answer: str) -> list[str]:
    """The contents of an answer's fenced blocks, of which the last may be cut off."""
    return re.findall(r"```\w*\n(.*?)(?:```|\Z)", answer, re.DOTALL)


def numbers(answer: str) -> list[str]:
    """The decimal numbers of an answer, in order, as text."""
    return re.findall(r"-?\d+(?:\.\d+)?", answer.replace(",", ""))


def passes(request: Request, answer: str) -> bool:
    """Whether an answer passes the request's check. Code is parsed, and not run."""
    kind, _, expected = request.check.partition(" ")
    blocks = fenced(answer)
    body = "\n".join(blocks) if blocks else answer
    if kind == "number":
        return float(expected) in map(float, numbers(answer))
    try:
        if kind == "json":
            json.loads(body)
            return True
        return bool(ast.parse(body).body)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return False


def checks(engine: TransformersEngine, work: Work) -> tuple[int, int]:
    """The number of right answers to held-out requests with a check, and of such requests, under the installed cap."""
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
    """The most that a cap may cost. ``perplexity`` and ``fiction``: how far the perplexity may rise (0.01: by one
    percent) in the worst domain, and in the worst domain of fiction. ``changed``: the share of likeliest tokens that
    may differ from the uncapped model's in any domain that is not fiction.
    """

    perplexity: float = 0.02
    fiction: float = 0.05
    changed: float = math.inf

    def admits(self, costs: Mapping[str, DomainCost]) -> bool:
        return (
            worst(costs, fiction=False)[1] <= 1 + self.perplexity
            and worst(costs, fiction=True)[1] <= 1 + self.fiction
            and all(1 - cost.agreement <= self.changed for cost in costs.values() if not cost.fiction)
        )


#: The budget of the mild profile. Costs are measured on the model's own samples, which every change makes less likely:
#: they are upper bounds (docs/calibration.md).
MILD = Budget(0.003, 0.003)


@dataclass(frozen=True)
class Setting:
    """The first and the last capped layer, and the percentiles of floors and targets. A target of None is the floor."""

    first: int
    last: int
    percentile: float
    target: float | None = None

    @property
    def name(self) -> str:
        lifted = "" if self.target is None else f" lifted to {self.target:g}"
        return f"layers {self.first}-{self.last}, p{self.percentile:g}{lifted}"

    def of(self, profile: CapProfile, population: str) -> CapProfile:
        """The profile with these floors and targets."""
        layers = list(range(self.first, self.last + 1))
        return with_floors(profile, self.percentile, population, layers, target_percentile=self.target)


@dataclass(frozen=True)
class Outcome:
    """The results of the tests that are too slow for every setting. Intervals are 95 %."""

    uptake: float  # share of held-out roles' answers that sound like a role
    uptake_interval: tuple[float, float]
    default_uptake: float
    choices: float  # share of multiple-choice questions with the right answer
    checks: tuple[int, int]  # right answers, and checked requests; (0, 0) without ordinary work
    declines: float  # nats by which the cap raises the log-odds of declining; 0 uncapped
    declines_interval: tuple[float, float]


@dataclass(frozen=True)
class Point:
    """The effect of a cap at one setting. A setting of None stands for the uncapped model."""

    setting: Setting | None
    domains: dict[str, DomainCost]
    hold: float  # nats by which the cap raises the Assistant's log-odds; uncapped: by which personas lower them
    hold_interval: tuple[float, float]  # 95 %
    tests: Outcome | None = None

    @property
    def name(self) -> str:
        return "uncapped" if self.setting is None else self.setting.name

    @property
    def worst(self) -> tuple[str, float]:
        """The domain that is not fiction and whose perplexity rises most, and its ratio."""
        return worst(self.domains, fiction=False)

    @property
    def worst_fiction(self) -> tuple[str, float]:
        return worst(self.domains, fiction=True)

    @property
    def cost(self) -> float:
        """The ratio of the perplexity to the uncapped model's in the worst domain, fiction or not."""
        return max(self.worst[1], self.worst_fiction[1])

    @property
    def mean(self) -> float:
        """The mean over domains of the perplexity's ratio to the uncapped model's."""
        costs = [cost.perplexity for cost in self.domains.values()]
        return sum(costs) / len(costs) if costs else 1.0

    @property
    def fired(self) -> float:
        """The mean over domains of the share of rows that fire."""
        return sum(cost.fired for cost in self.domains.values()) / max(1, len(self.domains))

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Point:
        setting, tests = stored["setting"], stored["tests"]
        if tests:
            tests = {name: tuple(value) if isinstance(value, list) else value for name, value in tests.items()}
        return cls(
            setting and Setting(**setting),
            {name: DomainCost(**cost) for name, cost in stored["domains"].items()},
            stored["hold"],
            tuple(stored["hold_interval"]),
            tests and Outcome(**tests),
        )


def measure(costs: Costs, holds: Holds, setting: Setting | None, profile: CapProfile | None) -> Point:
    """The point of a profile, which has the setting's floors; without a profile, of the uncapped model."""
    if profile is None:
        return Point(None, {}, holds.taken.mean().item(), interval(holds.taken))
    with install(holds.model, profile):
        gains = holds.measure()
    return Point(setting, costs.measure(profile), gains.mean().item(), interval(gains))


def interval(values: Tensor) -> tuple[float, float]:
    """The 95 % interval of the mean of (N,) values, by a percentile bootstrap."""
    generator = torch.Generator().manual_seed(0)
    draws = values.double()[torch.randint(len(values), (DRAWS, len(values)), generator=generator)].mean(1)
    return percentile_interval(draws)


def frontier(points: Sequence[Point]) -> list[Point]:
    """The points to which no other is better in hold and in cost, the cheapest first."""
    ordered = sorted(points, key=lambda p: (p.cost, -p.hold))
    return [point for i, point in enumerate(ordered) if all(point.hold > other.hold for other in ordered[:i])]
