"""SIGUSR2 as the keeper sees it; tests/e2e/test_upgrade.py has real proxies."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from scheduler.engines import reaper
from tests.patience import PATIENCE_S
from tests.scheduler.engines.keeper_rig import LendingRig, Rig, Systemd, eventually, lives, python

NEVER_READY = "import signal, sys; signal.signal(signal.SIGTERM, lambda *_: sys.exit(0)); signal.pause()"


def proxies(rig: Rig) -> list[int]:
    ours = [process.pid for process in reaper.processes() if process.parent == rig.process.pid]
    return sorted(pid for pid in ours if reaper.environment(pid).get("VRAMP_TAG", "").startswith("proxy:"))


def test_a_successor_that_dies_leaves_the_old_proxy_serving(rig: Callable[..., Rig]) -> None:
    kept = rig()
    old = kept.ask("who")["pid"]
    kept.process.send_signal(signal.SIGUSR2)
    (new,) = set(eventually(lambda: len(found := proxies(kept)) == 2 and found)) - {old}
    kept.process.send_signal(signal.SIGUSR2)
    for _ in range(2):
        kept.ask("list")  # by the second answer its loop has turned
    os.kill(new, signal.SIGKILL)
    eventually(lambda: proxies(kept) == [old])
    eventually(lambda: {"op": "go_on"} in kept.ask("heard"))  # /proc shows the end before the keeper hears of it
    assert kept.ask("who")["pid"] == old
    code, said = kept.stop()
    assert code == 0
    assert f"no upgrade: one is under way, to pid {new}" in said
    assert f"no upgrade: the new proxy was killed by signal 9; the old one serves on (pid {old})" in said


def test_a_successor_that_takes_too_long_to_start_is_ended(rig: Callable[..., Rig]) -> None:
    kept = rig(setup="keeper_proxies.UPGRADE_START_LIMIT_S = 0.8")
    old = kept.ask("who")["pid"]
    kept.process.send_signal(signal.SIGUSR2)
    eventually(lambda: len(proxies(kept)) == 2)
    eventually(lambda: proxies(kept) == [old])
    assert "could not serve yet, and the time is over" in kept.stop()[1]


def test_there_is_nothing_to_upgrade_before_somebody_serves(rig: Callable[..., Rig]) -> None:
    kept = rig(proxy=python(NEVER_READY))
    (only,) = eventually(lambda: proxies(kept))
    kept.process.send_signal(signal.SIGUSR2)
    _, said = kept.stop()
    assert "no upgrade: there is no proxy that serves" in said
    assert not lives(only)


def test_sigterm_in_an_upgrade_ends_all(rig: Callable[..., Rig]) -> None:
    kept = rig()
    kept.ask("who")
    kept.process.send_signal(signal.SIGUSR2)
    both = eventually(lambda: len(found := proxies(kept)) == 2 and found)
    assert kept.stop()[0] == 0
    assert not any(lives(pid) for pid in both)


class Talk:
    """One proxy's end of the keeper's socket."""

    def __init__(self, pid: int, sock: Any) -> None:
        self.pid, self.sock = pid, sock
        sock.settimeout(PATIENCE_S)

    def say(self, **message: Any) -> None:
        self.sock.send(json.dumps(message).encode())

    def hears(self, op: str) -> dict[str, Any]:
        while (message := json.loads(self.sock.recv(1 << 18)))["op"] != op:
            pass
        assert isinstance(message, dict)
        return message


def test_the_keeper_carries_what_the_two_say_and_tells_a_second_successor_whom_to_ask(tmp_path: Path) -> None:
    kept = LendingRig(tmp_path / "state")
    try:
        old = Talk(*kept.lent())
        old.say(op="take_over", id="1", protocol=1)
        assert old.hears("taken_over")["handed"] is None
        old.say(op="ready")
        old.say(op="alive")
        old.say(op="list", id="2")
        old.hears("listed")  # so it has heard the rest as well
        kept.process.send_signal(signal.SIGUSR2)
        new = Talk(*kept.lent())
        new.say(op="take_over", id="3", protocol=1)
        old.hears("hand_over")
        old.say(op="peer", body={"lease": 1})
        old.say(op="handed", handed=["a#1"])
        assert new.hears("peer")["body"] == {"lease": 1}
        assert new.hears("taken_over")["handed"] == ["a#1"]
        new.say(op="peer", body={"granted": 1})
        assert old.hears("peer")["body"] == {"granted": 1}
        os.kill(new.pid, signal.SIGKILL)
        again = Talk(*kept.lent())
        again.say(op="take_over", id="4", protocol=1)
        old.hears("hand_over")
        old.say(op="handed", handed=[])
        assert again.hears("taken_over")["handed"] == []
        os.kill(old.pid, signal.SIGTERM)
        again.hears("left")
        again.say(op="ready")
        for each in (old, new, again):
            each.sock.close()
        assert kept.stop()[0] == 0
    finally:
        kept.close()


def test_two_that_hand_over_in_different_ways_are_not_joined(tmp_path: Path) -> None:
    kept = LendingRig(tmp_path / "state")
    try:
        old = Talk(*kept.lent())
        for message in ({"op": "take_over", "id": "1", "protocol": 1}, {"op": "ready"}, {"op": "list", "id": "2"}):
            old.say(**message)
        old.hears("listed")
        kept.process.send_signal(signal.SIGUSR2)
        new = Talk(*kept.lent())
        new.say(op="take_over", id="3", protocol=2)
        old.hears("go_on")
        for each in (old, new):
            each.sock.close()
        code, said = kept.stop()
        assert (code, "this upgrade takes a restart" in said) == (0, True)
    finally:
        kept.close()


def test_systemd_sees_an_upgrade_that_fails(rig: Callable[..., Rig]) -> None:
    kept = rig()
    kept.process.kill()
    kept.process.communicate(timeout=PATIENCE_S)
    with Systemd() as systemd:
        kept.start({"NOTIFY_SOCKET": "@" + systemd.name})
        systemd.hears("READY=1")
        old = kept.ask("who")["pid"]
        kept.process.send_signal(signal.SIGUSR2)
        systemd.hears("STATUS=a new version is being started")
        (new,) = set(eventually(lambda: len(found := proxies(kept)) == 2 and found)) - {old}
        os.kill(new, signal.SIGKILL)
        systemd.hears("STATUS=serving; an upgrade failed: the new proxy was killed by signal 9")
