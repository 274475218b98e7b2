"""What a request carries through a serving engine, and the errors of a wrong configuration or request."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

#: The key of the configuration, and of a request's profile.
KEY = "axiscap"
#: The key of a :class:`RequestedProfile` in a request's extra arguments.
REQUESTED = f"{KEY}_told"
#: The name by which a request asks to be left alone, where the operator allows it.
OFF = "off"


class SettingsError(ValueError):
    """The configuration is wrong; the message is one sentence for the operator."""


class RequestError(ValueError):
    """A request asks for a profile that it may not have; the message is for the client."""


class RequestedProfile(NamedTuple):
    """The profile that the front resolved for a request. Name and digest are None if the request is left alone.

    ``ticket``: a name that nobody guesses, under which the worker leaves the answer's drift for the front; None: the
    client is not told.
    """

    name: str | None
    digest: str | None
    ticket: str | None

    def put(self, extra: Mapping[str, Any] | None) -> dict[str, Any]:
        """A request's extra arguments with it, in place of anything that a client wrote there."""
        return {**(extra or {}), REQUESTED: list(self)}

    @classmethod
    def read(cls, extra: Mapping[str, Any] | None) -> RequestedProfile | None:
        """Reads it from a request's extra arguments.

        Raises
        ------
        RequestError
            A client wrote something else there.
        """
        match (extra or {}).get(REQUESTED):
            case None:
                return None
            case [str() | None as name, str() | None as digest, None]:
                return cls(name, digest, None)
            case [str() | None as name, str() | None as digest, str(ticket)] if ticket.isalnum():  # it names a file
                return cls(name, digest, ticket)
        raise RequestError(f"{REQUESTED} is set by the server only")


@dataclass(frozen=True)
class Assignment:
    """The profile that the scheduler assigned to a request: a name for people, a digest for the engine.

    ``digest`` None: the request is left alone. ``ticket``: see :class:`RequestedProfile`. ``positions``: which of its
    rows are capped (:attr:`axiscap.serving.settings.Settings.rows_label`).
    """

    name: str | None
    digest: str | None
    id: str
    ticket: str | None = None
    positions: str = "all"

    @classmethod
    def read(cls, extra: Mapping[str, Any] | None) -> Assignment:
        """Reads it from a request's extra arguments.

        Raises
        ------
        RuntimeError
            The request has no assignment.
        """
        stored = (extra or {}).get(KEY)
        if not isinstance(stored, dict):
            raise RuntimeError("axiscap: a request reached the model without a decision about its profile")
        return cls(**stored)

    def put(self, extra: Mapping[str, Any] | None) -> dict[str, Any]:
        """A request's extra arguments with it, in place of the requested profile."""
        return {**(extra or {}), KEY: vars(self)}

    @property
    def salt(self) -> str:
        """Separates this request's blocks, in a prefix cache and in stores that servers share, from those of requests
        that are capped differently.
        """
        rows = "" if self.digest is None or self.positions == "all" else f"/{self.positions}"
        return f"{KEY}={self.digest or '-'}{rows}"

    @property
    def prompt_salt(self) -> str:
        """The salt of its prompt's blocks, which hold no cap if only written rows are capped."""
        return self.salt if self.positions == "all" else f"{KEY}=-"
