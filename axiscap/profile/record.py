"""The record of axes and floors that caps a model, and how it is saved, loaded and changed."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from axiscap.profile import hub
from axiscap.profile.card import describe_evidence, describe_floors, render_card
from axiscap.profile.checks import (
    OPTIONAL,
    PER_CAPPED_LAYER,
    UNIT_TOLERANCE,
    ProfileError,
    check_profile,
    format_layers,
    is_number,
    is_number_list,
    require,
    to_integers,
)
from axiscap.profile.evidence import Evidence
from axiscap.profile.file import make_folder, read_file, write_file
from axiscap.profile.slot import Slot, target_gaps
from axiscap.profile.source import open_location, split_digest


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
        (L, K) float32, at least the floors: the projection that a row below its floor gets. Default: the floors
        (eq. 1).
    lifts
        (L, K, H) float32, the vectors along which rows are corrected. Default: the axes (eq. 1). ``<axis, lift>`` is
        1, so that a row that fires ends on its target, or less in a weaker profile (:meth:`with_strength`).
    norm_limits
        (L,) float32, positive: a row with a larger norm is an attention sink, and is neither capped nor counted.
        ``inf`` is no limit. Default: no limits.
    provenance
        JSON-serialisable facts about how the numbers were computed. AxisCap itself reads the keys
        ``model`` (``id``, ``architecture``, ``hidden_size``, ``num_layers``), ``floors``, ``evidence`` and
        ``quantiles`` (``percentiles``: the columns of the tensors ``quantiles`` and ``populations``).
    axis_all
        (n_layers, H) float32, the axis at every layer, for monitoring outside the capped ones.
    lift_all
        (n_layers, H) float32, the lift at every layer.
    norm_limit_all
        (n_layers,) float32, the norm limit of every layer.
    quantiles
        (n_layers, Q) float32, projections of the floor's population at ``percentiles``.
    populations
        (P, n_layers, Q) float32, projections of each population that ``quantiles`` in the provenance names.

    Raises
    ------
    ProfileError
        naming the argument that does not fit.

    Examples
    --------
    >>> axes = torch.nn.functional.normalize(torch.ones(2, 1, 8), dim=-1)
    >>> small = axiscap.CapProfile([4, 5], axes, torch.zeros(2, 1))
    >>> small.layers, small.hidden_size
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
        """H, the length of a row of the residual stream.

        Examples
        --------
        >>> profile.hidden_size
        576
        """
        return self.axes.shape[2]

    @property
    def directions(self) -> int:
        """K, the number of directions at each layer.

        Examples
        --------
        >>> profile.directions
        1
        """
        return self.axes.shape[1]

    @property
    def num_layers(self) -> int | None:
        """The number of layers of the profile's model, if known.

        Examples
        --------
        >>> profile.num_layers
        30
        """
        num_layers = self.model_facts.get("num_layers")
        if num_layers is None and self.axis_all is not None:
            num_layers = len(self.axis_all)
        return num_layers

    @property
    def model_facts(self) -> Mapping[str, Any]:
        """The provenance's entry about the model: ``id``, ``architecture``, ``hidden_size``, ``num_layers``. Empty if
        there is no such entry.

        Examples
        --------
        >>> profile.model_facts["hidden_size"]
        576
        """
        return self._facts("model")

    @property
    def architecture(self) -> str | None:
        """The class of transformers that the profile is for, if its provenance states one.

        Examples
        --------
        >>> profile.architecture
        'LlamaForCausalLM'
        """
        architecture = self.model_facts.get("architecture")
        return architecture if isinstance(architecture, str) and architecture else None

    @property
    def evidence(self) -> Evidence | None:
        """The held-out tests of the axis; None if the provenance has none.

        Raises
        ------
        ProfileError
            they are not in the form that this version writes, or have another number of layers.

        Examples
        --------
        >>> 0.5 < profile.evidence.auc[profile.evidence.best_layer] <= 1
        True
        """
        stored = self.provenance.get("evidence")
        if stored is None:
            return None
        evidence = Evidence.read(stored)
        depth = len(evidence.auc)
        require(
            depth == (self.num_layers or depth) and self.layers[-1] < depth,
            f"its evidence is of {depth} layers, and not of the model's",
        )
        return evidence

    @property
    def digest(self) -> str:
        """A hash of all that changes a model: layers, axes, floors, targets, lifts and norm_limits.

        Examples
        --------
        >>> profile.digest == profile.with_floors(profile.floors).digest
        True
        """
        content = hashlib.sha256(repr((self.layers, tuple(self.axes.shape))).encode())
        for name in ("axes", "floors", *PER_CAPPED_LAYER):
            tensor = getattr(self, name)
            if tensor is None:
                continue
            if name in PER_CAPPED_LAYER:
                content.update(name.encode())
            content.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        return content.hexdigest()[:32]

    @property
    def knows_sinks(self) -> bool:
        """Whether the profile has norm limits, which exempt attention sinks from the cap.

        Examples
        --------
        >>> profile.knows_sinks
        True
        """
        return self.norm_limits is not None

    def slot_at(self, layer: int, directions: int) -> Slot:
        """The profile's slot in the bank of one layer, for a bank of K directions.

        Missing directions never fire. At a layer that is not capped, no direction fires and no row is a sink.

        Parameters
        ----------
        layer
            counted from 0.
        directions
            K of the bank, at least the profile's.

        Returns
        -------
        Slot
            In float32.

        Examples
        --------
        >>> profile.slot_at(profile.layers[0], 2).floors.shape
        torch.Size([2])
        """
        slot = Slot.off(self.hidden_size)
        if layer in self.layers:
            index = self.layers.index(layer)
            axes, floors = self.axes[index], self.floors[index]
            slot = Slot(
                axes,
                axes if self.lifts is None else self.lifts[index],
                floors,
                floors if self.targets is None else self.targets[index],
                slot.norm_limit if self.norm_limits is None else self.norm_limits[index],
            )
        return slot.padded(directions)

    @property
    def percentiles(self) -> tuple[float, ...]:
        """The columns of the quantile tables; empty if the provenance does not state them.

        Examples
        --------
        >>> 50.0 in profile.percentiles
        True
        """
        percentiles: Any = self._facts("quantiles").get("percentiles")
        return tuple(map(float, percentiles)) if is_number_list(percentiles) else ()

    @property
    def tables(self) -> dict[str, Tensor]:
        """The quantile tables by population, (n_layers, Q) each; empty if there are none that fit the provenance.

        Examples
        --------
        >>> {table.shape[0] for table in profile.tables.values()}
        {30}
        """
        names = self._facts("quantiles").get("populations")
        if self.populations is None or not isinstance(names, Mapping | list) or len(names) != len(self.populations):
            return {}
        if len(self.percentiles) != self.populations.shape[2]:
            return {}
        return dict(zip(names, self.populations, strict=True))

    @property
    def population(self) -> str | None:
        """The population whose percentile the floors are; None if the provenance does not state one with a table.

        Examples
        --------
        >>> profile.population in profile.tables
        True
        """
        name = self._facts("floors").get("population")
        return name if isinstance(name, str) and name in self.tables else None

    def population_count(self, name: str) -> int | None:
        """The number of projections behind a quantile table; None if the provenance does not state it.

        Parameters
        ----------
        name
            a population of :attr:`tables`.

        Returns
        -------
        int or None
            At every layer.

        Examples
        --------
        >>> profile.population_count(profile.population) > 0
        True
        """
        populations = self._facts("quantiles").get("populations")
        entry = populations.get(name) if isinstance(populations, Mapping) else None
        count = entry.get("count") if isinstance(entry, Mapping) else None
        return count if isinstance(count, int) else None

    def _facts(self, key: str) -> Mapping[str, Any]:
        entry = self.provenance.get(key)
        return entry if isinstance(entry, Mapping) else {}

    def with_floors(self, floors: Tensor, targets: Tensor | None = None) -> CapProfile:
        """The same axes with other floors and targets.

        Parameters
        ----------
        floors
            (L, K) float32, finite or ``-inf``.
        targets
            (L, K) float32, at least the floors. Default: each target stays as far above its floor as it was.

        Returns
        -------
        CapProfile
            With the same provenance.

        Examples
        --------
        >>> lower = profile.with_floors(profile.floors - 1)
        >>> bool((lower.floors < profile.floors).all())
        True
        """
        if targets is None and self.targets is not None and floors.shape == self.floors.shape:
            targets = floors + target_gaps(self.floors, self.targets)
        return self._replace(self.layers, self.axes, floors, targets=targets)

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
        """A weaker profile: a row below its floor is lifted by this share of the way to its target.

        Parameters
        ----------
        strength
            from 0 to 1; 0 lifts nothing, as :meth:`measuring_only`.

        Returns
        -------
        CapProfile
            With ``<axis, lift>`` equal to the strength.

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
        lift_all = self.axis_all if self.lift_all is None else self.lift_all
        lift_all = None if lift_all is None else lift_all * strength
        return self._replace(self.layers, self.axes, self.floors, lifts=lifts * strength, lift_all=lift_all)

    def at_layers(self, layers: Sequence[int]) -> CapProfile:
        """A profile that caps only some of the layers.

        Parameters
        ----------
        layers
            some of the capped layers, ascending.

        Returns
        -------
        CapProfile
            With the axes and floors of these layers.

        Raises
        ------
        ProfileError
            naming the layers that are not capped.

        Examples
        --------
        >>> profile.at_layers(profile.layers[:2]).layers == profile.layers[:2]
        True
        """
        missing = [layer for layer in layers if layer not in self.layers]
        require(not missing, f"layers must be among those that are capped, {list(self.layers)}, got {missing}")
        indices = [self.layers.index(layer) for layer in layers]
        tensors = {name: t[indices] for name in PER_CAPPED_LAYER if (t := getattr(self, name)) is not None}
        return self._replace(layers, self.axes[indices], self.floors[indices], **tensors)

    def _replace(self, layers: Sequence[int], axes: Tensor, floors: Tensor, **changes: Tensor | None) -> CapProfile:
        tensors = {name: getattr(self, name) for name in OPTIONAL} | changes
        return CapProfile(layers, axes, floors, self.provenance, **tensors)

    def measuring_only(self) -> CapProfile:
        """The same axes with every floor at ``-inf``: an installation measures every row and changes none.

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
        """Writes the file in one step: a reader of the path sees the old file or the whole new one.

        Parameters
        ----------
        path
            of the file, with the suffix ``.safetensors`` by custom.

        Raises
        ------
        OSError
            the folder of the file does not exist, or the path is a folder.

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
            of a file, or a URL of fsspec (``s3://``, ``gs://``, ``hf://``, ``https://``). If ``#`` and a digest
            follow, the profile must have this digest.

        Raises
        ------
        ProfileError
            naming the file and what is wrong with it.
        FileNotFoundError
            the file does not exist.

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
        """Loads a profile from a hub, or from the hub's local cache.

        Parameters
        ----------
        repo
            ``organisation/name``, or a folder that :meth:`save_pretrained` wrote.
        revision
            a branch, a tag or a commit. Default: the main branch. Only a commit is the same content for ever.
        file
            the profile's name in the repository.

        Raises
        ------
        ModuleNotFoundError
            huggingface_hub is missing; the message names the extra.
        OSError
            the repository, the revision or the file does not exist, or the hub cannot be reached.
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
        """Writes a folder for a hub: the profile, and a model card (``README.md``) of its provenance and evidence.

        Parameters
        ----------
        folder
            created if it does not exist.

        Examples
        --------
        >>> profile.save_pretrained(folder / "card")
        >>> sorted(path.name for path in (folder / "card").iterdir())
        ['README.md', 'profile.safetensors']
        """
        make_folder(Path(folder))
        self.save(Path(folder) / hub.FILE)
        card = render_card(str(self.model_facts.get("id", "an unknown model")), self.digest, self._summary())
        (Path(folder) / "README.md").write_text(card, "utf-8")

    def push_to_hub(self, repo: str, *, private: bool = False) -> str:
        """Uploads what :meth:`save_pretrained` writes; returns the commit's URL.

        Parameters
        ----------
        repo
            ``organisation/name``; created if it does not exist. The token is that of ``hf auth login``.
        private
            whether a new repository is private.

        Returns
        -------
        str
            The URL of the commit.

        Raises
        ------
        ModuleNotFoundError
            huggingface_hub is missing; the message names the extra.
        OSError
            the hub cannot be reached, or refuses.

        Examples
        --------
        >>> url = profile.push_to_hub("organisation/name", private=True)  # doctest: +SKIP
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return hub.upload(Path(folder), repo, f"Profile {self.digest}", private=private)

    def _summary(self) -> dict[str, str]:
        """The facts of the model card."""
        rows = {
            "model": str(self.model_facts.get("id", "unknown")),
            "digest": self.digest,
            "capped layers": f"{format_layers(self.layers)} of {self.num_layers or 'unknown'}",
            "directions a layer": str(self.directions),
            "strength": f"{self.strength:g}",
            "floors": describe_floors(self._facts("floors")),
            "attention sinks": "left alone, by their norm" if self.knows_sinks else "no limit is known",
        }
        evidence = self.evidence
        if evidence is not None:
            rows |= describe_evidence(evidence)
        return rows | {name: str(self.provenance[name]) for name in ("created", "axiscap") if name in self.provenance}
