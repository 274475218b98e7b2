"""The bytes that the CUDA kernels move."""

from __future__ import annotations

import math

import pytest
import torch
from checks import NARROW_AND_WIDE, norm_arguments, run_on
from conftest import unit
from emulated import MAX_REGISTER_SIZE, OPS, TYPES, Device
from interpreter import SECTOR
from op_inputs import DTYPES

from axiscap import _C


@pytest.mark.parametrize("op", ["cap", "cap_residual"])
@pytest.mark.parametrize("size", NARROW_AND_WIDE)
def test_a_row_that_does_not_fire_is_not_written(op, size):
    rows = torch.randn(3, size, generator=torch.Generator().manual_seed(0)).bfloat16()
    device = Device(resident=1)
    run_on(device, op, rows, unit(1, 1, size), torch.full((1, 1), -math.inf))
    assert device.memory["hidden0" if op == "cap" else "residual"].requested["st"] == 0


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [576, 4096, 8192])
def test_a_cap_moves_the_fewest_bytes(dtype, size):
    """A row is read once in whole sectors, and written once if it fires. A group of threads reads the axis once."""
    rows = 12
    hidden = torch.randn(rows, size, generator=torch.Generator().manual_seed(0)).to(dtype)
    axes = unit(1, 1, 1, size)
    fires = torch.arange(rows) % 3 == 0
    floors = torch.zeros(1, 1, 1)
    x = hidden.float() + (torch.where(fires, -2.0, 2.0) - hidden.float() @ axes[0, 0, 0])[:, None] * axes[0, 0, 0]
    hidden = x.to(dtype)
    device = Device(resident=4)
    device.call([hidden], axes, floors)
    stream, axis = device.memory["hidden0"], device.memory["axes"]
    row_bytes = size * hidden.element_size()
    assert stream.sectors["ld"] * SECTOR == stream.requested["ld"] == rows * row_bytes
    assert stream.sectors["st"] * SECTOR == stream.requested["st"] == int(fires.sum()) * row_bytes
    groups = device.launch.grid[0] * max(1, device.launch.block // _C.plan(TYPES[dtype][0], size, rows, 4)[0])
    assert axis.requested["ld"] == min(groups, rows) * size * 4


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [576, 4096, 8192])
@pytest.mark.parametrize("floor", [-math.inf, 1e3])
def test_a_norm_reads_and_writes_both_streams_once(dtype, size, floor):
    """Whether the rows fire or not."""
    rows = 12
    hidden = torch.randn(rows, size, generator=torch.Generator().manual_seed(0)).to(dtype)
    residual, weight = torch.zeros(rows, size, dtype=dtype), torch.ones(size, dtype=dtype)
    device = Device(resident=4)
    device.call([hidden], unit(1, 1, 1, size), torch.full((1, 1, 1), floor), residual=residual, weight=weight)
    for name in ("hidden0", "residual"):
        for kind in ("ld", "st"):
            assert device.memory[name].sectors[kind] * SECTOR == rows * size * dtype.itemsize


@pytest.mark.parametrize("op", list(OPS))
@pytest.mark.parametrize("directions", [1, 3])
def test_every_stream_is_read_once(op, directions):
    """Rows fire, with one direction or several, and have a norm limit."""
    size, rows = 1536, 7
    streams = {name: torch.randn(rows, size).bfloat16() for name in ("hidden0", "residual")}
    if op == "cap":
        del streams["residual"]
    norm, quantized, _ = norm_arguments(op, torch.ones(size).bfloat16(), torch.empty(rows, size))
    device = Device(resident=2)
    device.call(
        [streams["hidden0"]],
        unit(1, 1, directions, size),
        torch.full((1, 1, directions), 9.0),
        residual=streams.get("residual"),
        norm_limits=torch.full((1, 1), 1e3),
        **norm,
    )
    outputs = {"cap": ["hidden0"], "norm": ["hidden0", "residual"]}.get(op, ["residual"])
    for name in streams:
        buffer = device.memory[name]
        assert buffer.sectors["ld"] * SECTOR == buffer.requested["ld"] == rows * size * 2
        assert buffer.sectors["st"] * SECTOR == (rows * size * 2 if name in outputs else 0)
    if quantized is not None:
        assert device.memory["quantized"].sectors["st"] * SECTOR == rows * size


@pytest.mark.parametrize(
    ("op", "loads", "stores"), [("cap", 1, 1), ("cap_residual", 4, 1), ("norm", 2, 2), ("norm_fp8", 2, 1)]
)
def test_a_wide_row_is_read_and_written_as_often_as_its_op_needs(op, loads, stores):
    """cap_residual reads both streams a second time for a row that fires."""
    size, rows = MAX_REGISTER_SIZE[torch.bfloat16] + 2048, 3
    hidden = torch.randn(rows, size).bfloat16()
    device = Device(resident=2)
    run_on(device, op, hidden, unit(1, 1, size), torch.full((1, 1), 9.0), norm_limits=torch.tensor([1e3]))
    streams = [device.memory[name] for name in ("hidden0",) + (() if op == "cap" else ("residual",))]
    for kind, times in (("ld", loads), ("st", stores)):
        assert sum(buffer.sectors[kind] for buffer in streams) * SECTOR == times * rows * size * 2
