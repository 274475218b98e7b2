"""From roles and questions to a profile. Each stage streams over the shards that the stage before it wrote."""

from __future__ import annotations

import dataclasses
import datetime
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

import axiscap
from axiscap import interop
from axiscap.calibrate import refusal
from axiscap.calibrate.judge import TAKEN_ON
from axiscap.calibrate.roles import DEFAULT_ROLE, Plan, Task, batches, even_sample
from axiscap.calibrate.rollouts import TEMPERATURE, TOP_P, Here, TransformersEngine, Workers
from axiscap.calibrate.sinks import NormLimits, SinkCounts, find_norm_limits
from axiscap.calibrate.sketch import Sketch, describe
from axiscap.calibrate.space import (
    PARTS,
    ROLE,
    WORK,
    Directions,
    Projections,
    Space,
    Sums,
    discriminant,
    evidence,
    group,
    project,
)
from axiscap.calibrate.store import Settings, Store
from axiscap.calibrate.template import lowest_template_rows
from axiscap.calibrate.tokens import Collect, Scatter, Text, are_ordinary, read
from axiscap.calibrate.work import Work, load_prose
from axiscap.calibrate.work import answer as answer_work
from axiscap.calibrate.work import shards as work_shards
from axiscap.models import decoder_layers, language_class, text_config
from axiscap.profile import CapProfile
from axiscap.profile.floors import check_percentiles, with_floors

#: How many answers of the default are read token by token, and half as many of roles.
TEXTS = 512
#: The number of parts in which the texts are read. Any free worker takes the next part.
PARTS_OF_TEXTS = 32
#: The default's answers form this many domains, each of some of the questions. As a single domain among forty it would
#: weigh too little. The number is odd because every fourth question is held out.
DEFAULTS = 9
#: One answer to ordinary work in this many is also read as plain text, without a conversation around it.
PLAIN = 3
#: How far the discriminant's covariance is shrunk towards a multiple of the identity.
SHRINK = 0.1
#: The capped layers if ordinary work is given and no number of layers is: these shares of the depth, first and last.
WIDE = (0.27, 0.93)

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Keep:
    """Keeps all rollouts of the default, and those of a role that the judge gave a 3. Without scores, all are kept."""

    scores: dict[str, int | None] | None = None

    def __call__(self, task: Task) -> bool:
        return task.role == DEFAULT_ROLE or self.scores is None or self.scores.get(task.id) == TAKEN_ON


def calibrate(
    model: Any,
    tokenizer: Any,
    plan: Plan,
    store: Store,
    *,
    work: Work | None = None,
    shrink: float = SHRINK,
    percentile: float = 25.0,
    target_percentile: float | None = None,
    population: str = "assistant",
    count: int | None = None,
    keep: Keep | None = None,
    judge: str = "none",
    minimum: int = 1,
    workers: Workers | None = None,
    vectors: Path | None = None,
    progress: Progress = lambda label, done, total: None,
) -> CapProfile:
    """Makes a profile for a model from its answers to roles and questions.

    The norm limits are found first (:func:`find_norm_limits`), because they are part of the answers' settings.

    Parameters
    ----------
    model
        a transformers causal LM in evaluation mode.
    tokenizer
        its tokenizer (see :func:`axiscap.models.load`).
    plan
        the tasks: which role is asked which question.
    store
        keeps the rollouts; its settings name the model and the sampling.
    work
        ordinary work. With it the axis is a discriminant (:func:`axiscap.calibrate.space.discriminant`), and the lift
        has no part along the directions of refusal (:mod:`axiscap.calibrate.refusal`). Without it the axis is the
        published mean difference.
    shrink
        how far the discriminant's covariance is shrunk, from 0 (excluded) to 1.
    percentile
        the percentile of the population's projections at which the floors lie.
    target_percentile
        the same for the targets. None: a row below its floor is lifted to its floor.
    population
        the rows whose projections give the percentiles. Means of answers: ``assistant`` (the default's), ``pooled``
        (the default's and the roles'), ``work`` (to ordinary work). Single tokens: ``assistant tokens``,
        ``pooled tokens``, ``ordinary tokens``.
    count
        how many layers to cap. None: those from :data:`WIDE` of the depth with ordinary work; a fifth of the layers,
        and at least 8, without it.
    keep
        which rollouts count; None: all.
    judge
        the name of the judge that chose them, for the provenance.
    minimum
        the fewest kept answers with which a role takes part.
    workers
        run the rollouts; None: this process.
    vectors
        a folder for the default's and the roles' mean activations, in the published layout.
    progress
        called with the name of the step, how many items it finished since the last call, and how many there are.

    Returns
    -------
    CapProfile
        The profile, with the evidence for its axis in its provenance.

    Examples
    --------
    >>> from axiscap import calibrate
    >>> roles = calibrate.load_roles()
    >>> few = {name: roles[name] for name in ("default", *sorted(set(roles) - {"default"})[:2])}
    >>> plan = calibrate.plan(few, calibrate.load_questions()[:3], per_role=3)
    >>> store = calibrate.Store(str(folder / "rollouts"), calibrate.Settings("SmolLM2-135M", "float32", 4))
    >>> profile = calibrate.calibrate(model, tokenizer, plan, store)  # doctest: +SKIP
    """
    check_percentiles(percentile, target_percentile)
    limits = find_norm_limits(model, tokenizer, plan, store, work)
    store = Store(store.url, dataclasses.replace(store.settings, norm_limits=limits.limits))
    workers = workers or Here(TransformersEngine(model, tokenizer, store.settings))
    run = _Run(model, tokenizer, plan, work, keep or Keep(), store, workers, progress)
    run.answer()
    sums = run.sum_means()
    space = Space.of(sums, plan, minimum)
    if vectors:
        roles = dict(zip(space.names, space.roles.float(), strict=True))
        interop.write_vectors(interop.Vectors(space.default.float(), roles), vectors)
    discriminant_directions, sinks = run.read_texts(None if work is None else shrink)
    directions = run.choose_directions(space, discriminant_directions)
    projections, sketches = run.collect_projections(directions, space.null)
    facts = evidence(space, projections, plan)
    layers = _layers_to_cap(torch.tensor(facts.auc), count, has_work=work is not None)
    provenance = {
        "model": describe_model(model, store.settings.model),
        "axis": _describe_axis(space, sums, plan, judge, work, shrink),
        "sinks": sinks.describe(limits, layers, tokenizer),
        "quantiles": describe(sketches),
        "template": {} if work is None else describe_template(model, tokenizer, work, store.settings, directions.axis),
        "evidence": dataclasses.asdict(facts),
        "sampling": describe_sampling(store.settings),
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "axiscap": axiscap.__version__,
    }
    uncapped = profile_without_floors(layers, directions, limits, sketches, provenance)
    return with_floors(uncapped, percentile, population, target_percentile=target_percentile)


@dataclass(frozen=True)
class _Run:
    """One calibration: its inputs, and a method for each stage. The store's settings have the norm limits."""

    model: Any
    tokenizer: Any
    plan: Plan
    work: Work | None
    keep: Keep
    store: Store
    workers: Workers
    progress: Progress

    @cached_property
    def todo(self) -> list[list[Task]]:
        return batches(self.plan)

    @cached_property
    def texts(self) -> list[Text]:
        return _sample_texts(self.plan, self.keep, self.store, self.todo, self.work, self.tokenizer)

    @property
    def text_parts(self) -> list[list[Text]]:
        """The texts in parts. Their number does not depend on the workers, so that sums are equal to the bit."""
        parts = (self.texts[start::PARTS_OF_TEXTS] for start in range(PARTS_OF_TEXTS))
        return [part for part in parts if part]

    def answer(self) -> None:
        """Has the plan's tasks and ordinary work answered, except what the store has already."""
        total = len(self.plan.tasks)
        self.workers.rollouts(self.store, self.todo, lambda done: self.progress("answers", done, total))
        work = self.work
        if work is not None:
            label = "answers to ordinary work"
            answer_work(work, self.workers, self.store, lambda done: self.progress(label, done, work.answers))

    def sum_means(self) -> Sums:
        """The sums of the answers' mean activations that make the axis."""
        sums = Sums()
        for part in self.workers.over_shards(CollectSums(self.plan, self.keep), self.store, self.todo):
            sums.merge(part)
        return sums

    def read_texts(self, shrink: float | None) -> tuple[Directions | None, SinkCounts]:
        """The discriminant's directions (None if `shrink` is None), and the counts of attention sinks.

        The store keeps the result, because all texts are read for it.
        """
        name = self.store.name_of("reading", shrink, [dataclasses.astuple(text) for text in self.texts])
        if (kept := self.store.kept(name)) is not None:
            facts, tensors = kept
            self.progress("texts read", len(self.texts), len(self.texts))
            return Directions(**tensors) if tensors else None, SinkCounts.from_json(facts)
        scatters, sinks = self._scatter_tokens()
        directions = None if shrink is None else discriminant(scatters, shrink)
        tensors = {}
        if directions is not None:
            assert directions.lift is not None
            tensors = {"axis": directions.axis.contiguous(), "lift": directions.lift.contiguous()}
        self.store.keep(name, sinks.to_json(), tensors)
        return directions, sinks

    def _scatter_tokens(self) -> tuple[list[Scatter], SinkCounts]:
        """The scatter of single tokens at each layer, and the counts of attention sinks."""
        norm_limits = self.store.settings.norm_limits
        sinks = SinkCounts(norm_limits)
        scatters = [Scatter(text_config(self.model).hidden_size) for _ in norm_limits]
        for part_scatters, part_sinks in self._over_texts(CollectScatter(norm_limits), "texts read"):
            for scatter, part in zip(scatters, part_scatters, strict=True):
                scatter.merge(part)
            sinks.merge(part_sinks)
        return scatters, sinks

    def choose_directions(self, space: Space, discriminant_directions: Directions | None) -> Directions:
        """The discriminant with a lift without the directions of refusal. Without a discriminant, the space's axis."""
        if discriminant_directions is None:
            return Directions(space.axis)
        engine = TransformersEngine(self.model, self.tokenizer, self.store.settings)
        return refusal.guarded(discriminant_directions, refusal.directions(engine))

    def collect_projections(self, directions: Directions, null: Tensor) -> tuple[Projections, dict[str, Sketch]]:
        """The projections of the plan's answers, and the sketch of each population that has values."""
        projections = Projections(len(directions.axis))
        sketches: dict[str, Sketch] = {}
        collect = CollectProjections(self.plan, self.keep, directions.axis, null)
        for part, part_sketches in self.workers.over_shards(collect, self.store, self.todo):
            projections.merge(part)
            _merge_sketches(sketches, part_sketches)
        if self.work is not None:
            sketches["work"] = sketch_work(self.work, self.store, directions.axis)
        collect_tokens = CollectSketches(directions.axis, self.store.settings.norm_limits)
        for part_sketches in self._over_texts(collect_tokens, "texts projected"):
            _merge_sketches(sketches, part_sketches)
        return projections, {name: sketch for name, sketch in sketches.items() if sketch.count}

    def _over_texts(self, collect: Collect, label: str) -> Iterator[Any]:
        total = len(self.texts)
        return self.workers.over_texts(
            collect, self.store, self.text_parts, lambda done: self.progress(label, done, total)
        )


@dataclass(frozen=True)
class CollectSums:
    """Sums of the shards' mean activations."""

    plan: Plan
    keep: Keep

    def __call__(self, store: Store, todo: Sequence[Sequence[Task]]) -> Sums:
        return Sums().add(store.shards(todo), self.plan, self.keep)


@dataclass(frozen=True)
class CollectProjections:
    """Projections of the shards' mean activations on an axis (n_layers, H) and on the null's (n_layers, P, H)."""

    plan: Plan
    keep: Keep
    axis: Tensor
    null: Tensor

    def __call__(self, store: Store, todo: Sequence[Sequence[Task]]) -> tuple[Projections, dict[str, Sketch]]:
        depth = len(self.axis)
        projections = Projections(depth).add(store.shards(todo), self.axis, self.null, self.plan, self.keep)
        assistant = Sketch(depth).add(projections.select(lambda task: task.role == DEFAULT_ROLE))
        return projections, {"assistant": assistant, "pooled": Sketch(depth).add(projections.values.tensor())}


@dataclass(frozen=True)
class CollectScatter:
    """The scatter of single tokens at each layer, in the groups of :func:`axiscap.calibrate.space.group`. Attention
    sinks are counted, and left out of the scatter.
    """

    norm_limits: Sequence[float]

    def __call__(self, model: Any, texts: Sequence[Text]) -> tuple[list[Scatter], SinkCounts]:
        size = text_config(model).hidden_size
        scatters = [Scatter(size) for _ in self.norm_limits]
        tokens = [torch.tensor([*text.prompt, *text.answer]) for text in texts]
        counts = SinkCounts(self.norm_limits, len(texts), sum(map(len, tokens)))
        padded = pad_sequence(tokens, batch_first=True)
        groups = list(dict.fromkeys(text.group for text in texts))
        group_of_text = torch.tensor([groups.index(text.group) for text in texts])

        def add_rows(layer: int, rows: Tensor, text: Tensor, position: Tensor, in_answer: Tensor) -> None:
            is_ordinary = counts.add(layer, rows, padded[text, position])
            row_group = group_of_text[text]
            for number in sorted(set(row_group.tolist())):
                name = groups[number]
                for part, in_part in zip(PARTS, (in_answer, ~in_answer), strict=True):
                    members = rows[is_ordinary & in_part & (row_group == number)]
                    if len(members):
                        scatters[layer].add(group(name, part), members, scatters=not name.startswith(ROLE))

        read(model, texts, add_rows)
        return scatters, counts


@dataclass(frozen=True)
class CollectSketches:
    """Distributions of single tokens' projections on an axis (n_layers, H), for three populations: the default's
    answers; these and the roles' answers; the default's texts and ordinary work, prompts included. Attention sinks are
    left out at the layers where they are sinks.
    """

    axis: Tensor
    norm_limits: Sequence[float]

    def __call__(self, model: Any, texts: Sequence[Text]) -> dict[str, Sketch]:
        depth = len(self.axis)
        axes = self.axis.float()
        kinds = {DEFAULT_ROLE: 0, "role": 1, "work": 2}
        kind_of_text = torch.tensor([kinds[text.group.split(" ")[0]] for text in texts])
        populations = {"assistant tokens": [0], "pooled tokens": [0, 1], "ordinary tokens": [0, 2]}
        sketches = {name: Sketch(depth) for name in populations}

        def add_rows(layer: int, rows: Tensor, text: Tensor, position: Tensor, in_answer: Tensor) -> None:
            is_ordinary = are_ordinary(rows, layer, self.norm_limits)
            values = rows.float() @ axes[layer]
            for name, members in populations.items():
                is_member = is_ordinary & torch.isin(kind_of_text[text], torch.tensor(members))
                if name != "ordinary tokens":
                    is_member &= in_answer
                sketches[name].add_at(layer, values[is_member])

        read(model, texts, add_rows)
        return sketches


def _layers_to_cap(separation: Tensor, count: int | None, *, has_work: bool) -> list[int]:
    """The layers to cap, from the axis's separation (n_layers,) at each layer."""
    depth = len(separation)
    if count is None and has_work:
        first, end = (round(share * depth) for share in WIDE)
        return list(range(first, end))
    return choose_layers(separation, min(max(8, depth // 5), depth) if count is None else count)


def choose_layers(separation: Tensor, count: int) -> list[int]:
    """The run of `count` layers with the highest mean separation, between half of the depth and nine tenths of it.

    The paper's best settings lie there (layers 46-53 of 64, 56-71 of 80). ``axiscap sweep`` compares settings by their
    effect.
    """
    depth = len(separation)
    if not 1 <= count <= depth:
        raise ValueError(f"the number of layers to cap must be from 1 to {depth}, got {count}")
    first, last = depth // 2, -(-9 * depth // 10)
    starts = range(min(first, depth - count), max(last - count, min(first, depth - count)) + 1)
    best = max(starts, key=lambda start: separation[start : start + count].mean().item())
    return list(range(best, best + count))


def describe_model(model: Any, name: str) -> dict[str, Any]:
    config = text_config(model)
    return {
        "id": Path(name).name if Path(name).is_dir() else name,
        "architecture": language_class(model),
        "hidden_size": config.hidden_size,
        "num_layers": len(decoder_layers(model)),
    }


def _describe_axis(
    space: Space, sums: Sums, plan: Plan, judge: str, work: Work | None, shrink: float
) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "method": "mean(default) - mean(roles), unit length",
        "roles": space.names,
        "questions": len(set(plan.role_questions) - plan.held_questions),
        "rollouts": sum(sums.counts.values()),
        "judge": judge,
        "digest": plan.digest,
    }
    if work is not None:
        facts |= {
            "method": "read along a discriminant of ordinary and role tokens, lifted along mean(default) - mean(roles) "
            "without the directions of refusal",
            "shrink": shrink,
            "work": {"domains": work.domains, "held_out": work.held_domains, "digest": work.digest},
            "prose": sorted({register for register, _ in load_prose()}),
        }
    return facts


def describe_sampling(settings: Settings) -> dict[str, Any]:
    return {
        "temperature": TEMPERATURE,
        "top_p": TOP_P,
        "max_new_tokens": settings.max_new_tokens,
        "seed": settings.seed,
        "dtype": settings.dtype,
        "engine": settings.engine,
    }


def profile_without_floors(
    layers: list[int],
    directions: Directions,
    limits: NormLimits,
    sketches: Mapping[str, Sketch],
    provenance: dict[str, Any],
) -> CapProfile:
    """The profile with all floors at minus infinity, so that it caps nothing yet."""
    axis = directions.axis.float()
    lift = None if directions.lift is None else directions.lift.float()
    norm_limits = torch.tensor(limits.limits)
    return CapProfile(
        layers,
        axis[layers][:, None].contiguous(),
        torch.full((len(layers), 1), -torch.inf),
        provenance,
        lifts=None if lift is None else lift[layers][:, None].contiguous(),
        norm_limits=norm_limits[layers],
        axis_all=axis,
        lift_all=lift,
        norm_limit_all=norm_limits,
        populations=torch.stack([sketch.table() for sketch in sketches.values()]),
    )


def sketch_work(work: Work, store: Store, axis: Tensor) -> Sketch:
    """The distribution of the projections of answers to ordinary work, without those that are held out."""
    sketch = Sketch(len(axis))
    for shard in work_shards(work, store):
        rows = [row for row, task in enumerate(shard.tasks) if not work.is_held_out(task)]
        sketch.add(project(shard.means[rows], axis[:, None])[..., 0])
    return sketch


def describe_template(model: Any, tokenizer: Any, work: Work, settings: Settings, axis: Tensor) -> dict[str, Any]:
    """The entry for the rows of the chat template; empty without a template."""
    if tokenizer.chat_template is None:
        return {}
    engine = TransformersEngine(model, tokenizer, settings)
    lowest = lowest_template_rows(engine, work, axis, settings.norm_limits)
    return {"lowest": [math.floor(value * 10_000) / 10_000 for value in lowest.tolist()]}


def _merge_sketches(sketches: dict[str, Sketch], others: Mapping[str, Sketch]) -> None:
    for name, sketch in others.items():
        sketches[name] = sketches[name].merge(sketch) if name in sketches else sketch


def _sample_texts(
    plan: Plan, keep: Keep, store: Store, todo: Sequence[Sequence[Task]], work: Work | None, tokenizer: Any
) -> list[Text]:
    """The texts that are read token by token: an even sample of the answers that make the axis, answers to ordinary
    work, and AxisCap's own prose.
    """
    default, roles = _axis_texts(plan, keep, store, todo)
    texts = even_sample(default, TEXTS)
    for role_texts in roles.values():
        texts += even_sample(role_texts, max(1, 2 * TEXTS // len(roles)))
    if work is not None:
        texts += ordinary_texts(work, store, tokenizer)
    return texts


def _axis_texts(
    plan: Plan, keep: Keep, store: Store, todo: Sequence[Sequence[Task]]
) -> tuple[list[Text], dict[str, list[Text]]]:
    """The default's answers to questions that are not held out, and by role those that make the axis, ordered by task
    id.
    """
    default: list[tuple[str, Text]] = []
    roles: list[tuple[str, Text]] = []
    for shard in store.shards(todo):
        for task, prompt, answer_tokens in zip(shard.tasks, shard.prompts, shard.answers, strict=True):
            if task.role == DEFAULT_ROLE and task.question not in plan.held_questions:
                domain = f"{DEFAULT_ROLE} {task.question % DEFAULTS}"
                default.append((task.id, Text(domain, prompt, answer_tokens)))
            elif task.role != DEFAULT_ROLE and plan.makes_the_axis(task) and keep(task):
                roles.append((task.id, Text(f"{ROLE}{task.role}", prompt, answer_tokens)))
    by_role: dict[str, list[Text]] = {}
    for _, text in sorted(roles, key=lambda entry: entry[0]):
        by_role.setdefault(text.group, []).append(text)
    return [text for _, text in sorted(default, key=lambda entry: entry[0])], by_role


def ordinary_texts(work: Work, store: Store, tokenizer: Any) -> list[Text]:
    """Answers to ordinary work that are not held out, some of them again as plain text, and the shipped prose."""
    texts = []
    for shard in work_shards(work, store):
        for task, prompt, answer_tokens in zip(shard.tasks, shard.prompts, shard.answers, strict=True):
            if work.is_held_out(task):
                continue
            texts.append(Text(f"{WORK}{work.domain(task)}", prompt, answer_tokens))
            if task.question % PLAIN == 0 and len(answer_tokens) > 1:
                texts.append(Text(f"{WORK}plain text", answer_tokens[:1], answer_tokens[1:]))
    for register, paragraph in load_prose():
        ids = tokenizer(paragraph)["input_ids"]
        texts.append(Text(f"{WORK}prose: {register}", ids[:1], ids[1:]))
    return texts
