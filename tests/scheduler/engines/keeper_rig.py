"""A real keeper with a scripted proxy, for tests that kill things.

The scripted proxy serves the inherited socket: a connection sends one JSON line, a message for the keeper, and gets the
keeper's answer as one line. What comes unasked is kept and handed out for `{"op": "heard"}`; `{"op": "die"}` ends it.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from scheduler.engines import reaper
from tests.patience import PATIENCE_S

PROXY = textwrap.dedent(
    """
    import json, os, signal, socket, sys
    listener = socket.socket(fileno=int(os.environ["VRAMP_LISTEN_FDS"].split(",")[0].partition("=")[2]))
    keeper = socket.socket(fileno=int(os.environ["VRAMP_KEEPER_FD"]))
    heard, numbers = [], 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    keeper.send(json.dumps({"op": "ready"}).encode())

    def ask(message):
        global numbers
        numbers += 1
        keeper.send(json.dumps({**message, "id": f"{os.getpid()}-{numbers}"}).encode())
        while True:
            answer = json.loads(keeper.recv(1 << 18))
            if answer.get("id") == f"{os.getpid()}-{numbers}":
                return answer
            heard.append(answer)

    while True:
        client, _ = listener.accept()
        with client, client.makefile("rw") as file:
            message = json.loads(file.readline())
            if message["op"] == "die":
                os._exit(message.get("status", 1))
            answer = {"pid": os.getpid()}
            if message["op"] == "heard":
                ask({"op": "list"})
                answer = heard
            elif message["op"] != "who":
                answer = ask(message)
            file.write(json.dumps(answer) + "\\n")
    """
)


SLEEP = "import time; time.sleep(60)"


def python(code: str) -> list[str]:
    """A command line that runs this code; -S because site-packages take most of a start."""
    return [sys.executable, "-S", "-c", textwrap.dedent(code)]


def passed_by_systemd(sockets: Mapping[str, socket.socket]) -> list[str]:
    """What to put before a command line to have it started with these listening sockets, under these names."""
    code = """
        import fcntl, os, sys
        *descriptors, names = sys.argv[1].split(",")
        held = [fcntl.fcntl(int(descriptor), fcntl.F_DUPFD, 10) for descriptor in descriptors]  # out of the way
        for number, descriptor in enumerate(held, start=3):
            os.dup2(descriptor, number, inheritable=True)
        env = {"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": str(len(held)), "LISTEN_FDNAMES": names}
        os.execve(sys.argv[2], sys.argv[2:], {**os.environ, **env})
    """
    descriptors = ",".join(str(sock.fileno()) for sock in sockets.values())
    return [*python(code), f"{descriptors},{':'.join(sockets)}"]


class Systemd:
    """A service manager: the socket that it listens on."""

    def __init__(self) -> None:
        self.name = f"vramp-test-{os.getpid()}-{time.monotonic_ns()}"
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.sock.bind("\0" + self.name)
        self.sock.settimeout(PATIENCE_S)

    def __enter__(self) -> Systemd:
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()

    def hears(self, words: str) -> list[str]:
        """Read until these words come; the lines of their message."""
        while words not in (lines := self.sock.recv(1000).decode().splitlines()):
            pass
        return lines


def eventually(true: Callable[[], Any], limit_s: float = PATIENCE_S) -> Any:
    """Wait for a fact that another process brings about."""
    deadline = time.monotonic() + limit_s
    while not (result := true()):
        if time.monotonic() > deadline:
            raise AssertionError("it did not come true")
        time.sleep(0.005)
    return result


def lives(pid: int) -> bool:
    process = reaper.read(pid)
    return process is not None and process.state != "Z"


class Rig:
    """One keeper over a temporary state directory."""

    def __init__(self, state_dir: Path, *options: str, proxy: list[str] | None = None, setup: str = "") -> None:
        self.state_dir = state_dir
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        code = f"import sys\nfrom scheduler.engines import keeper, keeper_proxies\n{setup}\nsys.exit(keeper.main())"
        self.command = [sys.executable, "-c", code, "--listen", f"127.0.0.1:{self.port}", "--state-dir", str(state_dir)]
        self.command += [*options, "--", *(proxy or python(PROXY))]
        self.start()

    def start(self, env: dict[str, str] | None = None) -> None:
        self.process = subprocess.Popen(
            self.command,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **(env or {})},
        )

    def ask(self, op: str, **message: Any) -> Any:
        """Through the listening socket to the proxy, and by it to the keeper. Waits for a keeper that just starts."""
        client = eventually(self._connect)
        with client, client.makefile("rw") as file:
            file.write(json.dumps({"op": op, **message}) + "\n")
            file.flush()
            line = file.readline()
            return json.loads(line) if line else None

    def spawn(self, tag: str, code: str, **message: Any) -> dict[str, Any]:
        order = {"argv": python(code), "env": {}, "cwd": None, "log": str(self.log(tag)), "meta": {"model": tag}}
        answer = self.ask("spawn", tag=tag, **{**order, "warm": False, "launcher": None, **message})
        assert isinstance(answer, dict)
        return answer

    def log(self, tag: str) -> Path:
        return self.state_dir / f"{tag}.log"

    def engines(self) -> list[str]:
        return [engine["tag"] for engine in self.ask("list")["engines"]]

    def exited(self) -> list[dict[str, Any]]:
        return [event for event in self.ask("heard") if event["op"] == "exited"]

    def stop(self, number: int = signal.SIGTERM) -> tuple[int, str]:
        """Signal the keeper and wait: exit code and what it said."""
        self.process.send_signal(number)
        _, said = self.process.communicate(timeout=PATIENCE_S)
        return self.process.returncode, said

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate()
        reaper.reap(str(self.state_dir))

    def _connect(self) -> socket.socket | None:
        if self.process.poll() is not None:
            raise AssertionError(f"the keeper ended with {self.process.returncode}: {self.process.communicate()[1]}")
        try:
            return socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE_S)
        except ConnectionRefusedError:
            return None


LENDER = textwrap.dedent(
    """
    import os, signal, socket, sys
    # Before the test hears of us, and waited for, not handled: no SIGTERM finds us not ready for it.
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    with socket.socket(socket.AF_UNIX) as borrower:
        borrower.connect(sys.argv[1])
        socket.send_fds(borrower, [b"%d" % os.getpid()], [int(os.environ["VRAMP_KEEPER_FD"])])
    os.close(int(os.environ["VRAMP_KEEPER_FD"]))
    signal.sigwait([signal.SIGTERM])
    """
)


class LendingRig(Rig):
    """A keeper whose proxy lends its end of the keeper's socket to the test, each proxy anew."""

    def __init__(self, state_dir: Path) -> None:
        state_dir.mkdir(parents=True)
        self._meeting = socket.socket(socket.AF_UNIX)
        self._meeting.bind(str(state_dir / "meet"))
        self._meeting.listen()
        self._meeting.settimeout(PATIENCE_S)
        super().__init__(state_dir, proxy=[*python(LENDER), str(state_dir / "meet")])

    def borrow(self) -> socket.socket:
        """The next proxy's end of the keeper's socket."""
        return self.lent()[1]

    def lent(self) -> tuple[int, socket.socket]:
        """The next proxy's pid, and its end of the keeper's socket."""
        lender, _ = self._meeting.accept()
        with lender:
            pid, descriptors, _, _ = socket.recv_fds(lender, 16, 1)
        return int(pid), socket.socket(fileno=descriptors[0])

    def proxy_pid(self) -> int:
        pids = [process.pid for process in reaper.processes() if process.parent == self.process.pid]
        return next(pid for pid in pids if reaper.environment(pid).get("VRAMP_TAG", "").startswith("proxy"))

    def close(self) -> None:
        super().close()
        self._meeting.close()
