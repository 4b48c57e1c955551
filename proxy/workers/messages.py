"""What the proxy and its workers say to each other.

A stream socket carries frames: a length in four bytes (big endian), then a msgpack list of these messages, all that one
side had to say in one turn of its loop. Both ends are started from the same code, so there are no versions.

    worker                                   proxy
      Ask(ticket)                   ->                          whatever credit does not cover: one round trip
                                    <-  Granted | Declined
      Done(ticket_id)               ->                          its lease back, or it waits no longer
                                    <-  Lent                    credit: room in an engine to be filled without asking
      Report                        ->                          what was done with it, some times a second
                                    <-  Recall                  returned by Report at once, as far as it is unused
      Describe | Lost               ->                          questions of those who wait, or whose engine broke off
                                    <-  Answer
                                    <-  Configure, States       at the start, and when something has changed
      Serving                       ->                          it accepts
                                    <-  Count                   once a second; no answer for long: it hangs
      Counted                       ->
                                    <-  Reopen, Drain, Finish, Leave
      Drained                       ->
"""

from __future__ import annotations

import msgspec

from proxy.config import Config
from proxy.observe.metrics import Counts
from scheduler.events import Served
from scheduler.model import RefusalCode, Ticket


class _Message(msgspec.Struct, frozen=True, array_like=True, tag=True):
    pass


# ---- from a worker


class Serving(_Message, frozen=True):
    """It accepts connections."""


class Ask(_Message, frozen=True):
    """A lease is wanted."""

    ticket: Ticket


class Done(_Message, frozen=True):
    """A ticket is over, granted or not; with the tokens it really used if it ended well."""

    ticket_id: int
    prompt_tokens: int | None = None
    output_tokens: int | None = None


class Report(_Message, frozen=True):
    """As `scheduler.events.CreditReported`. `low`: what is left is less than what is in use."""

    engine_id: str
    begun: tuple[tuple[str, str], ...]
    in_use: int
    served: tuple[Served, ...]
    sequences: int
    tokens: int
    low: bool


class Describe(_Message, frozen=True):
    """What does this ticket wait for?"""

    number: int
    ticket_id: int


class Lost(_Message, frozen=True):
    """Has this engine died?"""

    number: int
    engine_id: str


class Counted(_Message, frozen=True):
    """All that it has counted."""

    counts: Counts


class Drained(_Message, frozen=True):
    """Nothing is in flight, or the time is over."""

    in_time: bool


FromWorker = Serving | Ask | Done | Report | Describe | Lost | Counted | Drained


# ---- to a worker


class Configure(_Message, frozen=True):
    """Serve this. Keys are (name, secret): a file that changed since must not make one worker differ from another."""

    config: Config
    api_keys: tuple[tuple[str, str], ...]
    backend_keys: dict[str, str]


class States(_Message, frozen=True):
    """The states of local models, for people."""

    states: dict[str, str]


class Granted(_Message, frozen=True):
    """The lease that was asked for."""

    ticket_id: int
    engine_id: str
    base_url: str
    queue_s: float
    load_s: float


class Declined(_Message, frozen=True):
    """No lease for this ticket; as `scheduler.driver.Refused`."""

    ticket_id: int
    code: RefusalCode
    reason: str
    retry_after_s: float | None


class Lent(_Message, frozen=True):
    """More credit; as `scheduler.commands.Credit`."""

    model: str
    engine_id: str
    base_url: str
    sequences: int
    tokens: int
    output_tokens: int


class Recall(_Message, frozen=True):
    """Credit on this engine is to be returned."""

    engine_id: str


class Answer(_Message, frozen=True):
    """To the question with this number."""

    number: int
    says: str | bool


class Count(_Message, frozen=True):
    """Say what was counted."""


class Reopen(_Message, frozen=True):
    """Open the access log and the usage rows anew."""


class Drain(_Message, frozen=True):
    """Let what is in flight finish; see `proxy.server.http.Server.drain`."""

    timeout_s: float


class Finish(_Message, frozen=True):
    """Accept nothing more, another proxy does; let what is in flight finish."""


class Leave(_Message, frozen=True):
    """Close everything, and end."""


ToWorker = Configure | States | Granted | Declined | Lent | Recall | Answer | Count | Reopen | Drain | Finish | Leave
