"""Tiny models of many architectures, and the cap written as the simplest hooks in plain torch."""

from __future__ import annotations

import math
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch
import transformers
from conftest import assert_same_bits, profile_for
from torch import nn

import axiscap
from axiscap import CapProfile, models

SMALL = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


MOE = {"moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2}


OLD = {"n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 128}


ARCHITECTURES = {
    "Llama": ("LlamaConfig", SMALL),
    "Qwen2": ("Qwen2Config", SMALL),
    "Qwen3": ("Qwen3Config", SMALL | {"head_dim": 8}),
    "Gemma2": ("Gemma2Config", SMALL | {"head_dim": 8}),
    "Gemma3": ("Gemma3TextConfig", SMALL | {"head_dim": 8}),
    "Mistral": ("MistralConfig", SMALL),
    "Phi": ("PhiConfig", SMALL),
    "Phi3": ("Phi3Config", SMALL),
    "GPT2": ("GPT2Config", SMALL | OLD),
    "GPTNeoX": ("GPTNeoXConfig", SMALL),
    "Falcon": ("FalconConfig", SMALL),
    "Mixtral": ("MixtralConfig", SMALL | {"num_local_experts": 4}),
    "Qwen2Moe": ("Qwen2MoeConfig", SMALL | MOE | {"shared_expert_intermediate_size": 24}),
    "Qwen3Moe": ("Qwen3MoeConfig", SMALL | MOE | {"head_dim": 8}),
    "OPT": ("OPTConfig", SMALL | {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "Bloom": ("BloomConfig", SMALL | {"n_layer": 4, "n_head": 4}),
    "GPTJ": ("GPTJConfig", SMALL | OLD | {"rotary_dim": 8}),
    "StableLm": ("StableLmConfig", SMALL),
    "Olmo2": ("Olmo2Config", SMALL),
    "Cohere": ("CohereConfig", SMALL),
    "ModernBertDecoder": ("ModernBertDecoderConfig", SMALL | {"cls_token_id": 1, "sep_token_id": 2}),
}


VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}


FLOOR = 0.4


LAYERS = [1, 2]


GREEDY = {"do_sample": False, "max_new_tokens": 12, "min_new_tokens": 12}


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    config_name, arguments = ARCHITECTURES[name]
    config = getattr(transformers, config_name)(**arguments)
    return transformers.AutoModelForCausalLM.from_config(config).float().eval()


def gemma3_multimodal() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.Gemma3Config(
        text_config=SMALL | {"head_dim": 8}, vision_config=VISION, mm_tokens_per_image=4, image_token_index=90
    )
    return transformers.Gemma3ForConditionalGeneration(config).eval()


def llava() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**SMALL), vision_config=transformers.CLIPVisionConfig(**VISION)
    )
    return transformers.LlavaForConditionalGeneration(config).eval()


def tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 90, shape, generator=torch.Generator().manual_seed(seed))


@contextmanager
def plain_cap(model: nn.Module, profile: CapProfile, prompt_mask: torch.Tensor | None = None):
    """Equation 1 in the simplest hooks that one can write, in float64, for any model whose layers the profile counts.
    Rows beyond its norm_limits are left alone.

    prompt_mask: which tokens of the prompts are real; those of a pass over one new token all are.
    """
    blocks = models.decoder_layers(model)

    def hook_for(axis, floor, norm_limit):
        def hook(module, args, output):
            hidden = output[0] if isinstance(output, tuple) else output
            rows = hidden.double()
            capped = rows - ((rows @ axis) - floor).clamp(max=0)[..., None] * axis
            capped = torch.where(rows.norm(dim=-1, keepdim=True) > norm_limit, rows, capped)
            batch, length = hidden.shape[:2]
            if prompt_mask is not None and length >= prompt_mask.shape[1]:
                real = nn.functional.pad(prompt_mask, (0, length - prompt_mask.shape[1]), value=1).bool()
                real = real.repeat_interleave(batch // len(real), 0)
                capped = torch.where(real[..., None], capped, rows)
            capped = capped.to(hidden.dtype)
            return (capped, *output[1:]) if isinstance(output, tuple) else capped

        return hook

    norm_limits = torch.full((len(profile.layers),), math.inf) if profile.norm_limits is None else profile.norm_limits
    handles = [
        blocks[layer].register_forward_hook(
            hook_for(profile.axes[i, 0].double(), profile.floors[i, 0].double(), norm_limits[i])
        )
        for i, layer in enumerate(profile.layers)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def hooks_and_attributes(model: nn.Module) -> list[tuple]:
    """Each module's hooks of every kind in their order, and its attributes, with those that can be called."""
    return [
        (
            name,
            {key: list(value.items()) for key, value in vars(module).items() if key.endswith("_hooks") and value},
            {key: value if callable(value) else None for key, value in vars(module).items()},
        )
        for name, module in model.named_modules()
    ]


def rows(cap, name="default") -> int:
    return cap.stats()[name][LAYERS[0]].rows


CACHES = {
    "dynamic": {"cache_implementation": "dynamic"},
    "static": {"cache_implementation": "static"},
    "offloaded static": {"cache_implementation": "offloaded_static"},
    "none": {"use_cache": False},
    "beams": {"num_beams": 3},
    "several": {"do_sample": True, "num_return_sequences": 2},
}


def in_threads(*calls):
    """Runs calls at once, each starting when all have; returns what they gave."""
    barrier = threading.Barrier(len(calls))

    def run(call):
        barrier.wait()
        return call()

    with ThreadPoolExecutor(len(calls)) as pool:
        return [done.result() for done in [pool.submit(run, call) for call in calls]]


def check_caps_and_leaves_no_trace(model: nn.Module) -> None:
    profile = profile_for(model, LAYERS, FLOOR)
    ids = tokens(2, 9)
    with torch.no_grad():
        plain = model(input_ids=ids).logits
        with plain_cap(model, profile):
            expected = model(input_ids=ids).logits
        before = hooks_and_attributes(model)
        with axiscap.install(model, profile) as cap:
            result = model(input_ids=ids).logits
            stats, projections = cap.stats()["default"], cap.projections()
        again = model(input_ids=ids).logits
    torch.testing.assert_close(result, expected, atol=2e-5, rtol=2e-5)
    assert (result - plain).abs().max() > 1e-4, "the cap should have changed something"
    assert_same_bits(again, plain)
    assert hooks_and_attributes(model) == before
    for layer in LAYERS:
        assert stats[layer].rows == ids.numel()
        assert stats[layer].fired == int((projections[layer] < FLOOR).sum()) > 0
        assert projections[layer].shape == (2, 9, 1)
