"""The launch configuration of a call."""

from __future__ import annotations

import pytest
from emulated import MAX_REGISTER_SIZE, TYPES
from op_inputs import DTYPES

from axiscap import _C


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_plan_covers_every_size(dtype):
    name = TYPES[dtype][0]
    thread_size = 4 * 16 // dtype.itemsize  # elements of a thread: four vectors
    for size in range(1, MAX_REGISTER_SIZE[dtype] + 1):
        threads, block, shared, _ = _C.plan(name, size, 4096, 132)
        assert threads * thread_size >= size
        assert (threads <= 32 and threads & (threads - 1) == 0) or threads % 32 == 0
        assert threads == 1 or threads * thread_size < 2 * size + 32 * thread_size
        assert block % 32 == 0
        assert block <= 512
        assert shared == block * 128
        assert block == threads if threads > 32 else block % threads == 0
        for rows, max_blocks in ((0, 132), (1, 132), (7, 1), (4097, 1056)):
            *block_plan, grid = _C.plan(name, size, rows, max_blocks)
            assert block_plan == [threads, block, shared]  # the bits of a row depend on threads
            steps = -(-rows // (block // threads))
            assert grid == 0 if rows == 0 else 0 < grid <= min(steps, max_blocks)
            if grid:  # no block has more steps than with max_blocks
                assert -(-steps // grid) == -(-steps // max_blocks)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("int8", 64, 1, 1), "dtype must be float32, bfloat16 or float16, got int8"),
        (("bfloat16", 0, 1, 1), "hidden_size must be from 1 to 24576, got 0"),
        (("float32", 24577, 1, 1), "hidden_size must be from 1 to 24576, got 24577"),
        (("float16", 64, -1, 1), "rows must not be negative, got -1"),
        (("float16", 64, 1, 0), "max_blocks must be at least 1, got 0"),
    ],
)
def test_a_plan_with_an_invalid_argument_raises(arguments, message):
    with pytest.raises(ValueError, match=message):
        _C.plan(*arguments)
