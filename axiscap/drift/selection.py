"""Which conversations a page shows, and the figures of their groups."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from axiscap.drift.conversations import CAPPED
from axiscap.drift.replay import Trace
from axiscap.drift.scale import Drift, Scale, drift_of

#: Conversations that are listed and drawn, and those that are shown token by token: more would be too large a page.
ROWS, DETAILED = 200, 8
_GROUPS, _HISTOGRAM = 24, 50_000


@dataclass(frozen=True)
class Row:
    """A conversation in figures: its drift, and each answer's mean, tokens, and tokens below the floor."""

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
    """The conversations of one group and side, added up."""

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

    def described(self) -> str:
        """Its level, for people."""
        return f"{self.level:.3g}" + (f" ± {self.interval:.2g}" if math.isfinite(self.interval) else "")


class Selection:
    """Of any number of traces, what is shown: figures of each group, and in full the conversations that went lowest.

    Memory does not grow with the number of traces.

    Parameters
    ----------
    scale
        of the layer that figures and curves are of.
    """

    def __init__(self, scale: Scale) -> None:
        self.scale = scale
        self.groups: dict[tuple[str, str], Group] = {}
        self.tokens: dict[str, list[float]] = {}
        self._rows: list[Row] = []
        self._traces: list[Trace] = []

    def add(self, trace: Trace) -> Drift | None:
        """Returns the trace's drift; None where the model says nothing in it, which is not shown."""
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
        kept = self.tokens.setdefault(conversation.side, [])
        if len(kept) < _HISTOGRAM:
            kept.extend(torch.cat(trace.answers(scale.layer)).tolist())
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
        mine = [trace for trace in self._traces if trace.conversation.name in names]
        return sorted(mine, key=lambda trace: (names.index(trace.conversation.name), trace.conversation.side == CAPPED))
