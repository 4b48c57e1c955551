"""What would fail later, said now: ports, disk, memory, compiler, vLLM, model folders, open files.

Each check looks at one thing, takes milliseconds and starts nothing. A finding has its remedy in the same line; a fatal
one means that serving could not work at all.
"""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import socket
import sys
from collections.abc import Collection, Iterator, Sequence
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path
from typing import Final, NamedTuple
from urllib.parse import urlsplit

import psutil

from ext.backend import MODULES
from proxy.assembly import devices_of, locals_of
from proxy.catalog.catalog import Catalog
from proxy.config import REAL_KINDS, BackendConfig, Config, ConfigError, ModelConfig
from proxy.config_check import clash, worker_count
from proxy.config_shape import parse_listen
from proxy.sizes import byte_size, format_size
from proxy.tls import tls_warnings
from scheduler.devices.discover import discover
from scheduler.devices.host import Cgroup, available_bytes
from scheduler.model import DeviceSpec

COMPILERS: Final = ("c++", "g++", "clang++")
DISK_NEEDED: Final = 64 << 20
DISK_WANTED: Final = 1 << 30
DESCRIPTORS_WANTED: Final = 4096
TOKENIZERS: Final = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "tekken.json", "vocab.txt")
WEIGHTS: Final = ("*.safetensors", "*.bin", "*.pt", "*.gguf")
LFS_POINTER: Final = b"version https://git-lfs"


class Finding(NamedTuple):
    """One thing wrong with this machine for this configuration."""

    says: str
    fatal: bool = True


class HostMemory(NamedTuple):
    """Bytes of this machine, or of the cgroup we are in: all there is, and what is free now."""

    total: int
    available: int


def preflight(config: Config, *, ports: bool = True, passed: Collection[str] = ()) -> list[Finding]:
    """Everything found, fatal ones first. Without `ports` for a configuration whose server may be running already;
    listeners that are `passed` to us (http, admin) hold their ports for us."""
    folders = list(check_models(config))
    findings = [
        *(check_port("server.listen", config.server.listen) if ports and "http" not in passed else ()),
        *(check_port("server.admin_listen", config.server.admin_listen) if ports and "admin" not in passed else ()),
        *check_workers(worker_count(config.server)),
        *check_disk(Path(config.store.dir)),
        *check_files(config),
        *check_memory(config, device_specs(config), host_memory()),
        *(Finding(warning, fatal=False) for warning in tls_warnings(config.server, datetime.now(UTC))),
        *check_vllm(config),
        *check_backends(config),
        *check_commands(config),
        *(folders or check_engines(config)),  # a folder with a hole has been named
        *check_descriptors(resource.getrlimit(resource.RLIMIT_NOFILE)[0]),
    ]
    return sorted(findings, key=lambda finding: not finding.fatal)


def check_port(key: str, address: str) -> Iterator[Finding]:
    """Whether the address can be listened on; who holds it, where /proc tells."""
    host, port = parse_listen(address)
    try:
        family, kind, proto, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError:
        yield Finding(f'{key} is "{address}": {host} is no address or known name; use one of this machine\'s addresses')
        return
    try:
        with socket.socket(family, kind, proto) as probe:
            # as the real listener does: a port in TIME_WAIT is free
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(place)
            probe.listen(1)
    except OSError as error:
        yield Finding(_port_words(key, address, port, error))


def _port_words(key: str, address: str, port: int, error: OSError) -> str:
    option = "--listen" if key == "server.listen" else "--admin-listen"
    if error.errno == errno.EADDRINUSE:
        return f"port {port} ({key}) is taken by {_holder(port)}; stop that, or choose another with {option}"
    if error.errno == errno.EACCES:
        return f"port {port} ({key}) is for root only; use one above 1023 with {option}, or grant CAP_NET_BIND_SERVICE"
    return f'{key} is "{address}", which cannot be listened on ({error.strerror}); use an address of this machine'


def _holder(port: int) -> str:
    """The process that listens on a port; other users' processes are hidden from us."""
    try:
        connections = psutil.net_connections("tcp")
        pids = [c.pid for c in connections if c.status == psutil.CONN_LISTEN and c.laddr.port == port and c.pid]
        if not pids:
            return "another process"
        holder = psutil.Process(pids[0])
        # a keeper, and its like, starts again the children that hold the port with it
        while (parent := holder.parent()) is not None and _listens(parent, port):
            holder = parent
        return f"{holder.name()} (pid {holder.pid})"
    except psutil.Error:
        return "another process"


def _listens(process: psutil.Process, port: int) -> bool:
    try:
        connections = process.net_connections("tcp")
    except psutil.Error:
        return False  # not ours to look at, and so not ours to stop
    return any(c.status == psutil.CONN_LISTEN and c.laddr.port == port for c in connections)


def check_workers(workers: int) -> Iterator[Finding]:
    """Whether several processes can hold the limits together."""
    if workers > 1 and MODULES["rate_counters"] != "native":
        says = f"server.workers is {workers}, and the pure rate counters count in one process only"
        yield Finding(f"{says}; build the native ones (pip install, or setup.py build_ext), or use 1")


def check_disk(state_dir: Path) -> Iterator[Finding]:
    """Whether the state folder can be made and written, and has room for engine logs."""
    there = next(parent for parent in (state_dir, *state_dir.parents) if os.path.lexists(parent))
    if not there.exists():
        yield Finding(f'store.dir is "{state_dir}", and {there} is a link to nothing; make what it names, or remove it')
        return
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        why = "cannot be written" if there.is_dir() else "is a file"
        yield Finding(f'store.dir is "{state_dir}", and {there} {why}; name a folder of your own')
        return
    free = shutil.disk_usage(there).free
    if free < DISK_WANTED:
        says = f'store.dir is "{state_dir}", with {format_size(free)} free on its disk'
        yield Finding(f"{says}; make room, engine logs are written there", fatal=free < DISK_NEEDED)


def check_files(config: Config) -> Iterator[Finding]:
    """Whether the files of usage and of the access log can be made and appended to."""
    usage, log = config.store.usage, config.observe.access_log
    files = {
        "store.usage": None if usage == "off" else Path(config.store.dir, usage),
        "observe.access_log": None if log in ("off", "stdout") else Path(log),
    }
    for key, path in files.items():
        if path is None:
            continue
        there = next(place for place in (path, *path.parents) if place.exists())
        if there.is_dir() and there == path:
            yield Finding(f'{key} is "{path}", which is a folder; name a file in it')
        elif not there.is_dir() and there != path:
            yield Finding(f'{key} is "{path}", and {there} is a file; name another place')
        elif not os.access(there, os.W_OK):
            yield Finding(f'{key} is "{path}", and {there} cannot be written; name a file in a folder of your own')


def check_record(path: str | None) -> Iterator[Finding]:
    """Whether the log of decisions that the command line asks for can be made."""
    if path is None:
        return
    folder = Path(path).absolute().parent
    if Path(path).is_dir():
        yield Finding(f"--record is {path}, which is a folder; name a file in it")
    elif not folder.is_dir():
        yield Finding(f"--record is {path}, and there is no folder {folder}; make it, or name another place")
    elif not os.access(folder, os.W_OK):
        yield Finding(f"--record is {path}, and {folder} cannot be written; name a file in a folder of your own")


def check_memory(config: Config, devices: Sequence[DeviceSpec], host: HostMemory) -> Iterator[Finding]:
    """Whether the devices named are there, and the budget and each model fit."""
    places: dict[str, list[DeviceSpec]] = {}
    for backend in (backend for backend in config.backends if backend.kind in REAL_KINDS):
        wanted = backend.device or ("nvidia" if any(device.kind == "nvidia" for device in devices) else "host")
        places[backend.name] = [device for device in devices if wanted in (device.kind, device.name)]
        if not places[backend.name]:
            known = ", ".join(device.name for device in devices)
            yield Finding(
                f'backends[{backend.name}].device is "{wanted}", and this machine has {known}; use one of these'
            )
    if config.devices.host_memory is not None and any(device.kind == "host" for device in chain(*places.values())):
        yield from _budget(config.devices.host_memory, host)
    for model in config.models:
        yield from _too_large(model, places.get(model.backend, ()))


def _budget(stated: str, host: HostMemory) -> Iterator[Finding]:
    if byte_size(stated) > host.total:
        yield Finding(
            f'devices.host_memory is "{stated}", and this machine has {format_size(host.total)}; '
            "lower it, or leave it out"
        )
    elif byte_size(stated) > host.available:
        yield Finding(
            f'devices.host_memory is "{stated}", and {format_size(host.available)} are free now; '
            "models are loaded only as far as memory allows",
            fatal=False,
        )


def _too_large(model: ModelConfig, places: Sequence[DeviceSpec]) -> Iterator[Finding]:
    largest = max((device.capacity_bytes - device.reserve_bytes for device in places), default=None)
    needed = memory_needed(model)
    if largest is not None and needed > largest:
        names = ", ".join(device.name for device in places)
        yield Finding(
            f"models[{model.id}] needs {format_size(needed)}, and the most that {names} can give is "
            f"{format_size(largest)}; use a smaller model, or more memory"
        )


def memory_needed(model: ModelConfig) -> int:
    """Bytes that the model takes at least: as stated, else its weights on disk."""
    if model.memory_bytes is not None:
        return byte_size(model.memory_bytes)
    if model.path is None:
        return 0
    return sum(file.stat().st_size for file in Path(model.path).glob("*.safetensors"))


def host_memory() -> HostMemory:
    """What this machine has, or the cgroup that holds us, if that is less."""
    total, cgroup = int(psutil.virtual_memory().total), Cgroup()
    limit = cgroup.limit()
    return HostMemory(total if limit is None else min(total, limit), available_bytes(cgroup))


def device_specs(config: Config) -> list[DeviceSpec]:
    """The devices as the scheduler will see them."""
    devices = discover(
        host_budget_bytes=None if config.devices.host_memory is None else byte_size(config.devices.host_memory),
        use_nvidia=config.devices.nvidia,
        gpu_reserve_bytes=byte_size(config.devices.gpu_reserve),
        simulated={device.name: byte_size(device.memory) for device in config.devices.simulated},
    )
    return [device.spec for device in devices]


def check_vllm(config: Config) -> Iterator[Finding]:
    """Whether each vLLM backend in use has a vLLM, and the compiler that vLLM calls for its first logprobs."""
    used = {model.backend for model in config.models}
    backends = [backend for backend in config.backends if backend.kind == "vllm" and backend.name in used]
    for backend in backends:
        yield from _vllm_of(backend)
    if backends and not any(shutil.which(name) for name in (os.environ.get("CXX") or "c++", *COMPILERS)):
        yield Finding(
            "no C++ compiler found, and vLLM compiles a kernel at the first request with logprobs; "
            "install g++ (Debian: apt install g++, Fedora: dnf install gcc-c++)"
        )


def _vllm_of(backend: BackendConfig) -> Iterator[Finding]:
    python = backend.python or sys.executable
    found = shutil.which(python)
    if found is None:
        yield Finding(
            f'backends[{backend.name}].python is "{python}", which cannot be run; name a Python that has vLLM'
        )
        return
    folders = [Path(entry) for entry in sys.path] if backend.python is None else _site_packages(Path(found))
    # importing it to see takes seconds; its folder, or what an editable install leaves, tells as well
    if folders and not any((folder / "vllm").is_dir() or any(folder.glob("vllm*.dist-info")) for folder in folders):
        yield Finding(
            f"backends[{backend.name}]: {python} has no vLLM; install it there, name another in backends.python, "
            "or try without: --engine simulated"
        )


def _site_packages(python: Path) -> list[Path]:
    """Where that Python keeps its packages; empty for a layout that we do not know, which then says nothing."""
    # not resolve(): the python of a virtual environment is a link out of it
    return [*python.absolute().parent.parent.glob("lib*/python3*/*-packages")]


def check_backends(config: Config) -> Iterator[Finding]:
    """Whether a remote account is this server itself, whose calls would go round until connections run out."""
    host, port = parse_listen(config.server.listen)
    for backend in config.backends:
        url = urlsplit(backend.base_url or "")
        if url.hostname and (url.port or {"http": 80, "https": 443}[url.scheme]) == port and clash(url.hostname, host):
            says = f"is {backend.base_url}, where this server itself listens; name the other server, or change"
            yield Finding(f"backends[{backend.name}].base_url {says} server.listen")


def check_commands(config: Config) -> Iterator[Finding]:
    """Whether the programs of command engines are there. One may be installed later, and the others serve without."""
    backends = {backend.name: backend for backend in config.backends}
    for model in config.models:
        path = {**os.environ, **backends[model.backend].env, **model.env}.get("PATH")
        if model.command and "${" not in model.command[0] and shutil.which(model.command[0], path=path) is None:
            says = f'models[{model.id}].command starts "{model.command[0]}", which is no program that can be run'
            yield Finding(f"{says}; install it, or write its whole path", fatal=False)


def check_models(config: Config) -> Iterator[Finding]:
    """Whether there is a model, and each folder that a vLLM backend loads is complete."""
    if not config.models:
        yield Finding("there is no model, and every call will be refused; add [[models]]", fatal=False)
    vllm = {backend.name for backend in config.backends if backend.kind == "vllm"}
    for model in config.models:
        if model.backend in vllm and model.path is not None:
            yield from check_folder(model.id, Path(model.path))


def check_engines(config: Config) -> Iterator[Finding]:
    """Whether the proxy can work out what each engine takes and how it is started, as it will before it serves."""
    try:
        locals_of(config, Catalog(config), devices_of(config))
    except ConfigError as error:
        yield from map(Finding, error.problems)


def check_folder(name: str, folder: Path) -> Iterator[Finding]:
    """What a model's folder lacks: a readable config.json, a tokenizer, weights, each of the index's files."""
    at = f"models[{name}].path"
    try:
        json.loads((folder / "config.json").read_bytes())
    except OSError:
        yield Finding(f"{at}: {folder} has no config.json; copy the whole model there")
    except ValueError:
        yield Finding(f"{at}: {folder / 'config.json'} is not JSON; copy the model again")
    if not any((folder / tokenizer).is_file() for tokenizer in TOKENIZERS):
        yield Finding(f"{at}: {folder} has no tokenizer; copy the whole model there")
    files = [file for pattern in WEIGHTS for file in sorted(folder.glob(pattern))]
    if not files:
        yield Finding(f"{at}: {folder} has no weights; copy its *.safetensors there")
    for file in files:
        if file.stat().st_size < 1024 and file.read_bytes().startswith(LFS_POINTER):
            yield Finding(f"{at}: {file} is only a pointer of git-lfs; run `git lfs pull` in {folder}")
    yield from _missing_shards(at, folder)


def _missing_shards(at: str, folder: Path) -> Iterator[Finding]:
    index = folder / "model.safetensors.index.json"
    try:
        shards = set(json.loads(index.read_bytes())["weight_map"].values())
    except FileNotFoundError:
        return
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        yield Finding(f"{at}: {index} cannot be read; copy the model again")
        return
    missing = sorted(shard for shard in shards if not (folder / shard).is_file())
    if missing:
        names = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        yield Finding(f"{at}: {folder} lacks {names}; finish the download")


def check_descriptors(soft_limit: int) -> Iterator[Finding]:
    """Every connection takes an open file, a proxied one two."""
    if soft_limit != resource.RLIM_INFINITY and soft_limit < DESCRIPTORS_WANTED:
        yield Finding(
            f"this user may open {soft_limit} files, which is about {soft_limit // 2} requests at once; "
            "raise it with ulimit -n 65536, or LimitNOFILE=65536 in the systemd unit",
            fatal=soft_limit < 128,
        )
