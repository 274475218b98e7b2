"""Activation checkpoints: a layer that backward computes again belongs to the pass in which it ran first.

A pass marks the nodes of its autograd graph at the inputs and outputs of its capped layers. A recomputation runs inside
a node of the same graph. The nearest mark, on the way from that node to the inputs of the model, is that of its pass.
So the mark travels with the graph, whatever other passes run before backward, and in whatever thread backward runs.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node, get_gradient_edge


def is_recomputing() -> bool:
    """Whether this thread runs a backward pass, and so computes again what a checkpoint did not keep."""
    return torch._C._current_graph_task_id() != -1


def mark(tensor: object, key: object, value: object) -> None:
    """Marks the node that computed a tensor, if it has one."""
    if isinstance(tensor, Tensor) and tensor.requires_grad:
        _metadata(get_gradient_edge(tensor).node)[key] = value


def before_backward(tensor: object, call: Callable[[], None]) -> None:
    """Calls ``call`` when backward reaches the node that computed a tensor, if it has one."""
    if isinstance(tensor, Tensor) and tensor.grad_fn is not None:
        tensor.grad_fn.register_prehook(lambda gradients: call())


def nearest_mark(key: object) -> Any:
    """The value of the mark that is nearest to the node that runs; None if no mark can be reached from there."""
    nodes: deque[Node] = deque([torch._C._current_autograd_node()])
    visited = set(nodes)
    while nodes:
        node = nodes.popleft()
        if key in (marks := _metadata(node)):
            return marks[key]
        inputs = {edge[0] for edge in node.next_functions if edge[0] is not None} - visited
        visited |= inputs
        nodes.extend(inputs)
    return None


def _metadata(node: Any) -> dict[object, Any]:
    """The dictionary that a node carries for its users; torch's stubs declare it as a method."""
    metadata: dict[object, Any] = node.metadata
    return metadata
