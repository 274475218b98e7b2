"""Which rows the CUDA kernels cap: floors, targets, slots, norm limits, and rows that are not finite."""

from __future__ import annotations

import math

import pytest
import torch
from checks import NARROW_AND_WIDE, WIDEST, run_on
from conftest import assert_same_bits, unit
from emulated import MAX_REGISTER_SIZE, OPS, Device
from op_inputs import DTYPES, at_the_edge
from torch._subclasses.fake_tensor import FakeTensorMode

from axiscap import _C, reference

#: Sizes of narrow rows: several rows to a warp, several warps to a row.
NARROW = (72, 1040)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_without_a_finite_result_or_a_slot_are_left_alone(dtype):
    """Infinity, NaN, a correction that overflows, slot -1 and slots outside of the bank: projections are NaN."""
    size = 1040
    hidden = torch.randn(8, size, generator=torch.Generator().manual_seed(1)).to(dtype)
    hidden[1, size - 1], hidden[2, 0] = math.inf, math.nan
    axes, floors = unit(1, 2, 1, size), torch.tensor([[[50.0], [3.4e38]]])
    hidden[3] = torch.where(axes[0, 1, 0] > 0, -3e38, 3e38).to(dtype) if dtype != torch.float16 else hidden[3]
    slots = torch.tensor([0, 0, 0, 1, 2, -1, -7, 2**31 - 1], dtype=torch.int32)
    before, projections = hidden.clone(), torch.empty(1, 8, 1)
    fired = torch.empty(8, 1, dtype=torch.uint8)
    Device().call([hidden], axes, floors, slots, projections=projections, fired=fired)
    left_alone = [1, 2, 4, 5, 6, 7] + ([3] if dtype != torch.float16 else [])
    assert_same_bits(hidden[left_alone], before[left_alone])
    assert bool(projections[0, left_alone].isnan().all())
    assert fired.flatten().tolist()[0] == 1
    assert not fired[left_alone].any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("size", "element"), [(7, 6), (40, 3), (1023, 1022), (1040, 700)])
@pytest.mark.parametrize("directions", [1, 2])
def test_a_row_whose_correction_overflows_is_left_alone(dtype, size, element, directions):
    rows, axes, floors, slots = at_the_edge(dtype, size, element)
    selected = slice(None) if directions == 2 else slice(3)
    rows, slots = rows[selected], slots[selected]
    axes, floors = axes[:, :directions].contiguous(), floors[:, :directions].contiguous()
    expected = reference.cap(rows, axes, floors, slots)
    for op in OPS:
        out = rows.clone()
        projections, fired = run_on(Device(), op, out, axes, floors, slots)
        assert fired.any(-1).tolist() == [False, True, False, True][selected]
        assert projections.isfinite().all(-1).tolist() == [False, True, True, True][selected]
        assert_same_bits(out[[0, 2]], rows[[0, 2]])
        torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("op", list(OPS))
@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("size", NARROW_AND_WIDE)
def test_a_projection_at_its_floor_does_not_fire(op, directions, size):
    """One row is at the floor, the other one bfloat16 below."""
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


@pytest.mark.parametrize(
    ("dtype", "op", "directions", "width"),
    [
        (dtype, op, directions, width)
        for number, dtype in enumerate(DTYPES)
        for op in OPS
        for directions, width in ((1, "narrow"), (2, "narrow"), (1 + number % 2, "wide"))
    ],
)
def test_a_row_at_its_norm_limit_is_capped(dtype, op, directions, width):
    """Two rows are at the limit, with opposite signs. The last one is one bfloat16 above and is left alone."""
    size = MAX_REGISTER_SIZE[dtype] + 8 if width == "wide" else 1040
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
@pytest.mark.parametrize("size", [67, 72, 1040, MAX_REGISTER_SIZE[torch.bfloat16] + 8])
def test_every_element_counts_in_the_norm(op, directions, size):
    """Each row has one massive element, at another position in its vector, thread and warp; the last row has none."""
    elements = [0, 1, 7, 8, 30, 37, 65, 66, *(i for i in (255, 256, 511, 519, 1033, 1039) if i < size)]
    rows = torch.zeros(len(elements) + 1, size, dtype=torch.bfloat16)
    rows[torch.arange(len(elements)), torch.tensor(elements)] = 100.0
    before = rows.clone()
    axes = torch.zeros(1, directions, size)
    axes[..., 40] = 1
    floors = torch.full((1, directions), 1.0)
    projections, fired = run_on(Device(resident=2), op, rows, axes, floors, norm_limits=torch.tensor([99.0]))
    assert fired.any(-1).tolist() == [False] * len(elements) + [True]
    assert projections[:-1].isnan().all()
    assert_same_bits(rows[:-1], before[:-1])
    assert rows[-1, 40] == 1


@pytest.mark.parametrize(
    ("dtype", "op", "directions", "size"),
    [
        (dtype, op, directions, size)
        for number, dtype in enumerate(DTYPES)
        for op in OPS
        for directions, size in (
            (1, NARROW[number % 2]),
            (2, NARROW[(number + 1) % 2]),
            (1 + number % 2, MAX_REGISTER_SIZE[torch.bfloat16] + 8),
        )
    ],
)
def test_each_slot_has_its_own_norm_limit(dtype, op, directions, size):
    """One slot has an infinite limit, and a row without a slot has no limit. Slots differ in targets and lifts, too."""
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
    """The sum of squares of a row with one element is its rounded square, so a row at its limit is always capped."""
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
def test_a_sum_of_squares_that_overflows_is_above_a_finite_limit(dtype, op, directions):
    """It is not above an infinite limit, nor above a limit whose square is infinite."""
    for size in (72, 1040, MAX_REGISTER_SIZE[dtype] + 8):
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


@pytest.mark.parametrize(
    ("dtype", "op", "directions", "has_lifts", "width"),
    [
        (dtype, op, directions, (number + offset) % 2 == 1, width)
        for number, dtype in enumerate(DTYPES)
        for op in OPS
        for offset, (directions, width) in enumerate(((1, "narrow"), (2, "narrow"), (1 + number % 2, "wide")))
    ],
)
def test_a_row_below_its_floor_ends_at_its_target(dtype, op, directions, has_lifts, width):
    """A row at its floor, or between floor and target, does not change."""
    size = MAX_REGISTER_SIZE[dtype] + 8 if width == "wide" else 1040
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
    bank = {"targets": targets, "lifts": lifts} if has_lifts else {"targets": targets}
    _, fired = run_on(Device(resident=2), op, rows, axes, torch.full((1, directions), 2.0), **bank)
    assert fired.tolist() == [[1] * directions] * 2 + [[0] * directions] * 2
    for k in range(directions):
        assert rows[:2, 3 + k].tolist() == [targets[0, k]] * 2
    corrections = [sum(float(targets[0, k]) - p for k in range(directions)) for p in (1.0, -2.0)]
    assert rows[:2, 9].tolist() == ([correction / 2 for correction in corrections] if has_lifts else [0.0, 0.0])
    assert_same_bits(rows[2:], before[2:])


@pytest.mark.parametrize("op", list(OPS))
@pytest.mark.parametrize("size", [1040, MAX_REGISTER_SIZE[torch.float32] + 8])
def test_a_projection_that_a_correction_makes_infinite_leaves_the_row_alone(op, size):
    """The projection on the second direction becomes infinite, although the first correction is finite."""
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
def test_a_row_with_a_slot_outside_of_the_bank_is_left_alone(op, size, resident):
    """Slot num_slots and its neighbours: in the first row of a block, in prefetched rows, and in later rows."""
    slots = torch.tensor([2, 3, 2, 0, 2, 1, 2, -1, 2], dtype=torch.int32)
    for shift in range(3):
        rows = torch.randn(9, size, generator=torch.Generator().manual_seed(shift)).bfloat16()
        before, row_slots = rows.clone(), slots.roll(shift)
        bank = unit(2, 1, size), torch.full((2, 1), 100.0)
        projections, fired = run_on(Device(resident=resident), op, rows, *bank, row_slots)
        is_in_bank = (row_slots >= 0) & (row_slots < 2)
        assert fired[:, 0].bool().tolist() == is_in_bank.tolist()
        assert projections[:, 0].isnan().tolist() == (~is_in_bank).tolist()
        assert_same_bits(rows[~is_in_bank], before[~is_in_bank])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("width", ["several rows to a warp", "several warps to a row", "wide"])
def test_an_infinite_shortfall_leaves_the_row_alone(dtype, directions, width):
    """Projection and floor are finite, their difference is infinite. Some elements are 0: 0 * inf is NaN."""
    sizes = {"several rows to a warp": 72, "several warps to a row": 1040, "wide": MAX_REGISTER_SIZE[dtype] + 8}
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
        # The same with a target that is too far away.
        rows = before.clone()
        projections, fired = run_on(Device(), op, rows, axes, torch.full_like(floors, 0.5), targets=floors)
        assert not fired.any()
        assert projections[:, 0].isnan().tolist() == [True, False]
        assert_same_bits(rows, before)


@pytest.mark.parametrize("op", list(OPS))
@pytest.mark.parametrize("directions", [1, 2])
def test_wide_rows_without_a_finite_result_or_a_slot_are_left_alone(op, directions):
    """A row that is not finite, a correction that overflows, a row without a slot, a row at its floor. Aligned rows and
    others give the same bits.
    """
    dtype, size = torch.bfloat16, MAX_REGISTER_SIZE[torch.bfloat16] + 2056
    rows, axes, floors, slots = at_the_edge(dtype, size, 16390)
    rows, slots = torch.cat([rows, rows[:1], rows[:1]]), torch.cat([slots, torch.tensor([-1, 2], dtype=torch.int32)])
    selected = slice(None) if directions == 2 else [0, 1, 2, 4, 5]
    rows, slots = rows[selected].contiguous(), slots[selected].contiguous()
    axes, floors = axes[:, :directions].contiguous(), floors[:, :directions].contiguous()
    results = []
    for padding in (0, 1):
        out = torch.zeros(len(rows), size + padding, dtype=dtype)[:, :size]
        out.copy_(rows)
        projections, fired = run_on(Device(resident=2), op, out, axes, floors, slots)
        results.append(out.contiguous())
        unchanged = [0, 2, len(rows) - 2, len(rows) - 1]
        assert fired.any(-1)[unchanged].tolist() == [False] * 4
        assert projections[[0, *unchanged[2:]]].isnan().all()
        assert projections[[i for i in range(len(rows)) if i not in unchanged or i == 2]].isfinite().all()
        assert_same_bits(out[unchanged].contiguous(), rows[unchanged])
    assert_same_bits(*results)
    expected = reference.cap(rows, axes, floors, slots.where(slots < len(axes), -1))
    torch.testing.assert_close(results[0], expected)


@pytest.mark.skipif(_C.accelerator() is None, reason="this build has no kernels for a GPU, and so no limit")
def test_a_bank_for_rows_too_wide_for_every_kernel_is_refused():
    with FakeTensorMode():  # fake tensors can be on a GPU that does not exist
        axes, floors = torch.empty(1, 1, WIDEST + 1, device="cuda"), torch.empty(1, 1, device="cuda")
        with pytest.raises(ValueError, match="axes must have an H of at most 24576 on cuda:0, got 24577"):
            _C.Bank(axes, floors)
