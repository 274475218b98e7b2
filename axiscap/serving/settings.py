"""The operator's configuration."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from axiscap.profile import CapProfile, is_url
from axiscap.profile.fit import ModelFacts, check_fits
from axiscap.serving.request import KEY, OFF, SettingsError
from axiscap_plugin.wrapping import is_nearly

#: Names the configuration file where the engine's own options carry none.
FILE_VARIABLE = "AXISCAP_CONFIG"

THINKING, ANSWER = "thinking", "answer"
#: The configuration says by one of these words which rows may be capped.
ROWS = {
    "all": "all rows",
    "generated": "the rows of tokens that the model wrote",
    THINKING: "the rows of the model's thinking",
    ANSWER: "the rows of the answer behind the thinking",
}
#: What begins and ends the thinking of most models.
MARKERS = ("<think>", "</think>")

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_MAX_SLOTS = 1024


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise SettingsError(f"axiscap: {message}")


def check_name(name: object) -> str:
    _require(
        isinstance(name, str) and _NAME.fullmatch(name) is not None and name != OFF,
        f"a profile's name must be 1 to 64 of A-Z a-z 0-9 . _ - and not {OFF!r}, got {str(name)[:80]!r}",
    )
    return str(name)


def is_member(name: object, names: Collection[str]) -> bool:
    return isinstance(name, str) and name in names


@dataclass(frozen=True)
class Settings:
    """The operator's choices, with what the profiles say.

    Parameters
    ----------
    profiles
        by name a path, or a URL, as :meth:`axiscap.CapProfile.load` takes them.
    default
        the profile of requests that name none; None leaves them alone.
    allowed
        the names that requests may choose.
    allow_off
        whether a request may switch capping off.
    slots
        profiles that fit at once, counting those that were replaced and still have requests.
    log
        a file that gets a JSON line for each finished request; None: no log.
    positions
        which rows are capped: ``"all"``; ``"generated"``, those of tokens that the model wrote; of a reasoning model's,
        ``"thinking"`` or ``"answer"`` alone.
    markers
        the text of the tokens that begin and end the thinking.
    tell_drift
        whether responses say how far their answers drifted.
    allow_other_model
        whether profiles that were made for another architecture are installed.
    check
        compare the rows' slots with the scheduler's view at every step, and stop where they differ.
    layers
        the layers that are capped; those of all profiles.
    directions
        of each slot: the most that a profile has.
    hidden_size
        H.
    digests
        the profiles' content, by name.
    model
        what a profile has to fit, as :class:`axiscap.profile.fit.ModelFacts` takes it; None until the model is known.
    """

    profiles: dict[str, str]
    default: str | None
    allowed: list[str]
    allow_off: bool
    slots: int
    log: str | None
    check: bool
    positions: str = "all"
    markers: list[str] = field(default_factory=lambda: list(MARKERS))
    tell_drift: bool = False
    allow_other_model: bool = False
    layers: list[int] = field(default_factory=list)
    directions: int = 0
    hidden_size: int = 0
    digests: dict[str, str] = field(default_factory=dict)
    model: dict[str, Any] | None = None

    @property
    def caps_written_only(self) -> bool:
        """Whether prompts are computed as without a cap."""
        return self.positions != "all"

    @property
    def rows_label(self) -> str:
        """Which rows are capped, as a word that differs where they do."""
        if not self.separates_thinking:
            return self.positions
        return f"{self.positions}-{hashlib.sha256(json.dumps(self.markers).encode()).hexdigest()[:8]}"

    @property
    def separates_thinking(self) -> bool:
        """Whether a row's place in the thinking or behind it decides."""
        return self.positions in (THINKING, ANSWER)

    @classmethod
    def parse(cls, facts: object) -> Settings:
        """Reads what the operator wrote, and the profiles that it names.

        Raises
        ------
        SettingsError
            one sentence that says what is wrong.
        """
        _require(isinstance(facts, Mapping), f"the configuration must be an object, got {type(facts).__name__}")
        assert isinstance(facts, Mapping)
        keys = {"profiles", "default", "allowed", "allow_off", "slots", "log", "check", "positions", "markers"}
        keys |= {"tell_drift", "allow_other_model"}
        stored = {"layers", "directions", "hidden_size", "digests", "model", "version"}
        extra = sorted(str(key) for key in facts.keys() - keys - stored)
        _require(not extra, f"unknown keys {', '.join(extra)[:200]}; known are {', '.join(sorted(keys))}")
        paths = facts.get("profiles")
        _require(isinstance(paths, Mapping) and len(paths) > 0, "profiles must be an object of at least one name: path")
        assert isinstance(paths, Mapping)
        for name, path in paths.items():
            check_name(name)
            _require(isinstance(path, str), f"the path of profile {name} must be a string")
        _require(
            "default" in facts or len(paths) == 1,
            "default must name one of several profiles, or be null to leave requests alone that name none",
        )
        default = facts["default"] if "default" in facts else next(iter(paths))
        _require(default is None or is_member(default, paths), f"default must be one of {', '.join(paths)} or null")
        allowed = facts.get("allowed", [])
        _require(
            isinstance(allowed, list) and all(is_member(name, paths) for name in allowed),
            f"allowed must be a list of names from {', '.join(paths)}",
        )
        for key in ("allow_off", "check", "tell_drift", "allow_other_model"):
            _require(isinstance(facts.get(key, False), bool), f"{key} must be true or false")
        positions, markers = _parse_positions(facts, is_stored=bool(facts.keys() & stored))
        slots = facts.get("slots", len(paths) + 4)
        _require(
            isinstance(slots, int) and not isinstance(slots, bool) and len(paths) <= slots <= _MAX_SLOTS,
            f"slots must be a number from {len(paths)}, the number of profiles, to {_MAX_SLOTS}",
        )
        log = facts.get("log")
        _check_log(log)
        settings = cls(
            profiles={name: path if is_url(path) else str(Path(path).absolute()) for name, path in paths.items()},
            default=default,
            allowed=sorted(set(allowed)),
            allow_off=facts.get("allow_off", False),
            slots=slots,
            log=None if log is None else str(Path(log).absolute()),
            check=facts.get("check", False),
            positions=positions,
            markers=markers,
            tell_drift=facts.get("tell_drift", False),
            allow_other_model=facts.get("allow_other_model", False),
        )
        return settings._with_profiles()

    def load_profiles(self) -> dict[str, CapProfile]:
        loaded = {}
        for name, path in self.profiles.items():
            try:
                loaded[name] = CapProfile.load(path)
            except (OSError, ValueError) as error:
                raise SettingsError(f"axiscap: profile {name} cannot be read: {error}") from None
        return loaded

    def _with_profiles(self) -> Settings:
        loaded = self.load_profiles()
        sizes = {profile.hidden_size for profile in loaded.values()}
        _require(len(sizes) == 1, f"the profiles are for different hidden sizes: {sorted(sizes)}")
        return Settings(
            **{
                **asdict(self),
                "layers": sorted({layer for profile in loaded.values() for layer in profile.layers}),
                "directions": max(profile.directions for profile in loaded.values()),
                "hidden_size": sizes.pop(),
                "digests": {name: profile.digest for name, profile in loaded.items()},
            }
        )

    def for_model(self, model: ModelFacts) -> Settings:
        """These settings for a model that every profile fits.

        Raises
        ------
        SettingsError
            A profile is for another model.
        """
        settings = replace(self, model=asdict(model))
        for name, profile in self.load_profiles().items():
            settings.check_profile(name, profile)
        return settings

    def check_room(self, profile: CapProfile) -> None:
        """Raises SettingsError if the server's buffers have no room for a profile."""
        _require(
            profile.hidden_size == self.hidden_size and profile.directions <= self.directions,
            f"this server was started for hidden size {self.hidden_size} and at most {self.directions} directions; the "
            f"profile has hidden size {profile.hidden_size} and {profile.directions}",
        )

    def check_profile(self, name: str, profile: CapProfile) -> None:
        """Raises SettingsError if a profile is for another model, or if the server's buffers have no room for it."""
        self.check_room(profile)
        if self.model is not None:
            try:
                check_fits(name, profile, ModelFacts(**self.model), allow_other_model=self.allow_other_model)
            except ValueError as error:
                raise SettingsError(f"axiscap: {error}") from None

    def to_json(self) -> dict[str, Any]:
        """What :meth:`from_json` reads. All that shapes a compiled graph is in it, so its hash tells them apart."""
        from axiscap import __version__

        return {**asdict(self), "version": __version__}

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Settings:
        return cls(**{key: value for key, value in stored.items() if key != "version"})


def _parse_positions(facts: Mapping[str, Any], *, is_stored: bool) -> tuple[str, list[str]]:
    positions = facts.get("positions", "all")
    _require(is_member(positions, ROWS), f"positions must be one of {', '.join(ROWS)}")
    markers = facts.get("markers", list(MARKERS))
    _require(
        isinstance(markers, list)
        and len(markers) == 2
        and all(isinstance(marker, str) and marker for marker in markers),
        "markers must be a list of two texts, of the tokens that begin and end the thinking",
    )
    _require(markers[0] != markers[1], "markers must be two different texts")
    _require(
        "markers" not in facts or positions in (THINKING, ANSWER) or is_stored,
        f'markers are for positions "{THINKING}" and "{ANSWER}"',
    )
    return positions, markers


def _check_log(log: object) -> None:
    _require(log is None or isinstance(log, str), "log must be a path or null")
    if isinstance(log, str):
        folder = Path(log).absolute().parent
        _require(folder.is_dir() and os.access(folder, os.W_OK), f"log must be in a writable folder, got {log}")
        _require(not Path(log).is_dir(), f"log must be a file, and {log} is a folder")


def read_settings(options: object) -> Settings | None:
    """The settings of an engine whose own options carry ``options``, or of the file that AXISCAP_CONFIG names.

    None: capping is not configured.

    Raises
    ------
    SettingsError
        one sentence that says what is wrong.
    """
    path = os.environ.get(FILE_VARIABLE)
    if options is None and path is None:
        return None
    _require(options is None or path is None, f"configured twice, by the engine's option and by {FILE_VARIABLE}")
    if options is None:
        assert path is not None
        _require(path != "", f"{FILE_VARIABLE} is empty; it must name a file, or not be set")
        try:
            options = json.loads(Path(path).read_text())
        except (OSError, ValueError) as error:
            raise SettingsError(f"axiscap: {FILE_VARIABLE}: {path} cannot be read as JSON: {error}") from None
    return Settings.parse(options)


def find_options(options: Mapping[str, Any]) -> object:
    """What an engine's own free options carry for AxisCap; None: nothing.

    Raises
    ------
    SettingsError
        something that was meant for it stands there under another key, or without one, or is null: the
        server would serve uncapped, and nobody would know.
    """
    for key in options:
        _require(key == KEY or not is_nearly(key), f"the configuration's key is {KEY!r}, and not {str(key)[:80]!r}")
    bare = "profiles" in options and isinstance(options["profiles"], Mapping)
    _require(not bare, f"profiles must stand in an object under the key {KEY!r}, not beside it")
    _require(KEY not in options or options[KEY] is not None, f"{KEY} must be an object; leave the key out for no cap")
    return options.get(KEY)


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


def refuse(engine: str, reasons: Mapping[str, bool]) -> None:
    """Raises SettingsError for the first of an engine's settings that would cap the wrong rows, or none."""
    for reason, names in reasons.items():
        if names:
            raise SettingsError(f"axiscap: {engine} is set up in a way that cannot be capped: {reason}")
