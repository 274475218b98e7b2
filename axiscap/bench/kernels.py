"""The kernels beside what people use instead, and beside the memory bound, paired within one run.

Every round times all contenders one after the other on the same restored input. A ratio is taken within a round, so
that a slow minute of the machine hits both sides; the results are medians and quartiles over rounds. On a GPU the
calls of a contender are captured in one CUDA graph, so that the clock sees its kernels and not their launches.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from axiscap import _C

HIDDEN_SIZES = (576, 2048, 4096, 5120, 8192)
ROWS = (1, 8, 64, 512, 4096)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SHARES = (0.0, 0.1, 1.0)

#: An input of at least LARGE bytes is measured from memory: its copies have BEYOND_CACHES bytes together.
LARGE, BEYOND_CACHES = 16 << 20, 128 << 20
#: The bytes of the copies of a smaller input, which stay in the second-level cache like those of a decoding step.
_SMALL_TOTAL, _MAX_COPIES = 1 << 20, 256
#: The first rounds compile and allocate, and are not counted.
_WARM_UP = 2

Contender = Callable[[Tensor], Any]


def eager(hidden: Tensor, axis: Tensor, floor: Tensor) -> Tensor:
    """Equation 1 in plain torch, accumulated in float32."""
    x = hidden.float()
    return (x - torch.clamp(x @ axis - floor, max=0)[:, None] * axis).to(hidden.dtype)


def published(hidden: Tensor, vector: Tensor, cap: Tensor) -> Tensor:
    """The published hook, as the paper describes it: in the model's dtype, with a ceiling on the negated axis."""
    v = vector.to(hidden.dtype)
    v = v / v.norm()
    excess = (torch.einsum("nh,h->n", hidden, v) - cap).clamp(min=0)
    return hidden - torch.outer(excess, v)


@dataclass
class Case:
    """One input of shape (rows, H). It has many equal copies, so that a short call is timed over fresh ones.

    ``fire`` is the share of rows that lie below the floor.
    """

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
        projections = torch.where(fires, -1.0, 1.0)
        rows += (projections - rows @ axis)[:, None] * axis
        self.axis = axis.to(self.device)
        self.axes = self.axis[None, None].contiguous()
        self.floors = torch.zeros(1, 1, device=self.device)
        self.floor = self.floors[0, 0]
        self.bank = _C.Bank(self.axes, self.floors)
        self.pristine = self.input(rows.to(self.device, DTYPES[self.dtype]))
        self.large = self.pristine.nbytes >= LARGE
        total = BEYOND_CACHES if self.large else _SMALL_TOTAL
        count = max(1, min(_MAX_COPIES, -(-total // self.pristine.nbytes)))
        self.copies = [self.pristine.clone() for _ in range(count)]

    def input(self, rows: Tensor) -> Tensor:
        """The argument of a contender."""
        return rows

    def restore(self) -> None:
        for copy in self.copies:
            copy.copy_(self.pristine)
        if self.device == "cuda":
            torch.cuda.synchronize()

    def over_all_copies(self, contender: Contender) -> Callable[[], None]:
        """A function that calls the contender on every copy and returns when all calls are done."""

        def run() -> None:
            for copy in self.copies:
                contender(copy)

        if self.device == "cpu":
            return run
        run()  # a graph cannot capture compilations and allocations, which happen at the first call
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()

        def replay() -> None:
            graph.replay()
            torch.cuda.synchronize()

        return replay

    def seconds(self, run: Callable[[], None]) -> float:
        """The seconds of one call, of a function from :meth:`over_all_copies`."""
        begin = time.perf_counter()
        run()
        return (time.perf_counter() - begin) / len(self.copies)

    def bound(self) -> tuple[Contender, float]:
        """The fastest pass over the same bytes, and the bytes that ``cap_`` moves as a share of the bytes of the pass.

        On a CPU the pass reads the bytes, or reads them and writes them back. On a GPU it copies them.
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
    """The same rows as both streams of ``add_rms_norm_cap_``: with the cap, with slots of -1, and in torch."""

    def input(self, rows: Tensor) -> Tensor:
        return torch.stack((rows, rows / 2))

    def contenders(self) -> dict[str, Contender]:
        weight = torch.ones(self.hidden_size, dtype=DTYPES[self.dtype], device=self.device)
        no_slots = torch.full((self.rows,), -1, dtype=torch.int32, device=self.device)

        def norm(streams: Tensor, slots: Tensor | None = None) -> None:
            hidden, residual = streams
            _C.add_rms_norm_cap_(hidden, residual, weight, 1e-6, self.axes, self.floors, slots)

        def torch_norm(streams: Tensor) -> Tensor:
            hidden, residual = streams
            residual += hidden
            return torch.nn.functional.rms_norm(residual, weight.shape, weight, 1e-6)

        return {"axiscap": norm, "uncapped": lambda streams: norm(streams, no_slots), "torch": torch_norm}


_compiled_eager: Callable[..., Tensor] | None = None


def _compiled() -> Callable[..., Tensor]:
    global _compiled_eager
    if _compiled_eager is None:
        # Each shape and dtype can need its own compilation; the default limit would fall back to eager.
        torch._dynamo.config.recompile_limit = 256
        _compiled_eager = torch.compile(eager)
    return _compiled_eager


def measure_case(case: Case, rounds: int) -> dict[str, Any]:
    """Times the contenders of a case in turn, and takes the ratios within each round."""
    contenders, traffic = case.contenders(), 1.0
    if not isinstance(case, NormCase):
        contenders["bound"], traffic = case.bound()
    times = _time_in_turn(case, contenders, rounds)
    own, bound = times.pop("axiscap"), times.pop("bound", None)
    result: dict[str, Any] = {
        "hidden_size": case.hidden_size,
        "rows": case.rows,
        "dtype": case.dtype,
        "fire": case.fire,
        "microseconds": {name: _microseconds(seconds) for name, seconds in (("axiscap", own), *times.items())},
        "speedup": {name: spread(b / a for a, b in zip(own, other, strict=True)) for name, other in times.items()},
    }
    if bound:
        pairs = [(seconds, least * traffic) for seconds, least in zip(own, bound, strict=True)]
        result["microseconds"]["bound"] = _microseconds(bound)
        result["overhead_us"] = _microseconds(seconds - least for seconds, least in pairs)
        result["of_memory_bound"] = spread(least / seconds for seconds, least in pairs)
    return result


def _time_in_turn(case: Case, contenders: dict[str, Contender], rounds: int) -> dict[str, list[float]]:
    """The seconds of a call, for each contender and round."""
    runs = {name: case.over_all_copies(contender) for name, contender in contenders.items()}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(_WARM_UP + rounds):
        for name, run in runs.items():
            case.restore()
            seconds = case.seconds(run)
            if number >= _WARM_UP:
                times[name].append(seconds)
    return times


def _microseconds(seconds: Iterable[float]) -> dict[str, float]:
    return spread(value * 1e6 for value in seconds)


def spread(values: Iterable[float]) -> dict[str, float]:
    """Median and quartiles."""
    ordered = sorted(values)
    low, middle, high = statistics.quantiles(ordered, n=4) if len(ordered) > 1 else ordered * 3
    return {"median": middle, "p25": low, "p75": high}
