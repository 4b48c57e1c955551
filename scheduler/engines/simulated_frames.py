"""Bodies and stream events of the simulated engine, in the three dialects that vLLM speaks.

A dialect is a class with `whole` (the body of a plain answer), and `opening`, `piece`, `closing` (the frames of a
stream). `Answer` is what they show: nothing here waits, counts or knows of HTTP.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import msgspec


class Answer(msgspec.Struct):
    """One generation. `finish` is stop or length; `created` is Unix time, `wants_usage` the client's include_usage."""

    id: str
    model: str
    created: int
    prompt_tokens: int
    text: str = ""
    count: int = 0
    finish: str = "stop"
    wants_usage: bool = False

    def usage(self) -> dict[str, int]:
        """As OpenAI counts."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "total_tokens": self.prompt_tokens + self.count,
            "completion_tokens": self.count,
        }


def data(body: dict[str, Any], event: str | None = None) -> bytes:
    """One server-sent event."""
    name = f"event: {event}\n" if event else ""
    return f"{name}data: {json.dumps(body, separators=(',', ':'))}\n\n".encode()


class Chat:
    """POST /v1/chat/completions."""

    prefix = "chatcmpl-"

    @staticmethod
    def whole(answer: Answer) -> dict[str, Any]:
        """The plain answer."""
        message = {"role": "assistant", "content": answer.text, "tool_calls": []}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": answer.finish}
        return {**_head(answer, "chat.completion"), "choices": [choice], "usage": answer.usage()}

    @staticmethod
    def opening(answer: Answer) -> Iterator[bytes]:
        """The role, before the first token."""
        yield Chat._chunk(answer, {"role": "assistant", "content": ""}, None)

    @staticmethod
    def piece(answer: Answer, text: str, finish: str | None) -> bytes:
        """One token."""
        return Chat._chunk(answer, {"content": text}, finish)

    @staticmethod
    def closing(answer: Answer) -> Iterator[bytes]:
        """The usage if it was asked for, and the end."""
        yield from _openai_end(answer, "chat.completion.chunk")

    @staticmethod
    def _chunk(answer: Answer, delta: dict[str, str], finish: str | None) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
        return data({**_head(answer, "chat.completion.chunk"), "choices": [choice]})


class Completion:
    """POST /v1/completions."""

    prefix = "cmpl-"

    @staticmethod
    def whole(answer: Answer) -> dict[str, Any]:
        """The plain answer."""
        choice = {"index": 0, "text": answer.text, "logprobs": None, "finish_reason": answer.finish}
        return {**_head(answer, "text_completion"), "choices": [choice], "usage": answer.usage()}

    @staticmethod
    def opening(answer: Answer) -> Iterator[bytes]:
        """Nothing: the first chunk has the first token."""
        yield from ()

    @staticmethod
    def piece(answer: Answer, text: str, finish: str | None) -> bytes:
        """One token."""
        choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": finish}
        return data({**_head(answer, "text_completion"), "choices": [choice]})

    @staticmethod
    def closing(answer: Answer) -> Iterator[bytes]:
        """The usage if it was asked for, and the end."""
        yield from _openai_end(answer, "text_completion")


class Responses:
    """POST /v1/responses: one message of text, no tools."""

    prefix = "resp_"

    @staticmethod
    def whole(answer: Answer, status: str = "completed") -> dict[str, Any]:
        """The plain answer, and what the stream's first and last event carry."""
        done = status == "completed"
        usage = {
            "input_tokens": answer.prompt_tokens,
            "output_tokens": answer.count,
            "total_tokens": answer.prompt_tokens + answer.count,
        }
        return {
            "id": answer.id,
            "object": "response",
            "created_at": answer.created,
            "status": ("incomplete" if answer.finish == "length" else status) if done else status,
            "model": answer.model,
            "output": [Responses._item(answer)] if done else [],
            "usage": usage if done else None,
        }

    @staticmethod
    def opening(answer: Answer) -> Iterator[bytes]:
        """The response, its one item, the item's one part."""
        yield Responses._event("response.created", response=Responses.whole(answer, "in_progress"))
        item = {**Responses._item(answer), "content": [], "status": "in_progress"}
        yield Responses._event("response.output_item.added", output_index=0, item=item)
        yield Responses._event("response.content_part.added", **Responses._where(answer), part=Responses._part(""))

    @staticmethod
    def piece(answer: Answer, text: str, finish: str | None) -> bytes:
        """One token."""
        return Responses._event("response.output_text.delta", **Responses._where(answer), delta=text)

    @staticmethod
    def closing(answer: Answer) -> Iterator[bytes]:
        """Part, item and response again, now whole."""
        where = Responses._where(answer)
        yield Responses._event("response.output_text.done", **where, text=answer.text)
        yield Responses._event("response.content_part.done", **where, part=Responses._part(answer.text))
        yield Responses._event("response.output_item.done", output_index=0, item=Responses._item(answer))
        last = "response.incomplete" if answer.finish == "length" else "response.completed"
        yield Responses._event(last, response=Responses.whole(answer))

    @staticmethod
    def _event(kind: str, **fields: Any) -> bytes:
        return data({"type": kind, **fields}, event=kind)

    @staticmethod
    def _where(answer: Answer) -> dict[str, Any]:
        return {"item_id": f"msg_{answer.id}", "output_index": 0, "content_index": 0}

    @staticmethod
    def _part(text: str) -> dict[str, Any]:
        return {"type": "output_text", "text": text, "annotations": []}

    @staticmethod
    def _item(answer: Answer) -> dict[str, Any]:
        content = [Responses._part(answer.text)]
        identity = {"id": f"msg_{answer.id}", "type": "message", "role": "assistant"}
        return {**identity, "status": "completed", "content": content}


class Messages:
    """POST /v1/messages, Anthropic's dialect."""

    prefix = "chatcmpl-"

    @staticmethod
    def whole(answer: Answer) -> dict[str, Any]:
        """The plain answer."""
        content = [{"type": "text", "text": answer.text}]
        return {
            **Messages._head(answer),
            "content": content,
            "stop_reason": Messages._reason(answer),
            "usage": {"input_tokens": answer.prompt_tokens, "output_tokens": answer.count},
        }

    @staticmethod
    def opening(answer: Answer) -> Iterator[bytes]:
        """The message and its one block, empty."""
        usage = {"input_tokens": answer.prompt_tokens, "output_tokens": 0}
        message = {**Messages._head(answer), "content": [], "stop_reason": None, "usage": usage}
        yield data({"type": "message_start", "message": message}, "message_start")
        block = {"type": "text", "text": ""}
        yield data({"type": "content_block_start", "index": 0, "content_block": block}, "content_block_start")

    @staticmethod
    def piece(answer: Answer, text: str, finish: str | None) -> bytes:
        """One token."""
        delta = {"type": "text_delta", "text": text}
        return data({"type": "content_block_delta", "index": 0, "delta": delta}, "content_block_delta")

    @staticmethod
    def closing(answer: Answer) -> Iterator[bytes]:
        """Why it stopped, the usage, the end."""
        yield data({"type": "content_block_stop", "index": 0}, "content_block_stop")
        delta = {"stop_reason": Messages._reason(answer), "stop_sequence": None}
        usage = {"input_tokens": answer.prompt_tokens, "output_tokens": answer.count}
        yield data({"type": "message_delta", "delta": delta, "usage": usage}, "message_delta")
        yield data({"type": "message_stop"}, "message_stop")

    @staticmethod
    def _head(answer: Answer) -> dict[str, Any]:
        return {
            "id": answer.id,
            "type": "message",
            "role": "assistant",
            "model": answer.model,
            "stop_sequence": None,
        }

    @staticmethod
    def _reason(answer: Answer) -> str:
        return "max_tokens" if answer.finish == "length" else "end_turn"


Dialect = type[Chat] | type[Completion] | type[Responses] | type[Messages]


def _head(answer: Answer, kind: str) -> dict[str, Any]:
    return {"id": answer.id, "object": kind, "created": answer.created, "model": answer.model}


def _openai_end(answer: Answer, kind: str) -> Iterator[bytes]:
    if answer.wants_usage:
        yield data({**_head(answer, kind), "choices": [], "usage": answer.usage()})
    yield b"data: [DONE]\n\n"
