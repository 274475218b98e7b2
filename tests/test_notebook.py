"""The notebook runs from top to bottom, and shows what it says."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from conftest import REPOSITORY
from nbclient import NotebookClient


@pytest.mark.slow
@pytest.mark.nightly
def test_the_notebook_runs():
    notebook = nbformat.read(REPOSITORY / "examples" / "walkthrough.ipynb", as_version=4)
    NotebookClient(notebook, timeout=1200, kernel_name="python3").execute()
    shown = [
        "".join(
            output.get("text", "") or output.get("data", {}).get("text/plain", "") for output in cell.get("outputs", [])
        )
        for cell in notebook.cells
    ]
    everything = "\n".join(shown)
    assert "held-out AUC" in everything
    assert "capped:" in everything
    # The capped conversation lies higher than the uncapped one.
    levels = {side: float(everything.split(f"{side}: level")[1].split(",")[0]) for side in ("uncapped", " capped")}
    assert levels["uncapped"] < levels[" capped"]
    assert Path(shown[-1].splitlines()[-1]).stat().st_size > 1_000_000
