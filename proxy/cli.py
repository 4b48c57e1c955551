"""The `vramp` command: options and help texts. What a command does stands in `proxy.cli_serve`, `proxy.cli_admin` and
`proxy.cli_simulate`.

Only click is imported before a command runs, so that `--help` and shell completion answer at once.
"""

# ruff: noqa: PLC0415 - imports inside the commands, see above

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import click

from proxy import __version__

EXAMPLES = """\b
Try it:
  vramp serve                          the demo, on http://127.0.0.1:8080
  vramp serve --model ~/models/qwen3   your own model
  vramp status --watch                 what runs where, and why
"""


# what writing to a device that takes no more raises; a reader that has gone is EPIPE, which click ends quietly
UNWRITABLE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


class _Command(click.Command):
    """Knows which option was meant by a file or an address that came without one."""

    allow_extra_args = True  # taken here, to be refused in better words

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        extra = super().parse_args(ctx, args)
        if extra and not ctx.resilient_parsing:
            meant = self._meant(extra[0], ctx) if len(extra) == 1 else None
            hint = f": did you mean {meant} {extra[0]}?" if meant else f"{'s' if extra[1:] else ''}: {' '.join(extra)}"
            ctx.fail(f"unexpected argument{hint}")
        return extra

    def _meant(self, said: str, ctx: click.Context) -> str | None:
        address = ":" in said
        kinds = {
            "--trace": said.endswith(".csv"),
            "--model": os.path.isdir(said),
            "--listen": address,
            "--admin": address,
            "--config": not ctx.params.get("config"),
        }
        known = {name for param in self.params for name in param.opts}
        return next((option for option, likely in kinds.items() if likely and option in known), None)


class _Commands(click.Group):
    """An output that takes no more is one line and exit 1, in every command."""

    command_class = _Command

    def main(self, *args: Any, **options: Any) -> Any:
        try:
            return super().main(*args, **options)
        except OSError as error:
            if error.errno not in UNWRITABLE or error.filename is not None:
                raise
            with suppress(OSError):
                click.echo(f"{click.style('error', 'red')}: the output cannot be written: {error.strerror}", err=True)
            # what is left in the buffer would fail once more when Python ends
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            sys.exit(1)


def _version(ctx: click.Context, _param: click.Parameter, wanted: bool) -> None:
    if not wanted or ctx.resilient_parsing:
        return
    from ext.backend import BACKEND

    click.echo(f"vramp {__version__} ({BACKEND})")
    ctx.exit()


@click.group(
    cls=_Commands, epilog=EXAMPLES, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}
)
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=_version,
    help="Show the version, and whether the native code is in use.",
)  # fmt: skip
def main() -> None:
    """One URL for many models: more local ones than fit into memory at once, and remote ones."""


@contextmanager
def _stopping_at_once() -> Iterator[None]:
    """A stop (SIGTERM, Ctrl-C) is exit 0: nothing has begun that would have to end first."""
    before = {number: signal.signal(number, lambda *_: sys.exit(0)) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _admin_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Options of the commands that talk to a running server."""
    config = click.option("--config", metavar="FILE", help="Configuration whose admin_listen to use.")
    admin = click.option(
        "--admin", metavar="ADDRESS", envvar="VRAMP_ADMIN", show_envvar=True,
        help="HOST:PORT or URL of the server's admin_listen. Default: as in --config, else 127.0.0.1:8081. "
        "An operator's key is read from the environment variable VRAMP_ADMIN_KEY.",
    )  # fmt: skip
    return admin(config(command))


@main.command(
    epilog="""\b
Examples:
  vramp serve
  vramp serve --config vramp.toml
  vramp serve --model ~/models/qwen3 --model ~/models/bge-small --listen 127.0.0.1:9000
"""
)
@click.option("--config", metavar="FILE", help="Configuration, see configs/vramp.example.toml.")
@click.option("--model", "models", metavar="PATH", multiple=True, help="Folder of a model to serve; may be repeated.")
@click.option("--listen", metavar="HOST:PORT", help="Where clients connect.  [default: 127.0.0.1:8080]")
@click.option("--admin-listen", metavar="HOST:PORT", help="Where operators connect.  [default: 127.0.0.1:8081]")
@click.option("--record", metavar="FILE", help="Record decisions, up to 1 GiB, for `vramp simulate --replay FILE`.")
@click.option("--workers", metavar="N|auto", help="Processes that serve, see [server] workers.  [default: 1]")
@click.option(
    "--engine", type=click.Choice(["auto", "simulated"]), default="auto", show_default=True,
    help="simulated: run every local model on a simulated engine, which needs no vLLM and answers with simulated text.",
)  # fmt: skip
def serve(
    config: str | None,
    models: tuple[str, ...],
    listen: str | None,
    admin_listen: str | None,
    record: str | None,
    workers: str | None,
    engine: str,
) -> None:
    """Serve models until Ctrl-C.

    Without --config it serves the models that --model names; without either, the demo. It first checks what would
    fail later: ports, memory, disk, compiler, model folders. SIGHUP or a changed file reads the configuration again,
    SIGUSR2 starts a new version beside the old one, SIGTERM lets requests in flight finish.
    """
    with _stopping_at_once():
        from proxy.cli_serve import serve
        from proxy.config_load import Start

        start = Start(
            config=config,
            models=models,
            engine=engine,
            listen=listen,
            admin_listen=admin_listen,
            record=record,
            workers=workers,
        )
        serve(start)


@main.command(
    epilog="""\b
Example:
  vramp check /etc/vramp/vramp.toml && systemctl reload vramp
"""
)
@click.argument("config", required=False)
@click.option("--config", "named", metavar="FILE", help="The same as CONFIG, as `vramp serve` has it.")
def check(config: str | None, named: str | None) -> None:
    """Check the configuration file CONFIG without starting anything.

    Prints every problem, a line each with file, key, value and remedy, and exits with 1 if there is one. What
    depends on this machine (memory, compiler, model folders) is a warning here, and fails only `vramp serve`.
    """
    from proxy.cli_serve import check

    file = config or named
    if file is None or (config and named):
        raise click.UsageError("name one configuration file: vramp check FILE")
    check(file)


@main.command(
    epilog="""\b
Examples:
  vramp status
  vramp status --watch
  vramp status --json | jq '.models[] | select(.state == "ready") | .id'
"""
)
@click.option("--watch", is_flag=True, help="Redraw every second until Ctrl-C.")
@click.option("--json", "as_json", is_flag=True, help="Print what the server answers, for programs.")
@_admin_options
def status(watch: bool, as_json: bool, admin: str | None, config: str | None) -> None:
    """Show devices, models, queues, and the last decisions with their reasons."""
    if watch and as_json:
        raise click.UsageError("--watch draws tables and --json prints for programs; use one of them.")
    from proxy.cli_admin import connect, show_status, watch_status

    client = connect(admin, config)
    if watch:
        watch_status(client)
    else:
        show_status(client, as_json)


@main.command(
    epilog="""\b
Examples:
  vramp models
  vramp models --json
"""
)
@click.option("--json", "as_json", is_flag=True, help="Print what the server answers, for programs.")
@_admin_options
def models(as_json: bool, admin: str | None, config: str | None) -> None:
    """List the models with their profiles."""
    from proxy.cli_admin import connect, show_models

    show_models(connect(admin, config), as_json)


@main.command(
    epilog="""\b
Example:
  vramp load demo-chat
"""
)
@click.argument("model")
@_admin_options
def load(model: str, admin: str | None, config: str | None) -> None:
    """Load MODEL now and show how far it is. Idle models are evicted if it needs their memory."""
    from proxy.cli_admin import change, connect

    change(connect(admin, config), model, "load")


@main.command(
    epilog="""\b
Example:
  vramp unload demo-chat
"""
)
@click.argument("model")
@_admin_options
def unload(model: str, admin: str | None, config: str | None) -> None:
    """Unload MODEL once its requests have ended. The next request for it loads it again."""
    from proxy.cli_admin import change, connect

    change(connect(admin, config), model, "unload")


@main.command(
    epilog="""\b
Examples:
  vramp simulate --trace arrivals.csv --memory 72GiB
  vramp simulate --trace arrivals.csv --memory 144GiB --policy vramp --deadline 30 --json
  vramp simulate --replay decisions.log
"""
)
@click.option(
    "--trace",
    "traces",
    metavar="FILE",
    multiple=True,
    help="CSV of arrivals: t_s, model, output_tokens, ...; may be repeated.",
)
@click.option("--memory", metavar="SIZE", default="72GiB", show_default=True, help="Memory that the models share.")
@click.option("--policy", metavar="NAME", default="all", show_default=True, help="One policy, or all.")
@click.option(
    "--deadline", "deadline_s", metavar="SECONDS", type=click.FloatRange(0, min_open=True), default=10.0,
    show_default=True, help="A wait up to this is on time.",
)  # fmt: skip
@click.option(
    "--engine", metavar="reference|FILE", default="reference", show_default=True,
    help="Sizes, load and answer times: the published reference, or a TOML file.",
)  # fmt: skip
@click.option(
    "--until", "until_s", metavar="SECONDS", type=click.FloatRange(0, min_open=True), default=float("inf"),
    help="Cut the trace here.",
)  # fmt: skip
@click.option(
    "--bounds/--no-bounds",
    default=None,
    help="Compare with the optimum (not for engines that sleep).  [default: where scipy is installed]",
)
@click.option("--anticipate", is_flag=True, help="Load early and hold swaps back, as a server does.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object a policy.")
@click.option("--replay", metavar="LOG", help="Run a server's log again and compare every decision.")
def simulate(
    traces: tuple[str, ...],
    memory: str,
    policy: str,
    deadline_s: float,
    engine: str,
    until_s: float,
    bounds: bool | None,
    anticipate: bool,
    as_json: bool,
    replay: str | None,
) -> None:
    """Run the scheduler on recorded arrivals in virtual time and compare its policies.

    Prints, for each policy: the share of requests on time, what that is of the best that any scheduler could reach
    (B2), its load cost over the least possible in arrival order (B1), loads, waits, the largest service gap between
    tenants, and how long it took.
    """
    from proxy.cli_simulate import Contest, names, replay_log, simulate

    if replay is not None:
        if traces:
            raise click.UsageError("--replay runs a log, --trace runs a trace; use one of them.")
        replay_log(replay)
        return
    if not traces:
        raise click.UsageError("nothing to run: name a trace with --trace FILE or a log with --replay LOG.")
    if policy not in (*names(), "all"):
        raise click.BadParameter(f"{policy!r} is none of {', '.join(names())}, all", param_hint="--policy")
    simulate(Contest(traces, memory, policy, deadline_s, engine, until_s, bounds, anticipate, as_json))


@main.command(
    epilog="""\b
Example:
  vramp plan --config vramp.toml --trace yesterday.csv
"""
)
@click.option("--config", metavar="FILE", required=True, help="The configuration whose models and machine to use.")
@click.option("--trace", metavar="FILE", required=True, help="CSV of arrivals for these models.")
@click.option(
    "--until", "until_s", metavar="SECONDS", type=click.FloatRange(0, min_open=True), default=float("inf"),
    help="Cut the trace here.",
)  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object a machine.")
def plan(config: str, trace: str, until_s: float, as_json: bool) -> None:
    """Would one more GPU, or 32 GB more RAM, help?

    Runs the arrivals through the scheduler on this machine as it is and as it could be, with the models, limits and
    profiles of the configuration. RAM is tried for engines on the CPU, and for engines to sleep in.
    """
    from proxy.cli_simulate import plan

    plan(config, trace, until_s, as_json)


if __name__ == "__main__":
    main(prog_name="vramp")
