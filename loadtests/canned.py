"""The bytes of the benchmark: requests, and the answers of the fake upstream. Made once, sent many times.

The model's name says what the upstream does, so that a proxy needs no setting for it: `gpt-4o-mini` answers at once,
`sse-64-20` streams 64 events, one each 20 ms, `sse-60-2000` 60 events, one each 2 s.
"""

from __future__ import annotations

import json

KEY = "sk-bench"
PATH = "/v1/chat/completions"
PLAIN, PACED, SLOW = "gpt-4o-mini", "sse-64-20", "sse-60-2000"
SMALL_BYTES, LARGE_BYTES = 400, 32 * 1024  # of the prompt
LAST = b"0\r\n\r\n"  # the chunk that ends a chunked body; no event of ours ends like it
_SENTENCE = "A proxy that has nothing to say should add nothing to what is said, least of all time. "
_USAGE = {"prompt_tokens": 101, "completion_tokens": 64, "total_tokens": 165}


def request(model: str, prompt_bytes: int = SMALL_BYTES, *, stream: bool = False) -> bytes:
    """A whole POST with its head."""
    prompt = (_SENTENCE * (prompt_bytes // len(_SENTENCE) + 1))[:prompt_bytes]
    fields = {"model": model, "messages": [{"role": "user", "content": prompt}], "max_tokens": 256, "stream": stream}
    body = json.dumps(fields).encode()
    head = (
        f"POST {PATH} HTTP/1.1\r\nHost: bench\r\nAuthorization: Bearer {KEY}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


def plain_answer() -> bytes:
    """A chat completion of about 700 bytes with its head."""
    message = {"role": "assistant", "content": _SENTENCE * 5}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}
    fields = {"id": "chatcmpl-bench", "object": "chat.completion", "created": 1, "model": PLAIN, "choices": [choice]}
    body = json.dumps(fields | {"usage": _USAGE}).encode()
    head = f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


STREAM_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


def _event(choices: list[object], **more: object) -> bytes:
    fields = {"id": "chatcmpl-bench", "object": "chat.completion.chunk", "created": 1, "model": PLAIN}
    return b"data: " + json.dumps(fields | {"choices": choices} | more).encode() + b"\n\n"


def _chunked(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


EVENT = _chunked(_event([{"index": 0, "delta": {"content": " token"}, "finish_reason": None}]))
_FINISH = _chunked(_event([{"index": 0, "delta": {}, "finish_reason": "stop"}]))
_END = _chunked(b"data: [DONE]\n\n") + LAST
STREAM_END = _FINISH + _END
STREAM_END_WITH_USAGE = _FINISH + _chunked(_event([], usage=_USAGE)) + _END


def numbered(number: int) -> bytes:
    """The event that says its number in its stream, in six digits: `EVENT`'s length."""
    return EVENT.replace(b" token", b"%06d" % number)


def events_of(model: str) -> int:
    """How many `data:` lines a client sees of this model's stream: its tokens, the finish reason, [DONE]."""
    return int(model.split("-")[1]) + 2
