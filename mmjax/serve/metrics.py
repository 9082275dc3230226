"""What Prometheus can ask."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from mmjax.engine.results import EngineStats

_SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000)
_GAUGES = {
    "running": "samples that hold a slot",
    "waiting": "samples that wait for one",
    "slots": "samples that can run at a time",
    "pages_used": "KV pages of running samples and cached prefixes",
    "pages_cached": "of these, the ones of cached prefixes alone",
    "pages_total": "KV pages there are",
}
_COUNTERS = {
    "prompt_tokens": "prompt tokens of admitted samples",
    "cached_prompt_tokens": "of these, the ones that were not computed again",
    "generated_tokens": "new tokens of all samples",
    "preemptions": "samples moved to the host for want of pages",
}


class Metrics:
    """The server's own counts, and the engine's as they stand when asked.

    Args:
      stats: Gives the engine's last figures.
      healthy: Whether the engine works.
    """

    def __init__(self, stats: Callable[[], EngineStats], healthy: Callable[[], bool]) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_EngineCollector(stats, healthy))
        self.requests = Counter(
            "mmjax_requests",
            "HTTP requests by endpoint and status; 499 is a client that hung up",
            ("endpoint", "status"),
            registry=self._registry,
        )
        self.first_token = Histogram(
            "mmjax_time_to_first_token_seconds",
            "from the request's arrival to its first token",
            buckets=_SECONDS,
            registry=self._registry,
        )
        self.duration = Histogram(
            "mmjax_request_duration_seconds",
            "from the request's arrival to its last token",
            buckets=_SECONDS,
            registry=self._registry,
        )

    def text(self) -> bytes:
        """All of them, in Prometheus' text format."""
        return generate_latest(self._registry)


class _EngineCollector(Collector):
    def __init__(self, stats: Callable[[], EngineStats], healthy: Callable[[], bool]) -> None:
        self._stats, self._healthy = stats, healthy

    def collect(self) -> Iterator[Metric]:
        yield GaugeMetricFamily("mmjax_healthy", "1 while the engine works", int(self._healthy()))
        stats = self._stats()
        for name, told in _GAUGES.items():
            yield GaugeMetricFamily(f"mmjax_{name}", told, getattr(stats, name))
        for name, told in _COUNTERS.items():
            yield CounterMetricFamily(f"mmjax_{name}", told, getattr(stats, name))
