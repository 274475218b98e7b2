"""What capping does, on the metrics page of the server that does it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from prometheus_client import REGISTRY, CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from axiscap.profile.scale import cumulate
from axiscap.serving.shared_folder import WRITTEN

_COUNTERS = {
    "rows": ("axiscap_rows", "Rows (one token at one layer) that were measured against a floor."),
    "fired": ("axiscap_fired_rows", "Rows that lay below their floor and were lifted to their target."),
    "nonfinite": (
        "axiscap_nonfinite_rows",
        "Rows that were left alone: attention sinks, beyond the limit of their norm, and rows that were not finite.",
    ),
    "projection": (
        "axiscap_projection_sum",
        "Sum of the projections on the first axis, before the cap, in units of the residual stream; may fall.",
    ),
    "shortfall": (
        "axiscap_shortfall",
        "Sum of floor less projection over the rows below, in units of the residual stream.",
    ),
}


class Totals(Collector):
    """Reads the totals that the workers of one server write, whenever somebody looks.

    The sums of projections are given as gauges, since they fall where projections are negative. Where a file cannot be
    read, what it said last holds, and the failure is counted.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._last: dict[Path, dict[str, Any]] = {}
        self._unread = 0

    def collect(self) -> Iterator[Metric]:
        families = {
            key: (GaugeMetricFamily if key == "projection" else CounterMetricFamily)(
                name, text, labels=["profile", "layer", "part"]
            )
            for key, (name, text) in _COUNTERS.items()
        }
        files = self._read()
        for labels, counts in _sums(files):
            for key, value in counts.items():
                families[key].add_metric(labels, value)
        yield from families.values()
        text = "Percentile (0 to 100) of an answer's mean projection among the model's normal answers."
        percentiles = HistogramMetricFamily("axiscap_answer_percentile", text, labels=["profile"])
        for name in sorted({name for file in files for name in file["answers"]}):
            known = [file["answers"][name] for file in files if name in file["answers"]]
            counts_by_bucket = [sum(counts) for counts in zip(*(one["counts"] for one in known), strict=True)]
            percentiles.add_metric([name], cumulate(counts_by_bucket), sum(one["sum"] for one in known))
        yield percentiles
        text = "Times that totals or the log could not be written, or totals not be read; all is tried again."
        failures = CounterMetricFamily("axiscap_telemetry_failures", text, labels=["what"])
        for what in WRITTEN:
            failures.add_metric([what], sum(file["failures"][what] for file in files))
        failures.add_metric(["read"], self._unread)
        yield failures
        text = "Records that the log lost, since more waited for its disk than is kept."
        yield CounterMetricFamily("axiscap_log_lost_records", text, sum(file["lost"] for file in files))

    def _read(self) -> list[dict[str, Any]]:
        """The workers' files, each as it was read last."""
        try:
            paths = [path for path in self.folder.iterdir() if path.match("totals-*.json")]
        except OSError:
            paths, self._unread = [], self._unread + 1
        for path in paths:
            try:
                self._last[path] = json.loads(path.read_text())
            except (OSError, ValueError):
                self._unread += 1
        return [self._last[path] for path in sorted(self._last)]


def _sums(files: Sequence[Mapping[str, Any]]) -> Iterator[tuple[tuple[str, str, str], dict[str, float]]]:
    """By profile, layer and part. Pipeline ranks hold different layers; data-parallel ranks the same ones, which add
    up.
    """
    sums: dict[tuple[str, str, str], dict[str, float]] = {}
    for file in files:
        for name, parts in file["profiles"].items():
            for part, layers in parts.items():
                for layer, counts in layers.items():
                    known = sums.setdefault((name, layer, part), dict.fromkeys(counts, 0.0))
                    for key, value in counts.items():
                        known[key] += value
    yield from sums.items()


_shown: Totals | None = None


def show(folder: Path) -> None:
    """Puts the totals of a server on this process's page; those of a later one take their place."""
    global _shown
    if _shown is not None:
        REGISTRY.unregister(_shown)
    _shown = Totals(folder)
    REGISTRY.register(_shown)


def show_in(registry: CollectorRegistry) -> None:
    """The same in a registry that gathers the pages of several processes, and knows nothing of this one's."""
    assert _shown is not None
    registry.register(_shown)
