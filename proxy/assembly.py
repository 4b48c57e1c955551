"""From the configuration to the scheduler's values: devices, what each local model needs, how its engine is started.

Reads model folders; does nothing on its own.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from hashlib import sha256

import msgspec

from proxy.catalog.catalog import Catalog, Deployment
from proxy.config import REAL_KINDS, BackendConfig, Config, ConfigError, ModelConfig, TimeoutsConfig
from proxy.sizes import byte_size
from scheduler.devices.base import Device
from scheduler.devices.discover import discover
from scheduler.driver import Launch
from scheduler.engines.base import EngineKind
from scheduler.engines.command import CommandKind
from scheduler.engines.estimate import (
    OVERHEAD_GPU,
    NotAModel,
    copy_s,
    default_kv_cache,
    estimate_memory,
    kv_tokens,
    weight_bytes,
)
from scheduler.engines.simulated import SimulatedKind
from scheduler.engines.vllm import VllmKind
from scheduler.model import ModelSpec, SchedulerSettings

NVIDIA, HOST, SIMULATED = "nvidia", "host", "simulated"
SIMULATED_SLEEP_KEEPS = 10  # a tenth of a simulated engine's memory stays where it is
# First guesses, in seconds: an engine forked on the CPU took 1.2 to 3.4 here, one started plainly 16 to 25.
WARM_START_S, PLAIN_START_S, COMMAND_START_S = 3.0, 25.0, 15.0
DISK_BYTES_PER_S = 1e9
UNBOUNDED_KV_TOKENS = 1 << 40  # an engine whose KV cache we do not know: its sequences alone are counted
# No cold model can meet a target for the first token: a wait counts as on time up to so many times its class's.
INSTANT_PATIENCE, FAST_PATIENCE, STANDARD_PATIENCE, DELIBERATE_PATIENCE = 20.0, 10.0, 5.0, 3.0
BATCH_PATIENCE_S = 120.0  # a class without a target


class Local(msgspec.Struct, frozen=True):
    """A local model, ready for the scheduler."""

    spec: ModelSpec
    launch: Launch


def devices_of(config: Config) -> list[Device]:
    """The memory that engines of this configuration may use."""
    real = any(backend.kind in REAL_KINDS for backend in config.backends)
    devices = config.devices
    return discover(
        host_budget_bytes=None if devices.host_memory is None else byte_size(devices.host_memory),
        use_host=real,
        use_nvidia=devices.nvidia and real,
        gpu_reserve_bytes=byte_size(devices.gpu_reserve),
        simulated={each.name: byte_size(each.memory) for each in devices.simulated},
    )


def settings_of(config: Config) -> SchedulerSettings:
    """The core's limits."""
    return SchedulerSettings(
        pressure_threshold=config.devices.pressure_threshold,
        max_wait_s=config.timeouts.max_wait_s,
        max_waiting=config.limits.max_waiting,
        patience_s=_patience_s(config.timeouts),
        sleep_memory_bytes=byte_size(config.devices.sleep_memory),
        anticipate=config.devices.anticipate,
    )


def _patience_s(targets: TimeoutsConfig) -> tuple[float, float, float, float, float]:
    return (
        INSTANT_PATIENCE * targets.instant_ms / 1000,
        FAST_PATIENCE * targets.fast_ms / 1000,
        STANDARD_PATIENCE * targets.standard_ms / 1000,
        DELIBERATE_PATIENCE * targets.deliberate_ms / 1000,
        BATCH_PATIENCE_S,
    )


def locals_of(config: Config, catalog: Catalog, devices: Sequence[Device]) -> list[Local]:
    """Every local model with its memory, its engine kind and its revision."""
    return [_local(config, deployment, devices) for deployment in catalog if deployment.local]


def _local(config: Config, deployment: Deployment, devices: Sequence[Device]) -> Local:
    model, backend = _read_for(deployment), deployment.backend
    device = _device_for(backend, devices)
    sleeps = byte_size(config.devices.sleep_memory) > 0
    try:
        parallel = _tensor_parallel(model, backend)
        memory, cache = _memory(model, cpu=device != NVIDIA, warm=backend.warm, parallel=parallel)
        tokens = _kv_tokens(model, cache) * parallel
        keeps, in_host = _asleep(model, backend, device, memory, sleeps=sleeps)
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
        revision=_revision(deployment, device, sleeps=keeps is not None),
        load_estimate_s=_load_estimate_s(model, backend, device),
        stated=model.memory_bytes is not None,
        devices_needed=parallel,
        sleep_keeps_bytes=keeps,
        sleep_host_bytes=in_host,
        wake_estimate_s=None if keeps is None else copy_s(in_host, parallel),
    )
    kind = _kind(deployment.model, backend, device, memory, cache, devices, sleep=keeps is not None)
    return Local(spec, Launch(kind, backend.start_timeout_s, backend.stop_timeout_s))


def without_device(found: Sequence[Local], devices: Sequence[Device]) -> list[str]:
    """A line for each model whose engine could run on none of these, which are found once, when a process starts."""
    there = {name for device in devices for name in (device.spec.name, device.spec.kind)}
    return [
        f"models[{local.spec.name}]: its engine runs on {local.spec.device}, which was not there or not looked for at "
        "the start; a restart or SIGUSR2 looks again"
        for local in found
        if local.spec.device not in there
    ]


def _read_for(deployment: Deployment) -> ModelConfig:
    """The model with its path only where that is a folder for vLLM, whose files tell sizes: what another program takes
    (a GGUF file, a name of its own) is its business, and a simulated engine reads nothing."""
    model = deployment.model
    return model if deployment.backend.kind == "vllm" else msgspec.structs.replace(model, path=None)


def _load_estimate_s(model: ModelConfig, backend: BackendConfig, device: str) -> float:
    """What to tell who waits for a first load; every load after it goes by what the last one took."""
    if backend.kind == "simulated":
        return model.simulated.load_s
    if backend.kind != "vllm" or model.path is None:
        return COMMAND_START_S
    start_s = WARM_START_S if backend.warm and device != NVIDIA else PLAIN_START_S
    try:
        return start_s + weight_bytes(model.path) / DISK_BYTES_PER_S
    except NotAModel:
        return start_s  # with its memory stated, whether the folder is a model is for vLLM to say


def _device_for(backend: BackendConfig, devices: Sequence[Device]) -> str:
    if backend.device is not None:
        return backend.device
    if backend.kind == "simulated":
        return SIMULATED
    return NVIDIA if any(device.spec.kind == NVIDIA for device in devices) else HOST


def _tensor_parallel(model: ModelConfig, backend: BackendConfig) -> int:
    """How many devices vLLM is told to spread the model over."""
    if backend.kind != "vllm":
        return 1
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--tensor-parallel-size", "-tp", type=int, default=1)
    try:
        found, _ = parser.parse_known_args([*backend.args, *model.args])
    except argparse.ArgumentError as error:
        raise ConfigError([f"models[{model.id}].args: {error}"]) from error
    if found.tensor_parallel_size < 1:
        said = f"--tensor-parallel-size is {found.tensor_parallel_size}; use 1 or more"
        raise ConfigError([f"models[{model.id}].args: {said}"])
    return int(found.tensor_parallel_size)


def _asleep(
    model: ModelConfig, backend: BackendConfig, device: str, memory: int, *, sleeps: bool
) -> tuple[int | None, int]:
    """(bytes that stay on each device, bytes of host memory) while its engine sleeps; None where it cannot.

    vLLM sleeps on GPUs only; what stays is its CUDA context and graphs. An embedding model has no token that would tell
    whether it woke as it was.
    """
    if not sleeps or model.task != "generate":
        return None, 0
    if backend.kind == "simulated":
        return memory // SIMULATED_SLEEP_KEEPS, memory - memory // SIMULATED_SLEEP_KEEPS
    if backend.kind != "vllm" or device in (HOST, SIMULATED) or model.path is None:
        return None, 0
    return min(OVERHEAD_GPU, memory), weight_bytes(model.path)


def _memory(model: ModelConfig, *, cpu: bool, warm: bool, parallel: int) -> tuple[int, int]:
    """(bytes on each device, bytes of them KV cache); what is not stated is estimated from the model's own files."""
    sequences = model.max_sequences
    cache = byte_size(model.kv_cache_bytes) if model.kv_cache_bytes is not None else 0
    if model.path is not None and not cache:
        cache = default_kv_cache(model.path, max_sequences=sequences, max_context=model.max_context)
    if model.memory_bytes is not None:
        return byte_size(model.memory_bytes), cache
    if model.path is None:
        raise ConfigError([f"models[{model.id}].memory_bytes is missing; say how much memory its engine takes"])
    whole = estimate_memory(model.path, kv_cache_bytes=cache, cpu=cpu, warm=warm, max_sequences=sequences)
    weights = weight_bytes(model.path)  # these are divided; cache (a size per device), step and runtime are not
    return whole - weights + -(-weights // parallel), cache


def _kv_tokens(model: ModelConfig, cache: int) -> int:
    if model.path is None or not cache or model.task == "embed":
        return UNBOUNDED_KV_TOKENS
    return kv_tokens(model.path, kv_cache_bytes=cache)


def _kind(
    model: ModelConfig,
    backend: BackendConfig,
    device: str,
    memory: int,
    cache: int,
    devices: Sequence[Device],
    *,
    sleep: bool,
) -> EngineKind:
    args, env = (*backend.args, *model.args), {**backend.env, **model.env}
    if backend.kind == "command":
        return CommandKind(
            model=model.id,
            argv=(*model.command, *args),
            env=env,
            task=model.task,
            upstream_model=model.upstream_model,
            model_path=model.path,
        )
    if backend.kind == "simulated":
        return SimulatedKind(
            model=model.id,
            task=model.task,
            memory_bytes=memory,
            max_sequences=model.max_sequences,
            **msgspec.structs.asdict(model.simulated),
        )
    largest = max((each.spec.capacity_bytes for each in devices if each.spec.kind == device), default=memory)
    return VllmKind(
        model=model.upstream_model or model.id,
        path=model.path or "",
        kv_cache_bytes=cache,
        cpu=device != NVIDIA,
        python=backend.python,
        task=model.task,
        args=args,
        env=env,
        max_sequences=model.max_sequences,
        max_context=model.max_context,
        # The ledger has booked the memory; half of the estimate, because what was learned since may be less than it,
        # and vLLM's own check would then refuse a start that fits. The cache has a fixed size whatever the share.
        device_share=min(1.0, 0.5 * memory / largest),
        warm=backend.warm,
        sleep=sleep,
    )


def _revision(deployment: Deployment, device: str, *, sleeps: bool) -> str:
    """Changes exactly when an engine would have to be started differently; a new profile text does not restart it."""
    model, backend = deployment.model, deployment.backend
    started_with = (
        model.id, model.path, model.upstream_model, model.task, model.command, model.args, model.env,
        model.kv_cache_bytes, model.max_sequences, model.max_context, model.simulated,
        backend.kind, backend.python, backend.args, backend.env, device, deployment.ranks, sleeps,
    )  # fmt: skip
    return sha256(msgspec.json.encode(started_with, order="deterministic")).hexdigest()[:16]
