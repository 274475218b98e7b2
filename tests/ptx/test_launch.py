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
    done = subprocess.run([launcher, str(compiled), str(device)], check=True, capture_output=True, text=True)
    assert done.stdout.splitlines() == [launched] * 2
