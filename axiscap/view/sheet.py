"""A self-contained HTML page of figures and tables.

The file contains plotly's script and all data, and its content security policy forbids any other source. Needs plotly
(the extra ``axiscap[report]``).
"""

from __future__ import annotations

import html
import importlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

# Okabe and Ito's colours; dashes, markers and hatches differ for prints in grey.
ORANGE, BLUE, PINK, GREY = "#D55E00", "#0072B2", "#CC79A7", "#888888"
_FACT_CHARACTERS = 600


def plotly() -> tuple[Any, Any]:
    """The modules ``plotly.graph_objects`` and ``plotly.offline``; the error without them names the extra."""
    try:
        return importlib.import_module("plotly.graph_objects"), importlib.import_module("plotly.offline")
    except ModuleNotFoundError:
        raise ModuleNotFoundError("the page needs plotly: pip install 'axiscap[report]'") from None


def save(path: Path, title: str, summary: Iterable[str], sections: Iterable[str], figures: Figures) -> None:
    """Writes the page, in one step.

    Parameters
    ----------
    summary
        the sentences below the title.
    sections
        results of :func:`section`.
    figures
        the figures of the sections.
    """
    template = Template((files("axiscap.view") / "sheet.html").read_text("utf-8"))
    page = template.substitute(
        title=html.escape(title),
        summary="".join(f"<p>{html.escape(line)}</p>" for line in summary),
        sections="\n".join(sections),
        figures=json.dumps(figures.by_id).replace("</", "<\\/"),
        plotly=figures.script,
    )
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(page, encoding="utf-8")
    partial.replace(path)


class Figures:
    """The figures of the page as JSON of plotly. The page draws a figure when it becomes visible."""

    def __init__(self) -> None:
        self.go, offline = plotly()
        self.script: str = offline.get_plotlyjs()
        self.by_id: dict[str, Any] = {}

    def add(
        self,
        alt: str,
        traces: Iterable[Any],
        *,
        title: str,
        x: Mapping[str, Any],
        y: Mapping[str, Any],
        height: int = 430,
        heat: Mapping[str, Any] | None = None,
        **layout: Any,
    ) -> str:
        """Adds a figure, and returns the HTML element for it.

        Parameters
        ----------
        heat
            the large parts of a heat map: a text for each column, and the values as bytes, in tenths.
        """
        figure = self.go.Figure(list(traces))
        figure.update_layout(
            template="none",
            title={"text": html.escape(title), "font": {"size": 15}},
            xaxis=dict(x),
            yaxis=dict(y),
            height=height,
            margin={"l": 62, "r": 12, "t": 44, "b": 48},
            paper_bgcolor="rgba(0,0,0,0)",
            plot_bgcolor="rgba(0,0,0,0)",
            hovermode="closest",
            legend={"orientation": "h", "y": -0.22},
            **layout,
        )
        name = f"figure{len(self.by_id)}"
        self.by_id[name] = json.loads(figure.to_json()) | ({} if heat is None else {"heat": heat})
        accessible = f'role="img" aria-label="{html.escape(alt)}"'
        return f'<figure><div id="{name}" class="plot" style="height:{height}px" {accessible}></div></figure>'


def axis(title: str, **more: Any) -> dict[str, Any]:
    return {"title": {"text": title}, **more}


def rounded(values: Iterable[float]) -> list[float | None]:
    """The values with four digits, which keep the page small. NaN becomes None, because JSON has no NaN."""
    return [float(f"{value:.4g}") if math.isfinite(value) else None for value in values]


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in heads)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def grid(figures: Sequence[str]) -> str:
    return f'<div class="grid">{"".join(figures)}</div>'


def section(title: str, text: str, body: str) -> str:
    lead = f"<p>{html.escape(text)}</p>" if text else ""
    return f"<section><h2>{html.escape(title)}</h2>{lead}{body}</section>"


def provenance(facts: Mapping[str, object]) -> str:
    """The last section: the origin of the figures. A long fact is cut."""
    rows = []
    for key, value in facts.items():
        text = value if isinstance(value, str) else json.dumps(value)
        cut = text if len(text) <= _FACT_CHARACTERS else text[:_FACT_CHARACTERS] + " ..."
        rows.append(f'<tr><th scope="row">{html.escape(key)}</th><td>{html.escape(cut)}</td></tr>')
    body = f'<div class="wide"><table class="facts">{"".join(rows)}</table></div>'
    return section("Provenance", "", body)
