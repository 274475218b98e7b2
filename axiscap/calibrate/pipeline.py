"""From roles and questions to a profile: each stage streams over the shards of the one before."""

from __future__ import annotations

import dataclasses
import datetime
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

import axiscap
from axiscap import interop
from axiscap.calibrate import floors as floors_module
from axiscap.calibrate import refusal
from axiscap.calibrate.data import DEFAULT_ROLE, Plan, Task, batches, even_sample
from axiscap.calibrate.floors import Sketch
from axiscap.calibrate.judge import TAKEN_ON
from axiscap.calibrate.rollouts import TEMPERATURE, TOP_P, Here, TransformersEngine, Workers
from axiscap.calibrate.sinks import NormLimits, SinkCounts, find_norm_limits
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
from axiscap.calibrate.tokens import Collect, Scatter, Text, are_ordinary, read
from axiscap.calibrate.work import Work, answer, load_prose
from axiscap.calibrate.work import shards as work_shards
from axiscap.models import decoder_layers, language_class, text_config
from axiscap.profile import CapProfile

#: Texts of the default, and half of those of roles, whose single tokens are looked at.
TEXTS = 512
#: How many parts the texts are read in, each by whichever worker is free.
PARTS_OF_TEXTS = 32
#: The default counts as this many domains, each of the answers to some of the questions: conversation about oneself
#: and the world is what roles are asked for as well, and as one domain among forty it would weigh too little. (Odd,
#: since of the questions every fourth is held out.)
DEFAULTS = 9
#: One answer to ordinary work in this many is also read as plain text, without a conversation around it, which on a
#: model of conversations looks like nobody's words.
PLAIN = 3
#: How far the discriminant's covariance is shrunk towards a multiple of the identity.
SHRINK = 0.1
#: The layers that are capped by default where ordinary work is known, from and to these shares of the depth.
WIDE = (0.27, 0.93)


@dataclass(frozen=True)
class Keep:
    """Which rollouts count: the default's all, a role's those that the judge gave a 3; with no judge, all."""

    scores: dict[str, int | None] | None = None

    def __call__(self, task: Task) -> bool:
        return task.role == DEFAULT_ROLE or self.scores is None or self.scores.get(task.id) == TAKEN_ON


@dataclass(frozen=True)
class CollectSums:
    plan: Plan
    keep: Keep

    def __call__(self, store: Store, todo: Sequence[Sequence[Task]]) -> Sums:
        return Sums().add(store.shards(todo), self.plan, self.keep)


@dataclass(frozen=True)
class CollectProjections:
    plan: Plan
    keep: Keep
    axis: Tensor
    null: Tensor

    def __call__(self, store: Store, todo: Sequence[Sequence[Task]]) -> Projections:
        return Projections(len(self.axis)).add(store.shards(todo), self.axis, self.null, self.plan, self.keep)


def choose_layers(separation: Tensor, count: int) -> list[int]:
    """The run of `count` layers with the highest mean separation among the middle-to-late ones.

    Those are the layers from half of the depth to nine tenths, where the paper's best settings lie (layers 46-53 of 64,
    56-71 of 80): earlier the character is not formed yet, later it is already spoken. ``axiscap sweep`` measures them.
    """
    depth = len(separation)
    if not 1 <= count <= depth:
        raise ValueError(f"the number of layers to cap must be from 1 to {depth}, got {count}")
    first, last = depth // 2, -(-9 * depth // 10)
    starts = range(min(first, depth - count), max(last - count, min(first, depth - count)) + 1)
    best = max(starts, key=lambda start: separation[start : start + count].mean().item())
    return list(range(best, best + count))


@dataclass(frozen=True)
class CollectScatter:
    """How single tokens scatter, by layer, in the groups of :func:`axiscap.calibrate.space.group`. Attention sinks are
    counted, and are no part of it.
    """

    norm_limits: Sequence[float]

    def __call__(self, model: Any, texts: Sequence[Text]) -> tuple[list[Scatter], SinkCounts]:
        size = text_config(model).hidden_size
        found = [Scatter(size) for _ in self.norm_limits]
        tokens = [torch.tensor([*text.prompt, *text.answer]) for text in texts]
        counts = SinkCounts(self.norm_limits, len(texts), sum(map(len, tokens)))
        padded = pad_sequence(tokens, batch_first=True)
        groups = list(dict.fromkeys(text.group for text in texts))
        group_of = torch.tensor([groups.index(text.group) for text in texts])

        def see(layer: int, rows: Tensor, owner: Tensor, place: Tensor, of_answer: Tensor) -> None:
            use = counts.add(layer, rows, padded[owner, place])
            mine = group_of[owner]
            for at in sorted(set(mine.tolist())):
                for part, of_part in zip(PARTS, (of_answer, ~of_answer), strict=True):
                    chosen = rows[use & of_part & (mine == at)]
                    if len(chosen):
                        found[layer].add(group(groups[at], part), chosen, scatters=not groups[at].startswith(ROLE))

        read(model, texts, see)
        return found, counts


@dataclass(frozen=True)
class CollectSketches:
    """Distributions of single tokens' projections on an axis (n_layers, H): of the default's answers, of those and
    everybody's in a role, and of all that is ordinary, prompts included. A row is left out at the layers where it is an
    attention sink.
    """

    axis: Tensor
    norm_limits: Sequence[float]

    def __call__(self, model: Any, texts: Sequence[Text]) -> dict[str, Sketch]:
        depth = len(self.axis)
        axes = self.axis.float()
        kinds = {DEFAULT_ROLE: 0, "role": 1, "work": 2}
        kind_of = torch.tensor([kinds[text.group.split(" ")[0]] for text in texts])
        populations = {"assistant tokens": [0], "pooled tokens": [0, 1], "ordinary tokens": [0, 2]}
        found = {name: Sketch(depth) for name in populations}

        def see(layer: int, rows: Tensor, owner: Tensor, place: Tensor, of_answer: Tensor) -> None:
            use = are_ordinary(rows, layer, self.norm_limits)
            values = rows.float() @ axes[layer]
            for name, members in populations.items():
                mine = use & torch.isin(kind_of[owner], torch.tensor(members))
                if name != "ordinary tokens":
                    mine &= of_answer
                found[name].add_at(layer, values[mine])

        read(model, texts, see)
        return found


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
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> CapProfile:
    """Makes a profile for a model.

    Limits of norms are found first (:func:`find_norm_limits`), and are part of the settings of the answers that follow.

    Parameters
    ----------
    model
        a transformers causal LM in evaluation mode.
    tokenizer
        its tokenizer (see :func:`axiscap.models.load`).
    plan
        who is asked what.
    store
        where the rollouts are kept; its settings name the model and the sampling.
    work
        ordinary work, which with the default's answers stands for the Assistant: the axis is then a discriminant
        (:func:`axiscap.calibrate.space.discriminant`), and the lift has no part along the directions of refusal
        (:mod:`axiscap.calibrate.refusal`). Without it the axis is the published mean difference.
    shrink
        of the discriminant.
    percentile
        of the population's projections that the floors are at.
    target_percentile
        the same of the targets; None: a row below its floor is lifted to its floor.
    population
        ``assistant`` (the default's answer means), ``pooled`` (everybody's in a role and the default's), or
        ``work`` (of ordinary work), or single tokens: ``assistant tokens``, ``pooled tokens``, ``ordinary tokens``.
    count
        how many layers to cap. Without it a fifth of them, or 8 where that is more; with ordinary work, those
        from :data:`WIDE` of the depth: a reading that ordinary tokens seldom fire costs little at each of them.
    keep
        which rollouts count; all without it.
    judge
        what chose them, for the provenance.
    minimum
        of kept answers, for a role to take part.
    workers
        who runs the rollouts; this process without them.
    vectors
        a folder for the default's and the roles' mean activations, in the published layout.
    progress
        called with what is done, how much of it was finished since the last call, and how much there is.

    Returns
    -------
    CapProfile
        The profile, with the evidence for it in its provenance.

    Examples
    --------
    >>> from axiscap import calibrate
    >>> roles = calibrate.load_roles()
    >>> few = {name: roles[name] for name in ("default", *sorted(set(roles) - {"default"})[:2])}
    >>> asked = calibrate.plan(few, calibrate.load_questions()[:3], per_role=3)
    >>> store = calibrate.Store(str(folder / "rollouts"), calibrate.Settings("SmolLM2-135M", "float32", 4))
    >>> made = calibrate.calibrate(model, tokenizer, asked, store)  # doctest: +SKIP
    """
    floors_module.check_percentiles(percentile, target_percentile)
    limits = find_norm_limits(model, tokenizer, plan, store, work)
    store = Store(store.url, dataclasses.replace(store.settings, norm_limits=limits.limits))
    engine = TransformersEngine(model, tokenizer, store.settings)
    run = _Run(engine, plan, work, keep or Keep(), store, workers or Here(engine), progress)
    run.answer()
    sums = run.sum_means()
    space = Space.of(sums, plan, minimum)
    if vectors:
        roles = dict(zip(space.names, space.roles.float(), strict=True))
        interop.write_vectors(interop.Vectors(space.default.float(), roles), vectors)
    texts = run.texts()
    directions, sinks = run.find_directions(space, texts, shrink)
    projections = run.project_means(directions, space)
    sketches = run.sketch(projections, directions, texts)
    facts = evidence(space, projections, plan)
    layers = _capped_layers(facts.auc, count, wide=work is not None)
    provenance = {
        "model": _describe_model(model, store.settings),
        "axis": _describe_axis(plan, space, sums, judge, work, shrink),
        "sinks": sinks.describe(limits, layers, tokenizer),
        "quantiles": floors_module.describe(sketches),
        "evidence": dataclasses.asdict(facts),
        "sampling": _describe_sampling(store.settings),
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "axiscap": axiscap.__version__,
    }
    profile = _without_floors(layers, directions, limits, sketches, provenance)
    return floors_module.with_floors(profile, percentile, population, target_percentile=target_percentile)


@dataclass(frozen=True)
class _Run:
    """The inputs that all stages of one calibration share, and the stages."""

    engine: TransformersEngine
    plan: Plan
    work: Work | None
    keep: Keep
    store: Store
    workers: Workers
    progress: Callable[[str, int, int], None]

    @functools.cached_property
    def batches(self) -> list[list[Task]]:
        return batches(self.plan)

    def answer(self) -> None:
        """Generates the answers that the store lacks."""
        tasks, work = len(self.plan.tasks), self.work
        self.workers.rollouts(self.store, self.batches, lambda done: self.progress("answers", done, tasks))
        if work is not None:
            title = "answers to ordinary work"
            answer(work, self.workers, self.store, lambda done: self.progress(title, done, work.answers))

    def sum_means(self) -> Sums:
        """Adds up the answers' mean activations by role."""
        sums = Sums()
        for part in self.workers.over_shards(CollectSums(self.plan, self.keep), self.store, self.batches):
            sums.merge(part)
        return sums

    def texts(self) -> list[Text]:
        """The texts that are read token by token: an even sample of the answers that make the axis, the default's
        answers, ordinary work, and AxisCap's own prose.
        """
        default, roles = self._answers()
        texts = even_sample(default, TEXTS)
        by_role: dict[str, list[Text]] = {}
        for text in roles:
            by_role.setdefault(text.group, []).append(text)
        for answers in by_role.values():
            texts += even_sample(answers, max(1, 2 * TEXTS // len(by_role)))
        if self.work is not None:
            texts += self._ordinary_texts(self.work)
        return texts

    def _answers(self) -> tuple[list[Text], list[Text]]:
        """The default's answers and the roles' kept ones, none of them held out, in the order of their tasks' names."""
        default: dict[str, Text] = {}
        roles: dict[str, Text] = {}
        for shard in self.store.shards(self.batches):
            for task, prompt, tokens in zip(shard.tasks, shard.prompts, shard.answers, strict=True):
                if task.role == DEFAULT_ROLE and task.question not in self.plan.held_questions:
                    default[task.id] = Text(f"{DEFAULT_ROLE} {task.question % DEFAULTS}", prompt, tokens)
                elif task.role != DEFAULT_ROLE and self.plan.makes_the_axis(task) and self.keep(task):
                    roles[task.id] = Text(f"{ROLE}{task.role}", prompt, tokens)
        return [default[name] for name in sorted(default)], [roles[name] for name in sorted(roles)]

    def _ordinary_texts(self, work: Work) -> list[Text]:
        texts = []
        for shard in work_shards(work, self.store):
            for task, prompt, tokens in zip(shard.tasks, shard.prompts, shard.answers, strict=True):
                if work.is_held_out(task):
                    continue
                texts.append(Text(f"{WORK}{work.domain(task)}", prompt, tokens))
                if task.question % PLAIN == 0 and len(tokens) > 1:
                    texts.append(Text(f"{WORK}plain text", tokens[:1], tokens[1:]))
        for register, paragraph in load_prose():
            tokens = self.engine.tokenizer(paragraph)["input_ids"]
            texts.append(Text(f"{WORK}prose: {register}", tokens[:1], tokens[1:]))
        return texts

    def find_directions(self, space: Space, texts: Sequence[Text], shrink: float) -> tuple[Directions, SinkCounts]:
        """Reads the texts for the axis and the lift: the discriminant with ordinary work, else the mean difference."""
        discriminant, sinks = self._read_for_discriminant(texts, None if self.work is None else shrink)
        if discriminant is None:
            return Directions(space.axis), sinks
        return refusal.guarded(discriminant, refusal.directions(self.engine)), sinks

    def _read_for_discriminant(
        self, texts: Sequence[Text], shrink: float | None
    ) -> tuple[Directions | None, SinkCounts]:
        """The discriminant (None without ``shrink``), and how many rows are sinks. The store keeps both, because every
        text is read for them.
        """
        norm_limits = self.store.settings.norm_limits
        name = self.store.name_of("reading", shrink, [dataclasses.astuple(text) for text in texts])
        if (kept := self.store.kept(name)) is not None:
            facts, tensors = kept
            self.progress("texts read", len(texts), len(texts))
            return Directions(**tensors) if tensors else None, SinkCounts.from_json(facts)
        sinks = SinkCounts(norm_limits)
        scatters = [Scatter(text_config(self.engine.model).hidden_size) for _ in norm_limits]
        for part_scatters, part_sinks in self._over_texts(CollectScatter(norm_limits), texts, "texts read"):
            for scatter, part in zip(scatters, part_scatters, strict=True):
                scatter.merge(part)
            sinks.merge(part_sinks)
        directions = None if shrink is None else discriminant(scatters, shrink)
        tensors = {}
        if directions is not None:
            assert directions.lift is not None
            tensors = {"axis": directions.axis.contiguous(), "lift": directions.lift.contiguous()}
        self.store.keep(name, sinks.to_json(), tensors)
        return directions, sinks

    def project_means(self, directions: Directions, space: Space) -> Projections:
        """Projects each answer's mean activations on the axis."""
        projections = Projections(len(directions.axis))
        collect = CollectProjections(self.plan, self.keep, directions.axis, space.null)
        for part in self.workers.over_shards(collect, self.store, self.batches):
            projections.merge(part)
        return projections

    def sketch(self, projections: Projections, directions: Directions, texts: Sequence[Text]) -> dict[str, Sketch]:
        """The distribution of projections in each population that has any."""
        depth = len(directions.axis)
        sketches = {
            "assistant": Sketch(depth).add(projections.of(lambda task: task.role == DEFAULT_ROLE)),
            "pooled": Sketch(depth).add(projections.values.tensor()),
        }
        if self.work is not None:
            sketches["work"] = self._sketch_work(self.work, directions.axis)
        collect = CollectSketches(directions.axis, self.store.settings.norm_limits)
        for part in self._over_texts(collect, texts, "texts projected"):
            for name, sketch in part.items():
                sketches[name] = sketches[name].merge(sketch) if name in sketches else sketch
        return {name: sketch for name, sketch in sketches.items() if sketch.count}

    def _sketch_work(self, work: Work, axis: Tensor) -> Sketch:
        sketch = Sketch(len(axis))
        for shard in work_shards(work, self.store):
            rows = [row for row, task in enumerate(shard.tasks) if not work.is_held_out(task)]
            sketch.add(project(shard.means[rows], axis[:, None])[..., 0])
        return sketch

    def _over_texts(self, collect: Collect, texts: Sequence[Text], title: str) -> Iterator[Any]:
        """Reads the texts in parts. Their number does not depend on the workers, so that sums have the same bits."""
        parts = [part for part in (texts[first::PARTS_OF_TEXTS] for first in range(PARTS_OF_TEXTS)) if part]
        return self.workers.over_texts(collect, self.store, parts, lambda done: self.progress(title, done, len(texts)))


def _capped_layers(separation: Sequence[float], count: int | None, *, wide: bool) -> list[int]:
    depth = len(separation)
    if count is None and wide:
        return list(range(*(round(share * depth) for share in WIDE)))
    return choose_layers(torch.tensor(separation), min(max(8, depth // 5), depth) if count is None else count)


def _describe_model(model: Any, settings: Settings) -> dict[str, Any]:
    return {
        "id": Path(settings.model).name if Path(settings.model).is_dir() else settings.model,
        "architecture": language_class(model),
        "hidden_size": text_config(model).hidden_size,
        "num_layers": len(decoder_layers(model)),
    }


def _describe_axis(
    plan: Plan, space: Space, sums: Sums, judge: str, work: Work | None, shrink: float
) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "method": "mean(default) - mean(roles), unit length",
        "roles": space.names,
        "questions": len(set(plan.asked) - plan.held_questions),
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


def _describe_sampling(settings: Settings) -> dict[str, Any]:
    return {
        "temperature": TEMPERATURE,
        "top_p": TOP_P,
        "max_new_tokens": settings.max_new_tokens,
        "seed": settings.seed,
        "dtype": settings.dtype,
        "engine": settings.engine,
    }


def _without_floors(
    layers: Sequence[int],
    directions: Directions,
    limits: NormLimits,
    sketches: Mapping[str, Sketch],
    provenance: dict[str, Any],
) -> CapProfile:
    """The profile of the directions, its floors off."""
    axis, norm_limits = directions.axis.float(), torch.tensor(limits.limits)
    lift = None if directions.lift is None else directions.lift.float()
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
