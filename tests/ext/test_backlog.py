import random
from math import inf, nan

import pytest

from tests.ext.conftest import load


def life(seed, steps=3000):
    """A random life that empties and fills again: what comes and goes, and a moment to ask about."""
    rng = random.Random(seed)
    tickets, now = [], 1e6
    for _ in range(steps):
        now += rng.expovariate(2.0)
        if tickets and rng.random() < (0.3 if now % 200 < 100 else 0.8):
            yield "remove", tickets.pop(rng.randrange(len(tickets))), tickets, now
        else:
            tickets.append((now, now + rng.choice((2.0, 10.0, 30.0))))
            yield "add", tickets[-1], tickets, now


def test_the_numbers_are_those_of_the_tickets_one_by_one(twins):
    backlog, rng = twins.Backlog(), random.Random(1)
    for what, ticket, tickets, now in life(1):
        getattr(backlog, what)(*ticket)
        at = now + rng.uniform(-5.0, 20.0)
        on_time, later = (sum(due >= moment for _, due in tickets) for moment in (at, at + 5.0))
        ages = [(at - since) / (due - since) / 4.0 for since, due in tickets]
        weight = sum((age**2 + age**3) / 2 for age in ages)
        assert len(backlog) == len(tickets)
        assert backlog.on_time(at) == on_time
        assert backlog.weight(at, 4.0) == pytest.approx(max(0.0, weight), rel=1e-6, abs=1e-6)
        assert backlog.gain(at, at + 5.0, 0.4, 4.0) == on_time - 0.4 * later + backlog.weight(at, 4.0)


@pytest.mark.native
@pytest.mark.parametrize("seed", range(5))
def test_the_twins_agree_to_the_last_bit(seed):
    twins = [load(kind).Backlog() for kind in ("pure", "native")]
    for what, ticket, _, now in life(seed):
        for each in twins:
            getattr(each, what)(*ticket)
        pure, native = ((b.weight(now + 3.0, 1.7), b.gain(now, now + 5.0, 0.4, 0.3), repr(b)) for b in twins)
        assert pure == native


def test_equal_moments_are_tickets_of_their_own(twins):
    backlog = twins.Backlog()
    for _ in range(3):
        backlog.add(0.0, 10.0)
    backlog.remove(0.0, 10.0)
    assert (len(backlog), backlog.on_time(10.0), backlog.on_time(10.5)) == (2, 2, 0)
    backlog.remove(0.0, 10.0)
    backlog.remove(0.0, 10.0)
    assert (len(backlog), backlog.weight(99.0, 1.0)) == (0, pytest.approx(0.0, abs=1e-9))


@pytest.mark.parametrize("order", ["first", "last", "middle"])
def test_a_long_line_is_left_from_any_end(twins, order):
    backlog, dues = twins.Backlog(), [float(i) for i in range(1, 501)]
    for due in dues:
        backlog.add(due - 1.0, due)
    while dues:
        due = dues.pop({"first": 0, "last": -1, "middle": len(dues) // 2}[order])
        backlog.remove(due - 1.0, due)
        assert [backlog.on_time(at) for at in (0.0, 250.0, 400.5)] == [
            sum(each >= at for each in dues) for at in (0.0, 250.0, 400.5)
        ]


@pytest.mark.parametrize("ticket", [(5.0, 5.0), (5.0, 4.0), (nan, 5.0), (5.0, nan), (inf, inf)])
def test_a_patience_that_is_not_above_zero_is_refused_and_changes_nothing(twins, ticket):
    backlog = twins.Backlog()
    backlog.add(0.0, 8.0)
    for call in (backlog.add, backlog.remove):
        with pytest.raises(ValueError, match="use a patience above 0"):
            call(*ticket)
    assert (len(backlog), backlog.weight(8.0, 1.0)) == (1, 1.0)


def test_whoever_does_not_wait_cannot_leave(twins):
    backlog = twins.Backlog()
    backlog.add(0.0, 8.0)
    for due in (7.0, 9.0):
        with pytest.raises(ValueError, match=f"nobody who waits is due at {due}"):
            backlog.remove(0.0, due)
    assert (len(backlog), backlog.weight(8.0, 1.0)) == (1, 1.0)


def test_a_scale_of_zero_has_no_weight(twins):
    backlog = twins.Backlog()
    backlog.add(0.0, 10.0)
    for call in (lambda: backlog.weight(1.0, 0.0), lambda: backlog.gain(1.0, 2.0, 0.4, 0.0)):
        with pytest.raises(ZeroDivisionError):
            call()
