"""Engines that sleep, have slept or would: what they keep, what they give back, and which of them go for the others.

Eviction puts an engine to sleep where it can: it keeps a little of each device, and takes host memory for the rest. One
that is woken on a guess, before anybody has asked, lends what it took: a plan may count on that, and on no more, as if
it slept on.

Sends nobody anywhere: that is for `scheduler.placement`. Cost: O(models x devices) at most.
"""

from __future__ import annotations

from collections.abc import Sequence

from scheduler.books import Books
from scheduler.guesses import Guesses
from scheduler.ledger import DeviceLedger
from scheduler.model import Residency
from scheduler.state import EngineState, ModelState


class Sleepers:
    """See the module."""

    def __init__(self, books: Books, guesses: Guesses) -> None:
        self._books = books
        self._guesses = guesses

    def may(self, model: ModelState) -> bool:
        """Whether its engine may be put to sleep one day, and must be asked now what it says awake."""
        return model.spec.sleep_keeps_bytes is not None and self._books.sleep_memory.budget > 0

    def asleep(self, model: ModelState) -> None:
        """The readings confirm that it sleeps."""
        engine = model.engine
        assert engine is not None
        for ledger in self._books.ledgers(engine):
            ledger.resize(engine.id, kept(model))
        model.move(Residency.ASLEEP)

    def has_slept(self, engine: EngineState) -> bool:
        """Whether it has host memory to go back to."""
        return self._books.sleep_memory.share(engine.id) > 0

    # ------------------------------------------------------- what they give back

    def leaving(self, ledger: DeviceLedger) -> int:
        """Bytes of engines that are on their way out of the device."""
        total = 0
        for model in self._books.models.values():
            if model.state in (Residency.STOPPING, Residency.SUSPENDING) and model.engine is not None:
                holding = ledger.holding(model.engine.id)
                stays = kept(model) if model.state is Residency.SUSPENDING else 0
                total += holding.held - stays if holding is not None else 0
        return total

    def lends(self, ledger: DeviceLedger, model: ModelState) -> int:
        """Bytes of a guessed engine that a plan may count on: all that it would not hold had nobody guessed."""
        engine = model.engine
        assert engine is not None
        stays = kept(model) if self.has_slept(engine) else 0
        return max(0, ledger.held_by(engine.id) - stays)

    def _held(self, ledger: DeviceLedger, victim: ModelState) -> int:
        """Bytes of a victim there, less what it lends."""
        engine = victim.engine
        assert engine is not None
        return kept(victim) if victim.guessed else ledger.held_by(engine.id)

    def lent(self, ledger: DeviceLedger) -> int:
        """Bytes that guesses lend there, those among them that are withdrawn and not quite gone."""
        return sum(self.lends(ledger, model) for model in self._guesses.leaving_or_on(ledger))

    def _unasked(self, ledger: DeviceLedger) -> int:
        """What guesses that can be withdrawn would give back."""
        return sum(self.lends(ledger, model) for model in self._guesses.on(ledger))

    # --------------------------------------------------------------- who goes

    def not_to_sleep(
        self, victims: Sequence[ModelState], wanted: ModelState, group: Sequence[DeviceLedger]
    ) -> set[ModelState]:
        """Victims that are stopped although they could sleep, because what they would keep is needed as well; those
        that lose least by it. O(models x devices)."""
        ended: set[ModelState] = set()
        for ledger in group if any(victim.kept_bytes for victim in victims) else ():
            here = [each for each in victims if each.engine is not None and ledger.spec.name in each.engine.devices]
            sleepers = [victim for victim in here if victim.kept_bytes and victim not in ended]
            missing = wanted.need_bytes - ledger.free - self.leaving(ledger) - self._unasked(ledger)
            missing -= sum(self._held(ledger, each) for each in here)
            missing += sum(victim.kept_bytes for victim in sleepers)
            for victim in sorted(sleepers, key=lambda each: each.load_s - each.wake_s):
                if missing > 0:
                    missing -= victim.kept_bytes
                    ended.add(victim)
        return ended

    def older(self, model: ModelState) -> list[ModelState]:
        """The sleepers that nobody has used for longest, as many as must go for the model to sleep next time; all of
        them where that is too little."""
        missing = self._books.sleep_memory.held + model.spec.sleep_host_bytes - self._books.sleep_memory.budget
        older = [
            other
            for other in self._books.engaged()
            if other.state is Residency.ASLEEP
            and not other.wanted
            and other.last_used_s < model.last_used_s
            and not self._books.start_beside(other)
        ]
        gone: list[ModelState] = []
        for sleeper in sorted(older, key=lambda each: each.last_used_s):
            if missing <= 0:
                break
            missing -= self._books.sleep_memory.share(sleeper.engine.id) if sleeper.engine is not None else 0
            gone.append(sleeper)
        return gone


def kept(model: ModelState) -> int:
    """What stays on each of its devices while it sleeps."""
    return model.spec.sleep_keeps_bytes or 0
