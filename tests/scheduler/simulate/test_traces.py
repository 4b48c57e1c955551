"""Traces as people have them: good ones are read, bad ones are named to the cell."""

from __future__ import annotations

from pathlib import Path

import pytest

from scheduler.model import LatencyClass
from scheduler.simulate.engine import REFERENCE, EngineFileError, GiB, read_engine
from scheduler.simulate.traces import Request, TraceError, read_trace


def trace(folder: Path, text: str) -> Path:
    path = folder / "t.csv"
    path.write_text(text, encoding="utf-8")
    return path


def test_columns_are_found_by_name_and_rows_come_in_order(tmp_path: Path) -> None:
    path = trace(tmp_path, "model,t_s,output_tokens,extra,tenant,class\nb,2.5,7,x,ann,batch\n\na,1,5,y,bob,instant\n")
    first, second = read_trace(path)
    assert first == Request(1.0, "a", 0, 5, None, "bob", LatencyClass.INSTANT)
    assert (second.model, second.latency_class) == ("b", LatencyClass.BATCH)


def test_milliseconds_durations_and_a_missing_model_column(tmp_path: Path) -> None:
    (only,) = read_trace(trace(tmp_path, "t_ms,duration_s\n1500,2.5\n"))
    assert (only.at_s, only.model, only.duration_s) == (1.5, "t", 2.5)
    assert REFERENCE.service_s(only) == 2.5


def test_until_cuts_the_trace(tmp_path: Path) -> None:
    path = trace(tmp_path, "t_s,output_tokens\n1,1\n2,1\n3,1\n")
    assert len(read_trace(path, 3.0)) == 2
    with pytest.raises(TraceError, match=r"no requests before 0.5 s"):
        read_trace(path, 0.5)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "line 1: empty file"),
        ("model,output_tokens\na,1\n", "line 1: no column t_s or t_ms"),
        ("t_s,model\n1,a\n", "line 1: no column output_tokens or duration_s"),
        ("t_s,model,output_tokens\n1,a,5\nsoon,a,5\n", "line 3, column t_s: 'soon' is not a number"),
        ("t_s,model,output_tokens\n-1,a,5\n", "line 2, column t_s: '-1' is not a time from 0 on"),
        ("t_s,model,output_tokens\nnan,a,5\n", "line 2, column t_s: 'nan' is not a time"),
        ("t_s,model,output_tokens\n1,a,5.5\n", "line 2, column output_tokens: '5.5' is not a whole number"),
        ("t_s,model,output_tokens\n1,,5\n", "line 2, column model: '' is not a model's name"),
        ("t_s,model,output_tokens\n1,a\n", "line 2, column output_tokens: missing"),
        ("t_s,model,output_tokens,class\n1,a,5,soon\n", "line 2, column class: 'soon' is not one of instant"),
        ("t_s,output_tokens\n", "no requests"),
    ],
)
def test_a_bad_row_is_named_with_file_line_and_column(tmp_path: Path, text: str, says: str) -> None:
    path = trace(tmp_path, text)
    with pytest.raises(TraceError) as caught:
        read_trace(path)
    assert str(path) in str(caught.value)
    assert says in str(caught.value)


def test_a_missing_file_and_one_that_is_no_text_are_said_plainly(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="No such file"):
        read_trace(tmp_path / "none.csv")
    (tmp_path / "x.csv").write_bytes(b"t_s,output_tokens\n\xff\xfe,1\n")
    with pytest.raises(TraceError, match="not a text file"):
        read_trace(tmp_path / "x.csv")


def test_the_reference_engine_deals_sizes_in_name_order() -> None:
    specs = REFERENCE.specs(["c", "a", "b", "a"])
    assert [(spec.name, spec.memory_bytes // GiB) for spec in specs] == [("a", 5), ("b", 28), ("c", 16)]
    assert specs[1].load_estimate_s == pytest.approx(2 + 28 * GiB / 20e9)


def test_an_engine_file_is_read_and_a_bad_one_named(tmp_path: Path) -> None:
    path = tmp_path / "engine.toml"
    path.write_text('sizes = ["1GiB"]\ntokens_per_s = 10.0\n[models]\nb = "512MiB"\n')
    engine = read_engine(str(path))
    assert [spec.memory_bytes for spec in engine.specs(["a", "b"])] == [GiB, GiB // 2]
    assert engine.service_s(Request(0.0, "a", 0, 20)) == pytest.approx(2.3)
    for text, says in (
        ("sizes = []", "sizes is empty"),
        ('sizes = ["big"]', "'big' is not a size"),
        ("nope = 1", "nope"),
    ):
        path.write_text(text)
        with pytest.raises(EngineFileError, match=says):
            read_engine(str(path))
