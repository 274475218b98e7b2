"""From roles and questions to a profile: each stage streams over the shards of the one before."""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import axiscap
from axiscap import interop
from axiscap.calibrate import floors as floors_module
from axiscap.calibrate.data import DEFAULT_ROLE, Plan, Task, batches
from axiscap.calibrate.floors import Sketch
from axiscap.calibrate.judge import TAKEN_ON
from axiscap.calibrate.rollouts import TEMPERATURE, TOP_P, Here, TransformersEngine, Workers
from axiscap.calibrate.space import Projections, Space, Sums, evidence, project
from axiscap.calibrate.store import Shard, Store
from axiscap.models import decoder_layers, watched_layers
from axiscap.profile import CapProfile

#: Rollouts of a population whose single tokens are looked at; they take a second pass of the model.
TOKEN_SAMPLE = 256


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
    space: Space

    def __call__(self, store: Store, todo: Sequence[Sequence[Task]]) -> tuple[Projections, dict[str, Sketch]]:
        depth = len(self.space.axis)
        found = Projections(depth).add(store.shards(todo), self.space, self.plan, self.keep)
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


@torch.inference_mode()
def token_sketch(model: Any, shards: Iterable[Shard], axis: Tensor, pick: Callable[[Task], bool]) -> Sketch:
    """Projections of single answer tokens, from a second pass over the finished texts.

    Args:
        model: a causal LM.
        shards: where the texts are.
        axis: (n_layers, H) unit rows.
        pick: which rollouts are looked at.
    """
    sketch = Sketch(len(axis))
    for shard in shards:
        for task, prompt, answer in zip(shard.tasks, shard.prompts, shard.answers, strict=True):
            if not pick(task):
                continue
            seen: list[Tensor] = []

            def look(layer: int, hidden: Tensor, seen: list[Tensor] = seen, start: int = len(prompt)) -> None:
                seen.append(hidden[0, start:].float().cpu())

            with watched_layers(model, look):
                model(torch.tensor([[*prompt, *answer]], device=model.device), use_cache=False, logits_to_keep=1)
            sketch.add(project(torch.stack(seen, dim=1), axis[:, None])[..., 0])
    return sketch


def calibrate(
    model: Any,
    tokenizer: Any,
    plan: Plan,
    store: Store,
    *,
    percentile: float = 25.0,
    population: str = "assistant",
    count: int | None = None,
    keep: Keep | None = None,
    judge: str = "none",
    minimum: int = 1,
    workers: Workers | None = None,
    vectors: Path | None = None,
    progress: Callable[[int], None] = lambda _: None,
) -> CapProfile:
    """Makes a profile for a model.

    Args:
        model: a transformers causal LM in evaluation mode.
        tokenizer: its tokenizer (see :func:`axiscap.models.load`).
        plan: who is asked what.
        store: where the rollouts are kept; its settings name the model and the sampling.
        percentile: of the population's projections that the floors are at.
        population: ``assistant`` (the default's answer means), ``pooled`` (everybody's), or either with `` tokens``.
        count: how many layers to cap; a fifth of them, or 8 where that is more.
        keep: which rollouts count; all without it.
        judge: what chose them, for the provenance.
        minimum: of kept answers, for a role to take part.
        workers: who runs the rollouts; this process without them.
        vectors: a folder for the default's and the roles' mean activations, in the published layout.
        progress: called with each number of rollouts finished.

    Returns:
        The profile, with the evidence for it in its provenance.
    """
    floors_module.check_percentile(percentile)
    depth = len(decoder_layers(model))
    count = min(max(8, depth // 5), depth) if count is None else count
    keep = keep or Keep()
    workers = workers or Here(TransformersEngine(model, tokenizer, store.settings))
    todo = batches(plan)
    workers.rollouts(store, todo, progress)

    sums = Sums()
    for part in workers.over_shards(CollectSums(plan, keep), store, todo):
        sums.merge(part)
    space = Space.of(sums, plan, minimum)
    if vectors:
        roles = dict(zip(space.names, space.roles.float(), strict=True))
        interop.write_vectors(interop.Vectors(space.default.float(), roles), vectors)
    found = Projections(depth)
    sketches: dict[str, Sketch] = {}
    for more, parts in workers.over_shards(CollectProjections(plan, keep, space), store, todo):
        found.merge(more)
        for name, sketch in parts.items():
            sketches[name] = sketches[name].merge(sketch) if name in sketches else sketch
    for name in ("assistant", "pooled"):
        sketches[f"{name} tokens"] = _tokens(model, name, store, todo, found, space.axis)

    facts = evidence(space, found, plan)
    layers = choose_layers(torch.tensor(facts.auc), count)
    unit = space.axis.float()
    tables = {name: sketch.table() for name, sketch in sketches.items()}
    settings = store.settings
    provenance = {
        "model": {
            "id": Path(settings.model).name if Path(settings.model).is_dir() else settings.model,
            "architecture": type(model).__name__,
            "hidden_size": unit.shape[1],
            "num_layers": depth,
        },
        "axis": {
            "method": "mean(default) - mean(roles), unit length",
            "roles": space.names,
            "questions": len(set(plan.asked) - plan.held_questions),
            "rollouts": sum(sums.counts.values()),
            "judge": judge,
            "digest": plan.digest,
        },
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
    bare = CapProfile(
        layers,
        unit[layers][:, None].contiguous(),
        off,
        provenance,
        axis_all=unit,
        populations=torch.stack(list(tables.values())),
    )
    return floors_module.with_floors(bare, percentile, population)


def _tokens(
    model: Any, name: str, store: Store, todo: Sequence[Sequence[Task]], found: Projections, axis: Tensor
) -> Sketch:
    kept = sorted(task.id for task in found.tasks if name == "pooled" or task.role == DEFAULT_ROLE)
    sample = set(kept[:: -(-len(kept) // TOKEN_SAMPLE)])
    wanted = [batch for batch in todo if any(task.id in sample for task in batch)]
    return token_sketch(model, store.shards(wanted), axis, lambda task: task.id in sample)
