"""``axiscap doctor``: the state of the installation."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from rich.markup import escape
from rich.table import Table

import axiscap
from axiscap import _C, models
from axiscap.cli.console import console


def doctor() -> None:
    """Check the installation: the machine, torch, the kernels and the extras, with a fix for each problem."""
    table = Table("what", "found", "what to do")
    for check in checks():
        cells = (escape(text) for text in (check.what, check.found, check.advice))
        table.add_row(*cells, style="yellow" if check.advice else None)
    console.print(table)


@dataclass(frozen=True)
class Check:
    """A part of the installation, its state, and advice if something is missing, else an empty text."""

    what: str
    found: str
    advice: str = ""


def checks() -> Iterator[Check]:
    """Checks this machine and this installation. Changes nothing."""
    yield Check("axiscap", axiscap.__version__)
    yield Check("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    yield Check("torch", f"{torch.__version__}, {torch.get_num_threads()} threads")
    requested = os.environ.get("AXISCAP_ISA")
    differs = requested is not None and requested != _C.isa()
    yield Check("CPU kernels", _C.isa(), f"AXISCAP_ISA={requested} is not one of this machine's" if differs else "")
    yield _cuda()
    for package, extra, purpose in (
        ("safetensors", "", ""),
        ("transformers", "calibrate", "models"),
        ("gguf", "calibrate", "the default model"),
        ("datasketches", "calibrate", "floors"),
        ("scikit-learn", "calibrate", "sweeps"),
        ("ray", "ray", "calibration by several workers"),
        ("matplotlib", "report", "pictures"),
    ):
        try:
            yield Check(package, importlib.metadata.version(package))
        except importlib.metadata.PackageNotFoundError:
            yield Check(package, "not installed", f"for {purpose}: pip install 'axiscap[{extra}]'")
    try:
        yield Check("default model", str(models.default_model_file()))
    except OSError as error:
        yield Check("default model", "not installed", str(error))


def _cuda() -> Check:
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    else:
        device = "torch is a CPU build" if torch.version.cuda is None else "no device or driver"
    versions = _C.accelerator_versions()
    if versions is None:
        advice = "build where nvcc is found (PATH or CUDA_HOME)"
        return Check("CUDA", f"{device}; no kernels in this build", advice)
    return Check("CUDA", f"{device}; kernels built in, with CUDA {cuda_version(versions[0])}", cuda_advice(*versions))


def cuda_version(number: int) -> str:
    """The text of a version number: 13020 is 13.2."""
    return f"{number // 1000}.{number % 1000 // 10}"


def cuda_advice(runtime: int, driver: int, torch_cuda: str | None = torch.version.cuda) -> str:
    """The advice for a driver that cannot run these kernels. Empty if it can, or if there is no driver.

    A driver runs binaries of its own major version of CUDA and of older ones.

    Parameters
    ----------
    runtime
        the version of CUDA that built the kernels, such as 13000.
    driver
        the newest version that the driver can run; 0 without a driver.
    torch_cuda
        the version of torch, such as "12.6".
    """
    if not driver or driver // 1000 >= runtime // 1000:
        return ""
    ours = f"the driver runs CUDA {cuda_version(driver)}, and these kernels need {runtime // 1000}.0 or newer"
    theirs = f", unlike torch's, of CUDA {torch_cuda}" if torch_cuda else ""
    return f"{ours}{theirs}: update the driver, or build with a CUDA toolkit of {driver // 1000}.x"
