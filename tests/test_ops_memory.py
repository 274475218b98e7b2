"""Tensors whose memory is not what their sizes and strides say, and memory that arguments share."""

from __future__ import annotations

import pytest
import torch
from conftest import assert_same_bits, unit
from op_inputs import lifts_beside
from torch._subclasses.fake_tensor import FakeTensorMode

from axiscap import _C, ops


def calls_on(hidden):
    """Every call that takes a stream, with all else in order for (4, 8)."""
    axes, floors = unit(1, 1, 8), torch.full((1, 1), 1e3)
    bank = _C.Bank(axes, floors)
    return {
        "cap_": lambda: ops.cap_(hidden, axes, floors),
        "cap": lambda: ops.cap(hidden, axes, floors),
        "project": lambda: ops.project(hidden, axes),
        "cap_residual_": lambda: ops.cap_residual_(hidden, torch.zeros(4, 8), axes, floors),
        "residual": lambda: ops.cap_residual_(torch.zeros(4, 8), hidden, axes, floors),
        "add_rms_norm_cap_": lambda: ops.add_rms_norm_cap_(
            hidden, torch.zeros(4, 8), torch.ones(8), 1e-6, axes, floors
        ),
        "add_rms_norm_cap_fp8_": lambda: ops.add_rms_norm_cap_fp8_(
            torch.zeros(4, 8, dtype=torch.float8_e4m3fn),
            hidden,
            torch.zeros(4, 8),
            torch.ones(8),
            1e-6,
            axes,
            floors,
            scale=torch.ones(1),
        ),
        "cap_layers_": lambda: ops.cap_layers_([hidden], axes[None], floors[None]),
        "bank": lambda: bank.cap_(hidden),
        "op": lambda: torch.ops.axiscap.cap_(hidden, axes, floors),
    }


def freed():
    tensor = torch.ones(4, 8)
    tensor.untyped_storage().resize_(0)
    return tensor


STRANGE = {
    "sparse": lambda: torch.ones(4, 8).to_sparse(),
    "compressed": lambda: torch.ones(4, 8).to_sparse_csr(),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(2, 8), torch.ones(2, 8)]),
    "quantised": lambda: torch.quantize_per_tensor(torch.ones(4, 8), 0.1, 0, torch.qint8),
    "freed": freed,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", list(STRANGE))
def test_tensors_without_rows_in_memory_are_refused(name):
    """With a sentence, and without a look at memory that is not there."""
    for entry, call in calls_on(STRANGE[name]()).items():
        with pytest.raises((ValueError, RuntimeError, NotImplementedError, TypeError)) as caught:
            call()
        assert len(str(caught.value)) > 20, entry


@pytest.mark.parametrize("argument", ["axes", "floors", "targets", "lifts", "norm_limits", "slots", "projections"])
def test_freed_arguments_are_named(argument):
    given = {
        "axes": unit(1, 1, 8), "floors": torch.zeros(1, 1), "targets": torch.ones(1, 1), "lifts": unit(1, 1, 8),
        "norm_limits": torch.ones(1), "slots": torch.zeros(4, dtype=torch.int32), "projections": torch.zeros(4, 1),
    }  # fmt: skip
    given[argument].untyped_storage().resize_(0)
    with pytest.raises(ValueError, match=f"{argument} has less memory than its shape"):
        ops.cap_(torch.ones(4, 8), **given)


def test_meta_and_fake_tensors_are_taken_by_every_call():
    for entry, call in calls_on(torch.ones(4, 8, device="meta")).items():
        with pytest.raises(ValueError, match="must be on the device of"):
            call()
        assert entry
    for call in calls_on(FakeTensorMode(allow_non_fake_inputs=True).from_tensor(torch.ones(4, 8))).values():
        call()


def test_layers_on_several_devices_are_refused():
    axes, floors, hidden = unit(2, 1, 1, 8), torch.ones(2, 1, 1), torch.zeros(4, 8)
    with pytest.raises(ValueError, match="hiddens must be on the device of hidden, cpu, got meta"):
        ops.cap_layers_([hidden, torch.zeros(4, 8, device="meta")], axes, floors)
    assert not hidden.any()


@pytest.mark.parametrize("name", ["stats", "projections", "floors", "slots"])
def test_statistics_on_several_devices_are_refused(name):
    given = {
        "stats": ops.new_stats(1, 1), "projections": torch.zeros(2, 1), "floors": torch.ones(1, 1),
        "slots": torch.zeros(2, dtype=torch.int32),
    }  # fmt: skip
    with pytest.raises(ValueError, match="must be on the device of projections"):
        ops.accumulate_(**given | {name: given[name].to("meta")})
    assert_same_bits(given["stats"], ops.new_stats(1, 1))


def test_a_bank_without_data_is_refused():
    fake = FakeTensorMode().from_tensor
    for made in (fake, lambda tensor: tensor.to("meta"), torch._neg_view):
        with pytest.raises(ValueError, match="a bank is made of dense tensors with data"):
            _C.Bank(made(unit(1, 1, 8)), made(torch.zeros(1, 1)))


def test_the_imaginary_part_of_a_conjugated_half_is_read_negated():
    numbers = torch.view_as_complex(torch.randn(8, 2, generator=torch.Generator().manual_seed(0)).half())
    view = numbers.conj().imag.view(8, 1)
    assert view.is_neg()
    axes, floors = torch.ones(1, 1, 1), torch.zeros(1, 1)
    assert_same_bits(ops.cap(view, axes, floors), view.resolve_neg().clamp(min=0))


def test_a_negated_view_is_read_as_it_is_and_not_changed():
    axes, floors = unit(1, 1, 8), torch.full((1, 1), 2.0)
    hidden = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    expected = ops.cap(-hidden, axes, floors)
    torch.testing.assert_close(ops.cap(torch._neg_view(hidden), axes, floors), expected)
    torch.testing.assert_close(ops.project(torch._neg_view(hidden), axes), ops.project(-hidden, axes))
    view = torch._neg_view(hidden.clone())
    changes = calls_on(view)
    for name in changes.keys() - {"cap", "project"}:
        with pytest.raises(ValueError, match=r"use its resolve_neg\(\)"):
            changes[name]()
    assert_same_bits(view.resolve_neg(), -hidden)


def test_memory_that_is_shared_is_refused():
    axes, floors = unit(1, 1, 8), torch.zeros(1, 1)
    buffer = torch.zeros(6, 8)
    flat = torch.zeros(64)
    shared = {
        "residual is changed, and shares memory with hidden": [
            lambda: ops.cap_residual_(buffer, buffer, axes, floors),
            lambda: ops.cap_residual_(buffer[:4], buffer[1:5], axes, floors),
            lambda: ops.add_rms_norm_cap_(buffer, buffer, torch.ones(8), 1e-6, axes, floors),
            # Rows of one stride that run into the next row; rows beside each other whose strides differ.
            lambda: ops.cap_residual_(flat[12:60].view(3, 16)[:, :8], flat[:48].view(3, 16)[:, :8], axes, floors),
            lambda: ops.cap_residual_(flat.as_strided((3, 8), (12, 1), 8), flat[:48].view(3, 16)[:, :8], axes, floors),
        ],
        "hidden is changed, and shares memory with axes": [
            lambda: ops.cap_(axes[0], axes, floors),
            lambda: _C.Bank(axes, floors).cap_(axes[0]),
        ],
        "hidden is changed, and shares memory with floors": [
            lambda: ops.cap_(flat[:8].view(1, 8), axes, flat[4:5].view(1, 1))
        ],
        "hidden is changed, and shares memory with projections": [
            lambda: ops.cap_(flat[:8].view(1, 8), axes, floors, projections=flat[7:8].view(1, 1))
        ],
        "hidden is changed, and shares memory with weight": [
            lambda: ops.add_rms_norm_cap_(flat[:16].view(2, 8), buffer[:2], flat[8:16], 1e-6, axes, floors)
        ],
        "quantized is changed, and shares memory with hidden": [
            lambda: ops.add_rms_norm_cap_fp8_(
                flat.view(torch.float8_e4m3fn)[:16].view(2, 8),
                flat[:16].view(2, 8),
                buffer[:2],
                flat[24:32],
                1e-6,
                axes,
                floors,
                scale=torch.ones(1),
            ),
            # Strides of as many elements, but not of as many bytes.
            lambda: ops.add_rms_norm_cap_fp8_(
                flat.view(torch.float8_e4m3fn)[:48].view(3, 16)[:, :8],
                flat[2:50].view(3, 16)[:, :8],
                buffer[:3],
                torch.ones(8),
                1e-6,
                axes,
                floors,
                scale=torch.ones(1),
            ),
        ],
        "scales is changed, and shares memory with projections": [
            lambda: ops.add_rms_norm_cap_fp8_(
                torch.zeros(2, 8, dtype=torch.float8_e4m3fn),
                flat[:16].view(2, 8),
                buffer[:2],
                flat[24:32],
                1e-6,
                axes,
                floors,
                scales=flat[40:42],
                projections=flat[41:43].view(2, 1),
            )
        ],
        "hiddens is changed, and shares memory with another of them": [
            lambda: ops.cap_layers_([buffer[:3], buffer[2:5]], unit(2, 1, 1, 8), torch.zeros(2, 1, 1))
        ],
        "stats is changed, and shares memory with projections": [
            lambda: ops.accumulate_(
                (room := torch.zeros(64)).view(torch.float64)[:8].view(1, 1, 8), room[2:4].view(2, 1), floors
            )
        ],
    }
    for message, calls in shared.items():
        for call in calls:
            with pytest.raises(ValueError, match=message):
                call()


def test_a_bank_whose_memory_moved_is_looked_at_again():
    hidden = torch.randn(2, 8)

    def made():
        axes, floors, lifts = unit(1, 1, 8), torch.full((1, 1), 3.0), unit(1, 1, 8)
        return axes, floors, lifts, _C.Bank(axes, floors, lifts=lifts)

    axes, floors, lifts, bank = made()
    floors.set_(torch.full((1, 1), 5.0))
    result = hidden.clone()
    bank.cap_(result)
    assert_same_bits(result, ops.cap(hidden, axes, floors, lifts=lifts))
    for at, name in enumerate(("axes", "floors", "lifts")):
        *tensors, bank = made()
        tensors[at].untyped_storage().resize_(0)
        with pytest.raises(ValueError, match=f"{name} has less memory than its shape"):
            bank.cap_(hidden)
    axes, floors, lifts, bank = made()
    floors.data = floors.double()
    with pytest.raises(TypeError, match="floors must be Float, got Double"):
        bank.cap_(hidden)
    axes, floors, lifts, bank = made()
    lifts.resize_(1, 1, 4)
    with pytest.raises(ValueError, match="lifts must have the shape of axes"):
        bank.cap_(hidden)
    axes, floors, lifts, bank = made()
    axes.resize_(8, 1, 1)
    with pytest.raises(ValueError, match="floors must have the shape of axes less H"):
        bank.cap_(hidden)


@pytest.mark.parametrize("moved", [False, True])
def test_a_bank_passes_on_every_argument(moved):
    """Also where its memory has moved, and the call takes another way."""
    axes, floors = unit(2, 1, 8), torch.full((2, 1), 1.0)
    more = {"targets": torch.full((2, 1), 2.5), "lifts": lifts_beside(axes), "norm_limits": torch.full((2,), 3.0)}
    bank = _C.Bank(axes, floors, **more)
    if moved:
        floors.set_(torch.full((2, 1), 2.0))
    hidden = torch.randn(9, 8, generator=torch.Generator().manual_seed(3))
    slots = torch.tensor([0, 1, -1] * 3, dtype=torch.int32)
    result, given, expected = hidden.clone(), torch.zeros(9, 1), torch.zeros(9, 1)
    bank.cap_(result, slots, given)
    assert_same_bits(result, ops.cap(hidden, axes, floors, slots, **more, projections=expected))
    assert_same_bits(given, expected)
    beyond = given[slots >= 0].isnan()
    assert beyond.any()
    assert not beyond.all()


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("axes", lambda t: t.transpose_(1, 2), "axes must be contiguous"),
        ("axes", lambda t: t.transpose_(0, 1), "axes must be contiguous"),
        ("axes", lambda t: t.unsqueeze_(0), r"axes must have shape \(S, K, H\)"),
        ("floors", lambda t: t.t_(), "floors must be contiguous"),
        ("lifts", lambda t: t.transpose_(1, 2), "lifts must be contiguous"),
        ("targets", lambda t: t.t_(), "targets must be contiguous"),
        ("norm_limits", lambda t: t.unsqueeze_(0), "norm_limits must have the shape of axes less K and H"),
    ],
)
def test_a_bank_that_was_reshaped_in_place_is_looked_at_again(name, change, message):
    parts = {
        "axes": unit(4, 4, 4),
        "floors": torch.ones(4, 4),
        "targets": torch.ones(4, 4),
        "lifts": unit(4, 4, 4),
        "norm_limits": torch.ones(4),
    }
    bank, hidden = _C.Bank(**parts), torch.zeros(3, 4)
    change(parts[name])
    with pytest.raises(ValueError, match=message):
        bank.cap_(hidden)
    assert not hidden.any()


def test_streams_side_by_side_in_one_buffer_are_two():
    axes, floors = unit(1, 1, 8), torch.full((1, 1), 3.0)
    both = torch.randn(5, 16, generator=torch.Generator().manual_seed(0))
    hidden, residual = both[:, :8], both[:, 8:]
    expected = ops.cap_residual_(hidden.clone(), residual.clone(), axes, floors)
    assert_same_bits(ops.cap_residual_(hidden, residual, axes, floors), expected)
    layers = torch.randn(4, 3, 8)
    ops.cap_layers_([layers[:, at] for at in (2, 0, 1)], unit(3, 1, 1, 8), torch.zeros(3, 1, 1))
