from __future__ import annotations

import pytest
from multidict import CIMultiDict

from proxy.config import Secret
from proxy.config_secrets import NamedKey
from proxy.errors import Unauthenticated
from proxy.gate.keys import Keys


def keys(*pairs: tuple[str, str]) -> Keys:
    return Keys(NamedKey(name, Secret(value, "literal")) for name, value in pairs)


@pytest.mark.parametrize(
    "headers",
    [
        {"Authorization": "Bearer k1"},
        {"authorization": "bearer  k1 "},
        {"X-API-Key": "k1"},
        {"api-key": "k1"},
        {"authorization": "Basic x", "x-api-key": "k1"},
    ],
)
def test_a_key_is_found_however_it_is_sent(headers: dict[str, str]) -> None:
    assert keys(("team", "k1"), ("other", "k2")).authenticate(CIMultiDict(headers)) == "team"


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": "Bearer"},
        {"authorization": "Bearer k"},
        {"authorization": "Bearer k11"},
        {"authorization": "Bearer x", "x-api-key": "k1"},
        {"authorization": "Bearer \udcff"},
    ],
)
def test_everything_else_is_refused_without_repeating_it(headers: dict[str, str]) -> None:
    with pytest.raises(Unauthenticated) as caught:
        keys(("team", "k1")).authenticate(CIMultiDict(headers))
    assert "k11" not in caught.value.message


def test_without_keys_everybody_is_local() -> None:
    assert keys().authenticate(CIMultiDict()) == "local"


def test_the_keys_cannot_be_seen_in_memory_dumps_of_the_object() -> None:
    guarded = keys(("team", "sk-planted"))
    assert "sk-planted" not in repr({name: getattr(guarded, name) for name in Keys.__slots__})
