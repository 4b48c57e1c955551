"""Names under which a loopback listener may be called."""

from __future__ import annotations

import pytest

from proxy.errors import Forbidden
from proxy.gate.keys import LOCAL_TENANT, Keys
from proxy.gate.origin import loopback_name


@pytest.mark.parametrize(
    "host", ["localhost", "localhost:8080", "127.0.0.1:8080", "127.8.8.8", "[::1]:8080", "a.localhost"]
)
def test_names_of_this_machine(host: str) -> None:
    assert loopback_name(host)


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1.evil.example:8080", "localhost.evil.example", "", "[", "10.0.0.1"]
)
def test_names_of_others(host: str) -> None:
    assert not loopback_name(host)


def test_a_page_that_rebinds_its_name_to_loopback_is_refused_where_there_are_no_keys() -> None:
    assert Keys([]).authenticate({"host": "127.0.0.1:8080"}) == LOCAL_TENANT
    assert Keys([]).authenticate({}) == LOCAL_TENANT  # HTTP/1.0; browsers always send it
    with pytest.raises(Forbidden, match="api_keys"):
        Keys([]).authenticate({"host": "evil.example:8080"})
