"""Capping inside llama.cpp, through llama-cpp-python (the extra ``axiscap[llamacpp]``).

llama.cpp computes graphs of tensors, and calls back with those that somebody wants to see. A block's output is named
``l_out-N``: the callback, which is C++ (``csrc/ggml``), caps its rows where they are, and no Python runs in between.
What only the caller of ``llama_decode`` knows is which row belongs to which sequence; so that function is wrapped, for
contexts with an installation alone, and says it before each batch. Batches that C code decodes by itself (images, in
llava's and mtmd's helpers) are capped under the profile of sequence 0.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

from axiscap import _C
from axiscap.banks import CappedLayer, Installed, by_name
from axiscap.fit import ModelFacts, check_fits
from axiscap.profile import CapProfile

#: ggml's own functions that the callback calls, in its order.
_FUNCTIONS = (
    "ggml_get_name",
    "ggml_nelements",
    "ggml_nrows",
    "ggml_nbytes",
    "ggml_backend_tensor_get",
    "ggml_backend_tensor_set",
)
#: GGUF architectures that several classes of transformers have in common, or that have another name there.
_CLASSES = {
    "llama": ("Llama", "Mistral", "Mixtral"),
    "command-r": ("Cohere",),
    "phi2": ("Phi",),
    "deepseek2": ("DeepseekV2", "DeepseekV3"),
    "granitehybrid": ("GraniteMoeHybrid",),
    "hunyuan-dense": ("HunYuanDenseV1",),
}
#: By the address of a context of llama.cpp's.
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
        model = llama._model.model
        num_layers, hidden_size = lib.llama_model_n_layer(model), lib.llama_model_n_embd(model)
        kind = llama.metadata.get("general.architecture", "")
        facts = ModelFacts.of(num_layers, hidden_size, _CLASSES.get(kind, (kind,) if kind else ()))
        for name, profile in profiles.items():
            check_fits(name, profile, facts, allow_other_model=allow_other_model)
        if lib.llama_model_has_encoder(model):
            raise ValueError("a model with an encoder cannot be capped in llama.cpp")
        params = llama.context_params
        if params.n_seq_max > 1 and not params.kv_unified:
            raise ValueError(
                "a context of several sequences must have kv_unified: llama.cpp would put the rows of a batch in an "
                "order of its own"
            )
        directions = max(profile.directions for profile in profiles.values())
        indices = sorted({layer for profile in profiles.values() for layer in profile.layers})
        cpu = torch.device("cpu")
        self._layers = {index: CappedLayer(index, list(profiles.values()), directions, cpu) for index in indices}
        pairs = [
            (self._layers[index].bank, self._layers[index].stats) if index in self._layers else None
            for index in range(num_layers)
        ]
        self._callback = _C.GgmlCallback(_addresses(), pairs)
        self._outputs_all = bool(params.embeddings)
        # Of these models llama.cpp may put the rows of several sequences in an order of its own.
        self._reorders = bool(
            lib.llama_model_is_recurrent(model) or lib.llama_model_is_hybrid(model) or lib.llama_model_n_swa(model)
        )
        self._selection: dict[int, int] = {}
        self._other = 0
        self._removed = False

        capped = type(params).from_buffer_copy(params)
        capped.cb_eval = lib.ggml_backend_sched_eval_callback(self._callback.function)
        capped.cb_eval_user_data = ctypes.c_void_p(self._callback.data)
        _wrap_decode(lib)
        self._renew(capped)
        _installed[self._address] = self
        llama._axiscap = self  # the context calls what this holds
        # A state of the model's memory does not say under which profile it came about.
        self._cache, llama.cache = llama.cache, None
        for name in ("set_cache", "save_state", "load_state"):
            setattr(llama, name, _refused(name))
        try:
            self._verify()
        except BaseException:
            self.remove()
            raise

    def remove(self) -> None:
        """Takes the capping out: the model is as it was, with an empty memory. The statistics stay.

        Examples
        --------
        >>> cap.remove()  # doctest: +SKIP
        """
        if self._removed:
            return
        self._removed = True
        _installed.pop(self._address, None)
        for name in ("set_cache", "save_state", "load_state"):
            vars(self._llama).pop(name, None)
        self._llama.cache = self._cache
        if self._llama._model.model is not None:  # it may have been closed
            self._renew(self._llama.context_params)
        del self._llama._axiscap

    def select(self, names: str | Mapping[int, str | None] | None) -> None:
        """Chooses the profile of what is decoded from now on: one for all sequences, or by sequence id (others keep
        the first profile). None leaves a sequence uncapped. The model's memory is emptied: what is in it came about
        under another choice.

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
        wanted = names if isinstance(names, Mapping) else {-1: names}
        slots = {sequence: self._slot(name) for sequence, name in wanted.items()}
        self._other = slots.pop(-1, 0)
        self._selection = slots
        self._callback.set_default_slot(slots.get(0, self._other))
        self._forget()

    @property
    def _address(self) -> int:
        return int(self._llama._ctx.ctx or 0)

    def _renew(self, params: Any) -> None:
        """Puts a new context in the place of the model's own: a callback is chosen where a context is made."""
        from llama_cpp import _internals

        llama = self._llama
        llama._ctx.close()
        llama._ctx = _internals.LlamaContext(model=llama._model, params=params, verbose=llama.verbose)
        if llama._lora_adapter is not None:
            adapters = (self._lib.llama_adapter_lora_p_ctypes * 1)(llama._lora_adapter)
            scales = (ctypes.c_float * 1)(llama.lora_scale)
            if self._lib.llama_set_adapters_lora(llama._ctx.ctx, adapters, 1, scales):
                raise RuntimeError("llama.cpp did not take the LoRA adapter into the new context")
        self._forget()

    def _forget(self) -> None:
        self._llama.reset()
        self._llama._ctx.kv_cache_clear()

    def _verify(self) -> None:
        """One small batch: every capped layer must see its rows, by the name that it is expected to have.

        Raises
        ------
        ValueError
            it does not.
        """
        lib, llama = self._lib, self._llama
        batch = lib.llama_batch_init(2, 0, 1)
        try:
            batch.n_tokens = 2
            for at in range(2):
                batch.token[at], batch.pos[at], batch.n_seq_id[at], batch.logits[at] = 0, at, 1, at == 1
                batch.seq_id[at][0] = 0
            try:
                if lib.llama_decode(llama._ctx.ctx, batch):
                    raise RuntimeError("a batch of two tokens was not decoded")
            except RuntimeError as error:
                kind = llama.metadata.get("general.architecture", "unknown")
                raise ValueError(f"llama.cpp's graph of the architecture {kind} cannot be capped: {error}") from None
        finally:
            lib.llama_batch_free(batch)
        self._forget()
        self.reset_stats()

    def _decode(self, original: Callable[..., int], context: Any, batch: Any) -> int:
        count = batch.n_tokens
        slots = np.full(count, self._selection.get(0, self._other), np.int32)
        if self._selection and batch.seq_id:  # else all sequences have one choice
            for at in range(count):
                found = {self._selection.get(batch.seq_id[at][n], self._other) for n in range(batch.n_seq_id[at])}
                if len(found) > 1:
                    raise ValueError("a token of several sequences must be under one profile")
                slots[at] = found.pop()
            if self._reorders and len(set(slots.tolist())) > 1:
                raise ValueError("sequences of this model must be under one profile, or in batches of their own")
        if self._outputs_all:
            outputs = np.ones(count, np.uint8)
        elif batch.logits:
            outputs = (np.ctypeslib.as_array(batch.logits, (count,)) != 0).astype(np.uint8)
        else:
            outputs = np.zeros(count, np.uint8)
            outputs[-1:] = 1
        self._callback.announce(slots.tolist(), outputs.tolist())
        try:
            status = original(context, batch)
        finally:
            problem = self._callback.end()
        if status == 0 and problem is not None:
            raise RuntimeError(f"axiscap: {problem}")
        return status


def install(
    llama: Any, profile: CapProfile | Mapping[str, CapProfile], *, allow_other_model: bool = False
) -> Installation:
    """Puts a profile into force in a ``llama_cpp.Llama``: in all its ways to generate and to embed, and in batches that
    are given to ``llama_cpp.llama_decode`` with its context.

    The model gets a context of its own with the same parameters, whose memory is empty; so it does where the
    installation ends. While it lasts, states are neither saved nor loaded, nor cached.

    Parameters
    ----------
    llama
        the model, on a CPU or on whatever llama.cpp offloads to.
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
        something else than a Llama, or than profiles.
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
        import llama_cpp.llama_cpp as found
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "capping in llama.cpp needs llama-cpp-python: pip install 'axiscap[llamacpp]'"
        ) from None
    return found


def _addresses() -> list[int]:
    from llama_cpp import _ggml

    try:
        functions = [getattr(_ggml.libggml, name) for name in _FUNCTIONS]
    except AttributeError as error:
        raise ValueError(f"this llama.cpp's ggml lacks a function that capping needs: {error}") from None
    return [ctypes.cast(function, ctypes.c_void_p).value or 0 for function in functions]


def _wrap_decode(lib: Any) -> None:
    """Has ``llama_decode`` ask the installation of its context, under both names that it goes by. Once and for all:
    contexts without an installation pass.
    """
    import llama_cpp

    original = lib.llama_decode
    if getattr(original, "axiscap", False):
        return

    def decode(context: Any, batch: Any, /) -> int:
        found = _installed.get(int(getattr(context, "value", context) or 0))
        status: int = original(context, batch) if found is None else found._decode(original, context, batch)
        return status

    decode.axiscap = True  # type: ignore[attr-defined]
    lib.llama_decode = llama_cpp.llama_decode = decode


def _refused(name: str) -> Callable[..., None]:
    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError(
            f"{name} is not available while a profile is installed: a state does not say under which profile it came "
            "about"
        )

    return refuse
