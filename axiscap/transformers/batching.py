"""Continuous batching in transformers: requests of many threads, whose tokens are one row of a pass."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import Any

import torch

from axiscap.transformers.rows import Rows
from axiscap.transformers.selection import Selection, slots_of_sequences
from axiscap.transformers.wrapping import MethodWrapper


class Batching:
    """One manager of continuous batching. A request has the selection of the thread that added it."""

    #: Requests that are remembered: far more than run at once.
    MAX_REQUESTS = 1 << 16

    def __init__(self, manager: Any, selection: Selection) -> None:
        self.manager, self._selection = manager, selection
        self._slots: dict[str, int] = {}  # by request
        self._adding = threading.local()
        self._wrappers = [
            MethodWrapper(manager, "add_request", self._add_request),
            MethodWrapper(manager, "add_requests", self._add_requests),
        ]

    def undo(self) -> None:
        for wrapper in self._wrappers:
            wrapper.undo()

    def _add_request(
        self, original: Callable[..., Any], input_ids: Any, request_id: str | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        slot = getattr(self._adding, "slots", {}).get(id(input_ids))
        if slot is None:
            selected = self._selection.current()
            if len(selected) > 1:
                raise ValueError("a request is one sequence: select one profile for it, or add all with add_requests")
            slot = selected[0]
        if request_id is None:  # the name that the manager would give, needed before the request runs
            with self.manager._request_lock:
                request_id = f"req_{self.manager._request_counter}"
                self.manager._request_counter += 1
        self._slots[request_id] = slot
        if len(self._slots) > self.MAX_REQUESTS:
            del self._slots[next(iter(self._slots))]
        return original(input_ids, request_id, *args, **kwargs)

    def _add_requests(self, original: Callable[..., Any], inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Adds several requests; the manager calls ``add_request`` for each of them."""
        inputs = [list(tokens) for tokens in inputs]
        slots = slots_of_sequences(self._selection.current(), len(inputs))
        self._adding.slots = {id(tokens): slot for tokens, slot in zip(inputs, slots, strict=True)}
        try:
            return original(inputs, *args, **kwargs)
        finally:
            self._adding.slots = {}

    def next_rows(self, tokens: int, generated_only: bool) -> Rows:
        """The rows of the batch that is about to run: ``tokens`` of them, with its padding."""
        io = self.manager.batch_processor.inputs_and_outputs
        io = io if hasattr(io, "requests_in_batch") else io.io_pairs[io.current_pair].host_io
        slots = torch.full((1, tokens), -1, dtype=torch.int32)
        begin = 0
        for request in io.requests_in_batch:
            state, end = request.state, begin + request.query_length
            slots[0, begin:end] = self._slot_of(state.request_id.split("__child#")[0])
            if generated_only:
                prompt_length = state._true_initial_tokens or len(state.initial_tokens)
                first = state.position_offset - request.query_length
                slots[0, begin : max(begin, min(end, begin + prompt_length - first))] = -1
            begin = end
        return Rows(slots=slots)

    def _slot_of(self, request: str) -> int:
        if request not in self._slots:
            raise RuntimeError(f"request {request} was added before the installation, or too long ago")
        return self._slots[request]


def batching_of_this_thread(batchings: Iterable[Batching]) -> Batching | None:
    """The batching whose manager runs the model in this thread."""
    thread = threading.current_thread()
    return next((batching for batching in batchings if batching.manager._generation_thread is thread), None)


def default_batching_config() -> Any:
    from transformers import ContinuousBatchingConfig

    return ContinuousBatchingConfig(allow_block_sharing=False, use_cuda_graph=False)


def check_batching_config(config: Any) -> None:
    """Checks that requests share no keys and values across profiles, and that no graph keeps one batch's slots.

    Raises
    ------
    ValueError
        The message names the setting to change.
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
