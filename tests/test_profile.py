"""Profiles: what is saved comes back, and what is wrong gets a sentence."""

from __future__ import annotations

import concurrent.futures
import json
import math
import os
import resource
import struct

import fsspec
import pytest
import torch
from conftest import assert_same_bits, unit
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file

from axiscap import _C, CapProfile, ProfileError, interop
from axiscap import profile as profile_module


def good(**changes):
    fields = {
        "layers": [2, 5],
        "axes": unit(2, 3, 16),
        "floors": torch.tensor([[1.0, -math.inf, 0.5], [2.0, 3.0, -4.0]]),
        "provenance": {"model": {"id": "a model", "num_layers": 8, "hidden_size": 16}, "note": "naïve ✓"},
        "axis_all": torch.randn(8, 16, generator=torch.Generator().manual_seed(0)),
        "quantiles": torch.arange(16.0).reshape(8, 2),
        "targets": torch.tensor([[1.5, -math.inf, 0.5], [2.0, 4.0, 3.0]]),
        "norm_limits": torch.tensor([7.5, math.inf]),
        "norm_limit_all": torch.arange(1.0, 9.0),
    } | changes
    return CapProfile(**fields)


def test_what_is_saved_comes_back(tmp_path):
    path = tmp_path / "profile.safetensors"
    saved = good()
    saved.save(path)
    loaded = CapProfile.load(path)
    assert loaded.layers == (2, 5)
    for name in ("axes", "floors", "axis_all", "quantiles", "targets", "norm_limits", "norm_limit_all"):
        assert torch.equal(getattr(loaded, name), getattr(saved, name))
    assert loaded.provenance == saved.provenance
    assert (loaded.hidden_size, loaded.directions, loaded.num_layers) == (16, 3, 8)


def test_the_optional_parts_are_optional(tmp_path):
    path = tmp_path / "small.safetensors"
    CapProfile([0], unit(1, 1, 4), torch.zeros(1, 1)).save(path)
    loaded = CapProfile.load(path)
    assert (loaded.axis_all, loaded.quantiles, loaded.num_layers, loaded.provenance) == (None, None, None, {})
    assert (loaded.targets, loaded.norm_limits, loaded.norm_limit_all, loaded.knows_sinks) == (None, None, None, False)


#: What a file stated of sinks before there were norm_limits.
OLD = {
    "limits": torch.tensor([[9.0, 4.0, 6.0], [2.0, 3.0, math.inf]]),
    "limit_all": torch.arange(1.0, 9.0),
    "sinks": torch.tensor([0, 2]),
}


def old_file(path, *names):
    """A profile without limits, to which a file from before adds its own tensors."""
    good(norm_limits=None, norm_limit_all=None, targets=None).save(path)
    tensors = load_file(path) | {name: OLD[name] for name in names}
    with safe_open(path, framework="pt") as file:
        save_file(tensors, path, file.metadata())


def test_limits_on_projections_become_limits_of_norms(tmp_path):
    """No row of a smaller norm has a projection beyond the least limit of its layer."""
    path = tmp_path / "old.safetensors"
    old_file(path, "limits", "limit_all", "sinks")
    loaded = CapProfile.load(path)
    assert loaded.norm_limits.tolist() == [4.0, 2.0]
    assert torch.equal(loaded.norm_limit_all, OLD["limit_all"])
    assert loaded.provenance["norm_limits"] == profile_module.CONVERTED
    assert loaded.knows_sinks
    loaded.save(path)  # in the present form
    again = CapProfile.load(path)
    assert again.digest == loaded.digest
    assert again.provenance == loaded.provenance
    old_file(path, "limits")
    assert CapProfile.load(path).norm_limit_all is None
    old_file(path, "sinks")
    with pytest.raises(ProfileError, match=r"names positions of attention sinks, but no limit.*calibrate again"):
        CapProfile.load(path)


def test_old_and_new_limits_exclude_each_other(tmp_path):
    path = tmp_path / "both.safetensors"
    save_file(TENSORS | {"norm_limits": torch.ones(1), "limits": torch.ones(1, 1)}, path, METADATA)
    with pytest.raises(ProfileError, match="norm_limits and limits exclude each other"):
        CapProfile.load(path)


def test_targets_stay_as_far_above_their_floors():
    profile = good()
    moved = profile.with_floors(profile.floors + 2)
    assert torch.equal(moved.targets, profile.targets + 2)
    measured = profile.measuring_only()
    assert measured.targets.isneginf().all()
    given = profile.with_floors(profile.floors, profile.floors.nan_to_num(neginf=-1.0) + 9)
    assert torch.equal(given.targets[:, 0], profile.floors[:, 0] + 9)
    assert torch.equal(given.norm_limits, profile.norm_limits)
    assert good(targets=None).with_floors(profile.floors + 1).targets is None
    weaker = profile.with_strength(0.5)
    assert torch.equal(weaker.targets, profile.targets)
    assert torch.equal(weaker.norm_limits, profile.norm_limits)
    assert weaker.strength == pytest.approx(0.5)
    later = profile.at_layers([5])
    assert torch.equal(later.targets, profile.targets[1:])
    assert torch.equal(later.norm_limits, profile.norm_limits[1:])


def test_a_slot_has_targets_and_a_limit():
    profile = good()
    slot = profile.slot_at(2, 5)
    off = -math.inf
    assert slot.targets.tolist() == [1.5, off, 0.5, off, off]
    assert slot.norm_limit.item() == 7.5
    assert profile.slot_at(3, 3).norm_limit.isinf()  # a layer that it does not cap
    bare = good(targets=None, norm_limits=None).slot_at(2, 3)
    assert torch.equal(bare.targets, bare.floors)
    assert bare.norm_limit.isinf()


def test_a_failed_save_leaves_the_old_file(tmp_path):
    path = tmp_path / "profile.safetensors"
    good().save(path)
    before = path.read_bytes()
    with pytest.raises(TypeError):
        good(provenance={"not json": object()}).save(path)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"axes": unit(2, 3, 16).double()}, "axes must be float32, got torch.float64"),
        ({"axes": unit(2, 16)}, "axes must have 3 dimensions, got 2"),
        ({"axes": torch.zeros(0, 3, 16)}, "axes must not be empty"),
        ({"axes": unit(2, 3, 16) * 1.01}, "axes must be of unit length within 0.001, one is off by 0.01"),
        ({"axes": torch.full((2, 3, 16), math.nan)}, "axes must be finite"),
        ({"axes": [[1.0]]}, "axes must be a tensor, got list"),
        ({"axes": unit(2, 3, 12), "axis_all": None}, "axes must have the model's hidden size 16, got 12"),
        ({"axes": unit(2, 3, 12)}, "axis_all must have H = 12 columns, got 16"),
        ({"floors": torch.zeros(2, 2)}, r"floors must have shape \(2, 3\) like axes, got \(2, 2\)"),
        ({"floors": torch.full((2, 3), math.nan)}, "floors must be finite, or -inf"),
        ({"floors": torch.full((2, 3), math.inf)}, "floors must be finite, or -inf"),
        ({"layers": [2]}, "layers must name the 2 layers of axes, got 1"),
        ({"layers": [5, 2]}, "layers must be ascending from 0"),
        ({"layers": [2, 2]}, "layers must be ascending from 0"),
        ({"layers": [-1, 2]}, "layers must be ascending from 0"),
        ({"layers": [1.5, 2]}, r"layers must be integers, got \[1\.5, 2\]"),
        ({"layers": [True, 2]}, "layers must be integers"),
        ({"layers": torch.tensor([2.0, 5.0])}, "layers must be integers"),
        (
            {"layers": [2, 1 << 70], "provenance": None, "axis_all": None, "quantiles": None},
            "layers must be below 65536",
        ),
        ({"targets": torch.zeros(2, 2)}, r"targets must have shape \(2, 3\), got \(2, 2\)"),
        ({"targets": torch.full((2, 3), 2.5)}, "targets must be finite and at least the floors"),
        ({"targets": torch.full((2, 3), math.nan)}, "targets must be finite and at least the floors"),
        ({"targets": torch.full((2, 3), math.inf)}, "targets must be finite and at least the floors"),
        ({"targets": torch.full((2, 3), 9.0).double()}, "targets must be float32, got torch.float64"),
        ({"norm_limits": torch.ones(2, 3)}, "norm_limits must have 1 dimensions, got 2"),
        ({"norm_limits": torch.ones(3)}, r"norm_limits must have shape \(2,\), got \(3,\)"),
        ({"norm_limits": torch.tensor([1.0, 0.0])}, "norm_limits must be positive, or inf for none"),
        ({"norm_limits": torch.tensor([1.0, math.nan])}, "norm_limits must be positive, or inf for none"),
        ({"norm_limit_all": torch.ones(7)}, "norm_limit_all must have a row for each of the model's 8 layers"),
        ({"norm_limit_all": -torch.ones(8)}, "norm_limit_all must be positive, or inf for none"),
        ({"axes": unit(2, 65, 16), "floors": torch.zeros(2, 65)}, "axes must have at most 64 directions, got 65"),
        ({"axes": unit(2, 3, 16) * torch.tensor([1.0, 0.0, 1.0])[:, None]}, "axes must be of unit length"),
        ({"layers": [2, 8]}, "layers must be below 8, the model's layer count, got 8"),
        ({"axis_all": torch.zeros(7, 16)}, "axis_all must have a row for each of the model's 8 layers"),
        ({"axis_all": torch.full((8, 16), math.inf)}, "axis_all must be finite"),
        ({"quantiles": torch.zeros(7, 2)}, "quantiles must have a row for each of the model's 8 layers"),
        ({"quantiles": torch.full((8, 2), math.nan)}, "quantiles must be finite"),
        ({"populations": torch.full((1, 8, 2), math.nan)}, "populations must be finite"),
        ({"axis_all": torch.full((8, 16), math.nan)}, "axis_all must be finite"),
        ({"provenance": {"model": {"num_layers": "8"}}}, "num_layers must be positive, got '8'"),
    ],
)
def test_a_profile_that_is_not_one(changes, message):
    with pytest.raises(ProfileError, match=message):
        good(**changes)


TENSORS = {"layers": torch.tensor([0]), "axes": unit(1, 1, 4), "floors": torch.zeros(1, 1)}
METADATA = {"format": "axiscap", "version": "1", "provenance": "{}"}


def _file(tensors=None, **metadata):
    wanted = {key: value for key, value in (METADATA | metadata).items() if value is not None}
    return save(TENSORS | (tensors or {}), wanted)


def _header(header: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header


HOSTILE = {
    "empty": (b"", "too short"),
    "short": (b"\x01\x02", "too short"),
    "text": (b"this is no safetensors file, but it is long enough", "truncated or no safetensors file"),
    "truncated": (_file()[:-5], "not a valid safetensors file"),
    "truncated in its header": (_file()[:60], "truncated or no safetensors file"),
    "header larger than the file": (struct.pack("<Q", 2**63) + b"{}", "truncated or no safetensors file"),
    "huge header": (_header(b" " * (9 << 20)), "more than the 8388608 allowed"),
    "header of garbage": (_header(b"\xff\xfe" * 20), "not a valid safetensors file"),
    "deep header": (_header(b"[" * 100000), "not a valid safetensors file"),
    "offsets outside": (
        _header(json.dumps({"axes": {"dtype": "F32", "shape": [1, 1, 4], "data_offsets": [0, 1 << 40]}}).encode()),
        "not a valid safetensors file",
    ),
    "shape that overflows": (
        _header(json.dumps({"axes": {"dtype": "F32", "shape": [1 << 62, 8], "data_offsets": [0, 16]}}).encode() + b" ")
        + b"\0" * 16,
        "not a valid safetensors file",
    ),
    "not a profile": (save(TENSORS), "not an AxisCap profile"),
    "other version": (_file(version="2"), "format version 2 is not one this AxisCap reads"),
    "no floors": (save({k: v for k, v in TENSORS.items() if k != "floors"}, METADATA), "tensors are missing: floors"),
    "another tensor": (_file({"weights": torch.zeros(3)}), "unknown tensors: weights"),
    "dtype": (_file({"axes": unit(1, 1, 4).half()}), "axes must be F32 of 3 dimensions"),
    "dimensions": (_file({"axes": unit(1, 4)}), "axes must be F32 of 3 dimensions"),
    "layers as floats": (_file({"layers": torch.tensor([0.0])}), "layers must be I64 of 1 dimensions"),
    "NaN": (_file({"axes": torch.full((1, 1, 4), math.nan)}), "axes must be finite"),
    "not of unit length": (_file({"axes": torch.ones(1, 1, 4)}), "axes must be of unit length"),
    "negative layer": (_file({"layers": torch.tensor([-1])}), "layers must be ascending from 0"),
    "provenance": (_file(provenance="{"), "its provenance is not JSON"),
    "deep provenance": (_file(provenance="[" * 100000), "its provenance is not"),
    "provenance of another kind": (_file(provenance="[1]"), "its provenance is not a JSON object"),
    "model facts": (_file(provenance='{"model": {"num_layers": -3}}'), "num_layers must be positive"),
}


@pytest.mark.parametrize("name", list(HOSTILE))
def test_hostile_files_get_a_sentence(name, tmp_path):
    content, message = HOSTILE[name]
    path = tmp_path / "hostile.safetensors"
    path.write_bytes(content)
    with pytest.raises(ProfileError, match=message) as caught:
        CapProfile.load(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_a_pickle_is_not_executed(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "executed"), "w"))

    path = tmp_path / "evil.safetensors"
    torch.save({"axes": Evil()}, path)
    with pytest.raises(ProfileError, match="truncated or no safetensors file"):
        CapProfile.load(path)
    assert not (tmp_path / "executed").exists()


def test_the_most_directions_are_those_of_the_kernels():
    assert profile_module.MAX_DIRECTIONS == _C.MAX_DIRECTIONS


def test_a_pipe_does_not_block(tmp_path):
    path = tmp_path / "pipe.safetensors"
    os.mkfifo(path)
    for read in (CapProfile.load, interop.read_axis):
        with pytest.raises(ProfileError, match="is no regular file"):
            read(path)


def test_a_large_file_is_refused_before_it_is_read(tmp_path):
    """A sparse one, whose header is in order."""
    shape = [64, 64, 128 << 10]
    size = math.prod(shape) * 4
    parts = {
        "axes": {"dtype": "F32", "shape": shape, "data_offsets": [0, size]},
        "floors": {"dtype": "F32", "shape": [64, 64], "data_offsets": [size, size + 16384]},
        "layers": {"dtype": "I64", "shape": [64], "data_offsets": [size + 16384, size + 16896]},
        "__metadata__": METADATA,
    }
    path = tmp_path / "sparse.safetensors"
    with path.open("wb") as file:
        header = _header(json.dumps(parts).encode())
        file.write(header)
        file.truncate(len(header) + size + 16896)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ProfileError, match="more than the 536870912 that it may have"):
        CapProfile.load(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10  # KiB


def test_many_threads_save_to_one_path(tmp_path):
    path = tmp_path / "profile.safetensors"
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for done in [pool.submit(good().save, path) for _ in range(100)]:
            done.result()
    assert CapProfile.load(path).layers == (2, 5)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_a_saved_file_can_be_read_by_whom_the_umask_allows(tmp_path):
    path, other = tmp_path / "profile.safetensors", tmp_path / "other"
    good().save(path)
    other.write_text("")
    assert path.stat().st_mode == other.stat().st_mode


def test_saving_into_no_folder_names_it(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"missing/profile\.safetensors: its folder does not exist"):
        good().save(tmp_path / "missing" / "profile.safetensors")


def test_tensors_that_share_memory_are_saved(tmp_path):
    whole = unit(8, 16)
    shared = CapProfile([0, 1], whole[:2, None], torch.zeros(2, 1), axis_all=whole)
    shared.save(tmp_path / "profile.safetensors")
    again = CapProfile.load(tmp_path / "profile.safetensors")
    assert torch.equal(again.axis_all, whole)
    assert torch.equal(again.axes, shared.axes)


@pytest.mark.parametrize("strength", [0.25, 1.0])
@pytest.mark.parametrize("lifted", [False, True])
def test_a_weaker_profile_lifts_by_a_share_of_the_shortfall(strength, lifted, tmp_path):
    axes, floors = unit(1, 1, 16), torch.full((1, 1), 2.0)
    other = unit(1, 1, 16)
    lifts = other / (axes * other).sum(-1, keepdim=True) if lifted else None
    if lifts is not None and (axes * other).sum() < 0:
        lifts = -other / (axes * -other).sum(-1, keepdim=True)
    whole = CapProfile([3], axes, floors, lifts=lifts)
    whole.with_strength(strength).save(tmp_path / "weaker.safetensors")
    weaker = CapProfile.load(tmp_path / "weaker.safetensors")
    assert (weaker.digest == whole.digest) == (strength == 1)
    assert weaker.strength == pytest.approx(strength, rel=1e-5)
    assert_same_bits(weaker.floors, whole.floors)
    rows = torch.randn(50, 16)
    before = rows @ axes[0, 0]
    slot = weaker.slot_at(3, 1)
    bank = _C.Bank(slot.axes[None], slot.floors[None], lifts=slot.lifts[None])
    bank.cap_(rows)
    wanted = before + strength * (2 - before).clamp(min=0)
    torch.testing.assert_close(rows @ axes[0, 0], wanted, rtol=1e-4, atol=1e-4)


def test_strength_0_only_measures():
    made = good().with_strength(0)
    assert made.floors.eq(-torch.inf).all()
    assert torch.equal(made.axes, good().axes)


@pytest.mark.parametrize("strength", [-1, 1.01, math.nan, True, "half"])
def test_a_strength_that_is_none(strength):
    with pytest.raises(ProfileError, match="strength must be from 0 to 1, got"):
        good().with_strength(strength)


def test_layers_that_are_not_capped_cannot_be_chosen():
    assert good().at_layers([5]).layers == (5,)
    with pytest.raises(ProfileError, match=r"layers must be among those that are capped, \[2, 5\], got \[3\]"):
        good().at_layers([2, 3])


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        CapProfile.load(tmp_path / "nowhere.safetensors")
    with pytest.raises(ProfileError, match="is a folder"):
        CapProfile.load(tmp_path)


def test_measuring_only_keeps_the_axes_and_never_fires():
    profile = good().measuring_only()
    assert bool((profile.floors == -math.inf).all())
    assert torch.equal(profile.axes, good().axes)


def test_profiles_from_other_tools_load(tmp_path):
    """The format is plain safetensors: anything that writes the tensors and the metadata makes a profile."""
    path = tmp_path / "other.safetensors"
    save_file(TENSORS, path, METADATA)
    assert CapProfile.load(path).layers == (0,)


def test_each_part_that_changes_a_model_changes_the_digest():
    axes, floors = unit(2, 1, 8), torch.zeros(2, 1)
    parts = {"lifts": axes / 2, "targets": torch.ones(2, 1), "norm_limits": torch.ones(2)}
    other = {"lifts": axes / 4, "targets": torch.full((2, 1), 2.0), "norm_limits": torch.full((2,), 2.0)}
    digests = [CapProfile([1, 2], axes, floors).digest]
    for name in parts:
        digests += [CapProfile([1, 2], axes, floors, **{name: value[name]}).digest for value in (parts, other)]
    digests += [CapProfile([1, 3], axes, floors).digest, CapProfile([1, 2], axes, floors + 1).digest]
    digests += [CapProfile([1, 2], -axes, floors).digest]
    assert len(set(digests)) == len(digests)


def test_profiles_come_from_stores_and_keep_to_their_digest(tmp_path):
    made = good()
    made.save(tmp_path / "a#b.safetensors")
    content = (tmp_path / "a#b.safetensors").read_bytes()
    store = fsspec.filesystem("memory")
    with store.open("/bucket/mild.safetensors", "wb") as file:
        file.write(content)
    for place in (
        tmp_path / "a#b.safetensors",
        f"file://{tmp_path}/a#b.safetensors",
        "memory://bucket/mild.safetensors",
    ):
        assert CapProfile.load(place).digest == made.digest
        assert CapProfile.load(f"{place}#{made.digest}").digest == made.digest
        with pytest.raises(ProfileError, match=f"{'0' * 32}: its digest is {made.digest}"):
            CapProfile.load(f"{place}#{'0' * 32}")
    with pytest.raises(FileNotFoundError, match="there is no memory://bucket/other"):
        CapProfile.load("memory://bucket/other")
    with pytest.raises(ProfileError, match="nostore://x: it cannot be fetched: Protocol not known: nostore"):
        CapProfile.load("nostore://x")
    with store.open("/bucket/broken", "wb") as file:
        file.write(content[:100])
    with pytest.raises(ProfileError, match="memory://bucket/broken: its header says"):
        CapProfile.load("memory://bucket/broken")


def test_a_profile_is_shared_as_models_are(shipped_profile, tmp_path, monkeypatch):
    shipped_profile.save_pretrained(tmp_path / "out")
    assert CapProfile.from_pretrained(str(tmp_path / "out")).digest == shipped_profile.digest
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: axiscap\n")
    for fact in (
        shipped_profile.digest,
        "| capped layers | 8-27 of 30 |",
        "percentile 5.0 of ordinary tokens",
        "0.907",
    ):
        assert fact in card
    good().save_pretrained(tmp_path / "bare")  # of which nothing is known
    assert "| floors | not stated |" in (tmp_path / "bare" / "README.md").read_text()

    # A hub's cache, as huggingface_hub lays it out, without a hub.
    hub = tmp_path / "hub" / "models--some--profile"
    commit = "0123456789" * 4
    (hub / "snapshots" / commit).mkdir(parents=True)
    (hub / "refs").mkdir()
    (hub / "refs" / "main").write_text(commit)
    shipped_profile.save(hub / "snapshots" / commit / "profile.safetensors")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for revision in (None, "main", commit):
        assert CapProfile.from_pretrained("some/profile", revision=revision).digest == shipped_profile.digest
    with pytest.raises(OSError, match=r"some/profile: cannot download profile\.safetensors from the hub"):
        CapProfile.from_pretrained("some/profile", revision="f" * 40)
    with pytest.raises(OSError, match=r"some/other: cannot download profile\.safetensors"):
        CapProfile.from_pretrained("some/other")
    with pytest.raises(OSError, match="neither a folder nor a repository's name"):
        CapProfile.from_pretrained("no such/folder/at all")
    with pytest.raises(OSError, match="some/profile: the hub does not take the profile"):
        shipped_profile.push_to_hub("some/profile")
