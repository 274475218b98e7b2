"""A real model that decodes: the speed of its steps, and the time of one capped layer inside them."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor

import axiscap
from axiscap import models, ops
from axiscap.bench.kernels import published, spread

_PROMPT = "The history of the sea is long, and"
#: Floors below and above every projection: no row fires, or every row.
_NO_ROW, _EVERY_ROW = -1e4, 1e2

Undo = Callable[[], None]
Hook = Callable[..., Any]
#: Hooks the layers with a floor, and returns the functions that remove the hooks.
Variant = Callable[[float], list[Undo]]


def measure_decode(progress: Progress, name: str, model: Any, tokenizer: Any, quick: bool) -> dict[str, Any]:
    """Decoding steps at batch 1, once with no row below its floor and once with every row.

    The steps of one generation are plain, capped and under the published hooks by turns.
    """
    model_hooks = _Hooks(model)
    steps = 30 if quick else 360
    by_label = {}
    for label, floor in (("none", _NO_ROW), ("all", _EVERY_ROW)):
        variants: list[Variant] = [lambda _: [], model_hooks.install, model_hooks.add_published]
        clock = _StepClock(variants, floor)
        task = progress.add_task(f"decoding, {label} fire", total=1)
        _generate(model, tokenizer, [_PROMPT], steps + 1, logits_processor=[clock])
        clock.leave()
        progress.advance(task)
        plain, capped, hooked = clock.seconds
        by_label[label] = {
            "uncapped_tokens_per_second": 1 / statistics.median(plain),
            "capped": spread(base / own for base, own in zip(plain, capped, strict=False)),
            "published": spread(base / other for base, other in zip(plain, hooked, strict=False)),
        }
    return {"model": name, "layers": len(model_hooks.layers), "steps": steps, "fire": by_label}


def measure_layer(
    progress: Progress, name: str, model: Any, tokenizer: Any, sequences: int, rounds: int = 15
) -> dict[str, Any]:
    """The time of a capped layer inside decoding steps, where the layer's memory is not in the caches.

    ``axiscap.install``, a hook that calls ``ops.cap_`` alone, and the published hook take turns, on one thread; no row
    fires. The value of a round is the median over ten steps and all capped layers.
    """
    timer = _LayerTimer(model, tokenizer, sequences)
    times: dict[str, list[float]] = {variant: [] for variant in timer.variants}
    task = progress.add_task(f"a capped layer, {sequences} sequences", total=rounds)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for _ in range(rounds):
            for variant, medians in times.items():
                medians.append(timer.median_microseconds(variant, steps=10))
            progress.advance(task)
        calls = {variant: timer.median_calls(variant, steps=2) for variant in timer.variants}
    finally:
        torch.set_num_threads(threads)
    ratios = {
        other: spread(own / theirs for own, theirs in zip(times["installed"], times[other], strict=True))
        for other in ("op", "published")
    }
    return {
        "model": name,
        "layers": len(timer.hooks.layers),
        "sequences": sequences,
        "microseconds": {variant: spread(medians) for variant, medians in times.items()},
        "calls": calls,
        "of": ratios,
    }


class _Hooks:
    """Eight middle-to-late layers of a model with random axes, and the variants of hooks on them."""

    def __init__(self, model: Any) -> None:
        self._model, self._modules = model, models.decoder_layers(model)
        count = min(8, len(self._modules))
        first = (len(self._modules) - count) * 3 // 4
        self.layers = list(range(first, first + count))
        size = models.text_config(model).hidden_size
        generator = torch.Generator().manual_seed(0)
        self._axes = torch.nn.functional.normalize(torch.randn(count, 1, size, generator=generator), dim=-1)

    def install(self, floor: float) -> list[Undo]:
        profile = axiscap.CapProfile(self.layers, self._axes, torch.full((len(self.layers), 1), floor))
        return [axiscap.install(self._model, profile).remove]

    def add(self, make: Callable[[int], Hook]) -> list[Undo]:
        """A forward hook for each layer; ``make`` gets the layer's index in ``layers``."""
        return [
            self._modules[layer].register_forward_hook(make(index)).remove for index, layer in enumerate(self.layers)
        ]

    def add_published(self, floor: float) -> list[Undo]:
        ceiling = torch.tensor(-floor)
        return self.add(lambda index: _published_hook(-self._axes[index, 0], ceiling))

    def add_op(self, floor: float) -> list[Undo]:
        floors = torch.full((1, 1), floor)

        def make(index: int) -> Hook:
            axis = self._axes[index : index + 1]

            def hook(module: Any, args: Any, output: Any) -> None:
                ops.cap_(output[0] if isinstance(output, tuple) else output, axis, floors)

            return hook

        return self.add(make)


def _published_hook(vector: Tensor, cap: Tensor) -> Hook:
    def hook(module: Any, args: Any, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        capped = published(hidden.reshape(-1, hidden.shape[-1]), vector, cap).reshape(hidden.shape)
        return (capped, *output[1:]) if isinstance(output, tuple) else capped

    return hook


def _generate(model: Any, tokenizer: Any, prompts: Sequence[str], tokens: int, **options: Any) -> None:
    inputs = tokenizer(list(prompts), return_tensors="pt")
    length = {"max_new_tokens": tokens, "min_new_tokens": tokens}
    with torch.inference_mode():
        model.generate(**inputs, do_sample=False, pad_token_id=tokenizer.pad_token_id, **length, **options)


class _StepClock:
    """A logits processor that times each decoding step, and changes the variant between steps."""

    def __init__(self, variants: Sequence[Variant], floor: float) -> None:
        self._variants, self._floor = variants, floor
        self.seconds: list[list[float]] = [[] for _ in variants]
        self._step = -1  # the first call follows the prompt, which is no step
        self._undo: list[Undo] = []
        self._begin = 0.0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        now = time.perf_counter()
        if self._step >= 0:
            self.seconds[self._step % len(self._variants)].append(now - self._begin)
        self.leave()
        self._step += 1
        self._undo = self._variants[self._step % len(self._variants)](self._floor)
        self._begin = time.perf_counter()
        return scores

    def leave(self) -> None:
        """Removes the hooks of the current variant."""
        for undo in self._undo:
            undo()
        self._undo = []


class _LayerTimer:
    """Times one of three variants of a capped layer between two hooks of that layer."""

    def __init__(self, model: Any, tokenizer: Any, sequences: int) -> None:
        self._model, self._tokenizer = model, tokenizer
        self._prompts = [_PROMPT] * sequences
        self.hooks, self._clock = _Hooks(model), _LayerClock()
        self.variants: dict[str, Variant] = {
            "installed": self.hooks.install,
            "op": self.hooks.add_op,
            "published": self.hooks.add_published,
        }

    def median_microseconds(self, variant: str, steps: int) -> float:
        self._clock.counts_calls = False
        return statistics.median(self._decode(variant, steps)) / 1e3

    def median_calls(self, variant: str, steps: int) -> float:
        self._clock.counts_calls = True
        return statistics.median(self._decode(variant, steps))

    def _decode(self, variant: str, steps: int) -> list[int]:
        """The nanoseconds, or calls, of each capped layer in the last ``steps`` steps."""
        self._clock.values.clear()
        undos = self.hooks.add(lambda index: self._clock.start)
        undos += self.variants[variant](_NO_ROW)
        undos += self.hooks.add(lambda index: self._clock.stop)
        # The prompt comes first, then two steps to warm up.
        _generate(self._model, self._tokenizer, self._prompts, steps + 3)
        for undo in undos:
            undo()
        return self._clock.values[-steps * len(self.hooks.layers) :]


class _LayerClock:
    """Measures between two hooks of a layer: nanoseconds, or the number of calls of Python and C functions."""

    def __init__(self) -> None:
        self.values: list[int] = []
        self.counts_calls = False
        self._begin = self._calls = 0

    def _count_call(self, frame: Any, event: str, argument: Any) -> None:
        self._calls += event in ("call", "c_call")

    def start(self, *_: Any) -> None:
        self._calls = 0
        if self.counts_calls:
            sys.setprofile(self._count_call)
        self._begin = time.perf_counter_ns()

    def stop(self, *_: Any) -> None:
        elapsed = time.perf_counter_ns() - self._begin
        sys.setprofile(None)
        # The calls of this method and of setprofile are not the layer's.
        self.values.append(self._calls - 2 if self.counts_calls else elapsed)
