"""Whom each eviction policy gives up."""

from __future__ import annotations

import pytest

from scheduler.eviction.adaptive import BURST, RATE_PER_S, Adaptive
from scheduler.eviction.base import Candidate, Ranking, cheapest
from scheduler.eviction.delay import ExpectedDelay
from scheduler.eviction.gdsf import Gdsf
from scheduler.eviction.idle_load_time import IdleLoadTime
from scheduler.eviction.landlord import Landlord
from scheduler.eviction.lfu import Lfu
from scheduler.eviction.lru import Lru
from scheduler.ledger import DeviceLedger
from scheduler.model import DeviceSpec, ModelSpec
from scheduler.state import ModelState


def resident(name: str, size: int = 10, **known: float) -> Candidate:
    facts = {"in_flight": 0, "last_used_s": 0.0, "load_s": 3.0, "uses": 1, "rate": 0.1} | known
    return Candidate(name, size, **facts)  # type: ignore[arg-type]


def names(victims: list[Candidate] | None) -> list[str]:
    assert victims is not None
    return [victim.model for victim in victims]


@pytest.mark.parametrize("policy", [Lru(), Lfu(), Gdsf(), Landlord(), IdleLoadTime(), ExpectedDelay()])
def test_every_policy_frees_enough_or_says_that_it_cannot(policy: Ranking) -> None:
    here = [resident("a"), resident("b", 20), resident("c", 5)]
    for need in range(1, 36):
        victims = policy.victims(here, need, 100.0)
        assert victims is not None
        assert sum(victim.held_bytes for victim in victims) >= need
    assert policy.victims(here, 36, 100.0) is None


@pytest.mark.parametrize("policy", [Lru(), Lfu(), Gdsf(), Landlord(), IdleLoadTime(), ExpectedDelay()])
def test_a_busy_engine_is_the_last_to_go(policy: Ranking) -> None:
    busy = resident("busy", in_flight=1, rate=0.0, load_s=0.1)
    idle = resident("idle", last_used_s=99.0, uses=50, rate=9.0, load_s=60.0)
    assert names(policy.victims([busy, idle], 10, 100.0)) == ["idle"]


def test_lru_goes_by_the_last_use() -> None:
    assert names(Lru().victims([resident("new", last_used_s=9.0), resident("old", last_used_s=1.0)], 1, 10.0)) == [
        "old"
    ]


def test_lfu_goes_by_the_count_of_uses() -> None:
    assert names(Lfu().victims([resident("often", uses=9), resident("rare", uses=2, last_used_s=9.0)], 1, 10.0)) == [
        "rare"
    ]


def test_gdsf_and_landlord_give_up_the_large_one_of_equal_use() -> None:
    here = [resident("large", 40, load_s=4.0), resident("small", 10, load_s=2.5)]
    assert names(Gdsf().victims(here, 1, 0.0)) == ["large"]
    assert names(Landlord().victims(here, 1, 0.0)) == ["large"]


def test_gdsf_lets_yesterdays_favourite_go_in_the_end() -> None:
    policy = Gdsf()
    favourite = resident("favourite", uses=5)
    policy.victims([favourite], 1, 0.0)
    for turn in range(1, 20):
        other = resident(f"other{turn}", uses=1)
        (victim,) = policy.victims([favourite, other], 1, 0.0) or []
        if victim is favourite:
            break
        policy.evicted(victim)
    else:
        raise AssertionError("the clock never reached a model that nobody uses")
    assert 3 <= turn <= 8


def test_being_asked_for_victims_commits_to_nothing() -> None:
    policy = Gdsf()
    here = [resident("a"), resident("b", uses=3)]
    asked = [names(policy.victims(here, 1, float(t))) for t in range(50)]
    assert asked == [["a"]] * 50


def test_idle_load_time_weighs_idleness_against_the_load() -> None:
    here = [resident("slow", load_s=60.0, last_used_s=0.0), resident("fast", load_s=3.0, last_used_s=50.0)]
    assert names(IdleLoadTime().victims(here, 1, 100.0)) == ["fast"]  # 100 / 60 against 50 / 3


def test_expected_delay_weighs_rate_recency_load_and_size() -> None:
    policy = ExpectedDelay()
    assert names(policy.victims([resident("hot", rate=1.0), resident("cold", rate=0.01)], 1, 60.0)) == ["cold"]
    assert names(policy.victims([resident("old"), resident("new", last_used_s=59.0)], 1, 60.0)) == ["old"]
    assert names(policy.victims([resident("dear", load_s=30.0), resident("cheap")], 1, 60.0)) == ["cheap"]
    assert names(policy.victims([resident("large", 40), resident("small", 10)], 1, 60.0)) == ["large"]


def test_a_favourite_is_kept_until_it_has_been_silent_for_longer_than_a_rare_one_takes_to_return() -> None:
    """One request in ten seconds against one in a minute that has come a moment ago."""

    def given_up(silent_s: float) -> list[str]:
        here = [resident("favourite", rate=0.1, last_used_s=100.0 - silent_s)]
        here.append(resident("rare", rate=1 / 60, last_used_s=99.0))
        return names(ExpectedDelay().victims(here, 1, 100.0))

    assert given_up(silent_s=20.0) == ["rare"]
    assert given_up(silent_s=60.0) == ["favourite"]


def test_a_model_that_nobody_was_seen_to_ask_for_is_worth_next_to_nothing() -> None:
    here = [resident("loaded by hand", rate=0.0, last_used_s=99.0), resident("old", rate=0.01, last_used_s=1.0)]
    assert names(ExpectedDelay().victims(here, 1, 100.0)) == ["loaded by hand"]


def test_victims_that_a_later_larger_one_makes_needless_are_spared() -> None:
    here = [resident("a", 3), resident("b", 3), resident("large", 10)]
    assert names(cheapest(here, 9, lambda c: (c.model != "a", c.model != "b"))) == ["large"]


class Cache:
    """A memory of equal slots under an adaptive policy, fed through its public face."""

    def __init__(self, slots: int, models: int) -> None:
        self.policy = Adaptive()
        self.states = {f"m{i}": ModelState(ModelSpec(f"m{i}", 10, "x", load_estimate_s=3.0)) for i in range(models)}
        self.policy.watch(self.states, {"x": DeviceLedger(DeviceSpec("x", "x", 10 * slots))})

    def ask(self, now: float, name: str) -> None:
        self.states[name].demand.count += 1
        self.policy.saw([(now, name)])


def test_the_adaptive_policy_follows_the_rule_that_loads_least() -> None:
    """Two favourites among a stream of models that never come back: recency throws the favourites out."""
    cache = Cache(slots=4, models=60)
    for turn in range(200):
        cache.ask(turn, f"m{turn % 2}" if turn % 6 < 2 else f"m{2 + turn % 58}")
    leader = cache.policy.leader
    assert not isinstance(leader, Lru)
    paid = {type(asked).__name__: shadow.paid_s(200.0) for asked, shadow in cache.policy._pairs}
    assert paid[type(leader).__name__] == min(paid.values()) < paid["Lru"]


def test_the_adaptive_policy_asks_the_default_estimate_until_a_rule_has_paid_less() -> None:
    cache = Cache(slots=2, models=3)
    assert isinstance(cache.policy.leader, ExpectedDelay)
    cache.ask(0.0, "m0")
    cache.ask(1.0, "m1")
    assert isinstance(cache.policy.leader, ExpectedDelay)


def test_a_flood_is_shadowed_in_part_and_a_burst_as_a_whole() -> None:
    """A shadow costs work at every miss: what it sees a second is bounded, whatever comes."""
    cache = Cache(slots=2, models=30)
    for turn in range(10_000):
        cache.ask(turn / 1000, f"m{turn % 30}")  # ten seconds
    assert sum(cache.policy._uses.values()) == pytest.approx(BURST + 10 * RATE_PER_S, abs=2)
    calm = Cache(slots=2, models=30)
    for turn in range(int(BURST)):
        calm.ask(5.0, f"m{turn % 30}")
    assert sum(calm.policy._uses.values()) == BURST


def test_the_adaptive_policy_forgets_a_model_that_was_removed() -> None:
    cache = Cache(slots=1, models=2)
    cache.ask(0.0, "m0")
    cache.policy.saw([(1.0, "gone")])
    cache.ask(2.0, "m1")
    assert names(cache.policy.victims([resident("m0")], 1, 3.0)) == ["m0"]


def test_a_shadow_gives_up_a_resident_that_the_configuration_no_longer_has() -> None:
    cache = Cache(slots=1, models=2)
    cache.ask(0.0, "m0")
    del cache.states["m0"]
    cache.ask(1.0, "m1")
    assert [list(shadow._resident) for _, shadow in cache.policy._pairs] == [["m1"]] * 5
