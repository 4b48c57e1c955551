"""The launcher's promises to the keeper, kept with a stub in vLLM's place."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.scheduler.engines.launcher_rig import MODULE, LauncherRig, write_stub


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[LauncherRig]:
    with LauncherRig(tmp_path, write_stub(tmp_path)) as rig:
        assert rig.hear() == {"op": "ready"}
        yield rig


def test_a_fork_runs_the_module_as_python_would(rig: LauncherRig, tmp_path: Path) -> None:
    engine = rig.engine("--port", "1", cwd=str(tmp_path))
    assert engine.said["argv"][1:] == ["--port", "1"]
    assert engine.said["argv"][0].endswith("entry.py")
    assert engine.said["cwd"] == str(tmp_path)
    assert engine.said["stdin"] == os.devnull
    assert engine.said["stdout"] == str(tmp_path / "engine.log")


def test_a_fork_is_the_keepers_child_in_a_session_of_its_own(rig: LauncherRig) -> None:
    engine = rig.engine()
    assert engine.said["parent"] == os.getpid()
    assert engine.said["session"] == engine.pid


def test_an_order_s_environment_comes_on_top_of_the_launcher_s(tmp_path: Path) -> None:
    with LauncherRig(tmp_path, write_stub(tmp_path), env={"KEPT": "1", "CHANGED": "1"}) as rig:
        rig.hear()
        said = rig.engine(env={"CHANGED": "2", "REPORT": str(tmp_path / "report")}).said["env"]
    assert (said["KEPT"], said["CHANGED"]) == ("1", "2")
    assert "VRAMP_LAUNCHER_FD" not in said


def test_temporary_files_go_where_the_order_says(tmp_path: Path) -> None:
    source = "__version__ = '0.32.0'\nimport tempfile\ntempfile.gettempdir()"
    with LauncherRig(tmp_path, write_stub(tmp_path, vllm=source)) as rig:
        rig.hear()
        engine = rig.engine(env={"TMPDIR": str(tmp_path), "REPORT": str(tmp_path / "report")})
    assert engine.said["tmp"] == str(tmp_path)


def test_the_log_is_appended_to(rig: LauncherRig, tmp_path: Path) -> None:
    (tmp_path / "engine.log").write_text("before\n")
    engine = rig.engine()
    engine.kill()
    assert engine.gone()
    assert (tmp_path / "engine.log").read_text().splitlines()[0] == "before"


def test_signal_handlers_of_the_imports_do_not_reach_the_engine(tmp_path: Path) -> None:
    source = "__version__ = '0.32.0'\nimport signal\nsignal.signal(signal.SIGTERM, print)"
    with LauncherRig(tmp_path, write_stub(tmp_path, vllm=source)) as rig:
        rig.hear()
        assert rig.engine().said["sigterm"]


def test_kill_9_of_the_api_server_takes_its_engine_core_along(rig: LauncherRig) -> None:
    engine = rig.engine()
    assert engine.said["core"]
    engine.kill()
    assert engine.gone()
    assert rig.engine().pid != engine.pid


def test_engines_live_on_when_the_launcher_ends(rig: LauncherRig) -> None:
    engine = rig.engine()
    rig.channel.close()
    assert rig.process.wait() == 0
    os.kill(engine.pid, 0)
    engine.kill()
    assert engine.gone()


KEEPER = """
import json, os, signal, socket, sys
sys.path.insert(0, {root!r})
from pathlib import Path
from tests.scheduler.engines.launcher_rig import start, subreaper
subreaper(on=True)
ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
start(Path({stub!r}), theirs, {{}})
theirs.close()
ours.recv(1 << 18)
ours.send(json.dumps({order!r}).encode())
print(json.loads(ours.recv(1 << 18))["pid"], flush=True)
signal.pause()
"""


def test_engine_and_core_die_with_the_keeper(tmp_path: Path) -> None:
    reports = socket.socket(socket.AF_UNIX)
    reports.bind(str(tmp_path / "report"))
    reports.listen()
    order = {
        "op": "fork", "id": 1, "argv": [sys.executable, "-m", MODULE], "cwd": None,
        "env": {"REPORT": str(tmp_path / "report")}, "log": str(tmp_path / "engine.log"),
    }  # fmt: skip
    root = str(Path(__file__).parents[3])
    script = KEEPER.format(root=root, stub=str(write_stub(tmp_path)), order=order)
    with reports, subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as keeper:
        connection, _ = reports.accept()
        with connection:
            assert json.loads(connection.makefile().readline())["core"]
            keeper.send_signal(signal.SIGKILL)
            assert connection.recv(1) == b""


@pytest.mark.parametrize(
    ("order", "reason"),
    [
        ({"log": "/nowhere/engine.log"}, "No such file"),
        ({"argv": ["llama-server", "--port", "1"]}, "only `python -m MODULE`"),
        ({"argv": [sys.executable, "-m"]}, "only `python -m MODULE`"),
    ],
)
def test_what_cannot_be_forked_is_said_and_the_next_order_works(
    rig: LauncherRig, order: dict[str, object], reason: str
) -> None:
    answer = rig.order(**order)
    assert answer["op"] == "failed"
    assert reason in answer["reason"]
    assert rig.engine().pid


def test_an_engine_that_cannot_enter_its_folder_ends_and_says_why_in_its_log(rig: LauncherRig, tmp_path: Path) -> None:
    answer = rig.order(cwd="/nowhere")
    _, status = os.waitpid(answer["pid"], 0)
    assert os.waitstatus_to_exitcode(status) == 1
    assert "/nowhere" in (tmp_path / "engine.log").read_text()


@pytest.mark.parametrize(
    ("replaced", "reason"),
    [
        ({"vllm": "__version__ = '0.99.1'"}, "vLLM 0.99.1 has not been tried"),
        ({"vllm": "raise ValueError('broken')"}, "ValueError: broken"),
        ({"vllm__v1__worker__cpu_worker": None}, "No module named 'vllm.v1.worker"),
        ({"vllm__v1__engine__utils": ""}, "no attribute 'get_mp_context'"),
        ({"xgrammar": "import threading, time\nthreading.Thread(target=time.sleep, args=(9,), daemon=True).start()"},
         "2 threads"),
        ({"torch": "class cuda:\n    is_initialized = staticmethod(lambda: True)", "xgrammar": "import torch"},
         "CUDA is initialised"),
    ],
)  # fmt: skip
def test_a_launcher_that_cannot_fork_safely_says_so_and_ends(
    tmp_path: Path, replaced: dict[str, str | None], reason: str
) -> None:
    with LauncherRig(tmp_path, write_stub(tmp_path, **replaced)) as rig:
        said = rig.hear()
        assert said["op"] == "unusable"
        assert reason in said["reason"]
        assert rig.process.wait() == 0


def model_folder(folder: Path, architecture: str) -> str:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"architectures": [architecture]}))
    return str(folder)


def test_a_model_s_code_is_imported_once_for_all_later_forks(rig: LauncherRig, tmp_path: Path) -> None:
    assert rig.engine().said["imported"] == ["LlamaForCausalLM"]
    rig.engine("--model", model_folder(tmp_path / "other", "OtherForCausalLM"))
    assert rig.engine().said["imported"] == ["LlamaForCausalLM", "OtherForCausalLM"]


def test_a_model_whose_code_starts_a_thread_is_not_forked(tmp_path: Path) -> None:
    threaded = (
        "import threading, time\nthreading.Thread(target=time.sleep, args=(9,), daemon=True).start()\nclass Model: pass"
    )
    with LauncherRig(tmp_path, write_stub(tmp_path, other_model=threaded)) as rig:
        rig.hear()
        answer = rig.order("--model", model_folder(tmp_path / "other", "OtherForCausalLM"))
    assert answer["op"] == "failed"
    assert "2 threads" in answer["reason"]


def test_a_model_that_is_none_is_left_to_the_engine_to_refuse(rig: LauncherRig) -> None:
    assert rig.engine("--model", "/nowhere").said["argv"][1:] == ["--model", "/nowhere"]


def test_on_a_gpu_vllm_is_told_to_fork(tmp_path: Path) -> None:
    platform = "class current_platform:\n    is_cpu = staticmethod(lambda: False)"
    with LauncherRig(tmp_path, write_stub(tmp_path, vllm__platforms=platform)) as rig:
        rig.hear()
        said = rig.engine().said
    assert said["env"]["VLLM_WORKER_MULTIPROC_METHOD"] == "fork"
    assert said["modules"] == ["vllm.v1.worker", "vllm.v1.worker.gpu_model_runner", "vllm.v1.worker.gpu_worker"]
