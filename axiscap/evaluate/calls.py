"""What an answer's random numbers come of: the seed, the sample, its epoch, and which of its calls it is.

Nothing else, so that two runs are pairs, whatever was answered beside a sample and in whatever order.
"""

from __future__ import annotations

import hashlib
from collections import Counter

from inspect_ai.solver._task_state import sample_state


class Calls:
    """The calls of one model, counted by sample."""

    def __init__(self) -> None:
        self._made: Counter[str] = Counter()

    def next(self, prompt: str, seed: int | None) -> int:
        """The seed, of 31 bits, of the call that is made now. Outside a task the prompt stands for the sample."""
        sample = sample_state()
        name = f"{sample.sample_id} {sample.epoch}" if sample else prompt
        key = sample.uuid if sample else prompt
        self._made[key] += 1
        digest = hashlib.sha256(f"{seed or 0} {name} {self._made[key]}".encode()).digest()
        return int.from_bytes(digest[:4]) >> 1
