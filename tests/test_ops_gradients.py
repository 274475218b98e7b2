"""Gradients of the ops, changes that autograd must notice, and the transforms of torch.func."""

from __future__ import annotations

import contextlib
import math
import warnings

import pytest
import torch
from conftest import assert_same_bits, unit
from op_inputs import calls_of_each_op, lifts_beside, tensors_of, valid_arguments

from axiscap import _C, ops, reference


def graded_inputs(directions: int):
    generator = torch.Generator().manual_seed(5)
    hidden = torch.randn(6, 12, generator=generator, dtype=torch.float64, requires_grad=True)
    axes = unit(2, directions, 12, seed=2)
    slots = torch.tensor([0, 1, -1, 0, 1, 1], dtype=torch.int32)
    return hidden, axes, torch.full((2, directions), 0.3), slots


@pytest.mark.parametrize("lifted", [False, True])
@pytest.mark.parametrize("directions", [1, 3])
def test_gradients_of_the_reference(directions, lifted):
    hidden, axes, floors, slots = graded_inputs(directions)
    lifts = lifts_beside(axes) if lifted else None
    assert torch.autograd.gradcheck(lambda h: reference.cap(h, axes, floors, slots, lifts=lifts), hidden)


@pytest.mark.parametrize("lifted", [False, True])
@pytest.mark.parametrize("directions", [1, 3])
@pytest.mark.parametrize("use_slots", [True, False])
def test_gradients_of_the_kernel_are_those_of_the_reference(directions, use_slots, lifted):
    hidden, axes, floors, slots = graded_inputs(directions)
    slots = slots if use_slots else None
    more = (
        {"targets": floors + 0.5, "lifts": lifts_beside(axes), "norm_limits": torch.full((2,), 4.0)} if lifted else {}
    )
    seed = torch.randn(6, 12, generator=torch.Generator().manual_seed(8))
    (expected,) = torch.autograd.grad(reference.cap(hidden, axes, floors, slots, **more), hidden, seed.double())
    h = hidden.detach().float().requires_grad_()
    (result,) = torch.autograd.grad(ops.cap(h, axes, floors, slots, **more), h, seed)
    torch.testing.assert_close(result.double(), expected, atol=1e-6, rtol=1e-5)
    project_seed = torch.randn(6, directions, generator=torch.Generator().manual_seed(9))
    scores = reference.project(hidden, axes, slots)
    finite = torch.where(scores.isnan(), 0.0, scores)
    (expected,) = torch.autograd.grad(finite, hidden, project_seed.double())
    (result,) = torch.autograd.grad(ops.project(h, axes, slots).nan_to_num(), h, project_seed)
    torch.testing.assert_close(result.double(), expected, atol=1e-6, rtol=1e-5)


def test_a_row_without_projections_has_no_gradient():
    hidden, axes = torch.ones(4, 8), unit(2, 2, 8)
    hidden[2, 3] = math.inf
    hidden.requires_grad_()
    result = ops.project(hidden, axes, torch.tensor([0, -1, 1, 1], dtype=torch.int32))
    assert result.isnan().all(-1).tolist() == [False, True, True, False]
    result.sum().backward()
    torch.testing.assert_close(hidden.grad, torch.stack([axes[0].sum(0), *torch.zeros(2, 8), axes[1].sum(0)]))


def test_changing_in_place_what_needs_a_gradient_is_refused():
    hidden = torch.zeros(2, 8, requires_grad=True)
    with pytest.raises(ValueError, match=r"hidden requires grad .* use axiscap\.ops\.cap"):
        ops.cap_(hidden, unit(1, 1, 8), torch.ones(1, 1))
    with torch.no_grad():
        ops.cap_(hidden, unit(1, 1, 8), torch.ones(1, 1))
    assert bool((hidden != 0).any())


def test_a_changed_argument_beside_the_stream_must_not_need_a_gradient():
    hidden, axes, floors = torch.zeros(2, 8), unit(1, 1, 8), torch.ones(1, 1)
    graded = torch.zeros(2, 1, requires_grad=True)
    stats = ops.new_stats(1, 1).requires_grad_()
    for cap in (ops.cap_, torch.ops.axiscap.cap_):
        with pytest.raises(ValueError, match="projections requires grad"):
            cap(hidden, axes, floors, projections=graded)
    with pytest.raises(ValueError, match="stats requires grad"):
        ops.accumulate_(stats, torch.zeros(2, 1), floors)
    assert not hidden.any()
    assert not graded.any()


def test_autograd_notices_a_saved_tensor_that_was_changed():
    x = torch.ones(2, 8, requires_grad=True)
    y = x * 2
    z = y * y
    ops.cap_(y.detach(), unit(1, 1, 8), torch.full((1, 1), 50.0))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.sum().backward()


@pytest.mark.parametrize("mode", [contextlib.nullcontext, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("entry", [ops.cap_, torch.ops.axiscap.cap_])
def test_a_change_counts_as_one(entry, mode, monkeypatch):
    """Of a tensor and of its views, as torch's own ops in place do, and without a call of Python."""
    monkeypatch.setattr(torch._C, "_increment_version", None)
    hidden, axes, floors = torch.zeros(3, 8), unit(1, 1, 8), torch.ones(1, 1)
    for part in (hidden, hidden[1:], hidden.detach()):
        before = part._version
        with mode():
            entry(part, axes, floors)
        assert part._version == hidden._version == before + 1
    with torch.inference_mode():
        entry(torch.zeros(3, 8), axes, floors)  # has no version


def test_every_tensor_that_an_op_changes_counts_one_change():
    for name, (op, arguments, keywords) in calls_of_each_op(**valid_arguments()).items():
        schema = op._schema.arguments
        given = dict(zip([argument.name for argument in schema], arguments, strict=False)) | keywords
        versions = {argument: [tensor._version for tensor in tensors_of(given[argument])] for argument in given}
        op(*arguments, **keywords)
        for argument in schema:
            change = int(argument.alias_info is not None and argument.alias_info.is_write)
            result = [tensor._version for tensor in tensors_of(given.get(argument.name))]
            assert result == [before + change for before in versions.get(argument.name, [])], (name, argument.name)


def test_a_change_counts_beside_a_tensor_that_has_no_version():
    """One that was made in inference mode."""
    with torch.inference_mode():
        projections = torch.zeros(2, 1)
    hidden = torch.zeros(2, 8)
    ops.cap_(hidden, unit(1, 1, 8), torch.ones(1, 1), projections=projections)
    assert hidden._version > 0


TRANSFORMS = {
    "jvp": lambda f, h, t: torch.func.jvp(f, (h,), (t,)),
    "vjp": lambda f, h, t: torch.func.vjp(f, h)[1](f(t)),
    "grad": lambda f, h, t: torch.func.grad(lambda x: f(x).square().sum())(h),
    "jacrev": lambda f, h, t: torch.func.jacrev(f)(h),
    "jacfwd": lambda f, h, t: torch.func.jacfwd(f)(h),
    "hessian": lambda f, h, t: torch.func.hessian(lambda x: f(x).pow(3).sum())(h),
    "vmap of grad": lambda f, h, t: torch.vmap(torch.func.grad(lambda x: f(x).square().sum()))(torch.stack([h, t])),
    "dual": lambda f, h, t: f(torch.autograd.forward_ad.make_dual(h, t)),
}


@pytest.mark.parametrize("name", list(TRANSFORMS))
def test_derivatives_other_than_backward_are_refused(name):
    axes, floors = unit(2, 2, 12), torch.tensor([[0.5, -0.2], [1.0, 0.0]])
    hidden, tangent = torch.randn(2, 6, 12, generator=torch.Generator().manual_seed(2))
    bank = _C.Bank(axes, floors)
    functions = (
        lambda x: ops.cap(x, axes, floors),
        lambda x: ops.project(x, axes),
        lambda x: ops.cap_(x.clone(), axes, floors),
        lambda x: ops.cap_residual_(x, x.clone(), axes, floors),
        lambda x: (y := x.clone(), bank.cap_(y))[0],
    )
    level = torch.autograd.forward_ad.dual_level() if name == "dual" else contextlib.nullcontext()
    for function in functions:
        with level, pytest.raises((RuntimeError, ValueError), match=r"forward-mode|setup_context|requires grad"):
            TRANSFORMS[name](function, hidden, tangent)


def test_vmap_is_right_or_refused():
    axes, floors, hidden = unit(3, 1, 8), torch.ones(3, 1), torch.randn(4, 5, 8)
    expected = torch.stack([ops.cap(rows, axes, floors) for rows in hidden])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, of a loop
        assert_same_bits(torch.vmap(lambda rows: ops.cap(rows, axes, floors))(hidden), expected)
    bank = _C.Bank(axes, floors)
    for cap in (
        lambda rows: ops.cap_(rows, axes, floors),
        bank.cap_,
        lambda rows: torch.ops.axiscap.cap_(rows, axes, floors),
    ):
        with pytest.raises(RuntimeError, match="Batching rule not implemented for axiscap::cap_"):
            torch.vmap(cap)(hidden.clone())
