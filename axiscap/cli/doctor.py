"""``axiscap doctor``: the state of the installation."""

from __future__ import annotations

from axiscap.cli.console import console


def doctor() -> None:
    """Check the installation: the machine, torch, the kernels and the extras, with a fix for each problem."""
    from axiscap import doctor as checks
    from axiscap.view import tables

    console.print(tables.check_table(checks.run()))
