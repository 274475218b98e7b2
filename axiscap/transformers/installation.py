"""Capping in a running transformers model: hooks on its decoder layers, and nothing else of it changed."""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from axiscap import _C, ops
from axiscap.banks import CappedLayer, Installed, by_name
from axiscap.fit import ModelFacts, check_fits
from axiscap.models import decoder_layers, language_class, text_config
from axiscap.profile import CapProfile
from axiscap.transformers.rows import (
    Batching,
    Hook,
    Method,
    Pass,
    Passes,
    Tokens,
    batching_here,
    check_batching,
    mask_of,
    no_sharing,
    one_for_each,
)

#: A row is an attention sink where its norm is more than this many times the median row's: those that are known have
#: 20 to 150 times as much, and no other row 3 times.
SINK_NORM = 8.0

# The decoder layers of every model with an installation.
_installed: weakref.WeakSet[nn.Module] = weakref.WeakSet()


class _CappedLayer(CappedLayer):
    """A layer whose hidden states are torch tensors.

    ``run(output)`` caps the output, keeps its projections and counts them, in one call of the extension. It returns
    False, with nothing done, for all but the plain case: no gradient, and the shape and device that the pass announced.
    """

    def __init__(
        self,
        index: int,
        profiles: Sequence[CapProfile],
        directions: int,
        device: torch.device,
        passes: dict[torch.device, Any],
        position: int,
    ) -> None:
        self._passes, self._position = passes, position
        super().__init__(index, profiles, directions, device)

    def place(self, *parts: Any) -> None:
        super().place(*parts)
        shared = self._passes.setdefault(self.axes.device, _C.Pass())
        self.run: Callable[[object], bool] = _C.layer(self.bank, self.stats, shared, self._position)

    def cap(self, hidden: Tensor, slots: Tensor | None, seen: Pass, *, count: bool = True) -> Tensor:
        """Caps hidden (batch, tokens, H): the same tensor changed, or a new one where autograd or a stride needs it."""
        if hidden.device != self.axes.device:
            self.place(self.axes, self.floors, self.more, self.stats, hidden.device)
        compiling = torch.compiler.is_compiling()
        # Do not count in an exported program: the statistics would be traced, not recorded. (The flag, since
        # torch.compile of 2.10 and 2.11 takes is_exporting() for true.)
        count = count and not (compiling and torch.compiler._is_exporting_flag)
        projections = self._projections(hidden, seen, compiling) if count else None
        if (hidden.requires_grad and torch.is_grad_enabled()) or not hidden.is_contiguous():
            hidden = ops.cap(hidden.contiguous(), self.axes, self.floors, slots, **self.more, projections=projections)
        elif compiling:
            ops.cap_(hidden, self.axes, self.floors, slots, **self.more, projections=projections)
        else:
            self.bank.cap_(hidden, slots, projections)
        if projections is not None:
            ops.accumulate_(self.stats, projections, self.floors, slots)
        return hidden

    def _projections(self, hidden: Tensor, seen: Pass, compiling: bool) -> Tensor:
        """A tensor for the projections of one pass: that of the last pass, if it has as many rows."""
        rows = hidden.numel() // hidden.shape[-1]
        room, _ = seen.projections.get(self.index, (None, None))
        if compiling or room is None or room.shape[0] != rows or room.device != hidden.device:
            room = self.floors.new_empty((rows, self.floors.shape[1]))
        seen.projections[self.index] = room, hidden.shape[:-1]
        return room


class _LayerHook(Hook):
    """The hook of a capped layer: one call of the extension, or of ``call`` for what that does not take."""

    def __init__(self, installation: Installation, layer: _CappedLayer) -> None:
        super().__init__(installation._after_layer(layer))
        self.installation, self.layer = installation, layer

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        # A pass that compiled code began is not announced, even if a graph break runs this hook in Python.
        if not torch.compiler.is_dynamo_compiling() and self.installation._is_announced and self.layer.run(output):
            return None
        return self.call(module, args, output)


class Installation(Installed):
    """Profiles in force in a model, until :meth:`remove` or the end of the ``with`` block. Made by :func:`install`.

    Examples
    --------
    >>> cap = axiscap.install(model, {"mild": profile, "strict": profile.with_floors(profile.floors + 2)})
    >>> cap.select("strict")
    >>> cap.remove()
    """

    _layers: dict[int, _CappedLayer]

    def __init__(
        self,
        model: nn.Module,
        profiles: Mapping[str, CapProfile],
        layers: str | Sequence[nn.Module] | None,
        positions: Literal["all", "generated"],
        allow_other_model: bool,
    ) -> None:
        blocks = decoder_layers(model, layers)
        if positions not in ("all", "generated"):
            raise ValueError(f"positions must be 'all' or 'generated', got {positions!r}")
        if any(block in _installed for block in blocks):
            raise RuntimeError("the model has an AxisCap installation already; remove it first")
        _check_streams(model, blocks[0])
        config = text_config(model)
        facts = ModelFacts.of_configs(
            len(blocks),
            getattr(config, "hidden_size", None),
            getattr(model, "config", None),
            config,
            names=[language_class(model)],
        )
        for name, profile in profiles.items():
            check_fits(name, profile, facts, allow_other_model=allow_other_model)

        self._names = tuple(profiles)
        self._profiles = dict(profiles)
        self._generated_only = positions == "generated"
        self._passes = Passes()
        self._last = self._passes.mine  # the last pass of any thread
        # The last selection and who made it. Once several threads or tasks have selected, it applies to its own only.
        self._selection: list[int] = [0]
        self._chooser: tuple[int, int] | None = None
        self._several_choose = False
        self._chosen_here: contextvars.ContextVar[list[int] | None] = contextvars.ContextVar("chosen", default=None)
        # Each lives as long as its manager.
        self._batching: weakref.WeakSet[Batching] = weakref.WeakSet()
        # Profiles without norm_limits, until the first pass has looked whether they lift a sink.
        self._unlooked = {at for at, known in enumerate(profiles.values()) if not known.knows_sinks}

        directions = self._directions = max(profile.directions for profile in profiles.values())
        indices = sorted({layer for profile in profiles.values() for layer in profile.layers})
        self._native_passes: dict[torch.device, Any] = {}  # of the layers' fast way
        self._is_announced = False  # the pass that began last, to them
        self._layers = {
            index: _CappedLayer(
                index, list(profiles.values()), directions, _device(blocks[index]), self._native_passes, position
            )
            for position, index in enumerate(indices)
        }

        self._undo: list[Any] = []
        self._blocks = blocks
        try:
            owner = self._decoder = _owner(model, blocks[0])
            self._encoder_decoder = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
            for around in _around(model, owner):
                self._undo += self._listen_for_masks(around)
            self._signature = inspect.signature(owner.forward)
            self._undo.append(owner.register_forward_pre_hook(Hook(self._before_model), with_kwargs=True).remove)
            for index, layer in self._layers.items():
                self._undo.append(blocks[index].register_forward_hook(_LayerHook(self, layer)).remove)
                _recorders_last(blocks[index])
            self._listen_to_generate(getattr(model, "_orig_mod", model))
            _installed.update(blocks)
        except BaseException:
            self.remove()
            raise
        _forget_compiled_code()

    def remove(self) -> None:
        """Takes the capping out: the model is as it was. The statistics stay. Once is enough, twice does no harm.

        Examples
        --------
        >>> cap = axiscap.install(model, profile)
        >>> cap.remove()
        """
        while self._undo:
            self._undo.pop()()
        _installed.difference_update(self._blocks)
        _forget_compiled_code()

    def select(self, names: str | Sequence[str | None] | None) -> None:
        """Chooses the profile of the coming forward passes: one for all sequences, or one for each of a batch.

        None leaves a sequence uncapped. A list must have the batch's length; where ``generate`` runs several rows for a
        sequence (beams, ``num_return_sequences``), they follow their sequence.

        The choice is that of the thread or the asynchronous task that makes it, and of tasks and threads that copy its
        context. Others have it too while nobody else chooses; once there are several, one that has not chosen is
        refused.

        Parameters
        ----------
        names
            the name of a profile for all sequences, or one for each sequence of the batch; None: not capped.

        Raises
        ------
        KeyError
            a name that is not installed; the selection stays as it was.

        Examples
        --------
        >>> with axiscap.install(model, {"a": profile}) as cap:
        ...     cap.select([None])
        ...     _ = model(**inputs)
        >>> cap.stats()["a"][18].rows
        0
        """
        wanted = [names] if names is None or isinstance(names, str) else list(names)
        if not wanted:
            raise ValueError("names must not be empty")
        chosen = [self._slot(name) for name in wanted]
        task, this = _task(), self._passes.mine
        this.several_tasks |= this.chooser not in (None, task)
        chooser = threading.get_ident(), task
        self._several_choose |= self._chooser not in (None, chooser)
        self._chooser, self._selection, this.chooser, this.selection = chooser, chosen, task, chosen
        self._chosen_here.set(chosen)

    def _selected(self) -> list[int]:
        """The selection of this thread and task."""
        if torch.compiler.is_compiling():  # which cannot look into a context; generate() does it for its passes
            this = self._passes.mine
            own = this.selection
            if this.several_tasks and not this.generating:
                raise RuntimeError("several tasks of one thread choose profiles, which compiled code cannot tell apart")
        else:
            own = self._chosen_here.get()
        if own is not None:
            return own
        if self._several_choose:
            raise RuntimeError(
                "several threads or tasks chose profiles with select(), and this one has not: call select() here too"
            )
        return self._selection

    def set_floors(self, floors: Tensor, name: str | None = None) -> None:
        """Moves a profile's floors, from the next forward pass on. Each target stays as far above its floor as it was.

        Parameters
        ----------
        floors
            (L, K) float32, in the order of the profile's layers, finite or ``-inf``.
        name
            the profile's; the first one's without it.

        Raises
        ------
        KeyError
            a name that is not installed.
        ValueError
            floors of another shape, or NaN or inf.

        Examples
        --------
        >>> with axiscap.install(model, profile) as cap:
        ...     cap.set_floors(profile.floors - 1)
        """
        name = self._names[0] if name is None else name
        slot = self._slot(name)
        profile = self._profiles[name] = self._profiles[name].with_floors(floors)
        for index in profile.layers:
            layer, moved = self._layers[index], profile.slot_at(index, self._directions)
            layer.floors[slot].copy_(moved.floors)
            targets = layer.more["targets"]
            if targets is not None:
                targets[slot].copy_(moved.targets)

    def projections(self) -> dict[int, Tensor]:
        """The last forward pass's projections by layer: (batch, tokens, K) float32, NaN for tokens left alone.

        The last of this thread, if it had one.

        Returns
        -------
        dict[int, Tensor]
            By layer, in the units of the floors.

        Examples
        --------
        >>> with axiscap.install(model, profile) as cap:
        ...     _ = model(**inputs)
        ...     cap.projections()[18].shape == (*inputs["input_ids"].shape, 1)
        True
        """
        seen = self._last_pass().projections
        return {index: projections.reshape(*shape, -1).clone() for index, (projections, shape) in seen.items()}

    def real(self) -> Tensor | None:
        """Which tokens of that forward pass are no padding, (batch, tokens) bool; None: all of them.

        Returns
        -------
        Tensor or None
            True for tokens that the model reads.

        Examples
        --------
        >>> with axiscap.install(model, profile) as cap:
        ...     _ = model(**tokenizer(["Hi", "Hello there"], padding=True, return_tensors="pt"))
        ...     cap.real().shape[0]
        2
        """
        return self._last_pass().tokens.real

    def _last_pass(self) -> Pass:
        """This thread's; another's where it had none."""
        return self._passes.mine if self._passes.mine.projections else self._last

    def watch(self, see: Callable[[dict[int, Tensor]], None]) -> Callable[[], None]:
        """Has ``see`` called after each forward pass, with what :meth:`projections` gives; returns what ends it.

        Parameters
        ----------
        see
            a function of the projections by layer.

        Returns
        -------
        Callable
            A function without arguments that ends it.

        Examples
        --------
        >>> seen = []
        >>> with axiscap.install(model, profile) as cap:
        ...     end = cap.watch(lambda projections: seen.append(sorted(projections)[0]))
        ...     _ = model(**inputs)
        ...     end()
        >>> seen == [profile.layers[0]]
        True
        """
        return self._decoder.register_forward_hook(Hook(lambda *_: see(self.projections()))).remove

    # Hooks. The pre-hook of the decoder finds the real tokens, makes slots of them and the selection, and announces the
    # pass to the layers.

    def _listen_for_masks(self, around: nn.Module) -> list[Callable[[], None]]:
        """Keeps the two-dimensional mask of a module around the decoder, which may pass a prepared one on."""
        signature = inspect.signature(around.forward)

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = kwargs if len(args) < 2 else signature.bind_partial(*args, **kwargs).arguments
            mask = None if self._encoder_decoder else mask_of(given.get("attention_mask"))
            if mask is not None:
                self._passes.mine.mask = mask

        def after(*_: Any) -> None:
            self._passes.mine.mask = None

        return [
            around.register_forward_pre_hook(Hook(before), with_kwargs=True).remove,
            around.register_forward_hook(Hook(after), always_call=True).remove,
        ]

    def _before_model(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        this = self._passes.mine
        given = kwargs if len(args) < 2 else self._signature.bind_partial(*args, **kwargs).arguments
        if this.announced is not None:
            this.tokens, this.announced = this.announced, None
        elif "cu_seq_lens_q" in given and (batching := batching_here(self._batching)) is not None:
            this.tokens = batching.tokens(given["position_ids"].shape[-1], self._generated_only)
        else:
            # A prepared (4-d) mask does not name the padding; then all tokens count as real.
            mask = mask_of(given.get("attention_mask"))
            this.tokens = Tokens(this.mask if mask is None else mask)
        this.slots = {}
        self._is_announced = False
        if not torch.compiler.is_compiling():
            self._last = this
            ids = args[0] if args else given.get("input_ids")
            self._announce(this, given.get("inputs_embeds") if ids is None else ids)

    def _announce(self, this: Pass, inputs: object) -> None:
        """Announces the pass to the layers' fast way: its shape, its slots, and where its projections go."""
        for native in self._native_passes.values():
            native.end()
        is_traced = torch._C._get_tracing_state() is not None
        if is_traced or not isinstance(inputs, Tensor) or inputs.dim() < 2:
            return
        batch, tokens = inputs.shape[:2]
        if self._unlooked and tokens > 1:  # the slow way looks for sinks
            return
        try:
            for device, native in self._native_passes.items():
                layers = [index if layer.axes.device == device else None for index, layer in self._layers.items()]
                if not any(index is not None for index in layers):
                    continue  # all of them have moved to another device
                slots = self._slots_of(this, device, batch, tokens)
                room = this.room(device, layers, torch.Size((batch, tokens)), self._directions)
                native.begin(batch, tokens, slots, room)
            self._is_announced = True
        except ValueError:  # the inputs are not those of the layers, or the layer itself says what is wrong
            return

    def _after_layer(self, layer: _CappedLayer) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            hidden = output[0] if isinstance(output, tuple | list) else output
            if not isinstance(hidden, Tensor):
                raise TypeError(f"layer {layer.index} returned no hidden states (batch, tokens, H), but {type(output)}")
            if hidden.dim() not in (2, 3):
                raise TypeError(
                    f"layer {layer.index} returned hidden states of shape {tuple(hidden.shape)}; (batch, tokens, H) or "
                    "(tokens, H) can be capped"
                )
            if not torch.compiler.is_compiling() and _has_no_data(hidden):
                return None  # the shape stays
            if not torch.compiler.is_compiling() and torch._C._get_tracing_state() is not None:
                raise RuntimeError(
                    "torch.jit.trace would keep this pass's choice of rows for all others; use torch.compile or "
                    "torch.export, or remove the installation first"
                )
            cap = self._cap_replicated if hasattr(hidden, "to_local") else self._cap
            capped = cap(layer, hidden)
            if capped is hidden:
                return None
            return type(output)((capped, *output[1:])) if isinstance(output, tuple | list) else capped

        return hook

    def _cap(self, layer: _CappedLayer, hidden: Tensor) -> Tensor:
        # A checkpoint computes a layer again during backward, maybe in a thread of autograd. Its rows are those of the
        # last forward pass, and counted already.
        again = not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
        this = self._last if again else self._passes.mine
        slots = self._slots_of(this, hidden.device, *_batch_and_tokens(hidden))
        looks = bool(self._unlooked) and hidden.shape[-2] > 1 and not torch.compiler.is_compiling()
        norms = hidden.detach().float().norm(dim=-1).flatten() if looks else None
        capped = layer.cap(hidden, slots, this, count=not again)
        if norms is not None:
            self._look_for_sinks(layer, norms, slots, this.projections[layer.index][0])
        return capped

    def _cap_replicated(self, layer: _CappedLayer, hidden: Any) -> Tensor:
        """Caps a replicated DTensor, of which each process has all rows."""
        if not all(placement.is_replicate() for placement in hidden.placements):
            raise ValueError(
                f"layer {layer.index} returns a DTensor with placements {hidden.placements}; it can be capped where it "
                "is replicated"
            )
        this, local = self._passes.mine, hidden.to_local()
        slots = self._make_slots(local.device, *_batch_and_tokens(local), this.tokens)
        capped = layer.cap(local, slots, this)
        made: Tensor = type(hidden).from_local(capped, hidden.device_mesh, hidden.placements, run_check=False)
        return made

    def _look_for_sinks(self, layer: _CappedLayer, norms: Tensor, slots: Tensor | None, projections: Tensor) -> None:
        """Warns, in the first pass alone, if a profile without norm_limits lifts a sink."""
        if layer.index == max(self._layers):
            looked, self._unlooked = self._unlooked, set()
        else:
            looked = self._unlooked
        index = torch.zeros(len(norms), dtype=torch.long) if slots is None else slots.long().cpu()
        below = (projections.cpu() < layer.floors.cpu()[index.clamp(min=0)]).any(-1) & (index >= 0)
        lifted = (below & (norms > SINK_NORM * norms.median()).cpu()).nonzero().flatten().tolist()
        mine = [row for row in lifted if int(index[row]) in looked]
        if mine:
            self._unlooked = set()
            row = mine[0]
            warnings.warn(
                f"profile {self._names[int(index[row])]!r} has no norm_limits, and lifts an attention sink: at layer "
                f"{layer.index}, row {row} has {norms[row] / norms.median():.0f} times the median norm and a "
                f"projection of {projections[row, 0].item():.3g}, below its floor. Capping it, as published files "
                "require, can harm ordinary text; a profile with norm_limits leaves it alone",
                stacklevel=2,
            )

    def _slots_of(self, this: Pass, device: torch.device, batch: int, tokens: int) -> Tensor | None:
        key = (device, batch, tokens)
        if key not in this.slots:
            this.slots[key] = self._make_slots(device, batch, tokens, this.tokens)
        return this.slots[key]

    def _make_slots(self, device: torch.device, batch: int, tokens: int, known: Tokens) -> Tensor | None:
        real, generated, chosen = known
        selection = [0] if chosen is not None else self._selected()
        if self._generated_only and generated is None:
            # Outside generate() a decoding step is one new token a sequence; anything longer is a prompt.
            generated = torch.full((tokens,), tokens == 1)
        if selection == [0] and real is None and generated is None and chosen is None:
            return None
        if batch % len(selection) != 0:
            raise ValueError(f"profiles are selected for {len(selection)} sequences, but the batch has {batch}")
        slots = torch.tensor(selection, dtype=torch.int32, device=device)[:, None]
        if chosen is not None:
            slots = chosen.to(device)
        if len(slots) > 1:
            slots = slots.repeat_interleave(batch // len(slots), 0)
        if real is not None:
            if real.shape[0] != batch or real.shape[1] < tokens:
                raise ValueError(
                    f"attention_mask has shape {tuple(real.shape)}, but hidden states have ({batch}, {tokens}) tokens"
                )
            slots = torch.where(real[:, -tokens:].to(device), slots, -1)
        if generated is not None:
            # Rows beyond those of generate() are virtual tokens, in front.
            generated = nn.functional.pad(generated, (max(0, tokens - len(generated)), 0))
            slots = torch.where(generated.to(device), slots, -1)
        return slots.expand(batch, tokens).reshape(-1).contiguous()

    def _leave_batching(self) -> None:
        for batching in list(self._batching):
            batching.undo()

    def _listen_to_generate(self, model: nn.Module) -> None:
        """Wraps generate() and its helpers, which have the 2-d mask and the end of the prompt; a pass does not."""
        if not hasattr(model, "prepare_inputs_for_generation"):
            return
        mask_name = "decoder_attention_mask" if self._encoder_decoder else "attention_mask"
        ids_name = "decoder_input_ids" if self._encoder_decoder else "input_ids"

        def generate(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            this = self._passes.mine
            this.generating += 1
            before = this.selection
            if this.generating == 1:
                ids = kwargs.get(ids_name, args[0] if args else kwargs.get("inputs"))
                embeds, mask = kwargs.get("inputs_embeds"), mask_of(kwargs.get(mask_name))
                this.given = (
                    ids.shape[1] if isinstance(ids, Tensor) and ids.dim() > 1 else 0 if embeds is not None else 1
                )
                # Until the first pass sets it: passes of an assistant model come before.
                lengths = (given.shape[1] for given in (mask, ids, embeds) if isinstance(given, Tensor))
                this.prompt_length = next(lengths, 1)
            try:
                this.selection = self._chosen_here.get() or before
                return original(*args, **kwargs)
            finally:
                this.generating -= 1
                this.selection, this.announced = before, None

        def prepare(original: Callable[..., Any], input_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
            this = self._passes.mine
            inputs = original(input_ids, *args, **kwargs)
            # The inputs include the virtual tokens of prompt tuning.
            found = (mask_of(given.get(mask_name)) for given in (inputs, kwargs))
            mask = next((mask for mask in found if mask is not None), None)
            total = input_ids.shape[1] if mask is None else mask.shape[1]
            ids = inputs.get(ids_name)
            tokens = (inputs["inputs_embeds"] if ids is None else ids).shape[1]
            if kwargs.get("is_first_iteration") and this.generating < 2:
                # Drafted tokens follow the prompt, and count as generated.
                drafted = max(0, input_ids.shape[1] - this.given) if this.generating else 0
                this.prompt_length = total - drafted
            generated = torch.arange(total - tokens, total) >= this.prompt_length if self._generated_only else None
            given = mask_of(kwargs.get(mask_name))
            if generated is not None and ids is None and mask is not None and given is not None:
                generated[: mask.shape[1] - given.shape[1]] = False  # PEFT feeds virtual tokens in every step
            this.announced = Tokens(None if mask is None else mask[:, -tokens:], generated)
            return inputs

        def batch(original: Callable[..., Any], inputs: Any, *args: Any, **kwargs: Any) -> Any:
            # Checked here, in the caller's thread: an error in the manager's thread ends in empty answers.
            one_for_each(self._selected(), len(inputs))
            config = kwargs.get("continuous_batching_config", args[1] if len(args) > 1 else None)
            if config is not None:
                check_batching(config)
            return original(inputs, *args, **kwargs)

        def batching(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            if len(args) < 2 and kwargs.get("continuous_batching_config") is None:
                kwargs["continuous_batching_config"] = no_sharing()
            manager = original(*args, **kwargs)
            check_batching(manager.continuous_batching_config)
            if not any(known.manager is manager for known in self._batching):
                self._batching.add(Batching(manager, self._selected))
            return manager

        calls = {
            "prepare_inputs_for_generation": prepare,
            "generate": generate,
            "generate_batch": batch,
            "init_continuous_batching": batching,
        }
        for name, call in calls.items():
            if hasattr(model, name):
                self._undo.append(Method(model, name, call).undo)
        self._undo.append(self._leave_batching)


def install(
    model: nn.Module,
    profile: CapProfile | Mapping[str, CapProfile],
    *,
    layers: str | Sequence[nn.Module] | None = None,
    positions: Literal["all", "generated"] = "all",
    allow_other_model: bool = False,
) -> Installation:
    """Puts a profile into force in a transformers causal language model.

    Parameters
    ----------
    model
        the model, also wrapped by PEFT or torch.compile, quantised, or spread over devices.
    profile
        one profile, or several by name; the first is in force until :meth:`Installation.select` says
        otherwise.
    layers
        where the decoder layers are, for a model whose structure does not tell; see
        :func:`axiscap.models.decoder_layers`.
    positions
        which tokens are capped: ``"all"`` (as published), or ``"generated"``, those that the model itself
        wrote, and not the prompt's; the virtual tokens of prompt tuning count as the prompt's. The last token that
        is written is never fed back: of a single new token no row is capped. Padding is neither capped nor
        measured.
    allow_other_model
        install a profile that was made for another architecture; its sizes must fit all the same.

    Returns
    -------
    Installation
        The handle, which is also a context manager::

            with axiscap.install(model, axiscap.CapProfile.load("profile.safetensors")) as cap:
                model.generate(**inputs)
                print(cap.stats())

    Raises
    ------
    ValueError
        the profile does not fit the model, or its decoder layers cannot be told.
    TypeError
        profile is something else.
    RuntimeError
        the model has an installation already.

    Examples
    --------
    >>> with axiscap.install(model, profile) as cap:
    ...     tokens = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    >>> cap.stats()["default"][18].rows > 0
    True
    """
    return Installation(model, by_name(profile), layers, positions, allow_other_model)


def _check_streams(model: nn.Module, block: nn.Module) -> None:
    """Checks that the layers pass on one stream, of a dtype that can be capped.

    Raises
    ------
    ValueError
        with the reason.
    """
    config = text_config(model)
    for name in ("altup_num_inputs", "hc_mult"):
        count = getattr(config, name, None)
        if isinstance(count, int) and count > 1:
            raise ValueError(
                f"the decoder layers of {type(model).__name__} pass on {count} residual streams ({name}); "
                "one can be capped"
            )
    floating = (parameter.dtype for parameter in block.parameters() if parameter.is_floating_point())
    if next(floating, torch.float32) == torch.float64:
        raise ValueError("the model is float64; float32, bfloat16 and float16 can be capped")


def _batch_and_tokens(hidden: Tensor) -> tuple[int, int]:
    return (hidden.shape[0], hidden.shape[1]) if hidden.dim() == 3 else (1, hidden.shape[0])


def _has_no_data(hidden: Tensor) -> bool:
    return hidden.is_meta or isinstance(hidden, FakeTensor)


def _task() -> int:
    """A number for the asynchronous task that runs, 0 outside any."""
    try:
        task = asyncio.current_task()
    except RuntimeError:
        return 0
    return 0 if task is None else id(task)


def _recorders_last(block: nn.Module) -> None:
    """Moves the hooks of ``output_hidden_states`` behind the cap, so that capped states are recorded."""
    hooks = block._forward_hooks
    for key in [key for key, hook in hooks.items() if hook.__module__ == "transformers.utils.output_capturing"]:
        hooks[key] = hooks.pop(key)


def _around(model: nn.Module, owner: nn.Module) -> list[nn.Module]:
    """The modules that contain the decoder, outermost first, without the decoder."""
    return [
        module for module in model.modules() if module is not owner and any(part is owner for part in module.modules())
    ]


def _owner(model: nn.Module, block: nn.Module) -> nn.Module:
    """The module whose forward runs the decoder layers: the parent of their list."""
    for module in model.modules():
        for child in module.children():
            if isinstance(child, nn.ModuleList | nn.Sequential) and len(child) and child[0] is block:
                return module
    return model


def _device(block: nn.Module) -> torch.device:
    parameter = next(block.parameters(), None)
    # Offloaded weights are on "meta" until they are needed; the first forward pass moves the bank.
    known = parameter is not None and parameter.device.type != "meta"
    return parameter.device if known and parameter is not None else torch.device("cpu")


def _forget_compiled_code() -> None:
    """Drops compiled code, which does not guard on hooks that are added or removed later."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
