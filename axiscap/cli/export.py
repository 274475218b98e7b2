"""``axiscap export``: a profile in another project's format."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from axiscap import CapProfile
from axiscap.cli.console import print_line
from axiscap.cli.options import ProfileArgument, make_folder


def export(
    profile: ProfileArgument,
    out: Annotated[
        Path,
        typer.Argument(
            help="The file to write: a capping config (.pt) or a control vector (.gguf).", callback=make_folder
        ),
    ],
    experiment: Annotated[str, typer.Option(help="The id of the setting in a capping config.")] = "axiscap",
) -> None:
    """Write a profile as a published capping config, or its directions as a control vector for llama.cpp."""
    from axiscap import interop

    if out.suffix == ".gguf":
        interop.write_control_vector(CapProfile.load(profile), out)
        print_line(f"wrote {out}: directions alone, which cap nothing by themselves")
        return
    interop.write_capping_config(CapProfile.load(profile), out, experiment)
    print_line(f"wrote {out}: experiment {experiment}")
