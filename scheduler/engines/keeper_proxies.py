"""The keeper's proxies: started, watched, started again when they die, ended when they hang.

A proxy says `alive` every second or two from its event loop. One that does not for `hang_limit_s` is asked where it
hangs (SIGABRT: it prints its stacks) and killed; it then comes back like any that died, and loses no engine by it.
"""

from __future__ import annotations

import signal
import socket
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence

from scheduler.engines import keeper_systemd
from scheduler.engines.keeper_children import Child, Children
from scheduler.engines.keeper_loop import Channel, Loop, Message
from scheduler.engines.keeper_sockets import Listener, say

FAST_DEATH_S = 5.0
FAST_DEATHS_LIMIT = 10
BACKOFF_FIRST_S, BACKOFF_LIMIT_S = 0.1, 5.0
BEAT_S = 1.0  # how often we look who is alive, and say that we are
START_LIMIT_S = 60.0  # from a proxy's start to its first sign of life
LAST_WORDS_S = 2.0  # for a hung proxy to print its stacks
REFUSED = 2  # exit status of a proxy that will not start with this configuration; starting it again cannot help


class Proxy:
    """One proxy process and our end of its socket."""

    def __init__(self, now_s: float) -> None:
        self.child: Child | None = None
        self.channel: Channel | None = None
        self.started_s = self.heard_s = now_s
        self.is_up = False  # it has given a sign of life
        self.is_ready = False
        self.is_hung = False

    @property
    def pid(self) -> int:
        """0 before it was started."""
        return self.child.pid if self.child else 0

    def send(self, message: Message) -> None:
        """Lost when it has gone."""
        if self.channel is not None:
            self.channel.send(message)


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
        self._unheard: deque[Message] = deque(maxlen=100)  # ends of engines while there was no proxy
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
        """Tell whoever serves; the end of an engine waits for the next if there is none."""
        if self._serving is not None:
            self._serving.send(message)
        elif message["op"] == "exited":
            self._unheard.append(message)

    def reload(self) -> None:
        """SIGHUP: have the configuration read again. A proxy that is being started reads it anyway."""
        keeper_systemd.reloading()
        if self._serving is not None:
            self._signal(self._serving, signal.SIGHUP)

    def stop(self, drain_limit_s: float) -> None:
        """SIGTERM to all; who has not ended after the limit is killed."""
        self._stopping = True
        if not any(self):
            self._all_gone(0)
            return
        for proxy in self:
            self._signal(proxy, signal.SIGTERM)
        self._loop.after(drain_limit_s, lambda: self._overdue(drain_limit_s))

    def __iter__(self) -> Iterator[Proxy]:
        return iter([proxy for proxy in (self._serving,) if proxy is not None])

    # -- their lives -------------------------------------------------------------------------------------------------

    def _start_serving(self) -> None:
        if self._stopping or self._serving is not None:
            return
        self._serving = self._start()
        if self._serving is None:
            self._give_up(1)
            return
        while self._unheard:
            self._serving.send(self._unheard.popleft())

    def _start(self) -> Proxy | None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        env = {
            "VRAMP_LISTEN_FDS": ",".join(f"{name}={sock.fileno()}" for name, sock in self._listeners),
            "VRAMP_KEEPER_FD": str(theirs.fileno()),
        }
        inherited = (theirs.fileno(), *(sock.fileno() for _, sock in self._listeners))
        proxy = Proxy(time.monotonic())
        proxy.channel = Channel(self._loop, ours, lambda message: self._hear(proxy, message), say)
        try:
            pid = self._children.start(self._argv, env, "proxy", inherited=inherited)
        except OSError as error:
            say(f"cannot start the proxy: {error}")
            proxy.channel.close()
            return None
        finally:
            theirs.close()
        proxy.child = Child("proxy", "proxy", pid, lambda status: self._gone(proxy, status))
        self._children.add(proxy.child)
        return proxy

    def _gone(self, proxy: Proxy, status: int) -> None:
        if proxy.channel is not None:
            proxy.channel.close()
        self._serving = None
        if self._stopping:
            self._all_gone(status)
        elif status == REFUSED and not self._was_ready:
            self._give_up(REFUSED)
        else:
            self._restart(status, time.monotonic() - proxy.started_s)

    def _restart(self, status: int, lived_s: float) -> None:
        self._fast_deaths = self._fast_deaths + 1 if lived_s < FAST_DEATH_S else 0
        engines = sum(1 for child in self._children if child.kind == "engine")
        say(f"the proxy {ended(status)} after {lived_s:.1f} s; {engines} engines live on")
        keeper_systemd.notify(f"STATUS=the proxy {ended(status)}: starting another")
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
        elif message["op"] == "reloaded":
            keeper_systemd.notify("READY=1", f"STATUS=serving; {message['note']}")
        else:
            self._hear_other(proxy, message)

    def _ready(self, proxy: Proxy) -> None:
        proxy.is_ready = self._was_ready = True
        keeper_systemd.notify("READY=1", f"STATUS=serving (pid {proxy.pid})")

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


def ended(status: int) -> str:
    """A process' end in words."""
    return f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
