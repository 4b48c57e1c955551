"""The keeper: a small parent process that owns the listening sockets and the engines, so that they outlive the proxy.

In the way of nginx's master it opens the sockets, starts the proxy, and at the proxy's word the warm launchers and the
engines. A proxy that dies is started again and inherits the sockets; clients meanwhile wait in the listen queue.
What happens here can take every engine down: so one thread, one selector, the standard library and nothing else.

Both protocols are JSON, one message a packet, over SOCK_SEQPACKET. The proxy's is in `scheduler.engines.keeper_link`.
A warm launcher (`scheduler.engines.launcher`) says `{"op": "ready"}` or `{"op": "unusable", "reason"}`, is told
`{"op": "fork", "id", "argv", "env", "cwd", "log"}` and answers `{"op": "forked", "id", "pid"}` or `{"op": "failed",
"id", "reason"}`. The fork leads its own session and is our child (forked twice; we are the subreaper) when it answers.
"""

from __future__ import annotations

import argparse
import itertools
import os
import signal
import socket
import sys
from collections.abc import Callable

from scheduler.engines import keeper_systemd, reaper
from scheduler.engines.keeper_children import Child, Children, become_subreaper
from scheduler.engines.keeper_loop import Channel, Loop, Message
from scheduler.engines.keeper_proxies import Proxies, Proxy
from scheduler.engines.keeper_sockets import Listener, bind_all, ended, say

FORK_LIMIT_S = 20.0
ENGINE_STOP_S = 10.0

Reply = Callable[[Message], object]


class Launcher:
    """A warm launcher: forks engines once it has imported their libraries. `pending` are forks it was asked for."""

    def __init__(self, name: str) -> None:
        self.name, self.state, self.reason = name, "starting", ""
        self.child: Child | None = None
        self.channel: Channel | None = None
        self.pending: dict[int, tuple[Message, Reply]] = {}

    def describe(self) -> Message:
        """As the proxy is told."""
        pid = self.child.pid if self.child else None
        return {"op": "launcher", "name": self.name, "state": self.state, "reason": self.reason, "pid": pid}


class Keeper:
    """The state of everything kept. `run` returns the exit code: 0 after an ordered stop."""

    def __init__(
        self,
        proxy_argv: list[str],
        listeners: list[Listener],
        state_dir: str,
        drain_limit_s: float,
        hang_limit_s: float,
    ) -> None:
        self._drain_limit_s = drain_limit_s
        self._on_signal: dict[int, Callable[[], None]] = {
            signal.SIGCHLD: self._child_ended,
            signal.SIGTERM: self._asked_to_stop,
            signal.SIGINT: self._asked_to_stop,
            signal.SIGHUP: self._asked_to_reload,
            signal.SIGUSR2: self._asked_to_upgrade,
        }
        self._loop = Loop()
        self._children = Children(self._loop, reaper.keeper_tag(state_dir), self._on_signal)
        self._proxies = Proxies(
            self._loop,
            self._children,
            proxy_argv,
            listeners,
            hang_limit_s,
            hear=self._hear,
            give_up=self._stop,
            all_gone=self._proxies_gone,
        )
        self._numbers = itertools.count()
        self._engines: dict[str, Child | None] = {}  # by tag; None while a launcher forks it
        self._launchers: dict[str, Launcher] = {}
        self._stopping = False
        self._code = 0

    def run(self) -> int:
        """Serve until stopped and nothing is left."""
        self._loop.on_signals(self._on_signal)
        self._proxies.run()
        while len(self._children) or not self._stopping:
            self._loop.turn()
        self._children.sweep()  # what had left its session, or was forked while we stopped
        self._loop.close()
        return self._code

    # -- what a proxy asks -------------------------------------------------------------------------------------------

    def _hear(self, proxy: Proxy, message: Message) -> None:
        handlers: dict[str, Callable[[Message, Reply], None]] = {
            "spawn": self._spawn,
            "signal": self._signal,
            "list": self._list,
            "launcher": self._start_launcher,
            "stop": lambda *_: self._stop(code=0),
        }
        try:
            handlers[message["op"]](message, proxy.send)
        except (ValueError, TypeError, LookupError) as error:
            _refuse(message, proxy.send, f"the keeper cannot read this request: {error!r}")

    # -- engines -----------------------------------------------------------------------------------------------------

    def _spawn(self, message: Message, reply: Reply) -> None:
        tag = message["tag"]
        launcher = self._launchers.get(message["launcher"])
        if self._stopping:
            _refuse(message, reply, "everything is being stopped")
        elif tag in self._engines:
            _refuse(message, reply, f"there is an engine {tag} already")
        elif not message["warm"]:
            self._spawn_plain(message, reply, None)
        elif launcher is not None and launcher.state == "ready" and launcher.channel is not None:
            self._fork(launcher, launcher.channel, message, reply)
        else:
            why = f"its launcher is {launcher.state}" if launcher else "it has no launcher"
            self._spawn_plain(message, reply, why)

    def _spawn_plain(self, message: Message, reply: Reply, why: str | None) -> None:
        tag = message["tag"]
        try:
            pid = self._children.start(message["argv"], message["env"], tag, cwd=message["cwd"], log=message["log"])
        except OSError as error:
            self._engines.pop(tag, None)
            _refuse(message, reply, f"cannot start it: {error}")
        else:
            self._spawned(message, reply, pid, warm=False, why=why)

    def _spawned(self, message: Message, reply: Reply, pid: int, *, warm: bool, why: str | None) -> None:
        tag = message["tag"]
        child = Child("engine", tag, pid, lambda _: self._engine_gone(child), message["meta"])
        self._engines[tag] = child
        reply({"op": "spawned", "id": message["id"], "pid": pid, "warm": warm, "why": why})
        self._children.add(child)
        if self._stopping:
            self._signal_child(child, signal.SIGKILL)

    def _engine_gone(self, child: Child) -> None:
        del self._engines[child.tag]
        self._proxies.tell(
            {"op": "exited", "tag": child.tag, "pid": child.pid, "status": child.status, "meta": child.meta}
        )

    def _signal(self, message: Message, reply: Reply) -> None:
        child = self._engines.get(message["tag"])
        if child is None:
            _refuse(message, reply, f"there is no engine {message['tag']}")
        else:
            self._signal_child(child, message["sig"])
            reply({"op": "done", "id": message["id"]})

    def _signal_child(self, child: Child | None, number: int) -> None:
        try:
            if child is not None:
                child.signal(number)
        except OSError as error:
            say(f"signal {number} did not reach {child.tag if child else 'nobody'}: {error}")

    def _living(self) -> list[Child]:
        return [child for child in self._engines.values() if child is not None and child.status is None]

    def _list(self, message: Message, reply: Reply) -> None:
        engines = [
            {"tag": child.tag, "pid": child.pid, "meta": child.meta, "started_s": child.started_s}
            for child in self._living()
        ]
        launchers = [launcher.describe() for launcher in self._launchers.values()]
        reply({"op": "listed", "id": message["id"], "engines": engines, "launchers": launchers})

    # -- warm launchers ----------------------------------------------------------------------------------------------

    def _start_launcher(self, message: Message, reply: Reply) -> None:
        launcher = self._launchers.get(message["name"])
        if launcher is None or launcher.child is None:
            launcher = self._launchers[message["name"]] = Launcher(message["name"])
            self._launch(launcher, message)
        reply({**launcher.describe(), "id": message["id"]})

    def _launch(self, launcher: Launcher, message: Message) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        tag = f"launcher:{launcher.name}"
        env = {**message["env"], "VRAMP_LAUNCHER_FD": str(theirs.fileno())}
        launcher.channel = Channel(self._loop, ours, lambda heard: self._hear_launcher(launcher, heard), say)
        try:
            pid = self._children.start(message["argv"], env, tag, log=message["log"], inherited=(theirs.fileno(),))
        except OSError as error:
            launcher.state, launcher.reason = "unusable", f"it cannot be started: {error}"
            launcher.channel.close()
            return
        finally:
            theirs.close()
        launcher.child = Child("launcher", tag, pid, lambda status: self._launcher_gone(launcher, status))
        self._children.add(launcher.child)

    def _hear_launcher(self, launcher: Launcher, message: Message) -> None:
        if message["op"] in ("ready", "unusable"):
            launcher.state, launcher.reason = message["op"], str(message.get("reason", ""))
            self._proxies.tell(launcher.describe())
            return
        asked, reply = launcher.pending.pop(message["id"])
        if message["op"] == "forked":
            self._spawned(asked, reply, int(message["pid"]), warm=True, why=None)
        else:
            self._spawn_plain(asked, reply, f"its launcher could not fork: {message.get('reason')}")

    def _fork(self, launcher: Launcher, channel: Channel, message: Message, reply: Reply) -> None:
        number = next(self._numbers)
        self._engines[message["tag"]] = None
        launcher.pending[number] = message, reply
        env = {**message["env"], **self._children.marks(message["tag"])}
        order = {"argv": message["argv"], "env": env, "cwd": message["cwd"], "log": message["log"]}
        channel.send({"op": "fork", "id": number, **order})
        self._loop.after(FORK_LIMIT_S, lambda: self._fork_overdue(launcher, number))

    def _fork_overdue(self, launcher: Launcher, number: int) -> None:
        if number in launcher.pending:
            say(f"the launcher {launcher.name} did not fork within {FORK_LIMIT_S:.0f} s: ending it")
            self._signal_child(launcher.child, signal.SIGKILL)

    def _launcher_gone(self, launcher: Launcher, status: int) -> None:
        if launcher.channel is not None:
            launcher.channel.drain()
            launcher.channel.close()
        if launcher.state != "unusable":
            launcher.state, launcher.reason = "ended", f"it {ended(status)}"
        launcher.child = launcher.channel = None
        self._proxies.tell(launcher.describe())
        pending, launcher.pending = launcher.pending, {}
        if pending:
            # It may have forked and not lived to say so: two engines would want one port.
            self._children.kill_strays([f"launcher:{launcher.name}", *(asked["tag"] for asked, _ in pending.values())])
        for asked, reply in pending.values():
            self._spawn_plain(asked, reply, f"its launcher {ended(status)}")

    # -- signals and the end -----------------------------------------------------------------------------------------

    def _child_ended(self) -> None:
        self._children.wait(forks_pending=any(launcher.pending for launcher in self._launchers.values()))

    def _asked_to_reload(self) -> None:
        self._proxies.reload()

    def _asked_to_upgrade(self) -> None:
        self._proxies.upgrade()

    def _asked_to_stop(self) -> None:
        if self._stopping:
            say("asked to stop twice: killing everything")
            self._code = 1
            self._kill_all()
        else:
            self._stop(code=0)

    def _stop(self, code: int) -> None:
        if self._stopping:
            return
        self._stopping, self._code = True, code
        keeper_systemd.notify("STOPPING=1", "STATUS=requests in flight finish")
        self._proxies.stop(self._drain_limit_s)

    def _proxies_gone(self, status: int) -> None:
        self._code = self._code or (1 if status else 0)
        self._stop_engines()

    def _stop_engines(self) -> None:
        for child in self._children:
            self._signal_child(child, signal.SIGTERM if child.kind == "engine" else signal.SIGKILL)
        self._loop.after(ENGINE_STOP_S, self._kill_all)

    def _kill_all(self) -> None:
        for child in self._children:
            self._signal_child(child, signal.SIGKILL)


def _refuse(message: Message, reply: Reply, reason: str) -> None:
    reply({"op": "failed", "id": message.get("id"), "reason": reason})


def main() -> int:
    """`python -m scheduler.engines.keeper --listen HOST:PORT ... -- PROXY_ARGV...`; exit 2: it could not begin."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # a traceback helps nobody who presses Ctrl-C this early
    parser = argparse.ArgumentParser(prog="keeper", description="Owns listening sockets and engines for the proxy.")
    parser.add_argument("--listen", action="append", default=[], metavar="HOST:PORT")
    parser.add_argument("--admin-listen", action="append", default=[], metavar="HOST:PORT")
    parser.add_argument("--state-dir", required=True, metavar="DIR")
    parser.add_argument("--drain-limit", type=float, default=60.0, metavar="SECONDS")
    parser.add_argument("--hang-limit", type=float, default=30.0, metavar="SECONDS", help="0: for ever")
    parser.add_argument("proxy_argv", nargs="+")
    options = parser.parse_args()
    try:
        os.makedirs(options.state_dir, mode=0o700, exist_ok=True)
        become_subreaper()
    except OSError as error:
        say(f"cannot begin: {error}")
        return 2
    # Before binding: a worker of a dead proxy may still hold the port.
    if reaped := reaper.reap(options.state_dir):
        named = ", ".join(f"{each.pid} ({each.command[:60]})" for each in reaped)
        say(f"ended {len(reaped)} processes that a keeper left when it died: {named}")
    listeners = _listeners({"http": options.listen, "admin": options.admin_listen})
    return Keeper(options.proxy_argv, listeners, options.state_dir, options.drain_limit, options.hang_limit).run()


def _listeners(wanted: dict[str, list[str]]) -> list[Listener]:
    """What the service manager passed us; bound here, what it did not. SystemExit(2) after a line that says why not."""
    try:
        passed = keeper_systemd.passed(wanted)
    except ValueError as error:
        say(str(error))
        sys.exit(2)
    names = {name for name, _ in passed}
    return passed + bind_all({name: addresses for name, addresses in wanted.items() if name not in names})


if __name__ == "__main__":
    sys.exit(main())
