"""The proxy as a whole, where it needs no process of its own."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from types import SimpleNamespace
from typing import NoReturn
from unittest.mock import Mock

import pytest
from aiohttp import web

from proxy.app import App
from proxy.config_load import Start
from tests.fakes import until


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


async def test_an_operator_who_connected_just_before_an_upgrade_is_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    """The connection was closed at once, which is an error to whoever had not sent the request yet."""

    async def answer(_request: web.BaseRequest) -> web.Response:
        return web.Response(text="here")

    app = App.__new__(App)
    app._runner = web.ServerRunner(web.Server(answer))
    await app._runner.setup()
    await web.TCPSite(app._runner, "127.0.0.1", 0).start()
    early, late = [await asyncio.open_connection(*app._runner.addresses[0]) for _ in range(2)]
    await until(lambda: len(app._runner.server.connections) == 2)
    monkeypatch.setattr("proxy.app.LEAVE_S", 60.0)
    leaving = asyncio.create_task(app._leave_operators())
    await until(lambda: not app._runner.sites)
    early[1].write(b"GET / HTTP/1.0\r\n\r\n")
    assert (await early[0].read()).endswith(b"here")
    leaving.cancel()
    monkeypatch.setattr("proxy.app.LEAVE_S", 0.0)
    await app._leave_operators()
    assert await late[0].read() == b""
    for _, writer in (early, late):
        writer.close()


def slow_parts(**env: str) -> str:
    code = "from proxy.app import slow_parts; print(*slow_parts())"
    return subprocess.check_output([sys.executable, "-c", code], env={**os.environ, **env}, text=True)


@pytest.mark.native
def test_a_server_without_native_code_says_so_at_start() -> None:
    assert slow_parts(VRAMP_PURE="0").strip() == ""
    assert "extensions are pure (VRAMP_PURE is set)" in slow_parts(VRAMP_PURE="1")
