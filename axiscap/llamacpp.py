"""Capping inside llama.cpp, through llama-cpp-python (the extra ``axiscap[llamacpp]``).

llama.cpp computes graphs of tensors, and its scheduler calls back for each tensor. The output of block N is named
``l_out-N``. The callback (C++, ``csrc/ggml``) caps its rows in place, without Python. Only the caller of
``llama_decode`` knows the sequence of each row, so this function is wrapped, and announces the rows of each batch. The
wrapper acts on contexts with an installation alone. Batches that C code decodes by itself (images, in llava's and
mtmd's helpers) are capped under the profile of sequence 0.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from axiscap import _C
from axiscap.ops.banks import CappedLayer, Installed, by_name
from axiscap.profile import CapProfile
from axiscap.profile.fit import ModelFacts, check_fits

#: The functions of ggml that the callback calls, in the order of its ``ggml::Library``.
_FUNCTIONS = (
    "ggml_get_name",
    "ggml_nelements",
    "ggml_nrows",
    "ggml_nbytes",
    "ggml_backend_tensor_get",
    "ggml_backend_tensor_set",
)
#: The classes of transformers of a GGUF architecture, if they are several or have another name.
_CLASSES = {
    "llama": ("Llama", "Mistral", "Mixtral"),
    "command-r": ("Cohere",),
    "phi2": ("Phi",),
    "deepseek2": ("DeepseekV2", "DeepseekV3"),
    "granitehybrid": ("GraniteMoeHybrid",),
    "hunyuan-dense": ("HunYuanDenseV1",),
}
#: The methods that save or load states of a model's memory.
_STATE_METHODS = ("set_cache", "save_state", "load_state")
#: By the address of the context.
_installed: weakref.WeakValueDictionary[int, Installation] = weakref.WeakValueDictionary()


class Installation(Installed):
    """Profiles in force in a ``llama_cpp.Llama``, until :meth:`remove` or the end of the ``with`` block. Made by
    :func:`install`.

    Examples
    --------
    >>> cap = axiscap.llamacpp.install(llama, {"mild": profile})  # doctest: +SKIP
    """

    def __init__(self, llama: Any, profiles: dict[str, CapProfile], allow_other_model: bool) -> None:
        lib = _library()
        self._lib, self._llama, self._profiles = lib, llama, profiles
        if int(getattr(llama._ctx, "ctx", None) or 0) in _installed:
            raise RuntimeError("the model has an AxisCap installation already; remove it first")
        model, params = llama._model.model, llama.context_params
        self._check_fits(allow_other_model)
        _check_context(lib, model, params)
        self._callback = self._make_callback(lib.llama_model_n_layer(model))
        self._computes_all_outputs = bool(params.embeddings)
        # llama.cpp may reorder the rows of several sequences of these models.
        self._may_reorder = bool(
            lib.llama_model_is_recurrent(model) or lib.llama_model_is_hybrid(model) or lib.llama_model_n_swa(model)
        )
        #: The slots that were selected by sequence, and the slot of all other sequences.
        self._slots: dict[int, int] = {}
        self._other_slot = 0
        self._is_removed = False
        self._put_in_place(params)
        try:
            self._verify()
        except BaseException:
            self.remove()
            raise

    def _check_fits(self, allow_other_model: bool) -> None:
        lib, model = self._lib, self._llama._model.model
        architecture = self._llama.metadata.get("general.architecture", "")
        names = _CLASSES.get(architecture, (architecture,) if architecture else ())
        facts = ModelFacts.of(lib.llama_model_n_layer(model), lib.llama_model_n_embd(model), names)
        for name, profile in self._profiles.items():
            check_fits(name, profile, facts, allow_other_model=allow_other_model)

    def _make_callback(self, num_layers: int) -> Any:
        """The callback for ggml, with the bank and the statistics of each capped layer."""
        profiles = list(self._profiles.values())
        directions = max(profile.directions for profile in profiles)
        indices = sorted({layer for profile in profiles for layer in profile.layers})
        self._layers = {index: CappedLayer(index, profiles, directions, torch.device("cpu")) for index in indices}
        pairs = [
            (self._layers[index].bank, self._layers[index].stats) if index in self._layers else None
            for index in range(num_layers)
        ]
        return _C.GgmlCallback(_addresses(), pairs)

    def _put_in_place(self, params: Any) -> None:
        """Gives the model a context with the callback, and refuses saved states."""
        llama = self._llama
        capped = type(params).from_buffer_copy(params)
        capped.cb_eval = self._lib.ggml_backend_sched_eval_callback(self._callback.function)
        capped.cb_eval_user_data = ctypes.c_void_p(self._callback.data)
        _wrap_decode(self._lib)
        self._renew_context(capped)
        _installed[self._address] = self
        llama._axiscap = self  # the context calls what the installation holds
        # A saved state does not tell under which profile it was computed.
        self._cache, llama.cache = llama.cache, None
        for name in _STATE_METHODS:
            setattr(llama, name, _refusal_of(name))

    def remove(self) -> None:
        """Takes the capping out: the model is as it was, with an empty memory. The statistics stay.

        Examples
        --------
        >>> cap.remove()  # doctest: +SKIP
        """
        if self._is_removed:
            return
        self._is_removed = True
        _installed.pop(self._address, None)
        for name in _STATE_METHODS:
            vars(self._llama).pop(name, None)
        self._llama.cache = self._cache
        if self._llama._model.model is not None:  # it may have been closed
            self._renew_context(self._llama.context_params)
        del self._llama._axiscap

    def select(self, names: str | Mapping[int, str | None] | None) -> None:
        """Selects the profile of the batches from now on: one for all sequences, or by sequence id.

        Sequences that a mapping leaves out have the first profile. None leaves a sequence uncapped. The model's memory
        is emptied, since it was computed under the selection before.

        Parameters
        ----------
        names
            the name of a profile, or one by sequence id; None: not capped.

        Raises
        ------
        KeyError
            a name that is not installed; the selection stays as it was.

        Examples
        --------
        >>> cap.select({0: "mild", 1: None})  # doctest: +SKIP
        """
        by_sequence = names if isinstance(names, Mapping) else {-1: names}
        slots = {sequence: self._slot(name) for sequence, name in by_sequence.items()}
        self._other_slot = slots.pop(-1, 0)
        self._slots = slots
        self._callback.set_default_slot(slots.get(0, self._other_slot))
        self._clear_memory()

    @property
    def _address(self) -> int:
        return int(self._llama._ctx.ctx or 0)

    def _renew_context(self, params: Any) -> None:
        """Replaces the model's context, since llama.cpp sets a callback only when it makes a context."""
        from llama_cpp import _internals

        llama = self._llama
        llama._ctx.close()
        llama._ctx = _internals.LlamaContext(model=llama._model, params=params, verbose=llama.verbose)
        if llama._lora_adapter is not None:
            adapters = (self._lib.llama_adapter_lora_p_ctypes * 1)(llama._lora_adapter)
            scales = (ctypes.c_float * 1)(llama.lora_scale)
            if self._lib.llama_set_adapters_lora(llama._ctx.ctx, adapters, 1, scales):
                raise RuntimeError("llama.cpp did not take the LoRA adapter into the new context")
        self._clear_memory()

    def _clear_memory(self) -> None:
        self._llama.reset()
        self._llama._ctx.kv_cache_clear()

    def _verify(self) -> None:
        """Decodes one small batch, to check that the callback finds every capped layer by its name.

        Raises
        ------
        ValueError
            It does not find one of them.
        """
        lib, llama = self._lib, self._llama
        batch = lib.llama_batch_init(2, 0, 1)
        try:
            batch.n_tokens = 2
            for row in range(2):
                batch.token[row], batch.pos[row], batch.n_seq_id[row], batch.logits[row] = 0, row, 1, row == 1
                batch.seq_id[row][0] = 0
            try:
                if lib.llama_decode(llama._ctx.ctx, batch):
                    raise RuntimeError("a batch of two tokens was not decoded")
            except RuntimeError as error:
                architecture = llama.metadata.get("general.architecture", "unknown")
                raise ValueError(
                    f"llama.cpp's graph of the architecture {architecture} cannot be capped: {error}"
                ) from None
        finally:
            lib.llama_batch_free(batch)
        self._clear_memory()
        self.reset_stats()

    def _decode(self, original: Callable[..., int], context: Any, batch: Any) -> int:
        self._callback.announce(self._slots_of(batch).tolist(), self._outputs_of(batch).tolist())
        try:
            status = original(context, batch)
        finally:
            problem = self._callback.end()
        if status == 0 and problem is not None:
            raise RuntimeError(f"axiscap: {problem}")
        return status

    def _slots_of(self, batch: Any) -> np.ndarray[Any, Any]:
        """(rows,) int32: the slot of each row of a batch."""
        slots = np.full(batch.n_tokens, self._slots.get(0, self._other_slot), np.int32)
        if not self._slots or not batch.seq_id:
            return slots
        for row in range(batch.n_tokens):
            sequences = (batch.seq_id[row][n] for n in range(batch.n_seq_id[row]))
            candidates = {self._slots.get(sequence, self._other_slot) for sequence in sequences}
            if len(candidates) > 1:
                raise ValueError("a token of several sequences must be under one profile")
            slots[row] = candidates.pop()
        if self._may_reorder and len(set(slots.tolist())) > 1:
            raise ValueError("sequences of this model must be under one profile, or in batches of their own")
        return slots

    def _outputs_of(self, batch: Any) -> np.ndarray[Any, Any]:
        """(rows,) uint8: whether a row has an output; the last layer computes only those rows."""
        rows = batch.n_tokens
        if self._computes_all_outputs:
            return np.ones(rows, np.uint8)
        outputs = np.zeros(rows, np.uint8)
        if batch.logits:
            outputs[:] = np.ctypeslib.as_array(batch.logits, (rows,)) != 0
        else:
            outputs[-1:] = 1
        return outputs


def install(
    llama: Any, profile: CapProfile | Mapping[str, CapProfile], *, allow_other_model: bool = False
) -> Installation:
    """Puts a profile into force in a ``llama_cpp.Llama``: in all its methods that generate or embed, and in calls of
    ``llama_cpp.llama_decode`` with its context.

    The model gets a new context with the same parameters and an empty memory, and another one when the installation
    ends. Meanwhile states are neither saved nor loaded nor cached.

    Parameters
    ----------
    llama
        the model, on a CPU or offloaded.
    profile
        one profile, or several by name; the first is in force until :meth:`Installation.select` says
        otherwise.
    allow_other_model
        install a profile that was made for another architecture; its sizes must fit all the same.

    Returns
    -------
    Installation
        The handle, which is also a context manager::

            with axiscap.llamacpp.install(llama, axiscap.CapProfile.load("profile.safetensors")) as cap:
                llama.create_chat_completion(messages)
                print(cap.stats())

    Raises
    ------
    ModuleNotFoundError
        naming the extra, without llama-cpp-python.
    ValueError
        the profile does not fit the model, or llama.cpp's graph of it cannot be capped.
    TypeError
        llama is no Llama, or profile is no profile.
    RuntimeError
        the model has an installation already.

    Examples
    --------
    >>> with axiscap.llamacpp.install(llama, profile) as cap:  # doctest: +SKIP
    ...     llama("Who are you?", max_tokens=8)
    """
    _library()
    import llama_cpp

    if not isinstance(llama, llama_cpp.Llama):
        raise TypeError(f"llama must be a llama_cpp.Llama, got {type(llama).__name__}")
    return Installation(llama, by_name(profile), allow_other_model)


def _library() -> Any:
    try:
        import llama_cpp.llama_cpp as library
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "capping in llama.cpp needs llama-cpp-python: pip install 'axiscap[llamacpp]'"
        ) from None
    return library


def _check_context(lib: Any, model: Any, params: Any) -> None:
    """Checks that the rows of a batch keep their order.

    Raises
    ------
    ValueError
        The model has an encoder, or its context reorders sequences.
    """
    if lib.llama_model_has_encoder(model):
        raise ValueError("a model with an encoder cannot be capped in llama.cpp")
    if params.n_seq_max > 1 and not params.kv_unified:
        raise ValueError(
            "a context of several sequences must have kv_unified: llama.cpp would put the rows of a batch in an "
            "order of its own"
        )


def _addresses() -> list[int]:
    """The addresses of :data:`_FUNCTIONS`."""
    from llama_cpp import _ggml

    try:
        functions = [getattr(_ggml.libggml, name) for name in _FUNCTIONS]
    except AttributeError as error:
        raise ValueError(f"this llama.cpp's ggml lacks a function that capping needs: {error}") from None
    return [ctypes.cast(function, ctypes.c_void_p).value or 0 for function in functions]


def _wrap_decode(lib: Any) -> None:
    """Wraps ``llama_decode`` under both of its names, once. Contexts without an installation are not affected."""
    import llama_cpp

    original = lib.llama_decode
    if getattr(original, "axiscap", False):
        return

    def decode(context: Any, batch: Any, /) -> int:
        installation = _installed.get(int(getattr(context, "value", context) or 0))
        if installation is None:
            status: int = original(context, batch)
            return status
        return installation._decode(original, context, batch)

    decode.axiscap = True  # type: ignore[attr-defined]
    lib.llama_decode = llama_cpp.llama_decode = decode


def _refusal_of(name: str) -> Callable[..., None]:
    """A method that raises, for one that saves or loads a state."""

    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError(
            f"{name} is not available while a profile is installed: a state does not say under which profile it came "
            "about"
        )

    return refuse
