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
import re
from operator import getitem
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("vllm", reason="needs vLLM: make test-serving")

from safetensors.torch import save_file
from serving import (
    LONG,
    MARKERS,
    MIXED,
    PROMPTS,
    configuration,
    expected_mixed,
    expected_part,
    expected_texts,
    free_port,
    make_profiles,
    small_model,
)
from torch._higher_order_ops.auto_functionalize import auto_functionalized
from torch._inductor.utils import run_and_get_code
from torch.fx import Graph
from transformers import GemmaConfig, LlamaConfig
from vllm import LLM, SamplingParams
from vllm.compilation.passes import pass_manager
from vllm.config import CompilationMode, KVTransferConfig, VllmConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.exceptions import VLLMValidationError
from vllm.lora.request import LoRARequest
from vllm.platforms.cpu import CpuPlatform
from vllm.v1.engine.core import EngineCore
from vllm.v1.worker.worker_base import WorkerWrapperBase

import axiscap_plugin
from axiscap import models, ops
from axiscap.serving.request import Assignment, SettingsError
from axiscap.serving.settings import Settings
from axiscap.serving.vllm import points
from axiscap.serving.vllm.norm import CapInNorm
from axiscap.serving.vllm.worker import VllmWorker
from axiscap.serving.worker.worker import Worker

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


@pytest.mark.parametrize("point", points.POINTS, ids=lambda point: f"{point.owner}.{point.name}")
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


@pytest.mark.parametrize("point", [point for point in points.POINTS if point.parameters], ids=lambda p: p.name)
def test_a_vllm_whose_parameters_have_other_names(point, monkeypatch):
    owner = getattr(importlib.import_module(point.module), point.owner)
    monkeypatch.setattr(owner, point.name, lambda self, other: None)
    with pytest.raises(SettingsError, match=f"has no parameter {point.parameters[0]} of"):
        points.check_points()


def served(model: str, folder, *, lora: LoRARequest | None = None, **options: object) -> list[str]:
    """The mixed batch by an engine that checks every step's rows."""
    config = {"axiscap": configuration(folder, check=True)}
    options = {"dtype": "float32", "max_model_len": 512, "enforce_eager": True, **options}
    llm = LLM(model, additional_config=config, **options)
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


@pytest.mark.nightly
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


@pytest.mark.nightly
def test_two_tensor_parallel_ranks_in_each_of_two_pipeline_ranks(tmp_path):
    model, tokenizer, made = small_model(tmp_path)
    found = served(str(tmp_path / "model"), tmp_path, tensor_parallel_size=2, pipeline_parallel_size=2)
    assert found == expected_mixed(model, tokenizer, made, TOKENS)
    assert len(set(found)) > len(found) / 2


def test_blocks_are_taken_up_by_another_engine_under_their_own_content_alone(tmp_path):
    """One engine computes a prompt and leaves it in a store; the next goes on from there where it has the same content,
    and else computes it anew.
    """
    model, tokenizer, made = small_model(tmp_path)
    store = {"shared_storage_path": str(tmp_path / "store")}
    transfer = {"kv_connector": "ExampleConnector", "kv_role": "kv_both", "kv_connector_extra_config": store}
    options = {"dtype": "float32", "max_model_len": 512, "enforce_eager": True, "block_size": 32}

    def ask(tokens: int, *names: str | None) -> tuple[list[str], list[int]]:
        config = {"axiscap": configuration(tmp_path, check=True)}
        llm = LLM(str(tmp_path / "model"), additional_config=config, kv_transfer_config=transfer, **options)
        choices = [{"axiscap": name} if name else None for name in names]
        params = [SamplingParams(temperature=0, max_tokens=tokens, extra_args=choice) for choice in choices]
        try:
            outputs = [llm.generate(LONG, one, use_tqdm=False)[0] for one in params]
            return [output.outputs[0].text for output in outputs], [output.num_cached_tokens for output in outputs]
        finally:
            llm.llm_engine.engine_core.shutdown()

    ask(1, "strict")
    assert len(list((tmp_path / "store").iterdir())) == 1
    found, loaded = ask(TOKENS, "strict", None, "off")
    kinds = (made["strict"], made["mild"], None)
    assert found == [expected_texts(model, tokenizer, [LONG], kind, TOKENS)[0] for kind in kinds]
    assert len(set(found)) == 3
    assert loaded[0] > 100
    assert loaded[1:] == [0, 0]
    assert len(list((tmp_path / "store").iterdir())) == 3


def test_the_hashes_that_an_offloading_connector_goes_by_tell_contents_apart():
    """Its own way to a key, from the engine's hashes of the blocks; the connector itself wants an accelerator."""
    from vllm.sampling_params import SamplingParams as Params
    from vllm.utils.hashing import sha256
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
    from vllm.v1.kv_offload.base import make_offload_key
    from vllm.v1.request import Request

    init_none_hash(sha256)
    hasher = get_request_block_hasher(4, sha256)

    def keys(choice: Assignment) -> list[bytes]:
        request = Request("r", list(range(12)), Params(max_tokens=1), None, cache_salt=choice.salt, block_hasher=hasher)
        return [make_offload_key(found, 0) for found in request.block_hashes]

    one, same, other, off = (keys(Assignment("n", digest, "r")) for digest in ("1", "1", "2", None))
    assert one == same
    assert len(one) == 3
    assert not set(one) & set(other) | set(one) & set(off)


def test_an_engine_that_decodes_goes_on_from_what_another_one_computed(tmp_path, monkeypatch):
    """By NIXL, on loopback: a router takes the word from the one that computes the prompt to the one that writes the
    answer, which must have the same content for it.
    """
    model, tokenizer, made = small_model(tmp_path)
    options = {"dtype": "float32", "max_model_len": 512, "enforce_eager": True, "block_size": 32}
    options |= {"disable_log_stats": False}

    def engine(role: str) -> LLM:
        monkeypatch.setenv("VLLM_NIXL_SIDE_CHANNEL_PORT", str(free_port()))
        config = {"axiscap": configuration(tmp_path, check=True)}
        transfer = {"kv_connector": "NixlConnector", "kv_role": role, "kv_buffer_device": "cpu"}
        return LLM(str(tmp_path / "model"), additional_config=config, kv_transfer_config=transfer, **options)

    def ask(llm: LLM, name: str, word: dict, tokens: int):
        extra = {"axiscap": name, "kv_transfer_params": word}
        return llm.generate(LONG, SamplingParams(temperature=0, max_tokens=tokens, extra_args=extra), use_tqdm=False)[0]

    def read(llm: LLM) -> int:
        """Tokens whose blocks came from the other engine."""
        return sum(m.value for m in llm.get_metrics() if m.name == "vllm:external_prefix_cache_hits")

    taken_over, empty = 0, dict.fromkeys(("remote_engine_id", "remote_block_ids", "remote_host", "remote_port"))
    first, second = engine("kv_producer"), engine("kv_consumer")
    try:
        for name in ("mild", "strict", "off"):
            begun = ask(first, name, {"do_remote_decode": True, "do_remote_prefill": False, **empty}, 1)
            word = begun.kv_transfer_params
            assert word["axiscap_content"] == f"axiscap={'-' if name == 'off' else made[name].digest}"
            for other in {"mild", "strict", "off"} - {name}:
                with pytest.raises(
                    VLLMValidationError, match=f"the prompt was computed as {word['axiscap_content']}, and this"
                ):
                    ask(second, other, word, TOKENS)
            found = ask(second, name, word, TOKENS)
            profile = None if name == "off" else made[name]
            assert found.outputs[0].text == expected_texts(model, tokenizer, [LONG], profile, TOKENS)[0]
            taken_over += len(tokenizer(LONG)["input_ids"])
            assert read(second) == taken_over
            with pytest.raises(VLLMValidationError, match="send it again"):  # from one that does not cap
                ask(second, "strict", {key: value for key, value in word.items() if key != "axiscap_content"}, TOKENS)
    finally:
        for llm in (first, second):
            llm.llm_engine.engine_core.shutdown()


@pytest.mark.parametrize(
    ("transfer", "says"),
    [
        (
            {"kv_connector": "MooncakeConnector"},
            r"MooncakeConnector may not tell KV blocks of different profiles apart "
            r"\(known are OffloadingConnector, ExampleConnector, NixlConnector, NixlPullConnector\)",
        ),
        (
            {"kv_connector": "NixlConnector", "kv_connector_extra_config": {"bidirectional_kv_xfer": True}},
            "blocks that go back to where a prompt is computed",
        ),
    ],
)
def test_a_connector_that_may_mix_contents_is_refused(transfer, says, profiles):
    arguments = EngineArgs(
        model=models.folder(models.DEFAULT_MODEL), max_model_len=512,
        kv_transfer_config=KVTransferConfig(kv_role="kv_both", **transfer),
        additional_config={"axiscap": configuration(profiles[0])},
    )  # fmt: skip
    with pytest.raises(SettingsError, match=says):
        arguments.create_engine_config()


def test_the_thinking_is_capped_alone(profiles, demo_model):
    folder, made = profiles
    part = {"positions": "thinking", "markers": MARKERS}
    llm = LLM(
        models.folder(models.DEFAULT_MODEL), dtype="float32", max_model_len=512, enforce_eager=True,
        additional_config={"axiscap": configuration(folder, check=True, **part)},
    )  # fmt: skip
    prompts = [f"{prompt}{MARKERS[0]}" for prompt in (*PROMPTS[:3], LONG)]
    wanted = [expected_part(*demo_model, prompt, made["strict"], 30, "thinking") for prompt in prompts]
    params = SamplingParams(temperature=0, max_tokens=30, extra_args={"axiscap": "strict"})
    try:
        for _ in range(2):  # the second time behind a prefix cache
            outputs = llm.generate(prompts, params, use_tqdm=False)
            assert [output.outputs[0].text for output in outputs] == wanted
    finally:
        llm.llm_engine.engine_core.shutdown()
    assert wanted != expected_texts(*demo_model, prompts, made["strict"], 30, "generated")
    assert wanted != expected_texts(*demo_model, prompts, None, 30)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}}, "drafts with positions .thinking"),
        ({"pipeline_parallel_size": 2}, "pipeline ranks with positions"),
        ({"enable_prompt_embeds": True}, "embeddings as prompts with positions"),
    ],
)
def test_where_a_rows_place_in_the_thinking_is_not_known(options, says, profiles):
    config = configuration(profiles[0], positions="thinking")
    arguments = EngineArgs(
        model=models.folder(models.DEFAULT_MODEL), max_model_len=512, additional_config={"axiscap": config}, **options
    )
    with pytest.raises(SettingsError, match=says):
        arguments.create_engine_config()


@pytest.fixture
def compiled_as_for_a_gpu(monkeypatch, tmp_path):
    """vLLM's own way to compile, in pieces and with its passes, which its CPU platform turns off; returns where the
    code will be.
    """
    check = CpuPlatform.check_and_update_config

    def keep_mode(config: VllmConfig) -> None:
        mode = config.compilation_config.mode
        check(config)
        if mode == CompilationMode.VLLM_COMPILE:
            kept = {"mode": mode, "backend": "inductor", "compile_sizes": [], "ir_enable_torch_wrap": True}
            for name, value in kept.items():
                setattr(config.compilation_config, name, value)

    monkeypatch.setattr(CpuPlatform, "check_and_update_config", staticmethod(keep_mode))
    # The last pass is about ops that a build without CUDA lacks, and stumbles over their names.
    monkeypatch.setattr(pass_manager.FixFunctionalizationPass, "__call__", lambda self, graph: None)
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    monkeypatch.setenv("VLLM_CACHE_ROOT", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize(("kind", "bias"), [(LlamaConfig, 0.0), (GemmaConfig, 1.0)])
def test_the_cap_runs_inside_the_norm_behind_it_where_vllm_compiles_for_a_gpu(
    kind, bias, compiled_as_for_a_gpu, tmp_path
):
    model, tokenizer, made = small_model(tmp_path, kind)
    found = served(str(tmp_path / "model"), tmp_path, enforce_eager=False, compilation_config={"mode": 3})
    assert found == expected_mixed(model, tokenizer, made, TOKENS)
    texts = [path.read_text() for path in compiled_as_for_a_gpu.rglob("*.py")]
    calls = [
        call for text in texts for call in re.findall(r"^ +torch\.ops\.axiscap\.(\S+)\((.*)\)", text, re.MULTILINE)
    ]
    # Pieces that are alike share their code: the end of an inner layer, and that of the last, behind which is one norm.
    assert [name for name, _ in calls] == ["add_rms_norm_cap_.buffers"] * 2
    for _, given in calls:
        hidden, residual, *rest = given.split(", ")
        # In place, in what the matrix product and the norm before it wrote; the rest are inputs of the graph.
        assert re.fullmatch(r"buf\d+", hidden)
        assert re.fullmatch(r"buf\d+", residual)
        assert rest.pop(6) == str(bias)
        assert rest.pop(1) == "1e-06"
        assert all(re.fullmatch(r"arg\d+_1", name) for name in rest)
    assert not re.search(r"cpp_fused_\w*clone\w*\(", "".join(texts))


def end_of_a_layer(*, weight_dtype=torch.float32, variance_size=None, residual_read=False, projections_read=False):
    """A cap and the norm behind it, in a graph as vLLM's passes see it; what the norm gives is returned."""
    graph = Graph()

    def given(name: str, *shape: int, dtype: torch.dtype = torch.float32):
        node = graph.placeholder(name)
        node.meta["val"] = torch.empty(*shape, dtype=dtype, device="meta")
        return node

    def part(of, at: int, like):
        node = graph.call_function(getitem, (of, at))
        node.meta["val"] = like.meta["val"]
        return node

    hidden, residual = given("hidden", 4, 8), given("residual", 4, 8)
    bank = {"axes": given("axes", 1, 1, 8), "floors": given("floors", 1, 1), "slots": given("slots", 4)}
    bank |= dict.fromkeys(("targets", "lifts", "norm_limits"))
    streams = {"hidden": hidden, "residual": residual, "projections": given("projections", 4, 1)}
    cap = graph.call_function(auto_functionalized, (torch.ops.axiscap.cap_residual_.buffers,), bank | streams)
    capped, projections = part(cap, 1, residual), part(cap, 2, streams["projections"])
    read = [graph.call_function(torch.ops.aten.neg.default, (projections,))] if projections_read else []
    arguments = (hidden, capped, given("weight", 8, dtype=weight_dtype), 1e-6, variance_size)
    norm = graph.call_function(torch.ops.vllm_ir.fused_add_rms_norm.default, arguments)
    read += [graph.call_function(torch.ops.aten.neg.default, (capped,))] if residual_read else []
    graph.output([part(norm, 0, hidden), part(norm, 1, residual), projections, *read])
    return graph


@pytest.mark.parametrize(
    ("options", "joined"),
    [
        ({}, True),
        ({"weight_dtype": torch.bfloat16}, False),
        ({"variance_size": 4}, False),
        ({"residual_read": True}, False),
        ({"projections_read": True}, False),
    ],
    ids=str,
)
def test_a_norm_that_the_fused_op_cannot_stand_for_keeps_its_cap_in_front(options, joined):
    graph = end_of_a_layer(**options)
    before = str(graph)
    CapInNorm()(graph)
    graph.lint()
    if not joined:
        assert str(graph) == before
        return
    (call,) = graph.find_nodes(op="call_function", target=auto_functionalized)
    assert call.args == (torch.ops.axiscap.add_rms_norm_cap_.buffers,)
    assert not graph.find_nodes(op="call_function", target=torch.ops.vllm_ir.fused_add_rms_norm.default)
    hidden, residual, projections = graph.output_node().args[0]
    assert [(part.args[0], part.args[1]) for part in (hidden, residual, projections)] == [
        (call, 1),
        (call, 2),
        (call, 3),
    ]


@pytest.fixture(scope="module")
def ops_of_a_gpu():
    """What vLLM's passes put where a norm and a quantisation were; its CPU build has no such ops."""
    library = torch.library.Library("_C", "FRAGMENT")
    library.define(
        "fused_add_rms_norm_static_fp8_quant(Tensor! result, Tensor input, Tensor! residual, Tensor weight, "
        "Tensor scale, float epsilon) -> ()"
    )
    library.define(
        "rms_norm_dynamic_per_token_quant(Tensor! result, Tensor input, Tensor weight, Tensor! scale, float epsilon, "
        "Tensor? scale_ub, Tensor!? residual) -> ()"
    )

    def never(*given):
        raise AssertionError("the norm ran behind the cap, not with it")

    for name in ("fused_add_rms_norm_static_fp8_quant", "rms_norm_dynamic_per_token_quant"):
        library.impl(name, never, "CPU")
        torch.library.register_fake(f"_C::{name}", lambda *given: None, lib=library)
    yield torch.ops._C
    library._destroy()


class Fp8Layer(torch.nn.Module):
    """The end of a capped layer, and the norm behind it as vLLM's passes leave it for an fp8 matrix."""

    def __init__(self, per_token: bool, *, upper_bound: bool = False, dtype: torch.dtype = torch.float8_e4m3fn) -> None:
        super().__init__()
        self.per_token, self.dtype = per_token, dtype
        generator = torch.Generator().manual_seed(3)
        axes = torch.nn.functional.normalize(torch.randn(2, 1, 64, generator=generator), dim=-1)
        tensors = {
            "axes": axes, "floors": torch.tensor([[2.0], [-torch.inf]]), "slots": torch.arange(32).int() % 3 - 1,
            "projections": torch.zeros(32, 1), "weight": torch.randn(64, generator=generator).bfloat16(),
            "scale": torch.tensor([0.03]),
        }  # fmt: skip
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)
        self.bound = torch.ones(1) if upper_bound else None

    def streams(self, x):
        return x * 1.5, x.flip(0) + 1

    def forward(self, x):
        hidden, residual = self.streams(x)
        bank = self.axes, self.floors, self.slots, self.projections
        torch.ops.axiscap.cap_residual_.buffers(hidden, residual, *bank)
        quantized = torch.empty_like(hidden, dtype=self.dtype)
        if self.per_token:
            scale = hidden.new_empty(len(hidden), 1, dtype=torch.float32)
            torch.ops._C.rms_norm_dynamic_per_token_quant(
                quantized, hidden, self.weight, scale, 1e-6, self.bound, residual
            )
        else:
            scale = self.scale
            torch.ops._C.fused_add_rms_norm_static_fp8_quant(quantized, hidden, residual, self.weight, scale, 1e-6)
        return quantized.float() * scale, residual


def compiled_with_the_pass(module: torch.nn.Module):
    """As vLLM compiles: with its older way to functionalise, and the pass at the end."""
    torch._dynamo.reset()
    options = {"enable_auto_functionalized_v2": False, "post_grad_custom_post_pass": CapInNorm()}
    return torch.compile(module, fullgraph=True, dynamic=True, options=options)


@pytest.mark.parametrize("per_token", [False, True])
def test_a_norm_that_is_fused_with_a_quantisation_takes_the_cap_in(per_token, ops_of_a_gpu):
    module = Fp8Layer(per_token)
    compiled = compiled_with_the_pass(module)
    _, (code,) = run_and_get_code(compiled, torch.zeros(7, 64).bfloat16())
    for rows in (5, 9):
        x = torch.randn(rows, 64, generator=torch.Generator().manual_seed(rows)).bfloat16()
        found, stream = compiled(x)
        hidden, residual = module.streams(x)
        bank = module.axes, module.floors, module.slots[:rows]
        reported = torch.empty(rows, 1)
        ops.add_rms_norm_cap_(hidden, residual, module.weight, 1e-6, *bank, projections=reported)
        largest = hidden.float().abs().amax(-1, keepdim=True)
        scale = (largest / 448).clamp(min=1 / (448 * 512)) if per_token else module.scale
        quantized = (hidden.float() * scale.reciprocal()).clamp(-448, 448).to(torch.float8_e4m3fn)
        assert torch.equal(found, quantized.float() * scale)
        assert torch.equal(stream, residual)
        assert torch.equal(module.projections[:rows].nan_to_num(), reported.nan_to_num())
        assert bool((reported[module.slots[:rows] == 0] < 2).any())  # some fire
    assert re.findall(r"torch\.ops\.axiscap\.(\S+?)\(", code) == ["add_rms_norm_cap_fp8_.buffers"]
    assert "clone" not in "".join(re.findall(r"^ +(cpp_fused_\w+)\(", code, re.MULTILINE))


@pytest.mark.parametrize("options", [{"upper_bound": True}, {"dtype": torch.int8}], ids=str)
def test_a_quantisation_that_the_fused_op_cannot_stand_for_keeps_its_cap_in_front(options, ops_of_a_gpu):
    with pytest.raises(AssertionError, match="the norm ran behind the cap"):
        compiled_with_the_pass(Fp8Layer(True, **options))(torch.randn(5, 64).bfloat16())


def test_an_operators_own_pass_stays(compiled_as_for_a_gpu, profiles):
    config = {"axiscap": configuration(profiles[0])}
    options = {"model": models.folder(models.DEFAULT_MODEL), "max_model_len": 512, "additional_config": config}
    key = "post_grad_custom_post_pass"

    def passes(**compilation: object) -> object:
        arguments = EngineArgs(**options, compilation_config={"mode": 3, **compilation})
        return arguments.create_engine_config().compilation_config.inductor_compile_config.get(key)

    assert isinstance(passes(), CapInNorm)
    assert not isinstance(passes(inductor_passes={key: "statistics.mean"}), CapInNorm)


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
    adapter.worker = Worker(settings, settings.layers, 16, torch.device("cpu"), 1, folder / "totals.json")
    adapter._v2 = True
    adapter._runner = SimpleNamespace(
        req_states=SimpleNamespace(prompt_len=SimpleNamespace(np=np.array([5, 4, 6], np.int32)))
    )
    choices = {"a": "strict", "b": None, "c": "mild"}
    adapter.worker.begin(
        [], [(key, Assignment(name, name and made[name].digest, key)) for key, name in choices.items()]
    )
    assert adapter._prepare_v2(lambda step: batch, SimpleNamespace()) is batch
    mild, strict = (adapter.worker.buffers.slot_of[made[name].digest] for name in ("mild", "strict"))
    assert adapter.worker.buffers.rows.tolist() == [strict] + [-1] * 5 + [mild] * 2 + [-1] * 8
    # The first row of c is the last of its prompt, whose 4 tokens are at 0 to 3.
    running = adapter.worker._telemetry._running
    assert adapter.worker._telemetry._rows[:8].tolist() == [2 * running["a"].index + 1] + [-1] * 5 + [
        2 * running["c"].index, 2 * running["c"].index + 1]  # fmt: skip
    # Of what the model wrote the answer alone: a's row stands behind what ended the thinking, c's second one begins it.
    settings = Settings.parse(configuration(folder, positions="answer"))
    totals = folder / "totals.json"
    adapter.worker = Worker(settings, settings.layers, 16, torch.device("cpu"), 1, totals, (7, 8))
    adapter._begun = {"a": [7, 1, 1, 1, 1, 1, 1, 8, 1, 1], "b": [1] * 5, "c": [1, 1, 1, 1]}
    batch.input_ids = torch.tensor([1, 1, 1, 1, 1, 1, 1, 7, 0, 0])
    adapter.worker.begin(
        [], [(key, Assignment(name, name and made[name].digest, key)) for key, name in choices.items()]
    )
    adapter._prepare_v2(lambda step: batch, SimpleNamespace())
    assert adapter.worker.buffers.rows.tolist() == [strict] + [-1] * 15
    batch.num_tokens = 9
    with pytest.raises(RuntimeError, match="9 rows in a step, but 8 are known"):
        adapter._prepare_v2(lambda step: batch, SimpleNamespace())
