"""Benchmarks: cap_ beside what people use instead, and beside the memory bound, paired within one run.

Every round times all contenders one after the other on the same restored input; a ratio is taken within a round, and
its median and quartiles over the rounds are reported, so that a machine's slow minutes hit both sides.
"""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

import axiscap
from axiscap import _C, models
from axiscap.profile import CapProfile

HIDDEN_SIZES = (576, 2048, 4096, 5120, 8192)
ROWS = (1, 8, 64, 512, 4096)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SHARES = (0.0, 0.1, 1.0)

#: Inputs of at least this many bytes are measured from memory, over this many bytes of copies.
LARGE, BEYOND_CACHES = 16 << 20, 128 << 20

Contender = Callable[[Tensor], Any]


def eager(hidden: Tensor, axis: Tensor, floor: Tensor) -> Tensor:
    """Equation 1 as one writes it in torch, accumulating in float32."""
    x = hidden.float()
    return (x - torch.clamp(x @ axis - floor, max=0)[:, None] * axis).to(hidden.dtype)


def published(hidden: Tensor, vector: Tensor, cap: Tensor) -> Tensor:
    """The sequence of the published hook, by its description: in the model's dtype, a ceiling on the negated axis."""
    v = vector.to(hidden.dtype)
    v = v / v.norm()
    excess = (torch.einsum("nh,h->n", hidden, v) - cap).clamp(min=0)
    return hidden - torch.outer(excess, v)


@dataclass
class Case:
    """One input: `copies` equal tensors (rows, H), so that a short call is timed over many fresh ones."""

    hidden_size: int
    rows: int
    dtype: str
    fire: float

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.hidden_size + self.rows)
        self.axis = torch.nn.functional.normalize(torch.randn(self.hidden_size, generator=generator), dim=0)
        self.axes = self.axis[None, None].contiguous()
        self.floors = torch.zeros(1, 1)
        self.floor = self.floors[0, 0]
        self.bank = _C.Bank(self.axes, self.floors)
        rows = torch.randn(self.rows, self.hidden_size, generator=generator)
        # Put every row one unit below the floor or one above it, mixed.
        fires = torch.randperm(self.rows, generator=generator) < round(self.fire * self.rows)
        wanted = torch.where(fires, -1.0, 1.0)
        rows += (wanted - rows @ self.axis)[:, None] * self.axis
        self.pristine = rows.to(DTYPES[self.dtype])
        self.large = self.pristine.nbytes >= LARGE
        # Few rows: about a megabyte of copies, long enough for the clock, inside the second-level cache like those of a
        # decoding step. Many rows: more than the caches hold, so that all of them come from memory.
        total = BEYOND_CACHES if self.large else 1 << 20
        self.copies = [self.pristine.clone() for _ in range(max(1, min(256, -(-total // self.pristine.nbytes))))]

    def restore(self) -> None:
        for copy in self.copies:
            copy.copy_(self.pristine)

    def seconds(self, contender: Contender) -> float:
        """Seconds a call."""
        begin = time.perf_counter()
        for copy in self.copies:
            contender(copy)
        return (time.perf_counter() - begin) / len(self.copies)

    def contenders(self) -> dict[str, Contender]:
        compiled = _compiled()
        vector, ceiling = -self.axis, -self.floor
        return {
            "axiscap": self.bank.cap_,
            "bound": _C.read_pass if self.fire == 0 else _C.read_modify_write_pass,
            "eager": lambda h: eager(h, self.axis, self.floor),
            "compile": lambda h: compiled(h, self.axis, self.floor),
            "published": lambda h: published(h, vector, ceiling),
        }


_compiled_eager: Callable[..., Tensor] | None = None


def _compiled() -> Callable[..., Tensor]:
    global _compiled_eager
    if _compiled_eager is None:
        # Shapes and dtypes each may need a compilation of their own; the default limit would fall back to eager.
        torch._dynamo.config.recompile_limit = 256
        _compiled_eager = torch.compile(eager)
    return _compiled_eager


def spread(values: Iterable[float]) -> dict[str, float]:
    """Median and quartiles."""
    ordered = sorted(values)
    low, middle, high = statistics.quantiles(ordered, n=4) if len(ordered) > 1 else ordered * 3
    return {"median": middle, "p25": low, "p75": high}


def measure_case(case: Case, rounds: int) -> dict[str, Any]:
    """Times the contenders of a case in turn and takes the ratios within each round."""
    contenders = case.contenders()
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for round_ in range(rounds + 2):
        for name, contender in contenders.items():
            case.restore()
            seconds = case.seconds(contender)
            if round_ >= 2:  # the first two warm up
                times[name].append(seconds)
    ours = times["axiscap"]

    def ratio(name: str) -> dict[str, float]:
        return spread(other / own for other, own in zip(times[name], ours, strict=True))

    return {
        "hidden_size": case.hidden_size,
        "rows": case.rows,
        "dtype": case.dtype,
        "fire": case.fire,
        "microseconds": {name: spread(value * 1e6 for value in values) for name, values in times.items()},
        "overhead_us": spread((own - bound) * 1e6 for own, bound in zip(ours, times["bound"], strict=True)),
        "of_memory_bound": ratio("bound"),
        "speedup": {name: ratio(name) for name in ("eager", "compile", "published")},
    }


def measure(progress: Progress, *, quick: bool = False, model: str | None = None) -> dict[str, Any]:
    """The whole benchmark.

    Args:
        progress: where its bar is drawn.
        quick: one size and dtype, few repetitions; for looking, not for reporting.
        model: also time the decoding of this model.
    """
    sizes, dtypes = ((4096,), ("bfloat16",)) if quick else (HIDDEN_SIZES, tuple(DTYPES))
    grid = [(h, n, d, s) for d in dtypes for h in sizes for n in ROWS for s in SHARES]
    task = progress.add_task("kernels", total=len(grid))
    results = []
    for hidden_size, rows, dtype, share in grid:
        case = Case(hidden_size, rows, dtype, share)
        rounds = 5 if quick else (15 if case.large else 25)
        results.append(measure_case(case, rounds))
        progress.advance(task)
    machine = {
        "processor": _processor(),
        "isa": _C.isa(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "axiscap": axiscap.__version__,
    }
    return {"machine": machine, "ops": results, "decode": measure_decode(progress, model, quick) if model else None}


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


class _Alternate:
    """A logits processor that times each decoding step and changes the variant between steps."""

    def __init__(self, enter: Sequence[Callable[[], Callable[[], None]]]) -> None:
        self.enter = enter
        self.steps: list[list[float]] = [[] for _ in enter]
        self.count = -1
        self.leave: Callable[[], None] = lambda: None
        self.begin = 0.0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        now = time.perf_counter()
        if self.count >= 0:  # the call before the first is the prompt's
            self.steps[self.count % len(self.enter)].append(now - self.begin)
        self.leave()
        self.count += 1
        self.leave = self.enter[self.count % len(self.enter)]()
        self.begin = time.perf_counter()
        return scores


def measure_decode(progress: Progress, name: str, quick: bool) -> dict[str, Any]:
    """Decoding steps of a real model at batch 1, variant by turns token by token: plain, capped, published hooks.

    The floors are such that no row and, in a second run, every row fires.
    """
    model, tokenizer = models.load(name)
    layers = models.decoder_layers(model)
    count = min(8, len(layers))
    first = (len(layers) - count) * 3 // 4
    chosen = list(range(first, first + count))
    size = models.text_config(model).hidden_size
    generator = torch.Generator().manual_seed(0)
    axes = torch.nn.functional.normalize(torch.randn(count, 1, size, generator=generator), dim=-1)
    inputs = tokenizer("The history of the sea is long, and", return_tensors="pt")
    steps = 30 if quick else 360
    result: dict[str, Any] = {"model": name, "layers": count, "steps": steps, "fire": {}}
    for label, floor in (("none", -1e4), ("all", 1e2)):
        profile = CapProfile(chosen, axes, torch.full((count, 1), floor))

        def plain() -> Callable[[], None]:
            return lambda: None

        def capped(profile: CapProfile = profile) -> Callable[[], None]:
            return axiscap.install(model, profile).remove

        def hooked(profile: CapProfile = profile) -> Callable[[], None]:
            handles = [
                layers[layer].register_forward_hook(_published_hook(-profile.axes[i, 0], -profile.floors[i, 0]))
                for i, layer in enumerate(chosen)
            ]

            def unhook() -> None:
                for handle in handles:
                    handle.remove()

            return unhook

        probe = _Alternate([plain, capped, hooked])
        task = progress.add_task(f"decoding, {label} fire", total=1)
        with torch.inference_mode():
            model.generate(
                **inputs,
                do_sample=False,
                max_new_tokens=steps + 1,
                min_new_tokens=steps + 1,
                logits_processor=[probe],
                pad_token_id=tokenizer.pad_token_id,
            )
        probe.leave()
        progress.advance(task)
        base, ours, theirs = probe.steps
        result["fire"][label] = {
            "uncapped_tokens_per_second": 1 / statistics.median(base),
            "capped": spread(b / o for b, o in zip(base, ours, strict=False)),
            "published": spread(b / t for b, t in zip(base, theirs, strict=False)),
        }
    return result


def _published_hook(vector: Tensor, cap: Tensor) -> Callable[..., Any]:
    def hook(module: Any, args: Any, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        capped = published(hidden.reshape(-1, hidden.shape[-1]), vector, cap).reshape(hidden.shape)
        return (capped, *output[1:]) if isinstance(output, tuple) else capped

    return hook


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


def _met(met: bool) -> str:
    return "yes" if met else "no"


def print_tables(console: Console, results: dict[str, Any]) -> None:
    """The full table, and the targets beside what was reached."""
    machine = results["machine"]
    about = f"{machine['processor']}, {machine['isa']}, {machine['threads']} threads, torch {machine['torch']}"
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

    console.print("\n[bold]targets (bfloat16)[/bold]")
    goals = Table()
    columns = targets(results)
    sizes = [f"H = {size}" for size in (4096, 8192)][: len(columns[0][2])]
    for name in ("case", "target", *sizes, "met"):
        goals.add_column(name)
    for what, goal, found, met in columns:
        goals.add_row(what, goal, *found, met)
    console.print(goals)

    decoding = decode_targets(results)
    if decoding:
        console.print("\n[bold]decoding, of the uncapped speed[/bold]")
        shares = Table()
        for name in ("case", "target", "share", "met"):
            shares.add_column(name)
        for row in decoding:
            shares.add_row(*row)
        console.print(shares)
