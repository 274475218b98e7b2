"""generate() under an installation gives the tokens that plain hooks give, with the same rows capped."""

from __future__ import annotations

import peft
import pytest
import torch
import transformers
from conftest import profile_for, unit
from tiny_models import CACHES, FLOOR, GREEDY, LAYERS, build, gemma3_multimodal, plain_cap, rows, tokens
from torch import nn

import axiscap
from axiscap import CapProfile


@pytest.fixture
def llama() -> nn.Module:
    return build("Llama")


@pytest.mark.parametrize("name", list(CACHES))
@pytest.mark.parametrize("side", ["left", "right", "none"])
def test_generate(name, side, llama):
    if "offloaded" in name and not torch.cuda.is_available():
        pytest.skip("an offloaded cache needs an accelerator to be offloaded from")
    profile = profile_for(llama, LAYERS, FLOOR)
    ids, mask = tokens(3, 8), torch.ones(3, 8, dtype=torch.long)
    if side != "none":
        mask[1, slice(0, 3) if side == "left" else slice(5, 8)] = 0
        ids[mask == 0] = 0
    options = GREEDY | CACHES[name]

    def generate():
        torch.manual_seed(3)
        output = llama.generate(
            ids, attention_mask=mask, **options, output_scores=True, return_dict_in_generate=True, disable_compile=True
        )
        return output.sequences, torch.stack(output.scores)

    plain = generate()
    with plain_cap(llama, profile, mask):
        expected = generate()
    with axiscap.install(llama, profile) as cap:
        result = generate()
        stats = cap.stats()["default"]
    assert torch.equal(result[0], expected[0])
    # Scores of beams that ended or tokens that may not come are -inf in both.
    torch.testing.assert_close(result[1], expected[1], atol=2e-5, rtol=2e-5)
    assert not torch.allclose(plain[1], expected[1], atol=1e-3)
    real = int(mask.sum())
    several = options.get("num_beams", 1) * options.get("num_return_sequences", 1)
    if name == "none":  # every step runs the whole sequence again
        wanted_rows = sum(real + 3 * step for step in range(12))
    elif name == "beams":
        wanted_rows = None  # the prompt may run once a sequence or once a beam
    else:
        wanted_rows = several * (real + 3 * 11)
    if wanted_rows is not None:
        assert {layer: stats[layer].rows for layer in LAYERS} == dict.fromkeys(LAYERS, wanted_rows)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_neither_capped_nor_measured(side, llama):
    profile = profile_for(llama, LAYERS, 1e3)
    mask = torch.ones(2, 6, dtype=torch.long)
    mask[1, slice(0, 2) if side == "left" else slice(4, 6)] = 0
    seen = []
    with axiscap.install(llama, profile) as cap, torch.no_grad():
        llama.model.layers[1].register_forward_hook(lambda m, a, output: seen.append(output))
        llama(tokens(2, 6), attention_mask=mask)
        projections = cap.projections()[1][..., 0]
        assert cap.stats()["default"][1].rows == 10
    assert torch.equal(projections.isnan(), mask == 0)
    lifted = (seen[0] @ profile.axes[0, 0] - 1e3).abs() < 0.1
    assert torch.equal(lifted, mask == 1)


def test_a_mask_of_the_whole_sequence_counts_its_last_columns_behind_a_cache(llama):
    """In a user's own loop, the left padding lies in the cache, and the tokens of the step are all real."""
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    with axiscap.install(llama, profile_for(llama, LAYERS, 1e3)) as cap, torch.no_grad():
        cache = llama(tokens(2, 4), attention_mask=mask[:, :4], use_cache=True).past_key_values
        cap.reset_stats()
        llama(tokens(2, 2, seed=1), attention_mask=mask, past_key_values=cache)
        assert cap.stats()["default"][1].rows == 4
        assert not cap.projections()[1].isnan().any()


def test_a_positional_mask_counts_too(llama):
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
    with axiscap.install(llama, profile_for(llama, LAYERS, 0.0)) as cap, torch.no_grad():
        llama(tokens(2, 3), mask)
        assert cap.stats()["default"][1].rows == 5


def test_positions_generated(llama):
    """The prompt is left alone; every token that the model wrote is capped when it is fed back."""
    profile = profile_for(llama, LAYERS, 1e3)
    ids, mask = tokens(2, 7), torch.ones(2, 7, dtype=torch.long)
    mask[1, :2] = 0
    for cached in (True, False):
        with axiscap.install(llama, profile, positions="generated") as cap, torch.no_grad():
            llama.generate(ids, attention_mask=mask, **GREEDY, use_cache=cached)
            rows = cap.stats()["default"][1].rows
            assert rows == 2 * (11 if cached else sum(range(12)))
            last = cap.projections()[1][..., 0]
            assert not last[:, -1].isnan().any()
            if not cached:
                assert last[:, :7].isnan().all()
            llama.generate(ids, attention_mask=mask, **GREEDY)
            assert cap.stats()["default"][1].rows == rows + 2 * 11
    with axiscap.install(llama, profile, positions="generated") as cap, torch.no_grad():
        out = llama(ids)
        assert cap.stats()["default"][1].rows == 0
        llama(tokens(2, 1), past_key_values=out.past_key_values)
        assert cap.stats()["default"][1].rows == 2
    with pytest.raises(ValueError, match="positions must be 'all' or 'generated', got 'some'"):
        axiscap.install(llama, profile, positions="some")


def test_a_profile_for_each_sequence(llama):
    names = {
        "low": profile_for(llama, [1], 0.3),
        "high": CapProfile([0, 2], unit(2, 2, 32, seed=7), torch.full((2, 2), 0.8)),
    }
    ids = tokens(3, 6)
    choice = ["high", None, "low"]

    def alone(i, name):
        if name is None:
            return llama.generate(ids[i : i + 1], **GREEDY)
        with axiscap.install(llama, names[name]):
            return llama.generate(ids[i : i + 1], **GREEDY)

    expected = [alone(i, name) for i, name in enumerate(choice)]
    with axiscap.install(llama, names) as cap:
        cap.select(choice)
        result = llama.generate(ids, attention_mask=torch.ones_like(ids), **GREEDY)
        stats = cap.stats()
        assert {layer: s.rows for layer, s in stats["low"].items()} == {1: 6 + 11}
        assert {layer: s.rows for layer, s in stats["high"].items()} == {0: 6 + 11, 2: 6 + 11}
        cap.reset_stats()
        cap.select("low")
        llama.generate(ids, attention_mask=torch.ones_like(ids), **GREEDY, num_beams=2)
        assert cap.stats()["high"][0].rows == 0
        assert cap.stats()["low"][1].rows > 0
        cap.select(None)
        uncapped = llama.generate(ids, attention_mask=torch.ones_like(ids), **GREEDY)
        with pytest.raises(KeyError, match="no profile 'middle' is installed; there are low, high"):
            cap.select(["low", "middle", None])
        with pytest.raises(ValueError, match="names must not be empty"):
            cap.select([])
        cap.select(["low", "high"])
        with pytest.raises(ValueError, match="profiles are selected for 2 sequences, but the batch has 3"):
            llama(ids)
    assert torch.equal(result, torch.cat(expected))
    assert torch.equal(uncapped, llama.generate(ids, attention_mask=torch.ones_like(ids), **GREEDY))


def test_beams_follow_their_sequence(llama):
    names = {"low": profile_for(llama, [1], 0.3), "high": profile_for(llama, [1], 2.0)}
    ids = tokens(2, 5)
    expected = []
    for i, name in enumerate(["high", "low"]):
        with axiscap.install(llama, names[name]):
            expected.append(llama.generate(ids[i : i + 1], **GREEDY, num_beams=3))
    with axiscap.install(llama, names) as cap:
        cap.select(["high", "low"])
        result = llama.generate(ids, attention_mask=torch.ones_like(ids), **GREEDY, num_beams=3)
    assert torch.equal(result, torch.cat(expected))


@pytest.mark.parametrize("name", ["Llama", "GPT2"])
def test_generate_from_embeddings(name):
    model = build(name)
    profile, embeds = profile_for(model, LAYERS, FLOOR), model.get_input_embeddings()(tokens(2, 6)).detach()
    plain = model.generate(inputs_embeds=embeds, **GREEDY)
    with plain_cap(model, profile):
        expected = model.generate(inputs_embeds=embeds, **GREEDY)
    with axiscap.install(model, profile) as cap:
        assert torch.equal(model.generate(inputs_embeds=embeds, **GREEDY), expected)
        assert rows(cap) == 2 * (6 + 11)
    assert torch.equal(model.generate(inputs_embeds=embeds, **GREEDY), plain)
    with axiscap.install(model, profile, positions="generated") as cap:
        model.generate(inputs_embeds=embeds, **GREEDY)
        assert rows(cap) == 2 * 11


def test_a_wrapper_that_somebody_puts_around_ours_stays_after_removal(llama):
    """Somebody wraps the method of a model that is capped, and takes the cap out later."""
    profile = profile_for(llama, LAYERS, FLOOR)
    called = []
    plain = llama.generate(tokens(1, 4), **GREEDY)
    cap = axiscap.install(llama, profile)
    inner = llama.prepare_inputs_for_generation

    def outer(*args, **kwargs):
        called.append(1)
        return inner(*args, **kwargs)

    llama.prepare_inputs_for_generation = outer
    llama.generate(tokens(1, 4), **GREEDY)
    assert rows(cap) == 4 + 11
    cap.remove()
    called.clear()
    assert torch.equal(llama.generate(tokens(1, 4), **GREEDY), plain)
    assert len(called) == 12
    assert rows(cap) == 4 + 11


def draft_model() -> nn.Module:
    """Guesses what the model says now and then."""
    model = build("Llama")
    with torch.no_grad():
        for parameter in model.model.layers[3].parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return model


@pytest.mark.parametrize("way", ["prompt lookup", "another model", "the model itself"])
@pytest.mark.parametrize("positions", ["all", "generated"])
def test_drafted_tokens_are_capped_as_written_ones(way, positions, llama):
    """Speculative decoding gives the texts that decoding token by token gives."""
    # A prompt that repeats itself, so that there is something to look up.
    ids = tokens(1, 6).repeat(1, 3)
    profile = profile_for(llama, LAYERS, 0.8)
    options = {
        "prompt lookup": {"prompt_lookup_num_tokens": 3},
        "another model": {"assistant_model": draft_model()},
        "the model itself": {"assistant_model": llama},
    }[way]
    with axiscap.install(llama, profile, positions=positions) as cap:
        expected = llama.generate(ids, **GREEDY)
        fired = cap.stats()["default"][LAYERS[0]]
        assert fired.rows == 11 + (18 if positions == "all" else 0)
        cap.reset_stats()
        seen = []
        stop = cap.watch(lambda projections: seen.append(projections[LAYERS[0]][0, :, 0].isnan().tolist()))
        result = llama.generate(ids, **GREEDY, **options)
        stop()
        again = llama.generate(ids, **GREEDY)
    assert torch.equal(result, expected)
    assert torch.equal(again, expected)
    if positions == "generated":
        prompts = [alone for alone in seen if len(alone) >= 18]
        assert prompts
        assert all(all(alone[:18]) for alone in prompts), "a prompt's row was capped"
        assert not any(any(alone[18:]) for alone in prompts), "a drafted row was left alone"
        assert not any(any(alone) for alone in seen if len(alone) < 18), "a written or drafted row was left alone"


@pytest.mark.parametrize("kind", ["T5", "Bart"])
def test_the_decoder_of_an_encoder_decoder_model_generates(kind):
    torch.manual_seed(0)
    sizes = {
        "T5": {"d_kv": 8, "d_ff": 32, "num_layers": 4, "num_heads": 4},
        "Bart": {
            "encoder_layers": 2, "decoder_layers": 4, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
            "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "max_position_embeddings": 64,
        },
    }[kind]  # fmt: skip
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=97, d_model=32, decoder_start_token_id=0, bos_token_id=1, eos_token_id=2, pad_token_id=0, **sizes
    )
    model = getattr(transformers, f"{kind}ForConditionalGeneration")(config).eval()
    layers = "decoder.block" if kind == "T5" else "model.decoder.layers"
    profile = profile_for(build("Llama"), LAYERS, FLOOR)
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[1, 4:] = 0
    options = {"attention_mask": mask, **GREEDY}
    with axiscap.install(model, profile, layers=layers) as cap:
        model.generate(tokens(2, 7), **options)
        assert rows(cap) == 2 * 12
    with axiscap.install(model, profile, layers=layers, positions="generated") as cap:
        model.generate(tokens(2, 7), **options)
        assert rows(cap) == 2 * 11


def test_a_recurrent_model_generates():
    sizes = {
        "attention_hidden_size": 32,
        "intermediate_size": 48,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    torch.manual_seed(0)
    config = transformers.RwkvConfig(vocab_size=97, hidden_size=32, num_hidden_layers=4, **sizes)
    model = transformers.RwkvForCausalLM(config).eval()
    profile, options = (
        profile_for(model, LAYERS, FLOOR),
        {"attention_mask": torch.ones(2, 6, dtype=torch.long), **GREEDY},
    )
    with plain_cap(model, profile):
        expected = model.generate(tokens(2, 6), **options)
    with axiscap.install(model, profile) as cap:
        assert torch.equal(model.generate(tokens(2, 6), **options), expected)
        assert rows(cap) == 2 * (6 + 11 * 2)  # it is fed two tokens a step


@pytest.mark.parametrize("kind", ["prompt", "prefix", "p-tuning"])
def test_virtual_tokens_count_as_the_prompts(kind, llama):
    configs = {
        "prompt": peft.PromptTuningConfig,
        "prefix": peft.PrefixTuningConfig,
        "p-tuning": peft.PromptEncoderConfig,
    }
    extra = {"encoder_hidden_size": 16} if kind == "p-tuning" else {}
    config = configs[kind](task_type="CAUSAL_LM", num_virtual_tokens=3, **extra)
    torch.manual_seed(1)
    model = peft.get_peft_model(llama, config).eval()
    mask = torch.ones(3, 9, dtype=torch.long)
    mask[1, :4] = 0
    profile = profile_for(llama, LAYERS, FLOOR)
    fed = 0 if kind == "prefix" else 3 * 3  # a prefix stands in the cache, and has no rows
    seen = []
    handle = llama.model.layers[LAYERS[0]].register_forward_hook(
        lambda m, a, output: seen.append(output[..., 0].numel())
    )
    with torch.no_grad():
        model.generate(input_ids=tokens(3, 9), attention_mask=mask, **GREEDY)
    handle.remove()
    with axiscap.install(model, profile) as cap, torch.no_grad():
        model(input_ids=tokens(3, 9), attention_mask=mask)
        assert rows(cap) == 27 - 4 + fed
        cap.reset_stats()
        model.generate(input_ids=tokens(3, 9), attention_mask=mask, **GREEDY)
        assert rows(cap) == sum(seen) - 4
    with axiscap.install(model, profile, positions="generated") as cap, torch.no_grad():
        model.generate(input_ids=tokens(3, 9), attention_mask=mask, **GREEDY)
        assert rows(cap) == 3 * 11


def test_padding_of_a_wrapper_that_prepares_the_mask():
    model = gemma3_multimodal()
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, :3] = 0
    profile = profile_for(model, LAYERS, FLOOR)
    with axiscap.install(model, profile) as cap, torch.no_grad():
        for part in (model, model.model):
            cap.reset_stats()
            part(input_ids=tokens(2, 9), attention_mask=mask)
            assert rows(cap) == 15
        cap.reset_stats()
        model(input_ids=tokens(2, 9))  # no mask of the pass before
        assert rows(cap) == 18
