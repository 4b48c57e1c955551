"""The worker processes, as the proxy keeps them: started, watched, replaced, told what changes, asked what they count.

They inherit the listening sockets, so a connection that nobody has accepted yet is lost with no worker (SO_REUSEPORT
would give each a queue of its own, and reset what is in the queue of one that dies). A worker that ends is replaced at
once, one that keeps ending after longer and longer pauses; one that does not answer for `hang_limit_s` is killed, for
it may hold credit that others wait for. What it held comes back by its desk; its counts stay on the metrics page.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Coroutine, Iterable, Sequence
from typing import Any, NamedTuple

import msgspec

from proxy.config import Config
from proxy.config_secrets import ResolvedSecrets
from proxy.observe.metrics import Counts
from proxy.workers.channel import Channel
from proxy.workers.desk import Desk
from proxy.workers.messages import (
    Configure,
    Count,
    Counted,
    Drain,
    Drained,
    Finish,
    FromWorker,
    Leave,
    Reopen,
    Serving,
    States,
)
from proxy.workers.shared_counters import SharedCounters
from scheduler.commands import Credit, Revoke
from scheduler.driver import Scheduler
from scheduler.engines.keeper_sockets import ended

log = logging.getLogger("vramp.workers")

COUNT_EVERY_S = 1.0
COUNT_LIMIT_S = 0.5  # for a metrics page
START_LIMIT_S = 30.0  # for a worker that has not answered yet
PREPARE_S = 30.0
LEAVE_S = 5.0  # for the last words to clients and the access log's last lines
FAST_DEATH_S = 5.0
PAUSE_FIRST_S, PAUSE_LIMIT_S = 0.1, 5.0


class Worker:
    """One worker process. `gone` is called once, when it has ended; its desk is closed by then."""

    def __init__(self, holder: int, scheduler: Scheduler, gone: Callable[[], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._gone = gone
        self._channel: Channel[FromWorker] = Channel(FromWorker, self._hear, self._lost)
        self.desk = Desk(holder, scheduler, self._channel.send)
        self.send = self._channel.send
        self.counts = Counts()
        self.serving = asyncio.Event()
        self.drained = asyncio.Event()
        self.ended = asyncio.Event()
        self.in_time = True
        self.began_s = self.heard_s = self._loop.time()
        self._counted = asyncio.Event()
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """0 before it was started."""
        return self._process.pid if self._process is not None else 0

    async def begin(self, started: Started) -> None:
        """Watch the process, and open the channel to it."""
        self._process = started.process
        self._end = os.pidfd_open(self._process.pid)
        self._loop.add_reader(self._end, self._ended)
        await self._channel.open(started.connection)

    def kill(self) -> None:
        """End it at once."""
        if self._process is not None and not self.ended.is_set():
            self._process.kill()

    async def count(self) -> None:
        """Have it say what it has counted."""
        self._counted.clear()
        self.send(Count())
        await self._counted.wait()

    def _hear(self, message: FromWorker) -> None:
        self.heard_s = self._loop.time()
        match message:
            case Serving():
                self.desk.open()
                self.serving.set()
            case Counted(counts):
                self.counts = counts
                self._counted.set()
            case Drained(in_time):
                self.in_time = in_time
                self.drained.set()
            case _:
                self.desk.hear(message)

    def _lost(self) -> None:
        """A worker without its channel is of no use; most often it has ended."""
        self.kill()

    def _ended(self) -> None:
        assert self._process is not None
        self._loop.remove_reader(self._end)
        os.close(self._end)
        self.status = self._process.wait()
        self._channel.close()
        self.desk.close()
        for event in (self.serving, self.drained, self._counted, self.ended):
            event.set()  # nobody waits for one that has gone
        self._gone()


class Workers:
    """So many worker processes; `proxy.server.serving.Front` over several."""

    scheduler: Scheduler  # to be set before `start`

    def __init__(self, count: int, config: Config, secrets: ResolvedSecrets) -> None:
        self._count = count
        self._config, self._secrets = config, secrets
        self._argv = [sys.executable, "-m", "proxy.worker"]
        self._loop = asyncio.get_running_loop()
        self._sockets: list[socket.socket] = []
        self._workers: list[Worker | None] = [None] * count
        self._prepared: dict[int, tuple[int, Started]] = {}
        self._fast_deaths = [0] * count
        self._next_holder = 1
        self._kept = Counts()  # of workers that have gone
        self._draining = False
        self._leaving = False  # another proxy has the listeners: no worker is replaced
        self._states: dict[str, str] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._shared = SharedCounters(count)
        self.restarts = 0

    # ---- what the proxy asks (`Front`)

    @property
    def in_flight(self) -> int:
        """As last counted."""
        return sum(worker.counts.in_flight for worker in self._living())

    @property
    def ready(self) -> bool:
        """Whether somebody accepts and new requests are welcome."""
        return not self._draining and any(worker.serving.is_set() for worker in self._living())

    async def prepare(self, sockets: Sequence[socket.socket]) -> None:
        """Start the processes; returns when they have imported what they need. They do nothing until `start`, which
        is a matter of milliseconds then: in an upgrade clients wait for it. Without it, `start` starts them."""
        self._sockets = list(sockets)
        for slot in range(self._count):
            with contextlib.suppress(OSError):  # `start` tries again, and says what is wrong
                self._prepared[slot] = self._spawn(slot)
        waits = [_readable(started.connection) for _, started in self._prepared.values()]
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(PREPARE_S):
                await asyncio.gather(*waits)

    async def start(self, sockets: Sequence[socket.socket]) -> None:
        """Start the workers; returns when all of them accept."""
        self._sockets = list(sockets)
        self.scheduler.on_credit = self._on_credit
        for slot in range(self._count):
            await self._start(slot)
        await asyncio.gather(*(worker.serving.wait() for worker in self._living()))
        self._background(self._tell_states())
        self._background(self._keep_counting())

    def configure(self, config: Config, secrets: ResolvedSecrets) -> None:
        """See `Front`."""
        self._config, self._secrets = config, secrets
        for slot, worker in enumerate(self._workers):
            if worker is not None:
                worker.send(self._configuration(slot))

    def reopen_logs(self) -> None:
        """See `Front`."""
        self._tell(Reopen())

    def stop_accepting(self) -> None:
        """See `Front`. They hear of it in a moment; what they accept until then gets its lease as the rest does."""
        self._leaving = True
        self._tell(Finish())

    async def finish(self) -> None:
        """See `Front`."""
        await asyncio.gather(*(worker.drained.wait() for worker in self._living()))

    async def drain(self, timeout_s: float) -> bool:
        """See `Front`."""
        self._draining = True
        log.info("draining: %d requests in flight", self.in_flight)
        living = self._living()
        self._tell(Drain(timeout_s))
        try:
            async with asyncio.timeout(timeout_s + COUNT_LIMIT_S):
                await asyncio.gather(*(worker.drained.wait() for worker in living))
        except TimeoutError:
            return False
        return all(worker.in_time for worker in living)

    async def close(self) -> None:
        """See `Front`."""
        self._draining = True
        living = self._living()
        self._tell(Leave())
        try:
            async with asyncio.timeout(LEAVE_S):
                await asyncio.gather(*(worker.ended.wait() for worker in living))
        except TimeoutError:
            for worker in living:
                worker.kill()
            await asyncio.gather(*(worker.ended.wait() for worker in living))
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._shared.close()

    # ---- what operators ask

    async def refresh(self) -> None:
        """Have every worker say what it has counted, those that do so at once."""
        asked = [asyncio.create_task(worker.count()) for worker in self._living()]
        if asked:
            _, late = await asyncio.wait(asked, timeout=COUNT_LIMIT_S)
            for task in late:
                task.cancel()

    def counts(self) -> Iterable[Counts]:
        """What they have counted, those that have gone among them."""
        return [self._kept, *(worker.counts for worker in self._living())]

    def view(self) -> list[dict[str, object]]:
        """The workers, for people."""
        return [
            {
                "worker": worker.desk.holder,
                "pid": worker.pid,
                "serving": worker.serving.is_set(),
                "in_flight": worker.counts.in_flight,
                "tickets": worker.desk.tickets,
                "uptime_s": round(self._loop.time() - worker.began_s, 1),
            }
            for worker in self._living()
        ]

    # ---- processes

    async def _start(self, slot: int) -> None:
        try:
            prepared = self._prepared.pop(slot, None)
            holder, started = self._spawn(slot) if prepared is None else prepared
            worker = Worker(holder, self.scheduler, lambda: self._ended(slot))
            await worker.begin(started)
        except OSError as error:
            log.error("a worker could not be started: %s", error)
            self._again(slot)
            return
        self._workers[slot] = worker
        worker.send(self._configuration(slot))
        worker.send(States(self._states))

    def _spawn(self, slot: int) -> tuple[int, Started]:
        """A worker process for this place, and the number by which the core will know it. Raises OSError."""
        holder, self._next_holder = self._next_holder, self._next_holder + 1
        argv = [*self._argv, str(holder), str(slot), str(self._count)]
        return holder, start_process(argv, self._sockets, self._shared.fd)

    def _ended(self, slot: int) -> None:
        worker = self._workers[slot]
        assert worker is not None
        self._workers[slot] = None
        self._shared.forget(slot)
        worker.counts.end()
        self._kept.add(worker.counts)
        if self._draining or self._leaving:
            return
        lived_s = self._loop.time() - worker.began_s
        log.error("worker %d %s after %.1f s: starting another", worker.pid, ended(worker.status), lived_s)
        self._fast_deaths[slot] = self._fast_deaths[slot] + 1 if lived_s < FAST_DEATH_S else 0
        self.restarts += 1
        self._again(slot)

    def _again(self, slot: int) -> None:
        fast = self._fast_deaths[slot]
        pause_s = min(PAUSE_FIRST_S * 2.0 ** (fast - 2), PAUSE_LIMIT_S) if fast > 1 else 0.0

        async def later() -> None:
            await asyncio.sleep(pause_s)
            if not (self._draining or self._leaving):
                await self._start(slot)

        self._background(later())

    def _living(self) -> list[Worker]:
        return [worker for worker in self._workers if worker is not None]

    # ---- words

    def _tell(self, message: msgspec.Struct) -> None:
        for worker in self._living():
            worker.send(message)

    def _configuration(self, slot: int) -> Configure:
        return Configure(
            share_of(self._config, slot, self._count),
            tuple((key.name, key.secret.reveal()) for key in self._secrets.api_keys),
            {name: secret.reveal() for name, secret in self._secrets.backend_keys.items()},
        )

    def _on_credit(self, command: Credit | Revoke) -> None:
        for worker in self._living():
            if isinstance(command, Revoke):
                worker.desk.recall(command.engine_id)
            elif worker.desk.holder == command.holder:
                worker.desk.lend(command)

    async def _tell_states(self) -> None:
        async for _ in self.scheduler.changes():
            states = self.scheduler.states()
            if states != self._states:
                self._states = states
                self._tell(States(states))

    async def _keep_counting(self) -> None:
        while True:
            await asyncio.sleep(COUNT_EVERY_S)
            self._tell(Count())
            for worker in self._living():
                self._end_if_it_hangs(worker)

    def _end_if_it_hangs(self, worker: Worker) -> None:
        limit_s = self._config.server.hang_limit_s
        silent_s = self._loop.time() - worker.heard_s
        if limit_s and silent_s > (limit_s if worker.serving.is_set() else max(START_LIMIT_S, limit_s)):
            log.error("worker %d has not answered for %.0f s ([server] hang_limit_s): ending it", worker.pid, silent_s)
            worker.kill()

    def _background(self, work: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def share_of(config: Config, slot: int, workers: int) -> Config:
    """The configuration of one worker: connections to a backend are divided, for no worker knows of the others'."""
    backends = tuple(
        msgspec.structs.replace(
            backend, max_connections=backend.max_connections // workers + (slot < backend.max_connections % workers)
        )
        for backend in config.backends
    )
    return msgspec.structs.replace(config, backends=backends)


class Started(NamedTuple):
    """A worker process and our end of its channel."""

    process: subprocess.Popen[bytes]
    connection: socket.socket


def start_process(argv: Sequence[str], sockets: Sequence[socket.socket], shared_fd: int) -> Started:
    """Start a worker, in a group of its own: signals to the proxy's are for the proxy, which tells its workers. Raises
    OSError."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    inherited = (theirs.fileno(), shared_fd, *(each.fileno() for each in sockets))
    env = {
        **os.environ,
        "VRAMP_WORKER_FD": str(theirs.fileno()),
        "VRAMP_SHARED_FD": str(shared_fd),
        "VRAMP_LISTEN_FDS": ",".join(f"http={each.fileno()}" for each in sockets),
    }
    with theirs:
        try:
            process = subprocess.Popen(argv, env=env, stdin=subprocess.DEVNULL, pass_fds=inherited, process_group=0)
        except OSError:
            ours.close()
            raise
    return Started(process, ours)


async def _readable(connection: socket.socket) -> None:
    """Return when the other side has said something, which is left unread, or has gone."""
    loop, said = asyncio.get_running_loop(), asyncio.Event()
    loop.add_reader(connection.fileno(), said.set)
    try:
        await said.wait()
    finally:
        loop.remove_reader(connection.fileno())
