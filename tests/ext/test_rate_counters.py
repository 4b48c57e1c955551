from math import inf, nan

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ext.errors import ClockWentBack
from tests.ext.conftest import load


def test_a_key_at_rest_may_use_a_minutes_worth_at_once_and_then_an_even_flow(twins):
    counters = twins.RateCounters()
    assert [counters.reserve("k", 0, 0.0, 6) for _ in range(6)] == [0.0] * 6
    assert counters.reserve("k", 0, 0.0, 6) == pytest.approx(10.0)
    assert counters.reserve("k", 0, 9.9, 6) == pytest.approx(0.1)
    assert counters.reserve("k", 0, 10.0, 6) == 0.0
    assert counters.reserve("k", 0, 10.0, 6) == pytest.approx(10.0)


def test_no_minute_sees_more_than_twice_the_limit_and_no_hour_more_than_an_hours_worth_and_a_burst(twins):
    counters = twins.RateCounters()
    allowed = [second for second in range(3600) for _ in range(5) if counters.reserve("k", 0, second, 60) == 0.0]
    assert len(allowed) <= 3600 + 60
    for start in range(0, 3540, 30):
        assert sum(start <= second < start + 60 for second in allowed) <= 2 * 60


def test_requests_and_tokens_are_taken_together_or_not_at_all(twins):
    counters = twins.RateCounters()
    assert counters.reserve("k", 90, 0.0, 10, 100) == 0.0
    assert counters.reserve("k", 20, 0.0, 10, 100) == pytest.approx(6.0)
    assert counters.remaining("k", 0.0, 10, 100)[:2] == (9, 10)  # the refused one took no request
    assert counters.reserve("k", 10, 0.0, 10, 100) == 0.0


def test_what_is_above_a_whole_minutes_limit_never_fits(twins):
    counters = twins.RateCounters()
    assert counters.reserve("k", 101, 0.0, 10, 100) == inf
    assert len(counters) == 0
    assert counters.reserve("k", 100, 0.0, 10, 100) == 0.0


def test_settling_gives_back_what_was_not_used_and_owes_what_was_used_more(twins):
    counters = twins.RateCounters()
    counters.reserve("less", 100, 0.0, 0, 100)
    counters.settle("less", 100, 30, 0.0, 100)
    assert counters.remaining("less", 0.0, 0, 100).tokens == 70
    counters.reserve("more", 10, 0.0, 0, 100)
    counters.settle("more", 10, 160, 0.0, 100)
    assert counters.remaining("more", 0.0, 0, 100).tokens == 0
    assert counters.reserve("more", 10, 0.0, 0, 100) == pytest.approx(42.0)


def test_settling_late_never_gives_more_than_a_full_bucket(twins):
    counters = twins.RateCounters()
    counters.reserve("k", 100, 0.0, 0, 100)
    counters.settle("k", 100, 0, 500.0, 100)
    assert counters.remaining("k", 500.0, 0, 100) == (-1, 100, -1.0, 0.0)
    assert counters.reserve("k", 100, 500.0, 0, 100) == 0.0
    assert counters.reserve("k", 1, 500.0, 0, 100) > 0


def test_keys_do_not_share_and_no_limit_is_no_limit(twins):
    counters = twins.RateCounters()
    assert counters.reserve("a", 5, 0.0, 1) == 0.0
    assert counters.reserve("a", 5, 0.0, 1) > 0
    assert counters.reserve("b", 5, 0.0, 1) == 0.0
    assert all(counters.reserve("free", 1 << 40, 0.0) == 0.0 for _ in range(1000))
    assert counters.remaining("free", 0.0) == (-1, -1, -1.0, -1.0)


def test_a_limit_changed_by_a_reload_holds_at_once(twins):
    counters = twins.RateCounters()
    assert all(counters.reserve("k", 0, 0.0, 10) == 0.0 for _ in range(10))
    assert counters.reserve("k", 0, 30.0, 1000) == 0.0


def test_keys_at_rest_are_forgotten(twins):
    counters = twins.RateCounters()
    for second in range(20_000):
        assert counters.reserve(f"visitor {second}", 1, float(second), 60, 60) == 0.0
    assert len(counters) <= 2048


def test_a_key_that_owes_is_not_forgotten(twins):
    counters = twins.RateCounters()
    counters.settle("debtor", 0, 100_000, 0.0, 100)
    for second in range(5000):
        counters.reserve(f"visitor {second}", 1, float(second), 60, 60)
    assert counters.reserve("debtor", 1, 5000.0, 0, 100) > 50_000


@pytest.mark.parametrize("bad", [-1, nan, 1.5, 1 << 63, None])
def test_bad_amounts_are_refused_and_change_nothing(twins, bad):
    counters = twins.RateCounters()
    calls = [
        lambda: counters.reserve("k", bad, 0.0),
        lambda: counters.reserve("k", 1, 0.0, bad),
        lambda: counters.reserve("k", 1, 0.0, 1, bad),
        lambda: counters.settle("k", bad, 1, 0.0, 1),
        lambda: counters.settle("k", 1, bad, 0.0, 1),
        lambda: counters.settle("k", 1, 1, 0.0, bad),
        lambda: counters.remaining("k", 0.0, bad),
        lambda: counters.remaining("k", 0.0, 1, bad),
    ]
    for call in calls:
        with pytest.raises((ValueError, TypeError, OverflowError)):
            call()
    assert repr(counters) == "<RateCounters 0 keys>"


def test_the_clock_must_not_go_back(twins):
    counters = twins.RateCounters()
    counters.reserve("k", 1, 5.0, 1)
    for call in (counters.reserve, lambda key, _, now: counters.remaining(key, now)):
        with pytest.raises(ClockWentBack):
            call("k", 1, 4.0)
        with pytest.raises(ValueError, match="NaN"):
            call("k", 1, nan)
    with pytest.raises(ClockWentBack):
        counters.settle("k", 1, 1, 4.0)
    assert counters.reserve("k", 1, 65.0, 1) == 0.0


amounts, limits = st.integers(0, 300), st.sampled_from([0, 1, 7, 60, 250])
calls = st.one_of(
    st.tuples(st.just("reserve"), amounts, limits, limits),
    st.tuples(st.just("settle"), amounts, amounts, limits),
    st.tuples(st.just("remaining"), limits, limits),
)


@pytest.mark.native
@given(script=st.lists(st.tuples(st.sampled_from("abc"), st.floats(0, 50), calls), max_size=40))
def test_both_twins_answer_alike_to_the_last_bit(script):
    pure, native = (load(kind).RateCounters() for kind in ("pure", "native"))
    now = 0.0
    for key, seconds, (name, *numbers) in script:
        now += seconds
        place = {"reserve": 1, "settle": 2, "remaining": 0}[name]  # of `now` among the numbers
        args = [key, *numbers[:place], now, *numbers[place:]]
        assert getattr(pure, name)(*args) == getattr(native, name)(*args)
        assert len(pure) == len(native)
