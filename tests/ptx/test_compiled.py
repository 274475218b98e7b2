"""The machine code of the kernels for every architecture: registers, spills, width of accesses."""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import limits
import pytest
from conftest import REPOSITORY
from emulated import nvcc

#: The Python packages of the disassemblers install their programs here.
TOOLS = Path(sysconfig.get_paths()["purelib"]) / "nvidia" / "cu13" / "bin"


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> dict[int, tuple[Path, str]]:
    """For each architecture the file of machine code, and the messages of ptxas."""
    folder, compiler = tmp_path_factory.mktemp("cubins"), nvcc()

    def build(architecture: int) -> tuple[Path, str]:
        out = folder / f"sm_{architecture}.cubin"
        command = [compiler, "-std=c++17", "-O3", "-cubin", f"-arch=sm_{architecture}", "-Xptxas", "-v"]
        source = REPOSITORY / "csrc" / "launchers" / "cuda.cu"
        result = subprocess.run(
            [*command, f"-I{REPOSITORY / 'csrc'}", str(source), "-o", str(out)],
            check=True, capture_output=True, text=True,
        )  # fmt: skip
        return out, result.stderr

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(limits.ARCHITECTURES, pool.map(build, limits.ARCHITECTURES), strict=True))


@functools.cache
def disassemble(cubin: Path) -> dict[str, list[str]]:
    """The opcodes of each kernel."""
    if not (TOOLS / "nvdisasm").exists():
        pytest.skip("reading machine code needs nvdisasm: pip install nvidia-cuda-nvdisasm")
    text = subprocess.run([TOOLS / "nvdisasm", "-c", cubin], check=True, capture_output=True, text=True).stdout
    kernels: dict[str, list[str]] = {}
    for section in re.split(r"^\s*\.section\s+\.text\.", text, flags=re.M)[1:]:
        name = re.split(r"[,\s]", section, maxsplit=1)[0].strip('"')
        kernels[name] = re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?\w+\s+)?([A-Z0-9_.]+)", section, re.M)
    return kernels


@pytest.mark.slow
@pytest.mark.parametrize("architecture", limits.ARCHITECTURES)
def test_kernels_do_not_spill_and_fit_the_registers(compiled, architecture):
    entries = re.findall(
        r"Compiling entry function '(\S+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers(?:[^\n]*?(\d+) bytes smem)?",
        compiled[architecture][1],
        re.S,
    )
    assert len(entries) == limits.KERNELS
    for name, stack, stores, loads, registers, shared in entries:
        assert int(stack) <= limits.STACK_BYTES, name
        assert int(stores) + int(loads) <= limits.SPILL_BYTES, name
        assert int(registers) <= limits.REGISTERS, name
        assert int(shared or 0) <= limits.SHARED_BYTES, name


@pytest.mark.parametrize("architecture", [80, 90, 100])
def test_accesses_are_wide_and_none_is_local(compiled, architecture):
    kernels = disassemble(compiled[architecture][0])
    assert len(kernels) == limits.KERNELS
    for name, code in kernels.items():
        assert not [op for op in code if op.startswith(("LDL", "STL"))], name
        if "accumulate_rows" in name:
            continue
        loads = [op for op in code if op.startswith(("LDG.", "LDGSTS"))]  # LDGSTS loads to shared memory
        stores = [op for op in code if op.startswith("STG")]
        wide_loads = [op for op in loads if ".128" in op]
        wide_stores = [op for op in stores if ".128" in op]
        # Vectors of rows and banks are 16 bytes. Slots, floors, targets, limits, projections, flags and scales are not.
        assert wide_loads, name
        assert wide_stores, name
        if "cap_register_rows" in name:
            assert not [op for op in loads + stores if ".U16" in op], name
            assert len(loads) - len(wide_loads) <= 8, (name, loads)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [90, 120])
def test_kernels_pass_the_gate_of_cuxray(compiled, architecture):
    cuxray = Path(sysconfig.get_paths()["scripts"]) / "cuxray"
    if not cuxray.exists() or not TOOLS.exists():
        pytest.skip("the gate needs cuxray: pip install cuxray nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm")
    path = f"{TOOLS}:{Path(nvcc()).parent}:{os.environ['PATH']}"
    gate = subprocess.run(
        [cuxray, "gate", compiled[architecture][0], limits.GATE, "--no-cache"],
        env={**os.environ, "PATH": path}, capture_output=True, text=True,
    )  # fmt: skip
    assert gate.returncode == 0, gate.stdout[-2000:] + gate.stderr[-2000:]
    assert "gate passed" in gate.stdout
