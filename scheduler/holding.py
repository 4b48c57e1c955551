"""A swap held back for a moment, because its victim is about to be used again.

Two sessions that call their models in turn, on memory for one of them, swap at every call: each model is idle between
two calls, and somebody waits for the other. So a swap waits where sessions make an even bet that an idle victim is
asked for again soon, and where that costs less than it saves: those who wait for the swap are still on time, and
within their deadlines, when the answer that is waited for has ended, and their seconds of waiting are together less
than the seconds of the reload times its chance.

A hold ends `SHARE` of the victim's load time after the swap could have begun, and none begins once anybody who waits
would be late for it. So no worst wait grows.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf

from scheduler.sequences import Expected, Sequences
from scheduler.state import ModelState

SHARE = 0.25
LEAST_CHANCE = 0.5
ANSWERS = 2.0  # the answer that is waited for may take so many times as long as usual
MOST_HELD = 16  # requests that wait for the swap: for more, the chance to save one reload does not pay


class Holding:
    """Swaps that are held back; `held` counts them. Asked only when a swap could begin at once."""

    def __init__(self, sequences: Sequences) -> None:
        self.held = 0
        self._sequences = sequences
        self._since: dict[str, float] = {}  # by the model that is to be loaded

    def until(self, wanted: ModelState, victims: Sequence[ModelState], now: float) -> float | None:
        """Until when to leave the idle victims alone; None: not at all. O(sessions looked at + victims x MOST_HELD)."""
        end = None
        if victims and wanted.wanted_order is None and len(wanted.queue) <= MOST_HELD:
            expected = self._sequences.expected(now)
            uses = [(each, use) for each in victims if (use := expected.get(each.spec.name)) is not None]
            end = max((self._end(wanted, victim, use, now) for victim, use in uses), default=now)
        if end is None or end <= now:
            return None
        if not self.holds(wanted):
            self._since[wanted.spec.name] = now
            self.held += 1
        return end

    def holds(self, wanted: ModelState) -> bool:
        """Whether those who wait for this model have been held back."""
        return wanted.queue.first_since_s() <= self._since.get(wanted.spec.name, -inf)

    def over(self, wanted: ModelState, now: float) -> str:
        """The swap begins; for how long it was held back, for people."""
        held = self.holds(wanted)
        since_s = self._since.pop(wanted.spec.name, now)
        return f", held back for {now - since_s:.1f} s" if held else ""

    @staticmethod
    def _end(wanted: ModelState, victim: ModelState, use: Expected, now: float) -> float:
        """When to stop waiting for this victim's next use; `now` or before: it is not worth a moment."""
        if use.probability < LEAST_CHANCE or use.after == wanted.spec.name:
            return now  # a session that waits for this very swap asks for nothing before it
        could_begin_s = max(victim.last_used_s, wanted.queue.first_since_s())
        end = min(use.until_s, could_begin_s + SHARE * victim.loss_s)
        wait_s = max(0.0, use.at_s - now)
        pays = len(wanted.queue) * wait_s <= use.probability * victim.loss_s
        drained_s = end + ANSWERS * victim.demand.mean_service_s()
        return end if pays and now + wait_s <= end and _may_wait(wanted, drained_s) else now


def _may_wait(wanted: ModelState, begin_s: float) -> bool:
    """Whether all who wait for it are on time, and within their deadlines, if its load begins at this moment."""
    ready_s = begin_s + wanted.seconds_to_load
    queue = wanted.queue
    return queue.backlog.on_time(ready_s) == len(queue) and ready_s <= queue.first_deadline_s()
