"""The cost of a cap in a training step: memory and time, capped and with a hand-written hook, over uncapped.

    python benchmarks/training.py

Each pair is measured in turn in one process. Memory is the storages that autograd saves for the backward pass, each
counted once, and the parameters. Time is that of the forward and the backward pass.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from axiscap import CapProfile, models, training

PROFILE = Path(__file__).parents[1] / "examples" / "profiles" / "smollm2-135m-instruct.safetensors"


class Handwritten:
    """Equation 1 as a hook in plain torch, the usual way in studies."""

    def __init__(self, model: Any, profile: CapProfile) -> None:
        self.handles = []
        for at, layer in enumerate(profile.layers):
            axis, floor = profile.axes[at, 0], profile.floors[at, 0]
            lift = axis if profile.lifts is None else profile.lifts[at, 0]

            def hook(module: Any, args: Any, output: Any, axis=axis, floor=floor, lift=lift) -> Any:
                hidden = output[0] if isinstance(output, tuple) else output
                short = (floor - hidden @ axis).clamp(min=0)
                capped = hidden + short[..., None] * lift
                return (capped, *output[1:]) if isinstance(output, tuple) else capped

            self.handles.append(models.decoder_layers(model)[layer].register_forward_hook(hook))

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()


class Capped:
    """The profile in force, as in training."""

    def __init__(self, model: Any, profile: CapProfile) -> None:
        self.cap = training.TrainingCap(model, profile)
        self.cap.begin(0, 1)

    def remove(self) -> None:
        self.cap.remove()


class Uncapped:
    """Nothing."""

    def __init__(self, model: Any, profile: CapProfile) -> None:
        pass

    def remove(self) -> None:
        pass


def saved_bytes(step: Callable[[], Any], model: Any) -> int:
    """The bytes that autograd saves, without the parameters."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    sizes: dict[int, int] = {}
    kept = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept.append(tensor)  # so that no address comes twice
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step()
    return sum(sizes.values())


def main(
    pairs: Annotated[int, typer.Option(help="How often each is measured.")] = 9,
    batch: Annotated[int, typer.Option(help="Texts in a step.")] = 4,
    length: Annotated[int, typer.Option(help="Tokens of a text.")] = 128,
) -> None:
    """Measure, and print a table."""
    model, _ = models.load(models.DEFAULT_MODEL, "float32")
    model.train()
    profile = CapProfile.load(PROFILE)
    ids = torch.randint(3, 999, (batch, length), generator=torch.Generator().manual_seed(0))

    def forward() -> torch.Tensor:
        return model(input_ids=ids, labels=ids, use_cache=False).loss  # type: ignore[no-any-return]

    kinds = (Uncapped, Capped, Handwritten)
    seconds: dict[type, list[float]] = {kind: [] for kind in kinds}
    memory: dict[type, int] = {}
    for number in range(pairs + 1):
        for kind in kinds if number % 2 else kinds[::-1]:
            put = kind(model, profile)
            if number == 0:  # which also warms up
                memory[kind] = saved_bytes(forward, model)
            begin = time.perf_counter()
            forward().backward()
            if number:
                seconds[kind].append(time.perf_counter() - begin)
            model.zero_grad(set_to_none=True)
            put.remove()
    print(f"a step of {batch} texts of {length} tokens, over that of the uncapped model; {pairs} in turn")
    print("| | time, median (least to most) | saved for the backward pass |")
    print("|---|---|---|")
    for kind in kinds[1:]:
        ratios = sorted(mine / plain for mine, plain in zip(seconds[kind], seconds[Uncapped], strict=True))
        spread = f"{ratios[len(ratios) // 2]:.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f})"
        print(f"| {kind.__name__.lower()} | {spread} | {memory[kind] / memory[Uncapped]:.4f} |")


if __name__ == "__main__":
    typer.run(main)
