"""vLLM set up in other ways: over several ranks, with speculative decoding and LoRA; and its second model runner.

Needs an environment that has vLLM: `make test-serving`. Engines run eagerly here; what a compiled graph makes of a cap
is tested in test_vllm_serving.py.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib
import inspect
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("vllm", reason="needs vLLM: make test-serving")

from safetensors.torch import save_file
from serving import MIXED, configuration, expected_mixed, expected_texts, make_profiles, small_model
from vllm import LLM, SamplingParams
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.lora.request import LoRARequest
from vllm.v1.engine.core import EngineCore
from vllm.v1.worker.worker_base import WorkerWrapperBase

import axiscap_plugin
from axiscap import models
from axiscap.serving import vllm as adapter
from axiscap.serving.settings import Choice, Settings, SettingsError
from axiscap.serving.vllm import VllmWorker
from axiscap.serving.worker import Worker

TOKENS = 12


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # its own plan wants a memory node for each rank


@pytest.fixture(scope="module")
def profiles(tmp_path_factory):
    folder = tmp_path_factory.mktemp("profiles")
    return folder, make_profiles(folder)


CONFIGURED = {"axiscap": {"profiles": {"a": "/nowhere.safetensors"}}}


@pytest.fixture
def restored(monkeypatch):
    """What the plug-in wraps is as it was, before the test and after it."""
    for owner, name in (
        (EngineArgs, "create_engine_config"), (EngineCore, "_initialize_kv_caches"),
        (WorkerWrapperBase, "init_device"), (VllmConfig, "__post_init__"),
    ):  # fmt: skip
        monkeypatch.setattr(owner, name, inspect.unwrap(getattr(owner, name)))


@pytest.mark.parametrize("point", adapter.POINTS, ids=lambda point: f"{point.owner}.{point.name}")
def test_a_vllm_that_lacks_what_capping_stands_on(point, monkeypatch, restored):
    """Where capping is configured it stops with a sentence that names it, and else goes on."""
    owner = getattr(importlib.import_module(point.module), point.owner)
    monkeypatch.setattr(owner, f"{point.name}_of_another_version", getattr(owner, point.name), raising=False)
    for holder in owner.__mro__:
        if point.name in vars(holder):
            monkeypatch.delattr(holder, point.name)
    axiscap_plugin.register_vllm()
    create = "create_engine_config"
    if point.name == create:
        create += "_of_another_version"
    options = {"model": models.folder(models.DEFAULT_MODEL), "max_model_len": 512}
    getattr(EngineArgs(**options), create)()
    with pytest.raises(Exception, match=rf"has no {point.owner}\.{point.name} \(.*\), so that it cannot be capped; 0"):
        getattr(EngineArgs(**options, additional_config=CONFIGURED), create)()
    monkeypatch.setenv("AXISCAP_CONFIG", "/nowhere.json")
    if point.name in ("create_engine_config", "_initialize_kv_caches", "init_device"):
        with pytest.raises(SettingsError, match="cannot be capped"):
            axiscap_plugin.register_vllm()


@pytest.mark.parametrize("point", [point for point in adapter.POINTS if point.parameters], ids=lambda p: p.name)
def test_a_vllm_whose_parameters_have_other_names(point, monkeypatch):
    owner = getattr(importlib.import_module(point.module), point.owner)
    monkeypatch.setattr(owner, point.name, lambda self, other: None)
    with pytest.raises(SettingsError, match=f"has no parameter {point.parameters[0]} of"):
        adapter.check_points()


def served(model: str, folder, *, lora: LoRARequest | None = None, **options: object) -> list[str]:
    """The mixed batch by an engine that checks every step's rows."""
    config = {"axiscap": configuration(folder, check=True)}
    llm = LLM(model, dtype="float32", max_model_len=512, enforce_eager=True, additional_config=config, **options)
    params = [
        SamplingParams(temperature=0, max_tokens=TOKENS, extra_args={"axiscap": name} if name else None)
        for _, name in MIXED
    ]
    try:
        outputs = llm.generate([prompt for prompt, _ in MIXED], params, use_tqdm=False, lora_request=lora)
        return [output.outputs[0].text for output in outputs]
    finally:
        llm.llm_engine.engine_core.shutdown()


def test_two_pipeline_ranks(profiles, demo_model):
    found = served(models.folder(models.DEFAULT_MODEL), profiles[0], pipeline_parallel_size=2)
    assert found == expected_mixed(*demo_model, profiles[1], TOKENS)


def test_speculative_decoding_with_lora(profiles, demo_model, tmp_path):
    """Rows of drafts that are thrown away belong to their request as well."""
    model, tokenizer = demo_model
    rank, alpha, scale = 4, 8, 0.05
    generator = torch.Generator().manual_seed(0)
    adapted, tensors = copy.deepcopy(model), {}
    for number, block in enumerate(adapted.model.layers):
        weight = block.self_attn.q_proj.weight
        down = scale * torch.randn(rank, weight.shape[1], generator=generator)
        up = scale * torch.randn(weight.shape[0], rank, generator=generator)
        with torch.no_grad():
            weight += alpha / rank * up @ down
        name = f"base_model.model.model.layers.{number}.self_attn.q_proj.lora"
        tensors |= {f"{name}_A.weight": down, f"{name}_B.weight": up}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": alpha, "bias": "none"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"target_modules": ["q_proj"]}))
    drafts = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
    found = served(
        models.folder(models.DEFAULT_MODEL),
        profiles[0],
        lora=LoRARequest("adapter", 1, str(tmp_path)),
        enable_lora=True,
        max_lora_rank=8,
        speculative_config=drafts,
    )
    assert found == expected_mixed(adapted, tokenizer, profiles[1], TOKENS)
    # The adapter is in it: without, some of the answers are others.
    plain = [at for at, (_, name) in enumerate(MIXED) if name == "off"]
    unadapted = expected_texts(model, tokenizer, [MIXED[at][0] for at in plain], None, TOKENS)
    assert [found[at] for at in plain] != unadapted


def test_two_tensor_parallel_ranks_in_each_of_two_pipeline_ranks(tmp_path):
    model, tokenizer, made = small_model(tmp_path)
    found = served(str(tmp_path / "model"), tmp_path, tensor_parallel_size=2, pipeline_parallel_size=2)
    assert found == expected_mixed(model, tokenizer, made, TOKENS)
    assert len(set(found)) > len(found) / 2


def test_the_second_runners_adapter_fits_its_classes(profiles):
    """It needs Triton, and has not run: what is looked at are its classes, and the adapter on a batch of theirs."""
    from vllm.v1.worker.gpu.input_batch import InputBatch
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner
    from vllm.v1.worker.gpu.states import RequestState

    for method in ("load_model", "_dummy_run", "execute_model", "prepare_inputs", "get_model"):
        assert callable(getattr(GPUModelRunner, method))
    assert not hasattr(GPUModelRunner, "_prepare_inputs")  # by which the adapter tells the runners apart
    assert "skip_attn" in inspect.signature(GPUModelRunner._dummy_run).parameters
    assert "prompt_len" in inspect.getsource(RequestState.__init__)

    fields = {field.name: None for field in dataclasses.fields(InputBatch)}
    batch = InputBatch(**fields | {
        "req_ids": ["a", "b", "c"], "num_reqs": 3, "num_tokens": 8, "idx_mapping_np": np.array([2, 0, 1]),
        "query_start_loc_np": np.array([0, 1, 6, 8, 8], np.int32), "num_scheduled_tokens": np.array([1, 5, 4]),
        "num_computed_tokens_np": np.array([9, 0, 3], np.int32),
    })  # fmt: skip
    folder, made = profiles
    settings = Settings.parse(configuration(folder))
    adapter = VllmWorker.__new__(VllmWorker)
    adapter._capped = Worker(settings, settings.layers, 16, torch.device("cpu"), 1, folder / "totals.json")
    adapter._runner = SimpleNamespace(
        req_states=SimpleNamespace(prompt_len=SimpleNamespace(np=np.array([5, 4, 6], np.int32)))
    )
    choices = {"a": "strict", "b": None, "c": "mild"}
    adapter._capped.begin([], [(key, Choice(name, name and made[name].digest, key)) for key, name in choices.items()])
    assert adapter._prepare_v2(lambda step: batch, SimpleNamespace()) is batch
    mild, strict = (adapter._capped.buffers.slot_of[made[name].digest] for name in ("mild", "strict"))
    assert adapter._capped.buffers.rows.tolist() == [strict] + [-1] * 5 + [mild] * 2 + [-1] * 8
    # The first row of c is the last of its prompt, whose 4 tokens are at 0 to 3.
    running = adapter._capped._telemetry._running
    assert adapter._capped._telemetry._rows[:8].tolist() == [2 * running["a"].index + 1] + [-1] * 5 + [
        2 * running["c"].index, 2 * running["c"].index + 1]  # fmt: skip
    batch.num_tokens = 9
    with pytest.raises(RuntimeError, match="9 rows in a step, but 8 are known"):
        adapter._prepare_v2(lambda step: batch, SimpleNamespace())
