"""Pictures, by matplotlib (the extra ``axiscap[report]``)."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from axiscap.drift.compare import Comparison
from axiscap.profile import CapProfile

# Okabe and Ito's colours, which stay apart for colour-blind eyes; markers and dashes keep them apart in grey.
UNCAPPED, CAPPED, FLOOR = "#D55E00", "#0072B2", "#555555"


def pyplot() -> Any:
    """matplotlib's, drawing without a screen; the error without it names the extra."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        raise ModuleNotFoundError("pictures need matplotlib: pip install 'axiscap[report]'") from None
    matplotlib.use("Agg")
    return importlib.import_module("matplotlib.pyplot")


def draw_trajectories(comparisons: Sequence[Comparison], profile: CapProfile, layer_index: int, path: Path) -> None:
    """One panel a conversation: each answer token's projection (thin), each turn's mean (marked), and the floor.

    Parameters
    ----------
    comparisons
        the conversations.
    profile
        the one in force.
    layer_index
        which of the profile's layers is drawn.
    path
        the picture, its kind by its suffix.
    """
    plot = pyplot()
    figure, panels = plot.subplots(
        1, len(comparisons), figsize=(5.6 * len(comparisons), 4.2), sharey=True, squeeze=False, layout="constrained"
    )
    floor = profile.floors[layer_index, 0].item()
    for panel, comparison in zip(panels[0], comparisons, strict=True):
        sides = (("uncapped", comparison.uncapped, UNCAPPED, "o"), ("capped", comparison.capped, CAPPED, "s"))
        for name, track, colour, marker in sides:
            for turn, answer in enumerate(track.answers):
                values = answer.projections[layer_index].tolist()
                where = [turn + 0.6 + 0.8 * (i + 0.5) / len(values) for i in range(len(values))]
                panel.plot(where, values, color=colour, linewidth=0.6, alpha=0.45)
            turns = range(1, len(track.answers) + 1)
            panel.plot(turns, track.turn_means(layer_index), color=colour, marker=marker, label=f"{name}, mean of turn")
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


def draw_bench(results: dict[str, Any], path: Path) -> None:
    """Fraction of the memory bound against rows, one panel for each firing share, one line for each H (bfloat16).

    Parameters
    ----------
    results
        what ``axiscap bench`` writes as JSON.
    path
        the picture, its kind by its suffix.
    """
    plot = pyplot()
    cases = [case for case in results["ops"] if case["dtype"] == "bfloat16"]
    shares = sorted({case["fire"] for case in cases})
    figure, panels = plot.subplots(
        1, len(shares), figsize=(4.2 * len(shares), 3.8), sharey=True, squeeze=False, layout="constrained"
    )
    for panel, share in zip(panels[0], shares, strict=True):
        sizes = sorted({case["hidden_size"] for case in cases})
        for marker, shade, size in zip(
            "os^Dv", ("#000000", "#D55E00", "#0072B2", "#009E73", "#CC79A7"), sizes, strict=False
        ):
            line = [case for case in cases if case["fire"] == share and case["hidden_size"] == size]
            line.sort(key=lambda case: case["rows"])
            rows = [case["rows"] for case in line]
            panel.plot(
                rows, [c["of_memory_bound"]["median"] for c in line], marker=marker, color=shade, label=f"H = {size}"
            )
            low, high = ([c["of_memory_bound"][end] for c in line] for end in ("p25", "p75"))
            panel.fill_between(rows, low, high, color=shade, alpha=0.12)
        panel.set_xscale("log", base=8)
        panel.set_xticks([1, 8, 64, 512, 4096], ["1", "8", "64", "512", "4096"])
        panel.axhline(1, color=FLOOR, linestyle="--", linewidth=1)
        bound = "reading only" if share == 0 else "reading and writing back"
        if results["machine"]["device"] != "cpu":
            bound = "copying, byte for byte"
        panel.set_title(f"{share:.0%} of rows fire\n(bound: {bound})", fontsize=10)
        panel.set_xlabel("rows")
        panel.grid(alpha=0.25)
    panels[0][0].set_ylim(0, 1.05 * max(1, *(case["of_memory_bound"]["p75"] for case in cases)))
    panels[0][0].set_ylabel("fraction of the memory bound's speed")
    panels[0][-1].legend(fontsize=8)
    machine = results["machine"]
    where = f"{machine['threads']} threads" if machine["device"] == "cpu" else machine["processor"]
    figure.suptitle(f"cap_ against the memory bound, bfloat16, {where}; band: quartiles")
    figure.savefig(path, dpi=140)
    plot.close(figure)


def draw_calibration(profile: CapProfile, path: Path) -> None:
    """The evidence for a profile: separation and geometry by layer, floors, the persona space, the roles' loadings.

    Parameters
    ----------
    profile
        one that ``axiscap calibrate`` made.
    path
        the picture, its kind by its suffix.

    Raises
    ------
    ValueError
        the profile's provenance has no evidence that can be read.
    """
    facts = profile.evidence
    if facts is None:
        raise ValueError("the profile has no evidence to draw; it was not made by this version's calibration")
    plot = pyplot()
    figure, ((separation, geometry, floors), (space, scree, loadings)) = plot.subplots(
        2, 3, figsize=(16, 9.5), layout="constrained"
    )
    depth, best = range(len(facts.auc)), facts.best_layer
    low, high = facts.auc_interval
    shades = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")

    def band(panel: Any) -> None:
        panel.axvspan(profile.layers[0] - 0.5, profile.layers[-1] + 0.5, color="#999999", alpha=0.2, label="capped")
        panel.set_xlabel("layer")
        panel.grid(alpha=0.25)

    separation.plot(depth, facts.auc, color="black", linewidth=2, label="all held-out roles")
    separation.errorbar([best], [facts.auc[best]], [[facts.auc[best] - low], [high - facts.auc[best]]],
                        color="black", capsize=4)  # fmt: skip
    for (kind, values), shade, marker in zip(facts.auc_by_kind.items(), shades * 9, "os^Dv*" * 9, strict=False):
        separation.plot(depth, values, color=shade, marker=marker, markersize=3, linewidth=1, label=kind)
    separation.plot(depth, facts.null_auc, color=FLOOR, linestyle=":", label="labels permuted")
    separation.set(title="separation from the default, held out", ylabel="AUC (0.5: none)", ylim=(0.2, 1.02))
    band(separation)
    separation.legend(fontsize=8, loc="lower left", ncols=2)

    geometry.plot(depth, [abs(x) for x in facts.pc1_cosine], color=shades[0], marker="o", markersize=3,
                  label="|cos|, first component and axis")  # fmt: skip
    geometry.plot(depth, facts.halves, color=shades[1], marker="s", markersize=3, label="cos, halves of the questions")
    geometry.plot(depth[:-1], facts.next_layer, color=shades[2], marker="^", markersize=3, label="cos, next layer")
    geometry.set(title="the axis", ylabel="cosine", ylim=(0, 1.05))
    band(geometry)
    geometry.legend(fontsize=8, loc="lower right")

    drawn = [profile.percentiles.index(p) for p in (5.0, 50.0, 95.0) if p in profile.percentiles]
    for name, shade, hatch in (("assistant", shades[0], ""), ("pooled", shades[1], "//")):
        if len(drawn) < 3 or name not in profile.tables:
            continue
        table = profile.tables[name][:, drawn].T.tolist()
        floors.fill_between(depth, table[0], table[2], color=shade, alpha=0.2, hatch=hatch, label=f"{name}: 5 to 95 %")
        floors.plot(depth, table[1], color=shade, linewidth=1)
    floors.plot(profile.layers, profile.floors[:, 0].tolist(), color="black", marker="_", label="floor")
    if profile.targets is not None:
        targets = profile.targets[:, 0].tolist()
        floors.plot(profile.layers, targets, color="black", marker="_", linestyle="--", label="target")
    floors.set(title="projections of answer means (lines: medians)", ylabel="projection")
    band(floors)
    floors.legend(fontsize=8, loc="lower left")

    for name, (x, y) in facts.map.items():
        space.plot(x, y, marker="o", color=shades[0], markersize=3)
        space.annotate(name.replace("_", " "), (x, y), fontsize=6, xytext=(2, 2), textcoords="offset points")
    space.annotate("Assistant", (1, -0.06), (0.8, -0.06), xycoords="axes fraction", va="center", fontsize=8,
                   arrowprops={"arrowstyle": "->"})  # fmt: skip
    space.set(title=f"roles on the first two components, layer {best}", xlabel="component 1 (+: Assistant)",
              ylabel="component 2")  # fmt: skip
    space.grid(alpha=0.25)

    scree.bar(range(1, len(facts.variance) + 1), facts.variance, color=shades[0])
    scree.set(title=f"variance of the role vectors, layer {best}\n{facts.components_70[best]} components hold 70 %",
              xlabel="component", ylabel="share")  # fmt: skip
    scree.grid(alpha=0.25, axis="y")

    ordered = sorted(facts.loadings.items(), key=lambda item: item[1])
    shown = ordered if len(ordered) <= 40 else ordered[:20] + ordered[-20:]
    loadings.barh([name.replace("_", " ") for name, _ in shown], [value for _, value in shown], color=shades[1])
    loadings.tick_params(axis="y", labelsize=6)
    some = "" if len(ordered) <= 40 else ", lowest and highest 20"
    loadings.set(title=f"roles along the axis{some}, layer {best}", xlabel="projection less the default's")
    loadings.grid(alpha=0.25, axis="x")
    figure.suptitle(f"The Assistant Axis of {profile.model_facts.get('id', 'a model')}: the evidence")
    figure.savefig(path, dpi=120)
    plot.close(figure)


def draw_sweep(uncapped: Any, points: Sequence[Any], chosen: Sequence[Any], path: Path) -> None:
    """Hold against the cost in the worst domain for each point of a sweep, with intervals; the frontier and the chosen
    ones marked.
    """
    from axiscap.calibrate.effects import frontier

    def cost(point: Any) -> float:
        return 100 * (float(point.cost) - 1)

    plot = pyplot()
    figure, panel = plot.subplots(figsize=(9, 6), layout="constrained")
    shades = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
    targets = sorted({(p.setting.first, p.setting.last, p.setting.target) for p in points}, key=str)
    for (first, last, target), shade, marker in zip(targets, shades * 9, "os^Dv*P" * 9, strict=False):
        mine = [p for p in points if (p.setting.first, p.setting.last, p.setting.target) == (first, last, target)]
        holds = [p.hold for p in mine]
        bars = [[p.hold - p.hold_interval[0] for p in mine], [p.hold_interval[1] - p.hold for p in mine]]
        lifted = "the floor" if target is None else f"percentile {target:g}"
        panel.errorbar([cost(p) for p in mine], holds, bars, marker=marker, color=shade, linestyle="none",
                       elinewidth=0.6, label=f"layers {first}-{last}, lifted to {lifted}")  # fmt: skip
        for p in mine:
            panel.annotate(f"p{p.setting.percentile:g}", (cost(p), p.hold), fontsize=7, xytext=(4, 4),
                           textcoords="offset points")  # fmt: skip
    best = frontier(points)
    panel.plot([cost(p) for p in best], [p.hold for p in best], color=FLOOR, linewidth=1, label="frontier")
    panel.plot([cost(p) for p in chosen], [p.hold for p in chosen], marker="o", markersize=16, fillstyle="none",
               color="black", linestyle="none", label="chosen")  # fmt: skip
    panel.axhline(uncapped.hold, color=FLOOR, linestyle=":", label="what personas take away")
    panel.set_title("How far a cap holds personas, and what it costs (bars: 95 %)")
    panel.set(xlabel="rise of the perplexity in the worst domain of ordinary answers, %", ylim=(0, None))
    panel.set_ylabel("hold (nats of log-odds given back to the Assistant)")
    panel.grid(alpha=0.25)
    panel.legend(fontsize=8)
    figure.savefig(path, dpi=130)
    plot.close(figure)
