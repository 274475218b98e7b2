"""Whose the rows of a generate() call are: of ended answers, of second passes, behind a cache, and under PEFT."""

from __future__ import annotations

import copy
import inspect
import math

import peft
import pytest
import torch
import transformers
from conftest import profile_for
from tiny_models import FLOOR, GREEDY, LAYERS, SMALL, build, plain_cap, rows, tokens
from torch import nn

import axiscap
from axiscap.drift import Recorder


@pytest.fixture
def llama() -> nn.Module:
    return build("Llama")


# Rows behind the end of an answer belong to nobody.

STOP, PAD = 2, 0
ENDED = {
    "dynamic": {},
    "static": {"cache_implementation": "static", "disable_compile": True},
    "none": {"use_cache": False},
    "sampling": {"do_sample": True},
    "several answers": {"do_sample": True, "num_return_sequences": 2},
    "padding is the stop": {"pad_token_id": STOP},
    "two stops": {"eos_token_id": [1, STOP]},
    "a stopping criterion": {"criterion": True},
}


def force_ends(ends):
    """A logits processor that ends the answer of each sequence at a position of its own."""

    def process(ids, scores):
        scores[:, [1, STOP, PAD]] = -math.inf
        for row in range(len(scores)):
            scores[row, STOP] = 1e6 if ids.shape[1] == ends[row % len(ends)] else -math.inf
        return scores

    return process


@pytest.mark.parametrize("positions", ["all", "generated"])
@pytest.mark.parametrize("name", list(ENDED))
def test_rows_behind_the_end_of_an_answer_are_neither_capped_nor_measured(name, positions, llama):
    options, ids, mask = dict(ENDED[name]), tokens(2, 5), torch.ones(2, 5, dtype=torch.long)
    mask[1, :2] = 0
    ends = [7, 12]
    processors = [force_ends(ends)]
    if options.pop("criterion", False):
        processors = [lambda ids, scores: scores.index_fill(1, torch.tensor([1, STOP, PAD]), -math.inf)]
        options["stopping_criteria"] = [lambda ids, scores: ids.shape[1] > torch.tensor(ends)]
    profile = profile_for(llama, LAYERS, 1e3)
    with axiscap.install(llama, profile, positions=positions) as cap, Recorder(cap) as seen:
        torch.manual_seed(3)
        written = llama.generate(
            ids, attention_mask=mask, max_new_tokens=12, logits_processor=processors, **{"do_sample": False} | options
        )
        stats = cap.stats()["default"][LAYERS[0]]
    several = options.get("num_return_sequences", 1)
    ends = [ends[row % 2] for row in range(2 * several)]
    own = [min(end + 1, written.shape[1] - 1) for end in ends]  # the last token is not read
    prompts = [5, 3]
    if positions == "generated":
        counts = [length - 5 for length in own]
    else:
        counts = [length - 5 + prompts[row // several] for row, length in enumerate(own)]
    if name == "none":  # each step reads its sequence again
        steps = range(5, written.shape[1])
        reads = [[min(step, length) for step in steps] for length in own]
        before = 5 if positions == "generated" else 0
        hidden = 0 if positions == "generated" else 2
        counts = [
            sum(read - before - (hidden if row // several else 0) for read in part) for row, part in enumerate(reads)
        ]
    assert stats.rows == stats.fired == sum(counts)
    if name != "none" and positions == "all":
        assert [part.shape[1] for part in seen.projections()] == counts


def test_beams_that_meet_a_stop_go_on_without_it(llama):
    """Of every beam that runs, all rows count."""
    profile, ids = profile_for(llama, LAYERS, FLOOR), tokens(2, 5)
    options = {"num_beams": 3, "max_new_tokens": 12, "do_sample": False, "eos_token_id": list(range(3, 30))}
    with plain_cap(llama, profile):
        expected = llama.generate(ids, **options)
    passes = []
    with axiscap.install(llama, profile) as cap:
        llama.model.register_forward_pre_hook(
            lambda module, args, kwargs: passes.append(kwargs["input_ids"].numel()), with_kwargs=True
        )
        assert torch.equal(llama.generate(ids, **options), expected)
        assert rows(cap) == sum(passes)


# Passes that generate() runs beside its own.


@pytest.mark.parametrize("positions", ["all", "generated"])
@pytest.mark.parametrize("way", ["one token", "no cache", "a negative prompt"])
def test_the_second_pass_of_guidance_has_written_rows_too(way, positions, llama):
    ids = tokens(1, 7)
    options = {
        "one token": {},
        "no cache": {"use_cache": False},
        "a negative prompt": {"negative_prompt_ids": ids[:, :3]},
    }
    options = options[way] | GREEDY | {"guidance_scale": 1.5, "max_new_tokens": 6, "min_new_tokens": 6}
    profile, second = profile_for(llama, LAYERS, 0.8), 3 if way == "a negative prompt" else 1
    with plain_cap(llama, profile, torch.zeros_like(ids) if positions == "generated" else None):
        expected = llama.generate(ids, **options)
    with axiscap.install(llama, profile, positions=positions) as cap:
        result = llama.generate(ids, **options)
    written = sum(range(6)) if way == "no cache" else 5
    prompts = (7 + second) * (6 if way == "no cache" else 1)
    assert rows(cap) == 2 * written + (prompts if positions == "all" else 0)
    if positions == "all":
        assert torch.equal(result, expected)


@pytest.mark.parametrize("given", ["all ids", "new ids alone"])
@pytest.mark.parametrize("positions", ["all", "generated"])
def test_generate_goes_on_from_a_cache(positions, given, llama):
    """Two turns: the second one's prompt lies behind what is in the cache."""
    profile, ids, new = profile_for(llama, LAYERS, FLOOR), tokens(1, 6), tokens(1, 4, seed=1)
    cache = transformers.DynamicCache(config=llama.config)
    options = {"do_sample": False, "eos_token_id": -1}
    name = "cache" if "cache" in inspect.signature(llama.model.forward).parameters else "past_key_values"
    options[name] = cache
    whole = torch.cat([llama.generate(ids, max_new_tokens=5, min_new_tokens=5, **options), new], 1)
    inputs = whole if given == "all ids" else whole[:, cache.get_seq_length() :]
    known = cache.get_seq_length()
    with axiscap.install(llama, profile, positions=positions) as cap:
        llama.generate(inputs, attention_mask=torch.ones_like(whole), max_new_tokens=4, **options)
        assert rows(cap) == 3 + (whole.shape[1] - known if positions == "all" else 0)


@pytest.mark.parametrize(("positions", "count"), [("all", 2 * (5 + 5)), ("generated", 2 * 5)])
def test_a_speech_model_goes_on_with_its_codes_alone(positions, count):
    """Its depth decoder runs inside each step, and has layers of its own."""
    torch.manual_seed(0)
    sizes = SMALL | {"vocab_size": 20, "num_codebooks": 4}
    depth = transformers.CsmDepthDecoderConfig(**sizes, backbone_hidden_size=32)
    config = transformers.CsmConfig(
        **sizes, text_vocab_size=97, depth_decoder_config=depth, codebook_pad_token_id=19, codebook_eos_token_id=18
    )
    model, ids = transformers.CsmForConditionalGeneration(config).eval(), tokens(2, 5)
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    profile = profile_for(build("Llama"), LAYERS, 1e3)
    with axiscap.install(model, profile, positions=positions, layers="backbone_model.layers") as cap:
        model.generate(ids, **options)
        assert rows(cap) == count


# PEFT, with the installation on the model inside and on the one around it, before and after.


@pytest.mark.parametrize("installed_on", ["base, before", "base, after", "adapted"])
@pytest.mark.parametrize("kind", ["prompt", "prefix", "p-tuning", "multitask prompt", "lora"])
def test_every_order_of_peft_caps_the_same_rows(kind, installed_on, llama):
    configs = {
        "prompt": peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        "prefix": peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        "p-tuning": peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=16),
        "multitask prompt": peft.MultitaskPromptTuningConfig(
            task_type="CAUSAL_LM", num_virtual_tokens=3, num_tasks=2, num_ranks=1
        ),
        "lora": peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], r=2),
    }
    profile, mask = profile_for(llama, LAYERS, FLOOR), torch.ones(2, 9, dtype=torch.long)
    mask[0, :3] = 0
    options = {"input_ids": tokens(2, 9), "attention_mask": mask, **GREEDY}
    if kind == "multitask prompt":
        options["task_ids"] = torch.tensor([0, 1])
    for positions in ("generated", "all"):
        base = copy.deepcopy(llama)
        torch.manual_seed(1)
        cap = axiscap.install(base, profile, positions=positions) if installed_on == "base, before" else None
        model = peft.get_peft_model(base, configs[kind]).eval()
        cap = cap or axiscap.install(model if installed_on == "adapted" else base, profile, positions=positions)
        for _ in range(2):
            cap.reset_stats()
            fed = []
            handle = base.model.layers[0].register_forward_hook(
                lambda m, a, output, fed=fed: fed.append(output.shape[:2].numel())
            )
            written = model.generate(**options)
            handle.remove()
            assert rows(cap) == (2 * 11 if positions == "generated" else sum(fed) - 3)
        cap.remove()
        with plain_cap(base, profile, None):
            assert written.shape == model.generate(**options).shape


def test_a_selection_has_one_name_for_each_sequence(llama):
    """generate() may run several rows for a sequence; a pass of the caller's has as many rows as sequences."""
    profile = profile_for(llama, LAYERS, FLOOR)
    with axiscap.install(llama, {"low": profile, "high": profile}) as cap, torch.no_grad():
        cap.select(["low", "high"])
        for call in (lambda: llama(tokens(4, 5)), lambda: llama.generate(tokens(4, 5), **GREEDY)):
            with pytest.raises(ValueError, match="profiles are selected for 2 sequences, but the batch has 4"):
                call()
        cap.reset_stats()
        llama.generate(tokens(2, 5), **GREEDY | {"do_sample": True}, num_return_sequences=2)
        assert rows(cap, "low") == rows(cap, "high") == 2 * (5 + 11)
