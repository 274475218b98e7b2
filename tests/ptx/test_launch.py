"""How kernels are launched, by the launcher itself and a runtime that stands in for the GPU's."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from conftest import REPOSITORY
from emulated import nvcc


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
        assert line == f"{launched}, 1 blocks, 100 % shared"


def launches(launcher: Path, compiled: int, device: int, rows: int) -> list[str]:
    """Of two calls: what is remembered is as right as what is asked."""
    command = [launcher, str(compiled), str(device), str(rows)]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    assert len(lines) == 2
    return lines


@pytest.mark.slow
@pytest.mark.parametrize(("rows", "blocks"), [(1, 1), (33, 2), (512, 16), (10_000, 16)])
def test_a_launch_has_twice_the_blocks_that_should_fit(launcher, rows, blocks):
    """Four processors of two blocks of 32 rows; with the memory for them asked for."""
    for line in launches(launcher, 90, 9, rows):
        assert line == f"early, {blocks} blocks, 100 % shared"
