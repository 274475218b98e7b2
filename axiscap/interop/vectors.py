"""Published vectors (arXiv 2601.10387): the mean activations of a model's default and roles, and their axis."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from axiscap.interop.torch_files import load_torch_file, save_torch_file, to_numbers
from axiscap.profile import ProfileError, make_folder


def read_axis(path: str | os.PathLike[str]) -> Tensor:
    """Reads a published axis, not normalised; + = Assistant.

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
    value = load_torch_file(path)
    if isinstance(value, Mapping):
        value = value.get("axis")
    return to_numbers(value, 2, f"{os.fspath(path)}: the axis").float()


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
    save_torch_file({"axis": to_numbers(axis, 2, "axis").float()}, path)


@dataclass(frozen=True)
class Vectors:
    """Mean activations of a model's default and roles, (n_layers, H) float32 each, not normalised.

    Parameters
    ----------
    default
        of the Assistant, (n_layers, H) float32.
    roles
        by name, (n_layers, H) float32 each.

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
        the default vector is missing.
    ProfileError
        naming the file that is no vector, or whose shape differs from the others.

    Examples
    --------
    >>> from axiscap import interop
    >>> interop.write_vectors(interop.Vectors(torch.ones(2, 4), {"ghost": torch.zeros(2, 4)}), folder / "vectors")
    >>> list(interop.read_vectors(folder / "vectors").roles)
    ['ghost']
    """
    default = _read_vector(Path(folder) / "default_vector.pt")
    roles = {path.stem: _read_vector(path) for path in sorted(Path(folder).glob("role_vectors/*.pt"))}
    if not roles:
        raise ProfileError(f"{os.fspath(folder)}: no role vectors in its folder role_vectors")
    for name, vector in roles.items():
        if vector.shape != default.shape:
            raise ProfileError(
                f"{os.fspath(folder)}: the vector of {name} has shape {tuple(vector.shape)}, the default's "
                f"{tuple(default.shape)}"
            )
    return Vectors(default, roles)


def read_pipeline(folder: str | os.PathLike[str]) -> Vectors:
    """The vectors that the authors' pipeline leaves in its folder: ``vectors/ROLE.pt``.

    A file is ``{"vector": tensor, "type": str, "role": str}``. The default's vectors are those of the role ``default``
    or of the type ``mean``.

    Parameters
    ----------
    folder
        of one model, with the subfolder ``vectors``.

    Returns
    -------
    Vectors
        In float32; the default is the mean of the default's vectors.

    Raises
    ------
    ProfileError
        there are no vectors of the default or none of roles, or a file is no vector.

    Examples
    --------
    >>> from axiscap import interop
    >>> (folder / "run" / "vectors").mkdir(parents=True)
    >>> for role, kind in (("default", "mean"), ("ghost", "pos_3")):
    ...     content = {"vector": torch.ones(2, 4), "type": kind, "role": role}
    ...     torch.save(content, folder / "run" / "vectors" / f"{role}.pt")
    >>> list(interop.read_pipeline(folder / "run").roles)
    ['ghost']
    """
    defaults, roles = [], {}
    for path in sorted(Path(folder).glob("vectors/*.pt")):
        entry = load_torch_file(path)
        if not isinstance(entry, Mapping):
            raise ProfileError(f"{path}: not a vector of the pipeline; it must have 'vector', 'type' and 'role'")
        vector = to_numbers(entry.get("vector"), 2, f"{path}: the vector").float()
        role = str(entry.get("role", path.stem))
        if role == "default" or entry.get("type") == "mean":
            defaults.append(vector)
        else:
            roles[role] = vector
    if not defaults or not roles:
        raise ProfileError(f"{os.fspath(folder)}: its folder vectors must have a default (type mean) and roles")
    shapes = sorted({tuple(vector.shape) for vector in (*defaults, *roles.values())})
    if len(shapes) > 1:
        raise ProfileError(f"{os.fspath(folder)}: its vectors must have one shape, got {shapes}")
    return Vectors(torch.stack(defaults).mean(0), roles)


def write_vectors(vectors: Vectors, folder: str | os.PathLike[str]) -> None:
    """Writes vectors in the published layout, and their axis as ``assistant_axis.pt``.

    Parameters
    ----------
    vectors
        of the default and the roles.
    folder
        created if it does not exist.

    Examples
    --------
    >>> from axiscap import interop
    >>> interop.write_vectors(interop.Vectors(torch.ones(2, 4), {"ghost": torch.zeros(2, 4)}), folder / "vectors")
    """
    make_folder(Path(folder) / "role_vectors")
    save_torch_file(vectors.default, Path(folder) / "default_vector.pt")
    for name, vector in vectors.roles.items():
        # Not "mean": the paper's script takes a vector of that type for the default.
        content = {"vector": vector, "type": "pos_3", "role": name}
        save_torch_file(content, Path(folder) / "role_vectors" / f"{name}.pt")
    write_axis(vectors.axis, Path(folder) / "assistant_axis.pt")


def _read_vector(path: Path) -> Tensor:
    value = load_torch_file(path)
    if isinstance(value, Mapping):
        value = value.get("vector")
    return to_numbers(value, 2, f"{path}: the vector").float()
