"""How much a key may ask for: requests and tokens a minute and calls at once, of each key and of each model.

A call is admitted after it was decoded and before it waits for anything, and settled when it ends, whatever way: both
lanes do it here, on the native counters (`ext.rate_counters`). A refusal takes nothing.

Tokens are reserved before anybody can count them: the prompt by its size, the output by what the call says or else by
`GUESSED_OUTPUT`. The answer's usage settles it. A call whose upstream counted nothing used nothing if no output came,
else what was reserved: leaving early must be no way round a limit. What a call *states* (`max_tokens`) above a whole
minute's worth can never be had and is a 400. OpenAI answers 429 there, which SDKs repeat in vain. A prompt is only
guessed, and an image in it guessed a hundred times too large, so no prompt is refused for good: it takes the whole
minute's worth at most.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import isinf

from ext.rate_counters import Meter, RateCounters, Refusal
from proxy.config import LimitsConfig
from proxy.config_shape import inside
from proxy.dialects.call import Call
from proxy.dialects.decode import BYTES_PER_TOKEN
from proxy.errors import CallError, InvalidRequest, RateLimited
from proxy.observe.outcome import Outcome

GUESSED_OUTPUT = 256  # tokens of an answer to a call that states no limit
MOST_STATED = 1 << 50  # more is as impossible
CONCURRENCY_RETRY_S = 1.0  # nobody knows when a call of the caller's own ends
_SAID = {
    "requests_per_minute": "{} requests a minute",
    "tokens_per_minute": "{} tokens a minute",
    "concurrency": "{} calls at once",
}


class Limits:
    """The limits of one configuration. Counts are in `counters` and outlive it: a reload loses none.

    `tenants` are the names that `Keys.authenticate` returns. Raises OverflowError where `counters` have no room.
    """

    __slots__ = ("_config", "_counters", "_keys", "_models")

    def __init__(self, config: LimitsConfig, tenants: Iterable[str], counters: RateCounters) -> None:
        self._config, self._counters = config, counters
        # without a limit no meter: the counters' room is for those that have one
        self._keys = {name: meter for name in tenants if (meter := _of_key(config, name, counters)) is not None}
        self._models = {
            name: counters.meter(f"model {name}", *(getattr(each, limit) for limit in _SAID))
            for name, each in config.models.items()
        }

    def meters(self, tenant: str, model: str) -> tuple[Meter | None, Meter | None]:
        """What counts a call: of its key and of its model, where they have limits."""
        return self._keys.get(tenant), self._models.get(model)

    def admit(self, outcome: Outcome, call: Call, now: float) -> None:
        """Reserve what this call of `outcome.tenant` may use, and note it in `outcome`. Half a microsecond.

        Raises `RateLimited` or `InvalidRequest`, and has taken nothing then.
        """
        key, model = self.meters(outcome.tenant, call.model)
        if key is None and model is None:
            return
        stated, guessed = output_of(call)
        grant = self._counters.reserve(key, model, stated, guessed + outcome.bytes_in // BYTES_PER_TOKEN, now)
        outcome.rate_limits = grant.headers
        if isinstance(grant, Refusal):
            if grant.meter is model:
                outcome.limited = f"models.{grant.limit}"
                table = inside("limits.models", call.model)
                raise _error(grant, table, f"model '{call.model}', all keys together, is", stated)
            outcome.limited = f"keys.{grant.limit}"
            raise _error(grant, self._table(outcome.tenant, grant.limit), f"key '{outcome.tenant}' is", stated)
        outcome.grant = grant

    def _table(self, tenant: str, limit: str) -> str:
        """Where the configuration says what holds for this key."""
        stated = _stated(self._config, tenant, limit) is not None
        return inside("limits.keys", tenant) if stated else "limits"


def output_of(call: Call) -> tuple[int, int]:
    """Tokens to reserve for its output: stated by the call, or guessed."""
    if call.max_output_tokens is not None:
        return min(call.max_output_tokens, MOST_STATED), 0
    return 0, GUESSED_OUTPUT if call.endpoint.streams else 0  # what cannot stream has no output


def settle(outcome: Outcome, now: float) -> None:
    """The call is over: what it did not use goes back. Once for each call, admitted or not."""
    grant = outcome.grant
    if grant is None:
        return
    outcome.grant = None
    used = outcome.prompt_tokens
    if used is not None:
        grant.settle(used + (outcome.output_tokens or 0), now)
    else:
        grant.settle(0 if outcome.first_byte_s is None else None, now)


def withdraw(outcome: Outcome) -> None:
    """The call begins anew elsewhere, and is admitted there: as if it had not been here."""
    if outcome.grant is not None:
        outcome.grant.cancel()


def _of_key(config: LimitsConfig, name: str, counters: RateCounters) -> Meter | None:
    limits: list[int] = [
        getattr(config, limit) if (stated := _stated(config, name, limit)) is None else stated for limit in _SAID
    ]
    return counters.meter(f"key {name}", *limits) if any(limits) else None


def _stated(config: LimitsConfig, name: str, limit: str) -> int | None:
    """What the key's own table says of it, if anything: 0 is something."""
    own = config.keys.get(name)
    stated: int | None = None if own is None else getattr(own, limit)
    return stated


def _error(refusal: Refusal, section: str, whose: str, stated: int) -> CallError:
    limit = _SAID[refusal.limit].format(getattr(refusal.meter, refusal.limit))
    rule = f"{whose} limited to {limit} ([{section}] {refusal.limit})"
    if isinf(refusal.wait_s):
        words = f"The call may use {stated} tokens for its output alone, and {rule}: lower its max_tokens."
        return InvalidRequest(words, param="max_tokens", code="max_tokens_above_limit")
    rule = rule[0].upper() + rule[1:]
    if not refusal.wait_s:
        return RateLimited(f"{rule}: wait until one of them ends.", retry_after_s=CONCURRENCY_RETRY_S)
    return RateLimited(f"{rule}: try again in {refusal.wait_s:.3f} s.", retry_after_s=refusal.wait_s)
