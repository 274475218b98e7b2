"""The kernels against the float64 oracle, and the promises that they keep bit by bit."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
import textwrap
import warnings

import pytest
import torch
from conftest import REPOSITORY, assert_same_bits, lower_instruction_sets, unit
from hypothesis import example, given
from hypothesis import strategies as st
from torch._inductor.utils import run_and_get_code
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

import axiscap
from axiscap import _C, ops, reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
#: Half the distance to the next number, relative; and absolute, where numbers are subnormal.
ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
TINY = {torch.float32: 2.0**-150, torch.bfloat16: 2.0**-134, torch.float16: 2.0**-25}


class Input:
    """One random call: rows with a stride of their own inside a larger buffer, some of them not finite."""

    def __init__(
        self,
        dtype,
        rows,
        size,
        slots,
        directions,
        padding,
        scale,
        choose,
        special,
        seed,
        *,
        targets=False,
        lifts=False,
        norm_limits=False,
    ):
        generator = torch.Generator().manual_seed(seed)

        def randn(*shape):
            return torch.randn(*shape, generator=generator)

        self.axes = torch.nn.functional.normalize(randn(slots, directions, size), dim=-1)
        self.floors = randn(slots, directions) * scale
        self.floors[torch.rand(slots, directions, generator=generator) < 0.15] = -math.inf
        self.buffer = (randn(rows, size + padding) * scale).to(dtype)
        if special and rows:
            for value in (math.inf, -math.inf, math.nan):
                row = int(torch.randint(rows, (), generator=generator))
                self.buffer[row, int(torch.randint(size, (), generator=generator))] = value
        self.hidden = self.buffer[:, :size]
        self.slots = torch.randint(-1, slots, (rows,), generator=generator).int() if choose else None
        self.targets = self.lifts = self.norm_limits = None
        if targets:
            self.targets = self.floors + torch.rand(slots, directions, generator=generator) * scale
        if lifts:
            aside = randn(slots, directions, size)
            aside -= (aside * self.axes).sum(-1, keepdim=True) * self.axes
            self.lifts = self.axes + 0.3 * torch.nn.functional.normalize(aside, dim=-1)
        if norm_limits:  # about half of the rows lie beyond theirs
            self.norm_limits = (0.8 + 0.4 * torch.rand(slots, generator=generator)) * scale * size**0.5

    def call(self):
        return self.axes, self.floors, self.slots

    def more(self):
        return {"targets": self.targets, "lifts": self.lifts, "norm_limits": self.norm_limits}


@st.composite
def inputs(draw):
    return Input(
        dtype=draw(st.sampled_from(DTYPES)),
        rows=draw(st.integers(0, 37)),
        size=draw(st.one_of(st.integers(1, 70), st.sampled_from([255, 256, 576, 1000, 4099]))),
        slots=draw(st.integers(1, 3)),
        directions=draw(st.integers(1, 4)),
        padding=draw(st.sampled_from([0, 0, 1, 7, 32])),
        scale=draw(st.sampled_from([1e-6, 1e-3, 1.0, 30.0, 1000.0, 2e4])),
        choose=draw(st.booleans()),
        special=draw(st.booleans()),
        seed=draw(st.integers(0, 2**31)),
        targets=draw(st.booleans()),
        lifts=draw(st.booleans()),
        norm_limits=draw(st.booleans()),
    )


def near_limit(x, slots, norm_limits):
    """Which rows (N,) are so near their limit that rounding decides."""
    limits = norm_limits.double()[torch.zeros(len(x), dtype=torch.long) if slots is None else slots.clamp(min=0).long()]
    return (x.double().norm(dim=-1) - limits).abs() <= 1e-4 * limits


def assert_close_to_oracle(
    actual, incoming, axes, floors, slots, base=None, *, targets=None, lifts=None, norm_limits=None
):
    """Within the rounding of one store, beside what float32 sums in 32 lanes may be off by."""
    bank = {"targets": targets, "lifts": lifts, "norm_limits": norm_limits}
    exact = reference.cap(incoming.double(), axes, floors, slots, **bank)
    x = incoming.double()
    size, directions = x.shape[-1], axes.shape[1]
    index = torch.zeros(len(x), dtype=torch.long) if slots is None else slots.clamp(min=0).long()
    v = torch.maximum(axes.abs(), axes.abs() if lifts is None else lifts.abs()).double()[index].amax(1)
    # Every element of |x| + sum |delta v| that can enter a sum; a lane adds size / 32 products, then five folds.
    ends = floors if targets is None else targets
    largest = x.abs() + directions * (x.abs().sum(-1, keepdim=True) + ends.double()[index].abs().nan_to_num(
        posinf=0.0, neginf=0.0).amax(-1, keepdim=True)) * v  # fmt: skip
    sums = (size / 32 + 6) * 2.0**-24 * (largest * v).sum(-1, keepdim=True) * v * directions
    written = exact if base is None else base.double() + (exact - x)
    bound = ROUNDING[actual.dtype] * written.abs() + TINY[actual.dtype] + sums + directions * 2.0**-24 * largest
    finite = exact.isfinite().all(-1) & (written.abs() < torch.finfo(actual.dtype).max).all(-1)
    if norm_limits is not None:
        finite &= ~near_limit(x, slots, norm_limits)
    error = (actual.double() - written).abs()
    assert bool((error <= bound)[finite].all()), f"off by up to {(error / bound)[finite].max():.3g} of what is allowed"


def assert_admitted(projections, x, case):
    """No row beyond the limit of its norm is reported, but for those of which rounding decides."""
    if case.norm_limits is None:
        return
    slots = torch.zeros(len(x), dtype=torch.long) if case.slots is None else case.slots.clamp(min=0).long()
    beyond = x.double().norm(dim=-1) > case.norm_limits.double()[slots]
    assert not projections[beyond & ~near_limit(x, case.slots, case.norm_limits)].isfinite().any()


@given(inputs())
@example(Input(torch.bfloat16, 9, 32768, 1, 1, 0, 1.0, False, False, 0))
@example(Input(torch.float16, 5, 32771, 2, 3, 5, 1.0, True, True, 1))
def test_cap_is_the_oracle(ops, library, case):
    before, outside = case.hidden.clone(), case.buffer.clone()
    projections = torch.empty(len(before), case.axes.shape[1])
    out = ops.cap_(case.hidden, *case.call(), **case.more(), projections=projections)
    assert out is case.hidden
    assert_close_to_oracle(out, before, *case.call(), **case.more())

    expected = reference.project(before.double(), case.axes, case.slots)
    finite = expected.isfinite() & projections.isfinite()
    assert_admitted(projections, before, case)
    # A row may be left alone because its correction overflows float32, which its float64 oracle does not show.
    assert not projections[~finite].isfinite().any()
    magnitude = before.double().abs().sum(-1, keepdim=True) + 1e-30
    near = (projections.double() - expected).abs() <= (case.hidden.shape[-1] / 32 + 6) * 2.0**-24 * magnitude
    assert bool(near[finite].all())

    copy, incoming, fired = library.cap(before, *case.call(), *case.more().values())
    assert_same_bits(copy, out.contiguous())
    assert_same_bits(incoming, projections)
    untouched = ~fired.any(-1)
    assert_same_bits(out[untouched], before[untouched])
    if case.axes.shape[1] == 1:
        slots = torch.zeros(len(before), dtype=torch.long) if case.slots is None else case.slots.clamp(min=0).long()
        assert bool((fired == (projections < case.floors[slots])).all())
    size = case.hidden.shape[-1]
    assert_same_bits(case.buffer[:, size:], outside[:, size:])


@given(inputs())
def test_project_gives_what_cap_reports(ops, library, case):
    found = ops.project(case.hidden, case.axes, case.slots)
    # A direction that is off fires nowhere, so nothing but the incoming row decides.
    off = torch.full_like(case.floors, -math.inf)
    incoming = library.cap(case.hidden, case.axes, off, case.slots)[1]
    assert_same_bits(found, incoming)


@given(inputs())
def test_cap_residual_is_the_oracle(ops, case):
    hidden = case.hidden.clone()
    residual = case.hidden.flip(0).clone() if len(hidden) else hidden.clone()
    before = residual.clone()
    projections = torch.empty(len(hidden), case.axes.shape[1])
    out = ops.cap_residual_(hidden, residual, *case.call(), **case.more(), projections=projections)
    assert out is residual
    assert_same_bits(hidden, case.hidden.clone())
    # The sum is exact in float64; in float32 it is rounded once more.
    assert_close_to_oracle(residual, hidden.double() + before.double(), *case.call(), base=before, **case.more())
    left_alone = ~projections.isfinite().all(-1)
    assert_same_bits(residual[left_alone], before[left_alone])


def assert_normed(hidden, residual, weight, eps, bias):
    """hidden is the RMS norm of the stored residual, within one rounding and the float32 sum's error."""
    y = residual.double()
    wanted = y / (y.square().mean(-1, keepdim=True) + eps).sqrt() * (weight.double() + bias)
    allowed = ROUNDING[hidden.dtype] * wanted.abs() + TINY[hidden.dtype] + 2.0**-20 * wanted.abs()
    finite = wanted.isfinite() & (wanted.abs() < torch.finfo(hidden.dtype).max) & (y.abs() < 1e15)
    assert bool(((hidden.double() - wanted).abs() <= allowed)[finite].all())


@given(inputs(), st.sampled_from([0.0, 1.0]))
def test_add_rms_norm_cap_is_the_oracle(ops, case, bias):
    before_hidden = case.hidden.clone()
    residual = case.hidden.flip(0).clone() if len(case.hidden) else case.hidden.clone()
    before = residual.clone()
    weight = torch.randn(case.hidden.shape[-1], generator=torch.Generator().manual_seed(1)).to(residual.dtype)
    projections = torch.empty(len(residual), case.axes.shape[1])
    hidden = case.hidden
    axes, floors, slots = case.call()
    found = ops.add_rms_norm_cap_(
        hidden, residual, weight, 1e-6, axes, floors, slots, weight_bias=bias, **case.more(), projections=projections
    )
    assert found[0] is hidden
    assert found[1] is residual
    assert_close_to_oracle(residual, before_hidden.double() + before.double(), *case.call(), **case.more())
    assert_normed(hidden, residual, weight, 1e-6, bias)
    # A row that is left alone, or does not fire, has the bits of the plain fused norm.
    plain_hidden, plain_residual = before_hidden.clone(), before.clone()
    nobody = torch.full((len(hidden),), -1, dtype=torch.int32)
    ops.add_rms_norm_cap_(plain_hidden, plain_residual, weight, 1e-6, axes, floors, nobody, weight_bias=bias)
    sums = before_hidden.float() + before.float()
    assert_same_bits(plain_residual.nan_to_num(), sums.to(residual.dtype).nan_to_num())
    index = torch.zeros(len(hidden), dtype=torch.long) if slots is None else slots.clamp(min=0).long()
    quiet = ~(projections < floors[index]).any(-1)
    if axes.shape[1] == 1:
        assert_same_bits(residual[quiet].nan_to_num(), plain_residual[quiet].nan_to_num())
        assert_same_bits(hidden[quiet].nan_to_num(), plain_hidden[quiet].nan_to_num())


def in_fp8(rows, scale):
    """What torch makes of rows over their scale."""
    return (rows.float() * scale.reciprocal()).clamp(-448, 448).to(torch.float8_e4m3fn)


def own_scales(rows):
    """(rows, 1), as the engines choose each row's scale."""
    return (rows.float().abs().amax(-1, keepdim=True) / 448).clamp(min=1 / (448 * 512))


@given(inputs(), st.sampled_from([0.0, 1.0]), st.sampled_from([None, 1e-4, 0.01, 3.0]))
def test_the_norm_in_fp8_is_the_norm_and_a_quantisation(ops, case, bias, scale):
    """To the bit: residual, projections, and each row's scale."""
    residual = case.hidden.flip(0).clone() if len(case.hidden) else case.hidden.clone()
    size, rows = case.hidden.shape[-1], len(residual)
    weight = torch.randn(size, generator=torch.Generator().manual_seed(1)).to(residual.dtype)
    axes, floors, slots = case.call()
    normed, stream = case.hidden.clone(), residual.clone()
    found, wanted = torch.empty(rows, axes.shape[1]), torch.empty(rows, axes.shape[1])
    more = {**case.more(), "weight_bias": bias}
    ops.add_rms_norm_cap_(normed, stream, weight, 1e-6, axes, floors, slots, **more, projections=wanted)
    before = case.buffer.clone()
    buffer = torch.full((rows, size + 3), 1.0).to(torch.float8_e4m3fn)
    scales = torch.empty(rows, 1) if scale is None else torch.tensor([scale])
    kind = {"scales": scales} if scale is None else {"scale": scales}
    given = buffer[:, :size], case.hidden, residual, weight, 1e-6, axes, floors, slots
    quantized, _ = ops.add_rms_norm_cap_fp8_(*given, **kind, **more, projections=found)
    assert quantized is given[0]
    assert_same_bits(case.buffer, before)
    assert bool((buffer[:, size:].float() == 1).all())
    assert_same_bits(residual.nan_to_num(), stream.nan_to_num())
    assert_same_bits(found, wanted)
    numbers = normed.isfinite().all(-1)
    if scale is None:
        assert_same_bits(scales[numbers], own_scales(normed)[numbers])
    expected = in_fp8(normed, scales)
    assert torch.equal(quantized[numbers].view(torch.uint8), expected[numbers].view(torch.uint8))
    assert bool((quantized.float().isnan() == expected.float().isnan()).all())


def around_fp8(dtype):
    """(1024,) of dtype: each number of eight bits, what lies halfway to the next and just beside that, and what is
    beyond the largest; then zeros.
    """
    codes = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    ties = (codes[1:] + codes[:-1]) / 2
    every = torch.cat([codes, ties, ties * (1 - 2.0**-9), ties * (1 + 2.0**-9), torch.tensor([464.0, 465.0, 6e4])])
    every = torch.cat([every, -every]).to(dtype)
    return torch.nn.functional.pad(every, (0, 1024 - len(every)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_number_in_fp8(ops, dtype):
    """A row of ones is its own norm, so that what is quantised is the weights."""
    weight = around_fp8(dtype)
    hidden, residual = torch.zeros(1, 1024, dtype=dtype), torch.ones(1, 1024, dtype=dtype)
    quantized, bank = torch.empty(1, 1024, dtype=torch.float8_e4m3fn), (unit(1, 1, 1024), torch.full((1, 1), -math.inf))
    for scale in (torch.ones(1), torch.tensor([0.5]), torch.tensor([2.0**-9])):
        ops.add_rms_norm_cap_fp8_(quantized, hidden, residual.clone(), weight, 0.0, *bank, scale=scale)
        assert torch.equal(quantized.view(torch.uint8), in_fp8(weight[None] + 0.0, scale).view(torch.uint8))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_of_zeros_has_the_least_scale_in_fp8(ops, dtype):
    hidden, scales = torch.zeros(3, 40, dtype=dtype), torch.empty(3)
    quantized, weight = torch.ones(3, 40).to(torch.float8_e4m3fn), torch.ones(40, dtype=dtype)
    given = quantized, hidden, hidden.clone(), weight, 1e-6, unit(1, 1, 40), torch.full((1, 1), -math.inf)
    ops.add_rms_norm_cap_fp8_(*given, scales=scales)
    assert scales.tolist() == [torch.tensor(1 / (448 * 512)).item()] * 3
    assert not quantized.float().any()


@given(inputs(), st.integers(1, 4))
def test_cap_layers_is_cap_of_each(ops, case, count):
    axes = torch.stack([case.axes.roll(layer, 0) for layer in range(count)])
    floors = torch.stack([case.floors + layer for layer in range(count)])
    streams = [case.hidden * (layer + 1) for layer in range(count)]
    more = {
        name: None if value is None else torch.stack([value.roll(layer, 0) for layer in range(count)])
        for name, value in case.more().items()
    }
    of = [{name: None if value is None else value[i] for name, value in more.items()} for i in range(count)]
    each = [ops.cap_(s.clone(), axes[i], floors[i], case.slots, **of[i]) for i, s in enumerate(streams)]
    projections = torch.empty(count, len(case.hidden), case.axes.shape[1])
    wanted = [ops.project(s, axes[i], case.slots) for i, s in enumerate(streams)]
    found = ops.cap_layers_(streams, axes, floors, case.slots, **more, projections=projections)
    for layer in range(count):
        assert found[layer] is streams[layer]
        assert_same_bits(found[layer], each[layer])
        overflowed = projections[layer].isnan() & ~wanted[layer].isnan()
        assert_same_bits(torch.where(overflowed, wanted[layer], projections[layer]), wanted[layer])


@given(inputs(), st.randoms(use_true_random=False))
def test_a_row_depends_on_itself_alone(ops, case, random):
    """Not on the batch's size, its place in it, the row stride, or the threads."""
    if not len(case.hidden):
        return
    whole = ops.cap(case.hidden.clone(), *case.call(), **case.more())
    order = list(range(len(whole)))
    random.shuffle(order)
    slots = None if case.slots is None else case.slots[order]
    shuffled = ops.cap(case.hidden[order], case.axes, case.floors, slots, **case.more())
    assert_same_bits(shuffled, whole[order])
    row = order[0]
    alone = ops.cap_(
        case.hidden[row].clone(), case.axes, case.floors, None if slots is None else slots[:1], **case.more()
    )
    assert_same_bits(alone, whole[row])


@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_do_not_show(dtype):
    hidden = torch.randn(521, 2048, generator=torch.Generator().manual_seed(3)).to(dtype)
    axes, floors = unit(2, 2, 2048), torch.zeros(2, 2)
    slots = torch.randint(-1, 2, (521,)).int()
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(ops.cap_(hidden.clone(), axes, floors, slots))
    assert_same_bits(results[1], results[0])
    assert_same_bits(results[2], results[0])


def test_threads_do_not_show_in_layers_at_once():
    """A thread's rows may begin in the middle of one layer and end in another."""
    streams = torch.randn(3, 101, 512, generator=torch.Generator().manual_seed(3))
    axes, floors = unit(3, 2, 1, 512), torch.tensor([0.0, 1.0, 2.0]).expand(2, 3).T[..., None].contiguous()
    slots = torch.randint(-1, 2, (101,), generator=torch.Generator().manual_seed(4)).int()
    wanted = [ops.cap(stream, axes[layer], floors[layer], slots) for layer, stream in enumerate(streams)]
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        found = streams.clone()
        ops.cap_layers_(list(found), axes, floors, slots)
        assert_same_bits(found, torch.stack(wanted))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 31, 576, 4096, 8192])
def test_fired_rows_end_on_the_floor(ops, dtype, size):
    rows = 64
    hidden = torch.randn(rows, size, generator=torch.Generator().manual_seed(size)).to(dtype)
    axes, floors = unit(1, 1, size), torch.tensor([[0.75]])
    before = ops.project(hidden, axes)[:, 0]
    ops.cap_(hidden, axes, floors)
    after = (hidden.double() @ axes[0, 0].double())[before < 0.75]
    assert len(after) > 0
    # Each element's rounding, weighted by the axis; the float32 sum's beside it.
    allowed = (hidden.double().abs() * axes[0, 0].double().abs()).sum(-1)[before < 0.75] * (
        ROUNDING[dtype] + 8 * 2.0**-24
    )
    assert bool(((after - 0.75).abs() <= allowed).all())


def test_directions_apply_in_order(ops):
    v = torch.tensor([[[1.0, 0.0], [0.6, 0.8]]])
    hidden = torch.tensor([[-1.0, -1.0]])
    projections = torch.empty(1, 2)
    ops.cap_(hidden, v, torch.tensor([[1.0, 1.0]]), projections=projections)
    # First to (1, -1); that projects to -0.2 on the second axis, so 1.2 of it is added.
    torch.testing.assert_close(hidden, torch.tensor([[1.72, -0.04]]))
    torch.testing.assert_close(projections, torch.tensor([[-1.0, -1.4]]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_are_not_finite_stay_and_are_reported(ops, dtype):
    hidden = torch.ones(4, 40, dtype=dtype)
    hidden[1, 39], hidden[2, 0] = math.inf, math.nan
    before = hidden.clone()
    projections = torch.empty(4, 1)
    ops.cap_(hidden, unit(1, 1, 40), torch.full((1, 1), 100.0), projections=projections)
    assert_same_bits(hidden[1:3], before[1:3])
    assert projections.isnan().flatten().tolist() == [False, True, True, False]
    assert bool((hidden[0] != before[0]).any())


def test_a_correction_that_overflows_leaves_the_row(ops):
    hidden = torch.tensor([[-3e38, 0.0]])
    projections = torch.empty(1, 1)
    ops.cap_(hidden, torch.tensor([[[1.0, 0.0]]]), torch.tensor([[3e38]]), projections=projections)
    assert hidden.tolist() == [[torch.tensor(-3e38).item(), 0.0]]
    assert projections.isnan().all()


def at_the_edge(dtype, size, place):
    """Rows, axes and floors of two slots: row 0 would leave the dtype's range at element ``place``, along one
    direction; row 1 fires and stays within; row 2 does not fire; row 3 leaves it along the first of two directions and
    is brought back by the second (in float16; elsewhere that is row 1 again).
    """
    large = 60000.0 if dtype == torch.float16 else 3e38
    other = (place + size // 2) % size
    rows = torch.zeros(4, size)
    rows[0, place], rows[0, other] = large, -large
    rows[1, place], rows[1, other] = large / 2, -large / 2
    rows[2, place] = large
    axes = torch.zeros(2, 2, size)
    axes[0, :, [place, other]] = 0.5**0.5
    floors = torch.tensor([[0.25 * large, -math.inf], [70000.0, -1000.0]])
    slots = torch.zeros(4, dtype=torch.int32)
    if dtype == torch.float16:
        axes[1, 0, place], axes[1, 1, place] = 1.0, -1.0
        slots[3] = 1
    else:
        rows[3] = rows[1]
    return rows.to(dtype), axes, floors, slots


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("size", "place"), [(2, 0), (2, 1), (31, 30), (37, 36), (64, 0), (576, 300), (1000, 999), (1001, 1000)]
)
def test_a_row_that_its_correction_takes_out_of_range_is_left_alone(ops, library, dtype, size, place):
    rows, axes, floors, slots = at_the_edge(dtype, size, place)
    for directions in (1, 2):
        call = axes[:, :directions].contiguous(), floors[:, :directions].contiguous(), slots
        some = slice(None) if directions == 2 else slice(3)
        call = (*call[:2], slots[some])
        before, nothing = rows[some], torch.zeros_like(rows[some])
        projections = torch.empty(len(before), directions)
        wanted = reference.cap(before, *call)
        copy, incoming, fired = library.cap(before, *call)
        out = ops.cap_(before.clone(), *call, projections=projections)
        assert fired.any(-1).tolist() == [False, True, False, True][some]
        assert projections.isfinite().all(-1).tolist() == [False, True, True, True][some]
        assert_same_bits(out[[0, 2]], before[[0, 2]])
        torch.testing.assert_close(out, wanted)
        assert_same_bits(copy, out)
        assert_same_bits(incoming.nan_to_num(), projections.nan_to_num())
        # Where the correction goes into a stream of its own, that is what must stay within; but a second direction
        # reads the sum, in float32.
        torch.testing.assert_close(ops.cap_residual_(nothing, before.clone(), *call), wanted)
        alone = ops.cap_residual_(before, nothing.clone(), *call)
        assert bool(alone[0].any()) == (directions == 1 or dtype == torch.float16)
        assert alone.isfinite().all()
        # Under the norm the sum goes on as it is.
        weight = torch.ones(size, dtype=dtype)
        _, residual = ops.add_rms_norm_cap_(before.clone(), nothing.clone(), weight, 1e-6, *call)
        torch.testing.assert_close(residual, wanted)
        assert_same_bits(residual[[0, 2]], before[[0, 2]])


@pytest.mark.parametrize(("dtype", "least"), [(torch.float16, 0x477FF000), (torch.bfloat16, 0x7F7F8000)])
@pytest.mark.parametrize("size", [3, 40, 1040])
@pytest.mark.parametrize("large", [0, 1])
def test_one_large_correction_of_several_is_enough_to_leave_the_range(ops, dtype, least, size, large):
    """Beside a small one, whichever comes first. least: the smallest float32, by its bits, that rounds to infinity."""
    floors, axes = torch.ones(2, 2), torch.zeros(2, 2, size)
    floors[:, large] = torch.tensor([least, least - 1], dtype=torch.int32).view(torch.float32)
    axes[:, 0, 0] = axes[:, 1, 2] = 1
    rows, projections = torch.zeros(2, size, dtype=dtype), torch.empty(2, 2)
    ops.cap_(rows, axes, floors, torch.tensor([0, 1], dtype=torch.int32), projections=projections)
    assert not rows[0].any()
    assert sorted(rows[1, [0, 2]].tolist()) == [1, torch.finfo(dtype).max]
    assert projections.isfinite().all(-1).tolist() == [False, True]


def test_no_gradient_comes_of_a_correction_that_was_left_out(ops):
    rows, axes, floors, slots = at_the_edge(torch.float16, 64, 5)
    hidden = rows.requires_grad_()
    (found,) = torch.autograd.grad(ops.cap(hidden, axes, floors, slots).float().sum(), hidden)
    (wanted,) = torch.autograd.grad(reference.cap(hidden, axes, floors, slots).float().sum(), hidden)
    assert bool((found[[0, 2]] == 1).all())
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize(("dtype", "storage"), [(torch.bfloat16, torch.int16), (torch.float16, torch.int16)])
def test_every_16_bit_number_is_read_and_rounded_as_torch_does(ops, dtype, storage):
    """All 65,536 patterns as rows of one element, and their sums with a small correction."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(storage).view(dtype)[:, None].contiguous()
    axis = torch.ones(1, 1, 1)
    found = ops.project(every, axis).flatten()
    wanted = torch.where(every.float().isfinite(), every.float(), math.nan).flatten()
    assert_same_bits(torch.where(found.isnan(), math.nan, found), torch.where(wanted.isnan(), math.nan, wanted) + 0.0)
    for floor in (1.0, 1.00390625, 1.01171875, 1e-41, 3e-8, 6.1e-5, 65519.0, 65520.0, 3.39e38):
        capped = ops.cap(every, axis, torch.tensor([[floor]]))
        assert_same_bits(capped, reference.cap(every, axis, torch.tensor([[floor]])))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_do_not_fire_are_never_written(dtype):
    """The rows lie in memory that cannot be written: touching one would end the process."""
    script = textwrap.dedent(f"""
        import mmap, sys, tempfile, torch, warnings
        warnings.simplefilter("ignore")
        from axiscap import ops
        with tempfile.TemporaryFile() as file:
            file.write(b"\\0" * (64 * 640 * 4)); file.flush()
            memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            hidden = torch.frombuffer(memory, dtype={dtype})[: 64 * 640].reshape(64, 640)
            axes = torch.nn.functional.normalize(torch.ones(1, 1, 640), dim=-1)
            ops.cap_(hidden, axes, torch.tensor([[float(sys.argv[1])]]))
    """)
    quiet = subprocess.run([sys.executable, "-c", script, "-1"], capture_output=True, text=True)
    assert quiet.returncode == 0, quiet.stderr
    fires = subprocess.run([sys.executable, "-c", script, "1"], capture_output=True)
    assert fires.returncode < 0, "the control should have been killed by its write"


RESULTS_OF_AN_ISA = textwrap.dedent("""
    import hashlib, json, torch
    from axiscap import _C, ops
    digests = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for size in (1, 7, 31, 33, 576, 4099):
            generator = torch.Generator().manual_seed(size)
            hidden = torch.randn(23, size, generator=generator).to(dtype)
            axes = torch.nn.functional.normalize(torch.randn(2, 3, size, generator=generator), dim=-1)
            slots = torch.randint(-1, 2, (23,), generator=generator).int()
            out, projections, fired = torch.ops.axiscap.cap(hidden, axes, torch.zeros(2, 3), slots)
            raw = out.float().numpy().tobytes() + projections.nan_to_num(nan=9e9).numpy().tobytes()
            digests[f"{dtype} {size}"] = hashlib.sha256(raw).hexdigest()
    print(json.dumps({"isa": _C.isa(), "digests": digests}))
""")


def run_with_isa(name: str, script: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"AXISCAP_ISA": name}
    return subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)


@pytest.mark.slow
def test_instruction_sets_with_fused_multiply_add_give_the_same_bits():
    names = [name for name in lower_instruction_sets() if name != "baseline"]
    if len(names) < 2:
        pytest.skip(f"this machine has no two such instruction sets, only {names or 'the baseline'}")
    results = [json.loads(run_with_isa(name, RESULTS_OF_AN_ISA).stdout) for name in names]
    assert [result["isa"] for result in results] == names
    assert all(result["digests"] == results[0]["digests"] for result in results)


@pytest.mark.slow
@pytest.mark.parametrize("name", lower_instruction_sets()[:-1])
def test_the_lower_instruction_sets_pass_the_same_tests(name):
    if os.environ.get("AXISCAP_ISA"):
        pytest.skip("AXISCAP_ISA is set: this is the inner run")
    wanted = "oracle or alone or floor or 16_bit or finite or fp8"
    command = [sys.executable, "-m", "pytest", "-q", "-k", wanted, __file__]
    inner = subprocess.run(command, env=os.environ | {"AXISCAP_ISA": name}, capture_output=True, text=True)
    assert inner.returncode == 0, inner.stdout[-3000:]
    assert " passed" in inner.stdout


# Gradients.


def _graded_inputs(directions: int):
    generator = torch.Generator().manual_seed(5)
    hidden = torch.randn(6, 12, generator=generator, dtype=torch.float64, requires_grad=True)
    axes = unit(2, directions, 12, seed=2)
    slots = torch.tensor([0, 1, -1, 0, 1, 1], dtype=torch.int32)
    return hidden, axes, torch.full((2, directions), 0.3), slots


def _lifts(axes):
    """Another vector for each axis, 1 along it."""
    aside = torch.randn(axes.shape, generator=torch.Generator().manual_seed(11))
    return axes + 0.5 * (aside - (aside * axes).sum(-1, keepdim=True) * axes)


@pytest.mark.parametrize("lifted", [False, True])
@pytest.mark.parametrize("directions", [1, 3])
def test_gradients_of_the_reference(directions, lifted):
    hidden, axes, floors, slots = _graded_inputs(directions)
    lifts = _lifts(axes) if lifted else None
    assert torch.autograd.gradcheck(lambda h: reference.cap(h, axes, floors, slots, lifts=lifts), hidden)


@pytest.mark.parametrize("lifted", [False, True])
@pytest.mark.parametrize("directions", [1, 3])
@pytest.mark.parametrize("use_slots", [True, False])
def test_gradients_of_the_kernel_are_those_of_the_reference(directions, use_slots, lifted):
    hidden, axes, floors, slots = _graded_inputs(directions)
    slots = slots if use_slots else None
    more = {"targets": floors + 0.5, "lifts": _lifts(axes), "norm_limits": torch.full((2,), 4.0)} if lifted else {}
    seed = torch.randn(6, 12, generator=torch.Generator().manual_seed(8))
    (wanted,) = torch.autograd.grad(reference.cap(hidden, axes, floors, slots, **more), hidden, seed.double())
    h = hidden.detach().float().requires_grad_()
    (found,) = torch.autograd.grad(ops.cap(h, axes, floors, slots, **more), h, seed)
    torch.testing.assert_close(found.double(), wanted, atol=1e-6, rtol=1e-5)
    project_seed = torch.randn(6, directions, generator=torch.Generator().manual_seed(9))
    scores = reference.project(hidden, axes, slots)
    finite = torch.where(scores.isnan(), 0.0, scores)
    (wanted,) = torch.autograd.grad(finite, hidden, project_seed.double())
    (found,) = torch.autograd.grad(ops.project(h, axes, slots).nan_to_num(), h, project_seed)
    torch.testing.assert_close(found.double(), wanted, atol=1e-6, rtol=1e-5)


def test_a_row_without_projections_has_no_gradient():
    hidden, axes = torch.ones(4, 8), unit(2, 2, 8)
    hidden[2, 3] = math.inf
    hidden.requires_grad_()
    found = ops.project(hidden, axes, torch.tensor([0, -1, 1, 1], dtype=torch.int32))
    assert found.isnan().all(-1).tolist() == [False, True, True, False]
    found.sum().backward()
    torch.testing.assert_close(hidden.grad, torch.stack([axes[0].sum(0), *torch.zeros(2, 8), axes[1].sum(0)]))


def test_changing_in_place_what_needs_a_gradient_is_refused():
    hidden = torch.zeros(2, 8, requires_grad=True)
    with pytest.raises(ValueError, match=r"hidden requires grad .* use axiscap\.ops\.cap"):
        ops.cap_(hidden, unit(1, 1, 8), torch.ones(1, 1))
    with torch.no_grad():
        ops.cap_(hidden, unit(1, 1, 8), torch.ones(1, 1))
    assert bool((hidden != 0).any())


def test_a_changed_argument_beside_the_stream_must_not_need_a_gradient():
    hidden, axes, floors = torch.zeros(2, 8), unit(1, 1, 8), torch.ones(1, 1)
    graded = torch.zeros(2, 1, requires_grad=True)
    stats = ops.new_stats(1, 1).requires_grad_()
    for cap in (ops.cap_, torch.ops.axiscap.cap_):
        with pytest.raises(ValueError, match="projections requires grad"):
            cap(hidden, axes, floors, projections=graded)
    with pytest.raises(ValueError, match="stats requires grad"):
        ops.accumulate_(stats, torch.zeros(2, 1), floors)
    assert not hidden.any()
    assert not graded.any()


def test_autograd_notices_a_saved_tensor_that_was_changed():
    x = torch.ones(2, 8, requires_grad=True)
    y = x * 2
    z = y * y
    ops.cap_(y.detach(), unit(1, 1, 8), torch.full((1, 1), 50.0))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.sum().backward()


@pytest.mark.parametrize("mode", [contextlib.nullcontext, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("entry", [ops.cap_, torch.ops.axiscap.cap_])
def test_a_change_counts_as_one(entry, mode, monkeypatch):
    """Of a tensor and of its views, as torch's own ops in place do, and without a call of Python."""
    monkeypatch.setattr(torch._C, "_increment_version", None)
    hidden, axes, floors = torch.zeros(3, 8), unit(1, 1, 8), torch.ones(1, 1)
    for part in (hidden, hidden[1:], hidden.detach()):
        before = part._version
        with mode():
            entry(part, axes, floors)
        assert part._version == hidden._version == before + 1
    with torch.inference_mode():
        entry(torch.zeros(3, 8), axes, floors)  # has no version


def test_every_tensor_that_an_op_changes_counts_one_change():
    for name, (op, arguments, keywords) in calls(**_good()).items():
        schema = op._schema.arguments
        given = dict(zip([argument.name for argument in schema], arguments, strict=False)) | keywords
        versions = {argument: [tensor._version for tensor in tensors_of(given[argument])] for argument in given}
        op(*arguments, **keywords)
        for argument in schema:
            change = int(argument.alias_info is not None and argument.alias_info.is_write)
            found = [tensor._version for tensor in tensors_of(given.get(argument.name))]
            assert found == [before + change for before in versions.get(argument.name, [])], (name, argument.name)


def test_a_change_counts_beside_a_tensor_that_has_no_version():
    """One that was made in inference mode."""
    with torch.inference_mode():
        projections = torch.zeros(2, 1)
    hidden = torch.zeros(2, 8)
    ops.cap_(hidden, unit(1, 1, 8), torch.ones(1, 1), projections=projections)
    assert hidden._version > 0


# The ops in torch.library.


def tensors_of(given):
    return [value for value in tree_leaves(given) if isinstance(value, torch.Tensor)]


def longer(tensor):
    """As a buffer with room for three rows more, whose values a fault would show."""
    return torch.cat([tensor, torch.full((3, *tensor.shape[1:]), 7, dtype=tensor.dtype)])


def _op_calls(dtype):
    hidden = torch.randn(2, 5, 40, generator=torch.Generator().manual_seed(1)).to(dtype)
    axes, floors = unit(2, 3, 40), torch.zeros(2, 3)
    slots = torch.tensor([0, 1, 1, 0, 1, 0, 0, 1, 1, 0], dtype=torch.int32)
    with_none = torch.where(torch.arange(10) % 5 == 2, -1, slots)  # NaN in a result is unequal to itself, for opcheck
    projections, quantized = torch.empty(10, 3), torch.empty(2, 5, 40, dtype=torch.float8_e4m3fn)
    graded = hidden.clone().requires_grad_()
    library = torch.ops.axiscap
    return {
        "cap_": (library.cap_.default, (hidden, axes, floors, with_none), {}),
        "cap_ with projections": (library.cap_.default, (hidden, axes, floors), {"projections": projections}),
        "cap": (library.cap.default, (graded, axes, floors, slots), {}),
        "project": (library.project.default, (graded, axes, slots), {}),
        "cap_residual_": (
            library.cap_residual_.default,
            (hidden, hidden.clone(), axes, floors, slots),
            {"projections": projections},
        ),
        "cap_ along lifts": (
            library.cap_.default,
            (hidden, axes, floors, slots),
            {"projections": projections, "lifts": _lifts(axes), "norm_limits": torch.full((2,), 100.0)},
        ),
        "cap along lifts": (
            library.cap.default,
            (hidden, axes, floors, slots, floors + 1, _lifts(axes), torch.full((2,), 100.0)),
            {},
        ),
        "cap_.buffers": (library.cap_.buffers, (hidden, axes, floors, longer(with_none), longer(projections)), {}),
        "cap_residual_.buffers": (
            library.cap_residual_.buffers,
            (hidden, hidden.clone(), axes, floors, longer(slots), longer(projections)),
            {},
        ),
        "add_rms_norm_cap_": (
            library.add_rms_norm_cap_.default,
            (hidden, hidden.clone(), torch.ones(40, dtype=dtype), 1e-6, axes, floors, slots),
            {"projections": projections},
        ),
        "add_rms_norm_cap_.buffers": (
            library.add_rms_norm_cap_.buffers,
            (
                hidden,
                hidden.clone(),
                torch.ones(40, dtype=dtype),
                1e-6,
                axes,
                floors,
                longer(slots),
                longer(projections),
            ),
            {"weight_bias": 1.0},
        ),
        "add_rms_norm_cap_fp8_": (
            library.add_rms_norm_cap_fp8_.default,
            (quantized, hidden, hidden.clone(), torch.ones(40, dtype=dtype), 1e-6, axes, floors, slots),
            {"scales": torch.empty(10, 1), "projections": projections},
        ),
        "add_rms_norm_cap_fp8_.buffers": (
            library.add_rms_norm_cap_fp8_.buffers,
            (
                quantized,
                hidden,
                hidden.clone(),
                torch.ones(40, dtype=dtype),
                1e-6,
                axes,
                floors,
                longer(slots),
                longer(projections),
            ),
            {"scale": torch.ones(1)},
        ),
        "cap_layers_": (
            library.cap_layers_.default,
            ([hidden, hidden + 1], torch.stack([axes, axes]), torch.stack([floors, floors]), slots),
            {"projections": torch.empty(2, 10, 3)},
        ),
        "accumulate_": (library.accumulate_.default, (ops.new_stats(2, 3), torch.zeros(10, 3), floors, slots), {}),
        "accumulate_ of layers": (
            library.accumulate_.default,
            (torch.stack([ops.new_stats(2, 3)] * 2), torch.zeros(2, 12, 3)[:, :10], torch.stack([floors] * 2), slots),
            {},
        ),
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", list(_op_calls(torch.float32)))
def test_opcheck(name, dtype):
    op, args, kwargs = _op_calls(dtype)[name]
    checks = ["test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    # Whether a schema tells the truth is tested by allclose, which torch does not have for fp8.
    torch.library.opcheck(op, args, kwargs, test_utils=checks + (["test_schema"] if "fp8" not in name else []))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [7, 40, 1040])
@pytest.mark.parametrize("directions", [1, 2])
def test_a_row_at_the_limit_of_its_norm_is_capped(dtype, size, directions):
    """Exactly there, wherever its elements are; a row beyond it is left alone."""
    axes = torch.zeros(1, directions, size)
    axes[..., 3] = 1
    floors, norm_limits = torch.full((1, directions), 2.0), torch.full((1,), 1.5)
    columns = torch.arange(size)
    at_limit, beyond = torch.zeros(size, size, dtype=dtype), torch.zeros(size, size, dtype=dtype)
    at_limit[columns, columns] = -1.5
    beyond[columns, columns] = 1.5078125
    rows = torch.cat([at_limit, beyond])
    expected = rows.clone()
    expected[:size, 3] = 2
    streams, sums = rows.clone(), rows.clone()
    projections = torch.zeros(2, 2 * size, directions)
    more = {"norm_limits": norm_limits}
    ops.cap_(streams, axes, floors, **more, projections=projections[0])
    ops.cap_residual_(torch.zeros_like(sums), sums, axes, floors, **more, projections=projections[1])
    assert_same_bits(streams, expected)
    assert_same_bits(sums, expected)
    assert projections[:, :size].isfinite().all()
    assert projections[:, size:].isnan().all()


def test_each_slot_has_its_own_limit():
    """inf is none; a sum of squares that is inf in float32 is beyond every other."""
    axes, floors = unit(3, 1, 24), torch.full((3, 1), -1.0)
    norm_limits = torch.tensor([math.inf, 1e19, 4.0])
    hidden = torch.full((6, 24), 1e19) * torch.tensor([1, 1, 1e-19, 1e-19, 1e-19, 1])[:, None]
    slots = torch.tensor([0, 1, 1, 2, 0, -1], dtype=torch.int32)
    projections = torch.empty(6, 1)
    ops.cap_(hidden, axes, floors, slots, norm_limits=norm_limits, projections=projections)
    assert projections.isfinite().flatten().tolist() == [True, False, True, False, True, False]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_below_its_floor_ends_on_its_target(ops, dtype):
    """And one that is at its floor, or above it, stays where it is, below its target or not."""
    rows = torch.zeros(4, 40, dtype=dtype)
    rows[:, 3] = torch.tensor([-1.0, 1.0, 1.5, 4.0])
    axes = torch.zeros(1, 1, 40)
    axes[..., 3] = 1
    ops.cap_(rows, axes, torch.ones(1, 1), targets=torch.full((1, 1), 3.0))
    assert rows[:, 3].tolist() == [3.0, 1.0, 1.5, 4.0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [7, 40, 1040])
def test_a_projection_at_its_floor_does_not_fire(ops, library, dtype, size):
    """As it comes, or as an earlier direction leaves it. Its zeros keep their sign."""
    rows = torch.full((2, size), -0.0, dtype=dtype)
    rows[:, 3] = torch.tensor([1.5, 1.25])
    axes = torch.zeros(1, 2, size)
    axes[..., 3] = 1
    floors = torch.full((1, 2), 1.5)
    copy, projections, fired = library.cap(rows, axes, floors)
    assert fired.tolist() == [[False, False], [True, False]]
    assert projections.tolist() == [[1.5, 1.5], [1.25, 1.25]]
    assert copy[:, 3].tolist() == [1.5, 1.5]
    assert_same_bits(copy[0], rows[0])
    assert_same_bits(ops.cap_(rows.clone(), axes, floors), copy)


@pytest.mark.parametrize("size", [1, 7, 64, 1040])
@pytest.mark.parametrize(("dtype", "least"), [(torch.float16, 0x477FF000), (torch.bfloat16, 0x7F7F8000)])
def test_a_correction_may_reach_the_largest_number_and_not_infinity(ops, dtype, least, size):
    """least: the smallest float32, by its bits, that rounds to infinity."""
    floors = torch.tensor([[least - 1], [least]], dtype=torch.int32).view(torch.float32)
    axes = torch.zeros(2, 1, size)
    axes[..., -1] = 1
    rows, projections = torch.zeros(2, size, dtype=dtype), torch.empty(2, 1)
    ops.cap_(rows, axes, floors, torch.tensor([0, 1], dtype=torch.int32), projections=projections)
    assert rows[:, -1].tolist() == [torch.finfo(dtype).max, 0]
    assert projections.isnan().flatten().tolist() == [False, True]
    rows = torch.zeros(1, size)
    ops.cap_(rows, axes, torch.full((2, 1), torch.finfo(torch.float32).max))
    assert rows[0, -1] == torch.finfo(torch.float32).max


def test_a_row_that_is_left_alone_has_not_fired(library):
    """Whatever the memory of the results held before."""
    rows, axes, floors = torch.zeros(6, 8), unit(1, 2, 8), torch.ones(1, 2)
    rows[1] = math.inf
    rows[2] = axes[0, 0] * -9
    slots = torch.tensor([0, 0, 0, -1, -1, 0], dtype=torch.int32)
    torch.use_deterministic_algorithms(True)  # fills new memory with ones
    try:
        _, projections, fired = library.cap(rows, axes, floors, slots, norm_limits=torch.full((1,), 5.0))
    finally:
        torch.use_deterministic_algorithms(False)
    alone = [False, True, True, True, True, False]
    assert (~fired).all(-1).tolist() == alone
    assert projections.isnan().all(-1).tolist() == alone


def test_a_projection_at_its_floor_is_not_counted_as_below():
    stats = ops.accumulate_(ops.new_stats(1, 1), torch.tensor([[2.0], [1.5], [2.5]]), torch.tensor([[2.0]]))
    counted = dict(zip(_C.STAT_FIELDS, stats[0, 0].tolist(), strict=True))
    assert (counted["seen"], counted["below"], counted["fired"], counted["shortfall"]) == (3, 1, 1, 0.5)


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_whole_without_a_graph_break(dynamic):
    axes, floors = unit(1, 1, 64), torch.full((1, 1), 0.5)

    def everything(hidden, residual):
        a = ops.cap_(hidden * 1.5, axes, floors)
        b = ops.cap(a + 0.25, axes, floors)
        c = ops.cap_residual_(hidden, residual + 1, axes, floors)
        c = sum(ops.add_rms_norm_cap_(hidden * 1, c, hidden[0] * 1, 1e-6, axes, floors))
        scales, quantized = hidden.new_empty(len(hidden), 1), torch.empty_like(hidden, dtype=torch.float8_e4m3fn)
        ops.add_rms_norm_cap_fp8_(quantized, hidden, c, hidden[0] * 1, 1e-6, axes, floors, scales=scales)
        c = c + quantized.float() * scales
        d = ops.cap_layers_([a * 2, b * 2], torch.stack([axes, axes]), torch.stack([floors, floors]))
        stats = ops.accumulate_(ops.new_stats(1, 1), ops.project(b, axes).reshape(-1, 1), floors)
        return a, b, c, *d, stats

    compiled = torch.compile(everything, fullgraph=True, dynamic=dynamic)
    for rows in (3, 8):
        hidden, residual = torch.randn(rows, 64), torch.randn(rows, 64)
        for found, wanted in zip(compiled(hidden, residual), everything(hidden, residual), strict=True):
            torch.testing.assert_close(found, wanted)


class Buffered(torch.nn.Module):
    """A layer's cap in a graph that serves: all but the rows lies in buffers."""

    def __init__(self, size: int, max_rows: int, residual: bool) -> None:
        super().__init__()
        self.residual = residual
        self.register_buffer("axes", unit(2, 2, size))
        self.register_buffer("floors", torch.zeros(2, 2))
        self.register_buffer("slots", torch.arange(max_rows, dtype=torch.int32) % 3 - 1)
        self.register_buffer("projections", torch.full((max_rows, 2), 7.0))

    def forward(self, hidden, residual):
        hidden, residual = hidden * 1.5, residual + 1
        if self.residual:
            torch.ops.axiscap.cap_residual_.buffers(
                hidden, residual, self.axes, self.floors, self.slots, self.projections
            )
        else:
            torch.ops.axiscap.cap_.buffers(hidden, self.axes, self.floors, self.slots, self.projections)
        return hidden + residual


@pytest.mark.slow
@pytest.mark.parametrize("newer", [False, True])
@pytest.mark.parametrize("residual", [False, True])
def test_a_compiled_graph_writes_into_its_buffers_without_a_copy(residual, newer):
    """With either way to functionalise: vLLM takes the older one, which copies a slice of a buffer."""
    module = Buffered(64, 16, residual)
    torch._dynamo.reset()
    with torch._inductor.config.patch(enable_auto_functionalized_v2=newer):
        compiled = torch.compile(module, fullgraph=True, dynamic=True)
        _, (code,) = run_and_get_code(compiled, torch.randn(3, 64), torch.randn(3, 64))
        kernels = re.findall(r"^ +(cpp_fused_\w+)\(", code, re.MULTILINE)
        assert len(kernels) == 2  # before the cap and behind it
        assert "clone" not in "".join(kernels)
        for rows in (3, 8, 16):
            hidden, other = torch.randn(rows, 64), torch.randn(rows, 64)
            module.projections.fill_(7)
            found = compiled(hidden, other)
            a, b, wanted = hidden * 1.5, other + 1, torch.full((16, 2), 7.0)
            arguments = (module.axes, module.floors, module.slots[:rows])
            if residual:
                ops.cap_residual_(a, b, *arguments, projections=wanted[:rows])
            else:
                ops.cap_(a, *arguments, projections=wanted[:rows])
            assert_same_bits(module.projections, wanted)
            torch.testing.assert_close(found, a + b)


@pytest.mark.parametrize("dtype", DTYPES)
def test_buffers_may_be_longer_than_the_step(dtype):
    """Their first rows are the step's; the others are neither read nor written."""
    hidden = torch.randn(5, 40, generator=torch.Generator().manual_seed(1)).to(dtype)
    axes, floors = unit(2, 3, 40), torch.zeros(2, 3)
    slots, wanted = torch.tensor([1, 0, -1, 1, 0], dtype=torch.int32), torch.empty(5, 3)
    capped = ops.cap_(hidden.clone(), axes, floors, slots, projections=wanted)
    projections = longer(torch.zeros(5, 3))
    torch.ops.axiscap.cap_.buffers(hidden, axes, floors, longer(slots), projections)
    assert_same_bits(hidden, capped)
    assert_same_bits(projections, longer(wanted))


def test_buffers_without_room():
    hidden, axes, floors = torch.zeros(4, 16), unit(1, 1, 16), torch.zeros(1, 1)
    slots, projections = torch.zeros(4, dtype=torch.int32), torch.zeros(4, 1)
    with pytest.raises(ValueError, match=r"slots must have room for the 4 rows, got shape \[3\]"):
        torch.ops.axiscap.cap_.buffers(hidden, axes, floors, slots[:3], projections)
    with pytest.raises(ValueError, match=r"projections must have room for the 4 rows, got shape \[2, 1\]"):
        torch.ops.axiscap.cap_residual_.buffers(hidden, hidden.clone(), axes, floors, slots, projections[:2])
    with pytest.raises(ValueError, match=r"projections must have shape \[4, 1\], got \[6, 2\]"):
        torch.ops.axiscap.cap_.buffers(hidden, axes, floors, slots, torch.zeros(6, 2))
    norm = hidden, hidden.clone(), torch.ones(16), 1e-6, axes, floors
    with pytest.raises(ValueError, match=r"slots must have room for the 4 rows, got shape \[3\]"):
        torch.ops.axiscap.add_rms_norm_cap_.buffers(*norm, slots[:3], projections)
    with pytest.raises(ValueError, match="hidden must have shape"):
        torch.ops.axiscap.cap_.buffers(torch.zeros(()), axes, floors, slots, projections)


def test_exported_programs_keep_the_op():
    axes = unit(1, 1, 16)

    class Block(torch.nn.Module):
        def forward(self, hidden):
            return ops.cap(hidden, axes, torch.ones(1, 1))

    program = torch.export.export(Block(), (torch.zeros(3, 16),))
    assert "axiscap.cap.default" in str(program.graph)
    hidden = torch.randn(3, 16)
    assert_same_bits(program.module()(hidden), Block()(hidden))


def test_the_function_the_op_and_the_bank_give_the_same():
    hidden = torch.randn(9, 100).bfloat16()
    axes, floors = unit(1, 2, 100), torch.zeros(1, 2)
    results = [hidden.clone() for _ in range(3)]
    _C.cap_(results[0], axes, floors)
    torch.ops.axiscap.cap_(results[1], axes, floors)
    _C.Bank(axes, floors).cap_(results[2])
    assert_same_bits(results[1], results[0])
    assert_same_bits(results[2], results[0])


# Statistics.


@given(inputs())
def test_statistics_are_exact(case):
    _, projections, fired = torch.ops.axiscap.cap(case.hidden, *case.call())
    stats = ops.new_stats(*case.floors.shape)
    for part in (slice(0, 5), slice(5, None)):
        ops.accumulate_(stats, projections[part], case.floors, None if case.slots is None else case.slots[part])
    field = {name: stats[..., i] for i, name in enumerate(_C.STAT_FIELDS)}
    slots = torch.zeros(len(projections)) if case.slots is None else case.slots
    for slot in range(len(case.floors)):
        mine = projections[slots == slot].double()
        finite = mine[mine.isfinite().all(-1)]
        floors = case.floors[slot].double()
        below = finite < floors
        assert field["seen"][slot].tolist() == [len(mine)] * mine.shape[1]
        assert field["nonfinite"][slot].tolist() == [len(mine) - len(finite)] * mine.shape[1]
        assert field["below"][slot].tolist() == below.sum(0).tolist()
        # The sums are those of the order of rows, in float64.
        assert field["sum"][slot].tolist() == [sum(column) for column in finite.T.tolist()]
        shortfall = [sum((floors[k] - finite[below[:, k], k]).tolist()) for k in range(mine.shape[1])]
        assert field["shortfall"][slot].tolist() == shortfall
        if len(finite):
            assert field["min"][slot].tolist() == finite.min(0).values.tolist()
            assert field["max"][slot].tolist() == finite.max(0).values.tolist()
        # A row fires exactly where its first direction below the floor does.
        assert field["fired"][slot].sum().item() == int(fired[slots == slot].any(-1).sum())


def layered(generator: torch.Generator, layers=3, rows=9, slots=4, directions=2):
    """Projections of several layers in a buffer with room for more rows, their floors, and the rows' slots."""
    projections = torch.randn(layers, rows + 5, directions, generator=generator)[:, :rows]
    projections[1, 3] = math.nan
    return (
        projections,
        torch.randn(layers, slots, directions, generator=generator),
        torch.randint(-1, slots, (rows,), generator=generator).int(),
    )


def test_statistics_of_layers_at_once_are_those_of_each():
    projections, floors, slots = layered(torch.Generator().manual_seed(4))
    wanted = torch.stack([ops.new_stats(4, 2) for _ in range(3)])
    for stats, of_layer, own in zip(wanted, projections, floors, strict=True):
        ops.accumulate_(stats, of_layer, own, slots)
    found = torch.stack([ops.new_stats(4, 2) for _ in range(3)])
    assert_same_bits(ops.accumulate_(found, projections, floors, slots), wanted)
    ops.accumulate_(found, projections[:, :0], floors, slots[:0])
    assert_same_bits(found, wanted)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("stats", lambda t: t[:2]),
        ("floors", lambda t: t[:, :0]),
        ("floors", lambda t: t[None]),
        ("projections", lambda t: t[:2]),
        ("projections", lambda t: t[0]),
        ("projections", lambda t: t[..., :1].contiguous()),
        ("projections", lambda t: t.transpose(1, 2).contiguous().transpose(1, 2)),
        ("slots", lambda t: t[1:]),
    ],
)
def test_statistics_of_wrong_shapes(name, change):
    projections, floors, slots = layered(torch.Generator().manual_seed(4))
    stats = torch.stack([ops.new_stats(4, 2) for _ in range(3)])
    arguments = {"stats": stats.clone(), "projections": projections, "floors": floors, "slots": slots}
    with pytest.raises(ValueError, match=f"{name} must have"):
        ops.accumulate_(**{**arguments, name: change(arguments[name])})
    assert_same_bits(arguments["stats"], stats)


@pytest.mark.parametrize(
    ("name", "dtype", "message"),
    [
        ("stats", torch.float32, "stats must be Double, got Float"),
        ("projections", torch.bfloat16, "projections must be Float, got BFloat16"),
        ("floors", torch.float64, "floors must be Float, got Double"),
        ("slots", torch.int64, "slots must be Int, got Long"),
    ],
)
def test_statistics_of_wrong_dtypes(name, dtype, message):
    given = {
        "stats": ops.new_stats(1, 1), "projections": torch.zeros(2, 1), "floors": torch.ones(1, 1),
        "slots": torch.zeros(2, dtype=torch.int32),
    }  # fmt: skip
    with pytest.raises(TypeError, match=message):
        ops.accumulate_(**given | {name: given[name].to(dtype)})
    assert_same_bits(given["stats"], ops.new_stats(1, 1))


def test_statistics_of_slots_outside_the_bank_are_refused():
    stats = ops.new_stats(2, 1)
    for slot in (2, -2):
        slots = torch.tensor([0, slot], dtype=torch.int32)
        with pytest.raises(IndexError, match=rf"slots\[1\] must be in \[0, 2\) or -1, got {slot}"):
            ops.accumulate_(stats, torch.zeros(2, 1), torch.zeros(2, 1), slots)
    assert_same_bits(stats, ops.new_stats(2, 1))


# Errors: one sentence that names the argument, and nothing changed.

H = 16


def _good():
    return {
        "hidden": torch.zeros(4, H),
        "axes": unit(2, 1, H),
        "floors": torch.ones(2, 1),
        "slots": torch.zeros(4, dtype=torch.int32),
        "projections": torch.zeros(4, 1),
        "lifts": unit(2, 1, H),
        "targets": torch.full((2, 1), 2.0),
        "norm_limits": torch.ones(2),
    }


BAD_CAP = {
    "hidden dtype": (
        "hidden",
        lambda t: t.double(),
        TypeError,
        "hidden must be float32, bfloat16 or float16, got Double",
    ),
    "hidden integer": ("hidden", lambda t: t.int(), TypeError, "hidden must be float32"),
    "hidden scalar": ("hidden", lambda t: torch.zeros(()), ValueError, r"hidden must have shape \(\.\.\., H\)"),
    "hidden empty": ("hidden", lambda t: torch.zeros(4, 0), ValueError, "hidden must have shape"),
    "hidden last stride": ("hidden", lambda t: torch.zeros(H, 4).T, ValueError, "hidden must have stride 1"),
    "hidden row strides": (
        "hidden",
        lambda t: torch.zeros(2, 3, H)[:, :2],
        ValueError,
        "hidden must have rows with one uniform stride",
    ),
    "hidden overlapping": (
        "hidden",
        lambda t: torch.zeros(H).expand(4, H),
        ValueError,
        "hidden is changed in place, so its rows must not overlap",
    ),
    "hidden other H": ("hidden", lambda t: torch.zeros(4, H + 1), ValueError, "axes must have the H of hidden, 17"),
    "hidden device": (
        "hidden",
        lambda t: t.to("meta"),
        ValueError,
        "axes must be on the device of hidden, meta, got cpu",
    ),
    "axes dtype": ("axes", lambda t: t.bfloat16(), TypeError, "axes must be Float, got BFloat16"),
    "axes shape": ("axes", lambda t: t[0], ValueError, r"axes must have shape \(S, K, H\), got \[1, 16\]"),
    "axes empty": ("axes", lambda t: t[:0], ValueError, "axes must have no dimension of size 0"),
    "axes directions": ("axes", lambda t: t.expand(2, 65, H).contiguous(), ValueError, "axes must have at most 64"),
    "axes stride": ("axes", lambda t: unit(2, 1, 2 * H)[..., ::2], ValueError, "axes must be contiguous"),
    "axes device": ("axes", lambda t: t.to("meta"), ValueError, "floors must be on the device of axes, meta, got cpu"),
    "floors dtype": ("floors", lambda t: t.double(), TypeError, "floors must be Float, got Double"),
    "floors shape": ("floors", lambda t: t[0], ValueError, "floors must have the shape of axes less H"),
    "slots dtype": ("slots", lambda t: t.long(), TypeError, "slots must be Int, got Long"),
    "slots shape": ("slots", lambda t: t[:3], ValueError, r"slots must have shape \(rows,\) = \(4,\), got \[3\]"),
    "slots stride": ("slots", lambda t: torch.zeros(8, dtype=torch.int32)[::2], ValueError, "slots must be contiguous"),
    "slots too large": ("slots", lambda t: t + 2, IndexError, r"slots\[0\] must be in \[0, 2\) or -1, got 2"),
    "slots too small": ("slots", lambda t: t - 2, IndexError, r"slots\[0\] must be in \[0, 2\) or -1, got -2"),
    "slots late": (
        "slots",
        lambda t: torch.tensor([0, 0, 0, 2**31 - 1], dtype=torch.int32),
        IndexError,
        r"slots\[3\] must be in",
    ),
    "lifts dtype": ("lifts", lambda t: t.half(), TypeError, "lifts must be Float, got Half"),
    "lifts shape": ("lifts", lambda t: t[:1], ValueError, r"lifts must have the shape of axes, \[2, 1, 16\]"),
    "lifts stride": ("lifts", lambda t: unit(2, 1, 2 * H)[..., ::2], ValueError, "lifts must be contiguous"),
    "lifts device": ("lifts", lambda t: t.to("meta"), ValueError, "lifts must be on the device of axes, cpu, got meta"),
    "targets dtype": ("targets", lambda t: t.double(), TypeError, "targets must be Float, got Double"),
    "targets shape": ("targets", lambda t: t[0], ValueError, "targets must have the shape of axes less H"),
    "norm_limits dtype": ("norm_limits", lambda t: t.double(), TypeError, "norm_limits must be Float, got Double"),
    "norm_limits shape": (
        "norm_limits",
        lambda t: t[:, None],
        ValueError,
        r"norm_limits must have the shape of axes less K and H, \[2\], got \[2, 1\]",
    ),
    "projections dtype": ("projections", lambda t: t.double(), TypeError, "projections must be Float"),
    "projections shape": ("projections", lambda t: t[:, 0], ValueError, r"projections must have shape \[4, 1\]"),
    "projections stride": (
        "projections",
        lambda t: torch.zeros(4, 2)[:, :1],
        ValueError,
        "projections must be contiguous",
    ),
}


@pytest.mark.parametrize("entry", ["ops", "library", "bank", "residual"])
@pytest.mark.parametrize("name", list(BAD_CAP))
def test_errors_name_the_argument_and_change_nothing(name, entry):
    argument, spoil, error, message = BAD_CAP[name]
    call = _good()
    call[argument] = spoil(call[argument])
    before = {key: value.clone() if value.device.type == "cpu" else None for key, value in call.items()}
    hidden, axes, floors, slots, projections, lifts, targets, norm_limits = call.values()
    more = {"targets": targets, "lifts": lifts, "norm_limits": norm_limits}
    if entry == "residual":
        message = message.replace("hidden is", "residual is")
    residual = hidden if "overlap" in message else hidden.clone()
    entries = {
        "ops": lambda: ops.cap_(hidden, axes, floors, slots, **more, projections=projections),
        "library": lambda: torch.ops.axiscap.cap_(hidden, axes, floors, slots, **more, projections=projections),
        "bank": lambda: _C.Bank(
            axes, floors, targets, axes if lifts.is_cpu and lifts.equal(unit(2, 1, H)) else lifts, norm_limits
        ).cap_(hidden, slots, projections),
        "residual": lambda: ops.cap_residual_(hidden, residual, axes, floors, slots, **more, projections=projections),
    }
    with pytest.raises(error, match=message) as caught:
        entries[entry]()
    assert "\n" not in str(caught.value)
    for key, value in call.items():
        if before[key] is not None:
            assert torch.equal(value, before[key])


def calls(hidden, axes, floors, slots, projections, lifts, targets, norm_limits) -> dict[str, tuple]:
    """Every op with these arguments, as (op, positional, keyword arguments)."""
    library, bank = torch.ops.axiscap, (targets, lifts, norm_limits)
    only = {"targets": targets, "lifts": lifts, "norm_limits": norm_limits, "projections": projections}
    residual, weight = hidden.clone() if hidden.is_contiguous() else hidden, hidden.new_ones(hidden.shape[-1:])
    quantized = torch.zeros(hidden.shape, dtype=torch.float8_e4m3fn)
    stats, layers = torch.zeros(2, 1, len(_C.STAT_FIELDS), dtype=torch.float64), {k: v[None] for k, v in only.items()}
    return {
        "cap_": (library.cap_.default, (hidden, axes, floors, slots), only),
        "cap_.buffers": (library.cap_.buffers, (hidden, axes, floors, slots, projections, *bank), {}),
        "cap": (library.cap.default, (hidden, axes, floors, slots, *bank), {}),
        "project": (library.project.default, (hidden, axes, slots), {}),
        "cap_residual_": (library.cap_residual_.default, (hidden, residual, axes, floors, slots), only),
        "cap_residual_.buffers": (
            library.cap_residual_.buffers,
            (hidden, residual, axes, floors, slots, projections, *bank),
            {},
        ),
        "add_rms_norm_cap_": (
            library.add_rms_norm_cap_.default,
            (hidden, residual, weight, 1e-6, axes, floors, slots),
            only,
        ),
        "add_rms_norm_cap_fp8_": (
            library.add_rms_norm_cap_fp8_.default,
            (quantized, hidden, residual, weight, 1e-6, axes, floors, slots),
            {"scale": torch.ones(1), **only},
        ),
        "cap_layers_": (library.cap_layers_.default, ([hidden], axes[None], floors[None], slots), layers),
        "accumulate_": (library.accumulate_.default, (stats, projections, floors, slots), {}),
    }


def test_an_op_without_data_gives_shapes_and_checks_nothing_else():
    """Of every op; the kernel checks the call when it runs, in the same words as without a graph."""
    wrong = _good() | {"projections": torch.zeros(4, 2), "slots": torch.zeros(3, dtype=torch.int32)}
    fake = FakeTensorMode()
    for name, (op, arguments, keywords) in calls(*wrong.values()).items():
        without_data = tree_map_only(torch.Tensor, fake.from_tensor, (arguments, keywords))
        with fake:
            results = op(*without_data[0], **without_data[1])
        shapes = [tuple(result.shape) for result in tree_leaves(results) if result is not None]
        wanted = {"cap": [(4, H), (4, 1), (4, 1)], "project": [(4, 1)]}
        assert shapes == wanted.get(name, []), name


def test_a_wrong_call_inside_a_graph_is_refused_when_it_runs():
    axes, floors = unit(1, 1, H), torch.ones(1, 1)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def step(hidden, slots):
        return ops.cap_(hidden + 1, axes, floors, slots)

    with pytest.raises(ValueError, match=r"slots must have shape \(rows,\) = \(4,\), got \[3\]"):
        step(torch.zeros(4, H), torch.zeros(3, dtype=torch.int32))
    with pytest.raises(IndexError, match=r"slots\[0\] must be in \[0, 1\) or -1, got 1"):
        step(torch.zeros(4, H), torch.ones(4, dtype=torch.int32))


@pytest.mark.parametrize(
    ("residual", "error", "message"),
    [
        (torch.zeros(3, H), ValueError, "residual must have the shape of hidden"),
        (torch.zeros(4, H, dtype=torch.bfloat16), TypeError, "residual must be Float, got BFloat16"),
        (torch.zeros(H, 4).T, ValueError, "residual must have stride 1"),
        (torch.zeros(4, H, requires_grad=True), ValueError, "residual requires grad"),
    ],
)
def test_errors_of_the_residual(residual, error, message):
    with pytest.raises(error, match=message):
        ops.cap_residual_(torch.zeros(4, H), residual, unit(1, 1, H), torch.ones(1, 1))
    assert not residual.any()


@pytest.mark.parametrize(
    ("weight", "eps", "bias", "error", "message"),
    [
        (torch.ones(H - 1), 0.0, 0.0, ValueError, r"weight must have shape \(H,\) = \(16,\)"),
        (torch.ones(H).half(), 0.0, 0.0, TypeError, "weight must be Float, got Half"),
        (torch.ones(2 * H)[::2], 0.0, 0.0, ValueError, "weight must have shape"),
        (torch.ones(H), -1.0, 0.0, ValueError, "eps must be finite and not negative, got -1"),
        (torch.ones(H), math.inf, 0.0, ValueError, "eps must be finite and not negative, got inf"),
        (torch.ones(H), 0.0, math.nan, ValueError, "weight_bias must be finite"),
    ],
)
def test_errors_of_the_norm(weight, eps, bias, error, message):
    hidden, residual = torch.ones(4, H), torch.zeros(4, H)
    with pytest.raises(error, match=message):
        ops.add_rms_norm_cap_(hidden, residual, weight, eps, unit(1, 1, H), torch.ones(1, 1), weight_bias=bias)
    assert bool((hidden == 1).all())
    assert not residual.any()


def test_rows_that_the_norm_replaces_do_not_overlap():
    """Where the norm goes to another tensor, hidden is read alone, and its rows may."""
    hidden, bank = torch.ones(H).expand(4, H), (unit(1, 1, H), torch.ones(1, 1))
    with pytest.raises(ValueError, match="hidden is changed in place, so its rows must not overlap"):
        ops.add_rms_norm_cap_(hidden, torch.zeros(4, H), torch.ones(H), 1e-6, *bank)
    quantized = torch.empty(4, H, dtype=torch.float8_e4m3fn)
    found, wanted = torch.zeros(4, H), torch.zeros(4, H)
    ops.add_rms_norm_cap_fp8_(quantized, hidden, found, torch.ones(H), 1e-6, *bank, scale=torch.ones(1))
    ops.cap_(wanted.copy_(hidden), *bank)
    assert_same_bits(found, wanted)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        (
            {"quantized": torch.zeros(3, H)},
            ValueError,
            r"quantized must have the shape of hidden, \[4, 16\], got \[3, 16\]",
        ),
        ({"quantized": torch.zeros(4, H)}, TypeError, "quantized must be Float8_e4m3fn, got Float"),
        ({"quantized": "twisted"}, ValueError, "quantized must have stride 1"),
        ({"quantized": "repeated"}, ValueError, "quantized is changed in place, so its rows must not overlap"),
        ({"scale": None}, ValueError, "one of scale and scales must be given"),
        ({"scales": torch.zeros(4)}, ValueError, "one of scale and scales must be given"),
        ({"scale": torch.zeros(4)}, ValueError, r"scale must be contiguous and have 1 element, got shape \[4\]"),
        (
            {"scale": None, "scales": torch.zeros(3, 1)},
            ValueError,
            r"scales must be contiguous and have 4 elements, one for each row, got shape \[3, 1\]",
        ),
        ({"scale": None, "scales": torch.zeros(8)[::2]}, ValueError, "scales must be contiguous"),
        ({"scale": torch.zeros(1, dtype=torch.float64)}, TypeError, "scale must be Float, got Double"),
        ({"scale": torch.zeros(1, device="meta")}, ValueError, "scale must be on the device of hidden"),
        ({"weight": torch.ones(H - 1)}, ValueError, "weight must have shape"),
        ({"residual": "leaf"}, ValueError, "residual requires grad"),
    ],
)
def test_errors_of_the_norm_in_fp8(changed, error, message):
    strange = {
        "twisted": torch.zeros(H, 4, dtype=torch.float8_e4m3fn).T,
        "repeated": torch.zeros(H, dtype=torch.float8_e4m3fn).expand(4, H),
        "leaf": torch.zeros(4, H, requires_grad=True),
    }
    call = {
        "quantized": torch.ones(4, H).to(torch.float8_e4m3fn), "hidden": torch.ones(4, H),
        "residual": torch.zeros(4, H), "weight": torch.ones(H), "eps": 0.0, "axes": unit(1, 1, H),
        "floors": torch.ones(1, 1), "scale": torch.ones(1), "scales": None,
    } | {name: strange[value] if isinstance(value, str) else value for name, value in changed.items()}  # fmt: skip
    for entry in (ops.add_rms_norm_cap_fp8_, torch.ops.axiscap.add_rms_norm_cap_fp8_):
        with pytest.raises(error, match=message):
            entry(**call)
    assert not call["residual"].any()


def test_errors_of_cap_layers():
    axes, floors = unit(2, 1, 1, H), torch.ones(2, 1, 1)
    streams = [torch.zeros(4, H), torch.zeros(4, H)]
    for hiddens, message in (
        (streams[:1], "axes must have one entry for each of the 1 hiddens, got 2"),
        ([streams[0], torch.zeros(3, H)], "hiddens must have one shape"),
        ([streams[0], torch.zeros(H, 4).T], "hiddens must have stride 1"),
        ([streams[0], torch.zeros(H).expand(4, H)], "hiddens is changed in place, so its rows must not overlap"),
        ([], "hiddens"),
    ):
        with pytest.raises(ValueError, match=message):
            ops.cap_layers_(hiddens, axes, floors)
    with pytest.raises(TypeError, match="hiddens must be Float, got Half"):
        ops.cap_layers_([streams[0], streams[1].half()], axes, floors)
    with pytest.raises(IndexError, match=r"slots\[1\]"):
        ops.cap_layers_(streams, axes, floors, torch.tensor([0, 1, 0, 0], dtype=torch.int32))
    assert not streams[0].any()


@pytest.mark.parametrize(
    ("axes", "floors", "message"),
    [
        (unit(1, 1, H) * 1.01, torch.ones(1, 1), "axes must be finite and of unit length"),
        (torch.full((1, 1, H), math.nan), torch.ones(1, 1), "axes must be finite and of unit length"),
        (unit(1, 1, H), torch.full((1, 1), math.nan), "floors must be finite"),
        (unit(1, 1, H), torch.full((1, 1), math.inf), "floors must be finite"),
    ],
)
def test_a_bank_checks_its_values_once(axes, floors, message):
    with pytest.raises(ValueError, match=message):
        _C.Bank(axes, floors)


def test_a_bank_checks_the_values_of_every_direction_of_every_slot():
    axes, floors = unit(2, 2, H), torch.ones(2, 2)
    good = {
        "axes": axes,
        "floors": floors,
        "targets": floors + 1,
        "lifts": _lifts(axes),
        "norm_limits": torch.ones(2),
    }
    _C.Bank(**good)
    for name, value in good.items():
        for at in ((0,), (1,)) if value.dim() == 1 else ((0, 1), (1, 0), (1, 1)):
            spoilt = value.clone()
            spoilt[at] = math.nan
            with pytest.raises(ValueError, match=f"{name} must be"):
                _C.Bank(**good | {name: spoilt})


def test_a_bank_checks_its_options():
    axes, floors = unit(1, 1, H), torch.ones(1, 1)
    for lifts in (2 * axes, -axes, torch.full_like(axes, math.nan)):
        with pytest.raises(ValueError, match="lifts must be finite, above 0 and at most 1 along their axes"):
            _C.Bank(axes, floors, lifts=lifts)
    for limit in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="norm_limits must be positive"):
            _C.Bank(axes, floors, norm_limits=torch.full((1,), limit))
    for target in (0.5, math.inf, math.nan, -math.inf):
        with pytest.raises(ValueError, match="targets must be finite and at least the floors"):
            _C.Bank(axes, floors, torch.full((1, 1), target))
    off = torch.full((1, 1), -math.inf)
    _C.Bank(axes, off, off)
    lifts = _lifts(axes)
    assert _C.Bank(axes, floors, None, lifts, torch.full((1,), math.inf)).lifts.data_ptr() == lifts.data_ptr()
    assert _C.Bank(axes, floors).lifts is None


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_read_along_one_direction_is_corrected_along_another(ops, dtype):
    """It ends on its floor as it is read, and has moved along the lift alone; beyond its limit it stays."""
    axes = unit(1, 1, 576)
    lifts = _lifts(axes)
    hidden = torch.randn(6, 576, generator=torch.Generator().manual_seed(3)).to(dtype)
    hidden[4:] += (-80 * axes[0]).to(dtype)
    before, projections = hidden.double(), torch.empty(6, 1)
    ops.cap_(
        hidden, axes, torch.full((1, 1), 3.0), lifts=lifts, norm_limits=torch.full((1,), 60.0), projections=projections
    )
    assert projections.isnan().flatten().tolist() == [False] * 4 + [True] * 2
    assert torch.equal(hidden[4:].double(), before[4:])
    read = hidden[:4].double() @ axes[0, 0].double()
    torch.testing.assert_close(read, torch.full((4,), 3.0, dtype=torch.float64), atol=0.1, rtol=0)
    moved = hidden[:4].double() - before[:4]
    along = (moved @ lifts[0, 0].double()) / (lifts[0, 0].double().norm() * moved.norm(dim=-1))
    assert bool((along > 0.99).all())


def test_zero_rows_and_one_dimension():
    axes, floors = unit(1, 1, 5), torch.ones(1, 1)
    assert ops.cap_(torch.zeros(0, 5), axes, floors).shape == (0, 5)
    assert ops.cap(torch.zeros(3, 0, 5), axes, floors).shape == (3, 0, 5)
    assert ops.project(torch.zeros(3, 0, 5), axes).shape == (3, 0, 1)
    assert ops.project(torch.zeros(5), axes).shape == (1,)
    row = ops.cap_(torch.zeros(5), axes, floors)
    assert row @ axes[0, 0] == pytest.approx(1)


def test_rows_that_are_only_read_may_overlap():
    rows, axes, floors = torch.ones(5).expand(3, 5), unit(1, 1, 5), torch.full((1, 1), 9.0)
    assert_same_bits(ops.cap(rows, axes, floors), ops.cap(rows.contiguous(), axes, floors))
    assert_same_bits(ops.project(rows, axes), ops.project(rows.contiguous(), axes))
    found = ops.cap_residual_(rows, torch.zeros(3, 5), axes, floors)
    assert_same_bits(found, ops.cap_residual_(rows.contiguous(), torch.zeros(3, 5), axes, floors))


def test_a_dimension_of_one_may_have_any_stride():
    axes, floors = unit(1, 1, 5), torch.ones(1, 1)
    for view in (
        torch.zeros(2, 4, 5)[:1, :3],
        torch.zeros(3, 2, 5)[:, :1],
        torch.zeros(2, 3, 2, 5)[:1, :, :1],
        torch.zeros(3, 2, 1, 5).transpose(1, 2)[..., :1, :],
    ):
        wanted = ops.cap(view, axes, floors)
        assert_same_bits(ops.cap_(view, axes, floors).contiguous(), wanted)
        assert bool((wanted != 0).all())
    part = unit(3, 4, 5, seed=1)[:1, :1]
    assert_same_bits(ops.project(torch.ones(2, 5), part), ops.project(torch.ones(2, 5), part.clone()))
    column = torch.zeros(1, 4).T
    assert ops.cap_(column, torch.ones(1, 1, 1), floors).tolist() == [[1.0]] * 4


def test_reference_refuses_slots_outside_the_bank():
    with pytest.raises(IndexError, match=r"slots must be in \[0, 1\) or -1"):
        reference.cap(torch.zeros(1, 4), unit(1, 1, 4), torch.ones(1, 1), torch.tensor([1]))


def test_the_same_call_gives_the_same_bits_every_time():
    hidden = torch.randn(64, 4096, generator=torch.Generator().manual_seed(0)).bfloat16()
    axes, floors = unit(1, 1, 4096), torch.zeros(1, 1)
    seen = {
        hashlib.sha256(ops.cap(hidden, axes, floors).view(torch.int16).numpy().tobytes()).hexdigest() for _ in range(20)
    }
    assert len(seen) == 1


def test_version_is_one():
    from importlib.metadata import version

    assert axiscap.__version__ == version("axiscap")


def test_the_binary_serves_every_torch():
    """It needs nothing that only some have: no CUDA library, and of torch two functions of its stable C interface."""
    if shutil.which("readelf") is None or shutil.which("nm") is None:
        pytest.skip("looking into the binary needs readelf and nm")
    needed = subprocess.run(["readelf", "-d", _C.__file__], check=True, capture_output=True, text=True).stdout
    libraries = re.findall(r"\(NEEDED\).*\[(.*)\]", needed)
    assert "libtorch_cpu.so" in libraries
    assert not [name for name in libraries if "cuda" in name.lower()]
    missing = subprocess.run(["nm", "-DC", "--undefined-only", _C.__file__], check=True, capture_output=True, text=True)
    names = {line.split()[-1].partition("@")[0] for line in missing.stdout.splitlines() if " U " in line}
    assert {name for name in names if "torch" in name} == {"aoti_torch_grad_mode_is_enabled", "torch_parallel_for"}
    assert not names & {"mincore", "dlopen", "dlsym"} or _C.accelerator()  # the CUDA runtime looks for the driver
    assert not [name for name in names if re.search(r"(?i)\bcuda|cudart|::cuda::|\b(?:at|c10|torch)::", name)]


def test_the_sources_touch_nothing_private_of_torch():
    """No layout of torch's objects, no symbol that is looked up by name, no name of functorch."""
    native = [path for path in (REPOSITORY / "csrc").rglob("*") if path.suffix in (".h", ".cpp", ".cu", ".cuh")]
    for path in native:
        text = path.read_text()
        for name in ("mincore", "dlsym", "dlopen", "_cdata", "TensorImpl", "AtenTensorHandle", "ATen/core", "c10/"):
            assert name not in text, (path, name)
    for path in (REPOSITORY / "axiscap").rglob("*.py"):
        assert "functorch" not in path.read_text(), path


def test_the_functions_call_the_kernels_directly():
    """A plain tensor does not pass torch's dispatcher; a negated view does, and is refused there."""

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    seen: list[str] = []
    hidden, axes, floors = torch.zeros(2, 8), unit(1, 1, 8), torch.ones(1, 1)
    slots = torch.zeros(2, dtype=torch.int32)
    with Seen():
        _C.Bank(axes, floors).cap_(hidden, slots)
        ops.cap_(torch.nn.Parameter(hidden, requires_grad=False), axes, floors, slots)
        assert seen == []
        ops.cap_(hidden.as_subclass(type("Subclass", (torch.Tensor,), {})), axes, floors, slots)
    assert "axiscap.cap_.default" in seen


def test_the_dispatcher_passes_on_every_argument():
    axes, floors = unit(2, 1, 8), torch.full((2, 1), 1.0)
    more = {"targets": floors + 1, "lifts": _lifts(axes), "norm_limits": torch.full((2,), 3.0)}
    slots = torch.tensor([0, 1, -1] * 3, dtype=torch.int32)
    hidden = torch.randn(9, 8, generator=torch.Generator().manual_seed(3))
    results = []
    for rows in (hidden.clone(), hidden.clone().as_subclass(type("Subclass", (torch.Tensor,), {}))):
        projections = torch.zeros(9, 1)
        ops.cap_(rows, axes, floors, slots, **more, projections=projections)
        results.append((rows.as_subclass(torch.Tensor), projections))
    for found, wanted in zip(results[1], results[0], strict=True):
        assert_same_bits(found, wanted)


def test_a_call_is_bound_to_the_arguments_of_its_schema():
    hidden, axes, floors = torch.zeros(2, 8), unit(1, 1, 8), torch.ones(1, 1)
    wrong = {
        "cap_ needs floors": lambda: _C.cap_(hidden, axes),
        "cap_ needs axes": lambda: _C.cap_(hidden, None, floors),
        "cap_ has no argument floor": lambda: _C.cap_(hidden, axes, floors, floor=1),
        "cap_ got hidden twice": lambda: _C.cap_(hidden, axes, floors, hidden=hidden),
        "cap_ takes fewer positional arguments than 5": lambda: _C.cap_(hidden, axes, floors, None, axes),
        "axes must be a torch.Tensor, got list": lambda: _C.cap_(hidden, [1.0], floors),
    }
    for message, call in wrong.items():
        with pytest.raises(TypeError, match=message):
            call()
    assert not hidden.any()
    assert _C.cap_(axes=axes, floors=floors, **{"".join(["hid", "den"]): hidden}) is None
    assert hidden.any()
    for schema, names, _ in _C.OPS:
        op = schema.partition("(")[0].partition(".")
        found = getattr(getattr(torch.ops.axiscap, op[0]), op[2] or "default")._schema
        assert [argument.name for argument in found.arguments] == names
    assert len(_C.plan("float32", 64, 8, 4)) == 4


# Transforms of torch.func, and forward mode: a clear refusal or the right number.


TRANSFORMS = {
    "jvp": lambda f, h, t: torch.func.jvp(f, (h,), (t,)),
    "vjp": lambda f, h, t: torch.func.vjp(f, h)[1](f(t)),
    "grad": lambda f, h, t: torch.func.grad(lambda x: f(x).square().sum())(h),
    "jacrev": lambda f, h, t: torch.func.jacrev(f)(h),
    "jacfwd": lambda f, h, t: torch.func.jacfwd(f)(h),
    "hessian": lambda f, h, t: torch.func.hessian(lambda x: f(x).pow(3).sum())(h),
    "vmap of grad": lambda f, h, t: torch.vmap(torch.func.grad(lambda x: f(x).square().sum()))(torch.stack([h, t])),
    "dual": lambda f, h, t: f(torch.autograd.forward_ad.make_dual(h, t)),
}


@pytest.mark.parametrize("name", list(TRANSFORMS))
def test_derivatives_other_than_backward_are_refused(name):
    axes, floors = unit(2, 2, 12), torch.tensor([[0.5, -0.2], [1.0, 0.0]])
    hidden, tangent = torch.randn(2, 6, 12, generator=torch.Generator().manual_seed(2))
    bank = _C.Bank(axes, floors)
    functions = (
        lambda x: ops.cap(x, axes, floors),
        lambda x: ops.project(x, axes),
        lambda x: ops.cap_(x.clone(), axes, floors),
        lambda x: ops.cap_residual_(x, x.clone(), axes, floors),
        lambda x: (y := x.clone(), bank.cap_(y))[0],
    )
    level = torch.autograd.forward_ad.dual_level() if name == "dual" else contextlib.nullcontext()
    for function in functions:
        with level, pytest.raises((RuntimeError, ValueError), match=r"forward-mode|setup_context|requires grad"):
            TRANSFORMS[name](function, hidden, tangent)


def test_vmap_is_right_or_refused():
    axes, floors, hidden = unit(3, 1, 8), torch.ones(3, 1), torch.randn(4, 5, 8)
    wanted = torch.stack([ops.cap(rows, axes, floors) for rows in hidden])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, of a loop
        assert_same_bits(torch.vmap(lambda rows: ops.cap(rows, axes, floors))(hidden), wanted)
    bank = _C.Bank(axes, floors)
    for cap in (
        lambda rows: ops.cap_(rows, axes, floors),
        bank.cap_,
        lambda rows: torch.ops.axiscap.cap_(rows, axes, floors),
    ):
        with pytest.raises(RuntimeError, match="Batching rule not implemented for axiscap::cap_"):
            torch.vmap(cap)(hidden.clone())


# Tensors whose memory is not what their sizes and strides say.


def _calls(hidden):
    """Every call that takes a stream, with all else in order for (4, 8)."""
    axes, floors = unit(1, 1, 8), torch.full((1, 1), 1e3)
    bank = _C.Bank(axes, floors)
    return {
        "cap_": lambda: ops.cap_(hidden, axes, floors),
        "cap": lambda: ops.cap(hidden, axes, floors),
        "project": lambda: ops.project(hidden, axes),
        "cap_residual_": lambda: ops.cap_residual_(hidden, torch.zeros(4, 8), axes, floors),
        "residual": lambda: ops.cap_residual_(torch.zeros(4, 8), hidden, axes, floors),
        "add_rms_norm_cap_": lambda: ops.add_rms_norm_cap_(
            hidden, torch.zeros(4, 8), torch.ones(8), 1e-6, axes, floors
        ),
        "add_rms_norm_cap_fp8_": lambda: ops.add_rms_norm_cap_fp8_(
            torch.zeros(4, 8, dtype=torch.float8_e4m3fn),
            hidden,
            torch.zeros(4, 8),
            torch.ones(8),
            1e-6,
            axes,
            floors,
            scale=torch.ones(1),
        ),
        "cap_layers_": lambda: ops.cap_layers_([hidden], axes[None], floors[None]),
        "bank": lambda: bank.cap_(hidden),
        "op": lambda: torch.ops.axiscap.cap_(hidden, axes, floors),
    }


def _freed():
    tensor = torch.ones(4, 8)
    tensor.untyped_storage().resize_(0)
    return tensor


STRANGE = {
    "sparse": lambda: torch.ones(4, 8).to_sparse(),
    "compressed": lambda: torch.ones(4, 8).to_sparse_csr(),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(2, 8), torch.ones(2, 8)]),
    "quantised": lambda: torch.quantize_per_tensor(torch.ones(4, 8), 0.1, 0, torch.qint8),
    "freed": _freed,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", list(STRANGE))
def test_what_has_no_rows_in_memory_is_refused(name):
    """With a sentence, and without a look at memory that is not there."""
    for entry, call in _calls(STRANGE[name]()).items():
        with pytest.raises((ValueError, RuntimeError, NotImplementedError, TypeError)) as caught:
            call()
        assert len(str(caught.value)) > 20, entry


@pytest.mark.parametrize("argument", ["axes", "floors", "targets", "lifts", "norm_limits", "slots", "projections"])
def test_freed_arguments_are_named(argument):
    given = {
        "axes": unit(1, 1, 8), "floors": torch.zeros(1, 1), "targets": torch.ones(1, 1), "lifts": unit(1, 1, 8),
        "norm_limits": torch.ones(1), "slots": torch.zeros(4, dtype=torch.int32), "projections": torch.zeros(4, 1),
    }  # fmt: skip
    given[argument].untyped_storage().resize_(0)
    with pytest.raises(ValueError, match=f"{argument} has less memory than its shape"):
        ops.cap_(torch.ones(4, 8), **given)


def test_meta_and_fake_tensors_are_taken_by_every_call():
    for entry, call in _calls(torch.ones(4, 8, device="meta")).items():
        with pytest.raises(ValueError, match="must be on the device of"):
            call()
        assert entry
    for call in _calls(FakeTensorMode(allow_non_fake_inputs=True).from_tensor(torch.ones(4, 8))).values():
        call()


def test_layers_on_several_devices_are_refused():
    axes, floors, hidden = unit(2, 1, 1, 8), torch.ones(2, 1, 1), torch.zeros(4, 8)
    with pytest.raises(ValueError, match="hiddens must be on the device of hidden, cpu, got meta"):
        ops.cap_layers_([hidden, torch.zeros(4, 8, device="meta")], axes, floors)
    assert not hidden.any()


@pytest.mark.parametrize("name", ["stats", "projections", "floors", "slots"])
def test_statistics_on_several_devices_are_refused(name):
    given = {
        "stats": ops.new_stats(1, 1), "projections": torch.zeros(2, 1), "floors": torch.ones(1, 1),
        "slots": torch.zeros(2, dtype=torch.int32),
    }  # fmt: skip
    with pytest.raises(ValueError, match="must be on the device of projections"):
        ops.accumulate_(**given | {name: given[name].to("meta")})
    assert_same_bits(given["stats"], ops.new_stats(1, 1))


def test_a_bank_without_data_is_refused():
    fake = FakeTensorMode().from_tensor
    for made in (fake, lambda tensor: tensor.to("meta"), torch._neg_view):
        with pytest.raises(ValueError, match="a bank is made of dense tensors with data"):
            _C.Bank(made(unit(1, 1, 8)), made(torch.zeros(1, 1)))


def test_the_imaginary_part_of_a_conjugated_half_is_read_negated():
    numbers = torch.view_as_complex(torch.randn(8, 2, generator=torch.Generator().manual_seed(0)).half())
    view = numbers.conj().imag.view(8, 1)
    assert view.is_neg()
    axes, floors = torch.ones(1, 1, 1), torch.zeros(1, 1)
    assert_same_bits(ops.cap(view, axes, floors), view.resolve_neg().clamp(min=0))


def test_a_negated_view_is_read_as_it_is_and_not_changed():
    axes, floors = unit(1, 1, 8), torch.full((1, 1), 2.0)
    hidden = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    wanted = ops.cap(-hidden, axes, floors)
    torch.testing.assert_close(ops.cap(torch._neg_view(hidden), axes, floors), wanted)
    torch.testing.assert_close(ops.project(torch._neg_view(hidden), axes), ops.project(-hidden, axes))
    view = torch._neg_view(hidden.clone())
    changes = _calls(view)
    for name in changes.keys() - {"cap", "project"}:
        with pytest.raises(ValueError, match=r"use its resolve_neg\(\)"):
            changes[name]()
    assert_same_bits(view.resolve_neg(), -hidden)


# What is changed shares memory with nothing else.


def test_memory_that_is_shared_is_refused():
    axes, floors = unit(1, 1, 8), torch.zeros(1, 1)
    buffer = torch.zeros(6, 8)
    flat = torch.zeros(64)
    shared = {
        "residual is changed, and shares memory with hidden": [
            lambda: ops.cap_residual_(buffer, buffer, axes, floors),
            lambda: ops.cap_residual_(buffer[:4], buffer[1:5], axes, floors),
            lambda: ops.add_rms_norm_cap_(buffer, buffer, torch.ones(8), 1e-6, axes, floors),
            # Rows of one stride that run into the next row; rows beside each other whose strides differ.
            lambda: ops.cap_residual_(flat[12:60].view(3, 16)[:, :8], flat[:48].view(3, 16)[:, :8], axes, floors),
            lambda: ops.cap_residual_(flat.as_strided((3, 8), (12, 1), 8), flat[:48].view(3, 16)[:, :8], axes, floors),
        ],
        "hidden is changed, and shares memory with axes": [
            lambda: ops.cap_(axes[0], axes, floors),
            lambda: _C.Bank(axes, floors).cap_(axes[0]),
        ],
        "hidden is changed, and shares memory with floors": [
            lambda: ops.cap_(flat[:8].view(1, 8), axes, flat[4:5].view(1, 1))
        ],
        "hidden is changed, and shares memory with projections": [
            lambda: ops.cap_(flat[:8].view(1, 8), axes, floors, projections=flat[7:8].view(1, 1))
        ],
        "hidden is changed, and shares memory with weight": [
            lambda: ops.add_rms_norm_cap_(flat[:16].view(2, 8), buffer[:2], flat[8:16], 1e-6, axes, floors)
        ],
        "quantized is changed, and shares memory with hidden": [
            lambda: ops.add_rms_norm_cap_fp8_(
                flat.view(torch.float8_e4m3fn)[:16].view(2, 8),
                flat[:16].view(2, 8),
                buffer[:2],
                flat[24:32],
                1e-6,
                axes,
                floors,
                scale=torch.ones(1),
            ),
            # Strides of as many elements, but not of as many bytes.
            lambda: ops.add_rms_norm_cap_fp8_(
                flat.view(torch.float8_e4m3fn)[:48].view(3, 16)[:, :8],
                flat[2:50].view(3, 16)[:, :8],
                buffer[:3],
                torch.ones(8),
                1e-6,
                axes,
                floors,
                scale=torch.ones(1),
            ),
        ],
        "scales is changed, and shares memory with projections": [
            lambda: ops.add_rms_norm_cap_fp8_(
                torch.zeros(2, 8, dtype=torch.float8_e4m3fn),
                flat[:16].view(2, 8),
                buffer[:2],
                flat[24:32],
                1e-6,
                axes,
                floors,
                scales=flat[40:42],
                projections=flat[41:43].view(2, 1),
            )
        ],
        "hiddens is changed, and shares memory with another of them": [
            lambda: ops.cap_layers_([buffer[:3], buffer[2:5]], unit(2, 1, 1, 8), torch.zeros(2, 1, 1))
        ],
        "stats is changed, and shares memory with projections": [
            lambda: ops.accumulate_(
                (room := torch.zeros(64)).view(torch.float64)[:8].view(1, 1, 8), room[2:4].view(2, 1), floors
            )
        ],
    }
    for message, calls in shared.items():
        for call in calls:
            with pytest.raises(ValueError, match=message):
                call()


def test_a_bank_whose_memory_moved_is_looked_at_again():
    hidden = torch.randn(2, 8)

    def made():
        axes, floors, lifts = unit(1, 1, 8), torch.full((1, 1), 3.0), unit(1, 1, 8)
        return axes, floors, lifts, _C.Bank(axes, floors, lifts=lifts)

    axes, floors, lifts, bank = made()
    floors.set_(torch.full((1, 1), 5.0))
    found = hidden.clone()
    bank.cap_(found)
    assert_same_bits(found, ops.cap(hidden, axes, floors, lifts=lifts))
    for at, name in enumerate(("axes", "floors", "lifts")):
        *tensors, bank = made()
        tensors[at].untyped_storage().resize_(0)
        with pytest.raises(ValueError, match=f"{name} has less memory than its shape"):
            bank.cap_(hidden)
    axes, floors, lifts, bank = made()
    floors.data = floors.double()
    with pytest.raises(TypeError, match="floors must be Float, got Double"):
        bank.cap_(hidden)
    axes, floors, lifts, bank = made()
    lifts.resize_(1, 1, 4)
    with pytest.raises(ValueError, match="lifts must have the shape of axes"):
        bank.cap_(hidden)
    axes, floors, lifts, bank = made()
    axes.resize_(8, 1, 1)
    with pytest.raises(ValueError, match="floors must have the shape of axes less H"):
        bank.cap_(hidden)


@pytest.mark.parametrize("moved", [False, True])
def test_a_bank_passes_on_every_argument(moved):
    """Also where its memory has moved, and the call takes another way."""
    axes, floors = unit(2, 1, 8), torch.full((2, 1), 1.0)
    more = {"targets": torch.full((2, 1), 2.5), "lifts": _lifts(axes), "norm_limits": torch.full((2,), 3.0)}
    bank = _C.Bank(axes, floors, **more)
    if moved:
        floors.set_(torch.full((2, 1), 2.0))
    hidden = torch.randn(9, 8, generator=torch.Generator().manual_seed(3))
    slots = torch.tensor([0, 1, -1] * 3, dtype=torch.int32)
    found, given, wanted = hidden.clone(), torch.zeros(9, 1), torch.zeros(9, 1)
    bank.cap_(found, slots, given)
    assert_same_bits(found, ops.cap(hidden, axes, floors, slots, **more, projections=wanted))
    assert_same_bits(given, wanted)
    beyond = given[slots >= 0].isnan()
    assert beyond.any()
    assert not beyond.all()


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("axes", lambda t: t.transpose_(1, 2), "axes must be contiguous"),
        ("axes", lambda t: t.transpose_(0, 1), "axes must be contiguous"),
        ("axes", lambda t: t.unsqueeze_(0), r"axes must have shape \(S, K, H\)"),
        ("floors", lambda t: t.t_(), "floors must be contiguous"),
        ("lifts", lambda t: t.transpose_(1, 2), "lifts must be contiguous"),
        ("targets", lambda t: t.t_(), "targets must be contiguous"),
        ("norm_limits", lambda t: t.unsqueeze_(0), "norm_limits must have the shape of axes less K and H"),
    ],
)
def test_a_bank_that_was_reshaped_in_place_is_looked_at_again(name, change, message):
    parts = {
        "axes": unit(4, 4, 4),
        "floors": torch.ones(4, 4),
        "targets": torch.ones(4, 4),
        "lifts": unit(4, 4, 4),
        "norm_limits": torch.ones(4),
    }
    bank, hidden = _C.Bank(**parts), torch.zeros(3, 4)
    change(parts[name])
    with pytest.raises(ValueError, match=message):
        bank.cap_(hidden)
    assert not hidden.any()


def test_streams_side_by_side_in_one_buffer_are_two():
    axes, floors = unit(1, 1, 8), torch.full((1, 1), 3.0)
    both = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
    hidden, residual = both[:, :8], both[:, 8:]
    wanted = ops.cap_residual_(hidden.clone(), residual.clone(), axes, floors)
    assert_same_bits(ops.cap_residual_(hidden, residual, axes, floors), wanted)
    layers = torch.randn(4, 3, 8)
    ops.cap_layers_([layers[:, at] for at in (2, 0, 1)], unit(3, 1, 1, 8), torch.zeros(3, 1, 1))


def test_a_compiled_model_is_capped_and_counted():
    """In every torch: an installation asks its compiler what it is doing."""

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = torch.nn.ModuleList(torch.nn.Linear(8, 8) for _ in range(2))

        def forward(self, hidden):
            for layer in self.layers:
                hidden = layer(hidden)
            return hidden

    profile = axiscap.CapProfile((1,), unit(1, 1, 8), torch.tensor([[2.0]]))
    model, hidden = Model(), torch.randn(1, 6, 8)
    with torch.no_grad(), axiscap.install(model, profile, layers="layers") as cap:
        wanted = model(hidden)
        torch.testing.assert_close(torch.compile(model, backend="aot_eager")(hidden), wanted)
        assert cap.stats()["default"][1].rows == 12
