"""Which profile each request gets, and how profiles change while requests run: two sides of one registry."""

from __future__ import annotations

import contextlib
import copy
import json
import math
import secrets
import threading
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from axiscap.profile import CapProfile
from axiscap.serving import state
from axiscap.serving.settings import KEY, Choice, ChoiceError, Registry, Settings, SettingsError

_REGISTRY = "registry.json"
#: Seconds that a response waits for its workers' word on its drift: they have it one step after its last token.
_PATIENCE = 1.0
#: Beside a request's choice (:class:`Told`).
TOLD = f"{KEY}_told"


class Told(NamedTuple):
    """What a request's client is told of its profile, which the request carries along; name and digest are None where
    it is left alone.

    ``ticket``: a name that nobody guesses, by which the process that has the client asks how far the answer drifted;
    None: nobody asks.
    """

    name: str | None
    digest: str | None
    ticket: str | None

    def put(self, extra: Mapping[str, Any] | None) -> dict[str, Any]:
        """A request's extra arguments with it, in place of what a client may have written there."""
        return {**(extra or {}), TOLD: list(self)}

    @classmethod
    def of(cls, extra: Mapping[str, Any] | None) -> Told | None:
        """Reads it from where :meth:`put` left it.

        Raises
        ------
        ChoiceError
            something else is there.
        """
        match (extra or {}).get(TOLD):
            case None:
                return None
            case [str() | None as name, str() | None as digest, None]:
                return cls(name, digest, None)
            case [str() | None as name, str() | None as digest, str(ticket)] if ticket.isalnum():  # it names a file
                return cls(name, digest, ticket)
        raise ChoiceError(f"{TOLD} is set by the server only")


class Choices:
    """For processes that talk to clients: the configuration's registry, then whatever :class:`Control` wrote last."""

    def __init__(self, settings: Settings, folder: Path) -> None:
        self._settings = settings
        self._registry = Registry(settings)
        self._path = folder / _REGISTRY
        self._seen: int | None = None

    def check(self, extra: Mapping[str, Any] | None) -> Told:
        """The profile that a request gets, by its extra arguments.

        Raises
        ------
        ChoiceError
            it asks for what it may not have.
        """
        self._look()
        name = self._registry.choose((extra or {}).get(KEY))
        ticket = secrets.token_hex(16) if self._settings.tell_drift else None
        return Told(name, None if name is None else self._registry.names[name], ticket)

    async def drift(self, tickets: Mapping[str, int]) -> list[dict[str, float]]:
        """What there is to tell of the answers of some tickets, by each its number of answers; waits for the workers to
        have counted them, for a second at most.
        """
        found = await state.await_answers(self._path.parent, tickets, _PATIENCE)
        return [answer for ticket in tickets for answer in found[ticket]]

    def describe(self) -> dict[str, Any]:
        """What the server caps with, for people and probes."""
        from axiscap import __version__

        self._look()
        registry = self._registry
        facts: dict[str, Any] = {"profiles": registry.names, "default": registry.default, "choices": registry.choices}
        facts |= {"layers": self._settings.layers, "positions": self._settings.positions}
        if self._settings.tells_thinking:
            facts["markers"] = self._settings.markers
        return {"version": __version__, **facts}

    def _look(self) -> None:
        # Where the folder was cleaned away, what was read last holds; the engine decides by its own.
        with contextlib.suppress(OSError):
            changed = self._path.stat().st_mtime_ns
            if changed != self._seen:
                self._registry.update(json.loads(self._path.read_text()))
                self._seen = changed


class Control:
    """For the process that schedules requests: decides for each, where no client reaches, and changes profiles.

    Parameters
    ----------
    place
        called with slot, digest, path and floors (or None) of a profile; puts it into every worker.
    share
        whether this process writes the registry for those that talk to clients.
    """

    def __init__(
        self, settings: Settings, folder: Path, place: Callable[[int, str, str, Any], object], *, share: bool = True
    ) -> None:
        self._settings = settings
        self._registry = Registry(settings)
        #: Of each name its file, and the digest of what was in it.
        self._files = {name: (path, settings.digests[name]) for name, path in settings.profiles.items()}
        self._file = folder / _REGISTRY if share else None
        self._place = place
        self._live: weakref.WeakSet[Any] = weakref.WeakSet()
        #: Requests may be decided in one thread while profiles change in another.
        self.lock = threading.RLock()
        self._save(self._registry)

    def _save(self, registry: Registry) -> None:
        if self._file is not None:
            state.write(self._file, registry.to_json())

    def decide(self, extra: Mapping[str, Any] | None, request: str) -> Choice:
        """The decision about a request, by its extra arguments and its id.

        Raises
        ------
        ChoiceError
            it asks for what it may not have, or its client was told of content that was replaced on the
            way here.
        """
        extra = extra or {}
        name = self._registry.choose(extra.get(KEY))
        digest = None if name is None else self._registry.names[name]
        told = Told.of(extra) or Told(name, digest, None)  # none where an engine is called from Python
        if told.digest != digest:
            raise ChoiceError(f"profile {name} was replaced while the request was on its way; send it again")
        return Choice(name, digest, request, told.ticket, self._settings.part)

    def begun(self, request: Any, choice: Choice) -> None:
        """The engine's own object for a request lives from now on; while it does, its profile keeps its slot."""
        request.axiscap_digest = choice.digest
        self._live.add(request)

    def load(self, name: str, path: str, allowed: bool = False) -> str:
        """Gives a name a profile, new or in place of its old one; running requests keep what they began with.

        Parameters
        ----------
        allowed
            whether requests may choose it.

        Raises
        ------
        ValueError
            the profile does not fit, or no slot is free.
        """
        for what, value in (("name", name), ("path", path)):
            if not isinstance(value, str):
                raise ValueError(f"{what} must be a string, got {value!r}")
        if not isinstance(allowed, bool):
            raise ValueError(f"allowed must be true or false, got {allowed!r}")
        return self._change(name, path, None, allowed)

    def move_floors(self, name: str, by: float) -> str:
        """Gives a name its file's floors raised by so much, in units of the projection (lowered, where negative).

        Raises
        ------
        ValueError
            there is no such profile, by is no finite number, or the file has other content by now.
        """
        self._registry.check(name)
        if isinstance(by, bool) or not isinstance(by, (int, float)) or not math.isfinite(by):
            raise ValueError(f"by must be a finite number, in units of the projection, got {by!r}")
        path, digest = self._files[name]
        floors = read_profile(path, None, digest).floors
        return self._change(name, path, (floors + by).tolist(), allowed=False)

    def retire(self, name: str) -> str:
        """Forgets a profile: no new request gets it."""
        with self.lock:
            registry = copy.deepcopy(self._registry)
            registry.retire(name)
            self._save(registry)
            self._registry = registry
        return f"retired {name}"

    def _change(self, name: str, path: str, floors: list[list[float]] | None, allowed: bool) -> str:
        profile = read_profile(path, floors)
        extra = sorted(set(profile.layers) - set(self._settings.layers))
        if extra:
            raise ValueError(
                f"the profile caps layers {extra}, and this server was started to cap {self._settings.layers}; start "
                "it with a profile that caps them"
            )
        self._settings.check_profile(name, profile)
        with self.lock:
            in_use = {request.axiscap_digest for request in self._live if request.axiscap_digest}
            registry = copy.deepcopy(self._registry)
            slot = registry.place(name, profile.digest, in_use, allowed=allowed)
            self._place(slot, profile.digest, path, floors)
            self._save(registry)
            self._registry = registry
            if floors is None:
                self._files[name] = path, profile.digest
        return f"{name} is {profile.digest} in slot {slot}"


def read_profile(path: str, floors: list[list[float]] | None, digest: str | None = None) -> CapProfile:
    """A profile from its file, with other floors where they were moved.

    Raises
    ------
    SettingsError
        its content is not the one that was decided on.
    """
    profile = CapProfile.load(path)
    if floors is not None:
        profile = profile.with_floors(torch.tensor(floors))
    if digest is not None and profile.digest != digest:
        raise SettingsError(f"axiscap: {path} is not what it was when the server read it first")
    return profile
