"""Two workers on simulated engines: for clients and operators they are one, and each dies for itself only."""

from __future__ import annotations

import http.client
import json
import re
import signal
import threading
import time
import urllib.error
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.e2e.harness import QUESTION, Served, assert_replays, model_table, simulated

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(60), pytest.mark.native]

CONFIG = """
[server]
workers = 2
hang_limit_s = 5
api_keys = ["literal:sk-many", "literal:sk-few", "literal:sk-one"]

[limits.keys."api_keys[1]"]
requests_per_minute = 7

[limits.keys."api_keys[2]"]
concurrency = 1

[observe]
access_log = "access.log"
""" + simulated(
    model_table("a", "max_sequences = 40"),
    model_table("b"),
    model_table("c", tokens_per_s=50),
)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    state = tmp_path_factory.mktemp("workers")
    (state / "vramp.toml").write_text(CONFIG)
    with Served(state / "vramp.toml", state) as served:
        yield served


def key(name: str) -> dict[str, str]:
    return {"Authorization": f"Bearer sk-{name}"}


def chat(served: Served, model: str = "a", who: str = "many", **more: Any) -> Any:
    return served.chat(model, key(who), **more)


def refusal(served: Served, who: str) -> int:
    try:
        chat(served, who=who)
    except urllib.error.HTTPError as error:
        with error:
            return error.code
    return 200


class Streaming:
    """A stream of about `tokens`/50 seconds on a connection of its own."""

    def __init__(self, served: Served, tokens: int, model: str = "c", who: str = "many") -> None:
        self.first, self.text, self.error = threading.Event(), b"", ""
        body = {"model": model, "messages": QUESTION, "stream": True, "max_tokens": tokens, "ignore_eos": True}
        self._sent = json.dumps(body)
        self._served, self._who = served, who
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        headers = {"Content-Type": "application/json", **key(self._who)}
        with closing(http.client.HTTPConnection("127.0.0.1", self._served.port, timeout=30)) as client:
            try:
                client.request("POST", "/v1/chat/completions", self._sent, headers)
                with client.getresponse() as answer:
                    while piece := answer.readline():
                        self.text += piece
                        if piece.startswith(b"data:"):
                            self.first.set()
            except (OSError, http.client.HTTPException) as error:
                self.error = type(error).__name__
        self.first.set()

    def whole(self) -> bool:
        """Waits for its end."""
        self._thread.join(30)
        return self.text.endswith(b"data: [DONE]\n\n") and not self.error


def workers(served: Served) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = served.status()["workers"]
    return found


def kill(served: Served, worker: dict[str, Any], number: int = signal.SIGKILL) -> None:
    """Returns when another serves in its place."""
    served.kill(worker["pid"], number=number)
    served.wait(lambda: worker["pid"] not in [each["pid"] for each in workers(served)], "it lives on", 25)
    served.wait(lambda: sum(each["serving"] for each in workers(served)) == 2, "nobody took its place", 20)


def scheduler_of(served: Served, model: str) -> dict[str, Any]:
    found = json.loads(served.get("/admin/api/scheduler", admin=True))
    return next(each for each in found["models"] if each["id"] == model)


def requests_counted(served: Served) -> float:
    page = served.get("/metrics", admin=True).decode()
    return sum(float(n) for n in re.findall(r'^vramp_requests_total\{.*model="[abc]".*\} (\S+)$', page, re.M))


def test_both_workers_serve_and_models_trade_places(served: Served) -> None:
    streams = [Streaming(served, 40) for _ in range(16)]
    for each in streams:
        assert each.first.wait(20)
    served.wait(lambda: sum(worker["in_flight"] for worker in workers(served)) == 16, "not all are counted", 10)
    busy: set[int] = set()

    def both() -> bool:
        """A worker that the machine does not let run gets nothing of a burst: so there is always one stream more."""
        busy.update(worker["pid"] for worker in workers(served) if worker["in_flight"])
        if len(busy) < 2:
            streams.append(Streaming(served, 40))
        return len(busy) == 2

    served.wait(both, "one of them gets nothing", 20)
    assert all(each.whole() for each in streams)
    for model in "abca":
        assert chat(served, model)["model"] == model


def test_requests_on_credit_are_seen_and_their_end_too(served: Served) -> None:
    chat(served, "c")
    streams = [Streaming(served, 60) for _ in range(4)]
    for each in streams:
        assert each.first.wait(20)
    served.wait(lambda: scheduler_of(served, "c")["in_flight"] == 4, "the scheduler does not see them", 5)
    assert all(each.whole() for each in streams)
    served.wait(lambda: scheduler_of(served, "c")["in_flight"] == 0, "they never end", 5)


def test_metrics_are_one_page_that_never_goes_back(served: Served) -> None:
    before = requests_counted(served)
    for _ in range(20):
        chat(served)
    assert requests_counted(served) == before + 20
    page = served.get("/metrics", admin=True).decode()
    assert page.count("# TYPE vramp_requests_total counter") == 1
    time.sleep(1.2)  # so that the last counts of whoever dies next have been told
    kill(served, workers(served)[0])
    assert requests_counted(served) >= before + 20


def test_limits_hold_for_all_workers_together(served: Served) -> None:
    answers = []
    threads = [threading.Thread(target=lambda: answers.append(refusal(served, "few"))) for _ in range(14)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(answers) == [200] * 7 + [429] * 7


def test_a_killed_worker_loses_its_own_requests_only_and_all_that_it_held_comes_back(served: Served) -> None:
    chat(served, "c")
    streams = [Streaming(served, 250) for _ in range(12)]
    for each in streams:
        assert each.first.wait(20)
    served.wait(lambda: sum(worker["in_flight"] for worker in workers(served)) == 12, "not all are counted", 10)
    dies, lives = workers(served)
    served.kill(dies["pid"])
    assert chat(served)["model"] == "a", "the next request is served at once"
    whole = [each.whole() for each in streams]
    assert whole.count(True) == lives["in_flight"]
    served.wait(lambda: scheduler_of(served, "c")["in_flight"] == 0, "its leases did not come back", 5)
    served.wait(lambda: len(workers(served)) == 2, "nobody took its place", 20)
    held = {share["worker"] for model in "abc" for share in scheduler_of(served, model)["credit"]}
    assert dies["worker"] not in held
    status = served.status()
    assert status["worker_restarts"] >= 1
    assert lives["pid"] in [each["pid"] for each in status["workers"]]
    for model in "cab":
        assert chat(served, model)["model"] == model


def test_what_a_dead_worker_had_in_use_of_a_limit_is_free_again(served: Served) -> None:
    stream = Streaming(served, 500, who="one")
    assert stream.first.wait(20)
    assert refusal(served, "one") == 429
    for worker in workers(served):
        served.kill(worker["pid"])
    assert not stream.whole()
    served.wait(lambda: refusal(served, "one") == 200, "the call still counts", 20)


def test_a_worker_that_hangs_is_replaced_and_what_it_held_is_free(served: Served) -> None:
    chat(served)
    served.wait(lambda: sum(each["serving"] for each in workers(served)) == 2, "not all serve", 20)
    kill(served, workers(served)[0], signal.SIGSTOP)
    for model in "cab":  # whatever credit it had on their engines, they can be stopped
        assert chat(served, model)["model"] == model


def test_a_reload_reaches_every_worker(served: Served) -> None:
    path = served.log.parent / "vramp.toml"
    path.write_text(CONFIG.replace('id = "b"', 'id = "renamed"'))
    served.kill(served.proxy_pid(), number=signal.SIGHUP)

    def listed() -> list[str]:
        return [model["id"] for model in json.loads(served.get("/v1/models", headers=key("many")))["data"]]

    served.wait(lambda: all("renamed" in listed() for _ in range(8)), "a worker has the old configuration", 10)
    assert chat(served, "renamed")["model"] == "renamed"
    path.write_text("[server\n")
    kill(served, workers(served)[0])
    assert all("renamed" in listed() for _ in range(8))
    path.write_text(CONFIG)
    served.kill(served.proxy_pid(), number=signal.SIGHUP)
    served.wait(lambda: all("b" in listed() for _ in range(8)), "a worker has the old configuration", 10)


def test_a_killed_proxy_takes_its_workers_along_and_all_come_back(served: Served) -> None:
    chat(served)
    engine, proxy = served.model("a")["pids"], served.proxy_pid()
    old = [psutil.Process(each["pid"]) for each in workers(served)]
    served.kill(proxy)
    psutil.wait_procs(old, timeout=10)
    assert not [process for process in old if process.is_running()]
    served.wait(served.ready, "the proxy did not come back")
    assert chat(served)["model"] == "a"
    assert served.model("a")["pids"] == engine


def test_every_request_has_one_line_in_the_log_whoever_served_it(served: Served) -> None:
    log = served.log.parent / "access.log"
    before = len(log.read_text().splitlines())
    for _ in range(30):
        chat(served)

    def written() -> bool:
        return len(log.read_text().splitlines()) >= before + 30

    served.wait(written, "lines are missing", 5)
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    ids = [line["request_id"] for line in lines]
    assert len(ids) == len(set(ids))


def test_sigterm_lets_streams_of_all_workers_finish_and_leaves_nothing(served: Served) -> None:
    chat(served, "c")
    streams = [Streaming(served, 100) for _ in range(8)]
    for each in streams:
        assert each.first.wait(20)
    served.family()
    served.process.send_signal(signal.SIGTERM)
    served.wait(lambda: refusal(served, "many") == 503, "a draining server takes new requests", 5)
    assert all(each.whole() for each in streams)
    assert served.process.wait(30) == 0
    assert served.survivors() == []


def test_what_workers_granted_from_credit_replays(tmp_path: Path) -> None:
    (tmp_path / "vramp.toml").write_text(CONFIG)
    record = tmp_path / "decisions.log"
    with Served(tmp_path / "vramp.toml", tmp_path, "--record", str(record)) as served:
        for model in "aaaabbbbaaccca":
            chat(served, model)
        served.kill(workers(served)[0]["pid"])
        chat(served)
        assert served.stop() == 0
    assert b"CreditReported" in record.read_bytes()
    assert_replays(record)
