"""Secrets: named in the configuration, read from environment or files, never written into it or out of it."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import msgspec

from proxy.config import Config, ConfigError, Secret
from proxy.config_shape import REMEDY, at_home, inside, nearest


class NamedKey(msgspec.Struct, frozen=True):
    """A key that a caller may show, and what to call its holder in logs and metrics."""

    name: str
    secret: Secret


class ResolvedSecrets(msgspec.Struct, frozen=True):
    """Every secret of a configuration, read. `backend_keys` by the backend's name; `warnings` are lines for people."""

    api_keys: tuple[NamedKey, ...] = ()
    admin_keys: tuple[NamedKey, ...] = ()
    backend_keys: dict[str, Secret] = {}
    warnings: tuple[str, ...] = ()


def fits_header(key: str) -> bool:
    """Whether a key can travel in an HTTP header: printable ASCII."""
    return key.isascii() and key.isprintable()


def secrets_of(config: Config, base_dir: Path, source: str = "config") -> ResolvedSecrets:
    """Reads every secret that `config` names; relative paths start at `base_dir`, `source` opens the messages.

    Raises ConfigError with a line for each secret that cannot be had. Reads files: not for the path of a request.
    """
    reader = _Reader(base_dir, source)
    resolved = ResolvedSecrets(
        api_keys=tuple(reader.keys("server.api_keys", config.server.api_keys)),
        admin_keys=tuple(reader.keys("server.admin_keys", config.server.admin_keys)),
        backend_keys=dict(reader.backend_keys(config)),
    )
    reader.check_limits(config, {key.name for key in resolved.api_keys})
    if reader.problems:
        raise ConfigError(reader.problems)
    return msgspec.structs.replace(resolved, warnings=tuple(reader.warnings))


def files_of(config: Config, base_dir: Path) -> list[Path]:
    """The files that `secrets_of` reads."""
    backends = [backend.api_key for backend in config.backends if backend.api_key is not None]
    texts = [*config.server.api_keys, *config.server.admin_keys, *backends]
    return [_path(base_dir, rest) for how, _, rest in (text.partition(":") for text in texts) if how == "file"]


class _Reader:
    """Reads secrets one by one and notes what is wrong, so that all of it is reported together."""

    def __init__(self, base_dir: Path, source: str) -> None:
        self.base_dir = base_dir
        self.source = source
        self.problems: list[str] = []
        self.warnings: list[str] = []

    def keys(self, path: str, texts: tuple[str, ...]) -> Iterator[NamedKey]:
        for index, text in enumerate(texts):
            yield from self._sound(f"{path}[{index}]", text)

    def backend_keys(self, config: Config) -> Iterator[tuple[str, Secret]]:
        for backend in config.backends:
            if backend.api_key is None:
                continue
            path = f"backends[{backend.name}].api_key"
            found = self._sound(path, backend.api_key)
            if len(found) > 1:
                self._problem(path, f"is {backend.api_key}, which has {len(found)} keys; keep one line in it")
            elif found:
                yield backend.name, found[0].secret

    def check_limits(self, config: Config, names: set[str]) -> None:
        """Limits are of keys by name, and only what was read tells the names."""
        if self.problems:
            return  # a key that could not be read has no name yet
        for name in config.limits.keys:
            if name not in names:
                self._problem(inside("limits.keys", name), f"is no key of server.api_keys; {nearest(name, names)}")

    def _sound(self, path: str, text: str) -> list[NamedKey]:
        found = self._read(path, text)
        for key in found:
            if not fits_header(key.secret.reveal()):
                self._problem(
                    path, f"({key.secret.source}) has characters that no header can carry; use printable ASCII"
                )
        return found

    def _read(self, path: str, text: str) -> list[NamedKey]:
        how, _, rest = text.partition(":")
        if how == "env":
            return self._env(path, rest)
        if how == "file":
            return self._file(path, rest)
        self.warnings.append(f"{self.source}: {path} is written into the file; {REMEDY}")
        return [NamedKey(path.rpartition(".")[2], Secret(rest, "literal"))]

    def _env(self, path: str, name: str) -> list[NamedKey]:
        value = os.environ.get(name, "").strip()
        if value:
            return [NamedKey(name, Secret(value, f"env:{name}"))]
        state = "is empty" if name in os.environ else "is not set"
        self._problem(path, f"is env:{name}, and the environment variable {name} {state}; set it, or name another")
        return []

    def _file(self, path: str, name: str) -> list[NamedKey]:
        file = _path(self.base_dir, name)
        try:
            mode = file.stat().st_mode
            lines = file.read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            why = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
            self._problem(path, f"is file:{name}, and {file} cannot be read ({why}); create it, or name another")
            return []
        if mode & stat.S_IROTH:
            self.warnings.append(f"{self.source}: {path}: everyone on this machine can read {file}; chmod 600 {file}")
        found = list(_lines(file, lines))
        if not found:
            self._problem(path, f"is file:{name}, and {file} has no key in it; write one on a line of its own")
        return found

    def _problem(self, path: str, says: str) -> None:
        self.problems.append(f"{self.source}: {path} {says}")


def _path(base_dir: Path, name: str) -> Path:
    return base_dir / at_home(name)


def _lines(file: Path, lines: list[str]) -> Iterator[NamedKey]:
    for number, line in enumerate(lines, start=1):
        key, _, name = line.strip().partition(" ")
        if key and not key.startswith("#"):
            yield NamedKey(name.strip() or f"{file.name}:{number}", Secret(key, f"file:{file}"))
