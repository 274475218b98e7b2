"""The ops in torch.library: compiled, exported, over buffers; and how Python calls them."""

from __future__ import annotations

import re
import shutil
import subprocess

import pytest
import torch
from conftest import REPOSITORY, assert_same_bits, unit
from op_inputs import DTYPES, lengthen, lifts_beside
from torch._inductor.utils import run_and_get_code
from torch.utils._python_dispatch import TorchDispatchMode

import axiscap
from axiscap import _C, ops


def op_calls(dtype):
    hidden = torch.randn(2, 5, 40, generator=torch.Generator().manual_seed(1)).to(dtype)
    axes, floors = unit(2, 3, 40), torch.zeros(2, 3)
    slots = torch.tensor([0, 1, 1, 0, 1, 0, 0, 1, 1, 0], dtype=torch.int32)
    with_none = torch.where(torch.arange(10) % 5 == 2, -1, slots)  # NaN in a result is unequal to itself, for opcheck
    projections, quantized = torch.empty(10, 3), torch.empty(2, 5, 40, dtype=torch.float8_e4m3fn)
    graded = hidden.clone().requires_grad_()
    library = torch.ops.axiscap
    return {
        "cap_": (library.cap_.default, (hidden, axes, floors, with_none), {}),
        "cap_ with projections": (library.cap_.default, (hidden, axes, floors), {"projections": projections}),
        "cap": (library.cap.default, (graded, axes, floors, slots), {}),
        "project": (library.project.default, (graded, axes, slots), {}),
        "cap_residual_": (
            library.cap_residual_.default,
            (hidden, hidden.clone(), axes, floors, slots),
            {"projections": projections},
        ),
        "cap_ along lifts": (
            library.cap_.default,
            (hidden, axes, floors, slots),
            {"projections": projections, "lifts": lifts_beside(axes), "norm_limits": torch.full((2,), 100.0)},
        ),
        "cap along lifts": (
            library.cap.default,
            (hidden, axes, floors, slots, floors + 1, lifts_beside(axes), torch.full((2,), 100.0)),
            {},
        ),
        "cap_.buffers": (library.cap_.buffers, (hidden, axes, floors, lengthen(with_none), lengthen(projections)), {}),
        "cap_residual_.buffers": (
            library.cap_residual_.buffers,
            (hidden, hidden.clone(), axes, floors, lengthen(slots), lengthen(projections)),
            {},
        ),
        "add_rms_norm_cap_": (
            library.add_rms_norm_cap_.default,
            (hidden, hidden.clone(), torch.ones(40, dtype=dtype), 1e-6, axes, floors, slots),
            {"projections": projections},
        ),
        "add_rms_norm_cap_.buffers": (
            library.add_rms_norm_cap_.buffers,
            (
                hidden,
                hidden.clone(),
                torch.ones(40, dtype=dtype),
                1e-6,
                axes,
                floors,
                lengthen(slots),
                lengthen(projections),
            ),
            {"weight_bias": 1.0},
        ),
        "add_rms_norm_cap_fp8_": (
            library.add_rms_norm_cap_fp8_.default,
            (quantized, hidden, hidden.clone(), torch.ones(40, dtype=dtype), 1e-6, axes, floors, slots),
            {"scales": torch.empty(10, 1), "projections": projections},
        ),
        "add_rms_norm_cap_fp8_.buffers": (
            library.add_rms_norm_cap_fp8_.buffers,
            (
                quantized,
                hidden,
                hidden.clone(),
                torch.ones(40, dtype=dtype),
                1e-6,
                axes,
                floors,
                lengthen(slots),
                lengthen(projections),
            ),
            {"scale": torch.ones(1)},
        ),
        "cap_layers_": (
            library.cap_layers_.default,
            ([hidden, hidden + 1], torch.stack([axes, axes]), torch.stack([floors, floors]), slots),
            {"projections": torch.empty(2, 10, 3)},
        ),
        "accumulate_": (library.accumulate_.default, (ops.new_stats(2, 3), torch.zeros(10, 3), floors, slots), {}),
        "accumulate_ of layers": (
            library.accumulate_.default,
            (torch.stack([ops.new_stats(2, 3)] * 2), torch.zeros(2, 12, 3)[:, :10], torch.stack([floors] * 2), slots),
            {},
        ),
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", list(op_calls(torch.float32)))
def test_opcheck(name, dtype):
    op, args, kwargs = op_calls(dtype)[name]
    checks = ["test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    # Whether a schema tells the truth is tested by allclose, which torch does not have for fp8.
    torch.library.opcheck(op, args, kwargs, test_utils=checks + (["test_schema"] if "fp8" not in name else []))


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_whole_without_a_graph_break(dynamic):
    axes, floors = unit(1, 1, 64), torch.full((1, 1), 0.5)

    def everything(hidden, residual):
        a = ops.cap_(hidden * 1.5, axes, floors)
        b = ops.cap(a + 0.25, axes, floors)
        c = ops.cap_residual_(hidden, residual + 1, axes, floors)
        c = sum(ops.add_rms_norm_cap_(hidden * 1, c, hidden[0] * 1, 1e-6, axes, floors))
        scales, quantized = hidden.new_empty(len(hidden), 1), torch.empty_like(hidden, dtype=torch.float8_e4m3fn)
        ops.add_rms_norm_cap_fp8_(quantized, hidden, c, hidden[0] * 1, 1e-6, axes, floors, scales=scales)
        c = c + quantized.float() * scales
        d = ops.cap_layers_([a * 2, b * 2], torch.stack([axes, axes]), torch.stack([floors, floors]))
        stats = ops.accumulate_(ops.new_stats(1, 1), ops.project(b, axes).reshape(-1, 1), floors)
        return a, b, c, *d, stats

    compiled = torch.compile(everything, fullgraph=True, dynamic=dynamic)
    for rows in (3, 8):
        hidden, residual = torch.randn(rows, 64), torch.randn(rows, 64)
        for result, expected in zip(compiled(hidden, residual), everything(hidden, residual), strict=True):
            torch.testing.assert_close(result, expected)


class Buffered(torch.nn.Module):
    """A layer's cap in a graph that serves: all but the rows lies in buffers."""

    def __init__(self, size: int, max_rows: int, residual: bool) -> None:
        super().__init__()
        self.residual = residual
        self.register_buffer("axes", unit(2, 2, size))
        self.register_buffer("floors", torch.zeros(2, 2))
        self.register_buffer("slots", torch.arange(max_rows, dtype=torch.int32) % 3 - 1)
        self.register_buffer("projections", torch.full((max_rows, 2), 7.0))

    def forward(self, hidden, residual):
        hidden, residual = hidden * 1.5, residual + 1
        if self.residual:
            torch.ops.axiscap.cap_residual_.buffers(
                hidden, residual, self.axes, self.floors, self.slots, self.projections
            )
        else:
            torch.ops.axiscap.cap_.buffers(hidden, self.axes, self.floors, self.slots, self.projections)
        return hidden + residual


@pytest.mark.slow
@pytest.mark.parametrize("newer", [False, True])
@pytest.mark.parametrize("residual", [False, True])
def test_a_compiled_graph_writes_into_its_buffers_without_a_copy(residual, newer):
    """With either way to functionalise: vLLM takes the older one, which copies a slice of a buffer."""
    module = Buffered(64, 16, residual)
    torch._dynamo.reset()
    with torch._inductor.config.patch(enable_auto_functionalized_v2=newer):
        compiled = torch.compile(module, fullgraph=True, dynamic=True)
        _, (code,) = run_and_get_code(compiled, torch.randn(3, 64), torch.randn(3, 64))
        kernels = re.findall(r"^ +(cpp_fused_\w+)\(", code, re.MULTILINE)
        assert len(kernels) == 2  # before the cap and behind it
        assert "clone" not in "".join(kernels)
        for rows in (3, 8, 16):
            hidden, other = torch.randn(rows, 64), torch.randn(rows, 64)
            module.projections.fill_(7)
            result = compiled(hidden, other)
            a, b, expected = hidden * 1.5, other + 1, torch.full((16, 2), 7.0)
            arguments = (module.axes, module.floors, module.slots[:rows])
            if residual:
                ops.cap_residual_(a, b, *arguments, projections=expected[:rows])
            else:
                ops.cap_(a, *arguments, projections=expected[:rows])
            assert_same_bits(module.projections, expected)
            torch.testing.assert_close(result, a + b)


@pytest.mark.parametrize("dtype", DTYPES)
def test_buffers_may_be_longer_than_the_step(dtype):
    """Their first rows are the step's; the others are neither read nor written."""
    hidden = torch.randn(5, 40, generator=torch.Generator().manual_seed(1)).to(dtype)
    axes, floors = unit(2, 3, 40), torch.zeros(2, 3)
    slots, expected = torch.tensor([1, 0, -1, 1, 0], dtype=torch.int32), torch.empty(5, 3)
    capped = ops.cap_(hidden.clone(), axes, floors, slots, projections=expected)
    projections = lengthen(torch.zeros(5, 3))
    torch.ops.axiscap.cap_.buffers(hidden, axes, floors, lengthen(slots), projections)
    assert_same_bits(hidden, capped)
    assert_same_bits(projections, lengthen(expected))


def test_buffers_without_room():
    hidden, axes, floors = torch.zeros(4, 16), unit(1, 1, 16), torch.zeros(1, 1)
    slots, projections = torch.zeros(4, dtype=torch.int32), torch.zeros(4, 1)
    with pytest.raises(ValueError, match=r"slots must have room for the 4 rows, got shape \[3\]"):
        torch.ops.axiscap.cap_.buffers(hidden, axes, floors, slots[:3], projections)
    with pytest.raises(ValueError, match=r"projections must have room for the 4 rows, got shape \[2, 1\]"):
        torch.ops.axiscap.cap_residual_.buffers(hidden, hidden.clone(), axes, floors, slots, projections[:2])
    with pytest.raises(ValueError, match=r"projections must have shape \[4, 1\], got \[6, 2\]"):
        torch.ops.axiscap.cap_.buffers(hidden, axes, floors, slots, torch.zeros(6, 2))
    norm = hidden, hidden.clone(), torch.ones(16), 1e-6, axes, floors
    with pytest.raises(ValueError, match=r"slots must have room for the 4 rows, got shape \[3\]"):
        torch.ops.axiscap.add_rms_norm_cap_.buffers(*norm, slots[:3], projections)
    with pytest.raises(ValueError, match="hidden must have shape"):
        torch.ops.axiscap.cap_.buffers(torch.zeros(()), axes, floors, slots, projections)


def test_exported_programs_keep_the_op():
    axes = unit(1, 1, 16)

    class Block(torch.nn.Module):
        def forward(self, hidden):
            return ops.cap(hidden, axes, torch.ones(1, 1))

    program = torch.export.export(Block(), (torch.zeros(3, 16),))
    assert "axiscap.cap.default" in str(program.graph)
    hidden = torch.randn(3, 16)
    assert_same_bits(program.module()(hidden), Block()(hidden))


def test_the_function_the_op_and_the_bank_give_the_same():
    hidden = torch.randn(9, 100).bfloat16()
    axes, floors = unit(1, 2, 100), torch.zeros(1, 2)
    results = [hidden.clone() for _ in range(3)]
    _C.cap_(results[0], axes, floors)
    torch.ops.axiscap.cap_(results[1], axes, floors)
    _C.Bank(axes, floors).cap_(results[2])
    assert_same_bits(results[1], results[0])
    assert_same_bits(results[2], results[0])


def test_version_is_one():
    from importlib.metadata import version

    assert axiscap.__version__ == version("axiscap")


def test_the_binary_serves_every_torch():
    """It needs nothing that only some have: no CUDA library, and of torch two functions of its stable C interface."""
    if shutil.which("readelf") is None or shutil.which("nm") is None:
        pytest.skip("looking into the binary needs readelf and nm")
    needed = subprocess.run(["readelf", "-d", _C.__file__], check=True, capture_output=True, text=True).stdout
    libraries = re.findall(r"\(NEEDED\).*\[(.*)\]", needed)
    assert "libtorch_cpu.so" in libraries
    assert not [name for name in libraries if "cuda" in name.lower()]
    missing = subprocess.run(["nm", "-DC", "--undefined-only", _C.__file__], check=True, capture_output=True, text=True)
    names = {line.split()[-1].partition("@")[0] for line in missing.stdout.splitlines() if " U " in line}
    assert {name for name in names if "torch" in name} == {"aoti_torch_grad_mode_is_enabled", "torch_parallel_for"}
    assert not names & {"mincore", "dlopen", "dlsym"} or _C.accelerator()  # the CUDA runtime looks for the driver
    assert not [name for name in names if re.search(r"(?i)\bcuda|cudart|::cuda::|\b(?:at|c10|torch)::", name)]


def test_the_sources_touch_nothing_private_of_torch():
    """No layout of torch's objects, no symbol that is looked up by name, no name of functorch."""
    native = [path for path in (REPOSITORY / "csrc").rglob("*") if path.suffix in (".h", ".cpp", ".cu", ".cuh")]
    for path in native:
        text = path.read_text()
        for name in ("mincore", "dlsym", "dlopen", "_cdata", "TensorImpl", "AtenTensorHandle", "ATen/core", "c10/"):
            assert name not in text, (path, name)
    for path in (REPOSITORY / "axiscap").rglob("*.py"):
        assert "functorch" not in path.read_text(), path


def test_the_functions_call_the_kernels_directly():
    """A plain tensor does not pass torch's dispatcher; a negated view does, and is refused there."""

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    seen: list[str] = []
    hidden, axes, floors = torch.zeros(2, 8), unit(1, 1, 8), torch.ones(1, 1)
    slots = torch.zeros(2, dtype=torch.int32)
    with Seen():
        _C.Bank(axes, floors).cap_(hidden, slots)
        ops.cap_(torch.nn.Parameter(hidden, requires_grad=False), axes, floors, slots)
        assert seen == []
        ops.cap_(hidden.as_subclass(type("Subclass", (torch.Tensor,), {})), axes, floors, slots)
    assert "axiscap.cap_.default" in seen


def test_the_dispatcher_passes_on_every_argument():
    axes, floors = unit(2, 1, 8), torch.full((2, 1), 1.0)
    more = {"targets": floors + 1, "lifts": lifts_beside(axes), "norm_limits": torch.full((2,), 3.0)}
    slots = torch.tensor([0, 1, -1] * 3, dtype=torch.int32)
    hidden = torch.randn(9, 8, generator=torch.Generator().manual_seed(3))
    results = []
    for rows in (hidden.clone(), hidden.clone().as_subclass(type("Subclass", (torch.Tensor,), {}))):
        projections = torch.zeros(9, 1)
        ops.cap_(rows, axes, floors, slots, **more, projections=projections)
        results.append((rows.as_subclass(torch.Tensor), projections))
    for result, expected in zip(results[1], results[0], strict=True):
        assert_same_bits(result, expected)


def test_a_call_is_bound_to_the_arguments_of_its_schema():
    hidden, axes, floors = torch.zeros(2, 8), unit(1, 1, 8), torch.ones(1, 1)
    wrong = {
        "cap_ needs floors": lambda: _C.cap_(hidden, axes),
        "cap_ needs axes": lambda: _C.cap_(hidden, None, floors),
        "cap_ has no argument floor": lambda: _C.cap_(hidden, axes, floors, floor=1),
        "cap_ got hidden twice": lambda: _C.cap_(hidden, axes, floors, hidden=hidden),
        "cap_ takes fewer positional arguments than 5": lambda: _C.cap_(hidden, axes, floors, None, axes),
        "axes must be a torch.Tensor, got list": lambda: _C.cap_(hidden, [1.0], floors),
    }
    for message, call in wrong.items():
        with pytest.raises(TypeError, match=message):
            call()
    assert not hidden.any()
    assert _C.cap_(axes=axes, floors=floors, **{"".join(["hid", "den"]): hidden}) is None
    assert hidden.any()
    for schema, names, _ in _C.OPS:
        op = schema.partition("(")[0].partition(".")
        result = getattr(getattr(torch.ops.axiscap, op[0]), op[2] or "default")._schema
        assert [argument.name for argument in result.arguments] == names
    assert len(_C.plan("float32", 64, 8, 4)) == 4


def test_a_compiled_model_is_capped_and_counted():
    """In every torch: an installation asks its compiler what it is doing."""

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = torch.nn.ModuleList(torch.nn.Linear(8, 8) for _ in range(2))

        def forward(self, hidden):
            for layer in self.layers:
                hidden = layer(hidden)
            return hidden

    profile = axiscap.CapProfile((1,), unit(1, 1, 8), torch.tensor([[2.0]]))
    model, hidden = Model(), torch.randn(1, 6, 8)
    with torch.no_grad(), axiscap.install(model, profile, layers="layers") as cap:
        expected = model(hidden)
        torch.testing.assert_close(torch.compile(model, backend="aot_eager")(hidden), expected)
        assert cap.stats()["default"][1].rows == 12
