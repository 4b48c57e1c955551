"""`vramp simulate` and `vramp plan`: the scheduler's core in virtual time. Neither needs an engine or a server."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, NoReturn

import click
import msgspec

from proxy.assembly import devices_of, locals_of, settings_of
from proxy.catalog.catalog import Catalog
from proxy.cli_simulate_views import contest_view, plan_view, progress
from proxy.cli_views import console
from proxy.config import Config, ConfigError
from proxy.config_load import load
from proxy.sizes import byte_size
from scheduler.learned import Learned
from scheduler.model import ModelSpec
from scheduler.record import LogError, replay
from scheduler.simulate.bounds import NoSolver
from scheduler.simulate.contest import NAMES, POLICIES, Bounds, Trial, bounds_of, measure
from scheduler.simulate.engine import EngineFileError, read_engine
from scheduler.simulate.traces import Request, TraceError, read_trace
from scheduler.simulate.whatif import Forecast, Machine, more_ram, variants, what_if

MORE_RAM_BYTES: Final = 32 * 10**9
FIRST_TOKEN_MS: Final = 300.0  # of a model whose profile says nothing
TOKENS_PER_S: Final = 60.0
HELPS: Final = 0.005  # of the requests: less than that is noise


class Contest(msgspec.Struct, frozen=True):
    """What the command line asked for."""

    traces: tuple[str, ...]
    memory: str
    policy: str
    deadline_s: float
    engine: str
    until_s: float
    bounds: bool | None  # None: where there is a solver
    anticipate: bool
    as_json: bool


def names() -> tuple[str, ...]:
    """The policies that can be asked for."""
    return NAMES


def simulate(contest: Contest) -> None:
    """Runs every policy on every trace and prints a table a trace, or one JSON object a policy."""
    trials = _trials(contest)
    entrants = [policy for policy in POLICIES if contest.policy in ("all", policy.name)]
    bounds = [None] * len(trials) if contest.bounds is False else _bounds(trials, demanded=bool(contest.bounds))
    with progress(len(entrants) * sum(len(trial.requests) for trial in trials)) as advance:
        results = [
            [measure(trial, policy, bound, advance) for policy in entrants]
            for trial, bound in zip(trials, bounds, strict=True)
        ]
    for trial, found in zip(trials, results, strict=True):
        if not contest.as_json:
            console().print(contest_view(trial, found))
            continue
        for result in found:
            click.echo(msgspec.json.encode(result.row))


def replay_log(path: str) -> None:
    """Runs a recorded log again; exits with 1 where it goes another way."""
    try:
        result = replay(path)
    except OSError as error:
        _fail(f"{path}: {error.strerror}")
    except LogError as error:
        _fail(str(error))
    if result.difference is None:
        click.echo(f"{path}: {result.events} events, {result.commands} commands: the same, decision for decision")
        return
    entry = result.difference.entry
    click.echo(f"{path}: entry {result.difference.number}, at {entry.now:.3f} s, {entry.event!r}", err=True)
    click.echo(f"  then: {', '.join(map(repr, entry.commands)) or 'nothing'}", err=True)
    click.echo(f"  now:  {', '.join(map(repr, result.difference.replayed)) or 'nothing'}", err=True)
    sys.exit(1)


def plan(config_path: str, trace: str, until_s: float, as_json: bool) -> None:
    """Runs the configuration's models on its machine and on larger ones, and says what helps."""
    try:
        config = load(Path(config_path))
        catalog = Catalog(config)
        devices = devices_of(config)
        found = locals_of(_with_sleep(config), catalog, devices)
        requests = read_trace(trace, until_s)
    except ConfigError as error:
        _fail(str(error))
    except TraceError as error:
        _fail(str(error))
    learned = Learned(Path(config.store.dir))
    models = [learned.expect(each.spec) for each in found]
    _all_known(trace, requests, models)
    service_s = _service_times(catalog)
    settings = settings_of(config)
    now = Machine("as it is", tuple(device.spec for device in devices), settings.sleep_memory_bytes)
    machines = variants(now, models, MORE_RAM_BYTES)
    forecasts = [what_if(machine, models, settings, requests, service_s) for machine in machines]
    if as_json:
        for forecast in forecasts:
            click.echo(msgspec.json.encode(forecast))
        return
    console().print(plan_view(Path(trace).name, forecasts))
    for forecast in forecasts[1:]:
        click.echo(_verdict(forecasts[0], forecast))
    if not any(machine.name.startswith(more_ram(MORE_RAM_BYTES)) for machine in machines):
        click.echo(f"{more_ram(MORE_RAM_BYTES)}: no use, no engine here computes on the CPU or can sleep")


def _with_sleep(config: Config) -> Config:
    """The same, with every engine that can sleep told so: how much memory there is for it is a machine's to say."""
    devices = msgspec.structs.replace(config.devices, sleep_memory=f"{MORE_RAM_BYTES}B")
    return msgspec.structs.replace(config, devices=devices)


def _verdict(now: Forecast, then: Forecast) -> str:
    gained = then.on_time_share - now.on_time_share
    p99 = f"p99 wait {now.wait_p99_s:.1f} to {then.wait_p99_s:.1f} s"
    if gained < HELPS:
        return f"{then.machine}: would not help ({gained:+.1%} on time, {p99})"
    return f"{then.machine}: {gained:+.1%} of the requests on time, {p99}"


def _service_times(catalog: Catalog) -> Callable[[Request], float]:
    """How long an answer takes, by the models' profiles."""
    pace = {
        each.name: (each.model.avg_ttft_ms or FIRST_TOKEN_MS, each.model.avg_tokens_per_sec or TOKENS_PER_S)
        for each in catalog
    }

    def service_s(request: Request) -> float:
        if request.duration_s is not None:
            return request.duration_s
        first_ms, per_s = pace[request.model]
        return first_ms / 1e3 + request.output_tokens / per_s

    return service_s


def _all_known(trace: str, requests: Sequence[Request], models: Sequence[ModelSpec]) -> None:
    missing = sorted({request.model for request in requests} - {model.name for model in models})
    if missing:
        has = ", ".join(sorted(model.name for model in models)) or "none"
        _fail(f"{trace}: the configuration has no local model {missing[0]!r} (it has {has})")


def _trials(contest: Contest) -> list[Trial]:
    try:
        memory = byte_size(contest.memory)
        engine = read_engine(contest.engine)
        trials = [
            Trial(path, read_trace(path, contest.until_s), engine, memory, contest.deadline_s, contest.anticipate)
            for path in contest.traces
        ]
    except (EngineFileError, TraceError) as error:
        _fail(str(error))
    except ValueError as error:
        _fail(f"--memory: {error}")
    for trial in trials:
        for spec in trial.specs():
            if spec.memory_bytes > memory:
                needs, has = spec.memory_bytes / 2**30, memory / 2**30
                _fail(f"{trial.trace}: {spec.name} needs {needs:.1f} GiB and --memory is {has:.1f} GiB")
    return trials


def _bounds(trials: Sequence[Trial], *, demanded: bool) -> Sequence[Bounds | None]:
    try:
        return [bounds_of(trial) for trial in trials]
    except NoSolver as error:
        if demanded:
            _fail(str(error))
        click.echo(f"{click.style('warning', 'yellow')}: without a comparison with the optimum: {error}", err=True)
        return [None] * len(trials)


def _fail(reason: str) -> NoReturn:
    click.echo(f"{click.style('error', 'red')}: {reason}", err=True)
    sys.exit(1)
