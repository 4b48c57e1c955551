"""What engines say, and what operators want of them: ready, failed, asleep, gone, idle for too long.

News moves a model through the table of `scheduler.residency`, teaches what it has to teach, lets in those who wait for
a model that became ready and turns away those whose model failed. What is loaded next is the plan's to say.

A model that becomes ready serves everything that waits for it, as far as it has room, before it can become a victim:
two models that trade places always make progress.

Unknown engine ids are late news and change nothing. O(devices) each, besides the tickets let in or turned away; a
reading is O(models that are waited for) times O(pinned models).
"""

from __future__ import annotations

from functools import partial

from scheduler.attest import difference
from scheduler.books import Books
from scheduler.commands import Command, Probe, Refuse, Sleep, Stop
from scheduler.events import EngineFailed, EngineReady, LoadProgress, MemoryMeasured, ProbeAnswered
from scheduler.fairness import LoadShares
from scheduler.model import RefusalCode, Residency, SchedulerSettings, StopCause
from scheduler.placement import Placement
from scheduler.state import ModelState
from scheduler.tickets import Tickets, load_failed, never_fits
from scheduler.timers import Timers

TTL_AGAIN_S = 1.0  # while a neighbour starts, nothing leaves the device
IMPOSSIBLE_S = 10.0  # for so long a model has no place before those who wait for it are told: a reading may be a moment
MAX_CRASHES = 3  # a ready engine that dies this often without serving anybody in between is backed off


class Lifecycle:
    """Models and their engines, from the first start to the last stop."""

    def __init__(
        self, books: Books, placement: Placement, tickets: Tickets, timers: Timers, settings: SchedulerSettings
    ) -> None:
        self.settings = settings
        self._books = books
        self._placement = placement
        self._models = books.models
        self._tickets = tickets
        self._timers = timers
        self._impossible: dict[str, float] = {}  # models that are waited for in vain, and since when

    # ---------------------------------------------------------------- starts

    def ready(self, event: EngineReady, now: float) -> list[Command]:
        """An engine has started, woken, or outlived an earlier proxy."""
        if event.adopted:
            return self._adopt(event, now)
        model = self._books.by_engine(event.engine_id)
        if model is None or model.engine is None or model.state not in (Residency.LOADING, Residency.WAKING):
            return []
        self._books.start_over(model.engine)
        model.took(event.load_seconds)
        _charge_load(model, event.load_seconds)
        if model.state is Residency.WAKING or self._placement.sleepers.may(model):
            return [Probe(event.engine_id)]
        return self._now_ready(model, now)

    def probed(self, event: ProbeAnswered, now: float) -> list[Command]:
        """What it says after a load is kept; after a wake it must say the same."""
        model = self._books.by_engine(event.engine_id)
        if model is None or model.engine is None:
            return []
        if model.state is Residency.LOADING:
            if not event.error:
                self._books.may_sleep_one_day(model, event)
            return self._now_ready(model, now)
        if model.state is not Residency.WAKING or model.engine.says is None:
            return []
        wrong = difference(model.engine.says, event)
        if wrong is None:
            model.sleepless_times = 0
            return self._now_ready(model, now)
        self._keep_awake(model, now)
        return self._placement.stop(model, StopCause.CORRUPT, f"it did not wake as it was: {wrong}")

    def progress(self, event: LoadProgress) -> None:
        """How far a load is."""
        model = self._books.by_engine(event.engine_id)
        if model is not None and model.state is Residency.LOADING:
            model.progress, model.note = max(model.progress, event.fraction), event.note

    def _adopt(self, event: EngineReady, now: float) -> list[Command]:
        model = self._models.get(event.model)
        known = all(name in self._books.devices for name in (event.device, *event.partners))
        if model is None or not known or model.engine is not None:
            why = "an engine from before that the configuration no longer has a place for"
            return [Stop(event.engine_id, StopCause.CONFIGURATION, why)]
        self._books.adopt(model, event.engine_id, event.device, event.revision, event.partners)
        assert model.engine is not None
        if event.says is not None:
            self._books.may_sleep_one_day(model, event.says)
        for ticket in event.in_flight:
            self._tickets.inherit(ticket, model, now)
        return self._still_asleep(model) if event.asleep else self._now_ready(model, now)

    def _still_asleep(self, model: ModelState) -> list[Command]:
        """It was put to sleep by the version before."""
        engine = model.engine
        assert engine is not None
        engine.was_ready = True
        self._placement.sleepers.asleep(model)
        if model.spec.sleep_keeps_bytes is None or not self._books.sleep_memory.take(
            engine.id, model.spec.sleep_host_bytes
        ):
            return self._placement.stop(model, StopCause.CONFIGURATION, "there is no host memory for it to sleep in")
        return []

    def _now_ready(self, model: ModelState, now: float) -> list[Command]:
        assert model.engine is not None
        model.loads += model.state is not Residency.WAKING
        model.move(Residency.READY)
        model.progress, model.note, model.last_error = 1.0, "", ""
        model.ran_out, model.engine.was_ready = False, True
        self._books.learn(model)
        model.wanted_order = None
        model.last_used_s = model.last_asked_s = now
        out = self._tickets.admit_waiting(model, now)
        if model.engine is not None and not model.engine.in_flight:
            out += self.became_idle(model)
        return out

    # ------------------------------------------------------------------ ends

    def asleep(self, engine_id: str, error: str, now: float) -> list[Command]:
        """It says that it sleeps, or why it cannot."""
        model = self._books.by_engine(engine_id)
        if model is None or model.engine is None or model.state is not Residency.SUSPENDING:
            return []
        if error:
            self._keep_awake(model, now)
            return self._placement.stop(model, StopCause.EVICTED, f"it could not be put to sleep: {error}")
        if self._books.departures.answered(model.engine, now):
            self._placement.sleepers.asleep(model)
        return []

    def failed(self, event: EngineFailed, now: float) -> list[Command]:
        """Its process has ended unasked, or its start went wrong."""
        model = self._books.by_engine(event.engine_id)
        if model is None or model.engine is None:
            return []
        if model.state is Residency.STOPPING:
            return self.gone(event.engine_id, now)
        loading, guessed = model.state is Residency.LOADING, model.guessed
        # nobody asked for a guess: whoever does, finds the model as if it had not been tried
        once_more = guessed or (loading and event.out_of_memory and not model.ran_out)
        if loading and event.out_of_memory:
            model.ran_out = not guessed
            self._books.ran_out(model)
        model.failures += not once_more
        model.last_error = event.reason
        if (loading and not once_more) or model.failures >= MAX_CRASHES:
            model.engine.end = Residency.FAILED
        if not self._books.frees_late(model.engine):
            return self._departed(model, now)
        self._placement.stop(model, StopCause.LEAKED, "it has gone, its memory not yet")
        return self.gone(event.engine_id, now)

    def gone(self, engine_id: str, now: float) -> list[Command]:
        """No process is left; on some devices that is not yet the end."""
        model = self._books.by_engine(engine_id)
        if model is None or model.engine is None:
            return []
        if model.state is Residency.STOPPING and not self._books.departures.answered(model.engine, now):
            return []
        return self._departed(model, now)

    def _departed(self, model: ModelState, now: float) -> list[Command]:
        """The engine is gone and its memory is back, or is not waited for any longer."""
        engine = model.engine
        assert engine is not None
        self._books.detach(model)
        if model.removed:
            del self._models[model.spec.name]
            return []
        if engine.end is Residency.FAILED:
            return self._back_off(model, now)
        model.move(Residency.COLD)
        return []

    def _back_off(self, model: ModelState, now: float) -> list[Command]:
        model.move(Residency.FAILED)
        model.wanted_order = None
        model.retry_at_s = now + self._pause_s(model.failures - 1)
        self._timers.push(model.retry_at_s, "retry", model.spec.name)
        return self._tickets.turn_away(model, lambda ticket: load_failed(ticket, model, now))

    def retry(self, model: ModelState, now: float) -> None:
        """A back-off may be over."""
        if model.state is Residency.FAILED and model.retry_at_s <= now:
            model.move(Residency.COLD)

    def _keep_awake(self, model: ModelState, now: float) -> None:
        """Sleep failed this model: its engines are stopped instead, for a while that grows."""
        pause = self._pause_s(model.sleepless_times)
        model.sleepless, model.sleepless_times = True, model.sleepless_times + 1
        self._timers.push(now + pause, "sleepless", model.spec.name)

    def _pause_s(self, times: int) -> float:
        return min(self.settings.backoff_limit_s, self.settings.backoff_first_s * 2.0 ** min(times, 30))

    # ---------------------------------------------------------------- memory

    def measured(self, event: MemoryMeasured, now: float) -> list[Command]:
        """A device's reading: it moves the book, and may complete a stop or a sleep."""
        ledger = self._books.devices.get(event.device)
        if ledger is None:
            return []
        ledger.measured(event.used_bytes, event.foreign_bytes, event.overhead_bytes, event.engines)
        out: list[Command] = []
        for model in self._books.leaving(event.device):
            if model.engine is not None and self._books.departures.complete(model.engine):
                out += self._gave_back(model, now)
        return out + self._give_up(now)

    def _give_up(self, now: float) -> list[Command]:
        """Who waits for a model that has had no place for a while hears what who comes now would hear, an operator too:
        a pinned one came, or grew, or the model itself did."""
        reasons = {
            model: reason
            for model in self._books.wanted
            if model.engine is None and (reason := self._books.never_fits(model.spec)) is not None
        }
        since = self._impossible
        self._impossible = {model.spec.name: since.get(model.spec.name, now) for model in reasons}
        out: list[Command] = []
        for model, reason in reasons.items():
            if now - self._impossible[model.spec.name] >= IMPOSSIBLE_S:
                out += self._tickets.turn_away(model, partial(never_fits, reason=reason))
                _not_wanted_after_all(model, reason)
        return out

    def _gave_back(self, model: ModelState, now: float) -> list[Command]:
        if model.state is not Residency.SUSPENDING:
            return self._departed(model, now)
        self._placement.sleepers.asleep(model)
        return []

    def fall_over(self, engine_id: str, now: float) -> list[Command]:
        """An engine said some time ago that it sleeps or has gone: has its memory come back?"""
        model = self._books.by_engine(engine_id)
        departures = self._books.departures
        if model is None or (engine := model.engine) is None or not departures.due(engine):
            return []
        if departures.complete(engine):
            return self._gave_back(model, now)
        if departures.wait_longer(engine, now):
            return []
        once_more = departures.again(engine) == 1
        what = f"its memory is still in use after {self.settings.fall_limit_s:g} s"
        if model.state is Residency.SUSPENDING:
            if once_more:
                return [Sleep(engine_id, StopCause.LEAKED, f"it says that it sleeps, and {what}: once more")]
            self._keep_awake(model, now)
            return self._placement.stop(model, StopCause.LEAKED, f"it says that it sleeps, and {what}", force=True)
        if once_more:
            return [Stop(engine_id, StopCause.LEAKED, f"it has gone, and {what}: once more, by force", force=True)]
        model.failures += 1
        model.last_error = f"its last engine has gone, and {what}"
        engine.end = Residency.FAILED
        return self._departed(model, now)

    # ------------------------------------------------------------------ idle

    def became_idle(self, model: ModelState) -> list[Command]:
        """The last of its requests has ended."""
        if model.state is Residency.DRAINING:
            if model.stop_cause is StopCause.EVICTED:
                return []  # its plan stops it, unless that is revised
            return self._placement.drained(model)
        self.arm_ttl(model)
        return self._placement.relieve_pressure(self.settings.pressure_threshold)

    def arm_ttl(self, model: ModelState) -> None:
        """Look again when it has been idle for as long as it may."""
        if model.spec.ttl_s is not None and not model.ttl_armed and not model.spec.pinned:
            model.ttl_armed = True
            self._timers.push(model.last_used_s + model.spec.ttl_s, "ttl", model.spec.name)

    def ttl_over(self, model: ModelState, now: float) -> list[Command]:
        """It may have been idle for as long as it may."""
        model.ttl_armed = False
        ttl = model.spec.ttl_s
        if ttl is None or not model.idle:
            return []
        if self._placement.paused or self._books.start_beside(model):
            model.ttl_armed = True
            self._timers.push(now + TTL_AGAIN_S, "ttl", model.spec.name)
            return []
        if now >= model.last_used_s + ttl:
            why = f"idle for {now - model.last_used_s:.0f} s (ttl_s = {ttl:g})"
            return self._placement.give_up(model, StopCause.IDLE, why)
        self.arm_ttl(model)
        return []

    # ------------------------------------------------------------- operators

    def load_asked(self, name: str) -> list[Command]:
        """An operator wants it here, before what is only waited for."""
        model = self._models.get(name)
        if model is None:
            return []
        if model.state in (Residency.READY, Residency.LOADING, Residency.WAKING):
            if model.engine is not None:
                model.engine.guess = None  # it is asked for now
            return []
        if model.state is Residency.FAILED:
            model.move(Residency.COLD)
        if model.engine is None:
            model.note = ""
        model.wanted_order = self._tickets.next_order()
        return []

    def unload_asked(self, name: str) -> list[Command]:
        """An operator wants it gone, once its requests have ended."""
        model = self._models.get(name)
        if model is None:
            return []
        _not_wanted_after_all(model, "an operator asked for its unload")
        return self._placement.give_up(model, StopCause.OPERATOR, "an operator asked for it")

    def removed(self, model: ModelState) -> list[Command]:
        """The configuration names it no longer."""
        name = model.spec.name
        model.removed, model.wanted_order = True, None
        why = f"{name!r} was removed from the configuration"
        out = self._tickets.turn_away(model, lambda ticket: Refuse(ticket.id, RefusalCode.UNKNOWN_MODEL, why))
        if model.engine is None:
            del self._models[name]
            return out
        return out + self._placement.give_up(model, StopCause.CONFIGURATION, "removed from the configuration")


def _not_wanted_after_all(model: ModelState, why: str) -> None:
    """An operator's load ends before it has begun."""
    if model.wanted_order is not None:
        model.wanted_order, model.note = None, why


def _charge_load(model: ModelState, load_s: float) -> None:
    """A load is over: its seconds are charged, as tokens, to whoever's ticket made it necessary."""
    cause, model.cause, model.shares = model.cause, None, None
    if cause is not None:
        tokens = round(load_s * model.pace.tokens_per_s)
        model.shares = LoadShares(tokens, cause.tenant, cause.latency_class)
        model.queue.charge(cause.tenant, cause.latency_class, tokens)
