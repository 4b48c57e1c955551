"""The keeper and its service manager: who is told what, whose sockets are used, what becomes of a proxy that hangs."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from scheduler.engines import keeper_systemd
from tests.patience import PATIENCE_S
from tests.scheduler.engines.keeper_rig import SLEEP, Rig, Systemd, eventually, lives, passed_by_systemd, python

HANGS = """
    import json, os, signal, socket, sys, time
    keeper = socket.socket(fileno=int(os.environ["VRAMP_KEEPER_FD"]))
    keeper.send(b'{"op": "alive"}')
    keeper.send(b'{"op": "ready"}')
    if not os.path.exists(sys.argv[1]):
        open(sys.argv[1], "w").write(str(os.getpid()))
        signal.pause()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    signal.signal(signal.SIGHUP, lambda *_: keeper.send(b'{"op": "reloaded", "note": "it was read again"}'))
    open(sys.argv[1] + ".next", "w").write(str(os.getpid()))
    while True:
        keeper.send(b'{"op": "alive"}')
        time.sleep(0.02)
"""


def test_a_proxy_that_hangs_is_ended_and_another_started(rig: Callable[..., Rig], tmp_path: Path) -> None:
    first = tmp_path / "first"
    kept = rig("--hang-limit", "0.6", setup="keeper_proxies.BEAT_S = 0.02", proxy=[*python(HANGS), str(first)])
    pid = int(eventually(lambda: first.exists() and first.read_text()))
    eventually(lambda: not lives(pid))
    eventually((tmp_path / "first.next").exists)
    kept.process.send_signal(signal.SIGSTOP)  # a keeper that was stopped itself suspects nobody
    time.sleep(0.9)
    kept.process.send_signal(signal.SIGCONT)
    code, said = kept.stop()
    assert (code, said.count("has given no sign of life")) == (0, 1)
    assert "killed by signal 6" in said


def test_a_limit_of_0_ends_nobody(rig: Callable[..., Rig], tmp_path: Path) -> None:
    first = tmp_path / "first"
    kept = rig("--hang-limit", "0", setup="keeper_proxies.BEAT_S = 0.01", proxy=[*python(HANGS), str(first)])
    pid = int(eventually(lambda: first.exists() and first.read_text()))
    time.sleep(0.1)
    assert lives(pid)
    assert "sign of life" not in kept.stop()[1]


def test_systemd_is_told_of_every_turn(rig: Callable[..., Rig], tmp_path: Path) -> None:
    first = tmp_path / "first"
    first.touch()
    with Systemd() as systemd:
        kept = rig("--hang-limit", "4", proxy=[*python(HANGS), str(first)])
        kept.process.kill()
        kept.process.communicate(timeout=PATIENCE_S)
        kept.start({"NOTIFY_SOCKET": "@" + systemd.name, "WATCHDOG_USEC": "60000"})
        systemd.hears("READY=1")
        systemd.hears("WATCHDOG=1")
        systemd.hears("WATCHDOG=1")
        kept.process.send_signal(signal.SIGHUP)
        assert systemd.hears("RELOADING=1")[1].startswith("MONOTONIC_USEC=")
        assert systemd.hears("READY=1") == ["READY=1", "STATUS=serving; it was read again"]
        assert kept.stop()[0] == 0
        systemd.hears("STOPPING=1")


def test_the_watchdog_of_another_process_is_not_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "2000000")
    assert keeper_systemd.watchdog_limit_s() == 2.0
    monkeypatch.setenv("WATCHDOG_PID", "1")
    assert keeper_systemd.watchdog_limit_s() is None


def passing(kept: Rig, sock: socket.socket, name: str) -> subprocess.Popen[str]:
    """The rig's keeper, started with this socket as systemd starts it."""
    argv = [*passed_by_systemd({name: sock}), *kept.command]
    return subprocess.Popen(argv, stderr=subprocess.PIPE, text=True, pass_fds=(sock.fileno(),))


def test_a_socket_of_systemd_is_used_instead_of_a_port_of_our_own(rig: Callable[..., Rig]) -> None:
    kept = rig()
    kept.process.kill()
    kept.process.communicate(timeout=PATIENCE_S)
    with socket.create_server(("127.0.0.1", kept.port)) as passed:
        kept.process = passing(kept, passed, "http")
        assert kept.ask("who")["pid"]
        pid = kept.spawn("a", SLEEP)["pid"]
        assert not {"LISTEN_PID", "LISTEN_FDS"} & set(Path(f"/proc/{pid}/environ").read_text().split("="))
        assert kept.stop() == (0, "")


@pytest.mark.parametrize(("name", "listens"), [("vramp.socket", True), ("http", False)])
def test_a_socket_that_is_not_for_us_is_refused_by_name(rig: Callable[..., Rig], name: str, listens: bool) -> None:
    kept = rig()
    kept.process.kill()
    kept.process.communicate(timeout=PATIENCE_S)
    with socket.socket() as passed:
        passed.bind(("127.0.0.1", 0))
        if listens:
            passed.listen()
        process = passing(kept, passed, name)
        _, said = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 2
    assert name in said
    assert ("FileDescriptorName=http or FileDescriptorName=admin" in said) == listens


def test_sockets_passed_to_another_process_are_not_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LISTEN_FDS", "2")
    monkeypatch.setenv("LISTEN_PID", "1")
    assert keeper_systemd.passed_names() == []
    monkeypatch.setenv("LISTEN_PID", str(os.getpid()))
    monkeypatch.setenv("LISTEN_FDNAMES", "http")
    assert keeper_systemd.passed_names() == ["http", "unknown"]
