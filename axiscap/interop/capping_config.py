"""Capping configs, as they were published with the paper (arXiv 2601.10387).

The paper's cap is a *ceiling* on vectors that point *away* from the Assistant and are not of unit length:
``h - clamp(<h, v/|v|> - cap, min=0) * v/|v|``. Here it becomes a floor on the axis that points towards the Assistant:
``axis = -v/|v|``, ``floor = -cap``, which is the same operation.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from axiscap.interop.directions import Direction, to_profile
from axiscap.interop.torch_files import load_torch_file, save_torch_file, to_numbers
from axiscap.profile import CapProfile, ProfileError


def experiments(path: str | os.PathLike[str]) -> list[str]:
    """The ids of the experiments in a capping config, such as ``layers_46:54-p0.25``.

    Parameters
    ----------
    path
        of a capping config.

    Returns
    -------
    list[str]
        In the file's order.

    Examples
    --------
    >>> from axiscap import interop
    >>> plain = axiscap.CapProfile(profile.layers, profile.axes, profile.floors)
    >>> interop.write_capping_config(plain, folder / "config.pt", "mine")
    >>> interop.experiments(folder / "config.pt")
    ['mine']
    """
    return list(_interventions(load_torch_file(path), os.fspath(path)))


def read_capping_config(
    path: str | os.PathLike[str], experiment: str, provenance: Mapping[str, Any] | None = None
) -> CapProfile:
    """The profile of one experiment of a capping config.

    Several interventions at one layer become its directions, in their order. Interventions that add a vector (``coef``)
    are left out, with a warning, as the authors' own loader leaves them out.

    Parameters
    ----------
    path
        ``{"vectors": {name: {"vector": (H,), "layer": int}}, "experiments": [{"id", "interventions":
        [{"vector": name, "cap": float}]}]}``, saved by torch.
    experiment
        its id.
    provenance
        facts to record; the source is recorded unless these state it.

    Returns
    -------
    CapProfile
        With floors on axes towards the Assistant, where the config has ceilings on vectors away from it.

    Raises
    ------
    ProfileError
        the file is not a capping config, or has no such experiment.

    Examples
    --------
    >>> from axiscap import interop
    >>> plain = axiscap.CapProfile(profile.layers, profile.axes, profile.floors)
    >>> interop.write_capping_config(plain, folder / "config.pt", "mine")
    >>> torch.allclose(interop.read_capping_config(folder / "config.pt", "mine").floors, plain.floors)
    True
    """
    name = os.fspath(path)
    config = load_torch_file(path)
    by_experiment = _interventions(config, name)
    if experiment not in by_experiment:
        raise ProfileError(f"{name}: no experiment {experiment!r}; it has {', '.join(by_experiment) or 'none'}")
    steps = by_experiment[experiment]
    if not steps:
        raise ProfileError(f"{name}: experiment {experiment!r} has no interventions")
    caps = [step for step in steps if not (isinstance(step, Mapping) and "cap" not in step and "coef" in step)]
    if not caps:
        raise ProfileError(f"{name}: experiment {experiment!r} adds vectors and caps nothing")
    if len(caps) < len(steps):
        added = len(steps) - len(caps)
        warnings.warn(
            f"{name}: experiment {experiment!r} also adds {added} vectors (coef), which are left out, as by its "
            "authors' own loader",
            stacklevel=2,
        )
    directions = [_read_intervention(config, step, name, experiment) for step in caps]
    facts = {"source": f"capping config {Path(path).name}, experiment {experiment}", **(provenance or {})}
    return to_profile(directions, f"{name}: experiment {experiment!r}", facts)


def write_capping_config(profile: CapProfile, path: str | os.PathLike[str], experiment: str) -> None:
    """Writes a profile as a capping config with one experiment. Directions that are off are left out.

    Parameters
    ----------
    profile
        whose lifts are its axes.
    path
        of the file.
    experiment
        the id of the experiment.

    Raises
    ------
    ProfileError
        the lifts of the profile are not its axes, which a capping config cannot express.

    Examples
    --------
    >>> from axiscap import interop
    >>> plain = axiscap.CapProfile(profile.layers, profile.axes, profile.floors)
    >>> interop.write_capping_config(plain, folder / "config.pt", "mine")
    """
    if profile.lifts is not None and not torch.equal(profile.lifts, profile.axes):
        raise ProfileError(
            "the profile reads along its axes and corrects along its lifts; a published config has one vector for both"
        )
    vectors: dict[str, dict[str, Any]] = {}
    interventions = []
    for index, layer in enumerate(profile.layers):
        for k in range(profile.directions):
            floor = profile.floors[index, k].item()
            if floor == -torch.inf:
                continue
            name = f"layer_{layer}/direction_{k}"
            vectors[name] = {"vector": -profile.axes[index, k], "layer": layer}
            interventions.append({"vector": name, "cap": -floor})
    save_torch_file({"vectors": vectors, "experiments": [{"id": experiment, "interventions": interventions}]}, path)


def _interventions(config: Any, name: str) -> dict[str, list[Any]]:
    """The interventions of a config by the id of their experiment."""
    try:
        if not isinstance(config, Mapping):  # torch warns of a tensor that is indexed by a name
            raise TypeError
        return {str(entry["id"]): list(entry["interventions"]) for entry in config["experiments"]}
    except (TypeError, KeyError, IndexError):
        raise ProfileError(
            f"{name}: not a capping config; it must have 'experiments' with 'id' and 'interventions'"
        ) from None


def _read_intervention(config: Any, step: Any, name: str, experiment: str) -> Direction:
    """One intervention, a ceiling on a vector away from the Assistant, as a floor on the vector towards it."""
    try:
        entry = config["vectors"][step["vector"]]
        if not isinstance(entry, Mapping):
            raise TypeError
        layer, cap, stored = entry["layer"], float(step["cap"]), entry["vector"]
    except KeyError as error:
        raise ProfileError(f"{name}: an intervention of {experiment!r} lacks {error}") from None
    except (TypeError, ValueError, OverflowError):
        raise ProfileError(
            f"{name}: an intervention of {experiment!r} must name a vector with 'vector' and 'layer', "
            "and have a number as 'cap'"
        ) from None
    if not abs(cap) <= torch.finfo(torch.float32).max:
        raise ProfileError(f"{name}: a cap at layer {layer} must be a finite float32, got {cap:g}")
    return Direction(layer, -to_numbers(stored, 1, f"{name}: vector {step['vector']!r}"), -cap)
