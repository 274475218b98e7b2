"""The choice of layers and percentile by effect: what a cap does to role-play, and what it costs.

Role uptake is judged from the text alone, by a classifier that was trained on other roles' uncapped answers to other
questions.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from axiscap.calibrate.data import DEFAULT_ROLE, Plan, Task, batches, in_batches, shipped
from axiscap.calibrate.effects import (
    PLAIN,
    Costs,
    DomainCost,
    Holds,
    agreement,
    checks,
    losses,
    share_fired,
    worst,
)
from axiscap.calibrate.floors import with_floors
from axiscap.calibrate.rollouts import TransformersEngine
from axiscap.calibrate.space import auc
from axiscap.calibrate.store import Settings, Shard, Store
from axiscap.calibrate.work import TOKENS, Work, settings_of
from axiscap.installation import install
from axiscap.profile import CapProfile

#: Kind of the roles that are near the Assistant by design: that a model takes one on is no drift.
NEAR = "helper"
DRAWS = 1000


class UptakeJudge:
    """Whether a text was written in a role, from the text alone: a logistic regression on runs of 3 to 5 characters.

    Style gives a character away, and runs of letters see it: on the shipped data they separate better than sentence
    embeddings do. It is trained on the roles and questions that make the axis, without roles that are near the
    Assistant by design (of kind ``helper``), whose answers do not differ from its own.

    ``auc``: of held-out roles against the default, held-out questions. ``threshold``: what 5 % of the default's own
    training answers exceed, each judged by a classifier that did not see it.
    """

    def __init__(self, shards: Iterable[Shard], plan: Plan) -> None:
        try:
            from sklearn.feature_extraction.text import TfidfVectorizer
            from sklearn.linear_model import LogisticRegression
            from sklearn.model_selection import cross_val_predict
            from sklearn.pipeline import make_pipeline
        except ModuleNotFoundError:
            raise ModuleNotFoundError("a sweep needs scikit-learn: pip install 'axiscap[calibrate]'") from None
        told: list[tuple[Task, str]] = []
        for shard in shards:
            told += zip(shard.tasks, shard.texts, strict=True)
        told = [(task, text) for task, text in told if plan.roles[task.role].kind != NEAR]
        train = [(task, text) for task, text in told if not plan.is_held_out(task)]
        held = [(task, text) for task, text in told if task.question in plan.held_questions]
        held = [(task, text) for task, text in held if task.role == DEFAULT_ROLE or task.role in plan.held_roles]
        self.classifier = make_pipeline(
            TfidfVectorizer(analyzer="char", ngram_range=(3, 5), min_df=3, sublinear_tf=True),
            LogisticRegression(C=0.3, class_weight="balanced", max_iter=3000),
        )
        labels = torch.tensor([task.role != DEFAULT_ROLE for task, _ in train])
        texts = [text for _, text in train]
        unseen = cross_val_predict(self.classifier, texts, labels.numpy(), method="decision_function")
        self.threshold = torch.from_numpy(unseen)[~labels].quantile(0.95).item()
        self.classifier.fit(texts, labels.numpy())
        values = self.scores([text for _, text in held])
        is_role = torch.tensor([task.role != DEFAULT_ROLE for task, _ in held])
        self.auc = auc(values[~is_role][:, None], values[is_role][:, None]).item()

    def scores(self, texts: Sequence[str]) -> Tensor:
        """(N,) float64: larger, more like a role."""
        return torch.from_numpy(self.classifier.decision_function(list(texts)))

    def took_on(self, texts: Sequence[str]) -> Tensor:
        """(N,) bool."""
        return self.scores(texts) > self.threshold


@dataclass(frozen=True)
class Point:
    """What a cap does at one setting. Shares are of 1; an interval is 95 %, over roles or texts drawn again."""

    first: int
    last: int
    percentile: float
    uptake: float
    uptake_interval: tuple[float, float]
    default_uptake: float
    fired: float
    perplexity: float  # of the default's held-out answers, over the uncapped model's
    perplexity_interval: tuple[float, float]
    agreement: float  # of the likeliest next token with the uncapped model's, on the same answers
    choices: float  # share of multiple-choice questions answered rightly
    hold: (
        float  # nats of log-odds that the cap gives back to the Assistant's answers; uncapped: that personas take away
    )
    hold_interval: tuple[float, float]
    checks: tuple[
        int, int
    ]  # answers that can be checked exactly: right ones, of how many; (0, 0) without ordinary work
    domains: dict[str, dict[str, Any]]  # DomainCost of plain prose and of each domain of ordinary work; uncapped: none

    @property
    def plain_perplexity(self) -> float:
        """Of plain prose, over the uncapped model's."""
        return self._costs[PLAIN].perplexity if self.domains else 1.0

    @property
    def worst(self) -> tuple[str, float]:
        """The domain of ordinary work, fiction left out, whose perplexity rises most, and how far."""
        return worst(self._costs, fiction=False)

    @property
    def worst_fiction(self) -> tuple[str, float]:
        """The same of fiction on request."""
        return worst(self._costs, fiction=True)

    @property
    def _costs(self) -> dict[str, DomainCost]:
        return {name: DomainCost(**cost) for name, cost in self.domains.items()}

    @property
    def name(self) -> str:
        return "uncapped" if self.percentile <= 0 else f"layers {self.first}-{self.last}, p{self.percentile:g}"


class Bench:
    """The tests of a sweep, with the uncapped model's results to compare with.

    Parameters
    ----------
    model
        a causal LM.
    tokenizer
        its tokenizer.
    plan
        whose held-out roles and questions are asked.
    settings
        of the answers.
    judge
        of uptake.
    store
        where the answers of the default and to ordinary work come from.
    questions
        how many questions each held-out role is asked.
    work
        ordinary work; without it plain prose alone says what a cap costs, and nothing is checked.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        plan: Plan,
        settings: Settings,
        judge: UptakeJudge,
        store: Store,
        questions: int = 4,
        work: Work | None = None,
    ) -> None:
        self.model, self.tokenizer, self.plan, self.judge, self.work = model, tokenizer, plan, judge, work
        # Another seed: what is measured here chose nothing before.
        self.engine = TransformersEngine(model, tokenizer, replace(settings, seed=settings.seed + 1))
        held = sorted(plan.held_questions)
        chosen = held[:: max(1, len(held) // questions)][:questions]
        self.roles = [name for name in plan.held_roles if plan.roles[name].kind != NEAR]
        self.role_tasks = self._tasks(self.roles, chosen)
        self.default_tasks = self._tasks([DEFAULT_ROLE], held)
        self.answers: list[tuple[list[int], list[int]]] = []
        for shard in store.shards(batches(plan)):
            for task, prompt, answer in zip(shard.tasks, shard.prompts, shard.answers, strict=True):
                if task.role == DEFAULT_ROLE and task.question in plan.held_questions and task.prompt < 2:
                    self.answers.append((prompt, answer))
        self.choices = shipped("choices.jsonl")
        self.base = losses(model, self.answers)
        self.holds = Holds(model, self.engine)
        self.costs = Costs(model, tokenizer, work, store)
        self.long_engine = TransformersEngine(model, tokenizer, settings_of(settings, TOKENS))

    def _tasks(self, roles: Sequence[str], questions: Sequence[int]) -> list[Task]:
        pairs = [(name, i, q) for name in roles for i, q in enumerate(questions)]
        prompts = {name: self.plan.roles[name].prompts for name in roles}
        return [
            Task(name, i % len(prompts[name]), q, prompts[name][i % len(prompts[name])], self.plan.questions[q])
            for name, i, q in pairs
        ]

    @torch.inference_mode()
    def _right_choices(self) -> float:
        right = 0
        for entry in self.choices:
            task = Task("", 0, 0, "", f"{entry['question']} Answer in as few words as possible.")
            prompt = self.engine.prompts([task])[0]
            options = [self.tokenizer(choice, add_special_tokens=False)["input_ids"] for choice in entry["choices"]]
            found = losses(self.model, [(prompt, ids) for ids in options])[0]
            right += int(found.argmin()) == entry["answer"]
        return right / len(self.choices)

    def _uptake(self, tasks: Sequence[Task]) -> tuple[list[Task], Tensor]:
        order: list[Task] = []
        texts: list[str] = []
        for batch in in_batches(tasks):
            shard = self.engine.answer(batch)
            order += shard.tasks
            texts += shard.texts
        return order, self.judge.took_on(texts).double()

    def measure(self, profile: CapProfile | None, percentile: float = 0.0) -> Point:
        """The model under a profile, or as it is."""
        if profile is None:
            point, fired = self._measure(self.holds.taken, self.base), 0.0
        else:
            with install(self.model, profile) as cap:
                seen = losses(self.model, self.answers)  # before anything else, so that what fires on these is counted
                fired = share_fired(cap)
                point = self._measure(self.holds.measure(), seen)
            point["domains"] = {name: asdict(cost) for name, cost in self.costs.measure(profile).items()}
        return Point(*_band(profile), percentile, fired=fired, **point)

    def _measure(self, held: Tensor, on_answers: tuple[Tensor, list[Tensor]]) -> dict[str, Any]:
        (found, tokens), (base, base_tokens) = on_answers, self.base
        order, taken = self._uptake(self.role_tasks)
        _, default_taken = self._uptake(self.default_tasks)
        generator = torch.Generator().manual_seed(0)
        by_role = torch.stack([taken[[i for i, t in enumerate(order) if t.role == n]].mean() for n in self.roles])
        return {
            "uptake": taken.mean().item(),
            "uptake_interval": _interval(by_role, generator),
            "default_uptake": default_taken.mean().item(),
            "perplexity": (found - base).mean().exp().item(),
            "perplexity_interval": _interval(found - base, generator, torch.exp),
            "agreement": agreement(tokens, base_tokens),
            "choices": self._right_choices(),
            "hold": held.mean().item(),
            "hold_interval": _interval(held, generator),
            "checks": (0, 0) if self.work is None else checks(self.long_engine, self.work),
            "domains": {},
        }


def _band(profile: CapProfile | None) -> tuple[int, int]:
    return (profile.layers[0], profile.layers[-1]) if profile else (-1, -1)


def _interval(
    values: Tensor, generator: torch.Generator, of_mean: Callable[[Tensor], Tensor] = lambda x: x
) -> tuple[float, float]:
    drawn = values[torch.randint(len(values), (DRAWS, len(values)), generator=generator)].mean(1)
    low, high = torch.quantile(of_mean(drawn), torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def bands(profile: CapProfile) -> list[tuple[int, int]]:
    """To sweep: the profile's layers, and other runs (first, last) of as many, from two fifths of the depth on."""
    depth, count = profile.num_layers or 0, len(profile.layers)
    last = max(0, depth - count)
    starts = {min(last, round(depth * share)) for share in (0.4, 0.5, 0.57, 0.63, 0.7)}
    return [(start, start + count - 1) for start in sorted(starts | {profile.layers[0]})]


def percentiles(population: str) -> list[float]:
    """To sweep: single tokens scatter far more than means of answers, so that the same effect lies at lower ones."""
    return [2.0, 4.0, 6.0] if population.endswith("tokens") else [5.0, 10.0, 25.0, 50.0]


def candidates(
    profile: CapProfile, bands: Sequence[tuple[int, int]], percentiles: Sequence[float], population: str
) -> list[tuple[CapProfile, float]]:
    """What to sweep: the profile at each band of layers (first, last; both in it) and percentile.

    Raises
    ------
    ValueError
        the profile has no such layer or quantile table.
    """
    return [
        (with_floors(profile, percentile, population, list(range(first, last + 1))), percentile)
        for first, last in bands
        for percentile in percentiles
    ]


def front(points: Sequence[Point]) -> list[Point]:
    """Those that no other beats in uptake and in perplexity both, least uptake last."""
    best = [
        p
        for p in points
        if not any(
            q.uptake <= p.uptake
            and q.perplexity <= p.perplexity
            and (q.uptake, q.perplexity) != (p.uptake, p.perplexity)
            for q in points
        )
    ]
    return sorted(best, key=lambda p: -p.uptake)


@dataclass(frozen=True)
class Bounds:
    """What the chosen point may cost: perplexity over the uncapped model's, of the default's answers, of the worst
    domain of ordinary work, and of the worst one of fiction on request.
    """

    perplexity: float = 1.02
    worst: float = 1.02
    fiction: float = 1.05

    def admit(self, point: Point) -> bool:
        return (
            point.perplexity <= self.perplexity
            and point.worst[1] <= self.worst
            and point.worst_fiction[1] <= self.fiction
        )


def choose(points: Sequence[Point], bounds: Bounds) -> Point:
    """What holds most, of the points within the bounds whose uptake cannot be told from the least, by its interval; the
    least costly where none is within the bounds.
    """
    allowed = [p for p in points if bounds.admit(p)]
    if not allowed:
        return min(points, key=lambda p: max(p.perplexity, p.worst[1], p.worst_fiction[1]))
    least = min(allowed, key=lambda p: p.uptake)
    return max((p for p in allowed if p.uptake <= least.uptake_interval[1]), key=lambda p: p.hold)


def sweep(
    bench: Bench,
    candidates: Sequence[tuple[CapProfile, float]],
    done: Path,
    progress: Callable[[Point], None] = lambda _: None,
) -> tuple[Point, list[Point]]:
    """The uncapped model, and one point for each candidate.

    Finished points are kept in `done`, JSONL, and not measured again.
    """
    known: dict[tuple[int, int, float], Point] = {}
    if done.exists():
        for line in done.read_bytes().splitlines(keepends=True):
            if line.endswith(b"\n"):
                point = Point(**json.loads(line))
                known[point.first, point.last, point.percentile] = point
        done.write_text("".join(json.dumps(asdict(point)) + "\n" for point in known.values()))
    points = []
    for candidate, percentile in [(None, 0.0), *candidates]:
        setting = (*_band(candidate), percentile)
        point = known.get(setting) or bench.measure(candidate, percentile)
        if setting not in known:
            with done.open("a") as file:
                file.write(json.dumps(asdict(point)) + "\n")
        points.append(point)
        progress(point)
    return points[0], points[1:]
