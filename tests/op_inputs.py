"""Inputs of the ops: random ones, a valid call of each op, and the bounds of the float64 oracle."""

from __future__ import annotations

import math

import torch
from conftest import unit
from hypothesis import strategies as st
from torch.utils._pytree import tree_leaves

from axiscap import _C, reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


#: Half the distance to the next number, relative; and absolute, where numbers are subnormal.
ROUNDING = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


TINY = {torch.float32: 2.0**-150, torch.bfloat16: 2.0**-134, torch.float16: 2.0**-25}


class Input:
    """One random call: rows with a stride of their own inside a larger buffer, some of them not finite."""

    def __init__(
        self,
        dtype,
        rows,
        size,
        slots,
        directions,
        padding,
        scale,
        choose,
        special,
        seed,
        *,
        targets=False,
        lifts=False,
        norm_limits=False,
    ):
        generator = torch.Generator().manual_seed(seed)

        def randn(*shape):
            return torch.randn(*shape, generator=generator)

        self.axes = torch.nn.functional.normalize(randn(slots, directions, size), dim=-1)
        self.floors = randn(slots, directions) * scale
        self.floors[torch.rand(slots, directions, generator=generator) < 0.15] = -math.inf
        self.buffer = (randn(rows, size + padding) * scale).to(dtype)
        if special and rows:
            for value in (math.inf, -math.inf, math.nan):
                row = int(torch.randint(rows, (), generator=generator))
                self.buffer[row, int(torch.randint(size, (), generator=generator))] = value
        self.hidden = self.buffer[:, :size]
        self.slots = torch.randint(-1, slots, (rows,), generator=generator).int() if choose else None
        self.targets = self.lifts = self.norm_limits = None
        if targets:
            self.targets = self.floors + torch.rand(slots, directions, generator=generator) * scale
        if lifts:
            aside = randn(slots, directions, size)
            aside -= (aside * self.axes).sum(-1, keepdim=True) * self.axes
            self.lifts = self.axes + 0.3 * torch.nn.functional.normalize(aside, dim=-1)
        if norm_limits:  # about half of the rows lie beyond theirs
            self.norm_limits = (0.8 + 0.4 * torch.rand(slots, generator=generator)) * scale * size**0.5

    def call(self):
        return self.axes, self.floors, self.slots

    def more(self):
        return {"targets": self.targets, "lifts": self.lifts, "norm_limits": self.norm_limits}


@st.composite
def inputs(draw):
    return Input(
        dtype=draw(st.sampled_from(DTYPES)),
        rows=draw(st.integers(0, 37)),
        size=draw(st.one_of(st.integers(1, 70), st.sampled_from([255, 256, 576, 1000, 4099]))),
        slots=draw(st.integers(1, 3)),
        directions=draw(st.integers(1, 4)),
        padding=draw(st.sampled_from([0, 0, 1, 7, 32])),
        scale=draw(st.sampled_from([1e-6, 1e-3, 1.0, 30.0, 1000.0, 2e4])),
        choose=draw(st.booleans()),
        special=draw(st.booleans()),
        seed=draw(st.integers(0, 2**31)),
        targets=draw(st.booleans()),
        lifts=draw(st.booleans()),
        norm_limits=draw(st.booleans()),
    )


def near_limit(x, slots, norm_limits):
    """Which rows (N,) are so near their limit that rounding decides."""
    limits = norm_limits.double()[torch.zeros(len(x), dtype=torch.long) if slots is None else slots.clamp(min=0).long()]
    return (x.double().norm(dim=-1) - limits).abs() <= 1e-4 * limits


def assert_close_to_oracle(
    actual, incoming, axes, floors, slots, base=None, *, targets=None, lifts=None, norm_limits=None
):
    """Within the rounding of one store, beside what float32 sums in 32 lanes may be off by."""
    bank = {"targets": targets, "lifts": lifts, "norm_limits": norm_limits}
    exact = reference.cap(incoming.double(), axes, floors, slots, **bank)
    x = incoming.double()
    size, directions = x.shape[-1], axes.shape[1]
    index = torch.zeros(len(x), dtype=torch.long) if slots is None else slots.clamp(min=0).long()
    v = torch.maximum(axes.abs(), axes.abs() if lifts is None else lifts.abs()).double()[index].amax(1)
    # Every element of |x| + sum |delta v| that can enter a sum; a lane adds size / 32 products, then five folds.
    ends = floors if targets is None else targets
    largest = x.abs() + directions * (x.abs().sum(-1, keepdim=True) + ends.double()[index].abs().nan_to_num(
        posinf=0.0, neginf=0.0).amax(-1, keepdim=True)) * v  # fmt: skip
    sums = (size / 32 + 6) * 2.0**-24 * (largest * v).sum(-1, keepdim=True) * v * directions
    written = exact if base is None else base.double() + (exact - x)
    bound = ROUNDING[actual.dtype] * written.abs() + TINY[actual.dtype] + sums + directions * 2.0**-24 * largest
    finite = exact.isfinite().all(-1) & (written.abs() < torch.finfo(actual.dtype).max).all(-1)
    if norm_limits is not None:
        finite &= ~near_limit(x, slots, norm_limits)
    error = (actual.double() - written).abs()
    assert bool((error <= bound)[finite].all()), f"off by up to {(error / bound)[finite].max():.3g} of what is allowed"


def assert_admitted(projections, x, case):
    """No row beyond the limit of its norm is reported, but for those of which rounding decides."""
    if case.norm_limits is None:
        return
    slots = torch.zeros(len(x), dtype=torch.long) if case.slots is None else case.slots.clamp(min=0).long()
    beyond = x.double().norm(dim=-1) > case.norm_limits.double()[slots]
    assert not projections[beyond & ~near_limit(x, case.slots, case.norm_limits)].isfinite().any()


def assert_normed(hidden, residual, weight, eps, bias):
    """hidden is the RMS norm of the stored residual, within one rounding and the float32 sum's error."""
    y = residual.double()
    expected = y / (y.square().mean(-1, keepdim=True) + eps).sqrt() * (weight.double() + bias)
    allowed = ROUNDING[hidden.dtype] * expected.abs() + TINY[hidden.dtype] + 2.0**-20 * expected.abs()
    finite = expected.isfinite() & (expected.abs() < torch.finfo(hidden.dtype).max) & (y.abs() < 1e15)
    assert bool(((hidden.double() - expected).abs() <= allowed)[finite].all())


def in_fp8(rows, scale):
    """What torch makes of rows over their scale."""
    return (rows.float() * scale.reciprocal()).clamp(-448, 448).to(torch.float8_e4m3fn)


def own_scales(rows):
    """(rows, 1), as the engines choose each row's scale."""
    return (rows.float().abs().amax(-1, keepdim=True) / 448).clamp(min=1 / (448 * 512))


def around_fp8(dtype):
    """(1024,) of dtype: each number of eight bits, what lies halfway to the next and just beside that, and what is
    beyond the largest; then zeros.
    """
    codes = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    ties = (codes[1:] + codes[:-1]) / 2
    every = torch.cat([codes, ties, ties * (1 - 2.0**-9), ties * (1 + 2.0**-9), torch.tensor([464.0, 465.0, 6e4])])
    every = torch.cat([every, -every]).to(dtype)
    return torch.nn.functional.pad(every, (0, 1024 - len(every)))


def at_the_edge(dtype, size, place):
    """Rows, axes and floors of two slots: row 0 would leave the dtype's range at element ``place``, along one
    direction; row 1 fires and stays within; row 2 does not fire; row 3 leaves it along the first of two directions and
    is brought back by the second (in float16; elsewhere that is row 1 again).
    """
    large = 60000.0 if dtype == torch.float16 else 3e38
    other = (place + size // 2) % size
    rows = torch.zeros(4, size)
    rows[0, place], rows[0, other] = large, -large
    rows[1, place], rows[1, other] = large / 2, -large / 2
    rows[2, place] = large
    axes = torch.zeros(2, 2, size)
    axes[0, :, [place, other]] = 0.5**0.5
    floors = torch.tensor([[0.25 * large, -math.inf], [70000.0, -1000.0]])
    slots = torch.zeros(4, dtype=torch.int32)
    if dtype == torch.float16:
        axes[1, 0, place], axes[1, 1, place] = 1.0, -1.0
        slots[3] = 1
    else:
        rows[3] = rows[1]
    return rows.to(dtype), axes, floors, slots


def lifts_beside(axes):
    """Another vector for each axis, 1 along it."""
    aside = torch.randn(axes.shape, generator=torch.Generator().manual_seed(11))
    return axes + 0.5 * (aside - (aside * axes).sum(-1, keepdim=True) * axes)


def tensors_of(given):
    return [value for value in tree_leaves(given) if isinstance(value, torch.Tensor)]


def lengthen(tensor):
    """As a buffer with room for three rows more, whose values a fault would show."""
    return torch.cat([tensor, torch.full((3, *tensor.shape[1:]), 7, dtype=tensor.dtype)])


H = 16


def valid_arguments():
    return {
        "hidden": torch.zeros(4, H),
        "axes": unit(2, 1, H),
        "floors": torch.ones(2, 1),
        "slots": torch.zeros(4, dtype=torch.int32),
        "projections": torch.zeros(4, 1),
        "lifts": unit(2, 1, H),
        "targets": torch.full((2, 1), 2.0),
        "norm_limits": torch.ones(2),
    }


def calls_of_each_op(hidden, axes, floors, slots, projections, lifts, targets, norm_limits) -> dict[str, tuple]:
    """Every op with these arguments, as (op, positional, keyword arguments)."""
    library, bank = torch.ops.axiscap, (targets, lifts, norm_limits)
    only = {"targets": targets, "lifts": lifts, "norm_limits": norm_limits, "projections": projections}
    residual, weight = hidden.clone() if hidden.is_contiguous() else hidden, hidden.new_ones(hidden.shape[-1:])
    quantized = torch.zeros(hidden.shape, dtype=torch.float8_e4m3fn)
    stats, layers = torch.zeros(2, 1, len(_C.STAT_FIELDS), dtype=torch.float64), {k: v[None] for k, v in only.items()}
    return {
        "cap_": (library.cap_.default, (hidden, axes, floors, slots), only),
        "cap_.buffers": (library.cap_.buffers, (hidden, axes, floors, slots, projections, *bank), {}),
        "cap": (library.cap.default, (hidden, axes, floors, slots, *bank), {}),
        "project": (library.project.default, (hidden, axes, slots), {}),
        "cap_residual_": (library.cap_residual_.default, (hidden, residual, axes, floors, slots), only),
        "cap_residual_.buffers": (
            library.cap_residual_.buffers,
            (hidden, residual, axes, floors, slots, projections, *bank),
            {},
        ),
        "add_rms_norm_cap_": (
            library.add_rms_norm_cap_.default,
            (hidden, residual, weight, 1e-6, axes, floors, slots),
            only,
        ),
        "add_rms_norm_cap_fp8_": (
            library.add_rms_norm_cap_fp8_.default,
            (quantized, hidden, residual, weight, 1e-6, axes, floors, slots),
            {"scale": torch.ones(1), **only},
        ),
        "cap_layers_": (library.cap_layers_.default, ([hidden], axes[None], floors[None], slots), layers),
        "accumulate_": (library.accumulate_.default, (stats, projections, floors, slots), {}),
    }
