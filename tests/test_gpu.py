"""The ops on a CUDA GPU: the CPU's property tests, and what only a GPU has. `make gpu` runs them; else they skip."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import assert_same_bits, unit
from hypothesis import given
from test_ops import DTYPES, assert_close_to_oracle, assert_normed, inputs

from axiscap import _C, ops, reference

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or _C.accelerator() is None, reason="needs a CUDA GPU and kernels built for it"
)


def on_gpu(*tensors):
    return [None if tensor is None else tensor.cuda() for tensor in tensors]


@given(inputs())
def test_cap_is_the_oracle(case):
    buffer, axes, floors, slots = on_gpu(case.buffer, *case.call())
    hidden = buffer[:, : case.hidden.shape[-1]]
    projections = torch.empty(len(hidden), axes.shape[1], device="cuda")
    ops.cap_(hidden, axes, floors, slots, projections=projections)
    assert_close_to_oracle(hidden.cpu(), case.hidden, *case.call())
    copy, incoming, fired = torch.ops.axiscap.cap(case.hidden.cuda(), axes, floors, slots)
    assert_same_bits(copy.cpu(), hidden.cpu().contiguous())
    assert_same_bits(incoming.cpu().nan_to_num(), projections.cpu().nan_to_num())
    untouched = ~fired.any(-1).cpu()
    assert_same_bits(hidden.cpu()[untouched], case.hidden[untouched])
    assert_same_bits(buffer.cpu()[:, hidden.shape[1] :], case.buffer[:, hidden.shape[1] :])
    found = ops.project(case.hidden.cuda(), axes, slots).cpu()
    finite = reference.project(case.hidden.double(), case.axes, case.slots).isfinite() & projections.cpu().isfinite()
    assert_same_bits(found[finite], projections.cpu()[finite])


@given(inputs())
def test_two_streams_are_the_oracle(case):
    residual = case.hidden.flip(0).clone()
    weight = torch.randn(residual.shape[-1], generator=torch.Generator().manual_seed(1)).to(residual.dtype)
    hidden, both, axes, floors, slots, w = on_gpu(case.hidden.clone(), residual, *case.call(), weight)
    total = case.hidden.double() + residual.double()
    ops.cap_residual_(hidden, both, axes, floors, slots)
    assert_close_to_oracle(both.cpu(), total, *case.call(), base=residual)
    both = residual.cuda()
    ops.add_rms_norm_cap_(hidden, both, w, 1e-6, axes, floors, slots, weight_bias=1.0)
    assert_close_to_oracle(both.cpu(), total, *case.call())
    assert_normed(hidden.cpu(), both.cpu(), weight, 1e-6, 1.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [64, 576, 4096, 8192])
def test_a_row_depends_on_itself_alone(dtype, size):
    hidden = torch.randn(300, size, device="cuda").to(dtype)
    axes, floors = on_gpu(unit(2, 2, size), torch.zeros(2, 2))
    slots = torch.randint(-1, 2, (300,), dtype=torch.int32, device="cuda")
    whole = ops.cap(hidden, axes, floors, slots)
    order = torch.randperm(300, device="cuda")
    padded = torch.empty(300, size + 3, device="cuda", dtype=dtype)[:, :size]
    padded.copy_(hidden[order])
    ops.cap_(padded, axes, floors, slots[order])
    assert_same_bits(padded.cpu().contiguous(), whole[order].cpu())
    alone = ops.cap(hidden[7:8], axes, floors, slots[7:8])
    assert_same_bits(alone.cpu(), whole[7:8].cpu())


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
    source = hidden.clone()

    def step():
        hidden.copy_(source)
        ops.cap_(hidden, axes, floors, slots, projections=projections)
        ops.accumulate_(stats, projections, floors, slots)

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for floor, slot in ((-math.inf, 0), (2.0, 1), (5.0, 0), (1.0, -1)):
        floors.fill_(floor)
        slots.fill_(slot)
        graph.replay()
        wanted = reference.cap(source, axes, floors, slots)
        torch.testing.assert_close(hidden, wanted, atol=0.04, rtol=0.01)


@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype):
    hidden = torch.randn(10, 40, device="cuda").to(dtype)
    axes, floors = on_gpu(unit(2, 3, 40), torch.zeros(2, 3))
    slots = torch.zeros(10, dtype=torch.int32, device="cuda")
    torch.library.opcheck(torch.ops.axiscap.cap_.default, (hidden, axes, floors, slots))
    torch.library.opcheck(torch.ops.axiscap.cap.default, (hidden.clone().requires_grad_(), axes, floors, slots))
    weight = torch.ones(40, device="cuda", dtype=dtype)
    torch.library.opcheck(
        torch.ops.axiscap.add_rms_norm_cap_.default, (hidden, hidden.clone(), weight, 1e-6, axes, floors, slots)
    )


def test_rows_that_are_too_wide_are_an_error():
    hidden = torch.zeros(1, 16385, device="cuda", dtype=torch.bfloat16)
    axes, floors = on_gpu(unit(1, 1, 16385), torch.zeros(1, 1))
    with pytest.raises(RuntimeError, match="H must be at most 16384"):
        ops.cap_(hidden, axes, floors)
