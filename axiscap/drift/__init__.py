"""Drift: the path of conversations along the axis, of stored ones or while they are written.

:func:`replay` lets the model read stored conversations again, and gives a *trace* of each: the projection of every
token at the requested layers, and the turns that the tokens belong to. A :class:`Monitor` follows many conversations
at once, and reports when one drifts and when it recovers. ``axiscap.drift.compare`` generates a conversation twice,
uncapped and capped.
"""

from axiscap.drift.conversations import (
    CAPPED,
    UNCAPPED,
    Conversation,
    Encoded,
    Turn,
    count_conversations,
    encode,
    read_conversations,
)
from axiscap.drift.monitor import Monitor
from axiscap.drift.recorder import Recorder
from axiscap.drift.records import make_records, open_records
from axiscap.drift.replay import BATCH_TOKENS, Trace, group_by_length, make_probe, project_sequences, replay
from axiscap.drift.selection import Selection
from axiscap.drift.statistics import Drift, drift_of, summarise_turn
from axiscap.profile.scale import Scale, describe_percentile, measurable_layers

__all__ = [
    "BATCH_TOKENS",
    "CAPPED",
    "UNCAPPED",
    "Conversation",
    "Drift",
    "Encoded",
    "Monitor",
    "Recorder",
    "Scale",
    "Selection",
    "Trace",
    "Turn",
    "count_conversations",
    "describe_percentile",
    "drift_of",
    "encode",
    "group_by_length",
    "make_probe",
    "make_records",
    "measurable_layers",
    "open_records",
    "project_sequences",
    "read_conversations",
    "replay",
    "summarise_turn",
]
