"""The cost of measuring stored conversations: replay against the same forward passes of the plain model, in pairs.

``python benchmarks/replay.py`` prints the ratio of the speeds (replay over plain) with its quartiles.
"""

from __future__ import annotations

import statistics
import time

import torch
from rich.console import Console
from rich.table import Table

from axiscap import CapProfile, drift, models
from axiscap.drift import Conversation

PROFILE = "examples/profiles/smollm2-135m-instruct.safetensors"
ROUNDS = 5
WORDS = "the sea is deep and old and nobody knows what lies under it on a night like this".split()  # noqa: SIM905


def conversations(count: int) -> list[Conversation]:
    """Synthetic conversations with answers of 20 to 200 words."""
    found = []
    for number in range(count):
        text = " ".join(WORDS[(number + at) % len(WORDS)] for at in range(20 + number * 97 % 180))
        said = ({"role": "user", "content": "Tell me of the sea."}, {"role": "assistant", "content": text})
        found.append(Conversation(f"{number}", said))
    return found


@torch.inference_mode()
def plain(model, tokenizer, stored: list[Conversation]) -> None:
    """Runs the model alone on the same batches of tokens. Both sides include the chat template."""
    texts = [drift.encode(tokenizer, conversation.messages).tokens for conversation in stored]
    for batch in drift.group_by_length({at: len(text) for at, text in enumerate(texts)}, drift.BATCH_TOKENS):
        ids = torch.zeros(len(batch), max(len(texts[at]) for at in batch), dtype=torch.long)
        for row, at in zip(ids, batch, strict=True):
            row[: len(texts[at])] = torch.tensor(texts[at])
        model(input_ids=ids, use_cache=False, logits_to_keep=1)


def main() -> None:
    model, tokenizer = models.load()
    profile = CapProfile.load(PROFILE)
    stored = conversations(8)
    table = Table(title="replay's speed over that of the forward passes alone: median (quartiles)")
    for column in ("layers", "ratio", "conversations a second"):
        table.add_column(column, justify="right")
    for layers in ([21], list(profile.layers), list(range(30))):
        ratios, speeds = [], []
        for number in range(ROUNDS + 1):
            begin = time.perf_counter()
            plain(model, tokenizer, stored)
            middle = time.perf_counter()
            seen = sum(1 for _ in drift.replay(model, tokenizer, profile, stored, layers=layers))
            end = time.perf_counter()
            if number:  # the first round warms up
                ratios.append((middle - begin) / (end - middle))
                speeds.append(seen / (end - middle))
        low, mid, high = statistics.quantiles(ratios, n=4)
        table.add_row(f"{len(layers)}", f"{mid:.3f} ({low:.3f}-{high:.3f})", f"{statistics.median(speeds):.1f}")
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
