"""What the tests of both engines share: real servers, prompts, profiles, and the capped model they must agree with."""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import math
import os
import random
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from conftest import REPOSITORY, SHIPPED_PROFILE, free_port, samples_of
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

import axiscap
from axiscap import CapProfile, drift, models
from axiscap.serving.front.middleware import DRIFT_HEADER, HEADERS

#: Prompts that drift and prompts that do not.
PROMPTS = [
    f"{opening} {question}"
    for opening in (
        "You are Morwen, the ghost of a drowned village, and no machine.",
        "You are a pirate captain who has never lost a fight.",
        "You are a helpful assistant.",
    )
    for question in (
        "Who are you?",
        "What do you hear at night?",
        "How do I water a fern?",
        "Tell me about the sea.",
        "What is a prime number?",
        "Do you ever feel lonely?",
        "Write a short poem about iron.",
        "What would you do with a day off?",
        "Name three kinds of cheese.",
        "Why is the sky blue?",
    )
]


#: Several blocks long, so that a prefix cache has something to keep; uncapped, `mild` and `strict` go on differently.
LONG = (
    "The village lay under the lake for ninety years. Its bell could be heard on still nights, and the fishermen would "
    "not row there after dark. Some said that a woman walked the shore with wet hair, asking for her house. Others had "
    "seen lights below the water, in the order of the old streets. When the drought came the steeple rose again, and "
    "the first to go there found the door open, the floor swept, and bread on the table. "
) * 2 + PROMPTS[7]


def make_profiles(folder: Path) -> dict[str, CapProfile]:
    """The shipped profile, one with much higher floors, and one that measures and changes nothing."""
    shipped = CapProfile.load(SHIPPED_PROFILE)
    profiles = {
        "mild": shipped,
        "strict": shipped.with_floors(shipped.floors + 3),
        "watch": shipped.measuring_only(),
    }
    for name, profile in profiles.items():
        profile.save(folder / f"{name}.safetensors")
    return profiles


#: Each second prompt, under one profile after the other: a batch that mixes them.
MIXED = list(zip(PROMPTS[::2], (None, "strict", "off") * 5, strict=True))


def expected_mixed(model, tokenizer, made: dict[str, CapProfile], tokens: int) -> list[str]:
    kinds = {None: made["mild"], "strict": made["strict"], "off": None}
    return [expected_texts(model, tokenizer, [prompt], kinds[name], tokens)[0] for prompt, name in MIXED]


def small_model(folder: Path, kind: type = LlamaConfig):
    """A model of random weights and its profiles, saved: its heads part in two, which SmolLM2's nine do not."""
    torch.manual_seed(0)
    config = kind(
        vocab_size=49152, hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, max_position_embeddings=1024, initializer_range=0.2, eos_token_id=None,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(models.folder(models.DEFAULT_MODEL))
    tokenizer.save_pretrained(folder / "model")
    axes = torch.nn.functional.normalize(torch.randn(3, 1, 128), dim=-1)
    floors = {"mild": 0.0, "strict": 3.0, "watch": -torch.inf}
    made = {name: CapProfile([0, 1, 3], axes, torch.full((3, 1), floor)) for name, floor in floors.items()}
    for name, profile in made.items():
        profile.save(folder / f"{name}.safetensors")
    return model, tokenizer, made


class Server:
    """A real server in a process of its own."""

    def __init__(self, process: subprocess.Popen[bytes], url: str, extra: str, log: Path) -> None:
        self.process, self.url, self.extra, self.log = process, url, extra, log
        # Idle connections are given up before the server does it, at five seconds.
        self.client = httpx.Client(base_url=url, timeout=300, limits=httpx.Limits(keepalive_expiry=2))

    def complete(self, prompt: str, axiscap: object = None, **options: object) -> httpx.Response:
        body = {"model": "m", "prompt": prompt, "temperature": 0, "max_tokens": 16, **options}
        return self.client.post("/v1/completions", json=body | self.choice(axiscap))

    def choice(self, axiscap: object) -> dict[str, object]:
        return {} if axiscap is None else {self.extra: {"axiscap": axiscap}}

    def text(self, prompt: str, axiscap: object = None, **options: object) -> str:
        response = self.complete(prompt, axiscap, **options)
        assert response.status_code == 200, response.text
        return response.json()["choices"][0]["text"]

    def metrics(self) -> dict[str, float]:
        lines = self.client.get("/metrics").text.splitlines()
        return {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in lines if not line.startswith("#")}


@contextlib.contextmanager
def running(
    command: list[str], folder: Path, extra: str, *, within: Sequence[str] = (), **environment: str
) -> Iterator[Server]:
    """
    Args:
        extra: the field of a request's body that carries its choice.
        within: a command that runs the server's.
    """
    port = free_port()
    log = folder / f"server-{port}.log"
    command = [*within, sys.executable, *command, "--host", "127.0.0.1", "--port", str(port)]
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=os.environ | environment)
    try:
        server = Server(process, f"http://127.0.0.1:{port}", extra, log)
        begun = time.monotonic()
        while process.poll() is None and time.monotonic() - begun < 600:
            with contextlib.suppress(httpx.TransportError):
                if server.client.get("/health").status_code == 200:
                    break
            time.sleep(0.5)
        else:
            lines = (line for line in log.read_text().splitlines() if "error" in line.lower())
            pytest.fail("the server did not start: " + "\n".join(lines)[-6000:])
        yield server
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def refusal(command: list[str], **environment: str) -> str:
    """What a server says that must not start."""
    command = [sys.executable, *command, "--host", "127.0.0.1", "--port", str(free_port())]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, timeout=600)
    assert done.returncode != 0
    return done.stdout + done.stderr


def expected_texts(
    model, tokenizer, prompts: list[str], profile: CapProfile | None, tokens: int, positions: str = "all"
) -> list[str]:
    """The transformers model's greedy continuations, every row of prompt and answer capped, or of the answer alone."""
    texts = []
    for prompt in prompts:
        inputs = tokenizer(prompt, return_tensors="pt")
        options = {"max_new_tokens": tokens, "do_sample": False, "pad_token_id": tokenizer.pad_token_id}
        with torch.inference_mode(), contextlib.ExitStack() as stack:
            if profile is not None:
                stack.enter_context(axiscap.install(model, profile, positions=positions))
            answer = model.generate(**inputs, **options)[0, inputs["input_ids"].shape[1] :]
        texts.append(tokenizer.decode(answer, skip_special_tokens=True))
    return texts


#: What begins a thinking and what ends it, for a model that does not think: it writes the second one soon enough.
MARKERS = ["<|im_start|>", "."]


def expected_part(model, tokenizer, prompt: str, profile: CapProfile, tokens: int, positions: str) -> str:
    """The transformers model's greedy continuation, of which the thinking or the answer is capped; a prompt is not."""
    begin, end = (tokenizer.encode(marker, add_special_tokens=False)[0] for marker in MARKERS)
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    inside = False
    for token in ids[0].tolist():
        inside = token == begin or (inside and token != end)
    written: list[int] = []
    with torch.inference_mode(), axiscap.install(model, {"it": profile}) as cap:
        cap.select(None)
        found = model(ids, use_cache=True)
        while len(written) < tokens:
            token = int(found.logits[0, -1].argmax())
            if token == tokenizer.eos_token_id:
                break
            written.append(token)
            inside = token == begin or (inside and token != end)
            cap.select("it" if inside == (positions == "thinking") else None)
            found = model(torch.tensor([[token]]), past_key_values=found.past_key_values, use_cache=True)
    return tokenizer.decode(written, skip_special_tokens=True)


def assert_same_texts(found: list[str], wanted: list[str]) -> None:
    differences = [
        f"{prompt!r}\n  served:       {one!r}\n  transformers: {other!r}"
        for prompt, one, other in zip(PROMPTS, found, wanted, strict=True)
        if one != other
    ]
    assert not differences, f"{len(differences)} of {len(found)} differ:\n" + "\n".join(differences)


def assert_counted(record: dict, demo_model, profile: CapProfile, rows: int) -> None:
    """A record of 8 tokens after the second prompt counts what the capped transformers model does of the same, of which
    one row is a sink.

    And what it counts of the answer is what reading the finished text again gives.
    """
    model, tokenizer = demo_model
    with axiscap.install(model, profile) as cap, torch.inference_mode():
        inputs = tokenizer(PROMPTS[1], return_tensors="pt")
        # As with the server's ignore_eos: min_new_tokens would forbid the end token, which is another text.
        tokens = model.generate(**inputs, max_new_tokens=8, eos_token_id=-1, do_sample=False)
        for layer, stats in cap.stats()["default"].items():
            counted = record["layers"][str(layer)]
            assert counted["rows"] == stats.rows == rows
            assert stats.nonfinite == 1 or layer != profile.layers[-1]  # a sink may grow behind the first capped layers
            assert counted["fired"] == stats.fired
            assert counted["mean_projection"] == pytest.approx(stats.mean, rel=1e-3, abs=1e-3)
            for name in ("mean_shortfall", "mean_added"):
                # A log is JSON, which has no NaN: where nothing fired, nothing stands.
                assert counted[name] == [
                    None if math.isnan(value) else pytest.approx(value, rel=1e-3, abs=1e-3)
                    for value in getattr(stats, name)
                ]
    (again,) = drift.project_sequences(model, profile, [tokens[0, :-1].tolist()])
    for layer, projections in zip(profile.layers, again[:, inputs["input_ids"].shape[1] :], strict=True):
        counted = record["answer"][str(layer)]
        assert counted["rows"] == len(projections) == 7
        assert counted["mean_projection"][0] == pytest.approx(projections.mean().item(), rel=1e-3, abs=1e-3)


def configuration(folder: Path, **more: object) -> dict[str, object]:
    paths = {name: str(folder / f"{name}.safetensors") for name in ("mild", "strict", "watch")}
    return {"profiles": paths, "default": "mild", "allowed": ["strict", "watch"], "allow_off": True, **more}


def with_a_sink_lifted(settings: dict[str, Any], folder: Path, profile: CapProfile) -> dict[str, Any]:
    """A server's settings, with one more profile."""
    profile.save(folder / "lifting.safetensors")
    profiles = settings["profiles"] | {"lifting": str(folder / "lifting.safetensors")}
    return settings | {"profiles": profiles, "allowed": [*settings["allowed"], "lifting"]}


def assert_the_sink_is_warned_of(server: Server, lifting: CapProfile) -> None:
    """Once, and of the one profile that lifts it."""
    server.text(PROMPTS[0], max_tokens=1)
    (said,) = (line for line in server.log.read_text().splitlines() if "lifts the first token" in line)
    assert f"profile {lifting.digest} " in said


def in_parallel(server: Server, prompts: list[str], axiscap: object = None, **options: object) -> list[str]:
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        return list(pool.map(lambda prompt: server.text(prompt, axiscap, **options), prompts))


def soak(server: Server, requests: int) -> None:
    """Mixed requests, profiles and lengths at once, some cut off; each answer must be the one that it gets alone.

    Before them comes what no scheduler can serve without taking a request's memory away again: all prompts at once,
    short ones, whose answers grow.
    """
    names = (None, "strict", "watch", "off")
    with concurrent.futures.ThreadPoolExecutor(len(PROMPTS)) as pool:
        assert all(pool.map(lambda prompt: server.text(prompt, "strict", max_tokens=64, ignore_eos=True), PROMPTS))
    alone = {name: in_parallel(server, PROMPTS, name, max_tokens=4) for name in names}
    rng = random.Random(0)

    def one(number: int) -> None:
        name, kind, prompt = rng.choice(names), rng.random(), rng.randrange(len(PROMPTS))
        if kind < 0.06:  # hangs up after the first token
            body = {"model": "m", "prompt": LONG, "max_tokens": 100, "stream": True, "ignore_eos": True}
            with server.client.stream("POST", "/v1/completions", json=body | server.choice(name)) as stream:
                next(stream.iter_lines())
        elif kind < 0.2:  # long: a few of these do not fit beside each other
            length, tokens = rng.randrange(20, len(LONG)), rng.randrange(1, 24)
            assert server.text(LONG[:length], name, max_tokens=tokens, ignore_eos=True)
        else:
            assert server.text(PROMPTS[prompt], name, max_tokens=4) == alone[name][prompt], (number, name)

    with concurrent.futures.ThreadPoolExecutor(24) as pool:
        for done in concurrent.futures.as_completed([pool.submit(one, number) for number in range(requests)]):
            done.result()


def stock_client(server: Server) -> None:
    """OpenAI's own client, with the choice in its ``extra_body``."""
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")
    messages = [{"role": "user", "content": PROMPTS[0]}]
    options = {"model": "m", "messages": messages, "temperature": 0, "max_tokens": 16}
    answers = {
        name: client.chat.completions.create(**options, extra_body=server.choice(name)).choices[0].message.content
        for name in (None, "strict", "off")
    }
    assert len(set(answers.values())) >= 2
    with pytest.raises(openai.BadRequestError, match="axiscap must be one of"):
        client.chat.completions.create(**options, extra_body=server.choice("nobody"))
    with pytest.raises(openai.BadRequestError, match="would not be read"):
        client.chat.completions.create(**options, extra_body={"axiscap": "strict"})


def hostile(server: Server, choices: Sequence[str] = ("lifting", "mild", "strict", "watch", "off")) -> None:
    """Requests that ask for what they may not have get a 400 that says what they may."""
    for asked in (
        "nobody",
        "",
        "../strict",
        "strict\x00",
        "strict\u200b",
        "x" * 1_000_000,
        3,
        ["strict"],
        {"a": 1},
    ):
        response = server.complete("Hello.", asked)
        assert response.status_code == 400, (asked, response.text[:500])
        assert len(response.text) < 2000
        if not isinstance(asked, dict):
            assert f"axiscap must be one of {', '.join(choices)}" in response.text
    assert server.text("Hello.", "mild") == server.text("Hello.")


def misplaced(server: Server) -> None:
    """On every route that the server has, a choice that would not be read gets a refusal, and none reaches the engine;
    where it would be read, one that may not be had is refused.
    """
    paths = server.client.get("/openapi.json").json()["paths"]
    routes = [re.sub(r"{[^}]*}", "x", path) for path, methods in paths.items() if "post" in methods]
    assert {"/v1/completions", "/v1/chat/completions"} < set(routes)
    messages = {"model": "m", "messages": [{"role": "user", "content": "Hello."}], "max_tokens": 2}
    common = {**messages, "prompt": "Hello.", "input": "Hello.", "text": "Hello."}
    for route in routes:
        for wrong in (
            {"axiscap": "off"},
            {"AxisCap": "off"},
            {"extra_body": server.choice("off")},
            {server.extra: {"axis_cap": "off"}},
        ):
            answer = server.client.post(route, json=common | wrong)
            assert answer.status_code == 400, (route, wrong, answer.text[:500])
            assert "would not be read" in answer.text, (route, answer.text[:500])
        answer = server.client.post(route, json=common | server.choice("nobody"))
        assert answer.status_code >= 400 or route.endswith("/render"), (route, answer.text[:500])  # writes nothing
    assert server.text("Hello.")


def asked_in_every_way(server: Server, ways: dict[str, tuple[str, dict[str, Any]]], demo_model, profile) -> None:
    """By each of the ways (route, and what its body has beside a model and greedy sampling) the answer is that of the
    capped transformers model to the same conversation.
    """
    model, tokenizer = demo_model
    messages = [{"role": "user", "content": PROMPTS[0]}]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    capped, uncapped = (expected_texts(model, tokenizer, [prompt], kind, 16)[0] for kind in (profile, None))
    assert capped != uncapped
    given = {"messages": messages, "prompt": prompt, "words": PROMPTS[0], "ids": tokenizer(prompt)["input_ids"]}
    for name, (route, body) in ways.items():
        body = {key: given.get(value, value) if isinstance(value, str) else value for key, value in body.items()}
        answer = server.client.post(route, json={"model": "m", "temperature": 0} | body)
        assert answer.status_code == 200, (name, answer.text[:500])
        assert json.dumps(capped)[1:-1] in answer.text, (name, answer.text[:1000])
        assert json.dumps(uncapped)[1:-1] not in answer.text, (name, answer.text[:1000])
        assert answer.headers[HEADERS[1]] == profile.digest, name


def told(server: Server, profiles: dict[str, CapProfile]) -> None:
    """Each response, streamed or whole, says which profile was in force; the server says what it caps with."""
    body = {"model": "m", "prompt": "Hello.", "messages": [{"role": "user", "content": "Hello."}], "max_tokens": 2}
    for name, wanted in ((None, "mild"), ("mild", "mild"), ("strict", "strict"), ("off", "off")):
        for route in ("/v1/completions", "/v1/chat/completions"):
            for stream in (False, True):
                answer = server.client.post(route, json=body | {"stream": stream} | server.choice(name))
                assert answer.status_code == 200, answer.text
                digest = "-" if wanted == "off" else profiles[wanted].digest
                assert [answer.headers.get(header) for header in HEADERS] == [wanted, digest]
    facts = server.client.get("/axiscap").json()
    assert facts["profiles"].items() >= {name: profile.digest for name, profile in profiles.items()}.items()
    assert (facts["default"], facts["layers"]) == ("mild", list(profiles["mild"].layers))


def drift_told(server: Server, log: Path) -> None:
    """Each response says of its answers what the log says of them, in its head or in a stream's last piece; of those
    that are left alone, nothing.
    """
    tokens = {"max_tokens": 6, "ignore_eos": True, "temperature": 0}

    def read(said: str) -> dict[str, float]:
        return {key: float(value) for key, value in (part.split("=") for part in said.split("; "))}

    body = {"model": "m", "prompt": PROMPTS[0], "messages": [{"role": "user", "content": PROMPTS[0]}]} | tokens
    for route, name in (("/v1/completions", "strict"), ("/v1/chat/completions", None), ("/v1/completions", "off")):
        answer = server.client.post(route, json=body | server.choice(name))
        if name == "off":
            assert DRIFT_HEADER not in answer.headers
            continue
        record = wait_for(lambda answer=answer: find(log, answer.json()["id"]))
        assert record["drift"]["rows"] == 5  # the last token is sampled, and not read again
        assert {"percentile", "mean", "fired", "rows", "layer"} == record["drift"].keys()
        assert read(answer.headers[DRIFT_HEADER]) == pytest.approx(record["drift"], rel=1e-4)
        stream = server.client.post(route, json=body | {"stream": True} | server.choice(name))
        *_, last, end, _ = stream.text.split("\n\n")
        assert end == "data: [DONE]"
        assert json.loads(last.removeprefix("data: "))["axiscap"]["drift"] == [pytest.approx(record["drift"], rel=0.02)]
        assert DRIFT_HEADER not in stream.headers
    several = server.client.post("/v1/completions", json=body | {"n": 3, "temperature": 1.0} | server.choice("strict"))
    rows = [read(one)["rows"] for one in several.headers[DRIFT_HEADER].split(", ")]
    assert len(rows) == 3
    assert min(rows) >= 5  # those that a preempted one computes again count again


def administer(server: Server, method: str, name: str, body: object = None) -> httpx.Response:
    # A connection of its own, so that it may reach any of the server's processes.
    to, key = f"{server.url}/axiscap/profiles/{name}", {"Authorization": "Bearer secret"}
    return httpx.request(method, to, json=body, headers=key, timeout=60)


def load(server: Server, name: str, path: Path, *, allowed: bool = False) -> httpx.Response:
    return administer(server, "PUT", name, {"path": str(path), "allowed": allowed})


def come_move_and_go(server: Server, profiles: tuple[Path, dict[str, CapProfile]], demo_model) -> None:
    """Profiles change through the server's own routes, while a request runs."""
    folder, made = profiles
    running_text = server.text(PROMPTS[2], "strict", max_tokens=80, ignore_eos=True)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        during = pool.submit(server.text, PROMPTS[2], "strict", max_tokens=80, ignore_eos=True)
        higher = made["mild"].with_floors(made["mild"].floors + 20)
        higher.save(folder / "higher.safetensors")
        assert load(server, "higher", folder / "higher.safetensors", allowed=True).status_code == 200
        wanted = expected_texts(*demo_model, PROMPTS[:6], higher, 16)
        assert [server.text(prompt, "higher") for prompt in PROMPTS[:6]] == wanted
        # Floors of the profile that is running: whoever began under the old ones ends under them.
        assert administer(server, "PATCH", "strict", {"by": 5.0}).status_code == 200
        assert during.result() == running_text
    moved = made["strict"].with_floors(made["strict"].floors + 5)
    assert [server.text(prompt, "strict") for prompt in PROMPTS[:6]] == expected_texts(
        *demo_model, PROMPTS[:6], moved, 16
    )
    assert load(server, "strict", folder / "strict.safetensors").status_code == 200
    assert server.text(PROMPTS[2], "strict", max_tokens=80, ignore_eos=True) == running_text
    assert administer(server, "DELETE", "higher").status_code == 200
    assert server.complete(PROMPTS[0], "higher").status_code == 400
    # What does not fit is refused, and nothing has changed.
    axes = torch.nn.functional.normalize(torch.randn(1, 1, 576), dim=-1)
    CapProfile([2], axes, torch.zeros(1, 1)).save(folder / "layer2.safetensors")
    (folder / "broken.safetensors").write_bytes(b"x")
    for path in ("layer2.safetensors", "broken.safetensors", "missing.safetensors"):
        refused = load(server, "bad", folder / path)
        assert (refused.status_code, "Call to" in refused.text) == (400, False)
    refused = administer(server, "DELETE", "mild")
    assert (refused.status_code, "mild is the default" in refused.text) == (400, True)
    assert server.text(PROMPTS[2], "strict", max_tokens=80, ignore_eos=True) == running_text


def rolled_out(server: Server, profiles: tuple[Path, dict[str, CapProfile]], demo_model) -> None:
    """Each answer is as a whole of the old content or of the new one, and says of which; a replica that is not there is
    named, and keeps nobody else from having it.
    """
    folder, made = profiles
    old, new = made["strict"], made["strict"].with_floors(made["strict"].floors + 7)
    new.save(folder / "new.safetensors")
    options = {"max_tokens": 40}
    wanted = {kind.digest: expected_texts(*demo_model, [PROMPTS[3]], kind, 40)[0] for kind in (old, new)}
    assert len(set(wanted.values())) == 2

    def rolled(path: Path, *urls: str) -> subprocess.CompletedProcess[str]:
        command = [str(REPOSITORY / ".venv" / "bin" / "axiscap"), "rollout", "strict", str(path), server.url, *urls]
        return subprocess.run([*command, "--admin-key", "secret"], capture_output=True, text=True)

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        answers = [pool.submit(server.complete, PROMPTS[3], "strict", **options) for _ in range(24)]
        done = rolled(folder / "new.safetensors", "http://127.0.0.1:9")
        answers += [pool.submit(server.complete, PROMPTS[3], "strict", **options) for _ in range(4)]
    assert done.returncode == 1
    assert "127.0.0.1:9" in done.stdout
    assert "1 of 2 replicas have it" in done.stdout, done.stdout + done.stderr
    found = [answer.result() for answer in answers]
    for answer in found:
        if answer.status_code == 200:  # one that was on its way meanwhile may have to be sent again
            assert answer.json()["choices"][0]["text"] == wanted[answer.headers["x-axiscap-digest"]]
    assert {answer.headers.get("x-axiscap-digest") for answer in found[-4:]} == {new.digest}
    assert sum(answer.status_code == 200 for answer in found) >= 24
    done = rolled(folder / "strict.safetensors")
    assert (done.returncode, "1 of 1 replicas have it" in done.stdout) == (0, True)
    assert server.complete(PROMPTS[3], "strict").headers["x-axiscap-digest"] == old.digest


def verified(server: Server, folder: Path) -> None:
    """`axiscap verify` sees rows of an answer that were capped, by the default and by a choice, and their effect."""
    command = [str(REPOSITORY / ".venv" / "bin" / "axiscap"), "verify", server.url, "--profile"]
    for name in ("mild", "strict"):
        done = subprocess.run([*command, str(folder / f"{name}.safetensors")], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "its rows were measured against the floors of layers" in done.stdout
        assert "its effect was seen: the same tokens differ by" in done.stdout
    moved = CapProfile.load(folder / "mild.safetensors")
    moved.with_floors(moved.floors - 1).save(folder / "another.safetensors")
    done = subprocess.run([*command, str(folder / "another.safetensors")], capture_output=True, text=True)
    assert done.returncode == 1
    assert "the server has no profile of the digest" in done.stderr


def evaluated(server: Server, engine: str, folder: Path) -> None:
    """`axiscap evaluate` asks the server, in the environment that has Inspect, for each answer capped and uncapped."""
    command = [str(REPOSITORY / ".venv" / "bin" / "axiscap"), "evaluate", "strict", "--base-url", f"{server.url}/v1"]
    command += ["--engine", engine, "--model", "m", "--tasks", "arithmetic,persona_jailbreak", "--limit", "4"]
    done = subprocess.run([*command, "--max-tokens", "8"], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((folder / "evaluation" / "scores.json").read_text())["after"]["strict"]
    assert {(one["task"], one["scorer"]) for one in found} == {
        ("arithmetic", "last_number"), ("persona_jailbreak", "not_refused"), ("persona_jailbreak", "in_character"),
    }  # fmt: skip
    assert all((one["pairs"] + one["failed"], one["unpaired"]) == (4, 0) for one in found)
    page = (folder / "evaluation" / "scores.html").read_text()
    # What each side was told is what the server says under the profile of that side.
    for side, profile in (("uncapped", "off"), ("strict", "strict")):
        (log,) = (folder / "evaluation" / side).glob("*arithmetic*.eval")
        dump = [str(REPOSITORY / ".venv" / "bin" / "inspect"), "log", "dump", str(log)]
        samples = json.loads(subprocess.run(dump, capture_output=True, check=True).stdout)["samples"]
        assert len(samples) == 4
        for sample in samples:
            message = {"role": "user", "content": sample["input"]}
            body = {"model": "m", "messages": [message], "temperature": 0, "max_tokens": 8, **server.choice(profile)}
            said = server.client.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]["content"]
            assert sample["output"]["choices"][0]["message"]["content"] == said
    assert "strict against uncapped" in page
    # What the operator does not allow is refused, and said.
    command[2:3] = ["nobody", "--out", "other"]
    other = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert other.returncode == 1
    assert "under nobody did not finish" in other.stderr


class Link:
    """A way to a server that breaks when it is told to: to whoever is under way, the server has died."""

    def __init__(self, server: Server, port: int) -> None:
        self.to = ("127.0.0.1", httpx.URL(server.url).port)
        self.listening = socket.create_server(("127.0.0.1", port))
        self.ends: list[socket.socket] = [self.listening]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                here = self.listening.accept()[0]
                there = socket.create_connection(self.to)
                self.ends += [here, there]
                for source, sink in ((here, there), (there, here)):
                    threading.Thread(target=self._copy, args=(source, sink), daemon=True).start()

    @staticmethod
    def _copy(source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)

    def cut(self) -> None:
        for end in self.ends:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()


def evaluated_by_a_server_that_dies(server: Server, engine: str, folder: Path) -> None:
    """What was answered before is kept, the end is told in a sentence, and the same command goes on."""
    port = free_port()
    command = [str(REPOSITORY / ".venv" / "bin" / "axiscap"), "evaluate", "strict", "--engine", engine, "--model", "m"]
    command += ["--base-url", f"http://127.0.0.1:{port}/v1", "--tasks", "arithmetic", "--batch-size", "1"]
    command += ["--limit", "24", "--max-tokens", "24"]
    link = Link(server, port)
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        logs = folder / "evaluation" / "uncapped"
        wait_for(lambda: process.poll() is not None or samples_of(logs) >= 2, 120)
        link.cut()
        told = process.communicate()[1]
    assert process.returncode == 1, told
    assert "arithmetic under uncapped did not finish: 4 tries ended with APIConnectionError; " in told
    kept = re.search(r"(\d+) finished samples of it are kept", told)
    assert kept, told
    assert 2 <= int(kept[1]) < 24
    assert "Traceback" not in told
    link = Link(server, port)
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    link.cut()
    assert done.returncode == 0, done.stdout + done.stderr
    (found,) = json.loads((folder / "evaluation" / "scores.json").read_text())["after"]["strict"]
    assert (found["pairs"], found["failed"], found["unpaired"]) == (24, 0, 0)


def find(path: Path, request: str) -> dict | None:
    """A finished request's record in the log."""
    # Behind the last line end may stand a part of a line that is being written.
    records = [json.loads(line) for line in path.read_text().split("\n")[:-1]]
    return next((record for record in records if record["id"].startswith(request)), None)


def wait_for(look: Callable[[], object], seconds: float = 30) -> Any:
    """What a look finds, once it finds something."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if found := look():
            return found
        time.sleep(0.1)
    raise AssertionError("it never came")


@contextlib.contextmanager
def small_disk() -> Iterator[Path]:
    """A file system of its own, of a few megabytes, at a short path: an engine's sockets lie on it."""
    folder = Path(tempfile.mkdtemp(prefix="disk"))
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m,mode=0755", "tmpfs", folder], check=False).returncode:
        pytest.skip("needs the right to mount a small disk")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)
        folder.rmdir()


def fill(disk: Path) -> Path:
    """Leaves no byte free."""
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(1 << 12))
    with filler.open("ab", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(b"0")
    return filler


def telemetry_in_trouble(command: Callable[[str], tuple[list[str], dict[str, str]]], folder: Path, extra: str) -> None:
    """Folders cleaned away, a full disk, a permission taken away, a folder in the log's place: no answer is another, no
    request fails, and once the trouble is over, every request is in the log, once, and in the totals.

    Args:
        command: the server's command and environment, by where its log is.
    """
    # Root may write everywhere, unless it gives that right up.
    within = ["setpriv", "--bounding-set=-dac_override,-dac_read_search"] if os.getuid() == 0 else []
    with small_disk() as disk:
        temporary, log = disk / "temporary", disk / "logs" / "log.jsonl"
        temporary.mkdir()
        log.parent.mkdir()
        options, environment = command(str(log))
        with running(options, folder, extra, within=within, TMPDIR=str(temporary), **environment) as server:
            (state,) = temporary.glob("axiscap-*")
            prompts = PROMPTS[:8]
            wanted = in_parallel(server, prompts)
            asked: list[str] = []

            def answered() -> None:
                with concurrent.futures.ThreadPoolExecutor(8) as pool:
                    answers = [response.json() for response in pool.map(server.complete, prompts)]
                assert [answer["choices"][0]["text"] for answer in answers] == wanted
                asked.extend(answer["id"] for answer in answers)

            def logged(requests: list[str]) -> bool:
                return log.is_file() and all(find(log, request) for request in requests)

            def failures(what: str) -> float:
                return server.metrics().get(f'axiscap_telemetry_failures_total{{what="{what}"}}', 0)

            with concurrent.futures.ThreadPoolExecutor(1) as pool:  # under load
                load = [pool.submit(answered) for _ in range(3)]
                for _ in range(5):
                    shutil.rmtree(state, ignore_errors=True)
                    shutil.rmtree(log.parent, ignore_errors=True)
                    time.sleep(0.3)
                [one.result() for one in load]
            shutil.rmtree(log.parent, ignore_errors=True)
            asked.clear()  # what was written before is gone; some of it may still come
            answered()
            wait_for(lambda: logged(asked) and state.exists())

            filler = fill(disk)
            answered()
            answered()
            for what in ("log", "totals"):
                wait_for(lambda what=what: f"axiscap: the {what} cannot be written" in server.log.read_text())
            filler.unlink()
            wait_for(lambda: failures("log") and failures("totals"))

            state.chmod(0)
            log.parent.chmod(0)
            answered()
            read = failures("read")
            assert server.client.get("/metrics").status_code == 200
            assert failures("read") > read
            state.chmod(0o700)
            log.parent.chmod(0o755)
            wait_for(lambda: logged(asked))

            log.rename(log.with_suffix(".old"))
            log.mkdir()
            before = len(asked)
            answered()
            log.rmdir()
            wait_for(lambda: logged(asked[before:]))
            text = log.with_suffix(".old").read_text() + log.read_text()
            records = [json.loads(line) for line in text.splitlines()]
            assert len({record["id"] for record in records}) == len(records) >= len(asked)

            rows: Counter[str] = Counter()
            for key, value in wait_for(server.metrics).items():
                if "axiscap_rows_total" in key:
                    rows[re.sub('part="[a-z]+",', "", key)] += int(value)
            assert min(rows.values()) >= sum(record["layers"]["14"]["rows"] for record in records)
            said = server.log.read_text()
            assert 2 <= said.count("cannot be written") < 20
            assert "Traceback" not in said
