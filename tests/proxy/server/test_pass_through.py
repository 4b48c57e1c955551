from __future__ import annotations

import json

from tests.fakes import STREAM, USAGE_CHUNK, chat_answer, stream
from tests.proxy.server.conftest import Proxy


async def test_a_chat_answer_comes_back_byte_for_byte(proxy: Proxy) -> None:
    response = await proxy.chat()
    assert response.status == 200
    assert await response.read() == json.dumps(chat_answer()).encode()
    assert response.headers["x-vramp-model"] == "demo-chat"
    assert response.headers["x-vramp-backend"] == "local/engines"
    assert response.headers["x-vramp-attempts"] == "1"
    assert response.headers["x-request-id"].startswith("req-")


async def test_a_stream_comes_back_without_the_usage_nobody_asked_for(proxy: Proxy) -> None:
    proxy.upstream.behave = stream(STREAM)
    response = await proxy.chat(stream=True)
    assert await response.read() == STREAM.replace(USAGE_CHUNK, b"")
    assert proxy.upstream.last_body["stream_options"] == {"include_usage": True}
