"""The example for Ray Serve, as it is: real replicas of vLLM under load. Needs an environment that has vLLM, beside the
one of `make`, which has Ray: `make test-serving`.
"""

from __future__ import annotations

import concurrent.futures
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter

import httpx
import pytest
import yaml
from conftest import REPOSITORY, free_port

pytest.importorskip("vllm", reason="needs vLLM: make test-serving")

from serving import PROMPTS, expected_texts, small_model, wait_for

RAY = REPOSITORY / ".venv" / "bin"
TOKENS = 24


@pytest.fixture
def cluster(monkeypatch):
    """Ray's own processes; the address of its dashboard, which takes deployments from who has the token."""
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", secrets.token_hex(32))
    port, dashboard = free_port(), free_port()
    command = [str(RAY / "ray"), "start", "--head", "--block", "--port", str(port), "--num-cpus", "4"]
    command += ["--include-dashboard", "true", "--dashboard-port", str(dashboard), "--disable-usage-stats"]
    # A folder of its own, of a short name for its sockets: Ray leaves an address there, at which others would look.
    folder = tempfile.mkdtemp(prefix="ray-")
    command += ["--temp-dir", folder]
    small = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    environment = os.environ | small | {"PYTHONPATH": str(REPOSITORY)}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield f"http://127.0.0.1:{dashboard}"
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)
        shutil.rmtree(folder, ignore_errors=True)


def serve(command: str, *arguments: str, address: str) -> str:
    done = subprocess.run(
        [str(RAY / "serve"), command, *arguments, "--address", address], capture_output=True, text=True, cwd=REPOSITORY
    )
    return (done.stdout or "sent") if done.returncode == 0 else ""


def replicas(address: str) -> Counter[str]:
    """How many there are, by their state."""
    found = yaml.safe_load(serve("status", address=address)) or {}
    deployments = found.get("applications", {}).get("capped", {}).get("deployments", {})
    return Counter(deployments.get("CappedServer", {}).get("replica_states", {}))


def processes(name: str) -> list[int]:
    found = subprocess.run(["pgrep", "-f", name], capture_output=True, text=True)
    return [int(pid) for pid in found.stdout.split()]


@pytest.mark.nightly
def test_a_profile_is_rolled_out_and_a_replica_dies_under_load(cluster, tmp_path):
    """No answer is written under mixed floors, and none uncapped; what the dead replica was writing fails."""
    model, tokenizer, made = small_model(tmp_path)
    old = made["strict"]
    new = old.with_floors(old.floors + 2)
    new.save(tmp_path / "new.safetensors")
    wanted = {kind.digest: expected_texts(model, tokenizer, PROMPTS[:3], kind, TOKENS) for kind in (old, new)}
    assert all(a != b for a, b in zip(*wanted.values(), strict=True))
    http = free_port()
    config = yaml.safe_load((REPOSITORY / "examples" / "deploy" / "ray_serve.yaml").read_text())
    config["http_options"] = {"host": "127.0.0.1", "port": http}
    (app,) = config["applications"]
    capped = {"axiscap": {"profiles": {"mild": str(tmp_path / "strict.safetensors")}, "check": True}}
    app["args"]["command"] = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(tmp_path / "model"),
        "--served-model-name", "m", "--dtype", "float32", "--max-model-len", "256", "--enforce-eager",
        "--additional-config", json.dumps(capped),
    ]  # fmt: skip
    (deployment,) = app["deployments"]

    def deploy(path: str, digest: str) -> None:
        deployment["user_config"]["profiles"]["mild"] = f"{tmp_path / path}#{digest}"
        (tmp_path / "serve.yaml").write_text(yaml.safe_dump(config))
        assert wait_for(lambda: serve("deploy", str(tmp_path / "serve.yaml"), address=cluster), 120)

    def ask(number: int) -> tuple[int, httpx.Response | None]:
        body = {"model": "m", "prompt": PROMPTS[number], "temperature": 0, "max_tokens": TOKENS, "ignore_eos": True}
        try:
            return number, httpx.post(f"http://127.0.0.1:{http}/v1/completions", json=body, timeout=120)
        except httpx.TransportError:
            return number, None

    deploy("strict.safetensors", old.digest)
    wait_for(lambda: replicas(cluster) == {"RUNNING": 2}, 600)
    answers: list[tuple[int, httpx.Response | None]] = []
    stop = threading.Event()

    def servers() -> set[int]:
        return set(processes(f"vllm.entrypoints.openai.api_server --model {tmp_path}"))

    def load() -> None:
        number = 0
        while not stop.is_set():
            answers.append(ask(number % 3))
            number += 1

    def digests(since: int) -> Counter[str | None]:
        return Counter(answer.headers.get("x-axiscap-digest") for _, answer in answers[since:] if answer is not None)

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        busy = [pool.submit(load) for _ in range(4)]
        try:
            wait_for(lambda: len(answers) >= 12, 120)
            deploy("new.safetensors", new.digest)
            time.sleep(0.2)
            before = servers()
            os.kill(processes("ray::ServeReplica:capped:CappedServer")[0], signal.SIGKILL)
            # Its server goes with it. Another takes its place, and has the new content from its first answer on; Serve
            # itself says for a while that nothing has changed.
            wait_for(lambda: len(servers() & before) == 1 and len(servers() - before) == 1, 600)
            wait_for(lambda: replicas(cluster) == {"RUNNING": 2}, 600)
            begun = len(answers)
            wait_for(lambda: digests(begun)[new.digest] >= 30, 120)
        finally:
            stop.set()
            for one in busy:
                one.result()
    assert set(digests(begun)) == {new.digest}
    right = [(number, answer) for number, answer in answers if answer is not None and answer.status_code == 200]
    for number, answer in right:
        assert answer.json()["choices"][0]["text"] == wanted[answer.headers["x-axiscap-digest"]][number]
    assert {answer.headers["x-axiscap-digest"] for _, answer in right} == {old.digest, new.digest}
    assert len(answers) - len(right) <= 8  # what the dead replica had, and what came before Serve knew
    assert len(servers()) == 2
