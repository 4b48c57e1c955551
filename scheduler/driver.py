"""The core's asyncio shell: it feeds events in, carries commands out, and hands leases to whoever asked.

Everything that touches the core runs on the event loop's thread and without an `await` in between, so there are no
locks and no races: a grant that reaches a task cancelled in the same turn of the loop is given back by the `with` block
that the task leaves.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Protocol, Self

import aiohttp
import msgspec

from scheduler.commands import Admit, Command, Credit, Load, Probe, Refuse, Revoke, Sleep, Stop, Wake, WakeAt
from scheduler.core import Core
from scheduler.devices.base import Device
from scheduler.devices.reader import Reader, Trouble
from scheduler.engines.base import EngineExit, EngineKind, Progress
from scheduler.engines.sleeping import Said, SleepError
from scheduler.events import (
    Asleep,
    ConfigChanged,
    EngineFailed,
    EngineReady,
    EngineStopped,
    Event,
    HandOverAsked,
    HandOverOff,
    LoadAsked,
    LoadProgress,
    MemoryMeasured,
    ProbeAnswered,
    Tick,
    UnloadAsked,
)
from scheduler.learned import Learned
from scheduler.model import RefusalCode, Residency, Ticket
from scheduler.state import ModelState

log = logging.getLogger("vramp.scheduler")

Shown = tuple[Residency, float, str]  # what operators are shown of a model: its state, progress 0..1, a note

DECISIONS_KEPT = 50
READING_LIMIT_S = 10.0  # for one reading of a device: a driver in trouble may take minutes
SLEEP_LIMIT_S = 60.0  # for one answer to sleep, wake or the fixed question
LEAVING_INTERVAL_S = 0.25  # between two readings while memory is awaited: a driver takes 0.5 to 1.5 s to free it
DEATH_LIMIT_S = 3.0  # vLLM takes a second and a half to notice that its core has been killed


class Refused(Exception):
    """The scheduler turned a ticket away."""

    def __init__(self, code: RefusalCode, reason: str, retry_after_s: float | None = None) -> None:
        super().__init__(reason)
        self.code = code
        self.reason = reason
        self.retry_after_s = retry_after_s


class Lease(msgspec.Struct, frozen=True):
    """The right to send one request to one engine. Waits are in seconds."""

    engine_id: str
    base_url: str
    queue_s: float
    load_s: float


class Launch(msgspec.Struct, frozen=True):
    """How the engine of one model is started and stopped. Times are in seconds."""

    kind: EngineKind
    start_timeout_s: float
    stop_timeout_s: float


class EngineHandle(Protocol):
    """What the supervisor returns of a running engine."""

    @property
    def base_url(self) -> str:
        """Where it answers, without a trailing slash."""
        ...


class Engines(Protocol):
    """The processes, as the driver needs them; `scheduler.engines.supervisor.Supervisor` in production."""

    on_exit: Callable[[str, str, Sequence[str]], None]

    async def start(
        self,
        engine_id: str,
        model: str,
        kind: EngineKind,
        device_env: Mapping[str, str],
        *,
        device: str,
        start_timeout_s: float,
        stop_timeout_s: float,
        on_progress: Callable[[Progress], None],
        revision: str = "",
        partners: tuple[str, ...] = (),
    ) -> EngineHandle:
        """Start an engine and wait until it answers a real request. Raises EngineExit; cancelling kills it."""
        ...

    async def stop(self, engine_id: str, timeout_s: float) -> None:
        """End it; returns when no process of it is left. Idempotent."""
        ...

    async def gone(self, engine_id: str, within_s: float) -> bool:
        """Whether the engine has ended, or does within the limit; `on_exit` has then been called."""
        ...

    async def sleep(self, engine_id: str, kind: EngineKind) -> None:
        """Have it sleep. Raises SleepError or aiohttp.ClientError, as do the next two."""
        ...

    async def wake(self, engine_id: str, kind: EngineKind) -> None:
        """Have it wake."""
        ...

    async def ask(self, engine_id: str, kind: EngineKind) -> Said:
        """What it answers to the fixed question."""
        ...

    def pids(self, engine_id: str) -> list[int]:
        """Every process of the engine."""
        ...

    def launcher_pids(self) -> list[int]:
        """Our own helper processes, whose memory is nobody's engine."""
        ...


class Successor(Protocol):
    """Where leases come from once this scheduler has handed over; `scheduler.handover.Leaver` in production."""

    def ask(self, ticket: Ticket, settle: Callable[[Lease | Refused], None]) -> None:
        """Ask for a lease; `settle` is called with it, or with why there is none."""
        ...

    def end(self, ticket_id: int, prompt_tokens: int | None = None, output_tokens: int | None = None) -> None:
        """A lease goes back, or a caller has gone."""
        ...

    def late(self, event: Event) -> None:
        """What happened after the hand-over."""
        ...


class Decision(msgspec.Struct, frozen=True):
    """One line of the decision log: seconds since the scheduler started, what was done, why."""

    at_s: float
    what: str
    why: str


class Waiting:
    """A ticket on its way to a lease. Leaving the `with` block withdraws it or gives the lease back, once."""

    __slots__ = ("_closed", "_driver", "_future", "submitted_s", "ticket", "usage")

    def __init__(self, driver: Scheduler, ticket: Ticket, future: asyncio.Future[Lease], now: float) -> None:
        self._driver = driver
        self._future = future
        self._closed = False
        self.ticket = ticket
        self.submitted_s = now
        self.usage: tuple[int, int] | None = None  # tokens of the prompt and of the answer, once it has ended well

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    async def granted(self) -> Lease:
        """The lease. Raises `Refused`. May be cancelled and awaited again."""
        if self._future.done():
            return self.result()
        return await asyncio.shield(self._future)

    def used(self, prompt_tokens: int, output_tokens: int) -> None:
        """What the request really used, to be told with the lease: corrects what its tenant is charged."""
        self.usage = prompt_tokens, output_tokens

    @property
    def done(self) -> bool:
        """Granted or refused."""
        return self._future.done()

    def result(self) -> Lease:
        """The lease, of one that is `done`. Raises `Refused`."""
        return self._future.result()

    def when_done(self, tell: Callable[[Waiting], object]) -> None:
        """Have somebody told, in the turn of the loop after it is `done`."""
        self._future.add_done_callback(lambda _: tell(self))

    async def describe(self) -> str:
        """One line on what this ticket waits for."""
        return self._driver.describe(self.ticket.id)

    def close(self) -> None:
        """Give everything back. Idempotent."""
        if not self._closed:
            self._closed = True
            self._driver.close_ticket(self)

    def settle(self, result: Lease | Refused) -> None:
        """Called by the driver, once."""
        if self._future.done():
            return
        if isinstance(result, Refused):
            self._future.set_exception(result)
            self._future.exception()  # whoever left without asking must not cause a warning
        else:
            self._future.set_result(result)


class Scheduler:
    """The driver. `launches` says how each model's engine is started; `observe` sees every event and command."""

    def __init__(
        self,
        core: Core,
        devices: Sequence[Device],
        engines: Engines,
        launches: Mapping[str, Launch],
        *,
        measure_interval_s: float = 2.0,
        reading_limit_s: float = READING_LIMIT_S,
        observe: Callable[[Event | Command], None] = lambda _: None,
        learned: Learned | None = None,
    ) -> None:
        self.core = core
        self._learned = learned
        self.decisions: deque[Decision] = deque(maxlen=DECISIONS_KEPT)
        self._devices = {device.spec.name: device for device in devices}
        self._readers = {device.spec.name: Reader(device, reading_limit_s) for device in devices}
        self._engines = engines
        self._launches = dict(launches)
        self._measure_interval_s = measure_interval_s
        self._observe = observe
        self._loop = asyncio.get_running_loop()
        self._started_s = self._loop.time()
        self._waiting: dict[int, Waiting] = {}
        self._urls: dict[str, str] = {}
        self._ready_at: dict[str, float] = {}
        self._starting: dict[str, asyncio.Task[None]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._watchers: set[asyncio.Event] = set()
        self._next_ticket = 0
        self._measure_soon = asyncio.Event()
        self.on_credit: Callable[[Credit | Revoke], None] = lambda _: None  # whoever has asked for credit sets it
        self._successor: Successor | None = None
        engines.on_exit = self._engine_died

    # ---------------------------------------------------------------- tickets

    def new_ticket_id(self) -> int:
        """A number no other ticket of this process has."""
        self._next_ticket += 1
        return self._next_ticket

    def lease(self, ticket: Ticket) -> Waiting:
        """Ask for a lease; the answer comes from `Waiting.granted()`. Use it in a `with` block."""
        now = self._loop.time()
        waiting = Waiting(self, ticket, self._loop.create_future(), now)
        self._waiting[ticket.id] = waiting
        if self._successor is not None:
            self._successor.ask(ticket, waiting.settle)
        else:
            self._carry_out(self.core.arrive(ticket, now))
        return waiting

    def lease_now(self, ticket: Ticket) -> Lease | None:
        """A lease if one can be had at once, else nothing has happened. Give it back by `give_back`."""
        admit = None if self._successor is not None else self.core.admit_now(ticket, self._loop.time())
        if admit is None:
            return None
        self._observe(admit)
        return Lease(admit.engine_id, self._urls[admit.engine_id], 0.0, 0.0)

    def give_back(self, ticket_id: int, prompt_tokens: int | None = None, output_tokens: int | None = None) -> None:
        """Give back what `lease_now` gave; the tokens are what was really used, where that is known."""
        if self._successor is not None:
            self._successor.end(ticket_id, prompt_tokens, output_tokens)
            return
        self._carry_out(self.core.finish(ticket_id, self._loop.time(), prompt_tokens, output_tokens))

    def close_ticket(self, waiting: Waiting) -> None:
        """Withdraw a ticket or give its lease back."""
        if self._waiting.pop(waiting.ticket.id, None) is None:
            return
        now = self._loop.time()
        if self._successor is not None:
            self._successor.end(waiting.ticket.id, *(waiting.usage or ()))
        elif waiting.usage is None:
            self._carry_out(self.core.cancel(waiting.ticket.id, now))
        else:
            self._carry_out(self.core.finish(waiting.ticket.id, now, *waiting.usage))

    async def lost(self, engine_id: str) -> bool:
        """Whether an engine that broke off a request has died, so that asking for a lease again finds another.

        The request notices a death first; the keeper says so once the last process has gone.
        """
        return await self._engines.gone(engine_id, DEATH_LIMIT_S)

    def describe(self, ticket_id: int) -> str:
        """What the ticket waits for, for people."""
        if self._successor is not None:
            return "a new version of vramp has taken over, and looks after it"
        return self.core.describe(ticket_id, self._loop.time())

    def engine_urls(self) -> dict[str, tuple[str, str]]:
        """Where each ready engine answers: (model, base URL) by engine id."""
        return {engine_id: (engine_id.rpartition("#")[0], url) for engine_id, url in self._urls.items()}

    def states(self) -> dict[str, str]:
        """The state of every local model."""
        return {name: model.state.value for name, model in self.core.models.items()}

    def unreadable(self) -> dict[str, Trouble]:
        """The devices whose last reading failed: what is known of them is what was read before."""
        return {name: reader.trouble for name, reader in self._readers.items() if reader.trouble is not None}

    async def changes(self) -> AsyncIterator[None]:
        """Something may have changed that people are shown; at first at once, then whenever it may have."""
        changed = asyncio.Event()
        self._watchers.add(changed)
        try:
            while True:
                yield
                await changed.wait()
                changed.clear()
        finally:
            self._watchers.discard(changed)

    def pids(self, engine_id: str) -> list[int]:
        """The processes of an engine, for people who look from outside."""
        return self._engines.pids(engine_id)

    # -------------------------------------------------------------- operators

    def adopt(self, event: EngineReady, base_url: str) -> None:
        """Take over an engine of an earlier proxy, which answers there."""
        self._urls[event.engine_id] = base_url
        self.dispatch(event)

    async def settled(self) -> None:
        """Begin nothing more, and return when no engine starts, stops, or is between two states of sleep: it can be
        handed over then. Requests go on. `go_on` takes it back."""
        changed = asyncio.Event()
        self._watchers.add(changed)
        try:
            self.dispatch(HandOverAsked())
            while not self.core.books.settled:
                changed.clear()
                await changed.wait()
            await self._keep_learned(everything=True)
        finally:
            self._watchers.discard(changed)

    def go_on(self) -> None:
        """There is no hand-over after all."""
        self.dispatch(HandOverOff())

    def hand_over(
        self, successor: Successor
    ) -> tuple[list[tuple[Ticket, str]], list[tuple[Ticket, Callable[[Lease | Refused], None]]]]:
        """Decide no more. What is out, with its weight and its engine, and who waits, are the successor's to know."""
        if self._timer is not None:
            self._timer.cancel()
        self._successor = successor
        held = [
            (msgspec.structs.replace(each.ticket, weight_tokens=each.weight, open_ended=False), each.engine.id)
            for each in self.core.tickets.admitted.values()
        ]
        return held, [(each.ticket, each.settle) for each in self._waiting.values() if not each.done]

    def reload(self, event: ConfigChanged, launches: Mapping[str, Launch]) -> None:
        """New models and settings; engines whose configuration changed are drained and replaced."""
        self._launches.update(launches)
        self.dispatch(event)

    async def load(self, name: str) -> AsyncIterator[Shown]:
        """Make a model resident; yields (state, progress 0..1, note) at every change until ready or failed. Failed is
        also what ends without a start: there is no place for it any more, or somebody had it unloaded."""
        model = self.core.models.get(name)
        reason = self.core.books.never_fits(model.spec) if model is not None and model.engine is None else None
        if reason is not None:
            yield Residency.FAILED, 0.0, reason
            return
        self.dispatch(LoadAsked(name))
        async for state in self._follow(name, _shown_loading, until=frozenset({Residency.READY, Residency.FAILED})):
            yield state

    async def unload(self, name: str) -> AsyncIterator[Shown]:
        """Drain and stop a model; yields its states until it is gone."""
        self.dispatch(UnloadAsked(name))
        async for state in self._follow(name, _shown, until=frozenset({Residency.COLD, Residency.FAILED})):
            yield state

    async def _follow(
        self, name: str, shown: Callable[[ModelState], Shown], until: frozenset[Residency]
    ) -> AsyncIterator[Shown]:
        changed = asyncio.Event()
        self._watchers.add(changed)
        try:
            last = None
            while (model := self.core.models.get(name)) is not None:
                changed.clear()
                state = shown(model)
                if state != last:
                    last = state
                    yield state  # which may take as long as an operator's connection does
                if state[0] in until:
                    return
                await changed.wait()
        finally:
            self._watchers.discard(changed)

    # ----------------------------------------------------------------- events

    def dispatch(self, event: Event) -> None:
        """Feed one event in and carry out what the core answers."""
        if self._successor is not None:
            self._successor.late(event)
            return
        self._observe(event)
        self._carry_out(self.core.step(event, self._loop.time()))
        for watcher in self._watchers:
            watcher.set()

    def _carry_out(self, commands: Sequence[Command]) -> None:
        for command in commands:
            self._observe(command)
            match command:
                case Admit():
                    self._admit(command)
                case Refuse():
                    self._refuse(command)
                case Credit() | Revoke():
                    self.on_credit(command)
                case Load():
                    where = ", ".join((command.device, *command.partners))
                    self._note(f"load {command.model} on {where}", command.reason)
                    self._start(command)
                case Stop():
                    self._note(f"stop {command.engine_id} ({command.cause})", command.reason)
                    self._background(self._stop(command.engine_id, force=command.force))
                case Sleep():
                    self._note(f"sleep {command.engine_id} ({command.cause})", command.reason)
                    self._background(self._sleep(command.engine_id))
                case Wake():
                    self._note(f"wake {command.engine_id}", command.reason)
                    self._background(self._wake(command.engine_id))
                case Probe(engine_id):
                    self._background(self._probe(engine_id))
                case WakeAt(at_s):
                    self._wake_at(at_s)

    def _admit(self, command: Admit) -> None:
        waiting = self._waiting[command.ticket_id]
        now = self._loop.time()
        ready_at = self._ready_at.get(command.engine_id, 0.0)
        load_s = max(0.0, ready_at - waiting.submitted_s)
        queue_s = max(0.0, now - waiting.submitted_s - load_s)
        waiting.settle(Lease(command.engine_id, self._urls[command.engine_id], queue_s, load_s))

    def _refuse(self, command: Refuse) -> None:
        waiting = self._waiting.pop(command.ticket_id, None)
        if waiting is not None:
            self._note(f"refuse a request for {waiting.ticket.model}: {command.code}", command.reason)
            waiting.settle(Refused(command.code, command.reason, command.retry_after_s))

    def _note(self, what: str, why: str) -> None:
        self.decisions.append(Decision(round(self._loop.time() - self._started_s, 3), what, why))

    def _wake_at(self, at_s: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_at(at_s, self.dispatch, Tick())

    # ---------------------------------------------------------------- engines

    def _start(self, command: Load) -> None:
        task = self._loop.create_task(self._run_start(command), name=f"start {command.engine_id}")
        self._starting[command.engine_id] = task
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _run_start(self, command: Load) -> None:
        engine_id, begun = command.engine_id, self._loop.time()
        launch = self._launches[command.model]
        devices = [self._devices[name] for name in (command.device, *command.partners)]
        spec = self.core.models[command.model].spec

        def progress(seen: Progress) -> None:
            self.dispatch(LoadProgress(engine_id, seen.fraction, seen.note))

        try:
            handle = await self._engines.start(
                engine_id,
                command.model,
                launch.kind,
                _together(device.engine_env() for device in devices),
                device=command.device,
                start_timeout_s=launch.start_timeout_s,
                stop_timeout_s=launch.stop_timeout_s,
                on_progress=progress,
                revision=spec.revision,
                partners=command.partners,
            )
        except EngineExit as failure:
            self._starting.pop(engine_id, None)
            self._failed(engine_id, failure.reason, failure.log_tail, out_of_memory=failure.out_of_memory)
            return
        except Exception as error:  # a bug of ours or of a kind's must not leave the model loading for ever
            log.exception("starting %s failed", engine_id)
            self._starting.pop(engine_id, None)
            self._failed(engine_id, f"{type(error).__name__}: {error}", ())
            return
        self._starting.pop(engine_id, None)
        now = self._loop.time()
        self._urls[engine_id], self._ready_at[engine_id] = handle.base_url, now
        await self._measure(device.spec.name for device in devices)  # its start lease ends with a figure, not a guess
        self._note(f"{engine_id} is ready", f"after {now - begun:.1f} s")
        if self._learned is not None:
            self._learned.loaded(command.model, now - begun)
        self.dispatch(EngineReady(engine_id, command.model, command.device, now - begun))

    def _engine_died(self, engine_id: str, reason: str, log_tail: Sequence[str]) -> None:
        self._failed(engine_id, reason, log_tail)

    def _failed(self, engine_id: str, reason: str, log_tail: Sequence[str], *, out_of_memory: bool = False) -> None:
        log.error("engine %s failed: %s", engine_id, reason)
        for line in log_tail:
            log.error("  %s | %s", engine_id, line)
        self._note(f"{engine_id} failed", reason)
        self._forget(engine_id)
        self._measure_soon.set()
        self.dispatch(EngineFailed(engine_id, reason, out_of_memory))

    async def _sleep(self, engine_id: str) -> None:
        error = await self._told(self._engines.sleep(engine_id, self._kind_of(engine_id)))
        await self._measure_for(engine_id)
        self.dispatch(Asleep(engine_id, error))

    async def _wake(self, engine_id: str) -> None:
        begun = self._loop.time()
        model = self.core.books.by_engine(engine_id)
        error = await self._told(self._engines.wake(engine_id, self._kind_of(engine_id)))
        if error:
            self.dispatch(ProbeAnswered(engine_id, error=error))
            return
        await self._measure_for(engine_id)
        now = self._loop.time()
        self._ready_at[engine_id] = now
        if model is not None and model.engine is not None:
            if self._learned is not None:
                self._learned.woke(model.spec.name, now - begun)
            self.dispatch(EngineReady(engine_id, model.spec.name, model.engine.device, now - begun))

    async def _probe(self, engine_id: str) -> None:
        said: list[Said] = []

        async def ask() -> None:
            said.append(await self._engines.ask(engine_id, self._kind_of(engine_id)))

        error = await self._told(ask())
        if said:
            self.dispatch(ProbeAnswered(engine_id, said[0].token, said[0].logprob))
        else:
            self.dispatch(ProbeAnswered(engine_id, error=error))

    async def _told(self, work: Coroutine[None, None, None]) -> str:
        """Wait for an engine's answer; what went wrong, or "". Whatever it is, the core must hear of it."""
        try:
            async with asyncio.timeout(SLEEP_LIMIT_S):
                await work
        except TimeoutError:
            return f"no answer within {SLEEP_LIMIT_S:g} s"
        except (SleepError, aiohttp.ClientError, OSError) as error:
            return str(error) or type(error).__name__
        except Exception as error:
            log.exception("an engine's sleep failed in a way of our own")
            return f"{type(error).__name__}: {error}"
        return ""

    def _kind_of(self, engine_id: str) -> EngineKind:
        return self._launches[engine_id.rpartition("#")[0]].kind

    async def _stop(self, engine_id: str, *, force: bool = False) -> None:
        starting = self._starting.pop(engine_id, None)
        if starting is not None:
            starting.cancel()
            await asyncio.gather(starting, return_exceptions=True)
        model = engine_id.rpartition("#")[0]
        launch = self._launches.get(model)
        await self._engines.stop(engine_id, 0.0 if force else launch.stop_timeout_s if launch else 10.0)
        self._forget(engine_id)
        self._measure_soon.set()
        await self._measure_for(engine_id, late_only=True)
        self.dispatch(EngineStopped(engine_id))

    def _forget(self, engine_id: str) -> None:
        self._urls.pop(engine_id, None)
        self._ready_at.pop(engine_id, None)

    def _background(self, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    # ----------------------------------------------------------------- memory

    async def _measure(self, devices: Iterable[str]) -> None:
        """Fresh readings of them, side by side."""
        await asyncio.gather(*map(self._measure_one, devices))

    async def _measure_one(self, device: str) -> None:
        reading = await self._readers[device].read(lambda: self._pids_on(device), self._engines.launcher_pids)
        if reading is not None:
            self.dispatch(
                MemoryMeasured(
                    device,
                    reading.total_bytes,
                    reading.used_bytes,
                    reading.foreign_bytes,
                    reading.engines,
                    reading.overhead_bytes,
                )
            )

    def _pids_on(self, device: str) -> dict[str, list[int]]:
        return {
            model.engine.id: self._engines.pids(model.engine.id)
            for model in self.core.models.values()
            if model.engine is not None and device in model.engine.devices
        }

    async def _measure_for(self, engine_id: str, *, late_only: bool = False) -> None:
        """A fresh reading of the engine's devices; `late_only`: of those that free memory late."""
        model = self.core.books.by_engine(engine_id)
        if model is not None and model.engine is not None:
            names = model.engine.devices
            await self._measure(name for name in names if self._devices[name].spec.frees_late or not late_only)

    async def _measure_all(self) -> None:
        """A round of readings. One that hangs goes on by itself: it must not hold up the next round of the others,
        whose memory may be awaited."""
        idle = [name for name, reader in self._readers.items() if not reader.busy]
        readings = [self._background(self._measure_one(name)) for name in idle]
        if readings:
            done, _ = await asyncio.wait(readings, timeout=min(LEAVING_INTERVAL_S, self._measure_interval_s))
            for reading in done:
                reading.result()

    def _next_reading_s(self) -> float:
        leaving = any(self.core.books.leaving(name) for name in self._devices)
        return min(self._measure_interval_s, LEAVING_INTERVAL_S) if leaving else self._measure_interval_s

    async def _keep_learned(self, *, everything: bool = False) -> None:
        if self._learned is not None:
            await self._learned.keep(self.core, self._loop.time(), everything=everything)

    async def run(self) -> None:
        """Read the devices until somebody else does, and keep what is learned. Cancel it to stop; engines are left as
        they are."""
        try:
            while self._successor is None:
                await self._measure_all()
                await self._keep_learned()
                self._measure_soon.clear()
                try:
                    await asyncio.wait_for(self._measure_soon.wait(), self._next_reading_s())
                except TimeoutError:
                    continue
        finally:
            await self._close()

    async def _close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._successor is None:  # else these files are the successor's by now
            await self._keep_learned(everything=True)


def _shown(model: ModelState) -> Shown:
    return model.state, model.progress, model.last_error if model.state is Residency.FAILED else model.note


def _shown_loading(model: ModelState) -> Shown:
    """To whom its load was promised."""
    return (Residency.FAILED, 0.0, model.note or "nobody wants it any more") if model.resting else _shown(model)


def _together(environments: Iterable[Mapping[str, str]]) -> dict[str, str]:
    """One environment for an engine on several devices: values of the same name are listed, as CUDA_VISIBLE_DEVICES
    is."""
    joined: dict[str, list[str]] = {}
    for environment in environments:
        for name, value in environment.items():
            joined.setdefault(name, []).append(value)
    return {name: ",".join(values) for name, values in joined.items()}
