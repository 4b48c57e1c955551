"""Sleep as a user sees it, on simulated engines: two models with room for one trade places without a load, and one that
wakes corrupted is loaded again before it answers anybody."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from tests.e2e.harness import Served, model_table, simulated

pytestmark = [pytest.mark.slow, pytest.mark.timeout(60)]

CONFIG = simulated(
    *(
        model_table(name, memory="1200MiB", load_s=0.2, fault=fault, fault_after=1000)
        for name, fault in (("a", "none"), ("b", "none"), ("broken", "corrupt"))
    ),
    devices='sleep_memory = "4GiB"',
)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    state = tmp_path_factory.mktemp("sleep")
    (state / "vramp.toml").write_text(CONFIG)
    with Served(state / "vramp.toml", state) as running:
        yield running


def ask(served: Served, model: str) -> str:
    return str(served.chat(model)["choices"][0]["message"]["content"])


def engine_of(served: Served, model: str) -> tuple[str, str | None]:
    found = served.model(model)
    return found["state"], found["engine"]


def test_models_trade_places_without_a_load(served: Served) -> None:
    said = ask(served, "a")
    first = engine_of(served, "a")[1]
    ask(served, "b")
    assert engine_of(served, "a") == ("asleep", first)
    assert ask(served, "a") == said
    assert engine_of(served, "a") == ("ready", first)
    assert served.model("a")["loads"] == 1


def test_what_wakes_corrupted_answers_nobody_and_is_loaded_again(served: Served) -> None:
    said = ask(served, "broken")
    first = engine_of(served, "broken")[1]
    ask(served, "b")
    assert engine_of(served, "broken") == ("asleep", first)
    assert ask(served, "broken") == said
    assert engine_of(served, "broken")[1] != first
    state = json.loads(served.get("/admin/api/scheduler", admin=True))
    assert any("did not wake as it was" in decision["why"] for decision in state["decisions"])
    assert state["sleep_memory"]["held_bytes"] > 0


def test_it_stops_with_engines_asleep_and_leaves_nothing_behind(served: Served) -> None:
    assert served.stop() == 0
    assert served.survivors() == []
