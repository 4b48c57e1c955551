"""The paths a model can be called on, as data. A new path is one line here and, if its body is new, one in `decode`."""

from __future__ import annotations

from proxy.dialects.call import Dialect, Endpoint, Task

ENDPOINTS: dict[str, Endpoint] = {
    endpoint.path: endpoint
    for endpoint in (
        Endpoint("/v1/chat/completions", Dialect.OPENAI, Task.GENERATE, "/v1/chat/completions"),
        Endpoint("/v1/completions", Dialect.OPENAI, Task.GENERATE, "/v1/completions"),
        Endpoint("/v1/responses", Dialect.RESPONSES, Task.GENERATE, "/v1/responses"),
        Endpoint("/v1/messages", Dialect.ANTHROPIC, Task.GENERATE, "/v1/messages"),
        Endpoint(
            "/v1/messages/count_tokens", Dialect.ANTHROPIC, Task.GENERATE, "/v1/messages/count_tokens", streams=False
        ),
        Endpoint("/v1/embeddings", Dialect.OPENAI, Task.EMBED, "/v1/embeddings", streams=False),
        Endpoint("/v1/rerank", Dialect.OPENAI, Task.EMBED, "/v1/rerank", streams=False),
        Endpoint("/rerank", Dialect.OPENAI, Task.EMBED, "/rerank", streams=False),
        Endpoint("/v1/score", Dialect.OPENAI, Task.EMBED, "/v1/score", streams=False),
        Endpoint("/score", Dialect.OPENAI, Task.EMBED, "/score", streams=False),
        Endpoint("/tokenize", Dialect.OPENAI, Task.ANY, "/tokenize", streams=False),
        Endpoint("/detokenize", Dialect.OPENAI, Task.ANY, "/detokenize", streams=False),
    )
}

# Where OpenAI's `stream_options` exists. Elsewhere usage is part of the stream anyway.
WITH_STREAM_OPTIONS = frozenset({"/v1/chat/completions", "/v1/completions"})

# Where vLLM takes a `priority` of ours.
WITH_PRIORITY = frozenset({"/v1/chat/completions", "/v1/completions"})


def dialect_of(path: str) -> Dialect:
    """Whose envelope an error on this path wears, known paths or not."""
    endpoint = ENDPOINTS.get(path)
    if endpoint is not None:
        return endpoint.dialect
    return Dialect.ANTHROPIC if path.startswith("/v1/messages/") else Dialect.OPENAI
