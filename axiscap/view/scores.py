"""The page of an evaluation: what a cap changes in every score, and the answers that changed, side by side."""

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

#: Of the table's columns, in a page and in a terminal.
HEADS = (
    "task", "score", "better", "pairs", "before", "after", "difference", "95 %", "fell", "rose", "p", "failed",
    "unpaired",
)  # fmt: skip
#: Changed answers of a score that are shown at most, and characters of each.
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


def cells(one: Difference) -> tuple[str, ...]:
    """One line under :data:`HEADS`."""
    low, high = one.interval
    return (
        one.task,
        one.scorer,
        "lower" if one.lower_is_better else "higher",
        f"{one.pairs}",
        f"{one.before:.3f}",
        f"{one.after:.3f}",
        f"{one.difference:+.3f}",
        f"{low:+.3f} to {high:+.3f}",
        f"{one.fell}",
        f"{one.rose}",
        "" if one.p_value is None else f"{one.p_value:.2g}",
        f"{one.failed}",
        f"{one.unpaired}",
    )


def write(
    path: Path, found: Mapping[str, Sequence[Difference]], before: str, notes: Sequence[str], facts: Mapping[str, Any]
) -> None:
    """Writes the page, in one step.

    Parameters
    ----------
    found
        the differences of each run that was compared with `before`.
    before
        the name of the run that they were compared with.
    notes
        sentences about who judged.
    facts
        what the page says of where it comes from.

    Raises
    ------
    ModuleNotFoundError
        plotly is missing.
    """
    figures = Figures()
    sections, summary = [], []
    for name, differences in found.items():
        summary += _summary(name, before, differences)
        sections.append(_overview(figures, name, before, differences))
        sections.append(_changed(name, before, differences))
    made = f"AxisCap {axiscap.__version__}, {datetime.now(UTC):%Y-%m-%d %H:%M} UTC"
    sections.append(provenance({**facts, "this page": made}))
    save(path, "Effect of the cap", [*summary, *notes], sections, figures)


def _summary(name: str, before: str, differences: Sequence[Difference]) -> list[str]:
    pairs = sum(one.pairs for one in differences)
    failed = sum(one.failed for one in differences)
    unpaired = sum(one.unpaired for one in differences)
    sure = [one for one in differences if one.interval[0] > 0 or one.interval[1] < 0]
    lines = [f"{name} against {before}: {len(differences)} scores of {pairs} pairs of answers."]
    for one in sure:
        low, high = one.interval
        word = "better" if one.drop < 0 else "worse"
        lines.append(
            f"{one.task}, {one.scorer}: {one.before:.3f} before, {one.after:.3f} after, which is {word} "
            f"({low:+.3f} to {high:+.3f})."
        )
    if len(sure) < len(differences):
        others = "the other scores" if sure else "all scores"
        lines.append(f"The 95 % interval of {others} includes zero: no change is shown.")
    if failed:
        lines.append(f"{failed} pairs have an answer without a score; they count for neither run.")
    if unpaired:
        lines.append(f"{unpaired} answers have no partner in the other run; they count for neither.")
    return lines


def _overview(figures: Figures, name: str, before: str, differences: Sequence[Difference]) -> str:
    go = figures.go
    labels = [f"{one.task}<br>{one.scorer}" for one in differences]
    colours = [ORANGE if one.drop > 0 else BLUE for one in differences]
    bars = go.Bar(
        x=rounded(one.difference for one in differences),
        y=[html.escape(label).replace("&lt;br&gt;", "<br>") for label in labels],
        orientation="h",
        marker={"color": colours, "pattern": {"shape": ["/" if one.drop > 0 else "" for one in differences]}},
        error_x={
            "type": "data",
            "symmetric": False,
            "array": rounded(one.interval[1] - one.difference for one in differences),
            "arrayminus": rounded(one.difference - one.interval[0] for one in differences),
        },
        hovertemplate="%{y}: %{x:+.3f}<extra></extra>",
    )
    ends = [abs(end) for one in differences for end in (*one.interval, one.difference) if math.isfinite(end)]
    most = 1.1 * max([0.05, *ends])
    made = figures.add(
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
        made + table(HEADS, [cells(one) for one in differences]),
    )


def _changed(name: str, before: str, differences: Sequence[Difference]) -> str:
    made = []
    for one in differences:
        shown = one.changed[:ANSWERS]
        pairs = "".join(_pair(sample, first, second, before, name) for sample, first, second in shown)
        many = f"{len(shown)} of {len(one.changed)}" if len(shown) < len(one.changed) else f"{len(shown)}"
        title = html.escape(f"{one.task}, {one.scorer}: {many}")
        if shown:
            made.append(f"<details><summary>{title}</summary>{pairs}</details>")
    return section(
        f"Answers whose score changed under {name}", "" if made else "No score of an answer changed.", "".join(made)
    )


def _pair(sample: str, first: Answer, second: Answer, before: str, name: str) -> str:
    sides = [(before, first), (name, second)]
    told = "".join(
        f'<div class="said model"><b>{html.escape(side)}: {answer.value:g}</b>{_cut(answer.text)}</div>'
        for side, answer in sides
    )
    asked = f'<div class="said"><b>{html.escape(sample)}</b>{_cut(first.prompt)}</div>'
    return f'{asked}<div class="grid">{told}</div>'


def _cut(text: str) -> str:
    return html.escape(text if len(text) <= CHARACTERS else text[:CHARACTERS] + " ...")
