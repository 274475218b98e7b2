"""vLLM set up in other ways: over several ranks, with speculative decoding, LoRA, several API processes.

Needs an environment that has vLLM: `make test-serving`. Engines run eagerly here; what a compiled graph makes of a cap
is tested in test_vllm_serving.py.
"""

from __future__ import annotations

import copy
import json

import pytest
import torch

pytest.importorskip("vllm", reason="needs vLLM: make test-serving")

from safetensors.torch import save_file
from serving import PROMPTS, configuration, expected_texts, make_profiles
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

from axiscap import CapProfile, models

NAMES = (None, "strict", "off")
TOKENS = 16


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # its own plan wants a memory node for each rank
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="module")
def profiles(tmp_path_factory):
    folder = tmp_path_factory.mktemp("profiles")
    return folder, make_profiles(folder)


def mixed(model: str, folder, *, lora: LoRARequest | None = None, **options: object) -> list[str]:
    """All prompts in one batch, each third one under another profile, in an engine that checks every step's rows."""
    config = {"axiscap": configuration(folder, check=True)}
    llm = LLM(model, dtype="float32", max_model_len=512, enforce_eager=True, additional_config=config, **options)
    params = [
        SamplingParams(temperature=0, max_tokens=TOKENS, extra_args={"axiscap": name} if name else None)
        for name in names()
    ]
    try:
        return [output.outputs[0].text for output in llm.generate(PROMPTS, params, use_tqdm=False, lora_request=lora)]
    finally:
        llm.llm_engine.engine_core.shutdown()


def names() -> list[str | None]:
    return [NAMES[number % len(NAMES)] for number in range(len(PROMPTS))]


def wanted(model, tokenizer, made: dict[str, CapProfile]) -> list[str]:
    kinds = {None: made["mild"], "strict": made["strict"], "off": None}
    texts = [""] * len(PROMPTS)
    for name, profile in kinds.items():
        mine = [at for at, other in enumerate(names()) if other == name]
        for at, text in zip(
            mine, expected_texts(model, tokenizer, [PROMPTS[at] for at in mine], profile, TOKENS), strict=True
        ):
            texts[at] = text
    return texts


def test_two_pipeline_ranks(profiles, demo_model):
    found = mixed(models.folder(models.DEFAULT_MODEL), profiles[0], pipeline_parallel_size=2)
    assert found == wanted(*demo_model, profiles[1])


def test_speculative_decoding(profiles, demo_model):
    """Rows of drafts that are thrown away belong to their request as well."""
    drafts = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
    found = mixed(models.folder(models.DEFAULT_MODEL), profiles[0], speculative_config=drafts)
    assert found == wanted(*demo_model, profiles[1])


def test_lora_beside_a_profile(profiles, demo_model, tmp_path):
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
    lora = LoRARequest("adapter", 1, str(tmp_path))
    found = mixed(models.folder(models.DEFAULT_MODEL), profiles[0], lora=lora, enable_lora=True, max_lora_rank=8)
    texts = wanted(adapted, tokenizer, profiles[1])
    assert found == texts
    assert texts != wanted(model, tokenizer, profiles[1])


@pytest.mark.parametrize("pipeline", [1, 2])
def test_two_tensor_parallel_ranks(tmp_path, pipeline):
    """SmolLM2 has 9 heads, which do not part in two: a small model of random weights has."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152, hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.2, eos_token_id=None,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(models.folder(models.DEFAULT_MODEL))
    tokenizer.save_pretrained(tmp_path / "model")
    axes = torch.nn.functional.normalize(torch.randn(3, 1, 128), dim=-1)
    made = {name: CapProfile([0, 1, 3], axes, torch.full((3, 1), floor)) for name, floor in
            (("mild", 0.0), ("strict", 3.0), ("watch", -torch.inf))}  # fmt: skip
    for name, profile in made.items():
        profile.save(tmp_path / f"{name}.safetensors")
    options = {"tensor_parallel_size": 2, "pipeline_parallel_size": pipeline}
    texts = wanted(model, tokenizer, made)
    assert mixed(str(tmp_path / "model"), tmp_path, **options) == texts
    assert len(set(texts)) > len(texts) / 2
