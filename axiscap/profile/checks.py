"""Checks of a profile's values. Each failure is a :class:`ProfileError` whose sentence names the argument."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

#: |v| may differ from 1 by this much: the rounding of an axis that was stored in bfloat16.
UNIT_TOLERANCE = 1e-3
#: The most layers of a model, and the most directions of a layer; the kernels have the same bounds.
MAX_LAYERS, MAX_DIRECTIONS = 1 << 16, 64
#: The largest element of a lift. Below it, no shortfall below 2^30 overflows bfloat16 or float32.
_LARGEST_LIFT = 2.0**60

#: The float32 tensors of a profile, and the number of dimensions of each.
DIMENSIONS = {
    "axes": 3, "floors": 2, "targets": 2, "lifts": 3, "norm_limits": 1, "axis_all": 2, "lift_all": 2,
    "norm_limit_all": 1, "quantiles": 2, "populations": 3,
}  # fmt: skip
#: The optional tensors with a row for each capped layer.
PER_CAPPED_LAYER = ("targets", "lifts", "norm_limits")
#: The optional tensors with a row for each layer of the model.
PER_MODEL_LAYER = ("axis_all", "lift_all", "norm_limit_all", "quantiles", "populations")
OPTIONAL = (*PER_CAPPED_LAYER, *PER_MODEL_LAYER)


class ProfileError(ValueError):
    """A profile, or a file that is read as one, is not valid; the message says why.

    Examples
    --------
    >>> try:
    ...     axiscap.CapProfile([3, 2], torch.ones(2, 1, 1), torch.zeros(2, 1))
    ... except axiscap.ProfileError as error:
    ...     print(error)
    layers must be ascending from 0, got [3, 2]
    """


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ProfileError(message)


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_number_list(value: object, length: int | None = None) -> bool:
    return isinstance(value, list) and all(map(is_number, value)) and length in (None, len(value))


def is_name_list(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def to_integers(values: Sequence[int] | Tensor, name: str) -> tuple[int, ...]:
    try:
        if any(isinstance(value, bool) for value in values):
            raise TypeError
        return tuple(operator.index(value) for value in values)
    except TypeError:
        raise ProfileError(f"{name} must be integers, got {values!r}") from None


def format_layers(numbers: Iterable[int]) -> str:
    """Ascending numbers as text: ``8-27, 30``."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(f"{first}-{last}" if last > first else str(first) for first, last in runs)


def check_profile(
    layers: Sequence[int], tensors: Mapping[str, Tensor | None], model_facts: Mapping[str, Any], num_layers: int | None
) -> None:
    """Checks all that the constructor of a profile takes.

    Parameters
    ----------
    tensors
        every tensor of :data:`DIMENSIONS` by its name, None for an optional one that the profile does not have.
    model_facts
        the part ``model`` of the provenance.
    num_layers
        of the model, if known.

    Raises
    ------
    ProfileError
        naming the argument that does not fit.
    """
    present = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    _check_kinds(present | {name: tensors[name] for name in ("axes", "floors")})
    axes, floors = present["axes"], present["floors"]
    _check_layers(layers, axes, floors)
    _check_axes(axes)
    _check_floors(floors)
    _check_shapes_like_axes(present)
    if "targets" in present:
        _check_targets(present["targets"], floors)
    if "lifts" in present:
        _check_lifts(present["lifts"], axes)
    _check_values_by_layer(present)
    _check_model(layers, present, model_facts, num_layers)


def _check_kinds(tensors: Mapping[str, Tensor | None]) -> None:
    for name, tensor in tensors.items():
        require(isinstance(tensor, Tensor), f"{name} must be a tensor, got {type(tensor).__name__}")
        assert isinstance(tensor, Tensor)
        require(tensor.dtype == torch.float32, f"{name} must be float32, got {tensor.dtype}")
        dimensions = DIMENSIONS[name]
        require(tensor.dim() == dimensions, f"{name} must have {dimensions} dimensions, got {tensor.dim()}")


def _check_layers(layers: Sequence[int], axes: Tensor, floors: Tensor) -> None:
    count, directions, size = axes.shape
    require(count > 0 and directions > 0 and size > 0, f"axes must not be empty, got shape {tuple(axes.shape)}")
    require(len(layers) == count, f"layers must name the {count} layers of axes, got {len(layers)}")
    require(
        floors.shape == (count, directions),
        f"floors must have shape ({count}, {directions}) like axes, got {tuple(floors.shape)}",
    )
    is_ascending = all(a < b for a, b in itertools.pairwise(layers))
    require(is_ascending and layers[0] >= 0, f"layers must be ascending from 0, got {list(layers)}")
    require(layers[-1] < MAX_LAYERS, f"layers must be below {MAX_LAYERS}, got {layers[-1]}")
    require(directions <= MAX_DIRECTIONS, f"axes must have at most {MAX_DIRECTIONS} directions, got {directions}")


def _check_axes(axes: Tensor) -> None:
    # Layer by layer: a stranger's file may be large, and is refused without several copies of it in memory.
    require(all(bool(layer.isfinite().all()) for layer in axes), "axes must be finite")
    error = max((layer.norm(dim=-1) - 1).abs().max().item() for layer in axes)
    require(error <= UNIT_TOLERANCE, f"axes must be of unit length within {UNIT_TOLERANCE}, one is off by {error:.3g}")


def _check_floors(floors: Tensor) -> None:
    is_invalid = floors.isnan() | (floors == torch.inf)
    require(not bool(is_invalid.any()), "floors must be finite, or -inf for a direction that is off")


def _check_shapes_like_axes(tensors: Mapping[str, Tensor]) -> None:
    axes, floors = tensors["axes"], tensors["floors"]
    shapes = {"targets": floors.shape, "lifts": axes.shape, "norm_limits": floors.shape[:1]}
    for name, shape in shapes.items():
        if name in tensors:
            actual = tensors[name].shape
            require(actual == shape, f"{name} must have shape {tuple(shape)}, got {tuple(actual)}")


def _check_targets(targets: Tensor, floors: Tensor) -> None:
    is_valid = (targets >= floors) & ((targets < torch.inf) | floors.isneginf())
    require(bool(is_valid.all()), "targets must be finite and at least the floors")


def _check_lifts(lifts: Tensor, axes: Tensor) -> None:
    require(bool((lifts.abs() < _LARGEST_LIFT).all()), "lifts must be finite, with elements below 2^60")
    products = (axes * lifts).sum(-1)
    least, most = products.min().item(), products.max().item()
    require(
        least > 0 and most <= 1 + UNIT_TOLERANCE,
        f"lifts must be above 0 and at most 1 along their axes, they are {least:.3g} to {most:.3g}",
    )


def _check_values_by_layer(tensors: Mapping[str, Tensor]) -> None:
    size = tensors["axes"].shape[2]
    for name in ("norm_limits", "norm_limit_all"):
        if name in tensors:
            require(bool((tensors[name] > 0).all()), f"{name} must be positive, or inf for none")
    for name in ("axis_all", "lift_all"):
        if name in tensors:
            columns = tensors[name].shape[1]
            require(columns == size, f"{name} must have H = {size} columns, got {columns}")
    for name in ("axis_all", "lift_all", "quantiles", "populations"):
        if name in tensors:
            require(bool(tensors[name].isfinite().all()), f"{name} must be finite")


def _check_model(
    layers: Sequence[int], tensors: Mapping[str, Tensor], model_facts: Mapping[str, Any], num_layers: int | None
) -> None:
    stated_layers, stated_size = model_facts.get("num_layers"), model_facts.get("hidden_size")
    require(
        stated_layers is None or (isinstance(stated_layers, int) and stated_layers > 0),
        f"num_layers must be positive, got {stated_layers!r}",
    )
    if num_layers is not None:
        for name in PER_MODEL_LAYER:
            if name in tensors:
                rows = tensors[name].shape[1 if name == "populations" else 0]
                require(rows == num_layers, f"{name} must have a row for each of the model's {num_layers} layers")
        require(
            layers[-1] < num_layers, f"layers must be below {num_layers}, the model's layer count, got {layers[-1]}"
        )
    size = tensors["axes"].shape[2]
    require(stated_size in (None, size), f"axes must have the model's hidden size {stated_size}, got {size}")
