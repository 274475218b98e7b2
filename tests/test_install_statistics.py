"""Statistics of an installation, and floors that are moved while it lasts."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import profile_for
from tiny_models import FLOOR, LAYERS, build, tokens
from torch import nn

import axiscap


@pytest.fixture
def llama() -> nn.Module:
    return build("Llama")


def test_set_floors_changes_one_profile(llama):
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
def test_a_target_keeps_its_distance_to_a_floor_that_is_set(llama, has_targets):
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
def test_statistics_have_the_mean_of_what_was_added(llama, strength):
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


def test_statistics_are_those_of_the_projections(llama):
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
