"""`vramp simulate` and `vramp plan` as a person uses them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from proxy.cli import main
from tests.e2e.harness import model_table, simulated

ROWS = "".join(f"{0.5 * i},{'abc'[i * i % 3]},10,60\n" for i in range(60))
FIELDS = {
    "policy", "default", "setting", "trace", "memory_bytes", "deadline_s", "requests", "on_time_share",
    "on_time_over_b2", "load_cost_over_b1", "loads", "load_seconds", "wait_p50_s", "wait_p99_s", "wait_worst_s",
    "service_gap", "run_s",
}  # fmt: skip


@pytest.fixture
def trace(tmp_path: Path) -> str:
    path = tmp_path / "arrivals.csv"
    path.write_text("t_s,model,prompt_tokens,output_tokens\n" + ROWS)
    return str(path)


def run(*words: str) -> Result:
    return CliRunner().invoke(main, words)


def test_json_is_one_object_a_policy_with_exactly_the_published_fields(trace: str) -> None:
    result = run("simulate", "--trace", trace, "--memory", "40GiB", "--no-bounds", "--json")
    assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert all(row.keys() == FIELDS for row in rows)
    assert sum(row["default"] for row in rows) == 1
    assert {(row["policy"], row["setting"]) for row in rows} >= {("fifo", None), ("vramp", "tail"), ("vramp", "share")}
    assert {row["memory_bytes"] for row in rows} == {40 << 30}
    assert {row["requests"] for row in rows} == {60}


def test_the_table_names_every_policy_and_a_chosen_one_alone(trace: str) -> None:
    table = run("simulate", "--trace", trace, "--memory", "40GiB", "--no-bounds").stdout
    assert all(name in table for name in ("fifo", "collate", "slack", "landlord", "vramp (tail)"))
    alone = run("simulate", "--trace", trace, "--memory", "40GiB", "--no-bounds", "--policy", "lru").stdout
    assert "lru" in alone
    assert "fifo" not in alone


@pytest.fixture
def no_scipy(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> object:
        raise ImportError(name)

    monkeypatch.setattr("scheduler.simulate.bounds.importlib.import_module", missing)


@pytest.mark.usefixtures("no_scipy")
def test_without_scipy_the_policies_are_compared_with_each_other(trace: str) -> None:
    result = run("simulate", "--trace", trace, "--memory", "40GiB", "--policy", "lru")
    assert result.exit_code == 0, result.output
    assert "lru" in result.stdout
    assert result.stderr.startswith(
        "warning: without a comparison with the optimum: the bounds need scipy: pip install"
    )


@pytest.mark.usefixtures("no_scipy")
def test_without_scipy_bounds_that_were_asked_for_are_an_error(trace: str) -> None:
    result = run("simulate", "--trace", trace, "--memory", "40GiB", "--policy", "lru", "--bounds")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith("error: the bounds need scipy")


def test_a_trace_saved_by_a_spreadsheet_is_read(tmp_path: Path) -> None:
    path = tmp_path / "day.csv"
    path.write_text("t_s,model,output_tokens\r\n0,a,10\r\n", encoding="utf-8-sig")
    result = run("simulate", "--trace", str(path), "--memory", "40GiB", "--no-bounds", "--policy", "lru")
    assert result.exit_code == 0, result.output


def test_a_log_that_is_not_there_is_said_by_its_name() -> None:
    result = run("simulate", "--replay", "/nonexistent.log")
    assert (result.exit_code, result.stderr) == (1, "error: /nonexistent.log: No such file or directory\n")


def test_until_cuts_and_two_traces_make_two_tables(trace: str) -> None:
    words = ("--memory", "40GiB", "--no-bounds", "--policy", "fifo", "--until", "10")
    result = run("simulate", "--trace", trace, "--trace", trace, *words)
    assert result.stdout.count("20 requests") == 2


@pytest.mark.parametrize(
    ("words", "says", "code"),
    [
        ((), "nothing to run", 2),
        (("--trace", "{trace}", "--replay", "x"), "use one of them", 2),
        (("--trace", "{trace}", "--policy", "best"), "'best' is none of fifo, collate", 2),
        (("--trace", "{trace}", "--memory", "plenty"), "--memory", 1),
        (("--trace", "{trace}", "--memory", "8GiB"), "b needs 28.0 GiB and --memory is 8.0 GiB", 1),
        (("--trace", "none.csv"), "none.csv: No such file", 1),
        (("--trace", "{trace}", "--engine", "none.toml"), "none.toml: No such file", 1),
        (("--replay", "none.log"), "none.log", 1),
    ],
)
def test_what_cannot_run_is_said_with_its_reason(trace: str, words: tuple[str, ...], says: str, code: int) -> None:
    result = run("simulate", *(word.format(trace=trace) for word in words))
    assert result.exit_code == code
    assert says in result.output


def test_a_bad_row_names_file_line_and_column(tmp_path: Path) -> None:
    (tmp_path / "bad.csv").write_text("t_s,model,output_tokens\n1,a,many\n")
    result = run("simulate", "--trace", str(tmp_path / "bad.csv"), "--no-bounds")
    assert result.exit_code == 1
    assert "bad.csv, line 2, column output_tokens: 'many' is not a whole number" in result.output


CONFIG = simulated(
    model_table("a", memory="4GiB", load_s=30),
    model_table("b", memory="4GiB", load_s=30),
    memory="6GiB",
)


def test_plan_says_what_one_more_device_would_do(tmp_path: Path) -> None:
    (tmp_path / "vramp.toml").write_text(CONFIG)
    (tmp_path / "t.csv").write_text(
        "t_s,model,output_tokens\n" + "".join(f"{2 * i},{'ab'[i % 2]},30\n" for i in range(60))
    )
    words = ("plan", "--config", str(tmp_path / "vramp.toml"), "--trace", str(tmp_path / "t.csv"))
    result = run(*words)
    assert result.exit_code == 0, result.output
    assert "one more sim0: +" in result.stdout  # both models fit then
    as_it_is, more, _ = (json.loads(line) for line in run(*words, "--json").stdout.splitlines())
    assert more["on_time_share"] > as_it_is["on_time_share"]
    assert more["loads"] == 2


def plan(folder: Path, config: str, gap_s: float) -> Result:
    """Two models asked for in turn."""
    (folder / "vramp.toml").write_text(config)
    (folder / "t.csv").write_text(
        "t_s,model,output_tokens\n" + "".join(f"{gap_s * i},{'ab'[i % 2]},30\n" for i in range(30))
    )
    return run("plan", "--config", str(folder / "vramp.toml"), "--trace", str(folder / "t.csv"))


def test_plan_says_that_more_ram_helps_where_engines_that_are_evicted_could_sleep_there(tmp_path: Path) -> None:
    result = plan(tmp_path, CONFIG, gap_s=60)
    assert result.exit_code == 0, result.output
    # each use loads for 30 s now; then the first two do, and a wake takes a fraction of a second
    assert "32 GB more RAM to sleep in: +93.3% of the requests on time" in result.stdout
    assert {"wakes", "wake s"} <= set(re.split(r"\s*[┃│]\s*", result.stdout))


def test_plan_says_that_more_ram_does_not_help_where_nothing_is_evicted(tmp_path: Path) -> None:
    result = plan(tmp_path, CONFIG.replace("6GiB", "9GiB"), gap_s=60)
    assert "32 GB more RAM to sleep in: would not help (+0.0% on time" in result.stdout


def test_plan_counts_the_host_memory_that_the_configuration_gives_to_sleepers_already(tmp_path: Path) -> None:
    result = plan(tmp_path, CONFIG.replace("[devices]", '[devices]\nsleep_memory = "16GiB"'), gap_s=60)
    assert "32 GB more RAM to sleep in: would not help (+0.0% on time" in result.stdout


def test_plan_goes_by_the_times_that_a_run_has_seen(tmp_path: Path) -> None:
    state = tmp_path / "state"
    state.mkdir()
    (state / "times.json").write_text('{"version":1,"figures":{"a":{"load_s":50.0},"b":{"load_s":70.0}}}')
    plan(tmp_path, f'store = {{ dir = "{state}" }}\n{CONFIG}', gap_s=100)
    words = ("plan", "--config", str(tmp_path / "vramp.toml"), "--trace", str(tmp_path / "t.csv"), "--json")
    as_it_is = json.loads(run(*words).stdout.splitlines()[0])
    assert as_it_is["load_seconds"] == pytest.approx(60.0 * as_it_is["loads"])


def test_plan_says_that_ram_is_of_no_use_to_engines_that_cannot_sleep(tmp_path: Path) -> None:
    result = plan(tmp_path, CONFIG.replace('backend = "sim"', 'backend = "sim"\ntask = "embed"'), gap_s=60)
    assert "32 GB more RAM: no use" in result.stdout


def test_plan_names_a_model_that_the_configuration_does_not_have(tmp_path: Path) -> None:
    (tmp_path / "vramp.toml").write_text(CONFIG)
    (tmp_path / "t.csv").write_text("t_s,model,output_tokens\n1,c,30\n")
    result = run("plan", "--config", str(tmp_path / "vramp.toml"), "--trace", str(tmp_path / "t.csv"))
    assert result.exit_code == 1
    assert "no local model 'c' (it has a, b)" in result.output
