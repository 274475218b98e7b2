"""Decoding loops of one's own, over every kind of state: which rows are capped, and what is said of the others."""

from __future__ import annotations

import inspect
import warnings

import pytest
import torch
import transformers
from conftest import profile_for
from tiny_models import LAYERS, OLD, SMALL, plain_cap, tokens
from torch import nn

import axiscap

STATE = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 4, "state_size": 8, "intermediate_size": 64}
#: By the kind of state that a model hands on.
MODELS = {
    "Llama": ("LlamaConfig", SMALL),
    "GPT2": ("GPT2Config", SMALL | OLD),
    "Mamba": ("MambaConfig", STATE),
    "Mamba2": ("Mamba2Config", STATE | {"num_heads": 4, "head_dim": 16, "n_groups": 1, "expand": 2}),
    "FalconMamba": ("FalconMambaConfig", STATE),
    "Rwkv": ("RwkvConfig", STATE | {"attention_hidden_size": 32, "context_length": 64}),
    "Bamba": ("BambaConfig", SMALL | {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 8,
                                      "attn_layer_indices": [1]}),
    "Jamba": ("JambaConfig", SMALL | {"mamba_d_state": 8, "num_experts": 2, "attn_layer_period": 2,
                                      "attn_layer_offset": 1}),
    "RecurrentGemma": ("RecurrentGemmaConfig", SMALL | {"lru_width": 32, "head_dim": 8}),
}  # fmt: skip
#: The names under which models return and take their state.
STATES = ("cache", "past_key_values", "cache_params", "state")


def build_model(name: str) -> nn.Module:
    torch.manual_seed(0)
    config_name, arguments = MODELS[name]
    config = getattr(transformers, config_name)(**arguments)
    return transformers.AutoModelForCausalLM.from_config(config).float().eval()


def state_of(out) -> dict:
    """The state that a pass returns, as the next one takes it."""
    return next(({name: out[name]} for name in STATES if out.get(name) is not None), {})


def decode(model, prompt: torch.Tensor, steps: int = 4) -> list[torch.Tensor]:
    """Feeds one token a sequence behind the prompt; returns the logits of each pass."""
    state = {}
    if isinstance(model, transformers.RecurrentGemmaForCausalLM):  # which does not return the cache that it makes
        name = next(name for name in STATES if name in inspect.signature(model.forward).parameters)
        state = {name: transformers.DynamicCache(config=model.config)}
    out = model(input_ids=prompt, use_cache=True, **state)
    passes = [out.logits]
    for step in range(steps):
        state = state_of(out) or state
        if "cache_params" in state:  # in older versions, which do not count the tokens themselves
            state |= {"cache_position": torch.tensor([prompt.shape[1] + step])}
        out = model(input_ids=out.logits[:, -1:].argmax(-1), use_cache=True, **state)
        passes.append(out.logits)
    return passes


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("length", [1, 3])
@pytest.mark.parametrize("positions", ["all", "generated"])
@pytest.mark.parametrize("name", list(MODELS))
def test_every_written_row_is_capped(name, positions, length):
    """A prompt may be one token long, which its shape does not tell from a written one."""
    batch = 1 if name == "Rwkv" else 2  # its decoding mixes the sequences of a batch
    model, prompt = build_model(name), tokens(batch, length)
    profile, seen = profile_for(model, LAYERS, 0.5), []
    with torch.no_grad():
        twin = build_model(name)  # RecurrentGemma keeps its state from one sequence to the next
        with plain_cap(twin, profile):
            expected = decode(twin, prompt)
        with axiscap.install(model, profile, positions=positions) as cap:
            cap.watch(lambda projections: seen.append(projections[LAYERS[0]][..., 0].isnan()))
            result = decode(model, prompt)
            stats = cap.stats()["default"][LAYERS[0]]
    prompt_rows = batch * length if positions == "all" else 0
    assert stats.rows == prompt_rows + batch * 4
    assert bool(seen[0].all()) == (positions == "generated")
    assert not any(bool(part.any()) for part in seen[1:])
    if positions == "all":
        for logits, right in zip(result, expected, strict=True):
            torch.testing.assert_close(logits, right, atol=1e-4, rtol=1e-4)


def test_rows_that_are_left_alone_because_nothing_tells_whose_they_are_are_said_once():
    model = build_model("Llama")
    with axiscap.install(model, profile_for(model, LAYERS, 1e3), positions="generated") as cap, torch.no_grad():
        with pytest.warns(UserWarning, match=r'positions="generated" outside generate\(\).* 5 tokens of this one'):
            out = model(tokens(1, 5), use_cache=True)
        assert cap.stats()["default"][LAYERS[0]].rows == 0
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model(tokens(1, 2), **state_of(out))
            model(tokens(1, 6))
        assert cap.stats()["default"][LAYERS[0]].rows == 0


def test_a_loop_that_prepares_its_inputs_tells_where_its_prompt_ends():
    model, ids = build_model("Llama"), tokens(1, 5)
    with axiscap.install(model, profile_for(model, LAYERS, 1e3), positions="generated") as cap, torch.no_grad():
        for step in range(4):
            inputs = model.prepare_inputs_for_generation(ids, is_first_iteration=step == 0, use_cache=False)
            logits = model(**inputs).logits
            ids = torch.cat([ids, logits[:, -1:].argmax(-1)], 1)
        assert cap.stats()["default"][LAYERS[0]].rows == 1 + 2 + 3


def test_positions_of_several_dimensions():
    """Those of Qwen2-VL and its kin: time, height and width."""
    config = transformers.Qwen2VLTextConfig(
        **SMALL, rope_parameters={"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
    )
    torch.manual_seed(0)
    model = transformers.AutoModel.from_config(config).eval()
    profile = profile_for(model, LAYERS, 0.5)
    positions = torch.stack([torch.arange(4), torch.zeros(4).long(), torch.zeros(4).long()])[:, None].expand(3, 2, 4)
    for kind, count in (("all", 2 * 6), ("generated", 2 * 2)):
        with axiscap.install(model, profile, positions=kind, layers="layers") as cap, torch.no_grad():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                out = model(tokens(2, 4), position_ids=positions, use_cache=True)
            for step in (4, 5):
                at = torch.tensor([step, 0, 0])[:, None, None].expand(3, 2, 1)
                out = model(tokens(2, 1), position_ids=at, **state_of(out))
            assert cap.stats()["default"][LAYERS[0]].rows == count
