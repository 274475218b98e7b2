"""Threads and asynchronous tasks have selections, masks and projections of their own."""

from __future__ import annotations

import asyncio
import sys

import pytest
import torch
from conftest import profile_for
from tiny_models import FLOOR, GREEDY, LAYERS, build, in_threads, plain_cap, rows, tokens
from torch import nn

import axiscap


@pytest.fixture
def llama() -> nn.Module:
    return build("Llama")


def test_threads_have_selections_of_their_own(llama):
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


def test_a_thread_without_a_selection_has_the_only_one(llama):
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


def test_threads_that_generate_do_not_mix_their_rows(llama, often_switched):
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


def test_tasks_have_selections_of_their_own(llama):
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
def test_threads_have_selections_of_their_own_in_compiled_code(llama):
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
def test_tasks_have_selections_of_their_own_in_compiled_code(llama):
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
