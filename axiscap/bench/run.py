"""The whole benchmark."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress

import axiscap
from axiscap import _C, models
from axiscap.bench import decoding, kernels


def measure(
    progress: Progress, *, quick: bool = False, model: str | None = None, device: str = "cpu"
) -> dict[str, Any]:
    """Measures the kernels and, if a model is named, its decoding and its capped layers.

    Parameters
    ----------
    quick
        one size and dtype with few repetitions, for a first look.
    device
        ``cpu`` or ``cuda``, for the kernels; the model decodes on the CPU.
    """
    cases, norm_cases = _measure_kernels(progress, quick, device)
    decode, layers = None, []
    if model:
        loaded, name = models.load(model), Path(model).name
        decode = decoding.measure_decode(progress, name, *loaded, quick)
        layers = [decoding.measure_layer(progress, name, *loaded, sequences) for sequences in (1, 8)]
    return {"machine": _machine(device), "ops": cases, "norm": norm_cases, "decode": decode, "layers": layers}


def check_cuda() -> None:
    """Raises a RuntimeError that names what a benchmark on a GPU lacks."""
    if _C.accelerator() is None:
        raise RuntimeError("this build has no CUDA kernels: build it where nvcc is found (PATH or CUDA_HOME)")
    if not torch.cuda.is_available():
        reason = "torch is a CPU build" if torch.version.cuda is None else "there is no device or driver"
        raise RuntimeError(f"no GPU to measure: {reason}")


def _measure_kernels(progress: Progress, quick: bool, device: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    sizes, dtypes = ((4096,), ("bfloat16",)) if quick else (kernels.HIDDEN_SIZES, tuple(kernels.DTYPES))
    rows, shares = kernels.ROWS, kernels.SHARES
    caps = [(size, count, dtype, share) for dtype in dtypes for size in sizes for count in rows for share in shares]
    norms = [(size, count, "bfloat16", share) for size in sizes for count in rows for share in (0.0, 1.0)]
    task = progress.add_task("kernels", total=len(caps) + len(norms))
    results: tuple[list[dict[str, Any]], list[dict[str, Any]]] = ([], [])
    for measured, kind, grid in zip(results, (kernels.Case, kernels.NormCase), (caps, norms), strict=True):
        for entry in grid:
            case = kind(*entry, device)
            measured.append(kernels.measure_case(case, 5 if quick else (15 if case.large else 25)))
            progress.advance(task)
    return results


def _machine(device: str) -> dict[str, Any]:
    return {
        "device": device,
        "processor": _processor() if device == "cpu" else torch.cuda.get_device_name(),
        "isa": _C.isa(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "axiscap": axiscap.__version__,
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
