"""Writes the reference pages from the code: configs/vramp.example.toml, docs/config.md, docs/cli.md, docs/metrics.md.

    python -m proxy.reference

Tests compare the files with what this module would write, so that no key, option or metric goes undocumented.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, get_origin

import click
import msgspec

from proxy.cli import main as command_line
from proxy.config import Config, Key
from proxy.config_diff import KEEPERS, RESTART
from proxy.config_shape import range_words, section_of, unit_of, unwrap
from proxy.reference_metrics import metrics_page

ROOT: Final = Path(__file__).parent.parent
WIDTH: Final = 110
# stated in the example though it could be left out: without it the example would not load
STATED: Final = frozenset({"models.memory_bytes"})
# what [section.NAME] is called in the example; commented out where that is a name of yours, which must exist
NAMED: Final = {
    "classes": "[classes.instant]",
    "limits.keys": "#[limits.keys.NAME]",
    "limits.models": "[limits.models.example-small]",
}
PLAIN: Final = ("text", "true or false", "a path", "a list of text", "a table of text", "a URL")

EXAMPLE_HEAD: Final = """\
# vramp's configuration: every key with its meaning, what it takes, and its default.
# A line like "#key = value" is a key that may be left out; where there is a default, it is the value shown.
# Sizes are bytes or "512MiB", "4GiB". Relative paths start at this file's folder.
# `vramp check FILE` says what is wrong with a file; SIGHUP makes a running vramp read it again.
"""

CONFIG_HEAD: Final = """\
# Configuration

TOML, as in [`configs/vramp.example.toml`](../configs/vramp.example.toml), which has every key of this page. Without a
file, `vramp serve` serves what `--model PATH` names, or the demo.

- **Sizes** are a number of bytes or text like `"512MiB"`, `"4GiB"`, `"24GB"`. **Relative paths** start at the folder of
  the file.
- **Secrets** are named, not written: `"env:NAME"` or `"file:PATH"`. A file of `api_keys` or `admin_keys` has a key a
  line, a name for its holder after a space if you like, and comments after `#`. `"literal:..."` is accepted, with a
  warning.
- **Errors** are reported all together, a line each with file, key, value and remedy; unknown keys are errors.
  `vramp check FILE` shows them without starting anything.
- **Reload**: SIGHUP reads the file again, and so does a change of it or of a file that it names for secrets, a second
  or two later (`reload_on_change`). A file with an error changes nothing.
  {restart} need a restart;
  SIGUSR2 ([lifecycle.md](lifecycle.md)) is enough for all of these but {keepers}.

Written from the code by `python -m proxy.reference`.
"""

CLI_HEAD: Final = """\
# Command line

Exit codes: 0 done, 1 refused or failed (the reason is on stderr), 2 wrong usage, 3 no server at the address.

Written from the code by `python -m proxy.reference`.
"""


def pages() -> dict[str, str]:
    """Every page by its path in the repository."""
    return {
        "configs/vramp.example.toml": "\n".join([EXAMPLE_HEAD, *_example(Config, "", "")]).rstrip() + "\n",
        "docs/config.md": _config_page(),
        "docs/cli.md": _cli_page(),
        "docs/metrics.md": metrics_page(),
    }


def _example(kind: type[msgspec.Struct], path: str, header: str) -> Iterator[str]:
    """A section of the example file, then the sections inside it."""
    if header:
        yield from _comment(_doc(kind))
        yield header
    fields = msgspec.structs.fields(kind)
    for field in fields:
        bare, key = unwrap(field.type)
        if section_of(bare) is None:
            yield from _example_key(field, key, path)
    if header:
        yield ""
    for field in fields:
        bare, _ = unwrap(field.type)
        section = section_of(bare)
        if section is not None:
            inner = f"{path}.{field.name}" if path else field.name
            yield from _example(section, inner, NAMED.get(inner) or _header(bare, inner))


def _example_key(field: msgspec.structs.FieldInfo, key: Key, path: str) -> Iterator[str]:
    bare, _ = unwrap(field.type)
    takes = _takes(bare, key, field.name)
    # the value shown tells a text from a list or a path; only what it cannot tell is said
    limits = "" if takes in PLAIN else f" Range: {takes}."
    absent = f" Left out: {key.absent}." if key.absent else ""
    yield from _comment(f"{key.meaning}{limits}{absent}")
    value = _default(field)
    if value in (None, (), {}):
        value = key.example
    mark = "" if field.required or f"{path}.{field.name}" in STATED else "#"
    yield f"{mark}{field.name} = {_toml(value)}"


def _header(bare: Any, path: str) -> str:
    if get_origin(bare) is tuple:
        return f"[[{path}]]"
    return f"[{path}.NAME]" if get_origin(bare) is dict else f"[{path}]"


def _config_page() -> str:
    restart = ", ".join(f"`{key}`" for key in RESTART)
    keepers = ", ".join(f"`{key}`" for key in KEEPERS)
    lines = [CONFIG_HEAD.format(restart=restart, keepers=keepers)]
    lines += _config_sections(Config, "")
    return "\n".join(lines).rstrip() + "\n"


def _config_sections(kind: type[msgspec.Struct], path: str) -> Iterator[str]:
    for field in msgspec.structs.fields(kind):
        bare, _ = unwrap(field.type)
        section = section_of(bare)
        if section is None:
            continue
        inner = f"{path}.{field.name}" if path else field.name
        yield f"## `{_header(bare, inner)}`\n"
        yield _doc(section) + "\n"
        yield "| key | takes | default | meaning |\n| --- | --- | --- | --- |"
        yield from _config_rows(section)
        yield ""
        yield from _config_sections(section, inner)


def _config_rows(kind: type[msgspec.Struct]) -> Iterator[str]:
    for field in msgspec.structs.fields(kind):
        bare, key = unwrap(field.type)
        if section_of(bare) is not None:
            continue
        default = "required" if field.required else f"`{_toml(_default(field))}`"
        if not field.required and _default(field) is None:
            default = f"none: {key.absent}" if key.absent else "none"
        cells = (f"`{field.name}`", _takes(bare, key, field.name), default, key.meaning)
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _takes(bare: Any, key: Key, name: str) -> str:
    """What a key takes, in words."""
    if key.choices:
        return ", ".join(key.choices[:-1]) + " or " + key.choices[-1]
    words = {
        "listen": "HOST:PORT",
        "secret": "env:NAME or file:PATH",
        "url": "a URL",
        "path": "a path",
        "device": "a kind or name of a device",
        "size": f"a size of {range_words(key)}",
        "workers": f'{range_words(key)}, or "auto"',
    }.get(key.form or "", "")
    if get_origin(bare) is tuple:
        return f"a list of {words or 'text'}"
    if get_origin(bare) is dict:
        return "a table of text"
    if words:
        return words
    if bare is bool:
        return "true or false"
    return (range_words(key) or "text") + unit_of(name)


def _default(field: msgspec.structs.FieldInfo) -> Any:
    """The default as the code has it; None where the key is required."""
    if field.required:
        return None
    return field.default_factory() if field.default is msgspec.NODEFAULT else field.default


def _toml(value: Any) -> str:
    """One value in TOML; JSON writes text, numbers, booleans and lists of text the same way."""
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{name} = {_toml(item)}" for name, item in value.items()) + " }" if value else "{}"
    return json.dumps(value, ensure_ascii=False)


def _doc(kind: type[msgspec.Struct]) -> str:
    return " ".join((kind.__doc__ or "").split())


def _comment(text: str) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent="# ", subsequent_indent="# ")


def _cli_page() -> str:
    root = click.Context(command_line, info_name="vramp", terminal_width=100, **command_line.context_settings)
    parts = [CLI_HEAD, _help(root)]
    for name, command in command_line.commands.items():
        context = click.Context(command, info_name=name, parent=root, terminal_width=100)
        parts += [f"## vramp {name}\n", _help(context)]
    return "\n".join(parts).rstrip() + "\n"


def _help(context: click.Context) -> str:
    return f"```text\n{context.command.get_help(context)}\n```\n"


def write() -> None:
    """Writes the pages into the repository."""
    for path, text in pages().items():
        (ROOT / path).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    write()
