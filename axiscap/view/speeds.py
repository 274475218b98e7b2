"""Tables of ``axiscap bench``: every measurement, and the targets beside what was reached."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

from rich.console import Console
from rich.table import Table


def targets(results: dict[str, Any]) -> list[tuple[str, str, list[str], str]]:
    """The targets for the kernels: case, target, the result at each H, and whether all results meet it."""
    cases = {(c["hidden_size"], c["rows"], c["fire"]): c for c in results["ops"] if c["dtype"] == "bfloat16"}
    sizes = [size for size in (4096, 8192) if (size, 1, 0.0) in cases]
    rows: list[tuple[str, str, list[str], str]] = []

    def add(what: str, goal: float, key: tuple[int, float], pick: Callable[[Any], dict[str, float]]) -> None:
        ratios = [pick(cases[size, *key]) for size in sizes]
        digits = 2 if goal < 2 else 1
        met = all(ratio["median"] >= goal for ratio in ratios)
        rows.append((what, f">= {goal:g}", [_text(ratio, digits) for ratio in ratios], _met(met)))

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
    """The targets for decoding a real model: case, target, share of the uncapped speed, and whether it is met."""
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
    """The targets for a capped layer: case, microseconds (calls) of each variant, two ratios, and if both are met."""
    rows = []
    for case in results["layers"]:
        times, calls, ratios = case["microseconds"], case["calls"], case["of"]
        costs = [f"{times[name]['median']:.1f} ({calls[name]:.0f})" for name in ("installed", "op", "published")]
        met = ratios["published"]["median"] <= 0.5 and ratios["op"]["median"] <= 1.2
        what = f"{case['model']}, {case['sequences']} sequence{'s' if case['sequences'] > 1 else ''}"
        rows.append((what, *costs, _text(ratios["published"]), _text(ratios["op"]), _met(met)))
    return rows


def print_tables(console: Console, results: dict[str, Any]) -> None:
    """Prints the measurements, and the targets beside the results."""
    _print_table(console, _machine_title(results["machine"]), *_cap_table(results["ops"]), justify="right")
    _print_table(console, "add_rms_norm_cap_, bfloat16", *_norm_table(results["norm"]), justify="right")
    kernels = [(case, goal, *reached, met) for case, goal, reached, met in targets(results)]
    sizes = [f"H = {size}" for size in (4096, 8192)][: len(kernels[0]) - 3]
    _print_table(console, "targets (bfloat16)", ("case", "target", *sizes, "met"), kernels)
    decoding = decode_targets(results)
    _print_table(console, "decoding, of the uncapped speed", ("case", "target", "share", "met"), decoding)
    columns = ("case", "installed", "op in a hook", "published", "of published, <= 0.5", "of op, <= 1.2", "met")
    title = "a capped layer inside decoding steps: microseconds (calls), and ratios"
    _print_table(console, title, columns, layer_targets(results))


def _machine_title(machine: dict[str, Any]) -> str:
    about = f"{machine['processor']}, torch {machine['torch']}"
    if machine["device"] == "cpu":
        about += f", {machine['isa']}, {machine['threads']} threads"
    return f"cap_ on {about}; ratios: median (quartiles) over paired rounds"


def _cap_table(cases: Sequence[dict[str, Any]]) -> tuple[Sequence[str], list[tuple[str, ...]]]:
    rows = [
        (
            case["dtype"],
            *_size_and_time(case),
            _text(case["of_memory_bound"]),
            *(_text(case["speedup"][name], 1) for name in ("eager", "compile", "published")),
        )
        for case in cases
    ]
    return ("dtype", "H", "rows", "fire", "us", "of memory bound", "x eager", "x compile", "x published hook"), rows


def _norm_table(cases: Sequence[dict[str, Any]]) -> tuple[Sequence[str], list[tuple[str, ...]]]:
    rows = [
        (*_size_and_time(case), *(_text(case["speedup"][name]) for name in ("uncapped", "torch"))) for case in cases
    ]
    return ("H", "rows", "fire", "us", "x uncapped", "x torch"), rows


def _size_and_time(case: dict[str, Any]) -> tuple[str, str, str, str]:
    time = f"{case['microseconds']['axiscap']['median']:.2f}"
    return str(case["hidden_size"]), str(case["rows"]), f"{case['fire']:.0%}", time


def _print_table(
    console: Console,
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    justify: Literal["left", "right"] = "left",
) -> None:
    if not rows:
        return
    table = Table()
    for column in columns:
        table.add_column(column, justify=justify, no_wrap=justify == "right")
    for row in rows:
        table.add_row(*row)
    console.print(f"\n[bold]{title}[/bold]")
    console.print(table)


def _text(ratio: dict[str, float], digits: int = 2) -> str:
    return f"{ratio['median']:.{digits}f} ({ratio['p25']:.{digits}f}-{ratio['p75']:.{digits}f})"


def _met(met: bool) -> str:
    return "yes" if met else "no"
