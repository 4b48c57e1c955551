"""Readings of a device that hangs and recovers: nobody waits for long, and no old figure is taken for a new one."""

from __future__ import annotations

import asyncio
import re
import threading
from collections.abc import AsyncIterator, Mapping, Sequence

import pytest

from scheduler.devices.base import Reading
from scheduler.devices.reader import Reader
from scheduler.model import DeviceSpec
from tests.patience import PATIENCE_S


class NumberedDevice:
    """Its readings are numbered, in `used_bytes`; one that begins while `lets` is not set hangs until it is."""

    def __init__(self, name: str = "gpu0") -> None:
        self.spec = DeviceSpec(name, "nvidia", 1000)
        self.begun = self.at_once = self.most_at_once = 0
        self.lets = threading.Event()
        self.lets.set()

    def measure(self, engines: Mapping[str, Sequence[int]], overhead: Sequence[int]) -> Reading:
        self.begun += 1
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        number = self.begun
        self.lets.wait()
        self.at_once -= 1
        return Reading(1000, number, 0, dict.fromkeys(engines, 1))

    def engine_env(self) -> dict[str, str]:
        return {}


async def number(reader: Reader) -> int | None:
    """The number of the reading that is made now."""
    reading = await reader.read(dict, list)
    return None if reading is None else reading.used_bytes


async def hang(reader: Reader, device: NumberedDevice) -> None:
    """A reading hangs, and is given up; those that follow may take as long as any."""
    device.lets.clear()
    reader.limit_s = 0.01
    assert await number(reader) is None
    reader.limit_s = PATIENCE_S


async def recovered(reader: Reader, device: NumberedDevice) -> int:
    """The device answers again: the number of the first reading that goes well."""
    device.lets.set()
    while (read := await number(reader)) is None:
        await asyncio.sleep(0)
    return read


@pytest.fixture
async def device() -> AsyncIterator[NumberedDevice]:
    device = NumberedDevice()
    yield device
    device.lets.set()


async def test_a_reading_that_hangs_is_given_up_and_no_second_one_is_begun(device: NumberedDevice) -> None:
    reader = Reader(device, PATIENCE_S)
    await hang(reader, device)
    assert [await number(reader) for _ in range(3)] == [None, None, None]  # at once: the limit is a long one now
    assert reader.trouble is not None
    assert reader.trouble.reason == f"TimeoutError: no answer within {PATIENCE_S:g} s"
    assert await recovered(reader, device) == 2


async def test_what_a_reading_brings_too_late_is_dropped(device: NumberedDevice) -> None:
    reader = Reader(device, PATIENCE_S)
    assert await number(reader) == 1
    await hang(reader, device)
    assert await recovered(reader, device) == 3
    assert reader.trouble is None


async def test_trouble_and_its_end_are_told_once_each(device: NumberedDevice, caplog: pytest.LogCaptureFixture) -> None:
    reader = Reader(device, PATIENCE_S)
    for _ in range(2):
        await hang(reader, device)
        trouble = reader.trouble
        await number(reader)
        assert trouble is not None
        assert reader.trouble is not None
        assert reader.trouble.since_s == trouble.since_s
        await recovered(reader, device)
        await number(reader)
    said = [re.sub(r"\d+ s$", "N s", record.getMessage()) for record in caplog.records]
    cannot = "device gpu0 cannot be read, and what was read last is believed: TimeoutError: no answer within 0.N s"
    assert said == [cannot, "device gpu0 can be read again, after N s"] * 2


async def test_readings_that_are_asked_for_together_take_turns_and_know_the_pids_of_their_turn(
    device: NumberedDevice,
) -> None:
    reader = Reader(device, PATIENCE_S)
    device.lets.clear()
    engines: dict[str, list[int]] = {}
    asked = [asyncio.create_task(reader.read(lambda: engines, list)) for _ in range(3)]
    while not device.begun:
        await asyncio.sleep(0)
    engines["a#1"] = [1]
    device.lets.set()
    readings = [reading for reading in await asyncio.gather(*asked) if reading is not None]
    assert [reading.used_bytes for reading in readings] == [1, 2, 3]
    assert readings[1].engines == {"a#1": 1}
    assert device.most_at_once == 1


async def test_after_one_that_was_cancelled_the_next_reading_works(device: NumberedDevice) -> None:
    reader = Reader(device, PATIENCE_S)
    device.lets.clear()
    asked = asyncio.create_task(number(reader))
    while not device.begun:
        await asyncio.sleep(0)
    asked.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asked
    assert not reader.busy
    assert await recovered(reader, device) == 2


async def test_a_thread_that_cannot_be_started_is_no_reading_that_hangs(
    device: NumberedDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    reader = Reader(device, PATIENCE_S)
    with monkeypatch.context() as scarce:
        scarce.setattr(threading.Thread, "start", refuse)
        assert await number(reader) is None
    assert await number(reader) == 1


def refuse(_: threading.Thread) -> None:
    raise RuntimeError("can't start new thread")


def test_the_process_ends_while_a_reading_hangs() -> None:
    """The end of the loop waits for the threads of its executor; the end of the interpreter, for all but daemons."""
    device = NumberedDevice("gpu7")
    try:
        asyncio.run(hang(Reader(device, PATIENCE_S), device))
        (thread,) = (each for each in threading.enumerate() if each.name == "read gpu7")
        assert thread.daemon
    finally:
        device.lets.set()
    thread.join()
