"""The CUDA kernel of the running statistics."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from emulated import kernels, storage_bytes
from interpreter import SECTOR, Launch
from ptx_memory import Memory
from ptx_module import Kernel

from axiscap import _C, ops


def statistics_kernel(block_per_slot: bool) -> Kernel:
    (kernel,) = [kernel for name, kernel in kernels().items() if f"accumulate_rowsILb{int(block_per_slot)}" in name]
    return kernel


@pytest.mark.parametrize("block_per_slot", [False, True])
def test_the_statistics_kernel_has_the_counts_of_the_cpu(block_per_slot):
    """The last block of four warps has a warp without a slot. One slot has no rows, and without slots one has all."""
    generator = torch.Generator().manual_seed(2)
    layers, rows, num_slots, directions = (2, 700, 3, 2) if block_per_slot else (2, 200, 7, 2)
    projections = torch.randn(layers, rows, directions, generator=generator)
    projections[1, 5] = math.nan
    floors = torch.randn(layers, num_slots, directions, generator=generator)
    slots = torch.randint(-1, num_slots - 1, (rows,), generator=generator).int()
    stats, expected = (torch.stack([ops.new_stats(num_slots, directions)] * layers) for _ in range(2))
    first_rows, last_rows = slice(0, 330 if block_per_slot else 130), slice(70, None)
    for part, part_slots in (
        (first_rows, slots[first_rows].clone()),
        (last_rows, slots[last_rows].clone()),
        (slice(0, rows), None),
    ):
        part_projections = projections[:, part]
        ops.accumulate_(expected, part_projections, floors, part_slots)
        # A call uses the first rows of a larger buffer.
        buffer = torch.nn.functional.pad(part_projections, (0, 0, 0, 7))
        memory = Memory()
        tensors = {"projections": buffer, "floors": floors, "slots": part_slots, "stats": stats}
        addresses = [
            0 if tensor is None else memory.add(name, storage_bytes(tensor)) for name, tensor in tensors.items()
        ]
        sizes = [part_projections.shape[1], num_slots, directions, layers, buffer.stride(0)]
        parameters = np.array([*addresses, *sizes], np.int64).tobytes()
        *plan, grid = _C.stats_plan(part_projections.shape[1], num_slots, layers)
        assert plan[0] == block_per_slot
        Launch(statistics_kernel(block_per_slot), memory, parameters, (grid, layers), plan[1]).run()
    torch.testing.assert_close(stats, expected, rtol=1e-14, atol=0)
    exact = [_C.STAT_FIELDS.index(name) for name in ("seen", "fired", "below", "nonfinite", "min", "max")]
    assert torch.equal(stats[..., exact], expected[..., exact])


def test_the_statistics_of_a_large_step_read_each_projection_once():
    """Each slot has one row: its warp reads all slots, and one projection."""
    num_slots, rows = 64, 64
    memory = Memory()
    stats, floors = ops.new_stats(num_slots, 1)[None], torch.zeros(1, num_slots, 1)
    projections, slots = torch.randn(1, rows, 1), torch.arange(rows).int()
    tensors = {"projections": projections, "floors": floors, "slots": slots, "stats": stats}
    addresses = [memory.add(name, storage_bytes(tensor)) for name, tensor in tensors.items()]
    parameters = np.array([*addresses, rows, num_slots, 1, 1, rows], np.int64).tobytes()
    _, block, grid = _C.stats_plan(rows, num_slots, 1)
    Launch(statistics_kernel(False), memory, parameters, (grid, 1), block).run()
    assert memory["projections"].requested["ld"] == rows * 4
    assert memory["slots"].sectors["ld"] * SECTOR == num_slots * rows * 4
    assert memory["stats"].requested["st"] == num_slots * len(_C.STAT_FIELDS) * 8


def test_many_rows_of_few_slots_are_counted_by_blocks():
    """A step of 1,024 requests in eight layers has a warp for each prompt and each answer."""
    assert _C.stats_plan(1024, 2048, 8) == (False, 128, 512)
    assert _C.stats_plan(8192, 1, 1) == (True, 1024, 1)
