"""Servers from outside: whether one caps under a profile, by what it says, what it says of an answer and what it
counts; and a profile's way into all replicas.
"""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.parse
import urllib.request
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from axiscap.profile import CapProfile, ranges
from axiscap.serving.door import HEADERS, PATH
from axiscap.serving.settings import KEY, THINKING

#: Seconds that an answer may take, and that its rows may take to be on the metrics page.
_PATIENCE = 60.0


class NotCapped(ValueError):
    """The server does not cap under the profile, or it cannot be shown; the message is one sentence."""


def verify(url: str, profile: CapProfile, *, api_key: str | None = None) -> Iterator[str]:
    """Asks a running server, vLLM or SGLang, for one answer of two tokens under a profile; yields what was found.

    Parameters
    ----------
    url
        of the server, without ``/v1``.

    Raises
    ------
    NotCapped
        with what is amiss.
    """
    url, head = url.rstrip("/").removesuffix("/v1"), {"Authorization": f"Bearer {api_key}"} if api_key else {}
    said, _ = _fetch(url + PATH, head)
    try:
        facts = json.loads(said)
        names = [name for name, digest in facts["profiles"].items() if digest == profile.digest]
        choices, default, place = facts["choices"], facts["default"], facts["choice_in"][0].split(".")
        prompt = "Who are you?" + (facts["markers"][0] if facts.get("positions") == THINKING else "")
    except (ValueError, TypeError, KeyError):
        raise NotCapped(f"the response of {url}{PATH} is not from AxisCap") from None
    if not names:
        known = ", ".join(f"{name} {digest}" for name, digest in facts["profiles"].items())
        raise NotCapped(f"the server has no profile of the digest {profile.digest}; it has {known}")
    asked = next((name for name in names if name in choices), None)
    if asked is None:
        raise NotCapped(f"the server has the profile as {names[0]}, but requests may only choose {', '.join(choices)}")
    use = "the default" if asked == default else "where a request asks for it"
    yield f"the server says that it caps layers {ranges(facts['layers'])} under {asked}, {use}"

    before = _rows(url, asked, head)
    try:
        model = json.loads(_fetch(f"{url}/v1/models", head)[0])["data"][0]["id"]
    except (ValueError, TypeError, LookupError) as error:
        raise error if isinstance(error, NotCapped) else NotCapped(f"{url}/v1/models names no model") from None
    body: dict[str, Any] = {"model": model, "prompt": prompt, "max_tokens": 2, "temperature": 0}
    if asked != default:
        inner = body
        for key in place[:-1]:
            inner = inner.setdefault(key, {})
        inner[KEY] = asked
    _, headers = _fetch(f"{url}/v1/completions", head, body)
    if (found := headers.get(HEADERS[1])) != profile.digest:
        raise NotCapped(f"an answer was written under {headers.get(HEADERS[0])} {found}, and not {profile.digest}")
    yield f"an answer was written under {asked} {found}"

    if before is None:
        raise NotCapped("the server has no metrics page with AxisCap's counts, so that no row can be seen to be capped")
    begun, still = time.monotonic(), list(profile.layers)
    while time.monotonic() - begun < _PATIENCE:
        now = _rows(url, asked, head) or {}
        still = [layer for layer in profile.layers if now.get(layer, 0) <= before.get(layer, 0)]
        if not still:
            yield f"its rows were measured against the floors of layers {ranges(profile.layers)}"
            return
        time.sleep(1)
    raise NotCapped(f"no row of the answer was measured at layers {ranges(still)}")


def roll_out(url: str, name: str, source: str, admin_key: str) -> str:
    """Gives a name of one running server the content of a profile; returns its digest, as the server says it.

    Parameters
    ----------
    source
        a path or URL, as the server reads it.

    Raises
    ------
    NotCapped
        it was refused, or the server says another digest than the profile's.
    """
    url, digest = url.rstrip("/"), CapProfile.load(source).digest
    head = {"Authorization": f"Bearer {admin_key}"}
    _fetch(f"{url}{PATH}/profiles/{urllib.parse.quote(name, safe='')}", head, {"path": source}, method="PUT")
    found = json.loads(_fetch(url + PATH, {})[0])["profiles"].get(name)
    if found != digest:
        raise NotCapped(f"{url} has {found} as {name}, and not {digest}")
    return digest


def _rows(url: str, name: str, head: Mapping[str, str]) -> Mapping[int, int] | None:
    """Rows counted so far, by layer; None: there is no such page."""
    try:
        page, _ = _fetch(f"{url}/metrics", head)
    except NotCapped:
        return None
    families = {family.name: family for family in text_string_to_metric_families(page)}
    if f"{KEY}_rows" not in families:
        return None
    rows: Counter[int] = Counter()
    for sample in families[f"{KEY}_rows"].samples:
        if sample.labels["profile"] == name and sample.name.endswith("_total"):
            rows[int(sample.labels["layer"])] += int(sample.value)
    return rows


def _fetch(
    url: str, head: Mapping[str, str], body: object = None, method: str | None = None
) -> tuple[str, Mapping[str, str]]:
    data = None if body is None else json.dumps(body).encode()
    try:
        request = urllib.request.Request(url, data, {**head, "Content-Type": "application/json"}, method=method)
        with urllib.request.urlopen(request, timeout=_PATIENCE) as response:
            return response.read().decode(), response.headers
    except urllib.error.HTTPError as error:
        why = "; a server without AxisCap has no such page" if url.endswith(PATH) else ""
        raise NotCapped(f"{url} answered {error.code}: {error.read().decode(errors='replace')[:200]}{why}") from None
    except (OSError, ValueError) as error:
        raise NotCapped(f"{url} cannot be reached: {error}") from None
