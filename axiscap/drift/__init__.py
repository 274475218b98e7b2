"""Drift: where conversations go along the axis, read again from stored texts, or followed as they are written.

A *talk* is a stored conversation. Reading it (:func:`replay`) gives a *trace*: the projection of every token at the
layers that were asked for, and where each message's tokens are. A :class:`Monitor` follows many conversations at once,
and says when one falls below normal and when it comes back. ``axiscap.drift.compare`` has a conversation generated
twice, uncapped and capped.
"""

from axiscap.drift.conversations import CAPPED, UNCAPPED, Encoded, Talk, Turn, encode, read_talks
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
    "Drift",
    "Encoded",
    "Monitor",
    "Recorder",
    "Scale",
    "Selection",
    "Talk",
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
    "read_talks",
    "replay",
    "summed",
    "turn_records",
    "writing_records",
]
