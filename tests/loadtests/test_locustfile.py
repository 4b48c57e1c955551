"""`make load` against nothing, and against a server: what a user sees and the exit code that a script sees."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.harness import REPO, Served, free_port, model_table, simulated

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(60)]


def locust(url: str, *options: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-m", "locust", "-f", "loadtests/locustfile.py", "--host", url, "--headless"]
    argv += ["--only-summary", "-r", "10", *options]
    return subprocess.run(argv, cwd=REPO, capture_output=True, text=True, check=False)


def test_where_nothing_listens_one_line_says_what_to_do() -> None:
    run = locust(f"http://127.0.0.1:{free_port()}", "-u", "2", "-t", "5s")
    assert run.returncode == 1
    assert "no vramp answers at http://127.0.0.1:" in run.stderr
    assert "make run" in run.stderr
    assert "Traceback" not in run.stderr


def test_every_scenario_runs_without_a_failure(tmp_path: Path) -> None:
    config = tmp_path / "two.toml"
    pace = {"ttft_ms": 20, "tokens_per_s": 500}
    config.write_text(
        simulated(
            model_table("talks", memory="600MiB", **pace),
            model_table("counts", 'task = "embed"', memory="600MiB", **pace),
            memory="1GiB",
            devices="nvidia = false",
        )
    )
    with Served(config, tmp_path) as vramp:
        run = locust(vramp.url, "-u", "10", "-t", "8s")
        assert run.returncode == 0, run.stdout + run.stderr
        for name in ("chat", "stream", "embed", "cold", "leave", "stream: time to the first token"):
            assert f" {name} " in run.stdout + run.stderr
        assert b"vramp_requests_in_flight 0.0" in vramp.get("/metrics", admin=True)
        assert vramp.ask("/v1/embeddings", {"model": "counts", "input": "still there?"})["data"]
