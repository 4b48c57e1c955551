"""What a reload changes: two configurations compared, for the line in the log and for `vramp check`'s readers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

import msgspec

from proxy.config import Config
from proxy.config_shape import label, show

# what the keeper opened before the proxy started, and what a running process reads only once
RESTART: Final = (
    "server.listen",
    "server.admin_listen",
    "server.workers",
    "server.fast_lane",
    "server.hang_limit_s",
    "devices.host_memory",
    "devices.gpu_reserve",
    "devices.nvidia",
    "devices.measure_interval_s",
    "devices.simulated",
    "store.dir",
    "store.usage",
    "observe.access_log",
    "observe.log_level",
)
# of those: what the keeper has, so that a new version of the proxy beside the old one (SIGUSR2) is not enough
KEEPERS: Final = ("server.listen", "server.admin_listen", "server.hang_limit_s", "store.dir")
RESTART_NOTE: Final = "(needs a restart; until then the old value holds)"
# what a restart begins or ends, and a reload changes
SWITCHED: Final = ("server.tls_cert", "server.tls_key")
# lists of secrets: literals may stand in them
SECRET: Final = ("api_key", "api_keys", "admin_keys")


def diff(old: Config, new: Config) -> list[str]:
    """A line for each key that a reload changes, those that need a restart marked; empty if nothing changes."""
    return list(_diff(msgspec.to_builtins(old), msgspec.to_builtins(new), ""))


def _diff(old: Any, new: Any, path: str) -> Iterator[str]:
    if old == new:
        return
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for name in dict.fromkeys([*old, *new]):
            yield from _entry(old, new, name, f"{path}.{name}" if path else name)
    elif _sections(old) and _sections(new) and (old or new):
        before, after = _named(old), _named(new)
        for name in dict.fromkeys([*before, *after]):
            yield from _entry(before, after, name, f"{path}[{name}]")
        if before == after:
            yield f"{path}: in another order"
    else:
        yield _changed(path, old, new)


def _entry(old: Mapping[str, Any], new: Mapping[str, Any], name: str, path: str) -> Iterator[str]:
    if name not in old:
        yield f"{path}: added{_note(path)}"
    elif name not in new:
        yield f"{path}: removed{_note(path)}"
    else:
        yield from _diff(old[name], new[name], path)


def _sections(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(item, Mapping) for item in value)


def _named(sections: Any) -> dict[str, Any]:
    """Sections by name; the second and later ones of a group carry their number."""
    named: dict[str, Any] = {}
    for index, section in enumerate(sections):
        name = label(section, index)
        named[f"{name}, {index}" if name in named else name] = section
    return named


def _changed(path: str, old: Any, new: Any) -> str:
    if path.rpartition(".")[2] in SECRET:
        return f"{path}: changed"
    note = f" {RESTART_NOTE}" if path in SWITCHED and None in (old, new) else _note(path)
    return f"{path}: {_shown(old)} -> {_shown(new)}{note}"


def _note(path: str) -> str:
    """What to add to the line of a key, or of a section like `devices.simulated[sim0]`."""
    return f" {RESTART_NOTE}" if path.partition("[")[0] in RESTART else ""


def _shown(value: Any) -> str:
    return "not set" if value is None else show(value)
