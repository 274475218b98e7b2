"""The command ``axiscap``: one file for each command, and ``main``, which runs them."""

from axiscap.cli.main import app, main

__all__ = ["app", "main"]
