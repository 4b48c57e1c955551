"""SIGUSR2: the next version of the proxy takes over, and nobody notices."""

from __future__ import annotations

import http.client
import json
import signal
import threading
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import psutil
import pytest

from tests.e2e.harness import QUESTION, Served, model_table, simulated

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(120)]

CONFIG = simulated(
    model_table("a", tokens_per_s=200),
    model_table("b", "max_sequences = 2", tokens_per_s=200),
    model_table("slow-to-load", load_s=3.0, tokens_per_s=200),
)


@pytest.fixture
def served(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Served]:
    workers = getattr(request, "param", 1)
    (tmp_path / "vramp.toml").write_text(f"[server]\nworkers = {workers}\n{CONFIG}")
    with Served(tmp_path / "vramp.toml", tmp_path) as served:
        yield served


class Client(threading.Thread):
    """Asks again and again, on one connection for as long as the server keeps it, as an SDK's pool does."""

    def __init__(self, served: Served, model: str, *, stream: bool, pause_s: float = 0.0, tokens: int = 16) -> None:
        super().__init__(daemon=True)
        self.port, self.pause_s, self.stream = served.port, pause_s, stream
        self.body = {"model": model, "messages": QUESTION, "max_tokens": tokens, "stream": stream, "ignore_eos": True}
        self.answered = 0
        self.failures: list[str] = []
        self.enough = threading.Event()
        self.start()

    def run(self) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        with closing(connection):
            while not self.enough.wait(self.pause_s):
                try:
                    self._ask(connection)
                except (OSError, http.client.HTTPException, AssertionError, ValueError) as error:
                    self.failures.append(f"after {self.answered}: {error!r}")
                    connection.close()

    def _ask(self, connection: http.client.HTTPConnection) -> None:
        headers = {"Content-Type": "application/json"}
        connection.request("POST", "/v1/chat/completions", json.dumps(self.body), headers)
        with connection.getresponse() as answer:
            text = answer.read()
            assert answer.status == 200, (answer.status, text)
        if self.stream:
            assert text.endswith(b"data: [DONE]\n\n"), text[-300:]
        else:
            assert json.loads(text)["usage"]["completion_tokens"] == self.body["max_tokens"], text
        self.answered += 1

    def ended(self) -> list[str]:
        self.enough.set()
        self.join(30)
        return self.failures


def upgrade(served: Served) -> int:
    """Another proxy serves when this returns; its pid."""
    serves = before = served.proxy_pid()

    def replaced() -> bool:
        nonlocal serves
        serves = served.proxy_pid()
        return serves != before

    served.process.send_signal(signal.SIGUSR2)
    served.wait(replaced, "there was no upgrade")
    return serves


def alone(served: Served) -> bool:
    """Whether the keeper has seen the version before end: until then it begins no other upgrade."""
    said = served.log.read_text()
    return said.count("upgrade: starting a new proxy") == said.count("the version before has finished its requests")


@pytest.mark.parametrize("served", [1, 2], indirect=True, ids=["alone", "two workers"])
def test_under_load_no_request_fails_and_no_model_is_loaded(served: Served) -> None:
    for model in ("a", "b"):
        served.operate(model, "load")
    engines = [served.model(model)["pids"] for model in ("a", "b")]
    kinds = [("a", False, 0.0), ("a", True, 0.0), ("a", True, 0.05), ("a", False, 0.3), ("b", True, 0.0)]
    clients = [Client(served, model, stream=stream, pause_s=pause_s) for model, stream, pause_s in kinds]
    clients += [Client(served, "b", stream=False, pause_s=0.0) for _ in range(4)]  # some of these wait
    pids = {served.proxy_pid()}
    for _ in range(3):
        pids.add(upgrade(served))
        so_far = [client.answered for client in clients]
        served.wait(
            lambda before=so_far: all(each.answered > then for each, then in zip(clients, before, strict=True)),  # type: ignore[misc]
            "somebody is no longer answered",
        )
        served.wait(lambda: alone(served), "the version before did not end")
    assert [failure for client in clients for failure in client.ended()] == []
    assert len(pids) == 4
    assert [served.model(model)["pids"] for model in ("a", "b")] == engines
    assert not [each for each in served.status()["decisions"] if each["what"].startswith(("load", "stop"))]
    assert [served.model(model)["in_flight"] for model in ("a", "b")] == [0, 0]
    assert served.stop() == 0


@pytest.mark.parametrize("served", [1, 2], indirect=True, ids=["alone", "two workers"])
def test_a_stream_in_flight_goes_on_and_its_engine_is_busy_for_the_next_version(served: Served) -> None:
    served.operate("a", "load")
    client = Client(served, "a", stream=True, pause_s=0.0, tokens=1200)
    served.wait(lambda: served.model("a")["in_flight"] == 1, "the stream did not begin")
    upgrade(served)
    # credit that the version before had lent its workers counts as in flight until they have returned it
    served.wait(lambda: served.model("a")["in_flight"] == 1, "the next version does not know of the stream")
    served.process.send_signal(signal.SIGUSR2)
    served.wait(lambda: "has requests in flight yet" in served.tail(), "the second upgrade was not refused")
    client.enough.set()
    served.wait(lambda: served.model("a")["in_flight"] == 0, "its end was not told")
    assert (client.ended(), client.answered) == ([], 1)
    served.wait(lambda: alone(served), "the version before did not end")
    upgrade(served)


def test_an_upgrade_while_a_model_loads_waits_for_it_and_who_waits_for_another_gets_it_from_the_next_version(
    served: Served,
) -> None:
    for model in ("a", "b"):
        served.operate(model, "load")
    first = Client(served, "slow-to-load", stream=True, pause_s=0.0)
    served.wait(lambda: served.model("slow-to-load")["state"] == "loading", "the load did not begin")
    evicted = next(model for model in ("a", "b") if served.model(model)["state"] == "cold")
    waits = Client(served, evicted, stream=False, pause_s=0.0)
    served.wait(lambda: served.model(evicted)["waiting"] == 1, "nobody waits")
    upgrade(served)
    for client in (first, waits):
        served.wait(lambda client=client: client.answered > 0, "it was not answered")  # type: ignore[misc]
    assert first.ended() + waits.ended() == []
    assert served.model("slow-to-load")["loads"] == 1


def test_a_version_that_cannot_start_leaves_the_old_one_serving(served: Served) -> None:
    served.operate("a", "load")
    client = Client(served, "a", stream=False, pause_s=0.0)
    pid, path = served.proxy_pid(), served.log.parent / "vramp.toml"
    path.write_text(CONFIG.replace("memory_bytes", "memroy_bytes"))
    served.process.send_signal(signal.SIGUSR2)
    served.wait(lambda: "no upgrade: the new proxy ended with status 2" in served.tail(20_000), "it was not said")
    assert served.proxy_pid() == pid
    path.write_text(CONFIG)
    assert upgrade(served) != pid
    assert client.ended() == []


def test_a_model_that_the_next_version_no_longer_has_is_stopped_when_its_last_request_has_ended(served: Served) -> None:
    for model in ("a", "b"):
        served.operate(model, "load")
    (engine,) = served.model("b")["pids"]
    client = Client(served, "b", stream=True, tokens=600)
    served.wait(lambda: served.model("b")["in_flight"] == 1, "the stream did not begin")
    client.enough.set()
    path = served.log.parent / "vramp.toml"
    path.write_text("[server]\nreload_on_change = false\n" + CONFIG.replace('id = "b"', 'id = "renamed"'))
    upgrade(served)
    assert "b" not in [model["id"] for model in served.status()["models"]]
    assert (client.ended(), client.answered) == ([], 1)
    served.wait(lambda: not psutil.pid_exists(engine), "its engine was not stopped")
    assert served.model("a")["state"] == "ready"


def test_a_successor_that_is_killed_after_the_hand_over_is_replaced_and_the_stream_still_counts(
    served: Served,
) -> None:
    served.operate("a", "load")
    client = Client(served, "a", stream=True, pause_s=0.0, tokens=1500)
    served.wait(lambda: served.model("a")["in_flight"] == 1, "the stream did not begin")
    engine = served.model("a")["pids"]
    client.enough.set()
    killed = upgrade(served)
    served.kill(killed)
    served.wait(lambda: served.proxy_pid() != killed, "it was not replaced")
    assert (served.model("a")["in_flight"], served.model("a")["pids"]) == (1, engine)
    served.wait(lambda: served.model("a")["in_flight"] == 0, "its end was not told")
    assert client.ended() == []


def test_sigterm_in_an_upgrade_ends_both(served: Served) -> None:
    served.operate("a", "load")
    client = Client(served, "a", stream=True, pause_s=0.0, tokens=600)
    served.wait(lambda: served.model("a")["in_flight"] == 1, "the stream did not begin")
    client.enough.set()
    upgrade(served)
    assert served.stop() == 0
    assert client.ended() == []
    assert served.survivors() == []
