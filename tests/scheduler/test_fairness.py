"""Tenants: what they are charged, and that a flood of one does not push another beyond the bound."""

from __future__ import annotations

import random
from collections import Counter, deque
from collections.abc import Sequence
from itertools import count

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ext.weighted_semaphore import Capacity
from scheduler.admission import Waiting, WaitQueue
from scheduler.commands import Admit, Command, Load, Refuse, Stop
from scheduler.core import Core
from scheduler.events import Arrived, Cancelled, EngineReady, EngineStopped, Event, Finished, LoadAsked
from scheduler.fairness import FIRST_RATE, MOST_SHARERS, MOST_TOKENS, Fairness, Line, LoadShares, Pace, largest_gap
from scheduler.model import DeviceSpec, LatencyClass, ModelSpec, Ticket
from scheduler.ordering import Ordering
from scheduler.policies.fifo import Fifo
from scheduler.simulate.gap import largest_service_gap
from scheduler.simulate.traces import Request

STANDARD = LatencyClass.STANDARD
KV_TOKENS = 400
MODEL = ModelSpec("m", 10, "host", max_sequences=8, kv_tokens=KV_TOKENS, max_queue=100_000)


class House:
    """A core whose engines answer when the test says so.

    All its models are ready, unless `cold`: then they load when `loaded` says so. `shares`: what tickets really use of
    what they were expected to, in percent, in turn.
    """

    def __init__(
        self,
        *models: ModelSpec,
        cold: bool = False,
        ordering: Ordering | None = None,
        shares: Sequence[int] = (100,),
    ) -> None:
        models = models or (MODEL,)
        self.core = Core([DeviceSpec("ram", "host", 1000)], models, ordering=ordering)
        self.shares = shares
        self.came_s: list[float] = []
        self.waits_s: dict[int, float] = {}
        self.now = 0.0
        self.loading: deque[Load] = deque()
        self.running: deque[tuple[int, str]] = deque()
        self.tickets: dict[int, Ticket] = {}
        self.admitted: list[int] = []
        self.refused: list[int] = []
        self._ids = count(1)
        for model in () if cold else models:
            self.feed(LoadAsked(model.name))
            self.loaded(0.0)

    def feed(self, event: Event) -> None:
        """An event and all that follows from it at once, loads and stops included."""
        events = deque([event])
        while events:
            event = events.popleft()
            for command in self.core.step(event, self.now):
                events.extend(self._obey(command))
            self.core.check()

    def _obey(self, command: Command) -> Sequence[Event]:
        match command:
            case Admit(ticket_id):
                self.admitted.append(ticket_id)
                self.waits_s[ticket_id] = self.now - self.came_s[ticket_id - 1]
                self.running.append((ticket_id, self.tickets[ticket_id].tenant))
            case Refuse(ticket_id):
                self.refused.append(ticket_id)
            case Load():
                self.loading.append(command)
            case Stop(engine_id):
                return (EngineStopped(engine_id),)
        return ()

    def loaded(self, seconds: float) -> None:
        load = self.loading.popleft()
        self.now += seconds
        self.feed(EngineReady(load.engine_id, load.model, load.device, seconds))

    def arrive(self, tenant: str, tokens: int = 10, model: str = "m", *, open_ended: bool = False) -> int:
        ticket = Ticket(next(self._ids), model, STANDARD, tenant, tokens, open_ended=open_ended)
        self.tickets[ticket.id] = ticket
        self.came_s.append(self.now)
        self.feed(Arrived(ticket))
        return ticket.id

    def finish(self, ticket_id: int, output_tokens: int | None = None, prompt_tokens: int = 0) -> None:
        self.running.remove((ticket_id, self.tickets[ticket_id].tenant))
        self.feed(Finished(ticket_id, prompt_tokens, output_tokens))

    def used(self, ticket: Ticket) -> int:
        return ticket.weight_tokens * self.shares[ticket.id % len(self.shares)] // 100

    def turn(self) -> None:
        """The request that runs longest ends."""
        ticket_id, _ = self.running[0]
        self.now += 0.1
        self.finish(ticket_id, self.used(self.tickets[ticket_id]))

    def gap(self) -> float:
        """The largest gap in service between two tenants, once everybody has been served."""
        while self.running:
            self.turn()
        requests = [
            Request(self.came_s[each.id - 1], each.model, 0, self.used(each), tenant=each.tenant)
            for each in self.tickets.values()
        ]
        return largest_service_gap(requests, [self.waits_s[each] for each in self.tickets])

    def charged(self, tenant: str, model: str = "m") -> int:
        return self.core.models[model].queue.charged(tenant, STANDARD)

    def served(self, tenant: str) -> int:
        mine = (self.tickets[ticket_id] for ticket_id in self.admitted)
        return sum(ticket.weight_tokens for ticket in mine if ticket.tenant == tenant)


def run_flood(house: House, sizes: Sequence[int]) -> None:
    """`flood` sends a hundred tickets, `quiet` keeps ten waiting; both wait until the end."""
    for at in range(100):
        house.arrive("flood", sizes[at % len(sizes)])
    for at in range(10):
        house.arrive("quiet", sizes[-1 - at % len(sizes)])
    for at in range(60):
        house.turn()
        house.arrive("quiet", sizes[at % len(sizes)])


@settings(max_examples=25, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 100), min_size=1, max_size=8),
    shares=st.lists(st.integers(0, 100), min_size=1, max_size=5),
)
def test_a_flood_does_not_push_a_tenant_beyond_the_bound(sizes: list[int], shares: list[int]) -> None:
    house = House(shares=shares)
    run_flood(house, sizes)
    assert house.gap() <= largest_gap(max(sizes), KV_TOKENS)


def test_order_of_arrival_breaks_that_bound() -> None:
    """So the test above can fail."""
    house = House(ordering=Fifo())
    for _ in range(50):
        house.arrive("flood", 100)
    for _ in range(10):
        house.arrive("quiet", 100)
    assert house.gap() > largest_gap(100, KV_TOKENS)


def test_two_tenants_that_both_wait_are_served_alike_however_many_requests_each_sends() -> None:
    house = House()
    for _ in range(500):
        house.arrive("flood", 10)
    for _ in range(50):
        house.arrive("large", 50)
    before = {name: house.served(name) for name in ("flood", "large")}
    for _ in range(100):
        house.turn()
    gained = [house.served(name) - before[name] for name in ("flood", "large")]
    assert abs(gained[0] - gained[1]) <= largest_gap(50, KV_TOKENS)
    assert min(gained) > 800


def test_what_was_charged_too_much_is_given_back_and_too_little_is_charged() -> None:
    house = House()
    first = house.arrive("a", KV_TOKENS)
    waits = [house.arrive("a", 100), house.arrive("b", 100), house.arrive("a", 10), house.arrive("b", 10)]
    house.finish(first, output_tokens=KV_TOKENS)
    before = house.charged("a"), house.charged("b")
    house.finish(waits[0], prompt_tokens=20, output_tokens=30)
    house.finish(waits[1], prompt_tokens=60, output_tokens=90)
    assert (house.charged("a") - before[0], house.charged("b") - before[1]) == (-50, 50)


def test_a_request_that_was_let_in_at_once_was_taken_from_nobody_and_is_not_charged() -> None:
    house = House()
    house.finish(house.arrive("a", 300), output_tokens=10)
    house.arrive("a", KV_TOKENS)
    house.arrive("a")
    assert house.charged("a") == 0


def test_a_caller_who_left_without_usage_pays_the_estimate_and_the_next_is_served() -> None:
    house = House()
    house.arrive("a", KV_TOKENS)
    waits = house.arrive("a", 100)
    house.turn()
    charged = house.charged("a")
    house.running.clear()
    house.feed(Cancelled(waits))
    assert house.charged("a") == charged == 100
    assert house.arrive("a") in house.admitted


def test_what_a_tenant_gets_of_another_model_counts_where_it_waits() -> None:
    house = House(ModelSpec("m", 10, "host", max_sequences=1), ModelSpec("other", 10, "host", max_sequences=1))
    running = house.arrive("x"), house.arrive("x", model="other")
    for model in ("m", "other"):
        house.arrive("both", 10, model)
        house.arrive("both", 10, model)
    waits = house.arrive("one", 10)
    house.finish(running[1], 10)  # `both` is let into the other model, and so stands behind `one` in this
    assert house.charged("both") == 10
    house.finish(running[0], 10)
    assert house.admitted[-1] == waits


class Prompt(Fairness):
    """Charges all places at once: what the lazy one must be indistinguishable from."""

    def __init__(self) -> None:
        super().__init__()
        self.places: Counter[tuple[str, Line, LatencyClass]] = Counter()

    def waits(self, tenant: str, line: Line, latency_class: LatencyClass) -> None:
        self.places[tenant, line, latency_class] += 1

    def left(self, tenant: str, line: Line, latency_class: LatencyClass) -> None:
        self.places[tenant, line, latency_class] -= 1

    def charge_elsewhere(self, tenant: str, line: Line, latency_class: LatencyClass, tokens: int) -> None:
        for (name, other, another), tickets in self.places.items():
            if tickets and name == tenant and (other, another) != (line, latency_class):
                other.charge(tenant, another, tokens)


@pytest.mark.parametrize("tenants", [1, 3, 300])
def test_charges_that_counters_catch_up_with_later_are_as_good_as_charges_at_once(tenants: int) -> None:
    rng = random.Random(tenants)
    names = [f"t{i}" for i in range(tenants)]
    worlds = [[WaitQueue(fairness) for _ in range(12)] for fairness in (Fairness(), Prompt())]
    waiting: list[list[Ticket]] = [[] for _ in range(12)]
    granted = 0
    for number in range(4000):
        at = min(rng.randrange(12), rng.randrange(12))  # the last lines are seldom looked at
        tenant, latency_class = rng.choice(names), rng.choice(list(LatencyClass))
        move = rng.random()
        if move < 0.55:
            ticket = Ticket(number, "m", latency_class, tenant)
            tokens = rng.randrange(1, 100)
            for queues in worlds:
                queues[at].push(Waiting(ticket, number, float(number), number + 9.0, number + 500.0, tokens))
            waiting[at].append(ticket)
        elif move < 0.65 and waiting[at]:
            ticket = waiting[at].pop(rng.randrange(len(waiting[at])))
            assert [queues[at].remove(ticket) is not None for queues in worlds] == [True, True]
        elif move < 0.8:
            amount = rng.randrange(-200, 2000)
            for queues in worlds:
                queues[at].charge(tenant, latency_class, amount)
        else:
            room = rng.randrange(1, 200)
            lazy, prompt = ([w.ticket for w in queues[at].take(Capacity(room), float(number))] for queues in worlds)
            assert lazy == prompt
            waiting[at] = [ticket for ticket in waiting[at] if ticket not in lazy]
            granted += len(lazy)
        if number % 50 == 0:
            heads = [head.order if (head := queues[at].head()) is not None else None for queues in worlds]
            assert heads[0] == heads[1]
            counters = [[queues[at].charged(name, latency_class) for name in names] for queues in worlds]
            assert counters[0] == counters[1]
    assert granted > 1000


def test_a_tenant_that_owes_more_than_one_charge_may_be_is_charged_all_of_it() -> None:
    fairness = Fairness()
    here, there = WaitQueue(fairness), WaitQueue(fairness)
    for number, queue in enumerate((here, there)):
        queue.push(Waiting(Ticket(number, "m", STANDARD, "a"), number, 0.0, 9.0, 99.0))
    for _ in range(3):
        here.charge("a", STANDARD, MOST_TOKENS)
    assert there.charged("a", STANDARD) == 3 * MOST_TOKENS


def test_the_seconds_of_a_load_are_charged_to_whoever_made_it_necessary_and_shared_by_those_who_use_it() -> None:
    house = House(ModelSpec("m", 10, "host", max_sequences=1), cold=True)
    for tenant in ("cause", "late", "third") * 2:
        house.arrive(tenant, 1)
    house.loaded(4.0)
    price = round(4.0 * FIRST_RATE)
    model = house.core.models["m"]
    assert model.shares is not None
    served = [house.tickets[house.admitted[0]].tenant]
    assert house.charged("cause") - house.charged("third") == price - price // 2  # `late` uses it already
    while len(served) < 6:
        house.turn()
        served.append(house.tickets[house.admitted[-1]].tenant)
    assert served[:2] == ["late", "third"]
    assert sum(model.shares.shares.values()) == price
    assert set(model.shares.shares.values()) == {price // 3, price - 2 * (price // 3)}


def test_a_load_that_an_operator_asked_for_is_charged_to_nobody() -> None:
    house = House(cold=True)
    house.feed(LoadAsked("m"))
    house.loaded(4.0)
    assert house.core.models["m"].shares is None
    assert house.arrive("a") in house.admitted


@given(st.integers(0, 10**9), st.lists(st.integers(0, 30), max_size=60))
def test_the_shares_of_a_load_always_sum_up_to_its_price(price: int, tenants: list[int]) -> None:
    shares = LoadShares(price, "cause", STANDARD)
    charged = {"cause": price}
    for tenant in tenants:
        for name, _, tokens in shares.join(str(tenant), STANDARD):
            charged[name] = charged.get(name, 0) + tokens
        assert charged == shares.shares
        assert sum(charged.values()) == price
        assert len(charged) <= MOST_SHARERS
        assert max(charged.values()) - min(charged.values()) < max(2, MOST_SHARERS) or len(charged) == 1


def test_an_engine_s_pace_is_measured_while_it_has_work() -> None:
    pace = Pace()
    assert pace.tokens_per_s == FIRST_RATE
    pace.began(10.0)
    pace.add(300)
    pace.ended(12.0)
    pace.began(100.0)
    pace.add(300)
    pace.ended(104.0)
    assert pace.tokens_per_s == pytest.approx(100.0)


def test_answers_without_a_limit_are_expected_to_be_as_long_as_such_answers_were() -> None:
    house = House(ModelSpec("m", 10, "host", kv_tokens=100_000))
    assert house.core.models["m"].output.tokens == 512
    for _ in range(100):
        house.finish(house.arrive("a", 10, open_ended=True), prompt_tokens=10, output_tokens=100)
        house.finish(house.arrive("a", 5000), prompt_tokens=10, output_tokens=4990)  # had a limit: teaches nothing
    expected = house.core.models["m"].output.tokens
    assert 100 <= expected <= 119
    engine = house.core.models["m"].engine
    assert engine is not None
    last = house.arrive("a", 10, open_ended=True)
    assert engine.capacity.held_tokens == 10 + expected
    house.finish(last)
    assert engine.capacity.held_tokens == 0


def test_a_tenant_is_known_only_while_it_waits() -> None:
    house = House()
    house.arrive("a", KV_TOKENS)
    waits = house.arrive("b")
    house.feed(Cancelled(waits))
    house.core.fairness.check(())
    house.turn()
    assert house.arrive("b") in house.admitted
