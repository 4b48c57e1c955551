"""What a reload says of itself."""

from __future__ import annotations

import pytest

from proxy.config_diff import diff
from proxy.config_load import load_text

BASE = """
[server]
api_keys = ["literal:sk-1"]
[[devices.simulated]]
name = "sim0"
memory = "8GiB"
[[backends]]
name = "local"
kind = "simulated"
[[models]]
id = "a"
backend = "local"
memory_bytes = "1GiB"
[[models]]
id = "b"
backend = "local"
memory_bytes = "1GiB"
"""


def changes(new: str, old: str = BASE) -> list[str]:
    return diff(load_text(old, "old"), load_text(new, "new"))


def test_the_same_file_changes_nothing() -> None:
    assert changes(BASE) == []


def test_each_changed_key_has_its_line() -> None:
    new = BASE.replace('id = "a"', 'id = "a"\nttl_s = 60') + '[limits]\nmax_body = "1MiB"\n'
    assert changes(new) == ["models[a].ttl_s: not set -> 60.0", 'limits.max_body: "64MiB" -> "1MiB"']


def test_models_come_and_go_by_their_id() -> None:
    assert changes(BASE.replace('id = "b"', 'id = "c"')) == ["models[b]: removed", "models[c]: added"]


def test_the_order_of_a_group_matters_and_is_said() -> None:
    remote = "[[backends]]\nname = '{0}'\nkind = 'openai'\nbase_url = 'https://{0}/v1'\n"
    one = remote.format("x") + remote.format("y")
    entries = "[[models]]\nid = '{}'\nbackend = 'x'\n"
    old = one + entries.format("m") + entries.format("n")
    new = one + entries.format("n") + entries.format("m")
    assert changes(new, old) == ["models: in another order"]


def test_a_second_entry_of_a_group_is_told_from_the_first() -> None:
    remote = (
        "[[backends]]\nname = 'r'\nkind = 'openai'\nbase_url = 'https://r/v1'\n[[models]]\nid = 'a'\nbackend = 'r'\n"
    )
    new = BASE + remote
    assert changes(new) == ["backends[r]: added", "models[a, 2]: added"]


def test_secrets_are_not_shown() -> None:
    assert changes(BASE.replace("sk-1", "sk-2")) == ["server.api_keys: changed"]


def test_what_needs_a_restart_is_marked() -> None:
    old = load_text(BASE, "old")
    new = load_text(BASE, "new", {"server.listen": "127.0.0.1:9", "store.dir": "/elsewhere", "server.drain_s": 1.0})
    restart = " (needs a restart; until then the old value holds)"
    listen, drain, store = diff(old, new)
    assert listen == f'server.listen: "127.0.0.1:8080" -> "127.0.0.1:9"{restart}'
    assert drain == "server.drain_s: 30.0 -> 1.0"
    assert store.startswith("store.dir: ")
    assert store.endswith(f' -> "/elsewhere"{restart}')


def test_devices_are_made_once() -> None:
    restart = " (needs a restart; until then the old value holds)"
    assert changes(BASE.replace("8GiB", "9GiB")) == [f'devices.simulated[sim0].memory: "8GiB" -> "9GiB"{restart}']
    more = BASE.replace("[[backends]]", '[[devices.simulated]]\nname = "sim1"\nmemory = "1GiB"\n[[backends]]')
    assert changes(more) == [f"devices.simulated[sim1]: added{restart}"]
    assert changes(BASE, more) == [f"devices.simulated[sim1]: removed{restart}"]


@pytest.mark.parametrize(
    "change", ["[server]\nfast_lane = false", '[devices]\nhost_memory = "9GiB"', '[observe]\naccess_log = "off"']
)
def test_what_a_process_reads_once_is_said_to_need_a_restart(change: str) -> None:
    lines = diff(load_text("", "old"), load_text(change, "new"))
    assert len(lines) == 1
    assert lines[0].endswith("(needs a restart; until then the old value holds)")
