from __future__ import annotations

import asyncio
import contextlib
import os
from pathlib import Path

import orjson
import pytest

from proxy.observe import access_log, lines
from proxy.observe.access_log import AccessLog
from proxy.observe.outcome import Outcome
from tests.fakes import until


def outcome(at: int) -> Outcome:
    return Outcome(request_id=f"r{at}", method="GET", path="/", started_s=0.0, status=200, duration_s=0.00012345)


def ids(path: Path) -> list[str]:
    return [orjson.loads(line)["request_id"] for line in path.read_bytes().splitlines()]


async def written(path: Path, count: int) -> None:
    await until(lambda: len(ids(path)) >= count)


async def test_lines_are_written_in_order_and_all_of_them_at_close(tmp_path: Path) -> None:
    log = AccessLog(str(tmp_path / "log"))
    for at in range(100):
        log.write(outcome(at))
    await log.close()
    assert ids(tmp_path / "log") == [f"r{at}" for at in range(100)]


async def test_a_batch_is_written_without_anybody_asking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "FLUSH_S", 0.001)
    log = AccessLog(str(tmp_path / "log"))
    for at in range(3):  # the writer starts anew for each batch
        log.write(outcome(at))
        await written(tmp_path / "log", at + 1)
    await log.close()


async def test_what_does_not_fit_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(access_log, "MOST_PENDING", 2)
    log = AccessLog(str(tmp_path / "log"))
    for at in range(5):
        log.write(outcome(at))
    await log.close()
    lines = [orjson.loads(line) for line in (tmp_path / "log").read_bytes().splitlines()]
    assert [line.get("request_id") for line in lines[:2]] == ["r0", "r1"]
    assert lines[2] == {"dropped_lines": 3}


async def test_a_pipe_that_nobody_reads_holds_up_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "FLUSH_S", 0.0)
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    log = AccessLog(str(tmp_path / "pipe"))
    for at in range(2000):  # more than a pipe holds
        log.write(outcome(at))
    await asyncio.sleep(0.05)
    log.write(outcome(2000))
    taken = 0
    closing = asyncio.create_task(log.close())
    while not closing.done():
        with contextlib.suppress(BlockingIOError):
            taken += os.read(reader, 1 << 20).count(b"\n")
        await asyncio.sleep(0.001)
    taken += os.read(reader, 1 << 20).count(b"\n")
    os.close(reader)
    assert taken == 2001


async def test_a_rotated_file_is_opened_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "FLUSH_S", 0.001)
    log = AccessLog(str(tmp_path / "log"))
    log.write(outcome(0))
    await written(tmp_path / "log", 1)
    (tmp_path / "log").rename(tmp_path / "log.1")
    log.reopen()
    log.write(outcome(1))
    await log.close()
    assert (ids(tmp_path / "log.1"), ids(tmp_path / "log")) == (["r0"], ["r1"])


async def test_closing_does_not_wait_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "CLOSE_S", 0.05)
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    log = AccessLog(str(tmp_path / "pipe"))
    for at in range(2000):
        log.write(outcome(at))
    await log.close()
    while log.writer._thread.is_alive():
        with contextlib.suppress(BlockingIOError):
            os.read(reader, 1 << 20)
        await asyncio.sleep(0.001)
    os.close(reader)


async def test_closing_in_the_middle_of_a_batch_is_not_missed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "FLUSH_S", 0.0)
    for at in range(200):  # the end meets the writer at another point each time
        log = AccessLog(str(tmp_path / f"log{at}"))
        log.write(outcome(0))
        await asyncio.sleep(at * 1e-6)
        await log.close()
        assert not log.writer._thread.is_alive()
        assert ids(tmp_path / f"log{at}") == ["r0"]


async def test_off_is_off() -> None:
    log = AccessLog("off")
    log.write(outcome(0))
    await log.close()
