"""What a configuration tells the scheduler of memory: several devices, sleep, and whose word a figure is."""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

from proxy.assembly import UNBOUNDED_KV_TOKENS, locals_of, settings_of, without_device
from proxy.catalog.catalog import Catalog
from proxy.config import Config, ConfigError
from proxy.config_load import demo_path, load
from scheduler.devices.base import Device, Reading
from scheduler.engines.estimate import OVERHEAD_GPU
from scheduler.model import DeviceSpec, ModelSpec

GiB = 1 << 30
WEIGHTS = 2048


class Gpu:
    spec = DeviceSpec("gpu0", "nvidia", 80 * GiB)

    def measure(self, engines: object, overhead: object) -> Reading:
        raise AssertionError("nobody asks")

    def engine_env(self) -> dict[str, str]:
        return {}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    shape = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 100}
    (tmp_path / "config.json").write_text(json.dumps({**shape, "max_position_embeddings": 2048}))
    header = json.dumps({"w": {"dtype": "F16", "shape": [WEIGHTS // 2], "data_offsets": [0, WEIGHTS]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(WEIGHTS))
    return tmp_path


def spec_of(folder: Path, *, sleep: str = "0B", kind: str = "vllm", **model: Any) -> ModelSpec:
    raw = {
        "devices": {"sleep_memory": sleep, "simulated": [{"name": "sim0", "memory": "8GiB"}]},
        "backends": [{"name": "local", "kind": kind}],
        "models": [{"id": "m", "backend": "local", "path": str(folder), **model}],
    }
    config = msgspec.convert(raw, Config)
    devices: Sequence[Device] = [Gpu()]
    (local,) = locals_of(config, Catalog(config), devices)
    assert settings_of(config).sleep_memory_bytes == (0 if sleep == "0B" else 64 * GiB)
    return local.spec


def test_a_stated_size_is_the_operators_and_an_estimate_is_ours(folder: Path) -> None:
    assert spec_of(folder, memory_bytes="5GiB").stated
    assert spec_of(folder, memory_bytes="5GiB").memory_bytes == 5 * GiB
    assert not spec_of(folder).stated


@pytest.mark.parametrize("args", [["--tensor-parallel-size", "4"], ["--tensor-parallel-size=4"], ["-tp", "4"]])
def test_tensor_parallel_divides_the_weights_and_needs_so_many_devices(folder: Path, args: list[str]) -> None:
    one, four = spec_of(folder), spec_of(folder, args=args)
    assert (one.devices_needed, four.devices_needed) == (1, 4)
    assert one.memory_bytes - four.memory_bytes == WEIGHTS * 3 // 4
    assert four.kv_tokens == 4 * one.kv_tokens
    assert four.revision != one.revision


@pytest.mark.parametrize("size", ["0", "many"])
def test_a_wrong_tensor_parallel_size_names_the_model_and_the_argument(folder: Path, size: str) -> None:
    with pytest.raises(ConfigError, match=r"models\[m\]\.args: .*tensor-parallel-size"):
        spec_of(folder, args=["--tensor-parallel-size", size])


def test_engines_sleep_only_where_there_is_memory_for_it_and_they_can(folder: Path) -> None:
    asleep = spec_of(folder, sleep="64GiB")
    assert (asleep.sleep_keeps_bytes, asleep.sleep_host_bytes) == (OVERHEAD_GPU, WEIGHTS)
    assert asleep.revision != spec_of(folder).revision
    assert spec_of(folder).sleep_keeps_bytes is None
    assert spec_of(folder, sleep="64GiB", task="embed").sleep_keeps_bytes is None
    simulated = spec_of(folder, sleep="64GiB", kind="simulated", memory_bytes="1GiB")
    assert simulated.sleep_keeps_bytes == GiB // 10


def test_the_first_load_of_an_engine_is_guessed_by_how_it_starts(folder: Path) -> None:
    on_a_gpu, simulated = spec_of(folder), spec_of(folder, kind="simulated", memory_bytes="1GiB")
    assert on_a_gpu.load_estimate_s == pytest.approx(25.0, abs=0.1)
    assert simulated.load_estimate_s == 1.0  # what its settings say
    with_weights_of_another_kind = folder / "model.safetensors"
    with_weights_of_another_kind.unlink()
    assert spec_of(folder, memory_bytes="5GiB").load_estimate_s == 25.0


def test_a_simulated_engine_takes_as_many_requests_at_once_as_the_scheduler_sends() -> None:
    raw = {
        "devices": {"simulated": [{"name": "sim0", "memory": "8GiB"}]},
        "backends": [{"name": "sim", "kind": "simulated"}],
        "models": [{"id": "m", "backend": "sim", "memory_bytes": "1GiB", "max_sequences": 64}],
    }
    config = msgspec.convert(raw, Config)
    (local,) = locals_of(config, Catalog(config), [Gpu()])
    assert local.spec.max_sequences == 64
    assert "--max-sequences=64" in local.launch.kind.spawn_spec(1, {}).argv


@pytest.mark.parametrize("kind", ["command", "simulated"])
@pytest.mark.parametrize("path", ["model.gguf", "nothing-there"])
def test_only_vllm_reads_what_is_at_the_path(tmp_path: Path, kind: str, path: str) -> None:
    (tmp_path / "model.gguf").touch()
    command = ["llama-server", "--port", "${PORT}", "--model", "${MODEL_PATH}"] if kind == "command" else []
    spec = spec_of(tmp_path / path, kind=kind, memory_bytes="5GiB", kv_cache_bytes="1GiB", command=command)
    assert (spec.memory_bytes, spec.kv_tokens) == (5 * GiB, UNBOUNDED_KV_TOKENS)


def test_the_demo_on_simulated_engines_needs_no_models(tmp_path: Path) -> None:
    file = tmp_path / "configs" / "demo.toml"
    file.parent.mkdir()
    file.write_text(demo_path().read_text())
    config = load(file, engine="simulated")
    assert len(locals_of(config, Catalog(config), [])) == len(config.models) == 4


def test_a_command_is_told_its_path(tmp_path: Path) -> None:
    model = {"id": "m", "backend": "local", "memory_bytes": "5GiB", "path": "/m", "command": ["x", "${MODEL_PATH}"]}
    config = msgspec.convert({"backends": [{"name": "local", "kind": "command"}], "models": [model]}, Config)
    (local,) = locals_of(config, Catalog(config), [])
    assert local.launch.kind.spawn_spec(1, {}).argv == ("x", "/m")


def test_a_command_is_given_the_arguments_of_its_backend_and_its_own() -> None:
    backend = {"name": "local", "kind": "command", "args": ["--threads", "2"]}
    model = {"id": "m", "backend": "local", "memory_bytes": "5GiB", "command": ["x"], "args": ["--port=${PORT}"]}
    config = msgspec.convert({"backends": [backend], "models": [model]}, Config)
    (local,) = locals_of(config, Catalog(config), [])
    assert local.launch.kind.spawn_spec(1, {}).argv == ("x", "--threads", "2", "--port=1")


def test_a_model_that_a_reload_puts_where_nobody_has_looked_is_told_of(folder: Path) -> None:
    backends = [{"name": "gpus", "kind": "vllm"}, {"name": "cpu", "kind": "vllm", "device": "host"}]
    models = [{"id": each["name"], "backend": each["name"], "path": str(folder)} for each in backends]
    config = msgspec.convert({"backends": backends, "models": models}, Config)
    (line,) = without_device(locals_of(config, Catalog(config), [Gpu()]), [Gpu()])
    assert line.startswith("models[cpu]: its engine runs on host, which was not there")
