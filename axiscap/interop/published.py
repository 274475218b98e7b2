"""Files of others: those published with the paper (arXiv 2601.10387), and control vectors for llama.cpp.

The paper's cap is a *ceiling* on vectors that point *away* from the Assistant and are not of unit length:
``h - clamp(<h, v/|v|> - cap, min=0) * v/|v|``. Here it becomes a floor on the axis that points towards the Assistant:
``axis = -v/|v|``, ``floor = -cap``, which is the same operation.

The files are torch pickles. They are read with ``weights_only=True``, which executes nothing; a file that needs more
is refused.
"""

from __future__ import annotations

import os
import pickle
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from axiscap.profile import MAX_DIRECTIONS, MAX_FILE_BYTES, MAX_LAYERS, CapProfile, ProfileError, check_file

#: What a file that torch saved begins with: a ZIP archive, or, before 2020, a pickle of protocol 2.
_MAGIC = (b"PK", b"\x80\x02")


def _numpy_arrays() -> list[Any]:
    """What an array of numbers is made of in a pickle, by NumPy 1 and 2; none of it runs code."""
    rebuild = np.empty(0).__reduce__()[0]
    dtypes = {type(np.dtype(kind)) for kind in np.typecodes["AllInteger"] + np.typecodes["Float"]}
    names = ("numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct")
    return [*((rebuild, name) for name in names), np.ndarray, np.dtype, *dtypes]


def _load(path: str | os.PathLike[str]) -> Any:
    try:
        check_file(Path(path))
    except ProfileError as error:
        raise ProfileError(f"{os.fspath(path)}: {error}") from None
    try:
        with torch.serialization.safe_globals(_numpy_arrays()):
            return torch.load(path, map_location="cpu", weights_only=True)
    except (
        pickle.UnpicklingError,
        zipfile.BadZipFile,
        RuntimeError,
        EOFError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        IndexError,
        OverflowError,
    ) as error:
        with Path(path).open("rb") as file:
            is_torchs = file.read(2) in _MAGIC
        why = "it holds objects that only full unpickling, which executes code, could load"
        if not is_torchs or ("Unsupported" not in str(error) and "weights_only" not in str(error)):
            why = "it is damaged or no torch file"
        raise ProfileError(f"{os.fspath(path)}: not loaded, because {why}") from None


def _vector(value: Any, dim: int, what: str) -> Tensor:
    """Of any numeric dtype, also of NumPy."""
    if isinstance(value, np.ndarray) and value.dtype.kind in "fiu":
        value = torch.from_numpy(value.astype(np.float64))
    if (
        not isinstance(value, Tensor)
        or value.layout != torch.strided
        or value.dtype == torch.bool
        or value.is_complex()
        or value.is_quantized
    ):
        raise ProfileError(f"{what} must be a dense tensor of numbers")
    # A stored view can claim more elements than its file has bytes; a copy would allocate them all.
    if value.dim() != dim or value.numel() == 0 or value.numel() * 8 > MAX_FILE_BYTES:
        raise ProfileError(f"{what} must have {dim} dimensions and a sensible size, got shape {tuple(value.shape)}")
    result = value.detach().double()
    if not bool(result.isfinite().all()):
        raise ProfileError(f"{what} must be finite")
    return result


def experiments(path: str | os.PathLike[str]) -> list[str]:
    """The ids of the settings in a capping config, such as ``layers_46:54-p0.25``.

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
    return list(_experiments(_load(path), path))


def _experiments(config: Any, path: str | os.PathLike[str]) -> dict[str, list[Any]]:
    try:
        return {str(entry["id"]): list(entry["interventions"]) for entry in config["experiments"]}
    except (TypeError, KeyError, IndexError):
        raise ProfileError(
            f"{os.fspath(path)}: not a capping config; it must have 'experiments' with 'id' and 'interventions'"
        ) from None


def read_capping_config(
    path: str | os.PathLike[str], experiment: str, provenance: Mapping[str, Any] | None = None
) -> CapProfile:
    """The profile of one experiment of a published capping config.


    Several interventions at one layer become its directions, in their order.

    Parameters
    ----------
    path
        ``{"vectors": {name: {"vector": (H,), "layer": int}}, "experiments": [{"id", "interventions":
        [{"vector": name, "cap": float}]}]}``, saved by torch.
    experiment
        its id.
    provenance
        what to record beside the facts that the file gives.

    Returns
    -------
    CapProfile
        With the sign of the published form undone: a floor on the axis towards the Assistant.

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
    config = _load(path)
    by_id = _experiments(config, path)
    if experiment not in by_id:
        raise ProfileError(f"{os.fspath(path)}: no experiment {experiment!r}; it has {', '.join(by_id) or 'none'}")
    by_layer: dict[int, list[tuple[Tensor, float]]] = {}
    for step in by_id[experiment]:
        try:
            entry = config["vectors"][step["vector"]]
            if not isinstance(entry, Mapping):
                raise TypeError
            layer, cap, stored = entry["layer"], float(step["cap"]), entry["vector"]
        except KeyError as error:
            raise ProfileError(f"{os.fspath(path)}: an intervention of {experiment!r} lacks {error}") from None
        except (TypeError, ValueError, OverflowError):
            raise ProfileError(
                f"{os.fspath(path)}: an intervention of {experiment!r} must name a vector with 'vector' and 'layer', "
                "and have a number as 'cap'"
            ) from None
        if type(layer) is not int or not 0 <= layer < MAX_LAYERS:
            raise ProfileError(f"{os.fspath(path)}: layer must be an integer from 0 to {MAX_LAYERS - 1}, got {layer!r}")
        if not abs(cap) <= torch.finfo(torch.float32).max:
            raise ProfileError(f"{os.fspath(path)}: a cap at layer {layer} must be a finite float32, got {cap:g}")
        vector = _vector(stored, 1, f"{os.fspath(path)}: vector {step['vector']!r}")
        largest = vector.abs().max()
        if largest == 0:
            raise ProfileError(f"{os.fspath(path)}: vector {step['vector']!r} has length 0")
        vector = vector / largest  # first, since the square of a large or small number is none
        by_layer.setdefault(layer, []).append(((-vector / vector.norm()).float(), -cap))
    if not by_layer:
        raise ProfileError(f"{os.fspath(path)}: experiment {experiment!r} has no interventions")
    sizes = {len(axis) for directions in by_layer.values() for axis, _ in directions}
    if len(sizes) > 1:
        raise ProfileError(f"{os.fspath(path)}: vectors must have one length, got {sorted(sizes)}")
    most = max(len(directions) for directions in by_layer.values())
    if most > MAX_DIRECTIONS:
        raise ProfileError(
            f"{os.fspath(path)}: experiment {experiment!r} has {most} interventions at one layer, at most "
            f"{MAX_DIRECTIONS} are allowed"
        )
    for directions in by_layer.values():  # a layer with fewer directions gets one that is off
        directions += [(directions[-1][0], -torch.inf)] * (most - len(directions))
    layers = sorted(by_layer)
    axes = torch.stack([torch.stack([axis for axis, _ in by_layer[layer]]) for layer in layers])
    floors = torch.tensor([[floor for _, floor in by_layer[layer]] for layer in layers], dtype=torch.float32)
    facts = {"source": f"capping config {Path(path).name}, experiment {experiment}", **(provenance or {})}
    return CapProfile(layers, axes, floors, facts)


def write_capping_config(profile: CapProfile, path: str | os.PathLike[str], experiment: str) -> None:
    """Writes a profile as a capping config with one experiment. Directions that are off are left out.

    Parameters
    ----------
    profile
        one without lifts of its own.
    path
        of the file.
    experiment
        the id that it gets.

    Raises
    ------
    ProfileError
        the profile corrects along other vectors than it reads along, which the published form cannot say.

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
    torch.save({"vectors": vectors, "experiments": [{"id": experiment, "interventions": interventions}]}, path)


def read_axis(path: str | os.PathLike[str]) -> Tensor:
    """A published axis file: (n_layers, H) float32, not normalised, + = Assistant.

    The file is a tensor or ``{"axis": tensor}``, saved by torch.

    Parameters
    ----------
    path
        of the file.

    Returns
    -------
    Tensor
        (n_layers, H) float32.

    Examples
    --------
    >>> from axiscap import interop
    >>> interop.write_axis(torch.ones(30, 576), folder / "axis.pt")
    >>> interop.read_axis(folder / "axis.pt").shape
    torch.Size([30, 576])
    """
    value = _load(path)
    if isinstance(value, Mapping):
        value = value.get("axis")
    return _vector(value, 2, f"{os.fspath(path)}: the axis").float()


def write_axis(axis: Tensor, path: str | os.PathLike[str]) -> None:
    """Writes an axis (n_layers, H) in the published form.

    Parameters
    ----------
    axis
        (n_layers, H), + = Assistant.
    path
        of the file.

    Examples
    --------
    >>> from axiscap import interop
    >>> interop.write_axis(torch.ones(30, 576), folder / "axis.pt")
    """
    torch.save({"axis": _vector(axis, 2, "axis").float()}, path)


@dataclass(frozen=True)
class Vectors:
    """Mean activations of a model's default and roles, (n_layers, H) float32 each, not normalised.

    Parameters
    ----------
    default
        the Assistant's, (n_layers, H) float32.
    roles
        by the role's name, the same.

    Examples
    --------
    >>> from axiscap import interop
    >>> vectors = interop.Vectors(torch.ones(2, 4), {"ghost": torch.zeros(2, 4)})
    >>> vectors.axis.tolist()[0]
    [1.0, 1.0, 1.0, 1.0]
    """

    default: Tensor
    roles: Mapping[str, Tensor]

    @property
    def axis(self) -> Tensor:
        """mean(default) - mean over roles, (n_layers, H), + = Assistant.

        Examples
        --------
        >>> from axiscap import interop
        >>> interop.Vectors(torch.ones(2, 4), {"ghost": torch.zeros(2, 4)}).axis.shape
        torch.Size([2, 4])
        """
        return self.default - torch.stack(list(self.roles.values())).mean(0)


def read_vectors(folder: str | os.PathLike[str]) -> Vectors:
    """A model's published vectors: ``default_vector.pt`` and ``role_vectors/*.pt`` in a folder.

    A file is a tensor, or ``{"vector": tensor, "type": str, "role": str}``, saved by torch.

    Parameters
    ----------
    folder
        of one model.

    Returns
    -------
    Vectors
        In float32.

    Raises
    ------
    OSError
        no default vector.
    ProfileError
        naming the file that is none, or whose shape is not that of the others.

    Examples
    --------
    >>> from axiscap import interop
    >>> interop.write_vectors(interop.Vectors(torch.ones(2, 4), {"ghost": torch.zeros(2, 4)}), folder / "vectors")
    >>> list(interop.read_vectors(folder / "vectors").roles)
    ['ghost']
    """
    default = _vector_file(Path(folder) / "default_vector.pt")
    roles = {path.stem: _vector_file(path) for path in sorted(Path(folder).glob("role_vectors/*.pt"))}
    if not roles:
        raise ProfileError(f"{os.fspath(folder)}: no role vectors in its folder role_vectors")
    for name, vector in roles.items():
        if vector.shape != default.shape:
            raise ProfileError(
                f"{os.fspath(folder)}: the vector of {name} has shape {tuple(vector.shape)}, the default's "
                f"{tuple(default.shape)}"
            )
    return Vectors(default, roles)


def _vector_file(path: Path) -> Tensor:
    value = _load(path)
    if isinstance(value, Mapping):
        value = value.get("vector")
    return _vector(value, 2, f"{path}: the vector").float()


def write_vectors(vectors: Vectors, folder: str | os.PathLike[str]) -> None:
    """Writes vectors in the published layout, with their axis: ``assistant_axis.pt`` beside what is read.

    Parameters
    ----------
    vectors
        the default's and the roles'.
    folder
        made where it is not there.

    Examples
    --------
    >>> from axiscap import interop
    >>> interop.write_vectors(interop.Vectors(torch.ones(2, 4), {"ghost": torch.zeros(2, 4)}), folder / "vectors")
    """
    (Path(folder) / "role_vectors").mkdir(parents=True, exist_ok=True)
    torch.save(vectors.default, Path(folder) / "default_vector.pt")
    for name, vector in vectors.roles.items():
        # Their axis script takes a type of "mean" for a default.
        content = {"vector": vector, "type": "pos_3", "role": name}
        torch.save(content, Path(folder) / "role_vectors" / f"{name}.pt")
    write_axis(vectors.axis, Path(folder) / "assistant_axis.pt")


def read_control_vector(path: str | os.PathLike[str]) -> CapProfile:
    """The directions of a control vector, in the GGUF form that llama.cpp reads and repeng writes.

    A control vector says which way, and nothing of how far: the profile's floors are all ``-inf``, so that it measures
    and caps nothing until :meth:`CapProfile.with_floors` gives it some. Whether its directions point towards the
    Assistant, only its maker knows.

    Parameters
    ----------
    path
        of the GGUF file.

    Returns
    -------
    CapProfile
        That measures and caps nothing.

    Raises
    ------
    ModuleNotFoundError
        naming the extra, without the package gguf.
    ProfileError
        the file is no control vector, or a direction in it cannot be one.

    Examples
    --------
    >>> from axiscap import interop
    >>> interop.write_control_vector(profile, folder / "control.gguf")
    >>> bool(interop.read_control_vector(folder / "control.gguf").floors.isneginf().all())
    True
    """
    gguf = _gguf()
    name = os.fspath(path)
    check_file(Path(path))
    try:
        reader = gguf.GGUFReader(path)
        architecture = reader.get_field("general.architecture")
        kind = None if architecture is None else architecture.contents()
        found = {tensor.name: np.array(tensor.data) for tensor in reader.tensors}
    except (ValueError, KeyError, IndexError, UnicodeDecodeError, OverflowError) as error:
        raise ProfileError(f"{name}: not a GGUF file: {error}") from None
    if kind != "controlvector":
        raise ProfileError(f"{name}: not a control vector, but a GGUF file of the architecture {kind!r}")
    by_layer: dict[int, Tensor] = {}
    for key, value in found.items():
        number = key.removeprefix("direction.")
        if number == key or not number.isdecimal() or int(number) >= MAX_LAYERS:
            raise ProfileError(f"{name}: a tensor must be called direction.LAYER, got {key!r}")
        vector = _vector(value, 1, f"{name}: {key}")
        if not vector.norm() > 0:
            raise ProfileError(f"{name}: {key} has length 0")
        by_layer[int(number)] = (vector / vector.norm()).float()
    if len({len(axis) for axis in by_layer.values()}) != 1:
        raise ProfileError(f"{name}: directions must be there, and of one length")
    layers = sorted(by_layer)
    axes = torch.stack([by_layer[layer] for layer in layers])[:, None]
    facts = {"source": f"control vector {Path(path).name}: directions alone, without floors"}
    return CapProfile(layers, axes, torch.full((len(layers), 1), -torch.inf), facts)


def write_control_vector(profile: CapProfile, path: str | os.PathLike[str]) -> None:
    """Writes what a profile corrects along as a control vector, for llama.cpp and repeng: the direction alone.

    A control vector is added to every row, however far along the axis it lies. So what makes a cap is lost: floors,
    what rows are read along, targets and norm_limits; a note in the file says so. One direction a layer.

    Parameters
    ----------
    profile
        with one direction a layer.
    path
        of the GGUF file.

    Raises
    ------
    ModuleNotFoundError
        naming the extra, without the package gguf.
    ProfileError
        the profile has several directions, or one at layer 0, which llama.cpp's control vectors lack.

    Examples
    --------
    >>> from axiscap import interop
    >>> interop.write_control_vector(profile, folder / "control.gguf")
    """
    gguf = _gguf()
    if profile.directions != 1:
        raise ProfileError(f"a control vector has one direction a layer, the profile {profile.directions}")
    if profile.layers[0] == 0:
        raise ProfileError("llama.cpp's control vectors have no direction at layer 0, and the profile has one")
    along = profile.axes if profile.lifts is None else profile.lifts
    writer = gguf.GGUFWriter(path, "controlvector")
    writer.add_string("controlvector.model_hint", str(profile.model_facts.get("architecture", "")))
    writer.add_uint32("controlvector.layer_count", len(profile.layers))
    writer.add_string("general.description", f"{_ALONE} (AxisCap profile {profile.digest})")
    for layer, vector in zip(profile.layers, torch.nn.functional.normalize(along[:, 0], dim=-1), strict=True):
        writer.add_tensor(f"direction.{layer}", vector.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


_ALONE = "the direction of a cap's corrections alone, towards the Assistant, of length 1; without floors it is no cap"


def _gguf() -> Any:
    try:
        import gguf
    except ModuleNotFoundError:
        raise ModuleNotFoundError("control vectors need the package gguf: pip install 'axiscap[calibrate]'") from None
    return gguf
