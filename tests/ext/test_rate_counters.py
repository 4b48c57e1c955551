import mmap
import os
from math import inf, nan

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ext._rate_counters_py import Refusal
from ext.errors import NotHeld
from tests.ext.conftest import load


def granted(counters, meter, now, stated=0, guessed=0):
    return not isinstance(counters.reserve(meter, None, stated, guessed, now), Refusal)


def wait_of(counters, meter, now, stated=0, guessed=0):
    refusal = counters.reserve(meter, None, stated, guessed, now)
    assert isinstance(refusal, Refusal)
    return refusal.wait_s


def test_a_name_at_rest_may_use_a_minutes_worth_at_once_and_then_an_even_flow(twins):
    counters = twins.RateCounters()
    meter = counters.meter("k", 6)
    assert all(granted(counters, meter, 0.0) for _ in range(6))
    assert wait_of(counters, meter, 0.0) == pytest.approx(10.0)
    assert wait_of(counters, meter, 9.9) == pytest.approx(0.1)
    assert granted(counters, meter, 10.0)
    assert wait_of(counters, meter, 10.0) == pytest.approx(10.0)


def test_no_minute_sees_more_than_twice_the_limit_and_no_hour_more_than_an_hours_worth_and_a_burst(twins):
    counters = twins.RateCounters()
    meter = counters.meter("k", 60)
    allowed = [second for second in range(3600) for _ in range(5) if granted(counters, meter, float(second))]
    assert len(allowed) <= 3600 + 60
    for start in range(0, 3540, 30):
        assert sum(start <= second < start + 60 for second in allowed) <= 2 * 60


@pytest.mark.parametrize(("limits", "stated"), [((7, 0, 0), 0), ((0, 90, 0), 31), ((7, 90, 0), 31), ((7, 0, 9), 0)])
def test_a_retry_after_the_wait_succeeds_and_one_a_millisecond_earlier_does_not(twins, limits, stated):
    counters = twins.RateCounters()
    meter, now = counters.meter("k", *limits), 1000.0
    while granted(counters, meter, now, stated):
        pass
    wait_s = wait_of(counters, meter, now, stated)
    assert wait_of(counters, meter, now + wait_s - 0.001, stated) == pytest.approx(0.001)
    assert granted(counters, meter, now + wait_s, stated)


def test_a_refusal_takes_nothing_of_either_meter(twins):
    counters = twins.RateCounters()
    key, model = counters.meter("k", 10, 100, 5), counters.meter("m", 10, 50, 5)
    counters.reserve(key, model, 40, 0, 0.0)
    before = repr(key), repr(model), key.remaining(0.0), model.remaining(0.0)
    refusal = counters.reserve(key, model, 0, 20, 0.0)
    assert (refusal.meter.name, refusal.limit, refusal.wait_s) == ("m", "tokens_per_minute", pytest.approx(12.0))
    assert (repr(key), repr(model), key.remaining(0.0), model.remaining(0.0)) == before


def test_the_longest_wait_is_told_whichever_meter_it_is_of(twins):
    counters = twins.RateCounters()
    slow, slower = counters.meter("slow", 2), counters.meter("slower", 1)
    counters.reserve(slow, slower, 0, 0, 0.0)
    counters.reserve(slow, None, 0, 0, 0.0)
    assert counters.reserve(slow, slower, 0, 0, 0.0)[:3] == (slower, "requests_per_minute", pytest.approx(60.0))
    assert counters.reserve(slower, slow, 0, 0, 0.0).meter is slower


def test_what_is_stated_above_a_whole_minutes_limit_never_fits(twins):
    counters = twins.RateCounters()
    meter = counters.meter("k", 10, 100)
    assert wait_of(counters, meter, 0.0, 101) == inf
    assert meter.remaining(0.0)[:2] == (10, 100)
    assert granted(counters, meter, 0.0, 100)


def test_a_guess_above_a_whole_minutes_limit_takes_all_of_it_and_no_more(twins):
    counters = twins.RateCounters()
    meter = counters.meter("k", 0, 100)
    grant = counters.reserve(meter, None, 20, 1 << 50, 0.0)
    assert meter.remaining(0.0) == (-1, 0, -1.0, pytest.approx(60.0))
    grant.settle(30, 0.0)
    assert meter.remaining(0.0).tokens == 70


def test_settling_gives_back_what_was_not_used_and_owes_what_was_used_more(twins):
    counters = twins.RateCounters()
    less, more, unknown = (counters.meter(name, 0, 100) for name in ("less", "more", "unknown"))
    counters.reserve(less, None, 100, 0, 0.0).settle(30, 0.0)
    assert less.remaining(0.0).tokens == 70
    counters.reserve(more, None, 10, 0, 0.0).settle(160, 0.0)
    assert more.remaining(0.0).tokens == 0
    assert wait_of(counters, more, 0.0, 10) == pytest.approx(42.0)
    counters.reserve(unknown, None, 10, 0, 0.0).settle(None, 0.0)
    assert unknown.remaining(0.0).tokens == 90


def test_settling_late_never_gives_more_than_a_full_bucket(twins):
    counters = twins.RateCounters()
    meter = counters.meter("k", 0, 100)
    counters.reserve(meter, None, 100, 0, 0.0).settle(0, 500.0)
    assert meter.remaining(500.0) == (-1, 100, -1.0, 0.0)
    assert granted(counters, meter, 500.0, 100)
    assert not granted(counters, meter, 500.0, 1)


def test_so_many_may_be_in_use_until_one_is_settled_or_cancelled(twins):
    counters = twins.RateCounters()
    meter = counters.meter("k", concurrency=2)
    grants = [counters.reserve(meter, None, 0, 5, 0.0) for _ in range(2)]
    assert meter.in_use == 2
    for grant, ends in zip(grants, (lambda g: g.settle(5, 0.0), lambda g: g.cancel()), strict=True):
        assert counters.reserve(meter, None, 0, 5, 0.0)[:3] == (meter, "concurrency", 0.0)
        ends(grant)
        assert granted(counters, meter, 0.0)


def test_a_cancelled_grant_was_never_there(twins):
    counters = twins.RateCounters()
    key, model = counters.meter("k", 10, 100, 5), counters.meter("m", 20, 50, 5)
    counters.reserve(key, model, 10, 0, 5.0)
    before = repr(key), repr(model), key.remaining(5.0), model.remaining(5.0)
    counters.reserve(key, model, 10, 10, 5.0).cancel()
    assert (repr(key), repr(model), key.remaining(5.0), model.remaining(5.0)) == before


def test_a_grant_ends_once(twins):
    counters = twins.RateCounters()
    meter = counters.meter("k", 10, 100, 2)
    for first in ("settle", "cancel"):
        grant = counters.reserve(meter, None, 10, 0, 0.0)
        grant.cancel() if first == "cancel" else grant.settle(10, 0.0)
        with pytest.raises(NotHeld):
            grant.cancel()
        with pytest.raises(NotHeld):
            grant.settle(10, 0.0)
        assert meter.in_use == 0


def test_names_do_not_share_and_no_limit_is_no_limit(twins):
    counters = twins.RateCounters()
    first, second, free = counters.meter("a", 1), counters.meter("b", 1), counters.meter("free")
    assert [granted(counters, meter, 0.0) for meter in (first, first, second)] == [True, False, True]
    assert all(granted(counters, free, 0.0, 1 << 40) for _ in range(1000))
    assert free.remaining(0.0) == (-1, -1, -1.0, -1.0)
    assert free.in_use == 1000
    assert counters.reserve(None, None, 5, 5, 0.0).headers == ""


def test_another_meter_of_a_name_goes_on_from_its_counts_and_its_limits_hold_at_once(twins):
    counters = twins.RateCounters()
    old = counters.meter("k", 10, 0, 3)
    grants = [counters.reserve(old, None, 0, 0, 0.0) for _ in range(3)]
    for _ in range(7):
        counters.reserve(counters.meter("k", 10), None, 0, 0, 0.0).settle(0, 0.0)
    new = counters.meter("k", 10, 0, 4)
    assert new.in_use == 3
    assert wait_of(counters, new, 0.0) == pytest.approx(6.0)
    assert granted(counters, counters.meter("k", 1000, 0, 4), 30.0)
    grants[0].settle(0, 30.0)
    assert new.in_use == 3


def test_a_clock_that_runs_back_costs_only_what_it_ran_back(twins):
    counters = twins.RateCounters()
    meter = counters.meter("k", 60)
    assert all(granted(counters, meter, 100.0) for _ in range(60))
    assert wait_of(counters, meter, 99.9) == pytest.approx(1.1)
    assert granted(counters, meter, 101.0)


def lines(unit, limit, left, reset):
    return (
        f"x-ratelimit-limit-{unit}: {limit}\r\n"
        f"x-ratelimit-remaining-{unit}: {left}\r\n"
        f"x-ratelimit-reset-{unit}: {reset}\r\n"
    )


@pytest.mark.parametrize(
    ("limits", "used", "expected"),
    [
        ((6000, 0), 0, lines("requests", 6000, 5999, "10ms")),
        ((60, 0), 0, lines("requests", 60, 59, "1s")),
        ((40, 0), 0, lines("requests", 40, 39, "1.5s")),
        ((1, 1000), 500, lines("requests", 1, 0, "1m0s") + lines("tokens", 1000, 500, "30s")),
        ((0, 1000), 0, lines("tokens", 1000, 1000, "0s")),
        ((0, 0), 5, ""),
    ],
)
def test_the_headers_are_openais_with_the_grant_counted(twins, limits, used, expected):
    counters = twins.RateCounters()
    meter = counters.meter("k", *limits, concurrency=3)
    assert counters.reserve(meter, None, used, 0, 1000.0).headers == expected


def test_the_headers_tell_of_the_meter_that_has_fewer_left(twins):
    counters = twins.RateCounters()
    key, model = counters.meter("k", 10, 1000), counters.meter("m", 5, 2000)
    headers = counters.reserve(key, model, 100, 0, 0.0).headers
    assert headers == lines("requests", 5, 4, "12s") + lines("tokens", 1000, 900, "6s")
    refused = counters.reserve(key, model, 950, 0, 0.0).headers
    assert refused == lines("requests", 5, 4, "12s") + lines("tokens", 1000, 900, "6s")


def test_a_debt_of_any_size_can_be_told(twins):
    counters = twins.RateCounters()
    meter = counters.meter("k", 0, 1)
    counters.reserve(meter, None, 1, 0, 0.0).settle(1 << 60, 0.0)
    assert counters.reserve(meter, None, 1, 0, 0.0).headers == lines("tokens", 1, 0, "16666666m40s")


@pytest.mark.parametrize("bad", [-1, nan, 1.5, 1 << 63, None])
def test_bad_amounts_are_refused_and_change_nothing(twins, bad):
    counters = twins.RateCounters()
    meter = counters.meter("k", 10, 100, 5)
    grant = counters.reserve(meter, None, 5, 5, 0.0)
    before = repr(meter), meter.remaining(0.0), repr(counters)
    calls = [
        lambda: counters.meter("other", bad),
        lambda: counters.meter("other", 1, bad),
        lambda: counters.meter("other", 1, 1, bad),
        lambda: counters.reserve(meter, None, bad, 0, 0.0),
        lambda: counters.reserve(meter, None, 0, bad, 0.0),
        lambda: counters.reserve(meter, None, 0, 0, nan),
        lambda: meter.remaining(nan),
        lambda: grant.settle(5, nan),
        *([] if bad is None else [lambda: grant.settle(bad, 0.0)]),
    ]
    for call in calls:
        with pytest.raises((ValueError, TypeError, OverflowError)):
            call()
    assert (repr(meter), meter.remaining(0.0), repr(counters)) == before
    grant.settle(5, 0.0)
    assert meter.remaining(0.0).tokens == 95


def test_a_process_that_is_not_one_of_them_is_refused(twins):
    for process in (-1, 1):
        with pytest.raises(ValueError, match="use 0"):
            twins.RateCounters(process=process)
        with pytest.raises(ValueError, match="use 0"):
            twins.RateCounters().forget(process)


def test_the_pure_twin_shares_nothing_and_says_so():
    with pytest.raises(ValueError, match="one process"):
        load("pure").RateCounters(bytearray(80))


def shared(names=4, processes=2):
    """Two processes' counters over one buffer."""
    make = load("native").RateCounters
    buffer = bytearray(make.bytes_for(names, processes))
    return [make(buffer, processes=processes, process=each) for each in range(processes)]


@pytest.mark.native
def test_processes_that_share_a_buffer_count_together():
    one, two = shared()
    mine, yours = one.meter("k", 3, 100, 5), two.meter("k", 3, 100, 5)
    grant = one.reserve(mine, None, 60, 0, 0.0)
    assert wait_of(two, yours, 0.0, 60) == pytest.approx(12.0)
    grant.settle(10, 0.0)
    assert granted(two, yours, 0.0, 60)
    assert granted(one, mine, 0.0)
    assert wait_of(two, yours, 0.0) == pytest.approx(20.0)
    assert (mine.in_use, yours.in_use) == (2, 2)
    assert mine.remaining(0.0) == yours.remaining(0.0) == (0, 30, pytest.approx(60.0), pytest.approx(42.0))


@pytest.mark.native
def test_what_a_dead_process_had_in_use_is_freed_and_nothing_of_another():
    one, two = shared()
    mine, yours = one.meter("k", concurrency=3), two.meter("k", concurrency=3)
    for counters, meter in ((one, mine), (two, yours), (two, yours)):
        assert granted(counters, meter, 0.0)
    assert not granted(one, mine, 0.0)
    one.forget(1)
    assert mine.in_use == 1


@pytest.mark.native
def test_a_buffer_has_room_for_so_many_names_and_one_more_is_refused():
    one, two = shared(names=100)
    names = [f"key {each}" for each in range(100)]
    for name in names:
        assert granted(one, one.meter(name, 1), 0.0)
    assert not any(granted(two, two.meter(name, 1), 0.0) for name in reversed(names))
    assert repr(two) == "<RateCounters 100 names>"
    with pytest.raises(OverflowError, match="room for 100 names"):
        one.meter("one more", 1)


@pytest.mark.native
@pytest.mark.parametrize("buffer", [bytearray(8), bytes(80), memoryview(bytearray(88))[1:]])
def test_a_buffer_that_cannot_be_counted_in_is_refused(buffer):
    with pytest.raises((ValueError, BufferError)):
        load("native").RateCounters(buffer)


@pytest.mark.native
@pytest.mark.timeout(30)
def test_processes_that_reserve_at_the_same_time_let_through_the_limit_and_no_more():
    limit, processes = 20_000, 3
    make = load("native").RateCounters
    with mmap.mmap(-1, make.bytes_for(2, processes)) as buffer:
        children = [fork(make, buffer, process, processes, limit) for process in range(processes)]
        lots = [int(os.read(pipe, 100)) for _, pipe in children]
        for child, pipe in children:
            os.close(pipe)
            assert os.waitpid(child, 0)[1] == 0
        counters = make(buffer, processes=processes)
        assert sum(lots) == limit
        assert counters.meter("k").in_use == 0
        assert counters.meter("k", limit, limit).remaining(0.0)[:2] == (0, limit)
        del counters


def fork(make, buffer, process, processes, limit):
    """A child that reserves until it is refused, and tells how often it was not."""
    pipe, end = os.pipe()
    child = os.fork()
    if child:
        os.close(end)
        return child, pipe
    counters = make(buffer, processes=processes, process=process)
    meter, count = counters.meter("k", limit, limit, limit), 0
    while not isinstance(grant := counters.reserve(meter, None, 1, 0, 0.0), Refusal):
        grant.settle(0, 0.0)
        count += 1
    os.write(end, b"%d" % count)
    os._exit(0)


amounts, limits = st.integers(0, 300), st.sampled_from([0, 1, 7, 60, 250])
calls = st.one_of(
    st.tuples(st.just("meter"), st.integers(0, 2), limits, limits, st.integers(0, 3)),
    st.tuples(st.just("reserve"), st.integers(0, 2), st.integers(0, 2), amounts, amounts),
    st.tuples(st.just("settle"), st.integers(0, 3), st.one_of(st.none(), amounts)),
    st.tuples(st.just("cancel"), st.integers(0, 3)),
)


class Driven:
    """One twin, and what it was asked for so far."""

    def __init__(self, kind):
        self.counters = load(kind).RateCounters()
        self.meters = [self.counters.meter(name, 7, 60, 3) for name in "ab"] + [None]
        self.grants = []

    def do(self, now, name, *numbers):
        if name == "meter":
            self.meters[numbers[0]] = self.counters.meter("abc"[numbers[0]], *numbers[1:])
        elif name == "reserve":
            first, second, stated, guessed = numbers
            second = None if second == first else second
            got = self.counters.reserve(
                self.meters[first], None if second is None else self.meters[second], stated, guessed, now
            )
            if isinstance(got, Refusal):
                return got.meter.name, *got[1:]
            self.grants.append(got)
            return got.headers
        elif self.grants:
            grant = self.grants.pop(numbers[0] % len(self.grants))
            grant.cancel() if name == "cancel" else grant.settle(numbers[1], now)
        return [(repr(meter), meter.remaining(now)) for meter in self.meters if meter is not None]


@pytest.mark.native
@given(script=st.lists(st.tuples(st.floats(-0.1, 20), calls), max_size=40))
def test_both_twins_answer_alike_to_the_last_bit(script):
    pure, native, now = Driven("pure"), Driven("native"), 1000.0
    for seconds, call in script:
        now += seconds
        assert pure.do(now, *call) == native.do(now, *call)
        assert repr(pure.counters) == repr(native.counters)
