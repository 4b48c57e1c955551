"""What Prometheus sees. Base units, the `vramp_` prefix, and labels from the configuration only.

A label's values are configured names, classes and status classes, never anything that a caller wrote: a mistyped model
name must not make a series for ever. Children are looked up once and kept, since `labels()` costs more than `inc()`.
"""

from __future__ import annotations

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from proxy.observe.outcome import Outcome

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
NO_MODEL = "other"


class _Series:
    """The children of one (model, backend, class): everything that a finished request adds to."""

    def __init__(self, metrics: Metrics, model: str, backend: str, latency_class: str) -> None:
        self._requests = metrics.requests
        self._labels = (model, backend, latency_class)
        self._by_status: dict[str, Counter] = {}
        self.duration = metrics.duration.labels(*self._labels)
        self.first_byte = metrics.first_byte.labels(*self._labels)
        self.waits = {phase: metrics.wait.labels(model, phase) for phase in ("queue", "load", "upstream")}
        self.tokens = {kind: metrics.tokens.labels(model, kind) for kind in ("input", "cached", "output")}

    def requests(self, status: int) -> Counter:
        name = f"{status // 100}xx"
        child = self._by_status.get(name)
        if child is None:
            child = self._by_status[name] = self._requests.labels(*self._labels, name)
        return child


class Metrics:
    """The public listener's metrics. Others add their own to `registry`."""

    def __init__(self) -> None:
        # A `_created` series beside each counter would double the page for nothing that rate() needs.
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry()
        labels = ("model", "backend", "class")
        self.requests = Counter(
            "vramp_requests", "Requests that ended.", (*labels, "status_class"), registry=self.registry
        )
        self.errors = Counter(
            "vramp_stream_errors", "Streams that ended with an error event.", ("model",), registry=self.registry
        )
        self.duration = Histogram(
            "vramp_request_duration_seconds",
            "From the first byte of a request to its end.",
            labels,
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.first_byte = Histogram(
            "vramp_time_to_first_byte_seconds",
            "From the first byte of a request to the first byte of model output.",
            labels,
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.wait = Histogram(
            "vramp_wait_seconds",
            "What a request waited for.",
            ("model", "phase"),
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.tokens = Counter("vramp_tokens", "Tokens used.", ("model", "type"), registry=self.registry)
        self.in_flight = Gauge("vramp_requests_in_flight", "Requests being answered.", registry=self.registry)
        self._series: dict[tuple[str, str, str], _Series] = {}

    def started(self) -> None:
        """A request began."""
        self.in_flight.inc()

    def finished(self, outcome: Outcome) -> None:
        """A request ended. Called exactly once for each."""
        self.in_flight.dec()
        series = self._of(outcome)
        series.requests(outcome.status).inc()
        series.duration.observe(outcome.duration_s)
        if outcome.error is not None and outcome.status == 200:
            self.errors.labels(outcome.model or NO_MODEL).inc()
        if outcome.first_byte_s is None:
            return
        series.first_byte.observe(outcome.first_byte_s)
        for phase, seconds in (("queue", outcome.queue_s), ("load", outcome.load_s), ("upstream", outcome.upstream_s)):
            series.waits[phase].observe(seconds)
        for kind, count in (
            ("input", outcome.prompt_tokens),
            ("cached", outcome.cached_tokens),
            ("output", outcome.output_tokens),
        ):
            if count:
                series.tokens[kind].inc(count)

    def render(self) -> tuple[bytes, str]:
        """The page and its content type."""
        return generate_latest(self.registry), CONTENT_TYPE_LATEST

    def _of(self, outcome: Outcome) -> _Series:
        """Bounded: the journey sets these names only after routing found them in the configuration."""
        key = (outcome.model or NO_MODEL, outcome.backend or "none", outcome.latency_class or "none")
        series = self._series.get(key)
        if series is None:
            series = self._series[key] = _Series(self, *key)
        return series
