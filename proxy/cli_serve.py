"""`vramp serve` and `vramp check`: everything that can be said before the first process starts."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shlex
import shutil
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final, NoReturn

import click

from proxy.config import Config, ConfigError, ModelConfig
from proxy.config_load import Loaded, Start, load_start
from proxy.config_secrets import secrets_of
from proxy.preflight import check_record, preflight
from scheduler.engines.keeper_systemd import passed_names
from scheduler.engines.reaper import reap

# more than any of our limits lets us open; above it, programs that close every possible descriptor get slow
DESCRIPTORS: Final = 65_536
DEFAULT_ADMIN: Final = "127.0.0.1:8081"
# the proxy ends its requests by itself after drain_s; the keeper steps in only when it does not
DRAIN_GRACE_S: Final = 10.0
STOPS: Final = (signal.SIGTERM, signal.SIGINT)


def serve(start: Start) -> NoReturn:
    """Checks everything, then becomes the keeper. Exits with 1 and a line for each reason if it must not start."""
    open_standard_streams()
    loaded = _load(start)
    raise_descriptor_limit()
    # what a killed keeper left would hold the port and the memory that preflight looks for
    left = reap(loaded.config.store.dir)
    if left:
        named = ", ".join(f"{process.pid} ({process.command[:60]})" for process in left)
        _say(f"ended what an earlier vramp left when it was killed: {named}", fatal=False)
    findings = [*check_record(start.record), *preflight(loaded.config, passed=passed_names())]
    for finding in findings:
        _say(finding.says, fatal=finding.fatal)
    if any(finding.fatal for finding in findings):
        sys.exit(1)
    _tell(f"vramp: serving {loaded.source}, {_counted(loaded.config)}")
    _become(keeper_argv(start, loaded.config))


def _become(argv: list[str]) -> NoReturn:
    """The keeper takes this process's place, and so its pid and its signals: a stop waits until it can hear it."""
    signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
    try:
        os.execv(argv[0], argv)  # noqa: S606
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)


def check(path: str) -> None:
    """Prints what is wrong with a configuration file; exits with 1 if it cannot be used."""
    loaded = _load(Start(config=path))
    for finding in preflight(loaded.config, ports=False):
        _say(finding.says, fatal=False)
    click.echo(f"{path}: good, {_counted(loaded.config)}")


def keeper_argv(start: Start, config: Config) -> list[str]:
    """The keeper's command line; after "--" the proxy's, which reads the same configuration again."""
    keeper = [sys.executable, "-m", "scheduler.engines.keeper"]
    keeper += ["--listen", config.server.listen, "--admin-listen", config.server.admin_listen]
    keeper += ["--state-dir", config.store.dir, "--drain-limit", str(config.server.drain_s + DRAIN_GRACE_S)]
    keeper += ["--hang-limit", str(config.server.hang_limit_s)]
    proxy = [sys.executable, "-m", "proxy.app", "--engine", start.engine]
    options = {
        "config": start.config,
        "listen": start.listen,
        "admin-listen": start.admin_listen,
        "record": start.record,
        "workers": start.workers,
    }
    for option, value in options.items():
        proxy += [f"--{option}", value] if value is not None else []
    for model in start.models:
        proxy += ["--model", model]
    return [*keeper, "--", *proxy]


def banner(config: Config, urls: Sequence[str]) -> str:
    """What a server that is ready says: `urls` are the clients' and the operators', in this order."""
    url, admin_url = urls
    tries = [_curl(config, url, model) for model in _samples(config.models)]
    lines = [f"vramp is ready: {url}/v1", "", *([] if not tries else ["Try it:", *tries, ""])]
    lines += [f"Status: {_status(admin_url)}    Metrics: {admin_url}/metrics", "Stop:   Ctrl-C"]
    return "\n".join(lines)


def _status(admin_url: str) -> str:
    """The command that shows this server, as it can be typed: `vramp` is in no PATH after `make run`."""
    beside = Path(sys.executable).with_name("vramp")
    found = shutil.which("vramp") is not None or not beside.exists()
    address = admin_url.partition("//")[2]
    option = "" if address == DEFAULT_ADMIN else f" --admin {shlex.quote(address)}"
    return f"{'vramp' if found else shlex.quote(_short(beside))} status --watch{option}"


def _short(path: Path) -> str:
    """The path from here, where that is shorter."""
    return min(str(path), os.path.relpath(path), key=len)


def announce(text: str) -> None:
    """Say it on stdout, if anybody can be told: a full disk or a reader that has gone is no reason not to serve."""
    with contextlib.suppress(OSError):
        print(text, flush=True)


def open_standard_streams() -> None:
    """Have descriptors 0 to 2 be something: where a caller closed them, a listening socket would become stdout."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # it gets the lowest number that is free


def raise_descriptor_limit() -> None:
    """As many open files as this user may have; every connection takes one, and the default is often 1024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, DESCRIPTORS)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _load(start: Start) -> Loaded:
    try:
        loaded = load_start(start)
        secrets = secrets_of(loaded.config, loaded.base_dir, loaded.source)
    except ConfigError as error:
        for problem in error.problems:
            _say(problem, fatal=True)
        sys.exit(1)
    for warning in secrets.warnings:
        _say(warning, fatal=False)
    return loaded


def _say(line: str, *, fatal: bool) -> None:
    _tell(f"{click.style('error', 'red') if fatal else click.style('warning', 'yellow')}: {line}")


def _tell(line: str) -> None:
    with contextlib.suppress(OSError):  # as `announce`
        click.echo(line, err=True)


def _counted(config: Config) -> str:
    names = list(dict.fromkeys(model.id for model in config.models))
    return f"{len(names)} model{'' if len(names) == 1 else 's'}" + (f": {', '.join(names)}" if names else "")


def _samples(models: Sequence[ModelConfig]) -> list[ModelConfig]:
    """Two models to try: two that chat, which shows a swap, else one of each task."""
    chats = [model for model in models if model.task == "generate"]
    embeds = [model for model in models if model.task == "embed"]
    return (chats[:2] + embeds)[:2]


def _curl(config: Config, url: str, model: ModelConfig) -> str:
    prompt = model.sample_prompt or "Hello!"
    body: dict[str, object]
    if model.task == "embed":
        path, body = "embeddings", {"model": model.id, "input": prompt}
    else:
        path, body = "chat/completions", {"model": model.id, "messages": [{"role": "user", "content": prompt}]}
    key = ' -H "Authorization: Bearer $VRAMP_KEY"' if config.server.api_keys else ""
    data = shlex.quote(json.dumps(body, ensure_ascii=False))
    at = shlex.quote(f"{url}/v1/{path}")  # an IPv6 address has brackets, which mean files to some shells
    return f"  curl {at}{key} -H 'Content-Type: application/json' -d {data}"
