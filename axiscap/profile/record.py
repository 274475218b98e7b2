"""The profile: what a user saves, shares and installs. One safetensors file; loading never unpickles."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import operator
import os
import re
import stat
import struct
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from axiscap.profile import hub

FORMAT_VERSION = 1
#: |v| may differ from 1 by this much: the rounding of an axis that was stored in bfloat16.
UNIT_TOLERANCE = 1e-3
#: What a provenance says of norm_limits that a file did not state (``norm_limits``).
CONVERTED = "from limits on projections, and positions"
#: Bounds for files from strangers: far above any real profile, far below what hurts a machine. 512 MiB hold 64
#: directions at 64 layers of 32768.
MAX_FILE_BYTES = 512 << 20
MAX_HEADER_BYTES = 8 << 20
#: Of layers that a model may have, and of directions of a layer, as the kernels do.
MAX_LAYERS, MAX_DIRECTIONS = 1 << 16, 64

#: The tensors of a file: their dimensions; all are float32 but those in _INTEGERS.
_DIMS = {
    "layers": 1, "axes": 3, "floors": 2, "targets": 2, "lifts": 3, "norm_limits": 1, "axis_all": 2, "lift_all": 2,
    "norm_limit_all": 1, "quantiles": 2, "populations": 3,
}  # fmt: skip
#: Tensors of files that were written before norm_limits.
_OLD_DIMS = {"limits": 2, "limit_all": 1, "sinks": 1}
_INTEGERS = {"layers", "sinks"}
#: Of the optional tensors, those with a row for each capped layer, and those with one for each layer of the model.
_OF_CAPPED = ("targets", "lifts", "norm_limits")
_OPTIONAL = (*_OF_CAPPED, "axis_all", "lift_all", "norm_limit_all", "quantiles", "populations")


class Slot(NamedTuple):
    """What a profile has for one layer, for a bank of K directions: axes and lifts (K, H), floors and targets (K,),
    norm_limit ().
    """

    axes: Tensor
    lifts: Tensor
    floors: Tensor
    targets: Tensor
    norm_limit: Tensor


class ProfileError(ValueError):
    """A profile, or a file read as one, is not valid; the message says what is wrong with it.

    Examples
    --------
    >>> try:
    ...     axiscap.CapProfile([3, 2], torch.ones(2, 1, 1), torch.zeros(2, 1))
    ... except axiscap.ProfileError as error:
    ...     print(error)
    layers must be ascending from 0, got [3, 2]
    """


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ProfileError(message)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _integers(values: Sequence[int] | Tensor, name: str) -> tuple[int, ...]:
    try:
        if any(isinstance(value, bool) for value in values):
            raise TypeError
        return tuple(operator.index(value) for value in values)
    except TypeError:
        raise ProfileError(f"{name} must be integers, got {values!r}") from None


def _are_numbers(value: object, count: int | None = None) -> bool:
    return isinstance(value, list) and all(map(_is_number, value)) and count in (None, len(value))


def _are_names(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


@dataclass(frozen=True)
class Evidence:
    """What says whether an axis is real, as ``axiscap calibrate`` measured it on roles and questions that made nothing.

    Parameters
    ----------
    best_layer
        where the axis separates best, among the later two thirds.
    held_roles
        the roles that made no axis.
    held_questions
        how many questions made none.
    auc
        by layer, of the default's held-out answers against held-out roles'.
    auc_interval
        95 %, at the best layer, over roles and answers.
    auc_by_kind
        by layer, of each kind of role.
    auc_by_role
        by layer, of each role.
    d_prime
        by layer, the difference of means over the root of the mean variance.
    null_auc
        by layer, of axes made with labels that say nothing, in the mean.
    null_auc_interval
        the same's, at the best layer.
    pc1_cosine
        by layer, of the role vectors' first principal component with the axis.
    variance
        shares of the first components at the best layer.
    components_70
        by layer, how many components hold 70 % of the variance.
    halves
        by layer, cosine of the axes from both halves of the questions.
    next_layer
        cosine of the axis with the next layer's, of each layer but the last.
    axis_interval
        95 %, of the cosine with axes from resampled roles, at the best layer.
    loadings
        each role's mean on the axis at the best layer, less the default's.
    map
        each role's coordinates on the first two components there.

    Examples
    --------
    >>> len(profile.evidence.auc) == profile.num_layers
    True
    """

    best_layer: int
    held_roles: list[str]
    held_questions: int
    auc: list[float]
    auc_interval: list[float]
    auc_by_kind: dict[str, list[float]]
    auc_by_role: dict[str, list[float]]
    d_prime: list[float]
    null_auc: list[float]
    null_auc_interval: list[float]
    pc1_cosine: list[float]
    variance: list[float]
    components_70: list[int]
    halves: list[float]
    next_layer: list[float]
    axis_interval: list[float]
    loadings: dict[str, float]
    map: dict[str, list[float]]

    @classmethod
    def read(cls, stored: object) -> Evidence:
        """From a provenance, which anyone may have written.

        Parameters
        ----------
        stored
            the value of ``evidence``.

        Returns
        -------
        Evidence
            Checked.

        Raises
        ------
        ProfileError
            naming what is missing or of another form.

        Examples
        --------
        >>> evidence = axiscap.Evidence.read(profile.provenance["evidence"])
        >>> evidence.best_layer == profile.evidence.best_layer
        True
        """
        _require(isinstance(stored, Mapping), "its evidence must be an object")
        assert isinstance(stored, Mapping)
        auc = stored.get("auc")
        depth = len(auc) if isinstance(auc, list) else 0

        def each(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
            return lambda value: isinstance(value, Mapping) and len(value) > 0 and all(map(fits, value.values()))

        by_layer = lambda value: depth > 0 and _are_numbers(value, depth)  # noqa: E731
        pair = lambda value: _are_numbers(value, 2)  # noqa: E731
        forms: dict[str, tuple[Callable[[Any], bool], str]] = {
            "auc": (by_layer, "a number for each layer"),
            "best_layer": (lambda value: type(value) is int and 0 <= value < depth, "one of the layers of auc"),
            "held_roles": (_are_names, "a list of names"),
            "held_questions": (lambda value: type(value) is int, "a number of questions"),
            "variance": (_are_numbers, "a list of numbers"),
            "next_layer": (lambda value: _are_numbers(value, depth - 1), "a number for each layer but the last"),
            "loadings": (each(_is_number), "a number for each role"),
            "map": (each(pair), "two numbers for each role"),
        }
        for name in ("d_prime", "null_auc", "pc1_cosine", "components_70", "halves"):
            forms[name] = by_layer, "a number for each layer"
        for name in ("auc_by_kind", "auc_by_role"):
            forms[name] = each(by_layer), "a number for each layer, by name"
        for name in ("auc_interval", "null_auc_interval", "axis_interval"):
            forms[name] = pair, "two numbers"
        for name, (fits, form) in forms.items():
            _require(fits(stored.get(name)), f"its evidence cannot be read: {name} must be {form}")
        return cls(**{name: stored[name] for name in forms})


class CapProfile:
    """Axes and floors per layer, with their provenance.

    Parameters
    ----------
    layers
        the L capped layers (block outputs, counted from 0), ascending.
    axes
        (L, K, H) float32, unit rows; larger projection = more Assistant-like.
    floors
        (L, K) float32, in the units of the projection; ``-inf`` switches a direction off.
    targets
        (L, K) float32, at least the floors: where a row ends whose projection is below its floor; the floors without
        them (eq. 1).
    lifts
        (L, K, H) float32, what rows are corrected along; the axes without them (eq. 1). ``<axis, lift>`` is 1,
        so that a row that fires ends on its target, or less (:meth:`with_strength`).
    norm_limits
        (L,) float32, positive: a row with a larger norm is an attention sink, and is neither capped nor counted. There
        is no limit without them, and where they are ``inf``.
    provenance
        JSON-serialisable facts about where the numbers come from. The keys that AxisCap itself reads:
        ``model`` (``id``, ``architecture``, ``hidden_size``, ``num_layers``) and ``quantiles``
        (``percentiles``, the columns of the tensor of that name).
    axis_all
        (n_layers, H) float32, the axis at every layer, for monitoring outside the capped ones.
    lift_all
        (n_layers, H) float32, the same of the lifts.
    norm_limit_all
        (n_layers,) float32, the same of the limits.
    quantiles
        (n_layers, Q) float32, projections of the floor's population at ``percentiles``.
    populations
        (P, n_layers, Q) float32, the same of every population that ``quantiles`` in the provenance names.

    Raises
    ------
    ProfileError
        naming the argument that does not fit.

    Examples
    --------
    >>> axes = torch.nn.functional.normalize(torch.ones(2, 1, 8), dim=-1)
    >>> made = axiscap.CapProfile([4, 5], axes, torch.zeros(2, 1))
    >>> made.layers, made.hidden_size
    ((4, 5), 8)
    """

    def __init__(
        self,
        layers: Sequence[int] | Tensor,
        axes: Tensor,
        floors: Tensor,
        provenance: Mapping[str, Any] | None = None,
        *,
        targets: Tensor | None = None,
        lifts: Tensor | None = None,
        norm_limits: Tensor | None = None,
        axis_all: Tensor | None = None,
        lift_all: Tensor | None = None,
        norm_limit_all: Tensor | None = None,
        quantiles: Tensor | None = None,
        populations: Tensor | None = None,
    ) -> None:
        self.layers: tuple[int, ...] = _integers(layers, "layers")
        self.axes = axes
        self.floors = floors
        self.provenance: dict[str, Any] = dict(provenance or {})
        self.targets = targets
        self.lifts = lifts
        self.norm_limits = norm_limits
        self.axis_all = axis_all
        self.lift_all = lift_all
        self.norm_limit_all = norm_limit_all
        self.quantiles = quantiles
        self.populations = populations
        self._check()

    @property
    def hidden_size(self) -> int:
        """H, the length of a row.

        Examples
        --------
        >>> profile.hidden_size
        576
        """
        return self.axes.shape[2]

    @property
    def directions(self) -> int:
        """K, how many directions the profile has at each layer.

        Examples
        --------
        >>> profile.directions
        1
        """
        return self.axes.shape[1]

    @property
    def num_layers(self) -> int | None:
        """How many layers the model has that this was made for, where that is known.

        Examples
        --------
        >>> profile.num_layers
        30
        """
        stated = self.model_facts.get("num_layers")
        if stated is None and self.axis_all is not None:
            stated = len(self.axis_all)
        return stated

    @property
    def model_facts(self) -> Mapping[str, Any]:
        """What the provenance says of the model: ``id``, ``architecture``, ``hidden_size``, ``num_layers``; empty
        without.

        Examples
        --------
        >>> profile.model_facts["hidden_size"]
        576
        """
        facts = self.provenance.get("model", {})
        return facts if isinstance(facts, Mapping) else {}

    @property
    def architecture(self) -> str | None:
        """The class of transformers that the profile was made for, if its provenance states one.

        Examples
        --------
        >>> profile.architecture
        'LlamaForCausalLM'
        """
        stated = self.model_facts.get("architecture")
        return stated if isinstance(stated, str) and stated else None

    @property
    def evidence(self) -> Evidence | None:
        """What was measured of the axis; None where the provenance says nothing of it.

        Raises
        ------
        ProfileError
            what it says is not in the form that this version writes, or of another number of layers.

        Examples
        --------
        >>> 0.5 < profile.evidence.auc[profile.evidence.best_layer] <= 1
        True
        """
        stored = self.provenance.get("evidence")
        if stored is None:
            return None
        found = Evidence.read(stored)
        depth = self.num_layers or len(found.auc)
        _require(
            len(found.auc) == depth and self.layers[-1] < depth,
            f"its evidence is of {len(found.auc)} layers, and not of the model's",
        )
        return found

    @property
    def digest(self) -> str:
        """Names what of this profile changes a model: its layers, axes, floors, and what it says of targets, lifts and
        norm_limits. Equal in equal profiles alone.

        Examples
        --------
        >>> profile.digest == profile.with_floors(profile.floors).digest
        True
        >>> profile.digest == profile.with_floors(profile.floors + 1).digest
        False
        """
        content = hashlib.sha256(repr((self.layers, tuple(self.axes.shape))).encode())
        for tensor in (self.axes, self.floors):
            content.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        for name in _OF_CAPPED:
            tensor = getattr(self, name)
            if tensor is not None:
                content.update(name.encode() + tensor.detach().cpu().contiguous().numpy().tobytes())
        return content.hexdigest()[:32]

    @property
    def knows_sinks(self) -> bool:
        """Whether a limit keeps the cap from lifting an attention sink.

        Examples
        --------
        >>> profile.knows_sinks
        True
        """
        return self.norm_limits is not None

    def slot_at(self, layer: int, directions: int) -> Slot:
        """This profile's slot in the bank of one layer, for a bank of K directions.

        Directions that it has not, and all of them at a layer that it does not cap, never fire and limit nothing.

        Parameters
        ----------
        layer
            counted from 0.
        directions
            K of the bank, at least the profile's.

        Returns
        -------
        Slot
            ``axes`` and ``lifts`` (K, H), ``floors`` and ``targets`` (K,), ``norm_limit`` (), float32.

        Examples
        --------
        >>> profile.slot_at(profile.layers[0], 2).floors.shape
        torch.Size([2])
        """
        axes = lifts = torch.eye(1, self.hidden_size)
        floors = targets = torch.tensor([-math.inf])
        norm_limit = torch.tensor(math.inf)
        if layer in self.layers:
            at = self.layers.index(layer)
            axes, floors = self.axes[at], self.floors[at]
            lifts = axes if self.lifts is None else self.lifts[at]
            targets = floors if self.targets is None else self.targets[at]
            norm_limit = norm_limit if self.norm_limits is None else self.norm_limits[at]
        missing = directions - len(axes)
        off = floors.new_full((missing,), -math.inf)
        return Slot(
            torch.cat([axes, axes[-1:].expand(missing, -1)]),
            torch.cat([lifts, lifts[-1:].expand(missing, -1)]),
            torch.cat([floors, off]),
            torch.cat([targets, off]),
            norm_limit,
        )

    @property
    def percentiles(self) -> tuple[float, ...]:
        """The columns of the quantile tables; empty where the provenance does not say them.

        Examples
        --------
        >>> 50.0 in profile.percentiles
        True
        """
        known = self._quantile_facts.get("percentiles")
        return tuple(map(float, known)) if isinstance(known, list) and _are_numbers(known) else ()

    @property
    def tables(self) -> dict[str, Tensor]:
        """The quantile tables by population, (n_layers, Q) each; empty where there are none, or not as stated.

        Examples
        --------
        >>> {table.shape[0] for table in profile.tables.values()}
        {30}
        """
        names = self._quantile_facts.get("populations")
        if self.populations is None or not isinstance(names, Mapping | list) or len(names) != len(self.populations):
            return {}
        fits = len(self.percentiles) == self.populations.shape[2]
        return dict(zip(names, self.populations, strict=True)) if fits else {}

    @property
    def population(self) -> str | None:
        """Whose projections the floors are a percentile of; None where the provenance does not say, or has no table.

        Examples
        --------
        >>> profile.population in profile.tables
        True
        """
        facts = self.provenance.get("floors")
        named = facts.get("population") if isinstance(facts, Mapping) else None
        return named if isinstance(named, str) and named in self.tables else None

    def population_count(self, name: str) -> int | None:
        """Of how many projections a quantile table is; None where the provenance does not say.

        Parameters
        ----------
        name
            of a population, one of :attr:`tables`.

        Returns
        -------
        int or None
            The number of projections.

        Examples
        --------
        >>> profile.population_count(profile.population) > 0
        True
        """
        known = self._quantile_facts.get("populations")
        entry = known.get(name) if isinstance(known, Mapping) else None
        count = entry.get("count") if isinstance(entry, Mapping) else None
        return count if isinstance(count, int) else None

    @property
    def _quantile_facts(self) -> Mapping[str, Any]:
        facts = self.provenance.get("quantiles")
        return facts if isinstance(facts, Mapping) else {}

    def with_floors(self, floors: Tensor, targets: Tensor | None = None) -> CapProfile:
        """The same axes with other floors (L, K), and other targets.

        Parameters
        ----------
        floors
            (L, K) float32, finite or ``-inf``.
        targets
            (L, K) float32, at least the floors. Without them each target stays as far above its floor as it was.

        Returns
        -------
        CapProfile
            With the same provenance, but for what it said of the floors.

        Examples
        --------
        >>> lower = profile.with_floors(profile.floors - 1)
        >>> bool((lower.floors < profile.floors).all())
        True
        """
        if targets is None and self.targets is not None and floors.shape == self.floors.shape:
            targets = floors + gaps(self.floors, self.targets)
        return self._with(self.layers, self.axes, floors, targets=targets)

    @property
    def strength(self) -> float:
        """The share of the way to its target by which a row is lifted: 1, unless :meth:`with_strength` weakened it.

        Examples
        --------
        >>> profile.strength
        1.0
        """
        if self.lifts is None:
            return 1.0
        least = (self.axes * self.lifts).sum(-1).min().item()
        return 1.0 if abs(least - 1) <= UNIT_TOLERANCE else least

    def with_strength(self, strength: float) -> CapProfile:
        """The same with weaker corrections: a row below its floor is lifted by this share of the way to its target.

        With strength 0 nothing is lifted: what is left is :meth:`measuring_only`.

        Parameters
        ----------
        strength
            from 0 to 1.

        Returns
        -------
        CapProfile
            With lifts of that length.

        Raises
        ------
        ProfileError
            strength is not from 0 to 1.

        Examples
        --------
        >>> round(profile.with_strength(0.5).strength, 3)
        0.5
        """
        _require(_is_number(strength) and 0 <= strength <= 1, f"strength must be from 0 to 1, got {strength!r}")
        if strength == 1:
            return self
        if strength == 0:
            return self.measuring_only()
        lifts = self.axes if self.lifts is None else self.lifts
        whole = self.axis_all if self.lift_all is None else self.lift_all
        return self._with(
            self.layers,
            self.axes,
            self.floors,
            lifts=lifts * strength,
            lift_all=None if whole is None else whole * strength,
        )

    def at_layers(self, layers: Sequence[int]) -> CapProfile:
        """The same at some of its layers, ascending.

        Parameters
        ----------
        layers
            some of the profile's, ascending.

        Returns
        -------
        CapProfile
            With the axes and floors of those alone.

        Raises
        ------
        ProfileError
            naming the layer that is none of them.

        Examples
        --------
        >>> profile.at_layers(profile.layers[:2]).layers == profile.layers[:2]
        True
        """
        missing = [layer for layer in layers if layer not in self.layers]
        _require(not missing, f"layers must be among those that are capped, {list(self.layers)}, got {missing}")
        chosen = [self.layers.index(layer) for layer in layers]
        parts = {name: getattr(self, name) for name in _OF_CAPPED}
        parts = {name: part if part is None else part[chosen] for name, part in parts.items()}
        return self._with(layers, self.axes[chosen], self.floors[chosen], **parts)

    def _with(self, layers: Sequence[int], axes: Tensor, floors: Tensor, **others: Tensor | None) -> CapProfile:
        more = {name: getattr(self, name) for name in _OPTIONAL} | others
        return CapProfile(layers, axes, floors, self.provenance, **more)

    def measuring_only(self) -> CapProfile:
        """The same axes with every floor at ``-inf``: an installation of it sees everything and changes nothing.

        Returns
        -------
        CapProfile
            Under another digest.

        Examples
        --------
        >>> bool(profile.measuring_only().floors.isneginf().all())
        True
        """
        return self.with_floors(torch.full_like(self.floors, -torch.inf))

    def _check(self) -> None:
        for name in ("axes", "floors", *_OPTIONAL):
            tensor = getattr(self, name)
            if tensor is None:
                continue
            _require(isinstance(tensor, Tensor), f"{name} must be a tensor, got {type(tensor).__name__}")
            _require(tensor.dtype == torch.float32, f"{name} must be float32, got {tensor.dtype}")
            _require(tensor.dim() == _DIMS[name], f"{name} must have {_DIMS[name]} dimensions, got {tensor.dim()}")
        count, directions, size = self.axes.shape
        _require(
            count > 0 and directions > 0 and size > 0, f"axes must not be empty, got shape {tuple(self.axes.shape)}"
        )
        _require(len(self.layers) == count, f"layers must name the {count} layers of axes, got {len(self.layers)}")
        _require(
            self.floors.shape == (count, directions),
            f"floors must have shape ({count}, {directions}) like axes, got {tuple(self.floors.shape)}",
        )
        ascending = all(a < b for a, b in zip(self.layers, self.layers[1:], strict=False))
        _require(ascending and self.layers[0] >= 0, f"layers must be ascending from 0, got {list(self.layers)}")
        _require(self.layers[-1] < MAX_LAYERS, f"layers must be below {MAX_LAYERS}, got {self.layers[-1]}")
        _require(directions <= MAX_DIRECTIONS, f"axes must have at most {MAX_DIRECTIONS} directions, got {directions}")
        # Layer by layer: a stranger's file may be large, and is to be refused without several copies of it.
        _require(all(bool(axes.isfinite().all()) for axes in self.axes), "axes must be finite")
        off = max((axes.norm(dim=-1) - 1).abs().max().item() for axes in self.axes)
        _require(off <= UNIT_TOLERANCE, f"axes must be of unit length within {UNIT_TOLERANCE}, one is off by {off:.3g}")
        bad = self.floors.isnan() | (self.floors == torch.inf)
        _require(not bool(bad.any()), "floors must be finite, or -inf for a direction that is off")
        shapes = {"targets": self.floors.shape, "lifts": self.axes.shape, "norm_limits": self.floors.shape[:1]}
        for name, shape in shapes.items():
            tensor = getattr(self, name)
            _require(
                tensor is None or tensor.shape == shape,
                f"{name} must have shape {tuple(shape)}, got {None if tensor is None else tuple(tensor.shape)}",
            )
        if self.targets is not None:
            reached = (self.targets >= self.floors) & ((self.targets < torch.inf) | self.floors.isneginf())
            _require(bool(reached.all()), "targets must be finite and at least the floors")
        if self.lifts is not None:
            _require(bool((self.lifts.abs() < 2.0**60).all()), "lifts must be finite, with elements below 2^60")
            along = (self.axes * self.lifts).sum(-1)
            least, most = along.min().item(), along.max().item()
            _require(
                least > 0 and most <= 1 + UNIT_TOLERANCE,
                f"lifts must be above 0 and at most 1 along their axes, they are {least:.3g} to {most:.3g}",
            )
        for name in ("norm_limits", "norm_limit_all"):
            tensor = getattr(self, name)
            _require(tensor is None or bool((tensor > 0).all()), f"{name} must be positive, or inf for none")
        for name in ("axis_all", "lift_all"):
            tensor = getattr(self, name)
            if tensor is not None:
                _require(tensor.shape[1] == size, f"{name} must have H = {size} columns, got {tensor.shape[1]}")
                _require(bool(tensor.isfinite().all()), f"{name} must be finite")
        for name in ("quantiles", "populations"):
            tensor = getattr(self, name)
            _require(tensor is None or bool(tensor.isfinite().all()), f"{name} must be finite")
        stated = self.model_facts.get("num_layers")
        _require(
            stated is None or (isinstance(stated, int) and stated > 0), f"num_layers must be positive, got {stated!r}"
        )
        last = self.num_layers
        for name in ("axis_all", "lift_all", "norm_limit_all", "quantiles", "populations"):
            tensor = getattr(self, name)
            _require(
                tensor is None or last is None or tensor.shape[tensor.dim() == 3] == last,
                f"{name} must have a row for each of the model's {last} layers",
            )
        _require(
            last is None or self.layers[-1] < last,
            f"layers must be below {last}, the model's layer count, got {self.layers[-1]}",
        )
        size_stated = self.model_facts.get("hidden_size")
        _require(
            size_stated is None or size_stated == size,
            f"axes must have the model's hidden size {size_stated}, got {size}",
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the file in one step: whoever reads the path sees the old file or the whole new one.

        Parameters
        ----------
        path
            of the file, ``.safetensors`` by custom.

        Raises
        ------
        FileNotFoundError
            its folder does not exist.

        Examples
        --------
        >>> profile.save(folder / "mine.safetensors")
        """
        tensors = {"layers": torch.tensor(self.layers, dtype=torch.int64), "axes": self.axes, "floors": self.floors}
        tensors |= {name: getattr(self, name) for name in _OPTIONAL if getattr(self, name) is not None}
        # Copies, since safetensors refuses tensors that share memory.
        tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
        metadata = {"format": "axiscap", "version": str(FORMAT_VERSION), "provenance": json.dumps(self.provenance)}
        target = Path(path)
        if not target.parent.is_dir():
            raise FileNotFoundError(f"{target}: its folder does not exist")
        partial = target.with_name(f".{target.name}.{uuid.uuid4().hex}.partial")
        try:
            # Opened here, and not by safetensors, whose files nobody else may read.
            with partial.open("xb") as file:
                file.write(save(tensors, metadata))
            os.replace(partial, target)
        finally:
            partial.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> CapProfile:
        """Reads a profile.

        Parameters
        ----------
        path
            of a file, or a URL of fsspec (``s3://``, ``gs://``, ``hf://``, ``https://``). ``#`` and a digest at
            its end say which content it must have.

        Raises
        ------
        ProfileError
            a sentence that names the file and what is wrong with it.
        FileNotFoundError
            there is no such file.

        Examples
        --------
        >>> loaded = axiscap.CapProfile.load("examples/profiles/smollm2-135m-instruct.safetensors")
        >>> loaded.digest == profile.digest
        True
        """
        given = os.fspath(path)
        place, pin = (given[:-33], given[-32:]) if _PINNED.search(given) else (given, None)
        try:
            with _fetched(place) as file:
                loaded = cls._load(file)
            _require(pin in (None, loaded.digest), f"its digest is {loaded.digest}")
            return loaded
        except ProfileError as error:
            raise ProfileError(f"{given}: {error}") from None

    @classmethod
    def from_pretrained(cls, repo: str, *, revision: str | None = None, file: str = hub.FILE) -> CapProfile:
        """A profile from a hub, or from what was downloaded of it before.

        Parameters
        ----------
        repo
            ``organisation/name``, or a folder that :meth:`save_pretrained` wrote.
        revision
            a branch, a tag or a commit; the main branch without it. A commit is the same content for ever.
        file
            its name there.

        Raises
        ------
        ModuleNotFoundError
            naming the extra, without huggingface_hub.
        OSError
            the repository, the revision or the file is not there, or the hub cannot be reached.
        ProfileError
            the file is no profile.

        Examples
        --------
        >>> profile.save_pretrained(folder / "shared")
        >>> axiscap.CapProfile.from_pretrained(str(folder / "shared")).digest == profile.digest
        True
        """
        return cls.load(Path(repo) / file if Path(repo).is_dir() else hub.download(repo, file, revision))

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Writes a folder as a hub has it: the profile, and a card of its provenance and evidence as ``README.md``.

        Parameters
        ----------
        folder
            made where it is not there.

        Examples
        --------
        >>> profile.save_pretrained(folder / "card")
        >>> sorted(path.name for path in (folder / "card").iterdir())
        ['README.md', 'profile.safetensors']
        """
        Path(folder).mkdir(parents=True, exist_ok=True)
        self.save(Path(folder) / hub.FILE)
        card = hub.card(str(self.model_facts.get("id", "an unknown model")), self.digest, self._summary())
        (Path(folder) / "README.md").write_text(card, "utf-8")

    def push_to_hub(self, repo: str, *, private: bool = False) -> str:
        """Uploads what :meth:`save_pretrained` writes; returns the commit's URL.

        Parameters
        ----------
        repo
            ``organisation/name``; it is made where it is not there. The token is that of ``hf auth login``.
        private
            whether a new repository is private.

        Returns
        -------
        str
            The URL of the commit.

        Raises
        ------
        ModuleNotFoundError
            naming the extra, without huggingface_hub.
        OSError
            the hub cannot be reached, or does not let you.

        Examples
        --------
        >>> url = profile.push_to_hub("organisation/name", private=True)  # doctest: +SKIP
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return hub.upload(Path(folder), repo, f"Profile {self.digest}", private=private)

    def _summary(self) -> dict[str, str]:
        """What is known, in a few words each."""
        floors, evidence = self.provenance.get("floors"), self.evidence
        place = "not stated"
        if isinstance(floors, Mapping) and {"percentile", "population"} <= floors.keys():
            place = f"percentile {floors['percentile']} of {floors['population']}"
            if "target_percentile" in floors:
                place += f"; rows below are lifted to percentile {floors['target_percentile']}"
        found = {
            "model": str(self.model_facts.get("id", "unknown")),
            "digest": self.digest,
            "capped layers": f"{ranges(self.layers)} of {self.num_layers or 'unknown'}",
            "directions a layer": str(self.directions),
            "strength": f"{self.strength:g}",
            "floors": place,
            "attention sinks": "left alone, by their norm" if self.knows_sinks else "no limit is known",
        }
        if evidence is not None:
            best = evidence.best_layer
            low, high = evidence.auc_interval
            found[f"held-out AUC, layer {best}"] = f"{evidence.auc[best]:.3f} (95 %: {low:.3f} to {high:.3f})"
            for kind, values in sorted(evidence.auc_by_kind.items()):
                found[f"held-out AUC of {kind} roles"] = f"{values[best]:.3f}"
        return found | {name: str(self.provenance[name]) for name in ("created", "axiscap") if name in self.provenance}

    @classmethod
    def _load(cls, path: Path) -> CapProfile:
        _check_header_size(path)
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                _require(metadata.get("format") == "axiscap", "not an AxisCap profile (its metadata does not say so)")
                version = metadata.get("version")
                _require(version == str(FORMAT_VERSION), f"format version {version} is not one this AxisCap reads")
                names = set(file.keys())
                missing = {"layers", "axes", "floors"} - names
                _require(not missing, f"tensors are missing: {', '.join(sorted(missing))}")
                dims = _DIMS | _OLD_DIMS
                extra = names - set(dims)
                _require(not extra, f"unknown tensors: {', '.join(sorted(extra)[:5])}")
                for name in names:
                    entry = file.get_slice(name)
                    found = entry.get_dtype(), len(entry.get_shape())
                    wanted = "I64" if name in _INTEGERS else "F32", dims[name]
                    _require(found == wanted, f"{name} must be {wanted[0]} of {wanted[1]} dimensions, got {found}")
                tensors = {name: file.get_tensor(name) for name in names}
        except SafetensorError as error:
            raise ProfileError(f"not a valid safetensors file ({error})") from None
        try:
            provenance = json.loads(metadata.get("provenance", "{}"))
        except (ValueError, RecursionError):
            raise ProfileError("its provenance is not JSON") from None
        _require(isinstance(provenance, dict), "its provenance is not a JSON object")
        _convert_limits(tensors, provenance)
        layers = tensors.pop("layers")
        return cls(layers, tensors.pop("axes"), tensors.pop("floors"), provenance, **tensors)


def _convert_limits(tensors: dict[str, Tensor], provenance: dict[str, Any]) -> None:
    """Makes norm_limits of what a file stated before there were any.

    Such a file left sinks alone by their positions, and by limits on projections at 1.5 times the largest norm of an
    ordinary row. A row of a smaller norm has no projection beyond such a limit, so that all rows beyond one are still
    left alone. A row at a sink's position whose norm is smaller is capped from now on.
    """
    old = {name: tensors.pop(name) for name in _OLD_DIMS if name in tensors}
    if not old:
        return
    _require("norm_limits" not in tensors, f"norm_limits and {min(old)} exclude each other")
    _require(
        "limits" in old and old["limits"].shape[1] > 0,
        "it names positions of attention sinks, but no limit; this version knows sinks by their norm: calibrate again",
    )
    tensors["norm_limits"] = old["limits"].amin(1)
    if "limit_all" in old:
        tensors["norm_limit_all"] = old["limit_all"]
    provenance["norm_limits"] = CONVERTED


def gaps(floors: Tensor, targets: Tensor) -> Tensor:
    """How far targets are above their floors, of the same shape; 0 for a direction that is off."""
    return torch.where(floors.isneginf(), 0.0, targets - floors)


_PINNED = re.compile("#[0-9a-f]{32}$")


def is_url(path: str) -> bool:
    """Whether :meth:`CapProfile.load` takes it from elsewhere than from a file."""
    return re.match(r"[a-zA-Z][\w+.-]*://", path) is not None


@contextlib.contextmanager
def _fetched(place: str) -> Iterator[Path]:
    """The file itself, or one with what a URL has, for as long as it is read."""
    if not is_url(place):
        yield Path(place)
        return
    import fsspec

    with tempfile.NamedTemporaryFile(suffix=".safetensors") as file:
        try:
            with fsspec.open(place, "rb") as source:
                content = source.read(MAX_FILE_BYTES + 1)
        except FileNotFoundError:
            raise FileNotFoundError(f"there is no {place}") from None
        except Exception as error:  # of whichever store: its own kinds, or that its package is not installed
            raise ProfileError(f"it cannot be fetched: {error}") from None
        _require(len(content) <= MAX_FILE_BYTES, f"more than the {MAX_FILE_BYTES} bytes that it may have")
        file.write(content)
        file.flush()
        yield Path(file.name)


def check_file(path: Path) -> int:
    """The size of a file that is to be read.

    Raises
    ------
    ProfileError
        it is none (a pipe would block for ever), or larger than :data:`MAX_FILE_BYTES`.
    """
    found = path.stat()
    _require(not stat.S_ISDIR(found.st_mode), "is a folder")
    _require(stat.S_ISREG(found.st_mode), "is no regular file")
    _require(found.st_size <= MAX_FILE_BYTES, f"{found.st_size} bytes, more than the {MAX_FILE_BYTES} that it may have")
    return found.st_size


def _check_header_size(path: Path) -> None:
    size = check_file(path)
    with path.open("rb") as file:
        start = file.read(8)
    _require(len(start) == 8, "too short for a safetensors file")
    (header,) = struct.unpack("<Q", start)
    _require(
        header <= size - 8,
        f"its header says {header} bytes, but {size - 8} are there: truncated or no safetensors file",
    )
    _require(header <= MAX_HEADER_BYTES, f"its header has {header} bytes, more than the {MAX_HEADER_BYTES} allowed")


def ranges(numbers: Iterable[int]) -> str:
    """Ascending numbers in words: 8-27, 30."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(f"{first}-{last}" if last > first else str(first) for first, last in runs)
