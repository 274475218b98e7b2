"""From directions that other files state, in any order and of any length, to a profile."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from axiscap.interop.torch_files import to_numbers
from axiscap.profile import MAX_DIRECTIONS, MAX_LAYERS, CapProfile, ProfileError

#: Directions are orthogonal if the absolute cosine between them is below this.
_ORTHOGONAL = 1e-4


class Direction(NamedTuple):
    """A floor at a layer.

    ``vector`` (H,), of any length, points to where larger projections on it lie; a row below the floor is corrected by
    the share ``strength`` of what it lacks.
    """

    layer: int
    vector: Any
    floor: float
    strength: float = 1.0


def to_profile(directions: Sequence[Direction], name: str, provenance: Mapping[str, Any]) -> CapProfile:
    """The profile of these directions, which it applies in their order.

    Raises
    ------
    ProfileError
        naming the source and what does not fit.
    """
    by_layer: dict[int, list[tuple[Tensor, Direction]]] = {}
    for direction in directions:
        by_layer.setdefault(direction.layer, []).append((_axis(direction, name), direction))
    if not by_layer:
        raise ProfileError(f"{name}: it has no directions")
    sizes = {len(axis) for parts in by_layer.values() for axis, _ in parts}
    if len(sizes) > 1:
        raise ProfileError(f"{name}: vectors must have one length, got {sorted(sizes)}")
    most = max(map(len, by_layer.values()))
    if most > MAX_DIRECTIONS:
        raise ProfileError(f"{name}: it has {most} directions at one layer, at most {MAX_DIRECTIONS} are allowed")
    axes, floors, lifts = [], [], []
    for _, parts in sorted(by_layer.items()):
        off = (parts[-1][0], parts[-1][1]._replace(floor=-torch.inf))
        padded = parts + [off] * (most - len(parts))
        axes.append(torch.stack([axis for axis, _ in padded]))
        floors.append([direction.floor for _, direction in padded])
        lifts.append(torch.stack([axis * direction.strength for axis, direction in padded]))
    is_whole = all(direction.strength == 1 for direction in directions)
    return CapProfile(
        sorted(by_layer),
        torch.stack(axes),
        torch.tensor(floors, dtype=torch.float32),
        provenance,
        lifts=None if is_whole else torch.stack(lifts),
    )


def check_orthogonal(profile: CapProfile, name: str) -> None:
    """Refuses directions of a layer that would disturb each other. A source that applies all of them to the same row
    then differs from a profile, which applies one after the other.

    Raises
    ------
    ProfileError
        naming the layer.
    """
    for layer, axes in zip(profile.layers, profile.axes, strict=True):
        cosines = (axes @ axes.T).abs()
        # The two bounds of one clamp are one direction, of which either fires.
        disturbs = (cosines > _ORTHOGONAL) & (cosines < 1 - _ORTHOGONAL)
        if bool(disturbs.any()):
            raise ProfileError(
                f"{name}: the directions at layer {layer} are not orthogonal; their source corrects all of them at "
                "once, and a profile one after the other"
            )


def _axis(direction: Direction, name: str) -> Tensor:
    """(H,) float32, of length 1."""
    layer, stored, floor, _ = direction
    if type(layer) is not int or not 0 <= layer < MAX_LAYERS:
        raise ProfileError(f"{name}: layer must be an integer from 0 to {MAX_LAYERS - 1}, got {layer!r}")
    if not abs(floor) <= torch.finfo(torch.float32).max and floor != -torch.inf:
        raise ProfileError(f"{name}: a floor at layer {layer} must be a finite float32, got {floor:g}")
    vector = to_numbers(stored, 1, f"{name}: a vector at layer {layer}")
    largest = vector.abs().max()
    if largest == 0:
        raise ProfileError(f"{name}: a vector at layer {layer} has length 0")
    vector = vector / largest  # first, since the square of a very large or small number overflows or underflows
    axis: Tensor = (vector / vector.norm()).float()
    return axis
