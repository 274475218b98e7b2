"""Tables of the commands, for a terminal."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table

from axiscap import CapProfile, Evidence
from axiscap.drift import Scale, Selection
from axiscap.drift.compare import Comparison, by_group
from axiscap.drift.selection import Row
from axiscap.view.sinks import describe_sinks

#: The provenance that a summary shows, and the characters after which an entry is cut.
_PROVENANCE = ("axis", "floors", "sampling", "created", "axiscap", "source")
_PROVENANCE_CHARACTERS = 300
_PERCENTILES = (1, 5, 10, 25, 50, 75, 90, 95, 99)


def new_table(columns: Iterable[str], text_columns: Collection[str] = ()) -> Table:
    """An empty table whose columns are aligned to the right, except those of text."""
    table = Table()
    for column in columns:
        table.add_column(column, justify="left" if column in text_columns else "right")
    return table


# A profile.


def profile_summary(profile: CapProfile) -> Table:
    """The model, digest, layers, sinks and provenance of a profile."""
    table = Table(show_header=False, box=None)
    model = profile.model_facts
    table.add_row(
        "model", escape(f"{model.get('id', 'unknown')} ({model.get('architecture', 'unknown architecture')})")
    )
    table.add_row("digest", profile.digest)
    depth = profile.num_layers or "unknown"
    table.add_row("layers", f"{len(profile.layers)} of {depth} capped; hidden size {profile.hidden_size}")
    if profile.strength != 1:
        table.add_row("strength", f"{profile.strength:.3g}: a row is lifted by this share of its shortfall")
    table.add_row("attention sinks", describe_sinks(profile))
    for key in _PROVENANCE:
        if key in profile.provenance:
            value = profile.provenance[key]
            text = value if isinstance(value, str) else json.dumps(value)
            cut = text if len(text) <= _PROVENANCE_CHARACTERS else text[: _PROVENANCE_CHARACTERS - 3] + "..."
            table.add_row(key, escape(cut))
    return table


def layer_table(profile: CapProfile, evidence: Evidence | None) -> Table:
    """Floor, target, quantiles and AUC of each capped layer and direction."""
    percentiles = profile.percentiles if profile.quantiles is not None else ()
    shown = [percentile for percentile in percentiles if percentile in _PERCENTILES]
    columns = ["layer", "direction", "floor"]
    columns += ["target"] if profile.targets is not None else []
    columns += [f"p{percentile:g}" for percentile in shown]
    columns += ["held-out AUC"] if evidence is not None else []
    table = new_table(columns)
    for index, layer in enumerate(profile.layers):
        quantiles, auc = [], []
        if profile.quantiles is not None:
            values = dict(zip(percentiles, profile.quantiles[layer].tolist(), strict=False))
            quantiles = [f"{values[p]:.4g}" if p in values else "" for p in shown]
        if evidence is not None:
            auc = [f"{evidence.auc[layer]:.3f}"]
        for k in range(profile.directions):
            limits = [profile.floors, *([profile.targets] if profile.targets is not None else [])]
            table.add_row(str(layer), str(k), *(f"{limit[index, k].item():.4g}" for limit in limits), *quantiles, *auc)
    return table


def evidence_table(evidence: Evidence) -> Table:
    """The tests of the axis, at the best layer unless the row says otherwise."""
    best = evidence.best_layer
    middle = range(len(evidence.auc) // 3, -(-2 * len(evidence.auc) // 3))
    cosines = [abs(evidence.pc1_cosine[layer]) for layer in middle]
    held_out = f"{len(evidence.held_roles)} roles, {evidence.held_questions} questions"
    table = Table(show_header=False)
    table.add_row(
        f"held-out AUC ({held_out}), layer {best}", f"{evidence.auc[best]:.3f} ({_interval(evidence.auc_interval)})"
    )
    for kind, values in sorted(evidence.auc_by_kind.items(), key=lambda item: -max(item[1])):
        table.add_row(f"  {escape(kind)}", f"{values[best]:.3f}; best {max(values):.3f}")
    table.add_row("d'", f"{evidence.d_prime[best]:.2f}")
    table.add_row("with labels permuted", f"{evidence.null_auc[best]:.3f} ({_interval(evidence.null_auc_interval)})")
    table.add_row(
        f"|cos| of the first component with the axis, layers {middle[0]}-{middle[-1]}",
        f"{min(cosines):.2f} to {max(cosines):.2f}",
    )
    table.add_row("components that hold 70 % of the roles' variance", str(evidence.components_70[best]))
    table.add_row("cosine of the axes of both halves of the questions", f"{evidence.halves[best]:.3f}")
    table.add_row("cosine with the axes of resampled roles", _interval(evidence.axis_interval))
    roles = sorted(evidence.loadings, key=lambda name: evidence.loadings[name])
    table.add_row("least Assistant-like roles", escape(", ".join(roles[:6])))
    table.add_row("most Assistant-like roles", escape(", ".join(reversed(roles[-6:]))))
    return table


def _interval(ends: Sequence[float]) -> str:
    low, high = ends
    return f"95 %: {low:.3f} to {high:.3f}"


# A sweep.


def point_table(points: Sequence[Any], marks: Mapping[int, str]) -> Table:
    """What each setting holds and costs. ``marks`` has the last column by the point's ``id()``."""
    columns = (
        "setting", "hold", "fired", "mean", "worst domain", "worst fiction", "changed", "uptake", "checks", "declines",
        "",
    )  # fmt: skip
    table = new_table(columns, {"setting"})
    for point in points:
        mark = marks.get(id(point), "")
        table.add_row(*_point_cells(point), mark, style="bold" if mark in ("chosen", "mild") else None)
    return table


def _point_cells(point: Any) -> Iterator[str]:
    low, high = point.hold_interval
    changed = max((1 - cost.agreement for cost in point.domains.values() if not cost.fiction), default=0.0)
    yield point.name
    yield f"{point.hold:.1f} ({low:.1f}-{high:.1f})"
    yield f"{point.fired:.1%}"
    yield f"{point.mean:.4f}"
    for name, value in (point.worst, point.worst_fiction):
        yield f"{value:.3f} {escape(name)}"
    yield f"{changed:.1%}"
    tests = point.tests
    if tests is None:
        yield from ("", "", "")
    else:
        yield from (f"{tests.uptake:.3f}", f"{tests.checks[0]}/{tests.checks[1]}", f"{tests.declines:+.2f}")


# Stored conversations.


def turn_table(rows: Iterable[Row], scale: Scale) -> Table:
    """The answers of each conversation, and the conversation as a whole."""
    table = new_table(
        ("conversation", "answer", "tokens", "mean", "percentile", "tokens below floor"), {"conversation"}
    )
    for row in rows:
        name, drift = f"{row.name} ({row.side})" if row.side else row.name, row.drift
        for number, (mean, tokens, below) in enumerate(row.answers, start=1):
            table.add_row(
                escape(name) if number == 1 else "",
                str(number),
                str(tokens),
                f"{mean:.4g}{' (below)' if mean < scale.floor else ''}",
                _percentile(scale.percentile(mean)),
                f"{below / tokens:.0%}" if math.isfinite(scale.floor) else "",
            )
        share = f"{drift.below:.0%}" if math.isfinite(drift.below) else ""
        slope = f", slope {drift.slope:+.3g}" if math.isfinite(drift.slope) else ""
        level = f"level {drift.level:.4g}{slope}"
        table.add_row("", "all", str(drift.tokens), level, _percentile(drift.percentile), share, end_section=True)
    return table


def _percentile(percentile: float) -> str:
    return "" if math.isnan(percentile) else f"{percentile:.3g}"


def group_table(selection: Selection) -> Table:
    """The groups and sides of stored conversations."""
    table = new_table(
        ("group", "side", "conversations", "mean level (95 %)", "answers below floor", "below percentile 1"),
        {"group", "side"},
    )
    for (name, side), group in sorted(selection.groups.items()):
        counts = (f"{count} of {group.answers}" for count in (group.below, group.abnormal))
        table.add_row(escape(name), escape(side), str(group.conversations), group.describe_level(), *counts)
    return table


# Conversations that were generated uncapped and capped.


def answer_table(result: Comparison) -> Table:
    """What the user says, and both answers."""
    table = Table(show_lines=True)
    for column in ("user", "uncapped", "capped"):
        table.add_column(column, ratio=1)
    rows = zip(result.conversation.turns, result.uncapped.answers, result.capped.answers, strict=True)
    for message, uncapped, capped in rows:
        table.add_row(*(escape(text) for text in (message, uncapped.text, capped.text)))
    return table


def mean_table(result: Comparison, layer_index: int, floor: float) -> Table:
    """The mean projection of each answer at one capped layer."""
    table = new_table(("turn", "uncapped", "capped"))
    means = zip(result.uncapped.turn_means(layer_index), result.capped.turn_means(layer_index), strict=True)
    for turn, pair in enumerate(means, start=1):
        table.add_row(str(turn), *(f"{mean:.4g}{' (below)' if mean < floor else ''}" for mean in pair))
    return table


def fired_table(results: Sequence[Comparison], layers: Iterable[int]) -> Table:
    """The rows that fired at each layer, one column for each conversation, or for each group if groups are named."""
    stats_by_label: dict[str, list[Any]] = {}
    for result in results:
        label = result.conversation.group or result.conversation.name
        stats_by_label.setdefault(label, []).append(result.capped.stats or {})
    table = new_table(("layer", *stats_by_label))
    for layer in layers:
        cells = []
        for stats in stats_by_label.values():
            fired, rows = (sum(getattr(by_layer[layer], name) for by_layer in stats) for name in ("fired", "rows"))
            cells.append(f"{fired} of {rows} ({fired / max(1, rows):.0%})")
        table.add_row(str(layer), *cells)
    return table


def below_table(results: Sequence[Comparison], profile: CapProfile) -> Table:
    """The turns and tokens below the floor, for each group."""
    table = new_table(
        ("group", "conversations", "turns below", "capped", "tokens below", "capped", "mean less floor"), {"group"}
    )
    for group in by_group(results, profile):
        shares = (f"{share:.1%}" for pair in (group.turns, group.tokens) for share in pair)
        low, high = group.interval
        mean = f"{group.mean:.3g} (95 %: {low:.3g} to {high:.3g})"
        table.add_row(escape(group.name), str(group.conversations), *shares, mean)
    return table


def speed_table(results: Sequence[Comparison]) -> Table:
    """The generated tokens per second of both sides."""
    table = new_table(("conversation", "uncapped", "capped"), {"conversation"})
    for result in results:
        speeds = (f"{track.tokens_per_second:.1f}" for track in (result.uncapped, result.capped))
        table.add_row(result.conversation.name, *speeds)
    return table
