"""SGLang's norm modules, with the cap of the layer before inside.

SGLang calls a layer's input norm (behind the last layer, the model's own) with the output of the layer before and the
residual that it is added to. On a GPU that is one launch, which reads both streams; with the cap in it, a capped layer
costs no launch of its own and no second reading.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from axiscap.serving.worker.model import engine_layers


def readers(model: nn.Module, layers: int) -> dict[int, nn.Module]:
    """Of each layer, by its number, the norm that alone reads its output, where the fused ops can stand for it.

    Parameters
    ----------
    model
        of SGLang's.
    layers
        of the whole model, those of other pipeline ranks included.
    """
    blocks = engine_layers(model, layers)
    (holder,) = (part for part in model.modules() if any(child is blocks for child in part.children()))
    norms = [getattr(block, "input_layernorm", None) for block in blocks[1:]] + [getattr(holder, "norm", None)]
    return {layer: norm for layer, norm in enumerate(norms) if norm is not None and _bias(norm) is not None}


def _bias(norm: Any) -> float | None:
    """What the norm adds to its weight; None: it computes something else than the fused ops."""
    from sglang.srt.layers import layernorm

    if type(norm) in (layernorm.GemmaRMSNorm, layernorm.Gemma3RMSNorm):
        return 1.0
    if type(norm) is not layernorm.RMSNorm:
        return None
    # What one of them does besides, by its attribute.
    besides = ("variance_size_override", "override_orig_dtype", "cast_x_before_out_mul", "fp32_residual")
    plain = getattr(norm, "has_weight", True) and not any(getattr(norm, name, None) for name in besides)
    return 0.0 if plain else None


def take_in(norm: nn.Module, tensors: tuple[Tensor, ...]) -> None:
    """Has the norm cap the sum of its streams.

    Parameters
    ----------
    norm
        one of :func:`readers`.
    tensors
        what the ops ``.buffers`` take: axes, floors, slots, projections, targets, lifts and norm_limits.
    """
    from sglang.srt.layers import layernorm

    axes, floors, slots, projections, *more = tensors
    original, bias = norm.forward, _bias(norm)
    eps = norm.eps if isinstance(norm, layernorm.Gemma3RMSNorm) else norm.variance_epsilon

    def scale_behind() -> Tensor | None:
        """Of the fp8 matrix that reads the norm, where the engine would have its own norm quantise for that."""
        linear = getattr(norm, "_quant_linear", None)
        if linear is None or not layernorm._flashinfer_rmsnorm_quant_available:
            return None
        return layernorm._fp8_static_input_scale(linear)  # type: ignore[no-any-return]

    def forward(x: Tensor, residual: Tensor | None = None, *rest: Any, **named: Any) -> Any:
        if residual is None:  # there was no pair: the hook has capped what the layer returned
            return original(x, residual, *rest, **named)
        scale = scale_behind()
        plain = all(value is None for value in (*rest, *named.values())) and norm.weight.dtype is x.dtype
        if not plain or (scale is not None and (scale.dtype is not torch.float32 or not scale.is_contiguous())):
            torch.ops.axiscap.cap_residual_.buffers(x, residual, *tensors)
            return original(x, residual, *rest, **named)
        arguments = residual, norm.weight.data, eps, axes, floors, slots, projections, bias
        if scale is None:
            torch.ops.axiscap.add_rms_norm_cap_.buffers(x, *arguments, *more)
            return x, residual
        quantized = torch.empty_like(x, dtype=torch.float8_e4m3fn)
        torch.ops.axiscap.add_rms_norm_cap_fp8_.buffers(quantized, x, *arguments, scale, None, *more)
        return (quantized, scale, x.dtype), residual

    norm.forward = forward
