"""The hand-over to the next version of the proxy, from the side of the one that leaves. The protocol is
`scheduler.handover`'s; who is told when is the keeper's (`scheduler.engines.keeper_proxies`)."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable

import msgspec

from scheduler.driver import Scheduler
from scheduler.engines.keeper_link import KeeperLink
from scheduler.handover import Leaver, hand_over

log = logging.getLogger("vramp")


class Upgrade:
    """Hands over when the keeper asks for it. `stop_accepting` and then `left` are called at that moment."""

    def __init__(
        self, link: KeeperLink, scheduler: Scheduler, stop_accepting: Callable[[], None], left: Callable[[], None]
    ) -> None:
        self._link = link
        self._scheduler = scheduler
        self._stop_accepting = stop_accepting
        self._left = left
        self._leaver: Leaver | None = None
        self._handing: asyncio.Task[None] | None = None
        link.on_hand_over, link.on_go_on = self._asked, self._called_off

    def close(self) -> None:
        """Nothing more is handed over."""
        if self._handing is not None:
            self._handing.cancel()

    def _asked(self) -> None:
        if self._leaver is None:
            log.info("a new version is ready: it takes over as soon as no engine starts or stops")
            self._handing = asyncio.create_task(self._hand_over())
        else:
            # our successor has died, and its own asks. What became of the engines meanwhile, it sees by itself.
            self._leaver.tell()
            self._link.handed([])

    def _called_off(self) -> None:
        if self._leaver is None and self._handing is not None:
            log.warning("the new version has ended: there is no upgrade")
            self._handing.cancel()
            self._scheduler.go_on()

    async def _hand_over(self) -> None:
        await self._scheduler.settled()
        try:
            self._give()
        except Exception:
            # Half of it may be the other's already. Our death hands over the rest, as a crash does.
            log.critical("the hand-over failed: this version ends, the new one goes on", exc_info=True)
            os._exit(1)

    def _give(self) -> None:
        """In one turn of the loop: each connection is ours or in the listen queue, each lease is out here or there."""
        self._stop_accepting()
        self._leaver = Leaver(self._link.peer)
        self._link.on_peer = self._leaver.hear
        self._link.handed(msgspec.to_builtins(hand_over(self._scheduler, self._leaver)))
        self._left()
