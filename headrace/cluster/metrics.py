"""`/metrics` of a router: what it counted, and its replicas as they are when asked. Knows no request."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from headrace.cluster.policies import Ask, ReplicaChoice
from headrace.cluster.replicas import Replicas
from headrace.server.metrics import buckets_of
from headrace.telemetry import DurationHistogram

CONTENT_TYPE = b"text/plain; version=0.0.4; charset=utf-8"
_SECONDS = "headrace_router_request_seconds"
_SECONDS_HELP = "calls by route and status, from the whole request to the end of the answer"
_BUCKETS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000)


class RouterMetrics:
    """One per router."""

    def __init__(self, replicas: Replicas) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_ReplicaCollector(replicas))
        self._calls = _CallCollector()
        self._registry.register(self._calls)
        self.retries = self._counter("retries", "data calls that were asked of another replica")
        self.broken_streams = self._counter("broken_streams", "streams that a replica broke off")
        self.resumptions = self._counter("resumptions", "generations that went on at another replica")
        self.updates = self._counter("updates", "updates that have returned: fences")
        self.disconnects = self._counter("disconnects", "clients gone before their answer was complete")

    def observe(self, route: str, status: int, seconds: float) -> None:
        """A call was answered, with status 0 not to its end."""
        self._calls.seconds[route, status].observe(seconds)

    def count_choice(self, choice: ReplicaChoice, ask: Ask) -> None:
        """A request is sent."""
        self._calls.num_prompt_tokens += ask.num_prompt_tokens
        self._calls.num_cached_tokens += choice.num_cached_tokens

    def render(self) -> bytes:
        """The exposition text."""
        return generate_latest(self._registry)

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(f"headrace_router_{name}", text, registry=self._registry)


class _CallCollector(Collector):
    """What each data call adds to: numbers, which cost it far less than counters of Prometheus, and are such only when
    somebody asks."""

    def __init__(self) -> None:
        self.num_prompt_tokens = 0
        self.num_cached_tokens = 0
        self.seconds = defaultdict[tuple[str, int], DurationHistogram](_make_histogram)
        """Of the calls, by route and status."""

    def collect(self) -> Iterator[Metric]:
        seconds = HistogramMetricFamily(_SECONDS, _SECONDS_HELP, labels=["route", "status"])
        for (route, status), each in self.seconds.items():
            seconds.add_metric([route, str(status)], buckets_of(each), each.total)
        yield seconds
        for name, text, value in (
            ("prompt_tokens", "tokens of prompts, as estimated", self.num_prompt_tokens),
            ("cached_tokens", "of these, expected in the chosen replica's cache", self.num_cached_tokens),
        ):
            yield CounterMetricFamily(f"headrace_router_{name}", text, value)


def _make_histogram() -> DurationHistogram:
    return DurationHistogram(_SECONDS, _SECONDS_HELP, _BUCKETS)


class _ReplicaCollector(Collector):
    """One sample of each for each replica."""

    def __init__(self, replicas: Replicas) -> None:
        self._replicas = replicas

    def collect(self) -> Iterator[Metric]:
        names = ["replica", "url"]
        healthy = GaugeMetricFamily("headrace_router_replica_is_healthy", "it may be chosen", labels=names)
        ready = GaugeMetricFamily("headrace_router_replica_is_ready", "a request would start at once", labels=names)
        current = GaugeMetricFamily("headrace_router_replica_is_current", "it holds the current weights", labels=names)
        requests = GaugeMetricFamily("headrace_router_replica_num_requests", "without an answer", labels=names)
        tokens = GaugeMetricFamily("headrace_router_replica_num_tokens", "expected of these", labels=names)
        sent = CounterMetricFamily("headrace_router_replica_requests", "sent there so far", labels=names)
        for each in self._replicas:
            labels = [each.id, each.url]
            healthy.add_metric(labels, each.is_healthy)
            ready.add_metric(labels, each.is_ready)
            current.add_metric(labels, each.is_current)
            requests.add_metric(labels, each.num_requests)
            tokens.add_metric(labels, each.num_tokens)
            sent.add_metric(labels, each.num_sent)
        yield from (healthy, ready, current, requests, tokens, sent)
