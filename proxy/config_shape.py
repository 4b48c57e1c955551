"""Does the file have the shape of the structs? Every unknown key, wrong type and value out of range, found in one pass.

msgspec's own conversion stops at the first error and cannot tell the remedy, so this walk looks at each key by itself
and msgspec converts only what has passed.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Final, NamedTuple, get_args, get_origin
from urllib.parse import urlsplit

import msgspec

from proxy.config import Config, Key
from proxy.sizes import byte_size, format_size

REMEDY: Final = 'use "env:NAME", "file:PATH", or "literal:..." for a key that is no secret'
TYPE_WORDS: Final = {str: "text in quotes", int: "a whole number", float: "a number", bool: "true or false"}


class Problem(NamedTuple):
    """What is wrong with one key: `path` is dotted ("models[demo-chat].ttl_s"), `says` goes on from there."""

    path: str
    says: str


def shape_problems(data: Mapping[str, Any]) -> list[Problem]:
    """Everything about the parsed file that the structs and their keys do not allow."""
    return list(_table(Config, data, ""))


def nearest(word: str, known: Iterable[str]) -> str:
    """The remedy for a name that does not exist: the name that was probably meant, or those there are."""
    names = sorted(known)
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.7)
    if close:
        return f"did you mean {close[0]}?"
    return f"use one of {', '.join(names)}" if names else "there is none yet"


def show(value: object) -> str:
    """A value as the file has it, on one line, cut where it gets long."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    if not text.isprintable():
        text = json.dumps(value, default=str)
    return text if len(text) <= 80 else text[:77] + "..."


def at_home(path: str) -> Path:
    """A path with its `~` or `~NAME` written out. A name that no user has stays, and no such file will be found."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def parse_listen(address: str) -> tuple[str, int]:
    """Host and port of "127.0.0.1:8080" or "[::1]:8080". Raises ValueError with the remedy."""
    host, colon, port = address.rpartition(":")
    if not colon or not port.isascii() or not port.isdigit() or int(port) > 65_535:
        raise ValueError("use HOST:PORT, e.g. 127.0.0.1:8080, with a port of 0 to 65535")
    bracketed = host.startswith("[") and host.endswith("]")
    if ":" in host and not bracketed:
        raise ValueError(f"write an IPv6 address in brackets, [{host}]:{port}")
    host = host[1:-1] if bracketed else host
    if not host:
        raise ValueError(f"name the address, e.g. 127.0.0.1:{port}, or 0.0.0.0:{port} for all of this machine's")
    return host, int(port)


def bad_secret(text: str) -> str | None:
    """What is wrong with how a secret is written; never quotes it, for it may be the secret itself."""
    how, colon, rest = text.partition(":")
    if not colon or how not in ("env", "file", "literal"):
        return f"is a bare string; {REMEDY}"
    return None if rest.strip() else f'is "{how}:" with nothing after it; {REMEDY}'


def unwrap(annotation: Any) -> tuple[Any, Key]:
    """The bare type of a field and its `Key`; sections and lists of sections have an empty one."""
    if get_origin(annotation) is Annotated:
        bare, key = get_args(annotation)
        return bare, key
    return annotation, Key("")


def section_of(bare: Any) -> type[msgspec.Struct] | None:
    """The struct behind a section, `[[section]]` or `[section.*]`; None for a plain value."""
    inner = [arg for arg in (bare, *get_args(bare)) if isinstance(arg, type) and issubclass(arg, msgspec.Struct)]
    return inner[0] if inner else None


def _table(kind: type[msgspec.Struct], data: object, path: str) -> Iterator[Problem]:
    if not isinstance(data, Mapping):
        yield Problem(path, f"is {show(data)}; write it as a section, [{path}]")
        return
    fields = {field.name: field for field in msgspec.structs.fields(kind)}
    for name in (name for name in data if name not in fields):
        yield Problem(inside(path, name), f"is not a key; {nearest(name, fields)}")
    for name, field in fields.items():
        here = inside(path, name)
        if name in data:
            yield from _field(field.type, data[name], here)
        elif field.required:
            yield Problem(here, f"is missing; {_meaning(field.type)}")


def _field(annotation: Any, value: object, path: str) -> Iterator[Problem]:
    bare, key = unwrap(annotation)
    section = section_of(bare)
    if section is None:
        says = _value(bare, key, value, unit_of(path))
        if says:
            yield Problem(path, says)
    elif get_origin(bare) is tuple:
        yield from _tables(section, value, path)
    elif get_origin(bare) is dict:
        yield from _named_tables(section, value, path)
    else:
        yield from _table(section, value, path)


def _tables(section: type[msgspec.Struct], value: object, path: str) -> Iterator[Problem]:
    if not isinstance(value, list):
        yield Problem(path, f"is one section; write it with double brackets, [[{path}]]")
        return
    for index, item in enumerate(value):
        here = f"{path}[{label(item, index)}]"
        if isinstance(item, Mapping):
            yield from _table(section, item, here)
        else:
            yield Problem(here, f"is {show(item)}; write it as a section, [[{path}]]")


def _named_tables(section: type[msgspec.Struct], value: object, path: str) -> Iterator[Problem]:
    if not isinstance(value, Mapping):
        yield Problem(path, f"is {show(value)}; write sections, [{path}.NAME]")
        return
    for name, item in value.items():
        yield from _table(section, item, inside(path, name))


def label(item: object, index: int) -> str:
    """What people call one entry of a list of sections: its id or name, else its number from 0."""
    named = (item.get("id") or item.get("name")) if isinstance(item, Mapping) else None
    return _plain(named) if isinstance(named, str) else str(index)


def inside(path: str, name: str) -> str:
    """The dotted path of one key or section in another."""
    return f"{path}.{_plain(name)}" if path else _plain(name)


def unit_of(path: str) -> str:
    """The unit that a key's name ends in, as a word with a space before it; empty where it has none."""
    if path.endswith("_ms"):
        return " milliseconds"
    return " seconds" if path.endswith("_s") and not path.endswith("_per_s") else ""


def _value(bare: Any, key: Key, value: object, unit: str) -> str | None:
    try:
        msgspec.convert(value, bare)
    except msgspec.ValidationError:
        # a secret written where it does not belong is still a secret
        shown = "of the wrong type" if key.form == "secret" else show(value)
        return f"is {shown}; use {_type_words(bare, key)}{_absent(key)}"
    # the parts as the file has them: converted, -5 would be shown as -5.0
    for part in value if isinstance(value, list) else (value,):
        says = _part(key, part, unit)
        if says:
            return says
    return None


def _part(key: Key, part: Any, unit: str) -> str | None:
    """What is wrong with one text or number: a value, or an item of a list."""
    if key.choices and part not in key.choices:
        return f"is {show(part)}; {nearest(part, key.choices)}"
    form = FORMS.get(key.form or "")
    if form is not None:
        return form(key, part)
    if isinstance(part, int | float) and not isinstance(part, bool):
        return _number(key, part, unit)
    if isinstance(part, str) and "\0" in part:
        return "has a NUL character; remove it"
    return None


def _number(key: Key, number: float, unit: str) -> str | None:
    if _in_range(key, number):
        return None
    return f"is {number}; use {range_words(key)}{unit}{_absent(key)}"


def _in_range(key: Key, number: float) -> bool:
    # every number has a bound above (a test asks for it), which inf exceeds and nan never meets
    return (
        (key.low is None or number >= key.low)
        and (key.above is None or number > key.above)
        and (key.high is None or number <= key.high)
    )


def _size(key: Key, size: int | str) -> str | None:
    try:
        number = byte_size(size)
    except ValueError:
        return f"is {show(size)}; use {_type_words(str, key)}{_absent(key)}"
    return None if _in_range(key, number) else f"is {show(size)}; use {range_words(key)}{_absent(key)}"


def _listen(_key: Key, address: str) -> str | None:
    try:
        parse_listen(address)
    except ValueError as error:
        return f"is {show(address)}; {error}"
    return None


def _workers(key: Key, workers: int | str) -> str | None:
    if workers == "auto" or (isinstance(workers, int) and _in_range(key, workers)):
        return None
    return f'is {show(workers)}; use {range_words(key)}, or "auto"'


def _name(_key: Key, name: str) -> str | None:
    if name and name.isprintable() and name == name.strip() and len(name) <= 200:
        return None
    return f"is {show(name)}; use 1 to 200 printable characters without a space at either end"


def _path(_key: Key, path: str) -> str | None:
    return None if path and "\0" not in path else f"is {show(path)}; name a path"


def _url(_key: Key, url: str) -> str | None:
    try:
        parts = urlsplit(url)
        port_ok = parts.port is None or parts.port > 0
    except ValueError:
        return f"is {show(url)}; use http://HOST:PORT/v1 or https://HOST/v1"
    if parts.username is not None or parts.password is not None:
        return (
            f'has a user or password in it (host {parts.hostname}); put the key into api_key, e.g. "env:PROVIDER_KEY"'
        )
    if parts.scheme not in ("http", "https") or not parts.hostname or not port_ok:
        return f"is {show(url)}; use http://HOST:PORT/v1 or https://HOST/v1"
    if parts.query or parts.fragment:
        return f"is {show(url)}; leave out everything from the ? or # on"
    return None


FORMS: Final[dict[str, Callable[[Key, Any], str | None]]] = {
    "size": _size,
    "listen": _listen,
    "name": _name,
    "workers": _workers,
    "path": _path,
    "url": _url,
    "secret": lambda _key, text: bad_secret(text),
}


def range_words(key: Key) -> str:
    """The range as people say it, without its unit; empty where every value will do."""
    figure = (lambda n: format_size(int(n))) if key.form == "size" else "{:.12g}".format
    if key.low is not None and key.high is not None:
        return f"{figure(key.low)} to {figure(key.high)}"
    if key.above is not None and key.high is not None:
        return f"more than {figure(key.above)}, up to {figure(key.high)}"
    return ""


def _type_words(bare: Any, key: Key) -> str:
    if key.form == "size":
        return 'a size like "4GiB" or "512MiB"'
    names = [TYPE_WORDS[arg] for arg in (bare, *get_args(bare)) if arg in TYPE_WORDS]
    if get_origin(bare) is tuple:
        return f"a list of {names[0]}"
    if get_origin(bare) is dict:
        return 'a table of text, { NAME = "value" }'
    return " or ".join(names)


def _absent(key: Key) -> str:
    return f", or leave it out to {key.absent}" if key.absent else ""


def _meaning(annotation: Any) -> str:
    key = unwrap(annotation)[1]
    return key.meaning[0].lower() + key.meaning[1:].rstrip(".")


def _plain(name: str) -> str:
    """A name in a message: quoted keys may hold anything, and a problem is one line."""
    return name if name and name.isprintable() else show(name)
