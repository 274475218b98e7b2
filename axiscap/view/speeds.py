"""Tables of ``axiscap bench``: every measurement, and the targets beside what was reached."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table


def _text(ratio: dict[str, float], digits: int = 2) -> str:
    return f"{ratio['median']:.{digits}f} ({ratio['p25']:.{digits}f}-{ratio['p75']:.{digits}f})"


def targets(results: dict[str, Any]) -> list[tuple[str, str, list[str], str]]:
    """The kernels' targets: what, target, the result at each H, and whether every one of them is met."""
    cases = {(c["hidden_size"], c["rows"], c["fire"]): c for c in results["ops"] if c["dtype"] == "bfloat16"}
    sizes = [size for size in (4096, 8192) if (size, 1, 0.0) in cases]
    rows: list[tuple[str, str, list[str], str]] = []

    def add(what: str, goal: float, key: tuple[int, float], pick: Callable[[Any], dict[str, float]]) -> None:
        found = [pick(cases[size, *key]) for size in sizes]
        digits = 2 if goal < 2 else 1
        met = all(value["median"] >= goal for value in found)
        rows.append((what, f">= {goal:g}", [_text(value, digits) for value in found], _met(met)))

    if results["machine"]["device"] != "cpu":
        add("4096 rows, none fire: of copy bandwidth", 0.9, (4096, 0.0), lambda c: c["of_memory_bound"])
        add("4096 rows, all fire: of copy bandwidth", 0.9, (4096, 1.0), lambda c: c["of_memory_bound"])
        cases = {(c["hidden_size"], c["rows"], c["fire"]): c for c in results["norm"]}
        add("4096 rows: of the norm's speed without a cap", 0.97, (4096, 0.0), lambda c: c["speedup"]["uncapped"])
        return rows
    add("4096 rows, none fire: of the read-only bound", 0.85, (4096, 0.0), lambda c: c["of_memory_bound"])
    add("4096 rows, all fire: of the read-modify-write bound", 0.75, (4096, 1.0), lambda c: c["of_memory_bound"])
    for name, title, goals in (
        ("published", "times the published hook's speed", (40, 12, 6)),
        ("compile", "times torch.compile's speed", (15, 4, 2.5)),
    ):
        keys = (((1, 0.0), "1 row"), ((4096, 0.0), "4096 rows, none fire"), ((4096, 1.0), "4096 rows, all fire"))
        for (key, label), goal in zip(keys, goals, strict=True):
            add(f"{label}: {title}", goal, key, lambda c, name=name: c["speedup"][name])  # type: ignore[misc]
    overhead = [cases[size, 1, 0.0]["overhead_us"] for size in sizes]
    met = all(value["median"] < 2 for value in overhead)
    rows.append(("1 row: microseconds above the memory time", "< 2", [_text(value) for value in overhead], _met(met)))
    return rows


def decode_targets(results: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    """The same for decoding a real model: what, target, share of the uncapped speed, and whether it is met."""
    decode = results["decode"]
    if not decode:
        return []
    rows = []
    for label, fire in decode["fire"].items():
        what = f"{decode['model']}, {decode['layers']} layers, {label} fire"
        rows.append((f"{what}: axiscap", "> 0.99", _text(fire["capped"], 3), _met(fire["capped"]["median"] > 0.99)))
        rows.append((f"{what}: the published hook", "", _text(fire["published"], 3), ""))
    return rows


def layer_targets(results: dict[str, Any]) -> list[tuple[str, ...]]:
    """A capped layer inside decoding steps: what, microseconds (calls) of each, two ratios, and if both are met."""
    rows = []
    for case in results["layers"]:
        times, calls, of = case["microseconds"], case["calls"], case["of"]
        costs = [f"{times[name]['median']:.1f} ({calls[name]:.0f})" for name in ("installed", "op", "published")]
        met = of["published"]["median"] <= 0.5 and of["op"]["median"] <= 1.2
        what = f"{case['model']}, {case['sequences']} sequence{'s' if case['sequences'] > 1 else ''}"
        rows.append((what, *costs, _text(of["published"]), _text(of["op"]), _met(met)))
    return rows


def _met(met: bool) -> str:
    return "yes" if met else "no"


def print_tables(console: Console, results: dict[str, Any]) -> None:
    """The full table, and the targets beside what was reached."""
    machine = results["machine"]
    about = f"{machine['processor']}, torch {machine['torch']}"
    if machine["device"] == "cpu":
        about += f", {machine['isa']}, {machine['threads']} threads"
    console.print(f"\n[bold]cap_ on {about}; ratios: median (quartiles) over paired rounds[/bold]")
    table = Table()
    for name in ("dtype", "H", "rows", "fire", "us", "of memory bound", "x eager", "x compile", "x published hook"):
        table.add_column(name, justify="right", no_wrap=True)
    for case in results["ops"]:
        table.add_row(
            case["dtype"],
            str(case["hidden_size"]),
            str(case["rows"]),
            f"{case['fire']:.0%}",
            f"{case['microseconds']['axiscap']['median']:.2f}",
            _text(case["of_memory_bound"]),
            *(_text(case["speedup"][name], 1) for name in ("eager", "compile", "published")),
        )
    console.print(table)

    console.print("\n[bold]add_rms_norm_cap_, bfloat16[/bold]")
    norms = Table()
    for name in ("H", "rows", "fire", "us", "x uncapped", "x torch"):
        norms.add_column(name, justify="right", no_wrap=True)
    for case in results["norm"]:
        norms.add_row(
            str(case["hidden_size"]),
            str(case["rows"]),
            f"{case['fire']:.0%}",
            f"{case['microseconds']['axiscap']['median']:.2f}",
            *(_text(case["speedup"][name]) for name in ("uncapped", "torch")),
        )
    console.print(norms)

    kernels = [(what, goal, *reached, met) for what, goal, reached, met in targets(results)]
    sizes = [f"H = {size}" for size in (4096, 8192)][: len(kernels[0]) - 3]
    _print_table(console, "targets (bfloat16)", ("case", "target", *sizes, "met"), kernels)
    decoding = decode_targets(results)
    _print_table(console, "decoding, of the uncapped speed", ("case", "target", "share", "met"), decoding)
    columns = ("case", "installed", "op in a hook", "published", "of published, <= 0.5", "of op, <= 1.2", "met")
    title = "a capped layer inside decoding steps: microseconds (calls), and ratios"
    _print_table(console, title, columns, layer_targets(results))


def _print_table(console: Console, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    if not rows:
        return
    table = Table(*columns)
    for row in rows:
        table.add_row(*row)
    console.print(f"\n[bold]{title}[/bold]")
    console.print(table)
