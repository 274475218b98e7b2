"""Activation checkpointing: a layer that backward computes again is capped as in its own pass.

The right gradients are those of a copy of the model in float64, capped by plain hooks and without checkpoints.
"""

from __future__ import annotations

import contextlib
import copy
import threading
from typing import NamedTuple

import pytest
import torch
from conftest import profile_for
from tiny_models import LAYERS, build, plain_cap, tokens
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.utils.checkpoint import checkpoint

import axiscap

IDS = tokens(2, 8)


class Step(NamedTuple):
    """One forward pass: its padding, its profile, and how far its floors are moved before."""

    padding: tuple[int, int] = (0, 0)
    name: str | None = "low"
    rise: float = 0.0

    @property
    def mask(self) -> torch.Tensor:
        return (torch.arange(8) >= torch.tensor(self.padding)[:, None]).long()


#: The passes whose losses one backward adds up.
PASSES = {
    "two paddings": [Step((4, 0)), Step((0, 6))],
    "two profiles": [Step(name="low"), Step(name="high")],
    "a reference pass": [Step((2, 0)), Step((2, 0), None)],
    "a reference pass first": [Step(name=None), Step(name="high")],
    "floors that rise": [Step(), Step(rise=1.0)],
    "three passes": [Step((4, 0), "high"), Step((0, 3), None), Step((0, 6), "low", 1.0)],
}


@pytest.fixture
def llama():
    return build("Llama").train()


@pytest.fixture
def profiles(llama):
    low = profile_for(llama, LAYERS, 0.4)
    return {"low": low, "high": low.with_floors(low.floors + 1.5)}


def losses(model, steps, run, before=lambda step: contextlib.nullcontext()):
    for step in steps:
        with before(step):
            yield run(model, step.mask).square().mean()


def run_plainly(model, mask):
    return model(input_ids=IDS, attention_mask=mask, use_cache=False).logits


def gradient(model) -> torch.Tensor:
    return torch.cat(
        [parameter.grad.flatten().double() for parameter in model.parameters() if parameter.grad is not None]
    )


def expected_gradient(llama, profiles, steps, run) -> torch.Tensor:
    exact = copy.deepcopy(llama).double()

    def capped(step):
        if step.name is None:
            return contextlib.nullcontext()
        profile = profiles[step.name]
        return plain_cap(exact, profile.with_floors(profile.floors + step.rise), step.mask)

    sum(losses(exact, steps, run, capped)).backward()
    return gradient(exact)


def checkpoint_with_transformers(llama, reentrant: bool) -> None:
    llama.gradient_checkpointing_enable({"use_reentrant": reentrant})


def checkpoint_as_before_5_24(llama, reentrant: bool) -> None:
    """transformers 5.0 to 5.20 keep the hooks of a layer inside the checkpoint."""
    for layer in llama.model.layers:
        call = type(layer).__call__
        layer.__class__ = type("Checkpointed", (type(layer),), {
            "__call__": lambda self, hidden, call=call, **kwargs: checkpoint(
                lambda hidden: call(self, hidden, **kwargs), hidden, use_reentrant=reentrant
            )
        })  # fmt: skip


def checkpoint_with_torch(llama, reentrant: bool) -> None:
    kind = CheckpointImpl.REENTRANT if reentrant else CheckpointImpl.NO_REENTRANT
    apply_activation_checkpointing(
        llama,
        lambda module: checkpoint_wrapper(module, kind),
        check_fn=lambda module: type(module).__name__ == "LlamaDecoderLayer",
    )


WAYS = {
    "transformers": checkpoint_with_transformers,
    "transformers before 5.24": checkpoint_as_before_5_24,
    "torch": checkpoint_with_torch,
}


def add_and_differentiate(parts) -> None:
    sum(parts).backward()


def assert_gradient(llama, plain, profiles, steps, run=None, exact_run=run_plainly, backward=add_and_differentiate):
    """plain: a copy of the model without checkpoints."""
    expected = expected_gradient(plain, profiles, steps, exact_run)
    cap, floors = axiscap.installed(llama), {name: profile.floors for name, profile in profiles.items()}

    @contextlib.contextmanager
    def before(step):
        cap.select(step.name)
        if step.name is not None:
            cap.set_floors(floors[step.name] + step.rise, step.name)
        yield

    parts = list(losses(llama, steps, run or exact_run, before))
    counted = cap.stats()
    backward(parts)
    assert cap.stats() == counted, "rows were counted again"
    assert (gradient(llama) - expected).norm() / expected.norm() < 1e-5
    rows = {name: sum(int(step.mask.sum()) for step in steps if step.name == name) for name in profiles}
    assert {name: stats[LAYERS[0]].rows for name, stats in counted.items()} == rows


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("way", list(WAYS))
@pytest.mark.parametrize("passes", list(PASSES))
def test_layers_are_capped_as_in_their_own_pass(passes, way, reentrant, llama, profiles):
    plain = copy.deepcopy(llama)
    with axiscap.install(llama, profiles):
        WAYS[way](llama, reentrant)
        assert_gradient(llama, plain, profiles, PASSES[passes])


def test_a_checkpoint_that_was_there_before_the_installation(llama, profiles):
    plain = copy.deepcopy(llama)
    checkpoint_with_torch(llama, False)
    with axiscap.install(llama, profiles):
        assert_gradient(llama, plain, profiles, PASSES["three passes"])


@pytest.mark.parametrize("passes", list(PASSES))
def test_a_checkpoint_around_the_model(passes, llama, profiles):
    """The region ends behind the model, so that backward begins in a node that the model does not have."""

    def run(model, mask):
        return checkpoint(lambda ids: exact_run(model, mask), IDS, use_reentrant=False)

    def exact_run(model, mask):
        return run_plainly(model, mask).sin()

    plain = copy.deepcopy(llama)
    with axiscap.install(llama, profiles):
        assert_gradient(llama, plain, profiles, PASSES[passes], run, exact_run)


@pytest.mark.parametrize("passes", ["two paddings", "two profiles"])
def test_a_reentrant_checkpoint_around_the_model(passes, llama, profiles):
    """It keeps no graph, so that nothing tells which selection a pass had."""
    embeds = torch.randn(2, 8, 32, generator=torch.Generator().manual_seed(2)).requires_grad_()

    def exact_run(model, mask):
        embeds_here = embeds.to(next(model.parameters()).dtype)
        return model(inputs_embeds=embeds_here, attention_mask=mask, use_cache=False).logits

    def run(model, mask):
        def logits(embeds):
            return model(inputs_embeds=embeds, attention_mask=mask, use_cache=False).logits

        return checkpoint(logits, embeds, use_reentrant=True)

    llama.model.embed_tokens.requires_grad_(False)
    plain = copy.deepcopy(llama)
    with axiscap.install(llama, profiles):
        if passes == "two paddings":
            assert_gradient(llama, plain, profiles, PASSES[passes], run, exact_run)
        else:
            with pytest.raises(RuntimeError, match=r"does not tell which profiles .* use_reentrant=False"):
                assert_gradient(llama, plain, profiles, PASSES[passes], run, exact_run)


@pytest.mark.parametrize("way", list(WAYS))
@pytest.mark.parametrize("reentrant", [False, True])
def test_inputs_of_adapters_whose_embeddings_are_frozen(reentrant, way, llama, profiles):
    """The first layer's input is a leaf, which no node has computed."""
    for parameter in llama.parameters():
        parameter.requires_grad_(parameter.dim() == 1)
    llama.enable_input_require_grads()
    plain = copy.deepcopy(llama)
    first = axiscap.CapProfile([0], profiles["low"].axes[:1], profiles["low"].floors[:1])
    with axiscap.install(llama, {"low": first, "high": first.with_floors(first.floors + 1.5)}) as cap:
        WAYS[way](llama, reentrant)
        exact = expected_gradient(
            plain, {"low": first, "high": first.with_floors(first.floors + 1.5)}, PASSES["three passes"], run_plainly
        )
        parts = []
        for step in PASSES["three passes"]:
            cap.select(step.name)
            if step.rise:
                cap.set_floors(first.floors + step.rise, step.name)
            parts.append(run_plainly(llama, step.mask).square().mean())
        sum(parts).backward()
    assert (gradient(llama) - exact).norm() / exact.norm() < 1e-5


@pytest.mark.parametrize("reentrant", [False, True])
def test_the_same_embeddings_in_two_passes(reentrant, llama, profiles):
    embeds = torch.randn(2, 8, 32, generator=torch.Generator().manual_seed(2))

    def run(model, mask):
        embeds_here = embeds.to(next(model.parameters()).dtype).requires_grad_()
        return model(inputs_embeds=embeds_here, attention_mask=mask, use_cache=False).logits

    llama.model.embed_tokens.requires_grad_(False)
    plain = copy.deepcopy(llama)
    with axiscap.install(llama, profiles):
        checkpoint_as_before_5_24(llama, reentrant)
        assert_gradient(llama, plain, profiles, PASSES["three passes"], run, run)


@pytest.mark.parametrize("reentrant", [False, True])
def test_backward_in_another_thread_and_in_another_order(reentrant, llama, profiles):
    def backward(parts):
        errors = []

        def run():
            try:
                for part in parts:  # the first pass first
                    part.backward()
            except BaseException as error:
                errors.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        assert not errors

    plain = copy.deepcopy(llama)
    with axiscap.install(llama, profiles):
        checkpoint_as_before_5_24(llama, reentrant)
        assert_gradient(llama, plain, profiles, PASSES["three passes"], backward=backward)


def test_layers_whose_inputs_are_kept_elsewhere(llama, profiles):
    """With tensors that autograd saves in other memory, as offloading does."""
    plain = copy.deepcopy(llama)
    with axiscap.install(llama, profiles):
        checkpoint_as_before_5_24(llama, False)
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor.clone(), lambda tensor: tensor.clone()):
            assert_gradient(llama, plain, profiles, PASSES["three passes"])


def compile_layers(llama) -> None:
    for layer in llama.model.layers:
        layer.compile(backend="aot_eager")


@pytest.mark.parametrize("compiled_first", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("way", [None, *WAYS])
def test_layers_that_are_compiled_one_by_one(way, reentrant, compiled_first, llama, profiles):
    """The hooks of such layers are compiled code, which cannot look at the graph."""
    plain = copy.deepcopy(llama)
    if compiled_first:
        compile_layers(llama)
    with axiscap.install(llama, profiles):
        if not compiled_first:
            compile_layers(llama)
        if way is not None:
            WAYS[way](llama, reentrant)
        assert_gradient(llama, plain, profiles, PASSES["three passes"])


def test_a_checkpoint_around_a_model_whose_layers_are_compiled(llama, profiles):
    def run(model, mask):
        return checkpoint(lambda ids: run_plainly(model, mask), IDS, use_reentrant=False)

    plain = copy.deepcopy(llama)
    with axiscap.install(llama, profiles):
        compile_layers(llama)
        assert_gradient(llama, plain, profiles, PASSES["three passes"], run)
