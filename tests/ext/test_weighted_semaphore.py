from math import inf, nan

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from ext.errors import ClockWentBack, CoreError, NeverFits, NotHeld, NotWaiting
from tests.ext.conftest import EXAMPLES, load

BAD_AMOUNTS = [-1, nan, 1.0, 1 << 63, None, "7"]


@pytest.mark.parametrize("amount", BAD_AMOUNTS)
def test_a_bad_amount_is_refused_and_changes_nothing(twins, amount):
    capacity, semaphore = twins.Capacity(10, 10), twins.WeightedSemaphore(10, 10)
    before = repr(capacity), repr(semaphore)
    for call in (capacity.try_take, capacity.fits, capacity.give, capacity.resize, twins.Capacity):
        with pytest.raises((ValueError, TypeError, OverflowError)):
            call(amount)
        with pytest.raises((ValueError, TypeError, OverflowError)):
            call(1, amount)
    for call in (semaphore.try_acquire, semaphore.park, semaphore.resize, twins.WeightedSemaphore):
        with pytest.raises((ValueError, TypeError, OverflowError)):
            call(amount)
        with pytest.raises((ValueError, TypeError, OverflowError)):
            call(1, amount)
    assert (repr(capacity), repr(semaphore)) == before


def test_capacity_takes_both_units_or_neither(twins):
    capacity = twins.Capacity(10, 2)
    assert capacity.try_take(4)
    assert not capacity.try_take(7)
    assert capacity.try_take(4)
    assert not capacity.try_take(1)  # no sequence left
    assert repr(capacity) == "<Capacity tokens 8/10 held, sequences 2/2 held>"
    capacity.give(4)
    assert (capacity.free_tokens, capacity.free_sequences) == (6, 1)


def test_capacity_shrunk_under_its_holders_goes_negative_and_recovers(twins):
    capacity = twins.Capacity(10, 4)
    assert capacity.try_take(8, 2)
    capacity.resize(5, 4)
    assert (capacity.tokens, capacity.held_tokens, capacity.free_tokens) == (5, 8, -3)
    assert not capacity.fits(1)
    assert capacity.fits(0)  # takes none of what is missing
    capacity.give(8, 2)
    assert capacity.try_take(5)


def test_giving_back_more_than_is_held_is_refused(twins):
    capacity = twins.Capacity(10, 4)
    assert capacity.try_take(3)
    for weight in [(4, 1), (3, 2)]:
        with pytest.raises(NotHeld):
            capacity.give(*weight)
    assert (capacity.held_tokens, capacity.held_sequences) == (3, 1)


def test_a_release_wakes_all_who_now_fit_in_the_order_of_their_arrival(twins):
    semaphore = twins.WeightedSemaphore(10)
    holder = semaphore.try_acquire(10)
    waiters = [semaphore.park(3) for _ in range(4)]
    assert semaphore.release(holder) == waiters[:3]
    assert semaphore.waiting == 1
    assert repr(semaphore).startswith("<WeightedSemaphore tokens 9/10 held")


def test_a_small_arrival_does_not_overtake_a_large_waiter(twins):
    semaphore = twins.WeightedSemaphore(10)
    holder = semaphore.try_acquire(6)
    large = semaphore.park(8)
    assert semaphore.try_acquire(1) == 0
    small = semaphore.park(1)
    assert semaphore.release(holder) == [large, small]


def test_a_more_urgent_class_goes_first_and_a_less_urgent_one_never_slips_past(twins):
    semaphore = twins.WeightedSemaphore(10, classes=3)
    holder = semaphore.try_acquire(6)
    batch = semaphore.park(5, priority=2)
    urgent = semaphore.park(9, priority=0)
    assert semaphore.try_acquire(4, priority=1) == 0
    assert semaphore.release(holder) == [urgent]
    assert semaphore.release(urgent) == [batch]


def test_cancelling_the_large_head_wakes_the_small_ones_behind_it(twins):
    semaphore = twins.WeightedSemaphore(10)
    semaphore.try_acquire(5)
    large, small = semaphore.park(9), semaphore.park(2)
    assert semaphore.cancel(large) == [small]


def test_expiry_takes_out_the_late_by_deadline_and_wakes_those_behind(twins):
    semaphore = twins.WeightedSemaphore(10)
    semaphore.try_acquire(5)
    late = semaphore.park(9, deadline_s=5.0)
    later = semaphore.park(8, deadline_s=3.0)
    patient = semaphore.park(2)
    assert semaphore.next_deadline_s == 3.0
    assert semaphore.expire(2.9) == ([], [])
    assert semaphore.expire(5.0) == ([later, late], [patient])
    assert semaphore.next_deadline_s == inf


def test_the_clock_must_not_go_back(twins):
    semaphore = twins.WeightedSemaphore(10)
    semaphore.expire(5.0)
    with pytest.raises(ClockWentBack):
        semaphore.expire(4.9)
    with pytest.raises(ValueError, match="NaN"):
        semaphore.expire(nan)
    with pytest.raises(ValueError, match="NaN"):
        semaphore.park(1, deadline_s=nan)
    assert semaphore.expire(5.0) == ([], [])


def test_a_weight_above_capacity_is_refused_at_the_door_and_after_a_shrink(twins):
    semaphore = twins.WeightedSemaphore(10, 4)
    for weight in [(11, 1), (1, 5)]:
        with pytest.raises(NeverFits):
            semaphore.try_acquire(*weight)
        with pytest.raises(NeverFits):
            semaphore.park(*weight)
    semaphore.try_acquire(8)
    large, small = semaphore.park(9), semaphore.park(5)
    assert semaphore.resize(6, 4) == ([], [large])
    assert semaphore.free_tokens == -2
    assert semaphore.resize(13, 4) == ([small], [])
    assert semaphore.stats().refused == 5


def test_parking_a_weight_that_fits_is_refused_because_nobody_waits_who_could_run(twins):
    semaphore = twins.WeightedSemaphore(10)
    with pytest.raises(ValueError, match="fits now"):
        semaphore.park(1)
    assert semaphore.waiting == 0


def test_a_ticket_is_released_once_and_cancelled_once(twins):
    semaphore = twins.WeightedSemaphore(10)
    holder = semaphore.try_acquire(10)
    waiter = semaphore.park(1)
    with pytest.raises(NotHeld):
        semaphore.release(waiter)
    with pytest.raises(NotWaiting):
        semaphore.cancel(holder)
    semaphore.cancel(waiter)
    with pytest.raises(NotWaiting):
        semaphore.cancel(waiter)
    semaphore.release(holder)
    for unknown in (holder, 0, -1, 1 << 60):
        with pytest.raises(NotHeld):
            semaphore.release(unknown)
    assert (semaphore.held_tokens, semaphore.waiting) == (0, 0)


@pytest.mark.parametrize("priority", [-1, 2, 1 << 40])
def test_a_class_that_does_not_exist_is_refused(twins, priority):
    with pytest.raises(ValueError, match="priority"):
        twins.WeightedSemaphore(10, classes=2).try_acquire(1, priority=priority)
    for classes in (0, 65):
        with pytest.raises(ValueError, match="classes"):
            twins.WeightedSemaphore(10, classes=classes)


def test_ten_thousand_waiters_are_cancelled_and_granted_in_order(twins):
    semaphore = twins.WeightedSemaphore(10_000)
    holder = semaphore.try_acquire(10_000)
    waiters = [semaphore.park(1, deadline_s=float(i % 97)) for i in range(10_000)]
    for ticket in waiters[::2]:
        assert semaphore.cancel(ticket) == []
    assert semaphore.release(holder) == waiters[1::2]
    assert semaphore.expire(1e9) == ([], [])


weights = st.tuples(st.integers(0, 12), st.integers(0, 3))
CLASSES = 3


class BothSemaphores(RuleBasedStateMachine):
    """The twins side by side with a list as the model: equal grants, equal order, equal counts, and the invariants."""

    @initialize(weight=weights)
    def start(self, weight):
        self.twins = [load(kind).WeightedSemaphore(*weight, classes=CLASSES) for kind in ("pure", "native")]
        self.number: list[dict[int, int]] = [{}, {}]  # each twin's ticket -> ours
        self.tickets: list[tuple[int, int]] = []  # ours -> each twin's
        self.held: dict[int, tuple[int, int]] = {}
        self.waiting: dict[int, tuple[int, int, int, float]] = {}  # ours, in order of arrival
        self.now = 0.0

    def both(self, call, *args):
        """Ask both; their answer in our numbers."""
        answers = []
        for twin, number in zip(self.twins, self.number, strict=True):
            try:
                answer = getattr(twin, call)(*args)
            except (CoreError, ValueError) as error:
                answers.append(type(error))
                continue
            answers.append(_renumber(answer, number) if isinstance(answer, (list, tuple)) else answer)
        return answers

    def on_ticket(self, call, ticket):
        tickets = self.tickets[ticket]
        answers = [
            _renumber(getattr(twin, call)(own), number)
            for twin, own, number in zip(self.twins, tickets, self.number, strict=True)
        ]
        assert answers[0] == answers[1]
        return answers[0]

    def remember(self, answers):
        for number, answer in zip(self.number, answers, strict=True):
            number[answer] = len(self.tickets)
        self.tickets.append(tuple(answers))
        return len(self.tickets) - 1

    def granted(self, tickets):
        for ticket in tickets:
            head = min(self.waiting, key=lambda waiter: (self.waiting[waiter][2], waiter))
            assert ticket == head
            self.held[ticket] = self.waiting.pop(ticket)[:2]

    @rule(weight=weights, priority=st.integers(0, CLASSES - 1), patience=st.one_of(st.none(), st.integers(0, 20)))
    def acquire_or_park(self, weight, priority, patience):
        first, second = self.both("try_acquire", *weight, priority)
        assert bool(first) == bool(second)
        if isinstance(first, type):
            assert first is second is NeverFits
        elif first:
            assert not any(other[2] <= priority for other in self.waiting.values())
            self.held[self.remember([first, second])] = weight
        else:
            deadline = inf if patience is None else self.now + patience
            answers = self.both("park", *weight, priority, deadline)
            self.waiting[self.remember(answers)] = (*weight, priority, deadline)

    @rule(weight=weights)
    def park_what_may_fit(self, weight):
        answers = self.both("park", *weight)
        if isinstance(answers[0], type):
            assert answers[0] is answers[1]
        else:
            self.waiting[self.remember(answers)] = (*weight, 0, inf)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data):
        ticket = data.draw(st.sampled_from(sorted(self.held)))
        del self.held[ticket]
        self.granted(self.on_ticket("release", ticket))

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def cancel(self, data):
        ticket = data.draw(st.sampled_from(sorted(self.waiting)))
        del self.waiting[ticket]
        self.granted(self.on_ticket("cancel", ticket))

    @precondition(lambda self: self.tickets)
    @rule(data=st.data())
    def misuse(self, data):
        ticket = data.draw(st.integers(0, len(self.tickets) - 1))
        for twin, own in zip(self.twins, self.tickets[ticket], strict=True):
            if ticket not in self.held:
                with pytest.raises(NotHeld):
                    twin.release(own)
            if ticket not in self.waiting:
                with pytest.raises(NotWaiting):
                    twin.cancel(own)

    @rule(seconds=st.integers(0, 8))
    def expire(self, seconds):
        self.now += seconds
        first, second = self.both("expire", self.now)
        assert first == second
        expired, granted = first
        late = [ticket for ticket, waiter in self.waiting.items() if waiter[3] <= self.now]
        assert expired == sorted(late, key=lambda ticket: (self.waiting[ticket][3], ticket))
        for ticket in expired:
            del self.waiting[ticket]
        self.granted(granted)

    @rule(weight=weights)
    def resize(self, weight):
        first, second = self.both("resize", *weight)
        assert first == second
        granted, refused = first
        assert refused == [t for t, (a, b, *_) in self.waiting.items() if a > weight[0] or b > weight[1]]
        for ticket in refused:
            del self.waiting[ticket]
        self.granted(granted)

    @invariant()
    def counts_hold(self):
        for semaphore in getattr(self, "twins", []):
            assert semaphore.held_tokens == sum(weight[0] for weight in self.held.values())
            assert semaphore.held_sequences == sum(weight[1] for weight in self.held.values())
            assert semaphore.free_tokens + semaphore.held_tokens == semaphore.tokens
            assert semaphore.free_sequences + semaphore.held_sequences == semaphore.sequences
            assert semaphore.waiting == len(self.waiting)
            assert semaphore.next_deadline_s == min((w[3] for w in self.waiting.values()), default=inf)
            stats = semaphore.stats()
            assert stats.acquired + stats.woken == stats.released + stats.held
            assert stats.parked >= stats.woken + stats.cancelled + stats.expired + stats.waiting

    @invariant()
    def the_head_does_not_fit(self):
        if getattr(self, "waiting", None):
            head = min(self.waiting, key=lambda waiter: (self.waiting[waiter][2], waiter))
            for semaphore in self.twins:
                tokens, sequences = self.waiting[head][:2]
                short_of_tokens = tokens > max(0, semaphore.free_tokens)
                assert short_of_tokens or sequences > max(0, semaphore.free_sequences)

    @invariant()
    def twins_agree(self):
        if hasattr(self, "twins"):
            assert self.twins[0].stats() == self.twins[1].stats()
            assert repr(self.twins[0]) == repr(self.twins[1])


def _renumber(answer, number):
    if isinstance(answer, tuple):
        return tuple(_renumber(part, number) for part in answer)
    return [number[ticket] for ticket in answer]


TestBothSemaphores = pytest.mark.native(BothSemaphores.TestCase)
TestBothSemaphores.settings = settings(max_examples=EXAMPLES, stateful_step_count=40)
