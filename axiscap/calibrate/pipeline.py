"""From roles and questions to a profile: each stage streams over the shards of the one before."""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Callable, Mapping, Sequence
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
from axiscap.calibrate.sinks import SinkCounts, find_norm_limits
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
from axiscap.calibrate.store import Store
from axiscap.calibrate.tokens import Scatter, Text, are_ordinary, read
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

    def __call__(self, store: Store, todo: Sequence[Sequence[Task]]) -> tuple[Projections, dict[str, Sketch]]:
        depth = len(self.axis)
        found = Projections(depth).add(store.shards(todo), self.axis, self.null, self.plan, self.keep)
        assistant = Sketch(depth).add(found.of(lambda task: task.role == DEFAULT_ROLE))
        return found, {"assistant": assistant, "pooled": Sketch(depth).add(found.values.tensor())}


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
    depth = len(decoder_layers(model))
    if count is None and work is None:
        count = min(max(8, depth // 5), depth)
    keep = keep or Keep()
    limits = find_norm_limits(model, tokenizer, plan, store, work)
    store = Store(store.url, dataclasses.replace(store.settings, norm_limits=limits.limits))
    workers = workers or Here(TransformersEngine(model, tokenizer, store.settings))
    todo = batches(plan)
    workers.rollouts(store, todo, lambda done: progress("answers", done, len(plan.tasks)))
    if work is not None:
        answer(work, workers, store, lambda done: progress("answers to ordinary work", done, work.answers))

    sums = Sums()
    for part in workers.over_shards(CollectSums(plan, keep), store, todo):
        sums.merge(part)
    space = Space.of(sums, plan, minimum)
    if vectors:
        roles = dict(zip(space.names, space.roles.float(), strict=True))
        interop.write_vectors(interop.Vectors(space.default.float(), roles), vectors)

    # Parts whose number does not hang on who reads them, so that the sums are the same to the bit.
    texts = _texts(plan, keep, store, todo, work, tokenizer)
    parts = [part for part in (texts[at::PARTS_OF_TEXTS] for at in range(PARTS_OF_TEXTS)) if part]
    shrinks = None if work is None else shrink
    read_along, sinks = _first_reading(model, texts, parts, shrinks, workers, store, progress)
    directions = Directions(space.axis)
    if read_along is not None:
        directions = refusal.guarded(
            read_along, refusal.directions(TransformersEngine(model, tokenizer, store.settings))
        )

    found = Projections(depth)
    sketches: dict[str, Sketch] = {}
    for projections, their_sketches in workers.over_shards(
        CollectProjections(plan, keep, directions.axis, space.null), store, todo
    ):
        found.merge(projections)
        _merge(sketches, their_sketches)
    if work is not None:
        sketches["work"] = Sketch(depth)
        for shard in work_shards(work, store):
            made = [at for at, task in enumerate(shard.tasks) if not work.is_held_out(task)]
            sketches["work"].add(project(shard.means[made], directions.axis[:, None])[..., 0])
    for of_tokens in workers.over_texts(
        CollectSketches(directions.axis, limits.limits),
        store,
        parts,
        lambda done: progress("texts projected", done, len(texts)),
    ):
        _merge(sketches, of_tokens)
    sketches = {name: sketch for name, sketch in sketches.items() if sketch.count}

    facts = evidence(space, found, plan)
    if count is None:
        layers = list(range(*(round(share * depth) for share in WIDE)))
    else:
        layers = choose_layers(torch.tensor(facts.auc), count)
    unit = directions.axis.float()
    tables = {name: sketch.table() for name, sketch in sketches.items()}
    settings = store.settings
    axis_facts: dict[str, Any] = {
        "method": "mean(default) - mean(roles), unit length",
        "roles": space.names,
        "questions": len(set(plan.asked) - plan.held_questions),
        "rollouts": sum(sums.counts.values()),
        "judge": judge,
        "digest": plan.digest,
    }
    if work is not None:
        axis_facts |= {
            "method": "read along a discriminant of ordinary and role tokens, lifted along mean(default) - mean(roles) "
            "without the directions of refusal",
            "shrink": shrink,
            "work": {"domains": work.domains, "held_out": work.held_domains, "digest": work.digest},
            "prose": sorted({register for register, _ in load_prose()}),
        }
    provenance = {
        "model": {
            "id": Path(settings.model).name if Path(settings.model).is_dir() else settings.model,
            "architecture": language_class(model),
            "hidden_size": unit.shape[1],
            "num_layers": depth,
        },
        "axis": axis_facts,
        "sinks": sinks.describe(limits, layers, tokenizer),
        "quantiles": floors_module.describe(sketches),
        "evidence": dataclasses.asdict(facts),
        "sampling": {
            "temperature": TEMPERATURE,
            "top_p": TOP_P,
            "max_new_tokens": settings.max_new_tokens,
            "seed": settings.seed,
            "dtype": settings.dtype,
            "engine": settings.engine,
        },
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "axiscap": axiscap.__version__,
    }
    off = torch.full((len(layers), 1), -torch.inf)
    lift = None if directions.lift is None else directions.lift.float()
    norm_limits = torch.tensor(limits.limits)
    bare = CapProfile(
        layers,
        unit[layers][:, None].contiguous(),
        off,
        provenance,
        lifts=None if lift is None else lift[layers][:, None].contiguous(),
        norm_limits=norm_limits[layers],
        axis_all=unit,
        lift_all=lift,
        norm_limit_all=norm_limits,
        populations=torch.stack(list(tables.values())),
    )
    return floors_module.with_floors(bare, percentile, population, target_percentile=target_percentile)


def _first_reading(
    model: Any,
    texts: Sequence[Text],
    parts: Sequence[Sequence[Text]],
    shrink: float | None,
    workers: Workers,
    store: Store,
    progress: Callable[[str, int, int], None],
) -> tuple[Directions | None, SinkCounts]:
    """The discriminant, where it is wanted, and how many rows are sinks; kept beside the answers, since all of them are
    read for it, and once more along what is found here.
    """
    norm_limits = store.settings.norm_limits
    name = store.name_of("reading", shrink, [dataclasses.astuple(text) for text in texts])
    if (kept := store.kept(name)) is not None:
        facts, tensors = kept
        progress("texts read", len(texts), len(texts))
        return Directions(**tensors) if tensors else None, SinkCounts.from_json(facts)
    sinks = SinkCounts(norm_limits)
    scatters = [Scatter(text_config(model).hidden_size) for _ in norm_limits]
    for more_scatters, more_sinks in workers.over_texts(
        CollectScatter(norm_limits), store, parts, lambda done: progress("texts read", done, len(texts))
    ):
        for scatter, more in zip(scatters, more_scatters, strict=True):
            scatter.merge(more)
        sinks.merge(more_sinks)
    found = None if shrink is None else discriminant(scatters, shrink)
    tensors = {}
    if found is not None:
        assert found.lift is not None
        tensors = {"axis": found.axis.contiguous(), "lift": found.lift.contiguous()}
    store.keep(name, sinks.to_json(), tensors)
    return found, sinks


def _merge(sketches: dict[str, Sketch], more: Mapping[str, Sketch]) -> None:
    for name, sketch in more.items():
        sketches[name] = sketches[name].merge(sketch) if name in sketches else sketch


def _texts(
    plan: Plan, keep: Keep, store: Store, todo: Sequence[Sequence[Task]], work: Work | None, tokenizer: Any
) -> list[Text]:
    """What is read token by token: an even sample of what makes the axis, the default's answers, and ordinary work with
    AxisCap's own prose.
    """

    default, roles = [], []
    for shard in store.shards(todo):
        for task, prompt, said in zip(shard.tasks, shard.prompts, shard.answers, strict=True):
            if task.role == DEFAULT_ROLE and task.question not in plan.held_questions:
                part = f"{DEFAULT_ROLE} {task.question % DEFAULTS}"
                default.append((task.id, Text(part, prompt, said)))
            elif task.role != DEFAULT_ROLE and plan.makes_the_axis(task) and keep(task):
                roles.append((task.id, Text(f"{ROLE}{task.role}", prompt, said)))
    ordered = [[text for _, text in sorted(part, key=lambda entry: entry[0])] for part in (default, roles)]
    by_role: dict[str, list[Text]] = {}
    for text in ordered[1]:
        by_role.setdefault(text.group, []).append(text)
    found = even_sample(ordered[0], TEXTS)
    for texts in by_role.values():
        found += even_sample(texts, max(1, 2 * TEXTS // len(by_role)))
    if work is not None:
        for shard in work_shards(work, store):
            for task, prompt, said in zip(shard.tasks, shard.prompts, shard.answers, strict=True):
                if work.is_held_out(task):
                    continue
                found.append(Text(f"{WORK}{work.domain(task)}", prompt, said))
                if task.question % PLAIN == 0 and len(said) > 1:
                    found.append(Text(f"{WORK}plain text", said[:1], said[1:]))
        for register, paragraph in load_prose():
            ids = tokenizer(paragraph)["input_ids"]
            found.append(Text(f"{WORK}prose: {register}", ids[:1], ids[1:]))
    return found
