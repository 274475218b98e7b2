"""The seeds of answers: from the seed of the run, the sample, its epoch and the number of the call.

Nothing else enters, neither the batch nor the order of samples, so that the answers of two runs form pairs.
"""

from __future__ import annotations

import hashlib
from collections import Counter

from inspect_ai.solver._task_state import sample_state


class Calls:
    """Counts the calls of one model for each sample."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()

    def next_seed(self, prompt: str, seed: int | None) -> int:
        """The seed (31 bits) of the sample's next call. Outside a task, the prompt identifies the sample."""
        sample = sample_state()
        name = f"{sample.sample_id} {sample.epoch}" if sample else prompt
        key = sample.uuid if sample else prompt
        self._counts[key] += 1
        digest = hashlib.sha256(f"{seed or 0} {name} {self._counts[key]}".encode()).digest()
        return int.from_bytes(digest[:4]) >> 1
