"""The kernels against the float64 oracle, and what a row's result depends on, bit by bit."""

from __future__ import annotations

import hashlib
import json
import math
import os
import subprocess
import sys
import textwrap

import pytest
import torch
from conftest import assert_same_bits, lower_instruction_sets, unit
from hypothesis import example, given
from hypothesis import strategies as st
from op_inputs import (
    DTYPES,
    ROUNDING,
    Input,
    around_fp8,
    assert_admitted,
    assert_close_to_oracle,
    assert_normed,
    at_the_edge,
    in_fp8,
    inputs,
    lifts_beside,
    own_scales,
)

from axiscap import _C, ops, reference


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
    result = ops.project(case.hidden, case.axes, case.slots)
    # A direction that is off fires nowhere, so nothing but the incoming row decides.
    off = torch.full_like(case.floors, -math.inf)
    incoming = library.cap(case.hidden, case.axes, off, case.slots)[1]
    assert_same_bits(result, incoming)


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


@given(inputs(), st.sampled_from([0.0, 1.0]))
def test_add_rms_norm_cap_is_the_oracle(ops, case, bias):
    before_hidden = case.hidden.clone()
    residual = case.hidden.flip(0).clone() if len(case.hidden) else case.hidden.clone()
    before = residual.clone()
    weight = torch.randn(case.hidden.shape[-1], generator=torch.Generator().manual_seed(1)).to(residual.dtype)
    projections = torch.empty(len(residual), case.axes.shape[1])
    hidden = case.hidden
    axes, floors, slots = case.call()
    result = ops.add_rms_norm_cap_(
        hidden, residual, weight, 1e-6, axes, floors, slots, weight_bias=bias, **case.more(), projections=projections
    )
    assert result[0] is hidden
    assert result[1] is residual
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


@given(inputs(), st.sampled_from([0.0, 1.0]), st.sampled_from([None, 1e-4, 0.01, 3.0]))
def test_the_norm_in_fp8_is_the_norm_and_a_quantisation(ops, case, bias, scale):
    """To the bit: residual, projections, and each row's scale."""
    residual = case.hidden.flip(0).clone() if len(case.hidden) else case.hidden.clone()
    size, rows = case.hidden.shape[-1], len(residual)
    weight = torch.randn(size, generator=torch.Generator().manual_seed(1)).to(residual.dtype)
    axes, floors, slots = case.call()
    normed, stream = case.hidden.clone(), residual.clone()
    projections, of_norm = torch.empty(rows, axes.shape[1]), torch.empty(rows, axes.shape[1])
    more = {**case.more(), "weight_bias": bias}
    ops.add_rms_norm_cap_(normed, stream, weight, 1e-6, axes, floors, slots, **more, projections=of_norm)
    before = case.buffer.clone()
    buffer = torch.full((rows, size + 3), 1.0).to(torch.float8_e4m3fn)
    scales = torch.empty(rows, 1) if scale is None else torch.tensor([scale])
    kind = {"scales": scales} if scale is None else {"scale": scales}
    given = buffer[:, :size], case.hidden, residual, weight, 1e-6, axes, floors, slots
    quantized, _ = ops.add_rms_norm_cap_fp8_(*given, **kind, **more, projections=projections)
    assert quantized is given[0]
    assert_same_bits(case.buffer, before)
    assert bool((buffer[:, size:].float() == 1).all())
    assert_same_bits(residual.nan_to_num(), stream.nan_to_num())
    assert_same_bits(projections, of_norm)
    numbers = normed.isfinite().all(-1)
    if scale is None:
        assert_same_bits(scales[numbers], own_scales(normed)[numbers])
    expected = in_fp8(normed, scales)
    assert torch.equal(quantized[numbers].view(torch.uint8), expected[numbers].view(torch.uint8))
    assert bool((quantized.float().isnan() == expected.float().isnan()).all())


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
    expected = [ops.project(s, axes[i], case.slots) for i, s in enumerate(streams)]
    result = ops.cap_layers_(streams, axes, floors, case.slots, **more, projections=projections)
    for layer in range(count):
        assert result[layer] is streams[layer]
        assert_same_bits(result[layer], each[layer])
        overflowed = projections[layer].isnan() & ~expected[layer].isnan()
        assert_same_bits(torch.where(overflowed, expected[layer], projections[layer]), expected[layer])


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
    expected = [ops.cap(stream, axes[layer], floors[layer], slots) for layer, stream in enumerate(streams)]
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        result = streams.clone()
        ops.cap_layers_(list(result), axes, floors, slots)
        assert_same_bits(result, torch.stack(expected))


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
        expected = reference.cap(before, *call)
        copy, incoming, fired = library.cap(before, *call)
        out = ops.cap_(before.clone(), *call, projections=projections)
        assert fired.any(-1).tolist() == [False, True, False, True][some]
        assert projections.isfinite().all(-1).tolist() == [False, True, True, True][some]
        assert_same_bits(out[[0, 2]], before[[0, 2]])
        torch.testing.assert_close(out, expected)
        assert_same_bits(copy, out)
        assert_same_bits(incoming.nan_to_num(), projections.nan_to_num())
        # Where the correction goes into a stream of its own, that is what must stay within; but a second direction
        # reads the sum, in float32.
        torch.testing.assert_close(ops.cap_residual_(nothing, before.clone(), *call), expected)
        alone = ops.cap_residual_(before, nothing.clone(), *call)
        assert bool(alone[0].any()) == (directions == 1 or dtype == torch.float16)
        assert alone.isfinite().all()
        # Under the norm the sum goes on as it is.
        weight = torch.ones(size, dtype=dtype)
        _, residual = ops.add_rms_norm_cap_(before.clone(), nothing.clone(), weight, 1e-6, *call)
        torch.testing.assert_close(residual, expected)
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


def test_a_correction_that_is_left_out_has_no_gradient(ops):
    rows, axes, floors, slots = at_the_edge(torch.float16, 64, 5)
    hidden = rows.requires_grad_()
    (result,) = torch.autograd.grad(ops.cap(hidden, axes, floors, slots).float().sum(), hidden)
    (expected,) = torch.autograd.grad(reference.cap(hidden, axes, floors, slots).float().sum(), hidden)
    assert bool((result[[0, 2]] == 1).all())
    torch.testing.assert_close(result, expected)


@pytest.mark.parametrize(("dtype", "storage"), [(torch.bfloat16, torch.int16), (torch.float16, torch.int16)])
def test_every_16_bit_number_is_read_and_rounded_as_torch_does(ops, dtype, storage):
    """All 65,536 patterns as rows of one element, and their sums with a small correction."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(storage).view(dtype)[:, None].contiguous()
    axis = torch.ones(1, 1, 1)
    result = ops.project(every, axis).flatten()
    expected = torch.where(every.float().isfinite(), every.float(), math.nan).flatten()
    result = torch.where(result.isnan(), math.nan, result)
    assert_same_bits(result, torch.where(expected.isnan(), math.nan, expected) + 0.0)
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
    expected = "oracle or alone or floor or 16_bit or finite or fp8"
    command = [sys.executable, "-m", "pytest", "-q", "-k", expected, __file__]
    inner = subprocess.run(command, env=os.environ | {"AXISCAP_ISA": name}, capture_output=True, text=True)
    assert inner.returncode == 0, inner.stdout[-3000:]
    assert " passed" in inner.stdout


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


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_read_along_one_direction_is_corrected_along_another(ops, dtype):
    """It ends on its floor as it is read, and has moved along the lift alone; beyond its limit it stays."""
    axes = unit(1, 1, 576)
    lifts = lifts_beside(axes)
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


def test_the_same_call_gives_the_same_bits_every_time():
    hidden = torch.randn(64, 4096, generator=torch.Generator().manual_seed(0)).bfloat16()
    axes, floors = unit(1, 1, 4096), torch.zeros(1, 1)
    seen = {
        hashlib.sha256(ops.cap(hidden, axes, floors).view(torch.int16).numpy().tobytes()).hexdigest() for _ in range(20)
    }
    assert len(seen) == 1
