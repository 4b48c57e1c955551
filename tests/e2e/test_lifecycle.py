"""The life of a server from its start to its end, as an operator and a service manager see it."""

from __future__ import annotations

import signal
import socket
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from tests.certificates import make_pair
from tests.e2e.harness import Served, model_table, simulated
from tests.scheduler.engines.keeper_rig import passed_by_systemd

pytestmark = [pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(60)]

CONFIG = f"""
[server]
hang_limit_s = 3
{simulated(model_table("a"))}
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "vramp.toml"
    path.write_text(CONFIG)
    return path


def chat(served: Served) -> str:
    return str(served.chat("a")["model"])


def test_a_proxy_that_hangs_says_where_and_another_serves_with_its_engines(config: Path) -> None:
    with Served(config, config.parent) as served:
        chat(served)
        engine, proxy = served.model("a")["pids"], served.proxy_pid()
        served.kill(proxy, number=signal.SIGSTOP)
        assert chat(served) == "a"  # after waiting in the listen queue
        assert served.proxy_pid() != proxy
        assert served.model("a")["pids"] == engine
        assert "has given no sign of life for" in served.tail()
        assert served.stop() == 0


def test_a_stop_at_any_moment_of_the_start_is_clean(config: Path) -> None:
    """From the first moment that it can be told on, through the keeper's start and the proxy's."""
    moments: dict[str, Callable[[Served], bool]] = {
        "it is about to become the keeper": lambda served: "vramp: serving" in served.tail(),
        "the keeper has a child": lambda served: len(served.family()) > 1,
        "clients can connect": accepts,
        "it is ready": Served.ready,
    }
    for moment, has_come in moments.items():
        served = Served(config, config.parent)
        try:
            served.wait(lambda: has_come(served), moment)  # noqa: B023 - called in this turn
            assert served.stop() == 0, f"{moment}\n{served.tail()}"
            assert served.survivors() == [], moment
        finally:
            served.__exit__()


def accepts(served: Served) -> bool:
    with suppress(ConnectionError), socket.create_connection(("127.0.0.1", served.port)):
        return True
    return False


def test_sockets_that_systemd_opened_are_served_and_their_ports_are_not_in_the_way(config: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as http, socket.create_server(("127.0.0.1", 0)) as admin:
        before = passed_by_systemd({"http": http, "admin": admin})
        passed = (http.fileno(), admin.fileno())
        served = Served(config, config.parent, before=before, passed=passed, ports=_ports(http, admin))
        with served:
            assert chat(served) == "a"
            assert served.stop() == 0


def test_a_reload_that_would_leave_an_open_port_without_keys_is_refused(config: Path) -> None:
    """The file may say a private address: the listener is still the one that the server began with."""
    keys = 'api_keys = ["literal:k"]\nadmin_keys = ["literal:k"]'
    config.write_text(CONFIG.replace("[server]", f"[server]\n{keys}"))
    with socket.create_server(("0.0.0.0", 0)) as http, socket.create_server(("127.0.0.1", 0)) as admin:
        before = passed_by_systemd({"http": http, "admin": admin})
        passed = (http.fileno(), admin.fileno())
        with Served(config, config.parent, before=before, passed=passed, ports=_ports(http, admin)) as served:
            config.write_text(CONFIG)
            served.wait(lambda: "open to others, and server.api_keys is empty" in served.tail(), "it was not refused")
            assert served.chat("a", {"Authorization": "Bearer k"})["model"] == "a"


@pytest.mark.parametrize("workers", [1, 2])
def test_https_is_served_and_a_renewed_certificate_is_used_without_being_told(
    config: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    first, second = (make_pair(config.parent / name) for name in ("first", "second"))
    tls = f'workers = {workers}\ntls_cert = "first/cert.pem"\ntls_key = "first/key.pem"'
    config.write_text(CONFIG.replace("[server]", f"[server]\n{tls}"))
    monkeypatch.setenv("SSL_CERT_FILE", str(first.cert))  # what this process trusts
    served = Served(config, config.parent)
    served.url = f"https://127.0.0.1:{served.port}"
    with served:
        assert chat(served) == "a"
        assert f"vramp is ready: {served.url}/v1" in served.tail()
        monkeypatch.setenv("SSL_CERT_FILE", str(second.cert))
        assert not served.ready()
        for new, old in zip(second, first, strict=True):
            new.rename(old)
        monkeypatch.setenv("SSL_CERT_FILE", str(first.cert))
        served.wait(served.ready, "the new certificate is not shown")
        assert chat(served) == "a"
        assert served.stop() == 0


def _ports(*sockets: socket.socket) -> tuple[int, int]:
    http, admin = (int(sock.getsockname()[1]) for sock in sockets)
    return http, admin
