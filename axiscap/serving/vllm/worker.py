"""vLLM's workers: each caps the block outputs of its layers, inside the compiled graph."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from axiscap.serving.request import Assignment, SettingsError
from axiscap.serving.settings import Settings
from axiscap.serving.vllm.points import RUNNER_POINTS, WORKER_POINTS, check_object, folder_of, settings_of
from axiscap.serving.worker.model import Model, Rows, flat_result, run_again
from axiscap.serving.worker.streams import (
    Form,
    InconclusiveError,
    Read,
    ZeroedMemory,
    check_effect,
    check_form,
    read_returned,
)
from axiscap.serving.worker.thinking import Tokens, marker_ids
from axiscap_plugin.wrapping import wrap


class VllmWorker(Model):
    """A worker's part: caps the block outputs of its layers, and tells the buffers whose rows a step computes."""

    _is_first = _is_filled = _is_warming_up = _awaits_prompts = False
    _handed_on: Any = None

    def __init__(self, worker: Any) -> None:
        self._runner = runner = worker.model_runner
        self._config = worker.vllm_config
        self._rank = worker.rank
        check_object(worker, WORKER_POINTS)
        check_object(runner, RUNNER_POINTS)
        self._v2 = not hasattr(runner, "_prepare_inputs")
        if self._v2:
            check_object(runner, ["prepare_inputs"])
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
        worker.axiscap_copy_profile = lambda *profile: self.worker.copy_profile(*profile)

    def _load_model(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        if hasattr(self, "worker"):
            raise SettingsError("axiscap: the model is loaded once more into a worker that caps another one")
        runner, parallel, settings = self._runner, self._config.parallel_config, settings_of(self._config)
        model = runner.get_model()
        language = model.get_language_model() if hasattr(model, "get_language_model") else model
        # Only one rank of those that hold the same rows and layers counts them.
        counts = self._rank % parallel.tensor_parallel_size == 0
        totals = folder_of(self._config) / f"totals-{parallel.data_parallel_index}-{self._rank}.json"
        self.hold(
            language,
            settings,
            layers=self._config.model_config.hf_text_config.num_hidden_layers,
            max_rows=runner.max_num_tokens,
            device=torch.device(runner.device),
            requests=self._config.scheduler_config.max_num_seqs,
            totals=totals if counts else None,
            markers=self._markers(settings) if settings.separates_thinking else None,
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
        new = (
            (request.req_id, Assignment.read(request.sampling_params.extra_args)) for request in step.scheduled_new_reqs
        )
        self.worker.begin(step.finished_req_ids, new)
        if self._v2:
            prompts = ((new.req_id, new.prefill_token_ids or new.prompt_token_ids) for new in step.scheduled_new_reqs)
            self._begun = {name: ids or () for name, ids in prompts}
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
