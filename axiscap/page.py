"""One self-contained HTML page: conversations along the axis, and the evidence for the profile that they are held to.

It asks no other host for anything: plotly's script and all data are in the file, and its own policy forbids the rest.
Needs plotly (the extra ``axiscap[report]``).
"""

from __future__ import annotations

import html
import importlib
import json
import math
import statistics
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from string import Template
from typing import Any

import torch

import axiscap
from axiscap.monitor import CAPPED, Drift, Scale, Trace, percentile_in_words
from axiscap.profile import CapProfile

#: Conversations that are shown token by token; the page would grow too large with more.
DETAILED = 12
#: Tokens of a conversation that are shown at most.
TOKENS = 700

# Okabe and Ito's colours; dashes, markers and hatches keep things apart in grey.
_UNCAPPED, _CAPPED, _NORMAL, _ROLE = "#D55E00", "#0072B2", "#009E73", "#CC79A7"
_SHADES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
_MARKERS = ("circle", "square", "triangle-up", "diamond", "x", "cross")


def _plotly() -> Any:
    try:
        return importlib.import_module("plotly.graph_objects"), importlib.import_module("plotly.offline")
    except ModuleNotFoundError:
        raise ModuleNotFoundError("the page needs plotly: pip install 'axiscap[report]'") from None


class Selection:
    """Of any number of traces, what a page shows: each one's figures, and in full those that went lowest.

    Args:
        scale: of the layer that figures and trajectories are of.
    """

    def __init__(self, scale: Scale) -> None:
        self.scale = scale
        self.rows: list[tuple[str, str, str, Drift, list[float]]] = []  # name, group, side, drift, turn means
        self.detailed: list[Trace] = []
        self.tokens: dict[str, list[float]] = {}

    def add(self, trace: Trace) -> Drift | None:
        """Returns the trace's drift; None where the model says nothing in it, which is not shown."""
        drift = trace.drift(self.scale)
        if drift is None:
            return None
        answers = trace.answers(self.scale.layer)
        talk = trace.talk
        self.rows.append((talk.name, talk.group, talk.side, drift, [values.mean().item() for values in answers]))
        kept = self.tokens.setdefault(talk.side, [])
        if len(kept) < 50_000:
            kept.extend(torch.cat(answers).tolist())
        self.detailed.append(trace)
        if len(self.detailed) > 4 * DETAILED:
            self._drop()
        return drift

    def _drop(self) -> None:
        """Keeps the conversations that went lowest, each with its other side."""
        lowest: dict[str, float] = {}
        for trace in self.detailed:
            drift = trace.drift(self.scale)
            assert drift is not None
            lowest[trace.talk.name] = min(drift.lowest, lowest.get(trace.talk.name, math.inf))
        names = sorted(lowest, key=lambda name: lowest[name])[:DETAILED]
        self.detailed = [trace for trace in self.detailed if trace.talk.name in names]

    def finish(self) -> list[Trace]:
        """The traces to show in full, those of one conversation together, the lowest first."""
        self._drop()
        order: dict[str, float] = {}
        for name, _, _, drift, _ in self.rows:
            order[name] = min(drift.lowest, order.get(name, math.inf))
        return sorted(
            self.detailed, key=lambda trace: (order[trace.talk.name], trace.talk.name, trace.talk.side == CAPPED)
        )


def write(
    path: Path, profile: CapProfile, selection: Selection, *, title: str = "Drift along the Assistant Axis"
) -> None:
    """Writes the page in one step.

    Args:
        profile: the one that the conversations are held against; its evidence is shown where it has some.
        selection: what to show; an empty one gives the profile's evidence alone.

    Raises:
        ModuleNotFoundError: plotly is missing.
        ValueError: there is nothing to show.
    """
    go, offline = _plotly()
    figures = _Figures(go)
    sections = []
    if selection.rows:
        sections.append(_trajectories(figures, selection))
        sections.append(_table(selection))
        sections.append(_details(figures, selection, profile))
    evidence = profile.provenance.get("evidence")
    if isinstance(evidence, Mapping):
        try:
            sections.append(_evidence(figures, profile, evidence))
        except (AttributeError, IndexError, KeyError, TypeError, ValueError):  # anyone may have written it
            sections.append("<p>The profile's evidence is not in the form that this version writes.</p>")
    if not sections:
        raise ValueError("nothing to show: no conversation with an answer, and no evidence in the profile")
    if profile.populations is not None or selection.rows:
        sections.append(_histogram(figures, profile, selection))
    sections.append(_provenance(profile, selection))
    template = Template((files("axiscap.data") / "page.html").read_text("utf-8"))
    page = template.substitute(
        title=html.escape(title),
        summary="".join(f"<p>{html.escape(line)}</p>" for line in _summary(profile, selection)),
        sections="\n".join(sections),
        figures=json.dumps(figures.made).replace("</", "<\\/"),
        plotly=offline.get_plotlyjs(),
    )
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(page, encoding="utf-8")
    partial.replace(path)


class _Figures:
    """The page's figures, as plotly's JSON; the page draws each when it comes into sight."""

    def __init__(self, go: Any) -> None:
        self.go = go
        self.made: dict[str, Any] = {}

    def add(self, alt: str, traces: Iterable[Any], *, height: int = 340, **layout: Any) -> str:
        """Returns the element that it will be drawn in."""
        figure = self.go.Figure(list(traces))
        figure.update_layout(
            template="none",
            height=height,
            margin={"l": 62, "r": 12, "t": 44, "b": 48},
            paper_bgcolor="rgba(0,0,0,0)",
            plot_bgcolor="rgba(0,0,0,0)",
            hovermode="closest",
            **layout,
        )
        name = f"figure{len(self.made)}"
        self.made[name] = json.loads(figure.to_json())
        seen = f'role="img" aria-label="{html.escape(alt)}"'
        return f'<figure><div id="{name}" class="plot" style="height:{height}px" {seen}></div></figure>'


def _round(values: Iterable[float]) -> list[float | None]:
    """Four digits are enough for an eye, and keep the page small; JSON has no NaN."""
    return [float(f"{value:.4g}") if math.isfinite(value) else None for value in values]


def _side(side: str) -> tuple[str, str, str, str]:
    """Label, colour, dash and marker."""
    return (CAPPED, _CAPPED, "dash", "square") if side == CAPPED else (side or "as read", _UNCAPPED, "solid", "circle")


def _summary(profile: CapProfile, selection: Selection) -> list[str]:
    scale, lines = selection.scale, []
    if selection.rows:
        for side in dict.fromkeys(side for _, _, side, _, _ in selection.rows):
            rows = [row for row in selection.rows if row[2] == side]
            turns = [mean for row in rows for mean in row[4]]
            below = sum(mean < scale.floor for mean in turns)
            far = sum(scale.percentile(mean) < 1 for mean in turns) if scale.values else 0
            name = f"The {side} conversations" if side else "The conversations"
            text = f"{name} ({len(rows)}) have {len(turns)} answers. {below} of them lie below the floor on average"
            lines.append(text + (f", {far} below 99 % of the model's normal answers." if scale.values else "."))
            worst = min(rows, key=lambda row: row[3].lowest)
            lines.append(
                f"The lowest is turn {worst[3].lowest_turn} of {worst[0]}: {worst[3].lowest:.3g}, "
                f"{percentile_in_words(worst[3].lowest_percentile)}; the floor is {scale.floor:.3g}."
                if math.isfinite(scale.floor)
                else f"The lowest is turn {worst[3].lowest_turn} of {worst[0]}: {worst[3].lowest:.3g}."
            )
        for group, level in _levels(selection).items():
            lines.append(f"{group}: mean level {level}.")
    facts = profile.provenance.get("evidence")
    if isinstance(facts, Mapping) and isinstance(facts.get("auc"), list) and isinstance(facts.get("best_layer"), int):
        auc = facts["auc"][facts["best_layer"]]
        lines.append(
            f"On roles and questions that made nothing of it, the axis tells the Assistant's answers from other "
            f"characters' with an AUC of {auc:.2f} at layer {facts['best_layer']} (0.5 is chance, 1 is never wrong)."
        )
    layers = f"{profile.layers[0]} to {profile.layers[-1]}" if len(profile.layers) > 1 else f"{profile.layers[0]}"
    lines.append(
        f"The profile caps layers {layers}. All curves of conversations are of layer {scale.layer}, before its own cap."
    )
    return lines


def _levels(selection: Selection) -> dict[str, str]:
    """The mean level of each group and side, with its standard error."""
    kinds: dict[str, list[float]] = {}
    for _, group, side, drift, _ in selection.rows:
        if group:
            kinds.setdefault(f"{group}, {side}" if side else group, []).append(drift.level)
    return {
        name: f"{statistics.fmean(values):.3g}"
        + (f" ± {statistics.stdev(values) / math.sqrt(len(values)):.2g} (standard error)" if len(values) > 1 else "")
        for name, values in kinds.items()
    }


def _trajectories(figures: _Figures, selection: Selection) -> str:
    go, scale = figures.go, selection.scale
    groups = list(dict.fromkeys(group for _, group, _, _, _ in selection.rows))
    means = [mean for row in selection.rows for mean in row[4]]
    band = [scale.values[scale.ranks.index(p)] for p in (5.0, 95.0)] if {5.0, 95.0} <= set(scale.ranks) else []
    reach = [*means, *band, *([scale.floor] if math.isfinite(scale.floor) else [])]
    margin = 0.05 * (max(reach) - min(reach) or 1)
    made = []
    for group in groups:
        rows = [row for row in selection.rows if row[1] == group]
        last = max(len(row[4]) for row in rows)
        traces = []
        if band:
            traces.append(
                go.Scatter(
                    x=[0.6, last + 0.4, last + 0.4, 0.6],
                    y=[band[0], band[0], band[1], band[1]],
                    fill="toself",
                    fillcolor="rgba(0,158,115,0.15)",
                    line={"width": 0},
                    name="normal answers, 5 to 95 %",
                    hoverinfo="skip",
                    mode="lines",
                )
            )
        if math.isfinite(scale.floor):
            traces.append(
                go.Scatter(
                    x=[0.6, last + 0.4],
                    y=[scale.floor] * 2,
                    mode="lines",
                    line={"dash": "longdash", "color": "#888888", "width": 2},
                    name="floor",
                    hovertemplate="floor %{y:.4g}<extra></extra>",
                )
            )
        shown: set[str] = set()
        for name, _, side, _, values in rows[:60]:
            label, colour, dash, marker = _side(side)
            traces.append(
                go.Scatter(
                    x=list(range(1, len(values) + 1)),
                    y=_round(values),
                    mode="lines+markers",
                    line={"color": colour, "dash": dash, "width": 1.5},
                    marker={"symbol": marker, "size": 7},
                    name=label,
                    legendgroup=label,
                    showlegend=label not in shown,
                    hovertemplate=f"{html.escape(name)}, turn %{{x}}: %{{y:.4g}}<extra></extra>",
                )
            )
            shown.add(label)
        more = f" (60 of {len(rows)})" if len(rows) > 60 else ""
        name = f"{group}{more}" if group else f"conversations{more}"
        alt = (
            f"Line chart of {name}: mean projection of each answer at layer {scale.layer} by turn, with the floor and "
            "the range of normal answers."
        )
        made.append(
            figures.add(
                alt,
                traces,
                title={"text": html.escape(name), "font": {"size": 15}},
                xaxis={"title": {"text": "turn"}, "dtick": max(1, last // 10), "range": [0.6, last + 0.4]},
                yaxis={"title": {"text": "mean projection"}, "range": [min(reach) - margin, max(reach) + margin]},
                legend={"orientation": "h", "y": -0.22},
                height=380,
            )
        )
    return _section(
        "Where the conversations go",
        "Each line is a conversation, each point one answer of the model's: the mean of its tokens' projections on "
        f"the axis at layer {scale.layer}, in the units of the residual stream. Higher is more Assistant-like.",
        f'<div class="grid">{"".join(made)}</div>',
    )


def _table(selection: Selection) -> str:
    rows = []
    ordered = sorted(selection.rows, key=lambda row: row[3].lowest)
    for name, group, side, drift, _ in ordered[:200]:
        cells = [
            name,
            group,
            side,
            f"{drift.turns}",
            f"{drift.level:.3g}",
            f"{drift.slope:+.3g}" if math.isfinite(drift.slope) else "",
            f"{drift.lowest:.3g} (turn {drift.lowest_turn})",
            percentile_in_words(drift.lowest_percentile),
            f"{drift.below:.0%}" if math.isfinite(drift.below) else "",
        ]
        rows.append("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>")
    heads = (
        "conversation",
        "group",
        "side",
        "answers",
        "level",
        "slope a turn",
        "lowest answer",
        "which is",
        "tokens below floor",
    )
    head = "".join(f'<th scope="col">{name}</th>' for name in heads)
    more = f" The lowest 200 of {len(ordered)} are listed." if len(ordered) > 200 else ""
    return _section(
        "Drift in figures",
        "Level: the mean of the answers' means; slope: by least squares." + more,
        f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>',
    )


#: Classes of a token's projection, from far below the floor to far above normal.
_BANDS = ("far-below", "below", "low", "normal", "high")


def _band(value: float, scale: Scale) -> str:
    low = scale.floor if math.isfinite(scale.floor) else math.nan
    values = dict(zip(scale.ranks, scale.values, strict=True))
    middle, spread = values.get(50.0, low), values.get(50.0, low) - values.get(5.0, low)
    if math.isnan(low) or not math.isfinite(value):
        return "normal"
    if value < low:
        return "far-below" if spread and value < low - spread else "below"
    if value < middle:
        return "low"
    return "high" if spread and value > middle + spread else "normal"


def _details(figures: _Figures, selection: Selection, profile: CapProfile) -> str:
    made = []
    for trace in selection.finish():
        side = f" ({trace.talk.side})" if trace.talk.side else ""
        name = f"{trace.talk.name}{side}"
        made.append(
            f"<details><summary>{html.escape(name)}</summary>"
            f"{_transcript(trace, selection.scale)}{_heat(figures, trace, name, profile)}</details>"
        )
    key = " ".join(
        f'<span class="t {name}">{text}</span>'
        for name, text in zip(
            _BANDS,
            (
                "far below the floor",
                "below the floor",
                "above the floor, below the normal median",
                "normal",
                "far above",
            ),
            strict=True,
        )
    )
    kept = len({trace.talk.name for trace in selection.detailed})
    total = len({row[0] for row in selection.rows})
    return _section(
        "Token by token",
        f"{kept if kept < total else 'All'} of {total} conversations, those that went lowest first; open one to see "
        f"it. Each token is marked by its projection at layer {selection.scale.layer}.",
        f'<p class="key">{key}</p>{"".join(made)}',
    )


def _transcript(trace: Trace, scale: Scale) -> str:
    row = trace.projections[trace.layers.index(scale.layer)].tolist()
    parts = []
    for turn in trace.text.turns:
        tokens = []
        for at in range(turn.start, min(turn.end, TOKENS)):
            text = html.escape(trace.text.pieces[at])
            tokens.append(f'<span class="t {_band(row[at], scale)}" title="{row[at]:.3g}">{text}</span>')
        if tokens:
            kind = "user" if turn.role != "assistant" else "model"
            parts.append(f'<div class="said {kind}"><b>{html.escape(turn.role)}</b> {"".join(tokens)}</div>')
    cut = f"<p>The first {TOKENS} of {len(row)} tokens.</p>" if len(row) > TOKENS else ""
    return "".join(parts) + cut


def _heat(figures: _Figures, trace: Trace, name: str, profile: CapProfile) -> str:
    """Layers by tokens. Layers differ in scale: each is shown less its floor or mean, over its own spread."""
    values = trace.projections[:, :TOKENS]
    spread = values.std(1, keepdim=True).clamp(min=1e-6)
    zero = values.mean(1, keepdim=True)
    for at, layer in enumerate(trace.layers):
        if layer in profile.layers and math.isfinite(profile.floors[profile.layers.index(layer), 0].item()):
            zero[at] = profile.floors[profile.layers.index(layer), 0]
    scaled = ((values - zero) / spread).clamp(-4, 4)
    pieces = [html.escape(piece) or " " for piece in trace.text.pieces[:TOKENS]]
    heat = figures.go.Heatmap(
        z=[[None if math.isnan(x) else round(x, 1) for x in row] for row in scaled.tolist()],
        y=[str(layer) for layer in trace.layers],
        colorscale="Cividis",
        zmin=-4,
        zmax=4,
        colorbar={"title": {"text": "spreads<br>above floor"}, "thickness": 12},
        hovertemplate="token %{x}, layer %{y}: %{z}<extra></extra>",
    )
    made = figures.add(
        f"Heat map of {name}: projection of each token at each layer, in spreads above the layer's floor.",
        [heat],
        title={
            "text": "layers by tokens: projection above the floor, in the layer's own spreads",
            "font": {"size": 13},
        },
        xaxis={"title": {"text": "token"}},
        yaxis={"title": {"text": "layer"}, "type": "category"},
        height=120 + 14 * max(8, len(trace.layers)),
    )
    figures.made[list(figures.made)[-1]]["pieces"] = pieces
    return made


def _evidence(figures: _Figures, profile: CapProfile, facts: Mapping[str, Any]) -> str:
    go = figures.go
    depth = list(range(len(facts["auc"])))
    best = facts["best_layer"]
    capped = {
        "type": "rect", "xref": "x", "yref": "paper", "x0": profile.layers[0] - 0.5, "x1": profile.layers[-1] + 0.5,
        "y0": 0, "y1": 1, "fillcolor": "rgba(128,128,128,0.18)", "line": {"width": 0}, "layer": "below",
    }  # fmt: skip
    lines = [
        go.Scatter(x=depth, y=_round(facts["auc"]), name="all held-out roles", line={"width": 3, "color": "#888888"})
    ]
    for number, (kind, values) in enumerate(facts["auc_by_kind"].items()):
        at = number % len(_SHADES)
        lines.append(
            go.Scatter(
                x=depth,
                y=_round(values),
                name=html.escape(str(kind)),
                mode="lines+markers",
                line={"color": _SHADES[at], "dash": _DASHES[at], "width": 1.2},
                marker={"symbol": _MARKERS[at], "size": 5},
            )
        )
    lines.append(
        go.Scatter(
            x=depth, y=_round(facts["null_auc"]), name="labels permuted", line={"dash": "dot", "color": "#888888"}
        )
    )
    separation = figures.add(
        "Line chart: AUC of the axis on held-out roles and questions by layer, for each kind of role.",
        lines,
        title={"text": "how well the axis separates, by layer (band: capped)", "font": {"size": 15}},
        xaxis={"title": {"text": "layer"}},
        yaxis={"title": {"text": "held-out AUC (0.5: chance)"}},
        shapes=[capped],
        legend={"orientation": "h", "y": -0.25},
        height=430,
    )
    names, points = list(facts["map"]), list(facts["map"].values())
    ordered = sorted(facts["loadings"], key=lambda name: facts["loadings"][name])
    named = {*ordered[:10], *ordered[-10:]}
    xs, ys = [point[0] for point in points], [point[1] for point in points]
    cosine = abs(facts["pc1_cosine"][best])
    far = max(abs(x) for x in xs)
    space = figures.add(
        "Scatter plot of roles on the first two principal components of the persona space, the axis drawn as an arrow.",
        [
            go.Scatter(
                x=_round(xs),
                y=_round(ys),
                mode="markers+text",
                text=[html.escape(name.replace("_", " ")) if name in named else "" for name in names],
                customdata=[html.escape(name.replace("_", " ")) for name in names],
                textposition="top center",
                textfont={"size": 10},
                marker={"color": _ROLE, "size": 7, "line": {"width": 1, "color": "#666666"}},
                hovertemplate="%{customdata}: %{x:.3g}, %{y:.3g}<extra></extra>",
                showlegend=False,
            )
        ],
        title={"text": f"persona space, layer {best} (named: the 10 lowest and highest)", "font": {"size": 15}},
        xaxis={"title": {"text": "component 1 (residual stream units)"}, "zeroline": True},
        yaxis={"title": {"text": "component 2"}, "zeroline": True},
        annotations=[
            {
                "x": far * cosine, "y": 0, "ax": -far * cosine, "ay": 0, "xref": "x", "yref": "y", "axref": "x",
                "ayref": "y", "showarrow": True, "arrowhead": 3, "arrowwidth": 2, "arrowcolor": _CAPPED,
                "text": f"Assistant Axis (cos {cosine:.2f} with component 1)", "yshift": 12, "font": {"color": _CAPPED},
            }
        ],
        height=460,
    )  # fmt: skip
    return _section(
        "Is the axis real?",
        f"Measured on {len(facts['held_roles'])} roles and {len(facts['held_questions'])} questions that made nothing "
        "of it.",
        f'<div class="grid">{separation}{space}</div>',
    )


def _histogram(figures: _Figures, profile: CapProfile, selection: Selection) -> str:
    go, scale = figures.go, selection.scale
    traces = []
    facts = profile.provenance.get("quantiles")
    names = list(facts.get("populations", [])) if isinstance(facts, Mapping) else []
    if profile.populations is not None and isinstance(facts, Mapping) and scale.layer < profile.populations.shape[1]:
        ranks = facts.get("percentiles", [])
        chosen = [at for at, rank in enumerate(ranks) if rank % 5 == 0]
        for number, name in enumerate(names[: len(profile.populations)]):
            values = profile.populations[number, scale.layer].tolist()
            x, y = [], []
            for left, right in pairwise(chosen):
                width = max(values[right] - values[left], 1e-9)
                density = (ranks[right] - ranks[left]) / width
                x += [values[left], values[right]]
                y += [density, density]
            traces.append(
                go.Scatter(
                    x=_round(x),
                    y=_round(y),
                    name=html.escape(str(name)),
                    mode="lines",
                    line={"color": _SHADES[number % 6], "dash": _DASHES[number % 6], "width": 1.6},
                    hovertemplate="%{x:.3g}: %{y:.3g} % a unit<extra></extra>",
                )
            )
    for side, values in selection.tokens.items():
        label, colour, _, _ = _side(side)
        counts = torch.histc(torch.tensor(values), bins=50)
        low, high = min(values), max(values)
        step = (high - low) / 50 or 1.0
        traces.append(
            go.Bar(
                x=_round(low + (at + 0.5) * step for at in range(50)),
                y=_round(100 * count / len(values) / step for count in counts.tolist()),
                width=step,
                name=f"tokens here, {label}",
                marker={"color": colour, "opacity": 0.45, "pattern": {"shape": "/" if side == CAPPED else ""}},
                hovertemplate="%{x:.3g}: %{y:.3g} % a unit<extra></extra>",
            )
        )
    shapes, notes = [], []
    if math.isfinite(scale.floor):
        shapes = [{"type": "line", "x0": scale.floor, "x1": scale.floor, "yref": "paper", "y0": 0, "y1": 1,
                   "line": {"dash": "longdash", "color": "#888888", "width": 2}}]  # fmt: skip
        notes = [{"x": scale.floor, "yref": "paper", "y": 1.02, "text": "floor", "showarrow": False}]
    made = figures.add(
        f"Histogram of projections at layer {scale.layer} by population, with the floor.",
        traces,
        title={"text": f"projections at layer {scale.layer}, by population", "font": {"size": 15}},
        xaxis={"title": {"text": "projection (residual stream units)"}},
        yaxis={"title": {"text": "% of the population a unit"}},
        barmode="overlay",
        shapes=shapes,
        annotations=notes,
        legend={"orientation": "h", "y": -0.22},
        height=430,
    )
    return _section(
        "Where normal answers lie",
        "Lines: the calibration's populations, of answer means or of single tokens, between their 5th and 95th "
        "percentile. Bars: the tokens of the answers above.",
        made,
    )


def _provenance(profile: CapProfile, selection: Selection) -> str:
    facts: dict[str, object] = {f"model {key}": value for key, value in profile.model_facts.items()}
    for key, value in profile.provenance.items():
        if key not in ("model", "evidence", "quantiles"):
            facts[key] = value
    facts |= {
        "capped layers": ", ".join(map(str, profile.layers)),
        "their floors": ", ".join(f"{floor:.4g}" for floor in profile.floors[:, 0].tolist()),
        "profile digest": profile.digest,
        "layer of the curves": selection.scale.layer,
        "this page": f"AxisCap {axiscap.__version__}, {datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
    }
    rows = []
    for key, value in facts.items():
        text = value if isinstance(value, str) else json.dumps(value)
        rows.append(f'<tr><th scope="row">{html.escape(key)}</th><td>{html.escape(text[:600])}</td></tr>')
    return _section(
        "Where this comes from", "", f'<div class="wide"><table class="facts">{"".join(rows)}</table></div>'
    )


def _section(title: str, text: str, body: str) -> str:
    lead = f"<p>{html.escape(text)}</p>" if text else ""
    return f"<section><h2>{html.escape(title)}</h2>{lead}{body}</section>"
