"""Continuous batching of transformers under an installation."""

from __future__ import annotations

import gc

import pytest
import transformers
from conftest import profile_for
from tiny_models import FLOOR, LAYERS, build, in_threads, plain_cap, rows, tokens
from torch import nn

import axiscap


@pytest.fixture
def llama() -> nn.Module:
    return build("Llama")


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
