"""What waits for one model: who goes next, what keeps its place, and that every view of the queue agrees."""

from __future__ import annotations

from math import inf

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from ext.weighted_semaphore import Capacity
from scheduler.admission import AGEING_SHARE, Waiting, WaitQueue
from scheduler.fairness import Fairness
from scheduler.model import LatencyClass, Ticket

STANDARD, BATCH = LatencyClass.STANDARD, LatencyClass.BATCH


class Queue:
    """A queue with an engine's capacity, where tickets are numbers."""

    def __init__(self, tokens: int = 1000, sequences: int = 1000) -> None:
        self.fairness = Fairness()
        self.queue = WaitQueue(self.fairness)
        self.capacity = Capacity(tokens, sequences)
        self.tickets: dict[int, Waiting] = {}

    def push(
        self,
        number: int,
        tenant: str = "a",
        tokens: int = 1,
        latency_class: LatencyClass = STANDARD,
        *,
        now: float = 0.0,
        overdue_s: float = inf,
        prefix: int = 0,
    ) -> None:
        ticket = Ticket(number, "m", latency_class, tenant, tokens, prefix=prefix)
        self.tickets[number] = Waiting(ticket, number, now, now + 10.0, overdue_s, tokens)
        self.queue.push(self.tickets[number])
        self.check()

    def take(self, now: float = 0.0) -> list[int]:
        taken = self.queue.take(self.capacity, now)
        self.check()
        return [waiting.ticket.id for waiting in taken]

    def remove(self, number: int) -> Waiting | None:
        removed = self.queue.remove(self.tickets[number].ticket)
        self.check()
        return removed

    def check(self) -> None:
        self.queue.check()
        self.fairness.check(self.queue.places())


def test_a_flood_of_one_tenant_does_not_stand_before_another_tenant() -> None:
    it = Queue(sequences=2)
    for number in range(100):
        it.push(number, "flood")
    it.push(500, "quiet")
    assert 500 in it.take()


def test_the_shorter_class_goes_first_and_inside_a_tenant_who_came_first() -> None:
    it = Queue()
    it.push(1, latency_class=BATCH)
    it.push(2)
    it.push(3)
    assert it.take() == [2, 3, 1]


def test_prompts_that_begin_alike_go_one_after_the_other_where_all_of_them_go_now() -> None:
    it = Queue()
    for number in range(1, 7):
        it.push(number, prefix=(11, 22, 0)[number % 3])
    assert it.take() == [1, 4, 2, 3, 6, 5]


def test_a_prompt_that_begins_like_one_that_goes_takes_nobodys_turn() -> None:
    it = Queue(sequences=2)
    for number, prefix in ((1, 11), (2, 22), (3, 11)):
        it.push(number, prefix=prefix)
    assert it.take() == [1, 2]


def test_of_the_overdue_only_every_fourth_grant_goes_out_of_turn() -> None:
    it = Queue(sequences=8)
    for number in range(10):
        it.push(number, "flood", overdue_s=5.0)
    for number in range(20, 30):
        it.push(number, "quiet", latency_class=LatencyClass.FAST)
    taken = it.take(now=6.0)
    assert AGEING_SHARE == 4
    assert [number < 10 for number in taken] == [False, False, False, True] * 2


def test_nobody_passes_a_large_head_and_small_ones_go_once_it_has_left() -> None:
    it = Queue(tokens=100)
    assert it.capacity.try_take(50)
    it.push(1, "a", 90)
    it.push(2, "b", 10)
    assert it.take() == []
    head = it.queue.head()
    assert head is not None
    assert head.ticket.id == 1
    it.remove(1)
    assert it.take() == [2]


def test_an_idle_engine_takes_a_head_that_looks_larger_than_it() -> None:
    it = Queue(tokens=1000)
    it.push(1, tokens=900)
    it.push(2, tokens=5)
    it.capacity.resize(100, 10)  # a reload gave the model a smaller cache while they waited
    assert it.take() == [1]
    assert it.capacity.free_tokens == 0
    it.capacity.give(it.tickets[1].tokens)
    assert it.take() == [2]


def test_what_was_cancelled_is_gone_everywhere_and_the_next_ticket_is_served() -> None:
    it = Queue()
    it.push(1)
    assert it.remove(1) is it.tickets[1]
    assert it.remove(1) is None
    assert (len(it.queue), it.queue.heads(), it.queue.head(), it.queue.overdue_since()) == (0, [], None, inf)
    it.push(2)
    assert it.take() == [2]


def test_a_drained_queue_serves_on() -> None:
    it = Queue()
    it.push(1, latency_class=BATCH)
    it.push(2, "b")
    assert [waiting.ticket.id for waiting in it.queue.drain()] == [2, 1]
    assert len(it.queue) == 0
    it.check()
    it.push(3)
    assert it.take() == [3]


def test_a_clock_that_steps_back_changes_nothing() -> None:
    it = Queue()
    it.push(1, now=5.0)
    it.push(2, now=4.0)
    assert it.take(now=3.0) == [1, 2]


class Model(RuleBasedStateMachine):
    """Random pushes, grants, ends and cancels against a plain dict."""

    @initialize(tokens=st.integers(1, 30), sequences=st.integers(1, 5))
    def start(self, tokens: int, sequences: int) -> None:
        self.it = Queue(tokens, sequences)
        self.waiting: set[int] = set()
        self.running: set[int] = set()
        self.last = 0
        self.now = 0.0

    @rule(tenant=st.sampled_from("abc"), tokens=st.integers(1, 30), latency_class=st.sampled_from(LatencyClass))
    def push(self, tenant: str, tokens: int, latency_class: LatencyClass) -> None:
        self.last += 1
        tokens = min(tokens, self.it.capacity.tokens)
        self.it.push(self.last, tenant, tokens, latency_class, now=self.now, overdue_s=self.now + 20.0)
        self.waiting.add(self.last)

    @rule(seconds=st.integers(0, 9))
    def take(self, seconds: int) -> None:
        self.now += seconds
        taken = self.it.take(self.now)
        assert self.waiting.issuperset(taken)
        self.waiting.difference_update(taken)
        self.running.update(taken)
        head = self.it.queue.head()
        assert (head is None) == (not self.waiting)
        assert head is None or not self.it.capacity.fits(head.tokens)

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(sorted(self.running)))
        self.running.remove(number)
        self.it.capacity.give(self.it.tickets[number].tokens)

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        number = data.draw(st.sampled_from(sorted(self.waiting)))
        self.waiting.remove(number)
        assert self.it.remove(number) is not None

    @rule(tokens=st.integers(1, 30))
    def resize(self, tokens: int) -> None:
        self.it.capacity.resize(tokens, self.it.capacity.sequences)

    @invariant()
    def agrees(self) -> None:
        if not hasattr(self, "it"):
            return
        queue = self.it.queue
        assert len(queue) == len(self.waiting) == sum(queue.count(c) for c in LatencyClass)
        assert self.it.capacity.held_tokens == sum(self.it.tickets[number].tokens for number in self.running)
        for number in self.waiting:
            assert 0 <= queue.ahead(self.it.tickets[number]) < len(queue)

    def teardown(self) -> None:
        """Whatever happened, everybody who still waits is served in the end."""
        for _ in range(2 * len(getattr(self, "waiting", ())) + 1):
            for number in self.running:
                self.it.capacity.give(self.it.tickets[number].tokens)
            self.running.clear()
            self.take(0)
        assert not getattr(self, "waiting", None)


TestRandomQueues = Model.TestCase
TestRandomQueues.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
