"""Every op in plain torch: the reference for the tests of the kernels.

The code follows the definition (arXiv 2601.10387, eq. 1): ``h <- h - v * min(<h, v> - tau, 0)``. Arithmetic runs in
float32, or in float64 if hidden is float64. Shapes are those of :mod:`axiscap.ops`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

#: The largest number of float8_e4m3fn.
_FP8_MAX = 448.0


class _Directions:
    """Rows x (N, H) in the dtype of the arithmetic, with the directions of each row: axes and lifts (N, K, H), floors
    and targets (N, K), norm_limits (N,). ``has_slot`` (N,): False for rows that are left alone.
    """

    def __init__(
        self,
        hidden: Tensor,
        axes: Tensor,
        floors: Tensor,
        slots: Tensor | None,
        targets: Tensor | None,
        lifts: Tensor | None,
        norm_limits: Tensor | None,
    ) -> None:
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        self.x = hidden.reshape(-1, hidden.shape[-1]).to(dtype)
        device = self.x.device
        index = torch.zeros(len(self.x), dtype=torch.long, device=device) if slots is None else slots.long()
        if bool(((index < -1) | (index >= len(axes))).any()):
            raise IndexError(f"slots must be in [0, {len(axes)}) or -1")
        self.has_slot, index = index >= 0, index.clamp(min=0)
        self.axes, self.floors = axes.to(dtype)[index], floors.to(dtype)[index]
        self.targets = self.floors if targets is None else targets.to(dtype)[index]
        self.lifts = self.axes if lifts is None else lifts.to(dtype)[index]
        no_limits = torch.full((len(self.x),), torch.inf, dtype=dtype, device=device)
        self.norm_limits = no_limits if norm_limits is None else norm_limits.to(dtype)[index]

    def cap(self, x: Tensor, rows: Tensor, rows_are_summand: bool = False) -> tuple[Tensor, Tensor]:
        """Applies the directions in order to x (N, H).

        Parameters
        ----------
        rows
            (N, H) in the dtype of the stream, which becomes x in the rows that fired.
        rows_are_summand
            x is the sum of rows and another stream, so that the correction is added to rows.

        Returns
        -------
        tuple[Tensor, Tensor]
            The capped rows, and the projections before the cap (N, K).
        """
        x_before = x
        projections = torch.einsum("nh,nkh->nk", x, self.axes)
        fired = torch.zeros_like(self.has_slot)
        admitted = self.has_slot & projections.isfinite().all(-1)
        admitted = admitted & ~(x.square().sum(-1) > self.norm_limits.square())
        for k in range(self.axes.shape[1]):
            p = (x * self.axes[:, k]).sum(-1)
            fires = p < self.floors[:, k]
            delta = torch.where(fires, self.targets[:, k] - p, 0)
            admitted = admitted & p.isfinite() & delta.isfinite()
            x = torch.where(fires[:, None], x + delta[:, None] * self.lifts[:, k], x)
            fired = fired | fires
        capped = (rows.to(x.dtype) + (x - x_before) if rows_are_summand else x).to(rows.dtype)
        # A row whose correction leaves the range of its dtype is not admitted either.
        admitted = admitted & (capped.isfinite().all(-1) | ~fired)
        projections = torch.where(admitted[:, None], projections, torch.nan)
        return torch.where((fired & admitted)[:, None], capped, rows), projections


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
    """The capped copy of hidden. Differentiable with respect to hidden.

    Parameters
    ----------
    hidden, axes, floors, slots, targets, lifts, norm_limits, projections
        See :mod:`axiscap.ops`.

    Returns
    -------
    Tensor
        Of hidden's shape and dtype.

    Examples
    --------
    >>> from axiscap import reference
    >>> hidden, axes = torch.tensor([[-1.0, 5.0], [2.0, 5.0]]), torch.tensor([[[1.0, 0.0]]])
    >>> reference.cap(hidden, axes, torch.zeros(1, 1)).tolist()
    [[0.0, 5.0], [2.0, 5.0]]
    """
    directions = _Directions(hidden, axes, floors, slots, targets, lifts, norm_limits)
    capped, before = directions.cap(directions.x, hidden.reshape(directions.x.shape))
    if projections is not None:
        projections.copy_(before.detach())
    return capped.reshape(hidden.shape)


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
        See :mod:`axiscap.ops`.

    Returns
    -------
    Tensor
        hidden.

    Examples
    --------
    >>> from axiscap import reference
    >>> hidden, axes = torch.tensor([[-1.0, 5.0]]), torch.tensor([[[1.0, 0.0]]])
    >>> reference.cap_(hidden, axes, torch.zeros(1, 1)) is hidden
    True
    """
    return hidden.copy_(
        cap(hidden, axes, floors, slots, targets=targets, lifts=lifts, norm_limits=norm_limits, projections=projections)
    )


def project(hidden: Tensor, axes: Tensor, slots: Tensor | None = None) -> Tensor:
    """<row, v_k>: shape hidden.shape[:-1] + (K,). NaN for a row that is not finite or has slot -1.

    Parameters
    ----------
    hidden, axes, slots
        See :mod:`axiscap.ops`.

    Returns
    -------
    Tensor
        In hidden's dtype, at least float32.

    Examples
    --------
    >>> from axiscap import reference
    >>> reference.project(torch.tensor([[3.0, 5.0]]), torch.tensor([[[1.0, 0.0]]])).tolist()
    [[3.0]]
    """
    off = torch.full(axes.shape[:2], -torch.inf, dtype=axes.dtype, device=axes.device)
    directions = _Directions(hidden, axes, off, slots, None, None, None)
    return directions.cap(directions.x, directions.x)[1].reshape(*hidden.shape[:-1], axes.shape[1])


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
    """Caps the sum hidden + residual by changing residual, in place; returns residual.

    Parameters
    ----------
    hidden, residual, axes, floors, slots, targets, lifts, norm_limits, projections
        See :mod:`axiscap.ops`.

    Returns
    -------
    Tensor
        residual.

    Examples
    --------
    >>> from axiscap import reference
    >>> hidden, residual = torch.tensor([[-3.0, 0.0]]), torch.tensor([[1.0, 2.0]])
    >>> reference.cap_residual_(hidden, residual, torch.tensor([[[1.0, 0.0]]]), torch.zeros(1, 1)).tolist()
    [[3.0, 2.0]]
    """
    directions = _Directions(hidden, axes, floors, slots, targets, lifts, norm_limits)
    rows = residual.reshape(directions.x.shape)
    capped, before = directions.cap(directions.x + rows.to(directions.x.dtype), rows, rows_are_summand=True)
    if projections is not None:
        projections.copy_(before)
    return residual.copy_(capped.reshape(residual.shape))


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
    """residual <- cap(hidden + residual); hidden <- the RMS norm of the stored residual, times weight + weight_bias.

    Parameters
    ----------
    weight
        (H,), of hidden's dtype.
    eps
        what is added to the mean of squares.
    weight_bias
        1 for Gemma, whose weights are stored less 1.
    hidden, residual, axes, floors, slots, targets, lifts, norm_limits, projections
        See :mod:`axiscap.ops`.

    Returns
    -------
    tuple[Tensor, Tensor]
        hidden and residual.

    Examples
    --------
    >>> from axiscap import reference
    >>> hidden, residual = torch.tensor([[-3.0, 0.0]]), torch.tensor([[1.0, 2.0]])
    >>> bank = torch.tensor([[[1.0, 0.0]]]), torch.zeros(1, 1)
    >>> reference.add_rms_norm_cap_(hidden, residual, torch.ones(2), 0.0, *bank)[1].tolist()
    [[0.0, 2.0]]
    """
    directions = _Directions(hidden, axes, floors, slots, targets, lifts, norm_limits)
    x = directions.x + residual.reshape(directions.x.shape).to(directions.x.dtype)
    capped, before = directions.cap(x, x.to(residual.dtype))
    if projections is not None:
        projections.copy_(before)
    residual.copy_(capped.reshape(residual.shape))
    y = residual.to(x.dtype)
    scale = (y.square().mean(-1, keepdim=True) + eps).rsqrt()
    return hidden.copy_(y * scale * (weight.to(x.dtype) + weight_bias)), residual


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
    """add_rms_norm_cap_ whose norm, rounded to hidden's dtype, is divided by a scale and rounded to fp8.

    Parameters
    ----------
    quantized
        float8_e4m3fn of hidden's shape, filled.
    weight
        (H,), of hidden's dtype.
    eps
        what is added to the mean of squares.
    weight_bias
        1 for Gemma, whose weights are stored less 1.
    scale
        float32, one element, the scale of all rows.
    scales
        float32, one element for each row, filled: the row's largest magnitude over 448, at least ``1 / (448 * 512)``.
        One of scale and scales is given.
    hidden, residual, axes, floors, slots, targets, lifts, norm_limits, projections
        See :mod:`axiscap.ops`.

    Returns
    -------
    tuple[Tensor, Tensor]
        quantized and residual.

    Examples
    --------
    >>> from axiscap import reference
    >>> hidden, residual = torch.tensor([[-3.0, 0.0]]), torch.tensor([[1.0, 2.0]])
    >>> bank, scales = (torch.tensor([[[1.0, 0.0]]]), torch.zeros(1, 1)), torch.empty(1, 1)
    >>> quantized = torch.empty_like(hidden, dtype=torch.float8_e4m3fn)
    >>> call = (quantized, hidden, residual, torch.ones(2), 0.0, *bank)
    >>> reference.add_rms_norm_cap_fp8_(*call, scales=scales)[0].tolist()
    [[0.0, 448.0]]
    """
    more: dict[str, Any] = {"targets": targets, "lifts": lifts, "norm_limits": norm_limits, "projections": projections}
    normed, _ = add_rms_norm_cap_(
        hidden.clone(), residual, weight, eps, axes, floors, slots, weight_bias=weight_bias, **more
    )
    rows = normed.float()
    if scales is not None:
        largest = rows.abs().amax(-1, keepdim=True)
        scale = (largest / _FP8_MAX).clamp(min=1 / (_FP8_MAX * 512))
        scales.copy_(scale.reshape(scales.shape))
    assert scale is not None
    return quantized.copy_((rows * scale.reciprocal()).clamp(-_FP8_MAX, _FP8_MAX)), residual


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
    """cap_ for each layer l, with axes[l] (S, K, H), floors[l] (S, K) and so on.

    Parameters
    ----------
    hiddens, axes, floors, slots, targets, lifts, norm_limits, projections
        See :mod:`axiscap.ops`; all but slots have a leading L.

    Returns
    -------
    list[Tensor]
        hiddens.

    Examples
    --------
    >>> from axiscap import reference
    >>> axes = torch.tensor([[[1.0, 0.0]]]).expand(2, 1, 1, 2)
    >>> streams = [torch.tensor([[-1.0, 5.0]]), torch.tensor([[-2.0, 5.0]])]
    >>> [stream.tolist() for stream in reference.cap_layers_(streams, axes, torch.zeros(2, 1, 1))]
    [[[0.0, 5.0]], [[0.0, 5.0]]]
    """

    def at(tensor: Tensor | None, layer: int) -> Tensor | None:
        return None if tensor is None else tensor[layer]

    for layer, hidden in enumerate(hiddens):
        cap_(
            hidden,
            axes[layer],
            floors[layer],
            slots,
            targets=at(targets, layer),
            lifts=at(lifts, layer),
            norm_limits=at(norm_limits, layer),
            projections=at(projections, layer),
        )
    return list(hiddens)
