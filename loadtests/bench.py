"""What vramp costs: CPU time per request and per streamed chunk, memory per stream. Printed, never asserted.

vramp (one worker, configs/bench.toml: every gate on), once more without its fast lane and with an HTTPS upstream, a
plain aiohttp relay, and nginx where it is installed stand in turn before the same fake upstream, in one run on one
machine: compare their ratio, not the figures, which other machines will not have.
Over TLS the fake upstream is the slower one, and then a proxy wakes up for each answer instead of for several. What
HTTPS costs the proxy itself shows beside an HTTP upstream that spends as much time on something else: measured, too.
Of several short windows the best counts, for all alike: whatever else the machine does only ever adds. Counted is the
CPU time of the process tree under test, so neither client nor upstream is in it; their own cost is printed beside it.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import fcntl
import json
import math
import os
import platform
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import msgspec
import psutil
import uvloop
from rich.console import Console
from rich.progress import Progress

from ext.backend import BACKEND
from loadtests import canned, client, nginx
from loadtests.fake_upstream import Busy

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "configs" / "bench.toml"
START_LIMIT_S = 30.0
STOP_LIMIT_S = 15.0
CONNECTIONS, STREAMS, OPEN_STREAMS = 32, 100, 200
WINDOWS, WINDOW_S, WARM_S = 4, 1.25, 0.4
BEGIN_LIMIT_S = 15.0  # for streams that are to be open at once: canned.SLOW ones last two minutes
STREAM_WARM_S = 1.5  # by then each of the streams has ended once, so that ends are in every window
STEPS, RIG_STEPS = 4, 7  # of progress: for each subject, and before them
UPSTREAM = ("-m", "loadtests.fake_upstream")


class Window(msgspec.Struct, frozen=True):
    """One stretch of load. `cpu_s` of whatever was watched, over `seconds`."""

    cpu_s: float
    seconds: float
    answers: int
    events: int
    failed: int

    @property
    def us_per_answer(self) -> float:
        """Infinite when nothing was answered."""
        return self.cpu_s / self.answers * 1e6 if self.answers else float("inf")

    @property
    def us_per_event(self) -> float:
        """Infinite when nothing was streamed."""
        return self.cpu_s / self.events * 1e6 if self.events else float("inf")


class Loads(msgspec.Struct, frozen=True):
    """The windows of each load that a server was put under. What it costs is that of the best."""

    small: list[Window]
    large: list[Window]
    streamed: list[Window]

    @property
    def us_per_request(self) -> float:
        """Of 0.7 KB."""
        return min(each.us_per_answer for each in self.small)

    @property
    def us_per_request_32k(self) -> float:
        """With a prompt of 32 KB."""
        return min(each.us_per_answer for each in self.large)

    @property
    def us_per_chunk(self) -> float:
        """A stream's part in head and end included."""
        return min(each.us_per_event for each in self.streamed)


class Figures(msgspec.Struct, frozen=True):
    """What one subject costs, in the units of the names."""

    name: str
    us_per_request: float
    us_per_request_32k: float
    us_per_chunk: float
    requests_per_s: float
    rss_idle_mb: float
    rss_streams_mb: float
    failed: int


class Rig(msgspec.Struct, frozen=True):
    """What the measuring itself costs, without a proxy in between. `sealing`: what TLS adds to the upstream's part."""

    upstream_us_per_request: float
    client_us_per_request: float
    requests_per_s: float
    sealing: Busy


class Subject(msgspec.Struct):
    """A server under test. Both processes of vramp count: the keeper, and the proxy below it."""

    process: subprocess.Popen[bytes]
    port: int
    admin_port: int = 0
    folder: str = ""

    def tree(self) -> list[psutil.Process]:
        """The process and all below it."""
        top = psutil.Process(self.process.pid)
        return [top, *top.children(recursive=True)]

    def rss_mb(self) -> float:
        """Resident memory of the tree."""
        return float(sum(each.memory_info().rss for each in self.tree()) / 1e6)


def cpu_s(processes: list[psutil.Process]) -> float:
    """User and system time of these processes, all threads. Ticks are 10 ms: a window needs many of them."""
    times = [each.cpu_times() for each in processes]
    return float(sum(each.user + each.system for each in times))


# -- starting and stopping


def cores() -> tuple[set[int], set[int]]:
    """The core of the subject and those of client and upstream; the same ones where there is only one."""
    allowed = sorted(os.sched_getaffinity(0))
    return {allowed[0]}, set(allowed[1:]) or {allowed[0]}


def everywhere() -> set[int]:
    """All the cores that there are for us."""
    return set(os.sched_getaffinity(0))


def spawn(argv: list[str], cwd: str, core: set[int], log: Path | None = None) -> subprocess.Popen[bytes]:
    """A server of ours, on its core. Its standard output is a pipe unless there is a log for it."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    with contextlib.ExitStack() as stack:
        out = stack.enter_context(log.open("wb")) if log else None
        process = subprocess.Popen(
            argv,
            cwd=cwd,
            env=env | {"PYTHONPATH": str(ROOT)},
            stdout=out or subprocess.PIPE,
            stderr=out,
            start_new_session=True,
        )
    os.sched_setaffinity(process.pid, core)
    return process


@contextlib.contextmanager
def stopping(process: subprocess.Popen[bytes]) -> Iterator[None]:
    """Stops it at the end, whatever happened."""
    try:
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOP_LIMIT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if process.stdout is not None:
            process.stdout.close()


@contextlib.contextmanager
def printing_its_port(argv: Sequence[str], core: set[int]) -> Iterator[Subject]:
    """A server that says where it listens."""
    process = spawn([sys.executable, *argv], str(ROOT), core)
    with stopping(process):
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line.strip().isdigit():
            raise SystemExit(f"bench: {' '.join(argv)} did not start")
        yield Subject(process, int(line))


def bench_config(upstream_port: int, scheme: str = "http") -> str:
    """configs/bench.toml, but for the upstream's address."""
    text = CONFIG.read_text(encoding="utf-8")
    base_url = tomllib.loads(text)["backends"][0]["base_url"]
    return text.replace(base_url, f"{scheme}://127.0.0.1:{upstream_port}/v1")


@contextlib.contextmanager
def over_tls(core: set[int]) -> Iterator[Subject]:
    """The fake upstream once more, with a certificate made here, which the servers started meanwhile trust."""
    with tempfile.TemporaryDirectory(prefix="vramp-bench-") as folder:
        cert, key = f"{folder}/cert.pem", f"{folder}/key.pem"
        command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-noenc"]
        command += ["-subj", "/CN=bench", "-addext", "subjectAltName=IP:127.0.0.1", "-out", cert, "-keyout", key]
        subprocess.run(command, check=True, capture_output=True)
        before = os.environ.get("SSL_CERT_FILE")
        os.environ["SSL_CERT_FILE"] = cert
        try:
            with printing_its_port([*UPSTREAM, cert, key], core) as upstream:
                yield upstream
        finally:
            del os.environ["SSL_CERT_FILE"]
            if before is not None:
                os.environ["SSL_CERT_FILE"] = before


@contextlib.contextmanager
def vramp(config_text: str, core: set[int], *options: str) -> Iterator[Subject]:
    """vramp with this configuration, but for its ports."""
    with tempfile.TemporaryDirectory(prefix="vramp-bench-") as folder:
        config, log = Path(folder, "bench.toml"), Path(folder, "log")
        config.write_text(config_text, encoding="utf-8")
        port, admin = free_port(), free_port()
        argv = [sys.executable, "-m", "proxy.cli", "serve", "--config", str(config), *options]
        argv += ["--listen", f"127.0.0.1:{port}", "--admin-listen", f"127.0.0.1:{admin}"]
        process = spawn(argv, folder, core, log)
        with stopping(process):
            wait_until_ready(process, port, log)
            yield Subject(process, port, admin, folder)


@contextlib.contextmanager
def nginx_before(upstream_port: int, core: set[int]) -> Iterator[Subject]:
    """nginx, as `loadtests.nginx` configures it."""
    with tempfile.TemporaryDirectory(prefix="vramp-bench-") as folder:
        port = free_port()
        process = spawn(nginx.command(folder, port, upstream_port), folder, core, Path(folder, "log"))
        with stopping(process):
            wait_until_ready(process, port, Path(folder, "log"))
            yield Subject(process, port)


def free_port() -> int:
    """A port that nobody has at this moment."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def wait_until_ready(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    """Return when /readyz says so; end the program with the server's last words if it never does."""
    deadline = time.monotonic() + START_LIMIT_S
    while process.poll() is None and time.monotonic() < deadline:
        with (
            contextlib.suppress(URLError, ConnectionError, TimeoutError),
            urlopen(f"http://127.0.0.1:{port}/readyz", timeout=1),
        ):
            return
        time.sleep(0.05)
    raise SystemExit(f"bench: {process.args!r} did not start:\n{log.read_text(errors='replace')[-2000:]}")


# -- measuring


async def window(load: client.Load, watched: list[psutil.Process], seconds: float = WINDOW_S) -> Window:
    """One window of a load that runs already."""
    count = load.count
    cpu, began = cpu_s(watched), time.perf_counter()
    answers, events, failed = count.answers, count.events, count.failed
    await asyncio.sleep(seconds)
    return Window(
        cpu_s=cpu_s(watched) - cpu,
        seconds=time.perf_counter() - began,
        answers=count.answers - answers,
        events=count.events - events,
        failed=count.failed - failed,
    )


async def windows(load: client.Load, watched: list[psutil.Process], warm_s: float) -> list[Window]:
    """Several windows of one load, after it has warmed up."""
    async with load:
        await asyncio.sleep(warm_s)
        return [await window(load, watched) for _ in range(WINDOWS)]


async def rss_with_streams(subject: Subject) -> float:
    """Resident megabytes while `OPEN_STREAMS` streams are open and have had their first event."""
    load = client.streams(subject.port, OPEN_STREAMS, canned.SLOW)
    async with load:
        until = time.monotonic() + BEGIN_LIMIT_S
        while load.count.started != OPEN_STREAMS:
            if time.monotonic() > until:
                raise SystemExit(f"bench: {load.count.started} of {OPEN_STREAMS} streams began in {BEGIN_LIMIT_S:g} s")
            await asyncio.sleep(0.02)
        return subject.rss_mb()


async def under_load(
    name: str, subject: Subject, step: Callable[[str], None], tls: ssl.SSLContext | None = None
) -> Loads:
    """What the process tree takes for requests, large ones, and streams, one load after the other."""
    watched, port = subject.tree(), subject.port
    step(f"{name}: requests")
    small = await windows(client.plain(port, CONNECTIONS, tls=tls), watched, WARM_S)
    step(f"{name}: 32 KB prompts")
    large = await windows(client.plain(port, CONNECTIONS, canned.LARGE_BYTES, tls), watched, WARM_S)
    step(f"{name}: {STREAMS} streams")
    return Loads(small, large, await windows(client.streams(port, STREAMS, canned.PACED, tls), watched, STREAM_WARM_S))


async def figures(name: str, subject: Subject, step: Callable[[str], None]) -> Figures:
    """Everything about one subject, in about twenty seconds."""
    async with client.plain(subject.port, 1):
        await asyncio.sleep(WARM_S)  # idle means: after the first requests, which load and cache
    idle_mb = subject.rss_mb()
    loads = await under_load(name, subject, step)
    step(f"{name}: {OPEN_STREAMS} open streams")
    streams_mb = await rss_with_streams(subject)
    return Figures(
        name=name,
        us_per_request=loads.us_per_request,
        us_per_request_32k=loads.us_per_request_32k,
        us_per_chunk=loads.us_per_chunk,
        requests_per_s=max(each.answers / each.seconds for each in loads.small),
        rss_idle_mb=idle_mb,
        rss_streams_mb=streams_mb,
        failed=sum(each.failed for each in (*loads.small, *loads.large, *loads.streamed)),
    )


async def rig(upstream: Subject, sealed: Subject, step: Callable[[str], None]) -> Rig:
    """The client on the bare upstream: how little of a core they need, and how much they could carry."""
    plain = await under_load("upstream alone", upstream, step)
    tls = await under_load("upstream alone, over TLS", sealed, step, ssl.create_default_context())
    step("client alone")  # one load cannot tell the two apart
    clients = await windows(client.plain(upstream.port, CONNECTIONS), [psutil.Process()], WARM_S)
    return Rig(
        upstream_us_per_request=plain.us_per_request,
        client_us_per_request=min(each.us_per_answer for each in clients),
        requests_per_s=max(each.answers / each.seconds for each in (*clients, *plain.small)),
        sealing=Busy(
            answer=beyond(tls.us_per_request, plain.us_per_request),
            large_answer=beyond(tls.us_per_request_32k, plain.us_per_request_32k),
            event=beyond(tls.us_per_chunk, plain.us_per_chunk),
        ),
    )


def beyond(tls_us: float, plain_us: float) -> float:
    """What TLS adds, to be spent on nothing: not less than nothing, by noise, and not for ever."""
    if not math.isfinite(tls_us - plain_us):
        raise SystemExit("bench: the upstream alone answered nothing in time; is the machine busy with something else?")
    return max(0.0, tls_us - plain_us)


def measure(step: Callable[[str], None]) -> tuple[Rig, list[Figures]]:
    """The whole run."""
    theirs, ours = cores()
    os.sched_setaffinity(0, ours)
    with printing_its_port(UPSTREAM, ours) as upstream, over_tls(ours) as sealed:
        alone = uvloop.run(rig(upstream, sealed, step))
        busy = ["--busy", *(f"{us:.1f}" for us in msgspec.structs.astuple(alone.sealing))]
        found = []
        with printing_its_port([*UPSTREAM, *busy], ours) as slower:
            for name, peer in peers(upstream.port, sealed.port, slower.port, theirs):
                with peer as subject:
                    found.append(uvloop.run(figures(name, subject, step)))
    return alone, found


def peers(
    upstream_port: int, tls_port: int, slower_port: int, core: set[int]
) -> list[tuple[str, contextlib.AbstractContextManager[Subject]]]:
    """Everybody who is measured, by name; vramp comes last."""
    url, config = f"http://127.0.0.1:{upstream_port}", bench_config(upstream_port)
    ordinary = config.replace("[server]", "[server]\nfast_lane = false", 1)
    found: list[tuple[str, contextlib.AbstractContextManager[Subject]]] = []
    if nginx.program() is not None:
        found.append(("nginx", nginx_before(upstream_port, core)))
    found.append(("plain aiohttp relay", printing_its_port(["-m", "loadtests.plain_relay", url], core)))
    found.append(("vramp, ordinary lane", vramp(ordinary, core)))
    found.append(("vramp, HTTPS upstream", vramp(bench_config(tls_port, "https"), core)))
    found.append(("vramp, HTTP upstream as slow", vramp(bench_config(slower_port), core)))
    found.append(("vramp", vramp(config, core)))
    return found


# -- telling

COLUMNS: tuple[tuple[str, str, str], ...] = (
    ("us_per_request", "CPU µs / request", ".0f"),
    ("us_per_request_32k", "same, 32 KB prompt", ".0f"),
    ("us_per_chunk", "CPU µs / chunk", ".1f"),
    ("requests_per_s", "requests/s, one core", ",.0f"),
    ("rss_idle_mb", "RSS idle MB", ".1f"),
    ("rss_streams_mb", f"RSS {OPEN_STREAMS} streams MB", ".1f"),
    ("failed", "failed", "d"),
)


def table(found: list[Figures]) -> list[str]:
    """Markdown: a row for each subject, and one for how the last compares with each of the others."""
    rows = [["", *(title for _, title, _ in COLUMNS)], ["---", *("--:" for _ in COLUMNS)]]
    rows += [[each.name, *(format(getattr(each, field), form) for field, _, form in COLUMNS)] for each in found]
    last = found[-1]
    rows += [[f"{last.name} / {other.name}", *ratios(last, other)] for other in found[:-1]]
    return [f"| {' | '.join(row)} |" for row in rows]


def ratios(ours: Figures, theirs: Figures) -> list[str]:
    """Of each column; empty where theirs is nothing."""
    return [
        f"{getattr(ours, field) / getattr(theirs, field):.2f} x" if getattr(theirs, field) else ""
        for field, _, _ in COLUMNS
    ]


def report(alone: Rig, found: list[Figures]) -> str:
    """What is printed at the end."""
    sealing = alone.sealing
    return "\n".join(
        [
            "",
            f"Python {platform.python_version()}, {platform.machine()}, {os.cpu_count()} cores, backend {BACKEND}",
            "",
            *table(found),
            "",
            f"Beside it, in no figure above: client {alone.client_us_per_request:.0f} µs and upstream "
            f"{alone.upstream_us_per_request:.0f} µs a request; without a proxy they do {alone.requests_per_s:,.0f}/s.",
            f"TLS takes the upstream {sealing.answer:.0f} µs more an answer ({sealing.large_answer:.0f} to a prompt of "
            f"32 KB) and {sealing.event:.0f} an event; the HTTP one that is as slow spends as much on nothing.",
            "",
            "Another bench: an OpenAI-compatible upstream on 127.0.0.1:9000 (its key does not matter), then",
            "  .venv/bin/python -m proxy.cli serve --config configs/bench.toml",
            f"serves http://127.0.0.1:9100{canned.PATH} with the key {canned.KEY}, in the foreground, without",
            "forking away. That process becomes the keeper and has the proxy as its child: count both.",
        ]
    )


@contextlib.contextmanager
def progress() -> Iterator[Callable[[str], None]]:
    """A bar at a terminal, a line for each step elsewhere; on stderr, so that the table can be piped."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda what: print(f"bench: {what}", file=sys.stderr, flush=True)
        return
    with Progress(console=console, transient=True) as bar:
        line = bar.add_task("bench", total=RIG_STEPS + (5 + (nginx.program() is not None)) * STEPS)
        began = False

        def step(what: str) -> None:
            nonlocal began
            bar.update(line, description=what, advance=1 if began else 0)
            began = True

        yield step


@contextlib.contextmanager
def machine_alone(path: str) -> Iterator[None]:
    """Holds an exclusive lock, so that measurements on one machine wait for each other."""
    with open(path, "w", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"bench: another measurement holds {path}, waiting", file=sys.stderr, flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def main() -> None:
    """Measure, print, and write the figures down if asked."""
    parser = argparse.ArgumentParser(description="CPU per request and per chunk: vramp beside its peers.")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    asked = parser.parse_args()
    with machine_alone(os.environ.get("BENCH_LOCK", "/tmp/cpu.lock")), progress() as step:
        alone, found = measure(step)
    print(report(alone, found))
    if asked.json is not None:
        about = {"python": platform.python_version(), "cores": os.cpu_count(), "backend": BACKEND}
        figures_found = [msgspec.to_builtins(each) for each in found]
        data = {"when": time.strftime("%Y-%m-%d %H:%M"), **about, "rig": msgspec.to_builtins(alone)}
        asked.json.write_text(json.dumps(data | {"results": figures_found}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
