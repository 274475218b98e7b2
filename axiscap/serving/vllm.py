"""Capping inside vLLM: three parts for its three kinds of process, all put in place by ``axiscap_plugin``.

- The API process reads the configuration and refuses requests that ask for what they may not have.
- The engine core decides each request's profile, once, and keeps its blocks apart in the prefix cache.
- Each worker caps the block outputs of its layers, inside the compiled graph.
"""

from __future__ import annotations

import contextlib
import contextvars
import copy
import importlib
import inspect
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from axiscap.fit import ModelFacts
from axiscap.serving import door, kv, metrics, state
from axiscap.serving import settings as shared
from axiscap.serving.control import Choices, Control, Told
from axiscap.serving.engine import Model, Rows, Scheduling, flat_result, refuse, run_again
from axiscap.serving.settings import KEY, OFF, Choice, ChoiceError, Settings, SettingsError
from axiscap.serving.streams import (
    Form,
    InconclusiveError,
    Read,
    ZeroedMemory,
    check_effect,
    check_form,
    read_returned,
)
from axiscap.serving.thinking import Tokens, marker_ids
from axiscap_plugin import wrap

_INSTANCE = "AXISCAP_INSTANCE"


def _settings(config: Any) -> Settings:
    return Settings.from_json(config.additional_config[KEY])


def _folder(config: Any) -> Path:
    return state.folder(config.instance_id)


# What of vLLM this stands on.

#: The versions that were run (docs/engines.md).
TESTED = "0.27 to 0.32"


class Point(NamedTuple):
    """A method of vLLM's that is wrapped or called, with the parameters that it must have, and what it is for."""

    module: str
    owner: str
    name: str
    parameters: tuple[str, ...]
    use: str


_CORE, _WORKER = "vllm.v1.engine.core", "vllm.v1.worker.worker_base"
_PROTOCOLS = "vllm.entrypoints.openai"
POINTS = (
    Point("vllm.engine.arg_utils", "EngineArgs", "create_engine_config", (), "the configuration is read there"),
    Point("vllm.v1.engine.input_processor", "InputProcessor", "process_inputs", ("params",), "choices are refused"),
    *(
        Point(f"{_PROTOCOLS}.{kind}.protocol", f"{request}Request", "to_beam_search_params", (), "beams are refused")
        for kind, request in (("chat_completion", "ChatCompletion"), ("completion", "Completion"))
    ),
    Point(_CORE, "EngineCore", "_initialize_kv_caches", ("vllm_config",), "the scheduler's part begins there"),
    Point(_CORE, "EngineCore", "preprocess_add_request", ("request",), "each request's profile is decided"),
    Point(_CORE, "EngineCore", "collective_rpc", ("method", "args", "kwargs"), "profiles change, and reach workers"),
    Point(_CORE, "EngineCore", "shutdown", (), "the server's folder goes"),
    Point("vllm.v1.core.sched.scheduler", "Scheduler", "schedule", (), "the checking mode sees a step"),
    Point(_WORKER, "WorkerWrapperBase", "init_device", (), "a worker's part begins there"),
)
#: Of a worker and its model runner: as objects, since each platform has classes of its own.
RUNNER_POINTS = ("load_model", "_dummy_run", "execute_model", "get_model")
WORKER_POINTS = ("compile_or_warm_up_model",)


def check_points() -> None:
    """Raises SettingsError where this vLLM has not what capping stands on: it would start, and not be capped."""
    for point in POINTS:
        try:
            owner = getattr(importlib.import_module(point.module), point.owner)
            found = inspect.signature(getattr(owner, point.name)).parameters
        except (ImportError, AttributeError):
            raise _unknown(f"{point.owner}.{point.name}", point.use) from None
        if missing := [name for name in point.parameters if name not in found]:
            raise _unknown(f"parameter {missing[0]} of {point.owner}.{point.name}", point.use)


def _check_object(owner: Any, names: Sequence[str]) -> None:
    for name in names:
        if not hasattr(owner, name):
            kind = getattr(owner, "__name__", type(owner).__name__)
            raise _unknown(f"{kind}.{name}", "the rows of a step, or blocks of the cache, are known by it")


def _unknown(what: str, use: str) -> SettingsError:
    import vllm

    return SettingsError(
        f"axiscap: vLLM {vllm.__version__} has no {what} ({use}), so that it cannot be capped; {TESTED} can"
    )


# The API process.

#: Where a request's body may carry its choice: OpenAI's and Anthropic's endpoints, and that of tokens.
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
    mine = shared.find(options)
    if mine is not None or shared.FILE_VARIABLE in os.environ:
        check_points()
    settings = shared.read(mine)
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
    wrap(InputProcessor, "process_inputs", _choose)
    for request in (ChatCompletionRequest, CompletionRequest):
        wrap(request, "to_beam_search_params", _refuse_choice_of_beams)
    global _part
    _part = settings.part
    folder = _folder(config)
    door.put_in_place(Choices(settings, folder), _PLACES, _change)
    _show_metrics(folder)
    if config.observability_config.otlp_traces_endpoint is not None:
        _trace()
    logging.getLogger("vllm.axiscap").info(settings.sentence())


def _fuse(config: Any) -> None:
    """Where vLLM compiles with its own passes, as it does for a GPU, ours follows them; but not an operator's own."""
    from vllm.config import CompilationMode
    from vllm.platforms import current_platform

    if config.mode == CompilationMode.VLLM_COMPILE:
        from axiscap.serving.vllm_norm import CapInNorm

        config.inductor_compile_config.setdefault(current_platform.pass_key, CapInNorm())


async def _change(app: Any, method: str, arguments: Sequence[Any]) -> str:
    """Has the engine core change a profile."""
    done: list[str] = await app.state.engine_client.collective_rpc(method, args=tuple(arguments))
    return done[0]


def _refuse(config: Any, settings: Settings) -> None:
    """What would cap the wrong rows, or none, stops the server."""
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
    if settings.tells_thinking:
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


def _choose(original: Callable[..., Any], processor: Any, *args: Any, **kwargs: Any) -> Any:
    """Refuses a request that asks for what it may not have, and notes what its client is told."""
    config = processor.vllm_config
    if KEY not in config.additional_config:
        return original(processor, *args, **kwargs)
    call = inspect.signature(original).bind(processor, *args, **kwargs)
    if call.arguments.get("resumable"):
        raise _to_client("streaming sessions are not served with axiscap: their turns share blocks under one profile")
    choices = processor.__dict__.get("_axiscap")
    if choices is None:
        choices = processor._axiscap = Choices(_settings(config), state.path(config.instance_id))
    params = copy.copy(call.arguments["params"])  # in one process with its client, the client's own
    extra = getattr(params, "extra_args", None) or {}
    try:
        told = choices.check(extra)
        kv.check_handed(extra, Choice(told.name, told.digest, "", positions=_part))
    except ChoiceError as error:
        raise _to_client(error) from None
    door.tell(told, getattr(params, "n", 1))
    params.extra_args = told.put(extra)
    call.arguments["params"] = params
    return original(*call.args, **call.kwargs)


_part = "all"  # of the rows that are capped, in the engine that this process serves


def _refuse_choice_of_beams(original: Callable[..., Any], request: Any, *args: Any, **kwargs: Any) -> Any:
    if _part != "all":
        raise _to_client("beam search reads what it wrote as prompts, which this server does not cap")
    if KEY in (request.vllm_xargs or {}):
        raise _to_client(f"beam search runs under the server's default profile and takes no {KEY}")
    return original(request, *args, **kwargs)


#: What a span says of a request.
_SPAN = ("axiscap.profile", "axiscap.digest")
_span: contextvars.ContextVar[dict[str, str]] = contextvars.ContextVar("axiscap_span")


def _trace() -> None:
    """Each request's span says its profile, where vLLM traces; where it traces in another way, the log says so."""
    from vllm.v1.engine import output_processor

    try:
        _check_object(output_processor.OutputProcessor, ["add_request", "do_tracing"])
        wrap(output_processor, "instrument_manual", _with_profile)
    except (SettingsError, AttributeError) as error:
        logging.getLogger("vllm.axiscap").warning("axiscap: spans say nothing of profiles: %s", error)
        return
    wrap(output_processor.OutputProcessor, "add_request", _remember_profile)
    wrap(output_processor.OutputProcessor, "do_tracing", _span_of)


def _remember_profile(original: Callable[..., Any], processor: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
    result = original(processor, request, *args, **kwargs)
    told = Told.of(request.sampling_params.extra_args) if request.sampling_params else None
    if told is not None:
        said = (told.name or OFF, told.digest or "-")
        processor.request_states[request.request_id].axiscap = dict(zip(_SPAN, said, strict=True))
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


# The engine core.


class Core(Scheduling):
    """The engine core's part: every request is decided here, and profiles change by its ``collective_rpc``."""

    key = "cache_salt"

    def __init__(self, core: Any) -> None:
        self._core = core
        self._settings = _settings(core.vllm_config)
        self._folder = _folder(core.vllm_config)
        workers = core.collective_rpc("axiscap_layers")
        missing = set(self._settings.layers) - {layer for layers in workers for layer in layers}
        if missing:
            raise SettingsError(f"axiscap: no worker holds the capped layers {sorted(missing)}")
        transfer = core.vllm_config.kv_transfer_config
        if transfer is not None and transfer.kv_connector == kv.SHARED:
            kv.keep_apart()
        if transfer is not None and transfer.kv_connector in kv.BY_REQUEST:
            kv.say_content()
        rpc = core.collective_rpc
        control = Control(self._settings, self._folder, lambda *profile: rpc("axiscap_place", args=profile))
        super().__init__(control)
        wrap(core, "preprocess_add_request", self._add)
        wrap(core, "collective_rpc", self._change)
        wrap(core, "shutdown", self._shutdown)
        if self._settings.written_only:
            from vllm.v1.core import kv_cache_utils

            _check_object(kv_cache_utils, [_KEYS])
            wrap(kv_cache_utils, _KEYS, _from_the_first_written)

    def extra(self, request: Any) -> Mapping[str, Any] | None:
        given: Mapping[str, Any] | None = request.sampling_params.extra_args
        return given

    def carry(self, request: Any, extra: dict[str, Any]) -> None:
        request.sampling_params = copy.copy(request.sampling_params)  # in one process with its client, the client's own
        request.sampling_params.extra_args = extra

    def _add(self, original: Callable[..., Any], request: Any) -> Any:
        with self.control.lock:
            name = request.external_req_id or request.request_id
            choice = self.decide(request, name, apart=not self._settings.written_only)
            kv.check_handed(request.sampling_params.extra_args, choice)
            made = original(request)
            self.control.begun(made[0], choice)
        if self._settings.check:
            wrap(self._core.scheduler, "schedule", _with_view)
        return made

    def _change(self, original: Callable[..., Any], method: Any, *args: Any, **kwargs: Any) -> Any:
        """The engine's own ``collective_rpc``; three methods are ours, all others go to the workers."""
        control = self.control
        ours: dict[object, Callable[..., str]] = {
            "axiscap_load": control.load,
            "axiscap_retire": control.retire,
            "axiscap_move_floors": control.move_floors,
        }
        if method not in ours:
            return original(method, *args, **kwargs)
        bound = inspect.signature(original).bind(method, *args, **kwargs).arguments
        return [ours[method](*bound.get("args", ()), **(bound.get("kwargs") or {}))]

    def _shutdown(self, original: Callable[..., Any]) -> Any:
        shutil.rmtree(self._folder, ignore_errors=True)
        return original()


#: What vLLM hashes of a block beside its tokens, where only what the model wrote is capped.
_KEYS = "generate_block_hash_extra_keys"


def _from_the_first_written(original: Callable[..., Any], request: Any, start: int, end: int, *args: Any) -> Any:
    """The blocks of a prompt are those of a request that is left alone; the first with a token that the model wrote is
    set apart, and so are those behind it.
    """
    keys, at = original(request, start, end, *args)
    choice = Choice.of(request.sampling_params.extra_args)
    if choice.digest is not None and start <= request.num_prompt_tokens < end:
        keys = (*(keys or ()), ("cache_salt", choice.salt))
    return keys, at


def _with_view(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """For the checking mode: the step carries the scheduler's own view of whose rows it computes."""
    step = original(*args, **kwargs)
    requests = original.__self__.requests  # type: ignore[attr-defined]
    step.axiscap_view = {name: requests[name].axiscap_digest for name in step.num_scheduled_tokens}
    return step


# The workers.


class VllmWorker(Model):
    """A worker's part: caps the block outputs of its layers, and tells the buffers whose rows a step computes."""

    _is_first = _is_filled = _is_warming_up = _awaits_prompts = False
    _handed_on: Any = None

    def __init__(self, worker: Any) -> None:
        self._runner = runner = worker.model_runner
        self._config = worker.vllm_config
        self._rank = worker.rank
        _check_object(worker, WORKER_POINTS)
        _check_object(runner, RUNNER_POINTS)
        self._v2 = not hasattr(runner, "_prepare_inputs")
        if self._v2:
            _check_object(runner, ["prepare_inputs"])
        self._dummy = runner._dummy_run
        wrap(runner, "load_model", self._load_model)
        wrap(runner, "_dummy_run", self._dummy_run)
        wrap(runner, "execute_model", self._execute)
        if self._v2:
            wrap(runner, "prepare_inputs", self._prepare_v2)
        else:
            wrap(runner, "_prepare_inputs", self._prepare_v1)
        self._begun: dict[str, Sequence[int]] = {}  # of the step's new requests, what is to be computed of them
        wrap(worker, "compile_or_warm_up_model", self._warm_up)
        for name in ("reload_weights", "finish_weight_update"):
            if hasattr(worker, name):
                wrap(worker, name, self._load_weights)
        worker.axiscap_layers = self._layers
        worker.axiscap_place = lambda *profile: self.worker.place(*profile)

    def _load_model(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        if hasattr(self, "worker"):
            raise SettingsError("axiscap: the model is loaded once more into a worker that caps another one")
        runner, parallel, settings = self._runner, self._config.parallel_config, _settings(self._config)
        model = runner.get_model()
        language = model.get_language_model() if hasattr(model, "get_language_model") else model
        # Only one rank of those that hold the same rows and layers counts them.
        counts = self._rank % parallel.tensor_parallel_size == 0
        totals = _folder(self._config) / f"totals-{parallel.data_parallel_index}-{self._rank}.json"
        self.hold(
            language,
            settings,
            layers=self._config.model_config.hf_text_config.num_hidden_layers,
            max_rows=runner.max_num_tokens,
            device=torch.device(runner.device),
            requests=self._config.scheduler_config.max_num_seqs,
            totals=totals if counts else None,
            markers=self._markers(settings) if settings.tells_thinking else None,
        )
        with _uncompiled(model), ZeroedMemory():  # type: ignore[no-untyped-call]
            self.cap_blocks(lambda: self._dummy_result(is_profile=True, **{"skip_attn": True} if self._v2 else {}))
        return result

    def _layers(self) -> list[int]:
        if not hasattr(self, "worker"):
            raise SettingsError("axiscap: the worker loaded no model that could be capped")
        return self.worker.buffers.layers

    def _markers(self, settings: Settings) -> tuple[int, int]:
        model = self._config.model_config
        options = {"revision": model.tokenizer_revision, "trust_remote_code": model.trust_remote_code}
        return marker_ids(settings.markers, model.tokenizer, **options)

    def _dummy_run(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self.worker.clear()
        return original(*args, **kwargs)

    def _execute(self, original: Callable[..., Any], step: Any, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("dummy_run"):  # the second runner's _dummy_run, which returns nothing on earlier pipeline ranks
            self._handed_on = original(step, *args, **kwargs)
            return self._handed_on
        if self._is_warming_up:  # requests that the engine makes up
            self.worker.clear()
            return original(step, *args, **kwargs)
        if self.fault is not None:
            raise self.fault
        new = ((request.req_id, Choice.of(request.sampling_params.extra_args)) for request in step.scheduled_new_reqs)
        self.worker.begin(step.finished_req_ids, new)
        if self._v2:
            told = ((new.req_id, new.prefill_token_ids or new.prompt_token_ids) for new in step.scheduled_new_reqs)
            self._begun = {name: ids or () for name, ids in told}
        self._is_filled = False
        result = original(step, *args, **kwargs)
        if step.total_num_scheduled_tokens and not self._is_filled:
            raise RuntimeError("axiscap: a step ran without the slots of its rows, so that it was not capped")
        self.worker.end()
        return result

    def _prepare_v1(self, original: Callable[..., Any], step: Any, counts: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(step, counts, *args, **kwargs)
        self._fill(step, counts)
        return result

    def _prepare_v2(self, original: Callable[..., Any], step: Any, *args: Any, **kwargs: Any) -> Any:
        batch = original(step, *args, **kwargs)
        self._fill(step, batch)
        return batch

    def _fill(self, step: Any, prepared: Any) -> None:
        if self._is_warming_up:
            return
        rows = self.rows(prepared)
        self._is_filled, self._is_first = True, len(rows.names) > 0 and not rows.starts.any()
        tokens = self._tokens(prepared, rows) if self.worker.reads_tokens else None
        self.worker.fill(*rows, getattr(step, "axiscap_view", None), tokens)
        self.worker.watch()

    def _tokens(self, prepared: Any, rows: Rows) -> Tokens:
        total = int(rows.counts.sum())
        if self._v2:
            return Tokens(prepared.input_ids[:total], lambda at, count: self._begun[rows.names[at]][:count])
        known = self._runner.input_batch.token_ids_cpu
        return Tokens(self._runner.input_ids.gpu[:total], lambda at, count: known[at, :count].tolist())

    def rows(self, step: Any) -> Rows:
        """
        Parameters
        ----------
        step
            as the model runner has prepared it: the second one's batch; of the first, each request's rows.
        """
        if self._v2:
            names = step.req_ids
            # Not num_scheduled_tokens, which with some ways to verify drafts is more than there are.
            counts = np.diff(step.query_start_loc_np[: len(names) + 1])
            if int(counts.sum()) != step.num_tokens:
                raise RuntimeError(f"axiscap: {step.num_tokens} rows in a step, but {counts.sum()} are known")
            lengths, done = self._runner.req_states.prompt_len.np[step.idx_mapping_np], step.num_computed_tokens_np
        else:
            batch, counts = self._runner.input_batch, step
            names = batch.req_ids
            lengths, done = (each[: len(names)] for each in (batch.num_prompt_tokens, batch.num_computed_tokens_cpu))
        prompts = np.minimum(np.maximum(lengths - done, 0), counts).astype(np.int32)
        return Rows(names, counts, prompts, done)

    def reader(self, block: nn.Module, layer: int) -> Read:
        kind = type(block).__name__
        return lambda args, kwargs, returned: read_returned(returned, layer, kind)

    def cap_block(self, block: nn.Module, layer: int, form: Form, tensors: tuple[Tensor, ...]) -> None:
        """Caps what a decoder layer returns, by a hook: Dynamo traces it into the model's graph.

        The hook's tensors are buffers of the layer, whose addresses stay.
        """
        kind = type(block).__name__
        parts = ("axes", "floors", "rows", "projections", "targets", "lifts", "norm_limits")
        names = [f"axiscap_{part}" for part in parts]
        for name, tensor in zip(names, tensors, strict=True):
            block.register_buffer(name, tensor, persistent=False)

        def cap(module: Any, args: Any, returned: Any) -> None:
            output = hidden, residual, _ = read_returned(returned, layer, kind)
            check_form(output, form, layer, kind)
            bank = [getattr(module, name) for name in names]
            if form is Form.SUM:
                torch.ops.axiscap.cap_residual_.buffers(hidden, residual, *bank)
            else:
                torch.ops.axiscap.cap_.buffers(hidden, *bank)

        block.register_forward_hook(cap)

    def _warm_up(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._is_warming_up = True
        result = original(*args, **kwargs)
        self._is_warming_up = False
        self._check_effect()
        return result

    def _load_weights(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Checks the effect once more. Whoever loads weights gets the error, and so does every later step."""
        result = original(*args, **kwargs)
        self._check_effect()
        return result

    def _check_effect(self) -> None:
        """Stops the server unless the cap is in force at every layer of the model as it runs.

        Raises
        ------
        SettingsError
            It is not.
        """
        try:
            if self.worker.buffers.layers:
                self._check_layers()
        except SettingsError as error:
            self.fault = error
            raise
        self.fault = None

    def _check_layers(self) -> None:
        buffers = self.worker.buffers
        # With attention: some backends leave the output of a pass without it uninitialised.
        run = partial(self._dummy_result, **{"skip_attn": False} if self._v2 else {"force_attention": True})
        # Blocks with a state of their own leave the rows of a pass without requests uninitialised.
        is_conclusive = not self._config.model_config.has_inner_state
        if is_conclusive:
            try:
                check_effect(buffers, run, "the compiled model")
            except InconclusiveError:
                is_conclusive = False
        self._is_first = False  # of an earlier step: the passes below are over dummy rows
        if not is_conclusive and not self._awaits_prompts:
            self._awaits_prompts = True
            wrap(self._runner.get_model(), "forward", self._check_first_step)
        with torch.no_grad(), buffers.kept():
            buffers.floors.fill_(-torch.inf)
            first = {}
            for digest, slot in buffers.slot_of.items():
                buffers.rows.fill_(slot)
                run()
                first[digest] = buffers.all_projections[:, 0].clone()
        for digest, projections in first.items():
            self.worker.look_for_sinks(digest, projections)
        self.worker.clear()

    def _check_first_step(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Checks the effect with the first prompts. To run them again does no harm to any state of the model."""
        if self._is_first:
            del self._runner.get_model().forward  # this wrapper
            self._awaits_prompts = False
            check_effect(self.worker.buffers, lambda: _flat(run_again(original, *args, **kwargs)), "the compiled model")
        return original(*args, **kwargs)

    def _dummy_result(self, **options: bool) -> Tensor:
        """The result of a pass over one dummy row: hidden states, or the pair that goes to the next pipeline rank."""
        hidden = self._dummy(1, **options)[0]
        return _flat(self._handed_on if hidden is None else hidden)


def _flat(result: Any) -> Tensor:
    """The result of the model's pass as one vector."""
    hidden = result[0] if isinstance(result, tuple) else result  # some models return more for drafts
    return flat_result(getattr(hidden, "tensors", {"": hidden}).values())


@contextlib.contextmanager
def _uncompiled(model: nn.Module) -> Iterator[None]:
    """Has the model run without compilation, and leaves its first compilation for later."""
    parts = [part for part in model.modules() if getattr(part, "do_not_compile", True) is False]
    for part in parts:
        part.do_not_compile = True  # type: ignore[assignment]
    try:
        with torch.compiler.set_stance("force_eager"):  # a model that torch compiles as a whole
            yield
    finally:
        for part in parts:
            part.do_not_compile = False  # type: ignore[assignment]
