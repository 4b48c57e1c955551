"""Counted places: never more taken than there are, and whoever waits hears of every one that comes back."""

from __future__ import annotations

from typing import Any

import pytest

from ext.errors import NotHeld


def test_no_more_are_taken_than_there_are(twins: Any) -> None:
    places = twins.Occupancy(2)
    assert [places.take() for _ in range(3)] == [True, True, False]
    places.give()
    assert (places.take(), places.taken, places.most) == (True, 2, 2)


def test_without_a_bound_all_are_let_in(twins: Any) -> None:
    places = twins.Occupancy()
    assert all(places.take() for _ in range(1000))
    assert places.taken == 1000


def test_whoever_waits_hears_of_what_comes_back_and_may_take_it_then(twins: Any) -> None:
    places, heard = twins.Occupancy(1), []
    places.take()
    places.on_give = lambda: heard.append(places.take())
    places.give()
    assert (heard, places.taken) == ([True], 1)
    places.on_give = None
    places.give()
    assert heard == [True]


def test_what_nobody_took_cannot_be_given(twins: Any) -> None:
    with pytest.raises(NotHeld):
        twins.Occupancy(1).give()
    with pytest.raises(ValueError, match="0 or more"):
        twins.Occupancy(-1)
