"""Pictures, by matplotlib (the extra ``axiscap[report]``)."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from axiscap.compare import Comparison
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

    Args:
        comparisons: the conversations.
        profile: the one in force.
        layer_index: which of the profile's layers is drawn.
        path: the picture, its kind by its suffix.
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

    Args:
        results: what ``axiscap bench`` writes as JSON.
        path: the picture, its kind by its suffix.
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
    figure.suptitle(
        f"cap_ against the memory bound, bfloat16, {where}; band: quartiles"
    )
    figure.savefig(path, dpi=140)
    plot.close(figure)
