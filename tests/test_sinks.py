"""A row whose norm is beyond the limit of its profile is left alone, in every way that its sequence may come."""

from __future__ import annotations

import copy
import math
import warnings

import pytest
import torch
import transformers
from conftest import profile_for
from tiny_models import CACHES, FLOOR, GREEDY, LAYERS, build, plain_cap, tokens
from torch import nn

import axiscap
from axiscap import CapProfile


@pytest.fixture
def llama() -> nn.Module:
    return build("Llama")


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
    result = profile_for(model, LAYERS, floor)
    norm_limits = torch.full((len(LAYERS),), norm_limit)
    return CapProfile(result.layers, result.axes, result.floors, result.provenance, norm_limits=norm_limits)


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
    result = profile_for(llama, LAYERS, 0.0)
    axes = result.axes.clone()
    axes[:, 0] = -nn.functional.normalize(llama.get_input_embeddings().weight[SINK].detach(), dim=0)
    every = CapProfile(result.layers, axes, result.floors, result.provenance)
    with axiscap.install(llama, every), torch.no_grad(), warnings.catch_warnings(record=True) as messages:
        warnings.simplefilter("always")
        llama(ids)
        llama(ids)
    (warning,) = [entry for entry in messages if "lifts an attention sink" in str(entry.message)]
    assert "row 0" in str(warning.message)
    norm_limits = torch.full((len(LAYERS),), NORM_LIMIT)
    quiet = CapProfile(result.layers, axes, result.floors, result.provenance, norm_limits=norm_limits)
    with axiscap.install(llama, quiet), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        llama(ids)
    with axiscap.install(llama, every), torch.no_grad(), pytest.warns(UserWarning, match="lifts an attention sink"):
        llama(ids[:, :2])
    late = every.with_floors(torch.tensor([[-math.inf], [0.0]]))
    with axiscap.install(llama, late), torch.no_grad(), pytest.warns(UserWarning, match=f"at layer {LAYERS[1]}, row 0"):
        llama(ids)
    # Beside a profile that would be warned about, one that states its limits is not, although it lifts the row.
    stated = CapProfile(result.layers, axes, result.floors, result.provenance, norm_limits=norm_limits + math.inf)
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
