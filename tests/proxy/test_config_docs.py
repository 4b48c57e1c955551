"""The example and the reference pages say what the code does."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any, get_origin

import msgspec
import pytest

import proxy
from proxy.config import CLASSES, Config
from proxy.config_load import load
from proxy.config_shape import section_of, shape_problems, unwrap
from proxy.reference import pages
from scheduler.model import LatencyClass

ROOT = Path(proxy.__file__).parent.parent
EXAMPLE = ROOT / "configs" / "vramp.example.toml"


def uncommented() -> dict[str, Any]:
    return tomllib.loads(re.sub(r"^#(?=[a-z_]+ = |\[)", "", EXAMPLE.read_text(), flags=re.MULTILINE))


def first(value: Any) -> Any:
    return value[0] if isinstance(value, list) else value


@pytest.mark.parametrize("path", sorted(pages()))
def test_the_page_is_what_the_code_writes(path: str) -> None:
    assert (ROOT / path).read_text() == pages()[path], "run python -m proxy.reference"


def test_the_example_loads() -> None:
    config = load(EXAMPLE)
    assert [model.id for model in config.models] == ["example-small"]
    assert config.timeouts == Config().timeouts


def test_the_example_with_every_key_has_the_right_shape() -> None:
    assert shape_problems(uncommented()) == []


def test_the_example_names_every_key_and_states_the_defaults_of_the_code() -> None:
    def check(kind: type[msgspec.Struct], data: dict[str, Any]) -> None:
        for field in msgspec.structs.fields(kind):
            assert field.name in data
            section = section_of(unwrap(field.type)[0])
            if section is not None:
                named = get_origin(unwrap(field.type)[0]) is dict
                check(section, first(list(data[field.name].values()) if named else data[field.name]))
            elif not field.required and field.default not in (None, ()) and field.default is not msgspec.NODEFAULT:
                assert data[field.name] == field.default

    check(Config, uncommented())


def test_every_key_says_what_it_means_and_every_number_and_size_its_range() -> None:
    def check(kind: type[msgspec.Struct]) -> None:
        for field in msgspec.structs.fields(kind):
            bare, key = unwrap(field.type)
            section = section_of(bare)
            if section is not None:
                check(section)
                continue
            assert key.meaning.endswith(".")
            if key.form == "size" or (bare is not bool and {int, float} & {bare, *getattr(bare, "__args__", ())}):
                assert key.high is not None
                assert (key.low is None) != (key.above is None)

    check(Config)


def test_the_benchmark_configuration_loads() -> None:
    config = load(ROOT / "configs" / "bench.toml")
    assert config.server.listen == "127.0.0.1:9100"
    assert config.backends[0].base_url == "http://127.0.0.1:9000/v1"
    assert config.observe.access_log == "off"


def test_the_class_names_are_the_scheduler_s() -> None:
    assert tuple(name.lower() for name in LatencyClass.__members__) == CLASSES


def test_the_version_is_the_distribution_s() -> None:
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"] == proxy.__version__
