"""Admission under an injected clock: what is reserved, what is refused and in which words, what comes back."""

from __future__ import annotations

import re
from typing import Any

import pytest

from ext.rate_counters import RateCounters
from proxy.config import KeyLimitsConfig, LimitsConfig, ModelLimitsConfig
from proxy.dialects.call import Call
from proxy.dialects.endpoints import ENDPOINTS
from proxy.dialects.envelope import retry_headers
from proxy.errors import CallError, InvalidRequest, RateLimited
from proxy.gate.limits import GUESSED_OUTPUT, Limits, settle, withdraw
from proxy.observe.outcome import Outcome

CHAT, EMBEDDINGS = "/v1/chat/completions", "/v1/embeddings"


class Gate:
    """Limits at a time, and the requests that came to them."""

    def __init__(self, **config: Any) -> None:
        self.counters = RateCounters()
        self.now = 1000.0
        self.configure(**config)

    def configure(self, **config: Any) -> None:
        self.limits = Limits(LimitsConfig(**config), ["alice", "bob"], self.counters)

    def ask(
        self,
        tenant: str = "alice",
        *,
        path: str = CHAT,
        model: str = "m",
        size: int = 400,
        max_tokens: int | None = 100,
    ) -> Outcome:
        outcome = Outcome("r", "POST", path, self.now, tenant=tenant, bytes_in=size)
        self.limits.admit(outcome, Call(ENDPOINTS[path], b"", model=model, max_output_tokens=max_tokens), self.now)
        return outcome

    def refused(self, tenant: str = "alice", **asked: Any) -> CallError:
        with pytest.raises(CallError) as caught:
            self.ask(tenant, **asked)
        return caught.value

    def end(self, outcome: Outcome, prompt: int | None = None, output: int | None = None) -> None:
        outcome.prompt_tokens, outcome.output_tokens = prompt, output
        settle(outcome, self.now)


def tokens_left(outcome: Outcome) -> int:
    found = re.search(r"remaining-tokens: (\d+)", outcome.rate_limits)
    assert found is not None
    return int(found[1])


def test_without_limits_nothing_is_counted_and_nothing_is_said() -> None:
    gate = Gate()
    outcome = gate.ask()
    assert (outcome.grant, outcome.rate_limits) == (None, "")
    gate.end(outcome)


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"requests_per_minute": 2}, "Key 'alice' is limited to 2 requests a minute ([limits] requests_per_minute)"),
        ({"tokens_per_minute": 400}, "Key 'alice' is limited to 400 tokens a minute ([limits] tokens_per_minute)"),
    ],
)
def test_a_refusal_names_key_limit_and_remedy_and_a_retry_after_its_wait_succeeds(
    limits: dict[str, int], message: str
) -> None:
    gate = Gate(**limits)
    for _ in range(2):
        gate.ask()
    gate.now += 0.5  # not a round figure
    error = gate.refused()
    assert isinstance(error, RateLimited)
    assert error.message == f"{message}: try again in 29.500 s."
    headers = retry_headers(error)
    assert (headers["retry-after"], headers["retry-after-ms"], headers["x-should-retry"]) == ("30", "29500", "true")
    gate.now += int(headers["retry-after-ms"]) / 1000 - 0.01
    gate.refused()
    gate.now += 0.01
    gate.ask()


def test_calls_at_once_are_limited_until_one_ends() -> None:
    gate = Gate(concurrency=1)
    first = gate.ask()
    error = gate.refused()
    assert "limited to 1 calls at once ([limits] concurrency): wait until one of them ends" in error.message
    assert retry_headers(error)["retry-after"] == "1"
    gate.end(first)
    gate.end(gate.ask())


def test_a_key_has_its_own_limits_where_it_says_so_and_the_general_ones_where_it_does_not() -> None:
    own = {"alice": KeyLimitsConfig(requests_per_minute=2), "bob": KeyLimitsConfig(requests_per_minute=0)}
    gate = Gate(requests_per_minute=1, concurrency=3, keys=own)
    kept = [gate.ask("alice"), gate.ask("alice"), gate.ask("bob"), gate.ask("bob"), gate.ask("bob")]
    assert "2 requests a minute ([limits.keys.alice] requests_per_minute)" in gate.refused("alice").message
    assert "3 calls at once ([limits] concurrency)" in gate.refused("bob").message
    for each in kept:
        gate.end(each)


def test_a_refusal_names_the_table_that_set_the_limit() -> None:
    own = {"alice": KeyLimitsConfig(tokens_per_minute=50)}
    models = {"large": ModelLimitsConfig(tokens_per_minute=70)}
    gate = Gate(requests_per_minute=9, tokens_per_minute=90, keys=own, models=models)
    assert "([limits.keys.alice] tokens_per_minute)" in gate.refused("alice", max_tokens=51).message
    assert "([limits] tokens_per_minute)" in gate.refused("bob", max_tokens=91).message
    assert "([limits.models.large] tokens_per_minute)" in gate.refused("bob", max_tokens=71, model="large").message


def test_a_models_limit_holds_for_all_keys_together() -> None:
    gate = Gate(models={"m": ModelLimitsConfig(requests_per_minute=2)})
    gate.ask("alice")
    gate.ask("bob")
    error = gate.refused("alice")
    assert error.message.startswith(
        "Model 'm', all keys together, is limited to 2 requests a minute ([limits.models.m] requests_per_minute)"
    )
    gate.ask("alice", model="other")


@pytest.mark.parametrize("tenant", ["alice", "bob"])
def test_a_refusal_by_the_model_takes_nothing_from_the_key(tenant: str) -> None:
    gate = Gate(requests_per_minute=2, concurrency=2, models={"m": ModelLimitsConfig(tokens_per_minute=100)})
    for _ in range(5):
        gate.refused(tenant, max_tokens=90, size=4000) if _ else gate.ask(tenant, max_tokens=90, size=40)
    gate.ask(tenant, model="other")


def test_what_a_call_reserves_is_its_size_and_what_it_states_or_a_guess() -> None:
    gate = Gate(tokens_per_minute=10_000)
    left = 10_000
    for asked, cost in (
        ({"size": 400, "max_tokens": 50}, 150),
        ({"size": 400, "max_tokens": None}, 100 + GUESSED_OUTPUT),
        ({"size": 400, "max_tokens": None, "path": EMBEDDINGS}, 100),
    ):
        left -= cost
        assert tokens_left(gate.ask(**asked)) == left  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("prompt", "output", "first_byte_s", "charged"),
    [
        (30, 20, 0.1, 50),  # counted
        (30, None, 0.1, 30),  # embeddings
        (None, None, 0.1, 200),  # left in the middle: nobody counted
        (None, None, None, 0),  # failed, refused, left before any output
        (900, 900, 0.1, 1800),  # more than was thought
    ],
)
def test_what_a_call_used_is_charged(
    prompt: int | None, output: int | None, first_byte_s: float | None, charged: int
) -> None:
    gate = Gate(tokens_per_minute=10_000, concurrency=1)
    outcome = gate.ask()
    outcome.first_byte_s = first_byte_s
    gate.end(outcome, prompt, output)
    assert tokens_left(gate.ask(max_tokens=0, size=0)) == 10_000 - charged


def test_stated_tokens_above_the_limit_are_a_400_that_nobody_should_repeat() -> None:
    gate = Gate(tokens_per_minute=1000)
    for stated in (1001, 10**40):
        error = gate.refused(max_tokens=stated)
        assert isinstance(error, InvalidRequest)
        assert (error.param, error.code) == ("max_tokens", "max_tokens_above_limit")
        assert "key 'alice' is limited to 1000 tokens a minute" in error.message
        assert retry_headers(error)["x-should-retry"] == "false"
    gate.ask(max_tokens=1000)


def test_a_large_prompt_is_only_guessed_and_passes_once_a_minutes_worth_is_there() -> None:
    gate = Gate(tokens_per_minute=1000)
    picture = gate.ask(size=4_000_000)
    assert tokens_left(picture) == 0
    assert isinstance(gate.refused(), RateLimited)
    gate.end(picture, 90, 10)
    assert tokens_left(gate.ask()) == 700


def test_a_reload_keeps_the_counts_and_what_is_in_use_and_changes_the_limits() -> None:
    gate = Gate(requests_per_minute=2, concurrency=2)
    first, second = gate.ask(), gate.ask()
    gate.configure(requests_per_minute=2, concurrency=9)
    gate.refused()
    gate.configure(requests_per_minute=600, concurrency=2)
    gate.now += 1.0
    assert "2 calls at once" in gate.refused().message
    gate.end(first)
    gate.ask()
    gate.end(second)


def test_a_withdrawn_call_was_never_there() -> None:
    gate = Gate(requests_per_minute=1, tokens_per_minute=300, concurrency=1)
    withdraw(gate.ask())
    gate.ask()


def test_a_call_is_settled_once_however_often_it_is_said() -> None:
    gate = Gate(concurrency=1)
    outcome = gate.ask()
    gate.end(outcome)
    gate.end(outcome)
    gate.ask()
    gate.refused()
