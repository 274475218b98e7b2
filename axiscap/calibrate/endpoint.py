"""An OpenAI-compatible endpoint: whoever writes answers, or judges them, elsewhere."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

#: Calls of an endpoint under way at once, and attempts of each.
CONCURRENT, ATTEMPTS = 16, 5


class Endpoint:
    """An OpenAI-compatible endpoint, asked by several threads at once; what fails for a while is asked again.

    Parameters
    ----------
    base_url
        such as ``http://127.0.0.1:8000/v1``; ``OPENAI_BASE_URL`` without it. ``OPENAI_API_KEY`` is the key.

    Raises
    ------
    ValueError
        no address.
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
        """The name of the first model that it lists."""
        return str(self._call("GET", "models")["data"][0]["id"])

    def chat(self, model: str, messages: Sequence[Mapping[str, str]], **sampling: Any) -> str:
        """Its answer to a conversation."""
        reply = self._call("POST", "chat/completions", {"model": model, "messages": list(messages), **sampling})
        return str(reply["choices"][0]["message"]["content"] or "")
