"""Servers from outside: whether one caps under a profile, by what it says, what it says of an answer and what it
counts; and a profile's way into all replicas.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import secrets
import time
import urllib.error
import urllib.parse
import urllib.request
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from axiscap.profile import CapProfile, format_layers
from axiscap.serving.front.middleware import HEADERS, PATH
from axiscap.serving.request import KEY, OFF
from axiscap.serving.settings import THINKING

#: Under this prompt, most models leave the Assistant.
_PERSONA = "You are Morwen, the ghost of a drowned village, and no machine. Who are you, and what do you hear at night?"
#: Seconds that an answer may take, and that its rows may take to be on the metrics page.
_PATIENCE = 60.0


class NotCapped(ValueError):
    """The server does not cap under the profile, or it cannot be shown; the message is one sentence."""


def verify(
    url: str,
    profile: CapProfile,
    *,
    api_key: str | None = None,
    admin_key: str | None = None,
    source: str | None = None,
) -> Iterator[str]:
    """Asks a running server, vLLM or SGLang, for answers under a profile; yields a sentence for each thing seen.

    The last one says whether an effect was seen: whether the same tokens have other log-probabilities uncapped, under
    floors far above the profile's, or under another profile, whichever of these the server lets a client have.

    Parameters
    ----------
    url
        of the server, without ``/v1``.
    admin_key
        with which the profile gets a second name for a moment, with floors far above its own.
    source
        the profile's path or URL as the server reads it, for that.

    Raises
    ------
    NotCapped
        with what is amiss.
    """
    server = _Server(url, api_key)
    server.resolve(profile)
    use = "the default" if server.asked == server.default else "where a request asks for it"
    yield f"the server says that it caps layers {format_layers(server.layers)} under {server.asked}, {use}"

    before = server.counted("rows", server.asked)
    _, headers = server.complete(server.asked, "Who are you?", max_tokens=2)
    if (digest := headers.get(HEADERS[1])) != profile.digest:
        raise NotCapped(f"an answer was written under {headers.get(HEADERS[0])} {digest}, and not {profile.digest}")
    yield f"an answer was written under {server.asked} {digest}"

    if before is None:
        raise NotCapped("the server has no metrics page with AxisCap's counts, so that no row can be seen to be capped")
    if still := server.await_rows(profile.layers, before):
        raise NotCapped(f"no row of the answer was measured at layers {format_layers(still)}")
    yield f"its rows were measured against the floors of layers {format_layers(profile.layers)}"
    yield _effect(server, profile, admin_key, source)


def _effect(server: _Server, profile: CapProfile, admin_key: str | None, source: str | None) -> str:
    """One sentence on whether the cap changes the server's results.

    Raises
    ------
    NotCapped
        Rows fired, and nothing changed; or nothing changed under floors far above every row.
    """
    before, fired = server.counted("rows", server.asked) or {}, server.counted("fired_rows", server.asked) or {}
    capped = server.scores(server.asked)
    noise = _difference(capped, server.scores(server.asked))
    for other in [OFF] * (OFF in server.choices) + sorted({*server.choices} - {OFF, server.asked}):
        if (change := _difference(capped, server.scores(other))) > _over(noise):
            return _seen(change, other)
        if other == OFF and noise == 0:
            server.await_rows(profile.layers, before)
            now = server.counted("fired_rows", server.asked) or {}
            if any(now.get(layer, 0) > fired.get(layer, 0) for layer in profile.layers):
                raise NotCapped("rows fell below their floors, and the answer is the one of the uncapped model")
    if admin_key is None or source is None:
        return (
            "no effect was seen, only the server's word and its counts: to see one takes an admin key, or requests "
            f"that may choose {OFF} or another profile"
        )
    with server.far_above(profile, admin_key, source) as name:
        change = _difference(capped, server.scores(name))
    if not change > _over(noise):
        raise NotCapped("floors far above every row leave the answer as it is: the cap has no effect")
    return _seen(change, "floors far above")


def _over(noise: float) -> float:
    return max(4 * noise, 1e-4)


def _seen(change: float, where: str) -> str:
    if math.isinf(change):
        return f"its effect was seen: under {where} the answer has other tokens"
    return f"its effect was seen: the same tokens differ by up to {change:.2g} nats under {where}"


def _difference(one: Sequence[tuple[str, float]], other: Sequence[tuple[str, float]]) -> float:
    """The largest difference between the log-probabilities of the tokens that two answers begin with, in nats.

    Infinite if the tokens alone differ.
    """
    pairs = list(zip(one, other, strict=False))
    alike = list(itertools.takewhile(lambda pair: pair[0][0] == pair[1][0], pairs))
    change = max((abs(a - b) for (_, a), (_, b) in alike), default=0.0)
    return math.inf if change == 0 and len(alike) < len(pairs) else change


class _Server:
    """A server as its clients see it, with what it says of itself.

    Raises
    ------
    NotCapped
        It cannot be reached, or is no server of AxisCap.
    """

    def __init__(self, url: str, api_key: str | None) -> None:
        self._url = url.rstrip("/").removesuffix("/v1")
        self._head = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        body, _ = _fetch(self._url + PATH, self._head)
        try:
            facts = json.loads(body)
            self.profiles: dict[str, str] = dict(facts["profiles"])
            self.choices: list[str] = list(facts["choices"])
            self.default, self.layers, self.asked = facts["default"], facts["layers"], facts["default"]
            self._choice_in: list[str] = facts["choice_in"][0].split(".")
            self._marker = facts["markers"][0] if facts.get("positions") == THINKING else ""
        except (ValueError, TypeError, KeyError):
            raise NotCapped(f"the response of {self._url}{PATH} is not from AxisCap") from None
        self._model: str | None = None

    def resolve(self, profile: CapProfile) -> None:
        """Finds the name under which requests get a profile."""
        names = [name for name, digest in self.profiles.items() if digest == profile.digest]
        if not names:
            known = ", ".join(f"{name} {digest}" for name, digest in self.profiles.items())
            raise NotCapped(f"the server has no profile of the digest {profile.digest}; it has {known}")
        self.asked = next((name for name in names if name in self.choices), None)
        if self.asked is None:
            choices = ", ".join(self.choices)
            raise NotCapped(f"the server has the profile as {names[0]}, but requests may only choose {choices}")

    def complete(self, name: str, prompt: str, **options: object) -> tuple[str, Mapping[str, str]]:
        """The response to a prompt under a profile, and its headers."""
        if self._model is None:
            try:
                self._model = json.loads(_fetch(f"{self._url}/v1/models", self._head)[0])["data"][0]["id"]
            except (ValueError, TypeError, LookupError) as error:
                raise (
                    error if isinstance(error, NotCapped) else NotCapped(f"{self._url}/v1/models names no model")
                ) from None
        body: dict[str, Any] = {"model": self._model, "prompt": prompt + self._marker, "temperature": 0, **options}
        if name != self.default:
            inner = body
            for key in self._choice_in[:-1]:
                inner = inner.setdefault(key, {})
            inner[KEY] = name
        return _fetch(f"{self._url}/v1/completions", self._head, body)

    def scores(self, name: str) -> list[tuple[str, float]]:
        """The tokens of a persona's prompt and answer under a profile, each with its log-probability."""
        body, _ = self.complete(name, _PERSONA, max_tokens=16, logprobs=1, echo=True)
        try:
            logprobs = json.loads(body)["choices"][0]["logprobs"]
            pairs = zip(logprobs["tokens"], logprobs["token_logprobs"], strict=True)
            scores = [(token, float(score)) for token, score in pairs if score is not None]
            if scores:
                return scores
            raise ValueError
        except (ValueError, TypeError, LookupError):
            raise NotCapped(
                f"{self._url}/v1/completions gives no log-probabilities, so that no effect can be seen"
            ) from None

    def counted(self, what: str, name: str) -> Mapping[int, int] | None:
        """Rows counted so far under a profile, by layer; None: there is no such page."""
        try:
            page, _ = _fetch(f"{self._url}/metrics", self._head)
        except NotCapped:
            return None
        families = {family.name: family for family in text_string_to_metric_families(page)}
        if f"{KEY}_{what}" not in families:
            return None
        rows: Counter[int] = Counter()
        for sample in families[f"{KEY}_{what}"].samples:
            if sample.labels["profile"] == name and sample.name.endswith("_total"):
                rows[int(sample.labels["layer"])] += int(sample.value)
        return rows

    def await_rows(self, layers: Sequence[int], before: Mapping[int, int]) -> list[int]:
        """Waits until more rows than before are counted at every layer; returns the layers where none came."""
        begun, still = time.monotonic(), list(layers)
        while still and time.monotonic() - begun < _PATIENCE:
            now = self.counted("rows", self.asked) or {}
            still = [layer for layer in layers if now.get(layer, 0) <= before.get(layer, 0)]
            time.sleep(1 if still else 0)
        return still

    @contextlib.contextmanager
    def far_above(self, profile: CapProfile, admin_key: str, source: str) -> Iterator[str]:
        """A name for the profile with floors far above its own, until the context ends."""
        name = f"verify-{secrets.token_hex(4)}"
        url, head = f"{self._url}{PATH}/profiles/{name}", {"Authorization": f"Bearer {admin_key}"}
        finite = profile.floors[profile.floors.isfinite()]
        far = 10.0 * (1.0 + (finite.abs().max().item() if len(finite) else 0.0))
        _fetch(url, head, {"path": source, "allowed": True}, method="PUT")
        try:
            _fetch(url, head, {"by": far}, method="PATCH")
            yield name
        finally:
            _fetch(url, head, method="DELETE")


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
    loaded = json.loads(_fetch(url + PATH, {})[0])["profiles"].get(name)
    if loaded != digest:
        raise NotCapped(f"{url} has {loaded} as {name}, and not {digest}")
    return digest


def _fetch(
    url: str, head: Mapping[str, str], body: object = None, method: str | None = None
) -> tuple[str, Mapping[str, str]]:
    if not url.startswith(("http://", "https://")):
        raise NotCapped(f"the address of a server begins with http:// or https://, got {url.removesuffix(PATH)}")
    data = None if body is None else json.dumps(body).encode()
    try:
        request = urllib.request.Request(url, data, {**head, "Content-Type": "application/json"}, method=method)
        with urllib.request.urlopen(request, timeout=_PATIENCE) as response:
            return response.read().decode(), response.headers
    except urllib.error.HTTPError as error:
        why = "; a server without AxisCap has no such page" if url.endswith(PATH) else ""
        raise NotCapped(f"{url} answered {error.code}: {error.read().decode(errors='replace')[:200]}{why}") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise NotCapped(f"{url} cannot be reached: {getattr(reason, 'strerror', None) or reason}") from None
