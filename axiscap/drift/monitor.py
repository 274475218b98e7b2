"""Live monitoring of conversations, with alarms and metrics."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from axiscap.drift.statistics import Drift, RunningDrift, summarise_turn
from axiscap.profile import CapProfile
from axiscap.profile.scale import BUCKETS, Scale, bucket_of, cumulate


@dataclass
class _Conversation:
    sums: RunningDrift = field(default_factory=RunningDrift)
    is_drifting: bool = False


class Monitor:
    """Follows many conversations turn by turn, and reports when one begins to drift and when it recovers.

    A conversation drifts from the first turn whose percentile among normal answers is below ``low``, until a turn is
    above ``high``. Memory is bounded: with more than ``most`` conversations, the one without turns for longest is
    forgotten.

    Parameters
    ----------
    profile
        with quantiles, as ``axiscap calibrate`` writes it.
    layer
        whose projections are followed. Default: as :meth:`Scale.of`.
    low
        the percentile below which a conversation begins to drift, 0 to 100.
    high
        the percentile above which it recovers, at least low.
    on_change
        called with the conversation's name, whether it drifts now, and its drift so far.
    most
        the most conversations that are kept.
    name
        the label ``profile`` of the metrics.

    Raises
    ------
    ValueError
        the profile has no quantiles of normal answers, or ``low`` and ``high`` are no percentiles in this order.

    Examples
    --------
    >>> from axiscap import drift
    >>> monitor = drift.Monitor(profile, on_change=lambda name, drifts, path: print(name, drifts))
    >>> _ = monitor.turn("first", torch.full((5,), -1000.0))
    first True
    """

    def __init__(
        self,
        profile: CapProfile,
        *,
        layer: int | None = None,
        low: float = 1.0,
        high: float = 10.0,
        on_change: Callable[[str, bool, Drift], None] | None = None,
        most: int = 10_000,
        name: str = "default",
    ) -> None:
        self.scale = Scale.of(profile, layer)
        if not self.scale.values:
            raise ValueError("the profile has no quantiles of normal answers; it was not made by axiscap calibrate")
        if not 0 <= low <= high <= 100:
            raise ValueError(f"low and high must be percentiles with low <= high, got {low} and {high}")
        self.low, self.high, self.name = low, high, name
        self._on_change = on_change
        self._most = most
        self._conversations: OrderedDict[str, _Conversation] = OrderedDict()
        self.drifting = 0
        self.turns = self.tokens = self.tokens_below = self.alarms = 0
        self.percentiles = [0] * len(BUCKETS)
        self.percentile_sum = 0.0

    def turn(self, conversation: str, projections: Tensor) -> Drift:
        """Adds one of the model's turns, by the projections of its tokens at the monitor's layer.

        Parameters
        ----------
        conversation
            its name.
        projections
            (tokens,) float32, in the units of the floors.

        Returns
        -------
        Drift
            Of the conversation so far.

        Raises
        ------
        ValueError
            no projection is finite.

        Examples
        --------
        >>> from axiscap import drift
        >>> drift.Monitor(profile).turn("first", torch.zeros(5)).turns
        1
        """
        values = projections.reshape(-1)
        values = values[values.isfinite()]
        if not len(values):
            raise ValueError("a turn must have at least one finite projection")
        return self._add(conversation, *summarise_turn(values, self.scale.floor))

    def record(self, conversation: str, record: Mapping[str, Any]) -> Drift | None:
        """Adds one of the model's turns, by a line of a serving engine's log (docs/serving.md).

        Parameters
        ----------
        conversation
            the one that the request belongs to; the record's own ``id`` names the request.
        record
            the parsed line.

        Returns
        -------
        Drift | None
            Of the conversation so far; None if the engine counted no row of the answer.

        Raises
        ------
        ValueError
            the record has no counts of the answer at the monitor's layer.

        Examples
        --------
        >>> from axiscap import drift
        >>> monitor = drift.Monitor(profile)
        >>> at = {"rows": 3, "fired": 1, "mean_projection": [-9.0]}
        >>> monitor.record("first", {"id": "1", "answer": {str(monitor.scale.layer): at}}).tokens
        3
        """
        try:
            counts = record["answer"][str(self.scale.layer)]
            rows, fired, mean = int(counts["rows"]), int(counts["fired"]), counts["mean_projection"][0]
        except (KeyError, TypeError, IndexError):
            raise ValueError(f"the record must be of a finished request, with layer {self.scale.layer}") from None
        return None if not rows or mean is None else self._add(conversation, float(mean), rows, fired)

    def _add(self, conversation: str, mean: float, tokens: int, below: int) -> Drift:
        entry = self._conversations.setdefault(conversation, _Conversation())
        self._conversations.move_to_end(conversation)
        while len(self._conversations) > self._most:
            _, forgotten = self._conversations.popitem(last=False)
            self.drifting -= forgotten.is_drifting
        entry.sums.add(mean, tokens, below)
        percentile = self.scale.percentile(mean)
        self._count(tokens, below, percentile)
        drift = entry.sums.drift(self.scale)
        is_drifting = percentile <= self.high if entry.is_drifting else percentile < self.low
        if is_drifting != entry.is_drifting:
            entry.is_drifting = is_drifting
            self.drifting += 1 if is_drifting else -1
            self.alarms += is_drifting
            if self._on_change is not None:
                self._on_change(conversation, is_drifting, drift)
        return drift

    def _count(self, tokens: int, below: int, percentile: float) -> None:
        self.turns += 1
        self.tokens += tokens
        self.tokens_below += below
        self.percentiles[bucket_of(percentile)] += 1
        self.percentile_sum += percentile

    def drift(self, conversation: str) -> Drift | None:
        """The drift of a conversation so far; None if it is unknown or forgotten.

        Parameters
        ----------
        conversation
            its name.

        Returns
        -------
        Drift or None
            As the last :meth:`turn` returned it.

        Examples
        --------
        >>> from axiscap import drift
        >>> drift.Monitor(profile).drift("unknown") is None
        True
        """
        entry = self._conversations.get(conversation)
        return None if entry is None else entry.sums.drift(self.scale)

    def register(self, registry: Any = None) -> None:
        """Adds the monitor's counts to a Prometheus registry. Their only label is the profile's name.

        Parameters
        ----------
        registry
            Default: the one of prometheus_client.

        Raises
        ------
        ModuleNotFoundError
            prometheus_client is missing.

        Examples
        --------
        >>> import prometheus_client
        >>> from axiscap import drift
        >>> registry = prometheus_client.CollectorRegistry()
        >>> drift.Monitor(profile).register(registry)
        >>> b"axiscap" in prometheus_client.generate_latest(registry)
        True
        """
        try:
            import prometheus_client
        except ModuleNotFoundError:
            raise ModuleNotFoundError("metrics need prometheus-client: pip install prometheus-client") from None
        (registry or prometheus_client.REGISTRY).register(self)

    def collect(self) -> Iterator[Any]:
        """The metrics, for prometheus_client, which calls this at every scrape.

        Yields
        ------
        Metric
            Families of prometheus_client.

        Examples
        --------
        >>> from axiscap import drift
        >>> any("drift" in family.name for family in drift.Monitor(profile).collect())
        True
        """
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

        label = [self.name]
        counters = {
            "axiscap_monitor_turns": ("The model's turns that were followed.", self.turns),
            "axiscap_monitor_tokens": ("Tokens of those turns.", self.tokens),
            "axiscap_monitor_tokens_below_floor": ("Tokens whose projection was below the floor.", self.tokens_below),
            "axiscap_monitor_alarms": ("Times that a conversation began to drift.", self.alarms),
        }
        for name, (text, value) in counters.items():
            counter = CounterMetricFamily(name, text, labels=["profile"])
            counter.add_metric(label, value)
            yield counter
        gauges = {
            "axiscap_monitor_conversations": ("Conversations that are remembered.", len(self._conversations)),
            "axiscap_monitor_drifting_conversations": ("Those of them that drift now.", self.drifting),
        }
        for name, (text, value) in gauges.items():
            gauge = GaugeMetricFamily(name, text, labels=["profile"])
            gauge.add_metric(label, value)
            yield gauge
        text = "Percentile (0 to 100) of a turn's mean projection among normal answers."
        histogram = HistogramMetricFamily("axiscap_monitor_turn_percentile", text, labels=["profile"])
        histogram.add_metric(label, cumulate(self.percentiles), sum_value=self.percentile_sum)
        yield histogram
