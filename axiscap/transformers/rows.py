"""Per-thread state of a forward pass, and the method wrappers that collect it."""

from __future__ import annotations

import copy
import functools
import threading
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Tokens(NamedTuple):
    """The tokens of a forward pass."""

    real: Tensor | None = None  # no padding; None: all tokens
    generated: Tensor | None = None  # written by the model; None: not needed
    chosen: Tensor | None = None  # the slot of each token, (1, tokens), if the tokens of many sequences are one row


def mask_of(given: object) -> Tensor | None:
    return given.bool() if isinstance(given, Tensor) and given.dim() == 2 else None


class Pass:
    """One thread's forward pass, and the projections that it left."""

    def __init__(self) -> None:
        self.tokens = Tokens()
        self.announced: Tokens | None = None  # by generate(), for the coming pass
        self.mask: Tensor | None = None  # two-dimensional, given to a module around the decoder
        self.slots: dict[tuple[torch.device, int, int], Tensor | None] = {}  # by device, batch and tokens
        self.selection: list[int] | None = None  # the context variable, for compiled code
        self.chooser: int | None = None  # the task that selected last
        self.several_tasks = False
        self.projections: dict[int, tuple[Tensor, torch.Size]] = {}  # by layer, with the shape of its tokens
        self._rooms: dict[torch.device, tuple[Tensor, dict[int, tuple[Tensor, torch.Size]]]] = {}
        # generate() sets these: how many calls run (an assistant model's call runs inside its model's), how many tokens
        # the input has, and at which position the prompt ends.
        self.generating = self.given = self.prompt_length = 0

    def room(self, device: torch.device, layers: list[int | None], shape: torch.Size, directions: int) -> Tensor:
        """(layers, rows, K) float32 for the projections of a pass, NaN until a layer has run.

        ``layers`` has None for those on another device. The last pass's tensor is used again if it fits.
        """
        room, parts = self._rooms.get(device, (None, {}))
        if room is None or next(iter(parts.values()))[1] != shape:
            with torch.inference_mode(False):
                room = torch.full((len(layers), shape.numel(), directions), torch.nan, device=device)
            parts = {layer: (part, shape) for layer, part in zip(layers, room, strict=True) if layer is not None}
            self._rooms[device] = room, parts
        self.projections.update(parts)
        return room


class Passes(threading.local):
    """The pass of each thread. An object inside, since torch.compile loses changes of a thread-local's attributes."""

    def __init__(self) -> None:
        self.mine = Pass()


def left_out(*_: object, **__: object) -> None:
    """No-op that replaces the hook when a model is copied or pickled."""


def left_out_hook() -> Callable[..., None]:
    return left_out


class Hook:
    """A hook that is not copied or pickled with its model."""

    def __init__(self, call: Callable[..., Any]) -> None:
        self.call = call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.call(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., None]:
        return left_out

    def __reduce__(self) -> tuple[Any, ...]:
        return left_out_hook, ()


class Method:
    """Wraps a method of a model, with its signature, which transformers inspects. A copy of the model is not wrapped.

    Parameters
    ----------
    call
        is called with the method and its arguments.
    """

    def __init__(self, model: Any, name: str, call: Callable[..., Any]) -> None:
        self.model, self.name, self.call = model, name, call
        self.own = model.__dict__.get(name)
        self.original = getattr(model, name)
        functools.update_wrapper(self, self.original)
        model.__dict__[name] = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.call(self.original, *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if self.own is not None:
            return copy.deepcopy(self.own, memo)
        return getattr(type(self.model), self.name).__get__(memo.get(id(self.model), self.model))

    def __reduce__(self) -> tuple[Any, ...]:
        return (copy.copy, (self.own,)) if self.own is not None else (getattr, (self.model, self.name))

    def undo(self) -> None:
        """Restores the method. If somebody wrapped this wrapper, it stays and passes its arguments on."""
        self.call = lambda original, *args, **kwargs: original(*args, **kwargs)
        if self.model.__dict__.get(self.name) is not self:
            return
        if self.own is None:
            del self.model.__dict__[self.name]
        else:
            self.model.__dict__[self.name] = self.own


class Batching:
    """One manager of continuous batching in transformers.

    Requests come from many threads and run in the manager's thread, with their tokens in one row. A request has the
    selection of the thread that added it.
    """

    MAX_REQUESTS = 1 << 16  # that are remembered: far more than are under way

    def __init__(self, manager: Any, selected: Callable[[], list[int]]) -> None:
        self.manager, self._selected = manager, selected
        self._slots: dict[str, int] = {}
        self._adding = threading.local()
        self._methods = [
            Method(manager, "add_request", self._add),
            Method(manager, "add_requests", self._add_all),
        ]

    def undo(self) -> None:
        for method in self._methods:
            method.undo()

    def _add(
        self, original: Callable[..., Any], input_ids: Any, request_id: str | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        slot = getattr(self._adding, "slots", {}).get(id(input_ids))
        if slot is None:
            selection = self._selected()
            if len(selection) > 1:
                raise ValueError("a request is one sequence: select one profile for it, or add all with add_requests")
            slot = selection[0]
        if request_id is None:  # the manager's own name, needed before the request runs
            with self.manager._request_lock:
                request_id = f"req_{self.manager._request_counter}"
                self.manager._request_counter += 1
        self._slots[request_id] = slot
        if len(self._slots) > self.MAX_REQUESTS:
            del self._slots[next(iter(self._slots))]
        return original(input_ids, request_id, *args, **kwargs)

    def _add_all(self, original: Callable[..., Any], inputs: Any, *args: Any, **kwargs: Any) -> Any:
        inputs = [list(tokens) for tokens in inputs]
        slots = one_for_each(self._selected(), len(inputs))
        self._adding.slots = {id(tokens): slot for tokens, slot in zip(inputs, slots, strict=True)}
        try:
            return original(inputs, *args, **kwargs)
        finally:
            self._adding.slots = {}

    def tokens(self, count: int, generated_only: bool) -> Tokens:
        """The tokens of the batch that is about to run, which are ``count`` with its padding."""
        io = self.manager.batch_processor.inputs_and_outputs
        io = io if hasattr(io, "requests_in_batch") else io.io_pairs[io.current_pair].host_io
        chosen, written = torch.full((1, count), -1, dtype=torch.int32), torch.zeros(count, dtype=torch.bool)
        at = 0
        for request in io.requests_in_batch:
            state, end = request.state, at + request.query_length
            name = state.request_id.split("__child#")[0]
            if name not in self._slots:
                raise RuntimeError(f"request {name} was added before the installation, or too long ago")
            chosen[0, at:end] = self._slots[name]
            prompt = state._true_initial_tokens or len(state.initial_tokens)
            written[at:end] = (
                torch.arange(state.position_offset - request.query_length, state.position_offset) >= prompt
            )
            at = end
        return Tokens(None, written if generated_only else None, chosen)


def one_for_each(selection: list[int], count: int) -> list[int]:
    """The slots of ``count`` sequences: a selection is for all of them, or one for each.

    Raises
    ------
    ValueError
        a selection for another number of sequences.
    """
    if len(selection) > 1 and len(selection) != count:
        raise ValueError(f"profiles are selected for {len(selection)} sequences, but there are {count}")
    return selection if len(selection) == count else selection * count


def no_sharing() -> Any:
    from transformers import ContinuousBatchingConfig

    return ContinuousBatchingConfig(allow_block_sharing=False, use_cuda_graph=False)


def check_batching(config: Any) -> None:
    """Raises if requests would share keys and values across profiles, or a captured graph one batch's slots.

    Raises
    ------
    ValueError
        with the setting to change.
    """
    if config.allow_block_sharing:
        raise ValueError(
            "continuous batching shares the keys of a prefix between requests, which may be under other profiles: give "
            "it a ContinuousBatchingConfig with allow_block_sharing=False"
        )
    if torch.cuda.is_available() and config.use_cuda_graph not in (False, (False, False)):
        raise ValueError(
            "a captured graph would keep one batch's rows for all others: give continuous batching a "
            "ContinuousBatchingConfig with use_cuda_graph=False"
        )


def batching_here(managers: Iterable[Batching]) -> Batching | None:
    """The manager whose thread this is."""
    here = threading.current_thread()
    return next((known for known in managers if known.manager._generation_thread is here), None)
