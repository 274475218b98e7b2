"""The part of every engine's scheduler: it assigns profiles to requests, and changes profiles while requests run."""

from __future__ import annotations

import copy
import math
import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from axiscap.serving import shared_folder
from axiscap.serving.registry import REGISTRY_FILE, Registry
from axiscap.serving.request import KEY, Assignment, RequestedProfile, RequestError
from axiscap.serving.settings import Settings, read_profile


class Control:
    """Assigns a profile to each request, in the scheduler's process, which no client reaches; and changes profiles.

    Parameters
    ----------
    copy_profile
        copies a profile to every worker: called with slot, digest, path and floors (or None).
    share
        whether this process writes the registry for those that talk to clients.
    """

    def __init__(
        self,
        settings: Settings,
        folder: Path,
        copy_profile: Callable[[int, str, str, Any], object],
        *,
        share: bool = True,
    ) -> None:
        self._settings = settings
        self._registry = Registry(settings)
        #: By name: the file of a profile, and the digest of its content.
        self._files = {name: (path, settings.digests[name]) for name, path in settings.profiles.items()}
        self._file = folder / REGISTRY_FILE if share else None
        self._copy_profile = copy_profile
        self._live: weakref.WeakSet[Any] = weakref.WeakSet()
        #: Requests may get profiles in one thread while profiles change in another.
        self.lock = threading.RLock()
        self._save(self._registry)

    def _save(self, registry: Registry) -> None:
        if self._file is not None:
            shared_folder.write(self._file, registry.to_json())

    def assign(self, extra: Mapping[str, Any] | None, request: str) -> Assignment:
        """The assignment of a request, by its extra arguments and its id.

        Raises
        ------
        RequestError
            The request may not have the profile, or the content that the front resolved was replaced meanwhile.
        """
        extra = extra or {}
        name = self._registry.resolve(extra.get(KEY))
        digest = None if name is None else self._registry.names[name]
        # An engine that is called from Python has no front.
        requested = RequestedProfile.read(extra) or RequestedProfile(name, digest, None)
        if requested.digest != digest:
            raise RequestError(f"profile {name} was replaced while the request was on its way; send it again")
        return Assignment(name, digest, request, requested.ticket, self._settings.rows_label)

    def track(self, request: Any, assignment: Assignment) -> None:
        """Keeps the slot of a request's profile as long as the engine's object for the request lives."""
        request.axiscap_digest = assignment.digest
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
            slot = registry.assign_slot(name, profile.digest, in_use, allowed=allowed)
            self._copy_profile(slot, profile.digest, path, floors)
            self._save(registry)
            self._registry = registry
            if floors is None:
                self._files[name] = path, profile.digest
        return f"{name} is {profile.digest} in slot {slot}"


class Scheduling(ABC):
    """The base of an adapter's part in the scheduler: it assigns profiles, and keeps the blocks of contents apart.

    Parameters
    ----------
    control
        assigns and changes profiles; every process has one, and all ranks call theirs in the same order.
    """

    #: The field of a request whose text goes into the hash of its first block, and so of all behind it.
    key: str

    def __init__(self, control: Control) -> None:
        self.control = control

    def assign(self, request: Any, name: str, *, apart: bool = True) -> Assignment:
        """Assigns a profile to a request, which carries the assignment from now on in place of the requested profile.

        Parameters
        ----------
        request
            the engine's request. Its fields change, so it must be a copy if others hold it too.
        name
            its id, as clients and logs know it.
        apart
            whether its blocks are those of its content alone, from the first one on.

        Raises
        ------
        RequestError
            The request may not have the profile, or the resolved content was replaced meanwhile.
        """
        extra = self.extra(request)
        assignment = self.control.assign(extra, name)
        self.carry(request, assignment.put(extra))
        if apart:
            # Blocks are hashed in a chain, so that what separates the first separates all.
            setattr(request, self.key, f"{assignment.salt};{getattr(request, self.key) or ''}")
        return assignment

    @abstractmethod
    def extra(self, request: Any) -> Mapping[str, Any] | None:
        """The extra arguments of a request: the client's field, and the profile that the front resolved."""

    @abstractmethod
    def carry(self, request: Any, extra: dict[str, Any]) -> None:
        """Replaces a request's extra arguments, without a change of the client's own object."""
