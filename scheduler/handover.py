"""How one version of the proxy hands its engines and its requests to the next, which runs beside it.

The one that leaves stops accepting, says which engines there are, which leases are out on them and who waits, and
decides no more. Its leases are held by the next scheduler as well, so that no engine is taken for idle that is not; its
waiting requests wait there, in the order in which they waited; and what still comes over its open connections asks
there for a lease. So nothing has to be waited for before the hand-over but loads and stops under way, and no request
notices.

`Leaver` is the end of the one that leaves, `Guests` that of the next. Between them the keeper carries messages, and
loses none: when the next one dies, the leaver tells everything again to the one after.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any, Protocol, TypeVar

import msgspec

from scheduler.commands import Revoke
from scheduler.driver import Lease, Refused, Scheduler
from scheduler.events import CreditReported, Event, HolderGone, ProbeAnswered
from scheduler.model import RefusalCode, Residency, Ticket

# To be raised when a version could misread what the one before says, tickets included: the keeper joins no two that
# differ, and says that this upgrade takes a restart.
PROTOCOL = 1
CHUNK = 50  # tickets in one message; a message is one packet

_T = TypeVar("_T")


class HandedEngine(msgspec.Struct, frozen=True):
    """An engine that serves, or sleeps, and what it said when it was asked the fixed question."""

    engine_id: str
    asleep: bool = False
    says: ProbeAnswered | None = None


class Held(msgspec.Struct, frozen=True, array_like=True):
    """A lease that is out. The ticket's weight is what it holds."""

    ticket: Ticket
    engine_id: str


class Holds(msgspec.Struct, frozen=True, tag=True):
    """Leases that are out: requests in flight."""

    leases: list[Held]


class Asks(msgspec.Struct, frozen=True, tag=True):
    """Tickets that want a lease, in order."""

    tickets: list[Ticket]


class Ends(msgspec.Struct, frozen=True, tag=True):
    """A ticket is over, with the tokens that it really used where they are known; or its caller waits no more."""

    ticket_id: int
    prompt_tokens: int | None = None
    output_tokens: int | None = None


class Grants(msgspec.Struct, frozen=True, tag=True):
    """A ticket has its lease."""

    ticket_id: int
    lease: Lease


class Refuses(msgspec.Struct, frozen=True, tag=True):
    """A ticket is turned away."""

    ticket_id: int
    code: RefusalCode
    reason: str
    retry_after_s: float | None = None


FromLeaver = Holds | Asks | Ends
ToLeaver = Grants | Refuses
Send = Callable[[dict[str, Any]], None]
Settle = Callable[[Lease | Refused], None]


class Leaver:
    """What is left of a scheduler that has handed over. `send` carries a message to whoever decides now.

    A ticket is in at most one of `_held` (it has its lease) and `_asked`, until it is over.
    """

    def __init__(self, send: Send) -> None:
        self._send = send
        self._held: dict[int, Held] = {}
        self._asked: dict[int, tuple[Ticket, Settle]] = {}
        self._lent: dict[tuple[int, str], list[int]] = {}  # by holder of credit and engine: a ticket for each sequence

    def lend(self, scheduler: Scheduler) -> Iterator[tuple[Ticket, str]]:
        """Credit that is out, as leases: a ticket for each sequence. It is called back, and ends them as it comes."""
        for model in scheduler.core.models.values():
            engine = model.engine
            if engine is None or not engine.credits.sequences:
                continue
            for holder, share in engine.credits:
                numbers = self._lent[holder, engine.id] = [scheduler.new_ticket_id() for _ in range(share.sequences)]
                weight = share.tokens // max(1, share.sequences)
                yield from ((Ticket(each, model.spec.name, weight_tokens=weight), engine.id) for each in numbers)
            scheduler.on_credit(Revoke(engine.id))

    def late(self, event: Event) -> None:
        """Credit comes back after the hand-over; nothing else that happens is ours any more."""
        if isinstance(event, CreditReported):
            numbers = self._lent.get((event.holder, event.engine_id), [])
            for _ in range(min(event.sequences, len(numbers))):
                self.end(numbers.pop())
        elif isinstance(event, HolderGone):
            for (holder, _), numbers in self._lent.items():
                while holder == event.holder and numbers:
                    self.end(numbers.pop())

    def begin(self, held: Iterable[tuple[Ticket, str]], asked: Iterable[tuple[Ticket, Settle]]) -> None:
        """What there is at the hand-over: leases with their engines, and who waits."""
        self._held = {ticket.id: Held(ticket, engine_id) for ticket, engine_id in held}
        self._asked = {ticket.id: (ticket, settle) for ticket, settle in asked}
        self.tell()

    def tell(self) -> None:
        """Tell everything, to one who knows nothing of it yet."""
        for leases in _chunks(self._held.values()):
            self._say(Holds(leases))
        for tickets in _chunks(ticket for ticket, _ in self._asked.values()):
            self._say(Asks(tickets))

    def ask(self, ticket: Ticket, settle: Settle) -> None:
        """Ask for a lease; `settle` is called with it, or with why there is none."""
        self._asked[ticket.id] = ticket, settle
        self._say(Asks([ticket]))

    def end(self, ticket_id: int, prompt_tokens: int | None = None, output_tokens: int | None = None) -> None:
        """A lease goes back, or a caller has gone. Unknown ids are late news."""
        if self._held.pop(ticket_id, None) or self._asked.pop(ticket_id, None):
            self._say(Ends(ticket_id, prompt_tokens, output_tokens))

    def hear(self, body: dict[str, Any]) -> None:
        """What the next scheduler says. Of a ticket that is over already it is late news: it has been told."""
        message = msgspec.convert(body, ToLeaver)
        ticket, settle = self._asked.pop(message.ticket_id, (None, None))
        if ticket is None or settle is None:
            return
        if isinstance(message, Grants):
            self._held[ticket.id] = Held(ticket, message.lease.engine_id)
            settle(message.lease)
        else:
            settle(Refused(message.code, message.reason, message.retry_after_s))

    def _say(self, message: FromLeaver) -> None:
        self._send(msgspec.to_builtins(message))


def hand_over(scheduler: Scheduler, leaver: Leaver) -> list[HandedEngine]:
    """Have a scheduler that is `settled` decide no more, and tell the next one what it has. The engines it leaves."""
    held, asked = scheduler.hand_over(leaver)
    leaver.begin([*held, *leaver.lend(scheduler)], asked)
    return [
        HandedEngine(model.engine.id, model.state is Residency.ASLEEP, model.engine.says)
        for model in scheduler.core.models.values()
        if model.engine is not None
    ]


class Waits(Protocol):
    """A ticket on its way to a lease, as `scheduler.driver.Waiting` is one."""

    def when_done(self, tell: Callable[[Any], object]) -> None:
        """Have somebody told, once it is granted or refused."""
        ...

    def result(self) -> Lease:
        """The lease. Raises `Refused`."""
        ...

    def used(self, prompt_tokens: int, output_tokens: int) -> None:
        """What the request really used."""
        ...

    def close(self) -> None:
        """Give everything back."""
        ...


class Host(Protocol):
    """The scheduler that decides now, as `scheduler.driver.Scheduler` is one."""

    def new_ticket_id(self) -> int:
        """A number that no other ticket has."""
        ...

    def lease(self, ticket: Ticket) -> Waits:
        """Ask for a lease."""
        ...

    def give_back(self, ticket_id: int, prompt_tokens: int | None = None, output_tokens: int | None = None) -> None:
        """Return a lease."""
        ...


class Guests:
    """Requests of the proxy before us. `send` carries a message to it.

    Its ticket ids and ours are counted separately: `_held` and `_asked` go by its, what they give to the scheduler by
    ours. What it says before `serve` is kept.
    """

    def __init__(self, send: Send) -> None:
        self._send = send
        self._host: Host | None = None
        self._held: dict[int, Held] = {}
        self._asked: dict[int, Ticket] = {}
        self._ours: dict[int, int] = {}
        self._waits: dict[int, Waits] = {}
        self._changed = asyncio.Event()

    def hear(self, body: dict[str, Any]) -> None:
        """What the proxy before us says."""
        message = msgspec.convert(body, FromLeaver)
        if isinstance(message, Holds):
            self._held.update((each.ticket.id, each) for each in message.leases)
        elif isinstance(message, Ends):
            self._end(message)
        elif self._host is None:
            self._asked.update((ticket.id, ticket) for ticket in message.tickets)
        else:
            for ticket in message.tickets:
                self._ask(self._host, ticket)

    def on(self, engine_id: str, host: Host) -> tuple[Ticket, ...]:
        """Its requests in flight on an engine, as tickets of this scheduler, which is to hold their leases."""
        tickets = []
        for number, held in self._held.items():
            if held.engine_id == engine_id:
                self._ours[number] = host.new_ticket_id()
                tickets.append(msgspec.structs.replace(held.ticket, id=self._ours[number]))
        return tuple(tickets)

    def serve(self, host: Host) -> None:
        """From now on its requests wait here."""
        self._host = host
        asked, self._asked = self._asked, {}
        for ticket in asked.values():
            self._ask(host, ticket)

    def gone(self) -> None:
        """It has ended: whatever it had is over."""
        for number in [*self._held, *self._asked, *self._waits]:
            self._end(Ends(number))

    async def left(self, engine_id: str) -> None:
        """Return when it has no request in flight on the engine."""
        while any(held.engine_id == engine_id for held in self._held.values()):
            self._changed.clear()
            await self._changed.wait()

    def _ask(self, host: Host, theirs: Ticket) -> None:
        waits = host.lease(msgspec.structs.replace(theirs, id=host.new_ticket_id()))
        self._waits[theirs.id] = waits
        waits.when_done(lambda _: self._settled(theirs.id, waits))

    def _settled(self, number: int, waits: Waits) -> None:
        if number not in self._waits:
            return  # it has ended meanwhile
        try:
            answer: ToLeaver = Grants(number, waits.result())
        except Refused as refused:
            self._waits.pop(number).close()
            answer = Refuses(number, refused.code, refused.reason, refused.retry_after_s)
        self._send(msgspec.to_builtins(answer))

    def _end(self, message: Ends) -> None:
        number, output = message.ticket_id, message.output_tokens
        self._asked.pop(number, None)
        self._held.pop(number, None)
        self._changed.set()
        waits, ours = self._waits.pop(number, None), self._ours.pop(number, None)
        if waits is not None:
            if output is not None:
                waits.used(message.prompt_tokens or 0, output)
            waits.close()
        elif ours is not None and self._host is not None:
            self._host.give_back(ours, message.prompt_tokens, output)


def _chunks(items: Iterable[_T]) -> Iterator[list[_T]]:
    rest = iter(items)
    while chunk := list(islice(rest, CHUNK)):
        yield chunk
