"""The configuration: TOML into these structs, and nothing else reads the file.

Field names are the keys of `configs/vramp.example.toml`. What a key means and which values it takes stands once, in its
`Key`: the loader checks by it, error messages quote it, and the example and `docs/config.md` are written from it.
Sizes are bytes or "4GiB" (`proxy.sizes.byte_size` reads both); times are in seconds, as their names say.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Never

import msgspec


class ConfigError(Exception):
    """A configuration that cannot be used. `problems` has a line for each thing wrong with it, all of them at once."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = list(problems)


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

    def __reduce_ex__(self, protocol: object) -> Never:
        raise TypeError("a Secret is never pickled or copied")


class Key(msgspec.Struct, frozen=True):
    """What a key means and takes. `low` and `high` are allowed themselves, `above` is not.

    `form` names a reading that is more than a type: size, listen, secret, url, path, name, device or workers.
    `absent` says what leaving the key out does, `example` is shown where there is no default to show.
    """

    meaning: str
    low: float | None = None
    above: float | None = None
    high: float | None = None
    choices: tuple[str, ...] = ()
    form: str | None = None
    absent: str | None = None
    example: Any = None


CLASSES = ("instant", "fast", "standard", "deliberate", "batch")
REAL_KINDS = ("vllm", "command")  # whose engines take memory of this machine
LOCAL_KINDS = (*REAL_KINDS, "simulated")
KINDS = (*LOCAL_KINDS, "openai")
FAULTS = ("none", "slow", "crash", "garbage", "corrupt", "hang")
MIB, GIB, PIB = 1 << 20, 1 << 30, 1 << 50
DAY_S, DAY_MS = 86_400, 86_400_000


class ServerConfig(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """Listeners and who may call."""

    listen: Annotated[
        str,
        Key(
            "Where clients connect. An address beyond this machine is refused while `api_keys` is empty.", form="listen"
        ),
    ] = "127.0.0.1:8080"
    admin_listen: Annotated[
        str,
        Key(
            "Where operators connect: status, metrics, console. Beyond this machine it needs `admin_keys`.",
            form="listen",
        ),
    ] = "127.0.0.1:8081"
    tls_cert: Annotated[
        str | None,
        Key(
            "File of the certificate chain (PEM) with which `listen` speaks TLS. A renewed one is read without a "
            "restart; to begin or to end TLS takes one.",
            form="path",
            absent="speak plain HTTP",
            example="tls/fullchain.pem",
        ),
    ] = None
    tls_key: Annotated[
        str | None,
        Key(
            "File of its private key (PEM, not encrypted).",
            form="path",
            absent="speak plain HTTP",
            example="tls/privkey.pem",
        ),
    ] = None
    api_keys: Annotated[
        tuple[str, ...],
        Key(
            'Keys of clients: "env:NAME", "file:PATH" (a key a line, a name after it if you like, # for comments). '
            "Empty: nobody is asked for a key, and only this machine may connect.",
            form="secret",
            example=["file:keys.txt"],
        ),
    ] = ()
    admin_keys: Annotated[
        tuple[str, ...],
        Key("Keys of operators, written as `api_keys` are.", form="secret", example=["env:VRAMP_ADMIN_KEY"]),
    ] = ()
    workers: Annotated[
        int | str,
        Key(
            'Processes that serve. "auto": one for each core, less one for the scheduler and the engines; at least 1. '
            "With several, each has its share of a backend's `max_connections`.",
            low=1,
            high=256,
            form="workers",
        ),
    ] = 1
    fast_lane: Annotated[
        bool,
        Key("Whether native code carries the calls that go straight through; false leaves all of them to aiohttp."),
    ] = True
    reload_on_change: Annotated[
        bool,
        Key("Whether this file and those it names for secrets are read again when they change, as SIGHUP asks for."),
    ] = True
    hang_limit_s: Annotated[
        float,
        Key(
            "A proxy, or a worker, whose event loop has stood still for so long is killed and started again; engines "
            "stay. 0: never.",
            low=0,
            high=DAY_S,
        ),
    ] = 30.0
    drain_s: Annotated[
        float,
        Key(
            "How long requests in flight may go on after SIGTERM before they are cut off. To raise it takes a restart.",
            low=0,
            high=DAY_S,
        ),
    ] = 30.0


class SimulatedDevice(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """A device that exists in arithmetic only: for trying a configuration without the hardware."""

    name: Annotated[str, Key("Its name in status and metrics.", form="name", example="sim0")]
    memory: Annotated[str, Key("Its memory.", form="size", low=MIB, high=PIB, example="24GiB")]


class DevicesConfig(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """Memory that engines share."""

    pressure_threshold: Annotated[
        float,
        Key("Share of a device's memory above which idle models are evicted before anyone waits.", above=0, high=1),
    ] = 0.95
    anticipate: Annotated[
        bool,
        Key(
            "Whether models are loaded, or woken, into idle memory before they are asked for, and a swap is held back "
            "for a moment when its victim is about to be used again."
        ),
    ] = True
    host_memory: Annotated[
        str | None,
        Key(
            "Host memory that engines on the CPU may fill together.",
            form="size",
            low=MIB,
            high=PIB,
            absent="use what the machine or its cgroup leaves free at start",
            example="16GiB",
        ),
    ] = None
    gpu_reserve: Annotated[
        str, Key("Memory of each GPU that is never promised to a model.", form="size", low=0, high=PIB)
    ] = "512MiB"
    sleep_memory: Annotated[
        str,
        Key(
            "Host memory for engines that sleep: where an engine can (vLLM on a GPU, simulated), an eviction moves its "
            "weights there, and it is back within seconds. 0B: evicted engines are stopped.",
            form="size",
            low=0,
            high=PIB,
        ),
    ] = "0B"
    nvidia: Annotated[bool, Key("Whether NVIDIA GPUs are looked for and used.")] = True
    simulated: tuple[SimulatedDevice, ...] = ()
    measure_interval_s: Annotated[float, Key("How often the memory of devices is measured.", low=0.1, high=3600)] = 2.0


class ClassConfig(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """One latency class: instant, fast, standard, deliberate or batch."""

    deadline_ms: Annotated[
        float | None,
        Key(
            "A request of this class that cannot get its first token by then is refused with Retry-After.",
            above=0,
            high=DAY_MS,
            absent="never refuse for lateness",
            example=5000.0,
        ),
    ] = None


class BackendConfig(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """Where models run: a local engine kind (vllm, command, simulated) or a remote account (openai)."""

    name: Annotated[
        str, Key("Its name: models refer to it, headers and metrics show it.", form="name", example="local")
    ]
    kind: Annotated[
        str,
        Key(
            "What runs there; command is any program that serves OpenAI's API, openai any URL that does.",
            choices=KINDS,
            example="simulated",
        ),
    ]
    base_url: Annotated[
        str | None,
        Key(
            "URL of a remote account up to and with /v1. Kind openai needs it, the others have none.",
            form="url",
            example="https://llm.example.com/v1",
        ),
    ] = None
    api_key: Annotated[
        str | None,
        Key(
            'Our key there: "env:NAME" or "file:PATH".', form="secret", absent="send no key", example="env:PROVIDER_KEY"
        ),
    ] = None
    python: Annotated[
        str | None,
        Key(
            "The Python that has vLLM, for kind vllm.",
            form="path",
            absent="use the one that runs vramp",
            example="/opt/vllm/bin/python",
        ),
    ] = None
    args: Annotated[
        tuple[str, ...], Key("Arguments added to the start of every engine here.", example=["--dtype=bfloat16"])
    ] = ()
    env: Annotated[
        dict[str, str], Key("Environment added to every engine here.", example={"VLLM_LOGGING_LEVEL": "INFO"})
    ] = {}
    device: Annotated[
        str | None,
        Key(
            "The device its engines use: nvidia, host, simulated, or the name of one device (gpu0, host, sim0).",
            form="device",
            absent="use GPUs where there are some, host memory elsewhere (simulated engines: simulated devices)",
            example="simulated",
        ),
    ] = None
    warm: Annotated[
        bool, Key("Whether vLLM is imported once and engines are forked from it: seconds, not half a minute.")
    ] = True
    start_timeout_s: Annotated[
        float, Key("How long an engine may take until it answers its first request.", above=0, high=DAY_S)
    ] = 300.0
    stop_timeout_s: Annotated[
        float,
        Key(
            "How long an engine may take to stop before it is killed; 10 seconds where all of vramp stops.",
            low=0,
            high=3600,
        ),
    ] = 15.0
    max_connections: Annotated[int, Key("Most connections open to it at once.", low=1, high=65_536)] = 512
    keepalive_s: Annotated[
        float, Key("How long an idle connection is kept for the next request.", low=0, high=3600)
    ] = 30.0


class SimulatedModel(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """Behaviour of a model on a simulated engine."""

    ttft_ms: Annotated[float, Key("Time to the first token.", low=0, high=DAY_MS)] = 50.0
    tokens_per_s: Annotated[float, Key("Tokens a second after the first.", above=0, high=1e6)] = 200.0
    load_s: Annotated[float, Key("Time that a load takes.", low=0, high=DAY_S)] = 1.0
    fault: Annotated[str, Key("What goes wrong, on request.", choices=FAULTS)] = "none"
    fault_after: Annotated[int, Key("Requests answered well before the fault.", low=0, high=1e9)] = 0


class ModelConfig(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """One model on one backend; several entries with one id form a group, tried in the order written."""

    id: Annotated[str, Key("What clients name in `model`.", form="name", example="example-small")]
    backend: Annotated[str, Key("The `name` of the backend that runs it.", example="local")]
    # how it runs
    path: Annotated[
        str | None,
        Key(
            "Folder of the model (config.json, weights, tokenizer). Kind vllm needs it.",
            form="path",
            example="/srv/models/example-small",
        ),
    ] = None
    upstream_model: Annotated[
        str | None,
        Key("What the backend calls the model.", absent="send the id", example="example-small-2026"),
    ] = None
    task: Annotated[
        str,
        Key(
            "What it does: generate (chat, completions) or embed (embeddings, rerank, score).",
            choices=("generate", "embed"),
        ),
    ] = "generate"
    command: Annotated[
        tuple[str, ...],
        Key(
            "The command line of the engine, for kind command. ${PORT} stands for the loopback port it must serve, "
            "${MODEL_PATH} for path. It is ready when GET /health or, without that, GET /v1/models is 200, and a "
            "request for one token, or one embedding, is answered.",
            example=["llama-server", "--port", "${PORT}", "--model", "${MODEL_PATH}"],
        ),
    ] = ()
    args: Annotated[
        tuple[str, ...], Key("Arguments added to this model's engine.", example=["--max-model-len=8192"])
    ] = ()
    env: Annotated[
        dict[str, str], Key("Environment added to this model's engine.", example={"VLLM_CPU_OMP_THREADS_BIND": "auto"})
    ] = {}
    memory_bytes: Annotated[
        int | str | None,
        Key(
            "Memory that the engine takes when loaded. Kinds command and simulated need it.",
            form="size",
            low=MIB,
            high=PIB,
            absent="have it estimated from the weights and learned from the first load",
            example="6GiB",
        ),
    ] = None
    kv_cache_bytes: Annotated[
        int | str | None,
        Key(
            "Memory for the KV cache of a vLLM engine.",
            form="size",
            low=MIB,
            high=PIB,
            absent="have it chosen from the model's size",
            example="2GiB",
        ),
    ] = None
    max_sequences: Annotated[int, Key("Most requests in the engine at once; the others wait.", low=1, high=65_536)] = 32
    pinned: Annotated[bool, Key("Whether it is loaded at start and never evicted.")] = False
    ttl_s: Annotated[
        float | None,
        Key(
            "Unloaded after being idle for so long.",
            low=0,
            high=365 * DAY_S,
            absent="keep the model loaded",
            example=600.0,
        ),
    ] = None
    max_queue: Annotated[
        int | None,
        Key(
            "Most requests that wait for it; more are refused with 503.",
            low=0,
            high=1e6,
            absent="have defaults.max_queue hold",
            example=100,
        ),
    ] = None
    simulated: SimulatedModel = SimulatedModel()
    # what it is (the profile)
    strengths: Annotated[
        tuple[str, ...], Key("Kinds of work that it is good at, shown to people and routing.", example=["code", "math"])
    ] = ()
    weaknesses: Annotated[tuple[str, ...], Key("Kinds of work that it is bad at.", example=["creative"])] = ()
    avg_ttft_ms: Annotated[
        float | None, Key("Usual time to the first token.", low=0, high=DAY_MS, absent="have it measured", example=80.0)
    ] = None
    avg_tokens_per_sec: Annotated[
        float | None, Key("Usual tokens a second.", low=0, high=1e6, absent="have it measured", example=120.0)
    ] = None
    max_context: Annotated[
        int | None,
        Key(
            "Most tokens of prompt and answer together.", low=1, high=1e9, absent="have the engine say", example=32_768
        ),
    ] = None
    supports_streaming: Annotated[bool, Key("Whether it can stream.")] = True
    supports_tools: Annotated[bool, Key("Whether it can call tools.")] = False
    cost_tier: Annotated[str | None, Key("What it costs, in your own words.", absent="say nothing", example="free")] = (
        None
    )
    licence: Annotated[str | None, Key("Its licence.", absent="say nothing", example="Apache-2.0")] = None
    sample_prompt: Annotated[
        str | None,
        Key("What to ask it in the lines to try, printed at start.", absent='ask "Hello!"', example="Who are you?"),
    ] = None


class DefaultsConfig(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """What holds when a request or a model does not say."""

    latency_class: Annotated[
        str, Key("Class of a request that names none (header x-vramp-class).", choices=CLASSES)
    ] = "standard"
    ttl_s: Annotated[
        float | None,
        Key(
            "`ttl_s` of models that state none.",
            low=0,
            high=365 * DAY_S,
            absent="keep models loaded until their memory is needed",
            example=3600.0,
        ),
    ] = None
    max_queue: Annotated[int, Key("`max_queue` of models that state none.", low=0, high=1e6)] = 1000


class TimeoutsConfig(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """Every wait has a limit. A class's target is none: it says from when a wait is late, by which the scheduler orders
    the loads of models."""

    connect_s: Annotated[float, Key("To connect to a backend.", above=0, high=3600)] = 5.0
    first_byte_s: Annotated[float, Key("From the request sent to the answer's first byte.", above=0, high=DAY_S)] = (
        300.0
    )
    idle_s: Annotated[float, Key("Between two pieces of an answer.", above=0, high=DAY_S)] = 120.0
    total_s: Annotated[float, Key("A whole request, waiting included.", above=0, high=DAY_S)] = 3600.0
    read_body_s: Annotated[float, Key("For a client to send its request.", above=0, high=3600)] = 60.0
    write_stall_s: Annotated[float, Key("For a client that reads nothing of its answer.", above=0, high=DAY_S)] = 60.0
    max_wait_s: Annotated[float, Key("In the queue, a model's load included.", above=0, high=DAY_S)] = 600.0
    instant_ms: Annotated[
        float, Key("First-token target of class instant; a wait of 20 times that is late.", low=1, high=DAY_MS)
    ] = 100.0
    fast_ms: Annotated[
        float, Key("First-token target of class fast; a wait of 10 times that is late.", low=1, high=DAY_MS)
    ] = 500.0
    standard_ms: Annotated[
        float, Key("First-token target of class standard; a wait of 5 times that is late.", low=1, high=DAY_MS)
    ] = 2000.0
    deliberate_ms: Annotated[
        float, Key("First-token target of class deliberate; a wait of 3 times that is late.", low=1, high=DAY_MS)
    ] = 10_000.0


class KeyLimitsConfig(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """Limits of the key with this name, each in place of the one in `[limits]`."""

    requests_per_minute: Annotated[
        int | None,
        Key(
            "Its requests in a minute. 0: any.",
            low=0,
            high=1e9,
            absent="have limits.requests_per_minute hold",
            example=600,
        ),
    ] = None
    tokens_per_minute: Annotated[
        int | None,
        Key(
            "Its tokens in a minute. 0: any.",
            low=0,
            high=1e11,
            absent="have limits.tokens_per_minute hold",
            example=1_000_000,
        ),
    ] = None
    concurrency: Annotated[
        int | None,
        Key("Its requests at once. 0: any.", low=0, high=1e6, absent="have limits.concurrency hold", example=100),
    ] = None


class ModelLimitsConfig(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """Limits of the model with this id, all keys together."""

    requests_per_minute: Annotated[int, Key("Requests in a minute. 0: any.", low=0, high=1e9)] = 0
    tokens_per_minute: Annotated[int, Key("Tokens in a minute. 0: any.", low=0, high=1e11)] = 0
    concurrency: Annotated[int, Key("Requests at once, waiting ones included. 0: any.", low=0, high=1e6)] = 0


class LimitsConfig(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """Sizes and counts. The first three hold for each key by itself; without keys, for all callers together."""

    requests_per_minute: Annotated[
        int,
        Key(
            "Calls of models that a key may make in a minute: a minute's worth at once, then evenly. 0: any.",
            low=0,
            high=1e9,
        ),
    ] = 0
    tokens_per_minute: Annotated[
        int,
        Key(
            "Tokens, in and out, that a key may use in a minute. Reserved by estimate, settled by the answer's usage. "
            "0: any.",
            low=0,
            high=1e11,
        ),
    ] = 0
    concurrency: Annotated[
        int, Key("Calls that a key may have open at once, waiting ones included. 0: any.", low=0, high=1e6)
    ] = 0

    max_body: Annotated[str, Key("Largest request body.", form="size", low=1 << 10, high=4 * GIB)] = "64MiB"
    max_header: Annotated[str, Key("Largest request head.", form="size", low=4 << 10, high=MIB)] = "64KiB"
    max_json_depth: Annotated[int, Key("Deepest nesting of a JSON body.", low=8, high=1024)] = 256
    max_waiting: Annotated[int, Key("Most requests that wait, all models together.", low=1, high=10_000_000)] = 20_000
    embed_window_ms: Annotated[
        float,
        Key(
            "How long embedding calls gather while their engine is busy, to go there as one. 0: never.",
            low=0,
            high=1000,
        ),
    ] = 3.0
    keys: dict[str, KeyLimitsConfig] = {}
    models: dict[str, ModelLimitsConfig] = {}


class StoreConfig(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """Where vramp keeps what it must remember: engine logs, the keeper's socket, what was learned, usage."""

    dir: Annotated[
        str, Key("The folder, made if missing. The default is in the folder that vramp is started in.", form="path")
    ] = ".state"
    usage: Annotated[
        str,
        Key(
            'A JSON line for each call of a known caller: a file, in `dir` unless its path is absolute, or "off".',
            form="path",
        ),
    ] = "usage.jsonl"


class ObserveConfig(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """Logs and metrics."""

    access_log: Annotated[str, Key('A JSON line per request: "stdout", "off", or the path of a file.', form="path")] = (
        "stdout"
    )
    log_level: Annotated[
        str, Key("The least important messages that are shown.", choices=("debug", "info", "warning", "error"))
    ] = "info"


class Config(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """The whole file. Relative paths in it start at the file's own folder."""

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
