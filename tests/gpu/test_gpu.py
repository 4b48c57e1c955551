"""The ledger's readings against memory that is really held, and models of some GB loaded, evicted and verified gone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from scheduler.devices.nvml import NvmlDevice, nvidia_devices
from tests.e2e.harness import Served

HERE = Path(__file__).parent
GIB = 1 << 30
CONTEXT = GIB  # a CUDA context and an allocator's granularity take less
SETTLE_S = 20.0  # a driver frees what a process held within seconds

pytestmark = [pytest.mark.gpu, pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def gpu() -> NvmlDevice:
    devices = nvidia_devices(reserve_bytes=0)
    if not devices:
        pytest.skip("no NVIDIA GPU")
    pytest.importorskip("transformers")
    if not pytest.importorskip("torch").cuda.is_available():
        pytest.skip("PyTorch cannot use the GPU")
    return devices[0]


@contextmanager
def holder(gpu: NvmlDevice, size: int) -> Iterator[int]:
    """A process that holds so many bytes of the GPU; its pid."""
    argv, env = [sys.executable, str(HERE / "hold.py"), str(size)], {**os.environ, **gpu.engine_env()}
    process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env)
    assert process.stdout is not None
    assert process.stdin is not None
    try:
        assert process.stdout.readline() == b"held\n"
        yield process.pid
    finally:
        process.stdin.close()
        process.wait(30)
        process.stdout.close()


def settled(condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + SETTLE_S
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.25)
    return True


def used(gpu: NvmlDevice) -> int:
    return gpu.measure({}, ()).used_bytes


# ---------------------------------------------------------------- the reading


def test_an_engines_memory_is_told_from_a_strangers(gpu: NvmlDevice) -> None:
    before = used(gpu)
    with holder(gpu, 2 * GIB) as ours, holder(gpu, 3 * GIB):
        reading = gpu.measure({"m#1": [ours]}, ())
        assert 5 * GIB <= reading.used_bytes - before <= 5 * GIB + 2 * CONTEXT
        # without the pids of this namespace (containers) an engine is left out, never counted as nothing
        if "m#1" in reading.engines:
            assert 2 * GIB <= reading.engines["m#1"] <= 2 * GIB + CONTEXT
            assert 3 * GIB <= reading.foreign_bytes - before <= 3 * GIB + CONTEXT
    assert settled(lambda: used(gpu) <= before + GIB // 4)


def test_a_stranger_that_grows_and_goes_moves_the_floor_both_ways(gpu: NvmlDevice) -> None:
    before = gpu.measure({}, ()).foreign_bytes
    with holder(gpu, 4 * GIB):
        assert gpu.measure({}, ()).foreign_bytes - before >= 4 * GIB
    assert settled(lambda: gpu.measure({}, ()).foreign_bytes <= before + GIB // 4)


# ----------------------------------------------------------------- the engines


def write_model(folder: Path, layers: int) -> int:
    """A Llama of `layers` wide layers with random weights; the bytes of its weights. Eight layers are 3.4 GB."""
    import torch  # noqa: PLC0415  some seconds, paid where a GPU is
    from transformers import LlamaConfig, LlamaForCausalLM  # noqa: PLC0415

    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=2048,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model = model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.normal_(0.0, 0.02)
    model.save_pretrained(folder, max_shard_size="2GB")
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def configuration(folders: dict[str, Path], promise: int, devices: str) -> str:
    command = json.dumps([sys.executable, str(HERE / "transformers_server.py"), "${MODEL_PATH}"])
    lines = ["[devices]", devices, "[[backends]]", 'name = "own"', 'kind = "command"', "start_timeout_s = 120"]
    for name, folder in folders.items():
        lines += ["[[models]]", f'id = "{name}"', 'backend = "own"', f'path = "{folder}"', f"command = {command}"]
        lines += [f'memory_bytes = "{promise}B"', "max_context = 2048"]
    return "\n".join(lines) + "\n"


def ask(server: Served, model: str) -> str:
    body = {"model": model, "messages": [{"role": "user", "content": "Which model are you?"}], "max_tokens": 4}
    return str(server.ask("/v1/chat/completions", body)["choices"][0]["message"]["content"])


def test_models_of_some_gb_are_loaded_evicted_and_gone(gpu: NvmlDevice, tmp_path: Path) -> None:
    folders = {name: tmp_path / name for name in ("first", "second")}
    sizes = {name: write_model(folder, layers) for (name, folder), layers in zip(folders.items(), (8, 9), strict=True)}
    before = used(gpu)
    promise = int(0.6 * (gpu.spec.capacity_bytes - before))  # one of them at a time
    (tmp_path / "vramp.toml").write_text(configuration(folders, promise, 'gpu_reserve = "0B"'), encoding="utf-8")
    rates: list[float] = []
    with Served(tmp_path / "vramp.toml", tmp_path) as server:
        said = {}
        for name in ("first", "second", "first"):
            began = time.monotonic()
            answer = ask(server, name)
            rates.append(sizes[name] / (time.monotonic() - began))
            assert said.setdefault(name, answer) == answer
            ready = [model["id"] for model in server.status()["models"] if model["state"] == "ready"]
            assert ready == [name]
            # the other has left the GPU, not only our books
            assert sizes[name] <= used(gpu) - before <= sizes[name] + 2 * CONTEXT
        assert server.stop() == 0
        assert server.survivors() == []
    assert settled(lambda: used(gpu) <= before + GIB // 4)
    print(f"loaded, from request to answer, at {', '.join(f'{rate / 1e9:.2f}' for rate in rates)} GB/s")
