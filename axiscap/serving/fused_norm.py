"""The graph that vLLM compiles for a GPU, with the cap inside the norm behind it.

The hook on a capped layer leaves ``cap_residual_`` in front of the next layer's input norm (behind the last layer, of
the model's own). That norm adds the same two streams once more: one launch does both, and what the cap reads besides is
its axes. This runs behind vLLM's own passes, so that a norm which those have fused with a quantisation keeps that, and
has its cap in front.
"""

from __future__ import annotations

from operator import getitem
from typing import Any, NamedTuple

import torch
from torch._higher_order_ops.auto_functionalize import auto_functionalized
from torch.fx import Graph
from vllm.compilation.passes.inductor_pass import InductorPass

_CAP = torch.ops.axiscap.cap_residual_.buffers
_JOINED = torch.ops.axiscap.add_rms_norm_cap_.buffers
#: Of a graph; what a node is given is, to a type checker, any of sixteen kinds of thing.
Node = Any
_CONVERT = torch.ops.prims.convert_element_type.default


class _Norm(NamedTuple):
    """What a norm of vLLM's computes: ``residual <- x + residual; x <- rms_norm(residual) * (weight + bias)``."""

    x: Node
    residual: Node
    weight: Node
    bias: float
    eps: float


class CapInNorm(InductorPass):  # type: ignore[misc]
    """Joins each cap of a pair of streams with the norm that alone reads the capped sum."""

    def __call__(self, graph: Graph) -> None:
        for node in graph.find_nodes(op="call_function", target=torch.ops.vllm_ir.fused_add_rms_norm.default):
            norm = _norm(node)
            if norm is not None and (cap := _cap_of(norm, node)) is not None:
                _join(graph, cap, node, norm)


def _norm(node: Node) -> _Norm | None:
    """What the node computes; None: something that ``add_rms_norm_cap_`` cannot."""
    names = ("x", "x_residual", "weight", "epsilon", "variance_size")
    given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    x, weight, bias = given["x"], given["weight"], 0.0
    if weight is None or given.get("variance_size") is not None:
        return None
    if weight.target is torch.ops.aten.add.Tensor and weight.args[1] == 1 and _dtype(weight) is torch.float32:
        # Gemma's weights are stored less 1, and multiply in float32.
        weight, bias = weight.args[0], 1.0
        if weight.target is _CONVERT:
            weight = weight.args[0]
    if _dtype(weight) is not _dtype(x):
        return None
    return _Norm(x, given["x_residual"], weight, bias, given["epsilon"])


def _cap_of(norm: _Norm, node: Node) -> Node | None:
    """The cap that made the norm's residual, where nothing else reads that, nor the projections before the norm."""
    residual = norm.residual
    if residual.target is not getitem or list(residual.users) != [node]:
        return None
    cap = residual.args[0]
    if cap.target is not auto_functionalized or cap.args[0] is not _CAP or cap.kwargs["hidden"] is not norm.x:
        return None
    return None if any(user < node for part in cap.users if part is not residual for user in part.users) else cap


def _join(graph: Graph, cap: Node, node: Node, norm: _Norm) -> None:
    changed = {"hidden": norm.x, "residual": cap.kwargs["residual"], "projections": cap.kwargs["projections"]}
    more = {"weight": norm.weight, "eps": norm.eps, "weight_bias": norm.bias}
    with graph.inserting_before(node):
        joined = graph.call_function(auto_functionalized, (_JOINED,), {**cap.kwargs, **changed, **more})
        # A functionalised op returns what the op does, and behind that all that it changes, in the schema's order.
        parts = [graph.call_function(getitem, (joined, at)) for at in range(1, 1 + len(changed))]
    for part, before in zip(parts, changed.values(), strict=True):
        part.meta["val"] = before.meta["val"]
    joined.meta["val"] = (None, *(part.meta["val"] for part in parts))
    hidden, residual, projections = parts
    for old, new in [(node, {0: hidden, 1: residual}), (cap, {2: projections})]:
        for part in list(old.users):
            if part.args[1] in new:
                part.replace_all_uses_with(new[part.args[1]])
            graph.erase_node(part)
        graph.erase_node(old)


def _dtype(node: Node) -> torch.dtype:
    return node.meta["val"].dtype  # type: ignore[no-any-return]
