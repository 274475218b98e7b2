"""The profiles that clients may ask for, in a process that talks to clients."""

from __future__ import annotations

import contextlib
import json
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from axiscap.serving import shared_folder
from axiscap.serving.registry import REGISTRY_FILE, Registry
from axiscap.serving.request import KEY, RequestedProfile
from axiscap.serving.settings import Settings

#: Seconds that a response waits for its workers' drift: they write it one step after the answer's last token.
_PATIENCE = 1.0


class ServedProfiles:
    """For processes that talk to clients: the configuration's registry, then whatever :class:`Control` wrote last."""

    def __init__(self, settings: Settings, folder: Path) -> None:
        self._settings = settings
        self._registry = Registry(settings)
        self._path = folder / REGISTRY_FILE
        self._seen: int | None = None

    def resolve(self, extra: Mapping[str, Any] | None) -> RequestedProfile:
        """The profile that a request gets, by its extra arguments.

        Raises
        ------
        RequestError
            it asks for what it may not have.
        """
        self._reload()
        name = self._registry.resolve((extra or {}).get(KEY))
        ticket = secrets.token_hex(16) if self._settings.tell_drift else None
        return RequestedProfile(name, None if name is None else self._registry.names[name], ticket)

    async def await_drift(self, tickets: Mapping[str, int]) -> list[dict[str, float]]:
        """The drift of the answers under some tickets, given the number of answers of each.

        It waits a second at most for the workers to count them.
        """
        answers = await shared_folder.await_answers(self._path.parent, tickets, _PATIENCE)
        return [answer for ticket in tickets for answer in answers[ticket]]

    def describe(self) -> dict[str, Any]:
        """A description of the server's profiles, for people and probes."""
        from axiscap import __version__

        self._reload()
        registry = self._registry
        facts: dict[str, Any] = {
            "profiles": registry.names,
            "default": registry.default,
            "choices": registry.selectable,
        }
        facts |= {"layers": self._settings.layers, "positions": self._settings.positions}
        if self._settings.separates_thinking:
            facts["markers"] = self._settings.markers
        return {"version": __version__, **facts}

    def _reload(self) -> None:
        # If the folder was cleaned away, the last content holds. The scheduler has a registry of its own.
        with contextlib.suppress(OSError):
            changed = self._path.stat().st_mtime_ns
            if changed != self._seen:
                self._registry.update(json.loads(self._path.read_text()))
                self._seen = changed
