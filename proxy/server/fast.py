"""The fast lane: calls that go straight through, over the relay of `ext`; Python decides, native code carries.

It answers nothing of its own but what has begun. A request that it does not recognise, must not decide alone, or cannot
answer goes to aiohttp with its connection, and is parsed there again; one that failed before its answer began takes
along how (`Tried`), so that the next candidate is tried, or the error told, by the ordinary lane. The steps are that
lane's own functions: keys, decoding, routing, leases and slots, records, metrics, the access log.

What is decided here never waits: a model that is not loaded, a lease or a slot that is not free, a host name that is
not resolved are all reasons to hand over.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections.abc import Callable, Mapping
from email.utils import formatdate
from http import HTTPStatus
from typing import Protocol

from ext.relay import TICK_S, Client, Failure, Limits, Relay
from ext.relay import Exchange as RelayExchange
from ext.sse import EventScanner
from proxy.dialects.call import Call
from proxy.dialects.decode import decode_short
from proxy.dialects.endpoints import ENDPOINTS
from proxy.dialects.envelope import event_for
from proxy.dialects.splice import edits_of
from proxy.errors import CallError, UpstreamFailed
from proxy.observe.outcome import Outcome
from proxy.providers.base import Broken, Provider, Unreachable
from proxy.providers.slots import Slots
from proxy.routing.router import Candidate, Decision
from proxy.server.answer import STREAM_HEADERS, closing_comment
from proxy.server.handler import LEFT, Handler, Tried, cut_off_error, open_outcome, total_error
from proxy.server.journey import (
    FAILOVER_STATUSES,
    FORWARDED,
    AttemptFailed,
    EngineBroke,
    Leases,
    changes_for,
    error_of,
    first_byte_error,
    forwarded,
    note_attempt,
    note_call,
    ticket_for,
)
from proxy.server.record import (
    PASSED,
    PASSED_PREFIXES,
    check_body,
    is_whole,
    record_body,
    record_stream,
    refusal_of,
    withholds_usage,
)
from proxy.server.relay import idle_error
from proxy.server.state import State
from proxy.server.targets import Targets
from scheduler.driver import Lease

log = logging.getLogger("vramp.server")

PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/messages")
KEPT = ("authorization", "x-api-key", "api-key", "host", "x-request-id", "x-vramp-class", *FORWARDED)
# Headers that change how a request is read, or ask for what takes time: their requests are for the ordinary lane.
FOREIGN = ("expect", "upgrade", "transfer-encoding", "content-encoding", "trailer", "http2-settings", "x-vramp-")
_CHUNKED = "Transfer-Encoding: chunked\r\n"
MOST_COMMENTS = 4096
LAST_CHUNK = b"0\r\n\r\n"
_REASONS = {status.value: status.phrase for status in HTTPStatus}


class Serves(Protocol):
    """Makes the protocol of a connection that aiohttp goes on with."""

    def __call__(self, read: bytes = b"", tried: Tried | None = None) -> asyncio.Protocol:
        """Of a connection of which something was `read` already."""
        ...


class FastLane:
    """Accepts connections, and decides on their requests. `http` goes on with those that are not for here."""

    def __init__(self, handler: Handler, http: Serves, *, keepalive_s: float) -> None:
        self.handler = handler
        self.dates = Dates()
        self._http = http
        self._loop = asyncio.get_running_loop()
        self._relay = Relay(
            self,
            paths=PATHS,
            kept=KEPT,
            foreign=FOREIGN,
            passed=PASSED,
            passed_families=PASSED_PREFIXES,
            keepalive_s=keepalive_s,
        )
        self._targets = Targets(self._loop)
        self._configured(handler.state)
        self._tasks: set[asyncio.Task[object]] = set()
        self._loop.add_reader(self._relay.fileno(), self._relay.pump)
        self._timer: asyncio.TimerHandle | None = None
        self._tick()

    def listen(self, listening: socket.socket) -> None:
        """Accept from this socket, which is ours from now on."""
        listening.setblocking(False)
        self._relay.listen(listening.detach())

    @property
    def now_s(self) -> float:
        """The relay's clock."""
        return self._relay.now_s

    # ---- what a listener does (`http.Listener`)

    def stop(self) -> None:
        """Accept nothing more; connections go on."""
        self._relay.stop_listening()

    def cut_off(self) -> None:
        """End what is in flight here with what can still be said."""
        self._relay.cut_off()

    def close(self) -> None:
        """Close all connections."""
        if self._timer is None:
            return
        self._relay.close()
        self._loop.remove_reader(self._relay.fileno())
        self._timer.cancel()
        self._timer = None
        for task in self._tasks:
            task.cancel()
        self._targets.close()

    def _tick(self) -> None:
        self._timer = self._loop.call_later(TICK_S, self._tick)
        self._relay.tick()

    # ---- what the relay asks (`ext.relay.Owner`)

    def decide(self, client: Client) -> RelayExchange | None:
        """See `Owner`. A few microseconds."""
        try:
            return self._decide(client)
        except CallError:
            return None  # the ordinary lane finds the same, and says so
        except Exception:
            log.exception("the fast lane could not decide")
            return None

    def _decide(self, client: Client) -> RelayExchange | None:
        handler = self.handler
        state = handler.state
        if state is not self._state:
            self._configured(state)
        if not handler.ready or client.head_size > state.max_header or client.body_size > state.max_body:
            return None
        scanned = client.scan(state.config.limits.max_json_depth)
        if scanned is None:
            return None
        endpoint = ENDPOINTS[client.path]
        headers = client.headers
        tenant = state.keys.authenticate(headers)
        call = decode_short(endpoint, headers, scanned, client.body_size, state.defaults[endpoint.task])
        call.tenant = tenant
        decision = state.router.decide(call)
        outcome = open_outcome(headers, "POST", client.path, client.remote, self._relay.now_s)
        call.request_id = outcome.request_id
        outcome.tenant, outcome.bytes_in = tenant, client.body_size
        note_call(outcome, call)
        return self._begun(client, state, call, decision, outcome)

    def _configured(self, state: State) -> None:
        self._state = state
        self._targets.forget()
        timeouts = state.config.timeouts
        self._limits = Limits(
            connect_s=timeouts.connect_s,
            first_byte_s=timeouts.first_byte_s,
            idle_s=timeouts.idle_s,
            total_s=timeouts.total_s,
            stall_s=timeouts.write_stall_s,
        )

    def _begun(
        self, client: Client, state: State, call: Call, decision: Decision, outcome: Outcome
    ) -> RelayExchange | None:
        """The exchange, once there is a place for it and a way to it."""
        candidate = decision.candidates[0]
        deployment = candidate.deployment
        provider = state.providers[deployment.backend.name]
        held = Held.take(self.handler.leases, provider, call, candidate, state, outcome)
        if held is None:
            return None
        try:
            target = self._targets.find(provider, call.endpoint.upstream_path, held.base_url)
            if target is None:
                held.give_back()
                return None
            pool, head = target
            edits: list[tuple[int, int, bytes]] = []
            size = client.body_size
            changes = changes_for(call, deployment.model.upstream_model)
            if changes and call.spans is not None:
                edits = edits_of(call.spans, changes)
                size += sum([len(new) - (end - start) for start, end, new in edits])
            client.forward(pool, head + _rest_of_head(client.headers, size), edits, self._limits)
        except BaseException:
            held.give_back()
            raise
        note_attempt(outcome, candidate)
        self.handler.begin()
        more = candidate.local or len(decision.candidates) > 1
        return Exchange(self, client, state, call, candidate, outcome, held, may_fail_over=more)

    def hand_over(self, fd: int, data: bytes, exchange: RelayExchange | None) -> None:
        """See `Owner`: aiohttp goes on with the connection."""
        tried = exchange.tried if isinstance(exchange, Exchange) else None
        connection = socket.socket(fileno=fd)
        connection.setblocking(False)
        task = self._loop.create_task(self._connect(connection, data, tried), name="hand over")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _connect(self, connection: socket.socket, data: bytes, tried: Tried | None) -> None:
        try:
            await self._loop.connect_accepted_socket(lambda: self._http(data, tried), connection)
        except OSError:  # it went in the meantime
            connection.close()
            if tried is not None:
                tried.outcome.status, tried.outcome.error = LEFT, "client_left"
                self.handler.end(tried.outcome, self._loop.time())

    def bug(self, exchange: RelayExchange | None) -> None:
        """See `Owner`."""
        log.exception("the fast lane failed in us")
        if isinstance(exchange, Exchange):
            exchange.abandon()


class Held:
    """The right to send one request: a lease on an engine, a slot of a backend's pool, or nothing that is counted."""

    __slots__ = ("_leases", "_slots", "_ticket_id", "base_url", "engine_id")

    def __init__(self, leases: Leases, slots: Slots | None, ticket_id: int, lease: Lease | None) -> None:
        self._leases = leases
        self._slots = slots
        self._ticket_id = ticket_id
        self.base_url = lease.base_url if lease is not None else None
        self.engine_id = lease.engine_id if lease is not None else None

    @classmethod
    def take(
        cls, leases: Leases, provider: Provider, call: Call, candidate: Candidate, state: State, outcome: Outcome
    ) -> Held | None:
        """Take it if it can be had at once."""
        if candidate.local:
            ticket = ticket_for(call, candidate, state, leases, outcome)
            lease = leases.lease_now(ticket)
            return None if lease is None else cls(leases, None, ticket.id, lease)
        slots = provider.slots
        if slots is not None and not slots.take_now():
            return None
        return cls(leases, slots, 0, None)

    def give_back(self) -> None:
        """Give it back. Idempotent."""
        if self._slots is not None:
            slots, self._slots = self._slots, None
            slots.give()
        if self._ticket_id:
            ticket_id, self._ticket_id = self._ticket_id, 0
            self._leases.give_back(ticket_id)


class Exchange:
    """One call on its way, as the relay asks about it (`ext.relay.Exchange`).

    Invariant: what is held goes back, and the outcome is settled or handed over as `tried`, each exactly once.
    """

    __slots__ = (
        "_asked_s",
        "_call",
        "_candidate",
        "_client",
        "_comments",
        "_headers",
        "_held",
        "_lane",
        "_lengthy",
        "_may_fail_over",
        "_outcome",
        "_scanner",
        "_settled",
        "_state",
        "tried",
    )

    def __init__(
        self,
        lane: FastLane,
        client: Client,
        state: State,
        call: Call,
        candidate: Candidate,
        outcome: Outcome,
        held: Held,
        *,
        may_fail_over: bool,
    ) -> None:
        self._lane = lane
        self._client = client
        self._state = state
        self._call = call
        self._candidate = candidate
        self._outcome = outcome
        self._held = held
        self._asked_s = lane.now_s
        self._scanner: EventScanner | None = None
        self._headers: Mapping[str, str] = {}  # of a stream
        self._lengthy = False  # the client was told a length
        self._may_fail_over = may_fail_over
        self._comments = b""  # that were held back
        self._settled = False
        self.tried: Tried | None = None

    # ---- answers

    def scan(self, headers: dict[str, str]) -> Callable[[bytes], bytes]:
        """The answer is an event stream: what each piece of it goes through."""
        self._headers = headers
        self._scanner = EventScanner(withhold_usage=withholds_usage(self._call))
        return self._scanner.feed

    def begin(self, events: bytes) -> tuple[bytes, bool]:
        """The first events, in a stream of ours if it is time; whether they are output.

        An upstream's comment is its sign of life, no output. It goes out at once, which fixes the status, unless
        somebody else may answer if this one fails: then it goes with the output, or not at all.
        """
        outcome, started = self._outcome, self._client.started
        output = self._scanner is not None and bool(self._scanner.events)
        if not output and not started and self._may_fail_over:
            self._comments = (self._comments + events)[:MOST_COMMENTS]
            return b"", False
        lead = b""
        if output:
            self._first_byte(self._lane.now_s)
            events = (closing_comment(outcome) if started else self._comments) + events
        if not started:
            outcome.status = 200
            passed = {**STREAM_HEADERS, **self._headers} if output else STREAM_HEADERS
            lead = self._head(200, passed, outcome.headers(waiting=not output), _CHUNKED)
        outcome.bytes_out += len(events)
        return lead + _chunk(events), output

    def large(self, status: int, headers: dict[str, str], length: int) -> bytes:
        """The head of an answer that is not held."""
        self._first_byte(self._client.first_byte_s)
        self._outcome.status = status
        self._lengthy = length >= 0
        if self._lengthy:
            return self._head(status, {**headers, "content-length": str(length)}, self._outcome.headers(), "")
        return self._head(status, headers, self._outcome.headers(), _CHUNKED)

    def whole(self, status: int, headers: dict[str, str], body: bytes) -> bytes | None:
        """A whole answer that is not an event stream; None where it is none to pass on."""
        call, outcome = self._call, self._outcome
        if not 200 <= status < 300:
            candidate = self._candidate
            refused = refusal_of(call, status, headers, body, where=candidate.where, local=candidate.local)
            self._leave(AttemptFailed(refused) if status in FAILOVER_STATUSES else refused)
            return None
        self._first_byte(self._client.first_byte_s or self._lane.now_s)
        try:
            check_body(call, headers, body)
        except UpstreamFailed as failed:
            self._leave(failed)
            return None
        record_body(outcome, body)
        outcome.status = status
        outcome.bytes_out += len(body)
        head = self._head(status, headers, outcome.headers(), f"Content-Length: {len(body)}\r\n")
        self._settle()
        return head + body

    def ended(self, tail: bytes) -> bytes | None:
        """The end of an answer that was begun."""
        outcome, scanner = self._outcome, self._scanner
        if scanner is None:
            record_body(outcome, tail)
            self._settle()
            return b"" if self._lengthy else LAST_CHUNK
        rest = scanner.flush()
        if not is_whole(self._call, scanner) or not (rest or self._client.started):
            return self.failed(Failure.BROKE, "the stream ended in the middle")
        record_stream(outcome, scanner)
        if self._client.started:
            outcome.bytes_out += len(rest)
            last = _chunk(rest)
        else:
            last = self.begin(rest)[0]
        self._settle()
        return last + LAST_CHUNK

    # ---- failures

    def failed(self, kind: int, words: str) -> bytes | None:
        """The end of an exchange without a whole answer."""
        outcome = self._outcome
        if self._scanner is not None:
            record_stream(outcome, self._scanner)
        if kind in (Failure.LEFT, Failure.STALLED):
            outcome.status = LEFT
            outcome.error = "client_stalled" if kind == Failure.STALLED else outcome.error or "client_left"
            self._settle()
            return None
        failure = self._failure(kind, words)
        if not self._client.started:
            self._leave(failure)
            return None
        error = failure.error if isinstance(failure, AttemptFailed) else failure
        outcome.error = error.code or error.type
        if self._scanner is None:
            self._settle()
            return None  # half of a body that has a length or is one JSON: an end that looks regular would be a lie
        event = event_for(self._call.endpoint.dialect, error, outcome.request_id)
        outcome.bytes_out += len(event)
        self._settle()
        return _chunk(event) + LAST_CHUNK

    def abandon(self) -> None:
        """A bug of ours ended it."""
        if not self._settled:
            self._outcome.status = self._outcome.status or 500
            self._outcome.error = "internal"
            self._settle()

    def _failure(self, kind: int, words: str) -> CallError | AttemptFailed:
        timeouts = self._state.config.timeouts
        if kind == Failure.FIRST_BYTE:
            return first_byte_error(timeouts)
        if kind == Failure.IDLE:
            return idle_error(timeouts)
        if kind == Failure.TOTAL:
            return total_error(timeouts)
        if kind == Failure.STOPPING:
            return cut_off_error()
        name = self._candidate.deployment.backend.name
        problem = (Unreachable if kind == Failure.UNREACHABLE else Broken)(f"backend {name}: {words}")
        error = error_of(self._call, problem)
        return AttemptFailed(error) if self._held.engine_id is None else EngineBroke(error, self._held.engine_id)

    def _leave(self, failure: CallError | AttemptFailed) -> None:
        """The ordinary lane tells the client, or finds somebody else who answers."""
        self._held.give_back()
        self._settled = True
        self.tried = Tried(self._outcome, failure)

    # ---- records

    def _first_byte(self, at_s: float) -> None:
        self._outcome.upstream_s = at_s - self._asked_s
        self._outcome.first_byte_s = at_s - self._outcome.started_s

    def _settle(self) -> None:
        self._settled = True
        self._outcome.bytes_out += self._client.bytes_out
        self._held.give_back()
        self._lane.handler.end(self._outcome, self._lane.now_s)

    def _head(self, status: int, passed: Mapping[str, str], ours: Mapping[str, str], framing: str) -> bytes:
        """A response's head, as aiohttp writes it."""
        lines = "".join([f"{name}: {value}\r\n" for name, value in {**passed, **ours}.items()])
        first = f"HTTP/1.1 {status} {_REASONS.get(status, '')}\r\n"
        return f"{first}{lines}server: vramp\r\n{framing}{self._lane.dates.now()}".encode("utf-8", "surrogateescape")


class Dates:
    """The last line of every head, made once a second."""

    __slots__ = ("_second", "_text")

    def __init__(self) -> None:
        self._second = 0
        self._text = ""

    def now(self) -> str:
        """The `Date` header, and the empty line."""
        second = int(time.time())
        if second != self._second:
            self._second = second
            self._text = f"Date: {formatdate(second, usegmt=True)}\r\n\r\n"
        return self._text


def _rest_of_head(headers: Mapping[str, str], size: int) -> bytes:
    passed = "".join([f"{name}: {value}\r\n" for name, value in forwarded(headers).items()])
    return f"{passed}content-length: {size}\r\n\r\n".encode("ascii")


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data) if data else b""
