"""A client of an OpenAI-compatible endpoint, which writes answers or judges them."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

#: Concurrent calls of an endpoint, and attempts of each call.
CONCURRENT, ATTEMPTS = 16, 5


class Endpoint:
    """A client that several threads may share. Transport errors and status 429 or 5xx are retried.

    Parameters
    ----------
    base_url
        such as ``http://127.0.0.1:8000/v1``; None: ``OPENAI_BASE_URL``. The key is ``OPENAI_API_KEY``.

    Raises
    ------
    ValueError
        there is no address.
    """

    def __init__(self, base_url: str | None = None) -> None:
        try:
            import httpx
        except ModuleNotFoundError:
            raise ModuleNotFoundError("asking an endpoint needs httpx: pip install 'axiscap[calibrate]'") from None
        self.base = (base_url or os.environ.get("OPENAI_BASE_URL") or "").rstrip("/")
        if not self.base:
            raise ValueError("an endpoint needs its address: set OPENAI_BASE_URL")
        key = os.environ.get("OPENAI_API_KEY") or "none"
        self.retried = httpx.TransportError
        self.client = httpx.Client(headers={"Authorization": f"Bearer {key}"}, timeout=120)

    def _call(self, method: str, path: str, body: Any = None) -> Any:
        for attempt in range(ATTEMPTS):
            try:
                reply = self.client.request(method, f"{self.base}/{path}", json=body)
                if reply.status_code == 429 or reply.status_code >= 500:
                    raise self.retried(f"status {reply.status_code}")
                if reply.status_code >= 400:
                    raise ValueError(f"the endpoint at {self.base} refuses: {reply.status_code} {reply.text[:200]}")
                return reply.json()
            except self.retried as error:
                if attempt == ATTEMPTS - 1:
                    raise ConnectionError(f"the endpoint at {self.base} does not answer: {error}") from None
                time.sleep(min(8.0, 0.5 * 2**attempt))
        raise AssertionError

    def first_model(self) -> str:
        """The name of the first model that the endpoint lists."""
        return str(self._call("GET", "models")["data"][0]["id"])

    def chat(self, model: str, messages: Sequence[Mapping[str, str]], **sampling: Any) -> str:
        """The model's answer to a conversation."""
        reply = self._call("POST", "chat/completions", {"model": model, "messages": list(messages), **sampling})
        return str(reply["choices"][0]["message"]["content"] or "")
