"""The vramp command, against a small server that answers as the operators' API does."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from unittest.mock import Mock
from urllib.parse import unquote

import pytest
from click.testing import CliRunner, Result

from proxy import __version__, cli_serve
from proxy.admin_client import AdminClient
from proxy.cli import main
from proxy.cli_admin import watch_status
from proxy.config import Config
from proxy.config_load import Start, load_text
from proxy.preflight import Finding
from scheduler.engines.reaper import Reaped

GIB = 1 << 30
STATUS = {
    "version": "0.1.0",
    "backend": "native",
    "uptime_s": 3725.0,
    "config": "configs/demo.toml",
    "a_key_of_a_newer_server": 1,
    "devices": [
        {"name": "host", "kind": "host", "capacity_bytes": 8 * GIB, "used_bytes": 3 * GIB,
         "held_bytes": 3 * GIB, "reserved_bytes": 0,
         "foreign_bytes": GIB, "free_bytes": 4 * GIB},
    ],
    "models": [
        {"id": "demo-chat", "backend": "local", "device": "host", "state": "ready", "note": "[bold]as is[/bold]",
         "progress": 1.0, "memory_bytes": GIB, "measured_bytes": 3 * GIB, "pinned": True, "in_flight": 2, "waiting": 0,
         "eta_s": None, "last_used_s": 1.0, "loads": 3, "task": "generate"},
        {"id": "demo-code", "backend": "local", "device": None, "state": "loading", "note": None, "progress": 0.4,
         "memory_bytes": GIB, "measured_bytes": None, "pinned": False, "in_flight": 0, "waiting": 5, "eta_s": 4.0,
         "last_used_s": 95.0, "loads": 0, "task": "generate"},
    ],
    "waiting": [{"class": "instant", "count": 0}, {"class": "standard", "count": 5}],
    "decisions": [{"t_s": 3720.0, "what": "evict demo-story", "why": "demo-code needs 1GiB"}],
}  # fmt: skip
MODELS = {
    "models": [
        {"id": "demo-chat", "where": "local/local", "strengths": ["chat"], "memory_bytes": GIB, "supports_tools": False,
         "licence": None, "env": {"HF_TOKEN": "not for a table"}},
        {"id": "demo-code", "where": "local/local", "strengths": [], "memory_bytes": None, "supports_tools": True,
         "licence": None},
    ]
}  # fmt: skip
LOAD_STEPS = [
    {"state": "loading", "progress": 0.1, "note": "starting"},
    {"state": "loading", "progress": 0.2, "note": "starting"},
    {"state": "loading", "progress": 0.7, "note": "reading weights"},
    {"state": "ready", "progress": 1.0, "note": None},
    {"state": "ready", "progress": 1.0, "note": None, "done": True},
]


class FakeAdmin:
    """Answers what `answers` says, by method and path, and notes what it was asked."""

    def __init__(self) -> None:
        self.answers: dict[str, tuple[int, bytes]] = {
            "GET /admin/api/status": (200, json.dumps(STATUS).encode()),
            "GET /admin/api/models": (200, json.dumps(MODELS).encode()),
            "POST /admin/api/models/demo-chat/load": (200, ndjson(LOAD_STEPS)),
            "POST /admin/api/models/demo-chat/unload": (200, ndjson([{"state": "cold", "done": True}])),
        }
        self.keys: list[str | None] = []
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def answer(self) -> None:
                fake.keys.append(self.headers.get("Authorization"))
                missing = (404, json.dumps({"error": {"message": "no such model; did you mean demo-chat?"}}).encode())
                status, body = fake.answers.get(f"{self.command} {unquote(self.path)}", missing)
                self.send_response(status)
                self.end_headers()
                self.wfile.write(body)

            do_GET = do_POST = answer  # noqa: N815

            def log_message(self, *_args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"127.0.0.1:{self.server.server_address[1]}"

    def run(self, *args: str, **env: str) -> Result:
        return CliRunner().invoke(main, [*args], env={"VRAMP_ADMIN": self.address, **env})


def ndjson(steps: list[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(step).encode() + b"\n" for step in steps)


@pytest.fixture
def admin(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeAdmin]:
    monkeypatch.setenv("COLUMNS", "160")
    fake = FakeAdmin()
    thread = Thread(target=fake.server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield fake
    fake.server.shutdown()
    thread.join()
    fake.server.server_close()


@pytest.fixture
def nobody() -> str:
    """An address that nothing listens on: taken and given back."""
    fake = FakeAdmin()
    fake.server.server_close()
    return fake.address


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "vramp.toml"
    path.write_text(
        """
        [server]
        listen = "127.0.0.1:0"
        admin_listen = "127.0.0.1:0"
        [store]
        dir = "state"
        [[devices.simulated]]
        name = "sim0"
        memory = "8GiB"
        [[backends]]
        name = "local"
        kind = "simulated"
        [[models]]
        id = "demo-chat"
        backend = "local"
        memory_bytes = "2GiB"
        sample_prompt = "Who's there?"
        """
    )
    return path


# status, models


def test_status_shows_devices_models_queue_and_reasons(admin: FakeAdmin) -> None:
    result = admin.run("status")
    assert result.exit_code == 0
    lines = [line.strip() for line in result.output.splitlines()]
    assert lines[0] == "vramp 0.1.0 (native), up 1h02m, configs/demo.toml"
    (host,) = [line for line in lines if line.startswith("host ")]
    assert "#########===............" in host
    assert host.split()[3:] == ["8GiB", "3GiB", "3GiB", "1GiB", "4GiB"]
    (chat,) = [line for line in lines if line.startswith("demo-chat")]
    assert "(pinned)" in chat
    assert "3GiB" in chat
    assert "100%" not in chat
    assert "[bold]as is[/bold]" in chat
    (code,) = [line for line in lines if line.startswith("demo-code")]
    assert "loading 40%" in code
    assert "1m35s" in code
    assert "waiting: 5 standard" in lines
    assert lines[-1] == "5s ago  evict demo-story: demo-code needs 1GiB"


def test_status_says_on_a_devices_line_that_its_figures_are_old(admin: FakeAdmin) -> None:
    def host(**more: object) -> str:
        status = STATUS | {"devices": [STATUS["devices"][0] | more]}
        admin.answers["GET /admin/api/status"] = (200, json.dumps(status).encode())
        lines = [line.strip() for line in admin.run("status").output.splitlines()]
        return next(line for line in lines if line.startswith("host "))

    unreadable = {"for_s": 185.0, "why": "TimeoutError: no answer within 10 s"}
    assert host(unreadable=unreadable).endswith(" not read for 3m05s: TimeoutError: no answer within 10 s")
    assert host(unreadable=None) == host()
    assert "not read" not in host()


def test_status_shows_workers_where_there_are_some(admin: FakeAdmin) -> None:
    def shown(**more: object) -> list[str]:
        admin.answers["GET /admin/api/status"] = (200, json.dumps(STATUS | more).encode())
        return [line for line in admin.run("status").output.splitlines() if line.startswith("workers")]

    workers = [
        {"worker": 3, "pid": 411, "serving": True, "in_flight": 7, "tickets": 7, "uptime_s": 9.5},
        {"worker": 4, "pid": 412, "serving": False, "in_flight": 0, "tickets": 0, "uptime_s": 0.1},
    ]
    line = "workers: 411 (7 in flight), 412 (0 in flight, starting); restarts: 2"
    assert shown(workers=workers, worker_restarts=2) == [line]
    assert shown(workers=[], worker_restarts=5) == ["workers: none runs; restarts: 5"]
    assert shown() == []


def test_a_narrow_terminal_does_not_cut_names(admin: FakeAdmin) -> None:
    output = admin.run("status", COLUMNS="60").output
    assert "demo-chat (pinned)" in output
    assert "demo-code" in output


def test_status_and_models_for_programs_are_what_the_server_said(admin: FakeAdmin) -> None:
    assert json.loads(admin.run("status", "--json").output) == STATUS
    assert json.loads(admin.run("models", "--json").output) == MODELS


def test_models_shows_only_columns_that_say_something(admin: FakeAdmin) -> None:
    head, _, chat, code = [line.split() for line in admin.run("models").output.splitlines() if line.strip()]
    assert head == ["model", "where", "memory", "tools", "good", "at"]
    assert chat == ["demo-chat", "local/local", "1GiB", "no", "chat"]
    assert code == ["demo-code", "local/local", "yes"]


def test_the_operators_key_is_sent_and_never_an_option(admin: FakeAdmin) -> None:
    admin.run("status", VRAMP_ADMIN_KEY="sk-op")
    admin.run("status")
    assert admin.keys == ["Bearer sk-op", None]


def test_an_operators_key_that_no_header_can_carry_is_refused(admin: FakeAdmin) -> None:
    result = admin.run("status", VRAMP_ADMIN_KEY="sk-\u00fc")
    assert (result.exit_code, result.stderr) == (
        1,
        "error: VRAMP_ADMIN_KEY has characters that no header can carry; use printable ASCII\n",
    )


def test_the_address_comes_from_option_environment_or_configuration(
    admin: FakeAdmin, nobody: str, tmp_path: Path
) -> None:
    assert CliRunner().invoke(main, ["status", "--admin", admin.address], env={"VRAMP_ADMIN": nobody}).exit_code == 0
    assert CliRunner().invoke(main, ["status", "--admin", f"http://{admin.address}/"]).exit_code == 0
    file = tmp_path / "vramp.toml"
    port = admin.address.rpartition(":")[2]
    file.write_text(f"[server]\nadmin_listen = '0.0.0.0:{port}'\nadmin_keys = ['env:KEY']")
    assert CliRunner().invoke(main, ["status", "--config", str(file)]).exit_code == 0


def test_nobody_there_is_said_with_its_own_exit_code(nobody: str) -> None:
    for args in (["status"], ["models"], ["load", "m"], ["unload", "m"]):
        result = CliRunner().invoke(main, [*args, "--admin", nobody])
        assert result.exit_code == 3
        assert result.stderr == (
            f"error: nothing listens on {nobody} (Connection refused); start it with `vramp serve`, "
            "or name another address with --admin or VRAMP_ADMIN\n"
        )


def test_an_address_that_is_none_is_said() -> None:
    result = CliRunner().invoke(main, ["status", "--admin", "127.0.0.1:http"])
    assert (result.exit_code, result.stderr) == (
        1,
        "error: 127.0.0.1:http is no address of a server; use HOST:PORT or http://HOST:PORT\n",
    )


@pytest.mark.parametrize("body", [b"<html>", b"[]", b'{"devices": 3}', b""])
def test_a_server_that_is_no_vramp_is_recognised(admin: FakeAdmin, body: bytes) -> None:
    admin.answers["GET /admin/api/status"] = (200, body)
    result = admin.run("status")
    assert (result.exit_code, result.stderr) == (
        1,
        f"error: {admin.address} does not answer as vramp's operators' API does; name its admin_listen\n",
    )
    admin.answers["GET /admin/api/status"] = (404, body)
    assert f"{admin.address} answered 404, not as vramp's operators' API does" in admin.run("status").stderr


def test_a_missing_key_names_the_variable(admin: FakeAdmin) -> None:
    admin.answers["GET /admin/api/status"] = (401, b"")
    assert admin.run("status").stderr == (
        f"error: {admin.address} wants an operator's key; set VRAMP_ADMIN_KEY to one of its admin_keys\n"
    )


def test_a_refusal_is_shown_in_the_server_s_words(admin: FakeAdmin) -> None:
    admin.answers["GET /admin/api/status"] = (403, b'{"error": {"message": "host is refused; use localhost"}}')
    assert admin.run("status").stderr == "error: host is refused; use localhost\n"


def test_watch_goes_on_while_the_server_is_away(admin: FakeAdmin, capsys: pytest.CaptureFixture[str]) -> None:
    turns: list[float] = []

    def pause(seconds: float) -> None:
        turns.append(seconds)
        if len(turns) == 1:
            admin.answers["GET /admin/api/status"] = (503, b'{"error": {"message": "is starting"}}')
        elif len(turns) == 2:
            admin.answers["GET /admin/api/status"] = (200, json.dumps(STATUS).encode())
        else:
            raise KeyboardInterrupt

    watch_status(AdminClient(admin.address), pause)
    assert turns == [1.0, 1.0, 1.0]
    assert "waiting: 5 standard" in capsys.readouterr().out


def test_watching_from_a_pipe_shows_each_status_as_it_is(admin: FakeAdmin, capsys: pytest.CaptureFixture[str]) -> None:
    shown: list[str] = []

    def pause(_seconds: float) -> None:
        shown.append(capsys.readouterr().out)
        if len(shown) == 2:
            raise KeyboardInterrupt

    watch_status(AdminClient(admin.address), pause)
    assert ["demo-chat" in text for text in shown] == [True, True]


def test_tls_to_a_server_that_has_none_is_not_a_server_that_is_away(admin: FakeAdmin) -> None:
    result = CliRunner().invoke(main, ["status", "--admin", f"https://{admin.address}"])
    assert result.exit_code == 1
    assert result.stderr.startswith(f"error: no TLS with {admin.address} (")
    assert result.stderr.endswith("); vramp's own admin_listen has none: use http://\n")


def test_watch_and_json_exclude_each_other(admin: FakeAdmin) -> None:
    assert admin.run("status", "--watch", "--json").exit_code == 2


# load, unload


def test_load_prints_a_line_for_each_change(admin: FakeAdmin) -> None:
    result = admin.run("load", "demo-chat")
    assert result.exit_code == 0
    assert result.output.splitlines() == [
        "demo-chat: loading, starting",
        "demo-chat: loading, reading weights",
        "demo-chat: ready",
    ]


def test_load_draws_a_bar_at_a_terminal(admin: FakeAdmin, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("proxy.cli_admin.at_terminal", lambda: True)
    result = admin.run("load", "demo-chat")
    last = result.output.splitlines()[-1]
    assert "demo-chat" in last
    assert "100%" in last
    assert last.endswith("ready")


def test_unload_says_where_it_ended(admin: FakeAdmin) -> None:
    assert admin.run("unload", "demo-chat").output == "demo-chat: cold\n"


def test_a_failed_load_ends_with_the_reason(admin: FakeAdmin) -> None:
    failed = [LOAD_STEPS[0], {"state": "failed", "done": True, "error": "the engine ended with code 1"}]
    admin.answers["POST /admin/api/models/demo-chat/load"] = (200, ndjson(failed))
    result = admin.run("load", "demo-chat")
    assert result.exit_code == 1
    assert result.stderr == "error: load of demo-chat failed: the engine ended with code 1\n"


def test_a_load_whose_server_goes_away_is_no_success(admin: FakeAdmin) -> None:
    admin.answers["POST /admin/api/models/demo-chat/load"] = (200, ndjson(LOAD_STEPS[:2]))
    result = admin.run("load", "demo-chat")
    assert result.exit_code == 1
    assert result.stderr == "error: the server ended the load of demo-chat without a result; see vramp status\n"


def test_an_unknown_model_is_refused_in_the_server_s_words(admin: FakeAdmin) -> None:
    result = admin.run("load", "demo-chta")
    assert (result.exit_code, result.stderr) == (1, "error: no such model; did you mean demo-chat?\n")


def test_where_clients_connect_is_no_address_for_operators(admin: FakeAdmin) -> None:
    error = {"message": "There is no path /admin/api/status here.", "code": "not_found"}
    admin.answers["GET /admin/api/status"] = (404, json.dumps({"error": error}).encode())
    result = admin.run("status")
    says = f"error: {admin.address} is where clients connect; name the server's admin_listen with --admin\n"
    assert (result.exit_code, result.stderr) == (1, says)


def test_a_model_with_a_slash_keeps_it(admin: FakeAdmin) -> None:
    admin.answers["POST /admin/api/models/org/tiny model/load"] = (200, ndjson(LOAD_STEPS[-1:]))
    assert admin.run("load", "org/tiny model").output == "org/tiny model: ready\n"


# check


def test_check_says_good(config: Path) -> None:
    result = CliRunner().invoke(main, ["check", str(config)])
    assert (result.exit_code, result.output) == (0, f"{config}: good, 1 model: demo-chat\n")


def test_check_takes_its_file_as_serve_does_too(config: Path) -> None:
    result = CliRunner().invoke(main, ["check", "--config", str(config)])
    assert (result.exit_code, result.output) == (0, f"{config}: good, 1 model: demo-chat\n")
    for args in ([], [str(config), "--config", str(config)]):
        result = CliRunner().invoke(main, ["check", *args])
        assert (result.exit_code, "name one configuration file: vramp check FILE" in result.stderr) == (2, True)


def test_check_prints_every_problem_and_fails(config: Path) -> None:
    config.write_text("[server]\nlistn = 1\nworkers = 0")
    result = CliRunner().invoke(main, ["check", str(config)])
    assert result.exit_code == 1
    assert result.stderr.splitlines() == [
        f"error: {config}: server.listn is not a key; did you mean listen?",
        f'error: {config}: server.workers is 0; use 1 to 256, or "auto"',
    ]


def test_check_reads_the_secrets(config: Path) -> None:
    config.write_text(config.read_text().replace("[server]", "[server]\napi_keys = ['env:VRAMP_NO_KEY', 'literal:x']"))
    result = CliRunner().invoke(main, ["check", str(config)], env={"VRAMP_NO_KEY": None})
    assert result.exit_code == 1
    assert "the environment variable VRAMP_NO_KEY is not set" in result.stderr
    result = CliRunner().invoke(main, ["check", str(config)], env={"VRAMP_NO_KEY": "sk"})
    assert result.exit_code == 0
    assert result.stderr.startswith(f"warning: {config}: server.api_keys[1] is written into the file")


def test_check_only_warns_of_what_this_machine_lacks(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli_serve, "preflight", lambda _config, ports: [Finding("no compiler; install g++")])
    result = CliRunner().invoke(main, ["check", str(config)])
    assert (result.exit_code, result.stderr) == (0, "warning: no compiler; install g++\n")


def test_check_does_not_mind_a_server_that_runs_on_the_ports(config: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        config.write_text(config.read_text().replace('listen = "127.0.0.1:0"', f'listen = "127.0.0.1:{port}"', 1))
        assert str(port) not in CliRunner().invoke(main, ["check", str(config)]).stderr
        assert (
            f"port {port} (server.listen) is taken"
            in CliRunner().invoke(main, ["serve", "--config", str(config)]).stderr
        )


# serve


class Became(Exception):
    """Raised in place of execv."""


@pytest.fixture
def execv(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    calls: list[list[str]] = []

    def fake(path: str, argv: list[str]) -> None:
        assert path == argv[0]
        calls.append(argv)
        raise Became

    monkeypatch.setattr(os, "execv", fake)
    return calls


def test_serve_becomes_the_keeper_with_the_proxy_behind_it(config: Path, execv: list[list[str]]) -> None:
    args = ["serve", "--config", str(config), "--engine", "simulated", "--admin-listen", "127.0.0.1:0"]
    result = CliRunner().invoke(main, args)
    assert isinstance(result.exception, Became)
    assert result.stderr == f"vramp: serving {config}, 1 model: demo-chat\n"
    assert execv == [
        [
            sys.executable, "-m", "scheduler.engines.keeper",
            "--listen", "127.0.0.1:0", "--admin-listen", "127.0.0.1:0", "--state-dir", str(config.parent / "state"),
            "--drain-limit", "40.0", "--hang-limit", "30.0",
            "--", sys.executable, "-m", "proxy.app",
            "--engine", "simulated", "--config", str(config), "--admin-listen", "127.0.0.1:0",
        ]
    ]  # fmt: skip


def test_a_banner_that_nobody_can_be_told_is_no_reason_not_to_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    stdout = Mock(write=Mock(side_effect=OSError(errno.ENOSPC, "No space left on device")))
    monkeypatch.setattr(sys, "stdout", stdout)
    cli_serve.announce("vramp is ready")
    stdout.write.assert_called()


def test_closed_standard_streams_are_opened_before_anything_takes_their_place() -> None:
    code = (
        "import os, sys; from proxy.cli_serve import open_standard_streams; open_standard_streams(); "
        'sys.stderr.write(f\'{os.readlink("/proc/self/fd/0")} {os.readlink("/proc/self/fd/1")} \''
        "f'{os.get_inheritable(0)} {os.get_inheritable(1)}')"
    )
    closed = ["sh", "-c", 'exec "$0" -c "$1" <&- >&-', sys.executable, code]
    shown = subprocess.run(closed, stderr=subprocess.PIPE, text=True, check=True)
    assert shown.stderr == "/dev/null /dev/null True True"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("point", ["load_start", "reap", "preflight"])
def test_a_stop_while_serve_looks_around_is_no_failure(
    config: Path, execv: list[list[str]], monkeypatch: pytest.MonkeyPatch, point: str, number: signal.Signals
) -> None:
    before = signal.getsignal(number)
    monkeypatch.setattr(cli_serve, point, lambda *_, **__: os.kill(os.getpid(), number))
    result = CliRunner().invoke(main, ["serve", "--config", str(config)])
    assert (result.exit_code, execv) == (0, [])
    assert signal.getsignal(number) is before


def test_a_stop_is_held_back_until_the_keeper_hears_it(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[set[int]] = []

    def become(_path: str, _argv: list[str]) -> None:
        held.append({*signal.pthread_sigmask(signal.SIG_BLOCK, ())})
        raise Became

    monkeypatch.setattr(os, "execv", become)
    assert isinstance(CliRunner().invoke(main, ["serve", "--config", str(config)]).exception, Became)
    assert {signal.SIGTERM, signal.SIGINT} <= held[0]
    assert not {signal.SIGTERM, signal.SIGINT} & {*signal.pthread_sigmask(signal.SIG_BLOCK, ())}


def test_serve_hands_on_every_model() -> None:
    argv = cli_serve.keeper_argv(Start(models=("a", "b")), load_text("", "x.toml"))
    assert argv[argv.index("proxy.app") + 1 :] == ["--engine", "auto", "--model", "a", "--model", "b"]


def test_serve_does_not_start_with_a_fatal_finding(
    config: Path, execv: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    findings = [Finding("port 1 is taken by x; stop that"), Finding("few files; raise it", fatal=False)]
    monkeypatch.setattr(cli_serve, "preflight", lambda _config, passed: findings)
    result = CliRunner().invoke(main, ["serve", "--config", str(config)])
    assert result.exit_code == 1
    assert result.stderr == "error: port 1 is taken by x; stop that\nwarning: few files; raise it\n"
    assert execv == []


def test_serve_ends_what_a_killed_keeper_left_before_it_looks_at_ports(
    config: Path, execv: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    did: list[str] = []

    def reap(state_dir: str) -> list[Reaped]:
        did.append(state_dir)
        return [Reaped(4711, "python -m vllm")]

    monkeypatch.setattr(cli_serve, "reap", reap)

    def preflight(_config: Config, passed: Sequence[str]) -> list[Finding]:
        did.append("preflight")
        return []

    monkeypatch.setattr(cli_serve, "preflight", preflight)
    result = CliRunner().invoke(main, ["serve", "--config", str(config)])
    assert did == [str(config.parent / "state"), "preflight"]
    assert result.stderr.startswith(
        "warning: ended what an earlier vramp left when it was killed: 4711 (python -m vllm)\n"
    )
    assert len(execv) == 1


def test_serve_refuses_a_public_address_without_keys(config: Path, execv: list[list[str]]) -> None:
    result = CliRunner().invoke(main, ["serve", "--config", str(config), "--listen", "0.0.0.0:0"])
    assert result.exit_code == 1
    assert result.stderr.startswith('error: command line: server.listen is "0.0.0.0:0", open to others')
    assert execv == []


@pytest.mark.parametrize("workers", ["0", "257", "-1", "many", "Auto", "1.5"])
def test_serve_refuses_a_number_of_workers_that_is_none(config: Path, execv: list[list[str]], workers: str) -> None:
    result = CliRunner().invoke(main, ["serve", "--config", str(config), "--workers", workers])
    assert result.exit_code == 1
    assert "error: command line: server.workers is" in result.stderr
    assert 'use 1 to 256, or "auto"' in result.stderr
    assert execv == []


def test_serve_hands_on_how_many_workers_there_are() -> None:
    argv = cli_serve.keeper_argv(Start(workers="auto"), load_text("", "x.toml"))
    assert argv[argv.index("--workers") + 1] == "auto"


def test_the_limit_of_open_files_is_raised_as_far_as_we_may(monkeypatch: pytest.MonkeyPatch) -> None:
    set_to: list[tuple[int, int]] = []
    monkeypatch.setattr(resource, "setrlimit", lambda _which, limits: set_to.append(limits))
    for limits in ((1024, 20_000), (1024, resource.RLIM_INFINITY), (70_000, 80_000), (4096, 4096)):
        monkeypatch.setattr(resource, "getrlimit", lambda _which, limits=limits: limits)
        cli_serve.raise_descriptor_limit()
    assert set_to == [(20_000, 20_000), (65_536, resource.RLIM_INFINITY)]


def test_the_banner_says_where_and_what_to_try(config: Path) -> None:
    text = config.read_text()
    embed = '[[models]]\nid = "demo-embed"\nbackend = "local"\ntask = "embed"\nmemory_bytes = "1GiB"\n'
    banner = cli_serve.banner(load_text(text + embed, "x"), ("http://127.0.0.1:1", "http://127.0.0.1:2"))
    lines = banner.splitlines()
    assert lines[0] == "vramp is ready: http://127.0.0.1:1/v1"
    curls = [line for line in lines if line.lstrip().startswith("curl")]
    assert [line.split()[1] for line in curls] == [
        "http://127.0.0.1:1/v1/chat/completions",
        "http://127.0.0.1:1/v1/embeddings",
    ]
    assert "Authorization" not in banner
    assert "http://127.0.0.1:2/metrics" in banner


@pytest.mark.parametrize(
    ("here", "admin", "line"),
    [
        (True, "127.0.0.1:8081", "vramp status --watch"),
        (True, "[::1]:9", "vramp status --watch --admin '[::1]:9'"),
        (False, "127.0.0.1:8081", ".venv/bin/vramp status --watch"),
    ],
)
def test_the_banner_s_status_line_can_be_typed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, here: bool, admin: str, line: str
) -> None:
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / "bin" / "vramp").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "executable", str(tmp_path / ".venv" / "bin" / "python"))
    monkeypatch.setattr("shutil.which", lambda _name: "/usr/bin/vramp" if here else None)
    banner = cli_serve.banner(load_text("", "x"), ("http://h", f"http://{admin}"))
    assert f"Status: {line}    Metrics: http://{admin}/metrics" in banner


def test_an_address_in_brackets_is_no_pattern_to_a_shell(config: Path) -> None:
    banner = cli_serve.banner(load_text(config.read_text(), "x"), ("http://[::1]:1", "http://[::1]:2"))
    assert "curl 'http://[::1]:1/v1/chat/completions' -H" in banner


def test_the_lines_to_try_survive_a_shell(config: Path) -> None:
    (curl, *_rest) = [
        line for line in cli_serve.banner(load_text(config.read_text(), "x"), ("http://h", "http://a")).splitlines()
        if "curl" in line
    ]  # fmt: skip
    shown = subprocess.run(["sh", "-c", curl.replace("curl", "printf '%s\\n'", 1)], capture_output=True, check=True)
    body = json.loads(shown.stdout.splitlines()[-1])
    assert body == {"model": "demo-chat", "messages": [{"role": "user", "content": "Who's there?"}]}


def test_the_lines_to_try_carry_a_key_where_one_is_needed() -> None:
    text = "[server]\napi_keys=['env:K']\n[[backends]]\nname='r'\nkind='openai'\nbase_url='https://h/v1'\n"
    config = load_text(text + "[[models]]\nid='m'\nbackend='r'\n", "x")
    assert 'curl http://h/v1/chat/completions -H "Authorization: Bearer $VRAMP_KEY"' in cli_serve.banner(
        config, ("http://h", "http://a")
    )


# help


def test_help_imports_nothing_that_takes_time() -> None:
    code = (
        "import sys; from proxy.cli import main; main(['--help'], standalone_mode=False); "
        "print([m for m in ('rich', 'msgspec', 'aiohttp', 'psutil', 'http.client') if m in sys.modules])"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("command", sorted(main.commands))
def test_each_command_explains_itself_with_an_example(command: str) -> None:
    shown = CliRunner().invoke(main, [command, "--help"]).output
    assert "Example" in shown
    assert f"  vramp {command}" in shown


@pytest.mark.parametrize(
    ("args", "meant"),
    [
        (["serve", "vramp.toml"], "did you mean --config vramp.toml?"),
        (["serve", "/etc/vramp"], "did you mean --config /etc/vramp?"),
        (["serve", "/"], "did you mean --model /?"),
        (["status", "vramp.toml"], "did you mean --config vramp.toml?"),
        (["status", "localhost:8081"], "did you mean --admin localhost:8081?"),
        (["load", "demo-chat", "vramp.toml"], "did you mean --config vramp.toml?"),
        (["plan", "--trace", "t.csv", "--config", "c.toml", "x.csv"], "did you mean --trace x.csv?"),
        (["simulate", "arrivals.csv"], "did you mean --trace arrivals.csv?"),
        (["simulate", "decisions"], "unexpected argument: decisions"),
        (["check", "a.toml", "b.toml"], "unexpected argument: b.toml"),
        (["serve", "--config", "a.toml", "b.toml"], "unexpected argument: b.toml"),
        (["serve", "a.toml", "b.toml"], "unexpected arguments: a.toml b.toml"),
    ],
)
def test_a_file_named_without_its_option_is_told_which(args: list[str], meant: str) -> None:
    result = CliRunner().invoke(main, args)
    assert result.exit_code == 2
    assert meant in result.output


@pytest.mark.parametrize("args", [["--help"], ["models"], ["models", "--json"], ["status"]])
def test_a_full_disk_is_a_line_and_not_a_traceback(admin: FakeAdmin, args: list[str]) -> None:
    command = [sys.executable, "-m", "proxy.cli", *args]
    environment = {**os.environ, "VRAMP_ADMIN": admin.address}
    with open("/dev/full", "w") as full:
        shown = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, env=environment, check=False)
    assert shown.stderr == "error: the output cannot be written: No space left on device\n"
    assert shown.returncode == 1


def test_an_error_that_is_not_the_output_s_is_not_taken_for_it(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli_serve, "preflight", Mock(side_effect=OSError(errno.ENOSPC, "full", "state")))
    assert isinstance(CliRunner().invoke(main, ["check", str(config)]).exception, OSError)


def test_the_version_says_native_or_pure() -> None:
    from ext.backend import BACKEND  # noqa: PLC0415 - what the command itself imports late

    assert CliRunner().invoke(main, ["--version"]).output == f"vramp {__version__} ({BACKEND})\n"
