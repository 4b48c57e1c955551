from __future__ import annotations

import json

import pytest

from proxy.dialects.call import Dialect
from proxy.dialects.endpoints import dialect_of
from proxy.dialects.envelope import body_for, event_for, read_foreign, retry_headers, status_for
from proxy.errors import CallError, InvalidRequest, RateLimited, Unauthenticated, Unavailable, UpstreamTimedOut


def test_openais_envelope_has_all_four_keys() -> None:
    assert json.loads(body_for(Dialect.OPENAI, InvalidRequest("no", param="n"), "r")) == {
        "error": {"message": "no", "type": "invalid_request_error", "param": "n", "code": None}
    }


@pytest.mark.parametrize(
    ("error", "status", "word"),
    [
        (InvalidRequest("x"), 400, "invalid_request_error"),
        (Unauthenticated("x"), 401, "authentication_error"),
        (RateLimited("x"), 429, "rate_limit_error"),
        (Unavailable("x"), 529, "overloaded_error"),
        (UpstreamTimedOut("x"), 504, "timeout_error"),
        (CallError("x"), 500, "api_error"),
    ],
)
def test_anthropics_envelope_names_the_error_by_its_status(error: CallError, status: int, word: str) -> None:
    assert status_for(Dialect.ANTHROPIC, error) == status
    body = json.loads(body_for(Dialect.ANTHROPIC, error, "r"))
    assert body == {"type": "error", "error": {"type": word, "message": "x"}, "request_id": "r"}


def test_each_dialect_has_its_error_event() -> None:
    error = Unavailable("gone\nnow", code="c")
    assert event_for(Dialect.OPENAI, error, "r").startswith(b'data: {"error":{')
    assert event_for(Dialect.ANTHROPIC, error, "r").startswith(b'event: error\ndata: {"type":"error","error":{')
    assert event_for(Dialect.RESPONSES, error, "r").startswith(b'event: error\ndata: {"type":"error","code":"c"')
    for dialect in Dialect:
        event = event_for(dialect, error, "r")
        assert event.endswith(b"}\n\n")
        assert event.count(b"\n\n") == 1


def test_a_time_to_come_back_is_told_in_three_ways() -> None:
    assert retry_headers(Unavailable("x", retry_after_s=0.2)) == {
        "retry-after": "1", "retry-after-ms": "200", "x-should-retry": "true"
    }  # fmt: skip
    assert retry_headers(InvalidRequest("x")) == {"x-should-retry": "false"}
    assert retry_headers(Unavailable("x")) == {}


def test_whole_foreign_envelopes_are_valid_and_others_are_read_as_far_as_they_go() -> None:
    whole = b'{"error":{"message":"m","type":"t","param":null,"code":404}}'
    seen = read_foreign(Dialect.OPENAI, whole)
    assert (seen.valid, seen.message, seen.type, seen.code) == (True, "m", "t", "404")
    assert read_foreign(Dialect.ANTHROPIC, whole).valid is False
    assert read_foreign(Dialect.ANTHROPIC, whole).message == "m"
    assert read_foreign(Dialect.ANTHROPIC, b'{"type":"error","error":{"type":"t","message":"m"}}').valid
    assert read_foreign(Dialect.OPENAI, b'{"error":{"message":"m"}}').valid is False
    assert read_foreign(Dialect.OPENAI, b'{"detail":[1]}').message == "[1]"


def test_unknown_paths_below_messages_are_anthropics() -> None:
    assert dialect_of("/v1/messages/batches") is Dialect.ANTHROPIC
    assert dialect_of("/v1/messagesx") is Dialect.OPENAI
