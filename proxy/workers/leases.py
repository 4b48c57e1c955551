"""Leases in a worker: from credit where there is some, else from the proxy.

With credit a lease costs no message. What was done with it is reported some times a second; it all goes back when it is
recalled. Times are monotonic seconds, which all processes of a machine share.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable
from types import TracebackType
from typing import Self

import msgspec

from proxy.workers.messages import Answer, Ask, Declined, Describe, Done, Granted, Lent, Lost, Recall, Report
from scheduler.driver import Lease, Refused
from scheduler.events import Served
from scheduler.model import Ticket

REPORT_S = 0.05
NUMBERS = 1 << 40  # of tickets, for each worker that ever was


class _Credit:
    """Credit on one engine. Invariant: sequences and tokens are unused; recalled implies that both are 0."""

    __slots__ = ("asked", "back_sequences", "back_tokens", "begun", "engine_id", "in_use", "lease", "output_tokens",
                 "recalled", "sequences", "served", "tokens", "tokens_in_use")  # fmt: skip

    def __init__(self, lent: Lent) -> None:
        self.engine_id = lent.engine_id
        self.lease = Lease(lent.engine_id, lent.base_url, 0.0, 0.0)
        self.sequences = self.tokens = self.output_tokens = 0
        self.in_use = self.tokens_in_use = 0
        self.recalled = False
        self.asked = False  # for more, since the last regular report
        # since the last report
        self.back_sequences = self.back_tokens = 0
        self.begun: list[tuple[str, str]] = []
        self.served: list[Served] = []

    @property
    def low(self) -> bool:
        return not self.recalled and (self.sequences < self.in_use or self.tokens < self.tokens_in_use)

    def report(self) -> Report:
        """What has happened since the last one."""
        report = Report(
            self.engine_id,
            tuple(self.begun),
            self.in_use,
            tuple(self.served),
            self.back_sequences,
            self.back_tokens,
            self.low,
        )
        self.back_sequences = self.back_tokens = 0
        self.begun, self.served = [], []
        return report


class _Used(msgspec.Struct):
    """A lease that was granted from credit."""

    credit: _Credit
    ticket: Ticket
    tokens: int
    since_s: float


class RemoteLeases:
    """`proxy.server.journey.Leases` in a worker. `hear` takes the proxy's messages about leases; `now` is a clock.

    Invariant: every ticket is in at most one of `_used` (granted from credit) and `_asked` (the proxy knows of it).
    """

    def __init__(self, holder: int, send: Callable[[object], None], now: Callable[[], float] | None = None) -> None:
        self._send = send
        self._loop = asyncio.get_running_loop()
        self._now = now or self._loop.time
        self._numbers = itertools.count(holder * NUMBERS + 1)
        self._credits: dict[str, _Credit] = {}  # by model
        self._engines: dict[str, _Credit] = {}  # by engine
        self._used: dict[int, _Used] = {}
        self._asked: dict[int, RemoteWaiting] = {}
        self._questions: dict[int, asyncio.Future[str | bool]] = {}
        self._changed: dict[str, _Credit] = {}  # credits with something to report, by engine
        self._timer: asyncio.TimerHandle | None = None

    # ---- what a journey asks (`Leases`)

    def new_ticket_id(self) -> int:
        """A number no other ticket of any worker has."""
        return next(self._numbers)

    def lease_now(self, ticket: Ticket) -> Lease | None:
        """A lease from credit, if there is enough of it. A microsecond or two."""
        credit = self._credits.get(ticket.model)
        if credit is None or not credit.sequences:
            return None
        tokens = ticket.weight_tokens + credit.output_tokens if ticket.open_ended else ticket.weight_tokens
        if tokens > credit.tokens:
            return None
        credit.sequences -= 1
        credit.tokens -= tokens
        credit.in_use += 1
        credit.tokens_in_use += tokens
        credit.begun.append((ticket.tenant, ticket.session))
        self._used[ticket.id] = _Used(credit, ticket, tokens, self._now())
        if credit.low and not credit.asked:
            credit.asked = True
            self._report(credit)
        else:
            self._report_soon(credit)
        return credit.lease

    def give_back(self, ticket_id: int, prompt_tokens: int | None = None, output_tokens: int | None = None) -> None:
        """Return what `lease_now` gave, once."""
        used = self._used.pop(ticket_id)
        credit, ticket = used.credit, used.ticket
        credit.in_use -= 1
        credit.tokens_in_use -= used.tokens
        credit.served.append(
            Served(
                ticket.tenant,
                ticket.latency_class,
                used.since_s,
                self._now(),
                ticket.open_ended,
                prompt_tokens,
                output_tokens,
            )
        )
        if credit.recalled:
            credit.back_sequences += 1
            credit.back_tokens += used.tokens
            self._report(credit)
        else:
            credit.sequences += 1
            credit.tokens += used.tokens
            self._report_soon(credit)

    def lease(self, ticket: Ticket) -> RemoteWaiting:
        """Ask for a lease, if credit does not cover it; leaving the `with` block withdraws or returns it."""
        waiting = RemoteWaiting(self, ticket, self._loop.create_future())
        lease = self.lease_now(ticket)
        if lease is not None:
            waiting.settle(lease)
        else:
            self._asked[ticket.id] = waiting
            self._send(Ask(ticket))
        return waiting

    async def lost(self, engine_id: str) -> bool:
        """Whether an engine that broke off has died."""
        return bool(await self._question(lambda number: Lost(number, engine_id)))

    async def describe(self, ticket_id: int) -> str:
        """What a ticket waits for."""
        if ticket_id not in self._asked:
            return ""
        return str(await self._question(lambda number: Describe(number, ticket_id)))

    def close_ticket(self, waiting: RemoteWaiting) -> None:
        """Withdraw a ticket, or give its lease back."""
        ticket_id = waiting.ticket.id
        used = waiting.usage or (None, None)
        if ticket_id in self._used:
            self.give_back(ticket_id, *used)
        elif self._asked.pop(ticket_id, None) is not None:
            self._send(Done(ticket_id, *used))

    # ---- what the proxy says

    def hear(self, message: Granted | Declined | Lent | Recall | Answer) -> None:
        """One message. What comes for somebody who has left is late news: its ticket is withdrawn already."""
        match message:
            case Granted(ticket_id, engine_id, base_url, queue_s, load_s):
                if (waiting := self._asked.get(ticket_id)) is not None:
                    waiting.settle(Lease(engine_id, base_url, queue_s, load_s))
            case Declined(ticket_id, code, reason, retry_after_s):
                if (waiting := self._asked.pop(ticket_id, None)) is not None:
                    waiting.settle(Refused(code, reason, retry_after_s))
            case Lent():
                self._lent(message)
            case Recall(engine_id):
                self._recall(engine_id)
            case Answer(number, says):
                if (asked := self._questions.pop(number, None)) is not None and not asked.done():
                    asked.set_result(says)

    def _lent(self, lent: Lent) -> None:
        credit = self._engines.get(lent.engine_id)
        if credit is None:
            credit = self._engines[lent.engine_id] = _Credit(lent)
        credit.recalled = False
        credit.sequences += lent.sequences
        credit.tokens += lent.tokens
        credit.output_tokens = lent.output_tokens
        self._credits[lent.model] = credit

    def _recall(self, engine_id: str) -> None:
        credit = self._engines.get(engine_id)
        if credit is None:
            return
        credit.recalled = True
        credit.back_sequences, credit.sequences = credit.back_sequences + credit.sequences, 0
        credit.back_tokens, credit.tokens = credit.back_tokens + credit.tokens, 0
        self._report(credit)

    # ---- reports

    def _report_soon(self, credit: _Credit) -> None:
        self._changed[credit.engine_id] = credit
        if self._timer is None:
            self._timer = self._loop.call_later(REPORT_S, self.report)

    def report(self) -> None:
        """Tell of everything that has changed. By itself `REPORT_S` after the first change."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        changed, self._changed = self._changed, {}
        for credit in changed.values():
            credit.asked = False
            self._report(credit)

    def _report(self, credit: _Credit) -> None:
        self._changed.pop(credit.engine_id, None)
        self._send(credit.report())
        if credit.recalled and not credit.in_use:
            self._forget(credit)

    def _forget(self, credit: _Credit) -> None:
        self._engines.pop(credit.engine_id, None)
        for model in [model for model, each in self._credits.items() if each is credit]:
            del self._credits[model]

    async def _question(self, ask: Callable[[int], object]) -> str | bool:
        number = self.new_ticket_id()
        answer: asyncio.Future[str | bool] = self._loop.create_future()
        self._questions[number] = answer
        try:
            self._send(ask(number))
            return await answer
        finally:
            self._questions.pop(number, None)


class RemoteWaiting:
    """As `scheduler.driver.Waiting`: leaving the `with` block withdraws the ticket or gives its lease back, once."""

    __slots__ = ("_closed", "_future", "_leases", "ticket", "usage")

    def __init__(self, leases: RemoteLeases, ticket: Ticket, future: asyncio.Future[Lease]) -> None:
        self._leases = leases
        self._future = future
        self._closed = False
        self.ticket = ticket
        self.usage: tuple[int, int] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._closed:
            self._closed = True
            self._leases.close_ticket(self)

    async def granted(self) -> Lease:
        """The lease. Raises `Refused`. May be cancelled and awaited again."""
        return await asyncio.shield(self._future)

    async def describe(self) -> str:
        """One line on what is waited for. A round trip."""
        return await self._leases.describe(self.ticket.id)

    def used(self, prompt_tokens: int, output_tokens: int) -> None:
        """What the request really used."""
        self.usage = prompt_tokens, output_tokens

    def settle(self, result: Lease | Refused) -> None:
        """Called once, with the answer."""
        if isinstance(result, Refused):
            self._future.set_exception(result)
            self._future.exception()  # whoever left without asking must not cause a warning
        else:
            self._future.set_result(result)
