"""Capping in a running transformers model: hooks on its decoder layers, and nothing else of it changed."""

from __future__ import annotations

import inspect
import sys
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from axiscap import _C, ops
from axiscap.models import decoder_layers, text_config
from axiscap.profile import CapProfile
from axiscap.stats import LayerStats, layer_stats

#: The name of a profile that was installed without one.
DEFAULT_NAME = "default"

#: A row is an attention sink where its norm is more than this many times the median row's: those that are known have
#: 20 to 150 times as much, and no other row 3 times.
SINK_NORM = 8.0

# The first decoder layer of every model with an installation.
_installed: weakref.WeakSet[nn.Module] = weakref.WeakSet()


class _Tokens(NamedTuple):
    """The tokens of a forward pass: which are real (None: all), which the model wrote (None: it does not matter), and
    their positions in their sequences, (1 or batch, tokens), or where they begin, or None (from 0).
    """

    real: Tensor | None = None
    generated: Tensor | None = None
    positions: Tensor | None = None


def _mask_of(given: object) -> Tensor | None:
    return given.bool() if isinstance(given, Tensor) and given.dim() == 2 else None


class _CappedLayer:
    """The bank of one layer, with a slot for each profile, and what was measured there."""

    def __init__(self, index: int, profiles: Sequence[CapProfile], directions: int, device: torch.device) -> None:
        self.index = index
        slots = zip(*(profile.slot_at(index, directions) for profile in profiles), strict=True)
        axes, lifts, floors, limits = (torch.stack(part) for part in slots)
        given = lifts if any(profile.lifts is not None for profile in profiles) else None
        bounds = limits if bool(limits.isfinite().any()) else None
        more = {"lifts": given, "limits": bounds}
        self.place(axes, floors, more, ops.new_stats(len(profiles), directions), device)
        self.projections: Tensor | None = None
        self.shape: torch.Size | None = None

    def place(
        self,
        axes: Tensor,
        floors: Tensor,
        more: Mapping[str, Tensor | None],
        stats: Tensor,
        device: torch.device,
    ) -> None:
        # Contiguous copies of our own: a profile that its owner changes later does not change the model.
        def own(tensor: Tensor) -> Tensor:
            return tensor.to(device, copy=True, memory_format=torch.contiguous_format)

        self.axes, self.floors = own(axes), own(floors)
        self.more = {name: None if tensor is None else own(tensor) for name, tensor in more.items()}
        self.stats = stats.to(device)
        self.bank = _C.Bank(self.axes, self.floors, **self.more)

    def cap(self, hidden: Tensor, slots: Tensor | None) -> Tensor:
        """Caps hidden (batch, tokens, H): the same tensor changed, or a new one where autograd or a stride needs it."""
        if hidden.device != self.axes.device:
            self.place(self.axes, self.floors, self.more, self.stats, hidden.device)
        rows = hidden.numel() // hidden.shape[-1]
        if self.projections is None or self.projections.shape[0] != rows or torch.compiler.is_compiling():
            self.projections = self.floors.new_empty((rows, self.floors.shape[1]))
        self.shape = hidden.shape[:-1]
        if (hidden.requires_grad and torch.is_grad_enabled()) or not hidden.is_contiguous():
            hidden = ops.cap(
                hidden.contiguous(), self.axes, self.floors, slots, **self.more, projections=self.projections
            )
        elif torch.compiler.is_compiling():
            ops.cap_(hidden, self.axes, self.floors, slots, **self.more, projections=self.projections)
        else:
            self.bank.cap_(hidden, slots, self.projections)
        ops.accumulate_(self.stats, self.projections, self.floors, slots)
        return hidden


class Installation:
    """Profiles in force in a model, until :meth:`remove` or the end of the ``with`` block. Made by :func:`install`."""

    def __init__(
        self,
        model: nn.Module,
        profiles: Mapping[str, CapProfile],
        layers: str | Sequence[nn.Module] | None,
        positions: Literal["all", "generated"],
    ) -> None:
        blocks = decoder_layers(model, layers)
        if positions not in ("all", "generated"):
            raise ValueError(f"positions must be 'all' or 'generated', got {positions!r}")
        if blocks[0] in _installed:
            raise RuntimeError("the model has an AxisCap installation already; remove it first")
        hidden_size = getattr(text_config(model), "hidden_size", None)
        for name, profile in profiles.items():
            _check_fits(name, profile, len(blocks), hidden_size)

        self._names = tuple(profiles)
        self._profiles = dict(profiles)
        self._generated_only = positions == "generated"
        self._selection: list[int] = [0]
        self._prompt_length = 0
        # What generate() said of the coming forward pass.
        self._announced: _Tokens | None = None
        self._tokens = _Tokens()
        self._sinks = {at: known.sinks for at, known in enumerate(profiles.values()) if known.sinks}
        # Profiles that say nothing of sinks, until it was seen once whether they lift one.
        self._unlooked = {at for at, known in enumerate(profiles.values()) if not known.knows_sinks}
        self._slots: dict[tuple[torch.device, torch.Size], Tensor | None] = {}

        directions = max(profile.directions for profile in profiles.values())
        indices = sorted({layer for profile in profiles.values() for layer in profile.layers})
        self._layers = {i: _CappedLayer(i, list(profiles.values()), directions, _device(blocks[i])) for i in indices}

        self._undo: list[Any] = []
        self._first_block = blocks[0]
        try:
            owner = self._decoder = _owner(model, blocks[0])
            self._signature = inspect.signature(owner.forward)
            self._undo.append(owner.register_forward_pre_hook(self._before_model, with_kwargs=True).remove)
            for index, layer in self._layers.items():
                self._undo.append(blocks[index].register_forward_hook(self._after_layer(layer)).remove)
            self._listen_to_generate(getattr(model, "_orig_mod", model))
            _installed.add(blocks[0])
        except BaseException:
            self.remove()
            raise
        _forget_compiled_code()

    def __enter__(self) -> Installation:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def remove(self) -> None:
        """Takes the capping out: the model is as it was. The statistics stay. Once is enough, twice does no harm."""
        while self._undo:
            self._undo.pop()()
        _installed.discard(self._first_block)
        _forget_compiled_code()

    def select(self, names: str | Sequence[str | None] | None) -> None:
        """Chooses the profile of the coming forward passes: one for all sequences, or one for each of a batch.

        None leaves a sequence uncapped. A list must have the batch's length; where ``generate`` runs several rows for a
        sequence (beams, ``num_return_sequences``), they follow their sequence.

        Raises:
            KeyError: a name that is not installed; the selection stays as it was.
        """
        wanted = [names] if names is None or isinstance(names, str) else list(names)
        unknown = [name for name in wanted if name is not None and name not in self._profiles]
        if unknown:
            raise KeyError(f"no profile {unknown[0]!r} is installed; there are {', '.join(self._names)}")
        if not wanted:
            raise ValueError("names must not be empty")
        self._selection = [-1 if name is None else self._names.index(name) for name in wanted]

    def stats(self) -> dict[str, dict[int, LayerStats]]:
        """What was seen so far, exactly, by profile and layer. Waits for the device, where that is not the CPU."""
        result: dict[str, dict[int, LayerStats]] = {}
        for slot, (name, profile) in enumerate(self._profiles.items()):
            result[name] = {
                index: layer_stats(self._layers[index].stats[slot, : profile.directions].cpu())
                for index in profile.layers
            }
        return result

    def reset_stats(self) -> None:
        """Forgets what was seen so far."""
        for layer in self._layers.values():
            slots, directions = layer.floors.shape
            layer.stats = ops.new_stats(slots, directions, layer.floors.device)

    def projections(self) -> dict[int, Tensor]:
        """The last forward pass's projections by layer: (batch, tokens, K) float32, NaN for tokens left alone."""
        return {
            index: layer.projections.reshape(*layer.shape, -1).clone()
            for index, layer in self._layers.items()
            if layer.projections is not None and layer.shape is not None
        }

    def real(self) -> Tensor | None:
        """Which tokens of the last forward pass are no padding, (batch, tokens) bool; None: all of them."""
        return self._tokens.real

    def watch(self, see: Callable[[dict[int, Tensor]], None]) -> Callable[[], None]:
        """Has ``see`` called after each forward pass, with what :meth:`projections` gives; returns what ends it."""
        return self._decoder.register_forward_hook(lambda *_: see(self.projections())).remove

    # Hooks. The pre-hook of the decoder learns which tokens are real; the first capped layer on a device turns that and
    # the selection into slots, which the layers after it share.

    def _before_model(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._announced is not None:
            self._tokens, self._announced = self._announced, None
        else:
            given = kwargs if len(args) < 2 else self._signature.bind_partial(*args, **kwargs).arguments
            # Other forms of masks (prepared 4-d ones) do not say which tokens are padding; then all count as real.
            real = _mask_of(given.get("attention_mask"))
            ids = given.get("position_ids")
            if isinstance(ids, Tensor):
                positions: Tensor | None = ids[0] if ids.dim() == 3 else ids  # one for each part of a rotary embedding
            elif real is not None:
                positions = real.long().cumsum(-1) - 1
            else:
                # By what it can do: the argument's name differs between versions of transformers.
                caches = (value for value in given.values() if hasattr(value, "get_seq_length"))
                cache = next(caches, None)
                length = 0 if cache is None else cache.get_seq_length()
                # A copy, since a static cache counts on in the tensor that it gives.
                positions = None if isinstance(length, int) and length == 0 else torch.as_tensor(length).clone()
            self._tokens = _Tokens(real, None, positions)
        self._slots = {}

    def _after_layer(self, layer: _CappedLayer) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            hidden = output[0] if isinstance(output, tuple | list) else output
            if not isinstance(hidden, Tensor) or hidden.dim() not in (2, 3):
                raise TypeError(f"layer {layer.index} returned no hidden states (batch, tokens, H), but {type(output)}")
            key = (hidden.device, hidden.shape)
            if key not in self._slots:
                self._slots[key] = self._make_slots(hidden)
            looks = bool(self._unlooked) and hidden.shape[-2] > 1 and not torch.compiler.is_compiling()
            norms = hidden.detach().float().norm(dim=-1).flatten() if looks else None
            capped = layer.cap(hidden, self._slots[key])
            if norms is not None:
                self._look_for_sinks(layer, norms, self._slots[key])
            if capped is hidden:
                return None
            return type(output)((capped, *output[1:])) if isinstance(output, tuple | list) else capped

        return hook

    def _look_for_sinks(self, layer: _CappedLayer, norms: Tensor, slots: Tensor | None) -> None:
        """Warns, in the first pass alone, where a profile that says nothing of sinks lifts one."""
        assert layer.projections is not None
        if layer.index == max(self._layers):
            looked, self._unlooked = self._unlooked, set()
        else:
            looked = self._unlooked
        index = torch.zeros(len(norms), dtype=torch.long) if slots is None else slots.long().cpu()
        below = (layer.projections.cpu() < layer.floors.cpu()[index.clamp(min=0)]).any(-1) & (index >= 0)
        lifted = (below & (norms > SINK_NORM * norms.median()).cpu()).nonzero().flatten().tolist()
        mine = [row for row in lifted if int(index[row]) in looked]
        if mine:
            self._unlooked = set()
            row = mine[0]
            warnings.warn(
                f"profile {self._names[int(index[row])]!r} says nothing of attention sinks, and lifts one: at layer "
                f"{layer.index}, row {row} has {norms[row] / norms.median():.0f} times the median norm and a "
                f"projection of {layer.projections[row, 0].item():.3g}, below its floor. To cap it, as published files "
                "ask for, can harm ordinary text; a profile with sinks or limits leaves it alone",
                stacklevel=2,
            )

    def _make_slots(self, hidden: Tensor) -> Tensor | None:
        batch, tokens = hidden.shape[:2] if hidden.dim() == 3 else (1, hidden.shape[0])
        real, generated, positions = self._tokens
        if self._generated_only and generated is None:
            # Outside generate() a decoding step is one new token a sequence; anything longer is a prompt.
            generated = torch.full((tokens,), tokens == 1)
        if self._selection == [0] and real is None and generated is None and 0 not in self._sinks:
            return None
        if batch % len(self._selection) != 0:
            raise ValueError(f"profiles are selected for {len(self._selection)} sequences, but the batch has {batch}")
        slots = torch.tensor(self._selection, dtype=torch.int32, device=hidden.device)[:, None]
        if len(slots) > 1:
            slots = slots.repeat_interleave(batch // len(slots), 0)
        if real is not None:
            if real.shape[0] != batch or real.shape[1] < tokens:
                raise ValueError(
                    f"attention_mask has shape {tuple(real.shape)}, but hidden states {tuple(hidden.shape)}"
                )
            slots = torch.where(real[:, -tokens:].to(hidden.device), slots, -1)
        if generated is not None:
            slots = torch.where(generated.to(hidden.device), slots, -1)
        if self._sinks:
            if positions is None or positions.dim() == 0:
                start = 0 if positions is None else positions.to(hidden.device)
                positions = (torch.arange(tokens, device=hidden.device) + start)[None]
            positions = positions[:, -tokens:].to(hidden.device)
            for at, sinks in self._sinks.items():
                for sink in sinks:  # a few; a tensor of them would be a copy to the device in each pass
                    slots = torch.where((slots == at) & (positions == sink), -1, slots)
        return slots.expand(batch, tokens).reshape(-1).contiguous()

    def _listen_to_generate(self, model: nn.Module) -> None:
        """generate() knows what a forward pass does not see: the 2-d mask, and where the prompt ends."""
        original = getattr(model, "prepare_inputs_for_generation", None)
        if original is None:
            return

        def prepare(input_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
            inputs = original(input_ids, *args, **kwargs)
            mask = _mask_of(kwargs.get("attention_mask"))
            total = input_ids.shape[1] if mask is None else mask.shape[1]
            ids = inputs.get("input_ids")
            tokens = (inputs["inputs_embeds"] if ids is None else ids).shape[1]
            if kwargs.get("is_first_iteration"):
                self._prompt_length = total
            generated = torch.arange(total - tokens, total) >= self._prompt_length if self._generated_only else None
            if mask is None:
                self._announced = _Tokens(None, generated, torch.arange(total - tokens, total)[None])
            else:
                self._announced = _Tokens(mask[:, -tokens:], generated, (mask.long().cumsum(-1) - 1)[:, -tokens:])
            return inputs

        own = model.__dict__.get("prepare_inputs_for_generation")
        model.__dict__["prepare_inputs_for_generation"] = prepare

        def undo() -> None:
            if own is None:
                model.__dict__.pop("prepare_inputs_for_generation", None)
            else:
                model.__dict__["prepare_inputs_for_generation"] = own

        self._undo.append(undo)


def install(
    model: nn.Module,
    profile: CapProfile | Mapping[str, CapProfile],
    *,
    layers: str | Sequence[nn.Module] | None = None,
    positions: Literal["all", "generated"] = "all",
) -> Installation:
    """Puts a profile into force in a transformers causal language model.

    Args:
        model: the model, also wrapped by PEFT or torch.compile, quantised, or spread over devices.
        profile: one profile, or several by name; the first is in force until :meth:`Installation.select` says
            otherwise.
        layers: where the decoder layers are, for a model whose structure does not tell; see
            :func:`axiscap.models.decoder_layers`.
        positions: which tokens are capped: ``"all"`` (as published), or ``"generated"``, those that the model itself
            wrote, and not the prompt's. Padding is neither capped nor measured.

    Returns:
        The handle, which is also a context manager::

            with axiscap.install(model, axiscap.CapProfile.load("profile.safetensors")) as cap:
                model.generate(**inputs)
                print(cap.stats())

    Raises:
        ValueError: the profile does not fit the model, or its decoder layers cannot be told.
        TypeError: profile is something else.
        RuntimeError: the model has an installation already.
    """
    if not isinstance(profile, CapProfile | Mapping):
        raise TypeError(
            f"profile must be a CapProfile or a mapping of names to them, got {type(profile).__name__}; "
            "read a file with CapProfile.load"
        )
    profiles = {DEFAULT_NAME: profile} if isinstance(profile, CapProfile) else dict(profile)
    if not profiles:
        raise ValueError("profile must be a CapProfile or a mapping with at least one")
    for name, value in profiles.items():
        if not isinstance(value, CapProfile):
            raise TypeError(f"profile {name!r} must be a CapProfile, got {type(value).__name__}")
    return Installation(model, profiles, layers, positions)


def _check_fits(name: str, profile: CapProfile, num_layers: int, hidden_size: int | None) -> None:
    if hidden_size is not None and profile.hidden_size != hidden_size:
        raise ValueError(f"profile {name!r} has hidden size {profile.hidden_size}, the model {hidden_size}")
    if profile.layers[-1] >= num_layers:
        raise ValueError(f"profile {name!r} caps layer {profile.layers[-1]}, but the model has {num_layers} layers")
    if profile.num_layers is not None and profile.num_layers != num_layers:
        raise ValueError(f"profile {name!r} is for a model of {profile.num_layers} layers, this one has {num_layers}")
    if profile.directions > _C.MAX_DIRECTIONS:
        raise ValueError(
            f"profile {name!r} has {profile.directions} directions, at most {_C.MAX_DIRECTIONS} are allowed"
        )


def _owner(model: nn.Module, block: nn.Module) -> nn.Module:
    """The module whose forward runs the decoder layers: what holds the list that holds the first one."""
    for module in model.modules():
        for child in module.children():
            if isinstance(child, nn.ModuleList | nn.Sequential) and len(child) and child[0] is block:
                return module
    return model


def _device(block: nn.Module) -> torch.device:
    parameter = next(block.parameters(), None)
    # Weights that are loaded when they are needed are on "meta"; the first forward pass will tell.
    known = parameter is not None and parameter.device.type != "meta"
    return parameter.device if known and parameter is not None else torch.device("cpu")


def _forget_compiled_code() -> None:
    """Code that torch.compile made knows nothing of hooks that came or went after it (it does not guard on them)."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
