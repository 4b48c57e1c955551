"""What Prometheus sees. Base units, the `vramp_` prefix, and labels from the configuration only.

A label's values are configured names, classes and status classes, never anything that a caller wrote: a mistyped model
name must not make a series for ever.

Requests are counted in plain lists, and prometheus_client's metrics are made of them when a page is asked for. Its own
counters lock at every step, which costs more than all else that ends a request; here one thread writes, and what a page
shows may be a request apart. Workers' numbers are added up on the proxy's page.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from itertools import accumulate

import msgspec
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector

from proxy.observe.outcome import Outcome

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_BOUNDS = (*(str(float(bound)) for bound in _SECONDS), "+Inf")
NO_MODEL = "other"


class Histogram(msgspec.Struct):
    """Counts of durations up to each bound, and their sum."""

    counts: list[int] = msgspec.field(default_factory=lambda: [0] * len(_BOUNDS))
    total_s: float = 0.0

    def observe(self, seconds: float) -> None:
        """Count one more."""
        self.counts[bisect_left(_SECONDS, seconds)] += 1
        self.total_s += seconds

    def add(self, other: Histogram) -> None:
        """Count all that another has counted."""
        self.counts = [mine + its for mine, its in zip(self.counts, other.counts, strict=True)]
        self.total_s += other.total_s

    def buckets(self, zeros: int = 0) -> list[tuple[str, float]]:
        """Cumulative, `zeros` observations of nothing among them."""
        return list(zip(_BOUNDS, (zeros + count for count in accumulate(self.counts)), strict=True))


class Series(msgspec.Struct):
    """What the requests of one (model, backend, class) add to."""

    statuses: dict[int, int] = {}
    duration: Histogram = msgspec.field(default_factory=Histogram)
    first_byte: Histogram = msgspec.field(default_factory=Histogram)

    def add(self, other: Series) -> None:
        """Add another's."""
        for status, count in other.statuses.items():
            self.statuses[status] = self.statuses.get(status, 0) + count
        self.duration.add(other.duration)
        self.first_byte.add(other.first_byte)


class OfModel(msgspec.Struct):
    """What the requests of one model add to, whoever answers them."""

    unwaited: int = 0  # waited for neither lease nor load: most do, and two sums are not worth their time then
    queue: Histogram = msgspec.field(default_factory=Histogram)
    load: Histogram = msgspec.field(default_factory=Histogram)
    upstream: Histogram = msgspec.field(default_factory=Histogram)
    input_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    stream_errors: int = 0

    def add(self, other: OfModel) -> None:
        """Add another's."""
        for mine, its in ((self.queue, other.queue), (self.load, other.load), (self.upstream, other.upstream)):
            mine.add(its)
        self.unwaited += other.unwaited
        self.input_tokens += other.input_tokens
        self.cached_tokens += other.cached_tokens
        self.output_tokens += other.output_tokens
        self.stream_errors += other.stream_errors


class UsageRows(msgspec.Struct):
    """How well usage rows are written: in memory now, attempts that failed, rows that found no room."""

    pending: int = 0
    failures: int = 0
    dropped: int = 0

    def add(self, other: UsageRows) -> None:
        """Add another's."""
        self.pending += other.pending
        self.failures += other.failures
        self.dropped += other.dropped


class Counts(msgspec.Struct):
    """Everything that one process has counted: numbers only, so that it can be sent to another and added up there."""

    in_flight: int = 0
    series: dict[tuple[str, str, str], Series] = {}
    models: dict[str, OfModel] = {}
    limited: dict[str, int] = {}
    usage_rows: UsageRows | None = None  # none are written

    def add(self, other: Counts) -> None:
        """Add another's."""
        self.in_flight += other.in_flight
        for key, series in other.series.items():
            self.series.setdefault(key, Series()).add(series)
        for name, model in other.models.items():
            self.models.setdefault(name, OfModel()).add(model)
        for limit, count in other.limited.items():
            self.limited[limit] = self.limited.get(limit, 0) + count
        if other.usage_rows is not None:
            self.usage_rows = self.usage_rows or UsageRows()
            self.usage_rows.add(other.usage_rows)

    def end(self) -> None:
        """The process has gone: its sums stay, and nothing of it is now."""
        self.in_flight = 0
        if self.usage_rows is not None:
            self.usage_rows.pending = 0


class Metrics(Collector):
    """The public listener's metrics. Those of `others`, other processes, are on the same page. Others add their own
    to `registry`."""

    def __init__(self, others: Callable[[], Iterable[Counts]] = tuple) -> None:
        self.registry = CollectorRegistry()
        self.counts = Counts()
        self.usage_rows: Callable[[], UsageRows | None] = lambda: None  # whoever writes some sets it
        self._others = others
        self._pairs: dict[tuple[str, str, str], tuple[Series, OfModel]] = {}
        self.registry.register(self)

    def started(self) -> None:
        """A request began."""
        self.counts.in_flight += 1

    def finished(self, outcome: Outcome) -> None:
        """A request ended. Called exactly once for each. Two microseconds."""
        self.counts.in_flight -= 1
        key = (outcome.model or NO_MODEL, outcome.backend or "none", outcome.latency_class or "none")
        try:
            series, model = self._pairs[key]
        except KeyError:
            series, model = self._new(key)
        statuses, status = series.statuses, outcome.status // 100
        statuses[status] = statuses.get(status, 0) + 1
        series.duration.observe(outcome.duration_s)
        if outcome.error is not None and outcome.status == 200:
            model.stream_errors += 1
        if outcome.limited:
            limited = self.counts.limited
            limited[outcome.limited] = limited.get(outcome.limited, 0) + 1
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

    def snapshot(self) -> Counts:
        """What was counted here so far. It goes on counting."""
        self.counts.usage_rows = self.usage_rows()
        return self.counts

    def render(self) -> tuple[bytes, str]:
        """The page and its content type."""
        return generate_latest(self.registry), CONTENT_TYPE_LATEST

    def _new(self, key: tuple[str, str, str]) -> tuple[Series, OfModel]:
        """Bounded: the journey sets these names only after routing found them in the configuration."""
        series = self.counts.series.setdefault(key, Series())
        made = self._pairs[key] = (series, self.counts.models.setdefault(key[0], OfModel()))
        return made

    def collect(self) -> Iterator[Metric]:
        """Everything, as prometheus_client wants it."""
        total = Counts()
        for counts in (self.snapshot(), *self._others()):
            total.add(counts)
        yield from _of_requests(total)
        yield from _of_models(total)
        if total.usage_rows is not None:
            yield from _of_usage(total.usage_rows)
        limited = CounterMetricFamily("vramp_limited", "Requests that a limit refused.", labels=("limit",))
        for limit, count in total.limited.items():
            limited.add_metric((limit,), count)
        yield limited
        yield GaugeMetricFamily("vramp_requests_in_flight", "Requests being answered.", value=total.in_flight)


def _of_requests(counts: Counts) -> Iterator[Metric]:
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
    for key, series in counts.series.items():
        for status, count in series.statuses.items():
            requests.add_metric((*key, f"{status}xx"), count)
        for metric, kept in ((duration, series.duration), (first_byte, series.first_byte)):
            metric.add_metric(key, buckets=kept.buckets(), sum_value=kept.total_s)
    return iter((requests, duration, first_byte))


def _of_usage(rows: UsageRows) -> Iterator[Metric]:
    yield GaugeMetricFamily("vramp_usage_rows_pending", "Usage rows in memory.", value=rows.pending)
    failures = "Attempts to write usage rows that failed."
    yield CounterMetricFamily("vramp_usage_write_failures", failures, value=rows.failures)
    yield CounterMetricFamily("vramp_usage_rows_dropped", "Usage rows that found no room.", value=rows.dropped)


def _of_models(counts: Counts) -> Iterator[Metric]:
    errors = CounterMetricFamily("vramp_stream_errors", "Streams that ended with an error event.", labels=("model",))
    waits = HistogramMetricFamily("vramp_wait_seconds", "What a request waited for.", labels=("model", "phase"))
    tokens = CounterMetricFamily("vramp_tokens", "Tokens used.", labels=("model", "type"))
    for name, model in counts.models.items():
        errors.add_metric((name,), model.stream_errors)
        phases = (("queue", model.queue, model.unwaited), ("load", model.load, model.unwaited))
        for phase, kept, zeros in (*phases, ("upstream", model.upstream, 0)):
            waits.add_metric((name, phase), buckets=kept.buckets(zeros), sum_value=kept.total_s)
        sums = (("input", model.input_tokens), ("cached", model.cached_tokens), ("output", model.output_tokens))
        for kind, count in sums:
            tokens.add_metric((name, kind), count)
    return iter((errors, waits, tokens))
