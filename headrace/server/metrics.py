"""`/metrics`: the engine's counters and the server's own, in a registry of its own. Knows no request."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from headrace.telemetry import METRICS, DurationHistogram

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_BUCKETS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000)


class ServerMetrics:
    """Counts what the server answers; renders that and the engine's metrics."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._engine = _EngineCollector()
        self._registry.register(self._engine)
        self._latency = Histogram(
            "headrace_http_request_seconds",
            "generation requests by route",
            ["route"],
            buckets=_BUCKETS,
            registry=self._registry,
        )
        self._disconnects = Counter(
            "headrace_http_disconnects", "clients gone before their answer", registry=self._registry
        )

    def observe(self, route: str, seconds: float) -> None:
        self._latency.labels(route).observe(seconds)

    def count_disconnect(self) -> None:
        self._disconnects.inc()

    def render(
        self, engine_metrics: Mapping[str, float], histograms: Iterable[DurationHistogram], labels: Mapping[str, str]
    ) -> bytes:
        """The exposition text. `labels` are put on every metric of the engine."""
        self._engine.values = dict(engine_metrics)
        self._engine.histograms = tuple(histograms)
        self._engine.labels = dict(labels)
        return generate_latest(self._registry)


class _EngineCollector(Collector):
    """The engine's own numbers, as last told."""

    def __init__(self) -> None:
        self.values: dict[str, float] = {}
        self.histograms: tuple[DurationHistogram, ...] = ()
        self.labels: dict[str, str] = {}

    def collect(self) -> Iterator[Metric]:
        known = {spec.name: spec for spec in METRICS}
        for name, value in self.values.items():
            spec = known.get(name)
            is_counter = spec is not None and spec.kind == "counter"
            family = CounterMetricFamily if is_counter else GaugeMetricFamily
            metric = family(f"headrace_{name}", spec.help if spec else name, labels=list(self.labels))
            metric.add_metric(list(self.labels.values()), value)
            yield metric
        for each in self.histograms:
            of_histogram = HistogramMetricFamily(each.name, each.help, labels=list(self.labels))
            of_histogram.add_metric(list(self.labels.values()), buckets_of(each), each.total)
            yield of_histogram


def buckets_of(histogram: DurationHistogram) -> list[tuple[str, float]]:
    """As Prometheus has them: each bound, and how many do not exceed it."""
    bounds = (*map(str, map(float, histogram.bounds)), "+Inf")
    return list(zip(bounds, itertools.accumulate(histogram.counts), strict=True))
