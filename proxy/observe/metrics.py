"""What Prometheus sees. Base units, the `vramp_` prefix, and labels from the configuration only.

A label's values are configured names, classes and status classes, never anything that a caller wrote: a mistyped model
name must not make a series for ever.

Requests are counted in plain lists, and prometheus_client's metrics are made of them when a page is asked for. Its own
counters lock at every step, which costs more than all else that ends a request; here one thread writes, and what a page
shows may be a request apart.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from itertools import accumulate

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector

from proxy.observe.outcome import Outcome

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_BOUNDS = (*(str(float(bound)) for bound in _SECONDS), "+Inf")
NO_MODEL = "other"


class _Histogram:
    """Counts of durations up to each bound, and their sum."""

    __slots__ = ("counts", "total_s")

    def __init__(self) -> None:
        self.counts = [0] * len(_BOUNDS)
        self.total_s = 0.0

    def observe(self, seconds: float) -> None:
        self.counts[bisect_left(_SECONDS, seconds)] += 1
        self.total_s += seconds

    def buckets(self, zeros: int = 0) -> list[tuple[str, float]]:
        """Cumulative, `zeros` observations of nothing among them."""
        return list(zip(_BOUNDS, (zeros + count for count in accumulate(self.counts)), strict=True))


class _Series:
    """What the requests of one (model, backend, class) add to."""

    __slots__ = ("duration", "first_byte", "statuses")

    def __init__(self) -> None:
        self.statuses: dict[int, int] = {}
        self.duration = _Histogram()
        self.first_byte = _Histogram()


class _Model:
    """What the requests of one model add to, whoever answers them."""

    __slots__ = (
        "cached_tokens",
        "input_tokens",
        "load",
        "output_tokens",
        "queue",
        "stream_errors",
        "unwaited",
        "upstream",
    )

    def __init__(self) -> None:
        self.unwaited = 0  # waited for neither lease nor load: most do, and two sums are not worth their time then
        self.queue, self.load, self.upstream = _Histogram(), _Histogram(), _Histogram()
        self.input_tokens = self.cached_tokens = self.output_tokens = 0
        self.stream_errors = 0


class Metrics(Collector):
    """The public listener's metrics. Others add their own to `registry`."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._in_flight = 0
        self._limited: dict[str, int] = {}
        self._series: dict[tuple[str, str, str], tuple[_Series, _Model]] = {}
        self._models: dict[str, _Model] = {}
        self.registry.register(self)

    def started(self) -> None:
        """A request began."""
        self._in_flight += 1

    def finished(self, outcome: Outcome) -> None:
        """A request ended. Called exactly once for each. Two microseconds."""
        self._in_flight -= 1
        key = (outcome.model or NO_MODEL, outcome.backend or "none", outcome.latency_class or "none")
        try:
            series, model = self._series[key]
        except KeyError:
            series, model = self._new(key)
        statuses, status = series.statuses, outcome.status // 100
        statuses[status] = statuses.get(status, 0) + 1
        series.duration.observe(outcome.duration_s)
        if outcome.error is not None and outcome.status == 200:
            model.stream_errors += 1
        if outcome.limited:
            self._limited[outcome.limited] = self._limited.get(outcome.limited, 0) + 1
        if outcome.first_byte_s is None:
            return
        series.first_byte.observe(outcome.first_byte_s)
        model.upstream.observe(outcome.upstream_s)
        if outcome.queue_s or outcome.load_s:
            model.queue.observe(outcome.queue_s)
            model.load.observe(outcome.load_s)
        else:
            model.unwaited += 1
        model.input_tokens += outcome.prompt_tokens or 0
        model.cached_tokens += outcome.cached_tokens or 0
        model.output_tokens += outcome.output_tokens or 0

    def render(self) -> tuple[bytes, str]:
        """The page and its content type."""
        return generate_latest(self.registry), CONTENT_TYPE_LATEST

    def _new(self, key: tuple[str, str, str]) -> tuple[_Series, _Model]:
        """Bounded: the journey sets these names only after routing found them in the configuration."""
        made = self._series[key] = (_Series(), self._models.setdefault(key[0], _Model()))
        return made

    def collect(self) -> Iterator[Metric]:
        """Everything, as prometheus_client wants it."""
        yield from self._of_requests()
        yield from self._of_models()
        limited = CounterMetricFamily("vramp_limited", "Requests that a limit refused.", labels=("limit",))
        for limit, count in self._limited.items():
            limited.add_metric((limit,), count)
        yield limited
        yield GaugeMetricFamily("vramp_requests_in_flight", "Requests being answered.", value=self._in_flight)

    def _of_requests(self) -> Iterator[Metric]:
        labels = ("model", "backend", "class")
        requests = CounterMetricFamily("vramp_requests", "Requests that ended.", labels=(*labels, "status_class"))
        duration = HistogramMetricFamily(
            "vramp_request_duration_seconds", "From the first byte of a request to its end.", labels=labels
        )
        first_byte = HistogramMetricFamily(
            "vramp_time_to_first_byte_seconds",
            "From the first byte of a request to the first byte of model output.",
            labels=labels,
        )
        for key, (series, _) in self._series.items():
            for status, count in series.statuses.items():
                requests.add_metric((*key, f"{status}xx"), count)
            for metric, kept in ((duration, series.duration), (first_byte, series.first_byte)):
                metric.add_metric(key, buckets=kept.buckets(), sum_value=kept.total_s)
        return iter((requests, duration, first_byte))

    def _of_models(self) -> Iterator[Metric]:
        errors = CounterMetricFamily(
            "vramp_stream_errors", "Streams that ended with an error event.", labels=("model",)
        )
        waits = HistogramMetricFamily("vramp_wait_seconds", "What a request waited for.", labels=("model", "phase"))
        tokens = CounterMetricFamily("vramp_tokens", "Tokens used.", labels=("model", "type"))
        for name, model in self._models.items():
            errors.add_metric((name,), model.stream_errors)
            phases = (("queue", model.queue, model.unwaited), ("load", model.load, model.unwaited))
            for phase, kept, zeros in (*phases, ("upstream", model.upstream, 0)):
                waits.add_metric((name, phase), buckets=kept.buckets(zeros), sum_value=kept.total_s)
            counts = (("input", model.input_tokens), ("cached", model.cached_tokens), ("output", model.output_tokens))
            for kind, count in counts:
                tokens.add_metric((name, kind), count)
        return iter((errors, waits, tokens))
