"""The hooks on a model: the decoder's begins a pass, and those of the capped layers cap their outputs."""

from __future__ import annotations

import inspect
import warnings
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from axiscap.transformers.batching import Batching, batching_of_this_thread
from axiscap.transformers.layers import ModelLayer
from axiscap.transformers.recompute import before_backward, is_recomputing, mark, nearest_mark
from axiscap.transformers.rows import Pass, PerThread, Rows, SinkCheck, ThreadState, mask_of
from axiscap.transformers.selection import Selection
from axiscap.transformers.wrapping import Hook

#: The arguments by which decoders take a cache of keys and values, or a recurrent state.
_STATES = ("past_key_values", "cache", "cache_params", "state", "mems", "past_key_value", "layer_past")


class LayerHook(Hook):
    """The hook of a capped layer: one call of the extension, or of ``call`` for what the extension does not take.

    It caps a copy. The layer's own tensor may belong to others: to hooks that were there first, to a submodule, or, if
    the layer returns its input, to the caller.
    """

    def __init__(self, hooks: ModelHooks, layer: ModelLayer) -> None:
        super().__init__(lambda module, args, output: hooks.cap_output(layer, args, output))
        self.hooks, self.layer = hooks, layer

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        # A pass that compiled code began is not announced, even if a graph break runs this hook in Python.
        if not torch.compiler.is_dynamo_compiling() and self.hooks.is_announced:
            is_tuple = type(output) is tuple
            hidden = output[0] if is_tuple else output
            if type(hidden) is Tensor:
                capped = hidden.clone()
                if self.layer.cap_announced(capped):
                    return (capped, *output[1:]) if is_tuple else capped
        return self.call(module, args, output)


class ModelHooks:
    """The hooks of one installation.

    Parameters
    ----------
    model, blocks
        the model and its decoder layers.
    layers
        the capped layers, by index.
    announced
        by device, the pass that was announced to the extension.
    generated_only
        whether only rows of tokens that the model wrote are capped.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: list[nn.Module],
        layers: Mapping[int, ModelLayer],
        announced: Mapping[torch.device, Any],
        selection: Selection,
        sinks: SinkCheck,
        generated_only: bool,
    ) -> None:
        #: The handle, which the hooks keep alive as long as they are in the model.
        self.installation: object = None
        self.threads = PerThread()
        self.last = self.threads.mine  # of any thread
        #: Whether the pass that began last was announced to the extension.
        self.is_announced = False
        #: The selection of the first pass, and whether another pass has had another one.
        self._first_selected: list[int] | None = None
        self._has_several_selections = False
        self._has_warned = False
        #: Each lives as long as its manager.
        self.batchings: weakref.WeakSet[Batching] = weakref.WeakSet()
        self.decoder = _owner_of(model, blocks[0])
        self.is_encoder_decoder = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
        self._model, self._blocks, self._layers, self._announced = model, blocks, layers, announced
        self._selection, self._sinks, self._generated_only = selection, sinks, generated_only
        self._signature = inspect.signature(self.decoder.forward)

    def register(self, undo: list[Callable[[], None]]) -> None:
        """Puts the hooks into the model; ``undo`` gets what takes each of them out."""
        for module in _modules_around(self._model, self.decoder):
            self._register_mask_hooks(module, undo)
        before = self.decoder.register_forward_pre_hook(Hook(self._before_decoder), with_kwargs=True)
        undo.append(before.remove)
        undo.append(self.decoder.register_forward_hook(Hook(self._after_decoder)).remove)
        for index, layer in self._layers.items():
            block = self._blocks[index]
            undo.append(_order_of_hooks(block))
            undo.append(block.register_forward_hook(LayerHook(self, layer)).remove)
            _move_recorders_last(block)

    def last_pass(self) -> ThreadState:
        """The state of this thread; that of another one if this one has run no pass."""
        return self.threads.mine if self.threads.mine.projections else self.last

    def _register_mask_hooks(self, module: nn.Module, undo: list[Callable[[], None]]) -> None:
        """Keeps the two-dimensional mask of a module around the decoder, which may pass a prepared one on."""
        signature = inspect.signature(module.forward)

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            arguments = _by_name(signature, args, kwargs)
            mask = None if self.is_encoder_decoder else mask_of(arguments.get("attention_mask"))
            if mask is not None:
                self.threads.mine.mask = mask

        def after(*_: Any) -> None:
            self.threads.mine.mask = None

        undo.append(module.register_forward_pre_hook(Hook(before), with_kwargs=True).remove)
        undo.append(module.register_forward_hook(Hook(after), always_call=True).remove)

    def _before_decoder(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Begins a pass, and announces it to the extension."""
        compiling = torch.compiler.is_compiling()
        thread = self.threads.mine
        if not compiling and is_recomputing():
            thread.recomputed = nearest_mark(self) or self._unmarked_pass(thread, args, kwargs)
            return
        arguments = _by_name(self._signature, args, kwargs)
        inputs = _inputs_of(args, arguments)
        rows = self._rows(thread, arguments, inputs)
        thread.current, thread.recomputed = Pass(rows, self._selected(rows), self._sequences(thread)), None
        self.is_announced = False
        if not compiling:
            self.last = thread
            self._note_selection(thread.current.selected)
            if torch.is_grad_enabled():
                thread.current.banks = {index: layer.tensors for index, layer in self._layers.items()}
            self._announce(thread, inputs)

    def _after_decoder(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Marks the graph at the decoder's output. Compiled layers cannot mark it: for them, backward says which pass
        it has reached, before it computes them again.
        """
        this_pass = self.threads.mine.current
        if torch.compiler.is_compiling() or not this_pass.banks or is_recomputing():
            return
        hidden = next(iter(output.values()), None) if isinstance(output, dict) else _hidden_of(output)
        mark(hidden, self, this_pass)
        before_backward(hidden, lambda: setattr(self.threads.mine, "recomputed", this_pass))

    def _note_selection(self, selected: list[int]) -> None:
        if self._first_selected is None:
            self._first_selected = selected
        self._has_several_selections |= selected != self._first_selected

    def _unmarked_pass(self, thread: ThreadState, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Pass:
        """The pass that a reentrant checkpoint around the model computes again. Its arguments tell its rows, but not
        its selection.
        """
        if self._has_several_selections:
            raise RuntimeError(
                "a checkpoint around the model computes a pass again, and does not tell which profiles were selected "
                "for it: use use_reentrant=False"
            )
        arguments = _by_name(self._signature, args, kwargs)
        rows = self._rows(thread, arguments, _inputs_of(args, arguments))
        return Pass(rows, self._first_selected or [0], self._sequences(thread))

    def _selected(self, rows: Rows) -> list[int]:
        return [0] if rows.slots is not None else self._selection.current()

    def _sequences(self, thread: ThreadState) -> int | None:
        """The sequences of a pass inside generate(), which may run several rows for each; None outside."""
        generation = thread.generation
        if generation.depth == 0:
            return None
        return len(self._selection.current()) if generation.sequences is None else generation.sequences

    def _rows(self, thread: ThreadState, arguments: Mapping[str, Any], inputs: object) -> Rows:
        if thread.announced is not None:
            rows, thread.announced = thread.announced, None
            return rows
        if "cu_seq_lens_q" in arguments and (batching := batching_of_this_thread(self.batchings)) is not None:
            return batching.next_rows(arguments["position_ids"].shape[-1], self._generated_only)
        mask = mask_of(arguments.get("attention_mask"))
        mask = thread.mask if mask is None else mask
        tokens = inputs.shape[1] if isinstance(inputs, Tensor) and inputs.dim() > 1 else None
        if thread.generation.depth and thread.generation.written is not None and tokens is not None:
            # A second pass over the same sequences, as that of classifier-free guidance.
            return thread.generation.rows(mask, tokens, self._generated_only)
        return Rows(mask, self._written_outside_generate(arguments, tokens) if self._generated_only else None)

    def _written_outside_generate(self, arguments: Mapping[str, Any], tokens: int | None) -> int | None:
        """How many of the last tokens of a pass the model wrote, as far as its arguments tell; None: all may be.

        Only the caller knows where the prompt ended. One token behind a state was written; the tokens that begin a
        sequence are a prompt. Of several tokens behind a state, nothing tells what they are.
        """
        if tokens is None or (tokens == 1 and self._has_state(arguments)):
            return None
        if not torch.compiler.is_compiling() and not self._has_warned:
            self._has_warned = True
            count = f"{tokens} tokens" if tokens > 1 else "token"
            warnings.warn(
                'positions="generated" outside generate(): nothing tells which tokens of a pass the model wrote. The '
                f"{count} of this one count as a prompt, and are left alone; a single token behind a cache is capped. "
                'Call generate(), or install the profile with positions="all"',
                stacklevel=2,
            )
        return 0

    def _has_state(self, arguments: Mapping[str, Any]) -> bool:
        """Whether a pass goes on from an earlier one: by a cache or a recurrent state, else by its positions. If the
        decoder takes neither, its single tokens are taken for written ones.
        """
        states = [arguments[name] for name in _STATES if arguments.get(name) is not None]
        if states:
            return any(map(_is_filled, states))
        positions = (arguments.get(name) for name in ("cache_position", "position_ids"))
        if any(isinstance(position, Tensor) and bool((position > 0).any()) for position in positions):
            return True
        return not any(name in self._signature.parameters for name in _STATES)

    def _announce(self, thread: ThreadState, inputs: object) -> None:
        """Announces a pass to the extension: its shape, its slots, and the buffer of its projections."""
        for announced in self._announced.values():
            announced.end()
        is_traced = torch._C._get_tracing_state() is not None
        if is_traced or thread.current.banks or not isinstance(inputs, Tensor) or inputs.dim() < 2:
            return
        batch, tokens = inputs.shape[:2]
        if self._sinks.is_due(tokens):  # the check needs the rows before the cap
            return
        try:
            for device, announced in self._announced.items():
                layers = [index if layer.axes.device == device else None for index, layer in self._layers.items()]
                if not any(index is not None for index in layers):
                    continue  # all of them have moved to another device
                slots = thread.current.slots(device, batch, tokens)
                directions = next(iter(self._layers.values())).floors.shape[1]
                buffer = thread.projection_buffer(device, layers, torch.Size((batch, tokens)), directions)
                announced.begin(batch, tokens, slots, buffer)
            self.is_announced = True
        except ValueError:  # the inputs are not those of the layers, or the layer's own hook says what is wrong
            return

    def mark_layer(self, layer: ModelLayer, args: tuple[Any, ...], capped: Tensor) -> None:
        """Marks the graph at a layer's input and output, for checkpoints. A reentrant one runs without gradients."""
        this_pass = self.threads.mine.current
        if not this_pass.banks:
            return
        for tensor in (*args[:1], capped):
            mark(tensor, self, this_pass)

    def cap_output(self, layer: ModelLayer, args: tuple[Any, ...], output: Any) -> Any:
        """A layer's output with a capped copy of its hidden states; None if it stays as it is."""
        hidden = _hidden_of(output)
        _check_hidden(layer.index, hidden, type(output))
        compiling = torch.compiler.is_compiling()
        if not compiling and (hidden.is_meta or isinstance(hidden, FakeTensor)):
            return None  # no data; the shape stays
        if not compiling and torch._C._get_tracing_state() is not None:
            raise RuntimeError(
                "torch.jit.trace would keep this pass's choice of rows for all others; use torch.compile or "
                "torch.export, or remove the installation first"
            )
        is_again = self.threads.mine.recomputed is not None if compiling else is_recomputing()
        cap = self._cap_again if is_again else self._cap
        capped = _cap_replicated(layer, hidden, cap) if hasattr(hidden, "to_local") else cap(layer, hidden)
        if not compiling and not is_again:
            self.mark_layer(layer, args, capped)
        return _with_hidden(output, capped)

    def _cap(self, layer: ModelLayer, hidden: Tensor) -> Tensor:
        thread = self.threads.mine
        slots = thread.current.slots(hidden.device, *_batch_and_tokens(hidden))
        is_checked = not torch.compiler.is_compiling() and self._sinks.is_due(hidden.shape[-2])
        norms = hidden.detach().float().norm(dim=-1).flatten() if is_checked else None
        capped = layer.cap(hidden, slots, thread)
        if norms is not None:
            self._sinks.check(layer.index, norms, slots, thread.projections[layer.index][0], layer.floors)
        return capped

    def _cap_again(self, layer: ModelLayer, hidden: Tensor) -> Tensor:
        """Caps a layer that backward computes again. Its rows were counted in its pass."""
        marked = None if torch.compiler.is_compiling() else nearest_mark(self)
        earlier = marked or self.threads.mine.recomputed
        if earlier is None:
            raise RuntimeError(f"backward computes layer {layer.index} again, and its forward pass is not known")
        slots = earlier.slots(hidden.device, *_batch_and_tokens(hidden))
        return layer.cap_again(hidden, slots, earlier.banks.get(layer.index, layer.tensors))


def _cap_replicated(layer: ModelLayer, hidden: Any, cap: Callable[[ModelLayer, Tensor], Tensor]) -> Tensor:
    """Caps a replicated DTensor, of which each process has all rows."""
    if not all(placement.is_replicate() for placement in hidden.placements):
        raise ValueError(
            f"layer {layer.index} returns a DTensor with placements {hidden.placements}; it can be capped where it is "
            "replicated"
        )
    capped = cap(layer, hidden.to_local())
    distributed: Tensor = type(hidden).from_local(capped, hidden.device_mesh, hidden.placements, run_check=False)
    return distributed


def _is_filled(state: Any) -> bool:
    """Whether a cache or a recurrent state holds an earlier pass. One that does not tell its length was returned by a
    pass.
    """
    try:
        return bool(state.get_seq_length() > 0)
    except (AttributeError, ValueError, TypeError, IndexError):
        return not isinstance(state, tuple | list) or len(state) > 0


def _inputs_of(args: tuple[Any, ...], arguments: Mapping[str, Any]) -> object:
    """The ids or embeddings of a call of the decoder."""
    inputs = args[0] if args else arguments.get("input_ids")
    return arguments.get("inputs_embeds") if inputs is None else inputs


def _by_name(signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Mapping[str, Any]:
    """The arguments of a call by name. A lone positional argument is the input, whose name is not needed."""
    return kwargs if len(args) < 2 else signature.bind_partial(*args, **kwargs).arguments


def _hidden_of(output: Any) -> Any:
    return output[0] if isinstance(output, tuple | list) and output else output


def _with_hidden(output: Any, hidden: Tensor) -> Any:
    """A layer's output with other hidden states."""
    if not isinstance(output, tuple | list):
        return hidden
    make = getattr(type(output), "_make", type(output))  # of named tuples
    return make((hidden, *output[1:]))


def _check_hidden(layer: int, hidden: object, kind: type) -> None:
    """Checks that a layer returned hidden states that can be capped.

    Raises
    ------
    TypeError
        It returned something else.
    """
    if not isinstance(hidden, Tensor):
        raise TypeError(f"layer {layer} returned no hidden states (batch, tokens, H), but {kind}")
    if hidden.dim() not in (2, 3):
        raise TypeError(
            f"layer {layer} returned hidden states of shape {tuple(hidden.shape)}; (batch, tokens, H) or "
            "(tokens, H) can be capped"
        )


def _batch_and_tokens(hidden: Tensor) -> tuple[int, int]:
    return (hidden.shape[0], hidden.shape[1]) if hidden.dim() == 3 else (1, hidden.shape[0])


def _move_recorders_last(block: nn.Module) -> None:
    """Moves the hooks of ``output_hidden_states`` behind the cap, so that capped states are recorded."""
    hooks = block._forward_hooks
    for key in [key for key, hook in hooks.items() if hook.__module__ == "transformers.utils.output_capturing"]:
        hooks[key] = hooks.pop(key)


def _order_of_hooks(block: nn.Module) -> Callable[[], None]:
    """A function that puts the hooks of now back into their order, in front of later ones."""
    hooks, keys = block._forward_hooks, list(block._forward_hooks)

    def restore() -> None:
        later = [key for key in hooks if key not in keys]
        for key in [*keys, *later]:
            if key in hooks:
                hooks[key] = hooks.pop(key)

    return restore


def _modules_around(model: nn.Module, decoder: nn.Module) -> list[nn.Module]:
    """The modules that contain the decoder, outermost first, without the decoder."""
    return [
        module
        for module in model.modules()
        if module is not decoder and any(part is decoder for part in module.modules())
    ]


def _owner_of(model: nn.Module, block: nn.Module) -> nn.Module:
    """The module whose forward runs the decoder layers: the parent of their list."""
    for module in model.modules():
        for child in module.children():
            if isinstance(child, nn.ModuleList | nn.Sequential) and len(child) and child[0] is block:
                return module
    return model
