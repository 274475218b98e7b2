"""The ops: activation capping on rows of a residual stream (arXiv 2601.10387, eq. 1), fused.

For a row x and its slot's directions k, in order, in float32: ``p = <x, v_k>; if p < tau_k: x += (tau_k - p) * u_k``,
with ``u = v`` (the paper's equation) unless lifts are given. A row in which nothing fires is not written. A row whose
projection is not finite or lies beyond its limit, or that its correction would take out of its dtype's range, is left
as it is, and its projections are NaN. A row's result depends on its own bits, H, dtype and slot alone.

Common arguments:

- hidden: (..., H), float32, bfloat16 or float16; last stride 1, rows with one uniform stride. ``rows`` below is the
  product of the leading dimensions.
- axes: (S, K, H) float32, contiguous, unit length. floors: (S, K) float32; ``-inf`` switches a direction off.
- lifts: like axes; what a row is corrected along, where that is not the axis that it is read along. ``<axis, lift>`` is
  1, so that the reading ends on the floor, or a strength between 0 and 1; its elements are below 2^60. None: the axes.
- limits: like floors, positive; a row with ``|<x, v_k>| > limit_k`` in any direction, as it came, is left alone: no row
  of ordinary norm can have such a projection, and an attention sink can. None, or inf: no limit.
- slots: (rows,) int32, the bank's slot of each row; -1 leaves a row alone (its projections are NaN). None: slot 0.
- projections: (rows, K) float32, filled with ``<row, v_k>`` before the cap.

All on one device. Errors, before anything is changed: TypeError for a dtype, ValueError for a shape, stride or device,
IndexError for a slot outside [0, S) other than -1 (on CPU; an accelerator leaves that row alone and reports NaN). Unit
length is the caller's promise here; :class:`axiscap.CapProfile` and ``axiscap.install`` check it.

The functions call the kernels directly; under ``torch.compile`` and ``torch.export`` they become
``torch.ops.axiscap.*``, which is the same code behind the dispatcher. ``torch.ops.axiscap.cap_.buffers(hidden, axes,
floors, slots, projections, lifts, limits)`` and ``cap_residual_.buffers(hidden, residual, axes, ...)`` are for graphs
that keep slots and projections at fixed addresses: both may be longer than the step, whose rows are the first of them.
(Where vLLM compiles, a slice of a buffer would be copied before the call and after it.)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._functorch.autograd_function import enable_single_level_autograd_function  # type: ignore[attr-defined]
from torch.autograd import forward_ad
from torch.autograd.function import _SingleLevelFunction
from torch.utils._pytree import tree_leaves, tree_map_only

from axiscap import _C, fake


def cap_(
    hidden: Tensor,
    axes: Tensor,
    floors: Tensor,
    slots: Tensor | None = None,
    *,
    lifts: Tensor | None = None,
    limits: Tensor | None = None,
    projections: Tensor | None = None,
) -> Tensor:
    """Caps hidden in place and returns it.

    Parameters
    ----------
    hidden
        (..., H) float32, bfloat16 or float16; last stride 1, rows with one uniform stride.
    axes
        (S, K, H) float32, contiguous, rows of unit length.
    floors
        (S, K) float32, in the units of the projection; ``-inf`` switches a direction off.
    slots
        (rows,) int32, each row's slot; -1 leaves a row alone. None: slot 0.
    lifts
        like axes: what rows are corrected along. None: the axes.
    limits
        like floors, positive: a row with a larger projection, of either sign, is left alone.
    projections
        (rows, K) float32, filled with the projections before the cap.

    Returns
    -------
    Tensor
        hidden.

    Raises
    ------
    TypeError
        a tensor has another dtype.
    ValueError
        a shape, a stride or a device does not fit, or what is changed shares memory with the rest.
    IndexError
        a slot lies outside of [0, S) and is not -1 (on a CPU).

    Examples
    --------
    >>> from axiscap import ops
    >>> hidden, axes = torch.tensor([[-1.0, 5.0], [2.0, 5.0]]), torch.tensor([[[1.0, 0.0]]])
    >>> ops.cap_(hidden, axes, torch.zeros(1, 1)).tolist()
    [[0.0, 5.0], [2.0, 5.0]]
    """
    if torch.compiler.is_compiling():
        torch.ops.axiscap.cap_(hidden, axes, floors, slots, lifts=lifts, limits=limits, projections=projections)
    else:
        _C.cap_(hidden, axes, floors, slots, lifts, limits, projections)
    return hidden


def cap(
    hidden: Tensor,
    axes: Tensor,
    floors: Tensor,
    slots: Tensor | None = None,
    *,
    lifts: Tensor | None = None,
    limits: Tensor | None = None,
    projections: Tensor | None = None,
) -> Tensor:
    """The capped copy of hidden, contiguous.

    Differentiable with respect to hidden: where directions fired, the gradient is multiplied by ``I - v u^T`` of each
    of them, in reverse order. All else is constant.

    Parameters
    ----------
    hidden
        (..., H) float32, bfloat16 or float16; last stride 1, rows with one uniform stride.
    axes
        (S, K, H) float32, contiguous, rows of unit length.
    floors
        (S, K) float32, in the units of the projection; ``-inf`` switches a direction off.
    slots
        (rows,) int32, each row's slot; -1 leaves a row alone. None: slot 0.
    lifts
        like axes: what rows are corrected along. None: the axes.
    limits
        like floors, positive: a row with a larger projection, of either sign, is left alone.
    projections
        (rows, K) float32, filled with the projections before the cap.

    Returns
    -------
    Tensor
        Of hidden's shape and dtype.

    Raises
    ------
    TypeError
        a tensor has another dtype.
    ValueError
        a shape, a stride or a device does not fit, or what is changed shares memory with the rest.
    IndexError
        a slot lies outside of [0, S) and is not -1 (on a CPU).

    Examples
    --------
    >>> from axiscap import ops
    >>> hidden = torch.tensor([[-1.0, 5.0], [2.0, 5.0]], requires_grad=True)
    >>> capped = ops.cap(hidden, torch.tensor([[[1.0, 0.0]]]), torch.zeros(1, 1))
    >>> capped.sum().backward()
    >>> hidden.grad.tolist()
    [[0.0, 1.0], [1.0, 1.0]]
    """
    out, incoming, _ = torch.ops.axiscap.cap(hidden, axes, floors, slots, lifts, limits)
    if projections is not None:
        projections.copy_(incoming.detach())
    return out  # type: ignore[no-any-return]


def project(hidden: Tensor, axes: Tensor, slots: Tensor | None = None) -> Tensor:
    """``<row, v_k>`` in float32, shape hidden.shape[:-1] + (K,). Differentiable with respect to hidden.

    Parameters
    ----------
    hidden
        (..., H) float32, bfloat16 or float16; last stride 1, rows with one uniform stride.
    axes
        (S, K, H) float32, contiguous, rows of unit length.
    slots
        (rows,) int32, each row's slot; -1 leaves a row alone. None: slot 0.

    Returns
    -------
    Tensor
        NaN for rows that are not finite or have slot -1.

    Raises
    ------
    TypeError
        a tensor has another dtype.
    ValueError
        a shape, a stride or a device does not fit, or what is changed shares memory with the rest.
    IndexError
        a slot lies outside of [0, S) and is not -1 (on a CPU).

    Examples
    --------
    >>> from axiscap import ops
    >>> ops.project(torch.tensor([[3.0, 5.0]]), torch.tensor([[[1.0, 0.0]]])).tolist()
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
    lifts: Tensor | None = None,
    limits: Tensor | None = None,
    projections: Tensor | None = None,
) -> Tensor:
    """Caps the block output hidden + residual by changing residual, in place; returns residual.

    The sum is taken in float32 and not rounded; residual has the shape and dtype of hidden.

    Parameters
    ----------
    hidden
        (..., H) float32, bfloat16 or float16; last stride 1, rows with one uniform stride.
    residual
        of hidden's shape and dtype; changed.
    axes
        (S, K, H) float32, contiguous, rows of unit length.
    floors
        (S, K) float32, in the units of the projection; ``-inf`` switches a direction off.
    slots
        (rows,) int32, each row's slot; -1 leaves a row alone. None: slot 0.
    lifts
        like axes: what rows are corrected along. None: the axes.
    limits
        like floors, positive: a row with a larger projection, of either sign, is left alone.
    projections
        (rows, K) float32, filled with the projections before the cap.

    Returns
    -------
    Tensor
        residual.

    Raises
    ------
    TypeError
        a tensor has another dtype.
    ValueError
        a shape, a stride or a device does not fit, or what is changed shares memory with the rest.
    IndexError
        a slot lies outside of [0, S) and is not -1 (on a CPU).

    Examples
    --------
    >>> from axiscap import ops
    >>> hidden, residual = torch.tensor([[-3.0, 0.0]]), torch.tensor([[1.0, 2.0]])
    >>> ops.cap_residual_(hidden, residual, torch.tensor([[[1.0, 0.0]]]), torch.zeros(1, 1)).tolist()
    [[3.0, 2.0]]
    """
    if torch.compiler.is_compiling():
        torch.ops.axiscap.cap_residual_(
            hidden, residual, axes, floors, slots, lifts=lifts, limits=limits, projections=projections
        )
    else:
        _C.cap_residual_(hidden, residual, axes, floors, slots, lifts, limits, projections)
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
    lifts: Tensor | None = None,
    limits: Tensor | None = None,
    projections: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The residual add and the norm before a block, with the cap between them; returns (hidden, residual), changed.

    ``residual <- cap(hidden + residual)``, ``hidden <- residual / sqrt(mean(residual^2) + eps) * (weight +
    weight_bias)``. The sum is taken in float32 and rounded once, when it is stored; the norm is that of the stored row.
    A row that is not capped (slot -1) gets exactly the bits of the add and the norm alone.

    Parameters
    ----------
    hidden
        (..., H) float32, bfloat16 or float16; last stride 1, rows with one uniform stride.
    residual
        of hidden's shape and dtype; changed, as hidden is.
    weight
        (H,), of hidden's dtype.
    eps
        what is added to the mean of squares.
    axes
        (S, K, H) float32, contiguous, rows of unit length.
    floors
        (S, K) float32, in the units of the projection; ``-inf`` switches a direction off.
    slots
        (rows,) int32, each row's slot; -1 leaves a row alone. None: slot 0.
    weight_bias
        1 for Gemma, whose weights are stored less 1.
    lifts
        like axes: what rows are corrected along. None: the axes.
    limits
        like floors, positive: a row with a larger projection, of either sign, is left alone.
    projections
        (rows, K) float32, filled with the projections before the cap.

    Returns
    -------
    tuple[Tensor, Tensor]
        hidden and residual.

    Raises
    ------
    TypeError
        a tensor has another dtype.
    ValueError
        a shape, a stride or a device does not fit, or what is changed shares memory with the rest.
    IndexError
        a slot lies outside of [0, S) and is not -1 (on a CPU).

    Examples
    --------
    >>> from axiscap import ops
    >>> hidden, residual = torch.tensor([[-3.0, 0.0]]), torch.tensor([[1.0, 2.0]])
    >>> bank = torch.tensor([[[1.0, 0.0]]]), torch.zeros(1, 1)
    >>> normed, stream = ops.add_rms_norm_cap_(hidden, residual, torch.ones(2), 0.0, *bank)
    >>> stream.tolist(), [round(value, 3) for value in normed[0].tolist()]
    ([[0.0, 2.0]], [0.0, 1.414])
    """
    if torch.compiler.is_compiling():
        torch.ops.axiscap.add_rms_norm_cap_(
            hidden,
            residual,
            weight,
            eps,
            axes,
            floors,
            slots,
            weight_bias=weight_bias,
            lifts=lifts,
            limits=limits,
            projections=projections,
        )
    else:
        _C.add_rms_norm_cap_(
            hidden, residual, weight, eps, axes, floors, slots, weight_bias, lifts, limits, projections
        )
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
    lifts: Tensor | None = None,
    limits: Tensor | None = None,
    projections: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """add_rms_norm_cap_ for an fp8 matrix: the norm goes to quantized, hidden stays; returns (quantized, residual).

    ``residual <- cap(hidden + residual)``, ``quantized <- round(clamp(norm(residual) * (1 / scale), -448, 448))``. The
    norm is rounded to hidden's dtype before it is scaled: the bits are those of :func:`add_rms_norm_cap_` and a
    quantisation behind it. The scale is one for all rows, or each row's own, as vLLM's per-tensor and per-token
    quantisations have it.

    Parameters
    ----------
    quantized
        float8_e4m3fn of hidden's shape, filled.
    hidden
        (..., H) float32, bfloat16 or float16; last stride 1, rows with one uniform stride.
    residual
        of hidden's shape and dtype; changed.
    weight
        (H,), of hidden's dtype.
    eps
        what is added to the mean of squares.
    axes
        (S, K, H) float32, contiguous, rows of unit length.
    floors
        (S, K) float32, in the units of the projection; ``-inf`` switches a direction off.
    slots
        (rows,) int32, each row's slot; -1 leaves a row alone. None: slot 0.
    weight_bias
        1 for Gemma, whose weights are stored less 1.
    scale
        float32, one element, the scale of all rows.
    scales
        float32, one element for each row, filled: the row's largest magnitude over 448, at least ``1 / (448 * 512)``.
        One of scale and scales is given.
    lifts
        like axes: what rows are corrected along. None: the axes.
    limits
        like floors, positive: a row with a larger projection, of either sign, is left alone.
    projections
        (rows, K) float32, filled with the projections before the cap.

    Returns
    -------
    tuple[Tensor, Tensor]
        quantized and residual.

    Raises
    ------
    TypeError
        a tensor has another dtype.
    ValueError
        a shape, a stride or a device does not fit, what is changed shares memory with the rest, or both or none of
        scale and scales are given.
    IndexError
        a slot lies outside of [0, S) and is not -1 (on a CPU).

    Examples
    --------
    >>> from axiscap import ops
    >>> hidden, residual = torch.tensor([[-3.0, 0.0]]), torch.tensor([[1.0, 2.0]])
    >>> bank, scales = (torch.tensor([[[1.0, 0.0]]]), torch.zeros(1, 1)), torch.empty(1, 1)
    >>> quantized = torch.empty_like(hidden, dtype=torch.float8_e4m3fn)
    >>> call = (quantized, hidden, residual, torch.ones(2), 0.0, *bank)
    >>> ops.add_rms_norm_cap_fp8_(*call, scales=scales)[0].tolist(), round(scales.item() * 448, 3)
    ([[0.0, 448.0]], 1.414)
    """
    if torch.compiler.is_compiling():
        torch.ops.axiscap.add_rms_norm_cap_fp8_(
            quantized,
            hidden,
            residual,
            weight,
            eps,
            axes,
            floors,
            slots,
            weight_bias=weight_bias,
            scale=scale,
            scales=scales,
            lifts=lifts,
            limits=limits,
            projections=projections,
        )
    else:
        given = quantized, hidden, residual, weight, eps, axes, floors, slots
        _C.add_rms_norm_cap_fp8_(*given, weight_bias, scale, scales, lifts, limits, projections)
    return quantized, residual


def cap_layers_(
    hiddens: Sequence[Tensor],
    axes: Tensor,
    floors: Tensor,
    slots: Tensor | None = None,
    *,
    lifts: Tensor | None = None,
    limits: Tensor | None = None,
    projections: Tensor | None = None,
) -> list[Tensor]:
    """Caps L layers' streams in place, in one launch; returns them.

    Parameters
    ----------
    hiddens
        L tensors of one shape and dtype, each (..., H); changed.
    axes
        (L, S, K, H) float32.
    floors
        (L, S, K) float32.
    slots
        (rows,) int32, shared by the layers.
    lifts
        like axes.
    limits
        like floors.
    projections
        (L, rows, K) float32, filled.

    Returns
    -------
    list[Tensor]
        hiddens.

    Raises
    ------
    TypeError
        a tensor has another dtype.
    ValueError
        a shape, a stride or a device does not fit, or what is changed shares memory with the rest.
    IndexError
        a slot lies outside of [0, S) and is not -1 (on a CPU).

    Examples
    --------
    >>> from axiscap import ops
    >>> streams = [torch.tensor([[-1.0, 5.0]]), torch.tensor([[-2.0, 5.0]])]
    >>> axes = torch.tensor([[[1.0, 0.0]]]).expand(2, 1, 1, 2).contiguous()
    >>> [stream.tolist() for stream in ops.cap_layers_(streams, axes, torch.zeros(2, 1, 1))]
    [[[0.0, 5.0]], [[0.0, 5.0]]]
    """
    streams = list(hiddens)
    if torch.compiler.is_compiling():
        torch.ops.axiscap.cap_layers_(streams, axes, floors, slots, lifts=lifts, limits=limits, projections=projections)
    else:
        _C.cap_layers_(streams, axes, floors, slots, lifts, limits, projections)
    return streams


def accumulate_(stats: Tensor, projections: Tensor, floors: Tensor, slots: Tensor | None = None) -> Tensor:
    """Adds one call's projections (rows, K) to running statistics, in place; returns them.

    L layers at once: stats (L, S, K, F), projections (L, rows, K), of any stride between layers, and floors (L, S, K);
    slots are shared.

    Parameters
    ----------
    stats
        (S, K, F) float64, the F fields of ``axiscap._C.STAT_FIELDS``, made by :func:`new_stats`; changed.
    projections
        (rows, K) float32, of one call.
    floors
        (S, K) float32.
    slots
        (rows,) int32; None: slot 0.

    Returns
    -------
    Tensor
        stats.

    Raises
    ------
    TypeError
        a tensor has another dtype.
    ValueError
        a shape, a stride or a device does not fit, or what is changed shares memory with the rest.
    IndexError
        a slot lies outside of [0, S) and is not -1 (on a CPU).

    Examples
    --------
    >>> from axiscap import ops
    >>> stats = ops.accumulate_(ops.new_stats(1, 1), torch.tensor([[-1.0], [2.0]]), torch.zeros(1, 1))
    >>> stats[0, 0, :3].tolist()  # seen, fired, below
    [2.0, 1.0, 1.0]
    """
    if torch.compiler.is_compiling():
        torch.ops.axiscap.accumulate_(stats, projections, floors, slots)
    else:
        _C.accumulate_(stats, projections, floors, slots)
    return stats


def new_stats(slots: int, directions: int, device: torch.device | str | None = None) -> Tensor:
    """Statistics of no rows: (slots, directions, F) float64.

    Parameters
    ----------
    slots
        S.
    directions
        K.
    device
        of the tensor.

    Returns
    -------
    Tensor
        (S, K, F) float64.

    Examples
    --------
    >>> from axiscap import ops
    >>> ops.new_stats(2, 1).shape
    torch.Size([2, 1, 8])
    """
    stats = torch.zeros(slots, directions, len(_C.STAT_FIELDS), dtype=torch.float64, device=device)
    stats[..., _C.STAT_FIELDS.index("min")] = math.inf
    stats[..., _C.STAT_FIELDS.index("max")] = -math.inf
    return stats


# The derivatives of the functional ops: backward, forward mode, and vmap; and what negated views need.


def _axes_of_rows(axes: Tensor, slots: Tensor | None, rows: int) -> Tensor:
    """(rows, K, H); a row without a slot gets some slot's, which its caller leaves unused."""
    return axes[:1].expand(rows, -1, -1) if slots is None else axes[slots.clamp(0, len(axes) - 1).long()]


def _in_rows(info: Any, in_dims: tuple[int | None, ...], hidden: Tensor, slots: Tensor | None) -> tuple[Any, ...]:
    """hidden (B, ..., H) and slots (B * rows,) of a vmapped call, in which only those two may be batched."""
    at, *others = in_dims
    if any(dim is not None for dim in others):
        raise NotImplementedError("vmap over axes, floors, slots, lifts or limits; give each row its slot instead")
    hidden = hidden.movedim(at, 0) if at is not None else hidden.expand(info.batch_size, *hidden.shape)
    return hidden.contiguous(), None if slots is None else slots.repeat(info.batch_size)


def _below(op: Any, *inputs: Any) -> Any:
    """A Function's op below autograd; the last of the inputs is the set of keys that it was called with."""
    *given, keyset = inputs
    # Enabled again, since a Function runs without: what lies below may be another level of functorch's.
    with torch._C._AutoDispatchBelowAutograd(), torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
        return op.redispatch(keyset & torch._C._after_autograd_keyset, *given)


class _Cap(_SingleLevelFunction):
    """Where direction k fired, x -> x + (tau - <x, v>) u has the Jacobian I - u v^T."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        return _below(torch.ops.axiscap.cap.default, *inputs)  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _, axes, _, slots, lifts, *_ = inputs
        _, projections, fired = output
        ctx.mark_non_differentiable(projections, fired)
        ctx.save_for_backward(axes, slots, lifts, fired)
        ctx.save_for_forward(axes, slots, lifts, fired)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        axes, slots, lifts, fired = ctx.saved_tensors
        g = grad.reshape(-1, grad.shape[-1]).float()
        if slots is None:
            axes, lifts = axes[:1], None if lifts is None else lifts[:1]
        # Products with the axes of all slots, of which each row keeps its own: a copy of its axis for each row would be
        # as large as the gradient.
        own = None if slots is None else slots.clamp(0, len(axes) - 1).long()[:, None]
        for k in reversed(range(axes.shape[1])):
            along = g @ (axes if lifts is None else lifts)[:, k].T
            mine = along if own is None else along.gather(1, own)
            mine = torch.where(fired[:, k, None], mine, 0)
            weights = mine if own is None else torch.zeros_like(along).scatter(1, own, mine)
            g = torch.addmm(g, weights, axes[:, k], alpha=-1)
        return g.to(grad.dtype).reshape(grad.shape), *[None] * 6

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: Any) -> tuple[Tensor, None, None]:
        axes, slots, lifts, fired = ctx.saved_tensors
        t = tangent.reshape(-1, tangent.shape[-1]).float()
        v = _axes_of_rows(axes, slots, len(t))
        u = v if lifts is None else _axes_of_rows(lifts, slots, len(t))
        for k in range(axes.shape[1]):
            along = (t * v[:, k]).sum(-1, keepdim=True) * u[:, k]
            t = torch.where(fired[:, k, None], t - along, t)
        return t.to(tangent.dtype).reshape(tangent.shape), None, None


class _Project(_SingleLevelFunction):
    """A row that was left alone has projections NaN, which nothing flows through."""

    @staticmethod
    def forward(*inputs: Any) -> Tensor:
        return _below(torch.ops.axiscap.project.default, *inputs)  # type: ignore[no-any-return]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        hidden, axes, slots, _ = inputs
        ctx.save_for_backward(axes, slots, output)
        ctx.save_for_forward(axes, slots, output)
        ctx.hidden_dtype = hidden.dtype

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        axes, slots, projections = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1])
        rows = torch.where(projections.reshape(rows.shape).isnan(), 0, rows)
        g = torch.einsum("nk,nkh->nh", rows, _axes_of_rows(axes, slots, len(rows)))
        return g.to(ctx.hidden_dtype).reshape(*grad.shape[:-1], axes.shape[-1]), None, None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: Any) -> Tensor:
        axes, slots, projections = ctx.saved_tensors
        t = tangent.reshape(-1, tangent.shape[-1]).float()
        found = torch.einsum("nh,nkh->nk", t, _axes_of_rows(axes, slots, len(t))).reshape(projections.shape)
        return torch.where(projections.isnan(), 0, found)


def _vmap_cap(
    info: Any,
    in_dims: Any,
    hidden: Tensor,
    axes: Tensor,
    floors: Tensor,
    slots: Tensor | None = None,
    *more: Tensor | None,
) -> tuple[Any, Any]:
    hidden, slots = _in_rows(info, in_dims, hidden, slots)
    out, *per_row = torch.ops.axiscap.cap(hidden, axes, floors, slots, *more)
    return (out, *(part.reshape(info.batch_size, -1, part.shape[-1]) for part in per_row)), (0, 0, 0)


def _vmap_project(
    info: Any, in_dims: Any, hidden: Tensor, axes: Tensor, slots: Tensor | None = None
) -> tuple[Any, Any]:
    hidden, slots = _in_rows(info, in_dims, hidden, slots)
    return torch.ops.axiscap.project(hidden, axes, slots), 0


def _derived(op: Any, function: Any) -> Any:
    """The op's kernel for autograd. What functorch leaves to it is one level of derivatives."""
    arguments = op._schema.arguments

    def kernel(keyset: Any, *inputs: Any) -> Any:
        inputs += (None,) * (
            len(arguments) - len(inputs)
        )  # the dispatcher leaves out the last ones where they are None
        hidden = inputs[0]
        if not (hidden.requires_grad and torch.is_grad_enabled()) and forward_ad._current_level < 0:
            with torch._C._AutoDispatchBelowAutograd():
                return op.redispatch(keyset & torch._C._after_autograd_keyset, *inputs)
        with enable_single_level_autograd_function():
            return function.apply(*inputs, keyset)

    return kernel


_library = torch.library.Library("axiscap", "IMPL")  # type: ignore[no-untyped-call]  # what it registered goes with it
for _name, _function, _vmap in (("cap", _Cap, _vmap_cap), ("project", _Project, _vmap_project)):
    _kernel = _derived(getattr(torch.ops.axiscap, _name).default, _function)
    _library.impl(_name, _kernel, "Autograd", with_keyset=True)  # type: ignore[no-untyped-call]
    torch.library.register_vmap(f"axiscap::{_name}", _vmap)


def _resolved(op: Any) -> Any:
    """The kernel of an op that changes arguments, for negated views: torch's fallback works for ops with results."""
    arguments = op._schema.arguments
    changed = [given.name for given in arguments if given.alias_info is not None and given.alias_info.is_write]

    def kernel(*inputs: Any, **keywords: Any) -> None:
        given = {argument.name: value for argument, value in zip(arguments, inputs, strict=False)} | keywords
        resolved = tree_map_only(Tensor, Tensor.resolve_neg, given)
        op(**resolved)
        for name in changed:
            for tensor, copy in zip(tree_leaves(given.get(name)), tree_leaves(resolved.get(name)), strict=True):
                if copy is not tensor:
                    tensor.copy_(copy)

    return kernel


for _name in fake.KERNELS.keys() - {"cap", "project"}:
    _packet = getattr(torch.ops.axiscap, _name.removesuffix(".buffers"))
    _kernel = _resolved(_packet.buffers if _name.endswith(".buffers") else _packet.default)
    _library.impl(_name, _kernel, "Negative")  # type: ignore[no-untyped-call]
