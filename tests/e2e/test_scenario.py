"""The scheduler on real engines under everything at once: five models round robin with room for two, mixed classes,
engines killed with -9, and a stranger that takes memory meanwhile.

What a model is promised is scaled to the machine: with a budget of what is free, a stranger that takes a sixth of it
moves the floor, and no machine has to be filled to see that.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
import urllib.error
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest

from scheduler.record import replay
from tests.e2e.harness import REPO, Served

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]

REQUESTS = 200
AT_ONCE = 50
MODELS = {  # two share a folder: for the scheduler they are five
    "chat": "demo-chat",
    "code": "demo-code",
    "story": "demo-story",
    "embed": "demo-embed",
    "twin": "demo-chat",
}
CLASSES = ("instant", "fast", "standard", "deliberate", "batch")
LEAST_ANSWERED = 0.9  # the two kills and the stranger may cost some, which are then refused with a reason
STRANGER = "import sys, time; held = bytearray(b'x') * int(sys.argv[1]); time.sleep(600)"


def configuration(budget: int) -> str:
    promise = int(0.44 * budget)
    lines = ["[devices]", f'host_memory = "{budget}B"', "nvidia = false", "measure_interval_s = 0.5"]
    lines += ["[[backends]]", 'name = "local"', 'kind = "vllm"', 'args = ["--enforce-eager"]']
    for model, folder in MODELS.items():
        lines += ["[[models]]", f'id = "{model}"', 'backend = "local"', f'path = "{REPO / ".models" / folder}"']
        lines += [f'memory_bytes = "{promise}B"', 'kv_cache_bytes = "256MiB"', "max_context = 2048"]
        if model == "embed":
            lines.append('task = "embed"')
    return "\n".join(lines) + "\n"


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Served, int]]:
    state = tmp_path_factory.mktemp("scenario")
    budget = int(0.9 * psutil.virtual_memory().available)
    (state / "scenario.toml").write_text(configuration(budget), encoding="utf-8")
    with Served(state / "scenario.toml", state, "--record", str(state / "decisions.log")) as running:
        yield running, budget


def view(server: Served) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(server.get("/admin/api/scheduler", admin=True))
    return found


class Watch(threading.Thread):
    """Looks from outside, several times a second: what the engines' processes hold, and what the ledger says."""

    def __init__(self, server: Served) -> None:
        super().__init__(daemon=True)
        self._server = server
        self._over = threading.Event()
        self.most_engines = 0
        self.most_uss = 0
        self.most_foreign = 0
        self.looks = 0
        self.faults: list[str] = []

    def run(self) -> None:
        while not self._over.wait(0.25):
            self._server.family()
            self._look()

    def stop(self) -> None:
        self._over.set()
        self.join(20)

    def _look(self) -> None:
        models = [model for model in self._server.status()["models"] if model.get("engine")]
        device = view(self._server)["devices"][0]
        promised = {each["engine"]: each["held_bytes"] for each in device["engines"]}
        self.looks += 1
        self.most_engines = max(self.most_engines, len(promised))
        self.most_foreign = max(self.most_foreign, device["foreign_bytes"])
        held = {model["engine"]: sum(map(uss, model["pids"])) for model in models}
        self.most_uss = max(self.most_uss, sum(held.values()))
        self.faults += [
            f"{engine} holds {size} of {promised[engine]}"
            for engine, size in held.items()
            if engine in promised and size > promised[engine]
        ]
        if sum(promised.values()) + device["overhead_bytes"] > device["capacity_bytes"]:
            self.faults.append(f"promised more than there is: {device}")


def uss(pid: int) -> int:
    try:
        return int(psutil.Process(pid).memory_full_info().uss)
    except psutil.Error:
        return 0


def ask(server: Served, number: int) -> str:
    """One request; "answered", or the refusal's type. An answer without a reason fails here."""
    model = list(MODELS)[number % len(MODELS)]
    headers = {"x-vramp-class": CLASSES[number // len(MODELS) % len(CLASSES)]}
    try:
        if model == "embed":
            reply = server.ask("/v1/embeddings", {"model": model, "input": f"number {number}"}, headers, 240)
            assert reply["data"][0]["embedding"], reply
        else:
            body = {"model": model, "messages": [{"role": "user", "content": f"Say {number}"}], "max_tokens": 12}
            reply = server.ask("/v1/chat/completions", body, headers, 240)
            assert reply["choices"][0]["finish_reason"] in ("stop", "length"), reply
    except urllib.error.HTTPError as error:
        said = json.loads(error.read())["error"]
        assert said["message"], said
        return f"{error.code} {said['code']}"
    return "answered"


def kill_an_engine(server: Served) -> int:
    """kill -9 of every process of an engine that serves; returns one of its pids."""
    found: list[int] = []

    def serving() -> bool:
        found[:] = next((m["pids"] for m in server.status()["models"] if m["state"] == "ready" and m["in_flight"]), [])
        return bool(found)

    server.wait(serving, "no engine serves anybody", 60)
    server.kill(*found)
    return found[0]


def done(futures: list[Future[str]]) -> int:
    return sum(future.done() for future in futures)


def test_nothing_is_lost_and_no_promise_broken_under_kills_and_a_strangers_memory(served: tuple[Served, int]) -> None:
    server, budget = served
    watch = Watch(server)
    watch.start()
    begun = time.monotonic()
    stranger: subprocess.Popen[bytes] | None = None
    try:
        with ThreadPoolExecutor(AT_ONCE) as clients:
            requests = [clients.submit(ask, server, number) for number in range(REQUESTS)]
            server.wait(lambda: done(requests) >= 20, "the first requests are not answered", 120)
            kill_an_engine(server)
            server.wait(lambda: done(requests) >= 40, "nothing goes on after a kill", 120)
            stranger = subprocess.Popen([sys.executable, "-c", STRANGER, str(budget // 4)], stdout=subprocess.PIPE)
            kill_an_engine(server)  # while the stranger takes its memory
            outcomes = Counter(future.result() for future in requests)
    finally:
        watch.stop()
        if stranger is not None:
            stranger.kill()
            stranger.communicate()
    took = time.monotonic() - begun
    print(
        f"{dict(outcomes)} in {took:.0f} s; most engines {watch.most_engines}, USS {watch.most_uss >> 20} MiB, "
        f"foreign {watch.most_foreign >> 20} MiB of {budget >> 20} MiB, {watch.looks} looks"
    )
    assert outcomes.total() == REQUESTS
    assert outcomes["answered"] >= LEAST_ANSWERED * REQUESTS, outcomes
    assert watch.faults == []
    assert watch.looks > 20
    assert watch.most_engines == 2
    assert watch.most_foreign > 0


def test_the_admin_view_shows_the_ledger_the_residency_and_why(served: tuple[Served, int]) -> None:
    state = view(served[0])
    assert {model["id"] for model in state["models"]} == set(MODELS)
    assert all(model["stated"] and model["booked_bytes"] >= model["predicted_bytes"] for model in state["models"])
    assert state["queues"] == []
    assert 0 < len(state["decisions"]) <= 50
    assert all(decision["why"] for decision in state["decisions"])
    (device,) = state["devices"]
    assert all(0 < engine["measured_bytes"] <= engine["held_bytes"] for engine in device["engines"])


def test_what_was_learned_is_kept_and_nothing_is_left_running(served: tuple[Served, int]) -> None:
    server, _ = served
    assert server.stop() == 0
    assert server.survivors() == []
    (kept,) = Path(server.log).parent.rglob("footprints.json")
    figures = json.loads(kept.read_bytes())["figures"]
    assert len(figures) == len(MODELS)
    assert all(size > 64 << 20 for sizes in figures.values() for size in sizes)


def test_the_log_of_it_all_replays_decision_for_decision(served: tuple[Served, int]) -> None:
    server, _ = served
    if server.process.poll() is None:
        server.stop()
    replayed = replay(server.log.parent / "decisions.log")
    assert replayed.difference is None
    assert replayed.events > REQUESTS
