"""Secrets: where they may come from, what is said when they do not, and that they never leave by accident."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path

import msgspec
import orjson
import pytest

from proxy.config import (
    BackendConfig,
    Config,
    ConfigError,
    KeyLimitsConfig,
    LimitsConfig,
    Secret,
    ServerConfig,
)
from proxy.config_secrets import secrets_of


def config(*api_keys: str, backend_key: str | None = None) -> Config:
    backend = BackendConfig(name="r", kind="openai", base_url="https://h/v1", api_key=backend_key)
    return Config(server=ServerConfig(api_keys=api_keys), backends=(backend,))


def private(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o600)
    return path


def problems_of(config: Config, base_dir: Path) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        secrets_of(config, base_dir, "x.toml")
    return caught.value.problems


def test_a_key_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("VRAMP_TEST_KEY", " sk-1\n")
    (key,) = secrets_of(config("env:VRAMP_TEST_KEY"), tmp_path).api_keys
    assert (key.name, key.secret.reveal(), key.secret.source) == ("VRAMP_TEST_KEY", "sk-1", "env:VRAMP_TEST_KEY")


def test_a_file_holds_several_keys_names_and_comments(tmp_path: Path) -> None:
    private(tmp_path / "keys.txt", "# the team\nsk-1 alice\n\n  sk-2\nsk-3  bob and carol\n")
    resolved = secrets_of(config("file:keys.txt"), tmp_path)
    assert [(key.name, key.secret.reveal()) for key in resolved.api_keys] == [
        ("alice", "sk-1"),
        ("keys.txt:4", "sk-2"),
        ("bob and carol", "sk-3"),
    ]
    assert resolved.warnings == ()


def test_a_mark_that_an_editor_puts_in_front_is_no_part_of_a_key(tmp_path: Path) -> None:
    private(tmp_path / "keys.txt", "\ufeffsk-1\n")
    assert secrets_of(config("file:keys.txt"), tmp_path).api_keys[0].secret.reveal() == "sk-1"


def test_a_file_in_the_home_of_nobody_cannot_be_read(tmp_path: Path) -> None:
    assert problems_of(config("file:~no-such-user/keys"), tmp_path) == [
        f"x.toml: server.api_keys[0] is file:~no-such-user/keys, and {tmp_path}/~no-such-user/keys cannot be read "
        "(No such file or directory); create it, or name another"
    ]


def test_a_backend_has_one_key(tmp_path: Path) -> None:
    private(tmp_path / "key", "sk-up\n")
    assert secrets_of(config(backend_key="file:key"), tmp_path).backend_keys["r"].reveal() == "sk-up"
    private(tmp_path / "key", "sk-up\nsk-other\n")
    assert problems_of(config(backend_key="file:key"), tmp_path) == [
        "x.toml: backends[r].api_key is file:key, which has 2 keys; keep one line in it"
    ]


def test_a_literal_is_taken_with_a_warning(tmp_path: Path) -> None:
    resolved = secrets_of(config("literal:sk-bench"), tmp_path, "x.toml")
    assert resolved.api_keys[0].secret.reveal() == "sk-bench"
    assert resolved.warnings == (
        'x.toml: server.api_keys[0] is written into the file; use "env:NAME", "file:PATH", '
        'or "literal:..." for a key that is no secret',
    )


def test_a_file_that_everyone_can_read_is_warned_about(tmp_path: Path) -> None:
    file = private(tmp_path / "keys.txt", "sk-1\n")
    file.chmod(0o644)
    assert secrets_of(config("file:keys.txt"), tmp_path, "x.toml").warnings == (
        f"x.toml: server.api_keys[0]: everyone on this machine can read {file}; chmod 600 {file}",
    )


def test_every_secret_that_cannot_be_had_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("VRAMP_NO_KEY", raising=False)
    monkeypatch.setenv("VRAMP_EMPTY_KEY", "")
    private(tmp_path / "empty", "# nothing\n")
    private(tmp_path / "binary", "").write_bytes(b"\xff\xfe")
    keys = ("env:VRAMP_NO_KEY", "env:VRAMP_EMPTY_KEY", "file:missing", "file:empty", "file:binary")
    at = "x.toml: server.api_keys"
    assert problems_of(config(*keys), tmp_path) == [
        f"{at}[0] is env:VRAMP_NO_KEY, and the environment variable VRAMP_NO_KEY is not set; set it, or name another",
        f"{at}[1] is env:VRAMP_EMPTY_KEY, and the environment variable VRAMP_EMPTY_KEY is empty; "
        "set it, or name another",
        f"{at}[2] is file:missing, and {tmp_path}/missing cannot be read (No such file or directory); "
        "create it, or name another",
        f"{at}[3] is file:empty, and {tmp_path}/empty has no key in it; write one on a line of its own",
        f"{at}[4] is file:binary, and {tmp_path}/binary cannot be read (not UTF-8 text); create it, or name another",
    ]


@pytest.mark.parametrize("key", ["sk-\u00fc", "sk-\x00", "sk\t1"])
def test_a_key_that_no_header_can_carry_is_refused(key: str, tmp_path: Path) -> None:
    assert problems_of(config(f"literal:{key}"), tmp_path) == [
        "x.toml: server.api_keys[0] (literal) has characters that no header can carry; use printable ASCII"
    ]


def test_limits_are_of_keys_that_there_are(tmp_path: Path) -> None:
    private(tmp_path / "keys", "sk-1 alice\nsk-2 bob\n")
    limits = LimitsConfig(keys={"alcie": KeyLimitsConfig(concurrency=1), "bob": KeyLimitsConfig(concurrency=1)})
    limited = msgspec.structs.replace(config("file:keys"), limits=limits)
    assert problems_of(limited, tmp_path) == [
        "x.toml: limits.keys.alcie is no key of server.api_keys; did you mean alice?"
    ]


def test_a_secret_cannot_be_shown() -> None:
    secret = Secret("sk-hidden", "env:KEY")
    assert "sk-hidden" not in f"{secret} {secret!r} {[secret]}"


@pytest.mark.parametrize("encode", [pickle.dumps, copy.deepcopy, msgspec.json.encode, orjson.dumps, json.dumps, vars])
def test_a_secret_cannot_be_written_out(encode: object) -> None:
    with pytest.raises(TypeError):
        encode(Secret("sk-hidden", "env:KEY"))  # type: ignore[operator]


def test_resolved_secrets_cannot_be_written_out_either(tmp_path: Path) -> None:
    resolved = secrets_of(config("literal:sk-hidden"), tmp_path)
    assert "sk-hidden" not in repr(resolved)
    with pytest.raises(TypeError):
        msgspec.json.encode(resolved)
