"""From a file, or from nothing, to a `Config`: read, check the shape, resolve paths, check the meaning.

All problems of one stage are reported together, each as a line with file, key, value and remedy.
"""

from __future__ import annotations

import json
import os
import re
import sys
import tomllib
from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, Final

import msgspec

from proxy.config import LOCAL_KINDS, Config, ConfigError
from proxy.config_check import meaning_problems
from proxy.config_shape import Problem, at_home, shape_problems

DEMO: Final = "configs/demo.toml"
NO_DEMO: Final = "that was the demo; `make models` makes what it needs, --model PATH or --config FILE serve your own"
SIMULATED_DEVICE: Final = {"name": "sim0", "memory": "8GiB"}
SIMULATED_MODEL_MEMORY: Final = "1GiB"
_AT: Final = re.compile(r"(?P<what>.*) \(at (?:line (?P<line>\d+), column (?P<column>\d+)|end of document)\)")


class Start(msgspec.Struct, frozen=True):
    """What the command line says of the configuration: the same for `vramp serve`, the proxy and every reload."""

    config: str | None = None
    models: tuple[str, ...] = ()
    engine: str = "auto"
    listen: str | None = None
    admin_listen: str | None = None
    record: str | None = None
    workers: str | None = None


class Loaded(msgspec.Struct, frozen=True):
    """A configuration, what to call where it came from, the folder at which its relative paths start, and its file
    (None: it came from the command line)."""

    config: Config
    source: str
    base_dir: Path
    file: Path | None = None


def load(path: Path, overrides: Mapping[str, object] | None = None, *, engine: str = "auto") -> Config:
    """The configuration in `path`. `overrides` maps dotted keys ("server.listen") to values that win over the file's.

    Raises ConfigError with every problem of the file.
    """
    return load_text(_read(path), str(path), overrides, base_dir=path.resolve().parent, engine=engine)


def load_text(
    text: str,
    name: str,
    overrides: Mapping[str, object] | None = None,
    *,
    base_dir: Path | None = None,
    engine: str = "auto",
) -> Config:
    """As `load`, of text: `name` opens the messages, relative paths start at `base_dir` (the current folder)."""
    return _build(_parse(text, name), name, overrides or {}, base_dir or Path.cwd(), engine)


def load_start(start: Start) -> Loaded:
    """The configuration that a command line asks for: a file, or folders, or the demo."""
    overrides = {
        f"server.{name}": value
        for name, value in (
            ("listen", start.listen),
            ("admin_listen", start.admin_listen),
            ("workers", _number_or_word(start.workers)),
        )
        if value is not None
    }
    if start.models and start.config is not None:
        raise ConfigError([f"--model: {start.config} says what is served; add the model there as a [[models]] entry"])
    if start.models:
        data = _serving(start.models)
        return Loaded(_build(data, "--model", overrides, Path.cwd(), start.engine), "--model", Path.cwd())
    path = Path(start.config) if start.config is not None else demo_path()
    try:
        config = load(path, overrides, engine=start.engine)
    except ConfigError as error:
        raise ConfigError([*error.problems, *([] if start.config is not None else [NO_DEMO])]) from None
    return Loaded(config, str(path), path.resolve().parent, path)


def _number_or_word(text: str | None) -> int | str | None:
    """An option's value as the file would have it."""
    return int(text) if text is not None and text.isascii() and text.isdigit() else text


def demo_path() -> Path:
    """The demo's file: of the checkout, else of the installation. Raises ConfigError where there is none."""
    for root in (Path(__file__).parent.parent, Path(sys.prefix) / "share" / "vramp"):
        if (root / DEMO).is_file():
            return root / DEMO
    raise ConfigError(["nothing to serve: name a model's folder with --model PATH, or a file with --config FILE"])


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")  # some editors put a mark in front
    except UnicodeDecodeError as error:
        raise ConfigError([f"{path}: byte {error.start} is not UTF-8; save the file as UTF-8"]) from None
    except OSError as error:
        raise ConfigError([f"{path}: cannot be read ({error.strerror}); name a file that exists"]) from None


def _parse(text: str, name: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise ConfigError([f"{name}: is nested too deeply; no key takes lists in lists"]) from None
    except tomllib.TOMLDecodeError as error:
        found = _AT.fullmatch(str(error))
        if found is None:
            raise ConfigError([f"{name}: {error}"]) from None
        last = len(text.splitlines())
        where = f"line {found['line']}, column {found['column']}" if found["line"] else f"line {last}, at the end"
        what = found["what"][0].lower() + found["what"][1:]
        raise ConfigError([f"{name}: {where}: {what}; see toml.io for how TOML is written"]) from None


def _build(data: dict[str, Any], name: str, overrides: Mapping[str, object], base_dir: Path, engine: str) -> Config:
    data = _overridden(data, overrides)
    if engine == "simulated":
        data = _simulated(data)
    _refuse(shape_problems(data), name, overrides)
    config = _resolved(msgspec.convert(data, Config), data, base_dir)
    _refuse(meaning_problems(config), name, overrides)
    return config


def _refuse(problems: list[Problem], name: str, overrides: Mapping[str, object]) -> None:
    if problems:
        # a value that the command line gave is not in the file; do not send the reader there
        lines = [f"{'command line' if p.path in overrides else name}: {p.path} {p.says}" for p in problems]
        raise ConfigError(lines)


def _overridden(data: Mapping[str, Any], overrides: Mapping[str, object]) -> dict[str, Any]:
    result = deepcopy(dict(data))
    for path, value in overrides.items():
        *sections, key = path.split(".")
        table = result
        for section in sections:
            table = table.setdefault(section, {})
            if not isinstance(table, dict):
                break  # the shape check says what is wrong with that section
        else:
            table[key] = value
    return result


def _simulated(data: dict[str, Any]) -> dict[str, Any]:
    """The same file on simulated engines: each local backend becomes one, and what it lacks for that is added.

    Works on the parsed file, before any check: the point is to run where models and engines are missing.
    """
    local = []  # not a set: before the checks a name may be anything
    for backend in _entries(data, "backends"):
        if backend.get("kind") in LOCAL_KINDS:
            local.append(backend.get("name"))
            backend["kind"] = "simulated"
            backend.pop("device", None)
    for model in _entries(data, "models"):
        if model.get("backend") in local:
            model.pop("command", None)
            model.setdefault("memory_bytes", SIMULATED_MODEL_MEMORY)
    devices = data.setdefault("devices", {})
    if local and isinstance(devices, dict) and not devices.get("simulated"):
        memory = devices.get("host_memory", SIMULATED_DEVICE["memory"])
        devices["simulated"] = [SIMULATED_DEVICE | {"memory": memory}]
    return data


def _entries(data: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    entries = data.get(name)
    return [entry for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []


def _resolved(config: Config, data: Mapping[str, Any], base_dir: Path) -> Config:
    """Relative paths made absolute, so that nobody after this needs to know where the file is."""
    models = tuple(
        model if model.path is None else msgspec.structs.replace(model, path=_absolute(model.path, base_dir))
        for model in config.models
    )
    backends = tuple(
        # a bare "python3" is looked up in PATH, as a shell would
        msgspec.structs.replace(backend, python=_absolute(backend.python, base_dir))
        if backend.python is not None and "/" in backend.python
        else backend
        for backend in config.backends
    )
    stated = "dir" in data.get("store", {})
    server = msgspec.structs.replace(
        config.server,
        tls_cert=None if config.server.tls_cert is None else _absolute(config.server.tls_cert, base_dir),
        tls_key=None if config.server.tls_key is None else _absolute(config.server.tls_key, base_dir),
    )
    store = msgspec.structs.replace(config.store, dir=_absolute(config.store.dir, base_dir if stated else Path.cwd()))
    observe = config.observe
    if observe.access_log not in ("stdout", "off"):
        observe = msgspec.structs.replace(observe, access_log=_absolute(observe.access_log, base_dir))
    return msgspec.structs.replace(
        config, server=server, models=models, backends=backends, store=store, observe=observe
    )


def _absolute(path: str, base_dir: Path) -> str:
    # normpath and not resolve(): a virtual environment's python is a link that must stay one
    return os.path.normpath(base_dir / at_home(path))


def _serving(model_paths: Sequence[str]) -> dict[str, Any]:
    """The file that somebody who only names folders would have written."""
    models = [
        {"id": Path(path).resolve().name, "backend": "local", "path": str(Path(path).resolve()), "task": _task(path)}
        for path in model_paths
    ]
    return {"backends": [{"name": "local", "kind": "vllm"}], "models": models}


def _task(path: str) -> str:
    """Whether the folder holds a model that generates: its architecture's name says, as vLLM itself reads it."""
    if (Path(path) / "modules.json").is_file():
        return "embed"  # sentence-transformers' own mark
    try:
        architectures = json.loads((Path(path) / "config.json").read_bytes()).get("architectures") or [""]
    except (OSError, ValueError, AttributeError):
        return "generate"  # the folder check names what is wrong
    generates = ("ForCausalLM", "ForConditionalGeneration", "LMHeadModel")
    return "generate" if any(str(name).endswith(generates) for name in architectures) else "embed"
