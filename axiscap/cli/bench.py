"""``axiscap bench``: the speed of the kernels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from axiscap import models
from axiscap.cli.console import console, print_line, progress_bar
from axiscap.cli.options import ModelOption, make_folder


def bench(
    out: Annotated[
        Path, typer.Option(help="The file to write, with every figure (JSON).", callback=make_folder)
    ] = Path("bench.json"),
    picture: Annotated[
        Path | None,
        typer.Option(
            help="The picture to write: the fraction of the memory bound against the number of rows.",
            callback=make_folder,
        ),
    ] = None,
    model: ModelOption = models.DEFAULT_MODEL,
    quick: Annotated[bool, typer.Option(help="Measure one size and dtype, with few repetitions.")] = False,
    decode: Annotated[bool, typer.Option(help="Also measure the decoding speed of a real model, on the CPU.")] = True,
    device: Annotated[str, typer.Option(help="The device to measure: cpu or cuda.")] = "cpu",
) -> None:
    """Measure the kernels against eager torch, torch.compile, the published hook and the memory bound."""
    from axiscap import bench as measurements
    from axiscap.view import speeds

    # A wrong device and a missing package must fail before the minutes of work.
    if device not in ("cpu", "cuda"):
        raise ValueError(f"--device must be cpu or cuda, got {device}")
    if device == "cuda":
        measurements.check_cuda()
    if picture:
        from axiscap.view import plots

        plots.pyplot()
    with progress_bar() as progress:
        results = measurements.measure(progress, quick=quick, model=model if decode else None, device=device)
    speeds.print_tables(console, results)
    out.write_text(json.dumps(results, indent=1) + "\n")
    print_line(f"figures: {out}")
    if picture:
        plots.draw_bench(results, picture)
        print_line(f"picture: {picture}")
