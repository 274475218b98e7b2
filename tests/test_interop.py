"""Files of others: the sign and the norm are right, and no code is executed."""

from __future__ import annotations

import math
import random

import gguf
import numpy as np
import pytest
import torch
from conftest import unit

from axiscap import CapProfile, ProfileError, interop, models, reference


def make_config():
    """Two layers, one with two interventions; vectors of any length, pointing away from the Assistant."""
    generator = torch.Generator().manual_seed(4)
    return {
        "vectors": {
            f"layer_{layer}/{name}": {"vector": torch.randn(16, generator=generator) * 7, "layer": layer}
            for layer, name in ((3, "a"), (3, "b"), (5, "a"))
        },
        "experiments": [
            {
                "id": "layers_3:6-p0.25",
                "interventions": [
                    {"vector": "layer_5/a", "cap": 0.5},
                    {"vector": "layer_3/a", "cap": -0.25},
                    {"vector": "layer_3/b", "cap": 1.5},
                ],
            },
            {"id": "another", "interventions": [{"vector": "layer_3/a", "cap": 0.0}]},
        ],
    }


def ceiling(hidden: torch.Tensor, vector: torch.Tensor, cap: float) -> torch.Tensor:
    """The published operation, from its description."""
    v = vector / vector.norm()
    excess = (hidden @ v - cap).clamp(min=0)
    return hidden - excess[:, None] * v


def test_a_published_ceiling_becomes_the_same_operation(tmp_path):
    path = tmp_path / "config.pt"
    torch.save(make_config(), path)
    assert interop.experiments(path) == ["layers_3:6-p0.25", "another"]
    profile = interop.read_capping_config(path, "layers_3:6-p0.25", {"model": {"id": "m"}})
    assert profile.layers == (3, 5)
    assert profile.provenance["model"] == {"id": "m"}
    hidden = torch.randn(50, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    vectors = {name: entry["vector"].double() for name, entry in make_config()["vectors"].items()}
    expected = {
        3: ceiling(ceiling(hidden, vectors["layer_3/a"], -0.25), vectors["layer_3/b"], 1.5),
        5: ceiling(hidden, vectors["layer_5/a"], 0.5),
    }
    for index, layer in enumerate(profile.layers):
        capped = reference.cap(hidden, profile.axes[index : index + 1], profile.floors[index : index + 1])
        torch.testing.assert_close(capped, expected[layer], atol=1e-6, rtol=1e-6)
        assert not torch.allclose(capped, hidden)


def test_a_written_capping_config_reads_unchanged(tmp_path):
    profile = CapProfile([1, 4], unit(2, 2, 8), torch.tensor([[0.5, -math.inf], [-1.0, 2.0]]))
    interop.write_capping_config(profile, tmp_path / "out.pt", "mine")
    loaded = interop.read_capping_config(tmp_path / "out.pt", "mine")
    assert loaded.layers == profile.layers
    torch.testing.assert_close(loaded.floors, profile.floors)
    torch.testing.assert_close(loaded.axes[1], profile.axes[1])
    torch.testing.assert_close(loaded.axes[0, 0], profile.axes[0, 0])
    stored = torch.load(tmp_path / "out.pt", weights_only=True)
    assert stored["experiments"][0]["interventions"][0] == {"vector": "layer_1/direction_0", "cap": -0.5}
    torch.testing.assert_close(stored["vectors"]["layer_1/direction_0"]["vector"], -profile.axes[0, 0])


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_written_axis_reads_unchanged(tmp_path, wrapped):
    axis = torch.randn(6, 12).bfloat16()
    torch.save({"axis": axis} if wrapped else axis, tmp_path / "axis.pt")
    loaded = interop.read_axis(tmp_path / "axis.pt")
    assert loaded.dtype == torch.float32
    assert torch.equal(loaded, axis.float())
    interop.write_axis(loaded, tmp_path / "written.pt")
    assert torch.equal(interop.read_axis(tmp_path / "written.pt"), loaded)


def test_written_vectors_read_unchanged(tmp_path):
    default, roles = torch.randn(4, 8), {"ghost": torch.randn(4, 8), "hermit": torch.randn(4, 8)}
    interop.write_vectors(interop.Vectors(default, roles), tmp_path)
    loaded = interop.read_vectors(tmp_path)
    assert torch.equal(loaded.default, default)
    assert {name: vector.tolist() for name, vector in loaded.roles.items()} == {n: v.tolist() for n, v in roles.items()}
    torch.testing.assert_close(loaded.axis, default - (roles["ghost"] + roles["hermit"]) / 2)
    torch.testing.assert_close(interop.read_axis(tmp_path / "assistant_axis.pt"), loaded.axis)
    # A default with a type, and a role without one, are valid too.
    torch.save({"vector": default, "type": "mean", "role": "default"}, tmp_path / "default_vector.pt")
    torch.save(roles["ghost"].bfloat16(), tmp_path / "role_vectors" / "ghost.pt")
    assert torch.equal(interop.read_vectors(tmp_path).default, default)
    assert torch.equal(interop.read_vectors(tmp_path).roles["ghost"], roles["ghost"].bfloat16().float())
    torch.save(torch.randn(4, 9), tmp_path / "role_vectors" / "ghost.pt")
    with pytest.raises(ProfileError, match=r"the vector of ghost has shape \(4, 9\), the default's \(4, 8\)"):
        interop.read_vectors(tmp_path)
    for path in (tmp_path / "role_vectors").iterdir():
        path.unlink()
    with pytest.raises(ProfileError, match="no role vectors"):
        interop.read_vectors(tmp_path)


def read_single(path, vector, layer=3, cap=1.5):
    """The profile of a config with one intervention."""
    entry = {"vector": vector, "layer": layer}
    steps = [{"vector": "a", "cap": cap}]
    torch.save({"vectors": {"a": entry}, "experiments": [{"id": "x", "interventions": steps}]}, path)
    return interop.read_capping_config(path, "x")


@pytest.mark.parametrize("scale", [1e30, 1.0, 1e-30, 1e-40])
def test_a_vector_may_have_any_length(tmp_path, scale):
    profile = read_single(tmp_path / "config.pt", torch.tensor([3.0, -4.0]) * scale)
    torch.testing.assert_close(profile.axes, torch.tensor([[[-0.6, 0.8]]]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("vector", [np.array([3, -4]), np.array([3.0, -4.0], np.float32), torch.tensor([3, -4])])
def test_a_vector_may_be_of_numpy_or_integers(tmp_path, vector):
    assert read_single(tmp_path / "config.pt", vector).axes.flatten().tolist() == pytest.approx([-0.6, 0.8])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cap": 10**400}, "have a number as 'cap'"),
        ({"cap": "much"}, "have a number as 'cap'"),
        ({"cap": 1e300}, r"a cap at layer 3 must be a finite float32, got 1e\+300"),
        ({"cap": math.inf}, "a cap at layer 3 must be a finite float32, got inf"),
        ({"cap": math.nan}, "a cap at layer 3 must be a finite float32, got nan"),
        ({"layer": 2**70}, "layer must be an integer from 0 to 65535"),
        ({"layer": True}, "layer must be an integer from 0 to 65535, got True"),
        ({"layer": 1.0}, "layer must be an integer from 0 to 65535"),
        ({"vector": torch.tensor([True, False])}, "must be a dense tensor of numbers"),
        ({"vector": torch.ones(4, dtype=torch.complex64)}, "must be a dense tensor of numbers"),
        ({"vector": np.array(["a", "b"])}, "full unpickling"),
        ({"vector": np.array([None, 1])}, "full unpickling"),
        ({"vector": torch.zeros(4)}, "has length 0"),
        ({"vector": torch.ones(1).expand(1 << 30)}, "a sensible size"),
    ],
)
def test_an_invalid_intervention_is_refused_with_a_sentence(tmp_path, changes, message):
    with pytest.raises(ProfileError, match=message) as caught:
        read_single(tmp_path / "config.pt", **({"vector": torch.ones(4)} | changes))
    assert "config.pt: " in str(caught.value)


def test_a_bare_tensor_is_no_vector_entry(tmp_path):
    steps = [{"vector": "a", "cap": 1.0}]
    torch.save(
        {"vectors": {"a": torch.ones(4)}, "experiments": [{"id": "x", "interventions": steps}]}, tmp_path / "c.pt"
    )
    with pytest.raises(ProfileError, match="must name a vector with 'vector' and 'layer'"):
        interop.read_capping_config(tmp_path / "c.pt", "x")


def test_at_most_as_many_directions_as_the_kernels_have(tmp_path):
    steps = [{"vector": "a", "cap": 1.0}] * 65
    entry = {"vector": torch.ones(4), "layer": 3}
    torch.save({"vectors": {"a": entry}, "experiments": [{"id": "x", "interventions": steps}]}, tmp_path / "c.pt")
    with pytest.raises(ProfileError, match="has 65 interventions at one layer, at most 64 are allowed"):
        interop.read_capping_config(tmp_path / "c.pt", "x")


@pytest.mark.parametrize("seed", range(4))
def test_random_bytes_are_no_torch_file(tmp_path, seed):
    (tmp_path / "noise.pt").write_bytes(random.Random(seed).randbytes(1000))
    with pytest.raises(ProfileError, match="damaged or no torch file"):
        interop.experiments(tmp_path / "noise.pt")


class _Evil:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return (open, (self.target, "w"))


def test_a_pickle_that_executes_code_is_refused(tmp_path):
    path = tmp_path / "default_vector.pt"
    torch.save({"vectors": {}, "experiments": [], "extra": _Evil(str(tmp_path / "executed"))}, path)
    for load in (
        lambda: interop.experiments(path),
        lambda: interop.read_axis(path),
        lambda: interop.read_vectors(tmp_path),
    ):
        with pytest.raises(ProfileError, match="only full unpickling, which executes code, could load"):
            load()
    assert not (tmp_path / "executed").exists()


def changed_config(**changes):
    result = make_config()
    result.update(changes)
    return result


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"vectors": {}}, "not a capping config"),
        ([1, 2], "not a capping config"),
        (changed_config(experiments=[{"id": "x"}]), "not a capping config"),
        (changed_config(experiments=[{"id": "x", "interventions": []}]), "experiment 'x' has no interventions"),
        (changed_config(vectors={}), "an intervention of 'x' lacks 'layer_3/a'"),
        (changed_config(vectors={"layer_3/a": {"vector": torch.zeros(4), "layer": 3}}), "has length 0"),
        (changed_config(vectors={"layer_3/a": {"vector": torch.full((4,), math.nan), "layer": 3}}), "must be finite"),
        (changed_config(vectors={"layer_3/a": {"vector": torch.ones(2, 2), "layer": 3}}), "must have 1 dimensions"),
        (
            changed_config(vectors={"layer_3/a": {"vector": torch.ones(4), "layer": -3}}),
            "layer must be an integer from 0",
        ),
        (changed_config(vectors={"layer_3/a": {"vector": [1.0], "layer": 3}}), "must be a dense tensor of numbers"),
        (
            changed_config(vectors={"layer_3/a": {"vector": torch.ones(1).expand(1 << 40), "layer": 3}}),
            "a sensible size",
        ),
    ],
)
def test_an_invalid_config_is_refused(tmp_path, content, message):
    if isinstance(content, dict) and content.get("experiments", [{}])[0].get("id") == "layers_3:6-p0.25":
        content["experiments"] = [{"id": "x", "interventions": [{"vector": "layer_3/a", "cap": 0.0}]}]
    path = tmp_path / "config.pt"
    torch.save(content, path)
    with pytest.raises(ProfileError, match=message):
        interop.read_capping_config(path, "x")


def test_an_unknown_experiment_is_refused_with_the_known_ones(tmp_path):
    torch.save(make_config(), tmp_path / "config.pt")
    with pytest.raises(ProfileError, match=r"no experiment 'x'; it has layers_3:6-p0\.25, another"):
        interop.read_capping_config(tmp_path / "config.pt", "x")


@pytest.mark.parametrize("content", [b"", b"garbage" * 100, b"PK\x03\x04" + b"\0" * 50])
def test_a_file_that_is_no_torch_file_is_refused(tmp_path, content):
    path = tmp_path / "damaged.pt"
    path.write_bytes(content)
    with pytest.raises(ProfileError, match="not loaded, because"):
        interop.read_axis(path)


def test_a_written_control_vector_has_the_lifts_alone(tmp_path, shipped_profile):
    interop.write_control_vector(shipped_profile, tmp_path / "cv.gguf")
    loaded = interop.read_control_vector(tmp_path / "cv.gguf")
    assert loaded.layers == shipped_profile.layers
    lifts = torch.nn.functional.normalize(shipped_profile.lifts, dim=-1)
    assert torch.allclose(loaded.axes, lifts, atol=1e-6)
    assert loaded.floors.eq(-torch.inf).all()
    assert "directions alone" in loaded.provenance["source"]
    fields = gguf.GGUFReader(tmp_path / "cv.gguf").fields
    assert "without floors it is no cap" in fields["general.description"].contents()
    assert fields["controlvector.layer_count"].contents() == len(loaded.layers)


def test_a_control_vector_of_another_writer_is_read(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "other.gguf", "controlvector")
    writer.add_string("controlvector.model_hint", "llama")
    writer.add_uint32("controlvector.layer_count", 2)
    for layer in (5, 3):
        writer.add_tensor(f"direction.{layer}", np.arange(layer, layer + 8, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    loaded = interop.read_control_vector(tmp_path / "other.gguf")
    assert loaded.layers == (3, 5)
    expected = torch.nn.functional.normalize(torch.arange(3.0, 11.0), dim=0)
    assert torch.allclose(loaded.axes[0, 0], expected)


def test_an_invalid_control_vector_is_refused(tmp_path, shipped_profile):
    (tmp_path / "text.gguf").write_text("no")
    with pytest.raises(ProfileError, match="not a GGUF file"):
        interop.read_control_vector(tmp_path / "text.gguf")
    with pytest.raises(ProfileError, match="not a control vector, but a GGUF file of the architecture 'llama'"):
        interop.read_control_vector(models.default_model_file())
    two = CapProfile([1], unit(1, 2, 8), torch.zeros(1, 2))
    with pytest.raises(ProfileError, match="one direction a layer, the profile 2"):
        interop.write_control_vector(two, tmp_path / "out.gguf")
    first = CapProfile([0], unit(1, 1, 8), torch.zeros(1, 1))
    with pytest.raises(ProfileError, match="no direction at layer 0"):
        interop.write_control_vector(first, tmp_path / "out.gguf")


@pytest.mark.parametrize(
    "write",
    [
        lambda path: interop.write_axis(torch.ones(2, 8), path),
        lambda path: interop.write_capping_config(CapProfile([1], unit(1, 1, 8), torch.zeros(1, 1)), path, "x"),
        lambda path: interop.write_control_vector(CapProfile([1], unit(1, 1, 8), torch.zeros(1, 1)), path),
    ],
)
def test_a_path_that_cannot_be_a_file_is_named(tmp_path, write):
    with pytest.raises(IsADirectoryError, match="a folder; the path must name a file"):
        write(tmp_path)
    with pytest.raises(FileNotFoundError, match="missing/file: its folder does not exist"):
        write(tmp_path / "missing" / "file")


def test_a_folder_is_no_file_to_read(tmp_path):
    for read in (interop.experiments, interop.read_axis, interop.read_control_vector):
        with pytest.raises(ProfileError, match=f"{tmp_path.name}: is a folder"):
            read(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match="a file; the path must name a folder"):
        interop.write_vectors(interop.Vectors(torch.ones(2, 4), {"ghost": torch.zeros(2, 4)}), tmp_path / "file")
