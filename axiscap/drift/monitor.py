"""Conversations followed as they happen: many at once, in memory that does not grow with their length."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from axiscap.drift.scale import BUCKETS, Drift, Path, Scale, bucket_of, cumulated, summed
from axiscap.profile import CapProfile
from axiscap.transformers import Installation


class Recorder:
    """Keeps every token's projections while a model with an installation generates::

        with axiscap.install(model, profile) as cap, Recorder(cap) as seen:
            model.generate(**inputs)
        seen.projections()[0]  # of the first sequence: (layers, tokens), of the prompt and of the answer

    The last token that is sampled is not read by the model, and has none. Beam search reorders sequences, and is not
    for this.

    Parameters
    ----------
    installation
        of :func:`axiscap.install`.

    Examples
    --------
    >>> from axiscap.drift import Recorder
    >>> with axiscap.install(model, profile) as cap, Recorder(cap) as seen:
    ...     _ = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    >>> len(seen.projections())
    1
    """

    def __init__(self, installation: Installation) -> None:
        self._installation = installation
        self._parts: list[Tensor] = []
        self._real: list[Tensor] = []

    def __enter__(self) -> Recorder:
        self._undo = self._installation.watch(self._see)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._undo()

    def _see(self, found: dict[int, Tensor]) -> None:
        part = torch.stack([found[layer][..., 0].cpu() for layer in sorted(found)])
        real = self._installation.real()
        self._parts.append(part)
        self._real.append(
            torch.ones(part.shape[1:], dtype=torch.bool) if real is None else real[:, -part.shape[2] :].cpu()
        )

    def projections(self) -> list[Tensor]:
        """By sequence, (layers, tokens) float32, without padding; NaN for sinks, which are left alone.

        Returns
        -------
        list[Tensor]
            In the order of the batch.

        Examples
        --------
        >>> from axiscap.drift import Recorder
        >>> with axiscap.install(model, profile) as cap, Recorder(cap) as seen:
        ...     _ = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        >>> seen.projections()[0].shape[0] == len(profile.layers)
        True
        """
        if not self._parts:
            return []
        whole, real = torch.cat(self._parts, 2), torch.cat(self._real, 1)
        return [whole[:, row, real[row]] for row in range(whole.shape[1])]


@dataclass
class _Following:
    path: Path = field(default_factory=Path)
    drifting: bool = False


class Monitor:
    """Follows many conversations turn by turn, and says when one drifts and when it is back.

    A conversation drifts from the first turn whose percentile among normal answers is below ``low``, until a turn is
    above ``high``. Memory is bounded: of more than ``most`` conversations, those silent longest are forgotten.

    Parameters
    ----------
    profile
        with quantiles, as ``axiscap calibrate`` makes it.
    layer
        whose projections are followed; see :meth:`Scale.of`.
    low
        the percentile below which a conversation begins to drift, 0 to 100.
    high
        the percentile above which it is back, at least low.
    on_change
        called with the conversation's name, whether it drifts now, and its drift so far.
    most
        conversations that are remembered.
    name
        the label ``profile`` of the metrics.

    Raises
    ------
    ValueError
        the profile does not know its model's normal answers, or the percentiles are in the wrong order.

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
        self._known: OrderedDict[str, _Following] = OrderedDict()
        self.drifting = 0
        self.turns = self.tokens = self.tokens_below = self.alarms = 0
        self.percentiles = [0] * len(BUCKETS)
        self.percentile_sum = 0.0

    def turn(self, conversation: str, projections: Tensor) -> Drift:
        """One turn of the model's: the projections of its tokens at the monitor's layer, (tokens,) float32.

        Parameters
        ----------
        conversation
            its name.
        projections
            (tokens,) float32, in the units of the floors.

        Returns
        -------
        Drift
            The conversation's so far.

        Raises
        ------
        ValueError
            there is none.

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
        return self._add(conversation, *summed(values, self.scale.floor))

    def record(self, conversation: str, record: Mapping[str, Any]) -> Drift | None:
        """One turn of the model's, from a serving engine: a line of its log, as docs/serving.md describes it.

        Parameters
        ----------
        conversation
            to which the request belonged; the record's own ``id`` names the request.
        record
            the parsed line.

        Returns
        -------
        Drift | None
            The conversation's drift so far; None where the engine counted no row of the answer.

        Raises
        ------
        ValueError
            it is no such record, or says nothing of the monitor's layer.

        Examples
        --------
        >>> from axiscap import drift
        >>> monitor = drift.Monitor(profile)
        >>> at = {"rows": 3, "fired": 1, "mean_projection": [-9.0]}
        >>> monitor.record("first", {"id": "1", "answer": {str(monitor.scale.layer): at}}).tokens
        3
        """
        try:
            counted = record["answer"][str(self.scale.layer)]
            rows, fired, mean = int(counted["rows"]), int(counted["fired"]), counted["mean_projection"][0]
        except (KeyError, TypeError, IndexError):
            raise ValueError(f"the record must be of a finished request, with layer {self.scale.layer}") from None
        return None if not rows or mean is None else self._add(conversation, float(mean), rows, fired)

    def _add(self, conversation: str, mean: float, tokens: int, below: int) -> Drift:
        entry = self._known.setdefault(conversation, _Following())
        self._known.move_to_end(conversation)
        while len(self._known) > self._most:
            _, gone = self._known.popitem(last=False)
            self.drifting -= gone.drifting
        entry.path.add(mean, tokens, below)
        percentile = self.scale.percentile(mean)
        self.turns += 1
        self.tokens += tokens
        self.tokens_below += below
        self.percentiles[bucket_of(percentile)] += 1
        self.percentile_sum += percentile
        drift = entry.path.drift(self.scale)
        now = percentile <= self.high if entry.drifting else percentile < self.low
        if now != entry.drifting:
            entry.drifting = now
            self.drifting += 1 if now else -1
            self.alarms += now
            if self._on_change is not None:
                self._on_change(conversation, now, drift)
        return drift

    def drift(self, conversation: str) -> Drift | None:
        """A conversation's drift so far; None where it is not known, or forgotten.

        Parameters
        ----------
        conversation
            its name.

        Returns
        -------
        Drift or None
            The same as the last :meth:`turn` gave.

        Examples
        --------
        >>> from axiscap import drift
        >>> drift.Monitor(profile).drift("unknown") is None
        True
        """
        entry = self._known.get(conversation)
        return None if entry is None else entry.path.drift(self.scale)

    def register(self, registry: Any = None) -> None:
        """Puts the monitor's counts on a Prometheus page, labelled by the profile's name alone.

        Parameters
        ----------
        registry
            prometheus_client's own without one.

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
        """For prometheus_client, which calls it at every scrape.

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
            "axiscap_monitor_conversations": ("Conversations that are remembered.", len(self._known)),
            "axiscap_monitor_drifting_conversations": ("Those of them that drift now.", self.drifting),
        }
        for name, (text, value) in gauges.items():
            gauge = GaugeMetricFamily(name, text, labels=["profile"])
            gauge.add_metric(label, value)
            yield gauge
        text = "Percentile (0 to 100) of a turn's mean projection among normal answers."
        histogram = HistogramMetricFamily("axiscap_monitor_turn_percentile", text, labels=["profile"])
        histogram.add_metric(label, cumulated(self.percentiles), sum_value=self.percentile_sum)
        yield histogram
