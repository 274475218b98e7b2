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
    built = _C.accelerator() is not None
    kernels = "kernels built in" if built else "no kernels in this build"
    advice = "" if built else "build where nvcc is found (PATH or CUDA_HOME)"
    if torch.cuda.is_available():
        return Check("CUDA", f"{torch.cuda.get_device_name()}, {kernels}", advice)
    why = "torch is a CPU build" if torch.version.cuda is None else "no device or driver"
    return Check("CUDA", f"{why}; {kernels}", advice)
