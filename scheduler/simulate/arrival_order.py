"""The load cost of an eviction policy alone: every request served to its end before the next comes.

A policy that reorders requests loads less without evicting any better, so its ratio to B1 comes from this second pass,
through the same core.
"""

from __future__ import annotations

from collections.abc import Sequence

from scheduler.commands import Admit, Command, Load, Stop
from scheduler.core import Core
from scheduler.events import Arrived, EngineReady, EngineStopped, Event, Finished
from scheduler.model import Ticket
from scheduler.simulate.traces import Request


def load_cost(core: Core, requests: Sequence[Request]) -> float:
    """Seconds of loads, each request in its turn; loads and answers take no time on the trace's clock."""
    paid = 0.0
    for index, request in enumerate(requests):
        events: list[Event] = [Arrived(Ticket(index, request.model))]
        while events:
            for command in core.step(events.pop(0), request.at_s):
                if isinstance(command, Load):
                    paid += core.models[command.model].spec.load_estimate_s
                events += _answer(core, command)
    return paid


def _answer(core: Core, command: Command) -> list[Event]:
    match command:
        case Admit(ticket_id):
            return [Finished(ticket_id)]
        case Load(engine_id, model, device):
            return [EngineReady(engine_id, model, device, core.models[model].spec.load_estimate_s)]
        case Stop(engine_id):
            return [EngineStopped(engine_id)]
        case _:
            return []
