"""The keeper's proxies: started, watched, started again when they die, ended when they hang, replaced on SIGUSR2.

A proxy says `alive` every second or two from its event loop. One that does not for `hang_limit_s` is asked where it
hangs (SIGABRT: it prints its stacks) and killed; it then comes back like any that died, and loses no engine by it.

An upgrade is a hand-over between two proxies, of which we only carry the messages (`scheduler.handover`):

    SIGUSR2      we start the successor; whatever becomes of it before it has all it needs, the old one serves on
    take_over    says the successor, which could serve now; we say hand_over to the old one
    handed       says the old one, when no load is under way and it accepts no more; we say taken_over to the successor
    ready        says the successor, and serves; the old one ends after its last request

The same words serve when the successor dies after that: the proxy that is started in its place also says take_over, and
the one that leaves tells it everything again. A proxy that finds nobody is told so at once.
"""

from __future__ import annotations

import itertools
import signal
import socket
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from scheduler.engines import keeper_systemd
from scheduler.engines.keeper_children import Child, Children
from scheduler.engines.keeper_loop import Channel, Loop, Message
from scheduler.engines.keeper_sockets import Listener, ended, say

FAST_DEATH_S = 5.0
FAST_DEATHS_LIMIT = 10
BACKOFF_FIRST_S, BACKOFF_LIMIT_S = 0.1, 5.0
REFUSED_PAUSE_S = 1.0  # until a configuration that was refused is tried again
BEAT_S = 1.0  # how often we look who is alive, and say that we are
START_LIMIT_S = 60.0  # from a proxy's start to its first sign of life
LAST_WORDS_S = 2.0  # for a hung proxy to print its stacks
UPGRADE_START_LIMIT_S = 60.0  # from a successor's start until it could serve
HAND_OVER_LIMIT_S = 600.0  # until no load is under way
REFUSED = 2  # exit status of a proxy that will not start with this configuration; starting it again cannot help


class Proxy:
    """One proxy process and our end of its socket."""

    def __init__(self, now_s: float) -> None:
        self.child: Child | None = None
        self.channel: Channel | None = None
        self.started_s = self.heard_s = now_s
        self.is_up = False  # it has given a sign of life
        self.is_ready = False
        self.is_stale = False  # it is to read its configuration again once it can be told so
        self.is_hung = False
        self.taking: Any = None  # the id of its take_over, until that is answered
        self.protocol: Any = None  # of hand-overs, as its take_over says

    @property
    def pid(self) -> int:
        """0 before it was started."""
        return self.child.pid if self.child else 0

    def send(self, message: Message) -> bool:
        """False, and lost, when it has gone, which may be before SIGCHLD tells of it."""
        return self.channel is not None and self.channel.send(message)


class Proxies:
    """Who serves. `hear(proxy, message)` gets what is not about proxies; `give_up(code)` is called when starting
    another proxy cannot help, `all_gone(status)` when the last has ended after `stop`."""

    def __init__(
        self,
        loop: Loop,
        children: Children,
        argv: Sequence[str],
        listeners: Sequence[Listener],
        hang_limit_s: float,
        *,
        hear: Callable[[Proxy, Message], None],
        give_up: Callable[[int], None],
        all_gone: Callable[[int], None],
    ) -> None:
        self._loop, self._children, self._argv, self._listeners = loop, children, list(argv), listeners
        self._hang_limit_s = hang_limit_s
        self._hear_other, self._give_up, self._all_gone = hear, give_up, all_gone
        self._serving: Proxy | None = None
        self._successor: Proxy | None = None  # starts, or waits until it is handed the engines
        self._leaving: Proxy | None = None  # has handed them over, and finishes its requests
        self._status = 0
        self._numbers = itertools.count(1)
        self._unheard: deque[Message] = deque(maxlen=100)  # ends of engines while no proxy could hear
        self._fast_deaths = 0
        self._was_ready = self._stopping = False
        self._beat_at_s = time.monotonic()
        watchdog_s = keeper_systemd.watchdog_limit_s()
        self._beat_s = BEAT_S if watchdog_s is None else min(BEAT_S, watchdog_s / 3)

    def run(self) -> None:
        """Start the first, and watch from now on."""
        self._beat_at_s = time.monotonic()
        self._loop.after(self._beat_s, self._beat)
        self._start_serving()

    def tell(self, message: Message) -> None:
        """Tell whoever serves or has requests in flight; the end of an engine waits for the next who serves."""
        if self._leaving is not None:
            self._leaving.send(message)
        is_heard = self._serving is not None and self._serving.send(message)
        if not is_heard and message["op"] == "exited":
            self._unheard.append(message)

    def reload(self) -> None:
        """SIGHUP: have the configuration read again. A proxy that starts may have read it already, but would die of the
        signal until it handles it: it is told when it is ready."""
        keeper_systemd.reloading()
        serving = self._serving
        if serving is not None and serving.is_ready:
            self._signal(serving, signal.SIGHUP)
        elif serving is not None:
            serving.is_stale = True

    def upgrade(self) -> None:
        """SIGUSR2: replace the proxy by one started now, from the code and the configuration that are there now."""
        serving = self._serving
        if self._stopping or serving is None or not serving.is_ready:
            say("no upgrade: there is no proxy that serves")
        elif self._successor is not None:
            say(f"no upgrade: one is under way, to pid {self._successor.pid}")
        elif self._leaving is not None:
            say(f"no upgrade: the version before (pid {self._leaving.pid}) has requests in flight yet")
        elif (successor := self._start()) is not None:
            say(f"upgrade: starting a new proxy (pid {successor.pid}) beside the old one (pid {serving.pid})")
            keeper_systemd.notify("STATUS=a new version is being started")
            self._successor = successor
            self._loop.after(UPGRADE_START_LIMIT_S, lambda: self._still_starting(successor))

    def stop(self, drain_limit_s: float) -> None:
        """SIGTERM to all; who has not ended after the limit is killed."""
        self._stopping = True
        if not any(self):
            self._all_gone(self._status)
            return
        for proxy in self:
            self._signal(proxy, signal.SIGTERM)
        self._loop.after(drain_limit_s, lambda: self._overdue(drain_limit_s))

    def __iter__(self) -> Iterator[Proxy]:
        return iter([each for each in (self._serving, self._successor, self._leaving) if each is not None])

    # -- their lives -------------------------------------------------------------------------------------------------

    def _start_serving(self) -> None:
        if self._stopping or self._serving is not None:
            return
        self._serving = self._start()
        if self._serving is None:
            self._give_up(1)
        else:
            self._tell_unheard(self._serving)

    def _tell_unheard(self, proxy: Proxy) -> None:
        while self._unheard:
            proxy.send(self._unheard.popleft())

    def _start(self) -> Proxy | None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        tag = f"proxy:{next(self._numbers)}"  # each its own: what is left of one is cleared away by it
        env = {
            "VRAMP_LISTEN_FDS": ",".join(f"{name}={sock.fileno()}" for name, sock in self._listeners),
            "VRAMP_KEEPER_FD": str(theirs.fileno()),
        }
        inherited = (theirs.fileno(), *(sock.fileno() for _, sock in self._listeners))
        proxy = Proxy(time.monotonic())
        proxy.channel = Channel(self._loop, ours, lambda message: self._hear(proxy, message), say)
        try:
            pid = self._children.start(self._argv, env, tag, inherited=inherited)
        except OSError as error:
            say(f"cannot start the proxy: {error}")
            proxy.channel.close()
            return None
        finally:
            theirs.close()
        proxy.child = Child("proxy", tag, pid, lambda status: self._gone(proxy, status))
        self._children.add(proxy.child)
        return proxy

    def _gone(self, proxy: Proxy, status: int) -> None:
        stopping = self._stopping
        if proxy.channel is not None:
            proxy.channel.close()
        if proxy is self._successor:
            self._successor_gone(status)
        elif proxy is self._leaving:
            self._left(status)
        else:
            self._serving_gone(proxy, status)
        if stopping and not any(self):
            self._all_gone(self._status)

    def _serving_gone(self, proxy: Proxy, status: int) -> None:
        self._serving = None
        if self._stopping:
            self._stopped(status)
        elif self._successor is not None:
            say(f"the proxy {ended(status)} before it could hand over: its successor goes on")
            self._serving, self._successor = self._successor, None
            self._serving.send({"op": "left"})
            self._tell_unheard(self._serving)
            self._answer_taking(None)
        elif status == REFUSED and not self._was_ready:
            self._give_up(REFUSED)
        else:
            self._restart(status, time.monotonic() - proxy.started_s)

    # -- upgrades ----------------------------------------------------------------------------------------------------

    def _successor_gone(self, status: int) -> None:
        self._successor = None
        if not self._stopping and self._serving is not None:
            say(f"no upgrade: the new proxy {ended(status)}; the old one serves on (pid {self._serving.pid})")
            keeper_systemd.notify(f"STATUS=serving; an upgrade failed: the new proxy {ended(status)}")
            self._serving.send({"op": "go_on"})

    def _left(self, status: int) -> None:
        self._leaving = None
        say(f"the version before {ended(status)}" if status else "the version before has finished its requests")
        if self._stopping:
            self._stopped(status)
        if self._serving is not None:
            self._serving.send({"op": "left"})

    def _stopped(self, status: int) -> None:
        if status != -signal.SIGTERM:  # else it had not come so far as to handle it, and had nothing to finish
            self._status = self._status or status

    def _still_starting(self, successor: Proxy) -> None:
        if successor.taking is None:
            self._too_late(successor)

    def _too_late(self, successor: Proxy) -> None:
        if successor is self._successor:
            what = "could not serve yet" if successor.taking is None else "has not been handed the engines"
            say(f"the new proxy (pid {successor.pid}) {what}, and the time is over: ending it")
            self._signal(successor, signal.SIGKILL)

    def _take_over(self, proxy: Proxy, message: Message) -> None:
        proxy.taking, proxy.protocol = message["id"], message["protocol"]
        giver = self._serving if proxy is self._successor else self._leaving
        if giver is not None and giver.protocol != proxy.protocol:
            say(f"the proxies {giver.pid} and {proxy.pid} hand over in different ways: this upgrade takes a restart")
            giver = None
            if proxy is self._successor:
                self._signal(proxy, signal.SIGKILL)
                return
        if giver is None:
            self._answer_taking(None)
            return
        giver.send({"op": "hand_over"})
        if proxy is self._successor:
            self._loop.after(HAND_OVER_LIMIT_S, lambda: self._too_late(proxy))

    def _handed(self, proxy: Proxy, message: Message) -> None:
        if proxy is self._serving:
            # also when the successor has died in this moment: then the next is started, and asks again
            self._leaving, self._serving, self._successor = proxy, self._successor, None
            if self._serving is None:
                self._start_serving()
                return
        self._answer_taking(message["handed"])

    def _answer_taking(self, handed: Any) -> None:
        if self._serving is not None and self._serving.taking is not None:
            self._serving.send({"op": "taken_over", "id": self._serving.taking, "handed": handed})
            self._serving.taking = None

    def _peer(self, proxy: Proxy, message: Message) -> None:
        other = self._serving if proxy is self._leaving else self._leaving or self._successor
        if other is not None:
            other.send(message)

    def _restart(self, status: int, lived_s: float) -> None:
        engines = sum(1 for child in self._children if child.kind == "engine")
        say(f"the proxy {ended(status)} after {lived_s:.1f} s; {engines} engines live on")
        keeper_systemd.notify(f"STATUS=the proxy {ended(status)}: starting another")
        if status == REFUSED:
            # broken since the last one began: a person's to mend, and to end the engines meanwhile would win nothing
            self._loop.after(REFUSED_PAUSE_S, self._start_serving)
            return
        self._fast_deaths = self._fast_deaths + 1 if lived_s < FAST_DEATH_S else 0
        if self._fast_deaths >= FAST_DEATHS_LIMIT:
            say(f"that was {self._fast_deaths} times in a row, each time at once: stopping; its last lines are above")
            self._give_up(1)
            return
        delay_s = 0.0
        if self._fast_deaths > 1:
            delay_s = min(BACKOFF_FIRST_S * 2 ** (self._fast_deaths - 2), BACKOFF_LIMIT_S)
        self._loop.after(delay_s, self._start_serving)

    # -- what they say -----------------------------------------------------------------------------------------------

    def _hear(self, proxy: Proxy, message: Message) -> None:
        if message["op"] == "alive":
            proxy.heard_s, proxy.is_up = time.monotonic(), True
        elif message["op"] == "ready":
            self._ready(proxy)
        elif message["op"] == "take_over":
            self._take_over(proxy, message)
        elif message["op"] == "handed":
            self._handed(proxy, message)
        elif message["op"] == "peer":
            self._peer(proxy, message)
        elif message["op"] == "reloaded":
            keeper_systemd.notify("READY=1", f"STATUS=serving; {message['note']}")
        else:
            self._hear_other(proxy, message)

    def _ready(self, proxy: Proxy) -> None:
        proxy.is_ready = self._was_ready = True
        keeper_systemd.notify("READY=1", f"STATUS=serving (pid {proxy.pid})")
        if proxy.is_stale and proxy is self._serving:
            proxy.is_stale = False
            self.reload()

    # -- signs of life -----------------------------------------------------------------------------------------------

    def _beat(self) -> None:
        """Look who hangs, and tell the service manager that we do not. A proxy that neither serves nor ends, because
        not even SIGKILL reaches it, is the one thing that we cannot mend ourselves."""
        now_s = time.monotonic()
        late_s = now_s - self._beat_at_s - self._beat_s
        self._beat_at_s = now_s
        self._loop.after(self._beat_s, self._beat)
        for proxy in self:
            if late_s > self._beat_s:
                proxy.heard_s += late_s  # we were stopped ourselves, and they perhaps with us
            limit_s = self._hang_limit_s if proxy.is_up else max(START_LIMIT_S, self._hang_limit_s)
            if self._hang_limit_s and not proxy.is_hung and now_s - proxy.heard_s > limit_s:
                self._end_hung(proxy, now_s - proxy.heard_s)
        if not any(proxy.is_hung for proxy in self):
            keeper_systemd.notify("WATCHDOG=1")

    def _end_hung(self, proxy: Proxy, silent_s: float) -> None:
        say(f"the proxy (pid {proxy.pid}) has given no sign of life for {silent_s:.0f} s: ending it")
        proxy.is_hung = True
        self._signal(proxy, signal.SIGABRT)
        self._loop.after(LAST_WORDS_S, lambda: self._signal(proxy, signal.SIGKILL))

    def _overdue(self, limit_s: float) -> None:
        for proxy in self:
            say(f"the proxy did not drain within {limit_s:.0f} s: ending it")
            self._signal(proxy, signal.SIGKILL)

    def _signal(self, proxy: Proxy, number: int) -> None:
        try:
            if proxy.child is not None:
                proxy.child.signal(number)
        except OSError as error:
            say(f"signal {number} did not reach the proxy: {error}")
