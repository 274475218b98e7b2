"""Launches by csrc/launchers/cuda.cu, with runtime.cpp in the place of the CUDA runtime."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY
from emulated import MAX_REGISTER_SIZE, OPS, kernel_name, nvcc, shared_kernel


@pytest.fixture(scope="module")
def launcher(tmp_path_factory) -> Path:
    """The program of runtime.cpp, which describes its arguments."""
    program = tmp_path_factory.mktemp("launch") / "launch"
    sources = [REPOSITORY / "csrc" / "launchers" / "cuda.cu", REPOSITORY / "tests" / "ptx" / "runtime.cpp"]
    command = [nvcc(), "-std=c++17", "-arch=compute_80", "-cudart", "none", f"-I{REPOSITORY / 'csrc'}"]
    subprocess.run([*command, *map(str, sources), "-o", str(program)], check=True, capture_output=True, text=True)
    return program


@pytest.mark.slow
@pytest.mark.parametrize(
    ("compiled", "device", "order"),
    [
        (80, 8, "in order"),
        (80, 9, "in order"),
        (89, 12, "in order"),
        (90, 9, "early"),
        (90, 12, "early"),
        (120, 12, "early"),
    ],
)
def test_a_kernel_starts_early_only_if_it_is_compiled_to_wait(launcher, compiled, device, order):
    """A device may run a kernel that is compiled for an older architecture and does not wait."""
    for line in launches(launcher, compiled, device, 4):
        assert line.startswith(f"{order}, 1 x 1 blocks, 16384 bytes, 100 % shared, ")


def launches(
    launcher: Path,
    compiled: int,
    major: int,
    rows: int,
    size: int | str = 64,
    layers: int = 1,
    *,
    op: str = "cap",
    odd: str = "-",
    bank: bool = False,
    device: int | str = -1,
    current: int = 0,
) -> list[str]:
    """The launches of a call. The program repeats the call: cached properties must give the same launches."""
    command = [launcher, *map(str, (compiled, major, rows, size, layers, op, odd, int(bank), device, current))]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    assert lines[: len(lines) // 2] == lines[len(lines) // 2 :]
    assert not [line for line in lines if "not as planned" in line]
    return lines[: len(lines) // 2]


@pytest.mark.slow
@pytest.mark.parametrize(("rows", "blocks"), [(1, 1), (33, 2), (512, 16), (10_000, 16)])
def test_a_launch_has_twice_the_blocks_that_the_device_holds(launcher, rows, blocks):
    """The device has four processors for two blocks of 32 rows each."""
    (line,) = launches(launcher, 90, 9, rows)
    assert line.startswith(f"early, {blocks} x 1 blocks, 16384 bytes, 100 % shared, ")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "layers", "expected"),
    [
        (64, 1, [("16 x 1 blocks, 16384 bytes", 1)]),
        (64, 3, [("5 x 3 blocks, 16384 bytes", 3)]),
        (64, 50, [("1 x 48 blocks, 16384 bytes", 48), ("1 x 2 blocks, 16384 bytes", 48)]),
        (8192, 1, [("16 x 1 blocks, 65536 bytes", 1)]),
        (8200, 1, [("16 x 1 blocks, 36864 bytes", None)]),
        (24576, 2, [("8 x 1 blocks, 98304 bytes", None)] * 2),
    ],
)
def test_layers_and_width_select_the_kernel(launcher, size, layers, expected):
    """One layer has a kernel of its own, and so have wide rows (None), which are launched layer by layer."""
    lines = launches(launcher, 90, 9, 10_000, size, layers)
    for line, (shape, kernel_layers) in zip(lines, expected, strict=True):
        if kernel_layers is None:
            name = shared_kernel(torch.float32, "cap")
        else:
            name = kernel_name(torch.float32, "cap", False, True, kernel_layers)
        assert line == f"early, {shape}, 100 % shared, {name}"
    assert MAX_REGISTER_SIZE[torch.float32] == 8192


@pytest.mark.slow
@pytest.mark.parametrize("op", list(OPS))
@pytest.mark.parametrize("size", [64, 8200])
def test_each_op_starts_its_own_kernel(launcher, op, size):
    (line,) = launches(launcher, 90, 9, 4, size, op=op)
    is_wide = size > MAX_REGISTER_SIZE[torch.float32]
    assert line.endswith(shared_kernel(torch.float32, op) if is_wide else kernel_name(torch.float32, op, False, True))


#: Pointers and strides of whole vectors: (op, pointer or stride, number of layers).
ODD = [
    *(("cap", odd, 1) for odd in ("hidden", "hidden_stride", "axes", "lifts", "out", "out_stride")),
    *(("cap", odd, 3) for odd in ("hidden", "hidden_stride", "axes", "lifts", "out", "out_stride")),
    *(("cap_residual", odd, 1) for odd in ("hidden", "residual", "residual_stride", "lifts", "out", "out_stride")),
    *(("norm", odd, 1) for odd in ("residual", "residual_stride", "weight", "normed", "normed_stride")),
    *(("norm_fp8", odd, 1) for odd in ("residual", "weight", "normed", "normed_stride")),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("op", "odd", "layers"), ODD)
def test_one_unaligned_pointer_or_stride_selects_the_kernel_for_unaligned_rows(launcher, op, odd, layers):
    """Only the last layer is not aligned. The kernel then reads all layers element by element."""
    (line,) = launches(launcher, 90, 9, 4, 64, layers, op=op, odd=odd, bank=odd == "lifts")
    assert kernel_name(torch.float32, op, False, False, 48 if layers > 1 else 1) in line
    (line,) = launches(launcher, 90, 9, 4, 64, layers, op=op, bank=odd == "lifts")
    assert kernel_name(torch.float32, op, False, True, 48 if layers > 1 else 1) in line


@pytest.mark.slow
@pytest.mark.parametrize(("layers", "launch_layers"), [(1, [1]), (3, [3]), (48, [48]), (50, [48, 2])])
def test_each_layer_is_launched_with_its_own_lifts_targets_and_limits(launcher, layers, launch_layers):
    lines = launches(launcher, 90, 9, 4, 64, layers, bank=True)
    assert [line.rpartition(", ")[2] for line in lines] == [f"{count} banks" for count in launch_layers]


@pytest.mark.slow
@pytest.mark.parametrize("op", list(OPS))
def test_several_directions_have_a_kernel_of_their_own(launcher, op):
    (line,) = launches(launcher, 90, 9, 4, 64, op=op, odd="directions")
    assert line.endswith(kernel_name(torch.float32, op, True, True))


@pytest.mark.slow
def test_a_row_too_wide_for_every_kernel_is_an_error(launcher):
    command = [launcher, *map(str, (90, 9, 1, 24577, 1, "cap", "-", 0, -1, 0))]
    result = subprocess.run(command, capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (1, "H must be at most 24576 on a GPU\n" * 2)


@pytest.mark.slow
@pytest.mark.parametrize(("device", "current", "launched"), [(-1, 0, 0), (-1, 3, 3), (0, 3, 0), (2, 0, 2), (5, 5, 5)])
@pytest.mark.parametrize("op", [*OPS, "statistics"])
def test_a_call_runs_on_its_device_and_leaves_the_current_one(launcher, op, device, current, launched):
    """The program fails if the current device is another one afterwards, or if it is set without need."""
    (line,) = launches(launcher, 90, 9, 4, op=op, device=device, current=current)
    assert line.endswith(f", on device {launched}") or (launched == 0 and "on device" not in line)


@pytest.mark.slow
def test_cached_properties_are_of_one_device_and_one_block_size(launcher):
    """Device 0 has four processors for two blocks each, device 5 has nine for three. Blocks of narrow and wide rows may
    have the same shared memory, but a processor holds only one of 288 threads.
    """
    shapes = [line.split(", ")[1:3] for line in launches(launcher, 90, 9, 10_000, device="0,5")]
    assert shapes == [["16 x 1 blocks", "16384 bytes"], ["53 x 1 blocks", "16384 bytes"]]
    lines = launches(launcher, 90, 9, 10_000, "4608,8200", odd="hidden")
    assert [line.split(", ")[1:3] for line in lines] == [
        ["8 x 1 blocks", "36864 bytes"],
        ["16 x 1 blocks", "36864 bytes"],
    ]


@pytest.mark.slow
@pytest.mark.parametrize("op", ["cap", "statistics"])
@pytest.mark.parametrize("device", [20, 16])
def test_a_device_that_does_not_exist_is_an_error(launcher, op, device):
    """So is a device for which the launcher has no cache entries."""
    command = [launcher, *map(str, (90, 9, 4, 64, 1, op, "-", 0, device, 3))]
    result = subprocess.run(command, capture_output=True, text=True)
    if (op, device) == ("statistics", 16):  # the statistics cache nothing
        assert (result.returncode, result.stdout) == (0, "statistics, on device 16\n" * 2)
    else:
        assert (result.returncode, result.stdout) == (1, "an error\n" * 2)
