"""What the site does beyond its plug-ins."""

import re
import subprocess
import sys


def on_page_markdown(markdown: str, *, page, **_: object) -> str:
    """The page of the command line is written from the command itself."""
    if page.file.src_path != "command-line.md":
        return markdown
    command = [sys.executable, "-m", "typer", "axiscap.cli", "utils", "docs", "--name", "axiscap"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.replace(
        "# `axiscap`", markdown, 1
    )


def on_page_content(html: str, **_: object) -> str:
    """Docstrings name what they refer to by roles, as editors read them; on a page the name suffices."""
    return re.sub(r":(?:attr|class|data|func|meth|mod):(?=<code>)", "", html)
