"""The page of an evaluation: the change of every score, and the answers that changed, side by side."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

import axiscap
from axiscap.evaluate.pairs import Answer, Difference
from axiscap.view.sheet import BLUE, ORANGE, Figures, axis, provenance, rounded, save, section, table

#: The heads of the table, on a page and in a terminal.
HEADS = (
    "task", "score", "better", "pairs", "before", "after", "difference", "95 %", "fell", "rose", "p", "failed",
    "unpaired",
)  # fmt: skip
#: The most changed answers of a score that the page shows, and the most characters of each.
ANSWERS, CHARACTERS = 30, 1500


def terminal_table(differences: Sequence[Difference]) -> Table:
    """The differences as a table for a terminal."""
    result = Table()
    for head in HEADS:
        is_name = head in ("task", "score")
        result.add_column(head, justify="left" if is_name else "right", no_wrap=is_name or head == "95 %")
    for difference in differences:
        result.add_row(*map(escape, cells(difference)))
    return result


def cells(difference: Difference) -> tuple[str, ...]:
    """The texts of one row of the table."""
    low, high = difference.interval
    return (
        difference.task,
        difference.scorer,
        "lower" if difference.lower_is_better else "higher",
        f"{difference.pairs}",
        f"{difference.before:.3f}",
        f"{difference.after:.3f}",
        f"{difference.difference:+.3f}",
        f"{low:+.3f} to {high:+.3f}",
        f"{difference.fell}",
        f"{difference.rose}",
        "" if difference.p_value is None else f"{difference.p_value:.2g}",
        f"{difference.failed}",
        f"{difference.unpaired}",
    )


def write(
    path: Path,
    comparisons: Mapping[str, Sequence[Difference]],
    before: str,
    notes: Sequence[str],
    facts: Mapping[str, Any],
) -> None:
    """Writes the page, in one step.

    Parameters
    ----------
    comparisons
        by the name of each run, its differences from the run ``before``.
    notes
        sentences about the judges.
    facts
        the provenance of the page.

    Raises
    ------
    ModuleNotFoundError
        plotly is missing.
    """
    figures = Figures()
    sections, summary = [], []
    for name, differences in comparisons.items():
        summary += _summary(name, before, differences)
        sections.append(_overview(figures, name, before, differences))
        sections.append(_changed(name, before, differences))
    this_page = f"AxisCap {axiscap.__version__}, {datetime.now(UTC):%Y-%m-%d %H:%M} UTC"
    sections.append(provenance({**facts, "this page": this_page}))
    save(path, "Effect of the cap", [*summary, *notes], sections, figures)


def _summary(name: str, before: str, differences: Sequence[Difference]) -> list[str]:
    pairs = sum(d.pairs for d in differences)
    failed = sum(d.failed for d in differences)
    unpaired = sum(d.unpaired for d in differences)
    certain = [d for d in differences if d.interval[0] > 0 or d.interval[1] < 0]
    lines = [f"{name} against {before}: {len(differences)} scores of {pairs} pairs of answers."]
    for d in certain:
        low, high = d.interval
        word = "better" if d.drop < 0 else "worse"
        lines.append(
            f"{d.task}, {d.scorer}: {d.before:.3f} before, {d.after:.3f} after, which is {word} "
            f"({low:+.3f} to {high:+.3f})."
        )
    if len(certain) < len(differences):
        others = "the other scores" if certain else "all scores"
        lines.append(f"The 95 % interval of {others} includes zero: no change is shown.")
    if failed:
        lines.append(f"{failed} pairs have an answer without a score; they count for neither run.")
    if unpaired:
        lines.append(f"{unpaired} answers have no partner in the other run; they count for neither.")
    return lines


def _overview(figures: Figures, name: str, before: str, differences: Sequence[Difference]) -> str:
    go = figures.go
    labels = [f"{d.task}<br>{d.scorer}" for d in differences]
    colours = [ORANGE if d.drop > 0 else BLUE for d in differences]
    bars = go.Bar(
        x=rounded(d.difference for d in differences),
        y=[html.escape(label).replace("&lt;br&gt;", "<br>") for label in labels],
        orientation="h",
        marker={
            "color": colours,
            "pattern": {"shape": ["/" if d.drop > 0 else "" for d in differences]},
        },
        error_x={
            "type": "data",
            "symmetric": False,
            "array": rounded(d.interval[1] - d.difference for d in differences),
            "arrayminus": rounded(d.difference - d.interval[0] for d in differences),
        },
        hovertemplate="%{y}: %{x:+.3f}<extra></extra>",
    )
    ends = [abs(end) for d in differences for end in (*d.interval, d.difference) if math.isfinite(end)]
    most = 1.1 * max([0.05, *ends])
    figure = figures.add(
        f"Bar chart of the difference that {name} makes to each score, with its 95 % interval.",
        [bars],
        title=f"{name} minus {before}",
        x=axis("difference of the mean score", range=[-most, most]),
        y={"autorange": "reversed", "automargin": True},
        height=130 + 52 * len(differences),
        showlegend=False,
    )
    return section(
        f"{name} against {before}",
        "Bars: the mean difference over pairs of answers to the same sample with the same random numbers. Lines: 95 %, "
        "by a bootstrap over samples. Hatched orange is worse, blue better. Failed: pairs in which an answer has no "
        "score. Unpaired: answers whose sample the other run has not answered.",
        figure + table(HEADS, [cells(d) for d in differences]),
    )


def _changed(name: str, before: str, differences: Sequence[Difference]) -> str:
    details = []
    for d in differences:
        shown = d.changed[:ANSWERS]
        pairs = "".join(_pair(sample, first, second, before, name) for sample, first, second in shown)
        many = f"{len(shown)} of {len(d.changed)}" if len(shown) < len(d.changed) else f"{len(shown)}"
        title = html.escape(f"{d.task}, {d.scorer}: {many}")
        if shown:
            details.append(f"<details><summary>{title}</summary>{pairs}</details>")
    return section(
        f"Answers whose score changed under {name}",
        "" if details else "No score of an answer changed.",
        "".join(details),
    )


def _pair(sample: str, first: Answer, second: Answer, before: str, name: str) -> str:
    sides = [(before, first), (name, second)]
    answers = "".join(
        f'<div class="said model"><b>{html.escape(side)}: {answer.value:g}</b>{_cut(answer.text)}</div>'
        for side, answer in sides
    )
    prompt = f'<div class="said"><b>{html.escape(sample)}</b>{_cut(first.prompt)}</div>'
    return f'{prompt}<div class="grid">{answers}</div>'


def _cut(text: str) -> str:
    return html.escape(text if len(text) <= CHARACTERS else text[:CHARACTERS] + " ...")
