import json
import re
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.ext.conftest import load

CHUNK = b'data: {"id":"x","choices":[{"index":0,"delta":{"content":"hello"},"finish_reason":null}],"usage":null}\n\n'
LAST = b'data: {"id":"x","choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\n'
USAGE = b'data: {"id":"x","choices":[],"usage":{"prompt_tokens":7,"completion_tokens":2}}\n\n'
DONE = b"data: [DONE]\n\n"


def run(twins, stream, cuts=(), **settings):
    """Feed a stream cut at these places: the scanner, and what it passed on."""
    scanner = twins.EventScanner(**settings)
    passed = [scanner.feed(stream[a:b]) for a, b in pairwise([0, *sorted(cuts), len(stream)])]
    return scanner, b"".join(passed) + scanner.flush()


def facts(scanner):
    names = ("events", "output_events", "usage", "first_usage", "finish_reason", "error", "done", "oversized")
    return {name: getattr(scanner, name) for name in names}


def test_ordinary_data_goes_through_as_the_very_same_object(twins):
    scanner = twins.EventScanner(withhold_usage=True)
    data = CHUNK * 3
    assert scanner.feed(data) is data
    assert (scanner.events, scanner.output_events) == (3, 3)


def test_a_whole_chat_stream_is_understood(twins):
    scanner, passed = run(twins, b": hello\n\n" + CHUNK * 4 + LAST + USAGE + DONE)
    assert passed == b": hello\n\n" + CHUNK * 4 + LAST + USAGE + DONE
    assert facts(scanner) == {
        "events": 7, "output_events": 5, "usage": b'{"prompt_tokens":7,"completion_tokens":2}',
        "first_usage": b'{"prompt_tokens":7,"completion_tokens":2}', "finish_reason": "stop", "error": None,
        "done": True, "oversized": False,
    }  # fmt: skip


def test_the_usage_chunk_nobody_asked_for_is_withheld_and_still_counted(twins):
    scanner, passed = run(twins, CHUNK + USAGE + DONE, withhold_usage=True)
    assert passed == CHUNK + DONE
    assert scanner.usage == b'{"prompt_tokens":7,"completion_tokens":2}'
    assert (scanner.events, scanner.output_events) == (3, 1)


def test_usage_beside_choices_is_noted_and_not_withheld(twins):
    stream = CHUNK.replace(b'"usage":null', b'"usage": {"total_tokens": 3}')
    scanner, passed = run(twins, stream, withhold_usage=True)
    assert passed == stream
    assert (scanner.usage, scanner.output_events) == (b'{"total_tokens": 3}', 1)


def test_empty_choices_without_usage_are_passed_on(twins):
    stream = b'data: {"choices":[],"prompt_filter_results":[{"a":{}}]}\n\n'
    scanner, passed = run(twins, stream, withhold_usage=True)
    assert passed == stream
    assert (scanner.events, scanner.output_events) == (1, 0)


def test_a_partial_event_waits_for_its_end(twins):
    scanner = twins.EventScanner()
    assert scanner.feed(CHUNK + CHUNK[:20]) == CHUNK
    assert scanner.feed(CHUNK[20:-1]) == b""
    assert scanner.feed(CHUNK[-1:]) == CHUNK
    assert scanner.events == 2


def test_a_comment_goes_at_once_because_it_is_a_sign_of_life(twins):
    scanner = twins.EventScanner()
    assert scanner.feed(b": still loading\n") == b": still loading\n"
    assert scanner.feed(b"data: x\n: in between\n") == b""
    assert scanner.feed(b"\n") == b"data: x\n: in between\n\n"


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
def test_all_three_line_ends_end_lines_at_any_split(twins, end):
    stream = (b"\xef\xbb\xbf: hi\n\n" + CHUNK * 2 + USAGE + DONE).replace(b"\n", end)
    whole, passed = run(twins, stream, withhold_usage=True)
    assert (whole.events, whole.output_events, whole.done) == (4, 2, True)
    assert passed == stream.replace(USAGE.replace(b"\n", end), b"")
    for cut in range(1, len(stream)):
        assert run(twins, stream, (cut,), withhold_usage=True)[1] == passed
    bytewise, passed_bytewise = run(twins, stream, range(1, len(stream)), withhold_usage=True)
    assert (facts(bytewise), passed_bytewise) == (facts(whole), passed)


@pytest.mark.parametrize(
    "line",
    [b"data: [DONE] \n\n", b"data: x[DONE]\n\n", b": [DONE]\n\n", b"data: [DONE]\ndata:\n\n", b"data:  [DONE]\n\n",
     b'data: {"choices":[{"delta":{"content":"data: [DONE]"}}]}\n\n', b"event: [DONE]\n\n", b"datax: [DONE]\n\n"],
)  # fmt: skip
def test_done_counts_only_as_a_whole_line(twins, line):
    assert not run(twins, line)[0].done
    assert run(twins, line + b"data:[DONE]\n\n")[0].done
    assert run(twins, line + b"data: [DONE]")[0].done  # the end of the stream ends the line


def test_text_that_talks_of_usage_is_not_usage(twins):
    trap = json.dumps({"choices": [{"delta": {"content": '"usage":{"a":1},"error":{"b":2},"finish_reason":"x"'}}]})
    nested = b'{"choices":[{"delta":{"tool":{"usage":{"a":1},"error":{"b":2}}}}]}'
    scanner, _ = run(twins, f"data: {trap}\n\n".encode() + b"data: " + nested + b"\n\n", withhold_usage=True)
    assert facts(scanner) | {"events": 2, "output_events": 2} == facts(twins.EventScanner()) | {
        "events": 2, "output_events": 2,
    }  # fmt: skip
    assert scanner.output_events == 2


def test_an_event_of_several_data_lines_is_joined(twins):
    scanner, _ = run(twins, b'data: {"choices":[],\nid: 7\ndata:"usage":\ndata: {"a":1}}\n\n', withhold_usage=True)
    assert scanner.usage == b'{"a":1}'
    assert scanner.events == 1


def test_a_byte_order_mark_belongs_to_no_line(twins):
    for lines in (
        b'data: {"choices":[],\ndata: "usage":{"a":1}}\n\n',
        b': hi\ndata: {"choices":[],\ndata: "usage":{"a":1}}\n\n',
    ):
        scanner, passed = run(twins, b"\xef\xbb\xbf" + lines)
        assert (scanner.usage, passed) == (b'{"a":1}', b"\xef\xbb\xbf" + lines)
    later, _ = run(twins, b'\n\n\xef\xbb\xbfdata: {\ndata: {"choices":[],\ndata:"usage":{"a":1}}\n\n')
    assert later.usage == b'{"a":1}'  # a mark that is not at the start makes its line a field nobody knows


@pytest.mark.parametrize(
    ("stream", "error"),
    [
        (b'data: {"error":{"message":"m","code":429}}\n\n', b'{"message":"m","code":429}'),
        (b'data: {"error": "overloaded"}\n\n', b'"overloaded"'),
        (b'event: error\ndata: {"type":"error","error":{"type":"overloaded_error"}}\n\n',
         b'{"type":"overloaded_error"}'),
        (b"event: error\ndata: no json at all\n\n", b"no json at all"),
        (b'data: {"type":"error","code":"x","message":"m"}\n\n', b'{"type":"error","code":"x","message":"m"}'),
        (b'event: response.failed\ndata: {"type":"response.failed","response":{"error":{"code":"x"},"usage":null}}\n\n',
         b'{"code":"x"}'),
        (b'data: {"choices":[],"error":null}\n\n', None),
        (b'data: {"error":""}\n\n', None),
    ],
)  # fmt: skip
def test_an_error_inside_the_stream_is_found(twins, stream, error):
    scanner, passed = run(twins, stream)
    assert (scanner.error, passed, scanner.output_events) == (error, stream, 0)


def test_an_anthropic_stream_is_understood(twins):
    events = [
        ("message_start", '{"type":"message_start","message":{"usage":{"input_tokens":25,"output_tokens":1}}}'),
        ("content_block_start", '{"type":"content_block_start","content_block":{"type":"text","text":""}}'),
        ("ping", '{"type": "ping"}'),
        ("content_block_delta", '{"type":"content_block_delta","delta":{"type":"text_delta","text":"Hi"}}'),
        ("content_block_stop", '{"type":"content_block_stop","index":0}'),
        ("message_delta",
         '{"type":"message_delta","delta":{"stop_reason":"end_turn"},"usage":{"output_tokens":15}}'),
        ("message_stop", '{"type":"message_stop"}'),
    ]  # fmt: skip
    stream = "".join(f"event: {name}\ndata: {data}\n\n" for name, data in events).encode()
    scanner, passed = run(twins, stream, withhold_usage=True)
    assert passed == stream
    assert (scanner.events, scanner.output_events, scanner.finish_reason) == (7, 1, "end_turn")
    assert scanner.first_usage == b'{"input_tokens":25,"output_tokens":1}'
    assert scanner.usage == b'{"output_tokens":15}'


def test_a_responses_stream_is_understood(twins):
    events = [
        '{"type":"response.created","response":{"usage":null,"error":null}}',
        '{"type":"response.output_text.delta","delta":"Hi"}',
        '{"type":"response.completed","response":{"status":"completed","usage":{"input_tokens":9}}}',
    ]
    stream = "".join(f"event: {json.loads(data)['type']}\ndata: {data}\n\n" for data in events).encode()
    scanner, passed = run(twins, stream, withhold_usage=True)
    assert passed == stream
    assert (scanner.events, scanner.output_events, scanner.usage) == (3, 1, b'{"input_tokens":9}')
    assert scanner.error is None


def test_a_gemini_stream_is_understood(twins):
    chunk = b'{"candidates": [{"content": {}, "finishReason": "STOP"}],"usageMetadata": {"promptTokenCount": 4}}'
    stream = b"data: " + chunk + b"\r\n\r\n"
    scanner, _ = run(twins, stream)
    assert (scanner.output_events, scanner.finish_reason) == (1, "STOP")
    assert scanner.usage == b'{"promptTokenCount": 4}'


def test_a_line_that_never_ends_is_passed_on_and_not_kept(twins):
    scanner = twins.EventScanner(max_event_bytes=1000)
    fed = [b"data: " + b"x" * 900] + [b"y" * 900] * 50
    passed = [scanner.feed(data) for data in fed]
    assert scanner.oversized
    assert b"".join(passed) == b"".join(fed)
    assert repr(scanner) == "<EventScanner 0 events, 0 with output, 0 bytes pending>"
    assert scanner.feed(b"\n\n" + CHUNK) == b"\n\n" + CHUNK
    assert (scanner.events, scanner.output_events) == (2, 2)


def test_an_event_of_just_the_limit_is_looked_into_and_one_byte_more_is_not(twins):
    for extra, usage in [(0, b'{"prompt_tokens":7,"completion_tokens":2}'), (1, None)]:
        stream = USAGE[:-2] + b" " * extra + b"\n\n"
        limit = len(USAGE) - 1  # the empty line does not count
        for cuts in [(), (30,), (len(stream) - 1,), range(1, len(stream))]:
            scanner, passed = run(twins, stream, cuts, max_event_bytes=limit, withhold_usage=True)
            assert (scanner.usage, scanner.oversized, scanner.events) == (usage, bool(extra), 1)
            assert passed == (stream if extra else b"")


def test_one_byte_at_a_time_is_linear_not_quadratic(twins):
    scanner = twins.EventScanner()
    for _ in range(200_000):
        scanner.feed(b"x")
    assert scanner.flush() == b"x" * 200_000


@pytest.mark.parametrize("end", [b"\n", b"\r", b"\r\n"])
def test_a_megabyte_of_empty_lines_is_linear_for_every_line_end(twins, end):
    scanner = twins.EventScanner()
    stream = end * (1 << 20 if twins.kind == "native" else 1 << 16)
    assert scanner.feed(stream) is stream


def test_after_flush_a_new_stream_begins(twins):
    scanner = twins.EventScanner()
    scanner.feed(CHUNK[:-10])
    assert scanner.flush() == CHUNK[:-10]
    assert scanner.flush() == b""
    assert scanner.feed(CHUNK) is not None
    assert scanner.events == 2


@pytest.mark.parametrize("bad", ["text", bytearray(b"x"), None, memoryview(b"x")])
def test_only_bytes_are_fed(twins, bad):
    with pytest.raises(TypeError):
        twins.EventScanner().feed(bad)
    for size in (0, -1):
        with pytest.raises(ValueError, match="max_event_bytes"):
            twins.EventScanner(max_event_bytes=size)


# -- against a reference that knows no streaming and decodes everything


def reference(stream, *, withhold_usage):
    """The events of a whole stream, the slow and simple way: what is passed on, and the facts."""
    found = {"events": 0, "output_events": 0, "usage": None, "finish_reason": None, "done": False, "passed": b""}
    event, fields = [stream[:3] if stream.startswith(b"\xef\xbb\xbf") else b""], []
    for line in re.findall(rb"[^\r\n]*(?:\r\n|\r|\n)|[^\r\n]+\Z", stream.removeprefix(b"\xef\xbb\xbf")):
        event.append(line)
        text = line.rstrip(b"\r\n")
        if text and not text.startswith(b":"):
            fields.append(text)
        if not text:
            _reference_event(found, b"".join(event), fields, withhold_usage=withhold_usage)
            event, fields = [], []
    _reference_event(found, b"".join(event), fields, withhold_usage=withhold_usage)
    return found


def _reference_event(found, event, fields, *, withhold_usage):
    data = [field[5:].removeprefix(b" ") for field in fields if field == b"data" or field.startswith(b"data:")]
    withhold = False
    if data:
        payload = b"\n".join(data)
        found["events"] += 1
        found["done"] |= payload == b"[DONE]"
        try:
            decoded = json.loads(payload)
        except ValueError:
            decoded = None
        if isinstance(decoded, dict):
            withhold = _reference_chunk(found, decoded) and withhold_usage
    if withhold:
        comments = re.match(rb"(?:\xef\xbb\xbf)?(?::[^\r\n]*(?:\r\n|\r|\n))+", event)
        event = comments.group() if comments else b""
    found["passed"] += event


def _reference_chunk(found, chunk):
    choices, usage = chunk.get("choices"), chunk.get("usage")
    found["output_events"] += bool(choices)
    if isinstance(usage, dict):
        found["usage"] = usage
    for choice in choices or []:
        if choice.get("finish_reason"):
            found["finish_reason"] = choice["finish_reason"]
            break
    return isinstance(usage, dict) and choices == []


tricky = ['"usage":{"a":1}', "data: [DONE]\n\n", '\\"usage":{}', "é\u2028😀"]
texts = st.one_of(st.text(max_size=12), st.sampled_from(tricky))
usages = st.one_of(st.none(), st.dictionaries(st.sampled_from(["prompt_tokens", "total"]), st.integers(0, 99)))
choice_lists = st.lists(
    st.fixed_dictionaries(
        {"delta": st.dictionaries(st.sampled_from(["content", "usage", "x"]), texts, max_size=2)},
        optional={"finish_reason": st.sampled_from([None, "stop", "length"])},
    ),
    max_size=2,
)
chunks = st.fixed_dictionaries({"choices": choice_lists}, optional={"usage": usages, "id": texts})
separators = st.sampled_from([(",", ":"), (", ", ": "), (" , ", " : ")])
ends = st.sampled_from([b"\n", b"\r", b"\r\n"])


@st.composite
def chunk_events(draw):
    text = json.dumps(draw(chunks), separators=draw(separators), ensure_ascii=draw(st.booleans())).encode()
    end = draw(ends)
    return b"data:" + draw(st.sampled_from([b"", b" "])) + text + end + draw(st.one_of(st.just(end), ends))


oddities = st.sampled_from(
    [b": ping\n", b": ping\r\r", b"data: [DONE]\n\n", b"event: x\n", b"id: 4\r\n", b"\r", b"\n", b"data\n", b"data:",
     b"\xef\xbb\xbf", b"retry: 1\n\n", b"data: {", b"}\n\n", b"\xff\xfe", b'"usage":{"a":1}']
)  # fmt: skip
streams = st.lists(st.one_of(chunk_events(), chunk_events(), oddities, st.binary(max_size=6)), max_size=8).map(b"".join)


@given(stream=streams, data=st.data(), withhold_usage=st.booleans())
def test_random_streams_in_random_splits_read_as_the_reference_reads_them(twins, stream, data, withhold_usage):
    cuts = data.draw(st.lists(st.integers(0, len(stream)), max_size=8))
    scanner, passed = run(twins, stream, cuts, withhold_usage=withhold_usage)
    expected = reference(stream, withhold_usage=withhold_usage)
    usage = json.loads(scanner.usage) if scanner.usage else None
    assert passed == expected["passed"]
    assert (scanner.events, scanner.done, usage) == (expected["events"], expected["done"], expected["usage"])
    assert scanner.finish_reason == expected["finish_reason"]


@pytest.mark.native
@given(stream=st.one_of(streams, st.binary(max_size=200)), data=st.data(), limit=st.integers(1, 60))
def test_both_twins_answer_every_feed_alike(stream, data, limit):
    scanners = [load(kind).EventScanner(True, limit) for kind in ("pure", "native")]
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=10)))
    for first, last in pairwise([0, *cuts, len(stream)]):
        answers = [scanner.feed(stream[first:last]) for scanner in scanners]
        assert answers[0] == answers[1]
        assert facts(scanners[0]) == facts(scanners[1])
        assert repr(scanners[0]) == repr(scanners[1])
    assert scanners[0].flush() == scanners[1].flush()
    assert facts(scanners[0]) == facts(scanners[1])


@given(stream=st.one_of(streams, st.binary(max_size=200)), data=st.data(), limit=st.integers(1, 60))
def test_the_facts_do_not_depend_on_the_split_even_at_the_size_limit(twins, stream, data, limit):
    cuts = data.draw(st.lists(st.integers(0, len(stream)), max_size=10))
    whole, passed = run(twins, stream, max_event_bytes=limit, withhold_usage=True)
    split, passed_split = run(twins, stream, cuts, max_event_bytes=limit, withhold_usage=True)
    assert facts(split) == facts(whole)
    assert passed_split == passed


@given(stream=streams, data=st.data())
def test_nothing_pending_exceeds_the_limit(twins, stream, data):
    scanner = twins.EventScanner(max_event_bytes=20)
    for piece in re.findall(b"(?s).{1,%d}" % data.draw(st.integers(1, 30)), stream):
        scanner.feed(piece)
        assert int(re.search(r"(\d+) bytes pending", repr(scanner)).group(1)) <= 20
