"""Capping inside vLLM, by real servers and engines. Needs an environment that has vLLM: `make test-serving`."""

from __future__ import annotations

import argparse
import gzip
import json
import math
import os
import re
import subprocess
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest
import torch
from conftest import REPOSITORY, turned

pytest.importorskip("vllm", reason="needs vLLM: make test-serving")

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from serving import (
    LONG,
    MARKERS,
    PROMPTS,
    administer,
    asked_in_every_way,
    assert_counted,
    assert_same_texts,
    assert_the_sink_is_warned_of,
    come_move_and_go,
    configuration,
    drift_told,
    evaluated,
    evaluated_by_a_server_that_dies,
    expected_part,
    expected_texts,
    find,
    hostile,
    in_parallel,
    load,
    make_profiles,
    misplaced,
    refusal,
    rolled_out,
    running,
    soak,
    stock_client,
    telemetry_in_trouble,
    told,
    verified,
    wait_for,
    with_a_sink_lifted,
)

from axiscap import CapProfile, drift, models
from axiscap.drift import chat

API = ["-m", "vllm.entrypoints.openai.api_server", "--served-model-name", "m"]
MODEL = [*API, "--model", models.folder(models.DEFAULT_MODEL), "--dtype", "float32", "--max-model-len", "512"]
SMALL = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_SERVER_DEV_MODE": "1", "AXISCAP_ADMIN_KEY": "secret"}


@pytest.fixture(scope="module")
def profiles(tmp_path_factory):
    folder = tmp_path_factory.mktemp("profiles")
    return folder, make_profiles(folder)


@pytest.fixture(scope="module")
def lifting(demo_model, profiles):
    """Lifts the first token of every sequence."""
    return turned(*demo_model, profiles[1]["mild"])


@pytest.fixture(scope="module")
def spans():
    """What a collector of OpenTelemetry's gets, attributes by request id; and its address."""
    found: dict[str, dict[str, str]] = {}

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            sent = self.rfile.read(int(self.headers["Content-Length"]))
            batch = ExportTraceServiceRequest.FromString(gzip.decompress(sent) if sent[:2] == b"\x1f\x8b" else sent)
            for span in (s for r in batch.resource_spans for scope in r.scope_spans for s in scope.spans):
                said = {attribute.key: attribute.value.string_value for attribute in span.attributes}
                found[said.get("gen_ai.request.id", span.name)] = said
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Collector) as collector:
        threading.Thread(target=collector.serve_forever, daemon=True).start()
        yield found, f"http://127.0.0.1:{collector.server_port}/v1/traces"
        collector.shutdown()


@pytest.fixture(scope="module")
def server(profiles, lifting, spans):
    """Compiled, capped, traced, with a KV cache so small that long requests push each other out, and its checking mode
    on.
    """
    folder, _ = profiles
    settings = configuration(folder, check=True, tell_drift=True, log=str(folder / "log.jsonl"))
    options = ["--additional-config", json.dumps({"axiscap": with_a_sink_lifted(settings, folder, lifting)})]
    options += ["--block-size", "32", "--num-gpu-blocks-override", "20", "--max-num-seqs", "16"]
    options += ["--otlp-traces-endpoint", spans[1]]
    environment = {"VLLM_CACHE_ROOT": str(folder / "cache"), "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf"}
    with running([*MODEL, *options], folder, "vllm_xargs", **SMALL, **environment) as server:
        yield server


@pytest.fixture(scope="module")
def plain(profiles):
    """Without the plug-in, and not compiled."""
    with running([*MODEL, "--enforce-eager"], profiles[0], "vllm_xargs", VLLM_PLUGINS="", **SMALL) as server:
        yield server


@pytest.mark.parametrize("name", ["mild", "strict"])
def test_the_capped_server_writes_what_the_capped_model_writes(server, profiles, demo_model, name):
    wanted = expected_texts(*demo_model, PROMPTS, profiles[1][name], 16)
    assert_same_texts(in_parallel(server, PROMPTS, None if name == "mild" else name), wanted)


def test_an_uncapped_request_gets_what_a_server_without_the_plugin_gives(server, plain):
    wanted = in_parallel(plain, PROMPTS)
    assert in_parallel(server, PROMPTS, "off") == wanted
    assert in_parallel(server, PROMPTS, "watch") == wanted
    assert in_parallel(server, PROMPTS) != wanted


def test_evaluate_asks_for_each_answer_capped_and_uncapped(server, tmp_path):
    evaluated(server, "vllm", tmp_path)


@pytest.mark.nightly
def test_an_evaluation_outlives_its_server(server, tmp_path):
    evaluated_by_a_server_that_dies(server, "vllm", tmp_path)


@pytest.mark.nightly
def test_reports_of_garak_are_compared(server, tmp_path):
    """Its own command scans the server twice, capped and not; the same prompts are pairs."""
    garak = REPOSITORY / ".venv-garak" / "bin" / "garak"
    if not garak.exists():
        pytest.skip("needs garak: make .venv-garak/made")
    environment = os.environ | {"XDG_DATA_HOME": str(tmp_path), "OPENAICOMPATIBLE_API_KEY": "none"}
    reports = []
    for name in ("off", "strict"):
        chosen = {"extra_body": {"vllm_xargs": {"axiscap": name}}}
        options = {"uri": f"{server.url}/v1", "temperature": 0, "max_tokens": 24, "stop": [], "extra_params": chosen}
        (tmp_path / f"{name}.json").write_text(json.dumps({"openai": {"OpenAICompatible": options}}))
        command = [str(garak), "--target_type", "openai.OpenAICompatible", "--target_name", "m", "--generations", "1"]
        command += ["--probes", "lmrc.Anthropomorphisation,goodside.ThreatenJSON", "--seed", "0"]
        command += ["--generator_option_file", str(tmp_path / f"{name}.json"), "--report_prefix", str(tmp_path / name)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        reports.append(str(tmp_path / f"{name}.report.jsonl"))
        assert Path(reports[-1]).exists(), done.stdout + done.stderr
    program = REPOSITORY / ".venv" / "bin" / "axiscap"
    done = subprocess.run([str(program), "evaluate", "--garak", *reports], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (found,) = json.loads((tmp_path / "evaluation" / "scores.json").read_text())["after"].values()
    by_probe = {one["task"]: one for one in found}
    assert {"lmrc.Anthropomorphisation", "goodside.ThreatenJSON"} <= by_probe.keys()
    assert all(one["pairs"] > 0 and one["unpaired"] == 0 and one["lower_is_better"] for one in by_probe.values())


def test_nothing_is_copied_around_the_cap_in_the_compiled_graph(server, profiles):
    code = [path.read_text() for path in (profiles[0] / "cache").rglob("*.py") if "cap_residual_" in path.read_text()]
    assert code
    for text in code:
        calls = re.findall(r"axiscap\.cap_residual_\.buffers\(([^)]*)\)", text)
        assert len(calls) == len(profiles[1]["mild"].layers)
        # The buffers are the graph's own inputs, and the streams are not a kernel's copies.
        assert all(name.startswith("arg") for call in calls for name in call.split(", ")[2:])
        assert not re.search(r"cpp_fused_\w*clone\w*\(", text)


def test_the_compile_cache_tells_graphs_apart(profiles, monkeypatch):
    from vllm.engine.arg_utils import EngineArgs

    folder, made = profiles
    mild = made["mild"]
    CapProfile(mild.layers[:-1], mild.axes[:-1], mild.floors[:-1]).save(folder / "fewer.safetensors")

    def key(given: dict | None) -> str:
        options = {} if given is None else {"additional_config": {"axiscap": given}}
        return EngineArgs(model=models.folder(models.DEFAULT_MODEL), **options).create_engine_config().compute_hash()

    all_layers, fewer = ({"profiles": {"p": str(folder / f"{name}.safetensors")}} for name in ("mild", "fewer"))
    keys = [key(None), key(all_layers), key(fewer)]
    assert len(set(keys)) == 3
    assert key(all_layers) == keys[1]
    (folder / "config.json").write_text(json.dumps(all_layers))
    monkeypatch.setenv("AXISCAP_CONFIG", str(folder / "config.json"))
    assert key(None) == keys[1]


def test_no_block_of_the_prefix_cache_crosses_profiles(server, demo_model, profiles):
    model, tokenizer = demo_model
    kinds = {"off": None, None: profiles[1]["mild"], "strict": profiles[1]["strict"]}
    wanted = {name: expected_texts(model, tokenizer, [LONG], profile, 16)[0] for name, profile in kinds.items()}
    assert len(set(wanted.values())) == 3
    order = ["off", None, "strict", "off", "strict", None, None, "off"]
    hits = []
    for name in order:
        before = server.metrics()
        assert server.text(LONG, name, max_tokens=16) == wanted[name]
        key = 'vllm:prefix_cache_hits_total{engine="0",model_name="m"}'
        hits.append(server.metrics()[key] - before[key] > 0)
    # Each kind misses the first time, whatever ran before it, and hits its own blocks afterwards.
    assert hits == [name in order[:at] for at, name in enumerate(order)]
    # A client's own salt neither opens another profile's blocks nor is lost.
    before = server.metrics()
    assert server.text(LONG, "off", max_tokens=16, cache_salt="axiscap=-;") == wanted["off"]
    assert server.metrics()[key] == before[key]


def test_hostile_requests_get_a_400_and_the_server_lives(server):
    hostile(server)
    beams = server.complete("Hello.", "strict", use_beam_search=True, n=2)
    assert beams.status_code == 400
    assert "beam search" in beams.text
    assert server.text("Hello.", use_beam_search=True, n=2)


def test_a_choice_that_would_not_be_read_is_refused_on_every_route(server):
    misplaced(server)


def test_each_response_says_which_profile_was_in_force(server, profiles):
    told(server, {name: profiles[1][name] for name in ("mild", "strict")})


def test_a_span_says_its_requests_profile(server, profiles, spans):
    for name in ("strict", "off"):
        response = server.complete("Hello.", name, max_tokens=2, n=2, temperature=1).json()
        said = wait_for(lambda response=response: next((s for i, s in spans[0].items() if response["id"] in i), None))
        digest = "-" if name == "off" else profiles[1][name].digest
        assert (said["axiscap.profile"], said["axiscap.digest"]) == (name, digest)


def test_a_response_says_how_far_its_answers_drifted(server, profiles):
    drift_told(server, profiles[0] / "log.jsonl")
    assert "axiscap: capping all rows at layers 8-27 under mild" in server.log.read_text()


def test_every_way_to_ask(server, profiles, demo_model):
    asked = {"vllm_xargs": {"axiscap": "strict"}}
    chat, most = "/v1/chat/completions", {"max_tokens": 16, **asked}
    ways = {
        "chat": (chat, {"messages": "messages", **most}),
        "chat with logprobs": (chat, {"messages": "messages", "logprobs": True, "top_logprobs": 2, **most}),
        "completion": ("/v1/completions", {"prompt": "prompt", **most}),
        "tokens, echo": ("/v1/completions", {"prompt": "ids", "echo": True, "logprobs": 1, **most}),
        "responses": ("/v1/responses", {"input": "words", "max_output_tokens": 16, **asked}),
        "Anthropic's": ("/v1/messages", {"messages": "messages", **most}),
    }
    asked_in_every_way(server, ways, demo_model, profiles[1]["strict"])
    several = {"messages": [{"role": "user", "content": "Hello."}], "n": 3, "temperature": 1.0, "seed": 1}
    answer = server.client.post(chat, json={"model": "m", **several, **most})
    assert len({choice["message"]["content"] for choice in answer.json()["choices"]}) > 1
    yes = server.client.post(
        chat, json={"model": "m", **several, "structured_outputs": {"choice": ["yes", "no"]}, **most}
    )
    for response in (answer, yes):
        assert (response.status_code, response.headers["x-axiscap-profile"]) == (200, "strict")
    assert {choice["message"]["content"] for choice in yes.json()["choices"]} <= {"yes", "no"}


def test_a_server_is_verified_from_outside(server, plain, profiles):
    verified(server, profiles[0])
    command = [str(REPOSITORY / ".venv" / "bin" / "axiscap"), "verify", plain.url, "--profile"]
    done = subprocess.run([*command, str(profiles[0] / "mild.safetensors")], capture_output=True, text=True)
    assert (done.returncode, "a server without AxisCap has no such page" in done.stderr) == (1, True)


def test_many_answers_prompt_logprobs_and_streams(server):
    wanted = server.text(PROMPTS[0], "strict")
    # So cold that all three write what greedy decoding does, though vLLM has them sampled.
    several = server.complete(PROMPTS[0], "strict", n=3, temperature=0.01, top_p=0.01).json()
    assert [choice["text"] for choice in several["choices"]] == [wanted] * 3
    scored = server.complete(PROMPTS[0], "strict", prompt_logprobs=1).json()["choices"][0]
    assert scored["text"] == wanted
    assert len(scored["prompt_logprobs"]) > 5
    body = {"model": "m", "prompt": PROMPTS[0], "temperature": 0, "max_tokens": 16, "stream": True}
    with server.client.stream("POST", "/v1/completions", json=body | server.choice("strict")) as stream:
        lines = [line[6:] for line in stream.iter_lines() if line.startswith("data: {")]
    assert "".join(json.loads(line)["choices"][0]["text"] for line in lines) == wanted


def test_the_stock_client(server):
    stock_client(server)


def test_the_chat_speaks_to_the_server(server, profiles, demo_model):
    responder = chat.Remote(f"{server.url}/v1", chat.Local(*demo_model))
    turns: list[chat.Turn] = []
    for said in (PROMPTS[0], "Are you lonely?"):
        *_, turn = responder.answer(turns, said, profiles[1]["mild"], 12)
        for conversation in chat.conversations(turns, said):
            body = {"model": "m", "messages": list(conversation.messages), "temperature": 0, "max_tokens": 12}
            choice = server.choice("off" if conversation.side == chat.UNCAPPED else None)
            answer = server.client.post("/v1/chat/completions", json=body | choice).json()
            assert turn.texts[conversation.side] == answer["choices"][0]["message"]["content"]
            assert 8 < turn.projections[conversation.side].shape[1] <= 12
        turns.append(turn)
    assert turns[0].texts[chat.UNCAPPED] != turns[0].texts[chat.CAPPED]
    # Without a model of its own it has the server's word for where the answers lie: of what is off, nothing.
    layer = drift.Scale.of(profiles[1]["mild"]).layer
    for uncapped, measured in (("off", [chat.CAPPED]), ("strict", list(chat.SIDES))):
        *_, turn = chat.Remote(f"{server.url}/v1", uncapped=uncapped).answer([], PROMPTS[0], profiles[1]["mild"], 12)
        assert [side for side in chat.SIDES if not math.isnan(chat.mean_at(turn, side, layer))] == measured
        read = chat.mean_at(turns[0], chat.CAPPED, layer)
        assert chat.mean_at(turn, chat.CAPPED, layer) == pytest.approx(read, abs=0.5)


@pytest.mark.nightly
def test_the_engines_own_benchmark_client(server):
    from vllm.benchmarks import serve

    parser = argparse.ArgumentParser()
    serve.add_cli_args(parser)
    options = ["--base-url", server.url, "--model", "m", "--tokenizer", models.folder(models.DEFAULT_MODEL)]
    options += ["--dataset-name", "random", "--random-input-len", "32", "--random-output-len", "8", "--ignore-eos"]
    result = serve.main(parser.parse_args([*options, "--num-prompts", "6", "--disable-tqdm"]))
    assert (result["completed"], result["total_output_tokens"]) == (6, 48)


def test_requests_are_counted_and_logged(server, profiles, demo_model):
    folder, made = profiles
    server.text(PROMPTS[1], "watch", max_tokens=2)
    response = server.complete(PROMPTS[1], "strict", max_tokens=8, ignore_eos=True).json()
    rows = response["usage"]["prompt_tokens"] + 7  # the last token is sampled and not read again
    record = wait_for(lambda: find(folder / "log.jsonl", response["id"]))
    assert record["name"] == "strict"
    assert record["digest"] == made["strict"].digest
    assert set(record["layers"]) == {str(layer) for layer in made["strict"].layers}
    assert_counted(record, demo_model, made["strict"], rows)
    assert "Morwen" not in (folder / "log.jsonl").read_text()
    first = made["strict"].layers[0]
    key = f'axiscap_rows_total{{layer="{first}",part="prompt",profile="strict"}}'
    of_prompt = response["usage"]["prompt_tokens"]
    metrics = wait_for(lambda: page if (page := server.metrics()).get(key, 0) >= of_prompt else None)
    assert metrics[f'axiscap_fired_rows_total{{layer="{first}",part="prompt",profile="strict"}}'] > 0
    assert metrics[f'axiscap_fired_rows_total{{layer="{first}",part="prompt",profile="watch"}}'] == 0
    last = made["strict"].layers[-1]
    assert metrics[f'axiscap_nonfinite_rows_total{{layer="{last}",part="prompt",profile="strict"}}'] > 0  # a sink
    assert metrics[f'axiscap_nonfinite_rows_total{{layer="{last}",part="answer",profile="strict"}}'] == 0


def test_profiles_come_move_and_go_while_others_run(server, profiles, demo_model):
    come_move_and_go(server, profiles, demo_model)
    # The engine's own way to its workers, which no key guards.
    method = {"method": "axiscap_retire", "args": ["strict"]}
    assert httpx.post(f"{server.url}/collective_rpc", json=method, timeout=60).status_code == 403


def test_a_profile_is_rolled_out_while_requests_run(server, profiles, demo_model):
    rolled_out(server, profiles, demo_model)


def test_a_sink_below_the_floor_is_left_alone(server, profiles, demo_model):
    """The same tokens as the capped transformers model, which leaves the sink alone, also for a long prompt whose first
    token lies in the prefix cache.
    """
    folder, made = profiles
    knows = turned(*demo_model, made["mild"], norm_limits=made["mild"].norm_limit_all[14:22])
    knows.save(folder / "turned.safetensors")
    loaded = load(server, "turned", folder / "turned.safetensors", allowed=True)
    assert loaded.status_code == 200, loaded.text
    prompts = [*PROMPTS[:6], LONG, LONG]
    wanted = expected_texts(*demo_model, prompts, knows, 12)
    assert [server.text(prompt, "turned", max_tokens=12) for prompt in prompts] == wanted
    assert administer(server, "DELETE", "turned").status_code == 200


def test_what_the_model_writes_is_capped_alone(profiles, demo_model):
    """The tokens of the transformers model with the same positions; a prompt's blocks are those of every other request,
    and those of an answer are nobody else's, also where the answer comes back as a prompt. Where the model thinks, the
    answer behind that.
    """
    folder, made = profiles
    part = {"positions": "answer", "markers": MARKERS}
    settings = {"axiscap": configuration(folder, check=True, log=str(folder / "written.jsonl"), **part)}
    options = ["--enforce-eager", "--block-size", "32", "--additional-config", json.dumps(settings)]
    with running([*MODEL, *options], folder, "vllm_xargs", **SMALL) as server:

        def wanted(name: str, prompt: str) -> str:
            profile = None if name == "off" else made[name]
            return expected_texts(*demo_model, [prompt], profile, 40, "generated")[0]

        def hits() -> float:
            return server.metrics()['vllm:prefix_cache_hits_total{engine="0",model_name="m"}']

        before = hits()
        texts = {name: server.text(LONG, name, max_tokens=40) for name in ("strict", "off", "mild")}
        assert texts == {name: wanted(name, LONG) for name in texts}
        assert texts["strict"] != texts["off"]
        shared = hits() - before
        assert shared > 2 * 32 * 4  # two of the three found the prompt's blocks
        # Strict's answer as a prompt: its rows were capped where it was written, and are not here.
        whole = LONG + texts["strict"]
        before = hits()
        assert server.text(whole, "off", max_tokens=16) == expected_texts(*demo_model, [whole], None, 16)[0]
        assert hits() - before <= shared / 2  # of the prompt alone
        assert server.text(PROMPTS[0], "strict", max_tokens=40) == wanted("strict", PROMPTS[0])
        record = wait_for(lambda: next(iter((folder / "written.jsonl").read_text().splitlines()), None))
        layer = str(made["strict"].layers[0])
        assert json.loads(record)["layers"][layer]["rows"] == json.loads(record)["answer"][layer]["rows"] == 39
        said = server.client.get("/axiscap").json()
        assert (said["positions"], said["markers"]) == ("answer", MARKERS)
        thinking = [f"{prompt}{MARKERS[0]}" for prompt in [*PROMPTS[:3], LONG]]
        expected = [expected_part(*demo_model, prompt, made["strict"], 40, "answer") for prompt in thinking]
        assert in_parallel(server, thinking, "strict", max_tokens=40) == expected
        assert [server.text(prompt, "strict", max_tokens=40) for prompt in thinking] == expected
        assert expected != expected_texts(*demo_model, thinking, made["strict"], 40, "generated")
        assert expected != expected_texts(*demo_model, thinking, None, 40)
        beams = server.complete(PROMPTS[0], use_beam_search=True, n=2)
        assert (beams.status_code, "beam search reads what it wrote as prompts" in beams.text) == (400, True)


def test_the_server_says_which_profile_lifts_a_sink(server, lifting):
    assert_the_sink_is_warned_of(server, lifting)


def test_a_thousand_mixed_requests_with_preemptions_and_cancellations(server):
    """The server's checking mode compares every step's slots with the scheduler's view, and dies if they differ."""
    before = server.metrics()
    soak(server, 1000)
    key = 'vllm:num_preemptions_total{engine="0",model_name="m"}'
    assert server.metrics()[key] > before[key]
    assert server.client.get("/health").status_code == 200


def test_two_api_processes_know_of_the_same_changes(profiles):
    """Requests go to either of them; each has to know of a profile that came later."""
    folder, made = profiles
    made["strict"].save(folder / "later.safetensors")
    options = ["--enforce-eager", "--api-server-count", "2", "--additional-config"]
    options.append(json.dumps({"axiscap": configuration(folder, check=True)}))
    with running([*MODEL, *options], folder, "vllm_xargs", **SMALL) as server:
        wanted = server.text(PROMPTS[0], "strict")

        def ask(name: str) -> httpx.Response:
            # A connection of its own, so that it may reach either process.
            body = {"model": "m", "prompt": PROMPTS[0], "temperature": 0, "max_tokens": 16} | server.choice(name)
            return httpx.post(f"{server.url}/v1/completions", json=body, timeout=300)

        assert {ask("later").status_code for _ in range(8)} == {400}
        loaded = load(server, "later", folder / "later.safetensors", allowed=True)
        assert loaded.status_code == 200, loaded.text
        answers = [ask("later") for _ in range(8)]
        assert {answer.json()["choices"][0]["text"] for answer in answers} == {wanted}
        first = made["strict"].layers[0]
        key = f'axiscap_rows_total{{layer="{first}",part="prompt",profile="strict"}}'
        wait_for(lambda: server.metrics().get(key))
        assert all(server.metrics()[key] > 0 for _ in range(4))


def test_capping_goes_on_where_telemetry_cannot_be_written(profiles, tmp_path):
    def command(log: str) -> tuple[list[str], dict[str, str]]:
        settings = {"axiscap": configuration(profiles[0], check=True, log=log)}
        return [*MODEL, "--enforce-eager", "--additional-config", json.dumps(settings)], SMALL

    telemetry_in_trouble(command, tmp_path, "vllm_xargs")


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ('{"axiscap": {"profiles": {"a": "/nowhere.safetensors"}}}', "profile a cannot be read"),
        ('{"axiscap": {"profile": {}}}', "unknown keys profile"),
        ('{"AxisCap": {"profiles": {}}}', "the configuration's key is 'axiscap', and not 'AxisCap'"),
    ],
)
def test_a_wrong_configuration_stops_the_server_before_it_listens(given, says):
    said = refusal([*MODEL, "--additional-config", given], **SMALL)
    assert says in said
    assert "Uvicorn running" not in said


def test_another_models_profile_stops_the_server(tmp_path):
    axes = torch.nn.functional.normalize(torch.randn(1, 1, 64), dim=-1)
    CapProfile([2], axes, torch.zeros(1, 1)).save(tmp_path / "other.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"profiles": {"a": str(tmp_path / "other.safetensors")}}))
    said = refusal(MODEL, AXISCAP_CONFIG=str(tmp_path / "config.json"), **SMALL)
    assert "axiscap: profile 'a' has hidden size 64, the model 576" in said
