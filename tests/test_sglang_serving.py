"""Capping inside SGLang, by real servers. Needs an environment that has SGLang: `make test-serving`."""

from __future__ import annotations

import concurrent.futures
import copy
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("sglang", reason="needs SGLang: make test-serving")

import sglang
from conftest import turned, unit
from serving import (
    LONG,
    MARKERS,
    MIXED,
    PROMPTS,
    asked_in_every_way,
    assert_counted,
    assert_same_texts,
    assert_the_sink_is_warned_of,
    come_move_and_go,
    configuration,
    drift_told,
    evaluated,
    expected_mixed,
    expected_part,
    expected_texts,
    find,
    hostile,
    in_parallel,
    make_profiles,
    misplaced,
    refusal,
    rolled_out,
    running,
    small_model,
    soak,
    stock_client,
    telemetry_in_trouble,
    told,
    verified,
    wait_for,
    with_a_sink_lifted,
)
from sglang.srt.layers import layernorm
from sglang.srt.layers.quantization.fp8 import Fp8LinearMethod

from axiscap import CapProfile, models, ops
from axiscap.serving.request import SettingsError
from axiscap.serving.settings import Settings
from axiscap.serving.sglang import adapter
from axiscap.serving.sglang import norm as norm_module

SERVER = ["-m", "sglang.launch_server", "--model-path", models.folder(models.DEFAULT_MODEL), "--served-model-name", "m"]
SERVER += ["--dtype", "float32", "--device", "cpu", "--attention-backend", "torch_native"]
SERVER += ["--sampling-backend", "pytorch", "--disable-cuda-graph"]
SERVER += ["--context-length", "1024", "--max-total-tokens", "1536", "--enable-metrics", "--sleep-on-idle"]
CPU = {"SGLANG_USE_CPU_ENGINE": "1"}
# SGLang's scheduler is so careful that a full cache alone retracts nobody here; this is its own switch for tests.
RETRACT = {"SGLANG_TEST_RETRACT": "1", "SGLANG_TEST_RETRACT_INTERVAL": "11"}


@pytest.fixture(scope="module")
def profiles(tmp_path_factory):
    folder = tmp_path_factory.mktemp("profiles")
    return folder, make_profiles(folder)


@pytest.fixture(scope="module")
def lifting(demo_model, profiles):
    """Lifts the first token of every sequence."""
    return turned(*demo_model, profiles[1]["mild"])


@pytest.fixture(scope="module")
def server(profiles, lifting):
    """Capped, with its checking mode on."""
    folder, _ = profiles
    settings = with_a_sink_lifted(
        configuration(folder, check=True, tell_drift=True, log=str(folder / "log.jsonl")), folder, lifting
    )
    (folder / "config.json").write_text(json.dumps(settings))
    environment = {"AXISCAP_CONFIG": str(folder / "config.json"), **CPU, **RETRACT}
    environment["AXISCAP_ADMIN_KEY"] = "secret"
    with running(SERVER, folder, "custom_params", **environment) as server:
        yield server


@pytest.fixture(scope="module")
def plain(profiles):
    """Not configured."""
    with running(SERVER, profiles[0], "custom_params", **CPU) as server:
        yield server


@pytest.mark.nightly
def test_evaluate_asks_for_each_answer_capped_and_uncapped(server, tmp_path):
    evaluated(server, "sglang", tmp_path)


def mixed(server) -> list[str]:
    with concurrent.futures.ThreadPoolExecutor(len(MIXED)) as pool:
        return list(pool.map(lambda asked: server.text(*asked, max_tokens=12), MIXED))


@pytest.mark.nightly
def test_two_tensor_parallel_ranks_in_each_of_two_pipeline_ranks(tmp_path):
    model, tokenizer, made = small_model(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(configuration(tmp_path, check=True)))
    environment = {"AXISCAP_CONFIG": str(tmp_path / "config.json"), "SGLANG_CPU_OMP_THREADS_BIND": "0|1|0|1", **CPU}
    command = [*SERVER, "--model-path", str(tmp_path / "model"), "--tp-size", "2", "--pp-size", "2"]
    with running(command, tmp_path, "custom_params", **environment) as server:
        found = mixed(server)
    assert found == expected_mixed(model, tokenizer, made, 12)
    assert len(set(found)) > len(found) / 2


#: Every process imports this as it starts: the norms of a CPU take in caps, as those of a GPU do.
JOINED = """
import axiscap_plugin

def register():
    from axiscap.serving.sglang import adapter, norm
    adapter._JOINED.add("cpu")
    take_in = norm.take_in
    def take_in_and_report(module, tensors):
        take_in(module, tensors)
        print(f"a {type(module).__name__} of SGLang's takes a cap in", flush=True)
    norm.take_in = take_in_and_report
    register_engine()

register_engine, axiscap_plugin.register_sglang = axiscap_plugin.register_sglang, register
"""


def test_the_cap_runs_inside_the_norm_behind_it(tmp_path):
    """Behind the layers within, and behind the last."""
    model, tokenizer, made = small_model(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(configuration(tmp_path, check=True)))
    (tmp_path / "sitecustomize.py").write_text(JOINED)
    paths = f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"
    environment = {"AXISCAP_CONFIG": str(tmp_path / "config.json"), "PYTHONPATH": paths, **CPU}
    command = [*SERVER, "--model-path", str(tmp_path / "model")]
    with running(command, tmp_path, "custom_params", **environment) as server:
        found = mixed(server)
    assert found == expected_mixed(model, tokenizer, made, 12)
    assert len(set(found)) > len(found) / 2
    assert server.log.read_text().count("takes a cap in") == len(made["mild"].layers)


NORM_LIMIT = 12.0


def bank(rows: int) -> tuple[torch.Tensor, ...]:
    """What the ops `.buffers` take: of two slots, one of which is off; rows of either and of none. The first slot lifts
    beyond its floor, and one of its rows has a norm beyond its limit.
    """
    axes, slots = unit(2, 1, 64), torch.arange(rows + 3, dtype=torch.int32) % 3 - 1
    floors, targets = torch.tensor([[2.0], [-torch.inf]]), torch.tensor([[2.5], [-torch.inf]])
    return axes, floors, slots, torch.zeros(rows + 3, 1), targets, axes, torch.tensor([NORM_LIMIT, torch.inf])


def joined_norm(name: str, tensors: tuple[torch.Tensor, ...]):
    """One of SGLang's, with a cap inside; and itself without."""
    norm = getattr(layernorm, name)(64).bfloat16()
    norm.weight.data.copy_(torch.randn(64, generator=torch.Generator().manual_seed(1)))
    alone = copy.deepcopy(norm)
    norm_module.take_in(norm, tensors)
    return norm, alone


@pytest.mark.parametrize(("name", "bias"), [("RMSNorm", 0.0), ("GemmaRMSNorm", 1.0), ("Gemma3RMSNorm", 1.0)])
def test_a_norm_of_sglangs_caps_the_sum_of_its_streams(name, bias):
    tensors = bank(9)
    axes, floors, slots, projections, targets, _, norm_limits = tensors
    norm, alone = joined_norm(name, tensors)
    x, residual = torch.randn(2, 9, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    wanted, stream, reported = x.clone(), residual.clone(), torch.empty(9, 1)
    more = {"targets": targets, "norm_limits": norm_limits}
    ops.add_rms_norm_cap_(wanted, stream, norm.weight.data, 1e-6, axes, floors, slots[:9], weight_bias=bias,
                          projections=reported, **more)  # fmt: skip
    hidden, capped = norm(x.clone(), residual.clone())
    assert torch.equal(hidden, wanted)
    assert torch.equal(capped, stream)
    assert torch.equal(projections[:9].nan_to_num(), reported.nan_to_num())
    assert bool((reported[slots[:9] == 0] < 2).any())  # some fire
    beyond = (x.float() + residual.float()).norm(dim=-1) > NORM_LIMIT
    assert bool((beyond & (slots[:9] == 0)).any())
    assert torch.equal(reported[:, 0].isnan(), (slots[:9] < 0) | (beyond & (slots[:9] == 0)))
    # As the hook and the engine's norm, but for the rounding of the sum in between.
    capped = ops.cap_residual_(x, residual.clone(), axes, floors, slots[:9], **more)
    theirs, sums = alone.forward_native(x.clone(), capped)
    torch.testing.assert_close(hidden, theirs, atol=0.03, rtol=0.02)
    torch.testing.assert_close(stream, sums, atol=0.03, rtol=0.02)
    # A stream alone has been capped by the hook.
    assert torch.equal(norm(x.clone()), alone(x.clone()))


def test_a_norm_that_quantises_for_its_matrix_does_so_with_the_cap_inside(monkeypatch):
    norm, _ = joined_norm("RMSNorm", bank(9))
    linear = torch.nn.Module()
    linear.quant_method, linear.input_scale = Fp8LinearMethod.__new__(Fp8LinearMethod), torch.tensor([0.02])
    norm.fuse_input_quant(linear)
    x, residual = torch.randn(2, 9, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    plain = norm(x.clone(), residual.clone())  # where the engine has no such kernel, it quantises behind
    assert plain[0].dtype == torch.bfloat16
    monkeypatch.setattr(layernorm, "_flashinfer_rmsnorm_quant_available", True)
    (quantized, scale, dtype), capped = norm(x.clone(), residual.clone())
    wanted = (plain[0].float() / linear.input_scale).clamp(-448, 448).to(torch.float8_e4m3fn)
    assert torch.equal(quantized.float(), wanted.float())
    assert scale is linear.input_scale
    assert dtype == torch.bfloat16
    assert torch.equal(capped, plain[1])


def test_a_norm_that_has_more_to_do_is_capped_in_front():
    tensors = bank(9)
    axes, floors, slots, _, targets, _, norm_limits = tensors
    options = {"targets": targets, "norm_limits": norm_limits}
    x, residual, more = torch.randn(3, 9, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    norm, alone = joined_norm("RMSNorm", tensors)
    hidden, stream = norm(x.clone(), residual.clone(), more)
    wanted = alone(x.clone(), ops.cap_residual_(x, residual.clone(), axes, floors, slots[:9], **options), more)
    assert torch.equal(hidden, wanted[0])
    assert torch.equal(stream, wanted[1])
    norm, alone = joined_norm("RMSNorm", tensors)
    norm.weight.data = alone.weight.data = alone.weight.data.float()
    hidden, stream = norm(x.clone(), residual.clone())
    wanted = alone(x.clone(), ops.cap_residual_(x, residual.clone(), axes, floors, slots[:9], **options))
    assert torch.equal(hidden, wanted[0])
    assert torch.equal(stream, wanted[1])


def test_which_norm_takes_a_cap_in():
    """That of the layer behind, or the model's own, where it computes no more than the fused ops."""

    def layer(**options: object) -> torch.nn.Module:
        block = torch.nn.Module()
        block.input_layernorm = layernorm.RMSNorm(64, **options)
        return block

    model, inner = torch.nn.Module(), torch.nn.Module()
    inner.layers = torch.nn.ModuleList([layer(), layer(), layer(cast_x_before_out_mul=True), torch.nn.Module()])
    inner.norm, model.model = layernorm.GemmaRMSNorm(64), inner
    found = norm_module.readers(model, 4)
    assert found == {0: inner.layers[1].input_layernorm, 3: inner.norm}
    inner.norm = torch.nn.LayerNorm(64)
    assert list(norm_module.readers(model, 4)) == [0]


@pytest.mark.parametrize("name", ["mild", "strict"])
def test_the_capped_server_writes_what_the_capped_model_writes(server, profiles, demo_model, name):
    wanted = expected_texts(*demo_model, PROMPTS, profiles[1][name], 16)
    assert_same_texts(in_parallel(server, PROMPTS, None if name == "mild" else name), wanted)


def test_an_uncapped_request_gets_what_a_server_without_the_plugin_gives(server, plain):
    wanted = in_parallel(plain, PROMPTS)
    assert in_parallel(server, PROMPTS, "off") == wanted
    assert in_parallel(server, PROMPTS, "watch") == wanted
    assert in_parallel(server, PROMPTS) != wanted


def test_no_token_of_the_radix_cache_crosses_profiles(server, demo_model, profiles):
    kinds = {"off": None, None: profiles[1]["mild"], "strict": profiles[1]["strict"]}
    wanted = {name: expected_texts(*demo_model, [LONG], profile, 16)[0] for name, profile in kinds.items()}
    assert len(set(wanted.values())) == 3
    order = ["off", None, "strict", "off", "strict", None, None, "off"]
    hits = []
    for name in order:
        body = {"text": LONG, "sampling_params": {"temperature": 0, "max_new_tokens": 16}}
        if name is not None:
            body["sampling_params"]["custom_params"] = {"axiscap": name}
        answer = server.client.post("/generate", json=body).json()
        assert answer["text"] == wanted[name]
        hits.append(answer["meta_info"]["cached_tokens"] > 100)
    # Each kind misses the first time, whatever ran before it, and hits its own tokens afterwards.
    assert hits == [name in order[:at] for at, name in enumerate(order)]


def test_hostile_requests_get_a_400_and_the_server_lives(server):
    hostile(server)


def test_a_choice_that_would_not_be_read_is_refused_on_every_route(server):
    misplaced(server)


def test_each_response_says_which_profile_was_in_force(server, profiles):
    told(server, {name: profiles[1][name] for name in ("mild", "strict")})


def test_a_response_says_how_far_its_answers_drifted(server, profiles):
    drift_told(server, profiles[0] / "log.jsonl")
    assert "axiscap: capping all rows at layers 8-27 under mild" in server.log.read_text()


def test_every_way_to_ask(server, profiles, demo_model):
    asked = {"custom_params": {"axiscap": "strict"}}
    most, sampling = {"max_tokens": 16, **asked}, {"temperature": 0, "max_new_tokens": 16, **asked}
    ways = {
        "chat": ("/v1/chat/completions", {"messages": "messages", **most}),
        "completion": ("/v1/completions", {"prompt": "prompt", **most}),
        "tokens, echo": ("/v1/completions", {"prompt": "ids", "echo": True, "logprobs": 1, **most}),
        "SGLang's own": ("/generate", {"text": "prompt", "sampling_params": sampling}),
        "SGLang's own, tokens, several": ("/generate", {"input_ids": "ids", "sampling_params": {**sampling, "n": 2}}),
    }
    asked_in_every_way(server, ways, demo_model, profiles[1]["strict"])
    both = [sampling, {"temperature": 0, "max_new_tokens": 4}]
    answer = server.client.post("/generate", json={"text": ["Hello.", "Hello."], "sampling_params": both})
    assert (answer.status_code, answer.headers["x-axiscap-profile"]) == (200, "strict, mild")


def test_a_server_is_verified_from_outside(server, profiles):
    verified(server, profiles[0])


def test_the_stock_client(server):
    stock_client(server)


@pytest.mark.nightly
def test_the_engines_own_benchmark_client(server, tmp_path):
    command = [sys.executable, "-m", "sglang.bench_serving", "--backend", "sglang-oai", "--base-url", server.url]
    command += ["--model", "m", "--tokenizer", models.folder(models.DEFAULT_MODEL), "--dataset-name", "random-ids"]
    command += ["--random-input-len", "32", "--random-output-len", "8", "--random-range-ratio", "1"]
    command += ["--num-prompts", "6", "--output-file", str(tmp_path / "result.jsonl"), "--disable-tqdm"]
    subprocess.run(command, check=True, cwd=tmp_path)
    result = json.loads((tmp_path / "result.jsonl").read_text())
    assert (result["completed"], result["total_output_tokens"]) == (6, 48)


def test_requests_are_counted_and_logged(server, profiles, demo_model):
    folder, made = profiles
    server.client.post("/flush_cache").raise_for_status()  # rows of the radix cache are not computed, nor counted
    response = server.complete(PROMPTS[1], "strict", max_tokens=8, ignore_eos=True).json()
    server.text("Hello.", "off", max_tokens=1)
    record = wait_for(lambda: find(folder / "log.jsonl", response["id"]))
    assert (record["name"], record["digest"]) == ("strict", made["strict"].digest)
    assert_counted(record, demo_model, made["strict"], response["usage"]["prompt_tokens"] + 7)
    assert "Morwen" not in (folder / "log.jsonl").read_text()
    first = made["strict"].layers[0]
    wait_for(
        lambda: server.metrics().get(f'axiscap_fired_rows_total{{layer="{first}",part="prompt",profile="strict"}}')
    )


@pytest.mark.nightly
def test_capping_goes_on_where_telemetry_cannot_be_written(profiles, tmp_path):
    def command(log: str) -> tuple[list[str], dict[str, str]]:
        settings = configuration(profiles[0], check=True, log=log)
        (tmp_path / "config.json").write_text(json.dumps(settings))
        return SERVER, {"AXISCAP_CONFIG": str(tmp_path / "config.json"), **CPU}

    telemetry_in_trouble(command, tmp_path, "custom_params")


def test_what_the_model_writes_is_capped_alone(profiles, demo_model):
    """And of it the answer, where it thinks before that."""
    folder, made = profiles
    settings = configuration(folder, check=True, positions="answer", markers=MARKERS)
    (folder / "written.json").write_text(json.dumps(settings))
    environment = {"AXISCAP_CONFIG": str(folder / "written.json"), **CPU}
    with running(SERVER, folder, "custom_params", **environment) as server:
        for name, profile in (("strict", made["strict"]), ("off", None), ("mild", made["mild"])):
            wanted = expected_texts(*demo_model, [*PROMPTS[:3], LONG], profile, 24, "generated")
            assert [server.text(prompt, name, max_tokens=24) for prompt in [*PROMPTS[:3], LONG]] == wanted
        thinking = [f"{prompt}{MARKERS[0]}" for prompt in [*PROMPTS[:3], LONG]]
        wanted = [expected_part(*demo_model, prompt, made["strict"], 40, "answer") for prompt in thinking]
        assert in_parallel(server, thinking, "strict", max_tokens=40) == wanted
        assert [server.text(prompt, "strict", max_tokens=40) for prompt in thinking] == wanted  # behind a cached prompt
        whole = expected_texts(*demo_model, thinking, made["strict"], 40, "generated")
        assert wanted != whole
        assert wanted != expected_texts(*demo_model, thinking, None, 40)


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ({"speculative_algorithm": "EAGLE"}, "drafts with positions .answer"),
        ({"pp_size": 2}, "pipeline ranks with positions"),
    ],
)
def test_where_a_rows_place_in_the_thinking_is_not_known(args, says, profiles, monkeypatch):
    settings = Settings.parse(configuration(profiles[0], positions="answer"))
    with pytest.raises(SettingsError, match=says):
        adapter._refuse(SimpleNamespace(**({"speculative_algorithm": None, "pp_size": 1} | args)), settings)


def test_the_server_says_which_profile_lifts_a_sink(server, lifting):
    """When a request first begins under it."""
    server.text(PROMPTS[0], "lifting", max_tokens=1)
    assert_the_sink_is_warned_of(server, lifting)


def retractions(server) -> float:
    return sum(value for key, value in server.metrics().items() if "num_retracted_requests_total" in key)


@pytest.mark.nightly
def test_a_thousand_mixed_requests_with_retractions_and_cancellations(server):
    """The server's checking mode compares every step's slots with the radix cache's key, and dies if they differ."""
    before = retractions(server)
    soak(server, 1000)
    assert retractions(server) > before
    assert server.client.get("/health").status_code == 200


def test_a_wrong_configuration_stops_the_server_before_it_listens(tmp_path):
    config = tmp_path / "config.json"
    config.write_text('{"profiles": {"a": "/nowhere.safetensors"}}')
    said = refusal(SERVER, AXISCAP_CONFIG=str(config), **CPU)
    assert "profile a cannot be read" in said
    axes = torch.nn.functional.normalize(torch.randn(1, 1, 64), dim=-1)
    CapProfile([2], axes, torch.zeros(1, 1)).save(tmp_path / "other.safetensors")
    config.write_text(json.dumps({"profiles": {"a": str(tmp_path / "other.safetensors")}}))
    said = refusal(SERVER, AXISCAP_CONFIG=str(config), **CPU)
    assert "axiscap: profile 'a' has hidden size 64, the model 576" in said
    assert "ready to roll" not in said


def test_profiles_come_move_and_go_while_others_run(server, profiles, demo_model):
    come_move_and_go(server, profiles, demo_model)


def test_a_profile_is_rolled_out_while_requests_run(server, profiles, demo_model):
    rolled_out(server, profiles, demo_model)


def test_profiles_come_move_and_go_without_a_server(profiles, demo_model, monkeypatch):
    """Through the collective_rpc of the engine's Engine.

    The last test here: an Engine's end takes all children of this process with it, and so the server.
    """
    folder, made = profiles
    (folder / "engine.json").write_text(json.dumps(configuration(folder, check=True)))
    monkeypatch.setenv("AXISCAP_CONFIG", str(folder / "engine.json"))
    monkeypatch.setenv("SGLANG_USE_CPU_ENGINE", "1")
    higher = made["mild"].with_floors(made["mild"].floors + 20)
    higher.save(folder / "higher.safetensors")
    moved = made["strict"].with_floors(made["strict"].floors + 5)
    (folder / "broken.safetensors").write_bytes(b"x")
    engine = sglang.Engine(
        model_path=models.folder(models.DEFAULT_MODEL), dtype="float32", device="cpu", context_length=1024,
        attention_backend="torch_native", sampling_backend="pytorch", disable_cuda_graph=True,
        max_total_tokens=4096, log_level="error",
    )  # fmt: skip
    try:

        def texts(name: str | None) -> list[str]:
            params = {"temperature": 0, "max_new_tokens": 16}
            choice = {} if name is None else {"custom_params": {"axiscap": name}}
            return [answer["text"] for answer in engine.generate(PROMPTS[:6], params | choice)]

        def wanted(profile: CapProfile) -> list[str]:
            return expected_texts(*demo_model, PROMPTS[:6], profile, 16)

        engine.collective_rpc("axiscap_load", name="higher", path=str(folder / "higher.safetensors"), allowed=True)
        assert texts("higher") == wanted(higher)
        engine.collective_rpc("axiscap_move_floors", name="strict", by=5.0)
        assert texts("strict") == wanted(moved)
        assert texts(None) == wanted(made["mild"])
        engine.collective_rpc("axiscap_retire", name="higher")
        with pytest.raises(Exception, match="axiscap must be one of"):
            texts("higher")
        for path in ("broken", "missing"):
            with pytest.raises(AssertionError):
                engine.collective_rpc("axiscap_load", name="bad", path=str(folder / f"{path}.safetensors"))
        with pytest.raises(AssertionError):
            engine.collective_rpc("axiscap_retire", name="mild")
        assert texts("strict") == wanted(moved)
    finally:
        engine.shutdown()
