"""Every way that people run a model: an installation survives it, with the right rows capped, or says why not."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import gc
import io
import os
import pickle
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import peft
import pytest
import torch
import transformers
from conftest import assert_same_bits, profile_for
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule
from test_install import FLOOR, GREEDY, LAYERS, SMALL, build, gemma3_multimodal, plain_cap, tokens
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard

import axiscap
from axiscap import models


@pytest.fixture
def llama() -> nn.Module:
    return build("Llama")


def rows(cap, name="default") -> int:
    return cap.stats()[name][LAYERS[0]].rows


# generate()


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


def test_what_stands_before_generate_stays_there(llama):
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


BATCHED = [tokens(1, n, seed=n)[0].tolist() for n in (5, 9, 7)]


def batched(llama, **more):
    """Three prompts of 5, 9 and 7 tokens, 6 new ones each, in transformers' own thread."""
    config = transformers.GenerationConfig(do_sample=False, max_new_tokens=6, eos_token_id=-1, pad_token_id=0)
    small = transformers.ContinuousBatchingConfig(
        num_blocks=32, max_batch_tokens=64, **{"allow_block_sharing": False} | more
    )
    result = llama.generate_batch(BATCHED, config, small, warmup=False)
    return [result[key].generated_tokens for key in sorted(result)]


def test_continuous_batching(llama):
    profile = profile_for(llama, LAYERS, FLOOR)
    with plain_cap(llama, profile):
        expected = batched(llama)
    assert [len(answer) for answer in expected] == [6, 6, 6]
    with axiscap.install(llama, profile) as cap:
        assert batched(llama) == expected
        assert rows(cap) == 5 + 9 + 7 + 3 * 5
        with pytest.raises(ValueError, match="allow_block_sharing=False"):
            batched(llama, allow_block_sharing=True)
    with axiscap.install(llama, profile, positions="generated") as cap:
        batched(llama)
        assert rows(cap) == 3 * 5


def test_each_request_of_a_batch_has_its_own_profile(llama):
    """Also those that another thread adds, to a manager that runs."""
    names = {"low": profile_for(llama, LAYERS, FLOOR), "high": profile_for(llama, LAYERS, 2.0)}
    with axiscap.install(llama, names) as cap:
        cap.select(["low", "high", None])
        batched(llama)
        assert (rows(cap, "low"), rows(cap, "high")) == (5 + 5, 9 + 5)
        cap.select(["low", "high"])
        with pytest.raises(ValueError, match="selected for 2 sequences, but there are 3"):
            batched(llama)
        cap.reset_stats()
        serve_from_threads(llama, cap)
        assert (rows(cap, "low"), rows(cap, "high")) == (5 + 5, 9 + 5)
        gc.collect()
        assert not cap._hooks.batchings, "a manager, and its memory, is kept"


def serve_from_threads(llama, cap) -> None:
    config = transformers.GenerationConfig(do_sample=False, max_new_tokens=6, eos_token_id=-1, pad_token_id=0)
    small = transformers.ContinuousBatchingConfig(num_blocks=32, max_batch_tokens=64, allow_block_sharing=False)
    with llama.continuous_batching_context_manager(
        generation_config=config, continuous_batching_config=small, warmup=False
    ) as manager:

        def ask(name, prompt):
            cap.select(name)
            request = manager.add_request(BATCHED[prompt])
            while (result := manager.get_result(request_id=request, timeout=5)) is None or not result.is_finished():
                pass

        in_threads(lambda: ask("low", 0), lambda: ask("high", 1), lambda: ask(None, 2))
        with pytest.raises(ValueError, match="a request is one sequence"):
            manager.add_request(BATCHED[0])


# Threads and tasks


def in_threads(*calls):
    """Runs calls at once, each starting when all have; returns what they gave."""
    barrier = threading.Barrier(len(calls))

    def run(call):
        barrier.wait()
        return call()

    with ThreadPoolExecutor(len(calls)) as pool:
        return [done.result() for done in [pool.submit(run, call) for call in calls]]


def test_threads_choose_for_themselves(llama):
    names = {"low": profile_for(llama, LAYERS, FLOOR), "high": profile_for(llama, LAYERS, 2.0)}
    ids = tokens(2, 8)
    expected = {}
    for name, profile in names.items():
        with plain_cap(llama, profile), torch.no_grad():
            expected[name] = llama(ids).logits
    with torch.no_grad():
        expected[None] = llama(ids).logits
    with axiscap.install(llama, names) as cap:

        def ask(name):
            cap.select(name)
            with torch.no_grad():
                return [llama(ids).logits for _ in range(40)]

        chosen = ("low", "high", None)
        for name, result in zip(chosen, in_threads(*(lambda n=n: ask(n) for n in chosen)), strict=True):
            for logits in result:
                torch.testing.assert_close(logits, expected[name], atol=2e-5, rtol=2e-5)
        assert rows(cap, "low") == rows(cap, "high") == 40 * ids.numel()
        # This thread has chosen nothing, and several others have.
        with pytest.raises(RuntimeError, match="several threads or tasks chose profiles"):
            llama(ids)
        cap.select("high")
        with torch.no_grad():
            torch.testing.assert_close(llama(ids).logits, expected["high"], atol=2e-5, rtol=2e-5)


def test_a_thread_without_a_choice_has_the_only_one(llama):
    """As where generate() runs in a thread of its own, and its caller chose."""
    names = {"low": profile_for(llama, LAYERS, FLOOR), "high": profile_for(llama, LAYERS, 2.0)}
    with axiscap.install(llama, names) as cap, torch.no_grad():
        cap.select("high")
        (_,) = in_threads(lambda: llama(tokens(1, 4)))
        assert (rows(cap, "low"), rows(cap, "high")) == (0, 4)
        # What a thread has not run itself, it sees of the others.
        assert cap.projections()[LAYERS[0]].shape == (1, 4, 1)


def test_threads_have_masks_and_batches_of_their_own(llama):
    profile = profile_for(llama, LAYERS, FLOOR)
    masks = [torch.ones(2, 6, dtype=torch.long), torch.ones(3, 9, dtype=torch.long), None]
    masks[0][1, :3] = 0
    masks[1][2, :5] = 0
    shapes = [(2, 6), (3, 9), (4, 5)]
    expected = []
    for mask, shape in zip(masks, shapes, strict=True):
        with plain_cap(llama, profile, mask), torch.no_grad():
            expected.append(llama(tokens(*shape), attention_mask=mask).logits)

    def ask(mask, shape):
        with torch.no_grad():
            return [llama(tokens(*shape), attention_mask=mask).logits for _ in range(30)]

    with axiscap.install(llama, profile) as cap:
        calls = [lambda m=m, s=s: ask(m, s) for m, s in zip(masks, shapes, strict=True)]
        for result, right in zip(in_threads(*calls), expected, strict=True):
            for logits in result:
                torch.testing.assert_close(logits, right, atol=2e-5, rtol=2e-5)
        assert rows(cap) == 30 * (9 + 22 + 20)


@pytest.fixture
def often_switched():
    """Threads take turns a thousand times as often as they do."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


def test_generating_threads_do_not_mix(llama, often_switched):
    """Each pass is announced as a whole, however often the interpreter goes from thread to thread."""
    names = {"low": profile_for(llama, LAYERS, FLOOR), "high": profile_for(llama, LAYERS, 20.0)}
    ids = tokens(2, 8)

    def last_scores():
        return llama.generate(ids, **GREEDY, output_scores=True, return_dict_in_generate=True).scores[-1][:, 3:]

    with axiscap.install(llama, names, positions="generated") as cap:
        expected = {}
        for name in names:
            cap.select(name)
            expected[name] = last_scores()
        assert not torch.allclose(expected["low"], expected["high"], atol=1e-3)

        def ask(name):
            cap.select(name)
            return [last_scores() for _ in range(200)]

        for name, result in zip(names, in_threads(*(lambda n=n: ask(n) for n in names)), strict=True):
            for scores in result:
                torch.testing.assert_close(scores, expected[name], atol=2e-5, rtol=2e-5)


def test_tasks_choose_for_themselves(llama):
    names = {"low": profile_for(llama, LAYERS, FLOOR), "high": profile_for(llama, LAYERS, 2.0)}
    with axiscap.install(llama, names) as cap, torch.no_grad():

        async def ask(name, other):
            cap.select(name)
            other.set_result(None)
            await asyncio.gather(*waiting.values())  # until both have chosen
            llama(tokens(1, 4))  # in the event loop's thread
            await asyncio.to_thread(llama, tokens(1, 3))  # in another, with this task's context

        async def both():
            for name in names:
                waiting[name] = asyncio.get_running_loop().create_future()
            await asyncio.gather(*(ask(name, waiting[name]) for name in names))

        waiting = {}
        asyncio.run(both())
        assert rows(cap, "low") == rows(cap, "high") == 7


@pytest.mark.slow
def test_threads_choose_for_themselves_in_compiled_code(llama):
    names = {"low": profile_for(llama, LAYERS, FLOOR), "high": profile_for(llama, LAYERS, 2.0)}
    ids = tokens(2, 8)
    with axiscap.install(llama, names) as cap, torch.no_grad():
        expected = {}
        for name in names:
            cap.select(name)
            expected[name] = llama(ids).logits
        compiled = torch.compile(llama, backend="eager")

        def ask(name):
            cap.select(name)
            return [compiled(ids).logits for _ in range(5)]

        for name in ("low", "high", "low"):  # compiled in one thread, run in another
            (result,) = in_threads(lambda name=name: ask(name))
            for logits in result:
                torch.testing.assert_close(logits, expected[name], atol=2e-5, rtol=2e-5)


@pytest.mark.slow
def test_tasks_choose_for_themselves_in_compiled_code(llama):
    names = {"low": profile_for(llama, LAYERS, FLOOR), "high": profile_for(llama, LAYERS, 2.0)}
    ids = tokens(2, 8)
    with axiscap.install(llama, names) as cap, torch.no_grad():
        expected = {}

        async def alone(name):
            cap.select(name)
            expected[name] = llama(ids).logits

        for name in names:
            asyncio.run(alone(name))
        assert not torch.allclose(expected["low"], expected["high"], atol=1e-3)
        compiled = torch.compile(llama, backend="eager")
        cap.select("low")
        compiled(ids)

        async def ask(name):
            cap.select(name)
            for _ in range(3):
                await asyncio.sleep(0.01)  # the other one chooses, or runs
                torch.testing.assert_close(compiled(ids).logits, expected[name], atol=2e-5, rtol=2e-5)

        async def both():
            await asyncio.gather(*(ask(name) for name in names))

        asyncio.run(both())


# Traces: nothing of them outlives them.


def still_right(model, cap, expected) -> None:
    before = rows(cap)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens(2, 5)).logits, expected, atol=2e-5, rtol=2e-5)
    assert rows(cap) == before + 10
    assert cap.projections()[LAYERS[0]].shape == (2, 5, 1)


@pytest.mark.slow
@pytest.mark.parametrize("strict", [False, True])
def test_an_export_leaves_nothing_behind(strict, llama):
    profile = profile_for(llama, LAYERS, FLOOR)

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = llama

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.model(ids, use_cache=False).logits

    with plain_cap(llama, profile), torch.no_grad():
        expected = llama(tokens(2, 5)).logits
    with axiscap.install(llama, profile) as cap, torch.no_grad():
        still_right(llama, cap, expected)
        program = torch.export.export(Logits().eval(), (tokens(2, 5),), strict=strict)
        torch.testing.assert_close(program.module()(tokens(2, 5)), expected, atol=2e-5, rtol=2e-5)
        still_right(llama, cap, expected)


def test_fake_and_meta_passes_leave_nothing_behind(llama):
    profile = profile_for(llama, LAYERS, FLOOR)
    with plain_cap(llama, profile), torch.no_grad():
        expected = llama(tokens(2, 5)).logits
    with axiscap.install(llama, profile) as cap, torch.no_grad():
        still_right(llama, cap, expected)
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        with mode:
            assert llama(mode.from_tensor(tokens(2, 7))).logits.shape == (2, 7, 97)
        still_right(llama, cap, expected)
    shell = build("Llama").to("meta")
    with axiscap.install(shell, profile) as cap, torch.no_grad():
        assert shell(tokens(2, 7).to("meta")).logits.shape == (2, 7, 97)
        shell.to_empty(device="cpu")
        shell.load_state_dict(llama.state_dict())
        shell.model.rotary_emb.load_state_dict(llama.model.rotary_emb.state_dict())
        shell.model.rotary_emb.inv_freq.copy_(llama.model.rotary_emb.inv_freq)
        still_right(shell, cap, expected)


def test_a_trace_by_jit_is_refused(llama):
    llama.requires_grad_(False)
    with axiscap.install(llama, profile_for(llama, LAYERS, FLOOR)), torch.no_grad():
        for _ in range(2):  # the first pass looks for sinks, the later ones take the layers' fast way
            with pytest.raises(RuntimeError, match=r"use torch\.compile or torch\.export"):
                torch.jit.trace(lambda ids: llama(ids, use_cache=False).logits, tokens(1, 4))
            llama(tokens(1, 4))


# Copies: plainly uncapped, and alive on their own.


def through_pickle(model):
    return pickle.loads(pickle.dumps(model))


def through_torch(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, through_pickle, through_torch])
def test_a_copy_is_not_capped(copied, llama):
    profile, ids = profile_for(llama, LAYERS, FLOOR), tokens(2, 6)
    plain = llama.generate(ids, **GREEDY)
    with axiscap.install(llama, profile) as cap:
        capped = llama.generate(ids, **GREEDY)
        again = copied(llama)
        assert not torch.equal(capped, plain)
        seen = rows(cap)
        with torch.no_grad():
            again.model.embed_tokens.weight.mul_(1)  # its own
        assert torch.equal(again.generate(ids, **GREEDY), plain)
        assert rows(cap) == seen
        with axiscap.install(again, profile) as own:
            assert torch.equal(again.generate(ids, **GREEDY), capped)
            assert rows(own) == seen
        assert torch.equal(llama.generate(ids, **GREEDY), capped)


# Wrappers, and what models may be like


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


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("grad", [True, False])
def test_hidden_states_are_what_went_on(before, grad, llama):
    """Also where transformers' recorder was there first."""
    profile = profile_for(llama, LAYERS, 3.0)
    with torch.set_grad_enabled(grad):
        if before:
            llama(tokens(1, 4), output_hidden_states=True)
        with axiscap.install(llama, profile):
            states = llama(tokens(1, 4), output_hidden_states=True).hidden_states
    for at, layer in enumerate(LAYERS):
        assert (states[layer + 1] @ profile.axes[at, 0]).min() > 2.999


def test_a_steering_hook_comes_before_the_cap(llama):
    """Whatever another hook did to a layer's output is lifted as well."""
    profile = profile_for(llama, LAYERS, 3.0)
    axis = profile.axes[0, 0]
    llama.model.layers[LAYERS[0]].register_forward_hook(lambda m, a, output: output - 50 * axis)
    with axiscap.install(llama, profile), torch.no_grad():
        states = llama(tokens(1, 4), output_hidden_states=True).hidden_states
    assert (states[LAYERS[0] + 1] @ axis).min() > 2.999


@pytest.fixture
def mesh():
    """Of one process."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield torch.distributed.init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("grad", [False, True])
def test_streams_that_are_distributed_tensors(grad, mesh, llama):
    """As where a model is sharded, or runs by a tensor-parallel plan."""
    profile, ids = profile_for(llama, LAYERS, FLOOR), tokens(2, 5)
    mask = torch.ones(2, 5, dtype=torch.long)
    mask[1, :2] = 0
    with plain_cap(llama, profile, mask), torch.no_grad():
        expected = llama(ids, attention_mask=mask).logits
    placement = Replicate()
    for layer in LAYERS:
        block = llama.model.layers[layer]
        block.register_forward_hook(lambda m, a, output: DTensor.from_local(output, mesh, [placement]))
    with axiscap.install(llama, profile) as cap, torch.set_grad_enabled(grad):
        for layer in LAYERS:
            block = llama.model.layers[layer]
            block.register_forward_hook(lambda m, a, output: output.to_local())
        result = llama(ids, attention_mask=mask).logits
        assert rows(cap) == 8
        torch.testing.assert_close(result, expected, atol=2e-5, rtol=2e-5)
        if grad:
            result.sum().backward()
            assert llama.model.layers[0].mlp.up_proj.weight.grad.abs().sum() > 0
        placement = Shard(0)
        with pytest.raises(ValueError, match=r"a DTensor with placements \(Shard\(dim=0\),\); it can be capped where"):
            llama(ids)


def sharded(rank: int, folder: str) -> None:
    """One of two processes that share a model, by its parameters (FSDP) or by its matrices (a tensor-parallel plan)."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(f"{folder}/store", 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    mesh = torch.distributed.init_device_mesh("cpu", (2,))
    whole, ids = build("Llama"), tokens(2, 9)
    profile = profile_for(whole, LAYERS, FLOOR)
    with plain_cap(whole, profile):
        expected = whole(ids).logits
        written = whole.generate(ids, **GREEDY)
        expected.sum().backward()
    gradient = whole.get_input_embeddings().weight.grad

    parameters = build("Llama")
    for layer in parameters.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(parameters, mesh=mesh)
    matrices = transformers.LlamaForCausalLM.from_pretrained(folder, tp_plan="auto", device_mesh=mesh).eval()
    for model in (parameters, matrices):
        local = model.model.layers[0].mlp.up_proj.weight
        assert (local.to_local() if isinstance(local, DTensor) else local).numel() == 48 * 32 / 2
        with axiscap.install(model, profile) as cap:
            result = model(ids).logits
            assert rows(cap) == 18
            torch.testing.assert_close(result, expected, atol=2e-5, rtol=2e-5)
            result.sum().backward()
            mine = model.get_input_embeddings().weight.grad
            mine = mine.full_tensor() if isinstance(mine, DTensor) else mine
            torch.testing.assert_close(mine, gradient, atol=1e-4, rtol=1e-4)
            assert torch.equal(model.generate(ids, **GREEDY), written)
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_models_that_two_processes_share(llama, tmp_path):
    llama.save_pretrained(tmp_path)
    torch.multiprocessing.spawn(sharded, (str(tmp_path),), 2)


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


def test_streams_of_four_dimensions_are_told_by_their_shape(llama):
    llama.model.layers[LAYERS[0]].register_forward_hook(lambda m, a, output: output[None])
    with (
        axiscap.install(llama, profile_for(llama, LAYERS, FLOOR)),
        pytest.raises(TypeError, match=r"layer 1 returned hidden states of shape \(1, 1, 4, 32\)"),
    ):
        llama(tokens(1, 4))


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


def test_the_model_is_as_it_was(llama):
    """Whatever was done with it in between."""
    names = [(name, sorted(part.__dict__)) for name, part in llama.named_modules()]
    plain = llama.generate(tokens(2, 5), **GREEDY)
    with axiscap.install(llama, profile_for(llama, LAYERS, FLOOR)):
        copy.deepcopy(llama)
        llama.generate(tokens(2, 5), **GREEDY)
    assert [(name, sorted(part.__dict__)) for name, part in llama.named_modules()] == names
    assert_same_bits(llama.generate(tokens(2, 5), **GREEDY), plain)


# Any sequence of these, on one model.


NAMED = {"low": 0.4, "high": 3.0}


class Actions(RuleBasedStateMachine):
    """A model with installations that come and go, beside a twin that the simplest hooks cap."""

    def __init__(self) -> None:
        super().__init__()
        self.model, self.twin = build("Llama"), build("Llama")
        self.profiles = {name: profile_for(self.model, LAYERS, floor) for name, floor in NAMED.items()}
        self.cap: axiscap.Installation | None = None
        self.chosen: str | None = None

    def teardown(self) -> None:
        if self.cap:
            self.cap.remove()

    @contextlib.contextmanager
    def twin_capped(self, mask=None):
        if self.cap is None or self.chosen is None:
            yield
        else:
            with plain_cap(self.twin, self.profiles[self.chosen], mask):
                yield

    @precondition(lambda self: self.cap is None)
    @rule()
    def install(self) -> None:
        self.cap, self.chosen = axiscap.install(self.model, self.profiles), "low"

    @precondition(lambda self: self.cap is not None)
    @rule()
    def remove(self) -> None:
        self.cap.remove()
        self.cap = None

    @precondition(lambda self: self.cap is not None)
    @rule(name=st.sampled_from([*NAMED, None]))
    def select(self, name) -> None:
        self.cap.select(name)
        self.chosen = name

    @rule(batch=st.integers(1, 3), length=st.integers(2, 9), padding=st.integers(0, 3), grad=st.booleans())
    def forward(self, batch, length, padding, grad) -> None:
        mask = torch.ones(batch, length, dtype=torch.long)
        mask[0, : min(padding, length - 1)] = 0
        with torch.set_grad_enabled(grad):
            result = self.model(tokens(batch, length), attention_mask=mask).logits
            with self.twin_capped(mask):
                expected = self.twin(tokens(batch, length), attention_mask=mask).logits
        torch.testing.assert_close(result, expected, atol=1e-4, rtol=1e-4)
        if self.cap is not None:
            assert self.cap.projections()[LAYERS[0]].shape == (batch, length, 1)

    @rule(way=st.sampled_from(["greedy", "beams", "static", "no cache", "lookup", "embeddings"]))
    def generate(self, way) -> None:
        ids = tokens(1, 4).repeat(1, 2)
        options = {
            "greedy": {"input_ids": ids},
            "beams": {"input_ids": ids, "num_beams": 2},
            "static": {"input_ids": ids, "cache_implementation": "static", "disable_compile": True},
            "no cache": {"input_ids": ids, "use_cache": False},
            "lookup": {"input_ids": ids, "prompt_lookup_num_tokens": 2},
            "embeddings": {},
        }[way]
        result = []
        for model in (self.model, self.twin):
            given = options or {"inputs_embeds": model.get_input_embeddings()(ids).detach()}
            with self.twin_capped() if model is self.twin else contextlib.nullcontext():
                made = model.generate(
                    **given, do_sample=False, max_new_tokens=5, output_scores=True, return_dict_in_generate=True
                )
            result.append((made.sequences, made.scores[-1][..., 3:]))
        assert torch.equal(result[0][0], result[1][0])
        torch.testing.assert_close(result[0][1], result[1][1], atol=1e-4, rtol=1e-4)

    @rule()
    def train(self) -> None:
        for model in (self.model, self.twin):
            with self.twin_capped() if model is self.twin else contextlib.nullcontext():
                model(tokens(2, 6), labels=tokens(2, 6)).loss.backward()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.sub_(0.1 * parameter.grad)
                    parameter.grad = None
        for mine, twins in zip(self.model.parameters(), self.twin.parameters(), strict=True):
            torch.testing.assert_close(mine, twins, atol=1e-4, rtol=1e-4)
            twins.data.copy_(mine.data)  # so that what is left does not add up

    @rule(dtype=st.sampled_from([torch.bfloat16, torch.float16]))
    def cast(self, dtype) -> None:
        """There, where it runs, and back, with the same rounding in both."""
        for model in (self.model, self.twin):
            model.to(dtype)
        with torch.no_grad():
            assert bool(self.model(tokens(1, 5)).logits.isfinite().all())
        for model in (self.model, self.twin):
            model.float()

    @rule(copied=st.sampled_from([copy.deepcopy, through_pickle]))
    def copies(self, copied) -> None:
        with torch.no_grad():
            torch.testing.assert_close(copied(self.model)(tokens(1, 5)).logits, self.twin(tokens(1, 5)).logits)

    @rule()
    def fake(self) -> None:
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        with mode, torch.no_grad():
            assert self.model(mode.from_tensor(tokens(2, 4))).logits.shape == (2, 4, 97)

    @rule()
    def somebody_elses_error(self) -> None:
        """A pass that ends in the middle leaves nothing for the next one."""
        handle = self.model.model.layers[2].register_forward_hook(lambda *_: 1 / 0)
        mask = torch.ones(2, 6, dtype=torch.long)
        mask[1, :4] = 0
        with pytest.raises(ZeroDivisionError):
            self.model.generate(tokens(2, 6), attention_mask=mask, max_new_tokens=3)
        handle.remove()


TestActions = Actions.TestCase
TestActions.settings = settings(max_examples=12, stateful_step_count=10, deadline=None, derandomize=True)
