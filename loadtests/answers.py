"""What a well-formed answer is, said once: each check returns what is wrong with it in a few words, None if nothing is.

A load test that only counts statuses calls a proxy fast that loses half of each stream.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

FINISH_REASONS = frozenset({"stop", "length", "tool_calls", "content_filter"})
DONE = b"[DONE]"


def wrong_chat(headers: Mapping[str, str], body: bytes, model: str) -> str | None:
    """A whole chat completion, usage included."""
    answer = _object(headers, body)
    if isinstance(answer, str):
        return answer
    if answer.get("object") != "chat.completion" or answer.get("model") != model:
        return f"a {answer.get('object')} of {answer.get('model')}, asked for a chat.completion of {model}"
    choices = answer.get("choices")
    if not isinstance(choices, list) or len(choices) != 1:
        return "not one choice"
    message = choices[0].get("message") or {}
    if message.get("role") != "assistant" or not isinstance(message.get("content"), str):
        return "no assistant's message"
    if choices[0].get("finish_reason") not in FINISH_REASONS:
        return f"finish_reason {choices[0].get('finish_reason')!r}"
    return _wrong_usage(answer.get("usage"), output=True)


def wrong_embeddings(headers: Mapping[str, str], body: bytes, model: str, inputs: int) -> str | None:
    """A list of vectors: one for each input, in order, all of one length, finite."""
    answer = _object(headers, body)
    if isinstance(answer, str):
        return answer
    if answer.get("object") != "list" or answer.get("model") != model:
        return f"a {answer.get('object')} of {answer.get('model')}, asked for a list of {model}"
    data = answer.get("data")
    if not isinstance(data, list) or [each.get("index") for each in data] != list(range(inputs)):
        return f"not the {inputs} vectors asked for, in their order"
    vectors = [each.get("embedding") or [] for each in data]
    if not vectors[0] or len({len(vector) for vector in vectors}) != 1:
        return "vectors that are empty or of several lengths"
    if not all(isinstance(number, float | int) and math.isfinite(number) for vector in vectors for number in vector):
        return "a vector with something that is no finite number"
    return _wrong_usage(answer.get("usage"), output=False)


class StreamCheck:
    """An event stream, fed line by line; `wrong` after each line and `wrong_end` at its end say what is wrong."""

    def __init__(self, model: str) -> None:
        self._model = model
        self._id: str | None = None
        self._finished = False
        self._usage: Any = None
        self._done = False
        self.pieces = 0  # of content

    def feed(self, line: bytes) -> str | None:
        """One line, its end taken off. Comments and the empty lines between events are always right."""
        if not line or line.startswith(b":"):
            return None
        if not line.startswith(b"data: "):
            return f"a line that is no event: {line[:60]!r}"
        if self._done:
            return "an event after [DONE]"
        if line[6:] == DONE:
            self._done = True
            return None
        return self._chunk(line[6:])

    def _chunk(self, data: bytes) -> str | None:
        try:
            chunk = json.loads(data)
        except ValueError:
            return f"an event that is not JSON: {data[:60]!r}"
        if "error" in chunk:
            return f"an error event: {chunk['error'].get('code')}: {chunk['error'].get('message')}"
        if chunk.get("object") != "chat.completion.chunk" or chunk.get("model") != self._model:
            return f"a {chunk.get('object')} of {chunk.get('model')} in a stream of {self._model}"
        if self._id not in (None, chunk.get("id")):
            return "chunks of two answers in one stream"
        self._id = chunk.get("id")
        self._usage = chunk.get("usage") or self._usage
        return self._choices(chunk.get("choices"))

    def _choices(self, choices: Any) -> str | None:
        if not isinstance(choices, list):
            return "a chunk without choices"
        for choice in choices:
            if self._finished:
                return "output after the finish_reason"
            if (choice.get("delta") or {}).get("content"):
                self.pieces += 1
            reason = choice.get("finish_reason")
            if reason is not None and reason not in FINISH_REASONS:
                return f"finish_reason {reason!r}"
            self._finished = reason is not None
        return None

    def wrong_end(self) -> str | None:
        """What is missing now that the stream is over."""
        if not self._done:
            return "the stream ended without [DONE]"
        if not self._finished or not self.pieces:
            return "a stream without output or without a finish_reason"
        return _wrong_usage(self._usage, output=True)


def _object(headers: Mapping[str, str], body: bytes) -> dict[str, Any] | str:
    if not str(headers.get("content-type", "")).startswith("application/json"):
        return f"content-type {headers.get('content-type')!r}"
    if not headers.get("x-request-id"):
        return "no x-request-id"
    try:
        answer = json.loads(body)
    except ValueError:
        return f"not JSON: {body[:60]!r}"
    return answer if isinstance(answer, dict) else "not a JSON object"


def _wrong_usage(usage: Any, *, output: bool) -> str | None:
    if not isinstance(usage, dict):
        return "no usage"
    asked, said, total = usage.get("prompt_tokens"), usage.get("completion_tokens") or 0, usage.get("total_tokens")
    if not isinstance(asked, int) or asked < 1 or total != asked + said or (output and said < 1):
        return f"usage that does not add up: {usage}"
    return None
