"""Runs one op on the emulated device, and compares the result with the oracle of the CPU tests."""

from __future__ import annotations

import itertools

import torch
from conftest import assert_same_bits
from emulated import MAX_REGISTER_SIZE, OPS, Device, storage_bytes
from op_inputs import DTYPES, Input, assert_close_to_oracle, assert_normed, in_fp8, own_scales

from axiscap import reference

#: The widest row (kMaxHiddenSize): so many float32 fit the shared memory of a block on every GPU.
WIDEST = 24576


KERNELS = list(itertools.product(DTYPES, OPS, (False, True), (True, False)))


def sizes_for(dtype: torch.dtype, aligned: bool) -> list[int]:
    """Sizes of rows for a part of a warp, a warp, several warps, and the widest; all with whole vectors or a tail."""
    return (
        [8, 72, 1024, 1040, MAX_REGISTER_SIZE[dtype]]
        if aligned
        else [1, 7, 67, 1023, 1041, MAX_REGISTER_SIZE[dtype] - 1]
    )


#: A row that a block's registers hold, and a wider one.
NARROW_AND_WIDE = (1040, MAX_REGISTER_SIZE[torch.bfloat16] + 8)


def run_on(device: Device, op: str, rows: torch.Tensor, axes, floors, slots=None, **bank):
    """Runs one op in place on rows (an op of two streams adds zeros) and returns projections and fired, (rows, K).

    axes, floors
        (S, K, H) and (S, K)
    bank
        targets (S, K), lifts (S, K, H) and norm_limits (S,)
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
        **norm_arguments(op, torch.ones(rows.shape[1], dtype=rows.dtype), rows)[0],
        **{name: tensor[None] for name, tensor in bank.items()},
    )
    return projections[0], fired


def norm_arguments(op: str, weight: torch.Tensor, rows: torch.Tensor, *, own_scales: bool = True):
    """The arguments that a norm adds to a call, and its outputs in fp8: (arguments, quantized or None, scales)."""
    if op not in ("norm", "norm_fp8"):
        return {}, None, torch.empty(0)
    if op == "norm":
        return {"weight": weight}, None, torch.empty(0)
    # The stride of hidden, so that vectors are aligned as in hidden.
    quantized = torch.zeros(len(rows), rows.stride(0)).to(torch.float8_e4m3fn)[:, : rows.shape[1]]
    scales = torch.full((len(rows), 1), 7.0) if own_scales else torch.tensor([0.02])
    return {"weight": weight, "quantized": quantized, "scales" if own_scales else "scale": scales}, quantized, scales


def run_case(device: Device, op: str, case: Input, *, bias: float = 0.0):
    """Runs one op on copies of the case's rows. Returns hidden (for norm_fp8 the norm in fp8), residual, weight,
    projections, fired and scales.
    """
    hidden = case.buffer.clone()[:, : case.hidden.shape[-1]]
    residual = case.buffer.flip(0).clone()[:, : hidden.shape[-1]]
    rows, directions = len(hidden), case.axes.shape[1]
    projections = torch.empty(1, rows, directions)
    fired = torch.empty(rows, directions, dtype=torch.uint8)
    weight = torch.randn(hidden.shape[-1], generator=torch.Generator().manual_seed(5)).to(hidden.dtype)
    norm, quantized, scales = norm_arguments(op, weight, hidden, own_scales=case.slots is None)
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


def assert_limited_rows_are_left_alone(projections: torch.Tensor, incoming: torch.Tensor, case: Input):
    """Compares sums of squares in float64, with a tolerance for the rounding of float32."""
    if case.norm_limits is None:
        return
    slots = torch.zeros(len(incoming), dtype=torch.long) if case.slots is None else case.slots.clamp(min=0).long()
    is_above = incoming.square().sum(-1) > (1 + 1e-4) * case.norm_limits.double()[slots].square()
    assert projections[is_above].isnan().all()


def check_against_oracle(device: Device, op: str, case: Input) -> None:
    if op == "norm_fp8":
        check_fp8_against_norm(device, case)
        return
    before, before_residual = case.hidden.clone(), case.buffer.flip(0)[:, : case.hidden.shape[-1]].clone()
    hidden, residual, weight, projections, fired, _ = run_case(device, op, case, bias=1.0)
    incoming = before.double() if op == "cap" else before.double() + before_residual.double()
    if op == "cap":
        assert_close_to_oracle(hidden, incoming, *case.call(), **case.more())
        stream, stream_before = hidden, before
    elif op == "cap_residual":
        assert_same_bits(hidden.contiguous(), before.contiguous())
        assert_close_to_oracle(residual, incoming, *case.call(), base=before_residual, **case.more())
        stream, stream_before = residual, before_residual
    else:
        assert_close_to_oracle(residual, incoming, *case.call(), **case.more())
        assert_normed(hidden, residual, weight, 1e-6, 1.0)
        stream = residual.nan_to_num()
        stream_before = (before.float() + before_residual.float()).to(residual.dtype).nan_to_num()
    is_unchanged = ~fired.bool().any(-1)
    assert_same_bits(stream[is_unchanged].contiguous(), stream_before[is_unchanged].contiguous())
    check_projections(projections, fired, incoming, case)


def check_fp8_against_norm(device: Device, case: Input) -> None:
    """norm_fp8 has the bits of the op norm, quantised by torch."""
    quantized, *outputs, scales = run_case(device, "norm_fp8", case, bias=1.0)
    normed, *expected_outputs, _ = run_case(Device(device.source, resident=device.resident), "norm", case, bias=1.0)
    assert_same_results(outputs, expected_outputs)
    is_finite = normed.isfinite().all(-1)
    if case.slots is None:
        assert_same_bits(scales[is_finite], own_scales(normed)[is_finite])
    expected = in_fp8(normed, scales)
    assert torch.equal(quantized[is_finite].view(torch.uint8), expected[is_finite].view(torch.uint8))
    assert bool((quantized.float().isnan() == expected.float().isnan()).all())


def check_projections(projections: torch.Tensor, fired: torch.Tensor, incoming: torch.Tensor, case: Input) -> None:
    """Projections are those of the incoming rows, within the rounding of float32, and decide what fired."""
    expected = reference.project(incoming, case.axes, case.slots)
    assert not projections[~expected.isfinite()].isfinite().any()
    assert_limited_rows_are_left_alone(projections, incoming, case)
    is_finite = expected.isfinite() & projections.isfinite()
    tolerance = (case.hidden.shape[-1] / 16 + 12) * 2.0**-24 * (incoming.abs().sum(-1, keepdim=True) + 1e-30)
    assert bool(((projections.double() - expected).abs() <= tolerance)[is_finite].all())
    if case.axes.shape[1] == 1:
        slots = torch.zeros(len(incoming), dtype=torch.long) if case.slots is None else case.slots.clamp(min=0).long()
        assert bool((fired.bool() == (projections < case.floors[slots])).all())


def raw_bits(tensor: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(storage_bytes(tensor.contiguous().clone()).copy())


def assert_same_results(results, expected) -> None:
    """The tensors of two runs have the same bits."""
    for result, expected_result in zip(results, expected, strict=True):
        assert torch.equal(raw_bits(result), raw_bits(expected_result))
