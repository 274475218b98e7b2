"""The profiles of a server: the content of each name, and the slot of each content."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from typing import Any

from axiscap.profile import format_layers
from axiscap.profile.fit import unstated
from axiscap.serving.request import KEY, OFF, RequestError
from axiscap.serving.settings import ROWS, Settings, check_name, is_member

#: The file of a server's folder that holds its registry.
REGISTRY_FILE = "registry.json"


class Registry:
    """The names of a server's profiles, the content of each, and the slot of each content.

    Content never changes: a new version of a profile is other content in another slot, so that running requests keep
    theirs.
    """

    def __init__(self, settings: Settings) -> None:
        self.default = settings.default
        self.allow_off = settings.allow_off
        self.allowed = list(settings.allowed)
        self.names = dict(settings.digests)
        #: Every profile's content, by slot; None: the slot was never used.
        self.slots: list[str | None] = list(dict.fromkeys(settings.digests.values()))
        self.slots += [None] * (settings.slots - len(self.slots))

    def resolve(self, asked: object) -> str | None:
        """The name of the profile that a request gets; None: it is left alone.

        Parameters
        ----------
        asked
            what the request says; None where it says nothing.

        Raises
        ------
        RequestError
            The request may not have the profile; the message names those that it may have.
        """
        if asked is None:
            return self.default
        if isinstance(asked, str) and asked in self.selectable:
            return None if asked == OFF else asked
        shown = repr(asked[:64]) if isinstance(asked, str) else json.dumps(asked, default=str)[:64]
        raise RequestError(f"{KEY} must be one of {', '.join(self.selectable)}; got {shown}")

    @property
    def selectable(self) -> list[str]:
        """The names that a request may have, the default included, and ``off`` if it is allowed."""
        named = {*self.allowed, *([] if self.default is None else [self.default])}
        return sorted(named) + ([OFF] if self.allow_off or self.default is None else [])

    def slot_of(self, digest: str) -> int:
        return self.slots.index(digest)

    def assign_slot(self, name: str, digest: str, in_use: Collection[str], *, allowed: bool) -> int:
        """Gives a name new content; returns the slot for it.

        Raises
        ------
        ValueError
            the name is not one, or every slot is taken by a name or by requests that still run.
        """
        check_name(name)
        keep = {*in_use, *(content for other, content in self.names.items() if other != name)}
        if digest in self.slots:
            slot = self.slot_of(digest)
        else:
            free = [at for at, content in enumerate(self.slots) if content not in keep]
            if not free:
                raise ValueError(
                    f"all {len(self.slots)} slots are taken, by the content of {len(self.names)} profiles and by "
                    f"requests that still run under {len(keep - set(self.names.values()))} replaced ones: retire a "
                    "profile, wait, or start with more slots"
                )
            slot = free[0]
        self.slots[slot] = digest
        self.names[name] = digest
        if allowed and name not in self.allowed:
            self.allowed.append(name)
        return slot

    def check(self, name: object) -> None:
        """Raises ValueError if no profile has the name."""
        if not is_member(name, self.names):
            raise ValueError(f"there is no profile {str(name)[:64]!r}; there are {', '.join(sorted(self.names))}")

    def retire(self, name: str) -> None:
        """Forgets a name. Running requests keep its content.

        Raises
        ------
        ValueError
            there is no such profile, or it is the default.
        """
        self.check(name)
        if name == self.default:
            raise ValueError(f"{name} is the default of requests that name none, and cannot be retired")
        del self.names[name]
        self.allowed = [other for other in self.allowed if other != name]

    def to_json(self) -> dict[str, Any]:
        """What :meth:`update` takes, in another process."""
        return dict(vars(self))

    def update(self, stored: Mapping[str, Any]) -> None:
        vars(self).update(stored)


def describe_start(settings: Settings) -> str:
    """The line that a server logs when it starts: rows, layers, profiles with their digests, and what requests get."""
    profiles = ", ".join(f"{name} ({digest})" for name, digest in settings.digests.items())
    default = settings.default or "none: requests that name no profile are left alone"
    where = f"{ROWS[settings.positions]} at layers {format_layers(settings.layers)}"
    line = f"axiscap: capping {where} under {profiles}; default {default}"
    line += f"; requests may choose {', '.join(Registry(settings).selectable)}"
    for name, profile in settings.load_profiles().items():
        if missing := unstated(profile):
            line += f"; {name} was not compared with the model: it states no {' and no '.join(missing)}"
    return line
