"""A launcher under test: this process plays the keeper, a stub on PYTHONPATH plays vLLM.

The stub's engine connects to a socket of ours, says what it finds, and holds the connection open as its own forks do:
end of file means that no process of that engine is left.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from scheduler.engines import launcher

PR_SET_CHILD_SUBREAPER = 36
LAUNCHER = Path(launcher.__file__)
MODULE = "vllm.entrypoints.launchers.api_server.entry"

MODULES = {
    "vllm": "__version__ = '0.32.0'",
    "vllm.platforms": "class current_platform:\n    is_cpu = staticmethod(lambda: True)",
    "vllm.utils.system_utils": "def get_mp_context(): raise RuntimeError('vLLM would spawn')",
    "vllm.model_executor.models.registry": """
        class Lazy:
            def __init__(self, module_name): self.module_name = module_name
            def load_model_cls(self):
                import importlib
                return importlib.import_module(self.module_name).Model
        class ModelRegistry:
            models = {"LlamaForCausalLM": Lazy("llama_model"), "OtherForCausalLM": Lazy("other_model")}
            @classmethod
            def register_model(cls, name, model): cls.models[name] = model
    """,
    "llama_model": "class Model: pass",
    "other_model": "class Model: pass",
    MODULE: """
        import json, os, signal, socket, sys, tempfile, time
        from vllm.model_executor.models.registry import ModelRegistry
        from vllm.v1.engine import utils
        if __name__ == "__main__":
            report = socket.socket(socket.AF_UNIX)
            report.connect(os.environ["REPORT"])
            core = None
            if "VLLM_WORKER_MULTIPROC_METHOD" not in os.environ:
                core = utils.get_mp_context().Process(target=time.sleep, args=(1000,))
                core.start()
            said = {
                "argv": sys.argv, "env": dict(os.environ), "cwd": os.getcwd(), "tmp": tempfile.gettempdir(),
                "session": os.getsid(0), "parent": os.getppid(),
                "stdin": os.readlink("/proc/self/fd/0"), "stdout": os.readlink("/proc/self/fd/1"),
                "core": core and core.pid, "sigterm": signal.getsignal(signal.SIGTERM) is signal.SIG_DFL,
                "imported": [name for name, model in ModelRegistry.models.items() if isinstance(model, type)],
                "modules": sorted(name for name in sys.modules if name.startswith("vllm.v1.worker")),
            }
            report.sendall(json.dumps(said).encode() + b"\\n")
            print("the engine runs", flush=True)
            signal.pause()
    """,
}


def write_stub(folder: Path, **replaced: str | None) -> Path:
    """The stub package; `replaced` has other sources by module name with __ for dots, None leaves a module out."""
    (folder / "vllm").mkdir()
    changed = {name.replace("__", "."): source for name, source in replaced.items()}
    spawning = dict.fromkeys(launcher.SPAWNING_MODULES, "def get_mp_context(): raise RuntimeError")
    others = dict.fromkeys((*launcher.IMPORTS, *launcher.CPU_IMPORTS, *launcher.GPU_IMPORTS), "")
    for name, source in {**others, **spawning, **MODULES, **changed}.items():
        if source is not None:
            _write_module(folder, name, source)
    return folder


def _write_module(folder: Path, name: str, source: str) -> None:
    *parents, last = name.split(".")
    for parent in parents:
        folder = folder / parent
        folder.mkdir(exist_ok=True)
        (folder / "__init__.py").touch()
    lines = source.strip("\n").splitlines() or [""]
    indent = len(lines[0]) - len(lines[0].lstrip())
    text = "\n".join(line[indent:] for line in lines) + "\n"
    (folder / f"{last}.py" if parents or name != "vllm" else folder / "vllm" / "__init__.py").write_text(text)


class Engine:
    """What a forked engine said of itself, and the connection that it holds."""

    def __init__(self, pid: int, connection: socket.socket) -> None:
        self.pid = pid
        self.connection = connection
        self.said: dict[str, Any] = json.loads(connection.makefile().readline())

    def kill(self) -> None:
        """kill -9 of its leader alone, as an operator would."""
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)

    def gone(self) -> bool:
        """Waits until no process of it is left."""
        return self.connection.recv(1) == b""


class LauncherRig:
    """Starts the launcher, gives orders, and cleans up. This process is a subreaper meanwhile."""

    def __init__(self, folder: Path, stub: Path | None, env: dict[str, str] | None = None) -> None:
        self.folder, self.stub, self.env = folder, stub, env or {}
        self.engines: list[Engine] = []
        self.numbers = iter(range(1, 100))
        self.reports = socket.socket(socket.AF_UNIX)
        self.reports.bind(str(folder / "report"))
        self.reports.listen()

    def __enter__(self) -> LauncherRig:
        subreaper(on=True)
        self.channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self.process = start(self.stub, theirs, self.env)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.channel.close()
        self.process.wait()
        for engine in self.engines:
            with suppress(ProcessLookupError, ChildProcessError):
                engine.kill()
            engine.connection.close()
        self.reports.close()
        subreaper(on=False)

    def hear(self) -> dict[str, Any]:
        """The next packet."""
        heard: dict[str, Any] = json.loads(self.channel.recv(1 << 18))
        return heard

    def order(self, *args: str, argv: list[str] | None = None, **changed: Any) -> dict[str, Any]:
        """Ask for an engine; returns the launcher's answer."""
        order = {
            "op": "fork", "id": next(self.numbers), "argv": argv or [sys.executable, "-m", MODULE, *args],
            "env": {"REPORT": str(self.folder / "report")}, "cwd": None, "log": str(self.folder / "engine.log"),
        }  # fmt: skip
        self.channel.send(json.dumps({**order, **changed}).encode())
        return self.hear()

    def engine(self, *args: str, **changed: Any) -> Engine:
        """An engine that runs."""
        answer = self.order(*args, **changed)
        assert answer["op"] == "forked", answer
        engine = Engine(answer["pid"], self.reports.accept()[0])
        self.engines.append(engine)
        return engine


def subreaper(*, on: bool) -> None:
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, int(on), 0, 0, 0)


def start(stub: Path | None, theirs: socket.socket, env: dict[str, str]) -> subprocess.Popen[bytes]:
    """The launcher on this stub; None: on the real vLLM."""
    path = {} if stub is None else {"PYTHONPATH": str(stub)}
    return subprocess.Popen(
        [sys.executable, str(LAUNCHER)],
        env={**os.environ, **env, **path, "VRAMP_LAUNCHER_FD": str(theirs.fileno())},
        pass_fds=[theirs.fileno()],
        stdin=subprocess.DEVNULL,
    )
