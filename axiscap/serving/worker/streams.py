"""Where the residual stream lies in a decoder block's output, and whether a cap there has an effect.

Engines' blocks return one tensor, a pair whose sum is the stream, or a pair whose first tensor is the stream. The three
cannot be told apart by names or types, so both questions are answered by effect: write into the output, run the rest of
the model, and compare the results.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from enum import Enum
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from axiscap.serving.request import SettingsError
from axiscap.serving.worker.buffers import UNSEEN, Buffers

#: A change below this share of the change by a new stream is noise, and one above the other is an effect.
_NOISE, _EFFECT = 0.02, 0.1
#: How far the self-test lifts a row, in units of its projection (at least 1).
_LIFT = 30.0
#: An effect is larger than the difference between two equal runs by this factor.
_OVER_NOISE = 4.0
#: Beyond these, a pass over dummy rows shows nothing: the noise as a share of the result, and a projection.
_MOST_NOISE, _LARGEST = 0.1, 1e6

#: Runs the model on dummy rows and returns its result, flat and in float32.
Run = Callable[[], Tensor]


class Form(Enum):
    """The forms of a block's output."""

    STREAM = "the stream"
    SUM = "a pair whose sum is the stream"
    FIRST = "a pair whose first tensor is the stream"


class Output(NamedTuple):
    """The tensors of a block's output, (rows, H) or (1, rows, H), and what the block returns in place of it.

    ``residual`` is None if there is one tensor.
    """

    hidden: Tensor
    residual: Tensor | None
    returned: Any


#: Reads a block's output from its positional and keyword arguments and what it returned.
Read = Callable[[tuple[Any, ...], dict[str, Any], Any], Output]


def read_returned(returned: Any, layer: int, kind: str) -> Output:
    """Reads a tensor or a tuple of two.

    Raises
    ------
    SettingsError
        The block returned something else.
    """
    hidden, residual = returned if isinstance(returned, tuple) and len(returned) == 2 else (returned, None)
    if not isinstance(hidden, Tensor) or not (hidden.dim() == 2 or (hidden.dim() == 3 and hidden.shape[0] == 1)):
        raise SettingsError(
            f"axiscap: layer {layer}, a {kind}, returns no rows of a stream, but {_described(returned)}"
        )
    return Output(hidden, residual if isinstance(residual, Tensor) else None, returned)


def check_form(output: Output, form: Form, layer: int, kind: str) -> None:
    """Raises SettingsError if a block no longer returns one tensor, or a pair, as it did when its form was learned."""
    if (output.residual is None) != (form is Form.STREAM):
        raise SettingsError(f"axiscap: layer {layer}, a {kind}, no longer returns {form.value}")


def _described(returned: Any) -> str:
    if isinstance(returned, Tensor):
        return f"a tensor of {'x'.join(map(str, returned.shape))}"
    if isinstance(returned, tuple):
        return f"({', '.join(_described(part) for part in returned)})"
    return f"a {type(returned).__name__}"


def learn_form(block: nn.Module, layer: int, read: Read, run: Run) -> Form:
    """Finds out what the output of a block is.

    Each run overwrites the output's tensors in place with random rows. The output is the sum of a pair if exchanging
    the two tensors changes nothing, which is exact in floating point, and its first tensor if the second one changes
    nothing.

    Parameters
    ----------
    block
        A decoder layer whose output the rest of the model, up to the result of ``run``, reads.
    layer
        Its number, for messages.
    read
        Reads the tensors of its output.
    run
        Runs the model. Equal values give equal results, up to noise.

    Raises
    ------
    SettingsError
        The block does not run exactly once, or its output is none of the three forms.
    """
    kind = type(block).__name__
    written: list[Output] = []
    order: tuple[int, int] = (0, 1)

    def overwrite(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], returned: Any) -> Any:
        output = read(args, kwargs, returned)
        written.append(output)
        for tensor, number in zip(output[:2], order, strict=True):
            if tensor is not None:
                rows = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(number))
                tensor.copy_(rows.to(output.hidden.dtype))  # values that both tensors of a pair can hold
        return output.returned

    def result(*numbers: int) -> Tensor:
        nonlocal order
        order = numbers[0], numbers[1]
        written.clear()
        result = run()
        if len(written) != 1:
            raise SettingsError(f"axiscap: layer {layer}, a {kind}, runs {len(written)} times in a pass, and not once")
        return result

    with torch.no_grad(), _hooked(block, overwrite):
        base, other = result(0, 1), result(2, 3)
        hidden, residual, _ = written[0]
        scale = (other - base).norm().item()
        if not (scale > 1e-3 * base.norm().item()):  # also if one of them is not finite
            raise SettingsError(f"axiscap: layer {layer}, a {kind}: what it returns does not change the model's result")
        if residual is None or _is_same(hidden, residual):
            return Form.STREAM if residual is None else Form.FIRST

        def change(*numbers: int) -> float:
            return float((result(*numbers) - base).norm() / scale)

        alone = change(0, 3)
        if alone < _NOISE and change(2, 1) > _EFFECT:
            return Form.FIRST
        if alone > _EFFECT and residual.shape == hidden.shape and change(1, 0) < _NOISE:
            return Form.SUM
    raise SettingsError(
        f"axiscap: layer {layer}, a {kind}, returns a pair, and the model reads neither its first tensor nor its sum"
    )


def _is_same(one: Tensor, other: Tensor) -> bool:
    return one.data_ptr() == other.data_ptr() and one.shape == other.shape


@contextlib.contextmanager
def _hooked(block: nn.Module, hook: Callable[..., Any]) -> Iterator[None]:
    handle = block.register_forward_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


class ZeroedMemory(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Fills new memory with zeros, so that what a dummy pass leaves uninitialised is the same in each run."""

    _EMPTY = (
        torch.ops.aten.empty,
        torch.ops.aten.empty_like,
        torch.ops.aten.empty_strided,
        torch.ops.aten.new_empty,
        torch.ops.aten.new_empty_strided,
    )

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        return result.zero_() if func.overloadpacket in self._EMPTY else result


class InconclusiveError(SettingsError):
    """Passes over equal rows differ too much to show the effect of a cap."""


@torch.no_grad()
def check_effect(buffers: Buffers, run: Run, where: str) -> None:
    """Checks that every layer measures its rows, and that a lift there changes the model's result.

    The content of the buffers is as before when this returns, but for the projections.

    Parameters
    ----------
    buffers
        Those that the model's caps read.
    run
        Runs the model, as it serves, on at least one row.
    where
        What runs, for messages.

    Raises
    ------
    SettingsError
        A layer's cap does not come through.
    InconclusiveError
        The model's dummy rows hold uninitialised memory, or it changes its state from pass to pass.
    """
    if not buffers.layers:
        return
    with buffers.kept():
        axis = torch.nn.functional.normalize(torch.randn(buffers.axes.shape[-1], generator=torch.Generator()), dim=0)
        buffers.axes[:, 0, 0] = buffers.lifts[:, 0, 0] = axis.to(buffers.axes)
        buffers.norm_limits.fill_(torch.inf)
        buffers.floors.fill_(-torch.inf)
        buffers.rows.fill_(0)
        buffers.all_projections.fill_(UNSEEN)
        plain = run()
        measured = buffers.all_projections[:, 0, 0].tolist()
        for layer, projection in zip(buffers.layers, measured, strict=True):
            if projection == UNSEEN:
                raise SettingsError(f"axiscap: layer {layer} of {where} measures no row: the cap is not in it")
        noise, size = (run() - plain).norm().item(), plain.norm().item()
        is_stable = noise <= _MOST_NOISE * size  # false if one of them is not finite
        if not (is_stable and all(abs(projection) < _LARGEST for projection in measured)):
            raise InconclusiveError(f"axiscap: passes of {where} over equal rows differ by {noise:.3g} of {size:.3g}")
        for at, layer in enumerate(buffers.layers):
            buffers.floors.fill_(-torch.inf)
            lifted = measured[at] + _LIFT * max(1.0, abs(measured[at]))
            buffers.floors[at, 0, 0] = buffers.targets[at, 0, 0] = lifted
            change = (run() - plain).norm().item()
            if not change > _OVER_NOISE * noise:  # also if it is not finite
                raise SettingsError(f"axiscap: the cap at layer {layer} of {where} changes nothing")
