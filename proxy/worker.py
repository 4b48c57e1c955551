"""A worker process: `python -m proxy.worker`, started by the proxy. It serves what it is told to, on inherited sockets.

It has the proxy's handler and lanes, and none of its devices and engines: leases come over the channel. Signals are the
proxy's business, which tells its workers; without a proxy there is nobody to ask for a lease, so a worker ends with it.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import socket
import sys
from collections.abc import Coroutine
from typing import Any

import uvloop

from ext.rate_counters import RateCounters
from proxy.catalog.catalog import Deployment
from proxy.config import Secret
from proxy.config_secrets import NamedKey, ResolvedSecrets
from proxy.observe.metrics import Metrics
from proxy.server.serving import Serving
from proxy.workers import messages
from proxy.workers.channel import Channel
from proxy.workers.leases import RemoteLeases
from proxy.workers.messages import Configure, Count, Counted, Drain, Drained, Finish, Leave, Reopen, States, ToWorker
from proxy.workers.shared_counters import counters_in
from scheduler.engines.keeper_link import inherited_listeners

log = logging.getLogger("vramp.workers")


class Worker:
    """Everything of one worker. `run` returns when the proxy lets it go."""

    def __init__(self, holder: int, sockets: list[socket.socket], counters: RateCounters) -> None:
        self._sockets = sockets
        self._counters = counters
        self._channel: Channel[ToWorker] = Channel(ToWorker, self._hear, _exit_as_orphan)
        self._leases = RemoteLeases(holder, self._channel.send)
        self._metrics = Metrics()
        self._states: dict[str, str] = {}
        self._serving: Serving | None = None
        self._leave = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self, connection: socket.socket) -> None:
        """Serve until told to leave."""
        await self._channel.open(connection)
        self._channel.send(Counted(self._metrics.snapshot()))  # all is imported: the proxy may be waiting for that
        await self._leave.wait()
        for task in self._tasks:
            task.cancel()
        if self._serving is not None:
            await self._serving.close()
        self._channel.close()

    def _hear(self, message: ToWorker) -> None:
        match message:
            case Configure():
                self._configure(message)
            case States(states):
                self._states = states
            case Count():
                self._channel.send(Counted(self._metrics.snapshot()))
            case Reopen():
                if self._serving is not None:
                    self._serving.reopen_logs()
            case Drain(timeout_s):
                self._background(self._drain(timeout_s))
            case Finish():
                self._background(self._finish())
            case Leave():
                self._leave.set()
            case _:
                self._leases.hear(message)

    def _configure(self, message: Configure) -> None:
        secrets = ResolvedSecrets(
            api_keys=tuple(NamedKey(name, Secret(text, "proxy")) for name, text in message.api_keys),
            backend_keys={name: Secret(text, "proxy") for name, text in message.backend_keys.items()},
        )
        if self._serving is not None:
            try:
                self._serving.configure(message.config, secrets)
            except OverflowError as error:
                log.error("not reloaded: %s", error)
            return
        logging.getLogger().setLevel(message.config.observe.log_level.upper())
        self._serving = Serving(
            message.config,
            secrets,
            self._leases,
            self._metrics,
            counters=self._counters,
            residency=self._residency,
        )
        self._background(self._start(self._serving))

    async def _start(self, serving: Serving) -> None:
        await serving.start(self._sockets, shared=True)
        self._channel.send(messages.Serving())

    async def _finish(self) -> None:
        if self._serving is not None:
            self._serving.stop_accepting()
            await self._serving.finish()
        self._drained(in_time=True)

    async def _drain(self, timeout_s: float) -> None:
        self._drained(in_time=self._serving is None or await self._serving.drain(timeout_s))

    def _drained(self, *, in_time: bool) -> None:
        self._channel.send(Counted(self._metrics.snapshot()))
        self._channel.send(Drained(in_time))

    def _residency(self, deployment: Deployment) -> str:
        return self._states.get(deployment.name, "cold") if deployment.local else "remote"

    def _background(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _exit_as_orphan() -> None:
    log.critical("the proxy has gone: this worker ends too")
    os._exit(128 + signal.SIGKILL)


async def serve(holder: int, slot: int, workers: int) -> None:
    """Take over what the proxy left open for us, and serve in our place among so many workers."""
    connection, shared = _inherited("VRAMP_WORKER_FD"), _inherited("VRAMP_SHARED_FD")
    counters = counters_in(shared, workers, slot)
    os.close(shared)
    await Worker(holder, inherited_listeners()["http"], counters).run(socket.socket(fileno=connection))


def _inherited(name: str) -> int:
    descriptor = int(os.environ.pop(name))
    os.set_inheritable(descriptor, False)
    return descriptor


def main() -> int:
    """Run on uvloop."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    logging.basicConfig(format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    gc.freeze()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve(*map(int, sys.argv[1:4])))
    return 0


if __name__ == "__main__":
    sys.exit(main())
