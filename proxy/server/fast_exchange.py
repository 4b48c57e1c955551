"""One call on the fast lane, from the upstream's first byte to the settling."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import msgspec

from ext.relay import Client, Failure
from ext.sse import EventScanner
from proxy.dialects.envelope import event_for
from proxy.errors import CallError, UpstreamFailed
from proxy.observe.outcome import Outcome
from proxy.providers.base import Broken, Unreachable
from proxy.providers.slots import Slots
from proxy.server.answer import STREAM_HEADERS, closing_comment
from proxy.server.fast_plans import Plan
from proxy.server.handler import LEFT, Handler, Tried, cut_off_error, total_error
from proxy.server.head import Dates, head_of
from proxy.server.journey import FAILOVER_STATUSES, AttemptFailed, EngineBroke, error_of, first_byte_error
from proxy.server.packing import Packer
from proxy.server.record import begun, check_body, is_whole, record_body, record_stream, refusal_of, withholds_usage
from proxy.server.relay import idle_error

MOST_COMMENTS = 4096
LAST_CHUNK = b"0\r\n\r\n"
_CHUNKED = "Transfer-Encoding: chunked\r\n"


class Settles(Protocol):
    """The lane, as an exchange needs it."""

    handler: Handler
    dates: Dates

    @property
    def now_s(self) -> float:
        """The clock of this turn."""
        ...


class Exchange(msgspec.Struct, eq=False):
    """One call on its way, as the relay asks about it (`ext.relay.Exchange`).

    Invariant: what is held goes back, and the outcome is settled or handed over as `tried`, each exactly once.
    """

    lane: Settles
    plan: Plan
    client: Client
    outcome: Outcome
    asked_s: float
    slots: Slots | None = None
    ticket_id: int = 0
    engine_id: str | None = None
    scanner: EventScanner | None = None
    headers: Mapping[str, str] = {}  # of a stream
    comments: bytes = b""  # that were held back
    lengthy: bool = False  # the client was told a length
    packer: Packer | None = None  # who was told that this engine is busy with it
    settled: bool = False
    tried: Tried | None = None

    # ---- answers

    def scan(self, headers: dict[str, str]) -> EventScanner:
        """The answer is an event stream: what each piece of it goes through."""
        self.headers = headers
        self.scanner = EventScanner(withhold_usage=withholds_usage(self.plan.call))
        return self.scanner

    def begin(self, events: bytes) -> tuple[bytes, bool]:
        """The first events, in a stream of ours if it is time; whether they are output.

        An upstream's comment is its sign of life, no output. It goes out at once, which fixes the status, unless
        somebody else may answer if this one fails: then it goes with the output, or not at all.
        """
        outcome, started = self.outcome, self.client.started
        output = self.scanner is not None and begun(self.scanner)
        if not output and not started and self.plan.may_fail_over:
            self.comments = (self.comments + events)[:MOST_COMMENTS]
            return b"", False
        lead = b""
        if output:
            self._first_byte(self.lane.now_s)
            events = (closing_comment(outcome) if started else self.comments) + events
        if not started:
            outcome.status = 200
            passed = self.headers if output else {}
            lead = self._head(200, {**STREAM_HEADERS, **passed}, _CHUNKED, waiting=not output)
        outcome.bytes_out += len(events)
        return lead + _chunk(events), output

    def large(self, status: int, headers: dict[str, str], length: int) -> bytes:
        """The head of an answer that is not held."""
        self._first_byte(self.client.first_byte_s)
        self.outcome.status = status
        self.lengthy = length >= 0
        return self._head(status, headers, _length(length) if self.lengthy else _CHUNKED)

    def whole(self, status: int, headers: dict[str, str], body: bytes) -> bytes | None:
        """A whole answer that is not an event stream; None where it is none to pass on."""
        call, outcome = self.plan.call, self.outcome
        if not 200 <= status < 300:
            candidate = self.plan.candidate
            refused = refusal_of(call, status, headers, body, where=candidate.where, local=candidate.local)
            self._leave(AttemptFailed(refused) if status in FAILOVER_STATUSES else refused)
            return None
        if body:
            self._first_byte(self.client.first_byte_s)
        try:
            check_body(call, headers, body)
        except UpstreamFailed as failed:
            self._leave(failed)
            return None
        record_body(outcome, body)
        outcome.status = status
        outcome.bytes_out += len(body)
        head = self._head(status, headers, _length(len(body)))
        self._settle()
        return head + body

    def ended(self, tail: bytes) -> bytes | None:
        """The end of an answer that was begun."""
        outcome, scanner = self.outcome, self.scanner
        if scanner is None:
            record_body(outcome, tail)
            self._settle()
            return b"" if self.lengthy else LAST_CHUNK
        rest = scanner.flush()
        if not is_whole(self.plan.call, scanner) or not (rest or self.client.started):
            record_stream(outcome, scanner)
            return self._end_with(self._broken(Broken("the stream ended in the middle")))
        record_stream(outcome, scanner)
        if self.client.started:
            outcome.bytes_out += len(rest)
            last = _chunk(rest)
        else:
            last = self.begin(rest)[0]
        self._settle()
        return last + LAST_CHUNK

    def _head(self, status: int, headers: Mapping[str, str], framing: str, *, waiting: bool = False) -> bytes:
        outcome = self.outcome
        head = head_of(status, outcome.headers(headers, waiting=waiting), outcome.rate_limits)
        return f"{head}{framing}{self.lane.dates.now()}".encode("utf-8", "surrogateescape")

    def resume(self, scanner: EventScanner | None, headers: Mapping[str, str], output_s: float, bytes_out: int) -> None:
        """It came as far as this without asking here: what its stream goes through, and when its output began."""
        self.scanner, self.headers = scanner, headers
        if output_s:
            self._first_byte(output_s)
            self.outcome.status = 200
            self.outcome.bytes_out = bytes_out

    # ---- failures

    def failed(self, kind: int, words: str) -> bytes | None:
        """The end of an exchange without a whole answer."""
        outcome = self.outcome
        if self.scanner is not None:
            record_stream(outcome, self.scanner)
        if kind in (Failure.LEFT, Failure.STALLED):
            outcome.status = LEFT
            outcome.error = "client_stalled" if kind == Failure.STALLED else outcome.error or "client_left"
            self._settle()
            return None
        return self._end_with(self._failure(kind, words))

    def _end_with(self, failure: CallError | AttemptFailed) -> bytes | None:
        outcome = self.outcome
        if not self.client.started:
            self._leave(failure)
            return None
        error = failure.error if isinstance(failure, AttemptFailed) else failure
        outcome.error = error.code or error.type
        if self.scanner is None:
            self._settle()
            return None  # half of a body that has a length or is one JSON: an end that looks regular would be a lie
        event = event_for(self.plan.call.endpoint.dialect, error, outcome.request_id)
        outcome.bytes_out += len(event)
        self._settle()
        return _chunk(event) + LAST_CHUNK

    def abandon(self) -> None:
        """A bug of ours ended it."""
        if not self.settled:
            self.outcome.status = self.outcome.status or 500
            self.outcome.error = "internal"
            self._settle()

    def _failure(self, kind: int, words: str) -> CallError | AttemptFailed:
        timeouts = self.plan.state.config.timeouts
        if kind == Failure.FIRST_BYTE:
            return first_byte_error(timeouts)
        if kind == Failure.IDLE:
            return idle_error(timeouts)
        if kind == Failure.TOTAL:
            return total_error(timeouts)
        if kind == Failure.STOPPING:
            return cut_off_error()
        name = self.plan.candidate.deployment.backend.name
        return self._broken((Unreachable if kind == Failure.UNREACHABLE else Broken)(f"backend {name}: {words}"))

    def _broken(self, problem: Unreachable | Broken) -> AttemptFailed:
        error = error_of(self.plan.call, problem)
        return AttemptFailed(error) if self.engine_id is None else EngineBroke(error, self.engine_id)

    def _leave(self, failure: CallError | AttemptFailed) -> None:
        """The ordinary lane tells the client, or finds somebody else who answers."""
        self._give_back()
        self.settled = True
        self.tried = Tried(self.outcome, failure)

    # ---- records

    def _first_byte(self, at_s: float) -> None:
        self.outcome.upstream_s = at_s - self.asked_s
        self.outcome.first_byte_s = at_s - self.outcome.started_s

    def _settle(self) -> None:
        self.settled = True
        self.outcome.bytes_out += self.client.bytes_out
        self._give_back()
        self.lane.handler.end(self.outcome, self.lane.now_s)

    def unpack(self) -> None:
        """Others need not gather because of this one any more. Idempotent."""
        packer, self.packer = self.packer, None
        if packer is not None:
            packer.end(self.plan.candidate.deployment.name)

    def _give_back(self) -> None:
        """What is held goes back before anybody else may need it."""
        if self.slots is not None:
            self.slots.give()
        elif self.ticket_id:
            self.unpack()
            used = self.outcome.prompt_tokens if self.outcome.error is None else None
            output = None if used is None else self.outcome.output_tokens or 0
            self.lane.handler.leases.give_back(self.ticket_id, used, output)


def _length(size: int) -> str:
    return f"Content-Length: {size}\r\n"


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data) if data else b""
