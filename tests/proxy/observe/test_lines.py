"""What is written for each request when the file will not take it: kept, tried again, never torn."""

from __future__ import annotations

import errno
import logging
import os
import select
import sys
from collections.abc import Callable
from pathlib import Path

import orjson
import pytest

from proxy.observe import lines
from proxy.observe.access_log import line_of
from proxy.observe.lines import LineWriter
from tests.fakes import until
from tests.proxy.observe.test_access_log import ids, outcome

Write = Callable[[int, bytes], int]
FULL = OSError(errno.ENOSPC, "No space left on device")


class Disk:
    """What writes, until a test says otherwise."""

    def __init__(self) -> None:
        self.real: Write = os.write
        self.does: Write = os.write

    def write(self, fd: int, data: bytes) -> int:
        return self.does(fd, data)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    disk = Disk()
    monkeypatch.setattr(lines, "FLUSH_S", 0.001)
    monkeypatch.setattr(lines, "RETRY_S", 0.001)
    monkeypatch.setattr(lines.os, "write", disk.write)
    return disk


def full(_fd: int, _data: bytes) -> int:
    raise FULL


async def test_a_full_disk_costs_no_line_and_is_told_once(
    tmp_path: Path, disk: Disk, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "vramp.lines")
    disk.does = full
    writer = LineWriter("the log", str(tmp_path / "log"), 1000)
    for at in range(10):
        writer.put(line_of(0.0, outcome(at)))
        await until(lambda at=at: writer.failures > at)  # type: ignore[misc]
    disk.does = disk.real
    await until(lambda: (tmp_path / "log").read_bytes().count(b"\n") == 10)
    await writer.close()
    assert ids(tmp_path / "log") == [f"r{at}" for at in range(10)]
    assert [record.levelname for record in caplog.records] == ["ERROR", "WARNING"]
    assert "No space left" in caplog.records[0].getMessage()


async def test_a_line_that_is_cut_short_goes_again_as_a_whole(tmp_path: Path, disk: Disk) -> None:
    """Between the two halves another process writes to the same file."""
    real, sizes = disk.real, [150, 0]

    def short(fd: int, data: bytes) -> int:
        if not sizes:
            return real(fd, data)
        size = sizes.pop(0)
        if not size:
            real(fd, b'\n{"request_id":"theirs"}\n')
            raise FULL
        return real(fd, data[:size])

    writer = LineWriter("the log", str(tmp_path / "log"), 1000)
    disk.does = short
    for at in range(5):
        writer.put(line_of(0.0, outcome(at)))
    await until(lambda: not sizes)
    await writer.close()
    readable = []
    for line in (tmp_path / "log").read_bytes().splitlines():
        try:
            readable.append(orjson.loads(line)["request_id"])
        except orjson.JSONDecodeError:
            continue  # the half line, and the empty one
    assert sorted(readable) == ["r0", "r1", "r2", "r3", "r4", "theirs"]


async def test_what_is_lost_at_the_end_is_counted(tmp_path: Path, disk: Disk, caplog: pytest.LogCaptureFixture) -> None:
    disk.does = full
    writer = LineWriter("the log", str(tmp_path / "log"), 1000)
    for at in range(3):
        writer.put(line_of(0.0, outcome(at)))
    await writer.close()
    assert "3 lines are lost" in caplog.records[-1].getMessage()


async def test_two_writers_of_one_file_tear_no_line(tmp_path: Path, disk: Disk) -> None:
    writers = [LineWriter("the log", str(tmp_path / "log"), 100_000) for _ in range(2)]
    for at in range(5000):
        writers[at % 2].put(line_of(0.0, outcome(at)))
        if at % 500 == 0:
            await until(lambda: not writers[0].pending)
    for writer in writers:
        await writer.close()
    assert sorted(ids(tmp_path / "log")) == sorted(f"r{at}" for at in range(5000))


async def test_a_loop_that_is_never_idle_does_not_hold_up_the_lines(tmp_path: Path, disk: Disk) -> None:
    """At each pause in the taking of a batch the thread would wait for this one, which goes on with other things."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(0.01)
    try:
        writer = LineWriter("the log", str(tmp_path / "log"), 100_000)
        for _ in range(20_000):
            writer.put(b"a line\n")
        pauses, left = 0, len(writer.pending)
        while left and pauses < 20:  # a machine that is busy elsewhere may add one now and then
            now = len(writer.pending)
            pauses += now < left
            left = now
    finally:
        sys.setswitchinterval(interval)
    await writer.close()
    assert left == 0, f"{left} lines are left after {pauses} pauses"


async def test_a_pipe_gets_whole_lines_in_writes_that_stay_in_one_piece(tmp_path: Path, disk: Disk) -> None:
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    pieces: list[bytes] = []

    def write(fd: int, data: bytes) -> int:
        pieces.append(bytes(data))
        return disk.real(fd, data)

    disk.does = write
    writer = LineWriter("the log", str(tmp_path / "pipe"), 1000)
    for at in range(60):
        writer.put(line_of(0.0, outcome(at)))
    await writer.close()
    os.close(reader)
    assert b"".join(pieces).count(b"\n") == 60
    assert max(map(len, pieces)) <= select.PIPE_BUF
    assert all(piece.endswith(b"\n") for piece in pieces)
