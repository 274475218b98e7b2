"""The record of axes and floors that caps a model, and how it is saved, loaded and changed."""

from __future__ import annotations

import hashlib
import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from axiscap.profile import hub
from axiscap.profile.checks import (
    OPTIONAL,
    PER_CAPPED_LAYER,
    UNIT_TOLERANCE,
    ProfileError,
    check_profile,
    is_number,
    is_number_list,
    ranges,
    require,
    to_integers,
)
from axiscap.profile.evidence import Evidence
from axiscap.profile.file import read_file, write_file
from axiscap.profile.source import open_location, split_digest


class Slot(NamedTuple):
    """What a profile has for one layer, for a bank of K directions: axes and lifts (K, H), floors and targets (K,),
    norm_limit ().
    """

    axes: Tensor
    lifts: Tensor
    floors: Tensor
    targets: Tensor
    norm_limit: Tensor


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
        self.layers: tuple[int, ...] = to_integers(layers, "layers")
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
        tensors = {name: getattr(self, name) for name in ("axes", "floors", *OPTIONAL)}
        check_profile(self.layers, tensors, self.model_facts, self.num_layers)

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
        require(
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
        for name in PER_CAPPED_LAYER:
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
        return tuple(map(float, known)) if isinstance(known, list) and is_number_list(known) else ()

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
        require(is_number(strength) and 0 <= strength <= 1, f"strength must be from 0 to 1, got {strength!r}")
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
        require(not missing, f"layers must be among those that are capped, {list(self.layers)}, got {missing}")
        chosen = [self.layers.index(layer) for layer in layers]
        parts = {name: getattr(self, name) for name in PER_CAPPED_LAYER}
        parts = {name: part if part is None else part[chosen] for name, part in parts.items()}
        return self._with(layers, self.axes[chosen], self.floors[chosen], **parts)

    def _with(self, layers: Sequence[int], axes: Tensor, floors: Tensor, **others: Tensor | None) -> CapProfile:
        more = {name: getattr(self, name) for name in OPTIONAL} | others
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
        tensors |= {name: getattr(self, name) for name in OPTIONAL if getattr(self, name) is not None}
        write_file(Path(path), tensors, self.provenance)

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
        location = os.fspath(path)
        source, digest = split_digest(location)
        try:
            with open_location(source) as file:
                tensors, provenance = read_file(file)
            layers, axes, floors = (tensors.pop(name) for name in ("layers", "axes", "floors"))
            profile = cls(layers, axes, floors, provenance, **tensors)
            require(digest in (None, profile.digest), f"its digest is {profile.digest}")
        except ProfileError as error:
            raise ProfileError(f"{location}: {error}") from None
        return profile

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


def gaps(floors: Tensor, targets: Tensor) -> Tensor:
    """How far targets are above their floors, of the same shape; 0 for a direction that is off."""
    return torch.where(floors.isneginf(), 0.0, targets - floors)
