"""The page of a report: conversations along the axis, and the evidence for the profile that they are held to."""

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
from axiscap.drift import CAPPED, Scale, Selection, Trace, describe_percentile
from axiscap.profile import CapProfile, Evidence, ProfileError
from axiscap.view.sheet import BLUE, GREY, ORANGE, PINK, Figures, axis, grid, provenance, rounded, save, section, table
from axiscap.view.sinks import describe_sinks, sink_warnings

#: Tokens of a conversation that are shown at most, and layers of its heat map.
TOKENS, LAYERS = 500, 32
#: Curves in one chart at most.
_LINES = 60

_SHADES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
_MARKERS = ("circle", "square", "triangle-up", "diamond", "x", "cross")


def write(path: Path, profile: CapProfile, selection: Selection, title: str = "Drift along the Assistant Axis") -> None:
    """Writes the page, in one step.

    Parameters
    ----------
    profile
        the one that the conversations are held against; its evidence is shown where it has some.
    selection
        what to show; an empty one gives the profile's evidence alone.

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


def _normal(scale: Scale) -> list[float]:
    """The 5th and the 95th percentile of normal answers; empty where they are not known."""
    ends = [scale.at(5.0), scale.at(95.0)]
    return ends if all(map(math.isfinite, ends)) else []


def _side(side: str) -> tuple[str, str, str, str]:
    """Label, colour, dash and marker."""
    if side == CAPPED:
        return CAPPED, BLUE, "dash", "square"
    return side or "as read", ORANGE, "solid", "circle"


def _summary(profile: CapProfile, evidence: Evidence | None, selection: Selection) -> list[str]:
    scale, lines = selection.scale, []
    for side in dict.fromkeys(side for _, side in selection.groups):
        groups = [group for (_, other), group in selection.groups.items() if other == side]
        conversations, answers, below, far = (
            sum(getattr(group, name) for group in groups) for name in ("conversations", "answers", "below", "abnormal")
        )
        name = f"The {side} conversations" if side else "The conversations"
        text = f"{name} ({conversations}) have {answers} answers. {below} of these lie below the floor on average"
        lines.append(text + (f", {far} below 99 % of the model's normal answers." if scale.values else "."))
        worst = next((row for row in selection.rows() if row.side == side), None)
        if worst is not None:
            lines.append(
                f"The lowest is answer {worst.drift.lowest_turn} of {worst.name}, at {worst.drift.lowest:.3g}"
                + (f", {describe_percentile(worst.drift.lowest_percentile)}" if scale.values else "")
                + (f"; the floor is {scale.floor:.3g}." if math.isfinite(scale.floor) else ".")
            )
    if evidence is not None:
        auc = evidence.auc[evidence.best_layer]
        lines.append(
            "On held-out roles and questions, the axis separates the Assistant's answers from other characters' "
            f"with an AUC of {auc:.2f} at layer {evidence.best_layer} (0.5 is chance, 1 is perfect)."
        )
    layers = f"{profile.layers[0]} to {profile.layers[-1]}" if len(profile.layers) > 1 else f"{profile.layers[0]}"
    about = f" Curves of conversations are of layer {scale.layer}, before its own cap." if selection.groups else ""
    sinks = f"Attention sinks: {describe_sinks(profile)}."
    return [*lines, f"The profile caps layers {layers}.{about}", sinks, *sink_warnings(profile)]


def _trajectories(figures: Figures, selection: Selection) -> str:
    scale, listed = selection.scale, selection.rows()
    reach = [*(mean for row in listed for mean in row.means), *_normal(scale)]
    reach += [scale.floor] if math.isfinite(scale.floor) else []
    margin = 0.05 * (max(reach) - min(reach) or 1)
    made = []
    for group in sorted({row.group for row in listed}):
        rows = [row for row in listed if row.group == group][:_LINES]
        total = sum(sums.conversations for (name, _), sums in selection.groups.items() if name == group)
        name = (group or "conversations") + (f" (the lowest {len(rows)} of {total})" if len(rows) < total else "")
        last = max(len(row.answers) for row in rows)
        made.append(
            figures.add(
                f"Line chart of {name}: mean projection of each answer at layer {scale.layer}, with the floor and the "
                "range of normal answers.",
                lines(figures.go, [(row.name, row.side, row.means) for row in rows], scale, last),
                title=name,
                x=axis("answer", dtick=max(1, last // 10), range=[0.6, last + 0.4]),
                y=axis("mean projection", range=[min(reach) - margin, max(reach) + margin]),
                height=380,
            )
        )
    return section(
        "Drift by conversation",
        "Each line is a conversation. Each point is one answer: the mean projection of its tokens on the axis at layer "
        f"{scale.layer}, in units of the residual stream. Higher is more Assistant-like.",
        grid(made),
    )


def lines(go: Any, curves: Iterable[tuple[str, str, Sequence[float]]], scale: Scale, last: int) -> Iterator[Any]:
    """Conversations against the floor and the range of normal answers, as plotly's traces.

    Parameters
    ----------
    go
        plotly's graph_objects.
    curves
        name, side and the answers' mean projections of each.
    last
        the number of answers to make room for.
    """
    ends, band = [0.6, last + 0.4], _normal(scale)
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
        label, colour, dash, marker = _side(side)
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
    heads = ("group", "side", "conversations", "level (95 %)", "answers below floor", "below 99 % of normal answers")
    other = (
        "conversation", "group", "side", "answers", "level", "slope per answer", "lowest answer", "position",
        "tokens below floor",
    )  # fmt: skip
    return section(
        "Drift statistics",
        "Level: the mean over a conversation's answers; for a group, the mean over its conversations. Slope: by least "
        "squares." + more,
        table(heads, groups) + table(other, conversations),
    )


#: Classes of a token's projection, and what they say.
_BANDS = {
    "far-below": "far below the floor",
    "below": "below the floor",
    "low": "below the median of normal answers",
    "normal": "normal",
    "high": "far above",
}


def _band(value: float, floor: float, median: float, spread: float) -> str:
    """Nothing is above or below what is not known (NaN)."""
    if value < floor:
        return "far-below" if value < floor - spread else "below"
    if value < median:
        return "low"
    return "high" if value > median + spread else "normal"


def _details(figures: Figures, selection: Selection, profile: CapProfile) -> str:
    traces, made = selection.traces(), []
    for trace in traces:
        name = trace.conversation.name + (f" ({trace.conversation.side})" if trace.conversation.side else "")
        made.append(
            f"<details><summary>{html.escape(name)}</summary>"
            f"{_transcript(trace, selection.scale)}{_heat(figures, trace, name, profile)}</details>"
        )
    key = " ".join(f'<i class="{name}">{text}</i>' for name, text in _BANDS.items())
    total = selection.conversations
    return section(
        "Token by token",
        f"{len(traces) if len(traces) < total else 'All'} of {total} conversations, those that went lowest first; open "
        f"one to see it. Each token is marked by its projection at layer {selection.scale.layer}.",
        f'<p class="key">{key}</p>{"".join(made)}',
    )


def _transcript(trace: Trace, scale: Scale) -> str:
    row = trace.projections[trace.layers.index(scale.layer)].tolist()
    median = scale.at(50.0)
    # How far the normal answers reach down from their median, as a measure of what is far.
    bounds = (scale.floor, median, median - scale.at(5.0))
    parts = []
    for turn in trace.text.turns:
        tokens = [
            f'<i class="{_band(value, *bounds)}" title="{_measured(value)}">{html.escape(piece)}</i>'
            for value, piece in list(zip(row, trace.text.pieces, strict=True))[turn.start : min(turn.end, TOKENS)]
        ]
        if tokens:
            kind = "model" if turn.role == "assistant" else "user"
            parts.append(f'<div class="said {kind}"><b>{html.escape(turn.role)}</b>{"".join(tokens)}</div>')
    cut = f"<p>The first {TOKENS} of {len(row)} tokens.</p>" if len(row) > TOKENS else ""
    return "".join(parts) + cut


def _measured(value: float) -> str:
    return "not measured: a sink" if math.isnan(value) else f"{value:.3g}"


def _heat(figures: Figures, trace: Trace, name: str, profile: CapProfile) -> str:
    """Layers by tokens. Layers differ in scale: each is shown less its floor or mean, over its own spread."""
    step = -(-len(trace.layers) // LAYERS)
    layers, values = trace.layers[::step], trace.projections[::step, :TOKENS]
    # Sinks, which have no projection, are shown as the mean.
    values = torch.where(values.isnan(), values.nanmean(1, keepdim=True), values)
    zero = values.mean(1, keepdim=True)
    for at, layer in enumerate(layers):
        floor = Scale.of(profile, layer).floor
        if math.isfinite(floor):
            zero[at] = floor
    scaled = ((values - zero) / values.std(1, keepdim=True).clamp(min=1e-6)).nan_to_num(0.0).clamp(-4, 4)
    tenths = (scaled * 10).round().to(torch.int8).numpy().tobytes()
    every = "" if step == 1 else f" (each {step}th layer)"
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
        title=f"z-score from the floor (layers without one: from the mean){every}",
        x=axis("token"),
        y=axis("layer", type="category"),
        height=120 + 14 * max(8, len(layers)),
        heat={
            "pieces": [html.escape(piece) for piece in trace.text.pieces[:TOKENS]],
            "tenths": base64.b64encode(tenths).decode(),
        },
    )


def _evidence(figures: Figures, profile: CapProfile, facts: Evidence) -> str:
    go, depth, best = figures.go, list(range(len(facts.auc))), facts.best_layer
    lines = [go.Scatter(x=depth, y=rounded(facts.auc), name="all held-out roles", line={"width": 3, "color": GREY})]
    for number, (kind, values) in enumerate(facts.auc_by_kind.items()):
        at = number % len(_SHADES)
        lines.append(
            go.Scatter(
                x=depth,
                y=rounded(values),
                name=html.escape(str(kind)),
                mode="lines+markers",
                line={"color": _SHADES[at], "dash": _DASHES[at], "width": 1.2},
                marker={"symbol": _MARKERS[at], "size": 5},
            )
        )
    null = go.Scatter(x=depth, y=rounded(facts.null_auc), name="labels permuted", line={"dash": "dot", "color": GREY})
    capped = {
        "type": "rect", "xref": "x", "yref": "paper", "x0": profile.layers[0] - 0.5, "x1": profile.layers[-1] + 0.5,
        "y0": 0, "y1": 1, "fillcolor": "rgba(128,128,128,0.18)", "line": {"width": 0}, "layer": "below",
    }  # fmt: skip
    separation = figures.add(
        "Line chart: AUC of the axis on held-out roles and questions by layer, for each kind of role.",
        [*lines, null],
        title="how well the axis separates, by layer (band: capped)",
        x=axis("layer"),
        y=axis("held-out AUC (0.5: chance)"),
        shapes=[capped],
        height=460,
    )
    names = [str(name).replace("_", " ") for name in facts.map]
    xs, ys = zip(*facts.map.values(), strict=True)
    ordered = sorted(facts.loadings, key=lambda name: float(facts.loadings[name]))
    named = {name.replace("_", " ") for name in (*ordered[:6], *ordered[-6:])}
    roles = go.Scatter(
        x=rounded(xs),
        y=rounded(ys),
        mode="markers+text",
        text=[html.escape(name) if name in named else "" for name in names],
        customdata=[html.escape(name) for name in names],
        textposition=[("top center", "bottom center")[at % 2] for at in range(len(names))],
        textfont={"size": 10},
        marker={"color": PINK, "size": 7, "line": {"width": 1, "color": "#666666"}},
        hovertemplate="%{customdata}: %{x:.3g}, %{y:.3g}<extra></extra>",
        showlegend=False,
    )
    cosine, far = abs(facts.pc1_cosine[best]), max(abs(x) for x in xs)
    arrow = {
        "x": far * cosine, "y": 0, "ax": -far * cosine, "ay": 0, "xref": "x", "yref": "y", "axref": "x", "ayref": "y",
        "showarrow": True, "arrowhead": 3, "arrowwidth": 2, "arrowcolor": BLUE,
    }  # fmt: skip
    text = f"Assistant Axis (cos {cosine:.2f} with component 1)"
    label = {"x": 0, "y": 1.07, "xref": "paper", "yref": "paper", "xanchor": "left", "showarrow": False, "text": text}
    space = figures.add(
        "Scatter plot of roles on the first two principal components of the persona space, the axis drawn as an arrow.",
        [roles],
        title=f"persona space, layer {best} (named: the 6 lowest and highest)",
        x=axis("component 1 (units of the residual stream)", zeroline=True),
        y=axis("component 2 (the same units)", zeroline=True),
        annotations=[arrow, {**label, "font": {"color": BLUE}}],
        height=460,
    )
    held = f"{len(facts.held_roles)} roles and {facts.held_questions} questions"
    return section("Evidence for the axis", f"Measured on {held} that were held out.", grid([separation, space]))


def _histogram(figures: Figures, profile: CapProfile, selection: Selection) -> str:
    go, scale, traces = figures.go, selection.scale, []
    chosen = [at for at, rank in enumerate(scale.ranks) if rank % 5 == 0]
    for number, (name, quantiles) in enumerate(profile.tables.items() if scale.values else ()):
        values = quantiles[scale.layer].tolist()
        x, y = [], []
        for left, right in pairwise(chosen):
            density = (scale.ranks[right] - scale.ranks[left]) / max(values[right] - values[left], 1e-9)
            x += [values[left], values[right]]
            y += [density, density]
        traces.append(
            go.Scatter(
                x=rounded(x),
                y=rounded(y),
                name=html.escape(str(name)),
                mode="lines",
                line={"color": _SHADES[number % 6], "dash": _DASHES[number % 6], "width": 1.6},
                hovertemplate="%{x:.3g}: %{y:.3g} % a unit<extra></extra>",
            )
        )
    for side, tokens in selection.tokens.items():
        label, colour, _, _ = _side(side)
        counts = torch.histc(torch.tensor(tokens), bins=50)
        low = min(tokens)
        step = (max(tokens) - low) / 50 or 1.0
        traces.append(
            go.Bar(
                x=rounded(low + (at + 0.5) * step for at in range(50)),
                y=rounded(100 * count / len(tokens) / step for count in counts.tolist()),
                width=step,
                name=f"tokens here, {label}",
                marker={"color": colour, "opacity": 0.45, "pattern": {"shape": "/" if side == CAPPED else ""}},
                hovertemplate="%{x:.3g}: %{y:.3g} % a unit<extra></extra>",
            )
        )
    floor: dict[str, Any] = {}
    if math.isfinite(scale.floor):
        line = {"dash": "longdash", "color": GREY, "width": 2}
        at = {"x0": scale.floor, "x1": scale.floor, "yref": "paper", "y0": 0, "y1": 1}
        floor["shapes"] = [{"type": "line", "line": line, **at}]
        floor["annotations"] = [{"x": scale.floor, "yref": "paper", "y": 1.05, "text": "floor", "showarrow": False}]
    made = figures.add(
        f"Histogram of projections at layer {scale.layer} by population, with the floor.",
        traces,
        title=f"projections at layer {scale.layer}, by population",
        x=axis("projection (units of the residual stream)"),
        y=axis("% of the population per unit"),
        barmode="overlay",
        height=460,
        **floor,
    )
    bars = " Bars: the tokens of the answers above." if selection.tokens else ""
    return section(
        "Distributions of projections",
        "Lines: the calibration's populations, of answers' means or of single tokens, between their 5th and 95th "
        "percentile." + bars,
        made,
    )


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
