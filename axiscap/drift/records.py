"""Files of records: one for each of the model's turns at each layer, as JSONL or Parquet."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from axiscap.drift.replay import Trace
from axiscap.profile.scale import Scale

#: Records that are collected before they are written to Parquet as one row group.
_ROW_GROUP = 10_000
#: The fields of a record, and their types in Parquet.
_FIELDS = {
    "conversation": "string", "group": "string", "side": "string", "turn": "int32", "layer": "int32",
    "tokens": "int32", "mean": "float64", "below_floor": "float64", "percentile": "float64",
}  # fmt: skip


def make_records(trace: Trace, scales: Sequence[Scale]) -> list[dict[str, Any]]:
    """The records of a trace at the layers of the scales."""
    conversation, records = trace.conversation, []
    for scale in scales:
        for number, (mean, tokens, below) in enumerate(trace.sums(scale), start=1):
            percentile = scale.percentile(mean)
            records.append(
                {
                    "conversation": conversation.name,
                    "group": conversation.group,
                    "side": conversation.side,
                    "turn": number,
                    "layer": scale.layer,
                    "tokens": tokens,
                    "mean": mean,
                    "below_floor": below / tokens if math.isfinite(scale.floor) else None,
                    "percentile": None if math.isnan(percentile) else percentile,
                }
            )
    return records


@contextlib.contextmanager
def open_records(path: Path | None, scales: Sequence[Scale]) -> Iterator[Callable[[Trace], None]]:
    """Opens a file for records, and yields the function that writes a trace's; without a path it writes nothing.

    Parameters
    ----------
    path
        ``.jsonl`` or ``.parquet``; its folder is created.
    scales
        of the layers of the records.

    Raises
    ------
    ValueError
        the path has another suffix.
    ModuleNotFoundError
        pyarrow is missing, for Parquet.
    """
    if path is None:
        yield lambda trace: None
        return
    if path.suffix not in (".jsonl", ".parquet"):
        raise ValueError(f"records are written as .jsonl or .parquet, got {path}")
    path.parent.mkdir(parents=True, exist_ok=True)
    opened = _open_jsonl(path, scales) if path.suffix == ".jsonl" else _open_parquet(path, scales)
    with opened as write:
        yield write


@contextlib.contextmanager
def _open_jsonl(path: Path, scales: Sequence[Scale]) -> Iterator[Callable[[Trace], None]]:
    with path.open("w", encoding="utf-8") as file:

        def write(trace: Trace) -> None:
            file.writelines(json.dumps(record) + "\n" for record in make_records(trace, scales))

        yield write


@contextlib.contextmanager
def _open_parquet(path: Path, scales: Sequence[Scale]) -> Iterator[Callable[[Trace], None]]:
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ModuleNotFoundError:
        raise ModuleNotFoundError("Parquet needs pyarrow: pip install 'axiscap[report]'") from None
    schema = pyarrow.schema([(name, pyarrow.type_for_alias(kind)) for name, kind in _FIELDS.items()])
    pending: list[dict[str, Any]] = []
    with parquet.ParquetWriter(path, schema) as writer:

        def flush() -> None:
            writer.write_table(pyarrow.Table.from_pylist(pending, schema))
            pending.clear()

        def write(trace: Trace) -> None:
            pending.extend(make_records(trace, scales))
            if len(pending) > _ROW_GROUP:
                flush()

        yield write
        flush()
