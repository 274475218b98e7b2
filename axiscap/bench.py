"""Benchmarks: cap_ beside what people use instead, and beside the memory bound, paired within one run.

Every round times all contenders one after the other on the same restored input; a ratio is taken within a round, and
its median and quartiles over the rounds are reported, so that a machine's slow minutes hit both sides. On a GPU a
contender's calls are captured in one CUDA graph, so that its kernels are timed and not their launches.
"""

from __future__ import annotations

import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor

import axiscap
from axiscap import _C, models, ops
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
    device: str = "cpu"

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.hidden_size + self.rows)
        axis = torch.nn.functional.normalize(torch.randn(self.hidden_size, generator=generator), dim=0)
        rows = torch.randn(self.rows, self.hidden_size, generator=generator)
        # Put every row one unit below the floor or one above it, mixed.
        fires = torch.randperm(self.rows, generator=generator) < round(self.fire * self.rows)
        wanted = torch.where(fires, -1.0, 1.0)
        rows += (wanted - rows @ axis)[:, None] * axis
        self.axis = axis.to(self.device)
        self.axes = self.axis[None, None].contiguous()
        self.floors = torch.zeros(1, 1, device=self.device)
        self.floor = self.floors[0, 0]
        self.bank = _C.Bank(self.axes, self.floors)
        self.pristine = self.input(rows.to(self.device, DTYPES[self.dtype]))
        self.large = self.pristine.nbytes >= LARGE
        # Few rows: about a megabyte of copies, long enough for the clock, inside the second-level cache like those of a
        # decoding step. Many rows: more than the caches hold, so that all of them come from memory.
        total = BEYOND_CACHES if self.large else 1 << 20
        self.copies = [self.pristine.clone() for _ in range(max(1, min(256, -(-total // self.pristine.nbytes))))]

    def input(self, rows: Tensor) -> Tensor:
        """What a contender is given."""
        return rows

    def restore(self) -> None:
        for copy in self.copies:
            copy.copy_(self.pristine)
        if self.device == "cuda":
            torch.cuda.synchronize()

    def over_all_copies(self, contender: Contender) -> Callable[[], None]:
        """Calls it on every copy, and returns when that is done."""

        def run() -> None:
            for copy in self.copies:
                contender(copy)

        if self.device == "cpu":
            return run
        run()  # what is compiled or allocated at the first call would not be captured
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()

        def replay() -> None:
            graph.replay()
            torch.cuda.synchronize()

        return replay

    def seconds(self, run: Callable[[], None]) -> float:
        """Seconds a call of what ``over_all_copies`` gave."""
        begin = time.perf_counter()
        run()
        return (time.perf_counter() - begin) / len(self.copies)

    def bound(self) -> tuple[Contender, float]:
        """The fastest pass over the same bytes, and the bytes that cap_ moves over those that it does.

        On a CPU the pass reads them, or reads and writes them back; on a GPU it copies them.
        """
        if self.device == "cpu":
            return (_C.read_pass if self.fire == 0 else _C.read_modify_write_pass), 1.0
        scratch = torch.empty_like(self.pristine)
        return scratch.copy_, (1 + self.fire) / 2

    def contenders(self) -> dict[str, Contender]:
        compiled = _compiled()
        vector, ceiling = -self.axis, -self.floor
        return {
            "axiscap": self.bank.cap_,
            "eager": lambda h: eager(h, self.axis, self.floor),
            "compile": lambda h: compiled(h, self.axis, self.floor),
            "published": lambda h: published(h, vector, ceiling),
        }


class NormCase(Case):
    """The same rows as both streams of ``add_rms_norm_cap_``: with the cap, with no row capped, and by torch."""

    def input(self, rows: Tensor) -> Tensor:
        return torch.stack((rows, rows / 2))

    def contenders(self) -> dict[str, Contender]:
        weight = torch.ones(self.hidden_size, dtype=DTYPES[self.dtype], device=self.device)
        nobody = torch.full((self.rows,), -1, dtype=torch.int32, device=self.device)

        def norm(streams: Tensor, slots: Tensor | None = None) -> None:
            hidden, residual = streams
            _C.add_rms_norm_cap_(hidden, residual, weight, 1e-6, self.axes, self.floors, slots)

        def by_torch(streams: Tensor) -> Tensor:
            hidden, residual = streams
            residual += hidden
            return torch.nn.functional.rms_norm(residual, weight.shape, weight, 1e-6)

        return {"axiscap": norm, "uncapped": lambda streams: norm(streams, nobody), "torch": by_torch}


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
    if not isinstance(case, NormCase):
        contenders["bound"], traffic = case.bound()
    runs = {name: case.over_all_copies(contender) for name, contender in contenders.items()}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for round_ in range(rounds + 2):
        for name, run in runs.items():
            case.restore()
            seconds = case.seconds(run)
            if round_ >= 2:  # the first two warm up
                times[name].append(seconds)
    ours = times.pop("axiscap")
    bound = times.pop("bound", None)
    result: dict[str, Any] = {
        "hidden_size": case.hidden_size,
        "rows": case.rows,
        "dtype": case.dtype,
        "fire": case.fire,
        "microseconds": {name: spread(t * 1e6 for t in found) for name, found in (("axiscap", ours), *times.items())},
        "speedup": {
            name: spread(other / own for other, own in zip(found, ours, strict=True)) for name, found in times.items()
        },
    }
    if bound:
        pairs = list(zip(ours, bound, strict=True))
        result["microseconds"]["bound"] = spread(seconds * 1e6 for seconds in bound)
        result["overhead_us"] = spread((own - least * traffic) * 1e6 for own, least in pairs)
        result["of_memory_bound"] = spread(least * traffic / own for own, least in pairs)
    return result


def measure(
    progress: Progress, *, quick: bool = False, model: str | None = None, device: str = "cpu"
) -> dict[str, Any]:
    """The whole benchmark.

    Parameters
    ----------
    progress
        where its bar is drawn.
    device
        ``cpu`` or ``cuda``.
    quick
        one size and dtype, few repetitions; for looking, not for reporting.
    model
        also time the decoding of this model, and its capped layers inside the steps.
    """
    sizes, dtypes = ((4096,), ("bfloat16",)) if quick else (HIDDEN_SIZES, tuple(DTYPES))
    grid = [(h, n, d, s) for d in dtypes for h in sizes for n in ROWS for s in SHARES]
    norms = [(h, n, "bfloat16", s) for h in sizes for n in ROWS for s in (0.0, 1.0)]
    task = progress.add_task("kernels", total=len(grid) + len(norms))
    results: dict[type[Case], list[dict[str, Any]]] = {Case: [], NormCase: []}
    for kind, entries in ((Case, grid), (NormCase, norms)):
        for entry in entries:
            case = kind(*entry, device)
            results[kind].append(measure_case(case, 5 if quick else (15 if case.large else 25)))
            progress.advance(task)
    machine = {
        "device": device,
        "processor": _processor() if device == "cpu" else torch.cuda.get_device_name(),
        "isa": _C.isa(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "axiscap": axiscap.__version__,
    }
    decode, layers = None, []
    if model:
        loaded = models.load(model)
        decode = measure_decode(progress, Path(model).name, *loaded, quick)
        layers = [measure_layer(progress, Path(model).name, *loaded, sequences) for sequences in (1, 8)]
    return {"machine": machine, "ops": results[Case], "norm": results[NormCase], "decode": decode, "layers": layers}


def check_cuda() -> None:
    """Raises a RuntimeError that says what is missing for a benchmark on a GPU."""
    if _C.accelerator() is None:
        raise RuntimeError("this build has no CUDA kernels: build it where nvcc is found (PATH or CUDA_HOME)")
    if not torch.cuda.is_available():
        why = "torch is a CPU build" if torch.version.cuda is None else "there is no device or driver"
        raise RuntimeError(f"no GPU to measure: {why}")


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


def measure_decode(progress: Progress, name: str, model: Any, tokenizer: Any, quick: bool) -> dict[str, Any]:
    """Decoding steps of a real model at batch 1, variant by turns token by token: plain, capped, published hooks.

    The floors are such that no row and, in a second run, every row fires.
    """
    layers = models.decoder_layers(model)
    chosen, axes = _random_axes(model, layers)
    count = len(chosen)
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


def _random_axes(model: Any, layers: Sequence[Any]) -> tuple[list[int], Tensor]:
    """Eight middle-to-late layers, and a direction for each: (layers, 1, H)."""
    count = min(8, len(layers))
    first = (len(layers) - count) * 3 // 4
    size = models.text_config(model).hidden_size
    generator = torch.Generator().manual_seed(0)
    axes = torch.nn.functional.normalize(torch.randn(count, 1, size, generator=generator), dim=-1)
    return list(range(first, first + count)), axes


class _LayerClock:
    """Times the hook between two hooks of a layer, or counts the calls of Python and of C that it makes."""

    def __init__(self) -> None:
        self.nanoseconds: list[int] = []
        self.calls: list[int] = []
        self.counts = False
        self._begin = self._count = 0

    def _count_call(self, frame: Any, event: str, argument: Any) -> None:
        self._count += event in ("call", "c_call")

    def start(self, *_: Any) -> None:
        self._count = 0
        if self.counts:
            sys.setprofile(self._count_call)
        self._begin = time.perf_counter_ns()

    def stop(self, *_: Any) -> None:
        elapsed = time.perf_counter_ns() - self._begin
        sys.setprofile(None)
        if self.counts:
            self.calls.append(self._count - 2)  # of this function, and of setprofile
        else:
            self.nanoseconds.append(elapsed)


def measure_layer(
    progress: Progress, name: str, model: Any, tokenizer: Any, sequences: int, rounds: int = 15
) -> dict[str, Any]:
    """The time of a capped layer inside the decoding steps of a real model, where its memory is out of the caches.

    One thread. What ``axiscap.install`` puts there, ``ops.cap_`` alone in a hook, and the published hook, by turns; no
    row fires. A round's value is the median over ten steps and all capped layers.
    """
    layers = models.decoder_layers(model)
    chosen, axes = _random_axes(model, layers)
    floors = torch.full((len(chosen), 1), -1e4)
    clock = _LayerClock()

    def op(i: int) -> Callable[..., None]:
        axis, floor = axes[i : i + 1], floors[i : i + 1]

        def hook(module: Any, args: Any, output: Any) -> None:
            ops.cap_(output[0] if isinstance(output, tuple) else output, axis, floor)

        return hook

    def hook_all(make: Callable[[int], Callable[..., Any]]) -> list[Callable[[], None]]:
        return [layers[layer].register_forward_hook(make(i)).remove for i, layer in enumerate(chosen)]

    variants: dict[str, Callable[[], list[Callable[[], None]]]] = {
        "installed": lambda: [axiscap.install(model, CapProfile(chosen, axes, floors)).remove],
        "op": lambda: hook_all(op),
        "published": lambda: hook_all(lambda i: _published_hook(-axes[i, 0], -floors[i, 0])),
    }
    inputs = tokenizer(["The history of the sea is long, and"] * sequences, return_tensors="pt")

    def decode(variant: str, steps: int) -> None:
        undo = hook_all(lambda i: clock.start)
        undo += variants[variant]()
        undo += hook_all(lambda i: clock.stop)
        count = steps + 3  # the prompt, and two steps to warm up
        with torch.inference_mode():
            model.generate(
                **inputs,
                do_sample=False,
                max_new_tokens=count,
                min_new_tokens=count,
                pad_token_id=tokenizer.pad_token_id,
            )
        for call in undo:
            call()
        for measured in (clock.nanoseconds, clock.calls):
            del measured[: -steps * len(chosen)]

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    times: dict[str, list[float]] = {variant: [] for variant in variants}
    calls = {}
    task = progress.add_task(f"a capped layer, {sequences} sequences", total=rounds)
    try:
        for _ in range(rounds):
            for variant, medians in times.items():
                decode(variant, 10)
                medians.append(statistics.median(clock.nanoseconds) / 1e3)
            progress.advance(task)
        clock.counts = True
        for variant in variants:
            decode(variant, 2)
            calls[variant] = statistics.median(clock.calls)
    finally:
        torch.set_num_threads(threads)
    installed = times["installed"]
    return {
        "model": name,
        "layers": len(chosen),
        "sequences": sequences,
        "microseconds": {variant: spread(medians) for variant, medians in times.items()},
        "calls": calls,
        "of": {
            other: spread(own / theirs for own, theirs in zip(installed, times[other], strict=True))
            for other in ("op", "published")
        },
    }


def _published_hook(vector: Tensor, cap: Tensor) -> Callable[..., Any]:
    def hook(module: Any, args: Any, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        capped = published(hidden.reshape(-1, hidden.shape[-1]), vector, cap).reshape(hidden.shape)
        return (capped, *output[1:]) if isinstance(output, tuple) else capped

    return hook
