"""What `axiscap doctor` looks at."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass

import torch

import axiscap
from axiscap import _C, models


@dataclass(frozen=True)
class Check:
    """Something looked at, what was found, and advice where something is missing (empty: nothing to do)."""

    what: str
    found: str
    advice: str = ""


def run() -> Iterator[Check]:
    """Looks at this machine and this installation, without changing anything."""
    yield Check("axiscap", axiscap.__version__)
    yield Check("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    yield Check("torch", f"{torch.__version__}, {torch.get_num_threads()} threads")
    asked = os.environ.get("AXISCAP_ISA")
    differs = asked is not None and asked != _C.isa()
    yield Check("CPU kernels", _C.isa(), f"AXISCAP_ISA={asked} is not one of this machine's" if differs else "")
    yield _cuda()
    for package, extra, why in (
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
            yield Check(package, "not installed", f"for {why}: pip install 'axiscap[{extra}]'")
    try:
        yield Check("default model", str(models.default_model_file()))
    except OSError as error:
        yield Check("default model", "not installed", str(error))


def _cuda() -> Check:
    if torch.cuda.is_available():
        found = torch.cuda.get_device_name()
    else:
        found = "torch is a CPU build" if torch.version.cuda is None else "no device or driver"
    versions = _C.accelerator_versions()
    if versions is None:
        advice = "build where nvcc is found (PATH or CUDA_HOME)"
        return Check("CUDA", f"{found}; no kernels in this build", advice)
    return Check("CUDA", f"{found}; kernels built in, with CUDA {cuda_version(versions[0])}", cuda_advice(*versions))


def cuda_version(number: int) -> str:
    """13020 is 13.2."""
    return f"{number // 1000}.{number % 1000 // 10}"


def cuda_advice(runtime: int, driver: int, torch_cuda: str | None = torch.version.cuda) -> str:
    """What to do where a driver cannot run these kernels; "" where it can, or where there is none.

    A driver runs what was built with its own major version of CUDA or an older one.

    Parameters
    ----------
    runtime
        of the kernels, such as 13000.
    driver
        the newest CUDA that the driver can run, 0 for no driver.
    torch_cuda
        torch's own, such as "12.6".
    """
    if not driver or driver // 1000 >= runtime // 1000:
        return ""
    ours = f"the driver runs CUDA {cuda_version(driver)}, and these kernels need {runtime // 1000}.0 or newer"
    theirs = f", unlike torch's, of CUDA {torch_cuda}" if torch_cuda else ""
    return f"{ours}{theirs}: update the driver, or build with a CUDA toolkit of {driver // 1000}.x"
