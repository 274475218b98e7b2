"""The command line's entry point, and its list of commands."""

from __future__ import annotations

import sys
from typing import Annotated

import typer
from rich.markup import escape

import axiscap
from axiscap.cli.bench import bench
from axiscap.cli.calibrate import calibrate
from axiscap.cli.chat import chat
from axiscap.cli.console import console, print_error_line
from axiscap.cli.doctor import doctor
from axiscap.cli.evaluate import evaluate
from axiscap.cli.export import export
from axiscap.cli.floors import floors
from axiscap.cli.import_ import import_
from axiscap.cli.inspect import inspect
from axiscap.cli.replay import replay
from axiscap.cli.report import report
from axiscap.cli.rollout import rollout
from axiscap.cli.run import run
from axiscap.cli.sweep import sweep
from axiscap.cli.verify import verify

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)


def _print_version(requested: bool) -> None:
    if requested:
        console.print(axiscap.__version__)
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Activation capping along the Assistant Axis: calibrate, serve, monitor and evaluate."""


# In the order of `axiscap --help`.
app.command("inspect")(inspect)
app.command("calibrate")(calibrate)
app.command("floors")(floors)
app.command("sweep")(sweep)
app.command("report")(report)
app.command("replay")(replay)
app.command("chat")(chat)
app.command("import")(import_)
app.command("export")(export)
app.command("run")(run)
app.command("evaluate")(evaluate)
app.command("verify")(verify)
app.command("rollout")(rollout)
app.command("bench")(bench)
app.command("doctor")(doctor)


def main() -> None:
    """Runs the command. Prints an error that a user can act on as one sentence, without a traceback."""
    try:
        app()
    except (ValueError, OSError, ModuleNotFoundError, RuntimeError) as error:
        text = str(error)
        if isinstance(error, OSError) and error.filename is not None and error.strerror:
            text = f"{error.filename}: {error.strerror}"
        print_error_line(f"[red]axiscap:[/red] {escape(text)}")
        sys.exit(1)
