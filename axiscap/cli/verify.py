"""``axiscap verify``: whether a running server caps."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from axiscap import CapProfile
from axiscap.cli.console import print_line


def verify(
    url: Annotated[
        str, typer.Argument(help="The URL of a running vLLM or SGLang server, such as http://localhost:8000.")
    ],
    profile: Annotated[str, typer.Option(help="The profile that the server should apply: a file or a URL.")],
    api_key: Annotated[
        str | None, typer.Option(envvar="OPENAI_API_KEY", help="The API key of the server, if it has one.")
    ] = None,
    admin_key: Annotated[
        str | None,
        typer.Option(
            envvar="AXISCAP_ADMIN_KEY",
            help="The admin key that the server was started with, if it has one. With it, the profile is loaded once "
            "more for a moment, with floors far above its own, to see their effect.",
        ),
    ] = None,
) -> None:
    """Check that a running server caps under a profile, and that the cap has an effect. Exits with status 1 if not.

    For probes and CI: a server without the plug-in answers requests, too, but uncapped. The effect is seen in the
    log-probabilities of the same tokens uncapped, under another profile, or under floors far above; where the server
    allows a client none of these, the command says so.
    """
    from axiscap.serving import client

    source = str(Path(profile).absolute()) if Path(profile).exists() else profile
    keys = {"api_key": api_key, "admin_key": admin_key}
    for line in client.verify(url, CapProfile.load(profile), source=source, **keys):
        print_line(line)
