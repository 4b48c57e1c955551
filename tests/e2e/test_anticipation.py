"""A session's next model is there before it is asked for, on a real server with simulated engines."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.harness import Served, model_table, simulated

pytestmark = [pytest.mark.slow, pytest.mark.timeout(60)]

CONFIG = simulated(
    model_table("planner", load_s=0.2),
    model_table("coder", load_s=0.2),
    model_table("large", memory="1900MiB"),
)


def ask(served: Served, model: str, session: str) -> None:
    served.chat(model, {"x-vramp-session": session})


def planned_ahead(served: Served, asked: list[str]) -> bool:
    """Another session asks for the planner; whether the coder is there, though nobody has asked for it since."""
    asked.append(f"another {len(asked)}")
    ask(served, "planner", asked[-1])
    coder = served.model("coder")
    return bool(coder["state"] == "ready" and coder["note"].startswith("guessed: sessions ask for it after"))


def test_the_coder_is_loaded_while_its_session_still_plans(tmp_path: Path) -> None:
    (tmp_path / "vramp.toml").write_text(CONFIG)
    with Served(tmp_path / "vramp.toml", tmp_path) as served:
        for _ in range(2):
            ask(served, "planner", "one")
            ask(served, "coder", "one")
        served.operate("large", "load")  # and so the two leave
        served.operate("large", "unload")
        assert served.model("coder")["state"] in ("cold", "loading")
        asked: list[str] = []
        served.wait(lambda: planned_ahead(served, asked), "nobody thought of the coder")
        loads = served.model("coder")["loads"]
        ask(served, "coder", asked[-1])
        assert served.model("coder")["loads"] == loads, "it was there"
        served.wait(
            lambda: 'vramp_guesses_total{outcome="right"} 0.0' not in served.get("/metrics", admin=True).decode(),
            "the guess was right, and is not counted",
        )


def test_what_sessions_do_next_is_known_after_a_restart(tmp_path: Path) -> None:
    (tmp_path / "vramp.toml").write_text(CONFIG)
    with Served(tmp_path / "vramp.toml", tmp_path) as served:

        def learned() -> bool:
            ask(served, "planner", "one")
            ask(served, "coder", "one")
            return (tmp_path / ".state" / "sequences.json").exists()

        served.wait(learned, "nothing was written down")
    asked: list[str] = []
    with Served(tmp_path / "vramp.toml", tmp_path) as served:
        served.wait(lambda: planned_ahead(served, asked), "the coder was forgotten")
