"""vLLM's sleep, over its own routes: to sleep, to wake, and one fixed question that tells whether it woke as it was.

Level 1: weights go to pinned host memory, the KV cache is dropped. What the engine answers here is believed by nobody:
the scheduler compares the device's reading and the answer to the question (`scheduler.departures`, `scheduler.attest`).
A sleeping vLLM accepts requests and lets them hang, so it is asked for nothing until it is awake.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import aiohttp
import msgspec

QUOTED = 300
# Of one token, so that it is a prefill alone, and long enough that wrong weights anywhere show.
QUESTION = "The capital of France is Paris. The capital of Italy is"


class SleepError(Exception):
    """The engine would not sleep, wake or answer; the message says what it said."""


class Said(msgspec.Struct, frozen=True):
    """The most likely next token, and the natural logarithm of its probability."""

    token: str
    logprob: float


class SleepControls:
    """The routes of one engine kind. Every call raises SleepError or aiohttp.ClientError; the caller sets the
    limits."""

    def __init__(self, model: str, headers: Mapping[str, str] | None = None) -> None:
        self._model = model
        self._headers = dict(headers or {})

    async def sleep(self, session: aiohttp.ClientSession, base_url: str) -> None:
        """Returns when the engine says that it sleeps."""
        await self._post(session, f"{base_url}/sleep?level=1&mode=wait")

    async def wake(self, session: aiohttp.ClientSession, base_url: str) -> None:
        """Returns when the engine says that it is awake."""
        await self._post(session, f"{base_url}/wake_up")
        async with session.get(f"{base_url}/is_sleeping") as answer:
            if (await answer.json(content_type=None)).get("is_sleeping"):
                raise SleepError("it still sleeps after /wake_up")

    async def ask(self, session: aiohttp.ClientSession, base_url: str) -> Said:
        """The fixed question, greedily. The engine must be idle: others in the batch change the last digits."""
        body = {"model": self._model, "prompt": QUESTION, "max_tokens": 1, "temperature": 0, "logprobs": 1}
        reply = await self._post(session, f"{base_url}/v1/completions", body)
        try:
            found = msgspec.json.decode(reply, type=_Completion).choices[0].logprobs
            return Said(found.tokens[0], found.token_logprobs[0])
        except (msgspec.DecodeError, IndexError) as error:
            raise SleepError(f"no token in its answer: {error}") from error

    async def _post(self, session: aiohttp.ClientSession, url: str, body: dict[str, Any] | None = None) -> bytes:
        async with session.post(url, json=body, headers=self._headers) as answer:
            said = await answer.read()
            if answer.status != 200:
                where = url.partition("?")[0].rpartition(":")[2].partition("/")[2]
                raise SleepError(f"/{where} answers {answer.status}: {said[:QUOTED].decode(errors='replace')}")
            return said


class _Logprobs(msgspec.Struct):
    tokens: list[str]
    token_logprobs: list[float]


class _Choice(msgspec.Struct):
    logprobs: _Logprobs


class _Completion(msgspec.Struct):
    choices: list[_Choice]
