from __future__ import annotations

import logging
import os
import threading
from pathlib import Path

import orjson
import pytest

from proxy.accounting import usage
from proxy.accounting.usage import Row, UsageLog, row_of
from proxy.observe import lines
from proxy.observe.metrics import Metrics, UsageRows
from proxy.observe.outcome import Outcome
from tests.fakes import until


def outcome(tenant: str = "alice") -> Outcome:
    return Outcome(
        "r1", "POST", "/v1/chat/completions", 5.0, tenant=tenant, model="m", queue_s=0.123456, prompt_tokens=7
    )


def test_a_row_has_every_field_whether_it_is_known_or_not() -> None:
    row = orjson.loads(row_of(1_700_000_000.125, outcome()))
    assert list(row) == list(Row.__struct_fields__)
    assert (row["time"], row["tenant"], row["queue_s"]) == (1_700_000_000.125, "alice", 0.1235)
    assert (row["prompt_tokens"], row["output_tokens"], row["error"]) == (7, None, None)


def test_names_of_any_kind_stay_one_line() -> None:
    line = row_of(0.0, outcome('a "b"\n\x00é'))
    assert line.count(b"\n") == 1
    assert orjson.loads(line)["tenant"] == 'a "b"\n\x00é'


async def test_rows_are_appended_to_what_is_there_in_a_folder_that_is_made(tmp_path: Path) -> None:
    for _ in range(2):
        log = UsageLog(str(tmp_path / "new" / "usage.jsonl"))
        log.write(outcome())
        log.write(outcome(tenant=""))
        await log.close()
    assert (tmp_path / "new" / "usage.jsonl").read_bytes().count(b"\n") == 2


async def test_off_is_off() -> None:
    log = UsageLog("off")
    log.write(outcome())
    log.reopen()
    assert not log.full
    assert log.rows() is None
    await log.close()


async def test_a_scrape_says_how_rows_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "FLUSH_S", 60.0)  # or until it is closed
    metrics, log = Metrics(), UsageLog(str(tmp_path / "usage.jsonl"))
    metrics.usage_rows = log.rows
    names = ("vramp_usage_rows_pending", "vramp_usage_write_failures_total", "vramp_usage_rows_dropped_total")
    assert [metrics.registry.get_sample_value(name) for name in names] == [0, 0, 0]
    log.write(outcome())
    monkeypatch.setattr(usage, "MOST_PENDING", 1)
    assert log.full
    assert metrics.registry.get_sample_value(names[0]) == 1
    await log.close()
    assert not log.full
    assert [metrics.registry.get_sample_value(name) for name in names] == [0, 0, 0]


async def test_the_log_says_once_a_batch_why_calls_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A disk that is only slow fails at nothing: without this the refusals would have no cause."""
    let, write = threading.Semaphore(0), os.write

    def slow(fd: int, data: bytes) -> int:
        let.acquire()
        return write(fd, data)

    monkeypatch.setattr(lines, "FLUSH_S", 0.001)
    monkeypatch.setattr(lines.os, "write", slow)
    monkeypatch.setattr(usage, "MOST_PENDING", 2)
    caplog.set_level(logging.WARNING, "vramp")
    log = UsageLog(str(tmp_path / "usage.jsonl"))
    log.write(outcome())
    for _ in range(2):
        await until(lambda: log.rows() == UsageRows(pending=0))  # taken, and being written
        log.write(outcome())
        log.write(outcome())
        assert log.full
        assert {log.refusal().code for _ in range(3)} == {"usage_unwritable"}
        let.release()
    let.release()
    await log.close()
    assert not log.full
    told = "new calls are refused: 2 usage rows wait to be written"
    assert [each.getMessage() for each in caplog.records] == [told, told]
