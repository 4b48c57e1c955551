"""Credit: room in an engine that its holder, a worker process, fills without asking.

Asking for every lease would be a message each way between two processes. So while nobody waits for an engine every
holder is lent a share of the room that is free there, and grants leases from it by itself; what it granted it reports
in batches, and the core learns from the reports what it learns from tickets. Credit is for the time while nobody waits:
when somebody does, or the engine is to go, it is revoked, and its holders return at once what they do not use and the
rest as it falls free. So nobody who waits is passed by for longer than a message takes.

An engine on which credit is out cannot be stopped, but with nobody in flight it is idle: revoking is all it takes.
"""

from __future__ import annotations

from collections.abc import Iterator

from ext.weighted_semaphore import Capacity
from scheduler.events import CreditReported


class Share:
    """What one holder has of one engine: sequences and tokens, unused or in use; requests in use as last reported."""

    __slots__ = ("in_use", "sequences", "tokens")

    def __init__(self) -> None:
        self.sequences = self.tokens = self.in_use = 0


class Credits:
    """The credit that is out on one engine.

    Invariant: what is out is held in the engine's capacity; every holder has sequences >= in_use >= 0 and tokens >= 0.
    A holder is here from its first credit until it has gone. `revoked`: all were told to return it, and none was given
    since. `wanted`: not every holder was given some since it came or since the last was revoked.
    """

    __slots__ = ("_capacity", "_shares", "in_use", "revoked", "sequences", "tokens", "wanted")

    def __init__(self, capacity: Capacity) -> None:
        self._capacity = capacity
        self._shares: dict[int, Share] = {}
        self.sequences = self.tokens = self.in_use = 0
        self.revoked = False
        self.wanted = True

    def __repr__(self) -> str:
        return f"<Credits sequences={self.sequences} tokens={self.tokens} in_use={self.in_use}>"

    def __iter__(self) -> Iterator[tuple[int, Share]]:
        """Holders and what they have."""
        return iter(self._shares.items())

    def part(self, parts: int) -> tuple[int, int]:
        """One of so many parts of what is free: sequences and tokens, or nothing of both."""
        sequences, tokens = self._capacity.free_sequences // parts, self._capacity.free_tokens // parts
        return (sequences, tokens) if sequences > 0 and tokens > 0 else (0, 0)

    def give(self, holder: int, sequences: int, tokens: int) -> None:
        """A holder has so much more. It is free."""
        self._capacity.try_take(tokens, sequences)
        self._change(self._shares.setdefault(holder, Share()), sequences, tokens, 0)
        self.revoked = False

    def take_back(self, event: CreditReported) -> int | None:
        """What a holder reports: how many more requests it has in use; None where it has nothing, which is late
        news."""
        share = self._shares.get(event.holder)
        if share is None:
            return None
        more = event.in_use - share.in_use
        self._capacity.give(event.tokens, event.sequences)
        self._change(share, -event.sequences, -event.tokens, more)
        return more

    def forget(self, holder: int) -> int | None:
        """The holder has gone: all it had is free. How many more requests are in use now: 0 or fewer; None where it
        had nothing."""
        share = self._shares.pop(holder, None)
        if share is None:
            return None
        more = -share.in_use
        self._capacity.give(share.tokens, share.sequences)
        self._change(share, -share.sequences, -share.tokens, more)
        return more

    def check(self) -> None:
        """What always holds. O(holders)."""
        shares = self._shares.values()
        assert self.sequences == sum(share.sequences for share in shares)
        assert self.tokens == sum(share.tokens for share in shares)
        assert self.in_use == sum(share.in_use for share in shares)
        assert all(share.sequences >= share.in_use >= 0 and share.tokens >= 0 for share in shares)

    def _change(self, share: Share, sequences: int, tokens: int, in_use: int) -> None:
        share.sequences += sequences
        share.tokens += tokens
        share.in_use += in_use
        self.sequences += sequences
        self.tokens += tokens
        self.in_use += in_use
