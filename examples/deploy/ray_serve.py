"""Capped vLLM behind Ray Serve: each replica runs vLLM's own server, and is healthy while that caps as it should.

    serve run examples/deploy/ray_serve.yaml

A profile is rolled out by `serve deploy` of the same file with another place in ``user_config``: Serve has the running
replicas load it, without a restart and one after the other, and the replicas that it starts later. Each answer is as a
whole of the old content or of the new one, and says of which in its head.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import secrets
import signal
import socket
import subprocess
from collections.abc import AsyncIterator
from typing import Any

import httpx
from ray import serve
from starlette.requests import Request
from starlette.responses import StreamingResponse

#: Of one connection, and those that the client of a response must not be told of as its own.
_HOP_BY_HOP = {"connection", "keep-alive", "te", "trailer", "transfer-encoding", "upgrade", "host", "content-length"}
_PR_SET_PDEATHSIG = 1


def _end_with_parent() -> None:
    """In the server's process: it ends when its replica does, however that ends."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@serve.deployment
class CappedServer:
    """
    Args:
        command: starts vLLM's server, less its address; its configuration caps.
        start_timeout: seconds that the server has to begin.
    """

    async def __init__(self, command: list[str], start_timeout: float = 600.0) -> None:
        self._key = secrets.token_hex(16)  # nobody but this replica changes this server's profiles
        self._wanted: dict[str, str] = {}
        self._changing = asyncio.Lock()
        port = _free_port()
        self._client = httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=None)
        self._server = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)],
            env=os.environ | {"AXISCAP_ADMIN_KEY": self._key},
            preexec_fn=_end_with_parent,
        )
        async with asyncio.timeout(start_timeout):
            while True:
                if self._server.poll() is not None:
                    raise RuntimeError(f"vLLM's server ended with status {self._server.returncode}; its log says why")
                try:
                    (await self._client.get("/health")).raise_for_status()
                    return
                except httpx.HTTPError:
                    await asyncio.sleep(0.5)

    async def reconfigure(self, config: dict[str, Any]) -> None:
        """Gives the server the profiles of ``user_config``: by name a path or URL, with # and the digest behind it."""
        for name, place in config["profiles"].items():
            _, pinned, digest = place.partition("#")
            if not pinned:
                raise ValueError(f"profile {name} must be a path or URL with # and its digest, got {place}")
            async with self._changing:
                head = {"Authorization": f"Bearer {self._key}"}
                answer = await self._client.put(f"/axiscap/profiles/{name}", json={"path": place}, headers=head)
                if answer.is_error:
                    raise RuntimeError(f"profile {name} was not taken: {answer.text}")
                self._wanted[name] = digest

    async def check_health(self) -> None:
        """Serve puts another replica in this one's place where the server is gone, or caps with other content."""
        (await self._client.get("/health", timeout=10)).raise_for_status()
        async with self._changing:
            facts = (await self._client.get("/axiscap", timeout=10)).raise_for_status().json()
        for name, digest in self._wanted.items():
            if facts["profiles"].get(name) != digest:
                raise RuntimeError(f"the server has {facts['profiles'].get(name)} as {name}, and not {digest}")

    async def __call__(self, request: Request) -> StreamingResponse:
        head = {key: value for key, value in request.headers.items() if key not in _HOP_BY_HOP}
        target = httpx.URL(path=request.url.path, query=request.url.query.encode())
        asked = self._client.build_request(request.method, target, headers=head, content=await request.body())
        answer = await self._client.send(asked, stream=True)

        async def body() -> AsyncIterator[bytes]:
            try:
                async for chunk in answer.aiter_raw():
                    yield chunk
            finally:
                await answer.aclose()

        kept = {key: value for key, value in answer.headers.items() if key not in _HOP_BY_HOP}
        return StreamingResponse(body(), status_code=answer.status_code, headers=kept)

    def __del__(self) -> None:
        self._server.terminate()


def app(args: dict[str, Any]) -> serve.Application:
    """What `serve run` deploys: ``args`` are those of :class:`CappedServer`."""
    return CappedServer.bind(**args)
