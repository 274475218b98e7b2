"""vLLM with its cap made ineffective: it does not start, or it stops. Needs vLLM: `make test-serving`."""

from __future__ import annotations

import copy
import inspect
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm", reason="needs vLLM: make test-serving")

from serving import configuration, small_model
from vllm import LLM, SamplingParams
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.models.llama import LlamaDecoderLayer
from vllm.v1.worker.cpu_model_runner import CPUModelRunner
from vllm.v1.worker.cpu_worker import CPUWorker

import axiscap_plugin
from axiscap.serving.request import SettingsError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    small_model(folder)
    return folder


@pytest.fixture(autouse=True)
def _in_this_process(monkeypatch):
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")


def start(folder, **options) -> LLM:
    options = {"dtype": "float32", "max_model_len": 128, "enforce_eager": True, **options}
    return LLM(
        str(folder / "model"), distributed_executor_backend="uni", disable_log_stats=True,
        additional_config={"axiscap": configuration(folder)}, **options,
    )  # fmt: skip


def generate(llm: LLM) -> None:
    llm.generate(["Who are you?"], SamplingParams(max_tokens=2, temperature=0), use_tqdm=False)


def without_hooks(layer: torch.nn.Module) -> torch.nn.Module:
    fresh = copy.copy(layer)
    fresh._forward_hooks = type(layer._forward_hooks)()
    return fresh


def replace_layer(model: torch.nn.Module) -> None:
    model.model.layers[1] = without_hooks(model.model.layers[1])


def after_loading(monkeypatch, change) -> None:
    """Has a worker change its model once the runner has loaded it, and the cap is in it."""
    load = CPUWorker.load_model

    def changed(self, **kwargs):
        load(self, **kwargs)
        change(self)

    monkeypatch.setattr(CPUWorker, "load_model", changed)


def a_layer_is_replaced_after_loading(monkeypatch):
    after_loading(monkeypatch, lambda worker: replace_layer(worker.model_runner.model))


def the_hooks_are_dropped(monkeypatch):
    def drop(worker):
        for layer in worker.model_runner.model.model.layers:
            layer._forward_hooks.clear()

    after_loading(monkeypatch, drop)


def layers_run_without_their_hooks(monkeypatch):
    monkeypatch.setattr(LlamaDecoderLayer, "__call__", lambda self, *args, **kwargs: self.forward(*args, **kwargs))


def hooks_get_copies(monkeypatch):
    register = torch.nn.Module.register_forward_hook

    def with_copies(self, hook, **options):
        def on_copies(module, *given):
            hook(module, *given[:-1], tuple(tensor.clone() for tensor in given[-1]))

        return register(self, on_copies, **options)

    monkeypatch.setattr(LlamaDecoderLayer, "register_forward_hook", with_copies)


def the_op_writes_elsewhere(monkeypatch):
    op = torch.ops.axiscap.cap_residual_.buffers
    elsewhere = SimpleNamespace(buffers=lambda hidden, residual, *more: op(hidden, residual.clone(), *more))
    monkeypatch.setattr(torch.ops.axiscap, "cap_residual_", elsewhere)


def the_output_is_read_before_the_hooks(monkeypatch):
    """The next layer gets what a layer computed, whatever its hooks do to what it returned."""
    call, forward, kept = torch.nn.Module.__call__, LlamaDecoderLayer.forward, []

    def keeping(self, positions, hidden, residual):
        returned = forward(self, positions, hidden, residual)
        kept.append(tuple(tensor.clone() for tensor in returned))
        return returned

    def calling(self, *args, **kwargs):
        call(self, *args, **kwargs)
        return kept.pop()

    monkeypatch.setattr(LlamaDecoderLayer, "forward", keeping)
    monkeypatch.setattr(LlamaDecoderLayer, "__call__", calling)


def a_step_is_prepared_by_something_else(monkeypatch):
    def unwrap(worker):
        runner = worker.model_runner
        runner._prepare_inputs = runner._prepare_inputs.__wrapped__

    after_loading(monkeypatch, unwrap)


def nothing_is_tested_before_the_first_step(monkeypatch):
    def unwrap(worker):
        worker.compile_or_warm_up_model = worker.compile_or_warm_up_model.__wrapped__

    after_loading(monkeypatch, unwrap)


def the_model_is_loaded_past_the_runner(monkeypatch):
    load = CPUWorker.load_model

    def past(self, **kwargs):
        self.model_runner.load_model = self.model_runner.load_model.__wrapped__
        load(self, **kwargs)

    monkeypatch.setattr(CPUWorker, "load_model", past)


FAULTS = {
    a_layer_is_replaced_after_loading: "layer 1 of the compiled model measures no row",
    the_hooks_are_dropped: "layer 0 of the compiled model measures no row",
    layers_run_without_their_hooks: "layer 0, a LlamaDecoderLayer, runs 0 times in a pass",
    hooks_get_copies: "layer 0, a LlamaDecoderLayer: what it returns does not change the model's result",
    the_op_writes_elsewhere: "the cap at layer 0 of the compiled model changes nothing",
    the_output_is_read_before_the_hooks: "layer 0, a LlamaDecoderLayer: what it returns does not change",
    a_step_is_prepared_by_something_else: "a step ran without the slots of its rows",
    nothing_is_tested_before_the_first_step: "the cap was not tested before the first step",
    the_model_is_loaded_past_the_runner: "the worker loaded no model that could be capped",
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_an_ineffective_cap_is_not_served(fault, folder, monkeypatch):
    fault(monkeypatch)
    with pytest.raises(Exception, match=FAULTS[fault]):
        generate(start(folder))


def test_a_graph_that_was_made_before_the_cap_is_not_served(folder, monkeypatch, tmp_path):
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path))
    load = CPUModelRunner.load_model

    def compiled_too_early(self, *args, **kwargs):
        load(self, *args, **kwargs)
        self._dummy_run.__wrapped__(64, is_profile=True)

    monkeypatch.setattr(CPUModelRunner, "load_model", compiled_too_early)
    with pytest.raises(Exception, match="layer 0 of the compiled model measures no row"):
        start(folder, enforce_eager=False)


def test_weights_that_are_loaded_while_serving(folder, monkeypatch):
    """The cap is still in force behind an ordinary reload; one that replaces a layer ends the engine."""
    llm = start(folder)
    generate(llm)
    llm.collective_rpc("reload_weights")
    generate(llm)
    reload = CPUModelRunner.reload_weights

    def replacing(self, *args, **kwargs):
        reload(self, *args, **kwargs)
        replace_layer(self.model)

    monkeypatch.setattr(CPUModelRunner, "reload_weights", replacing)
    with pytest.raises(Exception, match="layer 1 of the compiled model measures no row"):
        llm.collective_rpc("reload_weights")
    with pytest.raises(Exception, match="layer 1 of the compiled model measures no row"):
        generate(llm)


def test_a_layer_that_is_replaced_while_serving_ends_the_engine_soon(folder):
    llm = start(folder)
    generate(llm)
    llm.collective_rpc(lambda worker: replace_layer(worker.model_runner.model))
    with pytest.raises(RuntimeError, match="layer 1 no longer measures the rows of a step: its cap is gone"):
        llm.generate(["Who?"], SamplingParams(max_tokens=64, temperature=0, ignore_eos=True), use_tqdm=False)


@pytest.mark.parametrize(
    ("option", "says"), [("enable_sleep_mode", "memory that sleeps"), ("enable_elastic_ep", "elastic ranks")]
)
def test_what_takes_the_cap_away_while_serving_is_refused(option, says, folder):
    arguments = EngineArgs(
        model=str(folder / "model"), max_model_len=128, additional_config={"axiscap": configuration(folder)}
    )
    create = inspect.unwrap(EngineArgs.create_engine_config)

    def with_option(self):
        """The CPU platform has neither, and would refuse them itself."""
        config = create(self)
        setattr(config.model_config if option == "enable_sleep_mode" else config.parallel_config, option, True)
        return config

    with pytest.raises(SettingsError, match=says):
        axiscap_plugin._configure(with_option, arguments)
