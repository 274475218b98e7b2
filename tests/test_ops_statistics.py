"""The statistics that the kernels add up."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import assert_same_bits
from hypothesis import given
from op_inputs import inputs

from axiscap import _C, ops


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
    expected = torch.stack([ops.new_stats(4, 2) for _ in range(3)])
    for stats, of_layer, own in zip(expected, projections, floors, strict=True):
        ops.accumulate_(stats, of_layer, own, slots)
    result = torch.stack([ops.new_stats(4, 2) for _ in range(3)])
    assert_same_bits(ops.accumulate_(result, projections, floors, slots), expected)
    ops.accumulate_(result, projections[:, :0], floors, slots[:0])
    assert_same_bits(result, expected)


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
