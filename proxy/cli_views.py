"""Tables and bars of the command line. The only module that imports rich; whoever draws nothing does not pay for it.

What the server says goes into `Text`, never into markup: a note with [brackets] in it is shown as it is.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec
from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from proxy.admin_client import AdminError, DecisionStatus, DeviceStatus, ModelStatus, Status
from proxy.sizes import format_size

BAR_CELLS: Final = 24
DECISIONS: Final = 8
STYLES: Final = {
    "ready": "green", "loading": "yellow", "draining": "yellow", "stopping": "yellow", "failed": "red", "cold": "dim",
}  # fmt: skip


def console() -> Console:
    """Standard output, with colours and widths where it is a terminal."""
    return Console(highlight=False, soft_wrap=False)


def status_view(status: Status) -> RenderableType:
    """Devices, models, queue and the last decisions."""
    head = f"vramp {status.version} ({status.backend}), up {_ago(status.uptime_s)}, {status.config}"
    waiting = ", ".join(f"{group.count} {group.latency_class}" for group in status.waiting if group.count)
    parts = [Text(head, style="dim"), _devices(status.devices), _models(status.models)]
    parts.append(Text(f"waiting: {waiting or 'nobody'}"))
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


def models_view(models: list[dict[str, Any]]) -> RenderableType:
    """The profiles as a table: only columns that at least one model fills."""
    table = _table()
    names = list(dict.fromkeys(name for model in models for name, value in model.items() if _cell(name, value)))
    for name in names:
        table.add_column(name.removesuffix("_bytes").replace("_", " "), overflow="fold")
    for model in models:
        table.add_row(*(Text(_cell(name, model.get(name))) for name in names))
    return table if names else Text("no models; add [[models]] to the configuration")


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
    table = _table("device", "kind", "memory", "used", "of", "reserved", "foreign", "free")
    for device in devices:
        sizes = (
            device.used_bytes,
            device.capacity_bytes,
            device.reserved_bytes,
            device.foreign_bytes,
            device.free_bytes,
        )
        table.add_row(Text(device.name), Text(device.kind), _memory_bar(device), *map(format_size, sizes))
    return table


def _memory_bar(device: DeviceStatus) -> Text:
    """Engines' memory, then other people's, then what is free; a device without a capacity has an empty bar."""
    cell = max(device.capacity_bytes, 1) / BAR_CELLS
    used = min(BAR_CELLS, round(device.used_bytes / cell))
    foreign = min(used, round(device.foreign_bytes / cell))
    bar = Text("#" * (used - foreign), style="green")
    return bar.append("=" * foreign, style="yellow").append("." * (BAR_CELLS - used), style="dim")


def _models(models: tuple[ModelStatus, ...]) -> Table:
    table = _table("model", "state", "device", "memory", "in flight", "waiting", "eta", "idle", "loads", "note")
    for model in models:
        memory = model.measured_bytes or model.memory_bytes
        idle = None if model.in_flight else model.last_used_s
        table.add_row(
            Text(model.id + (" (pinned)" if model.pinned else "")),
            Text(_state(model), style=STYLES.get(model.state, "")),
            Text(model.device or ""),
            "" if memory is None else format_size(memory),
            str(model.in_flight),
            str(model.waiting),
            _ago(model.eta_s),
            _ago(idle),
            str(model.loads),
            Text(model.note or ""),
        )
    return table


def _state(model: ModelStatus) -> str:
    loading = model.state == "loading" and model.progress is not None
    return f"{model.state} {model.progress:.0%}" if loading else model.state


def _decision(decision: DecisionStatus, now_s: float) -> Text:
    line = Text(f"  {_ago(max(0.0, now_s - decision.t_s)):>7} ago  ", style="dim")
    return line.append(decision.what, style="bold").append(f": {decision.why}")


def _table(*columns: str) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column)
    return table


def _cell(name: str, value: object) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    if isinstance(value, bool):
        return "yes" if value else ""
    if name.endswith("_bytes") and isinstance(value, int):
        return format_size(value)
    return "" if value is None or value == {} else str(value)


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
