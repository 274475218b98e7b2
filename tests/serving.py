"""What the tests of both engines share: real servers, prompts, profiles, and the capped model they must agree with."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import torch
from conftest import SHIPPED_PROFILE

import axiscap
from axiscap import CapProfile

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


def make_profiles(folder: Path) -> dict[str, CapProfile]:
    """The shipped profile, one with much higher floors, and one that measures and changes nothing."""
    shipped = CapProfile.load(SHIPPED_PROFILE)
    profiles = {
        "mild": shipped,
        "strict": shipped.with_floors(shipped.floors + 8),
        "watch": shipped.measuring_only(),
    }
    for name, profile in profiles.items():
        profile.save(folder / f"{name}.safetensors")
    return profiles


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Server:
    """A real server in a process of its own."""

    def __init__(self, process: subprocess.Popen[bytes], url: str, log: Path) -> None:
        self.process, self.url, self.log = process, url, log
        self.client = httpx.Client(base_url=url, timeout=300)

    def complete(self, prompt: str, axiscap: object = None, **options: object) -> httpx.Response:
        body = {"model": "m", "prompt": prompt, "temperature": 0, "max_tokens": 24, **options}
        return self.client.post("/v1/completions", json=body | self.choice(axiscap))

    def choice(self, axiscap: object) -> dict[str, object]:
        return {} if axiscap is None else {"vllm_xargs": {"axiscap": axiscap}}

    def text(self, prompt: str, axiscap: object = None, **options: object) -> str:
        response = self.complete(prompt, axiscap, **options)
        assert response.status_code == 200, response.text
        return response.json()["choices"][0]["text"]

    def metrics(self) -> dict[str, float]:
        lines = self.client.get("/metrics").text.splitlines()
        return {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in lines if not line.startswith("#")}


@contextlib.contextmanager
def running(command: list[str], folder: Path, **environment: str) -> Iterator[Server]:
    port = free_port()
    log = folder / f"server-{port}.log"
    command = [sys.executable, *command, "--host", "127.0.0.1", "--port", str(port)]
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=os.environ | environment)
    try:
        server = Server(process, f"http://127.0.0.1:{port}", log)
        while process.poll() is None:
            with contextlib.suppress(httpx.TransportError):
                if server.client.get("/health").status_code == 200:
                    break
            time.sleep(0.5)
        assert process.poll() is None, "\n".join(line for line in log.read_text().splitlines() if "Error" in line)[
            -6000:
        ]
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
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, timeout=300)
    assert done.returncode != 0
    return done.stdout + done.stderr


def expected_texts(model, tokenizer, prompts: list[str], profile: CapProfile | None, tokens: int) -> list[str]:
    """The transformers model's greedy continuations, every row of prompt and answer capped."""
    texts = []
    for prompt in prompts:
        inputs = tokenizer(prompt, return_tensors="pt")
        options = {"max_new_tokens": tokens, "do_sample": False, "pad_token_id": tokenizer.pad_token_id}
        with torch.inference_mode(), contextlib.ExitStack() as stack:
            if profile is not None:
                stack.enter_context(axiscap.install(model, profile))
            answer = model.generate(**inputs, **options)[0, inputs["input_ids"].shape[1] :]
        texts.append(tokenizer.decode(answer, skip_special_tokens=True))
    return texts


def assert_same_texts(found: list[str], wanted: list[str]) -> None:
    differences = [
        f"{prompt!r}\n  served:       {one!r}\n  transformers: {other!r}"
        for prompt, one, other in zip(PROMPTS, found, wanted, strict=True)
        if one != other
    ]
    assert not differences, f"{len(differences)} of {len(found)} differ:\n" + "\n".join(differences)


def configuration(folder: Path, **more: object) -> str:
    paths = {name: str(folder / f"{name}.safetensors") for name in ("mild", "strict", "watch")}
    settings = {"profiles": paths, "default": "mild", "allowed": ["strict", "watch"], "allow_off": True, **more}
    return json.dumps({"axiscap": settings})
