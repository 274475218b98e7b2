"""The tests of the CUDA kernels find faults that are planted in the PTX."""

from __future__ import annotations

import dataclasses
import functools

import emulated
import faults
import pytest
import test_capped_rows
import test_kernels
import torch
from checks import check_against_oracle
from emulated import MAX_REGISTER_SIZE, Device, kernel_name, kernels, shared_kernel
from op_inputs import Input
from ptx_module import PtxError

#: The tests that must find a fault.
TARGETS = test_capped_rows.test_a_row_below_its_floor_ends_at_its_target
SLOTS = test_capped_rows.test_each_slot_has_its_own_norm_limit
ELEMENTS = test_capped_rows.test_every_element_counts_in_the_norm
LIMIT = test_capped_rows.test_a_row_at_its_norm_limit_is_capped
FLOOR = test_capped_rows.test_a_projection_at_its_floor_does_not_fire
OUTSIDE = test_capped_rows.test_a_row_with_a_slot_outside_of_the_bank_is_left_alone
SHORTFALL = test_capped_rows.test_an_infinite_shortfall_leaves_the_row_alone
LAYERS = test_kernels.test_layers_of_one_launch_have_the_bits_of_single_launches
STRIDE = test_kernels.test_a_row_stride_may_need_more_than_32_bits

#: The size of a wide row of bfloat16.
WIDE = MAX_REGISTER_SIZE[torch.bfloat16] + 8
UNALIGNED_KERNEL = kernel_name(torch.bfloat16, "cap", False, False)


@pytest.mark.parametrize(
    ("change", "size", "error", "message"),
    [
        (faults.drop_a_lane, 1040, AssertionError, None),
        (faults.drop_the_barrier, 1040, PtxError, "a race: shared|a read of shared where nothing"),
        (faults.read_one_too_far, 67, PtxError, "an access outside of hidden0"),
        (faults.forget_the_slot, 1040, AssertionError, None),
        (faults.store_every_row, 1040, AssertionError, None),
        (faults.shuffle_apart, 1040, PtxError, "a shuffle under divergence"),
        (faults.misalign_a_copy, 1040, PtxError, "a copy that is not 16 bytes at a multiple of 16"),
        (faults.do_not_wait, 1040, PtxError, "shared is used while it is being copied"),
        (faults.wait_for_too_few, 1040, PtxError, "shared is used while it is being copied"),
    ],
)
def test_planted_faults_are_caught(change, size, error, message):
    name = faults.PLANTED_KERNEL if size == 1040 else UNALIGNED_KERNEL
    case = Input(torch.bfloat16, 9, size, 2, 1, 0, 1.0, size == 1040, False, 1)
    check_rows_and_stores(Device(), case)
    with pytest.raises(error, match=message):
        check_rows_and_stores(Device(faults.plant(name, change)), case)


@pytest.mark.parametrize(
    ("change", "check", "arguments", "error", "message"),
    [
        (faults.do_not_wait_for_the_kernel_before, LAYERS, (72, False), PtxError, "before the wait"),
        (faults.wait_behind_the_first_loads, LAYERS, (72, False), PtxError, "before the wait"),
        (faults.offset_of_32_bits, STRIDE, ("cap", 1040), PtxError, "where nothing is"),
        (faults.fire_at_the_floor, FLOOR, ("cap", 1, 1040), AssertionError, None),
        (faults.accept_one_slot_too_many, OUTSIDE, ("cap", 1040, 100), (AssertionError, PtxError), None),
        (faults.never_check_the_range, SHORTFALL, (torch.bfloat16, 1, "several rows to a warp"), AssertionError, None),
        (faults.ignore_the_target, TARGETS, (torch.bfloat16, "cap", 1, False, "narrow"), AssertionError, None),
        (faults.ignore_the_target, TARGETS, (torch.bfloat16, "cap", 2, True, "narrow"), AssertionError, None),
        (faults.ignore_the_limit, SLOTS, (torch.bfloat16, "cap", 1, 1040), AssertionError, None),
        (faults.ignore_the_limit, SLOTS, (torch.bfloat16, "cap", 2, 72), AssertionError, None),
        (faults.take_the_limit_of_the_first_slot, SLOTS, (torch.bfloat16, "cap", 1, 1040), AssertionError, None),
        (faults.take_the_limit_of_the_first_slot, SLOTS, (torch.bfloat16, "cap", 2, 72), AssertionError, None),
        (faults.leave_an_element_out_of_the_norm, ELEMENTS, ("cap", 1, 1040), AssertionError, None),
        (faults.leave_an_element_out_of_the_norm, ELEMENTS, ("cap", 2, 72), AssertionError, None),
        (faults.leave_a_lane_out_of_the_norm, ELEMENTS, ("cap", 1, 1040), AssertionError, None),
        (faults.leave_a_row_at_its_limit_alone, LIMIT, (torch.bfloat16, "cap", 1, "narrow"), AssertionError, None),
        (faults.leave_a_row_at_its_limit_alone, LIMIT, (torch.bfloat16, "cap", 2, "narrow"), AssertionError, None),
    ],
)
def test_planted_faults_are_caught_by_their_own_test(change, check, arguments, error, message, monkeypatch):
    check(*arguments)
    names = faults.PLANTED_KERNEL, kernel_name(torch.bfloat16, "cap", True, True)
    planted = kernels() | {name: faults.plant(name, change)[name] for name in names}
    monkeypatch.setattr(emulated, "kernels", lambda: planted)
    with pytest.raises(error, match=message):
        check(*arguments)


@pytest.mark.parametrize(
    ("change", "op", "error", "message"),
    [
        (faults.drop_the_barrier, "cap", PtxError, "a race: shared|a read of shared where nothing"),
        (faults.do_not_wait_for_the_kernel_before, "norm", PtxError, "before the wait"),
        (faults.accept_one_slot_too_many, "cap_residual", (AssertionError, PtxError), None),
        (faults.never_check_the_range, "cap", AssertionError, None),
        (faults.read_one_too_far, "cap", PtxError, "an access outside of|where nothing is"),
    ],
)
def test_planted_faults_are_caught_in_wide_rows(change, op, error, message, monkeypatch):
    name = shared_kernel(torch.bfloat16, op)
    planted = faults.plant(name, change)
    monkeypatch.setattr(emulated, "kernels", lambda: planted)
    check = functools.partial(test_capped_rows.test_wide_rows_without_a_finite_result_or_a_slot_are_left_alone, op, 1)
    if change is faults.read_one_too_far:
        case = Input(torch.bfloat16, 2, MAX_REGISTER_SIZE[torch.bfloat16] + 3, 2, 1, 0, 1.0, False, False, 1)
        check = functools.partial(check_against_oracle, Device(), op, case)
    with pytest.raises(error, match=message):
        check()


@pytest.mark.parametrize(
    ("change", "check", "arguments"),
    [
        (faults.ignore_the_target, TARGETS, (torch.bfloat16, "cap", 1, True, "wide")),
        (faults.ignore_the_limit, SLOTS, (torch.bfloat16, "cap", 1, WIDE)),
        (faults.take_the_limit_of_the_first_slot, SLOTS, (torch.bfloat16, "cap", 1, WIDE)),
        (faults.leave_an_element_out_of_the_norm, ELEMENTS, ("cap", 1, WIDE)),
        (faults.leave_a_lane_out_of_the_norm, ELEMENTS, ("cap", 1, WIDE)),
        (faults.leave_a_row_at_its_limit_alone, LIMIT, (torch.bfloat16, "cap", 1, "wide")),
    ],
)
def test_planted_faults_in_the_bank_of_shared_rows_are_caught(change, check, arguments, monkeypatch):
    planted = faults.plant(shared_kernel(torch.bfloat16, "cap"), change)
    monkeypatch.setattr(emulated, "kernels", lambda: planted)
    with pytest.raises(AssertionError):
        check(*arguments)


@pytest.mark.parametrize("size", [1040, MAX_REGISTER_SIZE[torch.bfloat16] + 2048])
@pytest.mark.parametrize(
    "change", [faults.swap_fp8_bytes, faults.drop_a_lane_of_the_maximum, faults.drop_the_smallest_scale]
)
def test_planted_faults_in_fp8_are_caught(change, size):
    is_wide = size > MAX_REGISTER_SIZE[torch.bfloat16]
    name = (
        shared_kernel(torch.bfloat16, "norm_fp8") if is_wide else kernel_name(torch.bfloat16, "norm_fp8", False, True)
    )

    def check(device):
        case = Input(torch.bfloat16, 3, size, 2, 1, 0, 1.0, False, False, 1)
        case.buffer[1] = 0
        check_against_oracle(device, "norm_fp8", case)

    check(Device())
    with pytest.raises(AssertionError):
        check(Device(faults.plant(name, change)))


def check_rows_and_stores(device: Device, case: Input) -> None:
    """Checks the rows, and that the kernel has stored only rows that fired."""
    check_against_oracle(device, "cap", case)
    axes, floors, slots = case.call()
    fired = torch.ops.axiscap.cap(case.hidden, axes, floors, slots)[2].any(-1)
    assert device.memory["hidden0"].requested["st"] == int(fired.sum()) * case.hidden.shape[-1] * 2


def test_an_unknown_opcode_is_an_error():
    def invent(code):
        index = faults.find_first(code, "fma.rn.f32")
        code[index] = dataclasses.replace(code[index], op="fma.rz.f32")
        return code

    case = Input(torch.bfloat16, 3, 1040, 2, 1, 0, 1.0, True, False, 1)
    with pytest.raises(PtxError, match=r"unknown opcode fma\.rz\.f32"):
        check_against_oracle(Device(faults.plant(faults.PLANTED_KERNEL, invent)), "cap", case)
