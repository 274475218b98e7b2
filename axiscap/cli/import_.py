"""``axiscap import``: a profile from files of others."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from axiscap.cli.console import print_line
from axiscap.cli.options import make_folder


def import_(
    source: Annotated[
        str,
        typer.Argument(
            help="A file, a folder or a URL, optionally with # and its SHA-256: a capping config, an axis, vectors, "
            "persona vectors, a control vector (GGUF), or a steering module (JSON)."
        ),
    ],
    rest: Annotated[
        list[str] | None,
        typer.Argument(metavar="[EXPERIMENT] OUT", help="The setting of a capping config, and the profile to write."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="The model, a local folder or a hub name. Its config tells the layers, and goes on record."),
    ] = None,
) -> None:
    """Write a profile from files of others. Without OUT, list the settings that the source has."""
    from axiscap import interop

    *ids, target = rest or [""]
    if len(ids) > 1:
        raise ValueError(f"import takes SOURCE, EXPERIMENT and OUT, got {len(ids) + 2} arguments")
    with interop.open_source(source) as (path, digest):
        if not target:
            print_line("\n".join(_settings_of(path)) or "one setting, without an id")
            return
        profile = interop.read_source(path, *ids, model=None if model is None else _model_facts(model))
    profile.provenance["source_sha256"] = digest
    out = make_folder(Path(target))
    assert out is not None
    profile.save(out)
    print_line(f"wrote {out}: layers {', '.join(map(str, profile.layers))}; {profile.provenance['source']}")
    if bool(profile.floors.isneginf().all()):
        print_line(f"It has no floors. `axiscap floors {out} OUT --measure MODEL` finds them.")


def _settings_of(source: Path) -> list[str]:
    """The ids of a capping config; any other source has one setting without an id."""
    from axiscap import ProfileError, interop

    try:
        return interop.experiments(source)
    except ProfileError:
        return []


def _model_facts(name: str) -> dict[str, Any]:
    from transformers import AutoConfig

    from axiscap import models

    folder = models.folder(name)
    config = AutoConfig.from_pretrained(folder)
    text = config.get_text_config()
    return {
        "id": Path(name).name,
        "architecture": (config.architectures or [""])[0],
        "hidden_size": text.hidden_size,
        "num_layers": text.num_hidden_layers,
    }
