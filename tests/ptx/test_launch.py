"""How kernels are launched, by the launcher itself and a runtime that stands in for the GPU's."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY
from emulated import HELD, kernel_name, nvcc, wide_name


@pytest.fixture(scope="module")
def launcher(tmp_path_factory) -> Path:
    program = tmp_path_factory.mktemp("launch") / "launch"
    sources = [REPOSITORY / "csrc" / "cuda" / "launch.cu", REPOSITORY / "tests" / "ptx" / "runtime.cpp"]
    command = [nvcc(), "-std=c++17", "-arch=compute_80", "-cudart", "none", f"-I{REPOSITORY / 'csrc/include'}"]
    subprocess.run([*command, *map(str, sources), "-o", str(program)], check=True, capture_output=True, text=True)
    return program


@pytest.mark.slow
@pytest.mark.parametrize(
    ("compiled", "device", "launched"),
    [
        (80, 8, "in order"),
        (80, 9, "in order"),
        (89, 12, "in order"),
        (90, 9, "early"),
        (90, 12, "early"),
        (120, 12, "early"),
    ],
)
def test_a_kernel_starts_early_only_where_it_was_compiled_to_wait(launcher, compiled, device, launched):
    """The driver runs what was compiled for 8.0 on newer devices, too: there is no wait in it."""
    for line in launches(launcher, compiled, device, 4):
        assert line.startswith(f"{launched}, 1 x 1 blocks, 16384 bytes, 100 % shared, ")


def launches(launcher: Path, compiled: int, device: int, rows: int, size: int = 64, layers: int = 1) -> list[str]:
    """Of two calls: what is remembered is as right as what is asked."""
    command = [launcher, *map(str, (compiled, device, rows, size, layers))]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    assert lines[: len(lines) // 2] == lines[len(lines) // 2 :]
    return lines[: len(lines) // 2]


@pytest.mark.slow
@pytest.mark.parametrize(("rows", "blocks"), [(1, 1), (33, 2), (512, 16), (10_000, 16)])
def test_a_launch_has_twice_the_blocks_that_should_fit(launcher, rows, blocks):
    """Four processors of two blocks of 32 rows; with the memory for them asked for."""
    (line,) = launches(launcher, 90, 9, rows)
    assert line.startswith(f"early, {blocks} x 1 blocks, 16384 bytes, 100 % shared, ")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "layers", "wanted"),
    [
        (64, 1, [("16 x 1 blocks, 16384 bytes", 1)]),
        (64, 3, [("5 x 3 blocks, 16384 bytes", 3)]),
        (64, 50, [("1 x 48 blocks, 16384 bytes", 48), ("1 x 2 blocks, 16384 bytes", 48)]),
        (8192, 1, [("16 x 1 blocks, 65536 bytes", 1)]),
        (8200, 1, [("16 x 1 blocks, 36864 bytes", None)]),
        (24576, 2, [("8 x 1 blocks, 98304 bytes", None)] * 2),
    ],
)
def test_which_kernel_is_launched(launcher, size, layers, wanted):
    """One layer has parameters of its own; rows that are too wide for registers have a kernel of theirs."""
    lines = launches(launcher, 90, 9, 10_000, size, layers)
    for line, (shape, room) in zip(lines, wanted, strict=True):
        name = wide_name(torch.float32, "cap") if room is None else kernel_name(torch.float32, "cap", False, True, room)
        assert line == f"early, {shape}, 100 % shared, {name}"
    assert HELD[torch.float32] == 8192


@pytest.mark.slow
def test_a_row_that_no_kernel_takes_is_not_launched(launcher):
    command = [launcher, *map(str, (90, 9, 1, 24577, 1))]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "H must be at most 24576 on a GPU\n")
