"""``axiscap rollout``: a profile for running replicas."""

from __future__ import annotations

from typing import Annotated

import typer

from axiscap.cli.console import console, print_line


def rollout(
    name: Annotated[str, typer.Argument(help="The name of the profile in the servers, such as that of the default.")],
    profile: Annotated[
        str,
        typer.Argument(
            help="The profile: a path or a URL that the servers can read. #DIGEST behind it pins the content."
        ),
    ],
    urls: Annotated[list[str], typer.Argument(help="The URLs of the replicas.")],
    admin_key: Annotated[
        str, typer.Option(envvar="AXISCAP_ADMIN_KEY", help="The admin key that the servers were started with.")
    ],
) -> None:
    """Load a profile into running replicas, one after the other. Exits with status 0 if all of them have it.

    A request that has begun keeps the old content. If a replica fails, the others go on; run the command again for the
    rest.
    """
    from axiscap.serving import client

    failed = 0
    for url in urls:
        try:
            print_line(f"{url}: {name} is {client.roll_out(url, name, profile, admin_key)}")
        except client.NotCapped as error:
            failed += 1
            print_line(f"{url}: {error}", style="red")
    console.print(f"{len(urls) - failed} of {len(urls)} replicas have it")
    if failed:
        raise typer.Exit(1)
