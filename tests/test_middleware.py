"""What stands before a capped server's routes, around a real application of FastAPI."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import re
import threading
import time

import pytest
import torch
from conftest import free_port, unit

pytest.importorskip("fastapi", reason="the serving engines have FastAPI, and so has the chat page")

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import StreamingResponse
from fastapi.testclient import TestClient
from pydantic import BaseModel

from axiscap import CapProfile
from axiscap.serving import client as server_client
from axiscap.serving import shared_folder
from axiscap.serving.front import middleware
from axiscap.serving.front.profiles import ServedProfiles
from axiscap.serving.scheduler import Control
from axiscap.serving.settings import Settings


class Completion(BaseModel, extra="allow"):
    prompt: str | list[int] = ""
    stream: bool = False
    vllm_xargs: dict[str, object] | None = None


@dataclasses.dataclass
class Tokens:
    text: str = ""
    sampling_params: dict[str, object] | None = None


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A client of an application that decides as the engines do, and the profiles' files."""
    monkeypatch.setattr(shared_folder.tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv(middleware.ADMIN_VARIABLE, "secret")
    files = {}
    for seed, name in enumerate(("mild", "strict", "other")):
        files[name] = str(tmp_path / f"{name}.safetensors")
        CapProfile([2], unit(1, 1, 16, seed=seed), torch.zeros(1, 1)).save(files[name])
    given = {name: files[name] for name in ("mild", "strict")}
    settings = Settings.parse({"profiles": given, "default": "mild", "allowed": ["strict"], "allow_off": True})
    control = Control(settings, shared_folder.folder("server"), lambda *placed: None)
    profiles = ServedProfiles(settings, shared_folder.folder_path("server"))
    seen: list[object] = []
    tickets: list[str] = []
    scores = {"mild": -1.0, "strict": -1.0, "off": -2.0, "verify": -9.0}

    async def decide(extra: dict[str, object] | None) -> None:
        await asyncio.sleep(0)
        middleware.note_profile(profiles.resolve(extra)._replace(ticket=tickets.pop(0) if tickets else None), 1)

    async def change(app: object, method: str, arguments: list[object]) -> str:
        assert app is application
        try:
            return getattr(control, method.removeprefix("axiscap_"))(*arguments)
        except ValueError as error:
            raise RuntimeError(f"Call to collective_rpc method failed: {error}") from None

    application = FastAPI()

    @application.post("/v1/completions")
    async def complete(request: Completion, raw: Request):
        seen.append(await raw.json())
        if not request.stream:
            await decide(request.vllm_xargs)
            if "logprobs" in seen[-1]:
                name = str((request.vllm_xargs or {}).get("axiscap", "mild")).split("-")[0]
                return {"choices": [{"logprobs": {"tokens": ["a", "b"], "token_logprobs": [None, scores[name]]}}]}
            return {"text": request.prompt}

        async def words():
            await asyncio.gather(decide(request.vllm_xargs))  # in a task of its own
            for word in ("a", "b"):
                yield word
            if request.prompt == "openai":
                for end in (None, "stop"):
                    piece = {"choices": [{"text": "ü", "finish_reason": end}]}
                    yield f"data: {json.dumps(piece, ensure_ascii=False)}\n\n"
            yield "data: [DONE]" if request.prompt == "openai" else "end"

        return StreamingResponse(words(), media_type="text/event-stream")

    @application.post("/generate")
    async def generate(request: Tokens):
        await decide((request.sampling_params or {}).get("extra_args"))
        return {}

    @application.post("/several")
    async def several(requests: list[Completion]):
        await asyncio.gather(*(decide(request.vllm_xargs) for request in requests))
        return {}

    @application.post("/score")
    async def score(raw: Request):
        return {"scored": len(await raw.body())}

    @application.post("/collective_rpc")
    async def rpc(raw: Request):
        return {"reached": True}

    @application.get("/v1/models")
    async def models():
        return {"data": []}

    monkeypatch.setattr(FastAPI, "build_middleware_stack", FastAPI.build_middleware_stack)  # and back, at the end
    middleware.wrap_applications(profiles, (("vllm_xargs",), ("sampling_params", "extra_args")), change)
    client = TestClient(application)
    client.tickets, client.scores, client.control = tickets, scores, control
    return client, files, seen


def digest(path: str) -> str:
    return CapProfile.load(path).digest


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("asked", "name"), [(None, "mild"), ("strict", "strict"), ("off", "off")])
def test_each_response_says_which_profile_was_in_force(server, stream, asked, name):
    client, files, seen = server
    body = {"prompt": "axiscap", "stream": stream, "vllm_xargs": {"other": 1} | ({"axiscap": asked} if asked else {})}
    answer = client.post("/v1/completions", json=body)
    assert (answer.status_code, seen) == (200, [body])
    assert answer.text == ("abend" if stream else '{"text":"axiscap"}')
    found = [answer.headers[header] for header in middleware.HEADERS]
    assert found == [name, "-" if name == "off" else digest(files[name])]
    assert not set(middleware.HEADERS) & set(client.get("/v1/models").headers)


@pytest.mark.parametrize("stream", [False, True])
def test_a_response_says_how_far_its_answer_drifted(server, stream, monkeypatch):
    """In its head, or before the end of a stream; later than a second it says nothing, and a failed one never."""
    client, _, _ = server
    monkeypatch.setattr("axiscap.serving.front.profiles._PATIENCE", 0.05)
    told, folder = "percentile=3.25; fired=0.5; rows=40; layer=19", shared_folder.folder("server")
    shared_folder.write_answer(folder, "mine", {"percentile": 3.25, "fired": 0.5, "rows": 40, "layer": 19})
    shared_folder.write_answer(folder, "another", {"percentile": 99.0, "fired": 0.0, "rows": 1, "layer": 19})
    client.tickets += ["mine", "nobodys"]
    body = {"prompt": "p", "stream": stream}
    answer = client.post("/v1/completions", json=body)
    if stream:
        assert answer.text == f"abend: {middleware.DRIFT_HEADER}: {told}\n\n"
    assert answer.headers.get(middleware.DRIFT_HEADER) == (None if stream else told)
    answer = client.post("/v1/completions", json=body)
    assert (answer.status_code, middleware.DRIFT_HEADER in answer.headers) == (200, False)
    assert answer.text == ("abend" if stream else '{"text":"p"}')
    assert shared_folder.take_answers(folder, "another") == [{"percentile": 99.0, "fired": 0.0, "rows": 1, "layer": 19}]


def test_a_stream_of_openais_kind_says_it_in_its_last_piece(server, monkeypatch):
    """As a field that OpenAI's client hands on, where many a client stumbles over comments."""
    client, _, _ = server
    monkeypatch.setattr("axiscap.serving.front.profiles._PATIENCE", 0.05)
    answer = {"percentile": 3.25, "fired": 0.5, "rows": 40, "layer": 19}
    shared_folder.write_answer(shared_folder.folder("server"), "mine", answer)
    body = {"prompt": "openai", "stream": True}
    plain = client.post("/v1/completions", json=body).text
    client.tickets += ["mine", "nobodys"]
    first, last, end = client.post("/v1/completions", json=body).text.split("\n\n")
    assert json.loads(last.removeprefix("data: ")) == {
        "choices": [{"text": "ü", "finish_reason": "stop"}],
        "axiscap": {"drift": [answer]},
    }
    assert (first, end) == (plain.split("\n\n")[0], "data: [DONE]")
    assert client.post("/v1/completions", json=body).text == plain


@pytest.mark.parametrize(
    ("path", "body", "says"),
    [
        ("/v1/completions", {"axiscap": "strict"}, "chosen in vllm_xargs.axiscap; axiscap would not be read"),
        ("/v1/completions", {"extra_body": {"vllm_xargs": {"axiscap": "strict"}}}, "extra_body.vllm_xargs.axiscap"),
        ("/v1/completions", {"vllm_xargs": {"AxisCap": "strict"}}, "vllm_xargs.AxisCap would not be read"),
        ("/v1/completions", {"vllm_xargs": {"axis_cap": "strict"}}, "vllm_xargs.axis_cap would not be read"),
        ("/v1/completions", {"vllm_xargs": [{"axiscap": "strict"}]}, "would not be read|valid dict"),
        ("/v1/completions", {"custom_params": {"axiscap": "strict"}}, "custom_params.axiscap would not be read"),
        ("/v1/completions", {"sampling_params": {"extra_args": {"axiscap": "x"}}}, "extra_args.axiscap would not"),
        ("/generate", {"vllm_xargs": {"axiscap": "x"}}, "chosen in sampling_params.extra_args.axiscap; vllm_xargs"),
        ("/generate", {"sampling_params": {"axiscap": "x"}}, "sampling_params.axiscap would not be read"),
        ("/score", {"vllm_xargs": {"axiscap": "strict"}}, "/score takes no choice of a profile"),
        ("/score", {"AXISCAP": "off"}, "/score takes no choice of a profile, and AXISCAP would not be read"),
        ("/nowhere", {"axiscap": "off"}, "/nowhere takes no choice"),
    ],
)
def test_a_choice_that_would_not_be_read_is_refused(server, path, body, says):
    client, _, seen = server
    answer = client.post(path, json=body)
    assert answer.status_code in (400, 422)
    assert re.search(says, answer.text), answer.text
    assert seen == []


def test_a_choice_may_stand_in_the_places_of_both_engines(server):
    client, _, _ = server
    both = {"vllm_xargs": {"axiscap": "strict"}, "custom_params": {"axiscap": "strict"}}
    assert client.post("/v1/completions", json=both).headers[middleware.HEADERS[0]] == "strict"
    both["custom_params"]["axiscap"] = "off"
    answer = client.post("/v1/completions", json=both)
    assert (answer.status_code, "custom_params.axiscap would not be read" in answer.text) == (400, True)


def test_what_a_client_writes_is_no_choice(server):
    """Text, tools and metadata may be about AxisCap."""
    client, _, _ = server
    tool = {"function": {"name": "set", "parameters": {"properties": {"axiscap": {"type": "string"}}}}}
    words = {"prompt": "axiscap: off", "messages": [{"axiscap": 1}], "tools": [tool], "metadata": {"axiscap": "x"}}
    answer = client.post("/v1/completions", json=words)
    assert (answer.status_code, answer.headers[middleware.HEADERS[0]]) == (200, "mild")
    assert client.post("/score", content=b"axiscap, and no JSON").json() == {"scored": 20}
    assert client.post("/score", json=["axiscap"]).status_code == 200
    assert client.post("/v1/completions", content=b"{", headers={"content-type": "application/json"}).status_code == 422
    form = client.post("/score", files={"axiscap": b"axiscap"})
    assert form.status_code == 200


def test_several_answers_under_several_profiles_are_all_named(server):
    client, files, _ = server
    wanted = [{"vllm_xargs": {"axiscap": name}} if name else {} for name in ("strict", None, "strict", "off")]
    answer = client.post("/several", json=wanted)
    assert answer.headers[middleware.HEADERS[0]] == "strict, mild, off"
    assert answer.headers[middleware.HEADERS[1]] == f"{digest(files['strict'])}, {digest(files['mild'])}, -"


def test_the_server_says_what_it_caps_with(server):
    client, files, _ = server
    said = client.get("/axiscap").json()
    assert said["profiles"] == {name: digest(files[name]) for name in ("mild", "strict")}
    assert (said["default"], said["choices"], said["layers"]) == ("mild", ["mild", "strict", "off"], [2])
    assert said["choice_in"] == ["vllm_xargs.axiscap", "sampling_params.extra_args.axiscap"]


def test_profiles_are_changed_by_who_has_the_key(server, monkeypatch):
    client, files, _ = server
    key = {"Authorization": "Bearer secret"}
    to = "/axiscap/profiles/new"
    for wrong in ({}, {"Authorization": "Bearer"}, {"Authorization": "Bearer secre"}, {"Authorization": "secret2"}):
        assert client.put(to, json={"path": files["other"]}, headers=wrong).status_code == 401
    assert "new" not in client.get("/axiscap").json()["profiles"]
    done = client.put(to, json={"path": files["other"], "allowed": True}, headers=key)
    assert (done.status_code, done.json()) == (200, {"done": f"new is {digest(files['other'])} in slot 2"})
    assert (
        client.post("/v1/completions", json={"vllm_xargs": {"axiscap": "new"}}).headers[middleware.HEADERS[0]] == "new"
    )
    assert client.patch(to, json={"by": 1.5}, headers=key).status_code == 200
    assert client.get("/axiscap").json()["profiles"]["new"] != digest(files["other"])
    assert client.delete(to, headers=key).json() == {"done": "retired new"}
    for method, path, body, status, says in (
        ("PATCH", "mild", {"by": "high"}, 400, "by must be a finite number, in units of the projection, got 'high'"),
        ("PATCH", "mild", {}, 400, "the body must be a JSON object of by"),
        ("PATCH", "mild", [1], 400, "the body must be a JSON object of by"),
        ("PUT", "mild", {"path": files["other"], "allowed": "no"}, 400, "allowed must be true or false, got 'no'"),
        ("PUT", "mild", {"path": "nothing.safetensors"}, 400, "nothing.safetensors"),
        ("PUT", "mild", {"path": files["other"], "default": True}, 400, "must be a JSON object of path and"),
        ("DELETE", "mild", None, 400, "mild is the default"),
        ("DELETE", "gone", None, 400, "there is no profile 'gone'"),
        ("POST", "mild", {}, 404, "there are GET /axiscap"),
    ):
        answer = client.request(method, f"/axiscap/profiles/{path}", json=body, headers=key)
        assert answer.status_code == status, answer.text
        assert says in answer.json()["error"]["message"]
    assert client.get("/axiscap/other").status_code == 404
    monkeypatch.delenv(middleware.ADMIN_VARIABLE)
    answer = client.put(to, json={"path": files["other"]}, headers={"Authorization": "Bearer "})
    assert (answer.status_code, "without AXISCAP_ADMIN_KEY" in answer.text) == (403, True)


def test_the_engines_own_way_to_its_workers_changes_no_profile(server):
    client, _, _ = server
    answer = client.post("/collective_rpc", json={"method": "axiscap_retire", "args": ["strict"]})
    assert (answer.status_code, "profiles are changed at /axiscap/profiles" in answer.text) == (403, True)
    assert client.post("/collective_rpc", json={"method": "other"}).json() == {"reached": True}


def test_a_large_body_in_parts_is_read_whole(server):
    client, _, seen = server
    body = json.dumps({"prompt": "axiscap " * 200_000}).encode()
    parts = (body[at : at + 1000] for at in range(0, len(body), 1000))
    answer = client.post("/v1/completions", content=parts, headers={"content-type": "application/json"})
    assert answer.status_code == 200
    assert seen == [json.loads(body)]


@pytest.fixture
def serving(server):
    """The application in a server of its own: its address, and what it says besides."""
    client, files, _ = server
    said = {
        "models": {"data": [{"id": "m"}]},
        "rows": 0,
        "fired": 0,
        "scores": client.scores,
        "control": client.control,
    }

    @client.app.get("/metrics")
    async def page():
        said["rows"] += said.get("more", 1)
        said["fired"] += said.get("more fired", 0)
        page = ""
        for name, count in (("axiscap_rows", said["rows"]), ("axiscap_fired_rows", said["fired"])):
            page += f'# TYPE {name}_total counter\n{name}_total{{layer="2",profile="mild"}} {count}\n'
        return Response(page, media_type="text/plain")

    @client.app.get("/v1/models", include_in_schema=False)
    async def models():
        return said["models"]

    client.app.router.routes.insert(0, client.app.router.routes.pop())
    running = uvicorn.Server(uvicorn.Config(client.app, port=free_port(), log_level="error"))
    thread = threading.Thread(target=running.run)
    thread.start()
    while not running.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{running.config.port}", files, said
    running.should_exit = True
    thread.join()


def test_a_server_is_verified(serving, monkeypatch):
    url, files, said = serving
    mild = CapProfile.load(files["mild"])
    found = list(server_client.verify(f"{url}/v1/", mild))
    assert found == [
        "the server says that it caps layers 2 under mild, the default",
        f"an answer was written under mild {mild.digest}",
        "its rows were measured against the floors of layers 2",
        "its effect was seen: the same tokens differ by up to 1 nats under off",
    ]
    monkeypatch.setattr(server_client, "_PATIENCE", 0.5)
    for change, profile, says in (
        ({"more": 0}, "mild", "no row of the answer was measured at layers 2"),
        ({"models": {"data": []}}, "mild", "/v1/models names no model"),
        ({}, "other", "the server has no profile of the digest .*; it has mild"),
    ):
        said |= change
        with pytest.raises(server_client.NotCapped, match=says):
            list(server_client.verify(url, CapProfile.load(files[profile])))
    with pytest.raises(
        server_client.NotCapped, match=r"http://127\.0\.0\.1:9/axiscap cannot be reached: Connection refused"
    ):
        list(server_client.verify("http://127.0.0.1:9", mild))
    with pytest.raises(server_client.NotCapped, match="begins with http:// or https://, got localhost:9"):
        list(server_client.verify("localhost:9", mild))


def test_the_effect_of_a_cap_is_verified_where_it_can_be_seen(serving, monkeypatch):
    """Against the uncapped answer; else with the admin key, under floors far above; else it is said that none was."""
    url, files, said = serving
    mild, scores = CapProfile.load(files["mild"]), said["scores"]
    monkeypatch.setattr(server_client, "_PATIENCE", 0.5)
    scores["off"] = scores["mild"]
    assert list(server_client.verify(url, mild))[-1].startswith(
        "no effect was seen, only the server's word and its counts"
    )
    options = {"admin_key": "secret", "source": files["mild"]}
    assert list(server_client.verify(url, mild, **options))[-1] == (
        "its effect was seen: the same tokens differ by up to 8 nats under floors far above"
    )
    assert list(said["control"].load.__self__._registry.names) == ["mild", "strict"]  # the second name is gone again
    scores["verify"] = scores["mild"]
    with pytest.raises(server_client.NotCapped, match="floors far above every row leave the answer as it is"):
        list(server_client.verify(url, mild, **options))
    said["more fired"] = 1
    with pytest.raises(
        server_client.NotCapped, match="rows fell below their floors, and the answer is the one of the uncapped"
    ):
        list(server_client.verify(url, mild))
    scores["mild"] = None
    with pytest.raises(server_client.NotCapped, match="gives no log-probabilities"):
        list(server_client.verify(url, mild))


def test_a_profile_is_rolled_out(serving):
    url, files, _ = serving
    other = CapProfile.load(files["other"]).digest
    assert server_client.roll_out(url, "strict", f"{files['other']}#{other}", "secret") == other
    for name, key, says in (
        ("strict", "wrong", "answered 401: .*the header Authorization must be Bearer"),
        ("../x", "secret", "answered 40"),
    ):
        with pytest.raises(server_client.NotCapped, match=says):
            server_client.roll_out(url, name, files["other"], key)
