"""Limits in the listener, on both lanes: refused in the caller's dialect, told in headers, and back however it ends."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from proxy.config import LimitsConfig, ModelLimitsConfig
from tests.fakes import plain, stream
from tests.proxy.server import ends
from tests.proxy.server.conftest import Proxy

LIMITED = LimitsConfig(requests_per_minute=60, tokens_per_minute=60_000, concurrency=1)


def rate_limits(headers: Any) -> dict[str, str]:
    return {name.lower(): value for name, value in headers.items() if name.lower().startswith("x-ratelimit-")}


@pytest.mark.parametrize("streaming", [False, True])
async def test_an_answer_says_what_is_left(proxy: Proxy, streaming: bool) -> None:
    proxy.configure(limits=LIMITED)
    proxy.upstream.behave = stream() if streaming else plain(**{"x-ratelimit-limit-tokens": "5", "x-ratelimit-x": "6"})
    response = await proxy.chat(stream=streaming, max_tokens=100)
    await response.read()
    headers = rate_limits(response.headers)
    left = int(headers.pop("x-ratelimit-remaining-tokens"))
    assert 59_800 < left < 59_900
    assert headers.pop("x-ratelimit-reset-tokens").endswith("ms")
    assert headers == {
        "x-ratelimit-limit-requests": "60",
        "x-ratelimit-remaining-requests": "59",
        "x-ratelimit-reset-requests": "1s",
        "x-ratelimit-limit-tokens": "60000",
    }


async def test_without_limits_of_ours_the_upstreams_are_passed_on(proxy: Proxy) -> None:
    proxy.upstream.behave = plain(**{"x-ratelimit-limit-tokens": "5"})
    assert rate_limits((await proxy.chat()).headers) == {"x-ratelimit-limit-tokens": "5"}


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages"])
async def test_a_refusal_is_a_429_in_the_dialect_with_the_time_to_come_back(proxy: Proxy, path: str) -> None:
    proxy.configure(limits=LimitsConfig(requests_per_minute=1))
    assert (await proxy.chat(path, max_tokens=5)).status == 200
    response = await proxy.chat(path, max_tokens=5)
    error = (await response.json())["error"]
    assert (response.status, error["type"]) == (429, "rate_limit_error")
    assert "limited to 1 requests a minute" in error["message"]
    assert response.headers["retry-after"] in ("59", "60")
    assert response.headers["x-ratelimit-remaining-requests"] == "0"
    assert error.get("code") == (None if path == "/v1/messages" else "rate_limit_exceeded")
    await proxy.settled()
    assert [(line["status"], line.get("limited")) for line in await proxy.lines()] == [
        (200, None),
        (429, "keys.requests_per_minute"),
    ]
    value = proxy.metrics.registry.get_sample_value
    assert value("vramp_limited_total", {"limit": "keys.requests_per_minute"}) == 1
    assert len(proxy.scheduler.tickets) == 1  # it never asked for a lease
    proxy.configure()
    await proxy.still_works()


async def test_one_key_s_limit_is_not_another_s_and_strangers_count_for_nobody(proxy: Proxy) -> None:
    proxy.configure(keys=("sk-0", "sk-1"), limits=LimitsConfig(requests_per_minute=1))
    body = {"model": "demo-chat", "messages": ["Hi"]}

    async def status(key: str) -> int:
        headers = {"authorization": f"Bearer {key}"}
        return (await proxy.session.post("/v1/chat/completions", json=body, headers=headers)).status

    assert [await status(key) for key in ("sk-x", "sk-0", "sk-0", "sk-1", "sk-1")] == [401, 200, 429, 200, 429]


async def test_what_cannot_be_decoded_or_routed_takes_nothing(proxy: Proxy) -> None:
    proxy.configure(limits=LimitsConfig(requests_per_minute=1))
    assert (await proxy.chat(model="nope")).status == 404
    assert (await proxy.chat(max_tokens=-1)).status == 400
    await proxy.still_works()


async def test_a_reload_forgets_nothing(proxy: Proxy) -> None:
    proxy.configure(limits=LimitsConfig(requests_per_minute=1))
    assert (await proxy.chat()).status == 200
    proxy.configure(limits=LimitsConfig(requests_per_minute=1, models={"far": ModelLimitsConfig(concurrency=1)}))
    assert (await proxy.chat()).status == 429


async def test_another_candidate_is_not_another_request(proxy: Proxy) -> None:
    """The first attempt fails before its answer; the call goes on, over both lanes, under the one grant."""
    proxy.configure(limits=LIMITED)
    proxy.upstream.behave = plain(b'{"error":{}}', status=503)
    response = await proxy.chat(model="both")
    assert response.status == 200
    assert response.headers["x-ratelimit-remaining-requests"] == "59"
    await proxy.settled()
    assert proxy.counters.meter("key local").in_use == 0
    await proxy.still_works()


async def test_a_call_that_waits_is_counted_once(proxy: Proxy) -> None:
    """The fast lane, which does not wait, withdraws what it admitted before the ordinary one admits it."""
    proxy.configure(limits=LIMITED)
    proxy.scheduler.base_url = None
    asking = asyncio.create_task(proxy.chat())
    await proxy.scheduler.submitted.wait()
    assert proxy.counters.meter("key local").in_use == 1
    refused = await proxy.chat()
    assert (refused.status, refused.headers["retry-after"]) == (429, "1")
    proxy.scheduler.waiting[0].grant(proxy.upstream.base_url)
    response = await asking
    assert (response.status, response.headers["x-ratelimit-remaining-requests"]) == (200, "59")
    await proxy.still_works()


async def refused_upstream(proxy: Proxy) -> None:
    proxy.upstream.behave = plain(b'{"detail":"no"}', status=422)
    assert (await proxy.chat()).status == 422


ENDS = [
    ends.left_while_queued,
    ends.left_before_the_first_byte,
    ends.left_in_mid_stream,
    ends.refused_by_the_scheduler,
    ends.failed_upstream,
    refused_upstream,
    ends.broke_off_in_mid_stream,
    ends.answered,
    ends.streamed,
]


@pytest.mark.parametrize("end", ENDS, ids=lambda end: end.__name__)
async def test_however_a_call_ends_its_place_is_free_again(proxy: Proxy, end: Any) -> None:
    proxy.configure(limits=LIMITED)
    await end(proxy)
    await proxy.settled()
    assert proxy.counters.meter("key local").in_use == 0
    await proxy.still_works()  # the limit is one at once
