"""The scheduler's desk for one worker: its tickets, its credit, its questions."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from proxy.workers.messages import Answer, Ask, Declined, Describe, Done, Granted, Lent, Lost, Recall, Report
from scheduler.commands import Credit
from scheduler.driver import Refused, Scheduler, Waiting
from scheduler.events import CreditAsked, CreditReported, HolderCame, HolderGone
from scheduler.model import RefusalCode, Ticket

log = logging.getLogger("vramp.workers")


class Desk:
    """Serves the worker that is known to the core as `holder`. After `close` nothing of it is held or waits."""

    def __init__(self, holder: int, scheduler: Scheduler, send: Callable[[object], None]) -> None:
        self.holder = holder
        self._scheduler = scheduler
        self._send = send
        self._waiting: dict[int, Waiting] = {}
        self._questions: set[asyncio.Task[None]] = set()

    @property
    def tickets(self) -> int:
        """How many of its tickets wait or hold a lease that was asked for."""
        return len(self._waiting)

    def hear(self, message: Ask | Done | Report | Describe | Lost) -> None:
        """One message of the worker."""
        match message:
            case Ask(ticket):
                self._ask(ticket)
            case Done(ticket_id, prompt_tokens, output_tokens):
                self._done(ticket_id, prompt_tokens, output_tokens)
            case Report():
                self._report(message)
            case Describe(number, ticket_id):
                self._send(Answer(number, self._scheduler.describe(ticket_id)))
            case Lost(number, engine_id):
                task = asyncio.get_running_loop().create_task(self._lost(number, engine_id))
                self._questions.add(task)
                task.add_done_callback(self._questions.discard)

    def open(self) -> None:
        """The worker is there, and may be lent room."""
        self._scheduler.dispatch(HolderCame(self.holder))

    def lend(self, credit: Credit) -> None:
        """The core has given this worker credit."""
        _, base_url = self._scheduler.engine_urls()[credit.engine_id]
        self._send(
            Lent(credit.model, credit.engine_id, base_url, credit.sequences, credit.tokens, credit.output_tokens)
        )

    def recall(self, engine_id: str) -> None:
        """The core wants its credit on this engine back."""
        self._send(Recall(engine_id))

    def close(self) -> None:
        """The worker has gone: what it held comes back, what it waited for is withdrawn."""
        for task in self._questions:
            task.cancel()
        waiting, self._waiting = self._waiting, {}
        for each in waiting.values():
            each.close()
        self._scheduler.dispatch(HolderGone(self.holder))

    def _ask(self, ticket: Ticket) -> None:
        try:
            waiting = self._waiting[ticket.id] = self._scheduler.lease(ticket)
        except Exception:  # a bug of ours: this one request fails, as it would with the scheduler in its process
            log.exception("a ticket could not be taken")
            self._send(Declined(ticket.id, RefusalCode.STOPPING, "an error of vramp itself; its log has more", None))
            return
        if waiting.done:
            if self._answer(waiting):
                self._scheduler.dispatch(CreditAsked(self.holder, ticket.model))
        else:
            waiting.when_done(self._answer)

    def _answer(self, waiting: Waiting) -> bool:
        """Tell the worker what became of a ticket; True for a lease."""
        ticket_id = waiting.ticket.id
        if ticket_id not in self._waiting:
            return False  # withdrawn in the same turn of the loop
        try:
            lease = waiting.result()
        except Refused as refused:
            del self._waiting[ticket_id]
            self._send(Declined(ticket_id, refused.code, refused.reason, refused.retry_after_s))
            return False
        self._send(Granted(ticket_id, lease.engine_id, lease.base_url, lease.queue_s, lease.load_s))
        return True

    def _done(self, ticket_id: int, prompt_tokens: int | None, output_tokens: int | None) -> None:
        waiting = self._waiting.pop(ticket_id, None)
        if waiting is None:
            return  # it was declined meanwhile
        if prompt_tokens is not None and output_tokens is not None:
            waiting.used(prompt_tokens, output_tokens)
        waiting.close()

    def _report(self, report: Report) -> None:
        engine_id = report.engine_id
        self._scheduler.dispatch(
            CreditReported(
                self.holder,
                engine_id,
                report.begun,
                report.in_use,
                report.served,
                report.sequences,
                report.tokens,
            )
        )
        if report.low:
            self._scheduler.dispatch(CreditAsked(self.holder, engine_id.rpartition("#")[0]))

    async def _lost(self, number: int, engine_id: str) -> None:
        self._send(Answer(number, await self._scheduler.lost(engine_id)))
