from __future__ import annotations

import pytest

from proxy.dialects.call import Call
from proxy.dialects.decode import MOST_SESSION, Defaults, decode, prefix_of
from proxy.dialects.endpoints import ENDPOINTS
from proxy.errors import InvalidRequest
from scheduler.model import LatencyClass


def call(path: str, body: bytes, **headers: str) -> Call:
    return decode(ENDPOINTS[path], {name.replace("_", "-"): value for name, value in headers.items()}, body)


def test_what_deciding_needs_is_read_and_the_body_kept() -> None:
    body = b'{"model":"m","messages":[1,2],"stream":true,"stream_options":{"include_usage":true},"priority":3}'
    read = call("/v1/chat/completions", body, x_vramp_class="batch", x_vramp_deadline_ms="1.5")
    assert read.body is body
    assert (read.model, read.stream, read.wants_usage, read.priority) == ("m", True, True, 3)
    assert (read.latency_class, read.deadline_ms) == (LatencyClass.BATCH, 1.5)
    assert read.prompt_tokens_estimate == len(body) // 4
    assert read.session == ""


def test_bodies_that_begin_alike_have_one_prefix_and_short_ones_have_none() -> None:
    system = b'{"model":"m","messages":[{"role":"system","content":"' + b"You are a coder. " * 80
    assert prefix_of(system + b'"},1]}') == prefix_of(system + b'"},2]}') != 0
    assert prefix_of(system.replace(b"coder", b"poet") + b'"},1]}') not in (0, prefix_of(system + b'"},1]}'))
    assert prefix_of(b'{"model":"m","messages":[]}') == 0


def test_a_session_is_any_text_and_its_beginning_counts() -> None:
    body = b'{"model":"m","messages":[]}'
    assert call("/v1/chat/completions", body, x_vramp_session="agent 7").session == "agent 7"
    assert call("/v1/chat/completions", body, x_vramp_session="x" * 5000).session == "x" * MOST_SESSION


@pytest.mark.parametrize(
    ("path", "fields", "tokens"),
    [
        ("/v1/chat/completions", b'"messages":[],"max_tokens":5', 5),
        ("/v1/chat/completions", b'"messages":[],"max_tokens":5,"max_completion_tokens":7', 7),
        ("/v1/chat/completions", b'"messages":[],"max_tokens":5,"n":3', 15),
        ("/v1/completions", b'"prompt":"x","max_tokens":0', 0),
        ("/v1/responses", b'"input":"x","max_output_tokens":9', 9),
        ("/v1/messages", b'"messages":[],"max_tokens":4', 4),
        ("/v1/embeddings", b'"input":"x"', None),
    ],
)
def test_the_output_limit_is_found_under_its_name_on_each_path(path: str, fields: bytes, tokens: int | None) -> None:
    assert call(path, b'{"model":"m",' + fields + b"}").max_output_tokens == tokens


def test_nulls_are_as_if_absent() -> None:
    read = call("/v1/chat/completions", b'{"model":"m","messages":[],"stream":null,"stream_options":null,"n":null}')
    assert (read.stream, read.wants_usage, read.max_output_tokens) == (False, False, None)


def test_unknown_fields_are_left_to_the_engine() -> None:
    assert call("/v1/chat/completions", b'{"model":"m","messages":[],"top_k":"odd","x":{}}').model == "m"


def test_the_default_model_stands_in_only_where_none_is_named() -> None:
    chat = ENDPOINTS["/v1/chat/completions"]
    read = decode(chat, {}, b'{"messages":[]}', Defaults(model="d"))
    assert (read.model, read.names_model) == ("d", False)
    read = decode(chat, {}, b'{"messages":[],"model":"m"}', Defaults(model="d"))
    assert (read.model, read.names_model) == ("m", True)


@pytest.mark.parametrize(
    ("path", "fields", "lacks"),
    [
        ("/v1/chat/completions", b'"messages":[]', "messages"),
        ("/v1/chat/completions", b'"messages":[ \n ]', "messages"),
        ("/v1/chat/completions", b'"messages":[1]', ""),
        ("/v1/messages", b'"messages":[],"max_tokens":4', "messages"),
        ("/v1/messages/count_tokens", b'"messages":[]', "messages"),
        ("/v1/completions", b'"n":1', "prompt"),
        ("/v1/completions", b'"prompt":null', "prompt"),
        ("/v1/completions", b'"prompt":[ ]', "prompt"),
        ("/v1/completions", b'"prompt":[],"prompt_embeds":null', "prompt"),
        ("/v1/completions", b'"prompt":""', ""),
        ("/v1/completions", b'"prompt":[[]]', ""),
        ("/v1/completions", b'"prompt":{"an engine\'s own":1}', ""),
        ("/v1/completions", b'"prompt_embeds":"gAJ9"', ""),
        ("/v1/embeddings", b'"input":[]', "input"),
        ("/v1/embeddings", b'"input":[[1]]', ""),
        ("/v1/embeddings", b'"input":""', ""),
        ("/v1/embeddings", b'"dimensions":2', "input"),
        ("/v1/embeddings", b'"input":null,"messages":[]', "input"),
        ("/v1/embeddings", b'"messages":[{"role":"user","content":"a"}]', ""),
        ("/v1/embeddings", b'"messages":"an engine\'s own"', ""),
        ("/v1/responses", b'"max_output_tokens":5', "input"),
        ("/v1/responses", b'"input":null,"prompt":null,"instructions":null', "input"),
        ("/v1/responses", b'"input":[ ]', ""),
        ("/v1/responses", b'"input":""', ""),
        ("/v1/responses", b'"input":{"an engine\'s own":1}', ""),
        ("/v1/responses", b'"previous_response_id":"resp_1"', ""),
        ("/v1/responses", b'"previous_input_messages":[{"role":"user"}]', ""),
        ("/v1/responses", b'"conversation":"conv_1"', ""),
        ("/v1/responses", b'"prompt":{"id":"pmpt_1"}', ""),
        ("/v1/responses", b'"instructions":"Say hello."', ""),
        ("/v1/rerank", b'"documents":["a"]', "query"),
        ("/v1/rerank", b'"query":"q"', "documents"),
        ("/v1/rerank", b'"query":"q","documents":[]', "documents"),
        ("/v1/rerank", b'"query":"","documents":{"content":[]}', ""),
        ("/rerank", b'"query":"q","texts":["a"]', ""),
        ("/v1/score", b'"text_2":["a"]', "text_1"),
        ("/v1/score", b'"text_1":"a","text_2":[]', "text_2"),
        ("/v1/score", b'"text_1":"a","text_2":"b"', ""),
        ("/v1/score", b'"queries":"a","documents":["b"]', ""),
        ("/v1/score", b'"queries":["a"],"items":["b"]', ""),
        ("/score", b'"data_1":"a","data_2":"b"', ""),
        ("/tokenize", b'"prompt":null', ""),
    ],
)
@pytest.mark.parametrize("name", [b'"model":"m",', b'"mod\\u0065l":"m",'], ids=["scanned", "decoded whole"])
def test_a_call_without_anything_in_it_says_what_it_lacks(path: str, fields: bytes, lacks: str, name: bytes) -> None:
    assert call(path, b"{" + name + fields + b"}").lacks == lacks


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/embeddings", b'{"model":"m","input":{}}', "input"),
        ("/v1/embeddings", b'{"model":"m","input":"x","dimensions":0}', "dimensions"),
        ("/v1/completions", b'{"model":"m","max_tokens":-1}', "max_tokens"),
        ("/v1/messages", b'{"model":"m"}', "messages"),
        ("/v1/rerank", b'{"model":[]}', "model"),
        ("/tokenize", b'{"model":"m","priority":"high"}', "priority"),
    ],
)
def test_wrong_fields_are_named(path: str, body: bytes, param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        call(path, body)
    assert caught.value.param == param
