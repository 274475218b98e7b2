"""Every op in plain torch: the oracle that the kernels are tested against.

Written to be read beside the definition (arXiv 2601.10387, eq. 1): ``h <- h - v * min(<h, v> - tau, 0)``. Arithmetic
runs in float32, or in float64 where hidden is float64. Shapes are those of :mod:`axiscap.ops`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def _directions(
    hidden: Tensor, axes: Tensor, floors: Tensor, slots: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows x (N, H), their axes (N, K, H) and floors (N, K), and which rows take part (N,)."""
    work = torch.promote_types(hidden.dtype, torch.float32)
    x = hidden.reshape(-1, hidden.shape[-1]).to(work)
    index = torch.zeros(len(x), dtype=torch.long, device=x.device) if slots is None else slots.long()
    if bool(((index < -1) | (index >= len(axes))).any()):
        raise IndexError(f"slots must be in [0, {len(axes)}) or -1")
    row_axes, row_floors = axes.to(work)[index.clamp(min=0)], floors.to(work)[index.clamp(min=0)]
    return x, row_axes, row_floors, index >= 0


def _cap(x: Tensor, axes: Tensor, floors: Tensor, active: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Applies the directions in order: rows after the cap, projections before it (N, K), fired (N,)."""
    incoming = torch.einsum("nh,nkh->nk", x, axes)
    fired = torch.zeros_like(active)
    finite = incoming.isfinite().all(-1)
    for v, tau in zip(axes.unbind(1), floors.unbind(1), strict=True):
        p = (x * v).sum(-1)
        fires = p < tau
        delta = torch.where(fires, tau - p, 0)
        finite = finite & p.isfinite() & delta.isfinite()
        x = torch.where(fires[:, None], x + delta[:, None] * v, x)
        fired = fired | fires
    incoming = torch.where((active & finite)[:, None], incoming, torch.nan)
    return x, incoming, fired & finite & active


def cap(
    hidden: Tensor, axes: Tensor, floors: Tensor, slots: Tensor | None = None, *, projections: Tensor | None = None
) -> Tensor:
    """The capped copy of hidden. Differentiable with respect to hidden."""
    x, row_axes, row_floors, active = _directions(hidden, axes, floors, slots)
    x, incoming, fired = _cap(x, row_axes, row_floors, active)
    if projections is not None:
        projections.copy_(incoming.detach())
    rows = hidden.reshape(x.shape)
    return torch.where(fired[:, None], x.to(hidden.dtype), rows).reshape(hidden.shape)


def cap_(
    hidden: Tensor, axes: Tensor, floors: Tensor, slots: Tensor | None = None, *, projections: Tensor | None = None
) -> Tensor:
    """Caps hidden in place and returns it."""
    return hidden.copy_(cap(hidden, axes, floors, slots, projections=projections))


def project(hidden: Tensor, axes: Tensor, slots: Tensor | None = None) -> Tensor:
    """<row, v_k>: shape hidden.shape[:-1] + (K,). NaN for a row that is not finite or has slot -1."""
    off = torch.full(axes.shape[:2], -torch.inf, dtype=axes.dtype, device=axes.device)
    x, row_axes, row_floors, active = _directions(hidden, axes, off, slots)
    return _cap(x, row_axes, row_floors, active)[1].reshape(*hidden.shape[:-1], axes.shape[1])


def cap_residual_(
    hidden: Tensor,
    residual: Tensor,
    axes: Tensor,
    floors: Tensor,
    slots: Tensor | None = None,
    *,
    projections: Tensor | None = None,
) -> Tensor:
    """Caps the sum hidden + residual by changing residual, in place; returns residual."""
    h, row_axes, row_floors, active = _directions(hidden, axes, floors, slots)
    r = residual.reshape(h.shape).to(h.dtype)
    capped, incoming, fired = _cap(h + r, row_axes, row_floors, active)
    if projections is not None:
        projections.copy_(incoming)
    corrected = (r + (capped - (h + r))).to(residual.dtype)
    return residual.copy_(torch.where(fired[:, None], corrected, residual.reshape(h.shape)).reshape(residual.shape))


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
    projections: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """residual <- cap(hidden + residual); hidden <- the RMS norm of the stored residual, times weight + weight_bias."""
    h, row_axes, row_floors, active = _directions(hidden, axes, floors, slots)
    x = h + residual.reshape(h.shape).to(h.dtype)
    capped, incoming, fired = _cap(x, row_axes, row_floors, active)
    if projections is not None:
        projections.copy_(incoming)
    residual.copy_(torch.where(fired[:, None], capped, x).reshape(residual.shape))
    y = residual.to(h.dtype)
    scale = (y.square().mean(-1, keepdim=True) + eps).rsqrt()
    return hidden.copy_(y * scale * (weight.to(h.dtype) + weight_bias)), residual


def cap_layers_(
    hiddens: Sequence[Tensor],
    axes: Tensor,
    floors: Tensor,
    slots: Tensor | None = None,
    *,
    projections: Tensor | None = None,
) -> list[Tensor]:
    """cap_ for each layer l with axes[l] (S, K, H) and floors[l] (S, K)."""
    for layer, hidden in enumerate(hiddens):
        cap_(hidden, axes[layer], floors[layer], slots, projections=None if projections is None else projections[layer])
    return list(hiddens)
