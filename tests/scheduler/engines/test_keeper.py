"""The keeper for real: processes are started, killed and counted."""

from __future__ import annotations

import ast
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from scheduler.engines import (
    keeper,
    keeper_children,
    keeper_loop,
    keeper_proxies,
    keeper_sockets,
    keeper_systemd,
    reaper,
)
from tests.patience import PATIENCE_S
from tests.scheduler.engines.keeper_rig import PROXY, SLEEP, Rig, eventually, lives, python

STUBBORN_FAMILY = """
    import os, signal, sys, time
    if os.fork() == 0:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        print(os.getpid(), flush=True)
        time.sleep(60)
    time.sleep(60)
"""
RUNAWAY_FAMILY = """
    import os, time
    if os.fork() == 0:
        os.setsid()
        print(os.getpid(), flush=True)
        time.sleep(60)
    time.sleep(60)
"""
STUBBORN = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1, flush=True); time.sleep(60)"


def printed_pid(rig: Rig, tag: str) -> int:
    return int(eventually(lambda: rig.log(tag).exists() and rig.log(tag).read_text().strip()))


def test_a_dead_proxy_is_replaced_and_neither_engine_nor_waiting_client_is_lost(rig: Callable[..., Rig]) -> None:
    kept = rig()
    engine = kept.spawn("a", SLEEP)["pid"]
    first = kept.ask("who")["pid"]
    os.kill(first, signal.SIGSTOP)
    eventually(lambda: (process := reaper.read(first)) and process.state == "T")
    with socket.create_connection(("127.0.0.1", kept.port)) as waiting, waiting.makefile("rw") as file:
        file.write('{"op": "who"}\n')
        file.flush()
        os.kill(first, signal.SIGKILL)
        assert f'"pid": {first}' not in file.readline()
    assert lives(engine)
    assert kept.ask("list")["engines"][0]["meta"] == {"model": "a"}


@pytest.mark.parametrize("first", ["proxy", "engine"])
def test_an_engine_that_dies_while_there_is_no_proxy_is_told_to_the_next_one(
    rig: Callable[..., Rig], first: str
) -> None:
    kept = rig()
    engine = kept.spawn("a", SLEEP)["pid"]
    if first == "engine":  # the keeper learns of the ends of its children in the order in which it started them
        kept.ask("die")
    proxy = kept.ask("who")["pid"]
    kept.process.send_signal(signal.SIGSTOP)  # so that both are dead before it learns of the first
    for pid in (proxy, engine):
        os.kill(pid, signal.SIGKILL)
    eventually(lambda: not lives(proxy) and not lives(engine))
    kept.process.send_signal(signal.SIGCONT)
    assert eventually(kept.exited) == [
        {"op": "exited", "tag": "a", "pid": engine, "status": -signal.SIGKILL, "meta": {"model": "a"}}
    ]
    assert kept.engines() == []


def test_a_proxy_that_dies_again_and_again_ends_everything(rig: Callable[..., Rig]) -> None:
    kept = rig(setup="keeper_proxies.BACKOFF_FIRST_S = 0.001", proxy=python("import sys; sys.exit('no such table')"))
    _, said = kept.process.communicate(timeout=PATIENCE_S)
    assert kept.process.returncode == 1
    assert said.count("no such table") == keeper_proxies.FAST_DEATHS_LIMIT
    assert "10 times in a row" in said


def test_a_proxy_that_refuses_its_configuration_is_not_started_again(rig: Callable[..., Rig]) -> None:
    kept = rig(proxy=python("import sys; print('bad key', file=sys.stderr); sys.exit(2)"))
    _, said = kept.process.communicate(timeout=PATIENCE_S)
    assert kept.process.returncode == 2
    assert said == "bad key\n"


def test_a_configuration_that_is_broken_when_the_proxy_dies_costs_no_engine(
    rig: Callable[..., Rig], tmp_path: Path
) -> None:
    refusals = keeper_proxies.FAST_DEATHS_LIMIT + 3
    starts = f"""
with open({str(tmp_path / "starts")!r}, "a+b") as file:
    file.write(b".")
    file.flush()
    if 1 < file.tell() <= 1 + {refusals}:
        raise SystemExit({keeper_proxies.REFUSED})
"""
    kept = rig(setup="keeper_proxies.REFUSED_PAUSE_S = 0.001", proxy=python(starts + PROXY))
    engine = kept.spawn("a", SLEEP)["pid"]
    kept.ask("die")
    assert kept.engines() == ["a"], "once it is mended the next proxy goes on"
    assert lives(engine)
    assert (tmp_path / "starts").stat().st_size == 1 + refusals + 1


def test_the_end_of_an_engine_is_told_when_its_whole_family_has_gone(rig: Callable[..., Rig]) -> None:
    kept = rig()
    leader = kept.spawn("a", STUBBORN_FAMILY)["pid"]
    grandchild = printed_pid(kept, "a")
    kept.ask("signal", tag="a", sig=signal.SIGTERM)
    exited = eventually(kept.exited)
    assert not lives(grandchild)
    assert (exited[0]["pid"], exited[0]["status"]) == (leader, -signal.SIGTERM)


def test_a_grandchild_in_a_session_of_its_own_goes_with_its_engine(rig: Callable[..., Rig]) -> None:
    kept = rig()
    leader = kept.spawn("a", RUNAWAY_FAMILY)["pid"]
    grandchild = printed_pid(kept, "a")
    os.kill(leader, signal.SIGKILL)
    eventually(kept.exited)
    assert not lives(grandchild)


def test_sigterm_leaves_nothing_and_exits_with_0(rig: Callable[..., Rig]) -> None:
    kept = rig()
    pids = [kept.ask("who")["pid"], kept.spawn("a", SLEEP)["pid"], kept.spawn("b", RUNAWAY_FAMILY)["pid"]]
    pids.append(printed_pid(kept, "b"))
    assert kept.stop() == (0, "")
    assert not any(lives(pid) for pid in pids)


def test_a_stop_before_the_proxy_can_hear_of_it_is_as_good_as_any(rig: Callable[..., Rig]) -> None:
    kept = rig(proxy=python("import os, signal, time; os.kill(os.getppid(), signal.SIGTERM); time.sleep(60)"))
    _, said = kept.process.communicate(timeout=PATIENCE_S)
    assert (kept.process.returncode, said) == (0, "")


def test_a_proxy_that_does_not_drain_in_time_is_ended(rig: Callable[..., Rig], tmp_path: Path) -> None:
    up = tmp_path / "up"
    proxy = f"""
        import pathlib, signal, time
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        pathlib.Path({str(up)!r}).touch()
        time.sleep(60)
    """
    kept = rig("--drain-limit", "0.05", proxy=python(proxy))
    eventually(up.exists)
    code, said = kept.stop()
    assert code == 1
    assert "did not drain" in said


def test_a_second_ctrl_c_kills_at_once(rig: Callable[..., Rig]) -> None:
    kept = rig()
    engine = kept.spawn("a", STUBBORN)["pid"]
    assert printed_pid(kept, "a") == 1
    kept.process.send_signal(signal.SIGINT)
    time.sleep(0.1)
    assert lives(engine)  # it ignores SIGTERM and has seconds yet
    code, said = kept.stop(signal.SIGINT)
    assert code == 1
    assert "twice" in said
    assert not lives(engine)


def test_everything_dies_with_a_killed_keeper_or_is_reaped_by_the_next(rig: Callable[..., Rig]) -> None:
    kept = rig()
    proxy, leader = kept.ask("who")["pid"], kept.spawn("a", STUBBORN_FAMILY)["pid"]
    orphan = printed_pid(kept, "a")
    kept.process.kill()
    kept.process.communicate()
    eventually(lambda: not lives(proxy) and not lives(leader))
    assert lives(orphan)  # a parent-death signal reaches children only
    kept.start()
    assert kept.engines() == []
    assert not lives(orphan)
    assert f"ended 1 processes that a keeper left when it died: {orphan} (" in kept.stop()[1]


def test_a_taken_port_is_named_in_one_line(rig: Callable[..., Rig]) -> None:
    first = rig()
    first.ask("who")
    second = subprocess.run(first.command, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert second.returncode == 2
    assert second.stderr == f"vramp keeper: cannot listen on 127.0.0.1:{first.port}: Address already in use\n"


def test_children_are_marked_and_see_nothing_of_the_keepers_own(rig: Callable[..., Rig]) -> None:
    kept = rig()
    kept.process.kill()
    kept.process.communicate()
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind("\0vramp-test-" + str(kept.port))
        kept.start({"NOTIFY_SOCKET": "@vramp-test-" + str(kept.port), "PYTHONDONTWRITEBYTECODE": "1"})
        pid = kept.spawn("a", SLEEP, env={"MINE": "1"})["pid"]
        said = eventually(lambda: (word := systemd.recv(200)) != b"WATCHDOG=1" and word)
        assert said.startswith(b"READY=1\nSTATUS=serving (pid ")
        env = reaper.environment(pid)
        assert kept.stop()[0] == 0
        assert systemd.recv(200).startswith(b"STOPPING=1\n")
    assert (env["MINE"], env["VRAMP_TAG"], env["SPT_NOENV"]) == ("1", "a", "1")
    assert env["VRAMP_KEEPER"].startswith(f"{kept.process.pid}-")
    unseen = {"PYTHONDONTWRITEBYTECODE", "VRAMP_KEEPER_FD", "VRAMP_LISTEN_FDS", *keeper_systemd.VARIABLES}
    assert not unseen & set(env)


def test_an_engine_leads_its_session_and_logs_where_only_its_owner_reads(rig: Callable[..., Rig]) -> None:
    kept = rig()
    pid = kept.spawn("a", f"print('hello', flush=True); {SLEEP}")["pid"]
    eventually(lambda: kept.log("a").read_text() == "hello\n")
    assert kept.log("a").stat().st_mode & 0o777 == 0o600
    assert os.getsid(pid) == os.getpgid(pid) == pid


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ({"argv": ["/no/such/program"]}, "No such file or directory: '/no/such/program'"),
        ({"argv": ["true\0"]}, "null byte"),
        ({"argv": 7}, "cannot read this request"),
        ({"log": "/no/such/folder/log"}, "/no/such/folder/log"),
    ],
)
def test_a_start_that_cannot_be_is_answered_and_the_next_one_works(
    rig: Callable[..., Rig], message: dict[str, Any], reason: str
) -> None:
    kept = rig()
    answer = kept.spawn("a", SLEEP, **message)
    assert answer["op"] == "failed"
    assert reason in answer["reason"]
    assert kept.spawn("a", SLEEP)["op"] == "spawned"
    assert "already" in kept.spawn("a", SLEEP)["reason"]


READS_AGAIN = """
    import os, pathlib, signal, socket, sys, time
    mark = pathlib.Path(sys.argv[1])
    keeper = socket.socket(fileno=int(os.environ["VRAMP_KEEPER_FD"]))
    mark.write_text("starting")
    while sys.argv[2:] and not os.path.exists(sys.argv[2]): time.sleep(0.005)
    signal.signal(signal.SIGHUP, lambda *_: mark.write_text("reloaded"))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    mark.write_text("up")
    keeper.send(b'{"op": "ready"}')
    while True: time.sleep(60)
"""


def test_sighup_reaches_the_proxy(rig: Callable[..., Rig], tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    kept = rig(proxy=[*python(READS_AGAIN), str(mark)])
    eventually(lambda: mark.exists() and mark.read_text() == "up")
    kept.process.send_signal(signal.SIGHUP)
    eventually(lambda: mark.read_text() == "reloaded")


def test_sighup_waits_for_a_proxy_that_starts(rig: Callable[..., Rig], tmp_path: Path) -> None:
    """It would die of the signal, and count as one that cannot be started."""
    mark, go_on = tmp_path / "mark", tmp_path / "go on"
    kept = rig(proxy=[*python(READS_AGAIN), str(mark), str(go_on)])
    eventually(lambda: mark.exists() and mark.read_text() == "starting")
    kept.process.send_signal(signal.SIGHUP)
    go_on.touch()
    eventually(lambda: mark.read_text() == "reloaded")
    assert "killed" not in kept.stop()[1]


def test_a_host_name_in_brackets_is_ipv6() -> None:
    (name, sock), *rest = keeper_sockets.bind("http", "[::1]:0")
    with sock:
        assert (name, sock.family, sock.getsockname()[0], rest) == ("http", socket.AF_INET6, "::1", [])


def test_a_name_may_stand_for_an_address_that_the_machine_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    def resolve(*_: Any, **__: Any) -> list[tuple[Any, ...]]:
        lacking = (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("192.0.2.1", 0))
        return [lacking, (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", 0))]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    ((_, sock),) = keeper_sockets.bind("http", "example:0")
    with sock:
        assert sock.getsockname()[0] == "127.0.0.1"
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: resolve()[:1])
    with pytest.raises(OSError, match="Cannot assign requested address"):
        keeper_sockets.bind("http", "example:0")


@pytest.mark.parametrize("address", ["127.0.0.1:http!", "127.0.0.1:99999", "nobody.invalid:80"])
def test_an_address_that_cannot_be_is_named(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        keeper_sockets.bind_all({"http": [address]})
    assert f"cannot listen on {address}: " in capsys.readouterr().err


def test_the_keeper_needs_the_standard_library_only() -> None:
    ours = set()
    kept = (keeper, keeper_children, keeper_loop, keeper_proxies, keeper_sockets, keeper_systemd, reaper)
    for module in kept:
        tree = ast.parse(Path(str(module.__file__)).read_text())
        for node in ast.walk(tree):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
            ours |= {name for name in names if name.split(".")[0] not in sys.stdlib_module_names}
    assert ours == {"scheduler.engines", *(module.__name__ for module in kept[1:5])}
