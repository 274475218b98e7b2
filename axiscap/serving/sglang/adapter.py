"""Capping inside SGLang, put in place by ``axiscap_plugin`` in each of its processes.

- The process that talks to clients refuses requests that ask for what they may not have.
- Each scheduler decides its requests' profiles, keeps their tokens apart in the radix cache, and caps the block outputs
  of the model that it runs, in the same process.

A block's output is complete where the next block reads it: what a layer returns may be a sum that other ranks owe, and
the residual lies with the batch. So the cap has the stream complete the layer's output, which the next layer's boundary
would do otherwise, and then corrects the residual that is added to it; on a GPU the norm that reads both does that
(``norm``).
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import json
import logging
import os
import secrets
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from axiscap.profile.fit import ModelFacts
from axiscap.serving import shared_folder
from axiscap.serving.front import metrics, middleware
from axiscap.serving.front.profiles import ServedProfiles
from axiscap.serving.registry import describe_start
from axiscap.serving.request import KEY, Assignment, RequestError, SettingsError
from axiscap.serving.scheduler import Control, Scheduling
from axiscap.serving.settings import Settings, read_settings, refuse
from axiscap.serving.sglang import norm
from axiscap.serving.worker.model import Model, Rows, flat_result, run_again
from axiscap.serving.worker.streams import (
    Form,
    InconclusiveError,
    Output,
    Read,
    check_effect,
    check_form,
    read_returned,
)
from axiscap.serving.worker.thinking import Tokens, marker_ids
from axiscap_plugin.wrapping import wrap

_INSTANCE = "AXISCAP_INSTANCE"
#: Devices on which the engine's norm adds both streams in one launch, and can take in the cap.
_JOINED = {"cuda"}

#: The method of a call between the server's process and its schedulers, and the seconds that they have for it.
_CHANGE, _PATIENCE = "axiscap_change", 60.0


class _Process:
    """AxisCap's state in one process of SGLang."""

    def __init__(self) -> None:
        settings = read_settings(None)
        assert settings is not None
        self.settings = settings
        # The first process of a server names the folder that all of them share.
        self.folder = shared_folder.folder(os.environ.setdefault(_INSTANCE, f"sglang-{os.getpid()}-{time.time_ns()}"))
        self.profiles = ServedProfiles(settings, self.folder)
        self.scheduling: SglangScheduling
        self.model: SglangModel | None = None
        #: The requests that the worker counts, by id.
        self.running: dict[str, weakref.ref[Any]] = {}

    def take_gone(self) -> list[str]:
        """Forgets the requests that are finished, or that the scheduler dropped; returns their ids."""
        gone = [name for name, ref in self.running.items() if (request := ref()) is None or request.finished()]
        for name in gone:
            del self.running[name]
        return gone


_process: _Process


def wrap_engine() -> None:
    """Wraps the methods of SGLang that this process uses.

    Raises
    ------
    SettingsError
        The configuration is wrong; the message is one sentence.
    """
    global _process
    _process = _Process()

    from sglang.srt.entrypoints import http_server
    from sglang.srt.managers.schedule_batch import Req
    from sglang.srt.managers.scheduler import Scheduler
    from sglang.srt.managers.tokenizer_manager import TokenizerManager
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch
    from sglang.srt.model_executor.model_runner import ModelRunner
    from sglang.srt.model_executor.runner.eager_runner import EagerRunner

    fields = (("custom_params",), ("sampling_params", "custom_params"))
    middleware.wrap_applications(_process.profiles, fields, _change)
    wrap(TokenizerManager, "_validate_one_request", _validate)
    wrap(http_server, "add_prometheus_middleware", _with_totals)
    wrap(Scheduler, "__init__", _start_scheduler)
    wrap(Scheduler, "handle_generate_request", _assign)
    wrap(Req, "__init__", _begin)
    wrap(Scheduler, "handle_rpc_request", _rpc)
    wrap(Scheduler, "on_idle", _idle)
    wrap(ModelRunner, "load_model", _load_model)
    wrap(EagerRunner, "__init__", _cap_blocks)
    wrap(ModelRunner, "init_cuda_graphs", _check_decoding)
    wrap(ModelRunner, "forward", _forward)
    original = ForwardBatch.init_new.__func__
    ForwardBatch.init_new = classmethod(
        lambda cls, batch, runner, **kwargs: _with_rows(original, cls, batch, runner, kwargs)
    )


# The process that talks to clients.


def _custom_params(sampling: Any) -> dict[str, Any]:
    """A request's custom parameters, as SGLang has them before and after it parses the sampling parameters."""
    custom = sampling.get("custom_params") if isinstance(sampling, dict) else getattr(sampling, "custom_params", None)
    return custom if isinstance(custom, dict) else {}


def _validate(original: Callable[..., Any], manager: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
    result = original(manager, request, *args, **kwargs)
    sampling = request.sampling_params
    requested = _process.profiles.resolve(_custom_params(sampling))
    if isinstance(sampling, dict):
        sampling["custom_params"], answers = requested.put(_custom_params(sampling)), sampling.get("n")
    else:
        sampling.custom_params, answers = requested.put(_custom_params(sampling)), sampling.n
    middleware.note_profile(requested, answers or 1)
    if getattr(request, "session_params", None) or getattr(request, "session_id", None):
        raise RequestError("sessions are not served with axiscap: their turns share a cache under one profile")
    if isinstance(sampling, dict) and (sampling.get("beam_width") or 1) > 1:
        raise RequestError("beam search is not served with axiscap")
    return result


async def _change(app: Any, method: str, arguments: Sequence[Any]) -> str:
    """Has every scheduler change a profile. They answer through the server's folder: what SGLang has for such calls
    answers its Engine alone.
    """
    from sglang.srt.entrypoints import http_server
    from sglang.srt.managers.io_struct import RpcReqInput

    manager = http_server.get_global_state().tokenizer_manager
    ticket = secrets.token_hex(16)
    call = json.dumps({"method": method, "arguments": list(arguments), "ticket": ticket})
    manager._dispatch_to_scheduler(RpcReqInput(method=_CHANGE, parameters={"call": call}))
    expected = manager.server_args.dp_size
    answers = (await shared_folder.await_answers(_process.folder, {ticket: expected}, _PATIENCE))[ticket]
    if len(answers) < expected:
        raise TimeoutError(f"{len(answers)} of {expected} schedulers have answered within {_PATIENCE} s")
    for answer in answers:
        if "error" in answer:
            raise ValueError(answer["error"])
    return str(answers[0]["done"])


def _with_totals(original: Callable[..., Any], app: Any) -> Any:
    """Adds the totals to the registry of SGLang's metrics page, which the original makes."""
    import prometheus_client

    registry_class = prometheus_client.CollectorRegistry

    def with_totals(*args: Any, **kwargs: Any) -> Any:
        registry = registry_class(*args, **kwargs)
        metrics.show_in(registry)
        return registry

    metrics.show(_process.folder)
    prometheus_client.CollectorRegistry = with_totals  # type: ignore[assignment,misc]
    try:
        return original(app)
    finally:
        prometheus_client.CollectorRegistry = registry_class  # type: ignore[misc]


# The scheduler.


def _parallel() -> Any:
    from sglang.srt.runtime_context import get_parallel

    return get_parallel()


def _start_scheduler(original: Callable[..., Any], scheduler: Any, *args: Any, **kwargs: Any) -> None:
    original(scheduler, *args, **kwargs)
    model = _process.model
    if model is None or model.fault is not None:
        raise SettingsError("axiscap: the scheduler loaded no model that could be capped")
    parallel = _parallel()
    share = parallel.tp_rank == 0 and parallel.pp_rank == 0
    if share:
        logging.getLogger("axiscap").info(describe_start(_process.settings))
    # Every rank gets the same requests and changes in the same order, and so assigns the same profiles.
    control = Control(_process.settings, _process.folder, model.worker.copy_profile, share=share)
    _process.scheduling = SglangScheduling(control)
    scheduler.axiscap_answers = share
    scheduler.axiscap_load = control.load
    scheduler.axiscap_retire = control.retire
    scheduler.axiscap_move_floors = control.move_floors


class SglangScheduling(Scheduling):
    key = "extra_key"

    def extra(self, request: Any) -> Mapping[str, Any]:
        return _custom_params(request.sampling_params)

    def carry(self, request: Any, extra: dict[str, Any]) -> None:
        request.sampling_params = copy.copy(request.sampling_params)
        request.sampling_params.custom_params = extra


def _assign(original: Callable[..., Any], scheduler: Any, request: Any, **kwargs: Any) -> Any:
    # A copy: a pipeline rank hands the request on after this, and the next rank resolves the client's own field.
    assigned = copy.copy(request)
    try:
        _process.scheduling.assign(assigned, request.rid)
    except RequestError as error:  # the profile was retired on the way here
        return original(scheduler, request, mm_input_error=str(error))
    return original(scheduler, assigned, **kwargs)


def _begin(original: Callable[..., Any], request: Any, *args: Any, **kwargs: Any) -> None:
    """While SGLang's own object for a request lives, its profile keeps its slot."""
    original(request, *args, **kwargs)
    if isinstance(_custom_params(request.sampling_params).get(KEY), dict):
        _process.scheduling.control.track(request, Assignment.read(request.sampling_params.custom_params))


def _rpc(original: Callable[..., Any], scheduler: Any, request: Any) -> Any:
    """A change of a profile, from the server's process; all other calls are the engine's own."""
    if request.method != _CHANGE:
        return original(scheduler, request)
    call = json.loads(request.parameters["call"])
    try:
        answer = {"done": getattr(scheduler, call["method"])(*call["arguments"])}
    except Exception as error:  # it is the operator's to know, and no reason for a scheduler to end
        answer = {"error": str(error)}
    if scheduler.axiscap_answers:
        shared_folder.write_answer(_process.folder, call["ticket"], answer)
    return None


def _idle(original: Callable[..., Any], scheduler: Any) -> Any:
    if _process.model is not None:
        _process.model.worker.begin(_process.take_gone(), ())
        _process.model.worker.end()
    return original(scheduler)


# The model.


def _load_model(original: Callable[..., Any], runner: Any) -> Any:
    result = original(runner)
    if runner.is_draft_worker:
        return result
    _refuse(runner.server_args, _process.settings)
    config, text = runner.model_config, runner.model_config.hf_text_config
    facts = ModelFacts.of_configs(text.num_hidden_layers, config.hidden_size, text, config.hf_config)
    _process.settings = _process.settings.for_model(facts)
    _process.model = _hold_model(runner, text.num_hidden_layers)
    return result


def _hold_model(runner: Any, layers: int) -> SglangModel:
    """Makes the buffers of a loaded model of so many layers, those of other pipeline ranks included."""
    args, parallel = runner.server_args, _parallel()
    data_rank = (parallel if hasattr(parallel, "dp_rank") else runner.ps).dp_rank or 0  # before 0.5.19: the runner's
    totals = _process.folder / f"totals-{data_rank}-{parallel.pp_rank}.json"
    most_requests = getattr(args, "max_running_requests", None) or 4096
    longest_step = max(
        runner.model_config.context_len,
        getattr(args, "max_prefill_tokens", None) or 0,
        getattr(args, "chunked_prefill_size", None) or 0,
    )
    # Some kinds of drafts read a layer's output as well, and a deterministic engine has other norms.
    has_readers = args.speculative_algorithm or getattr(args, "enable_deterministic_inference", False)
    is_joined = runner.device in _JOINED and not has_readers
    model = SglangModel(parallel.tp_size, norm.readers(runner.model, layers) if is_joined else {})
    model.hold(
        runner.model,
        _process.settings,
        layers=layers,
        max_rows=longest_step + most_requests,
        device=torch.device(runner.device),
        requests=64,
        totals=totals if parallel.tp_rank == 0 else None,
        markers=_markers(args) if _process.settings.separates_thinking else None,
    )
    return model


def _cap_blocks(original: Callable[..., Any], eager: Any, runner: Any, **kwargs: Any) -> None:
    """Caps the layers as soon as the model can run, and before anything of it is captured."""
    original(eager, runner, **kwargs)
    model = _process.model
    if model is not None and not runner.is_draft_worker and not model.is_capped:
        model.cap_blocks(lambda: _dummy_pass(eager)[0])
        model.is_capped = True


def _check_decoding(original: Callable[..., Any], runner: Any, *args: Any, **kwargs: Any) -> None:
    """Stops the server unless the cap comes through when it decodes, by a captured graph or without."""
    original(runner, *args, **kwargs)
    if _process.model is None or runner.is_draft_worker:
        return
    if not _process.model.is_capped:
        raise SettingsError("axiscap: this SGLang runs no model before it captures graphs, so that it cannot be capped")
    _check_effect(runner)

    def update(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Checks once more. Whoever loads weights gets the error, and so does every later batch."""
        result = original(*args, **kwargs)
        _check_effect(runner)
        return result

    updater = type(runner.weight_updater)
    for name in dir(updater):
        if name.startswith("update_weights"):
            wrap(updater, name, update)


def _check_effect(runner: Any) -> None:
    """Checks the effect of the cap on a decoding step of request 0, which SGLang keeps for padding."""
    model = _process.model
    assert model is not None
    _, batch, proxies = _dummy_pass(runner.eager_runner)
    forward = partial(inspect.unwrap(type(runner).forward), runner, batch)
    run = partial(run_again, forward, pp_proxy_tensors=proxies)
    try:
        check_effect(model.worker.buffers, lambda: _result(run()), "the decoding model")
    except InconclusiveError:
        pass  # a block changed its state: the first prompts show the effect
    except SettingsError as error:
        model.fault = error
        raise
    model.fault = None
    model.worker.clear()


def _dummy_pass(eager: Any) -> tuple[Tensor, Any, Any]:
    """Runs the model on one request's rows, without a graph; returns its result, its batch, and what it had from the
    pipeline rank before.

    The rows are those that SGLang itself makes up: of request 0 of its pool, in the block of the cache for padding.
    """
    runner = eager.model_runner
    rows = runner.decode_num_tokens_per_req() if runner.spec_algorithm.is_speculative() else 1
    size = runner.model_config.hidden_size
    with torch.device(runner.device):
        ids, lengths = torch.zeros(rows, dtype=torch.int64), torch.ones(1, dtype=torch.int64)
        count = torch.zeros(1, dtype=torch.int32)
        proxies = {name: torch.zeros(rows, size, dtype=runner.dtype) for name in ("hidden_states", "residual")}
        buffers = SimpleNamespace(
            input_ids=ids, positions=ids.clone(), out_cache_loc=ids.clone(), req_pool_indices=torch.zeros_like(lengths),
            seq_lens=lengths, seq_lens_cpu=lengths.cpu(), mrope_positions=ids.repeat(3, 1), encoder_lens=None,
            custom_mask=torch.ones((1 + rows) * rows, dtype=torch.bool), next_token_logits_buffer=None,
            num_token_non_padded=count.clone(), pp_proxy_tensors=proxies, ngram_embedding_info=None,
            global_num_tokens_gpu=count.clone(), global_num_tokens_for_logprob_gpu=count.clone(),
        )  # fmt: skip
    passes: list[tuple[Any, Any, Any]] = []

    @contextlib.contextmanager
    def noted() -> Iterator[None]:
        forward = runner.model.forward

        @functools.wraps(forward)
        def noting(ids: Any, positions: Any, batch: Any, **kwargs: Any) -> Any:
            proxies = kwargs.get("pp_proxy_tensors")
            passes.append((forward(ids, positions, batch, **kwargs), batch, proxies))
            return passes[-1][0]

        own = "forward" in vars(runner.model)
        runner.model.forward = noting
        try:
            yield
        finally:
            if own:
                runner.model.forward = forward
            else:
                del runner.model.forward

    context = getattr(eager, "model_context", contextlib.nullcontext)
    with torch.no_grad(), context():
        eager._dummy_run(1, noted(), buffers=buffers)
    ((result, batch, proxies),) = passes
    return _result(result), batch, proxies


def _result(output: Any) -> Tensor:
    """The result of a pass as one vector: logits, or the tensors for the next pipeline rank."""
    output = getattr(output, "logits_output", output)
    return flat_result(output.tensors.values() if hasattr(output, "tensors") else [output.next_token_logits])


def _markers(args: Any) -> tuple[int, int]:
    tokenizer = getattr(args, "tokenizer_path", None) or args.model_path
    return marker_ids(_process.settings.markers, tokenizer, trust_remote_code=args.trust_remote_code)


def _refuse(args: Any, settings: Settings) -> None:
    """Raises SettingsError for an option under which the wrong rows would be capped, or none."""
    reasons = {
        "attention data parallelism shards the rows (--enable-dp-attention)": getattr(
            args, "enable_dp_attention", False
        ),
        "two-batch overlap splits the rows (--enable-two-batch-overlap)": getattr(
            args, "enable_two_batch_overlap", False
        ),
        "attention context parallelism shards the rows": getattr(args, "attn_cp_size", 1) > 1,
        "prefill and decode in different servers": getattr(args, "disaggregation_mode", "null") != "null",
        "external stores of the cache (--enable-hierarchical-cache)": getattr(args, "enable_hierarchical_cache", False),
        "external stores of the cache (--enable-lmcache)": getattr(args, "enable_lmcache", False),
        "diffusion models": bool(getattr(args, "dllm_algorithm", None)),
        "multiplexed prefill and decode (--enable-pdmux)": getattr(args, "enable_pdmux", False),
        "elastic ranks load models of their own (--elastic-ep-backend)": bool(
            getattr(args, "elastic_ep_backend", None)
        ),
        "memory that is released takes the profiles with it (--enable-memory-saver)": getattr(
            args, "enable_memory_saver", False
        ),
    }
    if settings.separates_thinking:
        apart = f'with positions "{settings.positions}"'
        reasons[f"drafts {apart}: which of them count is known too late"] = bool(args.speculative_algorithm)
        reasons[f"pipeline ranks {apart}"] = args.pp_size > 1
    refuse("SGLang", reasons)


class SglangModel(Model):
    """
    Parameters
    ----------
    ranks
        that share each layer's sums.
    norms
        of a layer, the norm that takes its cap in, where one does.
    """

    def __init__(self, ranks: int, norms: Mapping[int, nn.Module]) -> None:
        self._ranks, self._norms = ranks, norms
        self.is_capped = self.is_tested_on_prompts = False

    def rows(self, step: Any) -> Rows:
        """
        Parameters
        ----------
        step
            the scheduler's batch, and how many rows the model gets of it.
        """
        batch, rows = step
        requests = batch.reqs
        if batch.forward_mode.is_decode_or_idle() or batch.extend_lens is None or batch.forward_mode.is_target_verify():
            each = rows // max(1, len(requests))
            counts, prompts = np.full(len(requests), each, np.int32), np.zeros(len(requests), np.int32)
            lengths = getattr(batch, "seq_lens_cpu", None)  # with the row of a decoding step, without those of drafts
            known = [len(r.origin_input_ids) for r in requests] if lengths is None else lengths.tolist()
            starts = np.array(known, np.int32) - (lengths is not None and not batch.forward_mode.is_target_verify())
        else:
            counts = np.array(batch.extend_lens, np.int32)
            left = [len(r.origin_input_ids) - done for r, done in zip(requests, batch.prefix_lens, strict=True)]
            prompts = np.clip(np.array(left, np.int32), 0, counts)
            starts = np.array(batch.prefix_lens, np.int32)
        if int(counts.sum()) != rows:
            raise RuntimeError(
                f"axiscap: {rows} rows of a {batch.forward_mode.name} batch, but {counts.sum()} are known"
            )
        return Rows([request.rid for request in requests], counts, prompts, starts)

    def reader(self, block: nn.Module, layer: int) -> Read:
        names = list(inspect.signature(block.forward).parameters)
        kind = type(block).__name__
        position = names.index("forward_batch") if "forward_batch" in names else len(names)

        def read(args: tuple[Any, ...], kwargs: dict[str, Any], returned: Any) -> Output:
            batch = kwargs.get("forward_batch", args[position] if position < len(args) else None)
            stream = getattr(batch, "residual_stream", None)
            if stream is not None:
                pending = stream.pending
                if pending is not None and not pending.update.is_plain_add:
                    raise SettingsError(
                        f"axiscap: layer {layer}, a {kind}, does not add its output to a plain residual"
                    )
                hidden, residual = stream.complete(returned), stream.residual if pending is not None else None
                return read_returned((hidden, residual), layer, kind)._replace(returned=hidden)
            if self._ranks > 1:
                raise SettingsError(f"axiscap: layer {layer}, a {kind}, may return a sum that other ranks still owe")
            return read_returned(returned, layer, kind)

        return read

    def cap_block(self, block: nn.Module, layer: int, form: Form, tensors: tuple[Tensor, ...]) -> None:
        read, kind = self.reader(block, layer), type(block).__name__
        in_norm = form is Form.SUM and layer in self._norms
        if in_norm:
            norm.take_in(self._norms[layer], tensors)

        def cap(module: Any, args: Any, kwargs: Any, returned: Any) -> Any:
            output = hidden, residual, returned = read(args, kwargs, returned)
            check_form(output, form, layer, kind)
            if form is not Form.SUM:
                torch.ops.axiscap.cap_.buffers(hidden, *tensors)
            elif not in_norm:
                torch.ops.axiscap.cap_residual_.buffers(hidden, residual, *tensors)
            return returned

        block.register_forward_hook(cap, with_kwargs=True)


def _with_rows(original: Callable[..., Any], cls: Any, batch: Any, runner: Any, kwargs: Any) -> Any:
    """Keeps the rows of the batch's requests with it; the buffers are filled when it runs."""
    forward = original(cls, batch, runner, **kwargs)
    if not runner.is_draft_worker:
        assert _process.model is not None
        forward.axiscap_rows = (list(batch.reqs), _process.model.rows((batch, len(forward.input_ids))))
    return forward


def _forward(original: Callable[..., Any], runner: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
    model = _process.model
    if runner.is_draft_worker or model is None:
        return original(runner, batch, *args, **kwargs)
    if model.fault is not None and getattr(batch, "rids", None):
        raise model.fault
    worker, buffers = model.worker, model.worker.buffers
    requests_and_rows: tuple[list[Any], Rows] | None = getattr(batch, "axiscap_rows", None)
    if requests_and_rows is None:  # a warm-up or a capture of the engine's own
        if getattr(batch, "rids", None):
            raise RuntimeError("axiscap: a batch ran without the slots of its rows, so that it was not capped")
        worker.clear()
        return original(runner, batch, *args, **kwargs)
    requests, rows = requests_and_rows
    _fill(batch, requests, rows)
    # To run prompts without a prefix again does no harm to any state of the model.
    is_fresh = batch.forward_mode.name == "EXTEND" and len(requests) > 0 and not rows.starts.any()
    if is_fresh and not model.is_tested_on_prompts:
        forward = partial(original, runner, batch)
        check_effect(buffers, lambda: _result(run_again(forward, *args, **kwargs)), "the model that reads prompts")
        model.is_tested_on_prompts = True
    if rows.counts.any():
        worker.watch()
    result = original(runner, batch, *args, **kwargs)
    if len(requests) and rows.starts[0] == 0 and (digest := worker.unseen(requests[0].rid)) is not None:
        worker.look_for_sinks(digest, buffers.all_projections[:, 0])
    worker.end()
    return result


def _fill(batch: Any, requests: Sequence[Any], rows: Rows) -> None:
    """Gives the worker the requests and the rows of the step that comes."""
    assert _process.model is not None
    worker = _process.model.worker
    gone = _process.take_gone()
    new = [request for request in requests if request.rid not in _process.running]
    worker.begin(gone, [(request.rid, Assignment.read(request.sampling_params.custom_params)) for request in new])
    _process.running.update((request.rid, weakref.ref(request)) for request in new)
    # The checking mode compares the rows with the key by which the radix cache tells requests apart.
    view = {request.rid: _content(request.extra_key) for request in requests} if _process.settings.check else None
    tokens = None
    if worker.reads_tokens:
        tokens = Tokens(
            batch.input_ids[: int(rows.counts.sum())],
            lambda at, count: [*requests[at].origin_input_ids, *requests[at].output_ids][:count],
        )
    worker.fill(*rows, view, tokens)


def _content(key: str) -> str | None:
    """The digest in the key by which the radix cache tells requests apart."""
    digest = key.removeprefix(f"{KEY}=").split(";")[0].split("/")[0]
    return None if digest == "-" else digest
