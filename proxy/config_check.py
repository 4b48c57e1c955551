"""Does the configuration make sense as a whole? What one key alone cannot tell: names, kinds, places, sums."""

from __future__ import annotations

import ipaddress
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from proxy.config import CLASSES, LOCAL_KINDS, BackendConfig, Config, DevicesConfig, ModelConfig, ServerConfig
from proxy.config_shape import Problem, inside, nearest, parse_listen, show
from proxy.sizes import byte_size, format_size
from proxy.tls import tls_problems

DEVICE_KINDS = ("nvidia", "host", "simulated")
GPU = re.compile(r"gpu\d+")


def meaning_problems(config: Config) -> list[Problem]:
    """Every contradiction in a configuration of the right shape. Looks at model folders, starts nothing."""
    backends = {backend.name: backend for backend in config.backends}
    problems = [*_server(config), *_classes(config), *_devices(config.devices), *_backends(config)]
    for model in config.models:
        problems += _model(model, backends, config.devices)
    problems += _groups(config.models, backends)
    problems += _limits(config)
    problems += _pinned(config.models, backends, config.devices)
    return problems


def worker_count(server: ServerConfig) -> int:
    """How many processes serve. "auto": one for each core that we may use, less one for the scheduler, the engines and
    the system; at least 1."""
    return max(1, len(os.sched_getaffinity(0)) - 1) if isinstance(server.workers, str) else server.workers


def is_loopback(host: str) -> bool:
    """Whether only this machine can connect to an address bound to `host`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def clash(one: str, other: str) -> bool:
    """Whether one port cannot be listened on at both: the same address, or one that stands for the other."""
    return any(_covers(a, b) or _covers(b, a) for a in _addresses(one) for b in _addresses(other))


def _addresses(host: str) -> tuple[str, ...]:
    return ("127.0.0.1", "::1") if host == "localhost" else (host,)


def _covers(one: str, other: str) -> bool:
    if one == other:
        return True
    try:
        address = ipaddress.ip_address(one)
        return address.is_unspecified and ipaddress.ip_address(other).version == address.version
    except ValueError:
        return False  # a name, of which only the system knows what it stands for


def open_problems(server: ServerConfig, http: Iterable[str], admin: Iterable[str]) -> Iterator[Problem]:
    """What is open to others and asks nobody for a key. The addresses are those that are listened on, or will be: a
    running server goes on with the ones it began with, and systemd may have opened others than the file says."""
    for name, keys, addresses in (("listen", "api_keys", http), ("admin_listen", "admin_keys", admin)):
        for address in addresses:
            if not is_loopback(parse_listen(address)[0]) and not getattr(server, keys):
                remedy = f'set server.{keys}, e.g. ["file:keys.txt"], or listen on 127.0.0.1'
                says = f"is {show(address)}, open to others, and server.{keys} is empty; {remedy}"
                yield Problem(f"server.{name}", says)


def _server(config: Config) -> Iterator[Problem]:
    server = config.server
    yield from open_problems(server, [server.listen], [server.admin_listen])
    yield from tls_problems(server)
    (host, port), (admin_host, admin_port) = parse_listen(server.listen), parse_listen(server.admin_listen)
    if port == admin_port != 0 and clash(host, admin_host):
        says = f"is {show(server.admin_listen)}, and server.listen has that port ({server.listen}); use another port"
        yield Problem("server.admin_listen", says)


def _classes(config: Config) -> Iterator[Problem]:
    for name in config.classes:
        if name not in CLASSES:
            yield Problem(f"classes.{name}", f"is not a latency class; {nearest(name, CLASSES)}")


def _devices(devices: DevicesConfig) -> Iterator[Problem]:
    for name in _twice([device.name for device in devices.simulated]):
        yield Problem(f"devices.simulated[{name}].name", "is given twice; rename one of them")
    for device in devices.simulated:
        if device.name in DEVICE_KINDS or GPU.fullmatch(device.name):
            yield Problem(
                f"devices.simulated[{device.name}].name", "stands for real devices; use another name, e.g. sim0"
            )


def _backends(config: Config) -> Iterator[Problem]:
    for name in _twice([backend.name for backend in config.backends]):
        yield Problem(f"backends[{name}].name", "is given twice; rename one of them")
    for backend in config.backends:
        at = f"backends[{backend.name}]"
        if backend.kind == "openai" and backend.base_url is None:
            yield Problem(f"{at}.base_url", 'is missing; kind openai needs it, e.g. "https://llm.example.com/v1"')
        if backend.kind == "openai" and backend.max_connections < (workers := worker_count(config.server)):
            says = f"is {backend.max_connections} for {workers} workers; use at least one for each"
            yield Problem(f"{at}.max_connections", says)
        if backend.kind != "openai" and backend.base_url is not None:
            yield Problem(f"{at}.base_url", f"is for kind openai only, and kind is {backend.kind}; remove it")
        yield from _backend_device(at, backend, config.devices)


def _backend_device(at: str, backend: BackendConfig, devices: DevicesConfig) -> Iterator[Problem]:
    known = (*DEVICE_KINDS, *(device.name for device in devices.simulated))
    gpu = (
        backend.device is not None and GPU.fullmatch(backend.device) is not None
    )  # whether it is there, preflight says
    if backend.device is not None and backend.device not in known and not gpu:
        yield Problem(f"{at}.device", f"is {show(backend.device)}; {nearest(backend.device, known)}")
    elif (gpu or backend.device == "nvidia") and not devices.nvidia:
        yield Problem(
            f"{at}.device", f'is "{backend.device}", and devices.nvidia is false; set it to true, or use host'
        )
    elif backend.kind == "simulated" and (gpu or backend.device in ("nvidia", "host")):
        yield Problem(f"{at}.device", f"is {show(backend.device)}; a simulated engine needs a simulated device")
    elif (backend.kind == "simulated" or backend.device == "simulated") and not devices.simulated:
        yield Problem(at, "uses simulated devices, and there is none; add [[devices.simulated]] with name and memory")


def _model(model: ModelConfig, backends: dict[str, BackendConfig], devices: DevicesConfig) -> Iterator[Problem]:
    at = f"models[{model.id}]"
    backend = backends.get(model.backend)
    if backend is None:
        yield Problem(f"{at}.backend", f"is {show(model.backend)}; {nearest(model.backend, backends)}")
        return
    if backend.kind == "vllm":
        yield from _folder(at, model)
    if backend.kind == "command" and not model.command:
        yield Problem(f"{at}.command", 'is missing; kind command needs it, e.g. ["llama-server", "--port", "${PORT}"]')
    if model.path is None and any("${MODEL_PATH}" in part for part in (*model.command, *model.env.values())):
        yield Problem(f"{at}.path", "is missing; ${MODEL_PATH} in command or env stands for it")
    if backend.kind in ("command", "simulated") and model.memory_bytes is None:
        yield Problem(f"{at}.memory_bytes", f'is missing; kind {backend.kind} needs it, e.g. "6GiB"')
    if backend.kind != "command" and model.command:
        yield Problem(f"{at}.command", f"is for kind command only, and kind is {backend.kind}; remove it")
    largest = max(_budgets(backend, devices), default=None)
    if largest is not None and _memory(model) > largest:
        yield Problem(
            f"{at}.memory_bytes",
            f"is {format_size(_memory(model))}, and the largest device for it has {format_size(largest)}; "
            "use a smaller model, or raise the device's memory",
        )


def _folder(at: str, model: ModelConfig) -> Iterator[Problem]:
    if model.path is None:
        yield Problem(f"{at}.path", "is missing; kind vllm needs it: the folder with config.json and the weights")
    elif not Path(model.path).is_dir():
        yield Problem(f"{at}.path", f"is {show(model.path)}, which is no folder; put the model there, or name another")
    elif not (Path(model.path) / "config.json").is_file():
        yield Problem(f"{at}.path", f"is {show(model.path)}, which has no config.json; name a model's own folder")


def _groups(models: tuple[ModelConfig, ...], backends: dict[str, BackendConfig]) -> Iterator[Problem]:
    local = [model.id for model in models if model.backend in backends and backends[model.backend].kind in LOCAL_KINDS]
    for name in _twice(local):
        yield Problem(
            f"models[{name}]", "is given for two local engines; keep one of them, or give the other its own id"
        )


def _limits(config: Config) -> Iterator[Problem]:
    """Of models only: which keys there are is known when the secrets are read."""
    ids = {model.id for model in config.models}
    for name in config.limits.models:
        if name not in ids:
            yield Problem(inside("limits.models", name), f"is no model; {nearest(name, ids)}")


def _pinned(
    models: tuple[ModelConfig, ...], backends: dict[str, BackendConfig], devices: DevicesConfig
) -> Iterator[Problem]:
    """Pinned models are never evicted, so those of one place must fit it together."""
    places: dict[tuple[int, ...], list[ModelConfig]] = {}
    for model in models:
        if model.pinned and model.backend in backends:
            places.setdefault(_budgets(backends[model.backend], devices), []).append(model)
    for budgets, pinned in places.items():
        needed = sum(map(_memory, pinned))
        # one alone that is too large was reported with its own figures
        if budgets and needed > sum(budgets) and len(pinned) > 1:
            names = ", ".join(model.id for model in pinned)
            says = f"together need {format_size(needed)}, and there is {format_size(sum(budgets))}; unpin one"
            yield Problem(f"models[{names}].pinned", says)


def _budgets(backend: BackendConfig, devices: DevicesConfig) -> tuple[int, ...]:
    """Memory of the devices that a backend may use, where the file states it; empty where only the machine knows."""
    if backend.kind == "openai":
        return ()
    simulated = {device.name: byte_size(device.memory) for device in devices.simulated}
    if backend.device in simulated:
        return (simulated[backend.device],)
    if backend.kind == "simulated" or backend.device == "simulated":
        return tuple(simulated.values())
    on_host = backend.device == "host" or (backend.device is None and not devices.nvidia)
    return (byte_size(devices.host_memory),) if on_host and devices.host_memory is not None else ()


def _memory(model: ModelConfig) -> int:
    return byte_size(model.memory_bytes or 0)


def _twice(names: list[str]) -> list[str]:
    return [name for name, count in Counter(names).items() if count > 1]
