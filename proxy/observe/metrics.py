"""What Prometheus sees. Base units, the `vramp_` prefix, and labels from the configuration only.

A label's values are configured names, classes and status classes, never anything that a caller wrote: a mistyped model
name must not make a series for ever.

Requests are counted in tallies (`ext.tally`), and prometheus_client's metrics are made of them when a page is asked
for. What it shows may be a request apart. Workers' numbers are added up on the proxy's page.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import accumulate

import msgspec
from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from ext.tally import Histogram, Tally
from proxy.observe.outcome import Outcome

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_BOUNDS = (*(str(float(bound)) for bound in _SECONDS), "+Inf")
_HISTOGRAMS = ("duration", "first_byte", "queue", "load", "upstream")
NO_MODEL = "other"


class Durations(msgspec.Struct):
    """Counts of durations up to each bound, and their sum."""

    counts: list[int] = msgspec.field(default_factory=lambda: [0] * len(_BOUNDS))
    total_s: float = 0.0

    @classmethod
    def of(cls, histogram: Histogram) -> Durations:
        """What was counted so far."""
        return cls(histogram.counts, histogram.total_s)

    def add(self, other: Durations) -> None:
        """Count all that another has counted."""
        self.counts = [mine + its for mine, its in zip(self.counts, other.counts, strict=True)]
        self.total_s += other.total_s

    def buckets(self, zeros: int = 0) -> list[tuple[str, float]]:
        """Cumulative, `zeros` observations of nothing among them."""
        return list(zip(_BOUNDS, (zeros + count for count in accumulate(self.counts)), strict=True))


class Series(msgspec.Struct):
    """What the requests of one (model, backend, class) came to: a tally's numbers."""

    statuses: dict[int, int] = {}
    duration: Durations = msgspec.field(default_factory=Durations)
    first_byte: Durations = msgspec.field(default_factory=Durations)
    queue: Durations = msgspec.field(default_factory=Durations)
    load: Durations = msgspec.field(default_factory=Durations)
    upstream: Durations = msgspec.field(default_factory=Durations)
    unwaited: int = 0  # waited for neither lease nor load
    input_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    errors: int = 0  # after the answer had begun

    @classmethod
    def of(cls, tally: Tally) -> Series:
        """What was counted so far."""
        return cls(
            statuses=tally.statuses,
            unwaited=tally.unwaited,
            input_tokens=tally.input_tokens,
            cached_tokens=tally.cached_tokens,
            output_tokens=tally.output_tokens,
            errors=tally.errors,
            **{name: Durations.of(getattr(tally, name)) for name in _HISTOGRAMS},
        )

    def add(self, other: Series) -> None:
        """Add another's."""
        for status, count in other.statuses.items():
            self.statuses[status] = self.statuses.get(status, 0) + count
        for name in _HISTOGRAMS:
            getattr(self, name).add(getattr(other, name))
        self.unwaited += other.unwaited
        self.input_tokens += other.input_tokens
        self.cached_tokens += other.cached_tokens
        self.output_tokens += other.output_tokens
        self.errors += other.errors


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
    limited: dict[str, int] = {}
    usage_rows: UsageRows | None = None  # none are written

    def add(self, other: Counts) -> None:
        """Add another's."""
        self.in_flight += other.in_flight
        for key, series in other.series.items():
            self.series.setdefault(key, Series()).add(series)
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
        self.limited: dict[str, int] = {}
        # whoever answers requests and writes rows sets these
        self.in_flight: Callable[[], int] = lambda: 0
        self.usage_rows: Callable[[], UsageRows | None] = lambda: None
        self._others = others
        self._tallies: dict[tuple[str, str, str], Tally] = {}
        self.registry.register(self)

    def tally(self, outcome: Outcome) -> Tally:
        """What requests like this one add to. Bounded: the journey sets these names only after routing found them in
        the configuration."""
        key = (outcome.model or NO_MODEL, outcome.backend or "none", outcome.latency_class or "none")
        tally = self._tallies.get(key)
        if tally is None:
            tally = self._tallies[key] = Tally(_SECONDS)
        return tally

    def finished(self, outcome: Outcome) -> None:
        """A request ended. Called exactly once for each that its lane does not count by itself. A microsecond."""
        tally = self.tally(outcome)
        tally.ended(outcome.status, outcome.duration_s)
        if outcome.error is not None and outcome.status == 200:
            tally.failed()
        if outcome.limited:
            self.limited[outcome.limited] = self.limited.get(outcome.limited, 0) + 1
        if outcome.first_byte_s is None:
            return
        tally.answered(outcome.first_byte_s, outcome.upstream_s, outcome.queue_s, outcome.load_s)
        tally.used(outcome.prompt_tokens or 0, outcome.cached_tokens or 0, outcome.output_tokens or 0)

    def snapshot(self) -> Counts:
        """What was counted here so far."""
        return Counts(
            in_flight=self.in_flight(),
            series={key: Series.of(tally) for key, tally in self._tallies.items()},
            limited=dict(self.limited),
            usage_rows=self.usage_rows(),
        )

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
    ended = "Requests that ended. One whose client left first is 4xx."
    requests = CounterMetricFamily("vramp_requests", ended, labels=(*labels, "status_class"))
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
    models: dict[str, Series] = {}
    for (name, _, _), series in counts.series.items():
        models.setdefault(name, Series()).add(series)
    for name, model in models.items():
        errors.add_metric((name,), model.errors)
        phases = (("queue", model.queue, model.unwaited), ("load", model.load, model.unwaited))
        for phase, kept, zeros in (*phases, ("upstream", model.upstream, 0)):
            waits.add_metric((name, phase), buckets=kept.buckets(zeros), sum_value=kept.total_s)
        sums = (("input", model.input_tokens), ("cached", model.cached_tokens), ("output", model.output_tokens))
        for kind, count in sums:
            tokens.add_metric((name, kind), count)
    return iter((errors, waits, tokens))
