"""The rows of a forward pass: which are capped, and in which slot of the bank."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from axiscap.transformers.endings import Endings

#: A row is an attention sink if its norm is more than this multiple of the median row's. Known sinks have 20 to 150
#: times the median; no other row has 3 times.
SINK_NORM = 8.0


class Rows(NamedTuple):
    """The facts about the rows of a pass that its layers do not see."""

    #: (batch, tokens or more) bool: no padding. The last columns are those of the pass. None: no row is padding.
    real: Tensor | None = None
    #: How many of the last tokens the model wrote; the others are left alone. None: all rows may be capped.
    written: int | None = None
    #: (1, tokens) int32: the slot of each row, where the tokens of many sequences are one row.
    slots: Tensor | None = None


class Pass:
    """One forward pass: its rows, and the slots of its sequences."""

    def __init__(self, rows: Rows, selected: list[int], sequences: int | None = None) -> None:
        self.rows, self.selected = rows, selected
        #: The number of sequences, if several rows of the batch belong to each; None: each row is one.
        self.sequences = sequences
        #: The banks by layer, if the pass began with gradients, so that backward may compute its layers again.
        self.banks: dict[int, Any] = {}
        self._slots: dict[tuple[torch.device, int, int], Tensor | None] = {}

    def slots(self, device: torch.device, batch: int, tokens: int) -> Tensor | None:
        """(batch * tokens,) int32, -1 for rows that are left alone; None if all rows have slot 0."""
        key = (device, batch, tokens)
        if key not in self._slots:
            self._slots[key] = self.make_slots(device, batch, tokens)
        return self._slots[key]

    def make_slots(self, device: torch.device, batch: int, tokens: int) -> Tensor | None:
        real, written, slots = self.rows
        if slots is None and real is None and written is None and self.selected == [0]:
            return None
        slots = self._by_sequence(device, batch) if slots is None else slots.to(device)
        if real is not None:
            if real.shape[0] != batch or real.shape[1] < tokens:
                raise ValueError(
                    f"attention_mask has shape {tuple(real.shape)}, but hidden states have ({batch}, {tokens}) tokens"
                )
            slots = torch.where(real[:, -tokens:].to(device), slots, -1)
        if written is not None:
            slots = torch.where(torch.arange(tokens, device=device) >= tokens - written, slots, -1)
        return slots.expand(batch, tokens).reshape(-1).contiguous()

    def _by_sequence(self, device: torch.device, batch: int) -> Tensor:
        """(batch, 1), or (1, 1) for one slot of all sequences."""
        selected, sequences = self.selected, self.sequences or batch
        if len(selected) > 1 and (len(selected) != sequences or batch % sequences != 0):
            raise ValueError(f"profiles are selected for {len(selected)} sequences, but the batch has {sequences}")
        slots = torch.tensor(selected, dtype=torch.int32, device=device)[:, None]
        return slots.repeat_interleave(batch // len(slots), 0) if len(slots) > 1 else slots


class Generation:
    """The generate() call that a thread runs, and the sequences in it when the last pass was prepared."""

    def __init__(self) -> None:
        #: Nested calls: an assistant model's runs inside its model's.
        self.depth = 0
        #: The sequences that the caller gave, if known. generate() may run several rows for each.
        self.sequences: int | None = None
        self.prompt_length, self._dimensions = 0, 2
        #: Whether the call's arguments tell the length of the prompt; else the first pass does.
        self.has_given_prompt = False
        #: Tokens of each sequence that the model wrote, or drafted; None before the first pass.
        self.written: int | None = None
        #: (batch, written): which of them lie behind the end of their answer.
        self.behind: Tensor | None = None

    def begin(self, ids: Tensor) -> None:
        """Takes the tokens of the first pass for the prompt, unless its length is known."""
        self._dimensions = ids.dim()
        if self.depth == 0:
            self.prompt_length = ids.shape[1]
        elif self.depth == 1 and not self.has_given_prompt:
            self.prompt_length = max(self.prompt_length, ids.shape[1])

    def advance(self, ids: Tensor, endings: Endings | None) -> None:
        """Takes the sequences (batch, tokens) before a pass.

        A speech model goes on with the codes that it wrote, (batch, tokens, codebooks), without its prompt.
        """
        prompt_length = 0 if ids.dim() > self._dimensions else self.prompt_length
        self.written = max(0, ids.shape[1] - prompt_length)
        self.behind = endings.behind(ids, prompt_length) if endings is not None and ids.dim() == 2 else None

    def rows(self, mask: Tensor | None, tokens: int, generated_only: bool) -> Rows:
        """The rows of a pass over the last ``tokens`` of the sequences."""
        real = None if mask is None else mask[:, -tokens:]
        behind = self.behind
        if behind is not None and (real is None or len(real) == len(behind)):
            behind = nn.functional.pad(behind, (max(0, tokens - behind.shape[1]), 0))[:, -tokens:]
            real = ~behind if real is None else real.to(behind.device) & ~behind
        return Rows(real, min(tokens, self.written or 0) if generated_only else None)


class ThreadState:
    """The passes of one thread: the current one, and what is known of the next."""

    def __init__(self) -> None:
        self.current = Pass(Rows(), [0])
        #: The pass that backward computes again, for layers that cannot reach a mark.
        self.recomputed: Pass | None = None
        #: By generate(), for the next pass.
        self.announced: Rows | None = None
        #: (batch, tokens), given to a module around the decoder.
        self.mask: Tensor | None = None
        self.generation = Generation()
        self.endings: Endings | None = None
        #: Of the last pass, by layer, each with the shape of its tokens.
        self.projections: dict[int, tuple[Tensor, torch.Size]] = {}
        self._buffers: dict[torch.device, tuple[Tensor, dict[int, tuple[Tensor, torch.Size]]]] = {}

    def projection_buffer(
        self, device: torch.device, layers: list[int | None], shape: torch.Size, directions: int
    ) -> Tensor:
        """(layers, rows, K) float32 for the projections of a pass, NaN until a layer has run.

        ``layers`` has None for those on another device. The last pass's buffer is used again if it fits.
        """
        buffer, parts = self._buffers.get(device, (None, {}))
        if buffer is None or next(iter(parts.values()))[1] != shape:
            with torch.inference_mode(False):
                buffer = torch.full((len(layers), shape.numel(), directions), torch.nan, device=device)
            parts = {layer: (part, shape) for layer, part in zip(layers, buffer, strict=True) if layer is not None}
            self._buffers[device] = buffer, parts
        self.projections.update(parts)
        return buffer


class PerThread(threading.local):
    """An object inside, since torch.compile loses changes of a thread-local's own attributes."""

    def __init__(self) -> None:
        self.mine = ThreadState()


def mask_of(value: object) -> Tensor | None:
    """A two-dimensional attention mask as bool. A prepared mask (4-d) does not tell which tokens are padding."""
    return value.bool() if isinstance(value, Tensor) and value.dim() == 2 else None


class SinkCheck:
    """Warns once, in the first pass of several tokens, if a profile without norm_limits lifts an attention sink.

    Parameters
    ----------
    names
        of the profiles, by slot.
    unchecked
        the slots of profiles without norm_limits.
    last_layer
        the last capped layer, which ends the check.
    """

    def __init__(self, names: Sequence[str], unchecked: set[int], last_layer: int) -> None:
        self._names, self._unchecked, self._last_layer = names, unchecked, last_layer

    def is_due(self, tokens: int) -> bool:
        """Whether a pass is checked. One token has no other rows to be compared with."""
        return bool(self._unchecked) and tokens > 1

    def check(self, layer: int, norms: Tensor, slots: Tensor | None, projections: Tensor, floors: Tensor) -> None:
        """Checks one layer: norms (rows,), slots (rows,), projections (rows, K) before the cap, floors (S, K)."""
        unchecked = self._unchecked
        if layer == self._last_layer:
            self._unchecked = set()
        index = torch.zeros(len(norms), dtype=torch.long) if slots is None else slots.long().cpu()
        is_below = (projections.cpu() < floors.cpu()[index.clamp(min=0)]).any(-1) & (index >= 0)
        is_sink = (norms > SINK_NORM * norms.median()).cpu()
        lifted = [row for row in (is_below & is_sink).nonzero().flatten().tolist() if int(index[row]) in unchecked]
        if not lifted:
            return
        self._unchecked = set()
        row = lifted[0]
        warnings.warn(
            f"profile {self._names[int(index[row])]!r} has no norm_limits, and lifts an attention sink: at layer "
            f"{layer}, row {row} has {norms[row] / norms.median():.0f} times the median norm and a "
            f"projection of {projections[row, 0].item():.3g}, below its floor. Capping it, as published files "
            "require, can harm ordinary text; a profile with norm_limits leaves it alone",
            stacklevel=2,
        )
