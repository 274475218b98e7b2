"""A profile from whatever a source has. Its content tells the layout."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from axiscap.interop.capping_config import experiments, read_capping_config
from axiscap.interop.clamps import read_clamps
from axiscap.interop.control_vectors import read_control_vector
from axiscap.interop.torch_files import load_torch_file, to_numbers
from axiscap.interop.vectors import Vectors, read_axis, read_pipeline, read_vectors
from axiscap.profile import MAX_FILE_BYTES, CapProfile, ProfileError, check_file, is_url

#: The capped layers of an axis that states none: these shares of the depth, first and last, as in a calibration.
_BAND = (0.27, 0.93)
_LAYOUTS = (
    "a capping config, an axis, a folder of vectors or of the authors' pipeline, persona vectors, a control vector "
    "(GGUF), or a steering module with clamps (JSON)"
)
_DIGEST = re.compile("(.*)#([0-9a-f]{64})", re.DOTALL)
#: The most files of a folder that is fetched. The published ones have fewer than 300.
_MOST_FILES = 2000


@contextlib.contextmanager
def open_source(location: str) -> Iterator[tuple[Path, str]]:
    """The path of a source, and its SHA-256: that of a file, or that of the names and hashes of a folder's files.

    Parameters
    ----------
    location
        a path, or a URL of fsspec, of which a temporary copy is made; optionally followed by ``#`` and the SHA-256 that
        it must have.

    Yields
    ------
    tuple[Path, str]
        The copy of a URL is deleted at the end.

    Raises
    ------
    ProfileError
        the source cannot be fetched, is too large, or has another SHA-256.
    OSError
        there is no such file.

    Examples
    --------
    >>> from axiscap import interop
    >>> interop.write_axis(torch.ones(30, 576), folder / "axis.pt")
    >>> with interop.open_source(str(folder / "axis.pt")) as (path, digest):
    ...     path.name, len(digest)
    ('axis.pt', 64)
    """
    match = _DIGEST.fullmatch(location)
    location, expected = (match[1], match[2]) if match else (location, None)
    with contextlib.ExitStack() as stack:
        path = Path(location)
        if is_url(location):
            path = _fetch(location, Path(stack.enter_context(tempfile.TemporaryDirectory())))
        digest = _sha256(path)
        if expected not in (None, digest):
            raise ProfileError(f"{location}: its SHA-256 is {digest}, not {expected}")
        yield path, digest


def _fetch(url: str, folder: Path) -> Path:
    import fsspec

    try:
        store, root = fsspec.core.url_to_fs(url)
        sizes = {name: int(facts["size"] or 0) for name, facts in store.find(root, detail=True).items()}
        if not sizes:
            raise FileNotFoundError(f"there is no {url}")
        if len(sizes) > _MOST_FILES or max(sizes.values()) > MAX_FILE_BYTES:
            raise ProfileError(f"more than {_MOST_FILES} files, or one of more than {MAX_FILE_BYTES} bytes")
        target = folder / Path(root).name
        store.get(root, os.fspath(target), recursive=store.isdir(root))
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no {url}") from None
    except Exception as error:  # each store raises classes of its own; the store's package may be missing too
        raise ProfileError(f"{url}: it cannot be fetched: {error}") from None
    return target


def _sha256(path: Path) -> str:
    if not path.is_dir():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    files = sorted(part for part in path.rglob("*") if part.is_file())
    lines = [f"{part.relative_to(path).as_posix()} {_sha256(part)}\n" for part in files]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def read_source(
    path: str | os.PathLike[str],
    experiment: str | None = None,
    *,
    model: Mapping[str, Any] | None = None,
) -> CapProfile:
    """The profile of a file or folder in any layout that this module knows.

    Parameters
    ----------
    path
        a capping config; an axis (n_layers, H) or ``{"axis": ...}``; a folder with ``default_vector.pt`` and
        ``role_vectors``, or with ``vectors`` as the authors' pipeline leaves it; a tensor of persona_vectors,
        (n_layers + 1, H); a control vector (GGUF); or a steering module with clamps (JSON).
    experiment
        the id of a setting in a capping config with several.
    model
        facts about the model: ``id``, ``architecture``, ``hidden_size`` and ``num_layers``. A tensor without a name
        needs ``num_layers``: a row more than the model has layers is that of the embeddings.

    Returns
    -------
    CapProfile
        An axis has no floors: its profile measures and caps nothing, until ``axiscap floors --measure`` finds them.
        Persona vectors point towards their trait, and the axis away from it.

    Raises
    ------
    ProfileError
        the source is in no known layout, needs an id or the model's layer count, or does not fit the model.
    OSError
        it cannot be read.

    Examples
    --------
    >>> from axiscap import interop
    >>> interop.write_axis(torch.ones(30, 576), folder / "axis.pt")
    >>> interop.read_source(folder / "axis.pt").layers[0]
    8
    """
    facts = dict(model or {})
    profile = _read_folder(Path(path)) if Path(path).is_dir() else _read_file(Path(path), experiment, facts)
    if facts:
        _check_model(profile, facts, os.fspath(path))
        profile.provenance["model"] = {**profile.model_facts, **facts}
    return profile


def _check_model(profile: CapProfile, facts: Mapping[str, Any], name: str) -> None:
    size, depth = facts.get("hidden_size"), facts.get("num_layers")
    if size not in (None, profile.hidden_size):
        raise ProfileError(f"{name}: its vectors have {profile.hidden_size} elements, and the model's rows {size}")
    own_depth = profile.num_layers
    if depth is not None and (profile.layers[-1] >= depth or own_depth not in (None, depth)):
        raise ProfileError(f"{name}: it is of {own_depth or profile.layers[-1] + 1} layers, and the model has {depth}")


def _read_folder(folder: Path) -> CapProfile:
    name = os.fspath(folder)
    if (folder / "default_vector.pt").exists():
        return _of_vectors(read_vectors(folder), f"vectors of {folder.name}")
    if (folder / "vectors").is_dir():
        return _of_vectors(read_pipeline(folder), f"vectors of the pipeline in {folder.name}")
    for stored in ("assistant_axis.pt", "axis.pt"):
        if (folder / stored).exists():
            return _of_axis(read_axis(folder / stored), f"axis {stored}", name)
    raise ProfileError(f"{name}: no known layout; a source is {_LAYOUTS}")


def _read_file(path: Path, experiment: str | None, facts: Mapping[str, Any]) -> CapProfile:
    try:
        check_file(path)
    except ProfileError as error:
        raise ProfileError(f"{path}: {error}") from None
    with path.open("rb") as file:
        start = file.read(64)
    if start.startswith(b"GGUF"):
        return read_control_vector(path)
    if start.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"{"):
        return read_clamps(path)
    if start[8:9] == b"{":
        _refuse_safetensors(path)
    return _read_torch_file(path, experiment, facts)


def _refuse_safetensors(path: Path) -> NoReturn:
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = file.read(min(size, 1 << 20))
    try:
        names = sorted(json.loads(header).keys() - {"__metadata__"})
    except (ValueError, AttributeError):
        names = []
    if {"axes", "floors", "layers"} <= set(names):
        raise ProfileError(f"{path}: it is a profile already")
    raise ProfileError(
        f"{path}: its tensors ({', '.join(names)[:200]}) are in no known layout. Readings that centre, scale or "
        "normalise rows first cannot be expressed in a profile"
    )


def _read_torch_file(path: Path, experiment: str | None, facts: Mapping[str, Any]) -> CapProfile:
    content = load_torch_file(path)
    if isinstance(content, Mapping):
        if "experiments" in content:
            return _read_experiment(path, experiment)
        if "axis" in content:
            axis = to_numbers(content["axis"], 2, f"{path}: the axis")
            return _of_axis(axis, f"axis {path.name}", str(path))
        if "vector" in content:
            raise ProfileError(
                f"{path}: a vector of one role ({content.get('role', 'unnamed')}) is no axis; name the folder that has "
                "the default's and the roles' vectors"
            )
        raise ProfileError(f"{path}: its entries ({', '.join(map(str, content))[:200]}) are in no known layout")
    tensor = to_numbers(content, 2, f"{path}: the tensor")
    depth, rows = facts.get("num_layers"), len(tensor)
    if depth is None:
        raise ProfileError(
            f"{path}: a tensor of {rows} rows is an axis of {rows} layers, or persona vectors of {rows - 1} and the "
            "embeddings: name the model"
        )
    if rows == depth:
        return _of_axis(tensor, f"axis {path.name}", str(path))
    if rows == depth + 1:
        source = f"persona vectors {path.name}, turned away from their trait"
        return _of_axis(-tensor[1:], source, str(path))
    raise ProfileError(f"{path}: {rows} rows fit no model of {depth} layers")


def _read_experiment(path: Path, experiment: str | None) -> CapProfile:
    if experiment is None:
        names = experiments(path)
        if len(names) != 1:
            raise ProfileError(f"{path}: name one of its experiments: {', '.join(names) or 'it has none'}")
        experiment = names[0]
    return read_capping_config(path, experiment)


def _of_vectors(vectors: Vectors, source: str) -> CapProfile:
    return _of_axis(vectors.axis, source, source)


def _of_axis(axis: Tensor, source: str, name: str) -> CapProfile:
    """The profile of an axis (n_layers, H), + = Assistant, without floors."""
    lengths = axis.double().norm(dim=-1, keepdim=True)
    if not bool((lengths > 0).all()):
        raise ProfileError(f"{name}: the axis has length 0 at layer {int((lengths[:, 0] == 0).nonzero()[0])}")
    axis = (axis.double() / lengths).float()
    first, end = (round(share * len(axis)) for share in _BAND)
    layers = list(range(first, max(end, first + 1)))
    floors = torch.full((len(layers), 1), -torch.inf)
    facts = {"source": source, "model": {"num_layers": len(axis)}}
    return CapProfile(layers, axis[layers][:, None].contiguous(), floors, facts, axis_all=axis)
