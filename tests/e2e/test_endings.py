"""Every way in which a request can end too early, at every point of its way, on both lanes.

However it ends: one line in the access log, one usage row that agrees with it, nothing in flight, nothing waiting, no
lease left, and the next request works.
"""

from __future__ import annotations

import http.client
import json
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

from tests.e2e.harness import Served, model_table, simulated

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(90)]

# a model for each point, which its first request reaches and stays at for half a second or more
POINTS = {
    "queued": model_table("queued", "max_sequences = 1", memory="1GiB", ttft_ms=500),
    "loading": model_table("loading", memory="1GiB", load_s=0.6),
    "before-the-answer": model_table("before-the-answer", memory="1GiB", ttft_ms=500),
    "mid-stream": model_table("mid-stream", memory="1GiB", tokens_per_s=20),
}
CONFIG = """
[server]
fast_lane = {fast}
drain_s = 8

[observe]
access_log = "access.log"
"""
LANES = ("fast", "ordinary")


def configured(folder: Path, lane: str) -> Path:
    text = CONFIG.format(fast="true" if lane == "fast" else "false") + simulated(*POINTS.values(), memory="8GiB")
    (folder / "vramp.toml").write_text(text, encoding="utf-8")
    return folder / "vramp.toml"


@pytest.fixture(scope="module", params=LANES)
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    state = tmp_path_factory.mktemp(f"endings-{request.param}")
    with Served(configured(state, request.param), state) as running:
        yield running


class Request:
    """One streamed call on a connection of its own, under an id of its own."""

    number = 0
    opened: ClassVar[list[socket.socket]] = []

    def __init__(self, served: Served, model: str, max_tokens: int = 30) -> None:
        Request.number += 1
        self.model, self.id = model, f"req-{model}-{Request.number}"
        body = {
            "model": model,
            "messages": [{"role": "user", "content": "Tell me everything"}],
            "stream": True,
            "max_tokens": max_tokens,
        }
        self._socket = socket.create_connection(("127.0.0.1", served.port), 30)
        self.opened.append(self._socket)
        data = json.dumps(body).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nx-request-id: {self.id}\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
        self._socket.sendall(head.encode() + data)

    def answer(self) -> tuple[int, bytes]:
        """The status and everything that came."""
        response = http.client.HTTPResponse(self._socket)
        response.begin()
        return response.status, response.read()

    def first_bytes(self) -> bytes:
        return self._socket.recv(65536)

    def leave(self) -> None:
        self._socket.close()


@pytest.fixture(autouse=True)
def _close_connections() -> Iterator[None]:
    yield
    while Request.opened:
        Request.opened.pop().close()


def lines(served: Served, request_id: str) -> list[dict[str, Any]]:
    """Of the access log."""
    return written(served, "access.log", request_id)


def rows(served: Served, request_id: str) -> list[dict[str, Any]]:
    """Of usage."""
    return written(served, ".state/usage.jsonl", request_id)


def written(served: Served, name: str, request_id: str) -> list[dict[str, Any]]:
    text = (served.log.parent / name).read_text(encoding="utf-8")
    found = [json.loads(line) for line in text.splitlines() if line.startswith("{") and line.endswith("}")]
    return [each for each in found if each.get("request_id") == request_id]


def recorded(served: Served, request: Request) -> bool:
    return bool(lines(served, request.id)) and bool(rows(served, request.id))


def assert_recorded_once(served: Served, request: Request) -> dict[str, Any]:
    """The line of the request, which its usage row repeats."""
    (line,), (row,) = lines(served, request.id), rows(served, request.id)
    same = ("tenant", "model", "status", "attempts", "stream")
    assert [row[name] for name in same] == [line[name] for name in same]
    assert row["error"] == line.get("error")
    assert row["output_tokens"] == line.get("output_tokens")
    return line


def model_is(served: Served, model: str, **wanted: object) -> Callable[[], bool]:
    return lambda: wanted.items() <= served.model(model).items()


def pids(served: Served, model: str) -> list[int]:
    return [int(pid) for pid in served.model(model)["pids"]]


def reach(served: Served, point: str) -> tuple[Request, list[Request]]:
    """A request at this point of its way, and those that it needs around it."""
    if point == "loading":
        served.operate(point, "unload")
        request = Request(served, point)
        served.wait(lambda: bool(pids(served, point)) and served.model(point)["state"] == "loading", "no load began")
        return request, []
    served.operate(point, "load")
    if point == "queued":
        before = Request(served, point, 2)
        served.wait(model_is(served, point, in_flight=1), "the first is not served")
        request = Request(served, point, 2)
        served.wait(model_is(served, point, waiting=1), "the second does not wait")
        return request, [before]
    request = Request(served, point)
    served.wait(model_is(served, point, in_flight=1), "it is not served")
    if point == "mid-stream":
        assert b"200 OK" in request.first_bytes()
    return request, []


def works(served: Served, model: str) -> Request:
    """The next request, or the first one after the pause that follows a failed load."""
    following: list[Request] = []

    def answered() -> bool:
        following.append(Request(served, model, 2))
        status, said = following[-1].answer()
        if status == 200:
            return said.endswith(b"data: [DONE]\n\n")
        assert (status, json.loads(said)["error"]["code"]) == (503, "load_failed")
        return False

    served.wait(answered, "the next request does not work", 30)
    return following[-1]


def assert_over(served: Served, request: Request, others: list[Request]) -> dict[str, Any]:
    """One line and row for each, nothing left, and the next request works; the line."""
    for each in (*others, request):
        served.wait(lambda each=each: recorded(served, each), f"no record of {each.id}", 20)
    idle = {"in_flight": 0, "waiting": 0}
    served.wait(lambda: all(idle.items() <= model.items() for model in served.status()["models"]), "not idle", 20)
    following = works(served, request.model)
    served.wait(lambda: recorded(served, following), "no record of the next request")
    for each in (*others, following):
        assert_recorded_once(served, each)
    return assert_recorded_once(served, request)


@pytest.mark.parametrize("point", POINTS)
def test_a_client_that_leaves_costs_one_line_and_no_lease(served: Served, point: str) -> None:
    request, others = reach(served, point)
    request.leave()
    line = assert_over(served, request, others)
    assert (line["status"], line["error"]) == (499, "client_left")


@pytest.mark.parametrize("point", POINTS)
def test_an_engine_that_dies_costs_one_line_and_no_lease(served: Served, point: str) -> None:
    request, others = reach(served, point)
    served.kill(*pids(served, point))
    status, said = request.answer() if point != "mid-stream" else (200, request.first_bytes())
    line = assert_over(served, request, others)
    if point == "mid-stream":
        assert line["status"] == 200
        assert line["error"]
    else:
        # done again on a new engine, or refused with the reason: never a silent end
        assert said.endswith(b"data: [DONE]\n\n") or b'"error"' in said, said
        assert line["status"] == status


@pytest.mark.parametrize("lane", LANES)
def test_an_ordered_stop_ends_every_request_with_one_line(lane: str, tmp_path: Path) -> None:
    with Served(configured(tmp_path, lane), tmp_path) as served:
        reached = {point: reach(served, point) for point in ("mid-stream", "before-the-answer", "queued", "loading")}
        served.process.send_signal(signal.SIGTERM)
        ends: dict[str, tuple[int, bytes]] = {}
        for point, (request, others) in reached.items():
            for other in others:
                other.answer()
            ends[point] = request.answer() if point != "mid-stream" else (200, b"")
        assert served.process.wait(40) == 0
        for request, others in reached.values():
            for each in (request, *others):
                assert_recorded_once(served, each)
        for point, (status, said) in ends.items():
            if point != "mid-stream":
                assert said.endswith(b"data: [DONE]\n\n") or b'"error"' in said, (point, status, said)
        assert served.survivors() == []
    with Served(configured(tmp_path, lane), tmp_path) as again:
        assert Request(again, "mid-stream", 2).answer()[0] == 200
