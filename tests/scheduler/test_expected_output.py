"""The expected length of an answer follows the recent ones."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from scheduler.expected_output import FIRST_TOKENS, ExpectedOutput


def test_a_model_that_has_answered_nothing_yet_is_given_a_guess() -> None:
    assert ExpectedOutput().tokens == FIRST_TOKENS


def test_it_is_the_eightieth_percentile_within_a_bucket() -> None:
    rng = random.Random(3)
    expected, lengths = ExpectedOutput(), []
    for _ in range(2000):
        lengths.append(int(rng.expovariate(1 / 300)))
        expected.add(lengths[-1])
    recent = sorted(lengths[-300:])
    assert 0.8 * recent[240] <= expected.tokens <= 1.3 * recent[240]


def test_a_change_is_followed_within_some_hundred_answers() -> None:
    expected = ExpectedOutput()
    for _ in range(5000):
        expected.add(50)
    assert expected.tokens <= 60
    for _ in range(200):
        expected.add(4000)
    assert 4000 <= expected.tokens <= 4800


@given(st.lists(st.integers(0, 1 << 40), max_size=400))
def test_any_lengths_give_an_expectation_within_their_range(lengths: list[int]) -> None:
    expected = ExpectedOutput()
    for length in lengths:
        expected.add(length)
    assert 1 <= expected.tokens <= max(1 << 24, FIRST_TOKENS)


def test_weights_that_grow_for_ever_stay_finite() -> None:
    expected = ExpectedOutput()
    for _ in range(20_000):
        expected.add(100)
    assert 100 <= expected.tokens <= 119
