"""The file format of a profile: tensors of safetensors, with the provenance as JSON in the metadata.

Files come from strangers. Their size and header are checked before anything is allocated, and nothing is unpickled.
"""

from __future__ import annotations

import json
import os
import stat
import struct
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from axiscap.profile.checks import DIMENSIONS, ProfileError, require

FORMAT_VERSION = 1
#: The largest file that is read: far above any real profile, and harmless for a machine. 512 MiB hold 64 directions at
#: 64 layers of 32768.
MAX_FILE_BYTES = 512 << 20
_MAX_HEADER_BYTES = 8 << 20
#: The provenance's ``norm_limits`` if they were converted from an older file (:func:`_convert_limits`).
CONVERTED = "from limits on projections, and positions"

#: The tensors that only files from before norm_limits have, and the number of dimensions of each.
_OLD_DIMENSIONS = {"limits": 2, "limit_all": 1, "sinks": 1}
_FORMS = {
    **{name: ("F32", dimensions) for name, dimensions in (DIMENSIONS | _OLD_DIMENSIONS).items()},
    "layers": ("I64", 1),
    "sinks": ("I64", 1),
}


def write_file(path: Path, tensors: Mapping[str, Tensor], provenance: Mapping[str, Any]) -> None:
    """Writes a profile in one step: a reader of the path sees the old file or the whole new one.

    Raises
    ------
    OSError
        as :func:`check_target`.
    """
    check_target(path)
    # Copies, since safetensors refuses tensors that share memory.
    copies = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    metadata = {"format": "axiscap", "version": str(FORMAT_VERSION), "provenance": json.dumps(provenance)}
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    try:
        # safetensors would create the file readable by its owner alone, whatever the umask allows.
        with partial.open("xb") as file:
            file.write(save(copies, metadata))
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def read_file(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Reads the tensors and the provenance of a profile, in the present form also if the file is older.

    Raises
    ------
    ProfileError
        the file is no profile of this format.
    """
    _check_header_size(path)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            require(metadata.get("format") == "axiscap", "not an AxisCap profile (its metadata does not say so)")
            version = metadata.get("version")
            require(version == str(FORMAT_VERSION), f"format version {version} is not one this AxisCap reads")
            _check_forms(file)
            tensors = {name: file.get_tensor(name) for name in set(file.keys())}
    except SafetensorError as error:
        raise ProfileError(f"not a valid safetensors file ({error})") from None
    provenance = _parse_provenance(metadata)
    _convert_limits(tensors, provenance)
    return tensors, provenance


def check_target(path: Path) -> None:
    """Checks that a file can be written.

    Raises
    ------
    FileNotFoundError
        the folder of the file does not exist.
    IsADirectoryError
        the path is a folder.
    """
    if path.is_dir():
        raise IsADirectoryError(f"{path}: a folder; the path must name a file")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path}: its folder does not exist")


def make_folder(path: Path) -> None:
    """Creates a folder, with the folders that contain it, unless it exists.

    Raises
    ------
    NotADirectoryError
        the path, or one that should contain it, is a file.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise NotADirectoryError(f"{path}: a file; the path must name a folder") from None


def check_file(path: Path) -> int:
    """The size of a file that is to be read.

    Raises
    ------
    ProfileError
        the path is no regular file (a pipe would block for ever), or the file exceeds :data:`MAX_FILE_BYTES`.
    """
    status = path.stat()
    require(not stat.S_ISDIR(status.st_mode), "is a folder")
    require(stat.S_ISREG(status.st_mode), "is no regular file")
    size = status.st_size
    require(size <= MAX_FILE_BYTES, f"{size} bytes, more than the {MAX_FILE_BYTES} that it may have")
    return size


def _check_header_size(path: Path) -> None:
    size = check_file(path)
    with path.open("rb") as file:
        start = file.read(8)
    require(len(start) == 8, "too short for a safetensors file")
    is_other = start.startswith((b"PK", b"\x80\x02", b"GGUF"))
    require(not is_other, "a file of torch or GGUF, and no profile; `axiscap import` makes one of it")
    (header,) = struct.unpack("<Q", start)
    require(
        header <= size - 8,
        f"its header says {header} bytes, but {size - 8} are there: truncated or no safetensors file",
    )
    require(header <= _MAX_HEADER_BYTES, f"its header has {header} bytes, more than the {_MAX_HEADER_BYTES} allowed")


def _check_forms(file: Any) -> None:
    """Checks names, dtypes and dimensions in the header, before any tensor is read."""
    names = set(file.keys())
    missing = {"layers", "axes", "floors"} - names
    require(not missing, f"tensors are missing: {', '.join(sorted(missing))}")
    unknown = names - set(_FORMS)
    require(not unknown, f"unknown tensors: {', '.join(sorted(unknown)[:5])}")
    for name in names:
        entry = file.get_slice(name)
        form = entry.get_dtype(), len(entry.get_shape())
        dtype, dimensions = _FORMS[name]
        require(form == (dtype, dimensions), f"{name} must be {dtype} of {dimensions} dimensions, got {form}")


def _parse_provenance(metadata: Mapping[str, str]) -> dict[str, Any]:
    try:
        provenance = json.loads(metadata.get("provenance", "{}"))
    except (ValueError, RecursionError):
        raise ProfileError("its provenance is not JSON") from None
    require(isinstance(provenance, dict), "its provenance is not a JSON object")
    assert isinstance(provenance, dict)
    return provenance


def _convert_limits(tensors: dict[str, Tensor], provenance: dict[str, Any]) -> None:
    """Replaces the limits of a file from before norm_limits by norm_limits.

    Such a file exempted sinks by their positions, and by limits on projections at 1.5 times the largest norm of an
    ordinary row. A row of a smaller norm has no projection beyond such a limit, so that norm_limits exempt all rows
    that the old limits exempted. A row of a smaller norm at a sink's position was exempt, and is not any more.
    """
    old = {name: tensors.pop(name) for name in _OLD_DIMENSIONS if name in tensors}
    if not old:
        return
    require("norm_limits" not in tensors, f"norm_limits and {min(old)} exclude each other")
    require(
        "limits" in old and old["limits"].shape[1] > 0,
        "it names positions of attention sinks, but no limit; this version knows sinks by their norm: calibrate again",
    )
    tensors["norm_limits"] = old["limits"].amin(1)
    if "limit_all" in old:
        tensors["norm_limit_all"] = old["limit_all"]
    provenance["norm_limits"] = CONVERTED
