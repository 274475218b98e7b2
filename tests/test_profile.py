"""Profiles: a saved profile loads unchanged, and an invalid one is refused with a sentence."""

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


def make_profile(**changes):
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


def test_a_saved_profile_loads_unchanged(tmp_path):
    path = tmp_path / "profile.safetensors"
    saved = make_profile()
    saved.save(path)
    loaded = CapProfile.load(path)
    assert loaded.layers == (2, 5)
    for name in ("axes", "floors", "axis_all", "quantiles", "targets", "norm_limits", "norm_limit_all"):
        assert torch.equal(getattr(loaded, name), getattr(saved, name))
    assert loaded.provenance == saved.provenance
    assert (loaded.hidden_size, loaded.directions, loaded.num_layers) == (16, 3, 8)


def test_optional_tensors_may_be_missing(tmp_path):
    path = tmp_path / "small.safetensors"
    CapProfile([0], unit(1, 1, 4), torch.zeros(1, 1)).save(path)
    loaded = CapProfile.load(path)
    assert (loaded.axis_all, loaded.quantiles, loaded.num_layers, loaded.provenance) == (None, None, None, {})
    assert (loaded.targets, loaded.norm_limits, loaded.norm_limit_all, loaded.knows_sinks) == (None, None, None, False)


#: The tensors about sinks in files from before norm_limits.
OLD = {
    "limits": torch.tensor([[9.0, 4.0, 6.0], [2.0, 3.0, math.inf]]),
    "limit_all": torch.arange(1.0, 9.0),
    "sinks": torch.tensor([0, 2]),
}


def write_old_file(path, *names):
    """Writes a profile without norm_limits, and with some of the old tensors."""
    make_profile(norm_limits=None, norm_limit_all=None, targets=None).save(path)
    tensors = load_file(path) | {name: OLD[name] for name in names}
    with safe_open(path, framework="pt") as file:
        save_file(tensors, path, file.metadata())


def test_limits_on_projections_become_limits_of_norms(tmp_path):
    """A row whose norm is below the least limit of its layer has no projection beyond one."""
    path = tmp_path / "old.safetensors"
    write_old_file(path, "limits", "limit_all", "sinks")
    loaded = CapProfile.load(path)
    assert loaded.norm_limits.tolist() == [4.0, 2.0]
    assert torch.equal(loaded.norm_limit_all, OLD["limit_all"])
    assert loaded.provenance["norm_limits"] == profile_module.CONVERTED
    assert loaded.knows_sinks
    loaded.save(path)  # in the present form
    reloaded = CapProfile.load(path)
    assert reloaded.digest == loaded.digest
    assert reloaded.provenance == loaded.provenance
    write_old_file(path, "limits")
    assert CapProfile.load(path).norm_limit_all is None
    write_old_file(path, "sinks")
    with pytest.raises(ProfileError, match=r"names positions of attention sinks, but no limit.*calibrate again"):
        CapProfile.load(path)


def test_old_and_new_limits_exclude_each_other(tmp_path):
    path = tmp_path / "both.safetensors"
    save_file(TENSORS | {"norm_limits": torch.ones(1), "limits": torch.ones(1, 1)}, path, METADATA)
    with pytest.raises(ProfileError, match="norm_limits and limits exclude each other"):
        CapProfile.load(path)


def test_targets_keep_their_distance_from_moved_floors():
    profile = make_profile()
    moved = profile.with_floors(profile.floors + 2)
    assert torch.equal(moved.targets, profile.targets + 2)
    measured = profile.measuring_only()
    assert measured.targets.isneginf().all()
    changed = profile.with_floors(profile.floors, profile.floors.nan_to_num(neginf=-1.0) + 9)
    assert torch.equal(changed.targets[:, 0], profile.floors[:, 0] + 9)
    assert torch.equal(changed.norm_limits, profile.norm_limits)
    assert make_profile(targets=None).with_floors(profile.floors + 1).targets is None
    weaker = profile.with_strength(0.5)
    assert torch.equal(weaker.targets, profile.targets)
    assert torch.equal(weaker.norm_limits, profile.norm_limits)
    assert weaker.strength == pytest.approx(0.5)
    later = profile.at_layers([5])
    assert torch.equal(later.targets, profile.targets[1:])
    assert torch.equal(later.norm_limits, profile.norm_limits[1:])


def test_a_slot_has_targets_and_a_limit():
    profile = make_profile()
    slot = profile.slot_at(2, 5)
    off = -math.inf
    assert slot.targets.tolist() == [1.5, off, 0.5, off, off]
    assert slot.norm_limit.item() == 7.5
    assert profile.slot_at(3, 3).norm_limit.isinf()  # a layer that is not capped
    bare = make_profile(targets=None, norm_limits=None).slot_at(2, 3)
    assert torch.equal(bare.targets, bare.floors)
    assert bare.norm_limit.isinf()


def test_a_failed_save_leaves_the_old_file(tmp_path):
    path = tmp_path / "profile.safetensors"
    make_profile().save(path)
    before = path.read_bytes()
    with pytest.raises(TypeError):
        make_profile(provenance={"not json": object()}).save(path)
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
def test_an_invalid_argument_is_named(changes, message):
    with pytest.raises(ProfileError, match=message):
        make_profile(**changes)


TENSORS = {"layers": torch.tensor([0]), "axes": unit(1, 1, 4), "floors": torch.zeros(1, 1)}
METADATA = {"format": "axiscap", "version": "1", "provenance": "{}"}


def file_content(tensors=None, **metadata):
    stated = {key: value for key, value in (METADATA | metadata).items() if value is not None}
    return save(TENSORS | (tensors or {}), stated)


def with_header(header: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header


HOSTILE = {
    "empty": (b"", "too short"),
    "short": (b"\x01\x02", "too short"),
    "text": (b"this is no safetensors file, but it is long enough", "truncated or no safetensors file"),
    "truncated": (file_content()[:-5], "not a valid safetensors file"),
    "truncated in its header": (file_content()[:60], "truncated or no safetensors file"),
    "header larger than the file": (struct.pack("<Q", 2**63) + b"{}", "truncated or no safetensors file"),
    "huge header": (with_header(b" " * (9 << 20)), "more than the 8388608 allowed"),
    "header of garbage": (with_header(b"\xff\xfe" * 20), "not a valid safetensors file"),
    "deep header": (with_header(b"[" * 100000), "not a valid safetensors file"),
    "offsets outside": (
        with_header(json.dumps({"axes": {"dtype": "F32", "shape": [1, 1, 4], "data_offsets": [0, 1 << 40]}}).encode()),
        "not a valid safetensors file",
    ),
    "shape that overflows": (
        with_header(
            json.dumps({"axes": {"dtype": "F32", "shape": [1 << 62, 8], "data_offsets": [0, 16]}}).encode() + b" "
        )
        + b"\0" * 16,
        "not a valid safetensors file",
    ),
    "not a profile": (save(TENSORS), "not an AxisCap profile"),
    "other version": (file_content(version="2"), "format version 2 is not one this AxisCap reads"),
    "no floors": (save({k: v for k, v in TENSORS.items() if k != "floors"}, METADATA), "tensors are missing: floors"),
    "another tensor": (file_content({"weights": torch.zeros(3)}), "unknown tensors: weights"),
    "dtype": (file_content({"axes": unit(1, 1, 4).half()}), "axes must be F32 of 3 dimensions"),
    "dimensions": (file_content({"axes": unit(1, 4)}), "axes must be F32 of 3 dimensions"),
    "layers as floats": (file_content({"layers": torch.tensor([0.0])}), "layers must be I64 of 1 dimensions"),
    "NaN": (file_content({"axes": torch.full((1, 1, 4), math.nan)}), "axes must be finite"),
    "not of unit length": (file_content({"axes": torch.ones(1, 1, 4)}), "axes must be of unit length"),
    "negative layer": (file_content({"layers": torch.tensor([-1])}), "layers must be ascending from 0"),
    "provenance": (file_content(provenance="{"), "its provenance is not JSON"),
    "deep provenance": (file_content(provenance="[" * 100000), "its provenance is not"),
    "provenance of another kind": (file_content(provenance="[1]"), "its provenance is not a JSON object"),
    "model facts": (file_content(provenance='{"model": {"num_layers": -3}}'), "num_layers must be positive"),
}


@pytest.mark.parametrize("name", list(HOSTILE))
def test_a_hostile_file_is_refused_with_one_sentence(name, tmp_path):
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
    with pytest.raises(ProfileError, match="a file of torch or GGUF, and no profile"):
        CapProfile.load(path)
    assert not (tmp_path / "executed").exists()


def test_the_most_directions_are_those_of_the_kernels():
    assert profile_module.MAX_DIRECTIONS == _C.MAX_DIRECTIONS


def test_a_pipe_does_not_block(tmp_path):
    path = tmp_path / "pipe.safetensors"
    os.mkfifo(path)
    for load in (CapProfile.load, interop.read_axis):
        with pytest.raises(ProfileError, match="is no regular file"):
            load(path)


def test_a_large_file_is_refused_before_it_is_read(tmp_path):
    """A sparse file with a valid header."""
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
        header = with_header(json.dumps(parts).encode())
        file.write(header)
        file.truncate(len(header) + size + 16896)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ProfileError, match="more than the 536870912 that it may have"):
        CapProfile.load(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10  # KiB


def test_many_threads_save_to_one_path(tmp_path):
    path = tmp_path / "profile.safetensors"
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for future in [pool.submit(make_profile().save, path) for _ in range(100)]:
            future.result()
    assert CapProfile.load(path).layers == (2, 5)
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_a_saved_file_has_the_permissions_of_the_umask(tmp_path):
    path, other = tmp_path / "profile.safetensors", tmp_path / "other"
    make_profile().save(path)
    other.write_text("")
    assert path.stat().st_mode == other.stat().st_mode


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"missing/profile\.safetensors: its folder does not exist"):
        make_profile().save(tmp_path / "missing" / "profile.safetensors")


def test_a_folder_in_place_of_a_file_is_named(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").touch()
    for path in (tmp_path / "folder", f"{tmp_path}/folder/", tmp_path / "folder" / ".." / "folder"):
        with pytest.raises(IsADirectoryError, match=r"folder: a folder; the path must name a file"):
            make_profile().save(path)
    assert [path.name for path in tmp_path.rglob("*")] == ["folder", "file"]
    with pytest.raises(FileNotFoundError, match="its folder does not exist"):
        make_profile().save(tmp_path / "folder" / "file" / "profile.safetensors")


def test_a_file_in_place_of_a_folder_is_named(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "folder"):
        with pytest.raises(NotADirectoryError, match=r"a file; the path must name a folder"):
            make_profile().save_pretrained(path)


def test_tensors_that_share_memory_are_saved(tmp_path):
    axis_all = unit(8, 16)
    shared = CapProfile([0, 1], axis_all[:2, None], torch.zeros(2, 1), axis_all=axis_all)
    shared.save(tmp_path / "profile.safetensors")
    loaded = CapProfile.load(tmp_path / "profile.safetensors")
    assert torch.equal(loaded.axis_all, axis_all)
    assert torch.equal(loaded.axes, shared.axes)


@pytest.mark.parametrize("strength", [0.25, 1.0])
@pytest.mark.parametrize("lifted", [False, True])
def test_a_weaker_profile_lifts_by_a_share_of_the_shortfall(strength, lifted, tmp_path):
    axes, floors = unit(1, 1, 16), torch.full((1, 1), 2.0)
    other = unit(1, 1, 16)
    lifts = other / (axes * other).sum(-1, keepdim=True) if lifted else None
    if lifts is not None and (axes * other).sum() < 0:
        lifts = -other / (axes * -other).sum(-1, keepdim=True)
    full = CapProfile([3], axes, floors, lifts=lifts)
    full.with_strength(strength).save(tmp_path / "weaker.safetensors")
    weaker = CapProfile.load(tmp_path / "weaker.safetensors")
    assert (weaker.digest == full.digest) == (strength == 1)
    assert weaker.strength == pytest.approx(strength, rel=1e-5)
    assert_same_bits(weaker.floors, full.floors)
    rows = torch.randn(50, 16)
    before = rows @ axes[0, 0]
    slot = weaker.slot_at(3, 1)
    bank = _C.Bank(slot.axes[None], slot.floors[None], lifts=slot.lifts[None])
    bank.cap_(rows)
    expected = before + strength * (2 - before).clamp(min=0)
    torch.testing.assert_close(rows @ axes[0, 0], expected, rtol=1e-4, atol=1e-4)


def test_strength_0_only_measures():
    measuring = make_profile().with_strength(0)
    assert measuring.floors.eq(-torch.inf).all()
    assert torch.equal(measuring.axes, make_profile().axes)


@pytest.mark.parametrize("strength", [-1, 1.01, math.nan, True, "half"])
def test_an_invalid_strength_is_refused(strength):
    with pytest.raises(ProfileError, match="strength must be from 0 to 1, got"):
        make_profile().with_strength(strength)


def test_at_layers_refuses_layers_that_are_not_capped():
    assert make_profile().at_layers([5]).layers == (5,)
    with pytest.raises(ProfileError, match=r"layers must be among those that are capped, \[2, 5\], got \[3\]"):
        make_profile().at_layers([2, 3])


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        CapProfile.load(tmp_path / "nowhere.safetensors")
    with pytest.raises(ProfileError, match="is a folder"):
        CapProfile.load(tmp_path)


def test_measuring_only_keeps_the_axes_and_never_fires():
    profile = make_profile().measuring_only()
    assert bool((profile.floors == -math.inf).all())
    assert torch.equal(profile.axes, make_profile().axes)


def test_profiles_from_other_tools_load(tmp_path):
    """The format is plain safetensors: any tool that writes the tensors and the metadata writes a profile."""
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


def test_profiles_load_from_stores_and_a_digest_is_checked(tmp_path):
    profile = make_profile()
    profile.save(tmp_path / "a#b.safetensors")
    content = (tmp_path / "a#b.safetensors").read_bytes()
    store = fsspec.filesystem("memory")
    with store.open("/bucket/mild.safetensors", "wb") as file:
        file.write(content)
    for location in (
        tmp_path / "a#b.safetensors",
        f"file://{tmp_path}/a#b.safetensors",
        "memory://bucket/mild.safetensors",
    ):
        assert CapProfile.load(location).digest == profile.digest
        assert CapProfile.load(f"{location}#{profile.digest}").digest == profile.digest
        with pytest.raises(ProfileError, match=f"{'0' * 32}: its digest is {profile.digest}"):
            CapProfile.load(f"{location}#{'0' * 32}")
    with pytest.raises(FileNotFoundError, match="there is no memory://bucket/other"):
        CapProfile.load("memory://bucket/other")
    with pytest.raises(ProfileError, match="nostore://x: it cannot be fetched: Protocol not known: nostore"):
        CapProfile.load("nostore://x")
    with store.open("/bucket/broken", "wb") as file:
        file.write(content[:100])
    with pytest.raises(ProfileError, match="memory://bucket/broken: its header says"):
        CapProfile.load("memory://bucket/broken")


def test_a_profile_is_shared_on_a_hub(shipped_profile, tmp_path, monkeypatch):
    shipped_profile.save_pretrained(tmp_path / "out")
    assert CapProfile.from_pretrained(str(tmp_path / "out")).digest == shipped_profile.digest
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: axiscap\n")
    for fact in (
        shipped_profile.digest,
        "| capped layers | 8-27 of 30 |",
        "percentile 4.0 of ordinary tokens",
        "0.907",
    ):
        assert fact in card
    make_profile().save_pretrained(tmp_path / "bare")  # without facts
    assert "| floors | not stated |" in (tmp_path / "bare" / "README.md").read_text()

    # The local cache in huggingface_hub's layout; no hub is needed.
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
