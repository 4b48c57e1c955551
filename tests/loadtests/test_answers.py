"""The load test's own eyes: a whole answer passes, and every way of being broken is seen."""

from __future__ import annotations

import json
from typing import Any

import pytest

from loadtests.answers import StreamCheck, wrong_chat, wrong_embeddings
from loadtests.prompts import questions_for

HEADERS = {"content-type": "application/json", "x-request-id": "req-1"}
USAGE = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}


def chat(**changes: Any) -> bytes:
    message = {"role": "assistant", "content": "Hello."}
    choices = [{"index": 0, "message": message, "finish_reason": "stop"}]
    return json.dumps(
        {"object": "chat.completion", "model": "m", "choices": choices, "usage": USAGE} | changes
    ).encode()


def test_a_whole_chat_answer_is_right() -> None:
    assert wrong_chat(HEADERS, chat(), "m") is None


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (chat()[:-1], "not JSON"),
        (chat(model="other"), "of other"),
        (chat(choices=[]), "not one choice"),
        (chat(choices=[{"message": {"role": "assistant", "content": None}, "finish_reason": "stop"}]), "message"),
        (chat(choices=[{"message": {"role": "assistant", "content": ""}, "finish_reason": None}]), "finish_reason"),
        (chat(usage=None), "no usage"),
        (chat(usage=USAGE | {"total_tokens": 6}), "add up"),
        (chat(usage=USAGE | {"completion_tokens": 0, "total_tokens": 3}), "add up"),
        (b"[]", "not a JSON object"),
    ],
)
def test_a_broken_chat_answer_is_seen(body: bytes, says: str) -> None:
    assert says in (wrong_chat(HEADERS, body, "m") or "")


def test_an_answer_of_another_type_or_without_a_request_id_is_seen() -> None:
    assert "content-type" in (wrong_chat(HEADERS | {"content-type": "text/html"}, chat(), "m") or "")
    assert "x-request-id" in (wrong_chat({"content-type": "application/json"}, chat(), "m") or "")


def embeddings(*vectors: Any, order: tuple[int, ...] | None = None) -> bytes:
    data = [
        {"index": at, "embedding": vector} for at, vector in zip(order or range(len(vectors)), vectors, strict=True)
    ]
    return json.dumps(
        {"object": "list", "model": "m", "data": data, "usage": {"prompt_tokens": 3, "total_tokens": 3}}
    ).encode()


def test_whole_embeddings_are_right() -> None:
    assert wrong_embeddings(HEADERS, embeddings([0.1, -1], [0.2, 3.5]), "m", 2) is None


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (embeddings([0.1]), "2 vectors"),
        (embeddings([0.1], [0.2], order=(1, 0)), "order"),
        (embeddings([0.1], [0.2, 0.3]), "several lengths"),
        (embeddings([], []), "empty"),
        (embeddings([0.1], [float("nan")]), "finite"),
        (embeddings([0.1], ["x"]), "finite"),
    ],
)
def test_broken_embeddings_are_seen(body: bytes, says: str) -> None:
    assert says in (wrong_embeddings(HEADERS, body, "m", 2) or "")


def chunk(content: str | None = None, finish: str | None = None, **changes: Any) -> bytes:
    choices = [{"index": 0, "delta": {"content": content} if content else {}, "finish_reason": finish}]
    fields = {"id": "c", "object": "chat.completion.chunk", "model": "m", "choices": choices} | changes
    return b"data: " + json.dumps(fields).encode()


WHOLE = [b": vramp loading", b"", chunk("Hel"), b"", chunk("lo."), chunk(None, "stop")]
WHOLE += [chunk(choices=[], usage=USAGE), b"data: [DONE]", b""]


def first_wrong(lines: list[bytes]) -> str | None:
    check = StreamCheck("m")
    for line in lines:
        if wrong := check.feed(line):
            return wrong
    return check.wrong_end()


def test_a_whole_stream_is_right_and_its_pieces_are_counted() -> None:
    check = StreamCheck("m")
    assert [check.feed(line) for line in WHOLE] == [None] * len(WHOLE)
    assert check.wrong_end() is None
    assert check.pieces == 2


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        ([], "without [DONE]"),
        (WHOLE[:-2], "without [DONE]"),
        ([b"data: [DONE]"], "without output"),
        (WHOLE[:2] + WHOLE[5:], "without output"),
        (WHOLE[:5] + WHOLE[6:], "finish_reason"),
        (WHOLE[:6] + WHOLE[7:], "no usage"),
        ([*WHOLE, chunk("more")], "after [DONE]"),
        ([chunk("x", "stop"), chunk("more")], "after the finish_reason"),
        ([chunk("x"), chunk("y", id="other")], "two answers"),
        ([chunk("x", model="other")], "of other"),
        ([b"data: {"], "not JSON"),
        ([b"event: x"], "no event"),
        ([b'data: {"error": {"code": "boom", "message": "it broke"}}'], "boom: it broke"),
        ([chunk("x", "because")], "because"),
    ],
)
def test_a_broken_stream_is_seen(lines: list[bytes], says: str) -> None:
    assert says in (first_wrong(lines) or "")


def test_a_demo_model_is_asked_what_is_on_its_page_and_any_other_what_is_on_all() -> None:
    own = questions_for("demo-code")
    assert "Write hello world." in own
    everything = questions_for("llama")
    assert set(own) < set(everything)
    assert "Tell me a story." in everything
    assert set(questions_for("demo-embed")) == set(everything)
