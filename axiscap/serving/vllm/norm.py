"""The graph that vLLM compiles for a GPU, with the cap inside the norm behind it.

The hook on a capped layer leaves ``cap_residual_`` in front of the next layer's input norm (behind the last layer, of
the model's own). That norm adds the same two streams once more: one launch does both, and what the cap reads besides is
its axes. This runs behind vLLM's own passes, and so also finds a norm that those have fused with the quantisation to
fp8 that a matrix multiplication wants, by one scale for all rows or by each row's own. Another quantisation (fp8 by
groups, fp4) keeps its fusion, with the cap in front.
"""

from __future__ import annotations

from operator import getitem
from typing import Any, NamedTuple

import torch
from torch._higher_order_ops.auto_functionalize import auto_functionalized
from torch.fx import Graph
from vllm.compilation.passes.inductor_pass import InductorPass

_CAP = torch.ops.axiscap.cap_residual_.buffers
#: A value of a graph. The stubs of torch.fx declare the arguments of a node as a union of sixteen types.
Node = Any
_CONVERT = torch.ops.prims.convert_element_type.default


class _Joined(NamedTuple):
    """An op that does both, and what it changes, in the order of its schema."""

    op: Any
    changes: tuple[str, ...]


_NORM = _Joined(torch.ops.axiscap.add_rms_norm_cap_.buffers, ("hidden", "residual", "projections"))
_NORM_FP8 = _Joined(torch.ops.axiscap.add_rms_norm_cap_fp8_.buffers, ("quantized", "residual", "projections", "scales"))


class _Norm(NamedTuple):
    """What a norm of vLLM's computes: ``residual <- x + residual; x <- rms_norm(residual) * (weight + bias)``."""

    x: Node
    residual: Node
    weight: Node
    bias: float
    eps: float
    joined: _Joined
    extra: dict[str, Node]  # what the joined op takes besides
    results: tuple[str, ...]  # of the node, in order, by the joined op's names; "" for what an op returns of itself


class CapInNorm(InductorPass):  # type: ignore[misc]
    """Joins each cap of a pair of streams with the norm that alone reads the capped sum."""

    def __call__(self, graph: Graph) -> None:
        for node in list(graph.nodes):
            norm = _norm(node)
            if norm is not None and (cap := _cap_of(norm, node)) is not None:
                _join(graph, cap, node, norm)


def _norm(node: Node) -> _Norm | None:
    """What the node computes; None: nothing that a joined op can stand for."""
    results: tuple[str, ...]
    if node.target is torch.ops.vllm_ir.fused_add_rms_norm.default:
        names = ("x", "x_residual", "weight", "epsilon", "variance_size")
        arguments = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
        x, residual, known = arguments["x"], arguments["x_residual"], arguments.get("variance_size") is None
        joined, extra, results = _NORM, {}, ("hidden", "residual")
    elif node.target is auto_functionalized:
        arguments = node.kwargs
        x, residual, known = arguments.get("input"), arguments.get("residual"), arguments.get("scale_ub") is None
        joined = _NORM_FP8
        if node.args[0] is _vllms("fused_add_rms_norm_static_fp8_quant"):
            extra, results = {"scale": arguments["scale"], "scales": None}, ("", "quantized", "residual")
        elif node.args[0] is _vllms("rms_norm_dynamic_per_token_quant"):
            extra, results = {"scale": None, "scales": arguments["scale"]}, ("", "quantized", "scales", "residual")
        else:
            return None
        extra |= {"quantized": arguments["result"]}
        known = known and residual is not None and _dtype(arguments["result"]) is torch.float8_e4m3fn
    else:
        return None
    weight, bias = arguments["weight"], 0.0
    if weight is None or not known:
        return None
    if weight.target is torch.ops.aten.add.Tensor and weight.args[1] == 1 and _dtype(weight) is torch.float32:
        # Gemma's weights are stored less 1, and multiply in float32.
        weight, bias = weight.args[0], 1.0
        if weight.target is _CONVERT:
            weight = weight.args[0]
    if _dtype(weight) is not _dtype(x):
        return None
    return _Norm(x, residual, weight, bias, arguments["epsilon"], joined, extra, results)


def _vllms(name: str) -> Any:
    """An op of vLLM's own, in a build that has it."""
    packet = getattr(torch.ops._C, name, None)
    return None if packet is None else packet.default


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
    arguments = {**cap.kwargs, **norm.extra, "weight": norm.weight, "eps": norm.eps, "weight_bias": norm.bias}
    parts: dict[str, Node] = {}
    with graph.inserting_before(node):
        joined = graph.call_function(auto_functionalized, (norm.joined.op,), arguments)
        # A functionalised op returns what the op does, and behind that all that it changes, in the schema's order.
        for at, name in enumerate(norm.joined.changes):
            if arguments[name] is not None:
                parts[name] = graph.call_function(getitem, (joined, 1 + at))
                parts[name].meta["val"] = arguments[name].meta["val"]
    joined.meta["val"] = (None, *(parts[name].meta["val"] if name in parts else None for name in norm.joined.changes))
    new = {node: {at: name for at, name in enumerate(norm.results) if name}, cap: {2: "projections"}}
    for old in (node, cap):
        for part in list(old.users):
            if part.args[1] in new[old]:
                part.replace_all_uses_with(parts[new[old][part.args[1]]])
            graph.erase_node(part)
        graph.erase_node(old)


def _dtype(node: Node) -> torch.dtype:
    return node.meta["val"].dtype  # type: ignore[no-any-return]
