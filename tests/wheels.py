"""Builds a wheel for each Python, and runs the ops' tests with it and several versions of torch.

``make wheels`` runs all pairs and writes docs/wheels.md; ``python tests/wheels.py 3.11 2.10.0`` runs one. The page
keeps the rows of other pairs and machines. uv makes an environment for each pair, with torch from PyPI, whose builds
for CUDA import without a GPU. All pairs take two hours; finished environments are kept.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
DOCUMENT = REPOSITORY / "docs" / "wheels.md"
FOLDER = REPOSITORY / "build" / "wheels"
PYTHONS = ("3.11", "3.12", "3.13", "3.14")
TORCHES = ("2.10.0", "2.11.0", "2.12.1", "2.13.0", "2.14.1", "2.15.0")
BUILT_WITH = TORCHES[0]
#: The versions of torch for every Python but the first.
FEWER = ("2.10.0", "2.13.0", "2.15.0")

PAGE = """# Wheels and torch versions

The extension uses only torch's stable C interface, as of torch 2.10. A wheel belongs to one version of Python and works
with every torch from 2.10 on. `make wheels` builds a wheel for each Python, repairs it with auditwheel, and runs the
tests of the ops with it in a fresh environment for each torch (from PyPI; builds with CUDA run on a machine without a
GPU):

| Python | wheel | MB | torch | tests of the ops |
|---|---|---|---|---|
{rows}

The platform tag depends on the C library of the build machine; a release is built in PyPA's manylinux image
(`.github/workflows/release.yml`). The x86-64 wheels of this table have code for two generations of GPUs. The aarch64
wheel has none; it was built and tested in an emulated Debian 12, with `python tests/wheels.py 3.11 2.10.0`.
[How it works](design.md) has the size of a release, with code for all GPUs.
"""


def run(*command: object, **environment: str) -> str:
    arguments = [str(part) for part in command]
    result = subprocess.run(arguments, cwd=REPOSITORY, env=os.environ | environment, capture_output=True, text=True)
    if result.returncode:
        raise SystemExit(f"{' '.join(arguments)}\n{result.stdout}{result.stderr}")
    return result.stdout


def make_environment(name: str, python: str, *packages: str) -> Path:
    """Makes an environment with these packages, unless it exists; returns its interpreter."""
    folder = FOLDER / name
    if not (folder / "made").exists():
        run("uv", "venv", "--quiet", "--clear", "--seed", "--python", python, folder)
        run("uv", "pip", "install", "--quiet", "--python", folder / "bin" / "python", *packages)
        (folder / "made").touch()
    return folder / "bin" / "python"


def build_wheel(python: str) -> tuple[Path, str]:
    """Builds a Python's wheel and repairs it by auditwheel; returns its path and its platform tag."""
    tools = (f"torch=={BUILT_WITH}", "setuptools>=77", "wheel", "ninja", "cmake")
    builder, dist = make_environment(f"build-{python}", python, *tools), FOLDER / f"dist-{python}"
    run("rm", "-rf", dist)
    build = ("-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", dist / "raw", ".")
    run(builder, *build, PATH=f"{builder.parent}:{os.environ['PATH']}")
    (raw,) = (dist / "raw").glob("*.whl")
    # torch has the library of its C interface.
    run(sys.executable, "-m", "auditwheel", "repair", "--exclude", "libtorch_cpu.so", "--wheel-dir", dist, raw)
    (repaired,) = dist.glob("*.whl")
    return repaired, repaired.stem.split("-")[-1]


def run_tests(python: str, torch: str, package: Path) -> str:
    """Runs the ops' tests with a wheel and a version of torch; returns their summary."""
    packages = (f"torch=={torch}", "numpy", "safetensors", "typer", "rich", "pytest", "hypothesis")
    interpreter = make_environment(f"{python}-torch-{torch}", python, *packages)
    run("uv", "pip", "install", "--quiet", "--python", interpreter, "--no-deps", "--reinstall", package)
    arguments = (
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        "-q",
        *map(str, sorted((REPOSITORY / "tests").glob("test_ops*.py"))),
    )
    output = run(interpreter, *arguments, PYTHONSAFEPATH="1", OMP_NUM_THREADS="1")
    return re.sub(r"( in .*|=)", "", output.strip().splitlines()[-1]).strip()


def add_row(row: str) -> None:
    """Puts a row into the page, where it replaces the row of the same Python, platform and torch."""
    rows = {}
    for line in [*re.findall(r"^\| \d.*", DOCUMENT.read_text(), re.MULTILINE), row]:
        python, platform, _, torch, _ = (cell.strip() for cell in line.strip("|").split("|"))
        rows[platform.endswith("aarch64"), python, torch] = line
    DOCUMENT.write_text(PAGE.format(rows="\n".join(line for _, line in sorted(rows.items()))))


def main(arguments: list[str]) -> None:
    for python in arguments[:1] or PYTHONS:
        package, platform = build_wheel(python)
        size = package.stat().st_size / 1e6
        for torch in arguments[1:] or (TORCHES if python == PYTHONS[0] else FEWER):
            row = f"| {python} | {platform} | {size:.1f} | {torch} | {run_tests(python, torch, package)} |"
            print(row, flush=True)
            add_row(row)


if __name__ == "__main__":
    main(sys.argv[1:])
