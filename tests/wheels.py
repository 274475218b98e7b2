"""One wheel for each Python, repaired by auditwheel, and the ops' tests with it and several versions of torch.

``make wheels`` runs all pairs and writes docs/wheels.md; ``python tests/wheels.py 3.11 2.10.0`` runs one. Rows of other
pairs and other machines stay in the page. Each pair has an environment of its own, made by uv with the torch that PyPI
has; one with CUDA can be imported without a GPU. Two hours; finished environments are kept.
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
#: Of the Pythons but the first.
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
    called = [str(part) for part in command]
    ended = subprocess.run(called, cwd=REPOSITORY, env=os.environ | environment, capture_output=True, text=True)
    if ended.returncode:
        raise SystemExit(f"{' '.join(called)}\n{ended.stdout}{ended.stderr}")
    return ended.stdout


def environment(name: str, python: str, *packages: str) -> Path:
    """The interpreter of an environment with these packages."""
    folder = FOLDER / name
    if not (folder / "made").exists():
        run("uv", "venv", "--quiet", "--clear", "--seed", "--python", python, folder)
        run("uv", "pip", "install", "--quiet", "--python", folder / "bin" / "python", *packages)
        (folder / "made").touch()
    return folder / "bin" / "python"


def wheel(python: str) -> tuple[Path, str]:
    """A Python's wheel as auditwheel leaves it, and what auditwheel says that it runs on."""
    tools = (f"torch=={BUILT_WITH}", "setuptools>=77", "wheel", "ninja", "cmake")
    builder, dist = environment(f"build-{python}", python, *tools), FOLDER / f"dist-{python}"
    run("rm", "-rf", dist)
    build = ("-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", dist / "raw", ".")
    run(builder, *build, PATH=f"{builder.parent}:{os.environ['PATH']}")
    (raw,) = (dist / "raw").glob("*.whl")
    # torch brings the library of its C interface.
    run(sys.executable, "-m", "auditwheel", "repair", "--exclude", "libtorch_cpu.so", "--wheel-dir", dist, raw)
    (repaired,) = dist.glob("*.whl")
    return repaired, repaired.stem.split("-")[-1]


def tested(python: str, torch: str, package: Path) -> str:
    """The summary of the ops' tests; those of signatures as one version of pybind11 writes them are left out."""
    needed = (f"torch=={torch}", "numpy", "safetensors", "typer", "rich", "pytest", "hypothesis")
    interpreter = environment(f"{python}-torch-{torch}", python, *needed)
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


def add(row: str) -> None:
    """Puts a row into the page, for that of the same Python, platform and torch."""
    rows = {}
    for line in [*re.findall(r"^\| \d.*", DOCUMENT.read_text(), re.MULTILINE), row]:
        python, platform, _, torch, _ = (cell.strip() for cell in line.strip("|").split("|"))
        rows[platform.endswith("aarch64"), python, torch] = line
    DOCUMENT.write_text(PAGE.format(rows="\n".join(line for _, line in sorted(rows.items()))))


def main(asked: list[str]) -> None:
    for python in asked[:1] or PYTHONS:
        package, platform = wheel(python)
        size = package.stat().st_size / 1e6
        for torch in asked[1:] or (TORCHES if python == PYTHONS[0] else FEWER):
            row = f"| {python} | {platform} | {size:.1f} | {torch} | {tested(python, torch, package)} |"
            print(row, flush=True)
            add(row)


if __name__ == "__main__":
    main(sys.argv[1:])
