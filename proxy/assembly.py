"""From the configuration to the scheduler's values: devices, what each local model needs, how its engine is started.

Reads model folders; does nothing on its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256

import msgspec

from proxy.catalog.catalog import Catalog, Deployment
from proxy.config import BackendConfig, Config, ConfigError, ModelConfig
from proxy.sizes import byte_size
from scheduler.devices.base import Device
from scheduler.devices.discover import discover
from scheduler.driver import Launch
from scheduler.engines.base import EngineKind
from scheduler.engines.command import CommandKind
from scheduler.engines.estimate import NotAModel, default_kv_cache, estimate_memory, kv_tokens
from scheduler.engines.simulated import SimulatedKind
from scheduler.engines.vllm import VllmKind
from scheduler.model import ModelSpec, SchedulerSettings

NVIDIA, HOST, SIMULATED = "nvidia", "host", "simulated"
UNBOUNDED_KV_TOKENS = 1 << 40  # an engine whose KV cache we do not know: its sequences alone are counted


class Local(msgspec.Struct, frozen=True):
    """A local model, ready for the scheduler."""

    spec: ModelSpec
    launch: Launch


def devices_of(config: Config) -> list[Device]:
    """The memory that engines of this configuration may use."""
    kinds = {backend.kind for backend in config.backends}
    devices = config.devices
    return discover(
        host_budget_bytes=None if devices.host_memory is None else byte_size(devices.host_memory),
        use_host=bool(kinds & {"vllm", "command"}),
        use_nvidia=devices.nvidia and bool(kinds & {"vllm", "command"}),
        gpu_reserve_bytes=byte_size(devices.gpu_reserve),
        simulated={each.name: byte_size(each.memory) for each in devices.simulated},
    )


def settings_of(config: Config) -> SchedulerSettings:
    """The core's limits."""
    return SchedulerSettings(
        pressure_threshold=config.devices.pressure_threshold,
        max_wait_s=config.timeouts.max_wait_s,
        max_waiting=config.limits.max_waiting,
    )


def locals_of(config: Config, catalog: Catalog, devices: Sequence[Device]) -> list[Local]:
    """Every local model with its memory, its engine kind and its revision."""
    return [_local(config, deployment, devices) for deployment in catalog if deployment.local]


def _local(config: Config, deployment: Deployment, devices: Sequence[Device]) -> Local:
    model, backend = deployment.model, deployment.backend
    device = _device_for(backend, devices)
    try:
        memory, cache = _memory(model, cpu=device != NVIDIA, warm=backend.warm)
        tokens = _kv_tokens(model, cache)
    except NotAModel as error:
        raise ConfigError([f"models[{model.id}].path: {error}"]) from error
    spec = ModelSpec(
        name=deployment.name,
        memory_bytes=memory,
        device=device,
        max_sequences=model.max_sequences,
        kv_tokens=tokens,
        pinned=model.pinned,
        ttl_s=model.ttl_s if model.ttl_s is not None else config.defaults.ttl_s,
        max_queue=model.max_queue if model.max_queue is not None else config.defaults.max_queue,
        revision=_revision(deployment, device),
    )
    kind = _kind(model, backend, device, memory, cache, devices)
    return Local(spec, Launch(kind, backend.start_timeout_s, backend.stop_timeout_s))


def _device_for(backend: BackendConfig, devices: Sequence[Device]) -> str:
    if backend.device is not None:
        return backend.device
    if backend.kind == "simulated":
        return SIMULATED
    return NVIDIA if any(device.spec.kind == NVIDIA for device in devices) else HOST


def _memory(model: ModelConfig, *, cpu: bool, warm: bool) -> tuple[int, int]:
    """(bytes in all, bytes of them KV cache); what is not stated is estimated from the model's own files."""
    sequences = model.max_sequences
    cache = byte_size(model.kv_cache_bytes) if model.kv_cache_bytes is not None else 0
    if model.path is not None and not cache:
        cache = default_kv_cache(model.path, max_sequences=sequences, max_context=model.max_context)
    if model.memory_bytes is not None:
        return byte_size(model.memory_bytes), cache
    if model.path is None:
        raise ConfigError([f"models[{model.id}].memory_bytes is missing; say how much memory its engine takes"])
    return estimate_memory(model.path, kv_cache_bytes=cache, cpu=cpu, warm=warm, max_sequences=sequences), cache


def _kv_tokens(model: ModelConfig, cache: int) -> int:
    if model.path is None or not cache or model.task == "embed":
        return UNBOUNDED_KV_TOKENS
    return kv_tokens(model.path, kv_cache_bytes=cache)


def _kind(
    model: ModelConfig, backend: BackendConfig, device: str, memory: int, cache: int, devices: Sequence[Device]
) -> EngineKind:
    env = {**backend.env, **model.env}
    if backend.kind == "command":
        return CommandKind(
            model=model.id,
            argv=model.command,
            env=env,
            task=model.task,
            upstream_model=model.upstream_model,
            model_path=model.path,
        )
    if backend.kind == "simulated":
        return SimulatedKind(
            model=model.id, task=model.task, memory_bytes=memory, **msgspec.structs.asdict(model.simulated)
        )
    largest = max((each.spec.capacity_bytes for each in devices if each.spec.kind == device), default=memory)
    return VllmKind(
        model=model.upstream_model or model.id,
        path=model.path or "",
        kv_cache_bytes=cache,
        cpu=device != NVIDIA,
        python=backend.python,
        task=model.task,
        args=(*backend.args, *model.args),
        env=env,
        max_sequences=model.max_sequences,
        max_context=model.max_context,
        device_share=min(1.0, memory / largest),
        warm=backend.warm,
    )


def _revision(deployment: Deployment, device: str) -> str:
    """Changes exactly when an engine would have to be started differently; a new profile text does not restart it."""
    model, backend = deployment.model, deployment.backend
    started_with = (
        model.id, model.path, model.upstream_model, model.task, model.command, model.args, model.env,
        model.kv_cache_bytes, model.max_sequences, model.max_context, model.simulated,
        backend.kind, backend.python, backend.args, backend.env, device, deployment.ranks,
    )  # fmt: skip
    return sha256(msgspec.json.encode(started_with, order="deterministic")).hexdigest()[:16]
