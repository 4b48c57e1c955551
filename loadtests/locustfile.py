"""Users of a running vramp: people who chat and stream, programs that embed, some who leave early.

    make load                                       a minute of everything against the demo
    make load HOST=http://127.0.0.1:9000            another address; VRAMP_KEY is the key, if it wants one
    locust -f loadtests/locustfile.py --tags cold   one scenario, with locust's own page and options

Tags: chat, stream, embed, mixed (these three), cold (chat models in turn: where not all fit, many calls need a load),
leavers (clients that go away while they wait or in mid-stream). Models come from GET /v1/models and are popular by
Zipf's law in that order. Every answer is checked; one that is not well-formed is a failure, and any failure makes the
exit code 1. Time to the first token and the gaps between tokens are in a table of their own.
"""

from __future__ import annotations

import http.client
import itertools
import json
import os
import random
import sys
import time
from collections.abc import Iterator
from typing import Any
from urllib.error import URLError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

import gevent
from locust import FastHttpUser, between, events, tag, task
from locust.env import Environment
from locust.stats import RequestStats, get_percentile_stats_summary

from loadtests.answers import StreamCheck, wrong_chat, wrong_embeddings
from loadtests.prompts import questions_for

CHAT, EMBEDDINGS = "/v1/chat/completions", "/v1/embeddings"
MAX_TOKENS = 48
PATIENCE_S = 300.0  # a cold model waits for its load, and perhaps for somebody else's first
CLASSES = {"instant": 1, "fast": 2, "standard": 5, "deliberate": 1, "batch": 1}  # how often each is asked for
ZIPF = 1.2
LEAVES_AFTER_S = (0.02, 1.0)  # in this range, drawn for each

KEY = os.environ.get("VRAMP_KEY", "")
HEADERS = {"Content-Type": "application/json", **({"Authorization": f"Bearer {KEY}"} if KEY else {})}

timings = RequestStats()  # of tokens, not of requests: kept apart, so that locust's totals count requests only


class Models:
    """What the server has, read once."""

    def __init__(self) -> None:
        self.chat: list[str] = []
        self.embed: list[str] = []
        self._turns: Iterator[str] = iter(())

    def read(self, host: str) -> None:
        """Ask the server. Raises OSError when there is none, or none that wants us."""
        with urlopen(Request(f"{host}/v1/models", headers=HEADERS), timeout=5) as answer:
            entries = json.load(answer)["data"]
        tasks = {entry["id"]: entry.get("vramp", {}).get("task", "generate") for entry in entries}
        self.chat = [name for name, what in tasks.items() if what == "generate"]
        self.embed = [name for name, what in tasks.items() if what == "embed"]
        self._turns = itertools.cycle(self.chat)

    def popular(self) -> str:
        """A chat model, the first ones much more often."""
        weights = [1 / rank**ZIPF for rank in range(1, len(self.chat) + 1)]
        return random.choices(self.chat, weights)[0]

    def next_cold(self) -> str:
        """The chat models in turn: where not all fit, each comes back after it had to go."""
        return next(self._turns)


models = Models()


@events.init.add_listener  # type: ignore[untyped-decorator]
def _look_first(environment: Environment, **_: Any) -> None:
    """Say it in one line if nothing listens, not in a failure per request."""
    host = (environment.host or "").rstrip("/")
    try:
        models.read(host)
    except (URLError, http.client.HTTPException, TimeoutError, OSError, ValueError, KeyError) as error:
        where = host or "(no host)"
        sys.exit(f"load: no vramp answers at {where}: {error}. Start one with `make run`, or name it: HOST=URL.")
    if not models.chat:
        sys.exit(f"load: {host} serves no chat model: /v1/models names none.")


@events.quitting.add_listener  # type: ignore[untyped-decorator]
def _summarise(environment: Environment, **_: Any) -> None:
    if timings.entries:
        print("\nTokens of the streams (milliseconds; requests are above)")
        print("\n".join(get_percentile_stats_summary(timings)))


def _class() -> str:
    return random.choices(list(CLASSES), list(CLASSES.values()))[0]


def _chat_body(model: str, *, stream: bool) -> dict[str, Any]:
    body: dict[str, Any] = {
        "model": model,
        "messages": [{"role": "user", "content": random.choice(questions_for(model))}],
        "max_tokens": MAX_TOKENS,
        "temperature": 0,
    }
    return body | {"stream": True, "stream_options": {"include_usage": True}} if stream else body


class Person(FastHttpUser):
    """One user, who does one thing after the other."""

    wait_time = between(0.2, 1.5)
    network_timeout = PATIENCE_S
    connection_timeout = 5.0

    def on_start(self) -> None:
        """A connection of its own for streams: locust's client does not hand out bytes as they come."""
        address = urlsplit(self.host or "")
        kind = http.client.HTTPSConnection if address.scheme == "https" else http.client.HTTPConnection
        self.connection = kind(address.hostname or "", address.port, timeout=PATIENCE_S)

    def on_stop(self) -> None:
        """Leave nothing open."""
        self.connection.close()

    # ------------------------------------------------------------------ what users do

    @tag("chat", "mixed")
    @task(4)
    def chat(self) -> None:
        self._ask_chat(models.popular(), "chat")

    @tag("stream", "mixed")
    @task(4)
    def stream(self) -> None:
        self._ask_stream(models.popular(), "stream")

    @tag("embed", "mixed")
    @task(2)
    def embed(self) -> None:
        if not models.embed:
            return
        model = random.choice(models.embed)
        texts = random.sample(questions_for(model), random.randint(1, 8))
        body, headers = {"model": model, "input": texts}, HEADERS | {"x-vramp-class": _class()}
        with self.client.post(EMBEDDINGS, json=body, headers=headers, name="embed", catch_response=True) as answer:
            wrong = _wrong_status(answer.status_code, answer.text) or wrong_embeddings(
                answer.headers or {}, answer.content, model, len(texts)
            )
            if wrong:
                answer.failure(wrong)

    @tag("cold")
    @task(1)
    def cold(self) -> None:
        self._ask_stream(models.next_cold(), "cold")

    @tag("leavers")
    @task(1)
    def leave(self) -> None:
        """Go away at some moment: while waiting, before the first token, in mid-stream. Others see if it harmed."""
        model = models.popular()
        started = time.perf_counter()
        wrong: Exception | None = None
        with gevent.Timeout(random.uniform(*LEAVES_AFTER_S), False):
            try:
                for _ in self._events(model, {}):
                    pass
            except (OSError, http.client.HTTPException, WrongAnswer) as error:
                wrong = error
        self.connection.close()
        self._report("leave", started, 0, wrong)

    # -------------------------------------------------------------------- asking

    def _ask_chat(self, model: str, name: str) -> None:
        body, headers = _chat_body(model, stream=False), HEADERS | {"x-vramp-class": _class()}
        with self.client.post(CHAT, json=body, headers=headers, name=name, catch_response=True) as answer:
            wrong = _wrong_status(answer.status_code, answer.text) or wrong_chat(
                answer.headers or {}, answer.content, model
            )
            if wrong:
                answer.failure(wrong)

    def _ask_stream(self, model: str, name: str) -> None:
        started = last = time.perf_counter()
        check, size = StreamCheck(model), 0
        wrong: Exception | None = None
        try:
            for line in self._events(model, {"x-vramp-class": _class()}):
                now, pieces = time.perf_counter(), check.pieces
                size += len(line)
                _refuse(check.feed(line.rstrip(b"\r\n")))
                if check.pieces > pieces:
                    what = f"{name}: gap between tokens" if pieces else f"{name}: time to the first token"
                    timings.log_request("SSE", what, round((now - last) * 1000), 0)
                    last = now
            _refuse(check.wrong_end())
        except (OSError, http.client.HTTPException, WrongAnswer) as error:
            wrong = error
            self.connection.close()  # whatever is left on it belongs to no later answer
        self._report(name, started, size, wrong)

    def _events(self, model: str, headers: dict[str, str]) -> Iterator[bytes]:
        """The lines of a stream as they come."""
        self.connection.request("POST", CHAT, json.dumps(_chat_body(model, stream=True)), HEADERS | headers)
        answer = self.connection.getresponse()
        if answer.status != 200:
            _refuse(_wrong_status(answer.status, answer.read().decode(errors="replace")))
        if not answer.headers.get("content-type", "").startswith("text/event-stream"):
            raise WrongAnswer(f"content-type {answer.headers.get('content-type')!r}")
        while line := answer.readline():
            yield line

    def _report(self, name: str, started: float, size: int, wrong: Exception | None) -> None:
        self.environment.events.request.fire(
            request_type="SSE",
            name=name,
            response_time=(time.perf_counter() - started) * 1000,
            response_length=size,
            exception=wrong,
            context={},
        )


class WrongAnswer(Exception):
    """An answer that no client could use, in words."""


def _refuse(wrong: str | None) -> None:
    if wrong:
        raise WrongAnswer(wrong)


def _wrong_status(status: int, text: str | None) -> str | None:
    return None if status == 200 else f"status {status}: {(text or '')[:200]}"
