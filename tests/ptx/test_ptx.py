"""The CUDA kernels, executed without a GPU: their PTX runs on an interpreter, against the same oracle as the CPU's."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math

import emulated
import limits
import numpy as np
import pytest
import torch
from conftest import assert_same_bits, unit
from emulated import HELD, LAYER_BYTES, MAX_LAYERS, OPS, TYPES, Device, kernel_name, kernels, raw, shared_kernel
from hypothesis import given, settings
from interpreter import Instruction, Kernel, Launch, Memory, PtxError
from op_inputs import (
    DTYPES,
    Input,
    around_fp8,
    assert_close_to_oracle,
    assert_normed,
    at_the_edge,
    in_fp8,
    inputs,
    own_scales,
)
from torch._subclasses.fake_tensor import FakeTensorMode

from axiscap import _C, ops, reference

#: The widest row: as many float32 as fit the shared memory that every GPU has for a block.
WIDEST = 24576

KERNELS = list(itertools.product(DTYPES, OPS, (False, True), (True, False)))


def sizes_for(dtype: torch.dtype, aligned: bool) -> list[int]:
    """Rows of a part of a warp, of a warp, of several, and the widest, each with whole vectors or a tail."""
    return [8, 72, 1024, 1040, HELD[dtype]] if aligned else [1, 7, 67, 1023, 1041, HELD[dtype] - 1]


def run_on(device: Device, op: str, rows: torch.Tensor, axes, floors, slots=None, **bank):
    """Runs one op in place on rows, to which a stream of zeros is added where it takes two; returns the projections
    (rows, K) and what fired. Axes (S, K, H), floors (S, K); the rest of the bank is targets (S, K), lifts (S, K, H) and
    norm_limits (S,).
    """
    projections = torch.empty(1, len(rows), axes.shape[1])
    fired = torch.empty(projections.shape[1:], dtype=torch.uint8)
    device.call(
        [rows if op == "cap" else torch.zeros_like(rows)],
        axes[None],
        floors[None],
        slots,
        residual=None if op == "cap" else rows,
        projections=projections,
        fired=fired,
        **normed_by(op, torch.ones(rows.shape[1], dtype=rows.dtype), rows)[0],
        **{name: tensor[None] for name, tensor in bank.items()},
    )
    return projections[0], fired


def normed_by(op: str, weight: torch.Tensor, rows: torch.Tensor, *, own_scales: bool = True):
    """What a norm takes beside a cap, and where its result and its scales go, if not to hidden."""
    if op not in ("norm", "norm_fp8"):
        return {}, None, torch.empty(0)
    if op == "norm":
        return {"weight": weight}, None, torch.empty(0)
    # Rows of hidden's stride: a vector's elements lie as they do there.
    quantized = torch.zeros(len(rows), rows.stride(0)).to(torch.float8_e4m3fn)[:, : rows.shape[1]]
    scales = torch.full((len(rows), 1), 7.0) if own_scales else torch.tensor([0.02])
    given = {"scales" if own_scales else "scale": scales}
    return {"weight": weight, "quantized": quantized, **given}, quantized, scales


def run_like_the_cpu(device: Device, op: str, case: Input, *, bias: float = 0.0):
    """Runs one op on the device, on copies of the case's rows; returns what it left and what it was given: hidden, or
    in its place the norm in fp8, residual, weight, projections, fired, scales.
    """
    hidden = case.buffer.clone()[:, : case.hidden.shape[-1]]
    residual = case.buffer.flip(0).clone()[:, : hidden.shape[-1]]
    rows, directions = len(hidden), case.axes.shape[1]
    projections = torch.empty(1, rows, directions)
    fired = torch.empty(rows, directions, dtype=torch.uint8)
    weight = torch.randn(hidden.shape[-1], generator=torch.Generator().manual_seed(5)).to(hidden.dtype)
    norm, quantized, scales = normed_by(op, weight, hidden, own_scales=case.slots is None)
    device.call(
        [hidden],
        case.axes[None],
        case.floors[None],
        case.slots,
        residual=None if op == "cap" else residual,
        eps=1e-6,
        weight_bias=bias,
        projections=projections,
        fired=fired,
        **norm,
        **{name: None if value is None else value[None] for name, value in case.more().items()},
    )
    if quantized is not None:
        assert_same_bits(hidden.contiguous(), case.hidden.contiguous())
        hidden = quantized
    return hidden, residual, weight, projections[0], fired, scales


def assert_rows_beyond_their_limit_are_left_alone(projections: torch.Tensor, incoming: torch.Tensor, case: Input):
    """The sum of squares in float64 decides, beside what the rounding of float32 leaves open."""
    if case.norm_limits is None:
        return
    slots = torch.zeros(len(incoming), dtype=torch.long) if case.slots is None else case.slots.clamp(min=0).long()
    beyond = incoming.square().sum(-1) > (1 + 1e-4) * case.norm_limits.double()[slots].square()
    assert projections[beyond].isnan().all()


def check_against_the_oracle(device: Device, op: str, case: Input) -> None:
    before, before_residual = case.hidden.clone(), case.buffer.flip(0)[:, : case.hidden.shape[-1]].clone()
    hidden, residual, weight, projections, fired, scales = run_like_the_cpu(device, op, case, bias=1.0)
    if op == "norm_fp8":  # the norm, to the bit, and torch's quantisation
        normed, *wanted = run_like_the_cpu(Device(device.source, resident=device.resident), "norm", case, bias=1.0)
        for found, other in zip((residual, weight, projections, fired), wanted, strict=False):
            assert torch.equal(raw_bits(found), raw_bits(other))
        numbers = normed.isfinite().all(-1)
        if case.slots is None:
            assert_same_bits(scales[numbers], own_scales(normed)[numbers])
        expected = in_fp8(normed, scales)
        assert torch.equal(hidden[numbers].view(torch.uint8), expected[numbers].view(torch.uint8))
        assert bool((hidden.float().isnan() == expected.float().isnan()).all())
        return
    incoming = before.double() if op == "cap" else before.double() + before_residual.double()
    if op == "cap":
        assert_close_to_oracle(hidden, incoming, *case.call(), **case.more())
        untouched, was = hidden, before
    elif op == "cap_residual":
        assert_same_bits(hidden.contiguous(), before.contiguous())
        assert_close_to_oracle(residual, incoming, *case.call(), base=before_residual, **case.more())
        untouched, was = residual, before_residual
    else:
        assert_close_to_oracle(residual, incoming, *case.call(), **case.more())
        assert_normed(hidden, residual, weight, 1e-6, 1.0)
        untouched = residual.nan_to_num()
        was = (before.float() + before_residual.float()).to(residual.dtype).nan_to_num()
    quiet = ~fired.bool().any(-1)
    assert_same_bits(untouched[quiet].contiguous(), was[quiet].contiguous())
    wanted = reference.project(incoming, case.axes, case.slots)
    assert not projections[~wanted.isfinite()].isfinite().any()
    assert_rows_beyond_their_limit_are_left_alone(projections, incoming, case)
    finite = wanted.isfinite() & projections.isfinite()
    near = (projections.double() - wanted).abs() <= (case.hidden.shape[-1] / 16 + 12) * 2.0**-24 * (
        incoming.abs().sum(-1, keepdim=True) + 1e-30
    )
    assert bool(near[finite].all())
    if case.axes.shape[1] == 1:
        slots = torch.zeros(len(hidden), dtype=torch.long) if case.slots is None else case.slots.clamp(min=0).long()
        assert bool((fired.bool() == (projections < case.floors[slots])).all())


@pytest.mark.slow
def test_the_list_of_kernels_is_that_of_the_module():
    one, statistics = {kernel_name(*entry) for entry in KERNELS}, 2
    several = {kernel_name(dtype, "cap", *rest, MAX_LAYERS) for dtype, op, *rest in KERNELS if op == "cap"}
    found = {name for name in kernels() if "accumulate_rows" not in name}
    assert found == one | several
    assert len(found) == limits.CAP_KERNELS <= limits.MOST_CAP_KERNELS < 40
    assert len(kernels()) == len(found) + statistics
    # What a launch copies: for a layer a few hundred bytes.
    assert {kernels()[name].parameters[0][1] for name in one} == {216 + LAYER_BYTES}
    assert {kernels()[name].parameters[0][1] for name in several} == {216 + MAX_LAYERS * LAYER_BYTES}


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "op", "many", "aligned"), KERNELS)
def test_every_kernel_against_the_oracle(dtype, op, many, aligned):
    for seed, size in enumerate(sizes_for(dtype, aligned)):
        for slots in (True, False):
            rows = 3 if size > 4000 else 9
            padding = 8 if aligned else seed % 3
            more = {"targets": seed % 2 == 1, "lifts": seed % 4 < 2, "norm_limits": seed % 3 == 0}
            case = Input(dtype, rows, size, 2, 3 if many else 1, padding, 1.0, slots, seed % 2 == 1, seed, **more)
            device = Device(resident=2)
            check_against_the_oracle(device, op, case)
            assert device.name == kernel_name(dtype, op, many, aligned)


@pytest.mark.slow
@settings(max_examples=45)
@given(inputs())
def test_the_properties_of_the_cpu_hold(case):
    if not len(case.hidden):
        return
    for op in OPS:
        check_against_the_oracle(Device(resident=4), op, case)


@pytest.mark.slow
def test_older_architectures_run_the_same():
    """Without programmatic dependent launch; the same bits."""
    for op, many in itertools.product(OPS, (False, True)):
        bank = {"targets": True, "lifts": True, "norm_limits": True}
        case = Input(torch.bfloat16, 5, 1040, 2, 3 if many else 1, 0, 1.0, True, True, 4, **bank)
        new, old = Device(), Device(kernels(80))
        for found, wanted in zip(run_like_the_cpu(old, op, case), run_like_the_cpu(new, op, case), strict=True):
            assert torch.equal(raw_bits(found), raw_bits(wanted))
    for source, dtype in itertools.product((kernels(80), kernels(90)), DTYPES):  # the older ones round by hand
        weight, ones = around_fp8(dtype), torch.ones(1, 1024, dtype=dtype)
        for scale in (torch.ones(1), torch.tensor([2.0**-9])):
            quantized = torch.zeros(1, 1024).to(torch.float8_e4m3fn)
            given = {"weight": weight, "quantized": quantized, "scale": scale, "residual": ones.clone()}
            Device(source).call(
                [torch.zeros_like(ones)], unit(1, 1, 1, 1024), torch.full((1, 1, 1), -math.inf), **given
            )
            assert torch.equal(quantized.view(torch.uint8), in_fp8(weight[None] + 0.0, scale).view(torch.uint8))
    assert not any("griddepcontrol" in i.op for kernel in kernels(80).values() for i in kernel.code)
    for name, kernel in kernels(90).items():
        assert ("accumulate_rows" not in name) == any(i.op == "griddepcontrol.wait" for i in kernel.code)


def raw_bits(tensor: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(raw(tensor.contiguous().clone()).copy())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [40, 576, 2056])
def test_a_row_depends_on_itself_alone(dtype, size):
    """Not on the batch, its place in it, the stride, the alignment or how many blocks there are."""
    bank = {"targets": True, "lifts": True, "norm_limits": True}
    case = Input(dtype, 11, size, 2, 1, 0, 1.0, True, False, 3, **bank)
    whole = run_like_the_cpu(Device(resident=100), "cap", case)[0]
    few = run_like_the_cpu(Device(resident=1), "cap", case)[0]
    assert_same_bits(few.contiguous(), whole.contiguous())
    order = torch.randperm(11, generator=torch.Generator().manual_seed(0))
    odd = Input(dtype, 11, size, 2, 1, 1, 1.0, True, False, 3, **bank)  # a row stride that no vector divides
    odd.buffer[:, :size] = case.hidden[order]
    odd.axes, odd.floors, odd.slots = case.axes, case.floors, case.slots[order].contiguous()
    odd.targets, odd.lifts, odd.norm_limits = case.targets, case.lifts, case.norm_limits
    device = Device(resident=2)
    shuffled = run_like_the_cpu(device, "cap", odd)[0]
    assert device.name == kernel_name(dtype, "cap", False, False)
    assert_same_bits(shuffled.contiguous(), whole[order].contiguous())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", list(OPS))
@pytest.mark.parametrize("directions", [1, 2])
def test_unaligned_rows_have_the_bits_of_aligned_ones(dtype, op, directions):
    """One kernel holds a row in registers, the other in shared memory: sums and roundings are the same."""
    for size in (40, 1040):
        case = Input(dtype, 5, size, 2, directions, 0, 1.0, True, False, 7, lifts=True)
        case.floors[:] = 3.0
        odd = Input(dtype, 5, size, 2, directions, 1, 1.0, True, False, 7, lifts=True)
        odd.buffer[:, :size], odd.floors = case.hidden, case.floors
        odd.axes, odd.lifts, odd.slots = case.axes, case.lifts, case.slots
        device, other = Device(resident=2), Device(resident=2)
        found, wanted = run_like_the_cpu(device, op, odd), run_like_the_cpu(other, op, case)
        assert (device.name, other.name) == tuple(kernel_name(dtype, op, directions > 1, on) for on in (False, True))
        assert found[4].any()
        for one, two in zip(found, wanted, strict=True):
            assert torch.equal(raw_bits(one), raw_bits(two))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", ["cap", "norm"])
@pytest.mark.parametrize("directions", [1, 2])
def test_unaligned_rows_have_the_norm_of_aligned_ones(dtype, op, directions):
    """To the bit: limits around a row's norm, one place of float32 apart, leave it alone in both or in none."""
    size, count, places = 1040, 3, 5
    incoming = torch.randn(count, size, generator=torch.Generator().manual_seed(11)).to(dtype)
    bits = incoming.double().norm(dim=-1).float().view(torch.int32)
    limits = bits[:, None] + torch.arange(places, dtype=torch.int32) - places // 2
    incoming, limits = incoming.repeat_interleave(places, 0), limits.flatten().view(torch.float32)
    bank = unit(1, directions, size).repeat(len(limits), 1, 1), torch.full((len(limits), directions), 9.0)
    more = {"slots": torch.arange(len(limits), dtype=torch.int32), "norm_limits": limits}
    fired = []
    for padding in (0, 1):
        rows = torch.zeros(len(limits), size + padding, dtype=dtype)[:, :size]
        rows.copy_(incoming)
        device = Device(resident=2)
        fired.append(run_on(device, op, rows, *bank, **more)[1][:, 0].reshape(count, places))
        assert device.name == kernel_name(dtype, op, directions > 1, not padding)
    assert fired[0].tolist() == fired[1].tolist() == fired[0].sort().values.tolist()
    assert not fired[0][:, 0].any()
    assert fired[0][:, -1].all()


@pytest.mark.slow
@pytest.mark.parametrize("op", list(OPS))
@pytest.mark.parametrize("size", [40, 1040])
def test_schedules_do_not_show(op, size):
    case = Input(torch.bfloat16, 7, size, 2, 2, 0, 1.0, True, True, 8, targets=True, norm_limits=True)
    wanted = run_like_the_cpu(Device(resident=2), op, case)
    for seed in range(4):
        found = run_like_the_cpu(Device(resident=2, seed=seed), op, case)
        for a, b in zip(found, wanted, strict=True):
            assert torch.equal(raw_bits(a), raw_bits(b))


@pytest.mark.parametrize("dtype", DTYPES)
def test_special_rows(dtype):
    """Infinity, NaN, slots outside the bank, -1, a correction that overflows: left alone, and reported as NaN."""
    size = 1040
    hidden = torch.randn(8, size, generator=torch.Generator().manual_seed(1)).to(dtype)
    hidden[1, size - 1], hidden[2, 0] = math.inf, math.nan
    axes, floors = unit(1, 2, 1, size), torch.tensor([[[50.0], [3.4e38]]])
    hidden[3] = torch.where(axes[0, 1, 0] > 0, -3e38, 3e38).to(dtype) if dtype != torch.float16 else hidden[3]
    slots = torch.tensor([0, 0, 0, 1, 2, -1, -7, 2**31 - 1], dtype=torch.int32)
    before, projections = hidden.clone(), torch.empty(1, 8, 1)
    fired = torch.empty(8, 1, dtype=torch.uint8)
    Device().call([hidden], axes, floors, slots, projections=projections, fired=fired)
    left = [1, 2, 4, 5, 6, 7] + ([3] if dtype != torch.float16 else [])
    assert_same_bits(hidden[left], before[left])
    assert bool(projections[0, left].isnan().all())
    assert fired.flatten().tolist()[0] == 1
    assert not fired[left].any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("size", "place"), [(7, 6), (40, 3), (1023, 1022), (1040, 700)])
@pytest.mark.parametrize("directions", [1, 2])
def test_a_row_that_its_correction_takes_out_of_range_is_left_alone(dtype, size, place, directions):
    rows, axes, floors, slots = at_the_edge(dtype, size, place)
    some = slice(None) if directions == 2 else slice(3)
    rows, slots = rows[some], slots[some]
    axes, floors = axes[:, :directions].contiguous(), floors[:, :directions].contiguous()
    wanted = reference.cap(rows, axes, floors, slots)
    for op in OPS:
        out = rows.clone()
        projections, fired = run_on(Device(), op, out, axes, floors, slots)
        assert fired.any(-1).tolist() == [False, True, False, True][some]
        assert projections.isfinite().all(-1).tolist() == [False, True, True, True][some]
        assert_same_bits(out[[0, 2]], rows[[0, 2]])
        torch.testing.assert_close(out, wanted)


#: A row that a block's registers hold, and a wider one.
NARROW_AND_WIDE = (1040, HELD[torch.bfloat16] + 8)


@pytest.mark.parametrize("op", list(OPS))
@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("size", NARROW_AND_WIDE)
def test_a_projection_at_its_floor_does_not_fire(op, directions, size):
    """Exactly there, and one place below it."""
    rows = torch.zeros(2, size, dtype=torch.bfloat16)
    rows[:, 3] = torch.tensor([2.0, 1.9921875])
    before = rows.clone()
    axes = torch.zeros(1, directions, size)
    axes[..., 3] = 1
    device = Device(resident=1)
    projections, fired = run_on(device, op, rows, axes, torch.full((1, directions), 2.0))
    assert projections[:, 0].tolist() == [2.0, 1.9921875]
    assert fired[:, 0].tolist() == [0, 1]
    assert_same_bits(rows[0], before[0])
    assert rows[1, 3] == 2.0
    if op not in ("norm", "norm_fp8"):
        name = "hidden0" if op == "cap" else "residual"
        assert device.memory[name].requested["st"] == size * 2


@pytest.mark.parametrize("op", list(OPS))
@pytest.mark.parametrize("size", NARROW_AND_WIDE)
def test_a_direction_at_its_floor_does_not_fire_beside_one_below(op, size):
    rows = torch.zeros(1, size, dtype=torch.bfloat16)
    rows[0, 3], rows[0, 5] = 1.5, 2.0
    axes = torch.zeros(1, 2, size)
    axes[0, 0, 3] = axes[0, 1, 5] = 1
    _, fired = run_on(Device(resident=1), op, rows, axes, torch.full((1, 2), 2.0))
    assert fired.tolist() == [[1, 0]]
    assert rows[0, 3] == rows[0, 5] == 2.0


@pytest.mark.parametrize("op", ["cap", "cap_residual"])
@pytest.mark.parametrize("size", NARROW_AND_WIDE)
def test_a_row_in_which_nothing_fires_is_not_written(op, size):
    rows = torch.randn(3, size, generator=torch.Generator().manual_seed(0)).bfloat16()
    device = Device(resident=1)
    run_on(device, op, rows, unit(1, 1, size), torch.full((1, 1), -math.inf))
    assert device.memory["hidden0" if op == "cap" else "residual"].requested["st"] == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", list(OPS))
@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("width", ["narrow", "wide"])
def test_a_row_at_its_norm_limit_is_capped(dtype, op, directions, width):
    """Exactly there, of either sign; one place of bfloat16 beyond it the row is left alone."""
    size = HELD[dtype] + 8 if width == "wide" else 1040
    rows = torch.zeros(3, size, dtype=dtype)
    rows[:, 3] = torch.tensor([-1.5, 1.5, -1.5])
    rows[:, size - 1] = torch.tensor([2.0, -2.0, 2.015625])
    before = rows.clone()
    axes = torch.zeros(1, directions, size)
    axes[..., 3] = 1
    floors = torch.full((1, directions), 2.0)
    projections, fired = run_on(Device(resident=1), op, rows, axes, floors, norm_limits=torch.tensor([2.5]))
    assert fired[:, 0].tolist() == [1, 1, 0]
    assert projections[:2, 0].tolist() == [-1.5, 1.5]
    assert projections[2].isnan().all()
    assert rows[:2, 3].tolist() == [2.0, 2.0]
    assert_same_bits(rows[2], before[2])


@pytest.mark.parametrize("op", list(OPS))
@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("size", [67, 72, 1040, HELD[torch.bfloat16] + 8])
def test_every_element_counts_in_the_norm(op, directions, size):
    """Each row has one massive element, elsewhere in its vector, thread and warp; the last row has none."""
    places = [0, 1, 7, 8, 30, 37, 65, 66, *(place for place in (255, 256, 511, 519, 1033, 1039) if place < size)]
    rows = torch.zeros(len(places) + 1, size, dtype=torch.bfloat16)
    rows[torch.arange(len(places)), torch.tensor(places)] = 100.0
    before = rows.clone()
    axes = torch.zeros(1, directions, size)
    axes[..., 40] = 1
    floors = torch.full((1, directions), 1.0)
    projections, fired = run_on(Device(resident=2), op, rows, axes, floors, norm_limits=torch.tensor([99.0]))
    assert fired.any(-1).tolist() == [False] * len(places) + [True]
    assert projections[:-1].isnan().all()
    assert_same_bits(rows[:-1], before[:-1])
    assert rows[-1, 40] == 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", list(OPS))
@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("size", [72, 1040, HELD[torch.bfloat16] + 8])
def test_a_norm_limit_is_of_its_slot(dtype, op, directions, size):
    """One slot's is infinite, and a row without a slot has none. Each slot has targets and lifts of its own, too."""
    slots = torch.tensor([0, 1, 2, -1, 2, 1, 0, 1], dtype=torch.int32)
    norms = torch.tensor([400.0, 3.0, 60.0, 900.0, 40.0, 5.0, 4.0, 3.5])
    rows = torch.zeros(len(slots), size, dtype=dtype)
    rows[:, size - 1] = norms.to(dtype)
    before = rows.clone()
    axes, lifts, targets = torch.zeros(3, directions, size), torch.zeros(3, directions, size), torch.ones(3, directions)
    for slot in range(3):
        for k in range(directions):
            axes[slot, k, 2 * k] = lifts[slot, k, 2 * k] = 1
            lifts[slot, k, 20 + slot] = 0.5
            targets[slot, k] = 1.5 + slot + k
    bank = {"targets": targets, "lifts": lifts, "norm_limits": torch.tensor([math.inf, 4.0, 50.0])}
    projections, fired = run_on(Device(resident=2), op, rows, axes, torch.ones(3, directions), slots, **bank)
    is_capped = [True, True, False, False, True, False, True, True]
    assert fired.tolist() == [[int(capped)] * directions for capped in is_capped]
    assert projections.isnan().tolist() == [[not capped] * directions for capped in is_capped]
    expected = before.clone()
    for row, slot in enumerate(slots.tolist()):
        for k in range(directions if is_capped[row] else 0):
            expected[row] += (targets[slot, k] * lifts[slot, k]).to(dtype)
    assert_same_bits(rows, expected)


@pytest.mark.parametrize("op", list(OPS))
@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("size", [72, 1040])
def test_a_norm_limit_is_squared_in_float32(op, directions, size):
    """A row of one element has that element's square, rounded: a row at its limit is capped, whatever the rounding."""
    count = 24
    limits = torch.rand(count, generator=torch.Generator().manual_seed(4)) + 0.5
    rows = torch.zeros(2 * count, size)
    rows[:count, size - 1] = limits
    rows[count:, size - 1] = limits * (1 + 2.0**-21)
    slots = torch.arange(count, dtype=torch.int32).repeat(2)
    axes = torch.zeros(count, directions, size)
    axes[..., 3] = 1
    floors = torch.ones(count, directions)
    _, fired = run_on(Device(), op, rows, axes, floors, slots, norm_limits=limits)
    assert fired[:, 0].tolist() == [1] * count + [0] * count


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("op", list(OPS))
@pytest.mark.parametrize("directions", [1, 2])
def test_a_sum_of_squares_that_overflows_is_beyond_a_finite_limit(dtype, op, directions):
    """Not beyond an infinite one, nor beyond a limit whose square is infinite."""
    for size in (72, 1040, HELD[dtype] + 8):
        rows = torch.zeros(3, size, dtype=dtype)
        rows[:, size - 1] = 2.0**65
        before = rows.clone()
        axes = torch.zeros(3, directions, size)
        axes[..., 3] = 1
        projections, fired = run_on(
            Device(resident=2), op, rows, axes, torch.ones(3, directions), torch.arange(3, dtype=torch.int32),
            norm_limits=torch.tensor([2.0**63, 2.0**64, math.inf]),
        )  # fmt: skip
        assert fired[:, 0].tolist() == [0, 1, 1]
        assert projections.isnan().all(-1).tolist() == [True, False, False]
        assert_same_bits(rows[0], before[0])
        assert rows[1:, 3].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", list(OPS))
@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("lifted", [False, True])
@pytest.mark.parametrize("width", ["narrow", "wide"])
def test_a_row_below_its_floor_ends_at_its_target(dtype, op, directions, lifted, width):
    """One that is at its floor, or between floor and target, is not changed."""
    size = HELD[dtype] + 8 if width == "wide" else 1040
    rows = torch.zeros(4, size, dtype=dtype)
    for k in range(directions):
        rows[:, 3 + k] = torch.tensor([1.0, -2.0, 2.0, 2.5])
    before = rows.clone()
    axes = torch.zeros(1, directions, size)
    for k in range(directions):
        axes[0, k, 3 + k] = 1
    lifts = axes.clone()
    lifts[..., 9] = 0.5
    targets = torch.tensor([[3.0, 6.0]])[:, :directions].contiguous()
    bank = {"targets": targets, "lifts": lifts} if lifted else {"targets": targets}
    _, fired = run_on(Device(resident=2), op, rows, axes, torch.full((1, directions), 2.0), **bank)
    assert fired.tolist() == [[1] * directions] * 2 + [[0] * directions] * 2
    for k in range(directions):
        assert rows[:2, 3 + k].tolist() == [targets[0, k]] * 2
    corrections = [sum(float(targets[0, k]) - p for k in range(directions)) for p in (1.0, -2.0)]
    assert rows[:2, 9].tolist() == ([correction / 2 for correction in corrections] if lifted else [0.0, 0.0])
    assert_same_bits(rows[2:], before[2:])


@pytest.mark.parametrize("op", list(OPS))
@pytest.mark.parametrize("size", [1040, HELD[torch.float32] + 8])
def test_a_projection_that_a_correction_makes_infinite_leaves_the_row_alone(op, size):
    """The second direction's: every element stays finite, and so the correction of the first alone would be kept."""
    rows = torch.zeros(1, size)
    rows[0, 5] = 3e38
    before = rows.clone()
    axes = torch.zeros(1, 2, size)
    axes[0, 0, 3] = 1
    axes[0, 1, 3] = axes[0, 1, 5] = 0.5**0.5
    projections, fired = run_on(Device(resident=1), op, rows, axes, torch.tensor([[3e38, 0.0]]))
    assert fired.tolist() == [[0, 0]]
    assert projections.isnan().all()
    assert_same_bits(rows, before)


@pytest.mark.parametrize("op", list(OPS))
@pytest.mark.parametrize("size", [72, 1040])
@pytest.mark.parametrize("resident", [1, 3, 100])
def test_a_slot_behind_the_bank_is_refused_wherever_it_comes(op, size, resident):
    """A block's first row, those on their way with it, and those behind: num_slots itself, and what lies around it."""
    slots = torch.tensor([2, 3, 2, 0, 2, 1, 2, -1, 2], dtype=torch.int32)
    for turn in range(3):
        rows = torch.randn(9, size, generator=torch.Generator().manual_seed(turn)).bfloat16()
        before, mine = rows.clone(), slots.roll(turn)
        bank = unit(2, 1, size), torch.full((2, 1), 100.0)
        projections, fired = run_on(Device(resident=resident), op, rows, *bank, mine)
        inside = (mine >= 0) & (mine < 2)
        assert fired[:, 0].bool().tolist() == inside.tolist()
        assert projections[:, 0].isnan().tolist() == (~inside).tolist()
        assert_same_bits(rows[~inside], before[~inside])


@pytest.mark.parametrize("op", list(OPS))
@pytest.mark.parametrize("size", NARROW_AND_WIDE)
def test_rows_may_lie_further_apart_than_32_bits_reach(op, size):
    """Of two streams, at strides of their own; memory between the rows is never touched."""
    stride = (1 << 31) + 8
    near = torch.randn(2, 3, size, generator=torch.Generator().manual_seed(2)).bfloat16()
    far = [
        torch.empty(2 * apart + size, dtype=torch.bfloat16).as_strided((3, size), (apart, 1))
        for apart in (stride, stride + 8)
    ]
    for rows, held in zip(far, near, strict=True):
        rows.copy_(held)
    bank = unit(1, 1, 1, size), torch.full((1, 1, 1), 2.0)
    made = []
    for hidden, residual in (far, near):
        norm, quantized, scales = normed_by(op, torch.ones(size, dtype=torch.bfloat16), near[0])
        Device(resident=1).call([hidden], *bank, residual=None if op == "cap" else residual, **norm)
        if op == "norm_fp8":
            made.append((quantized.view(torch.uint8), scales))
    for rows, held in zip(far, near, strict=True):
        assert_same_bits(rows.contiguous(), held)
    for one, other in zip(*made, strict=True) if made else ():
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("width", ["several rows to a warp", "several warps to a row", "wide"])
def test_an_infinite_shortfall_leaves_the_row_alone(dtype, directions, width):
    """Projection and floor are finite, what lies between them is not; the axis has zeros, and so has the row."""
    sizes = {"several rows to a warp": 72, "several warps to a row": 1040, "wide": HELD[dtype] + 8}
    for op in OPS:
        rows = torch.zeros(2, sizes[width], dtype=dtype)
        rows[:, 3] = torch.tensor([-2e38, 1.0])
        before = rows.clone()
        axes, floors = torch.zeros(1, directions, rows.shape[1]), torch.full((1, directions), 3e38)
        axes[..., 3] = 1
        projections, fired = run_on(Device(), op, rows, axes, floors)
        assert fired.any(-1).tolist() == [0, 1]
        assert projections[:, 0].isnan().tolist() == [True, False]
        assert_same_bits(rows[0], before[0])
        torch.testing.assert_close(rows[1], reference.cap(before, axes, floors)[1])
        # Nor does it have to be the floor that is so far away.
        rows = before.clone()
        projections, fired = run_on(Device(), op, rows, axes, torch.full_like(floors, 0.5), targets=floors)
        assert not fired.any()
        assert projections[:, 0].isnan().tolist() == [True, False]
        assert_same_bits(rows, before)


@pytest.mark.parametrize("size", [72, 67])
@pytest.mark.parametrize("bank", [False, True])
def test_cap_layers_in_one_launch(size, bank):
    """With targets, lifts and limits of each layer, or without."""
    layers = 3
    streams = [torch.randn(5, size, generator=torch.Generator().manual_seed(i)).bfloat16() for i in range(layers)]
    axes, floors = unit(layers, 2, 2, size), torch.zeros(layers, 2, 2)
    slots = torch.tensor([0, 1, -1, 1, 0], dtype=torch.int32)
    more = {}
    if bank:
        more["targets"] = torch.rand(layers, 2, 2, generator=torch.Generator().manual_seed(4))
        more["lifts"] = axes + 0.1 * unit(layers, 2, 2, size, seed=5)
        more["norm_limits"] = math.sqrt(size) * torch.tensor([[1.0, 0.5], [math.inf, 0.9], [0.1, 1.1]])
    before, wanted = [s.clone() for s in streams], [s.clone() for s in streams]
    found_projections = torch.empty(layers, 5, 2)
    device = Device(resident=6)
    device.call(streams, axes, floors, slots, projections=found_projections, **more)
    assert device.launch.grid[1] == layers
    for layer in range(layers):
        alone, projections = Device(), torch.empty(1, 5, 2)
        own = {name: tensor[layer : layer + 1] for name, tensor in more.items()}
        alone.call(
            [wanted[layer]], axes[layer : layer + 1], floors[layer : layer + 1], slots, projections=projections, **own
        )
        assert_same_bits(streams[layer], wanted[layer])
        assert_same_bits(found_projections[layer].nan_to_num(), projections[0].nan_to_num())
        if bank:
            limits = more["norm_limits"][layer].where(slots[:, None] >= 0, 0)[
                torch.arange(5), slots.clamp(min=0).long()
            ]
            is_left_alone = before[layer].float().square().sum(-1) > limits.square()
            assert projections[0].isnan().all(-1).tolist() == is_left_alone.tolist()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [67, 72])
def test_out_of_place_and_projecting(dtype, size):
    case = Input(dtype, 9, size, 2, 1, 0, 1.0, True, True, 6)
    in_place = run_like_the_cpu(Device(), "cap", case)
    out, projections = torch.empty_like(case.hidden), torch.empty(1, 9, 1)
    before = case.hidden.clone()
    Device().call([case.hidden], case.axes[None], case.floors[None], case.slots, out=out, projections=projections)
    assert_same_bits(out, in_place[0].contiguous())
    assert_same_bits(case.hidden, before)
    only = torch.empty(1, 9, 1)
    device = Device()
    device.call([case.hidden], case.axes[None], None, case.slots, out=False, projections=only)
    finite = projections.isfinite()
    assert_same_bits(only[finite], projections[finite])
    assert device.memory["hidden0"].sectors["st"] == 0


# What moves.


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [576, 4096, 8192])
def test_bytes_moved_are_the_minimum(dtype, size):
    """A row is read once, in whole sectors, and written once, only if it fires; the axis once a block."""
    rows = 12
    hidden = torch.randn(rows, size, generator=torch.Generator().manual_seed(0)).to(dtype)
    axes = unit(1, 1, 1, size)
    fires = torch.arange(rows) % 3 == 0
    floors = torch.zeros(1, 1, 1)
    x = hidden.float() + (torch.where(fires, -2.0, 2.0) - hidden.float() @ axes[0, 0, 0])[:, None] * axes[0, 0, 0]
    hidden = x.to(dtype)
    device = Device(resident=4)
    device.call([hidden], axes, floors)
    rows_of, axis = device.memory["hidden0"], device.memory["axes"]
    row_bytes = size * hidden.element_size()
    assert rows_of.sectors["ld"] * 32 == rows * row_bytes
    assert rows_of.sectors["st"] * 32 == int(fires.sum()) * row_bytes
    assert rows_of.requested["ld"] == rows * row_bytes
    assert rows_of.requested["st"] == int(fires.sum()) * row_bytes
    readers = device.launch.grid[0] * max(1, device.launch.block // _C.plan(TYPES[dtype][0], size, rows, 4)[0])
    assert axis.requested["ld"] == min(readers, rows) * size * 4

    residual, weight = torch.zeros(rows, size, dtype=dtype), torch.ones(size, dtype=dtype)
    moved = []
    for floor in (-math.inf, 1e3):
        device = Device(resident=4)
        device.call([hidden.clone()], axes, torch.full((1, 1, 1), floor), residual=residual.clone(), weight=weight)
        both = [device.memory[name] for name in ("hidden0", "residual")]
        moved.append([buffer.sectors[kind] * 32 for buffer in both for kind in ("ld", "st")])
    # The norm reads both streams once and writes both once, capped or not.
    assert moved[0] == moved[1] == [rows * row_bytes] * 4


@pytest.mark.parametrize("op", list(OPS))
@pytest.mark.parametrize("directions", [1, 3])
def test_every_stream_is_read_once(op, directions):
    """Also where it is corrected, by any number of directions, and where its norm has a limit."""
    size, rows = 1536, 7
    streams = {name: torch.randn(rows, size).bfloat16() for name in ("hidden0", "residual")}
    if op == "cap":
        del streams["residual"]
    weight, quantized, _ = normed_by(op, torch.ones(size).bfloat16(), torch.empty(rows, size))
    device = Device(resident=2)
    device.call(
        [streams["hidden0"]],
        unit(1, 1, directions, size),
        torch.full((1, 1, directions), 9.0),
        residual=streams.get("residual"),
        norm_limits=torch.full((1, 1), 1e3),
        **weight,
    )
    written = {"cap": ["hidden0"], "norm": ["hidden0", "residual"]}.get(op, ["residual"])
    for name in streams:
        buffer = device.memory[name]
        assert buffer.sectors["ld"] * 32 == buffer.requested["ld"] == rows * size * 2
        assert buffer.sectors["st"] * 32 == (rows * size * 2 if name in written else 0)
    if quantized is not None:  # a byte for two
        assert device.memory["quantized"].sectors["st"] * 32 == rows * size


# The plan.


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_plan_for_every_size(dtype):
    name = TYPES[dtype][0]
    per = 16 // dtype.itemsize
    for size in range(1, HELD[dtype] + 1):
        threads, block, shared, _ = _C.plan(name, size, 4096, 132)
        assert threads * 4 * per >= size
        assert (threads <= 32 and threads & (threads - 1) == 0) or threads % 32 == 0
        assert threads == 1 or threads * 4 * per < 2 * size + 32 * 4 * per  # and not many more than that
        assert block % 32 == 0
        assert block <= 512
        assert shared == block * 128
        assert block == threads if threads > 32 else block % threads == 0
        for rows, resident in ((0, 132), (1, 132), (7, 1), (4097, 1056)):
            *now, grid = _C.plan(name, size, rows, resident)
            assert now == [threads, block, shared]  # the bits hang on them
            units = -(-rows // (block // threads))
            assert grid == 0 if rows == 0 else 0 < grid <= min(units, resident)
            if grid:  # as few turns as can be, and the blocks share them evenly
                assert -(-units // grid) == -(-units // resident)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("int8", 64, 1, 1), "dtype must be float32, bfloat16 or float16, got int8"),
        (("bfloat16", 0, 1, 1), "hidden_size must be from 1 to 24576, got 0"),
        (("float32", 24577, 1, 1), "hidden_size must be from 1 to 24576, got 24577"),
        (("float16", 64, -1, 1), "rows must not be negative, got -1"),
        (("float16", 64, 1, 0), "resident must be at least 1, got 0"),
    ],
)
def test_a_plan_that_cannot_be(arguments, message):
    with pytest.raises(ValueError, match=message):
        _C.plan(*arguments)


# Statistics.


@pytest.mark.parametrize("whole", [False, True])
def test_the_statistics_kernel(whole):
    """By warps, of which the last block has one too many, and by blocks; a slot without rows, and one that has all."""
    generator = torch.Generator().manual_seed(2)
    layers, rows, slots, directions = (2, 700, 3, 2) if whole else (2, 200, 7, 2)
    projections = torch.randn(layers, rows, directions, generator=generator)
    projections[1, 5] = math.nan
    floors = torch.randn(layers, slots, directions, generator=generator)
    slot = torch.randint(-1, slots - 1, (rows,), generator=generator).int()
    found, wanted = (torch.stack([ops.new_stats(slots, directions)] * layers) for _ in range(2))
    (kernel,) = [kernel for name, kernel in kernels().items() if f"accumulate_rowsILb{int(whole)}" in name]
    for part, own in ((slice(0, 330 if whole else 130), slot), (slice(70, None), slot), (slice(0, rows), None)):
        piece = projections[:, part]
        own = None if own is None else own[part].clone()
        ops.accumulate_(wanted, piece, floors, own)
        memory = Memory()
        # The step is the first rows of a buffer with room for more.
        buffer = torch.nn.functional.pad(piece, (0, 0, 0, 7))
        tensors = {"projections": buffer, "floors": floors, "slots": own, "found": found}
        places = [0 if tensor is None else memory.add(name, raw(tensor)) for name, tensor in tensors.items()]
        sizes = [piece.shape[1], slots, directions, layers, buffer.stride(0)]
        planned, block, grid = _C.stats_plan(piece.shape[1], slots, layers)
        assert planned == whole
        Launch(kernel, memory, np.array([*places, *sizes], np.int64).tobytes(), (grid, layers), block).run()
    torch.testing.assert_close(found, wanted, rtol=1e-14, atol=0)
    counts = [_C.STAT_FIELDS.index(name) for name in ("seen", "fired", "below", "nonfinite", "min", "max")]
    assert torch.equal(found[..., counts], wanted[..., counts])


def test_what_the_statistics_of_a_large_step_take():
    """A step of 1,024 requests, of eight layers: a warp for each of their prompts and answers."""
    assert _C.stats_plan(1024, 2048, 8) == (False, 128, 512)
    assert _C.stats_plan(8192, 1, 1) == (True, 1024, 1)
    slots, rows = 64, 64
    memory = Memory()
    stats, floors = ops.new_stats(slots, 1)[None], torch.zeros(1, slots, 1)
    tensors = {"projections": torch.randn(1, rows, 1), "floors": floors, "slots": torch.arange(rows).int(), "s": stats}
    places = [memory.add(name, raw(tensor)) for name, tensor in tensors.items()]
    _, block, grid = _C.stats_plan(rows, slots, 1)
    (kernel,) = [kernel for name, kernel in kernels().items() if "accumulate_rowsILb0" in name]
    launch = Launch(kernel, memory, np.array([*places, rows, slots, 1, 1, rows], np.int64).tobytes(), (grid, 1), block)
    launch.run()
    assert memory["projections"].requested["ld"] == rows * 4  # each row's own slot alone reads it
    assert memory["slots"].sectors["ld"] * 32 == slots * rows * 4
    assert memory["s"].requested["st"] == slots * len(_C.STAT_FIELDS) * 8


# Rows that are wider than a block's registers.


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", list(OPS))
def test_wide_rows_against_the_oracle(dtype, op):
    """Up to the widest; in whole vectors or not, of a direction or more, with slots and without."""
    for seed, size in enumerate((HELD[dtype] + 1, HELD[dtype] + 8, WIDEST - 1, WIDEST)):
        more = {"targets": seed % 2 == 1, "lifts": seed % 2 == 0, "norm_limits": seed % 3 == 0}
        case = Input(dtype, 3, size, 2, 1 + seed % 2, 8 * (seed % 2), 1.0, seed < 2, seed % 2 == 1, seed, **more)
        device = Device(resident=2)
        check_against_the_oracle(device, op, case)
        assert device.name == shared_kernel(dtype, op)
        assert device.launch.block == 512
        assert device.launch.dynamic == -(-size // 1024) * 4096
    several = Input(dtype, 3, HELD[dtype] + 8, 2, 2, 0, 1.0, True, False, 9, lifts=True)  # each with a lift of its own
    check_against_the_oracle(Device(resident=2), op, several)


@pytest.mark.parametrize("op", list(OPS))
@pytest.mark.parametrize("directions", [1, 2])
def test_wide_special_rows(op, directions):
    """What the narrow kernels leave alone: a row that is not finite, one out of range, one without a slot, at its
    floor; rows in memory of one alignment give the bits of those in another.
    """
    dtype, size, place = torch.bfloat16, HELD[torch.bfloat16] + 2056, 16390
    rows, axes, floors, slots = at_the_edge(dtype, size, place)
    rows, slots = torch.cat([rows, rows[:1], rows[:1]]), torch.cat([slots, torch.tensor([-1, 2], dtype=torch.int32)])
    some = slice(None) if directions == 2 else [0, 1, 2, 4, 5]
    rows, slots = rows[some].contiguous(), slots[some].contiguous()
    axes, floors = axes[:, :directions].contiguous(), floors[:, :directions].contiguous()
    found = []
    for padding in (0, 1):
        out = torch.zeros(len(rows), size + padding, dtype=dtype)[:, :size]
        out.copy_(rows)
        projections, fired = run_on(Device(resident=2), op, out, axes, floors, slots)
        found.append(out.contiguous())
        left = [0, 2, len(rows) - 2, len(rows) - 1]
        assert fired.any(-1)[left].tolist() == [False] * 4
        assert projections[[0, *left[2:]]].isnan().all()
        assert projections[[i for i in range(len(rows)) if i not in left or i == 2]].isfinite().all()
        assert_same_bits(out[left].contiguous(), rows[left])
    assert_same_bits(*found)
    wanted = reference.cap(rows, axes, floors, slots.where(slots < len(axes), -1))
    torch.testing.assert_close(found[0], wanted)


@pytest.mark.skipif(_C.accelerator() is None, reason="this build has no kernels for a GPU, and so no limit")
def test_a_row_that_no_kernel_takes_is_refused_when_its_axes_are_installed():
    with FakeTensorMode():  # a bank on a GPU, of which only its sizes are looked at
        axes, floors = torch.empty(1, 1, WIDEST + 1, device="cuda"), torch.empty(1, 1, device="cuda")
        with pytest.raises(ValueError, match="axes must have an H of at most 24576 on cuda:0, got 24577"):
            _C.Bank(axes, floors)


@pytest.mark.parametrize("out", [True, False])
def test_wide_rows_into_another_tensor(out):
    """All of them written there, or their projections alone."""
    size = HELD[torch.bfloat16] + 8
    case = Input(torch.bfloat16, 5, size, 2, 1, 0, 1.0, True, True, 3)
    before, target = case.hidden.clone(), torch.empty_like(case.hidden) if out else False
    projections = torch.empty(1, 5, 1)
    device = Device(resident=2)
    device.call([case.hidden], case.axes[None], case.floors[None] if out else None, case.slots, out=target,
                projections=projections)  # fmt: skip
    assert_same_bits(case.hidden.contiguous(), before.contiguous())
    assert device.memory["hidden0"].sectors["st"] == 0
    if out:
        in_place = before.clone()
        Device(resident=1).call([in_place], case.axes[None], case.floors[None], case.slots)
        assert_same_bits(target, in_place)


@pytest.mark.parametrize(
    ("op", "loads", "stores"), [("cap", 1, 1), ("cap_residual", 4, 1), ("norm", 2, 2), ("norm_fp8", 2, 1)]
)
def test_what_a_wide_row_moves(op, loads, stores):
    """A stream of its own is read once and written once; a residual that is corrected is read again beside hidden."""
    size, rows = HELD[torch.bfloat16] + 2048, 3
    hidden = torch.randn(rows, size).bfloat16()
    device = Device(resident=2)
    run_on(device, op, hidden, unit(1, 1, size), torch.full((1, 1), 9.0), norm_limits=torch.tensor([1e3]))
    streams = [device.memory[name] for name in ("hidden0",) + (() if op == "cap" else ("residual",))]
    for kind, times in (("ld", loads), ("st", stores)):
        assert sum(buffer.sectors[kind] for buffer in streams) * 32 == times * rows * size * 2


# Planted faults: each must be caught by what is above.


def mutated(name: str, change) -> dict[str, Kernel]:
    """The module with one kernel's instructions changed by change(code) -> code of the same length."""
    kernel = kernels()[name]
    code = change(list(kernel.code))
    assert len(code) == len(kernel.code)
    assert code != kernel.code, "the fault was not planted"
    return {**kernels(), name: dataclasses.replace(kernel, code=code)}


def nop(instruction: Instruction) -> Instruction:
    return dataclasses.replace(instruction, op="griddepcontrol.launch_dependents", operands=(), guard=None)


def first(code: list[Instruction], op: str, start: int = 0) -> int:
    return next(i for i in range(start, len(code)) if code[i].op.startswith(op))


def squarings(code: list[Instruction]) -> list[int]:
    """The steps of the sum of squares of the row as it came."""
    return [
        i for i in range(first(code, "vote")) if code[i].op == "fma.rn.f32" and len(set(code[i].operands[1:3])) == 1
    ]


def squared_limit(code: list[Instruction]) -> int:
    return next(i for i in range(len(code)) if code[i].op == "mul.f32" and len(set(code[i].operands[1:])) == 1)


def load_of(code: list[Instruction], register: str) -> int:
    """From the bank. The value for a bank without that tensor is in the register already."""
    return next(i for i in range(len(code)) if code[i].op == "ld.global.nc.f32" and code[i].operands[0] == register)


def last_shuffle(code: list[Instruction]) -> int:
    """Of the projection's sum: behind it stand the sum of squares, and that over a row which may be out of range."""
    return max(i for i in range(squarings(code)[0]) if code[i].op.startswith("shfl"))


def drop_a_lane(code):
    """The sum leaves out what the last shuffle brings."""
    at = first(code, "add.f32", last_shuffle(code))
    code[at] = dataclasses.replace(code[at], op="mov.f32", operands=code[at].operands[:2])
    return code


def drop_the_barrier(code):
    return [nop(i) if i.op.startswith("bar.") else i for i in code]


def read_one_too_far(code):
    """A tail's bounds are off by one: at + e <= size for at + e < size."""
    for at in [i for i, instruction in enumerate(code) if instruction.op == "ld.global.u16"]:
        test = max(i for i in range(at) if code[i].op.startswith("setp"))
        if code[test].op == "setp.ge.s32":
            code[test] = dataclasses.replace(code[test], op="setp.gt.s32")
    return code


def forget_the_slot(code):
    """Every slot gets the first one's axis: slot * H becomes H * 0."""
    at = first(code, "ld.global.nc")
    product = max(i for i in range(at) if code[i].op == "mul.lo.s64")
    code[product] = dataclasses.replace(code[product], op="mov.u64", operands=(code[product].operands[0], "0"))
    return code


def store_what_did_not_fire(code):
    """The branch around the stores of a row is never taken."""
    at = first(code, "st.global.v4")
    targets = kernels()[PLANTED].labels
    around = [i for i in range(at) if code[i].op == "bra" and code[i].guard and targets[code[i].operands[0]] > at]
    for i in around[-2:]:
        code[i] = nop(code[i])
    return code


def shuffle_apart(code):
    """Half of a warp does not come to the shuffle."""
    spare = first(code, "griddepcontrol.launch_dependents")
    code[spare] = dataclasses.replace(code[spare], op="setp.lt.u32", operands=("%p9999", "%tid.x", "16"))
    at = last_shuffle(code)
    code[at] = dataclasses.replace(code[at], guard="%p9999")
    return code


def misalign(code):
    """A vector is read from two bytes further on."""
    at = first(code, "cp.async.cg")
    address = code[at].operands[1].strip("[]")
    sum_of = max(i for i in range(at) if code[i].op == "add.s64" and code[i].operands[0] == address)
    code[sum_of] = dataclasses.replace(code[sum_of], operands=(address, code[sum_of].operands[1], "2"))
    return code


def do_not_wait(code):
    """A row is used while it is on its way."""
    return [nop(i) if i.op == "cp.async.wait_group" else i for i in code]


def wait_for_too_few(code):
    """The row that is waited for is the one before."""
    at = first(code, "cp.async.wait_group")
    code[at] = dataclasses.replace(code[at], operands=("2",))
    return code


def do_not_wait_for_the_kernel_before(code):
    return [nop(i) if i.op == "griddepcontrol.wait" else i for i in code]


def wait_behind_the_first_loads(code):
    """The wait stands where the first slot has been read."""
    loads = first(code, "ld.global")
    code[first(code, "griddepcontrol.wait")] = nop(code[loads])
    code[first(code, "setp", loads)] = dataclasses.replace(
        code[first(code, "setp", loads)], op="griddepcontrol.wait", operands=()
    )
    return code


def offset_of_32_bits(code):
    """row * stride, with 32 bits of each."""
    return [dataclasses.replace(i, op="mul.wide.s32") if i.op == "mul.lo.s64" else i for i in code]


def fire_at_the_floor(code):
    """projection <= floor for projection < floor, and shortfall >= 0 for > 0."""
    inverse = {"setp.geu.f32": "setp.gtu.f32", "setp.leu.f32": "setp.ltu.f32"}
    return [
        dataclasses.replace(i, op=inverse[i.op])
        if i.op in inverse and (i.operands[2].startswith("%") or i.operands[2] == "0f00000000")
        else i
        for i in code
    ]


def accept_one_slot_more(code):
    """Of a block's first row: slot <= num_slots."""
    at = first(code, "setp.gt.u64")
    code[at] = dataclasses.replace(code[at], op="setp.ge.u64")
    return code


def never_look_whether_it_fits(code):
    """No correction counts as a large one: not even an infinite one."""
    return [
        dataclasses.replace(i, operands=(*i.operands[:2], "0f7F800000")) if i.operands[2:] == ("0f4E800000",) else i
        for i in code
    ]


def ignore_the_target(code):
    """Rows end at their floors."""
    correction = first(code, "sub.f32")
    at = load_of(code, code[correction].operands[1])
    code[at] = nop(code[at])
    return code


def ignore_the_limit(code):
    """Every limit is infinite."""
    at = load_of(code, code[squared_limit(code)].operands[1])
    code[at] = nop(code[at])
    return code


def take_the_limit_of_the_first_slot(code):
    at = load_of(code, code[squared_limit(code)].operands[1])
    address = code[at].operands[1].strip("[]")
    sum_of = max(i for i in range(at) if code[i].op == "add.s64" and code[i].operands[0] == address)
    code[sum_of] = dataclasses.replace(code[sum_of], operands=(address, code[sum_of].operands[1], "0"))
    return code


def leave_an_element_out_of_the_norm(code):
    """The last one of each vector."""
    at = squarings(code)[-1]
    code[at] = dataclasses.replace(code[at], op="mov.f32", operands=(code[at].operands[0], code[at].operands[3]))
    return code


def leave_a_lane_out_of_the_norm(code):
    """The sum leaves out what the last shuffle brings."""
    limit = squared_limit(code)
    at = first(code, "add.f32", max(i for i in range(limit) if code[i].op.startswith("shfl")))
    code[at] = dataclasses.replace(code[at], op="mov.f32", operands=code[at].operands[:2])
    return code


def leave_a_row_at_its_limit_alone(code):
    """squares >= limit * limit for >."""
    at = first(code, "setp.leu.f32", squared_limit(code))
    code[at] = dataclasses.replace(code[at], op="setp.ltu.f32")
    return code


TARGETS, SLOTS = test_a_row_below_its_floor_ends_at_its_target, test_a_norm_limit_is_of_its_slot
ELEMENTS, LIMIT = test_every_element_counts_in_the_norm, test_a_row_at_its_norm_limit_is_capped
PLANTED = kernel_name(torch.bfloat16, "cap", False, True)
UNALIGNED = kernel_name(torch.bfloat16, "cap", False, False)


@pytest.mark.parametrize(
    ("change", "size", "error", "message"),
    [
        (drop_a_lane, 1040, AssertionError, None),
        (drop_the_barrier, 1040, PtxError, "a race: shared|a read of shared where nothing"),
        (read_one_too_far, 67, PtxError, "an access outside of hidden0"),
        (forget_the_slot, 1040, AssertionError, None),
        (store_what_did_not_fire, 1040, AssertionError, None),
        (shuffle_apart, 1040, PtxError, "a shuffle under divergence"),
        (misalign, 1040, PtxError, "a copy that is not 16 bytes at a multiple of 16"),
        (do_not_wait, 1040, PtxError, "shared is used while it is being copied"),
        (wait_for_too_few, 1040, PtxError, "shared is used while it is being copied"),
    ],
)
def test_planted_faults_are_caught(change, size, error, message):
    name = PLANTED if size == 1040 else UNALIGNED
    case = Input(torch.bfloat16, 9, size, 2, 1, 0, 1.0, size == 1040, False, 1)
    check_bits_and_oracle(Device(), case)
    with pytest.raises(error, match=message):
        check_bits_and_oracle(Device(mutated(name, change)), case)


@pytest.mark.parametrize(
    ("change", "check", "error", "message"),
    [
        (
            do_not_wait_for_the_kernel_before,
            functools.partial(test_cap_layers_in_one_launch, 72, False),
            PtxError,
            "before the wait",
        ),
        (
            wait_behind_the_first_loads,
            functools.partial(test_cap_layers_in_one_launch, 72, False),
            PtxError,
            "before the wait",
        ),
        (
            offset_of_32_bits,
            functools.partial(test_rows_may_lie_further_apart_than_32_bits_reach, "cap", 1040),
            PtxError,
            "where nothing is",
        ),
        (
            fire_at_the_floor,
            functools.partial(test_a_projection_at_its_floor_does_not_fire, "cap", 1, 1040),
            AssertionError,
            None,
        ),
        (
            accept_one_slot_more,
            functools.partial(test_a_slot_behind_the_bank_is_refused_wherever_it_comes, "cap", 1040, 100),
            (AssertionError, PtxError),
            None,
        ),
        (
            never_look_whether_it_fits,
            functools.partial(
                test_an_infinite_shortfall_leaves_the_row_alone, torch.bfloat16, 1, "several rows to a warp"
            ),
            AssertionError,
            None,
        ),
        *(
            (change, functools.partial(check, *arguments), AssertionError, None)
            for change, check, arguments in (
                (ignore_the_target, TARGETS, (torch.bfloat16, "cap", 1, False, "narrow")),
                (ignore_the_target, TARGETS, (torch.bfloat16, "cap", 2, True, "narrow")),
                (ignore_the_limit, SLOTS, (torch.bfloat16, "cap", 1, 1040)),
                (ignore_the_limit, SLOTS, (torch.bfloat16, "cap", 2, 72)),
                (take_the_limit_of_the_first_slot, SLOTS, (torch.bfloat16, "cap", 1, 1040)),
                (take_the_limit_of_the_first_slot, SLOTS, (torch.bfloat16, "cap", 2, 72)),
                (leave_an_element_out_of_the_norm, ELEMENTS, ("cap", 1, 1040)),
                (leave_an_element_out_of_the_norm, ELEMENTS, ("cap", 2, 72)),
                (leave_a_lane_out_of_the_norm, ELEMENTS, ("cap", 1, 1040)),
                (leave_a_row_at_its_limit_alone, LIMIT, (torch.bfloat16, "cap", 1, "narrow")),
                (leave_a_row_at_its_limit_alone, LIMIT, (torch.bfloat16, "cap", 2, "narrow")),
            )
        ),
    ],
)
def test_planted_faults_are_caught_by_what_is_for_them(change, check, error, message, monkeypatch):
    check()
    names = PLANTED, kernel_name(torch.bfloat16, "cap", True, True)
    planted = kernels() | {name: mutated(name, change)[name] for name in names}
    monkeypatch.setattr(emulated, "kernels", lambda: planted)
    with pytest.raises(error, match=message):
        check()


@pytest.mark.parametrize(
    ("change", "op", "error", "message"),
    [
        (drop_the_barrier, "cap", PtxError, "a race: shared|a read of shared where nothing"),
        (do_not_wait_for_the_kernel_before, "norm", PtxError, "before the wait"),
        (accept_one_slot_more, "cap_residual", (AssertionError, PtxError), None),
        (never_look_whether_it_fits, "cap", AssertionError, None),
        (read_one_too_far, "cap", PtxError, "an access outside of|where nothing is"),
    ],
)
def test_planted_faults_are_caught_in_wide_rows(change, op, error, message, monkeypatch):
    name = shared_kernel(torch.bfloat16, op)
    planted = mutated(name, change)
    monkeypatch.setattr(emulated, "kernels", lambda: planted)
    check = functools.partial(test_wide_special_rows, op, 1)
    if change is read_one_too_far:
        case = Input(torch.bfloat16, 2, HELD[torch.bfloat16] + 3, 2, 1, 0, 1.0, False, False, 1)
        check = functools.partial(check_against_the_oracle, Device(), op, case)
    with pytest.raises(error, match=message):
        check()


@pytest.mark.parametrize(
    ("change", "check", "arguments"),
    [
        (ignore_the_target, TARGETS, ("wide",)),
        (ignore_the_limit, SLOTS, (HELD[torch.bfloat16] + 8,)),
        (take_the_limit_of_the_first_slot, SLOTS, (HELD[torch.bfloat16] + 8,)),
        (leave_an_element_out_of_the_norm, ELEMENTS, (HELD[torch.bfloat16] + 8,)),
        (leave_a_lane_out_of_the_norm, ELEMENTS, (HELD[torch.bfloat16] + 8,)),
        (leave_a_row_at_its_limit_alone, LIMIT, ("wide",)),
    ],
)
def test_planted_faults_in_the_bank_of_shared_rows_are_caught(change, check, arguments, monkeypatch):
    before = {TARGETS: (torch.bfloat16, "cap", 1, True), ELEMENTS: ("cap", 1)}.get(check, (torch.bfloat16, "cap", 1))
    planted = mutated(shared_kernel(torch.bfloat16, "cap"), change)
    monkeypatch.setattr(emulated, "kernels", lambda: planted)
    with pytest.raises(AssertionError):
        check(*before, *arguments)


def swap_two(code):
    """Of two numbers that become two bytes, each stands in the other's place."""
    return [
        dataclasses.replace(i, operands=(i.operands[0], i.operands[2], i.operands[1])) if "e4m3x2" in i.op else i
        for i in code
    ]


def leave_a_lane_out(code):
    """The largest of a row leaves out what the last shuffle brings."""
    at = first(code, "max", max(i for i in range(len(code)) if code[i].op.startswith("shfl")))
    code[at] = dataclasses.replace(code[at], op="mov.f32", operands=(code[at].operands[0], code[at].operands[1]))
    return code


def forget_the_least(code):
    """A row's scale may be 0."""
    at = max(i for i in range(len(code)) if code[i].op == "max.f32")
    code[at] = dataclasses.replace(code[at], op="mov.f32", operands=(code[at].operands[0], code[at].operands[1]))
    return code


@pytest.mark.parametrize("size", [1040, HELD[torch.bfloat16] + 2048])
@pytest.mark.parametrize("change", [swap_two, leave_a_lane_out, forget_the_least])
def test_planted_faults_in_fp8_are_caught(change, size):
    wide = size > HELD[torch.bfloat16]
    name = shared_kernel(torch.bfloat16, "norm_fp8") if wide else kernel_name(torch.bfloat16, "norm_fp8", False, True)

    def check(device):
        case = Input(torch.bfloat16, 3, size, 2, 1, 0, 1.0, False, False, 1)
        case.buffer[1] = 0
        check_against_the_oracle(device, "norm_fp8", case)

    check(Device())
    with pytest.raises(AssertionError):
        check(Device(mutated(name, change)))


def check_bits_and_oracle(device: Device, case: Input) -> None:
    """The oracle, and that rows which did not fire were not even written with what they held."""
    check_against_the_oracle(device, "cap", case)
    axes, floors, slots = case.call()
    fired = torch.ops.axiscap.cap(case.hidden, axes, floors, slots)[2].any(-1)
    assert device.memory["hidden0"].requested["st"] == int(fired.sum()) * case.hidden.shape[-1] * 2


def test_an_unknown_opcode_is_an_error():
    def invent(code):
        at = first(code, "fma.rn.f32")
        code[at] = dataclasses.replace(code[at], op="fma.rz.f32")
        return code

    case = Input(torch.bfloat16, 3, 1040, 2, 1, 0, 1.0, True, False, 1)
    with pytest.raises(PtxError, match=r"unknown opcode fma\.rz\.f32"):
        check_against_the_oracle(Device(mutated(PLANTED, invent)), "cap", case)
