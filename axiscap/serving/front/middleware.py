"""ASGI middleware of a capped server.

It refuses a request that names a profile where the engine would not read it, writes the profile in force and the
answers' drift into responses, describes the server at ``/axiscap``, and changes profiles for holders of the admin key.
"""

from __future__ import annotations

import contextvars
import dataclasses
import hmac
import json
import os
import re
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, get_args

from axiscap.serving.front.profiles import ServedProfiles
from axiscap.serving.request import KEY, RequestedProfile
from axiscap_plugin.wrapping import is_nearly, wrap

#: The route that describes what the server caps with. The routes below change profiles.
PATH = "/axiscap"
#: The environment variable with the key of those who may change profiles.
ADMIN_VARIABLE = "AXISCAP_ADMIN_KEY"
#: The headers with the name and the digest of the profile in force, or "off" and "-". A request for several answers
#: under several profiles gets all of them.
HEADERS = ("x-axiscap-profile", "x-axiscap-digest")

#: The header with each answer's drift, if the operator allows it: the percentile of its mean projection among the
#: model's normal answers, the share of rows that fired, the number of rows, and the layer.
DRIFT_HEADER = "x-axiscap-drift"
#: The most answers whose drift one response has: beam search makes hundreds of requests from one.
_MOST_ANSWERS = 128
#: The end of a stream in OpenAI's format, and a mark of the last chunk of an answer or of the usage chunk.
_DONE = b"data: [DONE]"
_LAST = re.compile(rb'"finish_reason": ?"|"choices": ?\[\]')

#: The fields with a client's own words. A key of AxisCap in them names no profile.
_CONTENT = {
    *("messages", "prompt", "input", "text", "system", "instructions", "documents", "metadata"),
    *("tools", "tool_choice", "functions", "chat_template_kwargs"),
    *("response_format", "structured_outputs", "guided_json", "json_schema"),
}
_MENTIONED = re.compile(rb"axis[\W_]*cap", re.IGNORECASE)

_Message = dict[str, Any]
_Receive = Callable[[], Awaitable[_Message]]
_Send = Callable[[_Message], Awaitable[None]]
_App = Callable[[_Message, _Receive, _Send], Awaitable[None]]
#: Changes profiles: called with the application, the name of the method and its arguments; returns its answer.
Change = Callable[[Any, str, Sequence[Any]], Awaitable[str]]


class _ResponseFacts:
    """Facts for the response of the request that runs in this context: digests by profile, and answers by ticket."""

    def __init__(self) -> None:
        self.decisions: dict[str, str] = {}
        self.tickets: dict[str, int] = {}


_facts: contextvars.ContextVar[_ResponseFacts] = contextvars.ContextVar("axiscap_known")


def note_profile(requested: RequestedProfile, answers: int) -> None:
    """Notes the profile of the request that runs in this context, for its response."""
    facts = _facts.get(None)
    if facts is not None:
        facts.decisions[requested.name or "off"] = requested.digest or "-"
        if requested.ticket is not None and requested.digest is not None:
            facts.tickets[requested.ticket] = answers


_wrapped: tuple[ServedProfiles, Collection[tuple[str, ...]], Change]


def wrap_applications(profiles: ServedProfiles, places: Collection[tuple[str, ...]], change: Change) -> None:
    """Puts a :class:`Middleware` around every FastAPI application that this process begins to serve."""
    global _wrapped
    from fastapi import FastAPI

    _wrapped = profiles, places, change
    wrap(FastAPI, "build_middleware_stack", _add_middleware)


def _add_middleware(original: Callable[[Any], _App], app: Any) -> _App:
    return Middleware(original(app), *_wrapped)


class _Refusal(Exception):
    """A refusal: an HTTP status and a sentence."""


class Middleware:
    """An ASGI application around the server's own.

    Parameters
    ----------
    places
        where a request's body may carry its choice, each the keys that lead there from the top.
    change
        changes profiles.
    """

    def __init__(
        self, app: _App, profiles: ServedProfiles, places: Collection[tuple[str, ...]], change: Change
    ) -> None:
        self._app, self._profiles, self._places, self._change = app, profiles, places, change

    async def __call__(self, scope: _Message, receive: _Receive, send: _Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        path = scope["path"].removeprefix(scope.get("root_path", "")).rstrip("/")
        own = path == PATH or path.startswith(PATH + "/")
        try:
            if own:
                return await _answer(send, 200, await self._own(scope, path, receive))
            if scope["method"] == "POST" and not _header(scope, b"content-type").startswith(b"multipart/"):
                body = await _body(receive)
                if _MENTIONED.search(body):
                    self._check(scope, path, body)
                receive = _replay(body, receive)
        except _Refusal as refusal:
            status, sentence = refusal.args
            error = {"message": sentence, "type": "BadRequestError", "param": KEY, "code": status}
            return await _answer(send, status, {"error": error})
        facts = _ResponseFacts()
        _facts.set(facts)
        await self._app(scope, receive, self._with_headers(send, facts))

    # Misplaced keys.

    def _check(self, scope: _Message, path: str, body: bytes) -> None:
        """Raises if the body has a key of AxisCap that the server would ignore."""
        try:
            request = json.loads(body)
        except ValueError:
            return  # the engine says so
        if not isinstance(request, dict):
            return
        if path == "/collective_rpc" and str(request.get("method")).startswith(f"{KEY}_"):
            raise _Refusal(403, f"profiles are changed at {PATH}/profiles, with the key in {ADMIN_VARIABLE}")
        takes = _fields(scope)
        mine = [place for place in self._places if place[0] in takes]
        mentions = list(_mentions(request))
        read = [value for (*place, key), value in mentions if key == KEY and tuple(place) in mine]
        for keys, value in mentions:
            if value in read:  # in its place, or once more for another engine
                continue
            where = " or ".join(".".join((*place, KEY)) for place in mine)
            name = ".".join(keys)[:80]
            if not mine:
                raise _Refusal(400, f"{path} takes no choice of a profile, and {name} would not be read")
            raise _Refusal(400, f"a profile is chosen in {where}; {name} would not be read")

    # Headers and drift.

    def _with_headers(self, send: _Send, facts: _ResponseFacts) -> _Send:
        """A ``send`` that adds headers and drift.

        It holds the head of a response back until the body begins, since a stream's head is made before a profile is
        assigned. The drift goes into the head of a complete response, or to the end of a stream.
        """
        held: list[_Message] = []
        is_stream = False

        async def release(drift: Sequence[Mapping[str, float]] = (), *, done: bool = False) -> None:
            words = [", ".join(values) for values in (facts.decisions, facts.decisions.values()) if facts.decisions]
            more = [(name.encode(), value.encode()) for name, value in zip(HEADERS, words, strict=False)]
            if drift and not is_stream:
                more.append((DRIFT_HEADER.encode(), _format_drift(drift).encode()))
            elif drift and not (done and _add_to_last_chunk(held, drift)):
                comment = f": {DRIFT_HEADER}: {_format_drift(drift)}\n\n".encode()
                held.insert(-1, {"type": "http.response.body", "body": comment, "more_body": True})
            while held:
                message = held.pop(0)
                if message["type"] == "http.response.start":
                    message = {**message, "headers": [*message.get("headers", ()), *more]}
                await send(message)

        async def later(message: _Message) -> None:
            nonlocal is_stream
            if message["type"] == "http.response.start":
                is_stream = _header(message, b"content-type").startswith(b"text/event-stream")
                if message["status"] != 200:
                    facts.tickets.clear()
                held.append(message)
                return
            body, ends = message.get("body", b""), not message.get("more_body", False)
            done = is_stream and body.lstrip().startswith(_DONE)
            last = is_stream and bool(facts.tickets) and _LAST.search(body) is not None
            if last:
                await release()  # another answer's last piece
            held.append(message)
            if facts.tickets and (ends or done):
                tickets, facts.tickets = facts.tickets, {}
                few = sum(tickets.values()) <= _MOST_ANSWERS
                await release(await self._profiles.await_drift(tickets) if few else (), done=done)
            elif not facts.tickets or (is_stream and not last):
                await release()

        return later

    # The server's own routes.

    async def _own(self, scope: _Message, path: str, receive: _Receive) -> object:
        if path == PATH and scope["method"] == "GET":
            places = [".".join((*place, KEY)) for place in self._places]
            return {**self._profiles.describe(), "choice_in": places}
        named = re.fullmatch(rf"{PATH}/profiles/([^/]+)", path)
        method = {"PUT": "load", "PATCH": "move_floors", "DELETE": "retire"}.get(scope["method"])
        if named is None or method is None:
            raise _Refusal(404, f"there are GET {PATH}, and PUT, PATCH and DELETE {PATH}/profiles/NAME")
        key = os.environ.get(ADMIN_VARIABLE)
        if not key:
            raise _Refusal(403, f"this server was started without {ADMIN_VARIABLE}, so profiles cannot be changed")
        shown = _header(scope, b"authorization").removeprefix(b"Bearer ")
        if not hmac.compare_digest(shown, key.encode()):
            raise _Refusal(401, f"the header Authorization must be Bearer and the key in {ADMIN_VARIABLE}")
        arguments = [named[1], *_arguments(method, await _body(receive))]
        try:
            return {"done": await self._change(scope["app"], f"{KEY}_{method}", arguments)}
        except Exception as error:
            raise _Refusal(400, str(error).rpartition(" method failed: ")[2]) from None


def _arguments(method: str, body: bytes) -> list[Any]:
    """The arguments of a change after the profile's name, from the request's body."""
    if method == "retire":
        return []
    wanted = ["path", "allowed"] if method == "load" else ["by"]
    try:
        fields = json.loads(body or b"null")
    except ValueError:
        fields = None
    if not isinstance(fields, dict) or set(fields) - set(wanted) or wanted[0] not in fields:
        raise _Refusal(400, f"the body must be a JSON object of {' and, where it is wanted, '.join(wanted)}")
    return [fields[name] for name in wanted if name in fields]


def _mentions(body: object, at: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], object]]:
    """The values under AxisCap's key, in any spelling, each with the keys that lead to it."""
    if isinstance(body, Mapping):
        for key, value in body.items():
            if is_nearly(key):
                yield (*at, str(key)), value
            elif key not in _CONTENT:
                yield from _mentions(value, (*at, str(key)))
    elif isinstance(body, list):
        for value in body:
            yield from _mentions(value, at)


def _fields(scope: _Message) -> set[str]:
    """The fields of the body that the request's route declares; none if the route parses its body itself."""
    from starlette.routing import Match

    for route in scope["app"].routes:
        if route.matches(scope)[0] == Match.FULL:
            parameters = getattr(getattr(route, "dependant", None), "body_params", ())
            return {name for parameter in parameters for name in _names(parameter.field_info.annotation)}
    return set()


def _names(kind: Any) -> set[str]:
    own = set(getattr(kind, "model_fields", ()))
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        own |= {field.name for field in dataclasses.fields(kind)}
    return own.union(*map(_names, get_args(kind)))


def _format_drift(drift: Sequence[Mapping[str, float]]) -> str:
    return ", ".join("; ".join(f"{name}={value:g}" for name, value in answer.items()) for answer in drift)


def _add_to_last_chunk(held: list[_Message], drift: Sequence[Mapping[str, float]]) -> bool:
    """Puts the drift into the last chunk before a stream's end, as a field, since many clients ignore comments."""
    for message in reversed(held[:-1]):
        before, prefix, piece = message.get("body", b"").rpartition(b"data: ")
        try:
            chunk = json.loads(piece)
        except ValueError:
            continue
        if prefix and isinstance(chunk, dict):
            chunk[KEY] = {"drift": list(drift)}
            message["body"] = before + prefix + json.dumps(chunk, ensure_ascii=False).encode() + b"\n\n"
            return True
    return False


# ASGI.


def _header(scope: _Message, name: bytes) -> bytes:
    return next((value for key, value in scope["headers"] if key.lower() == name), b"")


async def _body(receive: _Receive) -> bytes:
    parts = []
    while True:
        message = await receive()
        parts.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(parts)


def _replay(body: bytes, receive: _Receive) -> _Receive:
    """A ``receive`` that replays a body that was read."""
    first = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> _Message:
        return first.pop() if first else await receive()

    return replay


async def _answer(send: _Send, status: int, content: object) -> None:
    body = json.dumps(content).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
