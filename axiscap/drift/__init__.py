"""Drift: where conversations go along the axis, read again from stored texts, or followed as they are written.

Reading a stored conversation again (:func:`replay`) gives a *trace*: the projection of every token at the layers that
were asked for, and where each message's tokens are. A :class:`Monitor` follows many conversations at once,
and says when one falls below normal and when it comes back. ``axiscap.drift.compare`` has a conversation generated
twice, uncapped and capped.
"""

from axiscap.drift.conversations import CAPPED, UNCAPPED, Conversation, Encoded, Turn, encode, read_conversations
from axiscap.drift.monitor import Monitor, Recorder
from axiscap.drift.replay import BATCH_TOKENS, Trace, batches, measuring, read, replay, turn_records, writing_records
from axiscap.drift.scale import (
    BUCKETS,
    Drift,
    Scale,
    bucket_of,
    cumulated,
    drift_of,
    known_layers,
    percentile_in_words,
    summed,
)
from axiscap.drift.selection import Selection

__all__ = [
    "BATCH_TOKENS",
    "BUCKETS",
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
    "batches",
    "bucket_of",
    "cumulated",
    "drift_of",
    "encode",
    "known_layers",
    "measuring",
    "percentile_in_words",
    "read",
    "read_conversations",
    "replay",
    "summed",
    "turn_records",
    "writing_records",
]
