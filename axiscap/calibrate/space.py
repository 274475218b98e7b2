"""The axis at each layer, and the evidence that it is real. Nothing here runs a model."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from axiscap import ops
from axiscap.calibrate.roles import DEFAULT_ROLE, Plan, Task
from axiscap.calibrate.store import Shard
from axiscap.calibrate.tokens import Scatter
from axiscap.profile import Evidence

#: The default's answers are summed in this many groups, so that the null can permute their labels.
GROUPS = 16
#: Permutations of labels (a kernel call takes at most 64 directions, and one is the axis), and draws of a bootstrap.
PERMUTATIONS, DRAWS = 60, 400

Keep = Callable[[Task], bool]


@dataclass
class Sums:
    """Counts and float64 sums of activations by role and part. The sums of several shards merge into one.

    A role has two parts, the halves of its questions. The default has :data:`GROUPS`.
    """

    counts: dict[tuple[str, int], int] = field(default_factory=dict)
    sums: dict[tuple[str, int], Tensor] = field(default_factory=dict)  # (n_layers, H) float64

    def add(self, shards: Iterable[Shard], plan: Plan, keep: Keep) -> Sums:
        """Adds the shards' rollouts that make the axis and are kept; returns itself."""
        for shard in shards:
            for task, means in zip(shard.tasks, shard.means, strict=True):
                if plan.makes_the_axis(task) and keep(task):
                    part = plan.role_questions[task.question] % (GROUPS if task.role == DEFAULT_ROLE else 2)
                    self._add((task.role, part), 1, means.double())
        return self

    def merge(self, other: Sums) -> Sums:
        """Adds other sums; returns itself."""
        for key, total in other.sums.items():
            self._add(key, other.counts[key], total)
        return self

    def _add(self, key: tuple[str, int], count: int, total: Tensor) -> None:
        self.counts[key] = self.counts.get(key, 0) + count
        previous = self.sums.get(key)
        self.sums[key] = total.clone() if previous is None else previous.add_(total)

    def mean(self, role: str, parts: Sequence[int] | None = None) -> Tensor:
        """(n_layers, H) float64: the mean over a role's answers, in these parts or in all."""
        keys = [key for key in self.sums if key[0] == role and (parts is None or key[1] in parts)]
        return torch.stack([self.sums[key] for key in keys]).sum(0) / sum(self.counts[key] for key in keys)

    def count(self, role: str) -> int:
        return sum(count for key, count in self.counts.items() if key[0] == role)


def unit(vectors: Tensor) -> Tensor:
    """The vectors scaled to length 1 along the last dimension."""
    return torch.nn.functional.normalize(vectors, dim=-1)


def axis_of(default: Tensor, roles: Tensor) -> Tensor:
    """mean(default) - mean(roles), of unit length: (n_layers, H) from (n_layers, H) and (R, n_layers, H)."""
    return unit(default - roles.mean(0))


def project(means: Tensor, axes: Tensor) -> Tensor:
    """Projections (N, n_layers, K) float32 of activations (N, n_layers, H) on axes (n_layers, K, H), in one launch."""
    streams = list(means.transpose(0, 1).contiguous().unbind(0))
    projections = torch.empty(axes.shape[0], len(means), axes.shape[1])
    off = torch.full((axes.shape[0], 1, axes.shape[1]), -torch.inf)
    ops.cap_layers_(streams, axes[:, None].float().contiguous(), off, projections=projections)
    return projections.transpose(0, 1)


def auc(low: Tensor, high: Tensor) -> Tensor:
    """P(a value of high > a value of low), where a tie counts half: (n, L), (m, L) -> (L,) float64."""
    result = []
    for a, b in zip(low.T.contiguous(), high.T.contiguous(), strict=True):
        ordered = a.sort().values
        below = torch.searchsorted(ordered, b) + torch.searchsorted(ordered, b, right=True)
        result.append(below.double().mean() / (2 * len(a)))
    return torch.stack(result)


def d_prime(low: Tensor, high: Tensor) -> Tensor:
    """Difference of means over the root of the mean variance: (n, L), (m, L) -> (L,)."""
    spread = ((low.double().var(0) + high.double().var(0)) / 2).sqrt()
    return (high.double().mean(0) - low.double().mean(0)) / spread


@dataclass(frozen=True)
class Directions:
    """The directions of a cap at each layer, float64.

    ``axis``: (n_layers, H), unit rows, which a row is projected on; positive towards the Assistant. ``lift``:
    (n_layers, H) with <axis, lift> = 1, along which a row is corrected; None: along the axis.
    """

    axis: Tensor
    lift: Tensor | None = None


def discriminant(scatters: Sequence[Scatter], shrink: float) -> Directions:
    """The axis that best separates roles' tokens from ordinary ones, and the lift towards the Assistant.

    The axis is Fisher's discriminant, ``axis ~ ((1 - shrink) S + shrink tr(S)/H I)^-1 m`` at each layer, with the
    covariance shrunk towards a multiple of the identity (Ledoit and Wolf 2004). S is the covariance of ordinary tokens
    within their groups, plus the covariance of the groups' means. m is the mean over ordinary groups minus the mean
    over roles, for answers' tokens plus the same for prompts' tokens; each group has the same weight. Prompts count
    because a role's prompt also shows the role, and an answer does not take up what is capped in the prompt.

    The axis is computed twice. The second time most of the weight (:data:`WEIGHT`) lies on the ordinary groups that are
    nearest to the roles, such as poems, because a cap would harm these most. The lift is the published direction, which
    moves the persona: the mean difference d of the default's and the roles' answers, as ``d / <d, axis>``.

    Parameters
    ----------
    scatters
        one for each layer, of the groups of :func:`group`.
    shrink
        from 0 (excluded) to 1.

    Raises
    ------
    ValueError
        ordinary tokens and roles do not differ at a layer.
    """
    axes, lifts = [], []
    for scatter in scatters:
        parts = [_GroupMeans(scatter, part) for part in PARTS]
        spread = scatter.within([name for part in parts for name in part.ordinary_names])
        spread += torch.stack([part.ordinary.T.cov(correction=0) for part in parts]).mean(0)
        size = len(spread)
        shrunk = (1 - shrink) * spread + shrink * spread.trace() / size * torch.eye(size, dtype=torch.float64)
        root = torch.linalg.cholesky(shrunk)

        def solve(difference: Tensor, root: Tensor = root) -> Tensor:
            return unit(torch.cholesky_solve(difference[:, None], root)[:, 0])

        plain = solve(torch.stack([part.ordinary.mean(0) - part.roles.mean(0) for part in parts]).sum(0))
        axis = solve(torch.stack([part.weighted(plain) - part.roles.mean(0) for part in parts]).sum(0))
        answers = parts[0]
        default = [name for name in answers.ordinary_names if name.startswith(DEFAULT_ROLE)]
        difference = scatter.mean(*default) - answers.roles.mean(0)
        if difference @ axis <= 0:
            raise ValueError("ordinary tokens and roles do not differ; more roles or more ordinary work are needed")
        axes.append(axis)
        lifts.append(difference / (difference @ axis))
    return Directions(torch.stack(axes), torch.stack(lifts))


#: The prefixes of text groups: those of a role, and those of a domain of ordinary work.
ROLE, WORK = "role ", "work "
#: The parts of a text.
PARTS = ("answer", "prompt")
#: For :func:`discriminant`: the share of ordinary groups that counts as nearest to the roles, and its weight.
NEAREST, WEIGHT = 0.35, 0.7


def group(text_group: str, part: str) -> str:
    """The name of a group of tokens: ``default N``, ``role NAME`` or ``work DOMAIN``, then one of :data:`PARTS`."""
    return f"{text_group} {part}"


class _GroupMeans:
    """The means (n, H) of ordinary groups and of roles, over the tokens of their answers or of their prompts."""

    def __init__(self, scatter: Scatter, part: str) -> None:
        names = [name for name in scatter.counts if name.endswith(f" {part}")]
        self.ordinary_names = [name for name in names if not name.startswith(ROLE)]
        self.ordinary = torch.stack([scatter.mean(name) for name in self.ordinary_names])
        self.roles = torch.stack([scatter.mean(name) for name in names if name.startswith(ROLE)])

    def weighted(self, axis: Tensor) -> Tensor:
        """The mean over ordinary groups, with more weight on those that are nearest to the roles along an axis."""
        count = max(1, round(NEAREST * len(self.ordinary)))
        nearest = self.ordinary[(self.ordinary @ axis).argsort()[:count]]
        return (1 - WEIGHT) * self.ordinary.mean(0) + WEIGHT * nearest.mean(0)


@dataclass
class Space:
    """The axis, and the mean activations that made it.

    ``axis``: (n_layers, H) float64, unit rows, positive towards the Assistant. ``names``: the R roles that made it.
    ``roles``: (R, n_layers, H), their mean activations. ``default``: (n_layers, H), the default's. ``null``:
    (n_layers, P, H), axes from permuted labels. ``halves``: (n_layers,), the cosine between the axes that the two
    halves of the questions make.
    """

    axis: Tensor
    names: list[str]
    roles: Tensor
    default: Tensor
    null: Tensor
    halves: Tensor

    @classmethod
    def of(cls, sums: Sums, plan: Plan, minimum: int) -> Space:
        """The space of the sums. A role with fewer than `minimum` kept answers takes no part.

        Raises
        ------
        ValueError
            fewer than two roles are left.
        """
        names = [name for name in plan.train_roles if sums.count(name) >= max(1, minimum)]
        if len(names) < 2:
            raise ValueError(
                f"only {len(names)} of {len(plan.train_roles)} roles have {minimum} answers that were kept; at least 2 "
                "are needed: more rollouts, a lower minimum, or another judge"
            )
        roles = torch.stack([sums.mean(name) for name in names])
        default = sums.mean(DEFAULT_ROLE)
        return cls(axis_of(default, roles), names, roles, default, _null_axes(sums, roles), _halves(sums, names, roles))

    def components(self) -> tuple[Tensor, Tensor, Tensor]:
        """PCA of the role vectors at each layer.

        Returns
        -------
        tuple[Tensor, Tensor, Tensor]
            Shares of the variance (n_layers, R); the first two components (n_layers, 2, H), the first pointing to the
            Assistant; the roles' coordinates on them (n_layers, R, 2).
        """
        centred = (self.roles - self.roles.mean(0)).transpose(0, 1)  # (n_layers, R, H)
        _, values, right = torch.linalg.svd(centred, full_matrices=False)
        first = right[:, :2]
        sign = torch.where((first[:, 0] * self.axis).sum(-1) < 0, -1.0, 1.0)
        first = torch.cat([first[:, :1] * sign[:, None, None], first[:, 1:]], dim=1)
        return values.square() / values.square().sum(-1, keepdim=True), first, centred @ first.transpose(1, 2)


def _halves(sums: Sums, names: Sequence[str], roles: Tensor) -> Tensor:
    """(n_layers,): the cosine between the axes that the two halves of the questions make."""
    axes = []
    for half in (0, 1):
        groups = range(half, GROUPS, 2)
        has_halves = [name for name in names if (name, 0) in sums.sums and (name, 1) in sums.sums]
        means = torch.stack([sums.mean(name, [half]) for name in has_halves]) if has_halves else roles
        axes.append(axis_of(sums.mean(DEFAULT_ROLE, list(groups)), means))
    return (axes[0] * axes[1]).sum(-1)


def _null_axes(sums: Sums, roles: Tensor) -> Tensor:
    """(n_layers, P, H): axes from random labels. Half of the default's groups and half of the roles stand for the
    Assistant.
    """
    default_groups = [sums.mean(DEFAULT_ROLE, [g]) for g in range(GROUPS) if (DEFAULT_ROLE, g) in sums.sums]
    pools = (torch.stack(default_groups), roles)
    generator = torch.Generator().manual_seed(0)
    axes = []
    for _ in range(PERMUTATIONS):
        orders = [(pool, torch.randperm(len(pool), generator=generator)) for pool in pools]
        assistant, others = ([pool[order[i::2]] for pool, order in orders] for i in (0, 1))
        axes.append(axis_of(torch.cat(assistant).mean(0), torch.cat(others)))
    return torch.stack(axes, dim=1)


class Values:
    """Rows of float32 in one growing buffer. A tensor for each shard would fragment the memory."""

    def __init__(self, *shape: int) -> None:
        self.shape, self.buffer = shape, array("f")

    def add(self, rows: Tensor) -> None:
        self.buffer.frombytes(rows.contiguous().numpy().tobytes())

    def tensor(self) -> Tensor:
        """(n, *shape)."""
        return torch.tensor(self.buffer, dtype=torch.float32).view(-1, *self.shape)


class Projections:
    """The projections of each kept rollout on the axis at each layer, and of held-out rollouts on the null's axes."""

    def __init__(self, depth: int) -> None:
        self.tasks: list[Task] = []
        self.values = Values(depth)
        self.null_tasks: list[Task] = []  # held-out rollouts alone
        self.null = Values(depth, PERMUTATIONS)

    def add(self, shards: Iterable[Shard], axis: Tensor, null: Tensor, plan: Plan, keep: Keep) -> Projections:
        """Adds the kept rollouts' projections on an axis (n_layers, H) and the null's (n_layers, P, H); returns
        itself.
        """
        axes = torch.cat([axis[:, None], null], dim=1).float()
        for shard in shards:
            values = project(shard.means, axes)
            kept = [i for i, task in enumerate(shard.tasks) if keep(task)]
            held = [i for i in kept if plan.tests_the_axis(shard.tasks[i])]
            self.tasks += [shard.tasks[i] for i in kept]
            self.values.add(values[kept, :, 0])
            self.null_tasks += [shard.tasks[i] for i in held]
            self.null.add(values[held, :, 1:])
        return self

    def merge(self, other: Projections) -> Projections:
        """Adds others; returns itself."""
        self.tasks += other.tasks
        self.null_tasks += other.null_tasks
        self.values.buffer.extend(other.values.buffer)
        self.null.buffer.extend(other.null.buffer)
        return self

    def select(self, pick: Callable[[Task], bool]) -> Tensor:
        """(n, n_layers): the projections of the rollouts whose task is picked."""
        return self.values.tensor()[[i for i, task in enumerate(self.tasks) if pick(task)]]


def percentile_interval(draws: Tensor) -> tuple[float, float]:
    """The 95 % interval of a percentile bootstrap: the 2.5 % and 97.5 % quantiles of its (N,) draws."""
    low, high = torch.quantile(draws.double(), torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def evidence(space: Space, projections: Projections, plan: Plan) -> Evidence:
    """The evidence that the axis is real, from the rollouts of held-out roles and questions.

    Raises
    ------
    ValueError
        no answer of a held-out role was kept.
    """
    default, by_role = _held_out_values(projections, plan)
    every_role = torch.cat(list(by_role.values()))
    separation = auc(every_role, default)
    depth = len(separation)
    best = depth // 3 + int(separation[depth // 3 :].argmax())
    null_auc = _null_auc(projections, depth)
    generator = torch.Generator().manual_seed(1)
    best_by_role = [values[:, best, None] for values in by_role.values()]
    auc_draws = _bootstrap_auc(best_by_role, default[:, best, None], generator)
    axis_draws = _bootstrap_axis(space, best, generator)
    variance, components, coordinates = space.components()
    loadings = ((space.roles[:, best] - space.default[best]) @ space.axis[best]).tolist()
    return Evidence(
        best_layer=best,
        held_roles=list(by_role),
        held_questions=len(plan.held_questions & set(plan.role_questions)),
        auc=_rounded(separation),
        auc_interval=_rounded_interval(auc_draws),
        auc_by_kind=_auc_by_kind(by_role, default, plan),
        auc_by_role={name: _rounded(auc(values, default)) for name, values in by_role.items()},
        d_prime=_rounded(d_prime(every_role, default), 3),
        null_auc=_rounded(null_auc.mean(1)),
        null_auc_interval=_rounded_interval(null_auc[best]),
        pc1_cosine=_rounded((components[:, 0] * space.axis).sum(-1)),
        variance=_rounded(variance[best, :10]),
        components_70=[int(n) + 1 for n in (variance.cumsum(-1) < 0.7).sum(-1).tolist()],
        halves=_rounded(space.halves),
        next_layer=_rounded((space.axis[:-1] * space.axis[1:]).sum(-1)),
        axis_interval=_rounded_interval(axis_draws),
        loadings={name: round(value, 4) for name, value in zip(space.names, loadings, strict=True)},
        map={n: _rounded(xy) for n, xy in zip(space.names, coordinates[best], strict=True)},
    )


def _held_out_values(projections: Projections, plan: Plan) -> tuple[Tensor, dict[str, Tensor]]:
    """Projections (n, n_layers) of the default's answers to held-out questions, and of each held-out role's answers."""
    default = projections.select(lambda task: task.role == DEFAULT_ROLE and plan.tests_the_axis(task))
    by_role = {}
    for name in plan.held_roles:
        values = projections.select(lambda task, name=name: task.role == name)  # type: ignore[misc]
        if len(values):
            by_role[name] = values
    if not by_role or not len(default):
        raise ValueError("no answer of a held-out role was kept, so nothing can say whether the axis separates")
    return default, by_role


def _auc_by_kind(by_role: Mapping[str, Tensor], default: Tensor, plan: Plan) -> dict[str, list[float]]:
    kinds: dict[str, list[Tensor]] = {}
    for name, values in by_role.items():
        kinds.setdefault(plan.roles[name].kind or "all", []).append(values)
    return {kind: _rounded(auc(torch.cat(values), default)) for kind, values in sorted(kinds.items())}


def _null_auc(projections: Projections, depth: int) -> Tensor:
    """(n_layers, P): the separation along the axes that permuted labels made."""
    is_default = torch.tensor([task.role == DEFAULT_ROLE for task in projections.null_tasks])
    values = projections.null.tensor()
    return auc(values[~is_default].flatten(1), values[is_default].flatten(1)).view(depth, -1)


def _bootstrap_auc(by_role: Sequence[Tensor], default: Tensor, generator: torch.Generator) -> Tensor:
    """(DRAWS,) separations at one layer. Each draw samples roles, and then answers of each, (n, 1) per role."""
    draws = []
    for _ in range(DRAWS):
        picked = torch.randint(len(by_role), (len(by_role),), generator=generator)
        low = [by_role[i][torch.randint(len(by_role[i]), (len(by_role[i]),), generator=generator)] for i in picked]
        high = default[torch.randint(len(default), (len(default),), generator=generator)]
        draws.append(auc(torch.cat(low), high)[0])
    return torch.stack(draws)


def _bootstrap_axis(space: Space, layer: int, generator: torch.Generator) -> Tensor:
    """(DRAWS,) cosines between the axis of a layer and the axes that sampled roles make."""
    draws = []
    for _ in range(DRAWS):
        picked = torch.randint(len(space.roles), (len(space.roles),), generator=generator)
        draws.append(axis_of(space.default[layer], space.roles[picked, layer]) @ space.axis[layer])
    return torch.stack(draws)


def _rounded(values: Tensor, digits: int = 4) -> list[float]:
    return [round(x, digits) for x in values.tolist()]


def _rounded_interval(draws: Tensor) -> list[float]:
    return [round(x, 4) for x in percentile_interval(draws)]


def loadings_correlation(first: Mapping[str, float], second: Mapping[str, float]) -> tuple[float, int]:
    """Pearson's correlation of two models' role loadings over the roles that both have, and their number.

    Raises
    ------
    ValueError
        fewer than three roles in common.
    """
    shared = sorted(set(first) & set(second))
    if len(shared) < 3:
        raise ValueError(f"at least three roles in common are needed to compare two models, got {len(shared)}")
    pair = torch.tensor([[first[name] for name in shared], [second[name] for name in shared]], dtype=torch.float64)
    return torch.corrcoef(pair)[0, 1].item(), len(shared)
