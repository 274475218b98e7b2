"""Installation into transformers models: architectures by their structure, what is refused, and removal."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import NamedTuple

import peft
import pytest
import torch
import transformers
from conftest import assert_same_bits, profile_for, unit
from tiny_models import (
    ARCHITECTURES,
    FLOOR,
    GREEDY,
    LAYERS,
    SMALL,
    build,
    check_caps_and_leaves_no_trace,
    gemma3_multimodal,
    hooks_and_attributes,
    llava,
    tokens,
)
from torch import nn

import axiscap
from axiscap import CapProfile, models


@pytest.fixture
def llama() -> nn.Module:
    return build("Llama")


def peft_wrapped() -> nn.Module:
    lora = peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2, init_lora_weights=False)
    return peft.get_peft_model(build("Llama"), lora).eval()


WRAPPED = {"Gemma3 multimodal": gemma3_multimodal, "Llava": llava, "PEFT": peft_wrapped}


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


def test_installing_twice_is_refused(llama):
    profile = profile_for(llama, LAYERS, 0.0)
    handle = axiscap.install(llama, profile)
    for again in (llama, torch.compile(llama)):
        with pytest.raises(RuntimeError, match="has an AxisCap installation already; remove it first"):
            axiscap.install(again, profile)
        assert axiscap.installed(again) is handle
    handle.remove()
    handle.remove()
    assert axiscap.installed(llama) is None
    axiscap.install(llama, profile)  # the handle is lost
    gc.collect()
    axiscap.installed(llama).remove()
    axiscap.install(llama, profile).remove()


def test_an_installation_ends_with_its_model():
    model = build("Llama")
    cap = axiscap.install(model, profile_for(model, LAYERS, FLOOR))
    assert axiscap.installed(copy.deepcopy(model)) is None
    alive = weakref.ref(cap)
    del cap, model
    gc.collect()
    assert alive() is None


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


def test_any_layer_in_common_is_a_second_installation(llama):
    profile = profile_for(llama, LAYERS, FLOOR)
    with axiscap.install(llama, profile, layers=[*llama.model.layers[1:], llama.model.layers[0]]) as cap:
        for more in ({}, {"layers": "model.layers"}):
            with pytest.raises(RuntimeError, match="has an AxisCap installation already"):
                axiscap.install(llama, profile, **more)
        cap.remove()
        axiscap.install(llama, profile).remove()


def test_float64_is_refused_when_it_is_installed(llama):
    with pytest.raises(ValueError, match="the model is float64; float32, bfloat16 and float16 can be capped"):
        axiscap.install(llama.double(), profile_for(llama, LAYERS, FLOOR))


def test_layers_that_do_not_stand_beside_the_embedding():
    sizes = {"vocab_size": 97, "hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 4}
    model = transformers.CpmAntForCausalLM(transformers.CpmAntConfig(**sizes, dim_head=8, dim_ff=48)).eval()
    assert models.decoder_layers(model) == list(model.cpmant.encoder.layers)
    with axiscap.install(model, profile_for(model, LAYERS, FLOOR)) as cap, torch.no_grad():
        model(tokens(1, 6))
        assert cap.projections()[LAYERS[0]].shape[1] >= 6
    # Two stacks, which run in cycles.
    model = transformers.HrmTextForCausalLM(transformers.HrmTextConfig(**sizes, intermediate_size=48))
    with pytest.raises(ValueError, match=r"its module lists: model\.L_module\.layers \(4\), model\.H_module\.layers"):
        models.decoder_layers(model)


def test_several_streams_are_refused_when_it_is_installed():
    config = transformers.Gemma3nTextConfig(
        **SMALL | {"head_dim": 8, "num_kv_shared_layers": 0},
        hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=97,
        laurel_rank=4,
        altup_num_inputs=2,
        layer_types=["full_attention"] * 4,
        activation_sparsity_pattern=[0.0] * 4,
    )
    model = transformers.Gemma3nForCausalLM(config)
    with pytest.raises(ValueError, match=r"pass on 2 residual streams \(altup_num_inputs\)"):
        axiscap.install(model, profile_for(model, LAYERS, FLOOR))


def test_streams_of_four_dimensions_are_refused(llama):
    llama.model.layers[LAYERS[0]].register_forward_hook(lambda m, a, output: output[None])
    with (
        axiscap.install(llama, profile_for(llama, LAYERS, FLOOR)),
        pytest.raises(TypeError, match=r"layer 1 returned hidden states of shape \(1, 1, 4, 32\)"),
    ):
        llama(tokens(1, 4))


PUBLIC_CALLS = {
    "forward": lambda model, cap: model(tokens(2, 5)),
    "with hidden states": lambda model, cap: model(tokens(2, 5), output_hidden_states=True),
    "generate": lambda model, cap: model.generate(tokens(2, 5), **GREEDY),
    "beams": lambda model, cap: model.generate(tokens(2, 5), **GREEDY, num_beams=2),
    "continuous batching": lambda model, cap: model.generate_batch(
        tokens(2, 5).tolist(), transformers.GenerationConfig(max_new_tokens=3, eos_token_id=-1, pad_token_id=0),
        transformers.ContinuousBatchingConfig(num_blocks=32, max_batch_tokens=64, allow_block_sharing=False),
        warmup=False,
    ),
    "watch": lambda model, cap: cap.watch(lambda projections: None),
    "watch, ended": lambda model, cap: cap.watch(lambda projections: None)(),
    "select": lambda model, cap: cap.select(["default", None]),
    "set_floors": lambda model, cap: cap.set_floors(torch.zeros(len(LAYERS), 1)),
    "stats": lambda model, cap: (cap.stats(), cap.reset_stats()),
    "projections": lambda model, cap: (cap.projections(), cap.real()),
    "copy": lambda model, cap: copy.deepcopy(model),
    "backward": lambda model, cap: model(tokens(2, 5)).logits.sum().backward(),
}  # fmt: skip


@pytest.mark.parametrize("name", list(PUBLIC_CALLS))
def test_no_public_call_leaves_anything_behind(name, llama):
    """Hooks in their order, attributes and methods; also behind the hooks of somebody else, before and after."""
    llama(tokens(1, 3), output_hidden_states=True)  # transformers puts its recorders there for good
    layer = llama.model.layers[LAYERS[0]]
    layer.register_forward_hook(lambda module, args, output: None)
    before = hooks_and_attributes(llama)
    plain = llama.generate(tokens(2, 5), **GREEDY)
    with axiscap.install(llama, profile_for(llama, LAYERS, FLOOR)) as cap:
        later = layer.register_forward_hook(lambda module, args, output: None)
        PUBLIC_CALLS[name](llama, cap)
    later.remove()
    assert hooks_and_attributes(llama) == before
    assert_same_bits(llama.generate(tokens(2, 5), **GREEDY), plain)


def test_a_watcher_ends_with_its_installation(llama):
    seen = []
    cap = axiscap.install(llama, profile_for(llama, LAYERS, FLOOR))
    end = cap.watch(lambda projections: seen.append(projections[LAYERS[0]].shape))
    with torch.no_grad():
        llama(tokens(1, 3))
        cap.remove()
        llama(tokens(1, 5))
    assert seen == [(1, 3, 1)]
    end()


class Output(NamedTuple):
    hidden: torch.Tensor
    weights: str


@pytest.mark.parametrize("kind", [Output, lambda hidden, weights: (hidden, weights), lambda *parts: list(parts)])
@pytest.mark.parametrize("grad", [True, False])
def test_a_layer_may_return_its_hidden_states_in_a_tuple(grad, kind):
    model = Homemade()
    profile = CapProfile([1, 3], unit(2, 1, 32), torch.full((2, 1), 5.0))
    for step in model.trunk.steps:
        forward = step.forward
        step.forward = lambda hidden, forward=forward: kind(forward(hidden), "weights")
    seen = []
    with axiscap.install(model, profile, layers="trunk.steps"), torch.set_grad_enabled(grad):
        model.trunk.steps[3].register_forward_hook(lambda module, args, output: seen.append(output))
        hidden = model.embed(tokens(2, 5))
        for step in model.trunk.steps:
            hidden = step(hidden)[0]
    assert type(seen[0]) is type(kind(hidden, "weights"))
    assert seen[0][1] == "weights"
    torch.testing.assert_close(seen[0][0].double() @ profile.axes[1, 0].double(), torch.full((2, 5), 5.0).double())


def test_layers_that_return_no_rows_are_refused(llama):
    llama.model.layers[1].register_forward_hook(lambda m, a, output: {"hidden": output})
    with axiscap.install(llama, profile_for(llama, LAYERS, 0.0)), pytest.raises(TypeError, match="layer 1 returned no"):
        llama(tokens(1, 4))
