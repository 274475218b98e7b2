"""What the serving engines share: the operator's configuration, choices, slots, the rows of a step, and the counts."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import os
import resource
import shutil
import subprocess
import sys
import threading
from types import SimpleNamespace

import numpy as np
import prometheus_client.parser
import pytest
import torch
from conftest import unit
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, generate_latest, openmetrics
from prometheus_client.openmetrics import exposition, parser  # noqa: F401

from axiscap import CapProfile, models, reference
from axiscap.profile.fit import ModelFacts
from axiscap.serving import shared_folder
from axiscap.serving.front import metrics
from axiscap.serving.front.profiles import ServedProfiles
from axiscap.serving.registry import Registry, describe_start
from axiscap.serving.request import REQUESTED, Assignment, RequestError, SettingsError
from axiscap.serving.scheduler import Control, Scheduling
from axiscap.serving.settings import FILE_VARIABLE, Settings, find_options, read_settings
from axiscap.serving.worker.buffers import Buffers
from axiscap.serving.worker.telemetry import Telemetry
from axiscap.serving.worker.thinking import Thinking, Tokens, marker_ids
from axiscap.serving.worker.worker import Worker
from axiscap.serving.worker.writer import Writer

HIDDEN = 16


def profile(seed: int, layers=(2, 3), directions: int = 1, floor: float = 0.0, **more: torch.Tensor) -> CapProfile:
    count = len(layers)
    floors = torch.full((count, directions), floor)
    return CapProfile(layers, unit(count, directions, HIDDEN, seed=seed), floors, {"seed": seed}, **more)


@pytest.fixture
def files(tmp_path):
    paths = {}
    for seed, name in enumerate(("strict", "mild", "other")):
        paths[name] = str(tmp_path / f"{name}.safetensors")
        profile(seed, layers=(2, 3 + seed), directions=1 + seed % 2).save(paths[name])
    return paths


def test_settings_say_what_the_profiles_say(files):
    settings = Settings.parse({"profiles": files, "default": "mild", "allowed": ["strict"], "slots": 5})
    assert settings.layers == [2, 3, 4, 5]
    assert settings.directions == 2
    assert settings.hidden_size == HIDDEN
    assert settings.digests == {name: CapProfile.load(path).digest for name, path in files.items()}
    assert Settings.from_json(json.loads(json.dumps(settings.to_json()))) == settings
    assert Settings.parse(settings.to_json()) == settings  # an engine may make its configuration twice


def test_one_profile_is_the_default_and_nobody_may_choose(files):
    settings = Settings.parse({"profiles": {"strict": files["strict"]}})
    assert (settings.default, settings.allowed, settings.allow_off) == ("strict", [], False)
    assert Registry(settings).resolve(None) == "strict"
    assert Registry(settings).resolve("strict") == "strict"  # what it gets without a word
    with pytest.raises(RequestError, match="must be one of strict; got 'off'"):
        Registry(settings).resolve("off")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"profile": {}}, "unknown keys profile"),
        ({"profiles": {}}, "at least one name: path"),
        ({"profiles": "strict"}, "at least one name: path"),
        ({"profiles": {"off": "x"}}, "not 'off'"),
        ({"profiles": {"../x": "x"}}, "A-Z a-z 0-9"),
        ({"profiles": {"n" * 65: "x"}}, "1 to 64"),
        ({"profiles": {"a": 3}}, "must be a string"),
        ({"default": "nobody"}, "default must be one of"),
        ({"default": ["strict"]}, "default must be one of"),
        ({"default": {"strict": 1}}, "default must be one of"),
        ({"allowed": "strict"}, "allowed must be a list"),
        ({"allowed": ["nobody"]}, "allowed must be a list"),
        ({"allowed": [["strict"]]}, "allowed must be a list"),
        ({"allow_off": 1}, "allow_off must be true or false"),
        ({"slots": 2}, "slots must be a number from 3"),
        ({"slots": True}, "slots must be a number"),
        ({"log": "/nowhere/at/all.jsonl"}, "writable folder"),
        ({"log": "/"}, "log must be a file"),
        ({"positions": "answers"}, "positions must be one of all, generated, thinking, answer"),
        ({"positions": ["all"]}, "positions must be one of all, generated, thinking, answer"),
        ({"positions": "answer", "markers": "<think>"}, "markers must be a list of two texts"),
        ({"positions": "answer", "markers": ["<think>", ""]}, "markers must be a list of two texts"),
        ({"positions": "answer", "markers": ["<think>", "<think>"]}, "markers must be two different texts"),
        ({"markers": ["<think>", "</think>"]}, 'markers are for positions "thinking" and "answer"'),
    ],
)
def test_a_wrong_configuration_is_one_sentence(files, change, says):
    with pytest.raises(SettingsError, match=says) as error:
        Settings.parse({"profiles": files, "default": None, **change})
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 500


def test_several_profiles_need_a_default(files):
    with pytest.raises(SettingsError, match="default must name one of several"):
        Settings.parse({"profiles": files})


def test_broken_profiles_are_named(files, tmp_path):
    (tmp_path / "broken").write_bytes(b"nothing")
    with pytest.raises(SettingsError, match="profile bad cannot be read"):
        Settings.parse({"profiles": {"bad": str(tmp_path / "broken")}})
    with pytest.raises(SettingsError, match="profile gone cannot be read"):
        Settings.parse({"profiles": {"gone": str(tmp_path / "nothing")}})
    with pytest.raises(SettingsError, match="must be an object, got list"):
        Settings.parse([])


def test_the_file_and_the_option_exclude_each_other(files, tmp_path, monkeypatch):
    assert read_settings(None) is None
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"profiles": files, "default": None}))
    monkeypatch.setenv(FILE_VARIABLE, str(path))
    from_file = read_settings(None)
    with pytest.raises(SettingsError, match="configured twice"):
        read_settings({"profiles": files, "default": None})
    monkeypatch.delenv(FILE_VARIABLE)
    # The same words make the same settings, wherever they stand: an engine's compile cache hashes them.
    assert read_settings({"profiles": files, "default": None}) == from_file
    path.write_text("{")
    monkeypatch.setenv(FILE_VARIABLE, str(path))
    with pytest.raises(SettingsError, match="cannot be read as JSON"):
        read_settings(None)
    monkeypatch.setenv(FILE_VARIABLE, "")
    with pytest.raises(SettingsError, match="AXISCAP_CONFIG is empty"):
        read_settings(None)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"axiscap": None}, "axiscap must be an object; leave the key out"),
        ({"axis_cap": {"profiles": {}}}, "the configuration's key is 'axiscap', and not 'axis_cap'"),
        ({"AxisCap": {}}, "and not 'AxisCap'"),
        ({"axis-cap": None, "axiscap": {}}, "and not 'axis-cap'"),
        ({"profiles": {"mild": "x"}}, "profiles must stand in an object under the key 'axiscap'"),
    ],
)
def test_a_configuration_that_an_engine_would_pass_over_is_refused(options, says):
    with pytest.raises(SettingsError, match=says):
        find_options(options)


def test_what_is_not_meant_for_it_is_left_alone():
    assert find_options({}) is None
    assert find_options({"profiles": 3, "capture": True, "axis": {}}) is None
    assert find_options({"axiscap": {"profiles": {}}, "other": 1}) == {"profiles": {}}


def test_profiles_from_elsewhere_keep_their_names_and_digests(files, tmp_path):
    digest = CapProfile.load(files["mild"]).digest
    url = f"file://{files['mild']}"
    settings = Settings.parse({"profiles": {"mild": f"{url}#{digest}"}})
    assert (settings.profiles["mild"], settings.digests["mild"]) == (f"{url}#{digest}", digest)
    with pytest.raises(SettingsError, match=f"profile mild cannot be read: {url}#{'0' * 32}: its digest is {digest}"):
        Settings.parse({"profiles": {"mild": f"{url}#{'0' * 32}"}})


def test_another_models_profiles_are_refused(files):
    settings = Settings.parse({"profiles": files, "default": None})
    assert settings.for_model(ModelFacts(6, HIDDEN)).model == {"num_layers": 6, "hidden_size": HIDDEN, "families": ()}
    with pytest.raises(SettingsError, match=r"axiscap: profile '\w+' has hidden size 16, the model 32"):
        settings.for_model(ModelFacts(6, 32))
    with pytest.raises(SettingsError, match="caps layer 5, but the model has 5 layers"):
        settings.for_model(ModelFacts(5, HIDDEN))


def made_for(architecture: str | None, folder, *, num_layers: int | None = None) -> CapProfile:
    facts = {"architecture": architecture, "num_layers": num_layers}
    stated = {key: value for key, value in facts.items() if value is not None}
    made = CapProfile([1], torch.nn.functional.normalize(torch.ones(1, 1, HIDDEN), dim=-1), torch.zeros(1, 1),
                      {"model": stated})  # fmt: skip
    made.save(folder / "made.safetensors")
    return made


def test_a_profile_of_another_architecture_or_depth_is_refused_unless_the_operator_allows_it(tmp_path):
    made_for("Qwen3ForCausalLM", tmp_path, num_layers=6)
    asked = {"profiles": {"made": str(tmp_path / "made.safetensors")}}
    llama = ModelFacts.of(6, HIDDEN, ["LlamaForCausalLM", "llama"])
    with pytest.raises(SettingsError, match=r"made for Qwen3ForCausalLM.*another architecture \(llama\).*allow_other"):
        Settings.parse(asked).for_model(llama)
    allowed = Settings.parse(asked | {"allow_other_model": True})
    assert allowed.for_model(llama).model["families"] == ("llama",)
    for facts in (
        ModelFacts.of(6, HIDDEN, ["Qwen3ForConditionalGeneration"]),
        ModelFacts.of(6, HIDDEN, ["qwen3_text"]),
    ):
        Settings.parse(asked).for_model(facts)
    with pytest.raises(SettingsError, match="is for a model of 6 layers, this one has 5"):
        allowed.for_model(ModelFacts(5, HIDDEN))


def test_what_a_profile_does_not_state_is_said_at_start(tmp_path):
    asked = {"profiles": {"made": str(tmp_path / "made.safetensors")}}
    for made, says in (
        (("LlamaForCausalLM", 6), None), ((None, None), "no architecture and no layer count"),
        (("LlamaForCausalLM", None), "no layer count"), ((None, 6), "no architecture"),
    ):  # fmt: skip
        made_for(made[0], tmp_path, num_layers=made[1])
        sentence = describe_start(Settings.parse(asked).for_model(ModelFacts.of(6, HIDDEN, ["LlamaForCausalLM"])))
        said = "" if says is None else f"; made was not compared with the model: it states {says}"
        assert sentence.endswith(f"requests may choose made{said}")


def test_a_profile_that_comes_while_serving_must_fit_the_model(tmp_path):
    made_for("LlamaForCausalLM", tmp_path, num_layers=6)
    settings = Settings.parse({"profiles": {"made": str(tmp_path / "made.safetensors")}})
    settings = settings.for_model(ModelFacts.of(6, HIDDEN, ["LlamaForCausalLM"]))
    control = Control(settings, tmp_path / "folder", lambda *_: None, share=False)
    (tmp_path / "other").mkdir()
    for made, says in ((("GPT2LMHeadModel", 6), "made for GPT2LMHeadModel"), (("LlamaForCausalLM", 7), "of 7 layers")):
        made_for(made[0], tmp_path / "other", num_layers=made[1])
        with pytest.raises(SettingsError, match=says):
            control.load("new", str(tmp_path / "other" / "made.safetensors"))


@pytest.mark.parametrize(
    "asked", ["nobody", "other", "", "../strict", "strict\n", "strict\u200b", "x" * 1_000_000, 3, True, ["strict"], {}]
)
def test_requests_get_what_they_may_have_or_an_error(files, asked):
    registry = Registry(Settings.parse({"profiles": files, "default": "mild", "allowed": ["strict"]}))
    with pytest.raises(RequestError, match="must be one of mild, strict; got") as error:
        registry.resolve(asked)
    assert len(str(error.value)) < 200


def test_off_is_the_operators_to_allow(files):
    settings = {"profiles": files, "default": "mild", "allowed": ["strict"]}
    with pytest.raises(RequestError):
        Registry(Settings.parse(settings)).resolve("off")
    assert Registry(Settings.parse({**settings, "allow_off": True})).resolve("off") is None


def test_slots_are_given_kept_and_given_again(files):
    registry = Registry(Settings.parse({"profiles": files, "default": "mild", "slots": 4}))
    first = dict(registry.names)
    slots = {name: registry.slot_of(digest) for name, digest in first.items()}
    assert sorted(slots.values()) == [0, 1, 2]
    assert registry.assign_slot("strict", "new", in_use={first["strict"]}, allowed=True) == 3
    assert registry.resolve("strict") == "strict"
    with pytest.raises(
        ValueError, match="all 4 slots are taken, by the content of 3 profiles and by requests that still run under 1"
    ):
        registry.assign_slot("fourth", "newest", in_use={first["strict"]}, allowed=False)
    # Once nothing runs under the replaced content, its slot is free; equal content shares a slot.
    assert registry.assign_slot("fourth", "newest", in_use=set(), allowed=False) == slots["strict"]
    assert registry.assign_slot("fifth", "newest", in_use=set(), allowed=False) == slots["strict"]
    registry.retire("fourth")
    with pytest.raises(ValueError, match="there is no profile 'fourth'"):
        registry.retire("fourth")
    with pytest.raises(ValueError, match="is the default"):
        registry.retire("mild")
    with pytest.raises(SettingsError, match="A-Z a-z"):
        registry.assign_slot("../x", "content", in_use=set(), allowed=False)
    other = Registry(Settings.parse({"profiles": files, "default": None}))
    other.update(json.loads(json.dumps(registry.to_json())))
    assert vars(other) == vars(registry)


@pytest.fixture
def control(files, tmp_path, monkeypatch):
    """Of a server that was started with two of the profiles."""
    monkeypatch.setattr(shared_folder.tempfile, "tempdir", str(tmp_path))
    settings = Settings.parse({"profiles": {name: files[name] for name in ("strict", "other")}, "default": "strict"})
    return Control(settings, shared_folder.folder("server"), lambda *placed: None)


@pytest.mark.parametrize(
    ("method", "arguments", "says"),
    [
        ("move_floors", ("strict", "high"), "by must be a finite number, in units of the projection, got 'high'"),
        ("move_floors", ("strict", True), "by must be a finite number"),
        ("move_floors", ("strict", math.nan), "by must be a finite number"),
        ("move_floors", ("strict", None), "by must be a finite number"),
        ("move_floors", ("nobody", 1.0), "there is no profile 'nobody'; there are other, strict"),
        ("move_floors", (["strict"], 1.0), "there is no profile"),
        ("load", ("strict", "x", "no"), "allowed must be true or false, got 'no'"),
        ("load", ("strict", 3), "path must be a string, got 3"),
        ("load", (3, "x"), "name must be a string, got 3"),
        ("retire", ({},), "there is no profile"),
    ],
)
def test_what_an_operator_says_wrong_is_one_sentence(control, method, arguments, says):
    with pytest.raises(ValueError, match=says):
        getattr(control, method)(*arguments)


def test_a_profile_that_a_running_request_has_keeps_its_slot(tmp_path, files, monkeypatch):
    """Whatever comes meanwhile; once the request is gone, its slot is free."""
    monkeypatch.setattr(shared_folder.tempfile, "tempdir", str(tmp_path))
    settings = Settings.parse({"profiles": {"strict": files["strict"]}, "slots": 2})
    placed: list[int] = []
    control = Control(settings, shared_folder.folder("server"), lambda slot, *_: placed.append(slot), share=False)

    class Request:
        pass

    running = [Request(), Request()]
    control.track(running[0], control.assign({}, "r"))
    control.move_floors("strict", 1.0)
    control.track(running[1], control.assign({}, "r"))
    with pytest.raises(ValueError, match=r"all 2 slots are taken, by .* that still run under 1 replaced ones"):
        control.move_floors("strict", 2.0)
    assert placed == [1]
    running.pop(0)
    control.move_floors("strict", 2.0)
    assert placed == [1, 0]


@pytest.mark.parametrize(("key", "own"), [("cache_salt", None), ("extra_key", "mine")])
def test_a_decided_request_is_apart_in_the_engines_cache(control, key, own):
    """By its content's digest in front of the client's own key; equal contents share, and nothing else does."""

    class OneProcess(Scheduling):
        def extra(self, request):
            return request.asked

        def carry(self, request, extra):
            request.carried = extra

    OneProcess.key = key
    scheduling = OneProcess(control)
    keys = []
    for asked in ({}, {"axiscap": "strict"}):
        request = SimpleNamespace(asked=asked, **{key: own})
        choice = scheduling.assign(request, "r")
        assert Assignment.read(request.carried) == choice
        keys.append(getattr(request, key))
    assert keys == [f"axiscap={choice.digest};{own or ''}"] * 2
    control.move_floors("strict", 1.0)
    request = SimpleNamespace(asked={}, **{key: own})
    scheduling.assign(request, "r")
    assert getattr(request, key) not in keys
    request = SimpleNamespace(asked={}, **{key: own})
    scheduling.assign(request, "r", apart=False)
    assert getattr(request, key) == own


def test_floors_are_moved_from_the_content_that_was_loaded(control, files):
    """A file that was replaced meanwhile is another profile, and comes by a name of its own."""
    first = control.assign({}, "r").digest
    control.move_floors("strict", 1.0)
    assert control.assign({}, "r").digest != first
    control.move_floors("strict", 0)
    assert control.assign({}, "r").digest == first
    profile(7, layers=(2, 3)).save(files["strict"])
    with pytest.raises(SettingsError, match="is not what it was when the server read it first"):
        control.move_floors("strict", 0.0)
    assert control.assign({}, "r").digest == first
    control.load("strict", files["strict"])
    control.move_floors("strict", 0.0)
    assert control.assign({}, "r").digest == CapProfile.load(files["strict"]).digest


def test_what_a_client_was_told_is_what_it_gets(control, files):
    profiles = ServedProfiles(control._settings, shared_folder.folder_path("server"))
    told = profiles.resolve({"axiscap": "strict"})
    asked = told.put({"axiscap": "strict"})
    assert control.assign(asked, "r").digest == told.digest
    assert profiles.describe()["profiles"]["strict"] == told.digest
    control.move_floors("strict", 1.0)
    with pytest.raises(RequestError, match="profile strict was replaced while the request was on its way"):
        control.assign(asked, "r")
    assert profiles.resolve({}).digest == control.assign({}, "r").digest == profiles.describe()["profiles"]["strict"]


def test_a_folder_goes_with_its_last_process(tmp_path):
    """Or with the next server that starts, where its processes were killed."""
    code = "import os, sys, signal; from axiscap.serving import shared_folder; shared_folder.folder(sys.argv[1])\n"
    environment = {**os.environ, "TMPDIR": str(tmp_path)}

    def run(then: str, name: str) -> list[str]:
        subprocess.run([sys.executable, "-c", code + then, name], env=environment, check=False)
        (base,) = tmp_path.iterdir()
        return sorted(found.name for found in base.iterdir())

    assert run("os.kill(os.getpid(), signal.SIGKILL)", "killed") == ["killed"]
    assert run("os.kill(os.getpid(), signal.SIGKILL)", "again") == ["again"]
    assert run("", "ended") == []
    assert run("if os.fork(): os.wait(); os.kill(os.getpid(), signal.SIGKILL)", "forked") == ["forked"]
    assert run("sys.exit('a start that failed')", "failed") == []


def test_the_metrics_page_is_one_that_others_can_read(tmp_path):
    """Every sample belongs to its family, by prometheus-client's own parser of both formats."""
    counts = {"rows": 3.0, "fired": 1.0, "nonfinite": 0.0, "projection": -2.5, "shortfall": 0.5}
    (tmp_path / "totals-0-0.json").write_text(
        json.dumps(
            {
                "profiles": {"mild": {"prompt": {"2": counts}, "answer": {"2": counts}}},
                "answers": {"mild": {"counts": [1, 0, 0, 0, 2, 0, 0, 0, 0], "sum": 40.0}},
                "failures": dict.fromkeys(shared_folder.WRITTEN, 0),
                "lost": 0,
            }
        )
    )
    registry = CollectorRegistry()
    registry.register(metrics.Totals(tmp_path))
    for write, read in (
        (generate_latest, prometheus_client.parser.text_string_to_metric_families),
        (openmetrics.exposition.generate_latest, openmetrics.parser.text_string_to_metric_families),
    ):
        families = {family.name: family for family in read(write(registry).decode())}
        assert families["axiscap_projection_sum"].type == "gauge"
        assert families["axiscap_projection_sum"].samples[0].value == -2.5
        assert families["axiscap_rows"].type == "counter"
        assert families["axiscap_answer_percentile"].type == "histogram"
        assert "unknown" not in {family.type for family in families.values()}


def test_the_salt_tells_contents_and_rows_apart(files):
    assert Assignment("a", "1", "x").salt == Assignment("b", "1", "y").salt
    assignments = [Assignment("a", "1", "x"), Assignment("a", "2", "x"), Assignment(None, None, "x")]
    # Of servers that share a store, some cap all rows, and others a part of them.
    profiles = {"a": str(files["strict"])}
    parts = [{"positions": name} for name in ("all", "generated", "thinking", "answer")]
    parts.append({"positions": "answer", "markers": ["<reason>", "</reason>"]})
    kinds = [Settings.parse({"profiles": profiles, **part}).rows_label for part in parts]
    assignments += [Assignment("a", "1", "x", positions=kind) for kind in kinds[1:]]
    assert kinds[0] == "all"
    assert len({assignment.salt for assignment in assignments}) == 3 + len(parts) - 1
    assert Assignment(None, None, "x", positions="answer").salt == Assignment(None, None, "y").salt
    with pytest.raises(RuntimeError, match="without a decision"):
        Assignment.read({"axiscap": "strict"})  # a client's own words, not a decision
    assert Assignment.read(Assignment("a", "1", "x").put({"other": 1})) == Assignment("a", "1", "x")


def test_a_digest_is_of_what_changes_a_model():
    assert profile(1).digest == CapProfile((2, 3), profile(1).axes, profile(1).floors, {"another": "story"}).digest
    others = [profile(2), profile(1, floor=1.0), profile(1, layers=(2, 4))]
    assert len({profile(1).digest, *(other.digest for other in others)}) == 4


def make_buffers(tmp_path, rows: int = 12) -> tuple[Buffers, list[CapProfile]]:
    """Of two profiles, the second one alone has targets above its floors, and limits of norms."""
    more = {"targets": torch.tensor([[0.25, 0.0], [0.5, 0.75]]), "norm_limits": torch.tensor([50.0, 60.0])}
    profiles = [profile(1, (2, 3), floor=0.5), profile(2, (3, 5), directions=2, **more)]
    paths = {}
    for name, made in zip("ab", profiles, strict=True):
        paths[name] = str(tmp_path / f"{name}.safetensors")
        made.save(paths[name])
    buffers = Buffers(Settings.parse({"profiles": paths, "default": "a"}), [2, 3, 5], rows, torch.device("cpu"))
    for slot, made in enumerate(profiles):
        buffers.copy_profile(slot, made)
    return buffers, profiles


def test_the_buffers_layers_cap_as_the_profiles_do(tmp_path):
    buffers, profiles = make_buffers(tmp_path)
    buffers.fill(np.array([0, 1, -1, 1, 0, 1], np.int32))
    rows = torch.randn(6, HIDDEN)
    rows[4:] *= 100  # sinks, by the limits of the second profile alone
    for at, layer in enumerate(buffers.layers):
        capped = torch.ops.axiscap.cap_.buffers(hidden := rows.clone(), *buffers.tensors(at))
        assert capped is None
        assert torch.equal(hidden[[2, 5]], rows[[2, 5]])
        assert buffers.projections[at][5].isnan().all() == (layer in profiles[1].layers)
        for row, made in ((0, profiles[0]), (1, profiles[1]), (3, profiles[1]), (4, profiles[0])):
            wanted = rows[row : row + 1].clone()
            if layer in made.layers:
                number = made.layers.index(layer)
                targets = None if made.targets is None else made.targets[number][None]
                wanted = reference.cap(wanted, made.axes[number][None], made.floors[number][None], targets=targets)
            torch.testing.assert_close(hidden[row : row + 1], wanted)
    with pytest.raises(ValueError, match="at most 2 directions"):
        buffers.copy_profile(2, profile(3, directions=3))


def test_rows_behind_a_step_are_never_capped(tmp_path):
    buffers, _ = make_buffers(tmp_path)
    address = buffers.rows.data_ptr()
    for slots in ([1] * 12, [0, 1], [1, 1, 1], [], [0]):
        buffers.fill(np.array(slots, np.int32))
        assert buffers.rows.tolist() == slots + [-1] * (12 - len(slots))
    buffers.clear()
    assert buffers.rows.tolist() == [-1] * 12
    assert buffers.rows.data_ptr() == address


def step(buffers: Buffers, telemetry: Telemetry, rows: dict[str, int], slots: dict[str, int], seen: dict) -> None:
    """One step of an engine: the projections are what a capped graph would leave."""
    counts = np.array(list(rows.values()), np.int32)
    buffers.fill(np.repeat(np.array([slots[name] for name in rows], np.int32), counts))
    # The first step of a request is its prompt and, where it is longer than two rows, more.
    prompts = [0 if (name, buffers.layers[0]) in seen else min(count, 2) for name, count in rows.items()]
    telemetry.fill(list(rows), counts, np.array(prompts, np.int32), buffers.rows[: counts.sum()].numpy())
    at = 0
    for (name, count), of_prompt in zip(rows.items(), prompts, strict=True):
        for number in range(len(buffers.layers)):
            values = (
                torch.randn(count, buffers.floors.shape[2]) if slots[name] >= 0 else torch.full((count, 2), math.nan)
            )
            buffers.projections[number][at : at + count] = values
            seen.setdefault((name, buffers.layers[number]), []).append(values)
            seen.setdefault((name, buffers.layers[number], "answer"), []).append(values[of_prompt:])
        at += count
    telemetry.count()


def test_each_request_and_profile_is_counted_exactly(tmp_path, monkeypatch):
    monkeypatch.setattr("axiscap.serving.worker.telemetry.TOTALS_EVERY", 0.0)
    buffers, profiles = make_buffers(tmp_path)
    totals, log = tmp_path / "totals.json", tmp_path / "log.jsonl"
    writer = Writer(totals, log)
    telemetry = Telemetry(buffers, 1, writer)  # room for one, so that it has to grow
    seen: dict = {}
    assignments = {"r1": Assignment("a", profiles[0].digest, "one"), "r2": Assignment("b", profiles[1].digest, "two")}
    slots = {"r1": 0, "r2": 1, "r3": -1, "r4": 0}
    for name, assignment in assignments.items():
        telemetry.start(name, assignment)
    step(buffers, telemetry, {"r1": 3, "r2": 5, "r3": 2}, slots, seen)
    step(buffers, telemetry, {"r3": 1, "r2": 1, "r1": 1}, slots, seen)
    telemetry.settle(idle=False)
    assert writer.flush()
    running = json.loads(totals.read_text())["profiles"]
    assert (running["a"]["prompt"]["2"]["rows"], running["a"]["answer"]["2"]["rows"]) == (2, 2)
    telemetry.finish(["r1", "r3"])
    telemetry.start("r4", Assignment("a", profiles[0].digest, "four"))
    step(buffers, telemetry, {"r4": 2, "r2": 1}, slots, seen)
    telemetry.finish(["r4", "r2"])
    telemetry.settle(idle=True)
    assert writer.flush()

    records = {record["id"]: record for record in map(json.loads, log.read_text().splitlines())}
    assert set(records) == {"one", "two", "four"}
    for name, request, made in (("r1", "one", profiles[0]), ("r2", "two", profiles[1]), ("r4", "four", profiles[0])):
        record = records[request]
        assert record["digest"] == made.digest
        for layer in buffers.layers:
            values = torch.cat(seen[name, layer])
            floors, targets = made.slot_at(layer, 2).floors, made.slot_at(layer, 2).targets
            below = values < floors
            counted = record["layers"][str(layer)]
            assert counted["rows"] == len(values)
            assert counted["fired"] == int(below.any(1).sum())
            assert counted["mean_projection"] == pytest.approx(values.double().mean(0).tolist())
            answer = torch.cat(seen[name, layer, "answer"])
            assert record["answer"][str(layer)]["rows"] == len(answer)
            assert record["answer"][str(layer)]["fired"] == int((answer < floors).any(1).sum())
            if len(answer):
                assert record["answer"][str(layer)]["mean_projection"] == pytest.approx(
                    answer.double().mean(0).tolist()
                )
            for k in range(2):
                wanted = (floors[k] - values[:, k])[below[:, k]].double().mean().item()
                found, added = counted["mean_shortfall"][k], counted["mean_added"][k]
                assert (found is None and math.isnan(wanted)) or found == pytest.approx(wanted)
                wanted = (targets[k] - values[:, k])[below[:, k]].double().mean().item()
                assert (added is None and math.isnan(wanted)) or added == pytest.approx(wanted)
    final = json.loads(totals.read_text())
    for name, layer, requests, rows in (("a", 3, ("one", "four"), 6), ("b", 5, ("two",), 7)):
        parts = [final["profiles"][name][part][str(layer)] for part in ("prompt", "answer")]
        assert sum(part["rows"] for part in parts) == rows
        for which in ("rows", "fired"):
            wanted = sum(records[request]["layers"][str(layer)][which] for request in requests)
            assert sum(part[which] for part in parts) == wanted
            assert parts[1][which] == sum(records[request]["answer"][str(layer)][which] for request in requests)


def test_how_far_answers_drifted_is_told_and_counted(tmp_path, monkeypatch):
    """Of each, at the layer of its profile's scale: its percentile among normal answers, and the share that fired."""
    monkeypatch.setattr("axiscap.serving.worker.telemetry.TOTALS_EVERY", 0.0)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    made = profile(1, (2, 3), floor=0.5)
    table = torch.tensor([-1.0, 0.0, 1.0]).repeat(4, 1)
    facts = {"quantiles": {"percentiles": [5.0, 50.0, 95.0], "populations": ["assistant"]}}
    CapProfile(made.layers, made.axes, made.floors, facts, axis_all=unit(4, 16), populations=table[None]).save(
        tmp_path / "a.safetensors"
    )
    made = CapProfile.load(tmp_path / "a.safetensors")
    settings = Settings.parse({"profiles": {"a": str(tmp_path / "a.safetensors")}, "tell_drift": True})
    buffers = Buffers(settings, [2, 3], 12, torch.device("cpu"))
    buffers.copy_profile(0, made)
    folder = shared_folder.folder("server")
    control = Control(settings, folder, lambda *placed: None)
    profiles = ServedProfiles(settings, folder)
    writer = Writer(folder / "totals-0-0.json", tmp_path / "log.jsonl")
    telemetry = Telemetry(buffers, 4, writer)
    tickets, wanted, total = {}, [], 0.0
    for number, level in enumerate((-3.0, -0.5, 0.5)):
        told = profiles.resolve({})
        choice = control.assign(told.put({}), f"r{number}")
        assert choice.ticket == told.ticket
        telemetry.start("r", choice)
        buffers.fill(np.zeros(5, np.int32))
        telemetry.fill(["r"], np.array([5], np.int32), np.array([2], np.int32), np.zeros(5, np.int32))
        for projections in buffers.projections:
            projections[:5, 0] = torch.tensor([99.0, 99.0, level - 0.1, level, level + 0.1])
        telemetry.count()
        telemetry.finish(["r"])
        telemetry.settle(idle=True)
        tickets[told.ticket] = 1
        percentile = {-3.0: 0.0, -0.5: 27.5, 0.5: 72.5}[level]
        total += percentile
        fired = {-3.0: 1.0, -0.5: 1.0, 0.5: 1 / 3}[level]
        wanted.append({"percentile": percentile, "mean": level, "fired": round(fired, 4), "rows": 3, "layer": 3})
    assert writer.flush()
    assert asyncio.run(profiles.await_drift(tickets)) == wanted
    assert not list(folder.glob("answer-*"))
    monkeypatch.setattr("axiscap.serving.front.profiles._PATIENCE", 0.05)
    assert asyncio.run(profiles.await_drift(tickets)) == []  # told once
    found = pages(folder)
    assert found["axiscap_answer_percentile_count a"] == 3
    assert found["axiscap_answer_percentile_sum a"] == total
    assert found["axiscap_answer_percentile_bucket a 0"] == 1
    assert found["axiscap_answer_percentile_bucket a 50"] == 2
    assert found["axiscap_rows_total a 3 prompt"] == 6
    assert found["axiscap_projection_sum a 3 answer"] == pytest.approx(-9.0, abs=1e-5)
    assert [json.loads(line)["drift"]["rows"] for line in (tmp_path / "log.jsonl").read_text().splitlines()] == [3] * 3
    assert "ticket" not in (tmp_path / "log.jsonl").read_text()


def test_word_that_nobody_came_for_goes_away(writer, monkeypatch):
    """Of clients that were gone before their answers ended."""
    monkeypatch.setattr("axiscap.serving.worker.writer._DROP_EVERY", 4)
    folder = shared_folder.folder_path("server")
    for number in range(3):
        writer.report(f"old{number}", {"rows": 1})
    assert writer.flush()
    for file in folder.glob("answer-*"):
        os.utime(file, (0, 0))
    writer.report("new", {"rows": 2})
    assert writer.flush()
    assert [file.name.split("-")[1] for file in folder.glob("answer-*")] == ["new"]


@pytest.mark.parametrize("forged", ["x", ["x"], ["n", "x", "../../etc"], ["n", "x", 3], {"a": 1}, [None, None, None]])
def test_a_ticket_is_the_servers_own(control, forged):
    with pytest.raises(RequestError, match=r"axiscap_told is set by the server only|replaced"):
        control.assign({REQUESTED: forged}, "r")


def test_a_watched_step_shows_which_layer_no_longer_measures(tmp_path):
    make_buffers(tmp_path)
    settings = Settings.parse(
        {"profiles": {name: str(tmp_path / f"{name}.safetensors") for name in "ab"}, "default": "a"}
    )
    worker = Worker(settings, [2, 3, 5], 12, torch.device("cpu"), 2, None)

    def run(*layers: int) -> None:
        worker.watch()
        for at, layer in enumerate(worker.buffers.layers):
            if layer in layers:
                torch.ops.axiscap.cap_.buffers(torch.randn(2, HIDDEN), *worker.buffers.tensors(at))
        worker.end()

    run(2, 3, 5)  # rows without a slot, as those of padding: they are measured as NaN
    for _ in range(63):
        run()
    with pytest.raises(RuntimeError, match="layer 3 no longer measures the rows of a step: its cap is gone"):
        run(2, 5)
    worker.end()  # a step without rows


def test_a_workers_buffers_hold_the_step_that_runs(tmp_path):
    """A step like the last one is not written again: all that may change under the same names is."""
    _, profiles = make_buffers(tmp_path)
    paths = {name: str(tmp_path / f"{name}.safetensors") for name in "ab"}
    settings = Settings.parse({"profiles": paths, "default": "a", "slots": 3})
    worker = Worker(settings, [2, 3, 5], 12, torch.device("cpu"), 2, tmp_path / "totals.json")
    a, b = (Assignment(name, made.digest, name) for name, made in zip("ab", profiles, strict=True))
    nobody = Assignment(None, None, "off")

    def run(*slots: int, **counts: int) -> None:
        rows = np.array(list(counts.values()), np.int32)
        # The checking mode holds the buffers against this.
        starts = np.full_like(rows, 9)
        view = {name: worker._assignments[name].digest for name in counts}
        worker.fill(list(counts), rows, np.zeros_like(rows), starts, view)
        assert worker.buffers.rows.tolist() == [*slots] + [-1] * (12 - len(slots))
        worker.end()

    worker.begin([], [("x", a), ("y", b), ("z", nobody)])
    run(0, 1, -1, x=1, y=1, z=1)
    run(0, 1, -1, x=1, y=1, z=1)
    run(0, 0, 1, -1, x=2, y=1, z=1)
    run(1, 0, -1, y=1, x=1, z=1)
    worker.clear()
    run(1, 0, -1, y=1, x=1, z=1)
    worker.buffers.slot_of.clear()  # as after a profile's way out
    worker.copy_profile(0, b.digest, paths["b"])
    worker.copy_profile(2, a.digest, paths["a"])
    run(0, 2, -1, y=1, x=1, z=1)
    worker.begin(["x", "y"], [("x", nobody), ("y", a)])  # the names again, for others
    run(2, -1, -1, y=1, x=1, z=1)
    worker.end()  # a step without rows
    worker.begin(["x", "y", "z"], ())
    worker.end()
    worker._telemetry._writer.flush()
    totals = json.loads((tmp_path / "totals.json").read_text())["profiles"]
    assert {name: parts["answer"]["3"]["rows"] for name, parts in totals.items()} == {"a": 8, "b": 6}


def test_a_profile_without_norm_limits_is_looked_at_once(tmp_path, caplog):
    _, profiles = make_buffers(tmp_path)
    paths = {name: str(tmp_path / f"{name}.safetensors") for name in "ab"}
    settings = Settings.parse({"profiles": paths, "default": "a"})
    worker = Worker(settings, [2, 3, 5], 12, torch.device("cpu"), 2, None)
    a, b = (made.digest for made in profiles)
    worker.begin(
        [], [("x", Assignment("a", a, "x")), ("y", Assignment("b", b, "y")), ("z", Assignment(None, None, "z"))]
    )
    assert [worker.unseen(name) for name in "xyz"] == [a, None, None]
    for digest in (a, b, a):
        worker.look_for_sinks(digest, torch.full((3, 2), -0.6))
    (said,) = caplog.messages
    assert f"profile {a} lifts the first token of every sequence" in said
    assert "(layer 2: projection -0.6, floor 0.5)" in said
    assert worker.unseen("x") is None


def test_where_only_written_rows_are_capped_a_prompt_has_no_slot(tmp_path):
    """Prompts in one piece and in several, beside answers, with and without the first written row."""
    _, profiles = make_buffers(tmp_path)
    paths = {name: str(tmp_path / f"{name}.safetensors") for name in "ab"}
    settings = Settings.parse({"profiles": paths, "default": "a", "positions": "generated"})
    worker = Worker(settings, [2, 3, 5], 12, torch.device("cpu"), 2, tmp_path / "totals.json")
    a, b = (Assignment(name, made.digest, name) for name, made in zip("ab", profiles, strict=True))
    worker.begin([], [("x", a), ("y", b)])
    for counts, prompts, starts, slots in (
        ((4, 3), (4, 3), (0, 0), [-1] * 7),
        ((1, 3), (0, 2), (4, 3), [0, -1, -1, 1]),  # a recomputed answer behind its prompt
        ((2, 2), (0, 0), (5, 6), [0, 0, 1, 1]),
    ):
        view = {name: worker._assignments[name].digest for name in "xy"}
        worker.fill(["x", "y"], *(np.array(given, np.int32) for given in (counts, prompts, starts)), view)
        assert worker.buffers.rows.tolist() == slots + [-1] * (12 - len(slots))
        worker.end()
    worker.begin(["x", "y"], ())
    worker.end()
    worker._telemetry._writer.flush()
    totals = json.loads((tmp_path / "totals.json").read_text())["profiles"]
    found = {name: [parts[part]["3"]["rows"] for part in ("prompt", "answer")] for name, parts in totals.items()}
    assert found == {"a": [0, 3], "b": [0, 3]}


BEGIN, END = 7, 8


def inside(ids: list[int]) -> list[bool]:
    """Of each token, whether the last marker up to it begins the thinking."""
    found, now = [], False
    for token in ids:
        now = token == BEGIN or (now and token != END)
        found.append(now)
    return found


@given(st.data())
def test_each_row_is_told_by_the_last_marker_before_it(data):
    """Of requests that come, go on, are taken out and computed again, behind whatever a cache holds."""
    thinking = Thinking(BEGIN, END, torch.device("cpu"), 1)
    ids: dict[str, list[int]] = {}
    place: dict[str, int] = {}
    for _ in range(data.draw(st.integers(1, 8))):
        gone = data.draw(st.lists(st.sampled_from(sorted(ids)), unique=True)) if ids else []
        thinking.finish(gone)
        for name in gone:
            del ids[name], place[name]
        names = data.draw(st.lists(st.sampled_from("abcde"), min_size=1, unique=True))
        counts, starts = [], []
        for name in names:
            if name not in ids:
                ids[name] = data.draw(st.lists(st.sampled_from([1, BEGIN, END]), max_size=6))
                place[name] = data.draw(st.integers(0, len(ids[name])))
            elif data.draw(st.integers(0, 4)) == 0:
                place[name] = data.draw(st.integers(0, place[name]))
            count = data.draw(st.integers(1, 4))
            missing = place[name] + count - len(ids[name])
            ids[name] += [data.draw(st.sampled_from([1, 1, BEGIN, END])) for _ in range(missing)]
            counts.append(count)
            starts.append(place[name])
            place[name] += count
        ranges = [slice(start, start + count) for start, count in zip(starts, counts, strict=True)]
        tokens = torch.tensor([token for name, part in zip(names, ranges, strict=True) for token in ids[name][part]])
        wanted = [row for name, part in zip(names, ranges, strict=True) for row in inside(ids[name])[part]]
        given = Tokens(tokens, lambda at, count, names=names: ids[names[at]][:count])
        found = thinking.rows(names, np.array(counts, np.int32), np.array(starts, np.int32), given)
        assert found.tolist() == wanted


@pytest.mark.parametrize(("positions", "capped"), [("thinking", 3), ("answer", 4)])
def test_of_what_a_model_wrote_its_thinking_or_its_answer_is_capped(tmp_path, positions, capped):
    """And counted; a prompt is left alone, and may begin the thinking."""
    _, profiles = make_buffers(tmp_path)
    settings = Settings.parse({"profiles": {"a": str(tmp_path / "a.safetensors")}, "positions": positions})
    totals = tmp_path / "totals.json"
    worker = Worker(settings, [2, 3, 5], 12, torch.device("cpu"), 2, totals, (BEGIN, END))
    worker.begin([], [("x", Assignment("a", profiles[0].digest, "x")), ("y", Assignment(None, None, "y"))])
    ids = {"x": [1, 1, BEGIN, 1, 2, 3, END, 1, 2, 3], "y": [BEGIN] * 8}
    found, at, behind = [], 0, 0
    for x, y in ((3, 5), (1, 1), (1, 1), (1, 0), (1, 1), (1, 0), (1, 0), (1, 0)):
        counts = np.array([x, y][: 2 if y else 1], np.int32)
        starts = np.array([at, behind], np.int32)[: len(counts)]
        prompts = counts if at == 0 else np.zeros_like(counts)
        rows = [*ids["x"][at : at + x], *ids["y"][behind : behind + y]]
        tokens = Tokens(torch.tensor(rows), lambda number, count: ids["xy"[number]][:count])
        behind += y
        view = {"x": profiles[0].digest, "y": None}
        worker.fill(["x", "y"][: len(counts)], counts, prompts, starts, view, tokens)
        found += worker.buffers.rows[:x].tolist()
        assert worker.buffers.rows[x:].tolist() == [-1] * (12 - x)
        worker.buffers.all_projections.fill_(1.0)
        worker.end()
        at += x
    thinks = inside(ids["x"])
    wanted = [number >= 3 and thinks[number] == (positions == "thinking") for number in range(len(thinks))]
    assert found == [0 if row else -1 for row in wanted]
    assert sum(wanted) == capped
    nothing = np.zeros(0, np.int32)
    worker.fill([], nothing, nothing, nothing, {}, Tokens(torch.zeros(0, dtype=torch.int64), lambda at, count: []))
    assert worker.buffers.rows.tolist() == [-1] * 12
    worker.end()
    worker.begin(["x", "y"], ())
    worker.end()
    worker._telemetry._writer.flush()
    counted = json.loads(totals.read_text())["profiles"]["a"]
    assert [counted[part]["3"]["rows"] for part in ("prompt", "answer")] == [0, capped]


def test_a_marker_must_be_one_token():
    folder = models.folder(models.DEFAULT_MODEL)
    begin, end = marker_ids(["<|im_start|>", "<|im_end|>"], folder)
    assert begin != end
    with pytest.raises(SettingsError, match=r"'<think>' is not one token of this model's, but \d"):
        marker_ids(["<think>", "<|im_end|>"], folder)


@pytest.fixture
def writer(tmp_path, monkeypatch):
    """Of totals in a server's folder and a log, which writes when it is flushed alone."""
    monkeypatch.setattr(threading.Thread, "start", lambda thread: None)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    return Writer(shared_folder.folder("server") / "totals-0.json", tmp_path / "logs" / "log.jsonl")


def pages(folder) -> dict[str, float]:
    """What a page of metrics shows."""
    samples = [sample for family in metrics.Totals(folder).collect() for sample in family.samples]
    return {" ".join([sample.name, *sample.labels.values()]): sample.value for sample in samples}


def counted(rows: int) -> dict:
    fields = ("rows", "fired", "nonfinite", "projection", "shortfall")
    return {"profiles": {"p": {"answer": {"3": dict.fromkeys(fields, float(rows))}}}, "answers": {}}


def wrong_folder(log) -> None:
    shutil.rmtree(log.parent)


def wrong_kind(log) -> None:
    log.unlink()
    log.mkdir()


def full(log) -> None:
    log.unlink()
    log.symlink_to("/dev/full")


def nobody_reads(log) -> None:
    log.unlink()
    os.mkfifo(log)


@pytest.mark.parametrize("harm", [wrong_folder, wrong_kind, full, nobody_reads])
def test_records_wait_for_their_log(writer, tmp_path, caplog, harm):
    log = tmp_path / "logs" / "log.jsonl"
    writer.log([{"n": 0}])
    assert writer.flush()
    harm(log)
    survives = harm is wrong_folder  # made anew
    for n in (1, 2):
        writer.log([{"n": n}])
        writer.totals(counted(n))
        assert writer.flush() == survives
    said = [record.message for record in caplog.records]
    assert len(said) == (0 if survives else 1), said
    assert all("log cannot be written" in message and "capping goes on" in message for message in said)
    found = pages(shared_folder.folder_path("server"))
    assert found["axiscap_rows_total p 3 answer"] == 2
    assert found["axiscap_telemetry_failures_total log"] == (0 if survives else 2)
    if not survives:
        (log.rmdir if log.is_dir() else log.unlink)()
    assert writer.flush()
    assert [json.loads(line)["n"] for line in log.read_text().splitlines()] == ([1, 2] if log.exists() else [])
    assert len(caplog.records) == (0 if survives else 2)  # that it can be written again


def test_a_disk_that_takes_a_part_gets_the_rest_later(writer, tmp_path, caplog):
    """As a full disk does: a write takes some bytes, and the next none."""
    records = [{"n": n, "text": "x" * 100} for n in range(50)]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    writer.log(records)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1234, limits[1]))
        assert not writer.flush()
        assert not writer.flush()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    log = tmp_path / "logs" / "log.jsonl"
    assert log.stat().st_size == 1234
    assert writer.flush()
    assert [json.loads(line) for line in log.read_text().splitlines()] == records


def test_the_log_keeps_a_bounded_number_of_records(writer, tmp_path, monkeypatch):
    monkeypatch.setattr("axiscap.serving.worker.writer.WAITING_BYTES", 100)
    wrong = tmp_path / "logs"
    wrong.write_text("a file where the folder was")
    for n in range(30):
        writer.log([{"n": n}])
        writer.flush()
    wrong.unlink()
    writer.totals(counted(1))
    assert writer.flush()
    kept = [json.loads(line)["n"] for line in (tmp_path / "logs" / "log.jsonl").read_text().splitlines()]
    assert kept == list(range(len(kept)))
    assert pages(shared_folder.folder_path("server"))["axiscap_log_lost_records_total"] == 30 - len(kept) > 0


def test_totals_outlive_their_folder(writer, tmp_path, caplog):
    writer.totals(counted(1))
    assert writer.flush()
    page = metrics.Totals(shared_folder.folder_path("server"))

    def rows() -> tuple[float, float]:
        families = {family.name: family for family in page.collect()}
        unread = families["axiscap_telemetry_failures"].samples[-1].value
        return families["axiscap_rows"].samples[0].value, unread

    assert rows() == (1, 0)
    shutil.rmtree(tmp_path / "temporary")  # as those do that clean temporary folders
    assert rows() == (1, 1)
    writer.totals(counted(2))
    assert writer.flush()
    assert rows() == (2, 1)
    assert shared_folder.folder_path("server").stat().st_mode & 0o077 == 0
    # Somebody else's in its place: nothing is written there, and nothing stops.
    shutil.rmtree(tmp_path / "temporary")
    (tmp_path / "theirs").mkdir(mode=0o777)
    (tmp_path / "temporary").mkdir()
    shared_folder.folder_path("server").parent.symlink_to(tmp_path / "theirs")
    writer.totals(counted(3))
    assert not writer.flush()
    assert not list((tmp_path / "theirs").iterdir())
    assert "must be a folder of this user's own" in caplog.text
    shared_folder.folder_path("server").parent.unlink()
    assert writer.flush()
    assert rows() == (3, 1)


def test_telemetry_that_cannot_write_holds_up_no_step(tmp_path, caplog):
    """With the writer's own thread, as a server has it: the log is a folder, and the totals' folder a file."""
    buffers, profiles = make_buffers(tmp_path)
    (tmp_path / "log").mkdir()
    (tmp_path / "no-folder").write_text("")
    telemetry = Telemetry(buffers, 4, Writer(tmp_path / "no-folder" / "server" / "totals-0.json", tmp_path / "log"))
    with caplog.at_level(logging.WARNING):
        for number in range(20):
            telemetry.start("r", Assignment("a", profiles[0].digest, f"{number}"))
            step(buffers, telemetry, {"r": 3}, {"r": 0}, {})
            telemetry.finish(["r"])
            telemetry.settle(idle=True)
        telemetry._writer.flush()
    assert len([record for record in caplog.records if "cannot be written" in record.message]) == 2


def test_an_unconfigured_plugin_imports_nothing():
    code = "import sys, axiscap_plugin; axiscap_plugin.register_vllm(); print([m for m in sys.modules if 'torch' in m])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
