"""The C interface in another program, which CMake builds against the installed library."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import sysconfig

import pytest
import torch
from conftest import REPOSITORY, assert_same_bits, unit

from axiscap import _C, ops


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The path of CMake, and the prefix of a fresh installation of the library."""
    folder = tmp_path_factory.mktemp("c")
    scripts = sysconfig.get_paths()["scripts"]
    cmake = shutil.which("cmake", path=scripts) or "cmake"
    configure = [cmake, "-S", REPOSITORY, "-B", folder / "build", "-DAXISCAP_PYTHON=OFF"]
    subprocess.run([*configure, "-DAXISCAP_CUDA_ARCHITECTURES=90"], check=True, capture_output=True)
    subprocess.run([cmake, "--build", folder / "build", "--parallel", "2"], check=True, capture_output=True)
    subprocess.run(
        [cmake, "--install", folder / "build", "--prefix", folder / "prefix"], check=True, capture_output=True
    )
    return cmake, folder / "prefix"


@pytest.mark.slow
def test_the_example_program_runs(installed, tmp_path):
    cmake, prefix = installed
    configure = [cmake, "-S", REPOSITORY / "examples" / "cpp", "-B", tmp_path, f"-DCMAKE_PREFIX_PATH={prefix}"]
    subprocess.run(configure, check=True, capture_output=True)
    subprocess.run([cmake, "--build", tmp_path], check=True, capture_output=True)
    lines = subprocess.run([tmp_path / "cap_rows"], check=True, capture_output=True, text=True).stdout.splitlines()
    assert lines[:2] == ["projection -3, row now -1 1 0 0", "projection 2, row now 2 1 0 0"]
    if _C.accelerator() is None:
        assert lines[2] == "CUDA: status 3, this library was built without CUDA"
    elif not torch.cuda.is_available():
        assert lines[2].startswith("CUDA: status 4, ")
        assert "driver" in lines[2]
    assert lines[3] == "wrong: status 1, hidden_size must be at least 1"


@pytest.mark.parametrize(("defines", "expected"), [
    (["-D_WIN32", "-DAXISCAP_BUILDS_LIBRARY"], "__declspec(dllexport) int axiscap_version(void);"),
    (["-D_WIN32"], "__declspec(dllimport) int axiscap_version(void);"),
    ([], '__attribute__((visibility("default"))) int axiscap_version(void);'),
])  # fmt: skip
def test_functions_are_exported(defines, expected):
    header = REPOSITORY / "csrc" / "include" / "axiscap" / "axiscap.h"
    result = subprocess.run(["cc", "-E", "-P", *defines, header], check=True, capture_output=True, text=True)
    assert expected in result.stdout


class Call(ctypes.Structure):
    """``axiscap_call`` of axiscap.h."""

    _fields_ = [
        ("size", ctypes.c_int64),
        ("hidden", ctypes.c_void_p),
        ("hidden_stride", ctypes.c_int64),
        ("residual", ctypes.c_void_p),
        ("residual_stride", ctypes.c_int64),
        ("out", ctypes.c_void_p),
        ("out_stride", ctypes.c_int64),
        ("rows", ctypes.c_int64),
        ("hidden_size", ctypes.c_int64),
        ("dtype", ctypes.c_int32),
        ("project_only", ctypes.c_int32),
        ("axes", ctypes.c_void_p),
        ("lifts", ctypes.c_void_p),
        ("floors", ctypes.c_void_p),
        ("targets", ctypes.c_void_p),
        ("norm_limits", ctypes.c_void_p),
        ("slots", ctypes.c_void_p),
        ("num_slots", ctypes.c_int64),
        ("directions", ctypes.c_int64),
        ("projections", ctypes.c_void_p),
        ("weight", ctypes.c_void_p),
        ("eps", ctypes.c_float),
        ("weight_bias", ctypes.c_float),
        ("quantized", ctypes.c_void_p),
        ("quantized_stride", ctypes.c_int64),
        ("scale", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
    ]


def load_library(prefix):
    (path,) = prefix.glob("lib*/libaxiscap.so")
    loaded = ctypes.CDLL(str(path))
    loaded.axiscap_cap_cpu.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64]
    loaded.axiscap_last_error.restype = ctypes.c_char_p
    return loaded


def call_of(hidden, axes, floors, slots, **pointers):
    rows, size = hidden.shape
    dtype = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}[hidden.dtype]
    return Call(
        size=ctypes.sizeof(Call), hidden=hidden.data_ptr(), hidden_stride=hidden.stride(0), rows=rows,
        hidden_size=size, dtype=dtype, axes=axes.data_ptr(), floors=floors.data_ptr(), slots=slots.data_ptr(),
        num_slots=axes.shape[0], directions=axes.shape[1], **pointers,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_c_functions_give_the_bits_of_the_ops(installed, dtype):
    library = load_library(installed[1])
    assert library.axiscap_version() == 100
    hidden, residual = torch.randn(2, 9, 70, generator=torch.Generator().manual_seed(0)).to(dtype)
    axes, floors = unit(2, 2, 70), torch.zeros(2, 2)
    slots = torch.tensor([0, 1, -1, 1, 0, 0, 1, -1, 0], dtype=torch.int32)
    rows = hidden.clone()
    call = call_of(rows, axes, floors, slots)
    for begin, end in ((4, 9), (0, 4)):
        assert library.axiscap_cap_cpu(ctypes.byref(call), begin, end) == 0
    assert_same_bits(rows, ops.cap(hidden, axes, floors, slots))
    bank = {"targets": torch.full((2, 2), 1.5), "lifts": 0.5 * axes, "norm_limits": torch.tensor([8.4, 7.0])}
    rows, pointers = hidden.clone(), {name: tensor.data_ptr() for name, tensor in bank.items()}
    assert library.axiscap_cap_cpu(ctypes.byref(call_of(rows, axes, floors, slots, **pointers)), 0, 9) == 0
    assert_same_bits(rows, ops.cap(hidden, axes, floors, slots, **bank))
    rows, sums, weight = hidden.clone(), residual.clone(), torch.randn(70).to(dtype)
    extra = {"residual": sums.data_ptr(), "residual_stride": 70, "weight": weight.data_ptr(), "eps": 1e-6}
    assert library.axiscap_cap_cpu(ctypes.byref(call_of(rows, axes, floors, slots, **extra)), 0, 9) == 0
    expected = ops.add_rms_norm_cap_(hidden.clone(), residual.clone(), weight, 1e-6, axes, floors, slots)
    assert_same_bits(rows, expected[0])
    assert_same_bits(sums, expected[1])
    quantized, expected_quantized = torch.empty(2, 9, 70, dtype=torch.float8_e4m3fn)
    token_scales, scales = torch.empty(2, 9)
    for kind in ({"scales": token_scales}, {"scale": torch.tensor([0.02])}):
        rows, sums = hidden.clone(), residual.clone()
        extra |= {"residual": sums.data_ptr(), "quantized": quantized.data_ptr(), "quantized_stride": 70}
        pointers = {name: tensor.data_ptr() for name, tensor in kind.items()}
        call = call_of(rows, axes, floors, slots, **extra, **pointers)
        assert library.axiscap_cap_cpu(ctypes.byref(call), 0, 9) == 0
        arguments = expected_quantized, hidden, residual.clone(), weight, 1e-6, axes, floors, slots
        ops.add_rms_norm_cap_fp8_(*arguments, **({"scales": scales} if "scales" in kind else kind))
        assert torch.equal(quantized.view(torch.uint8), expected_quantized.view(torch.uint8))
        assert_same_bits(sums, arguments[2])
        assert_same_bits(rows, hidden)
    assert_same_bits(token_scales, scales)


@pytest.mark.parametrize(
    ("changes", "status", "message"),
    [
        ({"size": 8}, 1, b"size must be sizeof(axiscap_call)"),
        ({"dtype": 3}, 1, b"dtype is not"),
        ({"rows": -1}, 1, b"rows must not be negative"),
        ({"hidden": None}, 1, b"hidden is NULL"),
        ({"axes": None}, 1, b"axes is NULL"),
        ({"floors": None}, 1, b"floors is NULL"),
        ({"hidden_stride": 15}, 1, b"hidden_stride must be at least hidden_size"),
        ({"directions": 65}, 1, b"directions must be from 1 to 64"),
        ({"num_slots": 1}, 2, b"a slot is neither"),
        ({"weight": 1}, 1, b"weight needs residual"),
        ({"quantized": 1}, 1, b"quantized needs weight"),
        ({"quantized": 1, "weight": 1, "residual": 1, "residual_stride": 16}, 1, b"quantized needs one of"),
        (
            {"quantized": 1, "weight": 1, "residual": 1, "residual_stride": 16, "scale": 1, "scales": 1},
            1,
            b"quantized needs one of",
        ),
        (
            {"quantized": 1, "weight": 1, "residual": 1, "residual_stride": 16, "scale": 1, "quantized_stride": 15},
            1,
            b"quantized_stride must be at least hidden_size",
        ),
        ({"project_only": 1}, 1, b"project_only needs projections"),
    ],
)
def test_invalid_calls_change_nothing(installed, changes, status, message):
    library = load_library(installed[1])
    hidden, slots = torch.zeros(3, 16), torch.tensor([0, 1, 0], dtype=torch.int32)
    axes, floors = unit(2, 1, 16), torch.ones(2, 1)
    call = call_of(hidden, axes, floors, slots)
    for name, value in changes.items():
        setattr(call, name, value)
    assert library.axiscap_cap_cpu(ctypes.byref(call), 0, 3) == status
    assert library.axiscap_last_error().startswith(message)
    assert not hidden.any()
    assert library.axiscap_cap_cpu(None, 0, 3) == 1
    good = call_of(hidden, axes, floors, slots)
    assert library.axiscap_cap_cpu(ctypes.byref(good), 2, 4) == 1
    assert library.axiscap_last_error() == b"begin and end must be a range of rows"
