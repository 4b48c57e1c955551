"""The whole of vramp on simulated engines: everything but the model is real, and faults come on request."""

from __future__ import annotations

import http.client
import json
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.e2e.harness import QUESTION, Served, assert_replays, cli, model_table, simulated

# the limit is for a busy machine: starting a keeper, a proxy and an engine takes a second or two on an idle one
pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(60)]

SCRIPTS = """
[timeouts]
idle_s = 1
first_byte_s = 2

[[backends]]
name = "scripts"
kind = "command"
device = "simulated"

[[models]]
id = "script"
backend = "scripts"
memory_bytes = "100MiB"
command = [
    PYTHON, "-m", "scheduler.engines.simulated_server", "--port", "${PORT}", "--model", "script", "--load-s", "0.1",
]

[[models]]
id = "no-such-program"
backend = "scripts"
memory_bytes = "100MiB"
command = ["/nonexistent/engine", "--port", "${PORT}"]
""".replace("PYTHON", json.dumps(sys.executable))
CONFIG = SCRIPTS + simulated(
    model_table("a", load_s=0.2),
    model_table("b", load_s=0.2),
    model_table("slow-to-load", load_s=1.6, tokens_per_s=40),
    model_table("crashes", memory="100MiB", tokens_per_s=200, fault="crash", fault_after=1),
    model_table("hangs", memory="100MiB", fault="hang"),
    model_table("talks-garbage", memory="100MiB", fault="garbage"),
    model_table("huge", memory="1900MiB"),
)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    state = tmp_path_factory.mktemp("served")
    (state / "vramp.toml").write_text(CONFIG)
    with Served(state / "vramp.toml", state) as served:
        yield served


def chat(served: Served, model: str, **more: Any) -> Any:
    return served.chat(model, **more)


def refusal(served: Served, model: str, **more: Any) -> tuple[int, dict[str, Any]]:
    with pytest.raises(urllib.error.HTTPError) as refused:
        chat(served, model, **more)
    with refused.value as answer:
        return answer.code, json.loads(answer.read())["error"]


def stream(served: Served, model: str, **more: Any) -> list[str]:
    """The whole stream, an entry for each event or comment."""
    body = json.dumps({"model": model, "messages": QUESTION, "stream": True, "max_tokens": 5, **more}).encode()
    request = urllib.request.Request(served.url + "/v1/chat/completions", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        return [event for event in answer.read().decode().split("\n\n") if event]


def operator(served: Served, *argv: str) -> subprocess.CompletedProcess[str]:
    return cli(*argv, VRAMP_ADMIN=served.admin_url, COLUMNS="120")


def test_models_come_and_go_and_say_so(served: Served) -> None:
    for model in ("a", "b", "slow-to-load", "a", "b"):
        assert chat(served, model)["model"] == model
    what = [decision["what"] for decision in served.status()["decisions"]]
    # which of the two went for the third is a matter of how long their loads took
    assert any(line.startswith(("stop a#", "stop b#")) and "(evicted)" in line for line in what)
    assert served.model("a")["loads"] + served.model("b")["loads"] >= 3


def test_a_streaming_client_is_told_how_far_the_load_is(served: Served) -> None:
    served.operate("slow-to-load", "unload")
    events = stream(served, "slow-to-load")
    assert events[0].startswith(": vramp loading slow-to-load, ")
    assert any(event.startswith("data: {") for event in events)
    assert "data: [DONE]" in events


def test_an_engine_that_crashes_ends_its_stream_with_an_error_and_comes_back(served: Served) -> None:
    assert stream(served, "crashes")[-1] == "data: [DONE]"
    last = stream(served, "crashes", max_tokens=50)[-1]
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "upstream_error"
    assert stream(served, "crashes")[-1] == "data: [DONE]"  # a new engine, which again answers once


def test_an_engine_that_hangs_is_given_up_in_time(served: Served) -> None:
    status, error = refusal(served, "hangs")
    assert (status, error["code"]) == (504, "upstream_timeout")
    assert chat(served, "a")["model"] == "a"


def test_garbage_is_not_passed_on_as_an_answer(served: Served) -> None:
    status, error = refusal(served, "talks-garbage")
    assert (status, error["code"]) == (502, "upstream_error")


def test_a_script_is_an_engine_like_any_other(served: Served) -> None:
    assert chat(served, "script")["model"] == "script"


def test_a_program_that_does_not_exist_says_so_to_who_waits_and_backs_off(served: Served) -> None:
    status, error = refusal(served, "no-such-program")
    assert (status, error["code"]) == (503, "load_failed")
    assert "/nonexistent/engine" in error["message"]
    assert served.model("no-such-program")["state"] == "failed"
    assert chat(served, "a")["model"] == "a"


def test_the_command_line_loads_unloads_and_shows(served: Served) -> None:
    assert operator(served, "load", "b").returncode == 0
    assert served.model("b")["state"] == "ready"
    shown = operator(served, "status")
    assert shown.returncode == 0
    assert "sim0" in shown.stdout
    assert "slow-to-load" in shown.stdout
    assert operator(served, "unload", "b").returncode == 0
    assert served.model("b")["state"] == "cold"
    listed = operator(served, "models")
    assert "talks-garbage" in listed.stdout
    failed = operator(served, "load", "no-such-program")
    assert failed.returncode == 1
    assert "/nonexistent/engine" in failed.stderr + failed.stdout


def test_metrics_tell_what_happened(served: Served) -> None:
    chat(served, "a")
    page = served.get("/metrics", admin=True).decode()
    assert 'vramp_requests_total{backend="local/sim",class="standard",model="a",status_class="2xx"}' in page
    assert 'vramp_model_residency{model="a",state="ready"} 1.0' in page
    assert 'vramp_device_memory_bytes{device="sim0",use="capacity"}' in page
    assert "vramp_model_loads_total" in page
    assert "_created" not in page


def test_a_reload_changes_what_it_should_and_a_bad_file_changes_nothing(served: Served) -> None:
    path = served.log.parent / "vramp.toml"
    chat(served, "a")
    engine = served.model("a")["pids"]

    def listed() -> list[str]:
        return [model["id"] for model in json.loads(served.get("/v1/models"))["data"]]

    path.write_text(CONFIG.replace('id = "hangs"', 'id = "renamed"'))
    served.kill(served.proxy_pid(), number=signal.SIGHUP)
    served.wait(lambda: "renamed" in listed(), "the reload did not happen")
    assert "hangs" not in listed()
    assert served.model("a")["pids"] == engine, "an engine whose configuration did not change goes on"
    path.write_text(CONFIG.replace("memory_bytes", "memroy_bytes"))
    served.kill(served.proxy_pid(), number=signal.SIGHUP)
    served.wait(lambda: "memroy_bytes" in served.tail(), "the bad file was not complained about")
    assert "renamed" in listed()
    assert chat(served, "a")["model"] == "a"
    path.write_text(CONFIG)
    served.process.send_signal(signal.SIGHUP)  # as systemctl reload does: to the keeper
    served.wait(lambda: "hangs" in listed(), "the keeper did not pass the signal on")


def test_a_changed_file_is_read_by_itself_and_a_bad_one_is_complained_about_once(served: Served) -> None:
    path = served.log.parent / "vramp.toml"

    def listed() -> list[str]:
        return [model["id"] for model in json.loads(served.get("/v1/models"))["data"]]

    def replaced(text: str) -> None:
        (path.parent / "new").write_text(text)
        (path.parent / "new").rename(path)

    replaced(CONFIG.replace('id = "hangs"', 'id = "by-itself"'))
    served.wait(lambda: "by-itself" in listed(), "the file was not read")
    replaced(CONFIG.replace("memory_bytes", "momery_bytes"))
    served.wait(lambda: "momery_bytes" in served.tail(), "the bad file was not complained about")
    complaints = served.tail(100_000).count("models[a].momery_bytes")
    time.sleep(2.5)  # two looks more
    assert served.tail(100_000).count("models[a].momery_bytes") == complaints == 1
    assert "by-itself" in listed()
    replaced(CONFIG)
    served.wait(lambda: "hangs" in listed(), "the file was not read after a bad one")


def test_a_killed_proxy_comes_back_with_its_engines(served: Served) -> None:
    chat(served, "a")
    engine, proxy = served.model("a")["pids"], served.proxy_pid()
    served.kill(proxy)
    body = json.dumps({"model": "a", "messages": QUESTION})
    with closing(http.client.HTTPConnection("127.0.0.1", served.port, timeout=20)) as client:  # in the listen queue
        client.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
        with client.getresponse() as answer:
            assert answer.status == 200
    assert served.proxy_pid() != proxy
    assert served.model("a")["pids"] == engine


def test_a_request_that_can_never_fit_is_refused_at_once(served: Served) -> None:
    # pinning is configuration: with a pinned, no room is left for huge, ever
    path = served.log.parent / "vramp.toml"
    path.write_text(CONFIG.replace('id = "a"', 'id = "a"\npinned = true'))
    chat(served, "a")
    served.kill(served.proxy_pid(), number=signal.SIGHUP)
    served.wait(lambda: served.model("a")["pinned"], "the reload did not happen")
    begun = time.monotonic()
    status, error = refusal(served, "huge")
    assert (status, error["code"]) == (400, "model_never_fits")
    assert "huge needs 1.86 GiB" in error["message"]
    assert "900 MiB of it pinned" in error["message"]
    assert time.monotonic() - begun < 5
    path.write_text(CONFIG)
    served.kill(served.proxy_pid(), number=signal.SIGHUP)
    served.wait(lambda: not served.model("a")["pinned"], "the reload did not happen")


def test_sigterm_lets_streams_finish_refuses_new_requests_and_leaves_nothing(served: Served) -> None:
    chat(served, "slow-to-load")
    ended: list[str] = []
    first = threading.Event()

    def long_stream() -> None:
        ask = {"model": "slow-to-load", "messages": QUESTION, "stream": True, "max_tokens": 80, "ignore_eos": True}
        with closing(http.client.HTTPConnection("127.0.0.1", served.port, timeout=30)) as client:
            client.request("POST", "/v1/chat/completions", json.dumps(ask), {"Content-Type": "application/json"})
            with client.getresponse() as answer:
                answer.readline()
                first.set()
                ended.append(answer.read().decode()[-14:])

    thread = threading.Thread(target=long_stream)
    thread.start()
    assert first.wait(20)
    served.family()
    served.process.send_signal(signal.SIGTERM)

    def refused() -> bool:
        try:
            chat(served, "slow-to-load")
        except urllib.error.HTTPError as error:
            with error:
                return error.code == 503 and error.headers["retry-after"] is not None
        return False

    served.wait(refused, "a draining server takes new requests", 5)
    thread.join(30)
    assert ended == ["data: [DONE]\n\n"]
    assert served.process.wait(30) == 0
    assert served.survivors() == []


def test_a_recorded_life_replays_decision_for_decision(tmp_path: Path) -> None:
    (tmp_path / "vramp.toml").write_text(CONFIG)
    record = tmp_path / "decisions.log"
    with Served(tmp_path / "vramp.toml", tmp_path, "--record", str(record)) as served:
        for model in ("a", "b", "slow-to-load", "crashes", "crashes", "a"):
            stream(served, model, max_tokens=20)
        refusal(served, "no-such-program")
        assert served.stop() == 0
    assert_replays(record)


def test_after_a_keeper_killed_with_9_nothing_is_left_and_a_new_one_starts(tmp_path: Path) -> None:
    (tmp_path / "vramp.toml").write_text(CONFIG)
    with Served(tmp_path / "vramp.toml", tmp_path) as served:
        chat(served, "a")
        family = served.family()
        served.process.kill()
        served.process.wait()
        psutil.wait_procs(family, timeout=10)
    with Served(tmp_path / "vramp.toml", tmp_path) as again:
        assert again.survivors() == []
        assert not [process for process in family if process.is_running()]
        assert chat(again, "a")["model"] == "a"
        assert again.stop() == 0
