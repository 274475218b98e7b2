"""Files of others: the sign and the norm are right, and no code is executed."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import random

import fsspec
import gguf
import numpy as np
import pytest
import torch
from conftest import unit
from safetensors.torch import save_file

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
    with pytest.raises(ProfileError, match="has 65 directions at one layer, at most 64 are allowed"):
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


# Any layout, told by its content.


@pytest.fixture
def axis():
    return torch.randn(6, 16, generator=torch.Generator().manual_seed(9))


def pipeline_folder(folder, default, roles):
    """As the authors' pipeline/4_vectors.py and 5_axis.py leave it."""
    (folder / "vectors").mkdir(parents=True)
    for role, vector in {"default": default, **roles}.items():
        kind = "mean" if role == "default" else "pos_3"
        torch.save({"vector": vector, "type": kind, "role": role}, folder / "vectors" / f"{role}.pt")
    axis = default - torch.stack(list(roles.values())).mean(0)
    torch.save({"axis": axis, "default_mean": default, "n_default": 1, "n_roles": len(roles)}, folder / "axis.pt")
    (folder / "scores").mkdir()
    return axis


def assert_axis_without_floors(profile, axis):
    torch.testing.assert_close(profile.axis_all, torch.nn.functional.normalize(axis, dim=-1))
    assert torch.equal(profile.axes[:, 0], profile.axis_all[list(profile.layers)])
    assert profile.floors.isneginf().all()
    assert profile.num_layers == len(axis)


def test_the_pipelines_own_folder_is_read(tmp_path, axis):
    roles = {"ghost": torch.randn(6, 16), "hermit": torch.randn(6, 16)}
    expected = pipeline_folder(tmp_path / "run", axis, roles)
    assert_axis_without_floors(interop.read_source(tmp_path / "run"), expected)
    assert_axis_without_floors(interop.read_source(tmp_path / "run" / "axis.pt"), expected)
    with pytest.raises(ProfileError, match=r"a vector of one role \(ghost\) is no axis"):
        interop.read_source(tmp_path / "run" / "vectors" / "ghost.pt")


def test_published_folders_are_read(tmp_path, axis):
    vectors = interop.Vectors(axis, {"ghost": torch.zeros(6, 16)})
    interop.write_vectors(vectors, tmp_path / "whole")
    assert_axis_without_floors(interop.read_source(tmp_path / "whole"), axis)
    (tmp_path / "axis alone").mkdir()
    torch.save(axis, tmp_path / "axis alone" / "assistant_axis.pt")
    assert_axis_without_floors(interop.read_source(tmp_path / "axis alone"), axis)
    (tmp_path / "nothing").mkdir()
    with pytest.raises(ProfileError, match="no known layout"):
        interop.read_source(tmp_path / "nothing")


def test_the_layer_count_tells_an_axis_from_persona_vectors(tmp_path, axis):
    """persona_vectors saves (layers + 1, H): the first row is of the embeddings, and it points towards the trait."""
    path = tmp_path / "evil_response_avg_diff.pt"
    torch.save(torch.cat([torch.randn(1, 16), axis]), path)
    assert_axis_without_floors(interop.read_source(path, model={"num_layers": 6}), -axis)
    with pytest.raises(ProfileError, match="an axis of 7 layers, or persona vectors of 6 and the embeddings"):
        interop.read_source(path)
    with pytest.raises(ProfileError, match="7 rows fit no model of 8 layers"):
        interop.read_source(path, model={"num_layers": 8})
    torch.save(axis, tmp_path / "assistant_axis.pt")
    assert_axis_without_floors(interop.read_source(tmp_path / "assistant_axis.pt", model={"num_layers": 6}), axis)
    with pytest.raises(ProfileError, match="its vectors have 16 elements, and the model's rows 32"):
        interop.read_source(path, model={"num_layers": 6, "hidden_size": 32})


def test_vectors_that_an_experiment_adds_are_left_out_with_a_warning(tmp_path):
    config = make_config()
    config["experiments"][1]["interventions"].append({"vector": "layer_5/a", "coef": 2.0})
    torch.save(config, tmp_path / "config.pt")
    with pytest.warns(UserWarning, match=r"also adds 1 vectors \(coef\)"):
        profile = interop.read_source(tmp_path / "config.pt", "another")
    assert profile.layers == (3,)
    with pytest.raises(ProfileError, match=r"name one of its experiments: layers_3:6-p0\.25, another"):
        interop.read_source(tmp_path / "config.pt")
    config["experiments"] = [{"id": "adds", "interventions": [{"vector": "layer_5/a", "coef": 2.0}]}]
    torch.save(config, tmp_path / "config.pt")
    with pytest.raises(ProfileError, match="experiment 'adds' adds vectors and caps nothing"):
        interop.read_source(tmp_path / "config.pt")


def clamp(hidden, vector, low, high, strength):
    """The operation of a directional clamp, from its description."""
    v = vector / vector.norm()
    p = hidden @ v
    return hidden + strength * (p.clamp(low, high) - p)[:, None] * v


CLAMPS = {
    "a floor": ({"min": 0.5}, (0.5, math.inf, 1.0)),
    "a ceiling": ({"max": -0.25, "strength": 0.5}, (-math.inf, -0.25, 0.5)),
    "two bounds": ({"min": -0.5, "max": 0.5, "strength": 0.25}, (-0.5, 0.5, 0.25)),
    "a pin": ({"value": 1.5}, (1.5, 1.5, 1.0)),
}


@pytest.mark.parametrize("is_packed", [False, True])
@pytest.mark.parametrize("kind", list(CLAMPS))
def test_a_clamp_becomes_the_same_operation(tmp_path, kind, is_packed):
    bounds, expected = CLAMPS[kind]
    vector, hidden = torch.randn(16).double() * 3, torch.randn(200, 16)
    module = {"vectors": {}, "clamps": {"post_block": {"3": [{"vector": vector.tolist(), **bounds}]}}}
    if is_packed:
        low, high, strength = expected
        module["clamps"]["post_block"] = {
            "dtype": "float64", "shape": [1, 16], "layer_indices": [3],
            "data": base64.b64encode(vector.numpy().tobytes()).decode(),
            "bounds": [[None if math.isinf(low) else low, None if math.isinf(high) else high]],
            "strengths": [strength],
        }  # fmt: skip
    (tmp_path / "module.json").write_text(json.dumps(module))
    profile = interop.read_source(tmp_path / "module.json")
    slot = profile.slot_at(3, profile.directions)
    capped = hidden.clone()
    lifts = None if profile.lifts is None else slot.lifts[None]
    reference.cap_(capped, slot.axes[None], slot.floors[None], lifts=lifts)
    torch.testing.assert_close(capped, clamp(hidden.double(), vector, *expected).float())


CLAMP = {"vector": [1, 0], "min": 0}


@pytest.mark.parametrize(
    ("module", "message"),
    [
        ({"clamps": {"post_block": {}}, "vectors": {"post_block": {"3": [1.0]}}}, "it has vectors"),
        ({"clamps": {"pre_attn": {"3": [{"vector": [1.0], "min": 0}]}}}, "it clamps at pre_attn"),
        ({"clamps": {"post_block": {"3": [{"vector": [1.0]}]}}}, "a clamp without a bound"),
        ({"clamps": {"post_block": {"3": [{"vector": [1.0, 0], "min": 2, "max": 1}]}}}, "min <= max"),
        ({"clamps": {"post_block": {"3": [{"vector": ["a"], "min": 2}]}}}, "not in the form"),
        ({"clamps": {"post_block": {"data": "!", "shape": [1, 4], "dtype": "float32"}}}, "not in the form"),
        ({"clamps": {"post_block": {"3": [CLAMP, {"vector": [1, 1], "min": 0}]}}}, "not orthogonal"),
        ({"clamps": {"post_block": {}}}, "it has no directions"),
        ({"weights": []}, "no steering module"),
    ],
)  # fmt: skip
def test_a_module_that_a_profile_cannot_express_is_refused(tmp_path, module, message):
    (tmp_path / "module.json").write_text(json.dumps(module))
    with pytest.raises(ProfileError, match=message):
        interop.read_source(tmp_path / "module.json")


def test_tensors_of_other_projects_and_profiles_are_refused_by_name(tmp_path, shipped_profile):
    save_file({"direction": torch.ones(4), "scale": torch.ones(1)}, tmp_path / "reading.safetensors")
    with pytest.raises(ProfileError, match=r"its tensors \(direction, scale\) are in no known layout"):
        interop.read_source(tmp_path / "reading.safetensors")
    shipped_profile.save(tmp_path / "p.safetensors")
    with pytest.raises(ProfileError, match="it is a profile already"):
        interop.read_source(tmp_path / "p.safetensors")


def test_a_source_may_be_a_url_with_a_digest(tmp_path, axis):
    fs = fsspec.filesystem("memory")
    pipeline_folder(tmp_path / "run", axis, {"ghost": torch.zeros(6, 16)})
    fs.put(str(tmp_path / "run"), "memory://axes/run", recursive=True)
    with interop.open_source("memory://axes/run") as (path, digest):
        assert_axis_without_floors(interop.read_source(path), axis)
    with interop.open_source(str(tmp_path / "run")) as (_, same):
        assert same == digest
    with interop.open_source(f"memory://axes/run/axis.pt#{sha256(tmp_path / 'run' / 'axis.pt')}") as (path, _):
        assert path.name == "axis.pt"
    with (
        pytest.raises(ProfileError, match=f"its SHA-256 is {digest}, not {'0' * 64}"),
        interop.open_source(f"memory://axes/run#{'0' * 64}"),
    ):
        pass
    with (
        pytest.raises(FileNotFoundError, match="there is no memory://axes/none"),
        interop.open_source("memory://axes/none"),
    ):
        pass


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()
