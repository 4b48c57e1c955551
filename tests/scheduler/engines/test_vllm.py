"""The vLLM kind without vLLM: its command lines, the log of a real start, real failures, and a server's answers."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from scheduler.engines.base import ProbeError
from scheduler.engines.vllm import MODULE, VllmKind
from scheduler.engines.vllm_metrics import METRICS

# vLLM 0.32 on the CPU, in order, shortened
START_LOG = """\
(APIServer pid=7) INFO 11-21 11:35:21 [api_utils.py:286] non-default args: {'host': '127.0.0.1', 'port': 36753}
(APIServer pid=7) INFO 11-21 11:35:21 [model.py:733] Resolved architecture: LlamaForCausalLM
(APIServer pid=7) WARNING 11-21 11:35:21 [cpu.py:224] Triton is not installed. triton-cpu is expected on x86 CPUs.
(EngineCore pid=8) INFO 11-21 11:35:22 [core.py:133] Initializing a V1 LLM engine (v0.32.0) with config: model='x'
(EngineCore pid=8) INFO 11-21 11:35:22 [cpu_model_runner.py:68] Starting to load model /models/x...
Loading safetensors checkpoint shards:   0% Completed | 0/4 [00:00<?, ?it/s]
Loading safetensors checkpoint shards:  50% Completed | 2/4 [00:01<00:00,  1.68it/s]
Loading safetensors checkpoint shards: 100% Completed | 4/4 [00:02<00:00,  1.68it/s]
(EngineCore pid=8) INFO 11-21 11:35:23 [default_loader.py:501] Loading weights took 0.60 seconds
(EngineCore pid=8) INFO 11-21 11:35:24 [kv_cache_utils.py:2327] CPU KV cache size: 21,760 tokens, Maximum concurrency
(EngineCore pid=8) INFO 11-21 11:35:24 [core.py:402] init engine (profile, create kv cache, warmup model) took 0.05 s
(APIServer pid=7) INFO 11-21 11:35:25 [entry.py:140] Starting vLLM server on http://127.0.0.1:36753
INFO:     Application startup complete.
""".splitlines()

CORE = "(EngineCore pid=8) ERROR 11-21 11:37:03 [core.py:1510] "
FAILURES = [
    (
        CORE + "ValueError: Free memory on device cuda:0 (10.5/79.2 GiB) on startup is less than desired GPU memory "
        "utilization (0.92, 72.86 GiB). Decrease GPU memory utilization or reduce GPU memory used by other processes.",
        "cuda:0 has 10.5 of 79.2 GiB free and this engine asks for 72.86 GiB: "
        "set memory_bytes or kv_cache_bytes lower, or end what else uses the device",
    ),
    (
        CORE + "ValueError: Available memory on node 0 (7.12/8.09 GiB) on startup is less than desired CPU memory "
        "utilization (0.99, 8.01 GiB). On the CPU backend, the flag (despite its name) (e.g. `0.5 GiB)`)",
        "memory node 0 has 7.12 of 8.09 GiB free and this engine asks for 8.01 GiB: set kv_cache_bytes lower, "
        "or end what else uses the memory",
    ),
    (
        CORE + "ValueError: Available memory on node 0 (7.06/8.09 GiB) on kv cache allocation is less than requested "
        "memory for kv (900.0 GiB). Decrease --kv-cache-memory-bytes, VLLM_CPU_KVCACHE_SPACE, or reduce CPU memory",
        "the KV cache of 900.0 GiB does not fit into the 7.06 GiB free on memory node 0: set kv_cache_bytes lower",
    ),
    (
        CORE + "ValueError: To serve at least one request with the model's max seq len (2048), (0.01 GiB KV cache is "
        "needed, which is larger than the available KV cache memory (0.0 GiB). Based on the available memory, the "
        "estimated maximum model length is 128. Try increasing `gpu_memory_utilization`",
        "the KV cache is too small for one request of 2048 tokens, which takes 0.01 GiB: raise kv_cache_bytes, "
        "or lower max_context to 128",
    ),
    (
        "  Value error, User-specified max_model_len (999999) is greater than the derived max_model_len "
        "(max_position_embeddings=4096.0 or model_max_length=None in model's config.json).",
        "max_context is 999999, and the model was made for 4096 tokens: set it to 4096 or less",
    ),
    (
        "huggingface_hub.errors.HFValidationError: Repo id must be in the form 'repo_name' or 'namespace/repo_name': "
        "'/models/none'. Use `repo_type` argument if needed.",
        "there is no folder /models/none: set the model's path",
    ),
    (
        "  Value error, Invalid repository ID or local directory specified: '/models/empty'.",
        "/models/empty is not a model folder: no config.json",
    ),
    (
        "RuntimeError: Cannot find any model weights with `/models/x`",
        "/models/x holds no weights: was the model downloaded whole?",
    ),
    (
        "  Value error, Model architectures ['FancyForCausalLM'] are not supported for now. Supported architectures: "
        "dict_keys(['AfmoeForCausalLM'])",
        "this vLLM cannot run models of architecture FancyForCausalLM",
    ),
    (
        "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 1.96 GiB. GPU 0 has a capacity of 79.2 GiB",
        "the GPU ran out of memory allocating 1.96 GiB: set kv_cache_bytes or max_sequences lower",
    ),
    (
        "RuntimeError: [enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried to",
        "the machine ran out of memory: set kv_cache_bytes lower, or leave more memory free",
    ),
    (
        "torch._inductor.exc.InvalidCxxCompiler: No working C++ compiler found in torch._inductor.config.cpp.cxx",
        "vLLM needs a compiler and Python's headers: install g++ and the python3-dev package",
    ),
    (
        "/usr/bin/python3: Error while finding module specification (ModuleNotFoundError: No module named 'vllm')",
        "this Python has no vLLM: install it there, or set the backend's python",
    ),
    (
        "entry.py: error: unrecognized arguments: --max-tokens 5",
        "vLLM does not know the arguments --max-tokens 5: correct args",
    ),
    ("OSError: [Errno 98] Address already in use", "another program took the engine's port first"),
]


def kind(**changed: Any) -> VllmKind:
    return VllmKind(**{"model": "m", "path": "/models/m", "kv_cache_bytes": 1 << 26, "cpu": True, **changed})


def options(kind: VllmKind) -> dict[str, str]:
    argv = kind.spawn_spec(4321, {}).argv
    return {name: value for name, value in zip(argv, (*argv[1:], ""), strict=True) if name.startswith("--")}


def test_a_start_names_model_port_and_a_fixed_cache() -> None:
    given = options(kind(max_sequences=7, max_context=2048))
    assert given["--model"] == "/models/m"
    assert (given["--served-model-name"], given["--host"], given["--port"]) == ("m", "127.0.0.1", "4321")
    assert (given["--kv-cache-memory-bytes"], given["--max-num-seqs"], given["--max-model-len"]) == (
        str(1 << 26), "7", "2048",
    )  # fmt: skip


def test_requests_leave_nothing_in_a_log_that_nobody_rotates() -> None:
    assert "--disable-uvicorn-access-log" in kind().spawn_spec(1, {}).argv


def test_the_module_is_run_because_the_command_does_not_work_with_vllm_cpu() -> None:
    assert kind(python="/opt/vllm/bin/python").spawn_spec(1, {}).argv[:3] == ("/opt/vllm/bin/python", "-m", MODULE)


def test_a_context_that_nobody_set_is_fitted_to_the_cache() -> None:
    assert options(kind())["--max-model-len"] == "auto"


def test_on_the_cpu_the_worker_is_in_the_engine_and_bound_to_no_core() -> None:
    spec = kind(threads=4).spawn_spec(1, {"CUDA_VISIBLE_DEVICES": ""})
    assert "--gpu-memory-utilization" not in spec.argv
    assert spec.argv[spec.argv.index("--distributed-executor-backend") + 1] == "uni"
    assert spec.env["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
    assert spec.env["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"
    assert spec.env["OMP_NUM_THREADS"] == "4"
    assert spec.env["CUDA_VISIBLE_DEVICES"] == ""


def test_on_a_gpu_the_start_asks_for_its_own_share_only() -> None:
    engine = kind(cpu=False, device_share=0.25)
    assert options(engine)["--gpu-memory-utilization"] == "0.2500"
    spec = engine.spawn_spec(1, {"CUDA_VISIBLE_DEVICES": "GPU-1"})
    assert "--enforce-eager" not in spec.argv
    assert spec.env["CUDA_VISIBLE_DEVICES"] == "GPU-1"
    assert "OMP_NUM_THREADS" not in spec.env


def test_embeddings_need_a_pooling_server() -> None:
    given = options(kind(task="embed"))
    assert (given["--runner"], given["--convert"]) == ("pooling", "embed")
    assert "--scheduling-policy" not in given


def test_an_engine_that_generates_heeds_the_priority_of_requests() -> None:
    assert options(kind())["--scheduling-policy"] == "priority"


def test_what_the_operator_sets_comes_last() -> None:
    spec = kind(args=["--port", "5"], env={"VLLM_CPU_OMP_THREADS_BIND": "0-3"}).spawn_spec(1, {})
    assert spec.argv[-2:] == ("--port", "5")
    assert spec.env["VLLM_CPU_OMP_THREADS_BIND"] == "0-3"


@pytest.mark.parametrize(
    ("warm", "env", "forked"),
    [
        (True, {}, True),
        (False, {}, False),
        (True, {"VLLM_LOGGING_LEVEL": "DEBUG"}, True),
        (True, {"LD_PRELOAD": "libtcmalloc.so"}, False),
        (True, {"HF_HOME": "/cache"}, False),
    ],
)
def test_a_fork_is_asked_for_unless_it_could_not_obey_the_environment(
    warm: bool, env: Mapping[str, str], forked: bool
) -> None:
    spec = kind(warm=warm, env=env).spawn_spec(1, {})
    assert spec.warm is forked
    assert bool(spec.launcher_env) is forked


def test_all_kinds_share_one_launcher() -> None:
    kinds = (kind(), kind(model="other", env={"A": "1"}, threads=8))
    assert len({str(each.spawn_spec(1, {}).launcher_env) for each in kinds}) == 1


def test_a_start_s_log_moves_forward_and_says_what_happens() -> None:
    seen = [step for line in START_LOG if (step := kind().progress(line)) is not None]
    fractions = [step.fraction for step in seen]
    assert fractions == sorted(fractions)
    assert (fractions[0], fractions[-1]) == (0.2, 0.98)
    assert "loading weights, 2 of 4 files" in [step.note for step in seen]
    assert len(seen) == len(START_LOG) - 1


@pytest.mark.parametrize("line", ["", "(APIServer pid=7) INFO hello", "Loading safetensors checkpoint shards: broken"])
def test_other_lines_say_nothing(line: str) -> None:
    assert kind().progress(line) is None


@pytest.mark.parametrize(("line", "sentence"), FAILURES)
def test_a_failed_start_is_explained(line: str, sentence: str) -> None:
    on_its_way_up = "RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}"
    assert kind().explain([*START_LOG, line, "Traceback (most recent call last):", on_its_way_up]) == sentence


def test_a_failure_not_seen_before_is_not_guessed_at() -> None:
    assert kind().explain([*START_LOG, "ZeroDivisionError: division by zero"]) is None


class Server:
    """An engine's two routes; answers with `status`."""

    def __init__(self) -> None:
        self.status = 200
        self.asked: list[tuple[str, dict[str, Any]]] = []

    async def answer(self, request: web.Request) -> web.Response:
        self.asked.append((request.path, await request.json()))
        return web.json_response({"said": "so"}, status=self.status)


@pytest.fixture
async def served() -> AsyncIterator[tuple[Server, aiohttp.ClientSession, str]]:
    server, app = Server(), web.Application()
    app.router.add_post("/v1/{route:.*}", server.answer)
    async with TestServer(app) as listening, aiohttp.ClientSession() as session:
        yield server, session, str(listening.make_url("")).rstrip("/")


async def test_readiness_is_one_token_really_generated(
    served: tuple[Server, aiohttp.ClientSession, str],
) -> None:
    server, session, url = served
    assert await kind().probe(session, url)
    (path, body), *_ = server.asked
    assert (path, body["model"], body["max_tokens"]) == ("/v1/completions", "m", 1)


async def test_readiness_of_an_embedding_model_is_one_embedding(
    served: tuple[Server, aiohttp.ClientSession, str],
) -> None:
    server, session, url = served
    assert await kind(task="embed").probe(session, url)
    assert server.asked == [("/v1/embeddings", {"model": "m", "input": "a"})]


async def test_a_server_that_is_not_yet_able_is_asked_again(
    served: tuple[Server, aiohttp.ClientSession, str],
) -> None:
    server, session, url = served
    server.status = 503
    assert not await kind().probe(session, url)
    server.status = 200
    assert await kind().probe(session, url)


async def test_a_refusal_that_time_will_not_change_ends_the_start(
    served: tuple[Server, aiohttp.ClientSession, str],
) -> None:
    server, session, url = served
    server.status = 404
    with pytest.raises(ProbeError, match="/v1/completions answers 404"):
        await kind().probe(session, url)


async def test_a_port_that_nobody_serves_yet_is_not_ready(unused_tcp_port: int) -> None:
    async with aiohttp.ClientSession() as session:
        assert not await kind().probe(session, f"http://127.0.0.1:{unused_tcp_port}")


def test_metrics_of_ours_have_prometheus_names_of_their_own() -> None:
    names = [name for name, _ in METRICS.values()]
    assert len(set(names)) == len(names)
    assert all(name.startswith("vramp_engine_") for name in names)
    counters = {theirs for theirs in METRICS if theirs.endswith("_total")}
    assert {theirs for theirs, (ours, _) in METRICS.items() if ours.endswith("_total")} == counters
