"""The base of an adapter's part in a worker: it finds the layers of an engine's model, and caps their outputs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from axiscap.serving.request import SettingsError
from axiscap.serving.settings import Settings
from axiscap.serving.worker.buffers import Counts
from axiscap.serving.worker.streams import Form, Read, Run, learn_form
from axiscap.serving.worker.worker import Worker


class Rows(NamedTuple):
    """Whose rows a step computes, in order: for each request its id, how many, how many of them are of its prompt, and
    the position in its sequence of the first.
    """

    names: Sequence[str]
    counts: Counts
    prompts: Counts
    starts: Counts


class Model(ABC):
    """In a worker: where a block's output is complete, and whose rows a step computes."""

    worker: Worker
    #: Why nothing may be served: the cap was not seen to come through yet, or no longer does.
    fault: SettingsError | None = SettingsError("axiscap: the cap was not tested before the first step")
    _blocks: nn.ModuleList

    def hold(
        self,
        model: nn.Module,
        settings: Settings,
        *,
        layers: int,
        max_rows: int,
        device: torch.device,
        requests: int,
        totals: Path | None,
        markers: tuple[int, int] | None,
    ) -> None:
        """Finds the layers of a loaded model and makes the buffers for them.

        Parameters
        ----------
        layers
            of the whole model; those of other pipeline ranks are left out.
        max_rows, requests, totals, markers
            as for :class:`axiscap.serving.worker.Worker`.

        Raises
        ------
        SettingsError
            The model's layers cannot be told.
        """
        self._blocks = engine_layers(model, layers)
        held = [layer for layer in settings.layers if not _is_elsewhere(self._blocks[layer])]
        self.worker = Worker(settings, held, max_rows, device, requests, totals, markers)

    def cap_blocks(self, run: Run) -> None:
        """Learns what the output of each held layer is, and has it capped in every pass from now on.

        Parameters
        ----------
        run
            Runs the model on dummy rows, outside any compiled or captured graph.

        Raises
        ------
        SettingsError
            The output of a layer is no stream that a cap can change.
        """
        buffers = self.worker.buffers
        forms = [self._form(layer, run) for layer in buffers.layers]
        for at, (layer, form) in enumerate(zip(buffers.layers, forms, strict=True)):
            self.cap_block(self._blocks[layer], layer, form, buffers.tensors(at))

    def _form(self, layer: int, run: Run) -> Form:
        """The form of a layer's output. The last layer of a pipeline rank has no reader here; its form is that of
        another layer of the same class.
        """
        block, number = self._blocks[layer], layer
        if layer + 1 < len(self._blocks) and _is_elsewhere(self._blocks[layer + 1]):
            alike = [at for at in range(layer) if type(self._blocks[at]) is type(block)]
            if not alike:
                kind = type(block).__name__
                raise SettingsError(f"axiscap: layer {layer} is the only {kind} of its pipeline rank, and the last")
            number = alike[-1]
        return learn_form(self._blocks[number], number, self.reader(self._blocks[number], number), run)

    @abstractmethod
    def reader(self, block: nn.Module, layer: int) -> Read:
        """Reads the complete output of a block."""

    @abstractmethod
    def cap_block(self, block: nn.Module, layer: int, form: Form, tensors: tuple[Tensor, ...]) -> None:
        """Has a block's complete output capped by the op ``.buffers``, in every pass.

        Parameters
        ----------
        tensors
            what that op takes behind the streams, at addresses that stay.
        """

    @abstractmethod
    def rows(self, step: Any) -> Rows:
        """Whose rows a step of the engine computes."""


def _is_elsewhere(block: nn.Module) -> bool:
    """Whether another pipeline rank holds the layer."""
    return type(block).__name__ == "PPMissingLayer"


def run_again(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Calls a forward pass with copies of its tensors, also those of another pipeline rank: it may change them."""

    def copied(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.clone()
        if isinstance(tensors := getattr(value, "tensors", None), dict):
            return type(value)({name: copied(tensor) for name, tensor in tensors.items()})
        return value

    return forward(*map(copied, args), **{name: copied(value) for name, value in kwargs.items()})


def flat_result(parts: Iterable[Any]) -> Tensor:
    """A copy of the tensors that a pass returns, as one vector of float32."""
    return torch.cat([part.reshape(-1).float() for part in parts if isinstance(part, Tensor)])


def engine_layers(model: nn.Module, count: int) -> nn.ModuleList:
    """The decoder layers of an engine's language model, by structure: its one list of as many modules as it has layers.

    Raises
    ------
    SettingsError
        there is not one such list; the message says what there is.
    """
    lists = {name: part for name, part in model.named_modules() if isinstance(part, nn.ModuleList)}
    matching = [part for part in lists.values() if len(part) == count]
    if len(matching) != 1:
        listed = ", ".join(f"{name} ({len(part)})" for name, part in lists.items()) or "none"
        kind = type(model).__name__
        raise SettingsError(f"axiscap: cannot tell the {count} decoder layers of {kind}; its module lists: {listed}")
    return matching[0]
