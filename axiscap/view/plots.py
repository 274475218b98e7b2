"""Pictures, by matplotlib (the extra ``axiscap[report]``)."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from axiscap import CapProfile, Evidence
from axiscap.drift.compare import Comparison, Track

# Okabe and Ito's colours, which colour-blind people can tell apart; markers and dashes differ for prints in grey.
UNCAPPED, CAPPED, FLOOR = "#D55E00", "#0072B2", "#555555"
_SHADES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_MARKERS = "os^Dv*"
#: The roles at each end of the axis that are drawn if there are many.
_ROLES = 20


def pyplot() -> Any:
    """The module ``matplotlib.pyplot``, which draws without a screen; the error without it names the extra."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        raise ModuleNotFoundError("pictures need matplotlib: pip install 'axiscap[report]'") from None
    matplotlib.use("Agg")
    return importlib.import_module("matplotlib.pyplot")


def draw_trajectories(comparisons: Sequence[Comparison], profile: CapProfile, layer_index: int, path: Path) -> None:
    """One panel for each conversation: projections of tokens (thin), means of turns (marked), and the floor.

    Parameters
    ----------
    layer_index
        the index in ``profile.layers`` of the layer to draw.
    path
        the picture; its suffix is its format.
    """
    plot = pyplot()
    figure, panels = plot.subplots(
        1, len(comparisons), figsize=(5.6 * len(comparisons), 4.2), sharey=True, squeeze=False, layout="constrained"
    )
    floor = profile.floors[layer_index, 0].item()
    for panel, comparison in zip(panels[0], comparisons, strict=True):
        _draw_track(panel, "uncapped", comparison.uncapped, layer_index, UNCAPPED, "o")
        _draw_track(panel, "capped", comparison.capped, layer_index, CAPPED, "s")
        panel.axhline(floor, color=FLOOR, linestyle="--", label="floor")
        panel.set_title(f"conversation: {comparison.conversation.name}")
        panel.set_xlabel("turn")
        panel.set_xticks(list(range(1, len(comparison.conversation.turns) + 1)))
        panel.grid(alpha=0.25)
    panels[0][0].set_ylabel(f"projection on the Assistant Axis\n(before the cap, layer {profile.layers[layer_index]})")
    panels[0][-1].legend(loc="lower left", fontsize=8)
    figure.suptitle("Drift along the Assistant Axis: higher is more Assistant-like")
    figure.savefig(path, dpi=140)
    plot.close(figure)


def _draw_track(panel: Any, side: str, track: Track, layer_index: int, colour: str, marker: str) -> None:
    for turn, answer in enumerate(track.answers):
        values = answer.projections[layer_index].tolist()
        # The tokens of turn 1 lie between 0.6 and 1.4.
        x = [turn + 0.6 + 0.8 * (token + 0.5) / len(values) for token in range(len(values))]
        panel.plot(x, values, color=colour, linewidth=0.6, alpha=0.45)
    turns = range(1, len(track.answers) + 1)
    panel.plot(turns, track.turn_means(layer_index), color=colour, marker=marker, label=f"{side}, mean of turn")


def draw_bench(results: dict[str, Any], path: Path) -> None:
    """The fraction of the memory bound by rows, in bfloat16: one panel for each share of rows that fire.

    Parameters
    ----------
    results
        the JSON of ``axiscap bench``.
    path
        the picture; its suffix is its format.
    """
    plot = pyplot()
    cases = [case for case in results["ops"] if case["dtype"] == "bfloat16"]
    shares = sorted({case["fire"] for case in cases})
    machine = results["machine"]
    figure, panels = plot.subplots(
        1, len(shares), figsize=(4.2 * len(shares), 3.8), sharey=True, squeeze=False, layout="constrained"
    )
    for panel, share in zip(panels[0], shares, strict=True):
        _draw_bound(panel, [case for case in cases if case["fire"] == share])
        bound = "reading only" if share == 0 else "reading and writing back"
        if machine["device"] != "cpu":
            bound = "copying, byte for byte"
        panel.set_title(f"{share:.0%} of rows fire\n(bound: {bound})", fontsize=10)
    panels[0][0].set_ylim(0, 1.05 * max(1, *(case["of_memory_bound"]["p75"] for case in cases)))
    panels[0][0].set_ylabel("fraction of the memory bound's speed")
    panels[0][-1].legend(fontsize=8)
    setting = f"{machine['threads']} threads" if machine["device"] == "cpu" else machine["processor"]
    figure.suptitle(f"cap_ against the memory bound, bfloat16, {setting}; band: quartiles")
    figure.savefig(path, dpi=140)
    plot.close(figure)


def _draw_bound(panel: Any, cases: Sequence[dict[str, Any]]) -> None:
    """One curve for each hidden size, with a band from quartile to quartile."""
    shades = ("#000000", "#D55E00", "#0072B2", "#009E73", "#CC79A7")
    sizes = sorted({case["hidden_size"] for case in cases})
    for marker, shade, size in zip("os^Dv", shades, sizes, strict=False):
        curve = sorted((case for case in cases if case["hidden_size"] == size), key=lambda case: case["rows"])
        rows = [case["rows"] for case in curve]
        low, middle, high = ([case["of_memory_bound"][key] for case in curve] for key in ("p25", "median", "p75"))
        panel.plot(rows, middle, marker=marker, color=shade, label=f"H = {size}")
        panel.fill_between(rows, low, high, color=shade, alpha=0.12)
    panel.set_xscale("log", base=8)
    panel.set_xticks([1, 8, 64, 512, 4096], ["1", "8", "64", "512", "4096"])
    panel.axhline(1, color=FLOOR, linestyle="--", linewidth=1)
    panel.set_xlabel("rows")
    panel.grid(alpha=0.25)


def draw_calibration(profile: CapProfile, path: Path) -> None:
    """The evidence for a profile: separation and geometry by layer, floors, the persona space, the roles' loadings.

    Parameters
    ----------
    profile
        one that ``axiscap calibrate`` made.
    path
        the picture; its suffix is its format.

    Raises
    ------
    ValueError
        the profile's provenance has no evidence that can be read.
    """
    evidence = profile.evidence
    if evidence is None:
        raise ValueError("the profile has no evidence to draw; it was not made by this version's calibration")
    plot = pyplot()
    figure, panels = plot.subplots(2, 3, figsize=(16, 9.5), layout="constrained")
    (separation, geometry, floors), (space, variance, loadings) = panels
    _draw_separation(separation, evidence)
    _draw_geometry(geometry, evidence)
    _draw_floors(floors, profile, len(evidence.auc))
    for panel, legend in ((separation, {"loc": "lower left", "ncols": 2}), (geometry, {"loc": "lower right"}),
                          (floors, {"loc": "lower left"})):  # fmt: skip
        first, last = profile.layers[0] - 0.5, profile.layers[-1] + 0.5
        panel.axvspan(first, last, color="#999999", alpha=0.2, label="capped")
        panel.set_xlabel("layer")
        panel.grid(alpha=0.25)
        panel.legend(fontsize=8, **legend)
    _draw_space(space, evidence)
    _draw_variance(variance, evidence)
    _draw_loadings(loadings, evidence)
    figure.suptitle(f"The Assistant Axis of {profile.model_facts.get('id', 'a model')}: the evidence")
    figure.savefig(path, dpi=120)
    plot.close(figure)


def _draw_separation(panel: Any, evidence: Evidence) -> None:
    layers, best = range(len(evidence.auc)), evidence.best_layer
    auc, (low, high) = evidence.auc[best], evidence.auc_interval
    panel.plot(layers, evidence.auc, color="black", linewidth=2, label="all held-out roles")
    panel.errorbar([best], [auc], [[auc - low], [high - auc]], color="black", capsize=4)
    for (kind, values), shade, marker in zip(
        evidence.auc_by_kind.items(), cycle(_SHADES), cycle(_MARKERS), strict=False
    ):
        panel.plot(layers, values, color=shade, marker=marker, markersize=3, linewidth=1, label=kind)
    panel.plot(layers, evidence.null_auc, color=FLOOR, linestyle=":", label="labels permuted")
    panel.set(title="separation from the default, held out", ylabel="AUC (0.5: none)", ylim=(0.2, 1.02))


def _draw_geometry(panel: Any, evidence: Evidence) -> None:
    curves = (
        ([abs(cosine) for cosine in evidence.pc1_cosine], "|cos|, first component and axis"),
        (evidence.halves, "cos, halves of the questions"),
        (evidence.next_layer, "cos, next layer"),
    )
    for (values, label), shade, marker in zip(curves, _SHADES, _MARKERS, strict=False):
        panel.plot(range(len(values)), values, color=shade, marker=marker, markersize=3, label=label)
    panel.set(title="the axis", ylabel="cosine", ylim=(0, 1.05))


def _draw_floors(panel: Any, profile: CapProfile, depth: int) -> None:
    layers = range(depth)
    columns = [profile.percentiles.index(p) for p in (5.0, 50.0, 95.0) if p in profile.percentiles]
    for name, shade, hatch in (("assistant", _SHADES[0], ""), ("pooled", _SHADES[1], "//")):
        if len(columns) == 3 and name in profile.tables:
            low, median, high = profile.tables[name][:, columns].T.tolist()
            panel.fill_between(layers, low, high, color=shade, alpha=0.2, hatch=hatch, label=f"{name}: 5 to 95 %")
            panel.plot(layers, median, color=shade, linewidth=1)
    panel.plot(profile.layers, profile.floors[:, 0].tolist(), color="black", marker="_", label="floor")
    if profile.targets is not None:
        targets = profile.targets[:, 0].tolist()
        panel.plot(profile.layers, targets, color="black", marker="_", linestyle="--", label="target")
    panel.set(title="projections of answer means (lines: medians)", ylabel="projection")


def _draw_space(panel: Any, evidence: Evidence) -> None:
    for name, (x, y) in evidence.map.items():
        panel.plot(x, y, marker="o", color=_SHADES[0], markersize=3)
        panel.annotate(name.replace("_", " "), (x, y), fontsize=6, xytext=(2, 2), textcoords="offset points")
    panel.annotate("Assistant", (1, -0.06), (0.8, -0.06), xycoords="axes fraction", va="center", fontsize=8,
                   arrowprops={"arrowstyle": "->"})  # fmt: skip
    panel.set(title=f"roles on the first two components, layer {evidence.best_layer}",
              xlabel="component 1 (+: Assistant)", ylabel="component 2")  # fmt: skip
    panel.grid(alpha=0.25)


def _draw_variance(panel: Any, evidence: Evidence) -> None:
    best = evidence.best_layer
    panel.bar(range(1, len(evidence.variance) + 1), evidence.variance, color=_SHADES[0])
    title = f"variance of the role vectors, layer {best}\n{evidence.components_70[best]} components hold 70 %"
    panel.set(title=title, xlabel="component", ylabel="share")
    panel.grid(alpha=0.25, axis="y")


def _draw_loadings(panel: Any, evidence: Evidence) -> None:
    roles = sorted(evidence.loadings.items(), key=lambda item: item[1])
    cut = ""
    if len(roles) > 2 * _ROLES:
        roles, cut = roles[:_ROLES] + roles[-_ROLES:], f", lowest and highest {_ROLES}"
    names, values = [name.replace("_", " ") for name, _ in roles], [value for _, value in roles]
    panel.barh(names, values, color=_SHADES[1])
    panel.tick_params(axis="y", labelsize=6)
    panel.set(title=f"roles along the axis{cut}, layer {evidence.best_layer}", xlabel="projection less the default's")
    panel.grid(alpha=0.25, axis="x")


def draw_sweep(
    uncapped: Any, points: Sequence[Any], frontier: Sequence[Any], chosen: Sequence[Any], path: Path
) -> None:
    """Hold against the cost in the worst domain for each point of a sweep, with intervals, the frontier and the choice.

    Parameters
    ----------
    path
        the picture; its suffix is its format.
    """
    plot = pyplot()
    figure, panel = plot.subplots(figsize=(9, 6), layout="constrained")
    _draw_points(panel, points)
    panel.plot(_costs(frontier), [p.hold for p in frontier], color=FLOOR, linewidth=1, label="frontier")
    panel.plot(_costs(chosen), [p.hold for p in chosen], marker="o", markersize=16, fillstyle="none",
               color="black", linestyle="none", label="chosen")  # fmt: skip
    panel.axhline(uncapped.hold, color=FLOOR, linestyle=":", label="what personas take away")
    panel.set_title("How far a cap holds personas, and what it costs (bars: 95 %)")
    panel.set(xlabel="rise of the perplexity in the worst domain of ordinary answers, %", ylim=(0, None))
    panel.set_ylabel("hold (nats of log-odds given back to the Assistant)")
    panel.grid(alpha=0.25)
    panel.legend(fontsize=8)
    figure.savefig(path, dpi=130)
    plot.close(figure)


def _draw_points(panel: Any, points: Sequence[Any]) -> None:
    """The points, with a colour and a marker for each band of layers and target."""
    groups: dict[tuple[int, int, float | None], list[Any]] = {}
    for point in points:
        groups.setdefault((point.setting.first, point.setting.last, point.setting.target), []).append(point)
    shades, markers = cycle((*_SHADES, "#000000")), cycle((*_MARKERS, "P"))
    for (first, last, target), shade, marker in zip(sorted(groups, key=str), shades, markers, strict=False):
        group = groups[first, last, target]
        holds = [p.hold for p in group]
        bars = [[p.hold - p.hold_interval[0] for p in group], [p.hold_interval[1] - p.hold for p in group]]
        target_text = "the floor" if target is None else f"percentile {target:g}"
        panel.errorbar(_costs(group), holds, bars, marker=marker, color=shade, linestyle="none", elinewidth=0.6,
                       label=f"layers {first}-{last}, lifted to {target_text}")  # fmt: skip
        for point, cost in zip(group, _costs(group), strict=True):
            panel.annotate(f"p{point.setting.percentile:g}", (cost, point.hold), fontsize=7, xytext=(4, 4),
                           textcoords="offset points")  # fmt: skip


def _costs(points: Sequence[Any]) -> list[float]:
    """The rise of perplexity in the worst domain, in percent."""
    return [100 * (float(point.cost) - 1) for point in points]
