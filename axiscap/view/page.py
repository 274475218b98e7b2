"""The page of a report: the drift of conversations along the axis, and the evidence for the profile."""

from __future__ import annotations

import base64
import html
import math
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

import axiscap
from axiscap import CapProfile, Evidence, ProfileError
from axiscap.drift import CAPPED, Scale, Selection, Trace, describe_percentile
from axiscap.view.sheet import BLUE, GREY, ORANGE, PINK, Figures, axis, grid, provenance, rounded, save, section, table
from axiscap.view.sinks import describe_sinks, sink_warnings

#: The most tokens of a conversation that the page shows, and the most layers of its heat map.
TOKENS, LAYERS = 500, 32
#: The most curves of one chart, and the bars of the histogram.
_MAX_CURVES, _BINS = 60, 50

_SHADES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
_MARKERS = ("circle", "square", "triangle-up", "diamond", "x", "cross")


def write(path: Path, profile: CapProfile, selection: Selection, title: str = "Drift along the Assistant Axis") -> None:
    """Writes the page, in one step.

    Parameters
    ----------
    profile
        gives the floors, the range of normal answers and, if it has any, the evidence.
    selection
        the conversations; the page of an empty selection has the evidence only.

    Raises
    ------
    ModuleNotFoundError
        plotly is missing.
    ValueError
        there is nothing to show.
    """
    figures = Figures()
    sections = []
    if selection.groups:
        sections += [_trajectories(figures, selection), _table(selection), _details(figures, selection, profile)]
    try:
        evidence, unreadable = profile.evidence, ""
    except ProfileError as error:
        evidence, unreadable = None, f"Of the profile, {error}."
    if evidence is not None:
        sections.append(_evidence(figures, profile, evidence))
    if not sections:
        raise ValueError(
            f"nothing to show: no conversation has an answer, and the profile has no evidence. {unreadable}".rstrip()
        )
    if unreadable:
        sections.append(f"<p>{html.escape(unreadable)}</p>")
    if selection.scale.values or selection.groups:
        sections.append(_histogram(figures, profile, selection))
    sections.append(_provenance(profile, selection))
    save(path, title, _summary(profile, evidence, selection), sections, figures)


def _normal_range(scale: Scale) -> list[float]:
    """The 5th and the 95th percentile of normal answers; empty if the profile has no quantiles."""
    ends = [scale.at(5.0), scale.at(95.0)]
    return ends if all(map(math.isfinite, ends)) else []


def _side_style(side: str) -> tuple[str, str, str, str]:
    """Label, colour, dash and marker."""
    if side == CAPPED:
        return CAPPED, BLUE, "dash", "square"
    return side or "as read", ORANGE, "solid", "circle"


def _summary(profile: CapProfile, evidence: Evidence | None, selection: Selection) -> list[str]:
    """The sentences below the title."""
    lines: list[str] = []
    for side in dict.fromkeys(side for _, side in selection.groups):
        lines += _side_summary(side, selection)
    if evidence is not None:
        auc = evidence.auc[evidence.best_layer]
        lines.append(
            "On held-out roles and questions, the axis separates the Assistant's answers from other characters' "
            f"with an AUC of {auc:.2f} at layer {evidence.best_layer} (0.5 is chance, 1 is perfect)."
        )
    layers = f"{profile.layers[0]} to {profile.layers[-1]}" if len(profile.layers) > 1 else f"{profile.layers[0]}"
    curves = f" Curves of conversations are of layer {selection.scale.layer}, before its own cap."
    lines.append(f"The profile caps layers {layers}.{curves if selection.groups else ''}")
    return [*lines, f"Attention sinks: {describe_sinks(profile)}.", *sink_warnings(profile)]


def _side_summary(side: str, selection: Selection) -> Iterator[str]:
    scale = selection.scale
    groups = [group for (_, group_side), group in selection.groups.items() if group_side == side]
    conversations, answers, below, abnormal = (
        sum(getattr(group, name) for group in groups) for name in ("conversations", "answers", "below", "abnormal")
    )
    name = f"The {side} conversations" if side else "The conversations"
    text = f"{name} ({conversations}) have {answers} answers. {below} of these lie below the floor on average"
    yield text + (f", {abnormal} below 99 % of the model's normal answers." if scale.values else ".")
    lowest = next((row for row in selection.rows() if row.side == side), None)
    if lowest is not None:
        drift = lowest.drift
        yield (
            f"The lowest is answer {drift.lowest_turn} of {lowest.name}, at {drift.lowest:.3g}"
            + (f", {describe_percentile(drift.lowest_percentile)}" if scale.values else "")
            + (f"; the floor is {scale.floor:.3g}." if math.isfinite(scale.floor) else ".")
        )


def _trajectories(figures: Figures, selection: Selection) -> str:
    scale, rows = selection.scale, selection.rows()
    values = [*(mean for row in rows for mean in row.means), *_normal_range(scale)]
    values += [scale.floor] if math.isfinite(scale.floor) else []
    margin = 0.05 * (max(values) - min(values) or 1)
    y_range = [min(values) - margin, max(values) + margin]
    charts = [_group_chart(figures, selection, group, y_range) for group in sorted({row.group for row in rows})]
    return section(
        "Drift by conversation",
        "Each line is a conversation. Each point is one answer: the mean projection of its tokens on the axis at layer "
        f"{scale.layer}, in units of the residual stream. Higher is more Assistant-like.",
        grid(charts),
    )


def _group_chart(figures: Figures, selection: Selection, group: str, y_range: list[float]) -> str:
    scale = selection.scale
    rows = [row for row in selection.rows() if row.group == group][:_MAX_CURVES]
    total = sum(sums.conversations for (name, _), sums in selection.groups.items() if name == group)
    name = (group or "conversations") + (f" (the lowest {len(rows)} of {total})" if len(rows) < total else "")
    last = max(len(row.answers) for row in rows)
    return figures.add(
        f"Line chart of {name}: mean projection of each answer at layer {scale.layer}, with the floor and the "
        "range of normal answers.",
        drift_traces(figures.go, [(row.name, row.side, row.means) for row in rows], scale, last),
        title=name,
        x=axis("answer", dtick=max(1, last // 10), range=[0.6, last + 0.4]),
        y=axis("mean projection", range=y_range),
        height=380,
    )


def drift_traces(go: Any, curves: Iterable[tuple[str, str, Sequence[float]]], scale: Scale, last: int) -> Iterator[Any]:
    """The curves of conversations, the floor and the range of normal answers, as traces of plotly.

    Parameters
    ----------
    go
        the module ``plotly.graph_objects``.
    curves
        name, side and mean projections of the answers of each conversation.
    last
        the number of the last answer on the x axis.
    """
    ends, band = [0.6, last + 0.4], _normal_range(scale)
    if band:
        yield go.Scatter(
            x=[*ends, *reversed(ends)],
            y=[band[0], band[0], band[1], band[1]],
            fill="toself",
            fillcolor="rgba(0,158,115,0.15)",
            line={"width": 0},
            mode="lines",
            name="normal answers, 5 to 95 %",
            hoverinfo="skip",
        )
    if math.isfinite(scale.floor):
        yield go.Scatter(
            x=ends,
            y=[scale.floor] * 2,
            mode="lines",
            line={"dash": "longdash", "color": GREY, "width": 2},
            name="floor",
            hovertemplate="floor %{y:.4g}<extra></extra>",
        )
    shown: set[str] = set()
    for name, side, means in curves:
        label, colour, dash, marker = _side_style(side)
        yield go.Scatter(
            x=list(range(1, len(means) + 1)),
            y=rounded(means),
            mode="lines+markers",
            line={"color": colour, "dash": dash, "width": 1.5},
            marker={"symbol": marker, "size": 7},
            name=label,
            legendgroup=label,
            showlegend=label not in shown,
            hovertemplate=f"{html.escape(name)}, answer %{{x}}: %{{y:.4g}}<extra></extra>",
        )
        shown.add(label)


def _table(selection: Selection) -> str:
    scale, rows = selection.scale, selection.rows()
    groups = [
        (
            name,
            side,
            f"{group.conversations}",
            group.describe_level(),
            f"{group.below} of {group.answers}" if math.isfinite(scale.floor) else "",
            f"{group.abnormal} of {group.answers}" if scale.values else "",
        )
        for (name, side), group in sorted(selection.groups.items())
    ]
    conversations = [
        (
            row.name,
            row.group,
            row.side,
            f"{row.drift.turns}",
            f"{row.drift.level:.3g}",
            f"{row.drift.slope:+.3g}" if math.isfinite(row.drift.slope) else "",
            f"{row.drift.lowest:.3g} (answer {row.drift.lowest_turn})",
            describe_percentile(row.drift.lowest_percentile),
            f"{row.drift.below:.0%}" if math.isfinite(row.drift.below) else "",
        )
        for row in rows
    ]
    total = selection.conversations
    more = f" The lowest {len(rows)} of {total} conversations are listed." if len(rows) < total else ""
    group_heads = (
        "group", "side", "conversations", "level (95 %)", "answers below floor", "below 99 % of normal answers",
    )  # fmt: skip
    conversation_heads = (
        "conversation", "group", "side", "answers", "level", "slope per answer", "lowest answer", "position",
        "tokens below floor",
    )  # fmt: skip
    return section(
        "Drift statistics",
        "Level: the mean over a conversation's answers; for a group, the mean over its conversations. Slope: by least "
        "squares." + more,
        table(group_heads, groups) + table(conversation_heads, conversations),
    )


#: The CSS classes of a token's projection, and their meaning.
_BANDS = {
    "far-below": "far below the floor",
    "below": "below the floor",
    "low": "below the median of normal answers",
    "normal": "normal",
    "high": "far above",
}


def _band(value: float, floor: float, median: float, spread: float) -> str:
    """The class of a token's projection. An unknown floor or median is NaN, and no comparison with NaN holds."""
    if value < floor:
        return "far-below" if value < floor - spread else "below"
    if value < median:
        return "low"
    return "high" if value > median + spread else "normal"


def _details(figures: Figures, selection: Selection, profile: CapProfile) -> str:
    traces, details = selection.traces(), []
    for trace in traces:
        name = trace.conversation.name + (f" ({trace.conversation.side})" if trace.conversation.side else "")
        details.append(
            f"<details><summary>{html.escape(name)}</summary>"
            f"{_transcript(trace, selection.scale)}{_heat(figures, trace, name, profile)}</details>"
        )
    key = " ".join(f'<i class="{name}">{text}</i>' for name, text in _BANDS.items())
    total = selection.conversations
    return section(
        "Token by token",
        f"{len(traces) if len(traces) < total else 'All'} of {total} conversations, those that went lowest first; open "
        f"one to see it. Each token is marked by its projection at layer {selection.scale.layer}.",
        f'<p class="key">{key}</p>{"".join(details)}',
    )


def _transcript(trace: Trace, scale: Scale) -> str:
    row = trace.projections[trace.layers.index(scale.layer)].tolist()
    median = scale.at(50.0)
    # The spread of normal answers below their median says which distances are large.
    bounds = (scale.floor, median, median - scale.at(5.0))
    parts = []
    for turn in trace.text.turns:
        tokens = [
            f'<i class="{_band(value, *bounds)}" title="{_describe_projection(value)}">{html.escape(piece)}</i>'
            for value, piece in list(zip(row, trace.text.pieces, strict=True))[turn.start : min(turn.end, TOKENS)]
        ]
        if tokens:
            kind = "model" if turn.role == "assistant" else "user"
            parts.append(f'<div class="said {kind}"><b>{html.escape(turn.role)}</b>{"".join(tokens)}</div>')
    cut = f"<p>The first {TOKENS} of {len(row)} tokens.</p>" if len(row) > TOKENS else ""
    return "".join(parts) + cut


def _describe_projection(value: float) -> str:
    return "not measured: a sink" if math.isnan(value) else f"{value:.3g}"


def _heat(figures: Figures, trace: Trace, name: str, profile: CapProfile) -> str:
    """Layers by tokens, as z-scores: each layer less its floor (or mean), over its standard deviation."""
    step = -(-len(trace.layers) // LAYERS)
    layers, values = trace.layers[::step], trace.projections[::step, :TOKENS]
    # A sink has no projection; the map shows the mean instead.
    values = torch.where(values.isnan(), values.nanmean(1, keepdim=True), values)
    zero = values.mean(1, keepdim=True)
    for index, layer in enumerate(layers):
        floor = Scale.of(profile, layer).floor
        if math.isfinite(floor):
            zero[index] = floor
    scaled = ((values - zero) / values.std(1, keepdim=True).clamp(min=1e-6)).nan_to_num(0.0).clamp(-4, 4)
    tenths = (scaled * 10).round().to(torch.int8).numpy().tobytes()
    thinned = "" if step == 1 else f" (each {step}th layer)"
    return figures.add(
        f"Heat map of {name}: z-score of each token's projection at each layer, from the floor of the layer.",
        [
            figures.go.Heatmap(
                y=[str(layer) for layer in layers],
                colorscale="Cividis",
                zmin=-4,
                zmax=4,
                colorbar={"title": {"text": "z-score"}, "thickness": 12},
                hovertemplate="“%{text}”, token %{x}, layer %{y}: %{z}<extra></extra>",
            )
        ],
        title=f"z-score from the floor (layers without one: from the mean){thinned}",
        x=axis("token"),
        y=axis("layer", type="category"),
        height=120 + 14 * max(8, len(layers)),
        heat={
            "pieces": [html.escape(piece) for piece in trace.text.pieces[:TOKENS]],
            "tenths": base64.b64encode(tenths).decode(),
        },
    )


def _evidence(figures: Figures, profile: CapProfile, evidence: Evidence) -> str:
    held_out = f"{len(evidence.held_roles)} roles and {evidence.held_questions} questions"
    body = grid([_separation(figures, profile, evidence), _persona_space(figures, evidence)])
    return section("Evidence for the axis", f"Measured on {held_out} that were held out.", body)


def _separation(figures: Figures, profile: CapProfile, evidence: Evidence) -> str:
    """The held-out AUC by layer: of all roles, of each kind of role, and with permuted labels."""
    go, layers = figures.go, list(range(len(evidence.auc)))
    curves = [
        go.Scatter(x=layers, y=rounded(evidence.auc), name="all held-out roles", line={"width": 3, "color": GREY})
    ]
    for number, (kind, values) in enumerate(evidence.auc_by_kind.items()):
        style = number % len(_SHADES)
        curves.append(
            go.Scatter(
                x=layers,
                y=rounded(values),
                name=html.escape(str(kind)),
                mode="lines+markers",
                line={"color": _SHADES[style], "dash": _DASHES[style], "width": 1.2},
                marker={"symbol": _MARKERS[style], "size": 5},
            )
        )
    dotted = {"dash": "dot", "color": GREY}
    curves.append(go.Scatter(x=layers, y=rounded(evidence.null_auc), name="labels permuted", line=dotted))
    capped = {
        "type": "rect", "xref": "x", "yref": "paper", "x0": profile.layers[0] - 0.5, "x1": profile.layers[-1] + 0.5,
        "y0": 0, "y1": 1, "fillcolor": "rgba(128,128,128,0.18)", "line": {"width": 0}, "layer": "below",
    }  # fmt: skip
    return figures.add(
        "Line chart: AUC of the axis on held-out roles and questions by layer, for each kind of role.",
        curves,
        title="how well the axis separates, by layer (band: capped)",
        x=axis("layer"),
        y=axis("held-out AUC (0.5: chance)"),
        shapes=[capped],
        height=460,
    )


def _persona_space(figures: Figures, evidence: Evidence) -> str:
    """The roles on the first two principal components, with the axis as an arrow."""
    best = evidence.best_layer
    cosine = abs(evidence.pc1_cosine[best])
    reach = cosine * max(abs(x) for x, _ in evidence.map.values())
    arrow = {
        "x": reach, "y": 0, "ax": -reach, "ay": 0, "xref": "x", "yref": "y", "axref": "x", "ayref": "y",
        "showarrow": True, "arrowhead": 3, "arrowwidth": 2, "arrowcolor": BLUE,
    }  # fmt: skip
    label = {
        "x": 0, "y": 1.07, "xref": "paper", "yref": "paper", "xanchor": "left", "showarrow": False,
        "text": f"Assistant Axis (cos {cosine:.2f} with component 1)", "font": {"color": BLUE},
    }  # fmt: skip
    return figures.add(
        "Scatter plot of roles on the first two principal components of the persona space, the axis drawn as an arrow.",
        [_role_points(figures.go, evidence)],
        title=f"persona space, layer {best} (named: the 6 lowest and highest)",
        x=axis("component 1 (units of the residual stream)", zeroline=True),
        y=axis("component 2 (the same units)", zeroline=True),
        annotations=[arrow, label],
        height=460,
    )


def _role_points(go: Any, evidence: Evidence) -> Any:
    """A point for each role; only the roles at both ends of the axis have their names beside it."""
    names = [str(name).replace("_", " ") for name in evidence.map]
    xs, ys = zip(*evidence.map.values(), strict=True)
    ordered = sorted(evidence.loadings, key=lambda name: float(evidence.loadings[name]))
    ends = {name.replace("_", " ") for name in (*ordered[:6], *ordered[-6:])}
    return go.Scatter(
        x=rounded(xs),
        y=rounded(ys),
        mode="markers+text",
        text=[html.escape(name) if name in ends else "" for name in names],
        customdata=[html.escape(name) for name in names],
        textposition=[("top center", "bottom center")[number % 2] for number in range(len(names))],
        textfont={"size": 10},
        marker={"color": PINK, "size": 7, "line": {"width": 1, "color": "#666666"}},
        hovertemplate="%{customdata}: %{x:.3g}, %{y:.3g}<extra></extra>",
        showlegend=False,
    )


def _histogram(figures: Figures, profile: CapProfile, selection: Selection) -> str:
    """The calibration's populations as curves, and the tokens of the selection as bars."""
    scale = selection.scale
    figure = figures.add(
        f"Histogram of projections at layer {scale.layer} by population, with the floor.",
        [*_population_curves(figures.go, profile, scale), *_token_bars(figures.go, selection)],
        title=f"projections at layer {scale.layer}, by population",
        x=axis("projection (units of the residual stream)"),
        y=axis("% of the population per unit"),
        barmode="overlay",
        height=460,
        **(_floor_line(scale.floor) if math.isfinite(scale.floor) else {}),
    )
    bars = " Bars: the tokens of the answers above." if selection.tokens else ""
    return section(
        "Distributions of projections",
        "Lines: the calibration's populations, of answers' means or of single tokens, between their 5th and 95th "
        "percentile." + bars,
        figure,
    )


def _population_curves(go: Any, profile: CapProfile, scale: Scale) -> Iterator[Any]:
    """The density of each population between neighbouring quantiles, in steps of five percentiles."""
    if not scale.values:
        return
    indices = [index for index, rank in enumerate(scale.ranks) if rank % 5 == 0]
    for number, (name, quantiles) in enumerate(profile.tables.items()):
        values = quantiles[scale.layer].tolist()
        x, y = [], []
        for left, right in pairwise(indices):
            density = (scale.ranks[right] - scale.ranks[left]) / max(values[right] - values[left], 1e-9)
            x += [values[left], values[right]]
            y += [density, density]
        style = number % len(_SHADES)
        yield go.Scatter(
            x=rounded(x),
            y=rounded(y),
            name=html.escape(str(name)),
            mode="lines",
            line={"color": _SHADES[style], "dash": _DASHES[style], "width": 1.6},
            hovertemplate="%{x:.3g}: %{y:.3g} % a unit<extra></extra>",
        )


def _token_bars(go: Any, selection: Selection) -> Iterator[Any]:
    """A histogram of the tokens of each side."""
    for side, projections in selection.tokens.items():
        label, colour, _, _ = _side_style(side)
        counts = torch.histc(torch.tensor(projections), bins=_BINS)
        low = min(projections)
        width = (max(projections) - low) / _BINS or 1.0
        yield go.Bar(
            x=rounded(low + (number + 0.5) * width for number in range(_BINS)),
            y=rounded(100 * count / len(projections) / width for count in counts.tolist()),
            width=width,
            name=f"tokens here, {label}",
            marker={"color": colour, "opacity": 0.45, "pattern": {"shape": "/" if side == CAPPED else ""}},
            hovertemplate="%{x:.3g}: %{y:.3g} % a unit<extra></extra>",
        )


def _floor_line(floor: float) -> dict[str, Any]:
    """A vertical line at the floor, as parts of plotly's layout."""
    style = {"dash": "longdash", "color": GREY, "width": 2}
    line = {"type": "line", "line": style, "x0": floor, "x1": floor, "yref": "paper", "y0": 0, "y1": 1}
    label = {"x": floor, "yref": "paper", "y": 1.05, "text": "floor", "showarrow": False}
    return {"shapes": [line], "annotations": [label]}


def _provenance(profile: CapProfile, selection: Selection) -> str:
    facts: dict[str, object] = {f"model {key}": value for key, value in profile.model_facts.items()}
    facts |= {key: value for key, value in profile.provenance.items() if key not in ("model", "evidence", "quantiles")}
    facts |= {
        "capped layers": ", ".join(map(str, profile.layers)),
        "floors": ", ".join(f"{floor:.4g}" for floor in profile.floors[:, 0].tolist()),
        "profile digest": profile.digest,
        "layer of the curves": selection.scale.layer,
        "made by": f"AxisCap {axiscap.__version__}, {datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
    }
    if profile.targets is not None:
        facts["targets"] = ", ".join(f"{target:.4g}" for target in profile.targets[:, 0].tolist())
    return provenance(facts)
