"""The virtual-time shell: feeds the very same core from a trace, and plays engines that are only numbers."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from math import inf
from typing import NamedTuple

import msgspec

from scheduler.commands import Admit, Command, Load, Probe, Refuse, Sleep, Stop, Wake, WakeAt
from scheduler.core import Core
from scheduler.events import Arrived, Asleep, EngineReady, EngineStopped, Event, Finished, ProbeAnswered, Tick
from scheduler.model import ModelSpec, SchedulerSettings, Ticket
from scheduler.simulate.traces import Request
from scheduler.state import first_wake_s

# of what happens at one moment, places become free before they are asked for
FINISH, READY, TICK, ARRIVE = range(4)
STUCK_S = 3600.0  # after so long without any news but the time, nothing comes any more


class Outcome(msgspec.Struct):
    """What became of a trace. `waits_s[i]` is the wait of request i, infinite for one that was refused."""

    waits_s: list[float]
    loads: int = 0
    load_seconds: float = 0.0
    wakes: int = 0
    wake_seconds: float = 0.0


class Transfer(NamedTuple):
    """What an engine last moved between its device and elsewhere: over which link, until when."""

    link: str
    end_s: float
    loads: bool


class Simulation:
    """One run. Loads, sleeps and wakes pass one at a time, on each device or (`one_link`) on all; a stop takes no time,
    and neither does the question that a sleeper is asked. `sleep_s`: how long a model takes to fall asleep, as long as
    it takes to wake unless something else is said."""

    def __init__(
        self,
        core: Core,
        service_s: Callable[[Request], float],
        requests: Sequence[Request],
        *,
        one_link: bool = True,
        sleep_s: Callable[[ModelSpec], float] = first_wake_s,
        progress: Callable[[int], None] = lambda _: None,
        observe: Callable[[Event | Command, float], None] = lambda _event, _now: None,
    ) -> None:
        self.core = core
        self.now = 0.0
        self.outcome = Outcome([inf] * len(requests))
        self._service_s = service_s
        self._one_link = one_link
        self._sleep_s = sleep_s
        self._requests = requests
        self._progress = progress
        self._observe = observe
        self._heap: list[tuple[float, int, int, Event]] = []
        self._count = 0
        self._link_free_s: dict[str, float] = {}
        self._moved: dict[str, Transfer] = {}  # by engine
        self._wake_at = inf
        self._to_end = len(requests)
        self._news_at = 0.0

    def run(self) -> Outcome:
        """Until every request has ended."""
        for index, request in enumerate(self._requests):
            ticket = Ticket(index, request.model, request.latency_class, request.tenant, session=request.session)
            self._at(request.at_s, ARRIVE, Arrived(ticket))
        while self._heap and self._to_end and self.now - self._news_at < STUCK_S:
            self.now, kind, _, event = heapq.heappop(self._heap)
            if kind != TICK:
                self._news_at = self.now
            elif self.now != self._wake_at:
                continue  # a later WakeAt has replaced this one
            if kind == ARRIVE:
                self._progress(1)
            self._feed(event)
        return self.outcome

    def _at(self, at_s: float, kind: int, event: Event) -> None:
        self._count += 1
        heapq.heappush(self._heap, (at_s, kind, self._count, event))

    def _feed(self, event: Event) -> None:
        waiting = [event]
        while waiting:
            event = waiting.pop(0)
            self._observe(event, self.now)
            self._to_end -= isinstance(event, Finished)
            for command in self.core.step(event, self.now):
                self._observe(command, self.now)
                match command:
                    case Stop(engine_id):
                        self._break_off(engine_id)
                        waiting.append(EngineStopped(engine_id))
                    case Probe(engine_id):
                        waiting.append(ProbeAnswered(engine_id))
                    case _:
                        self._obey(command)

    def _obey(self, command: Command) -> None:
        match command:
            case Admit(index):
                request = self._requests[index]
                self.outcome.waits_s[index] = self.now - request.at_s
                self._at(self.now + self._service_s(request), FINISH, Finished(index))
            case Load(engine_id, model, device):
                seconds = self.core.models[model].spec.load_estimate_s
                ready_s = self._move(engine_id, device, seconds, loads=True)
                self.outcome.loads += 1
                self.outcome.load_seconds += seconds
                self._at(ready_s, READY, EngineReady(engine_id, model, device, seconds))
            case Sleep(engine_id):
                spec, device = self._place(engine_id)
                self._at(self._move(engine_id, device, self._sleep_s(spec)), READY, Asleep(engine_id))
            case Wake(engine_id):
                spec, device = self._place(engine_id)
                seconds = first_wake_s(spec)
                ready_s = self._move(engine_id, device, seconds)
                self.outcome.wakes += 1
                self.outcome.wake_seconds += seconds
                self._at(ready_s, READY, EngineReady(engine_id, spec.name, device, seconds))
            case Refuse():
                self._to_end -= 1  # and keeps its infinite wait
            case WakeAt(at_s):
                self._wake_at = at_s
                self._at(at_s, TICK, Tick())
            case _:
                pass

    def _place(self, engine_id: str) -> tuple[ModelSpec, str]:
        model = self.core.books.by_engine(engine_id)
        assert model is not None
        assert model.engine is not None
        return model.spec, model.engine.device

    def _move(self, engine_id: str, device: str, seconds: float, *, loads: bool = False) -> float:
        """Begin a transfer as soon as its link is free; when it ends."""
        link = "" if self._one_link else device
        end_s = self._link_free_s[link] = max(self.now, self._link_free_s.get(link, 0.0)) + seconds
        self._moved[engine_id] = Transfer(link, end_s, loads)
        return end_s

    def _break_off(self, engine_id: str) -> None:
        """A transfer whose engine is stopped before its end leaves its link to the next."""
        moved = self._moved.pop(engine_id, None)
        if moved is None or moved.end_s <= self.now or self._link_free_s.get(moved.link) != moved.end_s:
            return
        self._link_free_s[moved.link] = self.now
        if moved.loads:
            self.outcome.load_seconds -= moved.end_s - self.now


def endless_settings(deadline_s: float, *, anticipate: bool = False, sleep_memory_bytes: int = 0) -> SchedulerSettings:
    """Nothing is refused, nothing is evicted before somebody waits; on time is `deadline_s` for every class.

    Without anticipation unless asked for: the policies are compared by the loads that requests cause.
    """
    patience_s = (deadline_s, deadline_s, deadline_s, deadline_s, deadline_s)
    return SchedulerSettings(
        pressure_threshold=1.0,
        max_wait_s=inf,
        max_waiting=1 << 40,
        patience_s=patience_s,
        sleep_memory_bytes=sleep_memory_bytes,
        anticipate=anticipate,
    )
