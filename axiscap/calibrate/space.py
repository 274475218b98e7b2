"""The persona space: the axis at each layer, and the evidence that it is real. Nothing here runs a model."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from axiscap import ops
from axiscap.calibrate.data import DEFAULT_ROLE, Plan, Task
from axiscap.calibrate.store import Shard
from axiscap.calibrate.tokens import Scatter
from axiscap.profile import Evidence

#: The default's answers are also summed in this many groups, whose labels can be exchanged.
GROUPS = 16
#: Permutations of labels, and draws of a bootstrap. The directions of one call of a kernel are at most 64.
PERMUTATIONS, DRAWS = 60, 400

Keep = Callable[[Task], bool]


@dataclass
class Sums:
    """Counts and sums of activations by role and part, exact to float64; sums of shards add up to those of the whole.

    A role's parts are the halves of its questions; the default's are its groups.
    """

    counts: dict[tuple[str, int], int] = field(default_factory=dict)
    sums: dict[tuple[str, int], Tensor] = field(default_factory=dict)  # (n_layers, H) float64

    def add(self, shards: Iterable[Shard], plan: Plan, keep: Keep) -> Sums:
        """Adds what makes the axis and `keep` says of the shards' rollouts; returns itself."""
        for shard in shards:
            for task, means in zip(shard.tasks, shard.means, strict=True):
                if plan.makes_the_axis(task) and keep(task):
                    part = plan.asked[task.question] % (GROUPS if task.role == DEFAULT_ROLE else 2)
                    self._add((task.role, part), 1, means.double())
        return self

    def merge(self, other: Sums) -> Sums:
        """Adds other sums; returns itself."""
        for key, total in other.sums.items():
            self._add(key, other.counts[key], total)
        return self

    def _add(self, key: tuple[str, int], count: int, total: Tensor) -> None:
        self.counts[key] = self.counts.get(key, 0) + count
        known = self.sums.get(key)
        self.sums[key] = total.clone() if known is None else known.add_(total)

    def mean(self, role: str, parts: Sequence[int] | None = None) -> Tensor:
        """(n_layers, H) float64: the mean over a role's answers, in some of its parts."""
        keys = [key for key in self.sums if key[0] == role and (parts is None or key[1] in parts)]
        return torch.stack([self.sums[key] for key in keys]).sum(0) / sum(self.counts[key] for key in keys)

    def count(self, role: str) -> int:
        return sum(count for key, count in self.counts.items() if key[0] == role)


def unit(vectors: Tensor) -> Tensor:
    """Of length 1 along the last dimension."""
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
    """P(a value of high is above one of low), ties counting half: (n, L), (m, L) -> (L,) float64."""
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
    """What rows are read along and corrected along, float64: axis (n_layers, H), unit rows, + = Assistant, and lift
    (n_layers, H) with <axis, lift> = 1, or None where that is the axis.
    """

    axis: Tensor
    lift: Tensor | None = None


def discriminant(scatters: Sequence[Scatter], shrink: float) -> Directions:
    """Reads along what tells roles' tokens from ordinary ones, corrects along what moves a role towards the Assistant.

    At each layer, with S the covariance of ordinary tokens, within their groups and of the groups' means, and m the
    difference below, ``axis ~ ((1 - shrink) S + shrink tr(S)/H I)^-1 m``: Fisher's discriminant with the covariance
    shrunk towards a multiple of the identity (Ledoit and Wolf 2004). m is a sum over answers' tokens and over prompts':
    the mean over ordinary groups less that over roles, each group counting alike. A role is told by its prompt as well,
    and what is capped there is not taken up by the answer. Then once more, with most of the weight (:data:`WEIGHT`) on
    those ordinary groups that lie nearest to the roles (poems, say): those are what a cap would harm. The lift is the
    mean difference of the default's and the roles' answers, ``d / <d, axis>``, as published, which is what moves the
    persona.

    Parameters
    ----------
    scatters
        one for each layer, of the groups of :func:`group`.
    shrink
        from 0 (excluded) to 1.
    """
    axes, lifts = [], []
    for scatter in scatters:
        parts = [_Parts(scatter, of) for of in PARTS]
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


#: What the names of groups of texts begin with: of one role, of one domain.
ROLE, WORK = "role ", "work "
#: A text's tokens are of its answer or of its prompt.
PARTS = ("answer", "prompt")
#: Of the ordinary groups, the share that lies nearest to the roles, and its weight; of :func:`discriminant`.
NEAREST, WEIGHT = 0.35, 0.7


def group(of: str, part: str) -> str:
    """Tokens that count together: of ``default N``, ``role NAME`` or ``work DOMAIN``, and one of :data:`PARTS`."""
    return f"{of} {part}"


class _Parts:
    """The means (n, H) of ordinary groups and of roles, of answers or of prompts."""

    def __init__(self, scatter: Scatter, part: str) -> None:
        mine = [name for name in scatter.counts if name.endswith(f" {part}")]
        self.ordinary_names = [name for name in mine if not name.startswith(ROLE)]
        self.ordinary = torch.stack([scatter.mean(name) for name in self.ordinary_names])
        self.roles = torch.stack([scatter.mean(name) for name in mine if name.startswith(ROLE)])

    def weighted(self, axis: Tensor) -> Tensor:
        """The mean over ordinary groups, of which the nearest to the roles along an axis count for more."""
        count = max(1, round(NEAREST * len(self.ordinary)))
        nearest = self.ordinary[(self.ordinary @ axis).argsort()[:count]]
        return (1 - WEIGHT) * self.ordinary.mean(0) + WEIGHT * nearest.mean(0)


@dataclass
class Space:
    """The axis and what the roles look like along it.

    ``axis``: (n_layers, H) float64, unit rows, + = Assistant. ``names``: the R roles that made it. ``roles``:
    (R, n_layers, H) their mean activations. ``default``: (n_layers, H). ``null``: (n_layers, P, H), axes made with
    permuted labels. ``halves``: (n_layers,) cosine between the axes of both halves of the questions.
    """

    axis: Tensor
    names: list[str]
    roles: Tensor
    default: Tensor
    null: Tensor
    halves: Tensor

    @classmethod
    def of(cls, sums: Sums, plan: Plan, minimum: int) -> Space:
        """From sums over what makes the axis; roles with fewer than `minimum` kept answers take no part.

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
        halves = []
        for half in (0, 1):
            groups = range(half, GROUPS, 2)
            both = [n for n in names if (n, 0) in sums.sums and (n, 1) in sums.sums]
            parts = torch.stack([sums.mean(name, [half]) for name in both]) if both else roles
            halves.append(axis_of(sums.mean(DEFAULT_ROLE, list(groups)), parts))
        # The null: labels that say nothing. Half of the default's groups and half of the roles stand for the Assistant.
        units = torch.stack([sums.mean(DEFAULT_ROLE, [g]) for g in range(GROUPS) if (DEFAULT_ROLE, g) in sums.sums])
        generator = torch.Generator().manual_seed(0)
        null = []
        for _ in range(PERMUTATIONS):
            orders = [(pool, torch.randperm(len(pool), generator=generator)) for pool in (units, roles)]
            sides = [[pool[order[i::2]] for pool, order in orders] for i in (0, 1)]
            null.append(axis_of(torch.cat(sides[0]).mean(0), torch.cat(sides[1])))
        return cls(
            axis_of(default, roles),
            names,
            roles,
            default,
            torch.stack(null, dim=1),
            (halves[0] * halves[1]).sum(-1),
        )

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


class Values:
    """Rows of float32 in one buffer that grows: kept tensors would each hold on to the freed memory around them."""

    def __init__(self, *shape: int) -> None:
        self.shape, self.buffer = shape, array("f")

    def add(self, rows: Tensor) -> None:
        self.buffer.frombytes(rows.contiguous().numpy().tobytes())

    def tensor(self) -> Tensor:
        """(n, *shape)."""
        return torch.tensor(self.buffer, dtype=torch.float32).view(-1, *self.shape)


class Projections:
    """Scalars of each kept rollout: its projection on the axis at each layer, and on the null's axes."""

    def __init__(self, depth: int) -> None:
        self.tasks: list[Task] = []
        self.values = Values(depth)
        self.null_tasks: list[Task] = []  # held-out rollouts alone
        self.null = Values(depth, PERMUTATIONS)

    def add(self, shards: Iterable[Shard], axis: Tensor, null: Tensor, plan: Plan, keep: Keep) -> Projections:
        """Adds what `keep` says of the shards' rollouts, on an axis (n_layers, H) and the null's (n_layers, P, H);
        returns itself.
        """
        axes = torch.cat([axis[:, None], null], dim=1).float()
        for shard in shards:
            found = project(shard.means, axes)
            chosen = [i for i, task in enumerate(shard.tasks) if keep(task)]
            held = [i for i in chosen if plan.tests_the_axis(shard.tasks[i])]
            self.tasks += [shard.tasks[i] for i in chosen]
            self.values.add(found[chosen, :, 0])
            self.null_tasks += [shard.tasks[i] for i in held]
            self.null.add(found[held, :, 1:])
        return self

    def merge(self, other: Projections) -> Projections:
        """Adds others; returns itself."""
        self.tasks += other.tasks
        self.null_tasks += other.null_tasks
        self.values.buffer.extend(other.values.buffer)
        self.null.buffer.extend(other.null.buffer)
        return self

    def of(self, pick: Callable[[Task], bool]) -> Tensor:
        """(n, n_layers)."""
        return self.values.tensor()[[i for i, task in enumerate(self.tasks) if pick(task)]]


def _interval(values: Tensor) -> list[float]:
    return [
        round(x, 4) for x in torch.quantile(values.double(), torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    ]


def _rounded(values: Tensor, digits: int = 4) -> list[float]:
    return [round(x, digits) for x in values.tolist()]


def evidence(space: Space, found: Projections, plan: Plan) -> Evidence:
    """What says whether the axis is real.

    Raises
    ------
    ValueError
        no answer of a held-out role was kept.
    """
    held_default = found.of(lambda t: t.role == DEFAULT_ROLE and plan.tests_the_axis(t))
    groups = {name: found.of(lambda t, name=name: t.role == name) for name in plan.held_roles}  # type: ignore[misc]
    groups = {name: values for name, values in groups.items() if len(values)}
    if not groups or not len(held_default):
        raise ValueError("no answer of a held-out role was kept, so nothing can say whether the axis separates")
    everyone = torch.cat(list(groups.values()))
    separation = auc(everyone, held_default)
    depth = len(separation)
    best = depth // 3 + int(separation[depth // 3 :].argmax())

    kinds: dict[str, list[Tensor]] = {}
    for name, values in groups.items():
        kinds.setdefault(plan.roles[name].kind or "all", []).append(values)
    null_default = torch.tensor([task.role == DEFAULT_ROLE for task in found.null_tasks])
    null = found.null.tensor()
    null_auc = auc(null[~null_default].flatten(1), null[null_default].flatten(1)).view(depth, -1)

    generator = torch.Generator().manual_seed(1)
    columns = [values[:, best : best + 1] for values in groups.values()]
    draws = []
    for _ in range(DRAWS):
        picked = torch.randint(len(columns), (len(columns),), generator=generator)
        low = [columns[i][torch.randint(len(columns[i]), (len(columns[i]),), generator=generator)] for i in picked]
        high = held_default[torch.randint(len(held_default), (len(held_default),), generator=generator), best, None]
        draws.append(auc(torch.cat(low), high)[0])
    again = []
    for _ in range(DRAWS):
        picked = torch.randint(len(space.roles), (len(space.roles),), generator=generator)
        again.append(axis_of(space.default[best], space.roles[picked, best]) @ space.axis[best])

    variance, components, coordinates = space.components()
    loadings = ((space.roles[:, best] - space.default[best]) @ space.axis[best]).tolist()
    return Evidence(
        best_layer=best,
        held_roles=list(groups),
        held_questions=len(plan.held_questions & set(plan.asked)),
        auc=_rounded(separation),
        auc_interval=_interval(torch.stack(draws)),
        auc_by_kind={kind: _rounded(auc(torch.cat(values), held_default)) for kind, values in sorted(kinds.items())},
        auc_by_role={name: _rounded(auc(values, held_default)) for name, values in groups.items()},
        d_prime=_rounded(d_prime(everyone, held_default), 3),
        null_auc=_rounded(null_auc.mean(1)),
        null_auc_interval=_interval(null_auc[best]),
        pc1_cosine=_rounded((components[:, 0] * space.axis).sum(-1)),
        variance=_rounded(variance[best, :10]),
        components_70=[int(n) + 1 for n in (variance.cumsum(-1) < 0.7).sum(-1).tolist()],
        halves=_rounded(space.halves),
        next_layer=_rounded((space.axis[:-1] * space.axis[1:]).sum(-1)),
        axis_interval=_interval(torch.stack(again)),
        loadings={name: round(value, 4) for name, value in zip(space.names, loadings, strict=True)},
        map={n: _rounded(xy) for n, xy in zip(space.names, coordinates[best], strict=True)},
    )


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
