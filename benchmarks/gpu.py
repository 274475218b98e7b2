"""Runs every part that needs a GPU, and writes one report: ``make gpu``.

The parts: the tests of the kernels and of graphs; the same tests under each tool of compute-sanitizer; the benchmark;
decoding steps of vLLM, capped and uncapped, with a real model. The report names a part whose program is not installed.
A failed part does not stop the others. Writes FOLDER/report.md, with the complete output of each part beside it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import torch

from axiscap import _C

ROOT = Path(__file__).resolve().parent.parent
TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
#: The lines of a part's output that the report quotes.
LINES = 60


def parts(folder: Path) -> dict[str, list[str] | str]:
    """The command of each part, or the reason why it cannot run."""
    python = sys.executable
    tests = [python, "-m", "pytest", "-rs", "tests/test_gpu.py"]
    found: dict[str, list[str] | str] = {"tests": [*tests, *map(str, sorted(Path("tests").glob("test_ops*.py")))]}
    sanitizer = shutil.which("compute-sanitizer")
    for tool in TOOLS:
        command = [str(sanitizer), "--tool", tool, "--error-exitcode", "1", *tests]
        found[tool] = command if sanitizer else "compute-sanitizer is not installed; it comes with the CUDA toolkit"
    results = ["--out", str(folder / "bench.json"), "--picture", str(folder / "bench.png")]
    found["benchmark"] = [python, "-m", "axiscap", "bench", "--device", "cuda", *results]
    steps = [python, "benchmarks/serving_steps.py"]
    found["engine steps"] = steps if find_spec("vllm") else "vLLM is not installed: pip install vllm"
    return found


def run(name: str, command: list[str] | str, folder: Path) -> tuple[bool, str]:
    """Whether the part succeeded, and its section of the report."""
    print(f"== {name}", flush=True)
    if isinstance(command, str):
        print(command)
        return True, f"## {name}: not run\n\n{command}\n"
    begun = time.monotonic()
    path = folder / f"{name.replace(' ', '-')}.txt"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "120"}
    with path.open("w") as file:
        running = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        assert running.stdout is not None
        for line in running.stdout:
            print(line, end="", flush=True)
            file.write(line)
    ended = "passed" if running.wait() == 0 else f"failed with status {running.returncode}"
    last = path.read_text().rstrip().splitlines()[-LINES:]
    shown = " ".join(command).replace(str(ROOT) + "/", "")
    text = "\n".join(["```", f"$ {shown}", *last, "```"])
    return running.returncode == 0, f"## {name}: {ended} in {time.monotonic() - begun:.0f} s\n\n{text}\n"


def main() -> None:
    folder = Path(sys.argv[1]).resolve()
    if not torch.cuda.is_available():
        sys.exit("there is no GPU that torch can use; `axiscap doctor` says what is here")
    versions = _C.accelerator_versions()
    if versions is None:
        sys.exit("this build has no CUDA kernels; `axiscap doctor` says why")
    folder.mkdir(parents=True, exist_ok=True)
    device = torch.cuda.get_device_properties(0)
    toolkit, driver = (f"{version // 1000}.{version % 1000 // 10}" for version in versions)
    head = (
        f"# {device.name}\n\n{device.multi_processor_count} processors, {device.total_memory / 2**30:.0f} GiB, compute"
        f" capability {device.major}.{device.minor}; torch {torch.__version__}; kernels with CUDA"
        f" {toolkit}, a driver for up to {driver}.\n"
    )
    done = [run(name, command, folder) for name, command in parts(folder).items()]
    (folder / "report.md").write_text("\n".join([head, *(section for _, section in done)]))
    print(f"wrote {folder / 'report.md'}")
    sys.exit(not all(well for well, _ in done))


if __name__ == "__main__":
    main()
