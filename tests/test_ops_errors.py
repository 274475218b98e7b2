"""Wrong arguments of the ops: the error names the argument, and nothing is changed."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import assert_same_bits, unit
from op_inputs import H, calls_of_each_op, lifts_beside, valid_arguments
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map_only

from axiscap import _C, ops, reference

BAD_CAP = {
    "hidden dtype": (
        "hidden",
        lambda t: t.double(),
        TypeError,
        "hidden must be float32, bfloat16 or float16, got Double",
    ),
    "hidden integer": ("hidden", lambda t: t.int(), TypeError, "hidden must be float32"),
    "hidden scalar": ("hidden", lambda t: torch.zeros(()), ValueError, r"hidden must have shape \(\.\.\., H\)"),
    "hidden empty": ("hidden", lambda t: torch.zeros(4, 0), ValueError, "hidden must have shape"),
    "hidden last stride": ("hidden", lambda t: torch.zeros(H, 4).T, ValueError, "hidden must have stride 1"),
    "hidden row strides": (
        "hidden",
        lambda t: torch.zeros(2, 3, H)[:, :2],
        ValueError,
        "hidden must have rows with one uniform stride",
    ),
    "hidden overlapping": (
        "hidden",
        lambda t: torch.zeros(H).expand(4, H),
        ValueError,
        "hidden is changed in place, so its rows must not overlap",
    ),
    "hidden other H": ("hidden", lambda t: torch.zeros(4, H + 1), ValueError, "axes must have the H of hidden, 17"),
    "hidden device": (
        "hidden",
        lambda t: t.to("meta"),
        ValueError,
        "axes must be on the device of hidden, meta, got cpu",
    ),
    "axes dtype": ("axes", lambda t: t.bfloat16(), TypeError, "axes must be Float, got BFloat16"),
    "axes shape": ("axes", lambda t: t[0], ValueError, r"axes must have shape \(S, K, H\), got \[1, 16\]"),
    "axes empty": ("axes", lambda t: t[:0], ValueError, "axes must have no dimension of size 0"),
    "axes directions": ("axes", lambda t: t.expand(2, 65, H).contiguous(), ValueError, "axes must have at most 64"),
    "axes stride": ("axes", lambda t: unit(2, 1, 2 * H)[..., ::2], ValueError, "axes must be contiguous"),
    "axes device": ("axes", lambda t: t.to("meta"), ValueError, "floors must be on the device of axes, meta, got cpu"),
    "floors dtype": ("floors", lambda t: t.double(), TypeError, "floors must be Float, got Double"),
    "floors shape": ("floors", lambda t: t[0], ValueError, "floors must have the shape of axes less H"),
    "slots dtype": ("slots", lambda t: t.long(), TypeError, "slots must be Int, got Long"),
    "slots shape": ("slots", lambda t: t[:3], ValueError, r"slots must have shape \(rows,\) = \(4,\), got \[3\]"),
    "slots stride": ("slots", lambda t: torch.zeros(8, dtype=torch.int32)[::2], ValueError, "slots must be contiguous"),
    "slots too large": ("slots", lambda t: t + 2, IndexError, r"slots\[0\] must be in \[0, 2\) or -1, got 2"),
    "slots too small": ("slots", lambda t: t - 2, IndexError, r"slots\[0\] must be in \[0, 2\) or -1, got -2"),
    "slots late": (
        "slots",
        lambda t: torch.tensor([0, 0, 0, 2**31 - 1], dtype=torch.int32),
        IndexError,
        r"slots\[3\] must be in",
    ),
    "lifts dtype": ("lifts", lambda t: t.half(), TypeError, "lifts must be Float, got Half"),
    "lifts shape": ("lifts", lambda t: t[:1], ValueError, r"lifts must have the shape of axes, \[2, 1, 16\]"),
    "lifts stride": ("lifts", lambda t: unit(2, 1, 2 * H)[..., ::2], ValueError, "lifts must be contiguous"),
    "lifts device": ("lifts", lambda t: t.to("meta"), ValueError, "lifts must be on the device of axes, cpu, got meta"),
    "targets dtype": ("targets", lambda t: t.double(), TypeError, "targets must be Float, got Double"),
    "targets shape": ("targets", lambda t: t[0], ValueError, "targets must have the shape of axes less H"),
    "norm_limits dtype": ("norm_limits", lambda t: t.double(), TypeError, "norm_limits must be Float, got Double"),
    "norm_limits shape": (
        "norm_limits",
        lambda t: t[:, None],
        ValueError,
        r"norm_limits must have the shape of axes less K and H, \[2\], got \[2, 1\]",
    ),
    "projections dtype": ("projections", lambda t: t.double(), TypeError, "projections must be Float"),
    "projections shape": ("projections", lambda t: t[:, 0], ValueError, r"projections must have shape \[4, 1\]"),
    "projections stride": (
        "projections",
        lambda t: torch.zeros(4, 2)[:, :1],
        ValueError,
        "projections must be contiguous",
    ),
}


@pytest.mark.parametrize("entry", ["ops", "library", "bank", "residual"])
@pytest.mark.parametrize("name", list(BAD_CAP))
def test_errors_name_the_argument_and_change_nothing(name, entry):
    argument, spoil, error, message = BAD_CAP[name]
    call = valid_arguments()
    call[argument] = spoil(call[argument])
    before = {key: value.clone() if value.device.type == "cpu" else None for key, value in call.items()}
    hidden, axes, floors, slots, projections, lifts, targets, norm_limits = call.values()
    more = {"targets": targets, "lifts": lifts, "norm_limits": norm_limits}
    if entry == "residual":
        message = message.replace("hidden is", "residual is")
    residual = hidden if "overlap" in message else hidden.clone()
    entries = {
        "ops": lambda: ops.cap_(hidden, axes, floors, slots, **more, projections=projections),
        "library": lambda: torch.ops.axiscap.cap_(hidden, axes, floors, slots, **more, projections=projections),
        "bank": lambda: _C.Bank(
            axes, floors, targets, axes if lifts.is_cpu and lifts.equal(unit(2, 1, H)) else lifts, norm_limits
        ).cap_(hidden, slots, projections),
        "residual": lambda: ops.cap_residual_(hidden, residual, axes, floors, slots, **more, projections=projections),
    }
    with pytest.raises(error, match=message) as caught:
        entries[entry]()
    assert "\n" not in str(caught.value)
    for key, value in call.items():
        if before[key] is not None:
            assert torch.equal(value, before[key])


def test_an_op_without_data_gives_shapes_and_checks_nothing_else():
    """Of every op; the kernel checks the call when it runs, in the same words as without a graph."""
    wrong = valid_arguments() | {"projections": torch.zeros(4, 2), "slots": torch.zeros(3, dtype=torch.int32)}
    fake = FakeTensorMode()
    for name, (op, arguments, keywords) in calls_of_each_op(*wrong.values()).items():
        without_data = tree_map_only(torch.Tensor, fake.from_tensor, (arguments, keywords))
        with fake:
            results = op(*without_data[0], **without_data[1])
        shapes = [tuple(result.shape) for result in tree_leaves(results) if result is not None]
        expected = {"cap": [(4, H), (4, 1), (4, 1)], "project": [(4, 1)]}
        assert shapes == expected.get(name, []), name


def test_a_wrong_call_inside_a_graph_is_refused_when_it_runs():
    axes, floors = unit(1, 1, H), torch.ones(1, 1)

    @torch.compile(backend="aot_eager", fullgraph=True)
    def step(hidden, slots):
        return ops.cap_(hidden + 1, axes, floors, slots)

    with pytest.raises(ValueError, match=r"slots must have shape \(rows,\) = \(4,\), got \[3\]"):
        step(torch.zeros(4, H), torch.zeros(3, dtype=torch.int32))
    with pytest.raises(IndexError, match=r"slots\[0\] must be in \[0, 1\) or -1, got 1"):
        step(torch.zeros(4, H), torch.ones(4, dtype=torch.int32))


@pytest.mark.parametrize(
    ("residual", "error", "message"),
    [
        (torch.zeros(3, H), ValueError, "residual must have the shape of hidden"),
        (torch.zeros(4, H, dtype=torch.bfloat16), TypeError, "residual must be Float, got BFloat16"),
        (torch.zeros(H, 4).T, ValueError, "residual must have stride 1"),
        (torch.zeros(4, H, requires_grad=True), ValueError, "residual requires grad"),
    ],
)
def test_errors_of_the_residual(residual, error, message):
    with pytest.raises(error, match=message):
        ops.cap_residual_(torch.zeros(4, H), residual, unit(1, 1, H), torch.ones(1, 1))
    assert not residual.any()


@pytest.mark.parametrize(
    ("weight", "eps", "bias", "error", "message"),
    [
        (torch.ones(H - 1), 0.0, 0.0, ValueError, r"weight must have shape \(H,\) = \(16,\)"),
        (torch.ones(H).half(), 0.0, 0.0, TypeError, "weight must be Float, got Half"),
        (torch.ones(2 * H)[::2], 0.0, 0.0, ValueError, "weight must have shape"),
        (torch.ones(H), -1.0, 0.0, ValueError, "eps must be finite and not negative, got -1"),
        (torch.ones(H), math.inf, 0.0, ValueError, "eps must be finite and not negative, got inf"),
        (torch.ones(H), 0.0, math.nan, ValueError, "weight_bias must be finite"),
    ],
)
def test_errors_of_the_norm(weight, eps, bias, error, message):
    hidden, residual = torch.ones(4, H), torch.zeros(4, H)
    with pytest.raises(error, match=message):
        ops.add_rms_norm_cap_(hidden, residual, weight, eps, unit(1, 1, H), torch.ones(1, 1), weight_bias=bias)
    assert bool((hidden == 1).all())
    assert not residual.any()


def test_rows_that_the_norm_replaces_do_not_overlap():
    """Where the norm goes to another tensor, hidden is read alone, and its rows may."""
    hidden, bank = torch.ones(H).expand(4, H), (unit(1, 1, H), torch.ones(1, 1))
    with pytest.raises(ValueError, match="hidden is changed in place, so its rows must not overlap"):
        ops.add_rms_norm_cap_(hidden, torch.zeros(4, H), torch.ones(H), 1e-6, *bank)
    quantized = torch.empty(4, H, dtype=torch.float8_e4m3fn)
    result, expected = torch.zeros(4, H), torch.zeros(4, H)
    ops.add_rms_norm_cap_fp8_(quantized, hidden, result, torch.ones(H), 1e-6, *bank, scale=torch.ones(1))
    ops.cap_(expected.copy_(hidden), *bank)
    assert_same_bits(result, expected)


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        (
            {"quantized": torch.zeros(3, H)},
            ValueError,
            r"quantized must have the shape of hidden, \[4, 16\], got \[3, 16\]",
        ),
        ({"quantized": torch.zeros(4, H)}, TypeError, "quantized must be Float8_e4m3fn, got Float"),
        ({"quantized": "twisted"}, ValueError, "quantized must have stride 1"),
        ({"quantized": "repeated"}, ValueError, "quantized is changed in place, so its rows must not overlap"),
        ({"scale": None}, ValueError, "one of scale and scales must be given"),
        ({"scales": torch.zeros(4)}, ValueError, "one of scale and scales must be given"),
        ({"scale": torch.zeros(4)}, ValueError, r"scale must be contiguous and have 1 element, got shape \[4\]"),
        (
            {"scale": None, "scales": torch.zeros(3, 1)},
            ValueError,
            r"scales must be contiguous and have 4 elements, one for each row, got shape \[3, 1\]",
        ),
        ({"scale": None, "scales": torch.zeros(8)[::2]}, ValueError, "scales must be contiguous"),
        ({"scale": torch.zeros(1, dtype=torch.float64)}, TypeError, "scale must be Float, got Double"),
        ({"scale": torch.zeros(1, device="meta")}, ValueError, "scale must be on the device of hidden"),
        ({"weight": torch.ones(H - 1)}, ValueError, "weight must have shape"),
        ({"residual": "leaf"}, ValueError, "residual requires grad"),
    ],
)
def test_errors_of_the_norm_in_fp8(changed, error, message):
    strange = {
        "twisted": torch.zeros(H, 4, dtype=torch.float8_e4m3fn).T,
        "repeated": torch.zeros(H, dtype=torch.float8_e4m3fn).expand(4, H),
        "leaf": torch.zeros(4, H, requires_grad=True),
    }
    call = {
        "quantized": torch.ones(4, H).to(torch.float8_e4m3fn), "hidden": torch.ones(4, H),
        "residual": torch.zeros(4, H), "weight": torch.ones(H), "eps": 0.0, "axes": unit(1, 1, H),
        "floors": torch.ones(1, 1), "scale": torch.ones(1), "scales": None,
    } | {name: strange[value] if isinstance(value, str) else value for name, value in changed.items()}  # fmt: skip
    for entry in (ops.add_rms_norm_cap_fp8_, torch.ops.axiscap.add_rms_norm_cap_fp8_):
        with pytest.raises(error, match=message):
            entry(**call)
    assert not call["residual"].any()


def test_errors_of_cap_layers():
    axes, floors = unit(2, 1, 1, H), torch.ones(2, 1, 1)
    streams = [torch.zeros(4, H), torch.zeros(4, H)]
    for hiddens, message in (
        (streams[:1], "axes must have one entry for each of the 1 hiddens, got 2"),
        ([streams[0], torch.zeros(3, H)], "hiddens must have one shape"),
        ([streams[0], torch.zeros(H, 4).T], "hiddens must have stride 1"),
        ([streams[0], torch.zeros(H).expand(4, H)], "hiddens is changed in place, so its rows must not overlap"),
        ([], "hiddens"),
    ):
        with pytest.raises(ValueError, match=message):
            ops.cap_layers_(hiddens, axes, floors)
    with pytest.raises(TypeError, match="hiddens must be Float, got Half"):
        ops.cap_layers_([streams[0], streams[1].half()], axes, floors)
    with pytest.raises(IndexError, match=r"slots\[1\]"):
        ops.cap_layers_(streams, axes, floors, torch.tensor([0, 1, 0, 0], dtype=torch.int32))
    assert not streams[0].any()


@pytest.mark.parametrize(
    ("axes", "floors", "message"),
    [
        (unit(1, 1, H) * 1.01, torch.ones(1, 1), "axes must be finite and of unit length"),
        (torch.full((1, 1, H), math.nan), torch.ones(1, 1), "axes must be finite and of unit length"),
        (unit(1, 1, H), torch.full((1, 1), math.nan), "floors must be finite"),
        (unit(1, 1, H), torch.full((1, 1), math.inf), "floors must be finite"),
    ],
)
def test_a_bank_checks_its_values_once(axes, floors, message):
    with pytest.raises(ValueError, match=message):
        _C.Bank(axes, floors)


def test_a_bank_checks_the_values_of_every_direction_of_every_slot():
    axes, floors = unit(2, 2, H), torch.ones(2, 2)
    good = {
        "axes": axes,
        "floors": floors,
        "targets": floors + 1,
        "lifts": lifts_beside(axes),
        "norm_limits": torch.ones(2),
    }
    _C.Bank(**good)
    for name, value in good.items():
        for at in ((0,), (1,)) if value.dim() == 1 else ((0, 1), (1, 0), (1, 1)):
            spoilt = value.clone()
            spoilt[at] = math.nan
            with pytest.raises(ValueError, match=f"{name} must be"):
                _C.Bank(**good | {name: spoilt})


def test_a_bank_checks_its_options():
    axes, floors = unit(1, 1, H), torch.ones(1, 1)
    for lifts in (2 * axes, -axes, torch.full_like(axes, math.nan)):
        with pytest.raises(ValueError, match="lifts must be finite, above 0 and at most 1 along their axes"):
            _C.Bank(axes, floors, lifts=lifts)
    for limit in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="norm_limits must be positive"):
            _C.Bank(axes, floors, norm_limits=torch.full((1,), limit))
    for target in (0.5, math.inf, math.nan, -math.inf):
        with pytest.raises(ValueError, match="targets must be finite and at least the floors"):
            _C.Bank(axes, floors, torch.full((1, 1), target))
    off = torch.full((1, 1), -math.inf)
    _C.Bank(axes, off, off)
    lifts = lifts_beside(axes)
    assert _C.Bank(axes, floors, None, lifts, torch.full((1,), math.inf)).lifts.data_ptr() == lifts.data_ptr()
    assert _C.Bank(axes, floors).lifts is None


def test_reference_refuses_slots_outside_the_bank():
    with pytest.raises(IndexError, match=r"slots must be in \[0, 1\) or -1"):
        reference.cap(torch.zeros(1, 4), unit(1, 1, 4), torch.ones(1, 1), torch.tensor([1]))


def test_rows_that_are_only_read_may_overlap():
    rows, axes, floors = torch.ones(5).expand(3, 5), unit(1, 1, 5), torch.full((1, 1), 9.0)
    assert_same_bits(ops.cap(rows, axes, floors), ops.cap(rows.contiguous(), axes, floors))
    assert_same_bits(ops.project(rows, axes), ops.project(rows.contiguous(), axes))
    result = ops.cap_residual_(rows, torch.zeros(3, 5), axes, floors)
    assert_same_bits(result, ops.cap_residual_(rows.contiguous(), torch.zeros(3, 5), axes, floors))


def test_a_dimension_of_one_may_have_any_stride():
    axes, floors = unit(1, 1, 5), torch.ones(1, 1)
    for view in (
        torch.zeros(2, 4, 5)[:1, :3],
        torch.zeros(3, 2, 5)[:, :1],
        torch.zeros(2, 3, 2, 5)[:1, :, :1],
        torch.zeros(3, 2, 1, 5).transpose(1, 2)[..., :1, :],
    ):
        expected = ops.cap(view, axes, floors)
        assert_same_bits(ops.cap_(view, axes, floors).contiguous(), expected)
        assert bool((expected != 0).all())
    part = unit(3, 4, 5, seed=1)[:1, :1]
    assert_same_bits(ops.project(torch.ones(2, 5), part), ops.project(torch.ones(2, 5), part.clone()))
    column = torch.zeros(1, 4).T
    assert ops.cap_(column, torch.ones(1, 1, 1), floors).tolist() == [[1.0]] * 4
