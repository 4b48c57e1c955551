import random
from itertools import islice
from math import inf, nan

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from ext.errors import ClockWentBack, CoreError, NeverFits, NotWaiting, QueueFull
from tests.ext.conftest import EXAMPLES, load

PLENTY = 1 << 40
INSTANT, STANDARD, BATCH = 0, 2, 4


def test_the_more_urgent_class_goes_first(twins):
    queue = twins.FairQueue()
    queue.push(1, "a", 10, 0.0, latency_class=BATCH)
    queue.push(2, "a", 10, 0.0, latency_class=STANDARD)
    queue.push(3, "a", 10, 0.0, latency_class=INSTANT)
    assert queue.take(PLENTY, 2, 0.0) == [3, 2]
    assert queue.stats().by_class == (0, 0, 0, 0, 1)


def test_a_tenant_with_a_thousand_tickets_does_not_delay_another(twins):
    queue = twins.FairQueue(limit=2000)
    for ticket in range(1000):
        queue.push(ticket, "loud", 10, 0.0)
    queue.push(5000, "quiet", 10, 0.0)
    assert 5000 in queue.take(PLENTY, 2, 0.0)


def test_tenants_share_by_tokens_not_by_requests(twins):
    queue = twins.FairQueue()
    for ticket in range(100):
        queue.push(ticket, "long", 300, 0.0)
        queue.push(1000 + ticket, "short", 100, 0.0)
    taken = queue.take(PLENTY, 80, 0.0)
    assert sum(300 for ticket in taken if ticket < 1000) == sum(100 for ticket in taken if ticket >= 1000)


def test_a_tenant_that_was_away_is_lifted_and_cannot_claim_the_past(twins):
    queue = twins.FairQueue()
    for ticket in range(100):
        queue.push(ticket, "steady", 10, 0.0)
    queue.push(200, "back", 10, 0.0)
    assert len(queue.take(PLENTY, 52, 0.0)) == 52
    for ticket in range(300, 400):
        queue.push(ticket, "back", 10, 0.0)
    taken = queue.take(PLENTY, 20, 0.0)
    assert 9 <= sum(ticket >= 300 for ticket in taken) <= 11


def test_what_only_turned_out_later_is_charged_and_given_back(twins):
    queue = twins.FairQueue()
    for ticket in range(10):
        queue.push(ticket, "a", 10, 0.0)
        queue.push(100 + ticket, "b", 10, 0.0)
    queue.charge("a", STANDARD, 35)
    assert queue.take(PLENTY, 4, 0.0) == [100, 101, 102, 103]
    queue.charge("b", STANDARD, -40)
    assert queue.counter("b", STANDARD) == 0
    assert queue.take(PLENTY, 2, 0.0) == [104, 105]
    queue.charge("nobody", STANDARD, 7)
    assert queue.counter("nobody", STANDARD) == 0


def test_service_of_two_backlogged_tenants_never_differs_by_more_than_two_largest_tickets(twins):
    rng = random.Random(7)
    queue = twins.FairQueue(limit=10_000, patience_s=(1e6,))
    weight = {}
    for ticket in range(4000):
        weight[ticket] = rng.randint(1, 1000)
        queue.push(ticket, "ab"[ticket % 2], weight[ticket], 0.0, latency_class=0)
    served = [0, 0]
    for _ in range(1500):
        for ticket in queue.take(PLENTY, 1, 0.0):
            served[ticket % 2] += weight[ticket]
        assert abs(served[0] - served[1]) <= 2 * 1000


def test_first_in_first_out_inside_a_tenant_or_the_shortest_first_if_asked(twins):
    expected = {1: 900, 2: 5, 3: 70, 4: 6}
    for shortest_first, order in [(False, [1, 2, 3, 4]), (True, [2, 4, 3, 1])]:
        queue = twins.FairQueue(shortest_first=shortest_first)
        for ticket, output in expected.items():
            queue.push(ticket, "a", 10, 0.0, expected_output=output)
        assert queue.take(PLENTY, 10, 0.0) == order


def test_every_fourth_grant_goes_to_the_longest_overdue(twins):
    queue = twins.FairQueue(patience_s=(100.0, 1.0), ageing_share=4)
    for ticket in (900, 901, 902):
        queue.push(ticket, "patient", 10, 0.0, latency_class=1)
    for ticket in range(20):
        queue.push(ticket, "urgent", 10, 5.0, latency_class=0)
    assert queue.take(PLENTY, 9, 5.0) == [0, 1, 2, 900, 3, 4, 5, 901, 6]
    assert queue.stats().aged == 2


def test_a_ticket_may_bring_its_own_moment_of_being_overdue(twins):
    queue = twins.FairQueue(patience_s=(100.0, 100.0), ageing_share=1)
    queue.push(1, "a", 10, 0.0, latency_class=1, overdue_s=2.0)
    queue.push(2, "a", 10, 0.0, latency_class=1, overdue_s=inf)
    queue.push(3, "a", 10, 0.0, latency_class=0)
    assert queue.take(PLENTY, 1, 2.0) == [1]
    assert queue.take(PLENTY, 2, 99.0) == [3, 2]
    with pytest.raises(ValueError, match="overdue_s is NaN"):
        queue.push(4, "a", 10, 99.0, latency_class=0, overdue_s=nan)
    assert 4 not in queue


def test_who_came_first_in_each_class_and_who_is_overdue_first_are_known(twins):
    queue = twins.FairQueue(patience_s=(1.0, 10.0, 10.0))
    assert (queue.next_overdue_s, queue.oldest(0), queue.count(0)) == (inf, None, 0)
    queue.push(1, "a", 10, 0.0, latency_class=1)
    queue.push(2, "b", 10, 3.0, latency_class=1, overdue_s=4.0)
    queue.push(3, "a", 10, 5.0, latency_class=0)
    assert ([queue.oldest(c) for c in range(3)], [queue.count(c) for c in range(3)]) == ([3, 1, None], [1, 2, 0])
    assert queue.next_overdue_s == 6.0  # of its class the second is not looked at
    queue.cancel(1)
    assert (queue.next_overdue_s, queue.oldest(1), queue.count(1)) == (4.0, 2, 1)
    with pytest.raises(ValueError, match="latency_class is 3"):
        queue.oldest(3)
    with pytest.raises(ValueError, match="latency_class is -1"):
        queue.count(-1)


def test_the_head_is_whoever_the_next_take_looks_at_first(twins):
    queue = twins.FairQueue(patience_s=(100.0, 1.0), ageing_share=2, max_passes=0)
    assert queue.head() is None
    queue.push(1, "a", 90, 0.0, latency_class=1)
    queue.push(2, "a", 10, 0.0, latency_class=0)
    queue.push(3, "b", 10, 0.0, latency_class=0)
    order = []
    for now in (5.0, 5.0, 5.0):
        queue.take(0, 0, now)
        assert queue.head() == queue.head()
        order.append(queue.head())
        assert queue.take(PLENTY, 1, now) == order[-1:]
    assert order == [2, 1, 3]
    assert queue.head() is None


def test_the_shortest_first_order_cannot_starve_a_long_ticket(twins):
    queue = twins.FairQueue(shortest_first=True, patience_s=(1.0,), ageing_share=4)
    queue.push(999, "a", 10, 0.0, latency_class=0, expected_output=100_000)
    for ticket in range(50):
        queue.push(ticket, "a", 10, 2.0, latency_class=0, expected_output=1)
    assert 999 in queue.take(PLENTY, 4, 2.0)


def test_a_head_that_does_not_fit_is_passed_by_so_many_and_no_more(twins):
    queue = twins.FairQueue(max_passes=3)
    queue.push(1, "large", 90, 0.0)
    for ticket in range(10, 20):
        queue.push(ticket, "small", 1, 0.0)
    assert queue.take(50, 2, 0.0) == [10, 11]
    assert queue.take(50, 9, 0.0) == [12]
    assert queue.take(50, 9, 0.0) == []  # room is kept from now on
    assert queue.take(90, 9, 0.0) == [1]
    assert queue.stats().passes == 3


def test_with_no_passes_allowed_the_order_is_strict(twins):
    queue = twins.FairQueue(max_passes=0)
    queue.push(1, "a", 90, 0.0)
    queue.push(2, "b", 1, 0.0)
    assert queue.take(50, 9, 0.0) == []
    assert queue.take(100, 9, 0.0) == [1, 2]


def test_a_head_set_aside_keeps_its_place_in_its_tenants_line(twins):
    queue = twins.FairQueue()
    for ticket, tokens in [(1, 80), (2, 70), (3, 5)]:
        queue.push(ticket, "a", tokens, 0.0)
    assert queue.take(10, 9, 0.0) == [3]
    assert queue.take(200, 9, 0.0) == [1, 2]


def test_a_batch_is_grouped_by_prefix_and_holds_the_same_tickets(twins):
    queue = twins.FairQueue()
    for ticket, prefix in enumerate([7, 0, 9, 7, 0, 9, 7]):
        queue.push(ticket, "a", 10, 0.0, prefix=prefix)
    assert queue.take(PLENTY, 6, 0.0) == [0, 3, 1, 2, 5, 4]


def test_a_batch_stays_within_both_budgets_and_none_takes_nothing(twins):
    queue = twins.FairQueue()
    for ticket in range(10):
        queue.push(ticket, "a", 10, 0.0, sequences=2)
    assert queue.take(0, 10, 0.0) == queue.take(10, 0, 0.0) == queue.take(-5, -5, 0.0) == []
    assert len(queue.take(35, 100, 0.0)) == 3
    assert len(queue.take(PLENTY, 5, 0.0)) == 2


def test_cancel_and_expiry_take_tickets_out(twins):
    queue = twins.FairQueue()
    for ticket in range(6):
        queue.push(ticket, "a", 10, 0.0, deadline_s=[inf, 9.0, 3.0, 9.0, 3.5, inf][ticket])
    queue.cancel(1)
    assert queue.next_deadline_s == 3.0
    assert queue.expire(4.0) == [2, 4]
    assert 2 not in queue
    assert 3 in queue
    assert queue.next_deadline_s == 9.0
    assert queue.take(PLENTY, 9, 4.0) == [0, 3, 5]
    assert queue.next_deadline_s == inf
    assert (len(queue), queue.stats().waiting_tokens) == (0, 0)


def test_misuse_is_refused_and_changes_nothing(twins):
    queue = twins.FairQueue(limit=2, max_tokens=100, max_sequences=4)
    queue.push(1, "a", 10, 5.0)
    before = repr(queue)
    for bad in (0, -1, nan, 1.5, 1 << 41, None):
        with pytest.raises((ValueError, TypeError, OverflowError)):
            queue.push(2, "a", bad, 5.0)
        with pytest.raises((ValueError, TypeError, OverflowError)):
            queue.push(2, "a", 1, 5.0, sequences=bad)
    for keyword in ({"latency_class": 5}, {"latency_class": -1}, {"deadline_s": nan}, {"expected_output": -1}):
        with pytest.raises(ValueError, match=next(iter(keyword))):
            queue.push(2, "a", 1, 5.0, **keyword)
    with pytest.raises(NeverFits):
        queue.push(2, "a", 101, 5.0)
    with pytest.raises(NeverFits):
        queue.push(2, "a", 1, 5.0, sequences=5)
    with pytest.raises(ValueError, match="waits already"):
        queue.push(1, "a", 1, 5.0)
    for late in (lambda: queue.push(2, "a", 1, 4.9), lambda: queue.take(1, 1, 4.9), lambda: queue.expire(4.9)):
        with pytest.raises(ClockWentBack):
            late()
    with pytest.raises(ValueError, match="NaN"):
        queue.take(1, 1, nan)
    with pytest.raises(NotWaiting):
        queue.cancel(2)
    assert repr(queue) == before
    queue.push(2, "b", 10, 5.0)
    with pytest.raises(QueueFull):
        queue.push(3, "b", 10, 5.0)
    queue.cancel(2)
    with pytest.raises(NotWaiting):
        queue.cancel(2)
    assert queue.take(100, 9, 5.0) == [1]


@pytest.mark.parametrize(
    "setting",
    [{"limit": 0}, {"patience_s": ()}, {"patience_s": (nan,)}, {"patience_s": (-1.0,)}, {"patience_s": (inf,)},
     {"ageing_share": 0}, {"max_passes": -1}, {"max_tokens": 0}, {"max_sequences": 0}],
)  # fmt: skip
def test_a_bad_setting_is_named(twins, setting):
    with pytest.raises(ValueError, match=next(iter(setting))):
        twins.FairQueue(**setting)


def test_tenants_who_came_and_went_are_forgotten(twins):
    queue = twins.FairQueue()
    for visitor in range(20_000):
        queue.push(1, f"tenant {visitor}", 10, 0.0)
        assert queue.take(PLENTY, 1, 0.0) == [1]
    assert queue.counter("tenant 0", STANDARD) == 0
    known = sum(queue.counter(f"tenant {visitor}", STANDARD) > 0 for visitor in range(20_000))
    assert known <= 4096


def test_a_hundred_thousand_cancelled_deadlines_leave_nothing_behind(twins):
    queue = twins.FairQueue(limit=10)
    for ticket in range(100_000 if twins.kind == "native" else 5000):
        queue.push(ticket, "a", 1, 0.0, deadline_s=1e9)
        queue.cancel(ticket)
    assert queue.next_deadline_s == inf
    assert queue.expire(2e9) == []


def _waits_under_overload(queue, rng, *, capacity, rate, largest, until_s):
    """Feed a queue more than its engine can do: the longest wait of each class, in seconds.

    The engine frees each batch's tokens after tokens / rate seconds, one after the other: `rate` tokens per second.
    """
    now, free, ticket, running = 0.0, capacity, 0, []
    pushed, worst = {}, [0.0] * 3
    while now < until_s:
        while len(queue) < queue.limit:
            klass = rng.choice([0, 0, 0, 0, 1, 1, 2])
            queue.push(ticket, f"t{rng.randrange(5)}", rng.randint(1, largest), now, latency_class=klass)
            pushed[ticket] = now, klass
            ticket += 1
        before = queue.stats().waiting_tokens
        for taken in queue.take(free, PLENTY, now):
            arrived, klass = pushed.pop(taken)
            worst[klass] = max(worst[klass], now - arrived)
        granted = before - queue.stats().waiting_tokens
        if granted:
            running.append(granted)
            free -= granted
        finished = running.pop(0)
        now += finished / rate
        free += finished
    return [max([worst[k], *(now - at for at, klass in pushed.values() if klass == k)]) for k in range(3)]


@pytest.mark.parametrize("seed", range(3))
def test_no_wait_under_overload_exceeds_the_bound_of_the_docstring(twins, seed):
    queue = twins.FairQueue(limit=30, max_tokens=100, patience_s=(0.1, 0.5, 2.0), ageing_share=3, max_passes=2)
    waits = _waits_under_overload(queue, random.Random(seed), capacity=150, rate=1000, largest=100, until_s=120.0)
    for klass, wait in enumerate(waits):
        assert wait <= queue.worst_wait_s(klass, 1000)
    assert queue.stats().aged > 0
    assert queue.stats().passes > 0


def test_without_ageing_the_same_overload_breaks_the_bound(twins):
    never = 1 << 30
    queue = twins.FairQueue(limit=30, max_tokens=100, patience_s=(0.1, 0.5, 2.0), ageing_share=never, max_passes=2)
    waits = _waits_under_overload(queue, random.Random(0), capacity=150, rate=1000, largest=100, until_s=120.0)
    aged = twins.FairQueue(limit=30, max_tokens=100, patience_s=(0.1, 0.5, 2.0), ageing_share=3, max_passes=2)
    assert max(waits) > aged.worst_wait_s(2, 1000)


TENANTS = ["a", "b", "c", "d"]


class BothQueues(RuleBasedStateMachine):
    """The twins side by side: equal batches, equal order, equal counts; a plain dict knows what waits."""

    @initialize(
        shortest_first=st.booleans(), ageing_share=st.integers(1, 4), max_passes=st.integers(0, 3),
        limit=st.integers(1, 30),
    )  # fmt: skip
    def start(self, **settings):
        self.queues = [
            load(kind).FairQueue(max_tokens=20, max_sequences=3, patience_s=(0.0, 2.0, 5.0), **settings)
            for kind in ("pure", "native")
        ]
        self.waiting: dict[int, tuple[int, int, str, float]] = {}
        self.limit = settings["limit"]
        self.now, self.last_ticket = 0.0, 0

    def both(self, call, *args, **kwargs):
        answers = []
        for queue in self.queues:
            try:
                answers.append(getattr(queue, call)(*args, **kwargs))
            except (CoreError, ValueError) as error:
                answers.append(type(error))
        assert answers[0] == answers[1]
        return answers[0]

    @rule(
        tenant=st.sampled_from(TENANTS), tokens=st.integers(1, 21), sequences=st.integers(1, 3),
        latency_class=st.integers(0, 2), patience=st.one_of(st.none(), st.integers(0, 9)),
        expected_output=st.integers(0, 5000), prefix=st.integers(0, 2), seconds=st.integers(0, 1),
        overdue_in=st.one_of(st.none(), st.integers(-1, 9)),
    )  # fmt: skip
    def push(self, tenant, tokens, sequences, patience, seconds, overdue_in, **rest):
        now = self.now + seconds
        rest["overdue_s"] = None if overdue_in is None else now + overdue_in
        deadline = inf if patience is None else now + patience
        ticket = self.last_ticket + 1
        answer = self.both("push", ticket, tenant, tokens, now, sequences, deadline_s=deadline, **rest)
        if tokens > 20:
            assert answer is NeverFits
        elif len(self.waiting) >= self.limit:
            assert answer is QueueFull
        else:
            assert answer is None
            self.now, self.last_ticket = now, ticket
            self.waiting[ticket] = (tokens, sequences, tenant, deadline)

    @rule(tokens=st.integers(-2, 60), sequences=st.integers(-1, 12), seconds=st.integers(0, 3))
    def take(self, tokens, sequences, seconds):
        self.now += seconds
        batch = self.both("take", tokens, sequences, self.now)
        assert len(set(batch)) == len(batch)
        weights = [self.waiting.pop(ticket) for ticket in batch]
        assert sum(weight[0] for weight in weights) <= max(0, tokens)
        assert sum(weight[1] for weight in weights) <= max(0, sequences)

    @precondition(lambda self: self.waiting)
    @rule()
    def take_all_that_waits(self):
        assert sorted(self.both("take", PLENTY, PLENTY, self.now)) == sorted(self.waiting)
        self.waiting.clear()

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def cancel(self, data):
        ticket = data.draw(st.sampled_from(sorted(self.waiting)))
        self.both("cancel", ticket)
        del self.waiting[ticket]
        assert self.both("cancel", ticket) is NotWaiting

    @rule(seconds=st.integers(0, 5))
    def expire(self, seconds):
        self.now += seconds
        late = [ticket for ticket, weight in self.waiting.items() if weight[3] <= self.now]
        assert self.both("expire", self.now) == sorted(late, key=lambda ticket: (self.waiting[ticket][3], ticket))
        for ticket in late:
            del self.waiting[ticket]

    @rule(tenant=st.sampled_from([*TENANTS, "stranger"]), latency_class=st.integers(0, 3), tokens=st.integers(-50, 50))
    def charge(self, tenant, latency_class, tokens):
        self.both("charge", tenant, latency_class, tokens)

    @invariant()
    def counts_hold(self):
        for queue in getattr(self, "queues", []):
            stats = queue.stats()
            assert len(queue) == stats.waiting == sum(stats.by_class) == len(self.waiting) <= self.limit
            assert stats.waiting_tokens == sum(weight[0] for weight in self.waiting.values())
            assert stats.pushed == stats.taken + stats.cancelled + stats.expired + stats.waiting
            assert queue.next_deadline_s == min((weight[3] for weight in self.waiting.values()), default=inf)
            assert all(ticket in queue for ticket in islice(self.waiting, 5))

    @invariant()
    def twins_agree(self):
        if hasattr(self, "queues"):
            pure, native = self.queues
            assert pure.stats() == native.stats()
            assert repr(pure) == repr(native)
            assert pure.head() == native.head()
            assert pure.next_overdue_s == native.next_overdue_s
            assert [pure.oldest(k) for k in range(3)] == [native.oldest(k) for k in range(3)]
            assert pure.stats().by_class[:3] == tuple(native.count(k) for k in range(3))
            assert (pure.head() is None) == (not self.waiting)
            for tenant in TENANTS:
                assert [pure.counter(tenant, k) for k in range(3)] == [native.counter(tenant, k) for k in range(3)]


TestBothQueues = pytest.mark.native(BothQueues.TestCase)
TestBothQueues.settings = settings(max_examples=EXAMPLES, stateful_step_count=50)
