"""TLS: files that cannot be used are named before the start, and renewed ones are used without a dropped connection."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path

import aiohttp
import msgspec
import pytest

from ext.rate_counters import RateCounters
from proxy.config import ServerConfig
from proxy.config_diff import diff
from proxy.config_load import load_text
from proxy.config_secrets import ResolvedSecrets
from proxy.observe.metrics import Metrics
from proxy.server.serving import Serving
from proxy.tls import tls_problems, tls_warnings, validity
from tests.certificates import Pair, make_pair
from tests.fakes import FakeScheduler

SOON = datetime.now(UTC) + timedelta(hours=1)  # when what is made here is valid


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Pair, Pair]:
    folder = tmp_path_factory.mktemp("tls")
    return make_pair(folder / "one"), make_pair(folder / "two")


@pytest.fixture
def pair(made: tuple[Pair, Pair], tmp_path: Path) -> Pair:
    """One that the test may spoil."""
    copy = Pair(tmp_path / "cert.pem", tmp_path / "key.pem")
    use(made[0], copy)
    return copy


def use(source: Pair, target: Pair) -> None:
    for one, other in zip(source, target, strict=True):
        other.write_bytes(one.read_bytes())
        other.chmod(0o600)


def problems(server: ServerConfig) -> list[str]:
    return [f"{problem.path} {problem.says}" for problem in tls_problems(server)]


def test_a_good_pair_and_none_at_all_are_no_problem(pair: Pair) -> None:
    assert problems(ServerConfig()) == []
    assert problems(pair.server()) == []
    assert list(tls_warnings(pair.server(), SOON)) == []
    assert list(tls_warnings(ServerConfig(), SOON)) == []


def test_one_without_the_other_is_named(pair: Pair) -> None:
    assert problems(ServerConfig(tls_cert=str(pair.cert))) == [
        "server.tls_key is missing, and server.tls_cert is given; TLS needs both"
    ]
    assert problems(ServerConfig(tls_key=str(pair.key))) == [
        "server.tls_cert is missing, and server.tls_key is given; TLS needs both"
    ]


def test_what_is_not_there_or_is_something_else_is_named_at_once(pair: Pair) -> None:
    pair.cert.unlink()
    pair.key.write_text("nothing of the kind")
    cert, key = problems(pair.server())
    assert "cert.pem" in cert
    assert "which cannot be read (No such file or directory); name the certificate's file" in cert
    assert "which has no private key in it" in key


@pytest.mark.parametrize("text", ["", "-----BEGIN CERTIFICATE-----\nMAA=\n-----END CERTIFICATE-----\n", "MIIB"])
def test_a_file_without_a_certificate_is_named(pair: Pair, text: str) -> None:
    pair.cert.write_text(text)
    (says,) = problems(pair.server())
    assert "which has no certificate in it" in says


def test_a_key_of_another_certificate_is_named(pair: Pair, made: tuple[Pair, Pair]) -> None:
    pair.key.write_bytes(made[1].key.read_bytes())
    (says,) = problems(pair.server())
    assert says.startswith("server.tls_key is ")
    assert f"is not the key of {pair.cert}" in says


def test_a_key_with_a_password_is_refused_and_nobody_is_asked_for_it(tmp_path: Path) -> None:
    (says,) = problems(make_pair(tmp_path / "p", "-passout", "pass:secret").server())
    assert "which is encrypted" in says


def test_a_key_that_openssl_cannot_read_is_a_problem_and_no_crash(pair: Pair) -> None:
    head, *_, foot = pair.key.read_text().splitlines()
    pair.key.write_text(f"{head}\nMAA=\n{foot}\n")
    (says,) = problems(pair.server())
    assert "cannot be used" in says


def test_a_certificate_that_has_expired_or_is_not_valid_yet_is_warned_about(pair: Pair) -> None:
    begins, ends = validity(pair.cert.read_bytes())
    assert abs(ends - begins - timedelta(days=1)) < timedelta(seconds=2)
    assert begins <= datetime.now(UTC) < ends
    (late,) = tls_warnings(pair.server(), ends + timedelta(seconds=1))
    assert f"which expired on {ends:%Y-%m-%d}" in late
    (early,) = tls_warnings(pair.server(), begins - timedelta(seconds=1))
    assert "which is not valid before" in early


def test_a_key_that_everybody_can_read_is_warned_about(pair: Pair) -> None:
    pair.key.chmod(0o644)
    (says,) = tls_warnings(pair.server(), SOON)
    assert f"chmod 600 {pair.key}" in says


def test_the_configuration_resolves_and_checks_the_files(pair: Pair) -> None:
    text = '[server]\ntls_cert = "cert.pem"\ntls_key = "key.pem"'
    config = load_text(text, "x.toml", base_dir=pair.cert.parent)
    assert (config.server.tls_cert, config.server.tls_key) == (str(pair.cert), str(pair.key))
    renewed = load_text(text.replace("key.pem", "./key.pem"), "x.toml", base_dir=pair.cert.parent)
    plain = load_text("", "x.toml", base_dir=pair.cert.parent)
    assert diff(config, renewed) == []
    assert all(line.endswith("(needs a restart; until then the old value holds)") for line in diff(plain, config))


# ---- a listener


class Listening:
    def __init__(self, pair: Pair, *, fast: bool) -> None:
        self.pair = pair
        files = {"server.tls_cert": str(pair.cert), "server.tls_key": str(pair.key)}
        self.config = load_text("", "x.toml", {**files, "server.fast_lane": fast})
        self.config = msgspec.structs.replace(
            self.config, observe=msgspec.structs.replace(self.config.observe, access_log="off")
        )
        self.front = Serving(
            self.config,
            ResolvedSecrets(),
            FakeScheduler(),
            Metrics(),
            counters=RateCounters(),
            residency=lambda _: "cold",
        )

    async def start(self) -> None:
        sock = socket.create_server(("127.0.0.1", 0))
        self.port = sock.getsockname()[1]
        with closing(sock):
            await self.front.start([sock])

    def trusting(self, *certs: Path) -> ssl.SSLContext:
        context = ssl.create_default_context()
        for cert in certs:
            context.load_verify_locations(cert)
        return context

    async def get(self, session: aiohttp.ClientSession) -> str:
        async with session.get(f"https://localhost:{self.port}/healthz") as answer:
            assert answer.status == 200
            return await answer.text()

    async def handshake(self, context: ssl.SSLContext) -> ssl.SSLObject:
        _, writer = await asyncio.open_connection("localhost", self.port, ssl=context)
        with closing(writer):
            found: ssl.SSLObject = writer.get_extra_info("ssl_object")
            return found


@pytest.fixture(params=["ordinary", pytest.param("fast", marks=pytest.mark.native)])
async def listening(pair: Pair, request: pytest.FixtureRequest) -> AsyncIterator[Listening]:
    made = Listening(pair, fast=request.param == "fast")
    await made.start()
    yield made
    await made.front.close()


async def test_a_client_that_checks_the_certificate_is_served(listening: Listening) -> None:
    context = listening.trusting(listening.pair.cert)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=context)) as session:
        assert await listening.get(session) == "ok\n"
    context.set_alpn_protocols(["h2", "http/1.1"])
    found = await listening.handshake(context)
    assert (found.selected_alpn_protocol(), found.version()) == ("http/1.1", "TLSv1.3")


async def test_what_is_older_than_tls_1_2_and_what_is_no_tls_is_refused_and_the_next_is_served(
    listening: Listening,
) -> None:
    old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    old.load_verify_locations(listening.pair.cert)
    old.set_ciphers("ALL:@SECLEVEL=0")
    with pytest.warns(DeprecationWarning, match="TLSv1_1"):
        old.minimum_version = old.maximum_version = ssl.TLSVersion.TLSv1_1
    with pytest.raises((ssl.SSLError, ConnectionError)):
        await listening.handshake(old)
    reader, writer = await asyncio.open_connection("127.0.0.1", listening.port)
    writer.write(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert b"200 OK" not in await reader.read()
    writer.close()
    await listening.handshake(listening.trusting(listening.pair.cert))


async def test_a_renewed_certificate_is_shown_to_new_connections_and_open_ones_go_on(
    listening: Listening, made: tuple[Pair, Pair]
) -> None:
    context = listening.trusting(listening.pair.cert)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=context)) as session:
        await listening.get(session)
        use(made[1], listening.pair)
        listening.front.configure(listening.config, ResolvedSecrets())
        assert await listening.get(session) == "ok\n", "on the connection that is open"
    with pytest.raises(ssl.SSLCertVerificationError):
        await listening.handshake(context)
    await listening.handshake(listening.trusting(made[1].cert))


@pytest.mark.parametrize("renewed", ["cert", "key"])
async def test_a_renewal_that_fails_is_logged_and_the_certificate_before_stays(
    listening: Listening, made: tuple[Pair, Pair], caplog: pytest.LogCaptureFixture, renewed: str
) -> None:
    before = listening.trusting(made[0].cert)
    getattr(listening.pair, renewed).write_bytes(getattr(made[1], renewed).read_bytes())
    listening.front.configure(listening.config, ResolvedSecrets())
    assert "the certificate before stays in use" in caplog.text
    await listening.handshake(before)
