"""Files that torch saved, from strangers: they are read with ``weights_only=True``, which executes no code."""

from __future__ import annotations

import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from axiscap.profile import MAX_FILE_BYTES, ProfileError, check_file, check_target

#: The first bytes of a file that torch saved: a ZIP archive, or, before 2020, a pickle of protocol 2.
_MAGIC = (b"PK", b"\x80\x02")
#: All that ``torch.load`` raises for files that are damaged, or that hold objects which it does not load.
_ERRORS = (
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
)


def load_torch_file(path: str | os.PathLike[str]) -> Any:
    """The content of a file that torch saved; it may have arrays of NumPy.

    Raises
    ------
    ProfileError
        the file is too large, damaged, or needs full unpickling.
    """
    try:
        check_file(Path(path))
    except ProfileError as error:
        raise ProfileError(f"{os.fspath(path)}: {error}") from None
    try:
        with torch.serialization.safe_globals(_numpy_globals()):
            return torch.load(path, map_location="cpu", weights_only=True)
    except _ERRORS as error:
        raise ProfileError(f"{os.fspath(path)}: not loaded, because {_reason(Path(path), error)}") from None


def save_torch_file(content: Any, path: str | os.PathLike[str]) -> None:
    """Writes a file by ``torch.save``.

    Raises
    ------
    OSError
        the folder of the file does not exist, or the path is a folder.
    """
    check_target(Path(path))
    torch.save(content, path)


def to_numbers(value: Any, dimensions: int, name: str) -> Tensor:
    """A stored tensor or NumPy array of any numeric dtype, in float64.

    Raises
    ------
    ProfileError
        the value is no dense and finite tensor of numbers with this many dimensions.
    """
    if isinstance(value, np.ndarray) and value.dtype.kind in "fiu":
        value = torch.from_numpy(value.astype(np.float64))
    if (
        not isinstance(value, Tensor)
        or value.layout != torch.strided
        or value.dtype == torch.bool
        or value.is_complex()
        or value.is_quantized
    ):
        raise ProfileError(f"{name} must be a dense tensor of numbers")
    # A stored view can claim more elements than its file has bytes; a copy would allocate them all.
    if value.dim() != dimensions or value.numel() == 0 or value.numel() * 8 > MAX_FILE_BYTES:
        raise ProfileError(
            f"{name} must have {dimensions} dimensions and a sensible size, got shape {tuple(value.shape)}"
        )
    numbers = value.detach().double()
    if not bool(numbers.isfinite().all()):
        raise ProfileError(f"{name} must be finite")
    return numbers


def _numpy_globals() -> list[Any]:
    """The globals that an array of numbers has in a pickle of NumPy 1 and 2; none of them runs code."""
    reconstruct = np.empty(0).__reduce__()[0]
    dtypes = {type(np.dtype(kind)) for kind in np.typecodes["AllInteger"] + np.typecodes["Float"]}
    names = ("numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct")
    return [*((reconstruct, name) for name in names), np.ndarray, np.dtype, *dtypes]


def _reason(path: Path, error: Exception) -> str:
    with path.open("rb") as file:
        is_torch_file = file.read(2) in _MAGIC
    if is_torch_file and ("Unsupported" in str(error) or "weights_only" in str(error)):
        return "it holds objects that only full unpickling, which executes code, could load"
    return "it is damaged or no torch file"
