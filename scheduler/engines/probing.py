"""The one question that tells whether an engine serves: a real request for one token, or one embedding.

`/health` alone does not tell: it is 200 on engines that hang, sleep or drain.
"""

from __future__ import annotations

from typing import Any

import aiohttp

from scheduler.engines.base import ProbeError

QUOTED = 300  # characters of an engine's refusal that are shown
NO_SUCH_PATH = (404, 405, 501)


async def probe_openai(
    session: aiohttp.ClientSession, base_url: str, model: str, task: str, headers: dict[str, str] | None = None
) -> bool:
    """True: it answered a real request. False: not yet. Raises ProbeError when it refuses what every engine can do.

    `task` is generate or embed. An engine without `/health` is asked for `/v1/models`; one that refuses chat,
    for instance for want of a chat template, for a plain completion.
    """
    try:
        if not await _is_up(session, base_url):
            return False
        for path, body in _questions(model, task):
            async with session.post(base_url + path, json=body, headers=headers) as reply:
                if reply.status == 200:
                    return _is_answer(await reply.json(content_type=None))
                if reply.status == 429 or reply.status >= 500:
                    return False
                said = (await reply.text(errors="replace"))[:QUOTED]
                refusal = f"it refuses {path} with {reply.status}: {said}"
    except (aiohttp.ClientError, ValueError, OSError):
        return False
    raise ProbeError(refusal)


async def _is_up(session: aiohttp.ClientSession, base_url: str) -> bool:
    async with session.get(f"{base_url}/health") as reply:
        if reply.status not in NO_SUCH_PATH:
            return reply.status == 200
    async with session.get(f"{base_url}/v1/models") as reply:
        return reply.status == 200


def _questions(model: str, task: str) -> list[tuple[str, dict[str, Any]]]:
    if task == "embed":
        return [("/v1/embeddings", {"model": model, "input": "Hi"})]
    chat = {"model": model, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1}
    return [("/v1/chat/completions", chat), ("/v1/completions", {"model": model, "prompt": "Hi", "max_tokens": 1})]


def _is_answer(reply: Any) -> bool:
    return isinstance(reply, dict) and bool(reply.get("choices") or reply.get("data"))
