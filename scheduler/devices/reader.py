"""The readings of one device, none of which holds anybody up.

The driver of a GPU in trouble answers after minutes, or never. So a reading has a limit, and a thread of its own: a
thread of the loop's executor that hangs would keep the process from ending. What hangs is left alone: until it has come
back every other reading fails at once, and what it brings then, figures of another time, is dropped.

At most one thread reads a device at any moment, and readings that are asked for together take turns: figures come in
the order in which they were read.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from functools import partial

import msgspec

from scheduler.devices.base import Device, Reading

log = logging.getLogger("vramp.scheduler")


class Trouble(msgspec.Struct, frozen=True):
    """Why a device cannot be read, and since when, in seconds of the loop's clock."""

    reason: str
    since_s: float


class Reader:
    """Reads one device. `trouble` is None while its last reading went well."""

    def __init__(self, device: Device, limit_s: float) -> None:
        self.limit_s = limit_s
        self.trouble: Trouble | None = None
        self._device = device
        self._turn = asyncio.Lock()
        self._last: Future[Reading] | None = None

    @property
    def busy(self) -> bool:
        """Whether somebody waits for a reading."""
        return self._turn.locked()

    async def read(
        self, engines: Callable[[], Mapping[str, Sequence[int]]], overhead: Callable[[], Sequence[int]]
    ) -> Reading | None:
        """What the device says now, or None with the `trouble`. Takes `limit_s` at most once its turn has come, which
        is when `engines` and `overhead` are asked for the pids that `Device.measure` takes; the loop is held up for
        about 0.1 ms, by the start of a thread."""
        async with self._turn:
            try:
                reading = await self._look(engines, overhead)
            except Exception as error:  # whatever it is: a start must come to its end, and readings must go on
                self._failed(error)
                return None
            self._went_well()
            return reading

    async def _look(
        self, engines: Callable[[], Mapping[str, Sequence[int]]], overhead: Callable[[], Sequence[int]]
    ) -> Reading:
        late = f"no answer within {self.limit_s:g} s"
        if self._last is not None and not self._last.done():
            raise TimeoutError(late)
        self._last = _begin(partial(self._device.measure, engines(), overhead()), f"read {self._device.spec.name}")
        answer = asyncio.wrap_future(self._last)
        try:
            await asyncio.wait((answer,), timeout=self.limit_s)
            if not answer.done():
                raise TimeoutError(late)
            return answer.result()
        finally:
            answer.cancel()  # nobody takes it any more; the thread goes on, and `_last` tells when it has ended

    def _failed(self, error: Exception) -> None:
        """Told once: it is tried again every few seconds."""
        reason = f"{type(error).__name__}: {error}"
        since_s = asyncio.get_running_loop().time()
        if self.trouble is None:
            what = "device %s cannot be read, and what was read last is believed: %s"
            unforeseen = not isinstance(error, OSError)
            log.error(what, self._device.spec.name, reason, exc_info=error if unforeseen else None)
        else:
            since_s = self.trouble.since_s
        self.trouble = Trouble(reason, since_s)

    def _went_well(self) -> None:
        if self.trouble is not None:
            lasted_s = asyncio.get_running_loop().time() - self.trouble.since_s
            log.warning("device %s can be read again, after %.0f s", self._device.spec.name, lasted_s)
            self.trouble = None


def _begin(measure: Callable[[], Reading], name: str) -> Future[Reading]:
    """Call it in a thread that the end of the process does not wait for."""
    answer: Future[Reading] = Future()
    answer.set_running_or_notify_cancel()  # from here on it is done when the thread is, whoever stops waiting

    def run() -> None:
        try:
            answer.set_result(measure())
        except BaseException as error:  # as executors do: without an answer it would count as hanging for ever
            answer.set_exception(error)

    threading.Thread(target=run, name=name, daemon=True).start()
    return answer
