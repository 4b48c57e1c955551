"""The page of metrics, docs/metrics.md: read off a registry to which everything has happened once."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Final

from prometheus_client import Metric

from proxy.config import ModelLimitsConfig
from proxy.observe.metrics import Metrics, UsageRows
from proxy.observe.outcome import Outcome
from proxy.observe.scheduler_metrics import SchedulerGauges, SchedulerMetrics
from scheduler.commands import Load, Refuse, Stop
from scheduler.core import Core
from scheduler.engines.vllm_metrics import METRICS
from scheduler.events import EngineFailed, EngineReady
from scheduler.model import DeviceSpec, ModelSpec, RefusalCode, StopCause

HEAD: Final = """\
# Metrics

`GET /metrics` on `[server] admin_listen`, in Prometheus's text format: one page for all workers, seconds and bytes.
Labels have values of the configuration and of this page only, never a caller's words; what has no model or no backend
is `other` and `none`. A histogram has `_bucket`, `_sum` and `_count` behind its name.

Written from the code by `python -m proxy.reference`.
"""
ENGINES: Final = """
## Of engines

vLLM's own, under our names, with the labels that vLLM gives them and `model`; asked for when the page is, for half a
second at most. An engine that does not answer by then is left out.

| metric | vLLM's name | meaning |
| --- | --- | --- |"""
CONFIGURED: Final = frozenset({"model", "backend", "class", "device"})  # labels whose values a configuration names


def metrics_page() -> str:
    """Every metric with its type, its labels and what it means."""
    rows = ["| metric | type | labels | meaning |", "| --- | --- | --- | --- |"]
    rows += [_row(metric) for metric in sorted(_everything(), key=lambda each: each.name)]
    engines = [f"| `{ours}` | `{theirs}` | {meaning} |" for theirs, (ours, meaning) in METRICS.items()]
    return "\n".join([HEAD, *rows, ENGINES, *engines]) + "\n"


def _everything() -> Iterator[Metric]:
    metrics = Metrics()
    metrics.usage_rows = UsageRows
    for of, limit in product(("keys", "models"), ModelLimitsConfig.__struct_fields__):
        metrics.finished(Outcome("", "POST", "", 0.0, model="m", status=429, limited=f"{of}.{limit}"))
    scheduler = SchedulerMetrics(metrics.registry)
    scheduler.observe(Load("m#1", "m", "d", ""))
    scheduler.observe(EngineReady("m#1", "m", "d", 1.0))
    scheduler.observe(EngineFailed("m#1", ""))
    for cause in StopCause:
        scheduler.observe(Stop("m#1", cause, ""))
    for code in RefusalCode:
        scheduler.observe(Refuse(1, code, ""))
    core = Core([DeviceSpec("d", "simulated", 1)], [ModelSpec("m", 1, "simulated")])
    metrics.registry.register(SchedulerGauges(lambda: core, dict))
    yield from metrics.registry.collect()


def _row(metric: Metric) -> str:
    name = f"{metric.name}_total" if metric.type == "counter" else metric.name
    values: dict[str, dict[str, None]] = {}  # in order
    for sample in metric.samples:
        for label, value in sample.labels.items():
            values.setdefault(label, {})[value] = None
    labels = "; ".join(_label(label, list(found)) for label, found in values.items() if label != "le")
    return f"| `{name}` | {metric.type} | {labels} | {metric.documentation} |"


def _label(name: str, values: list[str]) -> str:
    if name == "status_class":
        return f"`{name}`: 2xx, 4xx, 5xx"
    return f"`{name}`" if name in CONFIGURED else f"`{name}`: {', '.join(values)}"
