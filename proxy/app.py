"""The proxy process, and the one place that joins the objects: `python -m proxy.app`, started by the keeper.

It inherits its listening sockets, takes over the engines that live, serves until it is told to stop, and drains.
"""

from __future__ import annotations

import argparse
import asyncio
import faulthandler
import gc
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Coroutine, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import aiohttp
import msgspec
import uvloop
from aiohttp import web
from prometheus_client import disable_created_metrics, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from ext.backend import BACKEND, describe
from ext.rate_counters import RateCounters
from proxy import __version__
from proxy.admin.api import Admin
from proxy.admin.scheduler import scheduler_view
from proxy.admin.status import status
from proxy.assembly import Local, devices_of, locals_of, settings_of, without_device
from proxy.catalog.catalog import Catalog, Deployment
from proxy.cli_serve import announce, banner
from proxy.config import ConfigError
from proxy.config_check import open_problems, worker_count
from proxy.config_diff import diff
from proxy.config_load import Loaded, Start, load_start
from proxy.config_secrets import ResolvedSecrets, files_of, secrets_of
from proxy.config_watch import LOOK_S, Watch
from proxy.observe.engine_metrics import EngineScraper
from proxy.observe.metrics import Metrics
from proxy.observe.scheduler_metrics import SchedulerGauges, SchedulerMetrics
from proxy.orders import Order, Orders
from proxy.server.http import LEAVE_S
from proxy.server.serving import Front, Serving
from proxy.upgrade import Upgrade
from proxy.workers.pool import Workers
from scheduler.core import Core
from scheduler.driver import Scheduler
from scheduler.engines.keeper_link import KeeperLink, inherited_listeners
from scheduler.engines.supervisor import Handle, Supervisor
from scheduler.events import ConfigChanged, EngineReady, LoadAsked
from scheduler.handover import PROTOCOL, Guests, HandedEngine
from scheduler.learned import Learned
from scheduler.record import Opening, RecordedCore, Recorder, free_path

log = logging.getLogger("vramp")

T = TypeVar("T")
Listeners = Mapping[str, Sequence[socket.socket]]

REFUSED = 2  # the keeper does not start us again: this configuration cannot be served


class App:
    """A serving proxy. `run` returns when it was told to end and has finished what was in flight."""

    def __init__(
        self, start: Start, loaded: Loaded, secrets: ResolvedSecrets, link: KeeperLink, listeners: Listeners
    ) -> None:
        self._start = start
        self._listeners = listeners
        self._config = loaded.config
        self._source = loaded.source
        self._secrets = secrets
        self._link = link
        self._began_s = time.monotonic()
        self._recorder: Recorder | None = None
        self._orders = Orders()
        self._guests = Guests(link.peer)
        self._stopping_unwanted: set[asyncio.Task[None]] = set()
        self._watch = Watch(_files(loaded))
        self._devices = devices_of(self._config)
        self._catalog = Catalog(self._config)
        self._locals = locals_of(self._config, self._catalog, self._devices)
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=None)
        )
        self._supervisor = Supervisor(link, self._session, Path(self._config.store.dir) / "logs")
        count = worker_count(self._config.server)
        # none: this process serves
        self._workers = Workers(count, self._config, secrets) if count > 1 else None
        self._metrics = Metrics(lambda: self._workers.counts() if self._workers else ())
        self._scheduler_metrics = SchedulerMetrics(self._metrics.registry)

    async def run(self) -> None:
        """Serve until SIGTERM, then drain; or until another proxy has taken over, then finish."""
        self.on_signals()
        handed = await self._unless_stopped(self._handed_over())
        if handed is None:
            await self._close()
            return
        await self._schedule(handed)
        self._front = self._serving()
        await self._front.start(self._listeners.get("http", []))
        self._runner = await self._admin(self._listeners.get("admin", []))
        measuring = asyncio.create_task(self._scheduler.run())
        watching = asyncio.create_task(self._watch_files())
        upgrade = Upgrade(
            self._link, self._scheduler, self._front.stop_accepting, lambda: self._orders.give(Order.LEAVE)
        )
        await self._announce()
        try:
            if await self._until_told() is Order.LEAVE:
                watching.cancel()  # what is written from now on is for the other
                await self._finish()
            else:
                await self._front.drain(self._config.server.drain_s)
        finally:
            upgrade.close()
            tasks = (measuring, watching, *self._stopping_unwanted)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self._front.close()
            await self._runner.cleanup()
            await self._close()

    # ------------------------------------------------------------------ joints

    async def _schedule(self, handed: Mapping[str, HandedEngine]) -> None:
        """The scheduler, with the engines and the requests that there are already."""
        adoptable = await self._supervisor.adopt()
        learned = Learned(Path(self._config.store.dir))
        engines_before = max((_number(handle.engine_id) for handle in adoptable), default=0)
        core = self._core(engines_before, learned)
        self._scheduler = Scheduler(
            core,
            self._devices,
            self._supervisor,
            {local.spec.name: local.launch for local in self._locals},
            measure_interval_s=self._config.devices.measure_interval_s,
            observe=self._scheduler_metrics.observe,
            learned=learned,
        )
        self._scraper = EngineScraper(self._session, self._scheduler.engine_urls)
        self._metrics.registry.register(SchedulerGauges(lambda: core, self._scheduler.unreadable))
        await self._take_over(adoptable, handed)
        self._guests.serve(self._scheduler)

    def _core(self, engines_before: int, learned: Learned) -> Core:
        opening = Opening(
            tuple(device.spec for device in self._devices),
            tuple(learned.expect(local.spec) for local in self._locals),
            settings_of(self._config),
            engines_before=engines_before,
            footprints=learned.footprints.load(),
            steps=learned.steps.load(),
        )
        if self._start.record is None:
            return opening.core()
        path = free_path(self._start.record)
        ended = "nothing is recorded in %s any more: %s; what it has can be replayed, and the next start records anew"
        try:
            self._recorder = Recorder(path, opening, on_end=lambda why: log.warning(ended, path, why))
        except OSError as error:  # a server that comes back after a crash is worth more than its log
            log.error("nothing is recorded: %s cannot be written (%s)", path, error.strerror)
            return opening.core()
        log.info("every decision is recorded in %s; `vramp simulate --replay` runs it again", path)
        return RecordedCore(opening, self._recorder)

    def _serving(self) -> Front:
        if self._workers is None:
            return Serving(
                self._config,
                self._secrets,
                self._scheduler,
                self._metrics,
                counters=RateCounters(),
                residency=self._residency,
            )
        self._workers.scheduler = self._scheduler
        return self._workers

    async def _admin(self, sockets: Sequence[Any]) -> web.AppRunner:
        admin = Admin(
            self._scheduler,
            status=self._status,
            models=lambda: [self._profile(deployment) for deployment in self._catalog],
            metrics=self._expose,
            scheduler_state=lambda: scheduler_view(self._scheduler, asyncio.get_running_loop().time()),
            ready=lambda: self._front.ready,
            keys=lambda: tuple(key.secret.reveal() for key in self._secrets.admin_keys),
        )
        runner = web.AppRunner(admin.app(), access_log=None, shutdown_timeout=1.0)
        await runner.setup()
        for sock in sockets:
            await web.SockSite(runner, sock.dup()).start()
        return runner

    async def _take_over(self, adoptable: Sequence[Handle], handed: Mapping[str, HandedEngine]) -> None:
        """Engines of the proxy before us go on, as it handed them over or if they still answer; others are stopped."""
        launches = {local.spec.name: local.launch for local in self._locals}
        for handle in adoptable:
            launch, known = launches.get(handle.model), handed.get(handle.engine_id)
            if launch is None and handed:
                self._stop_unwanted(handle)
            elif launch is not None and (known is not None or await self._answers(launch.kind, handle.base_url)):
                log.info("took over %s", handle.engine_id)
                self._adopt(handle, known or HandedEngine(handle.engine_id))
            else:
                await self._supervisor.stop(handle.engine_id, 5.0)

    def _adopt(self, handle: Handle, known: HandedEngine) -> None:
        event = EngineReady(
            handle.engine_id,
            handle.model,
            handle.device,
            0.0,
            adopted=True,
            revision=handle.revision,
            partners=handle.partners,
            in_flight=self._guests.on(handle.engine_id, self._scheduler),
            says=known.says,
            asleep=known.asleep,
        )
        self._scheduler.adopt(event, handle.base_url)

    def _stop_unwanted(self, handle: Handle) -> None:
        """The configuration no longer has its model, but the proxy before us may have requests on it."""

        async def stop() -> None:
            await self._guests.left(handle.engine_id)
            await self._supervisor.stop(handle.engine_id, 5.0)

        task = asyncio.create_task(stop())
        self._stopping_unwanted.add(task)
        task.add_done_callback(self._stopping_unwanted.discard)

    async def _answers(self, kind: Any, base_url: str) -> bool:
        try:
            async with asyncio.timeout(10):
                return bool(await kind.probe(self._session, base_url))
        except Exception:  # whatever is wrong with it, it is not an engine we can use
            return False

    async def _announce(self) -> None:
        for local in self._locals:
            if local.spec.pinned:
                self._scheduler.dispatch(LoadAsked(local.spec.name))
        await self._warm_up()
        self._link.ready()
        public, operators = (addresses(self._listeners, name)[0] for name in ("http", "admin"))
        urls = [f"{'https' if self._config.server.tls_cert else 'http'}://{public}", f"http://{operators}"]
        announce(banner(self._config, urls))

    async def _warm_up(self) -> None:
        """Start the launchers now, so that the first request finds them warm."""
        for local in self._locals:
            await self._supervisor.warm_up(local.launch.kind)

    async def _close(self) -> None:
        if self._recorder is not None:
            self._recorder.close()
        await self._session.close()
        self._link.close()

    # ---------------------------------------------------------------- upgrades

    async def _handed_over(self) -> dict[str, HandedEngine]:
        """What the proxy before us serves, once it has stopped accepting; nothing when there is none. What takes time
        and can be done before that is done before."""
        if self._workers is not None:
            await self._workers.prepare(self._listeners.get("http", []))
        self._link.on_peer, self._link.on_left = self._guests.hear, self._guests.gone
        handed = msgspec.convert(await self._link.take_over(PROTOCOL) or [], list[HandedEngine])
        return {engine.engine_id: engine for engine in handed}

    async def _finish(self) -> None:
        """Another proxy serves: finish what is in flight here. A SIGTERM hurries."""
        log.info("handed over: %d requests in flight are finished here", self._front.in_flight)
        if not await self._unless_stopped(self._finished()):
            await self._front.drain(self._config.server.drain_s)

    async def _finished(self) -> bool:
        await asyncio.gather(self._leave_operators(), self._front.finish())
        return True

    async def _leave_operators(self) -> None:
        """They find the other by connecting again; who has just connected to us has the time that callers have."""
        for site in list(self._runner.sites):
            await site.stop()
        await asyncio.sleep(LEAVE_S)
        await self._runner.cleanup()

    # ----------------------------------------------------------------- signals

    def on_signals(self) -> None:
        """SIGTERM and SIGINT drain; SIGHUP reloads."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._orders.give, Order.STOP)
        loop.add_signal_handler(signal.SIGHUP, self._orders.give, Order.RELOAD)

    async def _until_told(self) -> Order:
        """Serve until it is to end."""
        while (order := await self._orders.next()) is Order.RELOAD:
            await self.reload()
        return order

    async def _unless_stopped(self, work: Coroutine[None, None, T]) -> T | None:
        """What this comes to; None when we are told to stop before it does."""
        working, stopped = asyncio.create_task(work), asyncio.create_task(self._until(Order.STOP))
        await asyncio.wait([working, stopped], return_when=asyncio.FIRST_COMPLETED)
        for task in (working, stopped):
            task.cancel()
        return working.result() if working.done() else None

    async def _until(self, wanted: Order) -> None:
        while await self._orders.next() is not wanted:
            pass

    async def _watch_files(self) -> None:
        while True:
            await asyncio.sleep(LOOK_S)
            if self._watch.look() and self._config.server.reload_on_change:
                log.info("the configuration has changed on disk: reading it again")
                self._orders.give(Order.RELOAD)

    async def reload(self) -> None:
        """Read the configuration again. A bad one changes nothing; requests in flight keep the one they began with."""
        self._front.reopen_logs()
        self._watch.read()
        try:
            loaded = load_start(self._start)
            self._watch.follow(_files(loaded))  # also when a secret is missing: it may come later
            secrets = secrets_for(loaded, self._listeners)
            catalog = Catalog(loaded.config)
            found: list[Local] = locals_of(loaded.config, catalog, self._devices)
        except ConfigError as error:
            for problem in error.problems:
                log.error("not reloaded: %s", problem)
            self._link.reloaded("a changed configuration was refused, its errors are in the log")
            return
        except Exception:
            # a hole in our checks: to die of it would be to start again and again with this file, and serve nobody
            log.exception("not reloaded: an error of vramp itself while it read the configuration")
            self._link.reloaded("a changed configuration could not be read, why is in the log")
            return
        for line in diff(self._config, loaded.config):
            log.info("reload: %s", line)
        for line in without_device(found, self._devices):
            log.warning("reload: %s", line)
        self._config, self._secrets, self._catalog, self._locals = loaded.config, secrets, catalog, found
        self._front.configure(loaded.config, secrets)
        specs = tuple(local.spec for local in found)
        self._scheduler.reload(
            ConfigChanged(specs, settings_of(loaded.config)), {local.spec.name: local.launch for local in found}
        )
        await self._warm_up()
        self._link.reloaded("the configuration was read again")

    # ----------------------------------------------------------------- answers

    def _status(self) -> dict[str, Any]:
        about = {"version": __version__, "backend": BACKEND, "config": self._source, "pid": os.getpid()}
        if self._workers is not None:
            about |= {"workers": self._workers.view(), "worker_restarts": self._workers.restarts}
        return status(
            self._scheduler,
            self._config,
            uptime_s=time.monotonic() - self._began_s,
            now=asyncio.get_running_loop().time(),
            about=about,
        )

    def _profile(self, deployment: Deployment) -> dict[str, Any]:
        profile: dict[str, Any] = msgspec.to_builtins(deployment.model)
        del profile["env"]  # people put tokens there
        return {**profile, "where": deployment.where, "state": self._residency(deployment)}

    def _residency(self, deployment: Deployment) -> str:
        if not deployment.local:
            return "remote"
        model = self._scheduler.core.models.get(deployment.name)
        return model.state.value if model is not None else "cold"

    async def _expose(self) -> tuple[bytes, str]:
        if self._workers is not None:
            await self._workers.refresh()
        own = generate_latest(self._metrics.registry)
        return own + await self._scraper.text(), CONTENT_TYPE_LATEST


def secrets_for(loaded: Loaded, listeners: Listeners) -> ResolvedSecrets:
    """The secrets of a configuration with which these listeners may be served. Raises ConfigError."""
    server = loaded.config.server
    found = open_problems(server, addresses(listeners, "http"), addresses(listeners, "admin"))
    if problems := [f"{loaded.source}: {problem.path} {problem.says}" for problem in found]:
        raise ConfigError(problems)
    return secrets_of(loaded.config, loaded.base_dir, loaded.source)


def addresses(listeners: Listeners, name: str) -> list[str]:
    """Where clients (http) or operators (admin) connect, as HOST:PORT."""
    where = [sock.getsockname()[:2] for sock in listeners.get(name, [])]
    return [f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for host, port in where]


def _files(loaded: Loaded) -> list[Path]:
    """What a configuration was read from."""
    server = loaded.config.server
    tls = [Path(file) for file in (server.tls_cert, server.tls_key) if file is not None]
    return [*([loaded.file] if loaded.file else []), *tls, *files_of(loaded.config, loaded.base_dir)]


def _number(engine_id: str) -> int:
    tail = engine_id.rpartition("#")[2]
    return int(tail) if tail.isdigit() else 0


def parse(argv: Sequence[str]) -> Start:
    """The options that `vramp serve` passes on."""
    parser = argparse.ArgumentParser(prog="python -m proxy.app")
    parser.add_argument("--config")
    parser.add_argument("--model", action="append", default=[])
    parser.add_argument("--engine", default="auto")
    parser.add_argument("--listen")
    parser.add_argument("--admin-listen")
    parser.add_argument("--record")
    parser.add_argument("--workers")
    options = parser.parse_args(argv)
    return Start(
        config=options.config,
        models=tuple(options.model),
        engine=options.engine,
        listen=options.listen,
        admin_listen=options.admin_listen,
        record=options.record,
        workers=options.workers,
    )


async def serve(start: Start) -> int:
    """Everything from the configuration to the last request."""
    try:
        loaded = load_start(start)
        logging.basicConfig(
            level=loaded.config.observe.log_level.upper(),
            format="%(asctime)s %(levelname)s %(name)s: %(message)s",
            stream=sys.stderr,
        )
        listeners = inherited_listeners()
        app = App(start, loaded, secrets_for(loaded, listeners), KeeperLink.from_environment(), listeners)
    except ConfigError as error:
        for problem in error.problems:
            print(f"error: {problem}", file=sys.stderr)
        return REFUSED
    await app.run()
    return 0


def slow_parts() -> Iterator[str]:
    """What runs without native code, so that a request costs several times as much: a line each, with the remedy."""
    if not aiohttp.http_parser.HttpRequestParser.__module__.endswith("_http_parser"):
        yield "aiohttp runs its slow Python parser; install a wheel of it for this platform"
    if BACKEND != "native":
        yield f"vramp's own extensions are {describe()}; docs/ext.md says how they are built"


def main() -> int:
    """Run on uvloop."""
    for warning in slow_parts():
        print(f"warning: {warning}", file=sys.stderr)
    faulthandler.enable()  # the keeper ends a proxy that hangs with SIGABRT: then it says where
    disable_created_metrics()  # a gauge of its own for each counter and label, which nobody reads
    gc.freeze()  # what was imported lives as long as we do: the collector need not look at it again
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(serve(parse(sys.argv[1:])))


if __name__ == "__main__":
    sys.exit(main())
