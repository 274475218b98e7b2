"""Runs the ops on the PTX interpreter: maps tensors to memory and launches kernels as csrc/launchers/cuda.cu does."""

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
from interpreter import Launch
from ptx_memory import Memory
from ptx_module import Kernel, parse

from axiscap import _C

#: Each op, and its value of the enumeration Op in csrc/kernels/cuda/rows.cuh.
OPS = {"cap": 0, "cap_residual": 1, "norm": 2, "norm_fp8": 2}
#: For each dtype its name in the plan, its mangled name, and its value of the enumeration DType.
TYPES = {torch.float32: ("float32", "f", 0), torch.bfloat16: ("bfloat16", "13__nv_bfloat16", 1),
         torch.float16: ("float16", "6__half", 2)}  # fmt: skip
#: kMaxLayers in csrc/kernels/cuda/rows.cuh.
MAX_LAYERS = 48
#: The size of Layer in csrc/kernels/cuda/rows.cuh: a launch copies so many bytes for each layer.
LAYER_BYTES = 80
#: The widest row that is not wide (is_wide in csrc/kernels/cuda/plan.h): four vectors for each of 512 threads.
MAX_REGISTER_SIZE = {dtype: 4 * 512 * (16 // dtype.itemsize) for dtype in TYPES}
#: Rows with a stride of at least so many bytes are mapped one by one.
FAR = 1 << 30
#: The first architecture whose kernels start early (AXISCAP_WAITING_ARCHITECTURE).
EARLY = 90


def nvcc() -> str:
    """The path of the CUDA compiler. Skips the test if the compiler is not installed."""
    path = shutil.which("nvcc") or os.path.join(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin", "nvcc")
    if not os.path.exists(path):
        pytest.skip("the kernels' PTX needs nvcc, which is not here")
    return path


@functools.cache
def ptx_text(architecture: int = 90) -> str:
    """The PTX of csrc/launchers/cuda.cu, compiled with the flags of the build."""
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
    """The name of the kernel for aligned rows that are not wide."""
    arguments = f"{TYPES[dtype][1]}LNS0_2OpE{OPS[op]}ELb{int(any_directions)}ELi{1 if layers == 1 else MAX_LAYERS}"
    return f"_ZN7axiscap4cuda17cap_register_rowsI{arguments}EEEvNS0_4CallIXT2_EEE"


def shared_kernel(dtype: torch.dtype, op: str, layers: int = 1) -> str:
    """The name of the kernel for rows in shared memory: wide rows and rows that are not aligned."""
    arguments = f"{TYPES[dtype][1]}LNS0_2OpE{OPS[op]}ELi{1 if layers == 1 else MAX_LAYERS}"
    return f"_ZN7axiscap4cuda15cap_shared_rowsI{arguments}EEEvNS0_4CallIXT1_EEE"


def kernel_name(dtype: torch.dtype, op: str, any_directions: bool, aligned: bool, layers: int = 1) -> str:
    """The name of the kernel for rows that are not wide, aligned or not."""
    if not aligned:
        return shared_kernel(dtype, op, layers)
    return register_kernel(dtype, op, any_directions or layers > 1, layers)


def storage_bytes(tensor: torch.Tensor) -> np.ndarray:
    """The bytes of the tensor's storage, without a copy."""
    flat = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
    return flat.view(torch.uint8).numpy()


class Device:
    """Runs one call, and keeps its memory and its launch with the counts.

    source
        the kernels; by default those of sm_90.
    resident
        blocks that the device holds at once.
    seed
        of a random order of blocks and warps.
    """

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
        """hiddens: L tensors (rows, H); axes and lifts (L, S, K, H), floors and targets (L, S, K), norm_limits (L, S),
        projections (L, rows, K). All but hiddens and axes may be None.

        The cap is in place: in residual if it is not None, else in hiddens. With a tensor out it is written there, with
        out=False the call computes projections alone. The norm is written to quantized if it is not None, else to
        hiddens.
        """
        bank = {"axes": axes, "lifts": lifts, "floors": floors, "targets": targets, "norm_limits": norm_limits}
        inputs = {"residual": residual, "weight": weight, **bank, "slots": slots, "scale": scale}
        outputs = {"projections": projections, "fired": fired, "quantized": quantized, "scales": scales}
        streams = [self._map(f"hidden{i}", hidden) for i, hidden in enumerate(hiddens)]
        addresses = {name: self._map(name, tensor) for name, tensor in inputs.items()}
        addresses |= {name: self._map(name, tensor, written=False) for name, tensor in outputs.items()}
        outs, out_stride = self._outs(hiddens, streams, residual, addresses["residual"], out)

        first = hiddens[0]
        rows, size = first.shape
        normed, normed_stride = (streams[0], first.stride(0)) if weight is not None else (0, 0)
        residual_stride = 0 if residual is None else residual.stride(0)
        strides = [hidden.stride(0) for hidden in hiddens] + [out_stride, residual_stride]
        vectors = [*streams, *outs, *(addresses[name] for name in ("residual", "weight", "axes", "lifts"))]
        aligned = _is_aligned(first.dtype, size, vectors, strides)
        if quantized is not None:
            normed, normed_stride, vec = addresses["quantized"], quantized.stride(0), 16 // first.element_size()
            aligned = aligned and normed % vec == normed_stride % vec == 0

        norm = "norm_fp8" if quantized is not None else "norm"
        op = norm if weight is not None else "cap_residual" if residual is not None else "cap"
        layers, num_slots, directions = axes.shape[:3]
        if size > MAX_REGISTER_SIZE[first.dtype]:
            self.name = shared_kernel(first.dtype, op)
        else:
            self.name = kernel_name(first.dtype, op, directions > 1, aligned, layers)
        if rows == 0:
            return

        plan = _C.plan(TYPES[first.dtype][0], size, rows, max(1, self.resident // layers))
        shared = struct.pack(
            "<3Q3q2q6Q2q4Qqff2Qi4xif?7x",
            *(streams[0], addresses["residual"], outs[0]),
            *(first.stride(0), residual_stride, out_stride),
            *(rows, size),
            *(addresses[name] for name in ("axes", "lifts", "floors", "targets", "norm_limits", "slots")),
            *(num_slots, directions),
            *(*(addresses[name] for name in ("projections", "fired", "weight")), normed),
            *(normed_stride, eps, weight_bias, addresses["scale"], addresses["scales"], TYPES[first.dtype][2]),
            *(plan[0], 1 / size, aligned),
        )
        strides_of = {name: tensor[0].nbytes for name, tensor in bank.items() if tensor is not None}
        strides_of["projections"] = rows * directions * 4
        parameters = shared + b"".join(
            struct.pack(
                "<2Q2q6Q",
                *(streams[i], outs[i], hiddens[i].stride(0), out_stride),
                *(addresses[name] and addresses[name] + i * strides_of[name] for name in (*bank, "projections")),
            )
            for i in range(layers)
        )
        self._run(parameters, plan, layers)

    def _run(self, parameters: bytes, plan: tuple[int, int, int, int], layers: int) -> None:
        _, block, dynamic, grid = plan
        parameters += bytes(LAYER_BYTES * (MAX_LAYERS - layers) if layers > 1 else 0)
        kernel = (self.source or kernels())[self.name]
        early = kernel.architecture >= EARLY
        self.launch = Launch(kernel, self.memory, parameters, (grid, layers), block, dynamic, early)
        self.launch.run(self.seed)

    def _map(self, name: str, tensor: torch.Tensor | None, written: bool = True) -> int:
        """Maps a tensor to memory and returns its address; 0 if it is None or has no elements."""
        if tensor is None:
            return 0
        if tensor.dim() == 2 and tensor.stride(0) * tensor.element_size() >= FAR:
            stride = tensor.stride(0) * tensor.element_size()
            begin = self.memory.add(name, tensor[0].view(torch.uint8).numpy(), written=written)
            for i in range(1, len(tensor)):
                row = tensor[i].view(torch.uint8).numpy()
                self.memory.add(name, row, written=written, address=begin + i * stride)
            return begin
        data = storage_bytes(tensor)
        if not len(data):
            return 0
        # The storage is aligned for every vector. The tensor's offset in it decides whether the tensor is.
        return self.memory.add(name, data, written=written) + tensor.storage_offset() * tensor.element_size()

    def _outs(self, hiddens, streams: list[int], residual, residual_address: int, out) -> tuple[list[int], int]:
        """The address of each layer's output, and the stride of its rows."""
        if out is False:
            return [0] * len(hiddens), 0
        if out is not None:
            return [self._map("out", out, written=False)], out.stride(0)
        if residual is not None:
            return [residual_address] * len(hiddens), residual.stride(0)
        return streams, hiddens[0].stride(0)


def _is_aligned(dtype: torch.dtype, size: int, addresses: list[int], strides: list[int]) -> bool:
    """Whether each row is a number of whole vectors of 16 bytes at multiples of 16."""
    unit = dtype.itemsize
    return not size * unit % 16 and not any(a % 16 for a in addresses) and not any(s * unit % 16 for s in strides)
