"""The CUDA kernels without a GPU: an interpreter runs their PTX, and the oracle of the CPU tests checks the results."""

from __future__ import annotations

import itertools
import math

import limits
import pytest
import torch
from checks import (
    KERNELS,
    NARROW_AND_WIDE,
    WIDEST,
    assert_same_results,
    check_against_oracle,
    norm_arguments,
    run_case,
    run_on,
    sizes_for,
)
from conftest import assert_same_bits, unit
from emulated import LAYER_BYTES, MAX_LAYERS, MAX_REGISTER_SIZE, OPS, Device, kernel_name, kernels, shared_kernel
from hypothesis import given, settings
from op_inputs import DTYPES, Input, around_fp8, in_fp8, inputs


@pytest.mark.slow
def test_the_module_has_the_listed_kernels():
    one_layer = {kernel_name(*entry) for entry in KERNELS}
    several_layers = {kernel_name(dtype, "cap", *rest, MAX_LAYERS) for dtype, op, *rest in KERNELS if op == "cap"}
    cap_kernels = {name for name in kernels() if "accumulate_rows" not in name}
    assert cap_kernels == one_layer | several_layers
    assert len(cap_kernels) == limits.CAP_KERNELS <= limits.MAX_CAP_KERNELS
    assert len(kernels()) == limits.KERNELS
    # The bytes of parameters that a launch copies: those of the call, then those of its layers.
    assert {kernels()[name].parameters[0][1] for name in one_layer} == {216 + LAYER_BYTES}
    assert {kernels()[name].parameters[0][1] for name in several_layers} == {216 + MAX_LAYERS * LAYER_BYTES}


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "op", "any_directions", "aligned"), KERNELS)
def test_every_kernel_matches_the_oracle(dtype, op, any_directions, aligned):
    for seed, size in enumerate(sizes_for(dtype, aligned)):
        for slots in (True, False):
            rows = 3 if size > 4000 else 9
            padding = 8 if aligned else seed % 3
            more = {"targets": seed % 2 == 1, "lifts": seed % 4 < 2, "norm_limits": seed % 3 == 0}
            directions = 3 if any_directions else 1
            case = Input(dtype, rows, size, 2, directions, padding, 1.0, slots, seed % 2 == 1, seed, **more)
            device = Device(resident=2)
            check_against_oracle(device, op, case)
            assert device.name == kernel_name(dtype, op, any_directions, aligned)


@pytest.mark.slow
@settings(max_examples=45)
@given(inputs())
def test_the_properties_of_the_cpu_hold(case):
    if not len(case.hidden):
        return
    for op in OPS:
        check_against_oracle(Device(resident=4), op, case)


@pytest.mark.slow
def test_older_architectures_give_the_same_bits():
    for op, directions in itertools.product(OPS, (1, 3)):
        bank = {"targets": True, "lifts": True, "norm_limits": True}
        case = Input(torch.bfloat16, 5, 1040, 2, directions, 0, 1.0, True, True, 4, **bank)
        assert_same_results(run_case(Device(kernels(80)), op, case), run_case(Device(), op, case))


@pytest.mark.slow
def test_every_architecture_rounds_to_fp8_like_torch():
    """GPUs before sm_89 have no instruction for it, and the kernels round in integers."""
    for source, dtype in itertools.product((kernels(80), kernels(90)), DTYPES):
        weight, ones = around_fp8(dtype), torch.ones(1, 1024, dtype=dtype)
        for scale in (torch.ones(1), torch.tensor([2.0**-9])):
            quantized = torch.zeros(1, 1024).to(torch.float8_e4m3fn)
            norm = {"weight": weight, "quantized": quantized, "scale": scale, "residual": ones.clone()}
            floors = torch.full((1, 1, 1), -math.inf)
            Device(source).call([torch.zeros_like(ones)], unit(1, 1, 1, 1024), floors, **norm)
            assert torch.equal(quantized.view(torch.uint8), in_fp8(weight[None] + 0.0, scale).view(torch.uint8))


@pytest.mark.slow
def test_kernels_wait_for_the_previous_grid_from_sm_90_on():
    assert not any("griddepcontrol" in i.op for kernel in kernels(80).values() for i in kernel.code)
    for name, kernel in kernels(90).items():
        assert ("accumulate_rows" not in name) == any(i.op == "griddepcontrol.wait" for i in kernel.code)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [40, 576, 2056])
def test_a_row_depends_on_itself_alone(dtype, size):
    """Not on the batch, its index in it, the stride, the alignment or the number of blocks."""
    bank = {"targets": True, "lifts": True, "norm_limits": True}
    case = Input(dtype, 11, size, 2, 1, 0, 1.0, True, False, 3, **bank)
    many_blocks = run_case(Device(resident=100), "cap", case)[0]
    few_blocks = run_case(Device(resident=1), "cap", case)[0]
    assert_same_bits(few_blocks.contiguous(), many_blocks.contiguous())
    order = torch.randperm(11, generator=torch.Generator().manual_seed(0))
    unaligned = Input(dtype, 11, size, 2, 1, 1, 1.0, True, False, 3, **bank)
    unaligned.buffer[:, :size] = case.hidden[order]
    unaligned.axes, unaligned.floors, unaligned.slots = case.axes, case.floors, case.slots[order].contiguous()
    unaligned.targets, unaligned.lifts, unaligned.norm_limits = case.targets, case.lifts, case.norm_limits
    device = Device(resident=2)
    shuffled = run_case(device, "cap", unaligned)[0]
    assert device.name == kernel_name(dtype, "cap", False, False)
    assert_same_bits(shuffled.contiguous(), many_blocks[order].contiguous())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", list(OPS))
@pytest.mark.parametrize("directions", [1, 2])
def test_unaligned_rows_have_the_bits_of_aligned_ones(dtype, op, directions):
    """One kernel has a row in registers, the other one in shared memory: sums and roundings are the same."""
    for size in (40, 1040):
        case = Input(dtype, 5, size, 2, directions, 0, 1.0, True, False, 7, lifts=True)
        case.floors[:] = 3.0
        unaligned = Input(dtype, 5, size, 2, directions, 1, 1.0, True, False, 7, lifts=True)
        unaligned.buffer[:, :size], unaligned.floors = case.hidden, case.floors
        unaligned.axes, unaligned.lifts, unaligned.slots = case.axes, case.lifts, case.slots
        aligned_device, unaligned_device = Device(resident=2), Device(resident=2)
        results, expected = run_case(unaligned_device, op, unaligned), run_case(aligned_device, op, case)
        assert aligned_device.name == kernel_name(dtype, op, directions > 1, True)
        assert unaligned_device.name == kernel_name(dtype, op, directions > 1, False)
        assert results[4].any()  # fired
        assert_same_results(results, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", ["cap", "norm"])
@pytest.mark.parametrize("directions", [1, 2])
def test_unaligned_rows_have_the_norm_of_aligned_ones(dtype, op, directions):
    """To the bit: with limits around a row's norm, one float32 apart, both kernels leave the same rows alone."""
    size, count, steps = 1040, 3, 5
    incoming = torch.randn(count, size, generator=torch.Generator().manual_seed(11)).to(dtype)
    bits = incoming.double().norm(dim=-1).float().view(torch.int32)
    limits = bits[:, None] + torch.arange(steps, dtype=torch.int32) - steps // 2
    incoming, limits = incoming.repeat_interleave(steps, 0), limits.flatten().view(torch.float32)
    bank = unit(1, directions, size).repeat(len(limits), 1, 1), torch.full((len(limits), directions), 9.0)
    more = {"slots": torch.arange(len(limits), dtype=torch.int32), "norm_limits": limits}
    fired = []
    for padding in (0, 1):
        rows = torch.zeros(len(limits), size + padding, dtype=dtype)[:, :size]
        rows.copy_(incoming)
        device = Device(resident=2)
        fired.append(run_on(device, op, rows, *bank, **more)[1][:, 0].reshape(count, steps))
        assert device.name == kernel_name(dtype, op, directions > 1, not padding)
    assert fired[0].tolist() == fired[1].tolist() == fired[0].sort().values.tolist()
    assert not fired[0][:, 0].any()
    assert fired[0][:, -1].all()


@pytest.mark.slow
@pytest.mark.parametrize("op", list(OPS))
@pytest.mark.parametrize("size", [40, 1040])
def test_the_order_of_blocks_and_warps_does_not_change_a_bit(op, size):
    case = Input(torch.bfloat16, 7, size, 2, 2, 0, 1.0, True, True, 8, targets=True, norm_limits=True)
    expected = run_case(Device(resident=2), op, case)
    for seed in range(4):
        assert_same_results(run_case(Device(resident=2, seed=seed), op, case), expected)


@pytest.mark.parametrize("op", list(OPS))
@pytest.mark.parametrize("size", NARROW_AND_WIDE)
def test_a_row_stride_may_need_more_than_32_bits(op, size):
    """Two streams with different strides give the rows of contiguous streams. The kernel accesses no bytes between."""
    near = torch.randn(2, 3, size, generator=torch.Generator().manual_seed(2)).bfloat16()
    far = [
        torch.empty(2 * stride + size, dtype=torch.bfloat16).as_strided((3, size), (stride, 1))
        for stride in ((1 << 31) + 8, (1 << 31) + 16)
    ]
    for far_rows, near_rows in zip(far, near, strict=True):
        far_rows.copy_(near_rows)
    bank = unit(1, 1, 1, size), torch.full((1, 1, 1), 2.0)
    norms = []
    for hidden, residual in (far, near):
        norm, quantized, scales = norm_arguments(op, torch.ones(size, dtype=torch.bfloat16), near[0])
        Device(resident=1).call([hidden], *bank, residual=None if op == "cap" else residual, **norm)
        if op == "norm_fp8":
            norms.append((quantized.view(torch.uint8), scales))
    for far_rows, near_rows in zip(far, near, strict=True):
        assert_same_bits(far_rows.contiguous(), near_rows)
    if norms:
        assert_same_results(*norms)


@pytest.mark.parametrize("size", [72, 67])
@pytest.mark.parametrize("has_options", [False, True])
def test_layers_of_one_launch_have_the_bits_of_single_launches(size, has_options):
    """With targets, lifts and norm limits, which differ between the layers, or without them."""
    layers = 3
    streams = [torch.randn(5, size, generator=torch.Generator().manual_seed(i)).bfloat16() for i in range(layers)]
    axes, floors = unit(layers, 2, 2, size), torch.zeros(layers, 2, 2)
    slots = torch.tensor([0, 1, -1, 1, 0], dtype=torch.int32)
    options = {}
    if has_options:
        options["targets"] = torch.rand(layers, 2, 2, generator=torch.Generator().manual_seed(4))
        options["lifts"] = axes + 0.1 * unit(layers, 2, 2, size, seed=5)
        options["norm_limits"] = math.sqrt(size) * torch.tensor([[1.0, 0.5], [math.inf, 0.9], [0.1, 1.1]])
    before, expected = [s.clone() for s in streams], [s.clone() for s in streams]
    projections = torch.empty(layers, 5, 2)
    device = Device(resident=6)
    device.call(streams, axes, floors, slots, projections=projections, **options)
    assert device.launch.grid[1] == layers
    for layer in range(layers):
        expected_projections = torch.empty(1, 5, 2)
        bank = {"axes": axes, "floors": floors, **options}
        layer_bank = {name: tensor[layer : layer + 1] for name, tensor in bank.items()}
        Device().call([expected[layer]], slots=slots, projections=expected_projections, **layer_bank)
        assert_same_bits(streams[layer], expected[layer])
        assert_same_bits(projections[layer].nan_to_num(), expected_projections[0].nan_to_num())
        if has_options:
            slot_limits = options["norm_limits"][layer].where(slots[:, None] >= 0, 0)
            limits = slot_limits[torch.arange(5), slots.clamp(min=0).long()]
            is_left_alone = before[layer].float().square().sum(-1) > limits.square()
            assert projections[layer].isnan().all(-1).tolist() == is_left_alone.tolist()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [67, 72])
def test_a_copy_and_projections_alone_have_the_bits_of_the_cap_in_place(dtype, size):
    case = Input(dtype, 9, size, 2, 1, 0, 1.0, True, True, 6)
    in_place = run_case(Device(), "cap", case)
    out, projections = torch.empty_like(case.hidden), torch.empty(1, 9, 1)
    before = case.hidden.clone()
    Device().call([case.hidden], case.axes[None], case.floors[None], case.slots, out=out, projections=projections)
    assert_same_bits(out, in_place[0].contiguous())
    assert_same_bits(case.hidden, before)
    projections_alone = torch.empty(1, 9, 1)
    device = Device()
    device.call([case.hidden], case.axes[None], None, case.slots, out=False, projections=projections_alone)
    is_finite = projections.isfinite()
    assert_same_bits(projections_alone[is_finite], projections[is_finite])
    assert device.memory["hidden0"].sectors["st"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", list(OPS))
def test_wide_rows_match_the_oracle(dtype, op):
    """Rows up to the widest, with whole vectors or a tail, with one direction or two, with slots and without."""
    for seed, size in enumerate((MAX_REGISTER_SIZE[dtype] + 1, MAX_REGISTER_SIZE[dtype] + 8, WIDEST - 1, WIDEST)):
        more = {"targets": seed % 2 == 1, "lifts": seed % 2 == 0, "norm_limits": seed % 3 == 0}
        case = Input(dtype, 3, size, 2, 1 + seed % 2, 8 * (seed % 2), 1.0, seed < 2, seed % 2 == 1, seed, **more)
        device = Device(resident=2)
        check_against_oracle(device, op, case)
        assert device.name == shared_kernel(dtype, op)
        assert device.launch.block == 512
        assert device.launch.dynamic == -(-size // 1024) * 4096
    two_lifts = Input(dtype, 3, MAX_REGISTER_SIZE[dtype] + 8, 2, 2, 0, 1.0, True, False, 9, lifts=True)
    check_against_oracle(Device(resident=2), op, two_lifts)


@pytest.mark.parametrize("has_out", [True, False])
def test_a_copy_of_wide_rows_has_the_bits_of_the_cap_in_place(has_out):
    """Without out the call computes projections alone."""
    size = MAX_REGISTER_SIZE[torch.bfloat16] + 8
    case = Input(torch.bfloat16, 5, size, 2, 1, 0, 1.0, True, True, 3)
    before, out = case.hidden.clone(), torch.empty_like(case.hidden) if has_out else False
    axes, floors = case.axes[None], case.floors[None]
    device = Device(resident=2)
    projections = torch.empty(1, 5, 1)
    device.call([case.hidden], axes, floors if has_out else None, case.slots, out=out, projections=projections)
    assert_same_bits(case.hidden.contiguous(), before.contiguous())
    assert device.memory["hidden0"].sectors["st"] == 0
    if has_out:
        in_place = before.clone()
        Device(resident=1).call([in_place], axes, floors, case.slots)
        assert_same_bits(out, in_place)
