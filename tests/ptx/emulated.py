"""The ops, on the interpreter: tensors become buffers, a call becomes a launch, as csrc/launchers/cuda.cu makes it."""

from __future__ import annotations

import functools
import os
import shutil
import struct
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REPOSITORY
from interpreter import Kernel, Launch, Memory, parse

from axiscap import _C

#: Each op, and the one of the kernels that runs it.
OPS = {"cap": 0, "cap_residual": 1, "norm": 2, "norm_fp8": 2}
TYPES = {torch.float32: ("float32", "f", 0), torch.bfloat16: ("bfloat16", "13__nv_bfloat16", 1),
         torch.float16: ("float16", "6__half", 2)}  # fmt: skip
MAX_LAYERS = 48
#: What a launch copies for a layer.
LAYER_BYTES = 80
#: The widest row that a block's registers hold: four vectors for each of 512 threads.
HELD = {dtype: 4 * 512 * (16 // dtype.itemsize) for dtype in TYPES}
#: Rows that lie so many bytes apart are mapped one by one.
FAR = 1 << 30
#: From here on launch.cu starts a kernel early (AXISCAP_WAITING_ARCHITECTURE).
EARLY = 90


def nvcc() -> str:
    """The CUDA compiler; skips the test where there is none."""
    found = shutil.which("nvcc") or os.path.join(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin", "nvcc")
    if not os.path.exists(found):
        pytest.skip("the kernels' PTX needs nvcc, which is not here")
    return found


@functools.cache
def ptx_text(architecture: int = 90) -> str:
    """The PTX of csrc/launchers/cuda.cu, compiled with the build's own flags."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "kernels.ptx"
        source = REPOSITORY / "csrc" / "launchers" / "cuda.cu"
        command = [nvcc(), "-std=c++17", "-O3", "-ptx", f"-arch=compute_{architecture}"]
        subprocess.run([*command, f"-I{REPOSITORY / 'csrc'}", str(source), "-o", str(out)], check=True)
        return out.read_text()


@functools.cache
def kernels(architecture: int = 90) -> dict[str, Kernel]:
    return parse(ptx_text(architecture))


def register_kernel(dtype: torch.dtype, op: str, any_directions: bool, layers: int = 1) -> str:
    """Of the kernel for aligned rows in registers: of one direction or of any number, for one layer or for several."""
    arguments = f"{TYPES[dtype][1]}LNS0_2OpE{OPS[op]}ELb{int(any_directions)}ELi{1 if layers == 1 else MAX_LAYERS}"
    return f"_ZN7axiscap4cuda17cap_register_rowsI{arguments}EEEvNS0_4CallIXT2_EEE"


def shared_kernel(dtype: torch.dtype, op: str, layers: int = 1) -> str:
    """Of the kernel for rows in shared memory: those that are wide or not aligned."""
    arguments = f"{TYPES[dtype][1]}LNS0_2OpE{OPS[op]}ELi{1 if layers == 1 else MAX_LAYERS}"
    return f"_ZN7axiscap4cuda15cap_shared_rowsI{arguments}EEEvNS0_4CallIXT1_EEE"


def kernel_name(dtype: torch.dtype, op: str, many: bool, aligned: bool, layers: int = 1) -> str:
    """Of the kernel for rows that are not wide."""
    if not aligned:
        return shared_kernel(dtype, op, layers)
    return register_kernel(dtype, op, many or layers > 1, layers)


def raw(tensor: torch.Tensor) -> np.ndarray:
    """The tensor's storage as bytes, shared with it."""
    flat = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
    return flat.view(torch.uint8).numpy()


class Device:
    """What a call needs and leaves: memory, and the launch with its counts."""

    def __init__(self, source: dict[str, Kernel] | None = None, *, resident: int = 3, seed: int | None = None) -> None:
        self.source, self.resident, self.seed = source, resident, seed
        self.memory = Memory()
        self.launch: Launch | None = None
        self.name = ""

    def call(
        self,
        hiddens,
        axes,
        floors,
        slots=None,
        *,
        residual=None,
        weight=None,
        eps=0.0,
        weight_bias=0.0,
        quantized=None,
        scale=None,
        scales=None,
        out=None,
        projections=None,
        fired=None,
        targets=None,
        lifts=None,
        norm_limits=None,
    ) -> None:
        """hiddens: L rows (rows, H); axes and lifts (L, S, K, H), floors and targets (L, S, K), norm_limits (L, S),
        projections (L, rows, K). All but hiddens and axes may be None.

        In place (in residual, where given), unless out is a tensor; out False: only projections. The norm goes to
        hidden, or to quantized.
        """
        first = hiddens[0]
        rows, size = first.shape
        name, _, number = TYPES[first.dtype]
        layers, num_slots, directions = axes.shape[:3]
        threads, block, dynamic, grid = _C.plan(name, size, rows, max(1, self.resident // layers))
        at = {}

        def place(key: str, tensor: torch.Tensor | None, written: bool = True) -> int:
            if tensor is None:
                return 0
            if tensor.dim() == 2 and tensor.stride(0) * tensor.element_size() >= FAR:
                apart = tensor.stride(0) * tensor.element_size()
                begin = at[key] = self.memory.add(key, tensor[0].view(torch.uint8).numpy(), written=written)
                for row in range(1, len(tensor)):
                    self.memory.add(key, tensor[row].view(torch.uint8).numpy(), written=written, at=begin + row * apart)
                return begin
            storage = raw(tensor)
            if not len(storage):
                return 0
            # A tensor's storage is aligned for any vector; where in it the tensor begins is what counts.
            at[key] = self.memory.add(key, storage, written=written)
            return at[key] + tensor.storage_offset() * tensor.element_size()

        streams = [place(f"hidden{i}", hidden) for i, hidden in enumerate(hiddens)]
        residual_at, weight_at = place("residual", residual), place("weight", weight)
        axes_at, floors_at, slots_at = place("axes", axes), place("floors", floors), place("slots", slots)
        targets_at, lifts_at = place("targets", targets), place("lifts", lifts)
        limits_at = place("norm_limits", norm_limits)
        projections_at = place("projections", projections, written=False)
        fired_at = place("fired", fired, written=False)
        if out is None:
            outs = [residual_at] * layers if residual is not None else streams
            out_stride = (residual if residual is not None else first).stride(0)
        elif out is False:
            outs, out_stride = [0] * layers, 0
        else:
            outs, out_stride = [place("out", out, written=False)], out.stride(0)
        residual_stride = residual.stride(0) if residual is not None else 0

        unit = first.element_size()
        everything = [*streams, *outs, residual_at, weight_at, axes_at, lifts_at]
        strides = [hidden.stride(0) for hidden in hiddens] + [out_stride, residual_stride]
        aligned = size % (16 // unit) == 0 and all(address % 16 == 0 for address in everything)
        aligned = aligned and all(stride * unit % 16 == 0 for stride in strides)
        normed_at, normed_stride = (streams[0], first.stride(0)) if weight is not None else (0, 0)
        if quantized is not None:
            normed_at, normed_stride = place("quantized", quantized, written=False), quantized.stride(0)
            aligned = aligned and normed_at % (16 // unit) == normed_stride % (16 // unit) == 0
        scale_at, scales_at = place("scale", scale), place("scales", scales, written=False)
        op = "norm_fp8" if quantized is not None else "norm"
        op = op if weight is not None else "cap_residual" if residual is not None else "cap"
        wide = size > HELD[first.dtype]
        self.name = (
            shared_kernel(first.dtype, op) if wide else kernel_name(first.dtype, op, directions > 1, aligned, layers)
        )
        if rows == 0:
            return

        shared = struct.pack(
            "<3Q3q2q6Q2q4Qqff2Qi4x",
            *(streams[0], residual_at, outs[0]),
            *(first.stride(0), residual_stride, out_stride),
            *(rows, size),
            *(axes_at, lifts_at, floors_at, targets_at, limits_at, slots_at),
            *(num_slots, directions),
            *(projections_at, fired_at, weight_at, normed_at),
            *(normed_stride, eps, weight_bias, scale_at, scales_at, number),
        )
        parameters = shared + struct.pack("<if?7x", threads, 1 / size, aligned)
        for i in range(layers):
            bank = num_slots * directions
            parameters += struct.pack(
                "<2Q2q6Q",
                *(streams[i], outs[i], hiddens[i].stride(0), out_stride),
                axes_at + i * bank * size * 4,
                lifts_at + i * bank * size * 4 if lifts is not None else 0,
                floors_at + i * bank * 4 if floors is not None else 0,
                targets_at + i * bank * 4 if targets is not None else 0,
                limits_at + i * num_slots * 4 if norm_limits is not None else 0,
                projections_at + i * rows * directions * 4 if projections is not None else 0,
            )
        parameters += bytes(LAYER_BYTES * (MAX_LAYERS - layers) if layers > 1 else 0)
        kernel = (self.source or kernels())[self.name]
        self.launch = Launch(
            kernel, self.memory, parameters, (grid, layers), block, dynamic, kernel.architecture >= EARLY
        )
        self.launch.run(self.seed)
