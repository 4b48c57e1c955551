"""The configuration: TOML into these structs, and nothing else reads the file.

Field names are the keys of `configs/vramp.example.toml`, which documents each with meaning, default and range.
Sizes are bytes here and "4GiB" in the file; times are in seconds, as their names say.
"""

from __future__ import annotations

import msgspec


class Secret:
    """A key that cannot be printed, compared in the open or serialised by accident. `reveal()` is the only way in."""

    __slots__ = ("_source", "_value")

    def __init__(self, value: str, source: str) -> None:
        self._value = value
        self._source = source

    def reveal(self) -> str:
        """The secret itself: for a hash or an upstream header, never for a log."""
        return self._value

    @property
    def source(self) -> str:
        """Where it came from ("env:NAME", "file:PATH", "literal"), which may be shown."""
        return self._source

    def __repr__(self) -> str:
        return f"Secret({self._source})"

    __str__ = __repr__


class ServerConfig(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """Listeners and who may call."""

    listen: str = "127.0.0.1:8080"
    admin_listen: str = "127.0.0.1:8081"
    api_keys: tuple[str, ...] = ()
    admin_keys: tuple[str, ...] = ()
    workers: int = 1
    drain_s: float = 30.0


class SimulatedDevice(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """A device that exists in arithmetic only."""

    name: str
    memory: str


class DevicesConfig(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """Memory that engines share."""

    pressure_threshold: float = 0.95
    host_memory: str | None = None
    gpu_reserve: str = "512MiB"
    nvidia: bool = True
    simulated: tuple[SimulatedDevice, ...] = ()
    measure_interval_s: float = 2.0


class ClassConfig(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """One latency class."""

    deadline_ms: float | None = None


class BackendConfig(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """Where models run: a local engine kind (vllm, command, simulated) or a remote account (openai)."""

    name: str
    kind: str
    base_url: str | None = None
    api_key: str | None = None
    python: str | None = None
    args: tuple[str, ...] = ()
    env: dict[str, str] = {}
    device: str | None = None
    warm: bool = True
    start_timeout_s: float = 300.0
    stop_timeout_s: float = 15.0
    max_connections: int = 512
    keepalive_s: float = 30.0


class SimulatedModel(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """Behaviour of a simulated engine; `fault` is none, slow, crash, garbage or hang."""

    ttft_ms: float = 50.0
    tokens_per_s: float = 200.0
    load_s: float = 1.0
    fault: str = "none"
    fault_after: int = 0


class ModelConfig(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """One model on one backend; several entries with one id form a group, tried in the order written."""

    id: str
    backend: str
    # how it runs
    path: str | None = None
    upstream_model: str | None = None
    task: str = "generate"
    command: tuple[str, ...] = ()
    args: tuple[str, ...] = ()
    env: dict[str, str] = {}
    memory_bytes: int | str | None = None
    kv_cache_bytes: int | str | None = None
    max_sequences: int = 32
    pinned: bool = False
    ttl_s: float | None = None
    max_queue: int | None = None
    simulated: SimulatedModel = SimulatedModel()
    # what it is (the profile)
    strengths: tuple[str, ...] = ()
    weaknesses: tuple[str, ...] = ()
    avg_ttft_ms: float | None = None
    avg_tokens_per_sec: float | None = None
    max_context: int | None = None
    supports_streaming: bool = True
    supports_tools: bool = False
    cost_tier: str | None = None
    licence: str | None = None


class DefaultsConfig(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """What holds when a request or a model does not say."""

    latency_class: str = "standard"
    ttl_s: float | None = None
    max_queue: int = 1000


class TimeoutsConfig(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """Every wait has a limit. The class targets are first-token targets in milliseconds."""

    connect_s: float = 5.0
    first_byte_s: float = 300.0
    idle_s: float = 120.0
    total_s: float = 3600.0
    read_body_s: float = 60.0
    write_stall_s: float = 60.0
    max_wait_s: float = 600.0
    instant_ms: float = 100.0
    fast_ms: float = 500.0
    standard_ms: float = 2000.0
    deliberate_ms: float = 10_000.0


class LimitsConfig(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """Sizes and counts."""

    max_body: str = "64MiB"
    max_header: str = "64KiB"
    max_json_depth: int = 256
    max_waiting: int = 20_000


class StoreConfig(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """Where vramp keeps what it must remember: engine logs, the keeper's socket, learned footprints."""

    dir: str = ".state"


class ObserveConfig(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """Logs and metrics. `access_log`: "stdout", "off" or a path."""

    access_log: str = "stdout"
    log_level: str = "info"


class Config(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """The whole file."""

    server: ServerConfig = ServerConfig()
    devices: DevicesConfig = DevicesConfig()
    classes: dict[str, ClassConfig] = {}
    backends: tuple[BackendConfig, ...] = ()
    models: tuple[ModelConfig, ...] = ()
    defaults: DefaultsConfig = DefaultsConfig()
    timeouts: TimeoutsConfig = TimeoutsConfig()
    limits: LimitsConfig = LimitsConfig()
    store: StoreConfig = StoreConfig()
    observe: ObserveConfig = ObserveConfig()
