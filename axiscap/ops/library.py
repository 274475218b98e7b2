"""The ops as functions, and their registration with torch.library. Their contract is that of :mod:`axiscap.ops`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from axiscap import _C


def cap_(
    hidden: Tensor,
    axes: Tensor,
    floors: Tensor,
    slots: Tensor | None = None,
    *,
    targets: Tensor | None = None,
    lifts: Tensor | None = None,
    norm_limits: Tensor | None = None,
    projections: Tensor | None = None,
) -> Tensor:
    """Caps hidden in place and returns it.

    Parameters
    ----------
    hidden, axes, floors, slots, targets, lifts, norm_limits, projections
        See :mod:`axiscap.ops`, also for the errors. hidden and projections are changed.

    Returns
    -------
    Tensor
        hidden.

    Examples
    --------
    >>> hidden, axes = torch.tensor([[-1.0, 5.0], [2.0, 5.0]]), torch.tensor([[[1.0, 0.0]]])
    >>> axiscap.ops.cap_(hidden, axes, torch.zeros(1, 1)).tolist()
    [[0.0, 5.0], [2.0, 5.0]]
    """
    run = torch.ops.axiscap.cap_ if is_dynamo_compiling() else _C.cap_
    run(hidden, axes, floors, slots, targets=targets, lifts=lifts, norm_limits=norm_limits, projections=projections)
    return hidden


def cap(
    hidden: Tensor,
    axes: Tensor,
    floors: Tensor,
    slots: Tensor | None = None,
    *,
    targets: Tensor | None = None,
    lifts: Tensor | None = None,
    norm_limits: Tensor | None = None,
    projections: Tensor | None = None,
) -> Tensor:
    """The capped copy of hidden, contiguous.

    Differentiable with respect to hidden: the gradient is multiplied by ``I - v u^T`` for each direction that fired, in
    reverse order. All other arguments are constants.

    Parameters
    ----------
    hidden, axes, floors, slots, targets, lifts, norm_limits, projections
        See :mod:`axiscap.ops`, also for the errors. projections are changed.

    Returns
    -------
    Tensor
        Of hidden's shape and dtype.

    Examples
    --------
    >>> hidden = torch.tensor([[-1.0, 5.0], [2.0, 5.0]], requires_grad=True)
    >>> capped = axiscap.ops.cap(hidden, torch.tensor([[[1.0, 0.0]]]), torch.zeros(1, 1))
    >>> capped.sum().backward()
    >>> hidden.grad.tolist()
    [[0.0, 1.0], [1.0, 1.0]]
    """
    out, incoming, _ = torch.ops.axiscap.cap(hidden, axes, floors, slots, targets, lifts, norm_limits)
    if projections is not None:
        projections.copy_(incoming.detach())
    return out  # type: ignore[no-any-return]


def project(hidden: Tensor, axes: Tensor, slots: Tensor | None = None) -> Tensor:
    """``<row, v_k>`` in float32. Differentiable with respect to hidden.

    Parameters
    ----------
    hidden, axes, slots
        See :mod:`axiscap.ops`, also for the errors.

    Returns
    -------
    Tensor
        hidden.shape[:-1] + (K,) float32; NaN for rows that are not finite or have slot -1.

    Examples
    --------
    >>> axiscap.ops.project(torch.tensor([[3.0, 5.0]]), torch.tensor([[[1.0, 0.0]]])).tolist()
    [[3.0]]
    """
    return torch.ops.axiscap.project(hidden, axes, slots)  # type: ignore[no-any-return]


def cap_residual_(
    hidden: Tensor,
    residual: Tensor,
    axes: Tensor,
    floors: Tensor,
    slots: Tensor | None = None,
    *,
    targets: Tensor | None = None,
    lifts: Tensor | None = None,
    norm_limits: Tensor | None = None,
    projections: Tensor | None = None,
) -> Tensor:
    """Caps the block output hidden + residual by changing residual, in place; returns residual.

    The sum is taken in float32 and not rounded.

    Parameters
    ----------
    hidden, residual, axes, floors, slots, targets, lifts, norm_limits, projections
        See :mod:`axiscap.ops`, also for the errors. residual is like hidden; it and projections are changed.

    Returns
    -------
    Tensor
        residual.

    Examples
    --------
    >>> hidden, residual = torch.tensor([[-3.0, 0.0]]), torch.tensor([[1.0, 2.0]])
    >>> axiscap.ops.cap_residual_(hidden, residual, torch.tensor([[[1.0, 0.0]]]), torch.zeros(1, 1)).tolist()
    [[3.0, 2.0]]
    """
    run = torch.ops.axiscap.cap_residual_ if is_dynamo_compiling() else _C.cap_residual_
    run(
        hidden,
        residual,
        axes,
        floors,
        slots,
        targets=targets,
        lifts=lifts,
        norm_limits=norm_limits,
        projections=projections,
    )
    return residual


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
    targets: Tensor | None = None,
    lifts: Tensor | None = None,
    norm_limits: Tensor | None = None,
    projections: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The residual add and the norm before a block, with the cap between them; returns (hidden, residual).

    ``residual <- cap(hidden + residual)``, ``hidden <- residual / sqrt(mean(residual^2) + eps) * (weight +
    weight_bias)``. The sum is taken in float32 and rounded once, when it is stored; the norm is that of the stored row.
    A row that is not capped (slot -1) gets exactly the bits of the add and the norm alone.

    Parameters
    ----------
    weight
        (H,), of hidden's dtype.
    eps
        Added to the mean of squares.
    weight_bias
        1 for Gemma, whose weights are stored less 1.
    hidden, residual, axes, floors, slots, targets, lifts, norm_limits, projections
        See :mod:`axiscap.ops`, also for the errors. residual is like hidden; both and projections are changed.

    Returns
    -------
    tuple[Tensor, Tensor]
        hidden and residual.

    Examples
    --------
    >>> hidden, residual = torch.tensor([[-3.0, 0.0]]), torch.tensor([[1.0, 2.0]])
    >>> bank = torch.tensor([[[1.0, 0.0]]]), torch.zeros(1, 1)
    >>> normed, stream = axiscap.ops.add_rms_norm_cap_(hidden, residual, torch.ones(2), 0.0, *bank)
    >>> stream.tolist(), [round(value, 3) for value in normed[0].tolist()]
    ([[0.0, 2.0]], [0.0, 1.414])
    """
    run = torch.ops.axiscap.add_rms_norm_cap_ if is_dynamo_compiling() else _C.add_rms_norm_cap_
    bank = {"targets": targets, "lifts": lifts, "norm_limits": norm_limits}
    options = bank | {"weight_bias": weight_bias, "projections": projections}
    run(hidden, residual, weight, eps, axes, floors, slots, **options)
    return hidden, residual


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
    targets: Tensor | None = None,
    lifts: Tensor | None = None,
    norm_limits: Tensor | None = None,
    projections: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """add_rms_norm_cap_ for an fp8 matrix: the norm goes to quantized, hidden stays; returns (quantized, residual).

    ``residual <- cap(hidden + residual)``, ``quantized <- round(clamp(norm(residual) * (1 / scale), -448, 448))``. The
    norm is rounded to hidden's dtype before it is scaled, so that the bits are those of :func:`add_rms_norm_cap_` and a
    quantisation after it. There is one scale for all rows, or one for each row, as in vLLM's per-tensor and per-token
    quantisations.

    Parameters
    ----------
    quantized
        float8_e4m3fn of hidden's shape, filled.
    residual, weight, eps, weight_bias
        See :func:`add_rms_norm_cap_`.
    scale
        float32, one element, the scale of all rows.
    scales
        float32, one element for each row, filled: the row's largest magnitude over 448, at least ``1 / (448 * 512)``.
        One of scale and scales is given.
    hidden, axes, floors, slots, targets, lifts, norm_limits, projections
        See :mod:`axiscap.ops`, also for the errors. residual and projections are changed.

    Returns
    -------
    tuple[Tensor, Tensor]
        quantized and residual.

    Examples
    --------
    >>> hidden, residual = torch.tensor([[-3.0, 0.0]]), torch.tensor([[1.0, 2.0]])
    >>> bank, scales = (torch.tensor([[[1.0, 0.0]]]), torch.zeros(1, 1)), torch.empty(1, 1)
    >>> quantized = torch.empty_like(hidden, dtype=torch.float8_e4m3fn)
    >>> call = (quantized, hidden, residual, torch.ones(2), 0.0, *bank)
    >>> axiscap.ops.add_rms_norm_cap_fp8_(*call, scales=scales)[0].tolist(), round(scales.item() * 448, 3)
    ([[0.0, 448.0]], 1.414)
    """
    run = torch.ops.axiscap.add_rms_norm_cap_fp8_ if is_dynamo_compiling() else _C.add_rms_norm_cap_fp8_
    bank = {"targets": targets, "lifts": lifts, "norm_limits": norm_limits}
    options = bank | {"weight_bias": weight_bias, "projections": projections}
    run(quantized, hidden, residual, weight, eps, axes, floors, slots, scale=scale, scales=scales, **options)
    return quantized, residual


def cap_layers_(
    hiddens: Sequence[Tensor],
    axes: Tensor,
    floors: Tensor,
    slots: Tensor | None = None,
    *,
    targets: Tensor | None = None,
    lifts: Tensor | None = None,
    norm_limits: Tensor | None = None,
    projections: Tensor | None = None,
) -> list[Tensor]:
    """Caps L layers' streams in place, in one launch; returns them.

    Parameters
    ----------
    hiddens
        L tensors of one shape and dtype, each (..., H).
    axes, floors, slots, targets, lifts, norm_limits, projections
        See :mod:`axiscap.ops`, also for the errors; all but slots have a leading L. hiddens and projections change.

    Returns
    -------
    list[Tensor]
        hiddens.

    Examples
    --------
    >>> streams = [torch.tensor([[-1.0, 5.0]]), torch.tensor([[-2.0, 5.0]])]
    >>> axes = torch.tensor([[[1.0, 0.0]]]).expand(2, 1, 1, 2).contiguous()
    >>> [stream.tolist() for stream in axiscap.ops.cap_layers_(streams, axes, torch.zeros(2, 1, 1))]
    [[[0.0, 5.0]], [[0.0, 5.0]]]
    """
    streams = list(hiddens)
    run = torch.ops.axiscap.cap_layers_ if is_dynamo_compiling() else _C.cap_layers_
    run(streams, axes, floors, slots, targets=targets, lifts=lifts, norm_limits=norm_limits, projections=projections)
    return streams


def accumulate_(stats: Tensor, projections: Tensor, floors: Tensor, slots: Tensor | None = None) -> Tensor:
    """Adds the projections of one call to running statistics, in place; returns the statistics.

    For L layers at once: stats (L, S, K, F), projections (L, rows, K) of any stride between layers, floors (L, S, K).

    Parameters
    ----------
    stats
        (S, K, F) float64, made by :func:`new_stats`; changed.
    projections, floors, slots
        See :mod:`axiscap.ops`, also for the errors.

    Returns
    -------
    Tensor
        stats.

    Examples
    --------
    >>> stats = axiscap.ops.accumulate_(axiscap.ops.new_stats(1, 1), torch.tensor([[-1.0], [2.0]]), torch.zeros(1, 1))
    >>> stats[0, 0, :3].tolist()  # seen, fired, below
    [2.0, 1.0, 1.0]
    """
    run = torch.ops.axiscap.accumulate_ if is_dynamo_compiling() else _C.accumulate_
    run(stats, projections, floors, slots)
    return stats


def new_stats(slots: int, directions: int, device: torch.device | str | None = None) -> Tensor:
    """Statistics of no rows: (slots, directions, F) float64.

    Parameters
    ----------
    slots, directions, device
        S, K, and the device of the tensor.

    Returns
    -------
    Tensor
        (S, K, F) float64, the F fields of ``axiscap._C.STAT_FIELDS``.

    Examples
    --------
    >>> axiscap.ops.new_stats(2, 1).shape
    torch.Size([2, 1, 8])
    """
    stats = torch.zeros(slots, directions, len(_C.STAT_FIELDS), dtype=torch.float64, device=device)
    stats[..., _C.STAT_FIELDS.index("min")] = math.inf
    stats[..., _C.STAT_FIELDS.index("max")] = -math.inf
    return stats


# The ops in torch's dispatcher. The extension has the schemas and kernels; torch also needs fakes and derivatives.


def _fake(names: list[str], result: Callable[..., Any] | None) -> Callable[..., Any]:
    """An op without data: it gives the shapes of the result, and checks the devices, since the dispatcher takes it for
    a call with one meta tensor.
    """

    def fake(*positional: Any, **keywords: Any) -> Any:
        arguments = {**dict(zip(names, positional, strict=False)), **keywords}
        _check_devices(arguments)
        return result(**arguments) if result else None

    return fake


def _check_devices(arguments: dict[str, Any]) -> None:
    """Checks that the bank is on one device, and all tensors on that of the rows.

    Raises
    ------
    ValueError
        The message names the argument on another device.
    """
    devices = {name: value.device for name, value in arguments.items() if isinstance(value, Tensor)}
    if arguments.get("hiddens"):
        devices["hidden"], *others = (hidden.device for hidden in arguments["hiddens"])
        devices["hiddens"] = next((other for other in others if other != devices["hidden"]), devices["hidden"])
    rows = "hidden" if "hidden" in devices else "projections"  # accumulate_ has no hidden
    pairs = [(name, "axes") for name in ("floors", "targets", "lifts", "norm_limits")]
    pairs += [(name, rows) for name in devices]
    for name, owner in pairs:
        device, expected = devices.get(name), devices.get(owner)
        if device and expected and device != expected:
            raise ValueError(f"{name} must be on the device of {owner}, {expected}, got {device}")


def _refuse_negated(*_: Any, **__: Any) -> None:
    """Raises, since torch resolves negated views only for ops that return results."""
    raise ValueError("a negated view cannot be changed in place; use its resolve_neg()")


def _empty_cap(hidden: Tensor, axes: Tensor, **_: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    per_row = (math.prod(hidden.shape[:-1]), axes.shape[1])
    return (
        hidden.new_empty(hidden.shape),
        hidden.new_empty(per_row, dtype=torch.float32),
        hidden.new_empty(per_row, dtype=torch.bool),
    )


def _empty_project(hidden: Tensor, axes: Tensor, **_: Tensor | None) -> Tensor:
    return hidden.new_empty((*hidden.shape[:-1], axes.shape[1]), dtype=torch.float32)


def _setup_cap(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, axes, _, slots, _, lifts, _ = inputs
    _, projections, fired = output
    ctx.mark_non_differentiable(projections, fired)
    ctx.save_for_backward(axes, slots, lifts, fired)


def _differentiate_cap(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    """Where direction k fired, x -> x + (t - <x, v>) u has the Jacobian I - u v^T."""
    axes, slots, lifts, fired = ctx.saved_tensors
    g = grad.reshape(-1, grad.shape[-1]).float()
    if slots is None:
        axes, lifts = axes[:1], None if lifts is None else lifts[:1]
    # Each row is multiplied by the axes of all slots and keeps the product of its own slot. To gather the axes by row
    # would need a copy as large as the gradient.
    index = None if slots is None else slots.clamp(0, len(axes) - 1).long()[:, None]
    for k in reversed(range(axes.shape[1])):
        products = g @ (axes if lifts is None else lifts)[:, k].T
        product = products if index is None else products.gather(1, index)
        product = torch.where(fired[:, k, None], product, 0)
        weights = product if index is None else torch.zeros_like(products).scatter(1, index, product)
        g = torch.addmm(g, weights, axes[:, k], alpha=-1)
    return g.to(grad.dtype).reshape(grad.shape), *[None] * 6


def _setup_project(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    hidden, axes, slots = inputs
    ctx.save_for_backward(axes, slots, output)
    ctx.hidden_dtype = hidden.dtype


def _differentiate_project(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """The gradient of a row is the sum over its axes. A row that was left alone has projections NaN and no gradient."""
    axes, slots, projections = ctx.saved_tensors
    rows = grad.reshape(-1, grad.shape[-1])
    rows = torch.where(projections.reshape(rows.shape).isnan(), 0, rows)
    axes_of_rows = axes[:1].expand(len(rows), -1, -1) if slots is None else axes[slots.clamp(0, len(axes) - 1).long()]
    g = torch.einsum("nk,nkh->nh", rows, axes_of_rows)
    return g.to(ctx.hidden_dtype).reshape(*grad.shape[:-1], axes.shape[-1]), None, None


def _register() -> torch.library.Library:
    """Registers the ops. They exist as long as the library that this returns."""
    results: dict[str, Callable[..., Any]] = {"cap": _empty_cap, "project": _empty_project}
    library = torch.library.Library("axiscap", "DEF")  # type: ignore[no-untyped-call]
    for schema, names, kernel in _C.OPS:
        name = schema.partition("(")[0]
        library.define(schema)  # type: ignore[no-untyped-call]
        torch.library.register_fake(f"axiscap::{name}", _fake(names, results.get(name)), lib=library)
        kernels = {"CPU": kernel, "CUDA": kernel}
        if name not in results:  # the kernel refuses a changed argument that requires grad
            kernels |= {"Negative": _refuse_negated, "Autograd": torch.library.fallthrough_kernel}
        for key, function in kernels.items():
            library.impl(name, function, key)  # type: ignore[no-untyped-call]
    torch.library.register_autograd("axiscap::cap", _differentiate_cap, setup_context=_setup_cap, lib=library)
    torch.library.register_autograd(
        "axiscap::project", _differentiate_project, setup_context=_setup_project, lib=library
    )
    return library


_library = _register()
