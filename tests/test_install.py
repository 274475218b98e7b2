"""Installation into transformers models: every architecture by its structure, every way to run it, and out again."""

from __future__ import annotations

import copy
import math
import warnings
from contextlib import contextmanager

import pytest
import torch
import transformers
from conftest import assert_same_bits, profile_for, unit
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


def peft_wrapped() -> nn.Module:
    import peft

    lora = peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2, init_lora_weights=False)
    return peft.get_peft_model(build("Llama"), lora).eval()


WRAPPED = {"Gemma3 multimodal": gemma3_multimodal, "Llava": llava, "PEFT": peft_wrapped}


@pytest.fixture
def llama() -> nn.Module:
    return build("Llama")


def tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 90, shape, generator=torch.Generator().manual_seed(seed))


@contextmanager
def plain_cap(model: nn.Module, profile: CapProfile, prompt_mask: torch.Tensor | None = None):
    """Equation 1 in the simplest hooks that one can write, for any model whose layers the profile counts; rows beyond
    its norm_limits are left alone.

    prompt_mask: which tokens of the prompts are real; those of a pass over one new token all are.
    """
    blocks = models.decoder_layers(model)

    def hook_for(axis, floor, norm_limit):
        def hook(module, args, output):
            hidden = output[0] if isinstance(output, tuple) else output
            capped = hidden - ((hidden @ axis) - floor).clamp(max=0)[..., None] * axis
            capped = torch.where(hidden.norm(dim=-1, keepdim=True) > norm_limit, hidden, capped)
            batch, length = hidden.shape[:2]
            if prompt_mask is not None and length >= prompt_mask.shape[1]:
                real = nn.functional.pad(prompt_mask, (0, length - prompt_mask.shape[1]), value=1).bool()
                real = real.repeat_interleave(batch // len(real), 0)
                capped = torch.where(real[..., None], capped, hidden)
            return (capped, *output[1:]) if isinstance(output, tuple) else capped

        return hook

    norm_limits = torch.full((len(profile.layers),), math.inf) if profile.norm_limits is None else profile.norm_limits
    handles = [
        blocks[layer].register_forward_hook(hook_for(profile.axes[i, 0], profile.floors[i, 0], norm_limits[i]))
        for i, layer in enumerate(profile.layers)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


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


def hooks_and_attributes(model: nn.Module) -> list[tuple[str, int, int, tuple[str, ...]]]:
    return [
        (name, len(module._forward_hooks), len(module._forward_pre_hooks), tuple(sorted(module.__dict__)))
        for name, module in model.named_modules()
    ]


@pytest.mark.parametrize("name", list(ARCHITECTURES))
def test_architectures(name):
    check_caps_and_leaves_no_trace(build(name))


@pytest.mark.parametrize("name", list(WRAPPED))
def test_wrapped_models(name):
    check_caps_and_leaves_no_trace(WRAPPED[name]())


class Homemade(nn.Module):
    """No transformers model: layers that return tuples, under names of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(97, 32)
        self.trunk = nn.Module()
        self.trunk.steps = nn.ModuleList(nn.Linear(32, 32) for _ in range(4))

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        hidden = self.embed(input_ids)
        for step in self.trunk.steps:
            hidden = hidden + step(hidden)
        return hidden


def test_explicit_layers():
    model = Homemade()
    profile = CapProfile([3], unit(1, 1, 32), torch.full((1, 1), 5.0))
    with pytest.raises(ValueError, match=r"cannot tell the decoder layers of Homemade.*name the list with layers="):
        axiscap.install(model, profile)
    ids = tokens(2, 5)
    for layers in ("trunk.steps", list(model.trunk.steps)):
        seen = []
        with axiscap.install(model, profile, layers=layers) as cap, torch.no_grad():
            handle = model.trunk.steps[3].register_forward_hook(lambda m, a, output, seen=seen: seen.append(output))
            model(ids)
            handle.remove()
        torch.testing.assert_close(seen[0] @ profile.axes[0, 0], torch.full((2, 5), 5.0))
        assert cap.stats()["default"][3].fired == 10
    for layers, message in (
        ("trunk.nothing", "the model has no module 'trunk.nothing'"),
        ("embed", "'embed' is a Embedding, not a non-empty list"),
        ([], "layers must be a dotted name or a non-empty sequence"),
    ):
        with pytest.raises(ValueError, match=message):
            axiscap.install(model, profile, layers=layers)


def test_an_encoder_decoder_model_is_refused():
    config = transformers.T5Config(vocab_size=97, d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=4)
    profile = CapProfile([0], unit(1, 1, 32), torch.zeros(1, 1))
    with pytest.raises(ValueError, match="encoder-decoder model; say which stack to cap with layers="):
        axiscap.install(transformers.T5ForConditionalGeneration(config), profile)


# Ways to generate: what comes out is what the plain hooks give.

GREEDY = {"do_sample": False, "max_new_tokens": 12, "min_new_tokens": 12}
CACHES = {
    "dynamic": {"cache_implementation": "dynamic"},
    "static": {"cache_implementation": "static"},
    "offloaded static": {"cache_implementation": "offloaded_static"},
    "none": {"use_cache": False},
    "beams": {"num_beams": 3},
    "several": {"do_sample": True, "num_return_sequences": 2},
}


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


# Sinks: a row whose norm is beyond the profile's limit is left alone, however its sequence comes.

#: A token of the vocabulary whose row is a sink in every layer, and the limit that tells it from the others.
SINK, NORM_LIMIT = 7, 50.0


@pytest.fixture
def massive(llama) -> nn.Module:
    """A model that keeps the huge embedding of one token in its residual stream."""
    with torch.no_grad():
        llama.get_input_embeddings().weight[SINK] = -400 * profile_for(llama, LAYERS, 0.0).axes[0, 0]
    return llama


def limited(model, norm_limit: float = NORM_LIMIT, floor: float = 5.0) -> CapProfile:
    """Every row lies below the floor, so that a row that is not capped shows; no capped row is beyond the limit."""
    made = profile_for(model, LAYERS, floor)
    norm_limits = torch.full((len(LAYERS),), norm_limit)
    return CapProfile(made.layers, made.axes, made.floors, made.provenance, norm_limits=norm_limits)


def tokens_with_sinks(*shape: int, at: tuple[tuple[int, int], ...]) -> torch.Tensor:
    ids = tokens(*shape)
    ids[ids == SINK] = SINK + 1
    for row, column in at:
        ids[row, column] = SINK
    return ids


def assert_left_alone(cap, expected: torch.Tensor) -> None:
    for projections in cap.projections().values():
        assert torch.equal(projections[..., 0].isnan(), expected)


def assert_same_rows(parts: list[dict[int, torch.Tensor]], whole: dict[int, torch.Tensor]) -> None:
    """The projections of passes over parts of a sequence are those of one pass over the whole."""
    for layer, projections in whole.items():
        result = torch.cat([part[layer] for part in parts], 1)
        torch.testing.assert_close(result, projections, atol=1e-4, rtol=1e-4, equal_nan=True)


def whole_pass(model, profile: CapProfile, ids: torch.Tensor) -> dict[int, torch.Tensor]:
    with axiscap.install(model, profile) as cap, torch.no_grad():
        model(ids)
        assert_left_alone(cap, ids == SINK)
        return cap.projections()


@pytest.mark.parametrize("side", ["none", "left", "right"])
def test_sinks_of_plain_and_padded_sequences(massive, side):
    ids = tokens_with_sinks(2, 6, at=((0, 0), (0, 2), (1, 3)))
    real = torch.ones(2, 6, dtype=torch.bool)
    if side != "none":
        real[1, slice(0, 2) if side == "left" else slice(4, 6)] = False
    alone = whole_pass(massive, limited(massive), ids[1:, real[1]])
    with axiscap.install(massive, limited(massive)) as cap, torch.no_grad():
        massive(ids, attention_mask=None if side == "none" else real.long())
        assert_left_alone(cap, (ids == SINK) | ~real)
        assert_same_rows([{layer: result[1:, real[1]] for layer, result in cap.projections().items()}], alone)
        for stats in cap.stats()["default"].values():
            assert (stats.rows, stats.nonfinite) == (int(real.sum()), 3)
            assert stats.fired == stats.rows - 3


def test_a_capped_pass_with_sinks_gives_what_plain_hooks_give(massive):
    ids = tokens_with_sinks(2, 7, at=((0, 0), (1, 0), (1, 4)))
    with torch.no_grad():
        with plain_cap(massive, limited(massive, floor=FLOOR)):
            expected = massive(ids).logits
        with axiscap.install(massive, limited(massive, floor=FLOOR)):
            torch.testing.assert_close(massive(ids).logits, expected, atol=2e-5, rtol=2e-5)
        with plain_cap(massive, limited(massive, math.inf, FLOOR)):
            assert not torch.allclose(massive(ids).logits, expected, atol=1e-3)


def test_sinks_of_packed_sequences(massive):
    """Two sequences in one row, told apart by their positions, give the rows that each of them gives alone."""
    ids = tokens_with_sinks(1, 7, at=((0, 0), (0, 3)))
    alone = [whole_pass(massive, limited(massive), part) for part in (ids[:, :3], ids[:, 3:])]
    with axiscap.install(massive, limited(massive)) as cap, torch.no_grad():
        massive(ids, position_ids=torch.tensor([[0, 1, 2, 0, 1, 2, 3]]), use_cache=False)
        assert_left_alone(cap, ids == SINK)
        assert_same_rows(alone, cap.projections())


@pytest.mark.parametrize("static", [False, True])
def test_sinks_of_a_prompt_in_chunks(massive, static):
    config = massive.config
    cache = transformers.StaticCache(config=config, max_cache_len=16) if static else transformers.DynamicCache()
    ids = tokens_with_sinks(1, 7, at=((0, 0), (0, 4)))
    whole = whole_pass(massive, limited(massive), ids)
    with axiscap.install(massive, limited(massive)) as cap, torch.no_grad():
        parts = []
        for chunk in ids.split(3, dim=1):
            massive(chunk, past_key_values=cache)
            assert_left_alone(cap, chunk == SINK)
            parts.append(cap.projections())
    assert_same_rows(parts, whole)


def test_sinks_of_a_cache_that_is_resumed(massive):
    """In a loop of one's own, with padding on the left: a prefix is computed once, and goes on in two ways."""
    prefix, mask = tokens_with_sinks(2, 5, at=((0, 0), (1, 2))), torch.tensor([[1] * 8, [0, 0] + [1] * 6])
    endings = [tokens_with_sinks(2, 3, at=at) for at in (((0, 1),), ((1, 0), (1, 2)))]
    with axiscap.install(massive, limited(massive)) as cap, torch.no_grad():
        cache = massive(prefix, attention_mask=mask[:, :5], use_cache=True).past_key_values
        begun, resumed = cap.projections(), []
        for ending in endings:
            massive(ending, attention_mask=mask, past_key_values=copy.deepcopy(cache))
            assert_left_alone(cap, ending == SINK)
            resumed.append(cap.projections())
    for ending, end in zip(endings, resumed, strict=True):
        for row, start in ((0, 0), (1, 2)):
            whole = whole_pass(massive, limited(massive), torch.cat([prefix, ending], 1)[row : row + 1, start:])
            parts = [(begun, start), (end, 0)]
            assert_same_rows(
                [{at: result[row : row + 1, skip:] for at, result in part.items()} for part, skip in parts], whole
            )


@pytest.mark.parametrize("name", ["dynamic", "static", "none", "beams"])
def test_sinks_while_generating(name, massive):
    """Of the prompt and of what is written, with padding on the left; with no cache they come again at each step."""
    ids, mask = tokens_with_sinks(2, 6, at=((0, 0), (1, 3))), torch.ones(2, 6, dtype=torch.long)
    mask[1, :3] = 0
    with axiscap.install(massive, limited(massive)) as cap, torch.no_grad():
        options = GREEDY | CACHES[name] | {"disable_compile": True}
        written = massive.generate(ids, attention_mask=mask, **options)[:, :-1]  # the last token is not read
        stats = cap.stats()["default"].values()
        sinks = (written == SINK) & nn.functional.pad(mask == 1, (0, 11), value=True)
        if name == "none":
            padding = nn.functional.pad(mask == 0, (0, 11), value=False)
            assert_left_alone(cap, sinks | padding)
        elif name != "beams":
            assert_left_alone(cap, sinks[:, -1:])
            assert {result.rows for result in stats} == {(6 + 3) + 2 * 11}
            assert {result.nonfinite for result in stats} == {int(sinks.sum())}
        assert all(result.nonfinite >= 2 and result.fired == result.rows - result.nonfinite for result in stats)


@pytest.mark.filterwarnings("ignore:profile 'every' has no norm_limits")
def test_each_profile_has_its_own_limits(massive):
    profiles = {"every": profile_for(massive, LAYERS, 5.0), "sinks": limited(massive), "all": limited(massive, 1e-6)}
    ids = tokens_with_sinks(4, 3, at=((0, 0), (1, 0), (2, 0), (3, 0)))
    with axiscap.install(massive, profiles) as cap, torch.no_grad():
        cap.select(["sinks", None, "every", "all"])
        for _ in range(2):  # the first pass looks for sinks, the second takes the layers' fast way
            massive(ids)
            expected = torch.tensor([[True, False, False], [True] * 3, [False] * 3, [True] * 3])
            assert_left_alone(cap, expected)


def test_rows_beyond_their_limit_are_left_alone(llama):
    norms = []
    llama.model.layers[LAYERS[0]].register_forward_hook(lambda m, a, output: norms.append(output[0].norm(dim=-1)))
    with torch.no_grad():
        llama(tokens(1, 9))
    lower, upper = norms[0].sort().values[4:6].tolist()
    limit = (lower + upper) / 2
    with axiscap.install(llama, profile_for(llama, LAYERS, 1e3).measuring_only()) as cap, torch.no_grad():
        llama(tokens(1, 9))
        seen = cap.projections()[LAYERS[0]][0, :, 0]
    # The first capped layer alone: behind it the streams differ.
    with axiscap.install(llama, limited(llama, limit, 1e3)) as cap, torch.no_grad():
        llama(tokens(1, 9))
        assert torch.equal(cap.projections()[LAYERS[0]][0, :, 0].isnan(), norms[0] > limit)
        stats = cap.stats()["default"][LAYERS[0]]
        assert (stats.rows, stats.nonfinite, stats.fired) == (9, 4, 5)
        assert stats.mean[0] == pytest.approx(seen[norms[0] <= limit].double().mean().item(), rel=1e-5)


def test_a_profile_that_lifts_a_sink_warns_once(llama):
    """One token of the vocabulary gets a huge embedding: a sink that every layer keeps."""
    with torch.no_grad():
        llama.get_input_embeddings().weight[SINK] = 400 * nn.functional.normalize(torch.randn(32), dim=0)
    ids = tokens_with_sinks(1, 9, at=((0, 0),))
    made = profile_for(llama, LAYERS, 0.0)
    axes = made.axes.clone()
    axes[:, 0] = -nn.functional.normalize(llama.get_input_embeddings().weight[SINK].detach(), dim=0)
    every = CapProfile(made.layers, axes, made.floors, made.provenance)
    with axiscap.install(llama, every), torch.no_grad(), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        llama(ids)
        llama(ids)
    (warning,) = [entry for entry in said if "lifts an attention sink" in str(entry.message)]
    assert "row 0" in str(warning.message)
    norm_limits = torch.full((len(LAYERS),), NORM_LIMIT)
    quiet = CapProfile(made.layers, axes, made.floors, made.provenance, norm_limits=norm_limits)
    with axiscap.install(llama, quiet), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        llama(ids)
    with axiscap.install(llama, every), torch.no_grad(), pytest.warns(UserWarning, match="lifts an attention sink"):
        llama(ids[:, :2])
    late = every.with_floors(torch.tensor([[-math.inf], [0.0]]))
    with axiscap.install(llama, late), torch.no_grad(), pytest.warns(UserWarning, match=f"at layer {LAYERS[1]}, row 0"):
        llama(ids)
    # Beside a profile that would be warned about, one that states its limits is not, although it lifts the row.
    stated = CapProfile(made.layers, axes, made.floors, made.provenance, norm_limits=norm_limits + math.inf)
    with axiscap.install(llama, {"stated": stated, "every": every}) as cap, torch.no_grad():
        cap.select("stated")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            llama(ids)
        assert cap.stats()["stated"][LAYERS[0]].fired > 0
    with axiscap.install(llama, {"stated": stated, "every": every}) as cap, torch.no_grad():
        cap.select(["stated", "every"])
        with pytest.warns(UserWarning, match=r"profile 'every' has no norm_limits.* row 9 "):
            llama(ids.repeat(2, 1))


# Several profiles.


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


# Other ways in which a model may run.


@pytest.mark.slow
def test_compiled_models(llama):
    profile = profile_for(llama, LAYERS, FLOOR)
    ids, short = tokens(2, 9), tokens(3, 4)
    with torch.no_grad(), plain_cap(llama, profile):
        expected, wanted_short = llama(ids).logits, llama(short).logits
    with torch.no_grad():
        plain = llama(ids).logits
        compiled = torch.compile(llama)
        torch.testing.assert_close(compiled(ids).logits, plain, atol=2e-5, rtol=2e-5)
        with axiscap.install(compiled, profile) as cap:
            torch.testing.assert_close(compiled(ids).logits, expected, atol=2e-5, rtol=2e-5)
            torch.testing.assert_close(compiled(short).logits, wanted_short, atol=2e-5, rtol=2e-5)
            assert cap.stats()["default"][1].rows == 18 + 12
        torch.testing.assert_close(compiled(ids).logits, plain, atol=2e-5, rtol=2e-5)
        # Compiled with the cap in place, and after it has gone.
        with axiscap.install(llama, profile) as cap:
            inner = torch.compile(llama)
            torch.testing.assert_close(inner(ids).logits, expected, atol=2e-5, rtol=2e-5)
            assert cap.stats()["default"][1].rows == 18
        torch.testing.assert_close(inner(ids).logits, plain, atol=2e-5, rtol=2e-5)


@pytest.mark.slow
def test_compiled_with_a_selection(llama):
    names = {"low": profile_for(llama, [1], 0.3), "high": profile_for(llama, [2], 1.5)}
    ids = tokens(2, 7)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    compiled = torch.compile(llama)
    with axiscap.install(llama, names) as cap, torch.no_grad():
        for choice in (["low", None], ["high", "low"], "high"):
            cap.select(choice)
            expected = llama(ids, attention_mask=mask).logits
            result = compiled(ids, attention_mask=mask).logits
            real = mask.bool()
            torch.testing.assert_close(result[real], expected[real], atol=2e-5, rtol=2e-5)
        assert cap.stats()["high"][2].rows == 2 * (5 + 12)


def test_offloaded_weights(llama, tmp_path):
    """accelerate's hooks replace the forwards of modules whose weights lie on disk."""
    from accelerate import cpu_offload, disk_offload

    profile = profile_for(llama, LAYERS, FLOOR)
    ids = tokens(2, 6)
    with torch.no_grad(), plain_cap(llama, profile):
        expected = llama(ids).logits
    for offload in (lambda m: cpu_offload(m), lambda m: disk_offload(m, tmp_path / "weights")):
        model = offload(copy.deepcopy(llama))
        with torch.no_grad(), axiscap.install(model, profile):
            torch.testing.assert_close(model(ids).logits, expected, atol=2e-5, rtol=2e-5)


def test_device_map(llama, tmp_path):
    """Loaded with a device_map, part of it on disk."""
    llama.save_pretrained(tmp_path / "model")
    names = ["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"]
    device_map = dict.fromkeys(names, "cpu") | {f"model.layers.{i}": "disk" if i > 1 else "cpu" for i in range(4)}
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "offload", dtype=torch.float32
    )
    profile = profile_for(llama, LAYERS, FLOOR)
    ids = tokens(2, 6)
    with torch.no_grad(), plain_cap(llama, profile):
        expected = llama(ids).logits
    with torch.no_grad(), axiscap.install(model, profile) as cap:
        torch.testing.assert_close(model(ids).logits, expected, atol=2e-5, rtol=2e-5)
        assert cap.stats()["default"][2].rows == 12


def test_quantised_weights(llama):
    quantised = torch.ao.quantization.quantize_dynamic(copy.deepcopy(llama), {nn.Linear}, torch.qint8)
    check_caps_and_leaves_no_trace(quantised)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(llama, dtype):
    model = llama.to(dtype)
    profile = profile_for(model, LAYERS, FLOOR)
    outputs = []
    with axiscap.install(model, profile), torch.no_grad():
        model.model.layers[2].register_forward_hook(lambda m, a, output: outputs.append(output))
        model(tokens(2, 6))
    projections = outputs[0].float() @ profile.axes[1, 0]
    assert outputs[0].dtype == dtype
    assert bool((projections > FLOOR - 0.02).all())


def test_gradients_flow_through_the_cap(llama):
    """Training with the cap in force: the gradients are those of the plain hooks."""
    profile = profile_for(llama, LAYERS, FLOOR)
    ids = tokens(2, 6)

    def gradient():
        llama.zero_grad()
        llama(ids, labels=ids).loss.backward()
        return llama.model.embed_tokens.weight.grad.clone()

    with plain_cap(llama, profile):
        expected = gradient()
    with axiscap.install(llama, profile):
        result = gradient()
    torch.testing.assert_close(result, expected, atol=1e-6, rtol=1e-4)
    assert expected.abs().max() > 0


# Handles and mistakes.


def test_installing_twice_is_an_error_that_says_so(llama):
    profile = profile_for(llama, LAYERS, 0.0)
    handle = axiscap.install(llama, profile)
    for again in (llama, torch.compile(llama)):
        with pytest.raises(RuntimeError, match="has an AxisCap installation already; remove it first"):
            axiscap.install(again, profile)
    handle.remove()
    handle.remove()
    axiscap.install(llama, profile).remove()


def test_an_exception_inside_leaves_nothing_behind(llama):
    before = hooks_and_attributes(llama)
    with pytest.raises(ZeroDivisionError), axiscap.install(llama, profile_for(llama, LAYERS, 0.0)):
        raise ZeroDivisionError
    assert hooks_and_attributes(llama) == before


def test_an_exception_in_the_middle_of_a_forward_pass(llama):
    profile = profile_for(llama, LAYERS, FLOOR)
    ids = tokens(1, 5)

    def fail(module, args):
        raise KeyboardInterrupt

    with axiscap.install(llama, profile) as cap, torch.no_grad():
        expected = llama(ids).logits
        handle = llama.model.layers[2].register_forward_pre_hook(fail)
        with pytest.raises(KeyboardInterrupt):
            llama.generate(ids, **GREEDY)
        handle.remove()
        assert_same_bits(llama(ids).logits, expected)
        assert cap.stats()["default"][1].rows == 15
        assert cap.stats()["default"][2].rows == 10


def test_a_failing_installation_leaves_nothing_behind(llama, monkeypatch):
    before = hooks_and_attributes(llama)
    last = llama.model.layers[2]
    monkeypatch.setattr(last, "register_forward_hook", lambda *a, **k: (_ for _ in ()).throw(OSError("no")))
    with pytest.raises(OSError, match="no"):
        axiscap.install(llama, profile_for(llama, LAYERS, 0.0))
    monkeypatch.undo()
    assert hooks_and_attributes(llama) == before
    axiscap.install(llama, profile_for(llama, LAYERS, 0.0)).remove()


@pytest.mark.parametrize(
    ("profile", "error", "message"),
    [
        (CapProfile([0], unit(1, 1, 16), torch.zeros(1, 1)), ValueError, "has hidden size 16, the model 32"),
        (CapProfile([4], unit(1, 1, 32), torch.zeros(1, 1)), ValueError, "caps layer 4, but the model has 4 layers"),
        (
            CapProfile([0], unit(1, 1, 32), torch.zeros(1, 1), {"model": {"num_layers": 12}}),
            ValueError,
            "is for a model of 12 layers, this one has 4",
        ),
        ({}, ValueError, "profile must be a CapProfile or a mapping with at least one"),
        ({"a": "file.safetensors"}, TypeError, "profile 'a' must be a CapProfile, got str"),
        ("file.safetensors", TypeError, "profile must be a CapProfile or a mapping of names to them, got str"),
    ],
)
def test_profiles_that_do_not_fit(profile, error, message, llama):
    before = hooks_and_attributes(llama)
    with pytest.raises(error, match=message):
        axiscap.install(llama, profile)
    assert hooks_and_attributes(llama) == before


def made_for(architecture: str) -> CapProfile:
    return CapProfile([0], unit(1, 1, 32), torch.zeros(1, 1), {"model": {"architecture": architecture}})


def test_a_profile_of_another_architecture_is_refused_unless_it_is_allowed(llama):
    other = made_for("Qwen2ForCausalLM")
    with pytest.raises(ValueError, match=r"made for Qwen2ForCausalLM, and .* another architecture \(llama\)"):
        axiscap.install(llama, {"mine": made_for("LlamaForCausalLM"), "other": other})
    with axiscap.install(llama, other, allow_other_model=True), torch.no_grad():
        llama(tokens(1, 5))
    with pytest.raises(ValueError, match="hidden size"):  # which nothing allows
        axiscap.install(llama, CapProfile([0], unit(1, 1, 16), torch.zeros(1, 1)), allow_other_model=True)


@pytest.mark.parametrize(
    ("make", "architectures"),
    [
        (lambda: build("Llama"), ["LlamaForCausalLM", "LlamaModel", "LlamaForSequenceClassification"]),
        (peft_wrapped, ["LlamaForCausalLM"]),
        (lambda: torch.compile(build("Llama")), ["LlamaForCausalLM"]),
        (gemma3_multimodal, ["Gemma3ForCausalLM", "Gemma3ForConditionalGeneration"]),
        (llava, ["LlamaForCausalLM", "LlavaForConditionalGeneration"]),
    ],
    ids=["plain", "PEFT", "compiled", "Gemma3 multimodal", "Llava"],
)
def test_a_wrapper_of_a_language_model_takes_the_language_models_profiles(make, architectures):
    model = make()
    for architecture in architectures:
        axiscap.install(model, made_for(architecture)).remove()
    with pytest.raises(ValueError, match="another architecture"):
        axiscap.install(model, made_for("FalconH1ForCausalLM"))


def test_changing_the_profile_later_changes_nothing(llama):
    profile = profile_for(llama, LAYERS, FLOOR)
    with axiscap.install(llama, profile), torch.no_grad():
        before = llama(tokens(1, 5)).logits
        profile.floors.fill_(50.0)
        profile.axes.neg_()
        assert_same_bits(llama(tokens(1, 5)).logits, before)


def test_floors_that_are_set_are_those_of_one_profile(llama):
    """By the fast way, the slow one and the one with gradients, from the next pass on."""
    profile = profile_for(llama, LAYERS, FLOOR)
    ids, higher = tokens(1, 5), profile.with_floors(profile.floors + torch.tensor([[0.5], [1.0]]))
    with axiscap.install(llama, higher), torch.no_grad():
        expected = llama(ids).logits
    with axiscap.install(llama, {"first": profile, "second": profile}) as cap:
        with torch.no_grad():
            before = llama(ids).logits
        cap.set_floors(higher.floors, "second")
        for gradients in (False, True):
            with torch.set_grad_enabled(gradients):
                cap.select("first")
                torch.testing.assert_close(llama(ids).logits, before)
                cap.select("second")
                torch.testing.assert_close(llama(ids).logits, expected)
        cap.set_floors(higher.floors)
        cap.select("first")
        torch.testing.assert_close(llama(ids).logits, expected)


@pytest.mark.parametrize("has_targets", [True, False])
def test_a_target_stays_as_far_above_a_floor_that_is_set(llama, has_targets):
    """Also in the bank of a profile without targets, whose floors are its targets."""
    plain = profile_for(llama, LAYERS, FLOOR)
    beside = plain.with_floors(plain.floors, plain.floors + 2)
    moved = beside if has_targets else plain
    floors = plain.floors + torch.tensor([[0.5], [1.0]])
    with axiscap.install(llama, moved.with_floors(floors)) as cap, torch.no_grad():
        expected, stats = llama(tokens(1, 5)).logits, cap.stats()["default"]
    with axiscap.install(llama, {"moved": moved, "beside": beside}) as cap, torch.no_grad():
        cap.set_floors(floors, "moved")
        for _ in range(2):  # the first pass looks for sinks, the second takes the layers' fast way
            torch.testing.assert_close(llama(tokens(1, 5)).logits, expected)
        result = cap.stats()["moved"]
    for layer in LAYERS:
        gap = 2.0 if has_targets else 0.0
        assert result[layer].mean_added[0] == pytest.approx(result[layer].mean_shortfall[0] + gap)
        assert result[layer].mean_added == pytest.approx(stats[layer].mean_added, rel=1e-4)


@pytest.mark.parametrize("strength", [1.0, 0.25])
def test_stats_say_what_was_added_to_rows_below_their_floors(llama, strength):
    """What a row's projection rose by, measured behind the cap: the way to its target, times the strength."""
    plain = profile_for(llama, [2], 0.0)
    profile = plain.with_floors(plain.floors, plain.floors + 0.7).with_strength(strength)
    streams = []
    with axiscap.install(llama, profile) as cap, torch.no_grad():
        llama.model.layers[2].register_forward_hook(lambda m, a, output: streams.append(output.clone()))
        llama(tokens(2, 9))
        before, stats = cap.projections()[2], cap.stats()["default"][2]
    below = before < profile.floors[0]
    rise = (streams[0] @ profile.axes[0].T - before)[below]
    assert 0 < stats.fired == int(below.sum()) < below.numel()
    assert stats.mean_added[0] == pytest.approx(rise.mean().item(), rel=1e-4)
    assert stats.mean_added[0] == pytest.approx((stats.mean_shortfall[0] + 0.7) * strength)


def test_stats_say_what_was_seen(llama):
    profile = profile_for(llama, [2], FLOOR, directions=2)
    with axiscap.install(llama, profile) as cap, torch.no_grad():
        empty = cap.stats()["default"][2]
        assert (empty.rows, empty.fired, empty.nonfinite) == (0, 0, 0)
        figures = (empty.mean, empty.min, empty.max, empty.mean_shortfall, empty.mean_added)
        assert all(math.isnan(value) for values in figures for value in values)
        parts = []
        for seed in range(3):
            llama(tokens(2, 5, seed=seed))
            parts.append(cap.projections()[2].reshape(-1, 2))
        seen = torch.cat(parts).double()
        stats = cap.stats()["default"][2]
        assert stats.rows == 30
        assert stats.fired == int((seen < FLOOR).any(-1).sum())
        assert stats.min == tuple(seen.min(0).values.tolist())
        assert stats.max == tuple(seen.max(0).values.tolist())
        assert stats.mean == pytest.approx(tuple(seen.mean(0).tolist()), rel=1e-14)
        floor = profile.floors[0, 0].item()
        short = tuple((floor - seen[seen[:, k] < floor, k]).mean().item() for k in range(2))
        assert stats.mean_shortfall == pytest.approx(short, rel=1e-12)
        assert stats.mean_added == stats.mean_shortfall
        cap.reset_stats()
        assert cap.stats()["default"][2].rows == 0
    assert cap.stats()["default"][2].rows == 0


def test_rows_that_are_not_finite_are_counted(llama):
    profile = profile_for(llama, LAYERS, FLOOR)

    def spoil(module, args, output):
        output[0, 2, 0] = math.inf

    llama.model.layers[1].register_forward_hook(spoil)
    with axiscap.install(llama, profile) as cap, torch.no_grad():
        llama(tokens(2, 5))
        stats = cap.stats()["default"]
    assert (stats[1].rows, stats[1].nonfinite) == (10, 1)
    assert math.isfinite(stats[1].mean[0])


def test_layers_that_return_no_rows_are_refused(llama):
    llama.model.layers[1].register_forward_hook(lambda m, a, output: {"hidden": output})
    with axiscap.install(llama, profile_for(llama, LAYERS, 0.0)), pytest.raises(TypeError, match="layer 1 returned no"):
        llama(tokens(1, 4))
