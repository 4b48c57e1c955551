"""The core's decisions: given these events, exactly these commands."""

from __future__ import annotations

import pytest

from scheduler.commands import Load, Refuse
from scheduler.core import Core
from scheduler.events import ConfigChanged, EngineReady, LoadAsked, LoadProgress, UnloadAsked
from scheduler.lifecycle import IMPOSSIBLE_S
from scheduler.model import DeviceSpec, LatencyClass, ModelSpec, RefusalCode, Residency, SchedulerSettings
from scheduler.residency import TRANSITIONS, IllegalTransition, move
from tests.scheduler.conftest import MakeWorld, MiB, World, kinds, spec


def test_the_first_request_loads_its_model_and_is_admitted_when_it_is_ready(world: MakeWorld) -> None:
    w = world(a=700)
    ticket, commands = w.arrive("a")
    assert kinds(commands) == ["load a"]
    assert kinds(w.ready(commands[0])) == [f"admit {ticket}"]


def test_a_ready_model_admits_at_once(world: MakeWorld) -> None:
    w = world(a=700)
    w.resident("a")
    ticket, commands = w.arrive("a")
    assert kinds(commands) == [f"admit {ticket}"]


def test_a_short_class_that_fits_goes_past_a_large_ticket_of_a_lower_class(world: MakeWorld) -> None:
    w = world(a=spec("a", 700, kv_tokens=100))
    _, (load,) = w.arrive("a", tokens=60)
    w.ready(load)
    assert w.arrive("a", LatencyClass.BATCH, tokens=80)[1] == []
    ticket, commands = w.arrive("a", LatencyClass.INSTANT, tokens=10)
    assert kinds(commands) == [f"admit {ticket}"]


def test_a_third_model_evicts_the_least_recently_used_of_two(world: MakeWorld) -> None:
    w = world(a=700, b=700, c=700)
    w.resident("a")
    w.resident("b")
    ticket, commands = w.at(10.0).arrive("a")
    w.finish(ticket)  # a is now the more recent one
    _, commands = w.arrive("c")
    assert kinds(commands) == ["stop b"]
    assert kinds(w.stopped(commands[0])) == ["load c"]
    assert w.core.models["a"].state is Residency.READY


def test_nothing_loads_before_the_victim_is_gone(world: MakeWorld) -> None:
    w = world(a=700, b=700, c=700)
    w.resident("a")
    w.resident("b")
    _, (stop,) = w.arrive("c")
    assert w.arrive("c")[1] == []
    assert kinds(w.stopped(stop)) == ["load c"]


def test_a_busy_victim_is_drained_and_its_requests_finish_first(world: MakeWorld) -> None:
    w = world(memory=1000, a=700, b=700)
    w.resident("a")
    first, _ = w.arrive("a")
    second, _ = w.arrive("a")
    assert w.arrive("b")[1] == []
    assert w.core.models["a"].state is Residency.DRAINING
    assert w.finish(first) == []
    (stop,) = w.finish(second)
    assert kinds([stop]) == ["stop a"]
    assert kinds(w.stopped(stop)) == ["load b"]


def test_a_draining_victim_takes_nobody_new_and_comes_back_for_who_waits(world: MakeWorld) -> None:
    """ollama/ollama#17408: a victim that a new request revives blocks every later load."""
    w = world(memory=1000, a=700, b=700)
    w.resident("a")
    running, _ = w.arrive("a")
    waits_for_b, _ = w.arrive("b")
    late, commands = w.arrive("a")
    assert commands == []
    (stop,) = w.finish(running)
    (load_b,) = w.stopped(stop)
    assert kinds([load_b]) == ["load b"]
    # b serves who waited for it, then makes room for a: both make progress
    assert kinds(w.ready(load_b)) == [f"admit {waits_for_b}"]
    (stop_b,) = w.finish(waits_for_b)
    (load_a,) = w.stopped(stop_b)
    assert kinds(w.ready(load_a)) == [f"admit {late}"]


def test_a_drain_ends_when_the_reason_for_it_goes_away(world: MakeWorld) -> None:
    w = world(memory=1000, a=700, b=700)
    w.resident("a")
    running, _ = w.arrive("a")
    waits_for_b, _ = w.arrive("b")
    waits_for_a, _ = w.arrive("a")
    assert kinds(w.cancel(waits_for_b)) == [f"admit {waits_for_a}"]
    assert w.core.models["a"].state is Residency.READY
    assert w.finish(running) == []


def test_idle_engines_go_before_busy_ones_whatever_their_age(world: MakeWorld) -> None:
    w = world(a=700, b=700, c=700)
    w.resident("a")
    w.arrive("a")  # older, and busy
    w.resident("b")
    assert kinds(w.arrive("c")[1]) == ["stop b"]


def test_as_many_victims_as_needed_and_no_more(world: MakeWorld) -> None:
    w = world(memory=1500, a=300, b=300, c=800, d=900)
    for name in "abc":
        w.resident(name)
    _, commands = w.arrive("d")
    assert sorted(kinds(commands)) == ["stop c"]  # a and b are older, but c alone frees enough


def test_pinned_models_are_never_victims(world: MakeWorld) -> None:
    w = world(a=spec("a", 700, pinned=True), b=700, c=700)
    w.resident("a")
    w.resident("b")
    assert kinds(w.arrive("c")[1]) == ["stop b"]


def test_a_model_that_can_never_fit_is_refused_at_once_and_evicts_nobody(world: MakeWorld) -> None:
    """ollama/ollama#18282: without a ceiling test everything is evicted in vain, again and again."""
    w = world(memory=1500, a=700, huge=1600)
    w.resident("a")
    _, (refusal,) = w.arrive("huge")
    assert isinstance(refusal, Refuse)
    assert refusal.code == RefusalCode.NEVER_FITS
    assert refusal.reason == "huge needs 1.56 GiB and ram can give at most 1.46 GiB (1.46 GiB in all)"
    assert w.core.models["a"].state is Residency.READY


def test_pinned_memory_counts_as_never_to_be_had(world: MakeWorld) -> None:
    w = world(memory=1500, a=spec("a", 1000, pinned=True), b=700)
    w.resident("a")
    _, (refusal,) = w.arrive("b")
    assert refusal.code == RefusalCode.NEVER_FITS
    assert "1000 MiB of it pinned" in refusal.reason


def test_who_waits_for_a_model_that_has_become_impossible_hears_it_before_the_longest_wait(world: MakeWorld) -> None:
    w = world(memory=1500, a=spec("a", 700, pinned=True), b=700, c=700)
    engine = w.resident("a")
    w.measured(foreign=400 * MiB)
    first, commands = w.arrive("b")
    second, _ = w.arrive("b")
    other, _ = w.arrive("c")
    assert commands == []
    w.step(ConfigChanged((spec("a", 700, pinned=True), spec("b", 900), spec("c", 700)), SchedulerSettings()))
    _, (refusal,) = w.arrive("b")
    assert isinstance(refusal, Refuse)
    assert w.measured(foreign=400 * MiB) == []
    assert w.at(w.now + IMPOSSIBLE_S - 0.1).measured(foreign=400 * MiB) == []
    refused = w.at(w.now + 0.1).measured(foreign=400 * MiB)
    assert refused == [Refuse(each, RefusalCode.NEVER_FITS, refusal.reason) for each in (first, second)]
    (load,) = w.measured(engines={engine: 700 * MiB})
    assert kinds(w.ready(load)) == [f"admit {other}"]


def test_an_operators_load_that_has_become_impossible_ends_and_later_requests_find_the_model(world: MakeWorld) -> None:
    w = world(memory=1500, a=spec("a", 700, pinned=True), b=700)
    w.resident("a")
    w.measured(foreign=400 * MiB)
    assert w.step(LoadAsked("b")) == []
    w.step(ConfigChanged((spec("a", 700, pinned=True), spec("b", 900)), SchedulerSettings()))
    w.measured(foreign=400 * MiB)
    w.at(w.now + IMPOSSIBLE_S - 0.1).measured(foreign=400 * MiB)
    assert w.core.models["b"].wanted
    w.at(w.now + 0.1).measured(foreign=400 * MiB)
    assert not w.core.models["b"].wanted
    assert w.core.models["b"].note.startswith("b needs 900 MiB and ram can give at most 800 MiB")
    w.step(ConfigChanged((spec("a", 700, pinned=True), spec("b", 700)), SchedulerSettings()))
    assert w.measured() == []
    ticket, (load,) = w.arrive("b")
    assert kinds(w.ready(load)) == [f"admit {ticket}"]


def test_what_is_impossible_for_a_moment_refuses_nobody_who_waits(world: MakeWorld) -> None:
    w = world(memory=1500, a=spec("a", 700, pinned=True), b=700)
    engine = w.resident("a")
    w.measured(foreign=400 * MiB)
    waits, _ = w.arrive("b")
    for _ in range(3):
        assert w.at(w.now + IMPOSSIBLE_S).measured(engines={engine: 1000 * MiB}, foreign=400 * MiB) == []
        assert w.at(w.now + IMPOSSIBLE_S / 2).measured(engines={engine: 700 * MiB}, foreign=400 * MiB) == []
    (load,) = w.measured(engines={engine: 700 * MiB})
    assert kinds(w.ready(load)) == [f"admit {waits}"]


def test_memory_of_strangers_makes_nothing_impossible(world: MakeWorld) -> None:
    w = world(memory=1500, a=700)
    w.measured(foreign=1000 * MiB)
    waits, commands = w.arrive("a")
    for _ in range(3):
        commands += w.at(w.now + IMPOSSIBLE_S).measured(foreign=1000 * MiB)
    assert commands == []
    (load,) = w.measured()
    assert kinds(w.ready(load)) == [f"admit {waits}"]


def test_one_start_per_device_at_a_time(world: MakeWorld) -> None:
    w = world(a=700, b=700)
    _, (load_a,) = w.arrive("a")
    _, commands = w.arrive("b")
    assert commands == []
    assert "load b" in kinds(w.ready(load_a))


def test_no_neighbour_is_evicted_while_a_start_measures_the_device(world: MakeWorld) -> None:
    w = world(a=700, b=700, c=700)
    w.resident("a")
    _, (load_b,) = w.arrive("b")
    assert w.arrive("c")[1] == []
    assert kinds(w.ready(load_b)) == ["admit 2", "stop a"]


def test_classes_go_first_and_arrivals_keep_their_order_inside_a_class(world: MakeWorld) -> None:
    w = world(a=spec("a", 700, max_sequences=1))
    running, (load,) = w.arrive("a")
    w.ready(load)
    batch, _ = w.arrive("a", LatencyClass.BATCH)
    first, _ = w.arrive("a")
    second, _ = w.arrive("a")
    instant, _ = w.arrive("a", LatencyClass.INSTANT)
    order = []
    current = running
    for _ in range(4):
        (admit,) = w.finish(current)
        order.append(admit.ticket_id)
        current = admit.ticket_id
    assert order == [instant, first, second, batch]


def test_a_large_head_is_not_overtaken_and_its_cancel_wakes_who_fits(world: MakeWorld) -> None:
    w = world(a=spec("a", 700, kv_tokens=100))
    running, (load,) = w.arrive("a", tokens=60)
    w.ready(load)
    large, commands = w.arrive("a", tokens=80)
    assert commands == []
    small, commands = w.arrive("a", tokens=10)
    assert commands == []
    assert kinds(w.cancel(large)) == [f"admit {small}"]
    w.finish(running)


def test_a_weight_above_the_engine_takes_it_whole_instead_of_waiting_for_ever(world: MakeWorld) -> None:
    w = world(a=spec("a", 700, kv_tokens=100))
    ticket, (load,) = w.arrive("a", tokens=5000)
    assert kinds(w.ready(load)) == [f"admit {ticket}"]


def test_who_left_while_waiting_leaves_no_load_behind(world: MakeWorld) -> None:
    w = world(a=700, b=700, c=700)
    w.resident("a")
    w.resident("b")
    ticket, (stop,) = w.arrive("c")
    assert w.cancel(ticket) == []
    assert w.stopped(stop) == []  # the victim is gone, but nobody wants c any more
    assert kinds(w.arrive("b")[1]) == ["admit 4"]


def test_a_full_queue_refuses_with_the_setting_and_a_time_to_come_back(world: MakeWorld) -> None:
    w = world(a=spec("a", 700, max_queue=2))
    w.arrive("a")
    w.arrive("a")
    third, (refusal,) = w.arrive("a")
    assert kinds([refusal]) == [f"refuse {third} queue_full"]
    assert refusal.reason == "2 requests wait for a already (max_queue = 2)"
    assert refusal.retry_after_s == 30.0


def test_the_whole_queue_has_a_limit_too(world: MakeWorld) -> None:
    w = world(settings=SchedulerSettings(max_waiting=1), a=700, b=700)
    w.arrive("a")
    _, (refusal,) = w.arrive("b")
    assert refusal.code == RefusalCode.QUEUE_FULL
    assert "limits.max_waiting = 1" in refusal.reason


def test_a_wait_ends_at_its_limit_and_says_what_it_waited_for(world: MakeWorld) -> None:
    w = world(settings=SchedulerSettings(max_wait_s=60), a=700)
    ticket, (load,) = w.arrive("a")
    w.step(LoadProgress(load.engine_id, 0.62, "loading weights"))
    assert w.wake_at == 60.0
    (refusal,) = w.tick(60.0)
    assert kinds([refusal]) == [f"refuse {ticket} waited_too_long"]
    assert refusal.reason == "waited 60 s for a, loading a, 62% (loading weights)"


def test_a_deadline_refuses_at_its_moment_and_no_earlier(world: MakeWorld) -> None:
    w = world(a=700)
    ticket, (load,) = w.arrive("a", deadline_s=5.0)
    assert w.tick(4.9) == []
    assert kinds(w.tick(5.0)) == [f"refuse {ticket} deadline"]
    assert w.ready(load) == []


def test_a_failed_load_tells_everybody_backs_off_and_recovers_by_itself(world: MakeWorld) -> None:
    w = world(a=700)
    first, (load,) = w.arrive("a")
    second, _ = w.arrive("a")
    refusals = w.failed(load.engine_id, "no such folder")
    assert kinds(refusals) == [f"refuse {first} load_failed", f"refuse {second} load_failed"]
    assert refusals[0].reason == "a could not be loaded: no such folder; next try in 5 s"
    _, (refusal,) = w.at(2.0).arrive("a")
    assert refusal.retry_after_s == pytest.approx(3.0)
    assert w.wake_at == 5.0
    w.tick(5.0)
    _, (again,) = w.arrive("a")
    assert isinstance(again, Load)
    (refusal,) = w.failed(again.engine_id)
    assert refusal.retry_after_s == pytest.approx(10.0)  # twice as long


def test_a_crash_of_a_ready_engine_reloads_it_for_who_waits(world: MakeWorld) -> None:
    w = world(a=spec("a", 700, max_sequences=1))
    running, (load,) = w.arrive("a")
    w.ready(load)
    waits, _ = w.arrive("a")
    (again,) = w.failed(load.engine_id, "killed by signal 9")
    assert kinds([again]) == ["load a"]
    assert w.finish(running) == []  # late news of the dead engine's lease
    assert kinds(w.ready(again)) == [f"admit {waits}"]


def test_an_engine_that_dies_again_and_again_is_backed_off(world: MakeWorld) -> None:
    w = world(a=700)
    _, (load,) = w.arrive("a")
    for _ in range(2):
        w.ready(load)
        assert w.failed(load.engine_id) == []
        _, (load,) = w.arrive("a")
    w.ready(load)
    w.failed(load.engine_id)
    assert w.core.models["a"].state is Residency.FAILED


def test_time_to_live_ends_an_idle_model_and_only_an_idle_one(world: MakeWorld) -> None:
    w = world(a=spec("a", 700, ttl_s=10))
    w.resident("a")
    idle_since = w.now
    ticket, _ = w.at(idle_since + 9).arrive("a")
    assert w.tick(idle_since + 10) == []
    w.at(idle_since + 12).finish(ticket)
    assert w.tick(idle_since + 21) == []
    assert kinds(w.tick(idle_since + 22)) == ["stop a"]


def test_idle_models_go_under_pressure_before_anyone_waits(world: MakeWorld) -> None:
    w = world(memory=1500, settings=SchedulerSettings(pressure_threshold=0.9), a=600, b=600)
    a = w.resident("a")
    w.resident("b")
    assert kinds(w.measured(foreign=200 * MiB)) == ["stop a"]
    assert w.core.models["a"].engine.id == a


def test_pressure_spares_busy_and_pinned_models(world: MakeWorld) -> None:
    w = world(
        memory=1500, settings=SchedulerSettings(pressure_threshold=0.5), a=spec("a", 600, pinned=True), b=spec("b", 600)
    )
    w.resident("a")
    _, (load,) = w.arrive("b")
    w.ready(load)
    assert w.measured(foreign=200 * MiB) == []


def test_foreign_memory_is_a_floor_that_moves(world: MakeWorld) -> None:
    w = world(memory=1500, a=1000)
    w.measured(foreign=700 * MiB)
    ticket, commands = w.arrive("a")
    assert commands == []  # it fits the device, so it waits for the stranger to leave
    (load,) = w.measured(foreign=100 * MiB)
    assert kinds(w.ready(load)) == [f"admit {ticket}"]


def test_an_engine_that_outgrew_its_prediction_is_believed(world: MakeWorld) -> None:
    w = world(memory=1500, a=700, b=700)
    engine = w.resident("a")
    w.measured(engines={engine: 900 * MiB})
    assert kinds(w.arrive("b")[1]) == ["stop a"]


def test_an_operator_loads_and_unloads(world: MakeWorld) -> None:
    w = world(memory=1000, a=700, b=700)
    (load,) = w.step(LoadAsked("a"))
    assert w.ready(load) == []
    (stop,) = w.step(UnloadAsked("a"))
    assert w.stopped(stop) == []
    (load,) = w.step(LoadAsked("b"))
    (stop,) = w.step(UnloadAsked("b"))  # a start under way is broken off
    assert w.stopped(stop) == []
    assert w.core.models["b"].state is Residency.COLD


def test_an_adopted_engine_serves_without_a_load(world: MakeWorld) -> None:
    w = world(a=700)
    assert w.step(EngineReady("a#7", "a", "ram", 0.0, adopted=True)) == []
    assert kinds(w.arrive("a")[1]) == ["admit 1"]


def test_an_engine_nobody_knows_any_more_is_stopped_at_adoption(world: MakeWorld) -> None:
    w = world(a=700)
    assert kinds(w.step(EngineReady("old#1", "old", "ram", 0.0, adopted=True))) == ["stop old"]


def test_a_reload_replaces_engines_whose_configuration_changed_and_only_those(world: MakeWorld) -> None:
    w = world(a=spec("a", 700, revision="1"), b=spec("b", 700, revision="1"))
    w.resident("a")
    w.resident("b")
    ticket, _ = w.arrive("a")
    changed = ConfigChanged((spec("a", 600, revision="2"), spec("b", 700, revision="1")), SchedulerSettings())
    assert w.step(changed) == []
    assert w.core.models["a"].state is Residency.DRAINING
    assert kinds(w.finish(ticket)) == ["stop a"]
    assert w.core.models["b"].state is Residency.READY


def test_a_model_removed_by_a_reload_is_drained_and_its_queue_is_told(world: MakeWorld) -> None:
    w = world(memory=1000, a=spec("a", 700, max_sequences=1), b=700)
    running, (load,) = w.arrive("a")
    w.ready(load)
    waits, _ = w.arrive("a")
    commands = w.step(ConfigChanged((spec("b", 700),), SchedulerSettings()))
    assert kinds(commands) == [f"refuse {waits} unknown_model"]
    (stop,) = w.finish(running)
    w.stopped(stop)
    assert "a" not in w.core.models


def test_who_waits_for_a_model_that_a_reload_moves_is_served_where_it_is_now() -> None:
    other = ModelSpec("a", 700 * MiB, "other")
    core = Core([DeviceSpec("ram", "host", 1000 * MiB), DeviceSpec("far", "other", 1000 * MiB)], [spec("a", 700)])
    w = World(core)
    w.measured(foreign=900 * MiB)
    ticket, commands = w.arrive("a")
    assert commands == []
    (load,) = w.step(ConfigChanged((other,), SchedulerSettings()))
    assert (kinds([load]), load.device) == (["load a"], "far")
    assert kinds(w.ready(load)) == [f"admit {ticket}"]


def test_what_a_pinned_model_no_longer_holds_is_to_be_had(world: MakeWorld) -> None:
    w = world(memory=1000, a=spec("a", 700, pinned=True), b=700)
    w.resident("a")
    assert kinds(w.arrive("b")[1]) == [f"refuse 2 {RefusalCode.NEVER_FITS}"]
    w.step(ConfigChanged((spec("a", 700), spec("b", 700)), SchedulerSettings()))
    (stop,) = w.arrive("b")[1]
    assert kinds([stop]) == ["stop a"]
    w.stopped(stop)
    w.step(ConfigChanged((spec("a", 700, pinned=True), spec("b", 700)), SchedulerSettings()))
    assert w.arrive("b")[1] == []  # a pinned model that is not here keeps nobody out


def test_an_unknown_model_is_refused(world: MakeWorld) -> None:
    w = world(a=700)
    _, (refusal,) = w.arrive("b")
    assert refusal.code == RefusalCode.UNKNOWN_MODEL


def test_late_and_duplicate_news_changes_nothing(world: MakeWorld) -> None:
    w = world(a=700)
    ticket, (load,) = w.arrive("a")
    w.ready(load)
    assert w.finish(ticket) == []
    assert w.finish(ticket) == []
    assert w.cancel(ticket) == []
    assert w.finish(999) == []
    assert w.failed("nobody#1") == []
    assert w.ready(load) == []


def test_a_waiting_client_is_told_what_happens(world: MakeWorld) -> None:
    w = world(a=700)
    _, (load,) = w.arrive("a")
    second, _ = w.arrive("a")
    w.step(LoadProgress(load.engine_id, 0.62, "loading weights"))
    assert w.core.describe(second, 10.0) == "loading a, 62% (loading weights), 1 before you, about 20 s (10 to 40 s)"


def test_a_move_that_is_not_in_the_table_is_a_bug() -> None:
    with pytest.raises(IllegalTransition, match="cold -> draining"):
        move(Residency.COLD, Residency.DRAINING)
    assert TRANSITIONS.keys() == set(Residency)


def test_two_kinds_of_memory_do_not_wait_for_each_other(world: MakeWorld) -> None:
    w = world(a=700, g=ModelSpec("g", 700 * MiB, "nvidia"))
    _, (refusal,) = w.arrive("g")
    assert refusal.reason == "g runs on nvidia memory, and there is no such device"
    assert kinds(w.arrive("a")[1]) == ["load a"]


def test_a_model_that_is_removed_while_a_shadow_waits_for_it_is_forgotten(world: MakeWorld) -> None:
    w = world(memory=1000, a=700, b=700)
    _, (load,) = w.arrive("a")
    w.at(0.1).arrive("b")
    w.at(0.2).step(ConfigChanged((spec("a", 700),), SchedulerSettings()))
    w.ready(load)
    for now in (50.0, 100.0, 200.0):
        w.at(now).arrive("a")
        w.tick(now + 1.0)
    assert list(w.core.models) == ["a"]
