"""`vramp status`, `models`, `load` and `unload`: ask a running server, draw what it says.

Exit codes: 0 done, 1 refused or failed, 3 nothing listens there.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext, suppress
from functools import wraps
from pathlib import Path
from typing import Final, ParamSpec, TypeVar

import click

from proxy.admin_client import AdminClient, AdminError, Status, Step, operator_key
from proxy.config import ConfigError
from proxy.config_load import load
from proxy.config_shape import parse_listen

P = ParamSpec("P")
R = TypeVar("R")
WATCH_S: Final = 1.0


def _failing_plainly(command: Callable[P, R]) -> Callable[P, R]:
    """An AdminError becomes its line on stderr and its exit code."""

    @wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return command(*args, **kwargs)
        except AdminError as error:
            click.echo(f"{click.style('error', 'red')}: {error}", err=True)
            sys.exit(error.exit_code)

    return run


@_failing_plainly
def connect(admin: str | None, config: str | None) -> AdminClient:
    """A client for the address named, else for the configuration's `admin_listen`, else for the default one."""
    return AdminClient(admin or _configured(config), operator_key())


@_failing_plainly
def show_status(client: AdminClient, as_json: bool) -> None:
    """Prints the status once."""
    if as_json:
        click.echo(client.get("status"))
        return
    status = client.status()
    from proxy.cli_views import console, status_view  # noqa: PLC0415 - rich takes longer than all the rest

    console().print(status_view(status))


def watch_status(client: AdminClient, pause: Callable[[float], None] = time.sleep) -> None:
    """Redraws the status each second until Ctrl-C. Goes on while the server is away: that is when one watches.

    Where nothing can be redrawn (a pipe, a file, TERM=dumb) one follows the other.
    """
    from rich.live import Live  # noqa: PLC0415 - as above

    from proxy.cli_views import console, message_view, status_view  # noqa: PLC0415 - as above

    out = console()
    redraws = out.is_terminal and not out.is_dumb_terminal
    with (
        suppress(KeyboardInterrupt),
        Live(console=out, screen=True, auto_refresh=False) if redraws else nullcontext() as live,
    ):
        while True:
            state = _status_or_reason(client)
            view = message_view(state) if isinstance(state, str) else status_view(state)
            if live is None:
                out.print(view)
            else:
                live.update(view, refresh=True)
            pause(WATCH_S)


@_failing_plainly
def show_models(client: AdminClient, as_json: bool) -> None:
    """Prints the models' profiles."""
    answer = client.get("models")
    if as_json:
        click.echo(answer)
        return
    from proxy.cli_views import console, models_view, profiles  # noqa: PLC0415 - as above

    out = console()
    out.print(models_view(profiles(answer), out.width))


@_failing_plainly
def change(client: AdminClient, model: str, action: str) -> None:
    """Loads or unloads a model: a bar at a terminal, a line for each change elsewhere."""
    steps = client.change(model, action)
    if at_terminal():
        _bar(model, steps)
    else:
        _lines(model, steps)


def at_terminal() -> bool:
    """Whether somebody watches: a bar in a log file would be thousands of lines."""
    return sys.stdout.isatty()


def _bar(model: str, steps: Iterable[Step]) -> None:
    from proxy.cli_views import progress_bar  # noqa: PLC0415 - as above

    with progress_bar() as bar:
        task = bar.add_task(model, total=1.0, note="")
        for step in steps:
            bar.update(task, completed=1.0 if step.done else step.progress, note=step.note or step.state)


def _lines(model: str, steps: Iterable[Step]) -> None:
    shown = ""
    for step in steps:
        line = f"{model}: {step.state}" + (f", {step.note}" if step.note else "")
        if line != shown:
            click.echo(line)
        shown = line


def _status_or_reason(client: AdminClient) -> Status | str:
    try:
        return client.status()
    except AdminError as error:
        return str(error)


def _configured(config: str | None) -> str:
    if config is None:
        return "127.0.0.1:8081"
    try:
        host, port = parse_listen(load(Path(config)).server.admin_listen)
    except ConfigError as error:
        raise AdminError(str(error)) from None
    # the address to listen on may stand for all of them, which is none to connect to
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 - read, not bound
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
