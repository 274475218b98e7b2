"""Capping in a running transformers model: hooks on its decoder layers, and nothing else of it changed."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from axiscap.models import decoder_layers, language_class, text_config
from axiscap.ops.banks import Installed, by_name
from axiscap.profile import CapProfile
from axiscap.profile.fit import ModelFacts, check_fits
from axiscap.transformers.generate import GenerateWrappers
from axiscap.transformers.hooks import ModelHooks
from axiscap.transformers.layers import ModelLayer
from axiscap.transformers.rows import SinkCheck
from axiscap.transformers.selection import Selection
from axiscap.transformers.wrapping import Hook

# The installation of each decoder layer. Weak on both sides: the hooks on a layer keep its installation alive.
_installed: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Installation]] = weakref.WeakKeyDictionary()


class Installation(Installed):
    """Profiles in force in a model, until :meth:`remove` or the end of the ``with`` block. Made by :func:`install`.

    Examples
    --------
    >>> cap = axiscap.install(model, {"mild": profile, "strict": profile.with_floors(profile.floors + 2)})
    >>> cap.select("strict")
    >>> cap.remove()
    """

    _layers: dict[int, ModelLayer]

    def __init__(
        self,
        model: nn.Module,
        profiles: Mapping[str, CapProfile],
        layers: str | Sequence[nn.Module] | None,
        positions: Literal["all", "generated"],
        allow_other_model: bool,
    ) -> None:
        self._blocks = decoder_layers(model, layers)
        _check_installable(model, self._blocks, positions)
        facts = _facts_of(model, len(self._blocks))
        for name, profile in profiles.items():
            check_fits(name, profile, facts, allow_other_model=allow_other_model)
        self._profiles = dict(profiles)
        self._directions = max(profile.directions for profile in profiles.values())
        announced: dict[torch.device, Any] = {}
        self._layers = self._make_layers(announced)
        self._selection = Selection()
        unchecked = {slot for slot, profile in enumerate(profiles.values()) if not profile.knows_sinks}
        sinks = SinkCheck(list(profiles), unchecked, max(self._layers))
        generated_only = positions == "generated"
        self._hooks = ModelHooks(model, self._blocks, self._layers, announced, self._selection, sinks, generated_only)
        #: Takes out what was put into the model; the last entry first.
        self._undo: list[Callable[[], None]] = []
        self._watchers: set[RemovableHandle] = set()
        try:
            self._hooks.register(self._undo)
            wrappers = GenerateWrappers(self._hooks, self._selection, generated_only)
            wrappers.wrap(getattr(model, "_orig_mod", model), self._undo)
            self._hooks.installation = self
            _installed.update(dict.fromkeys(self._blocks, weakref.ref(self)))
        except BaseException:
            self.remove()
            raise
        _forget_compiled_code()

    def _make_layers(self, announced: dict[torch.device, Any]) -> dict[int, ModelLayer]:
        profiles = list(self._profiles.values())
        indices = sorted({layer for profile in profiles for layer in profile.layers})
        return {
            index: ModelLayer(index, profiles, self._directions, _device_of(self._blocks[index]), announced, position)
            for position, index in enumerate(indices)
        }

    def remove(self) -> None:
        """Takes the capping out: the model is as it was. The statistics stay. A second call does nothing.

        Examples
        --------
        >>> cap = axiscap.install(model, profile)
        >>> cap.remove()
        """
        while self._watchers:
            self._watchers.pop().remove()
        while self._undo:
            self._undo.pop()()
        for block in self._blocks:
            if _installation_of(block) is self:
                del _installed[block]
        _forget_compiled_code()

    def select(self, names: str | Sequence[str | None] | None) -> None:
        """Selects the profile of the coming forward passes: one for all sequences, or one for each of a batch.

        None leaves a sequence uncapped. A list must have the batch's length; if ``generate`` runs several rows for a
        sequence (beams, ``num_return_sequences``), they have the profile of their sequence.

        The selection is that of the thread or the asynchronous task that makes it, and of tasks and threads that copy
        its context. Others have it too while nobody else selects. Once several have selected, a thread or task that has
        not is refused.

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
        requested = [names] if names is None or isinstance(names, str) else list(names)
        if not requested:
            raise ValueError("names must not be empty")
        self._selection.select([self._slot(name) for name in requested])

    def set_floors(self, floors: Tensor, name: str | None = None) -> None:
        """Moves a profile's floors, from the next forward pass on. Each target keeps its distance to its floor.

        Parameters
        ----------
        floors
            (L, K) float32, in the order of the profile's layers, finite or ``-inf``.
        name
            of the profile; without it, the first one.

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
        name = next(iter(self._profiles)) if name is None else name
        slot = self._slot(name)
        profile = self._profiles[name] = self._profiles[name].with_floors(floors)
        for index in profile.layers:
            values = profile.slot_at(index, self._directions)
            self._layers[index].set_floors(slot, values.floors, values.targets)

    def projections(self) -> dict[int, Tensor]:
        """The last forward pass's projections by layer: (batch, tokens, K) float32, NaN for tokens left alone.

        The last pass of this thread, or of any if this thread has run none.

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
        parts = self._hooks.last_pass().projections
        return {index: projections.reshape(*shape, -1).clone() for index, (projections, shape) in parts.items()}

    def real(self) -> Tensor | None:
        """Which tokens of that forward pass are no padding, (batch, tokens) bool; None: no token is.

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
        return self._hooks.last_pass().current.rows.real

    def watch(self, see: Callable[[dict[int, Tensor]], None]) -> Callable[[], None]:
        """Calls ``see`` with the result of :meth:`projections` after each forward pass, while the installation lasts.

        Parameters
        ----------
        see
            a function of the projections by layer.

        Returns
        -------
        Callable
            A function without arguments that ends the calls.

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
        handle = self._hooks.decoder.register_forward_hook(Hook(lambda *_: see(self.projections())))
        self._watchers.add(handle)

        def end() -> None:
            handle.remove()
            self._watchers.discard(handle)

        return end


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


def installed(model: nn.Module) -> Installation | None:
    """The installation of a model, for a caller that has lost its handle, as when a notebook's cell runs again.

    Parameters
    ----------
    model
        the model, also wrapped by PEFT or torch.compile.

    Returns
    -------
    Installation or None
        None if the model has none.

    Examples
    --------
    >>> with axiscap.install(model, profile) as cap:
    ...     axiscap.installed(model) is cap
    True
    """
    installations = map(_installation_of, model.modules())
    return next((installation for installation in installations if installation is not None), None)


def _installation_of(block: nn.Module) -> Installation | None:
    reference = _installed.get(block)
    return None if reference is None else reference()


def _check_installable(model: nn.Module, blocks: Sequence[nn.Module], positions: str) -> None:
    """Checks what does not depend on the profiles.

    Raises
    ------
    ValueError
        The layers pass on several streams, or one of a dtype that cannot be capped; or positions is unknown.
    RuntimeError
        One of the layers is capped already.
    """
    if positions not in ("all", "generated"):
        raise ValueError(f"positions must be 'all' or 'generated', got {positions!r}")
    if any(_installation_of(block) is not None for block in blocks):
        raise RuntimeError(
            "the model has an AxisCap installation already; remove it first: axiscap.installed(model).remove()"
        )
    config = text_config(model)
    for name in ("altup_num_inputs", "hc_mult"):
        streams = getattr(config, name, None)
        if isinstance(streams, int) and streams > 1:
            raise ValueError(
                f"the decoder layers of {type(model).__name__} pass on {streams} residual streams ({name}); "
                "one can be capped"
            )
    floating = (parameter.dtype for parameter in blocks[0].parameters() if parameter.is_floating_point())
    if next(floating, torch.float32) == torch.float64:
        raise ValueError("the model is float64; float32, bfloat16 and float16 can be capped")


def _facts_of(model: nn.Module, num_layers: int) -> ModelFacts:
    config = text_config(model)
    hidden_size = getattr(config, "hidden_size", None)
    configs = (getattr(model, "config", None), config)
    return ModelFacts.of_configs(num_layers, hidden_size, *configs, names=[language_class(model)])


def _device_of(block: nn.Module) -> torch.device:
    """The device of a layer's weights. Offloaded ones are on "meta"; the first forward pass moves the bank."""
    parameter = next(block.parameters(), None)
    return torch.device("cpu") if parameter is None or parameter.is_meta else parameter.device


def _forget_compiled_code() -> None:
    """Drops compiled code, which does not guard on hooks that are added or removed later."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
