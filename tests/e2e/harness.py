"""A whole vramp as a user starts it: `vramp serve` as a process, its keeper, its proxy, its engines."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil

REPO = Path(__file__).resolve().parents[2]
START_LIMIT_S = 60.0
QUESTION = [{"role": "user", "content": "hi"}]


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def simulated(*models: str, memory: str = "2GiB", devices: str = "") -> str:
    """The configuration of one simulated device for these models; `devices` are more lines of its section."""
    head = f"""
[devices]
simulated = [{{ name = "sim0", memory = "{memory}" }}]
{devices}

[[backends]]
name = "sim"
kind = "simulated"
"""
    return head + "".join(models)


def model_table(name: str, *lines: str, memory: str = "900MiB", **engine: float | str) -> str:
    """A model of it, with these lines too. `engine`: what it simulates, if not a quick load and quick answers."""
    settings = {"load_s": 0.1, "ttft_ms": 5, "tokens_per_s": 1000} | engine
    inline = ", ".join(f"{key} = {json.dumps(value)}" for key, value in settings.items())
    table = [f'id = "{name}"', 'backend = "sim"', f'memory_bytes = "{memory}"', *lines, f"simulated = {{ {inline} }}"]
    return "\n".join(["", "[[models]]", *table, ""])


def cli(*argv: str, **env: str) -> subprocess.CompletedProcess[str]:
    """`vramp`, as a user runs it."""
    return subprocess.run(
        [sys.executable, "-m", "proxy.cli", *argv],
        env={**os.environ, "PYTHONPATH": str(REPO), **env},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


def assert_replays(record: Path) -> None:
    """The same events give the same decisions."""
    replayed = cli("simulate", "--replay", str(record))
    assert replayed.returncode == 0, replayed.stdout + replayed.stderr
    assert "the same, decision for decision" in replayed.stdout


class Served:
    """A running `vramp serve`. `stop()` returns its exit code; leaving the context makes sure that nothing is left."""

    def __init__(
        self,
        config: Path,
        state_dir: Path,
        *options: str,
        ports: tuple[int, int] | None = None,
        before: Sequence[str] = (),
        passed: Sequence[int] = (),
    ) -> None:
        """`ports`: of clients and operators; `before`: what is to exec it; `passed`: descriptors for it."""
        self.port, self.admin_port = ports or (free_port(), free_port())
        self.url, self.admin_url = f"http://127.0.0.1:{self.port}", f"http://127.0.0.1:{self.admin_port}"
        self.log = state_dir / "vramp.log"
        argv = [sys.executable, "-m", "proxy.cli", "serve", "--config", str(config)]
        argv += ["--listen", f"127.0.0.1:{self.port}", "--admin-listen", f"127.0.0.1:{self.admin_port}", *options]
        env = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [*before, *argv],
                cwd=state_dir,
                pass_fds=passed,
                env={**env, "PYTHONPATH": str(REPO)},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._seen: set[psutil.Process] = set()

    def __enter__(self) -> Served:
        self.wait(self.ready, "vramp did not become ready")
        return self

    def __exit__(self, *exc: object) -> None:
        self.family()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(40)
            except subprocess.TimeoutExpired:
                self.process.kill()
        for process in self._seen:
            if process.is_running():
                process.kill()

    # ------------------------------------------------------------------ asking

    def ready(self) -> bool:
        try:
            return self.get("/readyz") == b"ok\n"
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            return False

    def get(self, path: str, *, admin: bool = False, headers: dict[str, str] | None = None) -> bytes:
        base = self.admin_url if admin else self.url
        with urllib.request.urlopen(urllib.request.Request(base + path, headers=headers or {}), timeout=10) as answer:
            return bytes(answer.read())

    def status(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.get("/admin/api/status", admin=True))
        return found

    def model(self, name: str) -> dict[str, Any]:
        return next(model for model in self.status()["models"] if model["id"] == name)

    def ask(self, path: str, body: object, headers: dict[str, str] | None = None, timeout: float = 120) -> Any:
        """POST; the JSON answer. Raises urllib's HTTPError with the body readable."""
        request = urllib.request.Request(
            self.url + path, json.dumps(body).encode(), {"Content-Type": "application/json", **(headers or {})}
        )
        with urllib.request.urlopen(request, timeout=timeout) as answer:
            return json.loads(answer.read())

    def chat(self, model: str, headers: dict[str, str] | None = None, **more: object) -> Any:
        """A short answer."""
        body = {"model": model, "messages": QUESTION, "max_tokens": 5, **more}
        return self.ask("/v1/chat/completions", body, headers)

    def operate(self, model: str, action: str) -> dict[str, Any]:
        """load or unload; the last line of the progress."""
        request = urllib.request.Request(f"{self.admin_url}/admin/api/models/{model}/{action}", b"")
        with urllib.request.urlopen(request, timeout=300) as answer:
            lines = answer.read().splitlines()
        last: dict[str, Any] = json.loads(lines[-1])
        return last

    # --------------------------------------------------------------- processes

    def proxy_pid(self) -> int:
        return int(self.status()["pid"])

    def family(self) -> list[psutil.Process]:
        """Every process of ours that lives: keeper, proxy, launchers, engines."""
        try:
            keeper = psutil.Process(self.process.pid)
            found = [keeper, *keeper.children(recursive=True)]
        except psutil.NoSuchProcess:
            found = []
        self._seen.update(found)
        return found

    def kill(self, *pids: int, number: int = signal.SIGKILL) -> None:
        """A signal to processes of ours, and never to another: a pid that is wrong must not end the test run.

        Whoever has gone by itself since the caller looked, or goes with the first of them, is not missed.
        """
        ours = {process.pid for process in self.family()}
        assert pids, "there is nothing to kill"
        strangers = [pid for pid in pids if pid not in ours and psutil.pid_exists(pid)]
        assert not strangers, f"not ours: {strangers} of {pids}"
        for pid in ours.intersection(pids):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def survivors(self) -> list[str]:
        """Processes that were ever ours and still run."""
        return [
            f"{process.pid} {process.cmdline()[:4]}"
            for process in self._seen
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE
        ]

    def wait(self, condition: Callable[[], bool], complaint: str, limit_s: float = START_LIMIT_S) -> None:
        """Polls until the condition holds; fails with the complaint and the server's last words."""
        deadline = time.monotonic() + limit_s
        while not condition():
            if time.monotonic() > deadline or (self.process.poll() is not None and condition == self.ready):
                raise AssertionError(f"{complaint}\n{self.tail()}")
            time.sleep(0.05)

    def stop(self, number: int = signal.SIGTERM, limit_s: float = 60.0) -> int:
        self.family()
        self.process.send_signal(number)
        return self.process.wait(limit_s)

    def tail(self, size: int = 4000) -> str:
        return self.log.read_text(errors="replace")[-size:]
