"""The proxy as a whole, where it needs no process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace
from typing import NoReturn
from unittest.mock import Mock

import pytest

from proxy.app import App
from proxy.config_load import Start


async def test_a_hole_in_our_checks_does_not_end_a_server_that_reloads(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def breaks(_start: Start) -> NoReturn:
        raise TypeError("nobody thought of this file")

    monkeypatch.setattr("proxy.app.load_start", breaks)
    app = App.__new__(App)
    app._start, app._front, app._watch, app._link = Start(), Mock(), Mock(), Mock()
    before = SimpleNamespace(**vars(app))
    await app.reload()
    assert SimpleNamespace(**vars(app)) == before
    app._front.configure.assert_not_called()
    app._link.reloaded.assert_called_once_with("a changed configuration could not be read, why is in the log")
    assert "nobody thought of this file" in caplog.text


def slow_parts(**env: str) -> str:
    code = "from proxy.app import slow_parts; print(*slow_parts())"
    return subprocess.check_output([sys.executable, "-c", code], env={**os.environ, **env}, text=True)


@pytest.mark.native
def test_a_server_without_native_code_says_so_at_start() -> None:
    assert slow_parts(VRAMP_PURE="0").strip() == ""
    assert "extensions are pure (VRAMP_PURE is set)" in slow_parts(VRAMP_PURE="1")
