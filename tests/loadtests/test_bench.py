"""The benchmark's parts: a client that counts only whole answers, an upstream in step with it, figures that add up."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from loadtests import bench, canned, client, fake_upstream, nginx
from loadtests.fake_upstream import Upstream

ROOT = Path(__file__).resolve().parents[2]
Protocol = Callable[[], asyncio.Protocol]


@asynccontextmanager
async def serving(protocol: Protocol) -> AsyncIterator[int]:
    server = await asyncio.get_running_loop().create_server(protocol, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1]


def answering(*pieces: bytes) -> Protocol:
    """A server that answers each read with these pieces, each in a packet of its own."""

    class Canned(asyncio.Protocol):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            assert isinstance(transport, asyncio.Transport)
            transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._transport = transport
            self._answered = False

        def data_received(self, data: bytes) -> None:
            if not self._answered:  # one answer will do
                self._answered = True
                self._next(0)

        def _next(self, at: int) -> None:
            if at < len(pieces):
                self._transport.write(pieces[at])
                asyncio.get_running_loop().call_later(0.002, self._next, at + 1)

    return Canned


async def until(condition: Callable[[], object]) -> None:
    while not condition():
        await asyncio.sleep(0.001)


async def test_client_and_upstream_agree_on_plain_answers_and_long_prompts() -> None:
    async with serving(Upstream) as port:
        for prompt_bytes in (canned.SMALL_BYTES, canned.LARGE_BYTES):
            async with client.plain(port, 3, prompt_bytes) as load:
                await until(lambda load=load: load.count.answers >= 9)
            assert load.count.failed == 0


async def test_client_and_upstream_agree_on_streams() -> None:
    async with serving(Upstream) as port:
        async with client.streams(port, 2, "sse-3-1") as load:
            await until(lambda: load.count.answers >= 4)
        assert load.count.failed == 0
        assert load.count.events >= 4 * canned.events_of("sse-3-1")
        assert load.count.started >= 4


async def test_a_busy_upstream_answers_the_same_only_later(monkeypatch: pytest.MonkeyPatch) -> None:
    spent: list[float] = []
    monkeypatch.setattr(fake_upstream, "spin", spent.append)
    async with serving(lambda: Upstream(fake_upstream.Busy(1.0, 2.0, 3.0))) as port:
        for load in (
            client.plain(port, 1),
            client.plain(port, 1, canned.LARGE_BYTES),
            client.streams(port, 1, "sse-2-1"),
        ):
            async with load:
                await until(lambda load=load: load.count.answers)
            assert load.count.failed == 0
    assert sorted(set(spent)) == [1.0, 2.0, 3.0]
    assert spent.count(3.0) >= 2


async def test_usage_comes_in_a_stream_only_when_it_was_asked_for() -> None:
    async with serving(Upstream) as port:
        for asked in (True, False):
            request = canned.request("sse-1-1", stream=True)
            if asked:  # as a proxy splices it
                body = request.partition(b"\r\n\r\n")[2]
                longer = b'{"stream_options":{"include_usage":true},' + body[1:]
                request = request.replace(body, longer).replace(b"%d" % len(body), b"%d" % len(longer))
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(request)
            answer = await reader.readuntil(canned.LAST)
            writer.close()
            assert (b'"usage"' in answer) == asked


@pytest.mark.parametrize("size", [1, 7, 100])
async def test_a_stream_cut_into_any_pieces_counts_the_same(size: int) -> None:
    whole = canned.STREAM_HEAD + canned.EVENT * 2 + canned.STREAM_END
    rest = whole[20:]
    pieces = [whole[:20], *(rest[at : at + size] for at in range(0, len(rest), size))]
    count = client.Count()
    connection = client.Streamed(b"", count, canned.events_of("sse-2-1"))
    connection.connection_made(SilentTransport())
    for piece in pieces:
        connection.data_received(piece)
    assert (count.answers, count.events, count.failed) == (1, 4, 0)


class SilentTransport(asyncio.Transport):
    def write(self, data: object) -> None:
        pass


@pytest.mark.parametrize(
    "answer",
    [
        canned.STREAM_HEAD + canned.EVENT + canned.STREAM_END,  # an event is missing
        canned.STREAM_HEAD.replace(b"200 OK", b"502 No") + canned.EVENT * 2 + canned.STREAM_END,
    ],
)
async def test_a_stream_that_is_not_whole_is_a_failure(answer: bytes) -> None:
    async with serving(answering(answer)) as port, client.streams(port, 1, "sse-2-1") as load:
        await until(lambda: load.count.failed)
    assert load.count.answers == 0


@pytest.mark.parametrize(
    "answer",
    [
        canned.plain_answer().replace(b"200 OK", b"503 No"),
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    ],
)
async def test_a_plain_answer_that_is_not_one_is_a_failure(answer: bytes) -> None:
    async with serving(answering(answer)) as port, client.plain(port, 1) as load:
        await until(lambda: load.count.failed)
    assert load.count.answers == 0


async def test_a_plain_answer_in_two_packets_is_one_answer() -> None:
    whole = canned.plain_answer()
    async with serving(answering(whole[:30], whole[30:])) as port, client.plain(port, 1) as load:
        await until(lambda: load.count.answers)
    assert (load.count.answers, load.count.failed) == (1, 0)


def figures(name: str, us: float) -> bench.Figures:
    return bench.Figures(name, us, us * 2, us / 10, 1e6 / us, 40.0, 44.0, 0)


def test_the_table_has_a_row_for_each_subject_and_the_ratio_of_the_last_to_the_first() -> None:
    lines = bench.table([figures("relay", 100.0), figures("vramp", 250.0)])
    assert lines[2] == "| relay | 100 | 200 | 10.0 | 10,000 | 40.0 | 44.0 | 0 |"
    assert lines[4].startswith("| vramp / relay | 2.50 x | 2.50 x | 2.50 x | 0.40 x | 1.00 x |")


def test_nginx_is_asked_for_the_same_key_as_we_are(tmp_path: Path) -> None:
    argv = nginx.command(str(tmp_path), 9, 10)
    conf = (tmp_path / "nginx.conf").read_text()
    assert argv[-1] == str(tmp_path / "nginx.conf")
    assert f"Bearer {canned.KEY}" in conf
    assert conf.count("{") == conf.count("}")


def test_a_window_without_answers_is_no_free_lunch() -> None:
    empty = bench.Window(cpu_s=0.5, seconds=1.0, answers=0, events=0, failed=3)
    busy = bench.Window(cpu_s=0.5, seconds=1.0, answers=1000, events=0, failed=0)
    assert min(empty, busy, key=lambda each: each.us_per_answer).us_per_answer == 500.0


def test_an_upstream_that_never_answered_is_told_of_and_never_spins_for_ever() -> None:
    assert bench.beyond(30.0, 10.0) == 20.0
    assert bench.beyond(9.0, 10.0) == 0.0
    for tls, plain in ((float("inf"), 10.0), (30.0, float("inf")), (float("inf"), float("inf"))):
        with pytest.raises(SystemExit, match="the upstream alone answered nothing"):
            bench.beyond(tls, plain)


def test_the_lock_is_held_while_measuring_and_given_back(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with bench.machine_alone(str(path)), path.open() as other, pytest.raises(BlockingIOError):
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with path.open() as other:
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.timeout(60)
def test_a_short_run_measures_both_and_writes_the_figures_down(tmp_path: Path) -> None:
    short = "import sys; from loadtests import bench; bench.WINDOWS, bench.WINDOW_S, bench.STREAM_WARM_S = 1, 0.3, 0.1;"
    short += "bench.OPEN_STREAMS = 5; sys.argv = ['bench', '--json', sys.argv[1]]; bench.main()"
    file, env = tmp_path / "figures.json", os.environ | {"BENCH_LOCK": str(tmp_path / "lock")}
    run = subprocess.run(
        [sys.executable, "-c", short, str(file)], cwd=ROOT, env=env, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    found = json.loads(file.read_text())
    *others, ours = found["results"]
    names = [each["name"].removeprefix("vramp, ") for each in others]
    assert names[-4:] == ["plain aiohttp relay", "ordinary lane", "HTTPS upstream", "HTTP upstream as slow"]
    assert found["rig"]["sealing"]["answer"] > 0
    assert ours["name"] == "vramp"
    assert not any(each["failed"] for each in (*others, ours))
    assert min(ours["us_per_chunk"], ours["us_per_request"]) > 0
    assert "| vramp / plain aiohttp relay |" in run.stdout
