"""Both twins count alike, and refuse what they cannot count."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ext import _tally_py as pure
from tests.ext.conftest import load

BOUNDS = (0.005, 0.1, 1.0, 60.0)
SECONDS = st.sampled_from((0.0, -0.0, 0.005, 0.0050001, 0.1, 59.9, 60.0, 61.0, 1e9)) | st.floats(0, 100)
TOKENS = st.integers(0, 1 << 40)


def numbers(tally: Any) -> dict[str, Any]:
    histograms = ("duration", "first_byte", "queue", "load", "upstream")
    sums = ("statuses", "unwaited", "input_tokens", "cached_tokens", "output_tokens", "errors")
    found = {name: (getattr(tally, name).counts, getattr(tally, name).total_s) for name in histograms}
    return found | {name: getattr(tally, name) for name in sums}


@pytest.mark.native
@given(st.lists(st.tuples(st.integers(0, 599), SECONDS, SECONDS, SECONDS, SECONDS, TOKENS, TOKENS)))
def test_both_twins_count_alike(requests: list[Any]) -> None:
    twins = [load("native").Tally(BOUNDS), pure.Tally(BOUNDS)]
    for tally in twins:
        for status, duration, first, upstream, queue, some, more in requests:
            tally.ended(status, duration)
            tally.answered(first, upstream, queue, duration)
            tally.used(some, more, some)
            tally.failed()
    assert numbers(twins[0]) == numbers(twins[1])


def test_a_duration_counts_at_the_first_bound_that_it_does_not_pass(twins: Any) -> None:
    histogram = twins.Histogram(BOUNDS)
    for seconds in (0.0, 0.005, 0.006, 60.0, 61.0):
        histogram.observe(seconds)
    assert histogram.counts == [2, 1, 0, 1, 1]
    assert histogram.total_s == pytest.approx(121.011)


def test_who_waited_for_nothing_is_counted_and_not_added_up(twins: Any) -> None:
    tally = twins.Tally(BOUNDS)
    tally.answered(0.1, 0.1, 0.0, 0.0)
    tally.answered(2.1, 0.1, 0.0, 2.0)
    assert (tally.unwaited, sum(tally.queue.counts), tally.load.total_s) == (1, 1, 2.0)


@pytest.mark.parametrize("status", [-1, 600])
def test_what_is_no_status_is_refused(twins: Any, status: int) -> None:
    with pytest.raises(ValueError, match="use 0 to 599"):
        twins.Tally(BOUNDS).ended(status, 0.0)


@pytest.mark.parametrize("bounds", [(1.0, 1.0), (2.0, 1.0), (1.0, float("nan"))])
def test_bounds_that_do_not_rise_are_refused(twins: Any, bounds: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="rising"):
        twins.Histogram(bounds)
