"""The conversations that a page shows, and the statistics of all groups."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from axiscap.drift.conversations import CAPPED
from axiscap.drift.replay import Trace
from axiscap.drift.statistics import Drift, drift_of
from axiscap.profile.scale import Scale

#: How many conversations a page lists and draws, and how many it shows token by token. More make the page too large.
ROWS, DETAILED = 200, 8
#: The most groups that are told apart, and the most tokens of each side in the histogram.
_GROUPS, _HISTOGRAM_TOKENS = 24, 50_000


@dataclass(frozen=True)
class Row:
    """One conversation: its drift, and for each answer the mean projection, tokens, and tokens below the floor."""

    name: str
    group: str
    side: str
    drift: Drift
    answers: list[tuple[float, int, int]]

    @property
    def means(self) -> list[float]:
        return [mean for mean, _, _ in self.answers]


@dataclass
class Group:
    """The sums over the conversations of one group and side."""

    conversations: int = 0
    answers: int = 0
    below: int = 0  # answers whose mean is below the floor
    abnormal: int = 0  # answers whose mean is below 99 % of normal answers
    _level: float = 0.0
    _squares: float = 0.0

    def add(self, row: Row, scale: Scale) -> None:
        self.conversations += 1
        self.answers += len(row.answers)
        self.below += sum(mean < scale.floor for mean in row.means)
        self.abnormal += sum(scale.percentile(mean) < 1 for mean in row.means)
        self._level += row.drift.level
        self._squares += row.drift.level**2

    @property
    def level(self) -> float:
        """The mean of the conversations' levels."""
        return self._level / self.conversations

    @property
    def interval(self) -> float:
        """Half the width of the mean level's 95 % interval, by the normal approximation; NaN for one conversation."""
        if self.conversations < 2:
            return math.nan
        variance = (self._squares - self.conversations * self.level**2) / (self.conversations - 1)
        return 1.96 * math.sqrt(max(0.0, variance) / self.conversations)

    def describe_level(self) -> str:
        """The level with its interval, as text."""
        return f"{self.level:.3g}" + (f" ± {self.interval:.2g}" if math.isfinite(self.interval) else "")


class Selection:
    """Collects traces: the statistics of each group, and the conversations that went lowest.

    Memory does not grow with the number of traces.

    Parameters
    ----------
    scale
        of the layer at which the statistics are taken.
    """

    def __init__(self, scale: Scale) -> None:
        self.scale = scale
        self.groups: dict[tuple[str, str], Group] = {}
        self.tokens: dict[str, list[float]] = {}
        self._rows: list[Row] = []
        self._traces: list[Trace] = []

    def add(self, trace: Trace) -> Drift | None:
        """Adds a trace and returns its drift; a trace without answers is not added, and has none."""
        conversation, scale = trace.conversation, self.scale
        answers = trace.sums(scale)
        drift = drift_of(answers, scale)
        if drift is None:
            return None
        row = Row(conversation.name, conversation.group, conversation.side, drift, answers)
        key = (conversation.group, conversation.side)
        if key not in self.groups and len(self.groups) >= _GROUPS:
            key = ("other groups", conversation.side)
        self.groups.setdefault(key, Group()).add(row, scale)
        tokens = self.tokens.setdefault(conversation.side, [])
        if len(tokens) < _HISTOGRAM_TOKENS:
            tokens.extend(torch.cat(trace.answers(scale.layer)).tolist())
        self._rows.append(row)
        self._traces.append(trace)
        if len(self._rows) > 2 * ROWS:
            self._rows = self.rows()
        if len(self._traces) > 4 * DETAILED:
            self._traces = self.traces()
        return drift

    @property
    def conversations(self) -> int:
        return sum(group.conversations for group in self.groups.values())

    def rows(self) -> list[Row]:
        """At most :data:`ROWS` conversations, the lowest first."""
        return sorted(self._rows, key=lambda row: row.drift.lowest)[:ROWS]

    def traces(self) -> list[Trace]:
        """At most :data:`DETAILED` conversations, the lowest first, each followed by its other side."""
        names = list(dict.fromkeys(row.name for row in self.rows()))[:DETAILED]
        traces = [trace for trace in self._traces if trace.conversation.name in names]
        return sorted(
            traces, key=lambda trace: (names.index(trace.conversation.name), trace.conversation.side == CAPPED)
        )
