"""What only a GPU has; the property tests of tests/test_ops*.py run on both. `make gpu` runs them; else they skip."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import assert_same_bits, unit
from op_inputs import DTYPES

from axiscap import _C, ops, reference

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or _C.accelerator() is None, reason="needs a CUDA GPU and kernels built for it"
)


def on_gpu(*tensors):
    return [None if tensor is None else tensor.cuda() for tensor in tensors]


def test_slots_outside_the_bank_are_reported():
    hidden = torch.randn(4, 576, device="cuda")
    before, projections = hidden.clone(), torch.zeros(4, 1, device="cuda")
    slots = torch.tensor([0, 1, -1, 2**31 - 1], dtype=torch.int32, device="cuda")
    axes, floors = on_gpu(unit(1, 1, 576), torch.full((1, 1), 9.0))
    ops.cap_(hidden, axes, floors, slots, projections=projections)
    assert projections.isnan().flatten().tolist() == [False, True, True, True]
    assert_same_bits(hidden[1:].cpu(), before[1:].cpu())


def test_a_graph_replays_with_other_slots_and_floors():
    axes, floors = on_gpu(unit(2, 1, 1024), torch.full((2, 1), -math.inf))
    hidden = torch.randn(8, 1024, device="cuda").bfloat16()
    slots = torch.zeros(8, dtype=torch.int32, device="cuda")
    stats, projections = ops.new_stats(2, 1, "cuda"), torch.empty(8, 1, device="cuda")
    rows = hidden.clone()

    def step():
        hidden.copy_(rows)
        ops.cap_(hidden, axes, floors, slots, projections=projections)
        ops.accumulate_(stats, projections, floors, slots)

    side_stream = torch.cuda.Stream()
    with torch.cuda.stream(side_stream):
        step()
    torch.cuda.current_stream().wait_stream(side_stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for floor, slot in ((-math.inf, 0), (2.0, 1), (5.0, 0), (1.0, -1)):
        floors.fill_(floor)
        slots.fill_(slot)
        graph.replay()
        expected = reference.cap(rows, axes, floors, slots)
        torch.testing.assert_close(hidden, expected, atol=0.04, rtol=0.01)


def test_statistics_of_several_layers_equal_the_cpus():
    projections = torch.randn(3, 700, 2)[:, :600]
    projections[1, 3] = math.nan
    floors, slots = torch.randn(3, 4, 2), torch.randint(-1, 4, (600,)).int()
    expected = ops.accumulate_(torch.stack([ops.new_stats(4, 2)] * 3), projections, floors, slots)
    on_device = torch.stack([ops.new_stats(4, 2)] * 3).cuda()
    strided = torch.zeros(3, 700, 2, device="cuda")[:, :600]
    strided.copy_(projections)
    result = ops.accumulate_(on_device, strided, *on_gpu(floors, slots))
    torch.testing.assert_close(result.cpu(), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_ops_pass_opcheck(dtype):
    hidden = torch.randn(10, 40, device="cuda").to(dtype)
    axes, floors = on_gpu(unit(2, 3, 40), torch.zeros(2, 3))
    slots = torch.zeros(10, dtype=torch.int32, device="cuda")
    torch.library.opcheck(torch.ops.axiscap.cap_.default, (hidden, axes, floors, slots))
    torch.library.opcheck(torch.ops.axiscap.cap.default, (hidden.clone().requires_grad_(), axes, floors, slots))
    weight = torch.ones(40, device="cuda", dtype=dtype)
    torch.library.opcheck(
        torch.ops.axiscap.add_rms_norm_cap_.default, (hidden, hidden.clone(), weight, 1e-6, axes, floors, slots)
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [16392, 24576])
def test_wide_rows_match_the_reference(dtype, size):
    hidden = torch.randn(5, size, device="cuda").to(dtype)
    axes, floors = on_gpu(unit(1, 2, size), torch.tensor([[2.0, 1.0]]))
    expected = reference.cap(hidden, axes, floors)
    torch.testing.assert_close(ops.cap_(hidden.clone(), axes, floors), expected, atol=0.04, rtol=0.01)
    residual = torch.zeros_like(hidden)
    ops.cap_residual_(hidden, residual, axes, floors)
    torch.testing.assert_close(hidden + residual, expected, atol=0.04, rtol=0.01)


def test_too_wide_rows_are_an_error():
    axes, floors = on_gpu(unit(1, 1, 24577), torch.zeros(1, 1))
    with pytest.raises(ValueError, match="axes must have an H of at most 24576 on cuda:0, got 24577"):
        ops.cap_(torch.zeros(1, 24577, device="cuda", dtype=torch.bfloat16), axes, floors)
