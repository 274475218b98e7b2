"""Control vectors, in the GGUF form of llama.cpp and repeng."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from axiscap.interop.torch_files import to_numbers
from axiscap.profile import MAX_LAYERS, CapProfile, ProfileError, check_file, check_target

#: The note in the file.
_DESCRIPTION = (
    "the direction of a cap's corrections alone, towards the Assistant, of length 1; without floors it is no cap"
)


def read_control_vector(path: str | os.PathLike[str]) -> CapProfile:
    """The directions of a control vector, in the GGUF form that llama.cpp reads and repeng writes.

    A control vector has directions and no floors. The floors of the profile are all ``-inf``: it measures and caps
    nothing, until :meth:`CapProfile.with_floors` sets others. The file does not state whether its directions point
    towards the Assistant.

    Parameters
    ----------
    path
        of the GGUF file.

    Returns
    -------
    CapProfile
        Without floors.

    Raises
    ------
    ModuleNotFoundError
        the package gguf is missing; the message names the extra.
    ProfileError
        the file is no control vector, or a direction in it is not valid.

    Examples
    --------
    >>> from axiscap import interop
    >>> interop.write_control_vector(profile, folder / "control.gguf")
    >>> bool(interop.read_control_vector(folder / "control.gguf").floors.isneginf().all())
    True
    """
    name = os.fspath(path)
    by_layer: dict[int, Tensor] = {}
    for key, value in _read_tensors(Path(path)).items():
        number = key.removeprefix("direction.")
        if number == key or not number.isdecimal() or int(number) >= MAX_LAYERS:
            raise ProfileError(f"{name}: a tensor must be called direction.LAYER, got {key!r}")
        vector = to_numbers(value, 1, f"{name}: {key}")
        if not vector.norm() > 0:
            raise ProfileError(f"{name}: {key} has length 0")
        by_layer[int(number)] = (vector / vector.norm()).float()
    if len({len(axis) for axis in by_layer.values()}) != 1:
        raise ProfileError(f"{name}: directions must be there, and of one length")
    layers = sorted(by_layer)
    axes = torch.stack([by_layer[layer] for layer in layers])[:, None]
    facts = {"source": f"control vector {Path(path).name}: directions alone"}
    return CapProfile(layers, axes, torch.full((len(layers), 1), -torch.inf), facts)


def write_control_vector(profile: CapProfile, path: str | os.PathLike[str]) -> None:
    """Writes the lifts of a profile as a control vector, for llama.cpp and repeng.

    A control vector is added to every row, however far along the axis the row lies. The axes, floors, targets and
    norm_limits are lost, so that the file is no cap; a note in the file says so.

    Parameters
    ----------
    profile
        with one direction at each layer.
    path
        of the GGUF file.

    Raises
    ------
    ModuleNotFoundError
        the package gguf is missing; the message names the extra.
    ProfileError
        the profile has several directions at a layer, or caps layer 0, which llama.cpp's control vectors exclude.

    Examples
    --------
    >>> from axiscap import interop
    >>> interop.write_control_vector(profile, folder / "control.gguf")
    """
    gguf = _import_gguf()
    if profile.directions != 1:
        raise ProfileError(f"a control vector has one direction a layer, the profile {profile.directions}")
    if profile.layers[0] == 0:
        raise ProfileError("llama.cpp's control vectors have no direction at layer 0, and the profile has one")
    check_target(Path(path))
    lifts = profile.axes if profile.lifts is None else profile.lifts
    writer = gguf.GGUFWriter(path, "controlvector")
    writer.add_string("controlvector.model_hint", str(profile.model_facts.get("architecture", "")))
    writer.add_uint32("controlvector.layer_count", len(profile.layers))
    writer.add_string("general.description", f"{_DESCRIPTION} (AxisCap profile {profile.digest})")
    for layer, vector in zip(profile.layers, torch.nn.functional.normalize(lifts[:, 0], dim=-1), strict=True):
        writer.add_tensor(f"direction.{layer}", vector.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _read_tensors(path: Path) -> dict[str, Any]:
    """The tensors of a control vector's file by name."""
    gguf = _import_gguf()
    try:
        check_file(path)
    except ProfileError as error:
        raise ProfileError(f"{path}: {error}") from None
    try:
        reader = gguf.GGUFReader(path)
        architecture = reader.get_field("general.architecture")
        kind = None if architecture is None else architecture.contents()
        tensors = {tensor.name: np.array(tensor.data) for tensor in reader.tensors}
    except (ValueError, KeyError, IndexError, UnicodeDecodeError, OverflowError) as error:
        raise ProfileError(f"{path}: not a GGUF file: {error}") from None
    if kind != "controlvector":
        raise ProfileError(f"{path}: not a control vector, but a GGUF file of the architecture {kind!r}")
    return tensors


def _import_gguf() -> Any:
    try:
        import gguf
    except ModuleNotFoundError:
        raise ModuleNotFoundError("control vectors need the package gguf: pip install 'axiscap[calibrate]'") from None
    return gguf
