"""``axiscap import``: a profile from a published capping config."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from axiscap.cli.console import print_line
from axiscap.cli.options import ProfileOutput


def import_(
    config: Annotated[Path, typer.Argument(help="A published capping config (.pt).")],
    experiment: Annotated[str, typer.Argument(help="The setting in the config, such as layers_46:54-p0.25.")],
    out: ProfileOutput,
) -> None:
    """Write a profile from one setting of a published capping config."""
    from axiscap import interop

    profile = interop.read_capping_config(config, experiment)
    profile.save(out)
    print_line(f"wrote {out}: layers {', '.join(map(str, profile.layers))}")
