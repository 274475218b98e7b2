"""The hook of a capped layer: one call of the extension, or the slow way, with the same result."""

from __future__ import annotations

import gc
import threading
import weakref

import pytest
import torch
from conftest import assert_same_bits, profile_for, unit
from tiny_models import FLOOR, LAYERS, build, tokens

import axiscap
from axiscap import _C, ops
from axiscap.transformers import layers

H = 16


@pytest.fixture
def llama():
    return build("Llama")


class CappedLayer:
    """A bank of two slots and two directions, its statistics, and a pass of (2, 3) tokens that has begun."""

    def __init__(self, slots=None):
        self.axes, self.floors = unit(2, 2, H), torch.full((2, 2), 0.5)
        self.bank, self.stats = _C.Bank(self.axes, self.floors), ops.new_stats(2, 2)
        self.shared = _C.Pass()
        self.projections = torch.full((3, 6, 2), torch.nan)
        self.slots = slots
        self.shared.begin(2, 3, slots, self.projections)
        self.run = _C.layer(self.bank, self.stats, self.shared, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("slots", [None, [0, 1, -1, 1, 0, 0]])
@pytest.mark.parametrize("packed", [False, True])
def test_one_call_caps_projects_and_counts(dtype, slots, packed):
    slots = None if slots is None else torch.tensor(slots, dtype=torch.int32)
    capped = CappedLayer(slots)
    hidden = torch.randn(2, 3, H, generator=torch.Generator().manual_seed(1)).to(dtype)
    expected, stats, projections = hidden.clone(), ops.new_stats(2, 2), torch.empty(6, 2)
    ops.cap_(expected, capped.axes, capped.floors, slots, projections=projections)
    ops.accumulate_(stats, projections, capped.floors, slots)
    before = hidden._version
    with torch.no_grad():
        assert capped.run((hidden, None) if packed else hidden) is True
    assert hidden._version == before + 1
    assert_same_bits(hidden, expected)
    assert_same_bits(capped.projections[1], projections)
    assert capped.projections[[0, 2]].isnan().all()
    assert torch.equal(capped.stats, stats)


def test_a_single_sequence_may_come_without_its_dimension():
    capped = CappedLayer()
    capped.shared.begin(1, 6, None, capped.projections)
    hidden = torch.zeros(6, H)
    with torch.no_grad():
        assert capped.run(hidden)
    assert_same_bits(hidden, ops.cap(torch.zeros(6, H), capped.axes, capped.floors))


NOT_PLAIN = {
    "another shape": lambda: torch.zeros(2, 4, H),
    "another batch of as many rows": lambda: torch.zeros(3, 2, H),
    "another H": lambda: torch.zeros(2, 3, H + 1),
    "rows alone": lambda: torch.zeros(6, H),
    "one sequence of a pass of two": lambda: torch.zeros(6, H)[:3],
    "four dimensions": lambda: torch.zeros(1, 2, 3, H),
    "no dimension": lambda: torch.zeros(()),
    "another dtype": lambda: torch.zeros(2, 3, H, dtype=torch.float64),
    "strided": lambda: torch.zeros(3, 2, H).transpose(0, 1),
    "negated": lambda: torch._neg_view(torch.zeros(2, 3, H)),
    "meta": lambda: torch.zeros(2, 3, H, device="meta"),
    "sparse": lambda: torch.zeros(2, 3, H).to_sparse(),
    "subclass": lambda: torch.zeros(2, 3, H).as_subclass(type("Subclass", (torch.Tensor,), {})),
    "no tensor": lambda: None,
    "an empty tuple": lambda: (),
    "a tuple of something else": lambda: ("hidden",),
}


@pytest.mark.parametrize("name", list(NOT_PLAIN))
def test_an_output_that_is_not_plain_takes_the_slow_way(name):
    capped = CappedLayer()
    output = NOT_PLAIN[name]()
    with torch.no_grad():
        assert capped.run(output) is False
    assert capped.projections.isnan().all()
    assert not capped.stats[..., 0].any()
    if isinstance(output, torch.Tensor) and output.device.type == "cpu" and not output.is_sparse:
        assert not output.any()


def test_gradients_other_threads_and_a_pass_that_ended_take_the_slow_way():
    capped, hidden, answers = CappedLayer(), torch.zeros(2, 3, H), []
    answers.append(capped.run(hidden))  # gradients are on
    with torch.no_grad():
        with torch.autograd.forward_ad.dual_level():
            answers.append(capped.run(hidden))

        def elsewhere():
            with torch.no_grad():
                answers.append(capped.run(hidden))

        thread = threading.Thread(target=elsewhere, daemon=True)
        thread.start()
        thread.join()
        answers.append(
            _C.layer(capped.bank, capped.stats, capped.shared, 3)(hidden)
        )  # no such layer in the projections
        capped.shared.end()
        answers.append(capped.run(hidden))
    assert answers == [False] * 5
    assert not hidden.any()


def test_a_pass_of_other_directions_takes_the_slow_way():
    capped, hidden = CappedLayer(), torch.zeros(2, 3, H)
    room = torch.full((3, 6, 3), torch.nan)
    capped.shared.begin(2, 3, None, room)
    with torch.no_grad():
        assert capped.run(hidden) is False
    assert not hidden.any()
    assert room.isnan().all()


def test_the_slots_are_those_of_the_last_pass_that_began():
    capped, hidden = CappedLayer(torch.full((6,), -1, dtype=torch.int32)), torch.zeros(2, 3, H)
    capped.shared.begin(2, 3, None, capped.projections)
    with torch.no_grad():
        assert capped.run(hidden)
    assert_same_bits(hidden, ops.cap(torch.zeros(2, 3, H), capped.axes, capped.floors))


def test_a_layer_and_its_pass_keep_their_tensors_alive():
    capped = CappedLayer(torch.zeros(6, dtype=torch.int32))
    names = ["bank", "stats", "shared", "slots", "projections"]
    kept = {name: weakref.ref(capped.__dict__.pop(name)) for name in names}
    gc.collect()
    assert [name for name in names if kept[name]() is None] == []


def test_a_pass_refuses_tensors_that_do_not_fit():
    capped = CappedLayer()
    for wrong, message in (
        (lambda: capped.shared.begin(2, 4, None, capped.projections), "projections must be"),
        (lambda: capped.shared.begin(2, 3, None, capped.projections.double()), "projections must be"),
        (lambda: capped.shared.begin(2, 3, None, capped.projections.mT.contiguous().mT), "projections must be"),
        (
            lambda: capped.shared.begin(2, 3, torch.zeros(5, dtype=torch.int32), capped.projections),
            "slots must have shape",
        ),
        (lambda: _C.layer(capped.bank, capped.stats[:1], capped.shared, 0), "stats must be"),
        (lambda: _C.layer(capped.bank, capped.stats.float(), capped.shared, 0), "stats must be"),
        (lambda: _C.layer(capped.bank, capped.stats.mT.contiguous().mT, capped.shared, 0), "stats must be"),
    ):
        with pytest.raises(ValueError, match=message):
            wrong()
    with torch.no_grad():
        assert capped.run(torch.zeros(2, 3, H)) is False  # a pass that could not begin is none


def test_a_step_in_production_takes_the_one_call(llama, monkeypatch):
    """In every layer of a prompt and of each step, with a mask, under no_grad and in inference mode."""
    profile = profile_for(llama, LAYERS, FLOOR)
    ids, mask = tokens(2, 7), torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7])
    with axiscap.install(llama, profile) as cap:
        llama(ids)  # the first pass looks for sinks
        cap.reset_stats()

        def slow(*_, **__):
            raise AssertionError("the slow way was taken")

        monkeypatch.setattr(layers.ModelLayer, "cap", slow)
        llama.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False)
        with torch.inference_mode():
            llama(ids, attention_mask=mask)
        rows = (12 + 3 * 2) + 12
        assert [result.rows for result in cap.stats()["default"].values()] == [rows] * len(LAYERS)
        with pytest.raises(AssertionError, match="slow way"):
            llama(ids)  # with gradients


def test_projections_have_the_shape_of_the_last_pass(llama):
    """Also behind a pass of as many tokens in more or fewer sequences."""
    with axiscap.install(llama, profile_for(llama, LAYERS, FLOOR)) as cap, torch.no_grad():
        for shape in ((2, 6), (2, 6), (3, 4), (1, 12), (2, 6)):
            llama(tokens(*shape))
            assert [result.shape for result in cap.projections().values()] == [(*shape, 1)] * len(LAYERS)


def test_a_pass_that_cannot_begin_does_not_run_as_the_one_before(llama):
    profile = profile_for(llama, LAYERS, FLOOR)
    with axiscap.install(llama, {"mild": profile, "strict": profile}) as cap, torch.no_grad():
        for _ in range(2):  # the first looks for sinks
            llama(tokens(2, 5))
        cap.select(["mild", "strict", "mild"])
        with pytest.raises(ValueError, match="profiles are selected for 3 sequences, but the batch has 2"):
            llama(tokens(2, 5))


@pytest.mark.parametrize("selection", ["strict", ["strict", None], ["default", "strict"]])
def test_both_ways_give_the_same(llama, selection):
    mild = profile_for(llama, LAYERS, FLOOR)
    profiles = {"default": mild, "strict": mild.with_floors(mild.floors + 1)}
    ids, mask = tokens(2, 5), torch.tensor([[0, 1, 1, 1, 1], [1] * 5])
    results = []
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with axiscap.install(llama.requires_grad_(False), profiles) as cap, mode():
            llama(ids)
            cap.select(selection)
            cap.reset_stats()
            logits = llama(ids, attention_mask=mask).logits
            results.append((logits.clone(), cap.projections(), cap.stats()))
    for logits, projections, stats in results[1:]:
        assert_same_bits(logits, results[0][0])
        assert stats == results[0][2]
        for layer, result in projections.items():
            torch.testing.assert_close(result, results[0][1][layer], rtol=0, atol=0, equal_nan=True)


def test_threads_that_alternate_layer_by_layer_keep_their_rows_apart(llama):
    """One pass is announced at a time; another thread's layers take the slow way, with their own slots."""
    profile = profile_for(llama, LAYERS, FLOOR)
    floors = {"low": profile.with_floors(profile.floors - 1e3), "high": profile.with_floors(profile.floors + 2)}
    with axiscap.install(llama, floors) as cap, torch.no_grad():
        alone = {}
        for name in floors:
            cap.select(name)
            alone[name] = llama(tokens(1, 6)).logits
        barrier, result = threading.Barrier(2, timeout=30), {}

        def take_turns(*_):
            barrier.wait()

        handles = [block.register_forward_pre_hook(take_turns) for block in llama.model.layers]

        def work(name):
            with torch.no_grad():
                cap.select(name)
                result[name] = llama(tokens(1, 6)).logits

        threads = [threading.Thread(target=work, args=(name,), daemon=True) for name in floors]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for handle in handles:
            handle.remove()
    for name in floors:
        assert_same_bits(result[name], alone[name])
