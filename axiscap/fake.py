"""The ops without data, as torch.compile, torch.export and meta tensors see them: shapes, and the kernels' own checks.

What is wrong in a call is said here in the words of ``csrc/torch/ops.cpp``, which says it where there is data. A size
that is not known yet is let through, since a check of it would add a guard to the graph; the kernel will look at it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from axiscap import _C

_STREAMS = (torch.float32, torch.bfloat16, torch.float16)


def _sure(condition: Any) -> bool:
    """Whether a condition on sizes holds, whatever those turn out to be that are not known yet."""
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return statically_known_true(condition)


def _wrong(found: bool, message: str, *, error: type[Exception] = ValueError) -> None:
    if found:
        raise error(message)


def _differ(sizes: Sequence[Any], wanted: Sequence[Any]) -> bool:
    return len(sizes) != len(wanted) or any(_sure(a != b) for a, b in zip(sizes, wanted, strict=True))


def _is_scattered(tensor: Tensor) -> bool:
    """Whether a tensor is sure not to be contiguous."""
    expected: Any = 1
    scattered = False
    for size, stride in zip(reversed(tensor.shape), reversed(tensor.stride()), strict=True):
        if _sure(size == 0):
            return False
        if not _sure(size == 1):
            scattered = scattered or (_sure(size > 1) and _sure(stride != expected))
            expected = expected * size
    return scattered


def _name(dtype: torch.dtype) -> str:
    """As C++ writes it: Float, BFloat16, Long."""
    return torch.empty(0, dtype=dtype, device="cpu").type().removeprefix("torch.").removesuffix("Tensor")


def _rows(tensor: Tensor, name: str, *, writable: bool = False) -> Any:
    """The number of rows of (..., H), which must have one stride."""
    shape, strides = list(tensor.shape), list(tensor.stride())
    _wrong(not shape or _sure(shape[-1] < 1), f"{name} must have shape (..., H) with H >= 1, got {shape}")
    _wrong(
        _sure(strides[-1] != 1) and _sure(shape[-1] != 1),
        f"{name} must have stride 1 in its last dimension, got strides {strides}",
    )
    count, between = 1, shape[-1]
    for size, stride in zip(reversed(shape[:-1]), reversed(strides[:-1]), strict=True):
        if _sure(size == 1):
            continue
        if _sure(count == 1):
            between = stride
        _wrong(
            _sure(count != 0) and _sure(size > 1) and _sure(stride != between * count),
            f"{name} must have rows with one uniform stride, got shape {shape} with strides {strides}",
        )
        count = count * size
    _wrong(
        writable and _sure(count > 1) and _sure(between < shape[-1]),
        f"{name} is changed in place, so its rows must not overlap; got a row stride of {between} for H = {shape[-1]}",
    )
    return count


def _check_dtype(tensor: Tensor, name: str, wanted: torch.dtype) -> None:
    found = tensor.dtype
    _wrong(found != wanted, f"{name} must be {_name(wanted)}, got {_name(found)}", error=TypeError)


def _check_stream(tensor: Tensor, name: str) -> None:
    found = tensor.dtype
    message = f"{name} must be float32, bfloat16 or float16, got "
    _wrong(found not in _STREAMS, message + (_name(found) if found not in _STREAMS else ""), error=TypeError)


def _check_device(tensor: Tensor, name: str, device: torch.device, of: str = "hidden") -> None:
    _wrong(tensor.device != device, f"{name} must be on the device of {of}, {device}, got {tensor.device}")


def _check_contiguous(tensor: Tensor, name: str) -> None:
    _wrong(_is_scattered(tensor), f"{name} must be contiguous, got strides {list(tensor.stride())}")


def _check_axes(axes: Tensor, dim: int) -> None:
    shape = list(axes.shape)
    _check_dtype(axes, "axes", torch.float32)
    wanted = "(S, K, H)" if dim == 3 else "(L, S, K, H)"
    _wrong(axes.dim() != dim, f"axes must have shape {wanted}, got {shape}")
    _wrong(any(_sure(size == 0) for size in shape), f"axes must have no dimension of size 0, got shape {shape}")
    _wrong(
        _sure(shape[-2] > _C.MAX_DIRECTIONS),
        f"axes must have at most {_C.MAX_DIRECTIONS} directions (dimension -2), got {shape[-2]}",
    )
    _check_contiguous(axes, "axes")


def _check_beside(tensor: Tensor | None, name: str, axes: Tensor, *, whole: bool) -> None:
    if tensor is None:
        return
    _check_dtype(tensor, name, torch.float32)
    wanted, found = list(axes.shape if whole else axes.shape[:-1]), list(tensor.shape)
    less = "" if whole else " less H"
    _wrong(_differ(found, wanted), f"{name} must have the shape of axes{less}, {wanted}, got {found}")
    _check_contiguous(tensor, name)
    _check_device(tensor, name, axes.device, "axes")


def _check_bank(axes: Tensor, floors: Tensor, lifts: Tensor | None, limits: Tensor | None, dim: int = 3) -> None:
    _check_axes(axes, dim)
    _check_beside(floors, "floors", axes, whole=False)
    _check_beside(lifts, "lifts", axes, whole=True)
    _check_beside(limits, "limits", axes, whole=False)


def _check_slots(slots: Tensor | None, rows: Any, device: torch.device) -> None:
    if slots is None:
        return
    _check_dtype(slots, "slots", torch.int32)
    found = list(slots.shape)
    _wrong(_differ(found, [rows]), f"slots must have shape (rows,) = ({rows},), got {found}")
    _check_contiguous(slots, "slots")
    _check_device(slots, "slots", device)


def _check_rows(hidden: Tensor, axes: Tensor, slots: Tensor | None, name: str, *, writable: bool) -> Any:
    """A stream and the axes that measure it; returns the number of its rows."""
    rows = _rows(hidden, name, writable=writable)
    _check_stream(hidden, "hidden")
    size = hidden.shape[-1]
    _wrong(_sure(axes.shape[-1] != size), f"axes must have the H of hidden, {size}, got {axes.shape[-1]}")
    _check_device(axes, "axes", hidden.device)
    _check_slots(slots, rows, hidden.device)
    return rows


def _check_projections(projections: Tensor | None, wanted: list[Any], device: torch.device) -> None:
    if projections is None:
        return
    _check_dtype(projections, "projections", torch.float32)
    found = list(projections.shape)
    _wrong(_differ(found, wanted), f"projections must have shape {wanted}, got {found}")
    _check_contiguous(projections, "projections")
    _check_device(projections, "projections", device)


def _check_residual(residual: Tensor, hidden: Tensor) -> None:
    found, wanted = list(residual.shape), list(hidden.shape)
    _wrong(_differ(found, wanted), f"residual must have the shape of hidden, {wanted}, got {found}")
    _check_dtype(residual, "residual", hidden.dtype)
    _check_device(residual, "residual", hidden.device)
    _rows(residual, "residual", writable=True)


def _check_norm(hidden: Tensor, weight: Tensor, eps: float, weight_bias: float) -> None:
    _check_dtype(weight, "weight", hidden.dtype)
    size, found = hidden.shape[-1], list(weight.shape)
    _wrong(
        _differ(found, [size]) or _is_scattered(weight),
        f"weight must have shape (H,) = ({size},), contiguous, got {found}",
    )
    _check_device(weight, "weight", hidden.device)
    _wrong(not (eps >= 0 and math.isfinite(eps)), f"eps must be finite and not negative, got {eps:g}")
    _wrong(not math.isfinite(weight_bias), f"weight_bias must be finite, got {weight_bias:g}")


def _first_rows(buffer: Tensor, name: str, hidden: Tensor) -> Tensor:
    rows, found = _rows(hidden, "hidden"), list(buffer.shape)
    _wrong(not found or _sure(found[0] < rows), f"{name} must have room for the {rows} rows, got shape {found}")
    return buffer.as_strided([rows, *found[1:]], buffer.stride())


def cap_(
    hidden: Tensor,
    axes: Tensor,
    floors: Tensor,
    slots: Tensor | None = None,
    *,
    lifts: Tensor | None = None,
    limits: Tensor | None = None,
    projections: Tensor | None = None,
) -> None:
    _check_bank(axes, floors, lifts, limits)
    rows = _check_rows(hidden, axes, slots, "hidden", writable=True)
    _check_projections(projections, [rows, axes.shape[1]], hidden.device)


def cap__buffers(
    hidden: Tensor,
    axes: Tensor,
    floors: Tensor,
    slots: Tensor,
    projections: Tensor,
    lifts: Tensor | None = None,
    limits: Tensor | None = None,
) -> None:
    slots, projections = _first_rows(slots, "slots", hidden), _first_rows(projections, "projections", hidden)
    cap_(hidden, axes, floors, slots, lifts=lifts, limits=limits, projections=projections)


def cap(
    hidden: Tensor,
    axes: Tensor,
    floors: Tensor,
    slots: Tensor | None = None,
    lifts: Tensor | None = None,
    limits: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    _check_bank(axes, floors, lifts, limits)
    _check_rows(hidden, axes, slots, "hidden", writable=False)
    per_row = (math.prod(hidden.shape[:-1]), axes.shape[1])
    return hidden.new_empty(hidden.shape), axes.new_empty(per_row), axes.new_empty(per_row, dtype=torch.bool)


def project(hidden: Tensor, axes: Tensor, slots: Tensor | None = None) -> Tensor:
    _check_axes(axes, 3)
    _check_rows(hidden, axes, slots, "hidden", writable=False)
    return axes.new_empty((*hidden.shape[:-1], axes.shape[1]))


def cap_residual_(
    hidden: Tensor,
    residual: Tensor,
    axes: Tensor,
    floors: Tensor,
    slots: Tensor | None = None,
    *,
    lifts: Tensor | None = None,
    limits: Tensor | None = None,
    projections: Tensor | None = None,
) -> None:
    _check_bank(axes, floors, lifts, limits)
    rows = _check_rows(hidden, axes, slots, "hidden", writable=False)
    _check_residual(residual, hidden)
    _check_projections(projections, [rows, axes.shape[1]], hidden.device)


def cap_residual__buffers(
    hidden: Tensor,
    residual: Tensor,
    axes: Tensor,
    floors: Tensor,
    slots: Tensor,
    projections: Tensor,
    lifts: Tensor | None = None,
    limits: Tensor | None = None,
) -> None:
    slots, projections = _first_rows(slots, "slots", hidden), _first_rows(projections, "projections", hidden)
    cap_residual_(hidden, residual, axes, floors, slots, lifts=lifts, limits=limits, projections=projections)


def add_rms_norm_cap_(
    hidden: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    axes: Tensor,
    floors: Tensor,
    slots: Tensor | None = None,
    *,
    weight_bias: float = 0.0,
    lifts: Tensor | None = None,
    limits: Tensor | None = None,
    projections: Tensor | None = None,
) -> None:
    _check_bank(axes, floors, lifts, limits)
    rows = _check_rows(hidden, axes, slots, "hidden", writable=True)
    _check_residual(residual, hidden)
    _check_norm(hidden, weight, eps, weight_bias)
    _check_projections(projections, [rows, axes.shape[1]], hidden.device)


def add_rms_norm_cap__buffers(
    hidden: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    axes: Tensor,
    floors: Tensor,
    slots: Tensor,
    projections: Tensor,
    weight_bias: float = 0.0,
    lifts: Tensor | None = None,
    limits: Tensor | None = None,
) -> None:
    slots, projections = _first_rows(slots, "slots", hidden), _first_rows(projections, "projections", hidden)
    bank: dict[str, Any] = {"axes": axes, "floors": floors, "lifts": lifts, "limits": limits}
    add_rms_norm_cap_(
        hidden, residual, weight, eps, slots=slots, weight_bias=weight_bias, projections=projections, **bank
    )


def add_rms_norm_cap_fp8_(
    quantized: Tensor,
    hidden: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    axes: Tensor,
    floors: Tensor,
    slots: Tensor | None = None,
    *,
    weight_bias: float = 0.0,
    scale: Tensor | None = None,
    scales: Tensor | None = None,
    lifts: Tensor | None = None,
    limits: Tensor | None = None,
    projections: Tensor | None = None,
) -> None:
    _check_bank(axes, floors, lifts, limits)
    rows = _check_rows(hidden, axes, slots, "hidden", writable=False)
    _check_residual(residual, hidden)
    _check_norm(hidden, weight, eps, weight_bias)
    found, shape = list(quantized.shape), list(hidden.shape)
    _wrong(_differ(found, shape), f"quantized must have the shape of hidden, {shape}, got {found}")
    _check_dtype(quantized, "quantized", torch.float8_e4m3fn)
    _check_device(quantized, "quantized", hidden.device)
    _rows(quantized, "quantized", writable=True)
    _wrong((scale is None) == (scales is None), "one of scale and scales must be given")
    given, name, wanted, plural = (
        (scales, "scales", rows, "s, one for each row") if scale is None else (scale, "scale", 1, "")
    )
    assert given is not None
    _check_dtype(given, name, torch.float32)
    found = list(given.shape)
    _wrong(
        _sure(given.numel() != wanted) or _is_scattered(given),
        f"{name} must be contiguous and have {wanted} element{plural}, got shape {found}",
    )
    _check_device(given, name, hidden.device)
    _check_projections(projections, [rows, axes.shape[1]], hidden.device)


def add_rms_norm_cap_fp8__buffers(
    quantized: Tensor,
    hidden: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    axes: Tensor,
    floors: Tensor,
    slots: Tensor,
    projections: Tensor,
    weight_bias: float = 0.0,
    scale: Tensor | None = None,
    scales: Tensor | None = None,
    lifts: Tensor | None = None,
    limits: Tensor | None = None,
) -> None:
    slots, projections = _first_rows(slots, "slots", hidden), _first_rows(projections, "projections", hidden)
    bank: dict[str, Any] = {"axes": axes, "floors": floors, "lifts": lifts, "limits": limits}
    more: dict[str, Any] = {"weight_bias": weight_bias, "scale": scale, "scales": scales, "projections": projections}
    add_rms_norm_cap_fp8_(quantized, hidden, residual, weight, eps, slots=slots, **more, **bank)


def cap_layers_(
    hiddens: Sequence[Tensor],
    axes: Tensor,
    floors: Tensor,
    slots: Tensor | None = None,
    *,
    lifts: Tensor | None = None,
    limits: Tensor | None = None,
    projections: Tensor | None = None,
) -> None:
    _check_bank(axes, floors, lifts, limits, 4)
    count, given = axes.shape[0], len(hiddens)
    _wrong(_sure(count != given), f"axes must have one entry for each of the {given} hiddens, got {count}")
    first = hiddens[0]
    for layer, hidden in enumerate(hiddens):
        shape, found = list(first.shape), list(hidden.shape)
        _wrong(_differ(found, shape), f"hiddens must have one shape, got {shape} and {found}")
        _check_dtype(hidden, "hiddens", first.dtype)
        _check_device(hidden, "hiddens", first.device)
        if layer == 0:
            rows = _check_rows(hidden, axes, slots, "hiddens", writable=True)
            _check_projections(projections, [given, rows, axes.shape[2]], first.device)
        else:
            _rows(hidden, "hiddens", writable=True)


def accumulate_(stats: Tensor, projections: Tensor, floors: Tensor, slots: Tensor | None = None) -> None:
    _check_dtype(stats, "stats", torch.float64)
    _check_dtype(projections, "projections", torch.float32)
    _check_dtype(floors, "floors", torch.float32)
    shape, many = list(floors.shape), floors.dim() == 3
    _wrong(
        not (many or floors.dim() == 2) or any(_sure(size == 0) for size in shape) or _is_scattered(floors),
        f"floors must have shape (S, K) or (L, S, K), none of them 0, contiguous, got {shape}",
    )
    wanted, found = [*shape, len(_C.STAT_FIELDS)], list(stats.shape)
    _wrong(
        _differ(found, wanted) or _is_scattered(stats),
        f"stats must have shape {wanted}, contiguous, got {found}",
    )
    found, strides = list(projections.shape), list(projections.stride())
    fits = (
        projections.dim() == floors.dim()
        and not _sure(found[-1] != shape[-1])
        and not (many and _sure(found[0] != shape[0]))
        and not _is_scattered(projections[0] if many else projections)
    )
    _wrong(
        not fits,
        f"projections must have shape ({'L, ' if many else ''}rows, K) with the sizes of floors, {shape}, rows "
        f"contiguous, got {found} with strides {strides}",
    )
    _check_device(floors, "floors", projections.device)
    _check_device(stats, "stats", projections.device)
    _check_slots(slots, found[-2], projections.device)


KERNELS: dict[str, Callable[..., Any]] = {
    "cap_": cap_,
    "cap_.buffers": cap__buffers,
    "cap": cap,
    "project": project,
    "cap_residual_": cap_residual_,
    "cap_residual_.buffers": cap_residual__buffers,
    "add_rms_norm_cap_": add_rms_norm_cap_,
    "add_rms_norm_cap_.buffers": add_rms_norm_cap__buffers,
    "add_rms_norm_cap_fp8_": add_rms_norm_cap_fp8_,
    "add_rms_norm_cap_fp8_.buffers": add_rms_norm_cap_fp8__buffers,
    "cap_layers_": cap_layers_,
    "accumulate_": accumulate_,
}
for _op, _kernel in KERNELS.items():
    torch.library.register_fake(f"axiscap::{_op}", _kernel)
