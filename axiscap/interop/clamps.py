"""Directional clamps of RhizoNymph's vLLM, in the JSON of its steering modules (``vllm/config/steering_types.py``).

A clamp holds a row's projection between two bounds: ``h + strength * (clamp(p, min, max) - p) * v/|v|`` with
``p = <h, v/|v|>``. A lower bound is a floor on ``v/|v|``, and an upper one a floor on ``-v/|v|``; equal bounds, a
"pin", are both.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from axiscap.interop.directions import Direction, check_orthogonal, to_profile
from axiscap.profile import CapProfile, ProfileError, check_file

#: The point behind a decoder layer, where AxisCap caps. At the others a row is another one.
_POINT = "post_block"
_DTYPES = ("float64", "float32", "float16", "bfloat16")


class _Clamp(NamedTuple):
    layer: int
    vector: np.ndarray
    low: float
    high: float
    strength: float


def read_clamps(path: str | os.PathLike[str], provenance: Mapping[str, Any] | None = None) -> CapProfile:
    """The clamps of a steering module as a profile.

    Parameters
    ----------
    path
        of the JSON file, with ``clamps``: at the point ``post_block``, by layer a list of ``{"vector", "min", "max",
        "strength"}`` (or ``"value"`` for a pin), or all of them packed in base64.
    provenance
        facts to record; the source is recorded unless these state it.

    Returns
    -------
    CapProfile
        A direction for each bound.

    Raises
    ------
    ProfileError
        the file is no such module, or has what a profile cannot express: vectors that are added, or other points.

    Examples
    --------
    >>> from axiscap import interop
    >>> text = '{"clamps": {"post_block": {"3": [{"vector": [0, 2], "min": 1.5}]}}}'
    >>> _ = (folder / "module.json").write_text(text)
    >>> interop.read_clamps(folder / "module.json").floors.tolist()
    [[1.5]]
    """
    name = os.fspath(path)
    directions = [part for clamp in _clamps(_parse(Path(path)), name) for part in _directions(clamp, name)]
    profile = to_profile(directions, name, {"source": f"clamps of {Path(path).name}", **(provenance or {})})
    check_orthogonal(profile, name)
    return profile


def _parse(path: Path) -> Any:
    try:
        check_file(path)
        return json.loads(path.read_text("utf-8-sig"))
    except (ValueError, RecursionError) as error:  # a ProfileError is a ValueError
        raise ProfileError(f"{path}: {error}") from None


def _clamps(module: Any, name: str) -> Iterator[_Clamp]:
    if not isinstance(module, dict) or not isinstance(module.get("clamps"), dict):
        raise ProfileError(f"{name}: no steering module; it must be an object with clamps")
    for key in ("vectors", "prefill_vectors", "decode_vectors", "prefill_clamps", "decode_clamps"):
        if module.get(key):
            raise ProfileError(f"{name}: it has {key}, which a profile cannot express")
    for point, by_layer in module["clamps"].items():
        if point != _POINT:
            raise ProfileError(f"{name}: it clamps at {point}; a profile caps behind a layer, at {_POINT}")
        try:
            yield from _packed(by_layer) if "data" in by_layer else _listed(by_layer)
        except (TypeError, ValueError, KeyError, AttributeError, IndexError, OverflowError, binascii.Error) as error:
            raise ProfileError(f"{name}: its clamps are not in the form of a steering module: {error!r}") from None


def _listed(by_layer: Mapping[str, Any]) -> Iterator[_Clamp]:
    for layer, entries in by_layer.items():
        for entry in entries:
            if unknown := entry.keys() - {"vector", "value", "min", "max", "strength"}:
                raise ValueError(f"unknown keys {sorted(unknown)}")
            low, high = entry.get("min"), entry.get("max")
            if entry.get("value") is not None:
                low = high = entry["value"]
            if low is None and high is None:
                raise ValueError("a clamp without a bound")
            vector = np.asarray(entry["vector"], dtype=np.float64)
            yield _Clamp(int(layer), vector, *_bounds(low, high), float(entry.get("strength", 1.0)))


def _packed(blob: Mapping[str, Any]) -> Iterator[_Clamp]:
    dtype = blob.get("dtype", "float64")
    if dtype not in _DTYPES:
        raise ValueError(f"dtype {dtype!r}")
    count, size = map(int, blob["shape"])
    data = torch.frombuffer(bytearray(base64.b64decode(blob["data"], validate=True)), dtype=getattr(torch, dtype))
    rows = data.double().view(count, size).numpy()
    bounds = blob["bounds"] if "bounds" in blob else zip(blob["lo"], blob["hi"], strict=True)
    strengths = blob.get("strengths", blob.get("strength"))
    for layer, row, (low, high), strength in zip(blob["layer_indices"], rows, bounds, strengths, strict=True):
        yield _Clamp(int(layer), row, *_bounds(low, high), float(strength))


def _bounds(low: Any, high: Any) -> tuple[float, float]:
    return -math.inf if low is None else float(low), math.inf if high is None else float(high)


def _directions(clamp: _Clamp, name: str) -> Iterator[Direction]:
    if not clamp.low <= clamp.high or not 0 <= clamp.strength <= 1:
        raise ProfileError(
            f"{name}: a clamp at layer {clamp.layer} must have min <= max and a strength from 0 to 1, got "
            f"{clamp.low:g}, {clamp.high:g} and {clamp.strength:g}"
        )
    if clamp.strength == 0:
        return
    for sign, floor in ((1, clamp.low), (-1, -clamp.high)):
        if floor != -math.inf:
            yield Direction(clamp.layer, sign * clamp.vector, floor, clamp.strength)
