"""The main job on real engines: four models, room for two, five minutes of mixed calls by the SDK, then faults.

One server for the whole file, in the order written: each test leaves it serving.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import random
import re
import signal
import socket
import threading
import time
import urllib.error
from collections.abc import Iterator
from typing import Any

import openai
import psutil
import pytest

from tests.e2e.harness import REPO, Served

pytestmark = [pytest.mark.engine, pytest.mark.timeout(240)]

MIXED_SECONDS = float(os.environ.get("VRAMP_E2E_SECONDS", "300"))
CHATS = ("demo-chat", "demo-code", "demo-story")
PAGES = REPO / "scripts" / "demo_pages"


def page(model: str) -> list[tuple[str, str]]:
    """The questions a demo model was trained on, with the answers it should give."""
    text = (PAGES / f"{model.removeprefix('demo-')}.md").read_text(encoding="utf-8")
    found = re.findall(r"^## (.+?)\n(.+?)(?=\n## |\Z)", text, flags=re.M | re.S)
    return [(question.strip(), answer.strip()) for question, answer in found]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    state = tmp_path_factory.mktemp("demo")
    config = (REPO / "configs" / "demo.toml").read_text(encoding="utf-8")
    config = config.replace('"../.models/', f'"{REPO / ".models"}/')
    (state / "demo.toml").write_text(config, encoding="utf-8")
    with Served(state / "demo.toml", state) as served:
        yield served


@pytest.fixture
def client(demo: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{demo.url}/v1", api_key="none", max_retries=0, timeout=120) as client:
        yield client


class Memory:
    """Looks at the engines' USS from outside, twice a second, and remembers the most it saw."""

    def __init__(self, demo: Served) -> None:
        self._demo = demo
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self.most = 0
        self.samples = 0

    def __enter__(self) -> Memory:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join(10)

    def _watch(self) -> None:
        while not self._stop.wait(0.5):
            with contextlib.suppress(OSError, ValueError):
                self.most = max(self.most, sum(map(_uss, self._engine_pids())))
                self.samples += 1

    def _engine_pids(self) -> list[int]:
        return [pid for model in self._demo.status()["models"] for pid in model.get("pids", ())]


def _uss(pid: int) -> int:
    try:
        return int(psutil.Process(pid).memory_full_info().uss)
    except psutil.Error:
        return 0


def check_chat(answer: Any) -> None:
    assert answer.object == "chat.completion"
    assert answer.choices[0].finish_reason in ("stop", "length")
    assert answer.usage.prompt_tokens > 0
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


class Caller:
    """Makes one call of each kind and checks that the answer is whole."""

    def __init__(self, sync: openai.OpenAI, async_: openai.AsyncOpenAI, rng: random.Random) -> None:
        self.sync, self.async_, self.rng = sync, async_, rng
        self.answered = 0
        self.right = 0

    def _messages(self, model: str) -> tuple[list[Any], str]:
        question, answer = self.rng.choice(page(model))
        return [{"role": "user", "content": question}], answer

    def chat(self, model: str) -> None:
        messages, right = self._messages(model)
        answer = self.sync.chat.completions.create(model=model, messages=messages, temperature=0, max_tokens=80)
        check_chat(answer)
        self.right += answer.choices[0].message.content.strip() == right
        self.answered += 1

    def stream(self, model: str) -> None:
        messages, right = self._messages(model)
        chunks = list(
            self.sync.chat.completions.create(
                model=model, messages=messages, temperature=0, max_tokens=80, stream=True,
                stream_options={"include_usage": True},
            )
        )  # fmt: skip
        assert chunks[-1].usage.completion_tokens > 0
        assert chunks[-2].choices[0].finish_reason in ("stop", "length")
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        self.right += text.strip() == right
        self.answered += 1

    async def chat_async(self, model: str) -> None:
        messages, right = self._messages(model)
        answer = await self.async_.chat.completions.create(model=model, messages=messages, temperature=0, max_tokens=80)
        check_chat(answer)
        self.right += answer.choices[0].message.content.strip() == right
        self.answered += 1

    async def stream_async(self, model: str) -> None:
        messages, right = self._messages(model)
        stream = await self.async_.chat.completions.create(
            model=model, messages=messages, temperature=0, max_tokens=80, stream=True
        )
        chunks = [chunk async for chunk in stream]
        assert all(chunk.usage is None for chunk in chunks), "usage that nobody asked for"
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        self.right += text.strip() == right
        self.answered += 1

    def completion(self, model: str) -> None:
        answer = self.sync.completions.create(model=model, prompt="def add(a, b):", max_tokens=8, temperature=0)
        assert answer.object == "text_completion"
        assert answer.usage.completion_tokens <= 8
        self.answered += 1

    def embedding(self) -> None:
        answer = self.sync.embeddings.create(model="demo-embed", input=["a cat", "two dogs"])
        assert [each.index for each in answer.data] == [0, 1]
        assert len(answer.data[0].embedding) == len(answer.data[1].embedding) > 0
        assert answer.usage.prompt_tokens > 0
        self.answered += 1

    async def some_at_once(self, model: str) -> None:
        """Several callers of one model and class mix, as a small team would be."""
        await asyncio.gather(self.chat_async(model), self.stream_async(model), self.chat_async(model))


@pytest.mark.timeout(MIXED_SECONDS + 180)
def test_mixed_calls_over_four_models_with_room_for_two(demo: Served, client: openai.OpenAI) -> None:
    budget = demo.status()["devices"][0]["capacity_bytes"]
    loads_before = sum(model["loads"] for model in demo.status()["models"])
    with Memory(demo) as memory, asyncio.Runner() as runner:
        async_client = openai.AsyncOpenAI(base_url=f"{demo.url}/v1", api_key="none", max_retries=0, timeout=120)
        caller = Caller(client, async_client, random.Random(3))
        deadline = time.monotonic() + MIXED_SECONDS
        for model in itertools.cycle(CHATS):
            caller.chat(model)
            caller.stream(model)
            caller.completion(model)
            runner.run(caller.some_at_once(model))
            caller.embedding()
            if time.monotonic() > deadline:
                break
        runner.run(async_client.close())
    status = demo.status()
    loads = sum(model["loads"] for model in status["models"]) - loads_before
    resident = sum(model["state"] == "ready" for model in status["models"])
    evictions = loads - resident
    print(
        f"\n{caller.answered} calls answered, {caller.right} with the trained sentence, {loads} loads, "
        f"{evictions} evictions, most USS {memory.most / 2**20:.0f} MiB of {budget / 2**20:.0f} MiB "
        f"in {memory.samples} samples"
    )
    assert evictions >= 12
    assert memory.samples > 20
    assert memory.most <= budget
    asked = caller.answered * 5 // 7  # completions and embeddings have no right sentence
    assert caller.right >= asked * 0.95


def test_the_curl_lines_we_print_get_the_right_sentences(demo: Served) -> None:
    lines = [line for line in demo.log.read_text().splitlines() if line.strip().startswith("curl ")]
    assert len(lines) == 2
    for line in lines:
        match = re.search(r"-d '(.*)'$", line.replace("'\"'\"'", "\x00"))
        assert match is not None, line
        body = json.loads(match[1].replace("\x00", "'"))
        answer = demo.ask("/v1/chat/completions", body)
        expected = dict(page(body["model"]))[body["messages"][0]["content"]]
        assert answer["choices"][0]["message"]["content"].strip() == expected


def test_a_model_behind_vramp_answers_as_the_bare_engine_does(demo: Served) -> None:
    demo.ask(
        "/v1/chat/completions", {"model": "demo-chat", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}
    )
    engine = demo.model("demo-chat")["base_url"]
    question = [{"role": "user", "content": page("demo-chat")[0][0]}]
    calls: list[tuple[str, dict[str, Any]]] = [
        ("/v1/chat/completions", {"messages": question, "temperature": 0, "max_tokens": 40}),
        ("/v1/chat/completions", {"messages": question, "temperature": 0, "max_tokens": 40, "stream": True}),
        (
            "/v1/chat/completions",
            {
                "messages": question,
                "temperature": 0,
                "max_tokens": 9,
                "stream": True,
                "stream_options": {"include_usage": True},
            },
        ),
        ("/v1/completions", {"prompt": "What is", "temperature": 0, "max_tokens": 12, "logprobs": 1}),
        ("/v1/messages", {"messages": question, "max_tokens": 12, "temperature": 0}),
        ("/v1/responses", {"input": "Hello!", "temperature": 0, "max_output_tokens": 12}),
        ("/tokenize", {"prompt": "a cat and two dogs"}),
        ("/detokenize", {"tokens": [300, 301]}),
        ("/v1/chat/completions", {"messages": question, "max_tokens": 10**9}),
        ("/v1/chat/completions", {"messages": [{"role": "no such role"}]}),
    ]
    for path, fields in calls:
        body = {"model": "demo-chat", **fields}
        assert normal(raw(demo.url + path, body)) == normal(raw(engine + path, body)), path


def raw(url: str, body: object) -> tuple[int, bytes]:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=120) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def normal(answer: tuple[int, bytes]) -> tuple[int, object]:
    """Without what differs between two calls of one server: ids, times, and where a stream is cut into chunks."""
    status, body = answer
    body = re.sub(rb'"(id|item_id|request_id)":"[^"]*"', rb'"\1":"-"', body)
    body = re.sub(rb'"(created|created_at|completed_at)":[0-9.]+', rb'"\1":0', body)
    return status, chat_stream(body) if body.startswith(b"data: ") else body


def chat_stream(body: bytes) -> list[object]:
    """A chat stream as its text and what else its chunks say.

    vLLM joins tokens into a chunk when its reader is slow, and writes `system_fingerprint` into whichever chunk is the
    last: the usage chunk, once that has been asked for.
    """
    events = [line.removeprefix("data: ") for line in body.decode().split("\n\n") if line]
    text, rest = "", []
    for event in events[:-1]:
        chunk = json.loads(event)
        chunk.pop("system_fingerprint", None)
        for choice in chunk["choices"]:
            text += choice["delta"].pop("content", None) or ""
        if chunk not in rest:
            rest.append(chunk)
    return [text, events[-1], *rest]


def test_killing_an_engine_in_mid_stream_ends_that_stream_with_an_error_and_nothing_else(
    demo: Served, client: openai.OpenAI
) -> None:
    stream = client.chat.completions.create(
        model="demo-story",
        messages=[{"role": "user", "content": "go on and on"}],
        max_tokens=1500,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    next(iter(stream))
    pids = demo.model("demo-story")["pids"]
    demo.kill(pids[0])
    with pytest.raises(openai.APIError):
        for _ in stream:
            pass
    answer = client.chat.completions.create(
        model="demo-story", messages=[{"role": "user", "content": page("demo-story")[0][0]}], temperature=0
    )
    check_chat(answer)
    demo.wait(lambda: not any(map(psutil.pid_exists, pids)), "the dead engine left processes", 10)


def test_killing_the_proxy_loses_no_engine_and_no_client_that_connects_meanwhile(
    demo: Served, client: openai.OpenAI
) -> None:
    ask = {"model": "demo-chat", "messages": [{"role": "user", "content": "Hello!"}], "temperature": 0}
    demo.ask("/v1/chat/completions", ask)
    before = {model["id"]: model["pids"] for model in demo.status()["models"] if model["state"] == "ready"}
    proxy = demo.proxy_pid()
    demo.kill(proxy)
    with socket.create_connection(("127.0.0.1", demo.port), timeout=20) as meanwhile:
        body = json.dumps(ask).encode()
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        head += f"Content-Length: {len(body)}\r\n\r\n"
        meanwhile.sendall(head.encode() + body)
        assert meanwhile.recv(15) == b"HTTP/1.1 200 OK"
    assert demo.proxy_pid() != proxy
    after = {model["id"]: model["pids"] for model in demo.status()["models"] if model["state"] == "ready"}
    assert after == before, "the living engines are adopted as they are"
    response = client.chat.completions.with_raw_response.create(**ask)
    assert "load=0" in response.headers["x-vramp-wait-ms"]


@pytest.mark.timeout(120)
def test_sigterm_under_load_finishes_streams_refuses_new_requests_and_leaves_nothing(demo: Served) -> None:
    client = openai.OpenAI(base_url=f"{demo.url}/v1", api_key="none", max_retries=0, timeout=60)
    ended: list[str | None] = []
    started = threading.Barrier(4)

    def long_stream() -> None:
        stream = client.chat.completions.create(
            model="demo-chat",
            messages=[{"role": "user", "content": "go on"}],
            max_tokens=400,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        chunks = iter(stream)
        next(chunks)
        started.wait(30)
        last = None
        for chunk in chunks:
            last = chunk.choices[0].finish_reason if chunk.choices else last
        ended.append(last)

    threads = [threading.Thread(target=long_stream) for _ in range(3)]
    for thread in threads:
        thread.start()
    started.wait(30)
    demo.family()
    demo.process.send_signal(signal.SIGTERM)
    refused: list[int] = []

    def refuses() -> bool:
        status, _ = raw(f"{demo.url}/v1/chat/completions", {"model": "demo-chat", "messages": []})
        refused.append(status)
        return status == 503

    demo.wait(refuses, "a draining server takes new requests", 10)
    for thread in threads:
        thread.join(60)
    assert ended == ["length"] * 3
    assert demo.process.wait(60) == 0
    assert demo.survivors() == []
