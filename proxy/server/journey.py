"""The one path of a call: decode, gate, route, attempts, relay. Each attempt is a lease or a slot of a backend's pool.

Another candidate is tried only before the commit point, the first byte of model output to the client: after it the
client holds half an answer that no other model can finish. Whatever happens, the lease goes back by leaving its `with`
block, and the client is told.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager
from functools import partial
from types import TracebackType
from typing import Protocol, Self

import orjson
from aiohttp import web

from proxy.catalog.catalog import Deployment
from proxy.config import TimeoutsConfig
from proxy.dialects.call import Call, Endpoint
from proxy.dialects.decode import decode, prefix_of
from proxy.dialects.endpoints import WITH_PRIORITY, WITH_STREAM_OPTIONS
from proxy.dialects.splice import splice
from proxy.errors import CallError, InvalidRequest, NotFound, Unavailable, UpstreamFailed, UpstreamTimedOut
from proxy.observe.outcome import Outcome
from proxy.providers.base import Broken, Unreachable, Upstream
from proxy.routing.router import Candidate
from proxy.server.answer import Answer
from proxy.server.body import read_body
from proxy.server.packing import PATH as EMBEDDINGS
from proxy.server.packing import Engine, Split
from proxy.server.record import UpstreamRefused
from proxy.server.relay import Relay
from proxy.server.state import State
from proxy.server.watchdog import Watchdog
from scheduler.driver import Lease, Refused
from scheduler.model import LatencyClass, RefusalCode, Ticket

FIRST_COMMENT_S = 1.0
COMMENT_EVERY_S = 3.0
UNREACHABLE_RETRY_S = 1.0  # an engine that died is noticed and replaced by then; a remote's hiccup may be over
FAILOVER_STATUSES = frozenset({429, 502, 503, 504})
# vLLM serves lower numbers first. The default class has vLLM's default, so that its calls' bodies stay as they are.
PRIORITIES = {each: each - LatencyClass.STANDARD for each in LatencyClass}
CLASS_NAMES = {each: each.name.lower() for each in LatencyClass}
FORWARDED = ("traceparent", "tracestate", "anthropic-version", "anthropic-beta", "openai-beta")


class Waits(Protocol):
    """A ticket on its way to a lease, as `scheduler.driver.Waiting` is one."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    async def granted(self) -> Lease:
        """The lease. Raises `Refused`. May be cancelled and awaited again."""
        ...

    async def describe(self) -> str:
        """One line on what is waited for."""
        ...

    def used(self, prompt_tokens: int, output_tokens: int) -> None:
        """What the request really used."""
        ...


class Leases(Protocol):
    """What a journey needs of the scheduler."""

    def lease(self, ticket: Ticket) -> Waits:
        """Ask for a lease; leaving the `with` block withdraws or returns it."""
        ...

    def lease_now(self, ticket: Ticket) -> Lease | None:
        """A lease if one can be had at once, else nothing happens. It goes back by `give_back`."""
        ...

    def give_back(self, ticket_id: int, prompt_tokens: int | None = None, output_tokens: int | None = None) -> None:
        """Return what `lease_now` gave, once, with what the request really used if it ended well."""
        ...

    def new_ticket_id(self) -> int:
        """A number no other ticket has."""
        ...

    async def lost(self, engine_id: str) -> bool:
        """Whether an engine that broke off has died, so that another lease is on another engine."""
        ...


class AttemptFailed(Exception):
    """This candidate could not answer and another may. `error` is what to say if none can."""

    def __init__(self, error: CallError) -> None:
        super().__init__(error.message)
        self.error = error


class EngineBroke(AttemptFailed):
    """The engine was not there or broke off."""

    def __init__(self, error: CallError, engine_id: str) -> None:
        super().__init__(error)
        self.engine_id = engine_id


class Journey:
    """One call of a model."""

    def __init__(
        self,
        state: State,
        leases: Leases,
        request: web.BaseRequest,
        endpoint: Endpoint,
        answer: Answer,
        outcome: Outcome,
        watch: Watchdog,
        tried: Exception | None = None,
    ) -> None:
        self._state = state
        self._leases = leases
        self._request = request
        self._endpoint = endpoint
        self._answer = answer
        self._outcome = outcome
        self._watch = watch
        self._tried = tried  # how the first attempt failed, where the fast lane made it

    async def run(self) -> None:
        """Answer the client. Raises `CallError` for what it is still to be told."""
        tenant = self._state.keys.authenticate(self._request.headers)  # before the body: strangers send us nothing
        self._outcome.tenant = tenant
        call = await self._decode()
        call.tenant = tenant
        decision = self._state.router.decide(call)
        note_call(self._outcome, call)
        if self._tried is None:  # else the fast lane admitted it
            # not by the loop's clock: it lags the fast lane's, and a call withdrawn there would meet its own trace
            self._state.limits.admit(self._outcome, call, time.monotonic())
        relay = Relay(call, self._answer, self._outcome, self._watch, self._state.config.timeouts)
        failed: AttemptFailed | None = None
        for candidate in decision.candidates:
            try:
                await self._attempt(call, candidate, relay)
                return
            except AttemptFailed as failure:
                failed = failure
                if self._answer.committed:
                    break
        raise failed.error if failed is not None else Unavailable("No backend can serve this call.")

    async def _decode(self) -> Call:
        state = self._state
        try:
            body = await read_body(self._request, state.max_body, state.config.timeouts.read_body_s)
        except InvalidRequest:
            self._answer.last = True  # the parser stopped in the middle of it, and finds no next request
            raise
        self._outcome.bytes_in = len(body)
        call = decode(self._endpoint, self._request.headers, body, state.defaults[self._endpoint.task])
        call.request_id = self._outcome.request_id
        return call

    async def _attempt(self, call: Call, candidate: Candidate, relay: Relay) -> None:
        try:
            await self._try(call, candidate, relay)
        except EngineBroke as broke:
            # It may have died under us, or between the grant and now. Nothing has reached the client and nobody was
            # charged, so the request is done again on a new engine: once, since it may be what kills engines.
            if self._answer.committed or not await self._leases.lost(broke.engine_id):
                raise
            self._outcome.attempts += 1
            await self._on_engine(call, candidate, relay)

    async def _try(self, call: Call, candidate: Candidate, relay: Relay) -> None:
        if self._tried is not None:
            tried, self._tried = self._tried, None
            raise tried
        note_attempt(self._outcome, candidate)
        if candidate.local:
            await self._on_engine(call, candidate, relay)
        else:
            await self._exchange(call, candidate, relay, None)

    async def _on_engine(self, call: Call, candidate: Candidate, relay: Relay) -> None:
        started_s, prompt_tokens = self._outcome.started_s, call.prompt_tokens_estimate
        ticket = ticket_for(call, candidate, self._state, self._leases, started_s, prompt_tokens)
        with self._leases.lease(ticket) as waiting:
            try:
                lease = await self._granted(call, waiting)
            except Refused as refused:
                raise _refusal(refused) from None
            self._outcome.queue_s += lease.queue_s
            self._outcome.load_s += lease.load_s
            try:
                await self._exchange(call, candidate, relay, lease.base_url)
                if self._outcome.prompt_tokens is not None:
                    waiting.used(self._outcome.prompt_tokens, self._outcome.output_tokens or 0)
            except AttemptFailed as failure:
                if isinstance(failure.__cause__, Unreachable | Broken):
                    raise EngineBroke(failure.error, lease.engine_id) from failure
                raise

    async def _granted(self, call: Call, waiting: Waits) -> Lease:
        """The lease; a streaming client is told from time to time what it waits for."""
        self._watch.lift()
        if not (call.stream and self._endpoint.streams):
            return await waiting.granted()
        pause_s = FIRST_COMMENT_S
        while True:
            try:
                async with asyncio.timeout(pause_s):
                    return await waiting.granted()
            except TimeoutError:
                await self._answer.comment(await waiting.describe())
                self._watch.lift()
                pause_s = COMMENT_EVERY_S

    async def _exchange(self, call: Call, candidate: Candidate, relay: Relay, base_url: str | None) -> None:
        deployment = candidate.deployment
        timeouts = self._state.config.timeouts
        self._watch.limit(timeouts.first_byte_s, partial(first_byte_error, timeouts))
        body = splice(call.body, changes_for(call, deployment), call.spans)
        asked_s = self._watch.now()
        try:
            async with self._send(deployment, body, base_url) as upstream:
                if isinstance(upstream, Split):
                    self._outcome.packed = upstream.callers
                if 200 <= upstream.status < 300:
                    await relay.carry(upstream, asked_s)
                    return
                refused = await relay.refusal(upstream, where=candidate.where, local=candidate.local)
                status = upstream.status
        except (Unreachable, Broken) as problem:
            raise AttemptFailed(error_of(call, problem)) from problem
        raise AttemptFailed(refused) if status in FAILOVER_STATUSES else refused

    def _send(self, deployment: Deployment, body: bytes, base_url: str | None) -> AbstractAsyncContextManager[Upstream]:
        provider, packer = self._state.providers[deployment.backend.name], self._state.packer
        headers = forwarded(self._request.headers)
        # whoever sends headers along wants to be seen upstream by itself
        if packer is not None and base_url is not None and self._endpoint.path == EMBEDDINGS and not headers:
            return packer.send(Engine(deployment.name, provider, base_url, deployment.backend.kind == "vllm"), body)
        return provider.send(self._endpoint.upstream_path, body, headers, base_url=base_url)

    async def fail(self, error: CallError) -> None:
        """Tell the client: the upstream's own words where they are whole and nothing has been sent, else ours."""
        if isinstance(error, UpstreamRefused) and error.raw is not None and not self._answer.started:
            self._outcome.error = error.code or error.type
            await self._answer.whole(error.status, error.headers, error.raw)
        else:
            await self._answer.fail(error)


def note_call(outcome: Outcome, call: Call) -> None:
    """Record what is called. Only after routing knew the model: the metrics' labels are made of it."""
    outcome.model, outcome.stream = call.model, call.stream
    outcome.latency_class = CLASS_NAMES[call.latency_class]


def note_attempt(outcome: Outcome, candidate: Candidate) -> None:
    """Record one attempt more, and where."""
    outcome.attempts += 1
    outcome.backend, outcome.reason = candidate.where, candidate.reason


def ticket_for(
    call: Call, candidate: Candidate, state: State, leases: Leases, started_s: float, prompt_tokens: int
) -> Ticket:
    """What the scheduler is asked for. `prompt_tokens` are an estimate."""
    limit_ms = call.deadline_ms or state.deadlines_ms.get(call.latency_class)
    return Ticket(
        id=leases.new_ticket_id(),
        model=candidate.deployment.name,
        latency_class=call.latency_class,
        tenant=call.tenant,
        weight_tokens=prompt_tokens + (call.max_output_tokens or 0),
        deadline_s=None if limit_ms is None else started_s + limit_ms / 1000,
        open_ended=call.max_output_tokens is None and call.endpoint.streams,
        session=call.session,
        prefix=prefix_of(call.body),
    )


def changes_for(call: Call, deployment: Deployment) -> dict[str, bytes]:
    """What is spliced into the body: top-level members and their new values, as JSON."""
    changes: dict[str, bytes] = {}
    upstream_model = deployment.model.upstream_model
    if upstream_model is not None and upstream_model != call.model:
        changes["model"] = orjson.dumps(upstream_model)
    elif not call.names_model:
        changes["model"] = orjson.dumps(call.model)
    if call.stream and not call.wants_usage and call.endpoint.path in WITH_STREAM_OPTIONS:
        changes["stream_options"] = b'{"include_usage":true}'
    priority = _priority(call, deployment)
    if priority != (call.priority or 0):
        changes["priority"] = b"%d" % priority
    return changes


def _priority(call: Call, deployment: Deployment) -> int:
    """The class's number where the engine knows what to do with it. Callers may step back from it, not push forward."""
    ranked = deployment.ranks and call.endpoint.path in WITH_PRIORITY
    first = PRIORITIES[call.latency_class] if ranked else 0
    return first if call.priority is None else max(first, call.priority)


def forwarded(headers: Mapping[str, str]) -> dict[str, str]:
    """The client's headers that go upstream."""
    return {name: headers[name] for name in FORWARDED if name in headers}


def first_byte_error(timeouts: TimeoutsConfig) -> UpstreamTimedOut:
    """The end of a wait for an answer."""
    return UpstreamTimedOut(
        f"The model did not begin to answer in {timeouts.first_byte_s:g} s ([timeouts] first_byte_s)."
    )


def error_of(call: Call, problem: Unreachable | Broken) -> CallError:
    """What a connection's failure means to the caller."""
    if isinstance(problem, Unreachable):
        words = f"Model '{call.model}' cannot be reached: {problem}."
        return Unavailable(words, retry_after_s=UNREACHABLE_RETRY_S)
    return UpstreamFailed(f"Model '{call.model}' broke off: {problem}.")


def _refusal(refused: Refused) -> Exception:
    """What a refusal of the scheduler means to the caller, and whether another candidate may help.

    Overload is ours, so it is 503 with the time to come back; 429 is kept for limits of the caller's own. What can
    never fit is 400, because SDKs repeat every 5xx and no repetition helps. Only a stop is not tried elsewhere.
    """
    code, reason = refused.code, refused.reason
    if code is RefusalCode.UNKNOWN_MODEL:
        return AttemptFailed(NotFound(reason, param="model", code="model_not_found"))
    if code is RefusalCode.DEADLINE:
        reason = f"{reason[:1].upper()}{reason[1:]}: allow more (x-vramp-deadline-ms, or [classes] deadline_ms)."
    if code is RefusalCode.NEVER_FITS:
        return AttemptFailed(InvalidRequest(reason, param="model", code="model_never_fits"))
    error = Unavailable(reason, code=code.value, retry_after_s=refused.retry_after_s)
    if code is RefusalCode.STOPPING:
        return error
    return AttemptFailed(error)
