"""What the scheduler does, as Prometheus metrics: counters fed by its events, gauges read when asked.

Labels are model ids of the configuration, device names, latency classes and states: bounded by the configuration.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from scheduler.commands import Command, Load, Refuse, Stop
from scheduler.core import Core
from scheduler.events import EngineFailed, EngineReady, Event
from scheduler.model import LatencyClass, Residency

LOAD_SECONDS = (0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300)


class SchedulerMetrics:
    """`observe` is the driver's; it costs a match and, on rare events, a counter."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._loads = Counter("vramp_model_loads", "Engine starts begun.", ["model"], registry=registry)
        self._stops = Counter("vramp_model_stops", "Engines stopped.", ["model", "cause"], registry=registry)
        self._failures = Counter(
            "vramp_model_failures", "Engines that failed to start or died.", ["model"], registry=registry
        )
        self._refusals = Counter(
            "vramp_scheduler_refusals", "Requests the scheduler turned away.", ["code"], registry=registry
        )
        self._load_seconds = Histogram(
            "vramp_model_load_seconds", "From asked for to ready.", ["model"], buckets=LOAD_SECONDS, registry=registry
        )

    def observe(self, happened: Event | Command) -> None:
        """Count what is worth counting."""
        match happened:
            case Load(_, model):
                self._loads.labels(model).inc()
            case Stop(engine_id, cause):
                self._stops.labels(_model_of(engine_id), cause.value).inc()
            case EngineFailed(engine_id):
                self._failures.labels(_model_of(engine_id)).inc()
            case EngineReady(_, model, adopted=False):
                self._load_seconds.labels(model).observe(happened.load_seconds)
            case Refuse(_, code):
                self._refusals.labels(code).inc()
            case _:
                pass


class SchedulerGauges(Collector):
    """Gauges made from the core's state at scrape time: nothing to keep current, nothing that can drift."""

    def __init__(self, core: Callable[[], Core], unreadable: Callable[[], Container[str]]) -> None:
        """`unreadable` says which devices cannot be read."""
        self._core = core
        self._unreadable = unreadable

    def describe(self) -> Iterable[Metric]:
        """Nothing in advance: the registry would otherwise collect once at registration."""
        return []

    def collect(self) -> Iterable[Metric]:
        """Residency, queues and memory as they are now. O(models)."""
        core = self._core()
        residency = GaugeMetricFamily(
            "vramp_model_residency", "1 for the state a model is in.", labels=["model", "state"]
        )
        in_flight = GaugeMetricFamily("vramp_model_in_flight", "Requests holding a lease.", labels=["model"])
        waiting = GaugeMetricFamily("vramp_model_waiting", "Requests waiting for a lease.", labels=["model", "class"])
        for name, model in core.models.items():
            for state in Residency:
                residency.add_metric([name, state.value], float(model.state is state))
            in_flight.add_metric([name], float(model.engine.in_flight if model.engine else 0))
            for latency_class in LatencyClass:
                waiting.add_metric([name, latency_class.name.lower()], float(model.queue.count(latency_class)))
        yield from (residency, in_flight, waiting)
        yield from self._devices(core)
        yield from self._anticipation(core)

    def _anticipation(self, core: Core) -> Iterable[Metric]:
        guesses = CounterMetricFamily(
            "vramp_guesses", "Models loaded or woken before anybody asked, by whether somebody did.", labels=["outcome"]
        )
        guesses.add_metric(["right"], float(core.placement.guesses.right))
        guesses.add_metric(["wrong"], float(core.placement.guesses.wrong))
        held = CounterMetricFamily("vramp_swaps_held", "Swaps held back because the victim was about to be used.")
        held.add_metric([], float(core.placement.holding.held))
        yield from (guesses, held)

    def _devices(self, core: Core) -> Iterable[Metric]:
        memory = GaugeMetricFamily("vramp_device_memory_bytes", "Memory of a device by use.", labels=["device", "use"])
        unreadable = GaugeMetricFamily(
            "vramp_device_unreadable", "1 while a device cannot be read, and its figures are old.", labels=["device"]
        )
        silent = self._unreadable()
        for name, ledger in core.devices.items():
            unreadable.add_metric([name], float(name in silent))
            uses = {
                "capacity": ledger.spec.capacity_bytes,
                "reserved": ledger.spec.reserve_bytes,
                "overhead": ledger.overhead,
                "foreign": ledger.foreign,
                "held": ledger.held,
                "free": ledger.free,
            }
            for use, size in uses.items():
                memory.add_metric([name, use], float(size))
        yield from (memory, unreadable)


def _model_of(engine_id: str) -> str:
    return engine_id.rpartition("#")[0]
