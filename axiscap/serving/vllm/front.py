"""vLLM's API process: the configuration is read, and requests for profiles that they may not have are refused."""

from __future__ import annotations

import contextvars
import copy
import inspect
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from axiscap.profile.fit import ModelFacts
from axiscap.serving import shared_folder
from axiscap.serving.front import metrics, middleware
from axiscap.serving.front.profiles import ServedProfiles
from axiscap.serving.registry import describe_start
from axiscap.serving.request import KEY, OFF, Assignment, RequestedProfile, RequestError, SettingsError
from axiscap.serving.settings import FILE_VARIABLE, Settings, find_options, read_settings, refuse
from axiscap.serving.vllm import kv
from axiscap.serving.vllm.points import check_object, check_points, folder_of, settings_of
from axiscap_plugin.wrapping import wrap

_INSTANCE = "AXISCAP_INSTANCE"
#: The fields of a request's body that may name a profile, at OpenAI's and Anthropic's endpoints and at that for tokens.
_PLACES = (("vllm_xargs",), ("sampling_params", "extra_args"))


def configure(config: Any, options: Mapping[str, Any]) -> None:
    """Takes the operator's configuration into vLLM's, where every process finds it and the compile cache hashes it.

    Parameters
    ----------
    options
        vLLM's ``additional_config`` as the operator wrote it.

    Raises
    ------
    SettingsError
        one sentence that says what is wrong, or what of vLLM cannot be capped.
    """
    own_options = find_options(options)
    if own_options is not None or FILE_VARIABLE in os.environ:
        check_points()
    settings = read_settings(own_options)
    if settings is None:
        return
    _refuse(config, settings)
    model, text = config.model_config, config.model_config.hf_text_config
    facts = ModelFacts.of_configs(text.num_hidden_layers, model.get_hidden_size(), text, model.hf_config)
    settings = settings.for_model(facts)
    config.additional_config = {**config.additional_config, KEY: settings.to_json()}
    if config.parallel_config._api_process_count > 1:
        # Several API processes make this configuration again, each for itself; they must meet in one folder.
        config.instance_id = os.environ.setdefault(_INSTANCE, config.instance_id)

    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest
    from vllm.v1.engine.input_processor import InputProcessor

    _fuse(config.compilation_config)
    wrap(InputProcessor, "process_inputs", _resolve)
    for request in (ChatCompletionRequest, CompletionRequest):
        wrap(request, "to_beam_search_params", _refuse_profile_of_beams)
    global _rows_label
    _rows_label = settings.rows_label
    folder = folder_of(config)
    middleware.wrap_applications(ServedProfiles(settings, folder), _PLACES, _change)
    _show_metrics(folder)
    if config.observability_config.otlp_traces_endpoint is not None:
        _trace()
    logging.getLogger("vllm.axiscap").info(describe_start(settings))


def _fuse(config: Any) -> None:
    """Where vLLM compiles with its own passes, as it does for a GPU, ours follows them; but not an operator's own."""
    from vllm.config import CompilationMode
    from vllm.platforms import current_platform

    if config.mode == CompilationMode.VLLM_COMPILE:
        from axiscap.serving.vllm.norm import CapInNorm

        config.inductor_compile_config.setdefault(current_platform.pass_key, CapInNorm())


async def _change(app: Any, method: str, arguments: Sequence[Any]) -> str:
    """Has the engine core change a profile."""
    done: list[str] = await app.state.engine_client.collective_rpc(method, args=tuple(arguments))
    return done[0]


def _refuse(config: Any, settings: Settings) -> None:
    """Raises SettingsError for an option under which the wrong rows would be capped, or none."""
    parallel, passes = config.parallel_config, config.compilation_config.pass_config
    reasons = {
        "pooling models generate nothing": config.model_config.runner_type != "generate",
        "encoder-decoder models": config.model_config.is_encoder_decoder,
        "sequence parallelism shards the rows (pass_config.enable_sp)": getattr(passes, "enable_sp", False),
        "prefill context parallelism shards the rows": parallel.prefill_context_parallel_size > 1,
        "microbatches split the rows (enable_dbo)": parallel.use_ubatching,
        "kv_sharing_fast_prefill drops rows on the way": config.cache_config.kv_sharing_fast_prefill,
        "memory that sleeps may lose the profiles (enable_sleep_mode)": config.model_config.enable_sleep_mode,
        "elastic ranks load models of their own (enable_elastic_ep)": getattr(parallel, "enable_elastic_ep", False),
    }
    if (transfer := config.kv_transfer_config) is not None:
        known = (*kv.BY_HASH, kv.SHARED, *kv.BY_REQUEST)
        reason = f"{transfer.kv_connector} may not tell KV blocks of different profiles apart"
        reasons[f"{reason} (known are {', '.join(known)})"] = transfer.kv_connector not in known
        back = transfer.get_from_extra_config("bidirectional_kv_xfer", False)
        reasons["blocks that go back to where a prompt is computed (bidirectional_kv_xfer)"] = bool(back)
    if settings.separates_thinking:
        apart = f'with positions "{settings.positions}"'
        reasons[f"drafts {apart}: which of them count is known too late"] = config.speculative_config is not None
        reasons[f"pipeline ranks {apart}"] = parallel.pipeline_parallel_size > 1
        reasons[f"embeddings as prompts {apart}"] = config.model_config.enable_prompt_embeds
    refuse("vLLM", reasons)


def _to_client(message: object) -> Exception:
    """The exception that vLLM's server answers with a 400 and its message."""
    from vllm.exceptions import VLLMValidationError

    error: Exception = VLLMValidationError(str(message))
    return error


def _resolve(original: Callable[..., Any], processor: Any, *args: Any, **kwargs: Any) -> Any:
    """Refuses a request for a profile that it may not have, and notes the profile for the response's headers."""
    config = processor.vllm_config
    if KEY not in config.additional_config:
        return original(processor, *args, **kwargs)
    call = inspect.signature(original).bind(processor, *args, **kwargs)
    if call.arguments.get("resumable"):
        raise _to_client("streaming sessions are not served with axiscap: their turns share blocks under one profile")
    profiles = processor.__dict__.get("_axiscap")
    if profiles is None:
        folder = shared_folder.folder_path(config.instance_id)
        profiles = processor._axiscap = ServedProfiles(settings_of(config), folder)
    params = copy.copy(call.arguments["params"])  # in one process with its client, the client's own
    extra = getattr(params, "extra_args", None) or {}
    try:
        requested = profiles.resolve(extra)
        kv.check_handed(extra, Assignment(requested.name, requested.digest, "", positions=_rows_label))
    except RequestError as error:
        raise _to_client(error) from None
    middleware.note_profile(requested, getattr(params, "n", 1))
    params.extra_args = requested.put(extra)
    call.arguments["params"] = params
    return original(*call.args, **call.kwargs)


#: The rows that the engine of this process caps (:attr:`Settings.rows_label`). A request of beams has no configuration.
_rows_label = "all"


def _refuse_profile_of_beams(original: Callable[..., Any], request: Any, *args: Any, **kwargs: Any) -> Any:
    if _rows_label != "all":
        raise _to_client("beam search reads what it wrote as prompts, which this server does not cap")
    if KEY in (request.vllm_xargs or {}):
        raise _to_client(f"beam search runs under the server's default profile and takes no {KEY}")
    return original(request, *args, **kwargs)


#: The attributes of a request's span.
_SPAN = ("axiscap.profile", "axiscap.digest")
_span: contextvars.ContextVar[dict[str, str]] = contextvars.ContextVar("axiscap_span")


def _trace() -> None:
    """Adds the profile to each request's span. A vLLM that traces in another way gets a warning in the log."""
    from vllm.v1.engine import output_processor

    try:
        check_object(output_processor.OutputProcessor, ["add_request", "do_tracing"])
        wrap(output_processor, "instrument_manual", _with_profile)
    except (SettingsError, AttributeError) as error:
        logging.getLogger("vllm.axiscap").warning("axiscap: spans say nothing of profiles: %s", error)
        return
    wrap(output_processor.OutputProcessor, "add_request", _remember_profile)
    wrap(output_processor.OutputProcessor, "do_tracing", _span_of)


def _remember_profile(original: Callable[..., Any], processor: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
    result = original(processor, request, *args, **kwargs)
    requested = RequestedProfile.read(request.sampling_params.extra_args) if request.sampling_params else None
    if requested is not None:
        values = (requested.name or OFF, requested.digest or "-")
        processor.request_states[request.request_id].axiscap = dict(zip(_SPAN, values, strict=True))
    return result


def _span_of(original: Callable[..., Any], processor: Any, output: Any, state: Any, *args: Any, **kwargs: Any) -> Any:
    _span.set(getattr(state, "axiscap", {}))
    return original(processor, output, state, *args, **kwargs)


def _with_profile(original: Callable[..., Any], *args: Any, attributes: dict[str, Any], **kwargs: Any) -> Any:
    return original(*args, attributes={**attributes, **_span.get({})}, **kwargs)


def _show_metrics(folder: Path) -> None:
    metrics.show(folder)
    if "PROMETHEUS_MULTIPROC_DIR" in os.environ:
        import vllm.entrypoints.serve.instrumentator.metrics as page

        wrap(page, "get_prometheus_registry", _with_totals)


def _with_totals(original: Callable[..., Any]) -> Any:
    registry = original()
    metrics.show_in(registry)
    return registry
