"""Tables and bars of the command line. The only module that imports rich; whoever draws nothing does not pay for it.

What the server says goes into `Text`, never into markup: a note with [brackets] in it is shown as it is.
"""

from __future__ import annotations

import os
from typing import Any, Final

import msgspec
from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from proxy.admin_client import AdminError, DecisionStatus, DeviceStatus, ModelStatus, QueueStatus, Status, WorkerStatus
from proxy.sizes import format_size

BAR_CELLS: Final = 24
PIPE_WIDTH: Final = 200
# how it is run (paths, arguments, environment) is for --json
PROFILE: Final = {
    "id": "model", "where": "where", "task": "task", "state": "state", "memory_bytes": "memory",
    "max_context": "context", "avg_ttft_ms": "ttft ms", "avg_tokens_per_sec": "tokens/s",
    "supports_streaming": "streams", "supports_tools": "tools", "strengths": "good at", "weaknesses": "bad at",
    "cost_tier": "cost", "licence": "licence",
}  # fmt: skip
CHIEF: Final = ("id", "where", "task", "state", "memory_bytes", "max_context", "cost_tier")
WIDE: Final = 160
DECISIONS: Final = 8
QUEUES: Final = 12  # the longest; a tenant's name is no secret to an operator
STYLES: Final = {
    "ready": "green", "loading": "yellow", "draining": "yellow", "stopping": "yellow", "suspending": "yellow",
    "waking": "yellow", "asleep": "cyan", "failed": "red", "cold": "dim",
}  # fmt: skip


def console() -> Console:
    """Standard output: a terminal as wide as it is, a pipe wide enough for every column."""
    out = Console(highlight=False)
    return out if out.is_terminal or "COLUMNS" in os.environ else Console(highlight=False, width=PIPE_WIDTH)


def status_view(status: Status) -> RenderableType:
    """Devices, models, workers, queue and the last decisions."""
    head = f"vramp {status.version} ({status.backend}), up {_ago(status.uptime_s)}, {status.config}"
    waiting = ", ".join(f"{group.count} {group.latency_class}" for group in status.waiting if group.count)
    parts: list[RenderableType] = [Text(head, style="dim"), _devices(status.devices), _models(status.models)]
    if status.worker_restarts is not None:
        parts.append(_workers(status.workers, status.worker_restarts))
    parts.append(Text(f"waiting: {waiting or 'nobody'}"))
    if status.queues:
        parts.append(_queues(status.queues))
    if status.decisions:
        parts += [Text(""), Text("last decisions", style="bold")]
        parts += [_decision(decision, status.uptime_s) for decision in status.decisions[-DECISIONS:]]
    return Group(*parts)


def message_view(message: str) -> RenderableType:
    """A line in place of the tables."""
    return Text(message, style="yellow")


def profiles(answer: bytes) -> list[dict[str, Any]]:
    """The models of GET /admin/api/models."""
    try:
        return msgspec.json.decode(answer, type=_Profiles).models
    except msgspec.DecodeError:
        raise AdminError("the server does not answer as vramp's operators' API does; name its admin_listen") from None


def models_view(models: list[dict[str, Any]], width: int) -> RenderableType:
    """The profiles as a table: only columns that at least one model fills, and on a narrow terminal the chief ones."""
    shown = PROFILE if width >= WIDE else {name: PROFILE[name] for name in CHIEF}
    titles = {name: title for name, title in shown.items() if any(_cell(name, model.get(name)) for model in models)}
    table = _table(*titles.values())
    for model in models:
        table.add_row(*(Text(_cell(name, model.get(name))) for name in titles))
    return table if models else Text("no models; add [[models]] to the configuration")


def progress_bar() -> Progress:
    """The bar of a load, with its note."""
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}", markup=False),
    )


class _Profiles(msgspec.Struct):
    models: list[dict[str, Any]]


def _devices(devices: tuple[DeviceStatus, ...]) -> Table:
    rows = [
        {
            "device": Text(device.name),
            "kind": Text(device.kind),
            "memory": _memory_bar(device),
            "of": _size(device.capacity_bytes),
            "held": _size(device.held_bytes),
            "used": _size(device.used_bytes),
            "reserved": _size(device.reserved_bytes),
            "foreign": _size(device.foreign_bytes),
            "free": _size(device.free_bytes),
            "note": _stale(device),
        }
        for device in devices
    ]
    return _filled(rows)


def _stale(device: DeviceStatus) -> Text:
    """Whoever looks must not take old figures for what is."""
    trouble = device.unreadable
    return Text() if trouble is None else Text(f"not read for {_ago(trouble.for_s)}: {trouble.why}", style="red")


def _memory_bar(device: DeviceStatus) -> Text:
    """Ours, then other people's, then what can still be promised: by the ledger, which knows of loads to come."""
    cell = max(device.capacity_bytes, 1) / BAR_CELLS
    taken = min(BAR_CELLS, max(0, round((device.capacity_bytes - device.free_bytes) / cell)))
    foreign = min(taken, round(device.foreign_bytes / cell))
    bar = Text("#" * (taken - foreign), style="green")
    return bar.append("=" * foreign, style="yellow").append("." * (BAR_CELLS - taken), style="dim")


def _models(models: tuple[ModelStatus, ...]) -> Table:
    rows = [
        {
            "model": Text(model.id + (" (pinned)" if model.pinned else "")),
            "state": Text(_state(model), style=STYLES.get(model.state, "")),
            "device": Text(model.device or ""),
            "memory": _size(model.measured_bytes or model.memory_bytes),
            "running": Text(str(model.in_flight)),
            "waiting": Text(str(model.waiting)),
            "eta": Text(_ago(model.eta_s)),
            "idle": Text(_ago(None if model.in_flight else model.last_used_s)),
            "loads": Text(str(model.loads)),
            "note": Text(model.note or ""),
        }
        for model in models
    ]
    return _filled(rows)


def _workers(workers: tuple[WorkerStatus, ...], restarts: int) -> Text:
    told = (f"{each.pid} ({each.in_flight} in flight{'' if each.serving else ', starting'})" for each in workers)
    return Text(f"workers: {', '.join(told) or 'none runs'}; restarts: {restarts}")


def _queues(queues: tuple[QueueStatus, ...]) -> Table:
    longest = sorted(queues, key=lambda queue: queue.count, reverse=True)[:QUEUES]
    rows = [
        {
            "queue of": Text(queue.model),
            "class": Text(queue.latency_class),
            "tenant": Text(queue.tenant or "(none)"),
            "waiting": Text(str(queue.count)),
        }
        for queue in longest
    ]
    return _filled(rows)


def _state(model: ModelStatus) -> str:
    loading = model.state == "loading" and model.progress is not None
    return f"{model.state} {model.progress:.0%}" if loading else model.state


def _decision(decision: DecisionStatus, now_s: float) -> Text:
    line = Text().append(f"  {_ago(max(0.0, now_s - decision.t_s)):>7} ago  ", style="dim")
    return line.append(decision.what, style="bold").append(f": {decision.why}")


def _size(size: int | None) -> Text:
    return Text(format_size(size) if size else "")


def _filled(rows: list[dict[str, Text]]) -> Table:
    """The rows as a table of the columns that say anything: on 80 columns an empty one costs a name its end."""
    names = [name for name in (rows[0] if rows else {}) if any(row[name].plain for row in rows)]
    table = _table(*names)
    for row in rows:
        table.add_row(*(row[name] for name in names))
    return table


def _table(*columns: str) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False, header_style="bold")
    for index, column in enumerate(columns):
        # a narrow terminal folds long words of the columns that follow, but a name cut short names nothing
        table.add_column(column, no_wrap=index == 0, overflow="fold")
    return table


def _cell(name: str, value: object) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    if name.endswith("_bytes") and isinstance(value, int):
        return format_size(value)
    return "" if value is None else str(value)


def _ago(seconds: float | None) -> str:
    """A length of time in its two largest units' worth: "12s", "3m05s", "2h10m", "4d03h"."""
    if seconds is None:
        return ""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02}s"
    if whole < 86_400:
        return f"{whole // 3600}h{whole % 3600 // 60:02}m"
    return f"{whole // 86_400}d{whole % 86_400 // 3600:02}h"
