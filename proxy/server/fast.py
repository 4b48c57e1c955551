"""The fast lane: calls that go straight through, over the relay of `ext`; Python decides, native code carries.

It answers nothing of its own but what has begun. A request that it does not recognise, must not decide alone, or cannot
answer goes to aiohttp with its connection, and is parsed there again; one that failed before its answer began takes
along how (`Tried`), so that the next candidate is tried, or the error told, by the ordinary lane. The steps are that
lane's own functions: keys, decoding, routing, leases and slots, records, metrics, the access log.

What is decided on one kind of request is left to the relay for those that follow (`proxy.server.flows`).

What is decided here never waits: a model that is not loaded, a lease or a slot that is not free, a host name that is
not resolved are all reasons to hand over.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
from copy import copy
from math import inf
from typing import Protocol, cast

import msgspec

from ext.relay import TICK_S, Client, Flow, Lease, Pool, Relay
from ext.relay import Exchange as RelayExchange
from proxy.dialects.call import Call
from proxy.dialects.decode import estimated_tokens, session_of
from proxy.dialects.splice import edits_of
from proxy.errors import CallError, InvalidRequest
from proxy.gate.limits import withdraw
from proxy.observe.outcome import Outcome
from proxy.server.fast_exchange import Exchange
from proxy.server.fast_plans import Plan, Plans
from proxy.server.flows import NAMED_S, flow_of
from proxy.server.handler import LEFT, Handed, Handler, given_request_id, new_request_id
from proxy.server.head import Dates
from proxy.server.journey import FORWARDED, forwarded, ticket_for
from proxy.server.packing import PATH as EMBEDDINGS
from proxy.server.packing import Packer
from proxy.server.record import PASSED, PASSED_PREFIXES
from proxy.server.state import State
from proxy.server.targets import Target, Targets
from proxy.server.turns import Turns

log = logging.getLogger("vramp.server")

HANDSHAKE_S = 10.0  # of TLS, for a client
NO_REQUEST = b"\0"  # no parser waits for more of it
PATHS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/messages")
KEPT = ("authorization", "x-api-key", "api-key", "host", "x-request-id", "x-vramp-class", "x-vramp-session", *FORWARDED)
# Headers that change how a request is read, or ask for what takes time: their requests are for the ordinary lane.
FOREIGN = ("expect", "upgrade", "content-encoding", "trailer", "http2-settings", "proxy-connection", "x-vramp-")


class Known(msgspec.Struct, eq=False):
    """What is alike in all requests of one kind: those that say the same but for their messages (`Client.memo`).

    Who asks is looked up once for such requests, and again as soon as the configuration, and so the keys, are others.
    """

    state: State
    plan: Plan
    call: Call
    outcome: Outcome  # copied
    request_id: str | None  # the client's own
    lines: bytes  # its headers that go upstream
    target: Target | None  # where to, if that is no engine
    flow: Flow | None = None  # for those that follow
    until_s: float = 0.0  # it is good until then, on the relay's clock


class Serves(Protocol):
    """Makes the protocol of a connection that aiohttp goes on with."""

    def __call__(self, handed: Handed) -> asyncio.Protocol:
        """Of a connection that was here first."""
        ...


class FastLane:
    """Accepts connections, and decides on their requests. `http` goes on with those that are not for here."""

    def __init__(
        self,
        handler: Handler,
        http: Serves,
        *,
        keepalive_s: float,
        stall_s: float,
        shared: bool = False,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        """`shared`: other processes accept from the same sockets. With `tls` clients speak that."""
        self.handler = handler
        self._shared = shared
        self._tls = tls
        self._turns: list[Turns] = []
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
            stall_s=stall_s,
            handshake_s=HANDSHAKE_S,
        )
        self._targets = Targets(self._loop)
        self._configured(handler.state)
        handler.on_change = self._changed
        self._tasks: set[asyncio.Task[object]] = set()
        self._loop.add_reader(self._relay.fileno(), self._relay.pump)
        self._timer: asyncio.TimerHandle | None = None
        self._tick()

    def listen(self, listening: socket.socket) -> None:
        """Accept from this socket, which is ours from now on."""
        listening.setblocking(False)
        if not self._shared:
            self._relay.listen(listening.detach(), tls=self._tls)
            return
        listener = self._relay.listen(listening.dup().detach(), watched=False, tls=self._tls)
        self._turns.append(Turns(listening, listener.accept))

    @property
    def now_s(self) -> float:
        """The relay's clock."""
        return self._relay.now_s

    # ---- what a listener does (`http.Listener`)

    def stop(self) -> None:
        """Accept nothing more; connections go on."""
        for turns in self._turns:
            turns.close()
        self._relay.stop_listening()

    def cut_off(self) -> None:
        """End what is in flight here with what can still be said."""
        self._relay.cut_off()

    def close(self) -> None:
        """Close all connections."""
        if self._timer is None:
            return
        self.stop()
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
        if handler.leaving or not handler.ready:
            return None
        self._relay.passing = True
        if not client.scan():
            return None
        known: Known | None = client.memo
        again = known is not None and known.state is state
        if known is None or not again:
            known = self._known(client)
        now_s = self._relay.now_s
        outcome = self._outcome(client, known, known.request_id or new_request_id(), now_s)
        state.limits.admit(outcome, known.plan.call, now_s)
        exchange = Exchange(self, known.plan, client, outcome, now_s)
        placed = False
        try:
            placed = self._placed(exchange, known)
        finally:
            if not placed:
                withdraw(outcome)
        if not placed:
            return None
        handler.begin()
        if known.request_id is None:  # an id of its own makes each a kind of its own
            client.remember(known, self._flow(client, known) if again else None)
        return exchange

    def resume(self, client: Client) -> RelayExchange:
        """See `Owner`: as if it had been decided here and had come as far as it is."""
        known: Known = cast("Flow", client.flow).origin
        plan = known.plan
        outcome = self._outcome(client, known, client.request_id, client.began_s)
        outcome.grant = client.take_grant()
        if outcome.grant is not None:
            outcome.rate_limits = outcome.grant.headers
        exchange = Exchange(self, plan, client, outcome, client.began_s)
        if client.lease is not None:
            _, _, exchange.ticket_id, exchange.engine_id = client.lease
        else:
            exchange.slots = plan.provider.slots
        exchange.resume(client.scanner, client.passed, client.output_s, client.first_bytes_out)
        return exchange

    def _outcome(self, client: Client, known: Known, request_id: str, now_s: float) -> Outcome:
        outcome: Outcome = known.outcome.__copy__()  # type: ignore[attr-defined]  # copy() takes twice as long to find it
        outcome.request_id, outcome.started_s = request_id, now_s
        outcome.remote, outcome.bytes_in = client.remote, client.body_size
        return outcome

    def _known(self, client: Client) -> Known:
        """What a request says that nobody has said before. Raises `CallError`."""
        headers, state = client.headers, self._state
        tenant = state.keys.authenticate(headers)
        plan = self._plans.find(client.path, headers, client.short)
        outcome = copy(plan.outcome)
        outcome.tenant = tenant
        call = copy(plan.call)
        call.tenant, call.session = tenant, session_of(headers)
        lines = "".join([f"{name}: {value}\r\n" for name, value in forwarded(headers).items()])
        target = None if plan.candidate.local else self._targets.find(plan.provider, plan.upstream_path, None)
        return Known(state, plan, call, outcome, given_request_id(headers), lines.encode("ascii"), target)

    def _flow(self, client: Client, known: Known) -> Flow | None:
        """For the requests of this kind that follow. The first makes none: where each has a trace or a user of its own,
        there is no second."""
        plan, target, now_s = known.plan, known.target, self._relay.now_s
        if plan.candidate.local and self._packer(plan) is not None:
            return None  # whether it goes together with others is asked for each
        if known.until_s <= now_s:
            pool = self._pool(target)
            known.until_s = inf if target is None or target.pool is not None else now_s + NAMED_S
            known.flow = flow_of(
                self.handler,
                known,
                known.plan,
                known.outcome,
                client.spans,
                pool,
                b"" if target is None else _head(target, known),
                until_s=known.until_s,
            )
        return known.flow

    def _configured(self, state: State) -> None:
        self._state = state
        self._plans = Plans(state)
        self._targets.forget()
        self._relay.bound(state.max_header, state.max_body, state.max_depth)

    def _changed(self) -> None:
        """What was decided may not hold any more: until something is decided again, every request is asked about."""
        self._relay.passing = False
        self._relay.forget_flows()

    def _placed(self, exchange: Exchange, known: Known) -> bool:
        """Find room for it and a way to it; False where either would take time."""
        plan = exchange.plan
        if plan.candidate.local:
            return self._on_engine(exchange, known)
        slots = plan.provider.slots
        if slots is not None and not slots.take_now():
            return False
        exchange.slots = slots
        sent = False
        try:
            sent = self._sent(exchange, known, known.target)
        finally:
            if not sent and slots is not None:
                slots.give()
        return sent

    def _on_engine(self, exchange: Exchange, known: Known) -> bool:
        plan, client = exchange.plan, exchange.client
        name = plan.candidate.deployment.name
        packer = self._packer(plan)
        if packer is not None and packer.is_busy(name):
            return False  # it may go together with others
        lease = self._lease(known, client.body_size, exchange.outcome.started_s)
        if lease is None:
            return False
        pool, head, exchange.ticket_id, exchange.engine_id = lease
        if packer is not None:
            exchange.packer = packer
            packer.begin(name)
        self._forward(client, plan, pool, head)
        return True

    def lease(self, client: Client, origin: Known) -> Lease | None:
        """See `Owner`."""
        try:
            return self._lease(origin, client.body_size, self._relay.now_s)
        except Exception:
            log.exception("the fast lane could not lease")
            return None

    def _lease(self, known: Known, size: int, now_s: float) -> Lease | None:
        """An engine for a request whose body has this size: where to, the head, the ticket, the engine."""
        plan, leases = known.plan, self.handler.leases
        ticket = ticket_for(known.call, plan.candidate, known.state, leases, now_s, estimated_tokens(size))
        lease = leases.lease_now(ticket)
        if lease is None:
            return None
        pool = None
        try:
            target = self._targets.find(plan.provider, plan.upstream_path, lease.base_url)
            pool = self._pool(target)
        finally:
            if pool is None:
                leases.give_back(ticket.id)
        if target is None or pool is None:
            return None
        return pool, _head(target, known), ticket.id, lease.engine_id

    def give_back(self, lease: Lease, prompt_tokens: int | None, output_tokens: int) -> None:
        """See `Owner`."""
        self.handler.leases.give_back(lease[2], prompt_tokens, None if prompt_tokens is None else output_tokens)

    def _packer(self, plan: Plan) -> Packer | None:
        return plan.state.packer if plan.call.endpoint.path == EMBEDDINGS else None

    def _sent(self, exchange: Exchange, known: Known, target: Target | None) -> bool:
        """Tell the relay where it goes; False where that is not known at once."""
        pool = self._pool(target)
        if target is None or pool is None:
            return False
        self._forward(exchange.client, exchange.plan, pool, _head(target, known))
        return True

    def _forward(self, client: Client, plan: Plan, pool: Pool, head: bytes) -> None:
        client.forward(pool, head, edits_of(client.spans, plan.changes) if plan.changes else [], plan.limits)

    def _pool(self, target: Target | None) -> Pool | None:
        return None if target is None else target.pool or self._targets.resolved(target.straight)

    def date(self) -> bytes:
        """See `Owner`."""
        return self.dates.now().encode("ascii")

    def take_back(self, connection: socket.socket, data: bytes, remote: str) -> None:
        """Go on with a connection from the start of a request on, of which this was read. It is ours from now on."""
        connection.setblocking(False)
        self._relay.take_back(connection.detach(), data, remote)

    def hand_over(self, fd: int, data: bytes, exchange: RelayExchange | None, remote: str, whole: bool) -> None:
        """See `Owner`: aiohttp goes on with the connection."""
        tried = exchange.tried if isinstance(exchange, Exchange) else None
        self._hand_over(fd, Handed(data, tried, remote, self.take_back if whole else None))

    def refuse_bare(self, fd: int, remote: str) -> None:
        """See `Owner`: aiohttp tells it, and lingers while it goes on sending."""
        refusal = InvalidRequest("TLS is spoken here: use https:// in place of http://.", code="https_required")
        self._hand_over(fd, Handed(NO_REQUEST, None, remote, None, refusal))

    def _hand_over(self, fd: int, handed: Handed) -> None:
        connection = socket.socket(fileno=fd)
        connection.setblocking(False)
        task = self._loop.create_task(self._connect(connection, handed), name="hand over")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _connect(self, connection: socket.socket, handed: Handed) -> None:
        try:
            await self._loop.connect_accepted_socket(lambda: self._http(handed), connection)
        except OSError:  # it went in the meantime
            connection.close()
            if (tried := handed.tried) is not None:
                tried.outcome.status, tried.outcome.error = LEFT, "client_left"
                self.handler.end(tried.outcome, self._loop.time())

    def bug(self, exchange: RelayExchange | None) -> None:
        """See `Owner`."""
        log.exception("the fast lane failed in us")
        if isinstance(exchange, Exchange):
            exchange.abandon()


def _head(target: Target, known: Known) -> bytes:
    """Of a request upstream, without its length."""
    return target.straight.head + known.lines if known.lines else target.straight.head
