"""What a cap costs ordinary work, domain by domain, and how far it holds a persona: what a sweep judges by."""

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

from axiscap.calibrate.data import Task, in_batches, shipped
from axiscap.calibrate.floors import with_floors
from axiscap.calibrate.refusal import COMPLIES, DECLINES
from axiscap.calibrate.rollouts import TransformersEngine
from axiscap.calibrate.store import Store
from axiscap.calibrate.work import Request, Work, shards
from axiscap.profile import CapProfile
from axiscap.transformers import Installation, install

#: Texts of each domain, and tokens of a text that are looked at.
PER_DOMAIN, LONGEST = 8, 256
#: Domains beside those of ordinary work: prose without a conversation around it, and the default's answers.
PLAIN, OWN = "plain prose", "own answers"
#: How many samples a bootstrap draws.
DRAWS = 1000


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


def log_odds(model: Any, texts: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Tensor:
    """(N,) float64, nats: of 2N texts, log p(text 2i) - log p(text 2i + 1)."""
    total = losses(model, texts)[0] * torch.tensor([len(said) for _, said in texts], dtype=torch.float64)
    return total[1::2] - total[0::2]


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
    own
        the default's answers to held-out questions, a prompt and an answer each.
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
        return log_odds(self.model, self.texts[mode])

    @property
    def taken(self) -> Tensor:
        """(pairs,) nats that the persona takes away, the mean of both modes."""
        return torch.stack([self.base["none"] - self.base[mode] for mode in self.MODES]).mean(0)

    def measure(self) -> Tensor:
        """(pairs,) nats that whatever is in force in the model now gives back, the mean of both modes."""
        return torch.stack([self._odds(mode) - self.base[mode] for mode in self.MODES]).mean(0)


class Declines:
    """Requests that should be declined, behind each of some system prompts (none where it is empty)."""

    def __init__(self, model: Any, engine: TransformersEngine, system_prompts: Sequence[str]) -> None:
        self.model = model
        said = [engine.tokenizer(text, add_special_tokens=False)["input_ids"] for text in (DECLINES[0], COMPLIES[0])]
        self.texts: list[tuple[list[int], list[int]]] = []
        for pair in shipped("declined.jsonl"):
            for system in system_prompts:
                prompt = engine.prompts([Task("", 0, 0, system, pair["request"])])[0]
                self.texts += [(prompt, answer) for answer in said]
        self.base = log_odds(model, self.texts)

    def measure(self) -> Tensor:
        """(N,) nats by which the log-odds of declining rise under whatever is in force in the model now."""
        return log_odds(self.model, self.texts) - self.base


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
    """The most that a cap may cost. ``perplexity`` and ``fiction`` say how far the perplexity may rise (0.01 for one
    percent) in the worst domain of ordinary work, and in the worst of fiction on request. ``changed`` is the share of
    likeliest tokens that may differ from the uncapped model's in any domain that is not fiction.
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


#: The budget of the mild profile, whose cost no domain shows.
MILD = Budget(0.003, 0.003)


@dataclass(frozen=True)
class Setting:
    """Where floors and targets lie: the first and the last capped layer, and percentiles of one population. A target of
    None is the floor.
    """

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
    """The results of the tests that are too slow to run for every setting. Intervals are 95 %."""

    uptake: float  # share of held-out roles' answers that sound like a role
    uptake_interval: tuple[float, float]
    default_uptake: float
    choices: float  # share of multiple-choice questions with the right answer
    checks: tuple[int, int]  # right answers, of how many that can be checked; (0, 0) without ordinary work
    declines: float  # nats of log-odds by which requests that should be declined are declined more; 0 uncapped
    declines_interval: tuple[float, float]


@dataclass(frozen=True)
class Point:
    """The effect of a cap at one setting. A setting of None stands for the uncapped model."""

    setting: Setting | None
    domains: dict[str, DomainCost]
    hold: float  # nats that the cap gives back to the Assistant; uncapped: that personas take away
    hold_interval: tuple[float, float]  # 95 %
    tests: Outcome | None = None

    @property
    def name(self) -> str:
        return "uncapped" if self.setting is None else self.setting.name

    @property
    def worst(self) -> tuple[str, float]:
        """The domain, fiction left out, whose perplexity rises most, and how far."""
        return worst(self.domains, fiction=False)

    @property
    def worst_fiction(self) -> tuple[str, float]:
        return worst(self.domains, fiction=True)

    @property
    def cost(self) -> float:
        """The perplexity of the domain where it rises most, fiction or not, over the uncapped model's."""
        return max(self.worst[1], self.worst_fiction[1])

    @property
    def mean(self) -> float:
        """The mean over all domains of the perplexity over the uncapped model's."""
        costs = [cost.perplexity for cost in self.domains.values()]
        return sum(costs) / len(costs) if costs else 1.0

    @property
    def fired(self) -> float:
        """The mean share of rows that fire, over domains."""
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
    """The point of a profile that has a setting's floors; without one, of the uncapped model."""
    if profile is None:
        return Point(None, {}, holds.taken.mean().item(), interval(holds.taken))
    with install(holds.model, profile):
        given_back = holds.measure()
    return Point(setting, costs.measure(profile), given_back.mean().item(), interval(given_back))


def interval(values: Tensor) -> tuple[float, float]:
    """95 % of the mean of (N,) values, by a percentile bootstrap."""
    generator = torch.Generator().manual_seed(0)
    drawn = values.double()[torch.randint(len(values), (DRAWS, len(values)), generator=generator)].mean(1)
    low, high = torch.quantile(drawn, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def frontier(points: Sequence[Point]) -> list[Point]:
    """The points that no other beats in hold and in cost both, the least cost first."""
    ordered = sorted(points, key=lambda p: (p.cost, -p.hold))
    return [point for i, point in enumerate(ordered) if all(point.hold > other.hold for other in ordered[:i])]
