"""The cost of a cap in llama.cpp: ratios of the speeds of the same work, capped and uncapped in turn.

.venv-llamacpp/bin/python benchmarks/llamacpp.py    # after `make .venv-llamacpp/built`
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import llama_cpp
import typer

from axiscap import CapProfile, llamacpp, models

PROFILE = Path(__file__).parents[1] / "examples" / "profiles" / "smollm2-135m-instruct.safetensors"


def seconds(llama: llama_cpp.Llama, tokens: list[int], steps: int) -> tuple[float, float]:
    """The seconds for reading a prompt, and for generating an answer."""
    llama.reset()
    begin = time.perf_counter()
    llama.eval(tokens)
    read = time.perf_counter()
    for _ in range(steps):
        llama.eval(tokens[-1:])
    return read - begin, time.perf_counter() - read


def main(
    model: Annotated[Path | None, typer.Option(help="A GGUF file; the demo's without it.")] = None,
    profile: Annotated[Path, typer.Option(help="A profile that fits it.")] = PROFILE,
    prompt: Annotated[int, typer.Option(help="Tokens that are read.")] = 512,
    steps: Annotated[int, typer.Option(help="Tokens that are written.")] = 64,
    pairs: Annotated[int, typer.Option(help="How often each is measured.")] = 9,
    threads: Annotated[int, typer.Option(help="Of llama.cpp.")] = 2,
) -> None:
    """Measure, and print a table."""
    path = model or models.default_model_file()
    sides = [
        llama_cpp.Llama(str(path), n_ctx=prompt + steps, n_threads=threads, n_threads_batch=threads, verbose=False)
        for _ in range(2)
    ]
    tokens = [1 + number % 999 for number in range(prompt)]
    ratios: tuple[list[float], list[float]] = ([], [])
    with llamacpp.install(sides[1], CapProfile.load(profile)):
        for number in range(pairs + 1):
            order = sides if number % 2 else sides[::-1]
            measured = {side is sides[1]: seconds(side, tokens, steps) for side in order}
            if number:  # the first round warms up
                for kind in range(2):
                    ratios[kind].append(measured[False][kind] / measured[True][kind])
    print(f"{path.name}: speed capped over uncapped, median (least to most) of {pairs} pairs, {threads} threads")
    for name, found in zip((f"reading {prompt} tokens", f"writing {steps} tokens"), ratios, strict=True):
        found.sort()
        print(f"| {name} | {found[len(found) // 2]:.3f} ({found[0]:.3f} to {found[-1]:.3f}) |")


if __name__ == "__main__":
    typer.run(main)
