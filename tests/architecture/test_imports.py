"""Imports point one way: proxy -> scheduler -> ext; the core is pure; the keeper hardly has anything that can fail."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from tests.architecture.imports import (
    PACKAGES,
    ROOT,
    Import,
    imports_in,
    imports_of,
    module_name,
    reached,
    sources,
    top,
)

MAY_IMPORT = {"proxy": {"proxy", "scheduler", "ext"}, "scheduler": {"scheduler", "ext"}, "ext": {"ext"}}
# Tools and tests use the packages; never the other way round.
OUTSIDE = {"tests", "scripts", "loadtests"}
# The shells: they wait, log and touch disks. Everything else of the scheduler, but engines, devices and the simulator's
# command, decides.
SHELLS = {"driver", "handover", "semaphore", "kept_file", "learned"}
PURE_CORE = sorted(
    str(path.relative_to(ROOT / "scheduler"))
    for path in sources("scheduler", ".py")
    if path.parent.name in ("scheduler", "policies", "eviction") and path.stem not in SHELLS
)
IMPURE = {
    "asyncio",
    "time",
    "datetime",
    "random",
    "secrets",
    "uuid",
    "logging",
    "os",
    "socket",
    "subprocess",
    "threading",
    "aiohttp",
    "psutil",
    "pynvml",
    "uvloop",
}


def all_imports(path: Path) -> list[Import]:
    """What importing this file imports, through all files of ours that it leads to."""
    return [found for each in reached(path).values() for found in each]


def wrong_way(found: Import) -> bool:
    """Whether an import points back, or out of the product into its tools."""
    target = top(found.imported)
    return (target in PACKAGES and target not in MAY_IMPORT[top(found.importer)]) or target in OUTSIDE


@pytest.mark.parametrize("package", PACKAGES)
def test_no_import_points_back(package: str) -> None:
    assert [str(found) for path in sources(package) for found in imports_of(path) if wrong_way(found)] == []


def test_native_sources_import_nothing_of_the_rooms_above() -> None:
    back = re.compile(r"^\s*(?:c?import|from)\s+(proxy|scheduler|asyncio|logging)\b", re.MULTILINE)
    native = sources("ext", ".pyx", ".pxd")
    assert native
    assert [path.name for path in native if back.search(path.read_text())] == []


def test_ext_knows_nothing_of_asyncio_config_or_logging() -> None:
    banned = {"asyncio", "logging", "tomllib", "aiohttp"}
    assert [str(found) for path in sources("ext") for found in imports_of(path) if top(found.imported) in banned] == []


@pytest.mark.parametrize("name", PURE_CORE)
def test_the_core_and_all_that_it_leans_on_read_no_clock_wait_for_nothing_and_draw_no_lots(name: str) -> None:
    path = ROOT / "scheduler" / name
    assert [str(found) for found in all_imports(path) if top(found.imported) in IMPURE] == []


def test_the_scheduler_knows_no_web_server_and_no_metrics() -> None:
    # The simulated engine is a server: it stands where vLLM would, is started as a process and imported by nobody.
    server = "scheduler.engines.simulated_server"
    found = [each for package in PACKAGES for path in sources(package) for each in imports_of(path)]
    banned = ("aiohttp.web", "prometheus_client")
    ours = [each for each in found if top(each.importer) == "scheduler" and each.importer != server]
    assert [str(each) for each in ours if each.imported.startswith(banned)] == []
    assert [str(each) for each in found if each.imported.startswith(server)] == []


def test_the_core_is_among_what_is_pure() -> None:
    known = {"core.py", "books.py", "placement.py", "ordering.py", "eviction/base.py", "policies/regret.py"}
    assert known <= set(PURE_CORE)


@pytest.mark.parametrize("name", ["keeper", "launcher"])
def test_keeper_and_launcher_start_with_the_standard_library_alone(name: str) -> None:
    (path,) = (each for each in sources("scheduler") if each.name == f"{name}.py")
    beyond = [
        str(found)
        for found in all_imports(path)
        if top(found.imported) not in sys.stdlib_module_names and top(found.imported) not in PACKAGES
    ]
    assert beyond == []


def room(name: str) -> str:
    """The room of a proxy module: its folder, or the module itself at the top."""
    return ".".join(name.split(".")[:2])


def edges() -> dict[str, set[str]]:
    """Which room of proxy imports which other one when it is imported."""
    found: dict[str, set[str]] = {}
    rooms = {room(module_name(path)) for path in sources("proxy")}
    for path in sources("proxy"):
        here = room(module_name(path))
        for each in imports_of(path):
            there = room(each.imported)
            if each.at_start and not each.for_types and there in rooms and there not in ("proxy", here):
                found.setdefault(here, set()).add(there)
    return found


def cycle_in(graph: dict[str, set[str]]) -> list[str]:
    """Some cycle of a graph, as the names along it; empty when there is none."""
    done: set[str] = set()

    def visit(node: str, trail: list[str]) -> list[str]:
        if node in trail:
            return [*trail[trail.index(node) :], node]
        if node in done:
            return []
        for following in sorted(graph.get(node, ())):
            if cycle := visit(following, [*trail, node]):
                return cycle
        done.add(node)
        return []

    return next((cycle for node in sorted(graph) if (cycle := visit(node, []))), [])


def test_rooms_of_the_proxy_form_no_cycle() -> None:
    assert cycle_in(edges()) == []


# ------------------------------------------------------------------ the reader itself; without it the above c


def test_the_reader_finds_every_way_to_import() -> None:
    source = (
        "from typing import TYPE_CHECKING\nimport a.b, c\nfrom . import d\nfrom ..e import f\n"
        "if TYPE_CHECKING:\n    import g\ndef late():\n    import h\n"
    )
    found = {each.imported: each for each in imports_in(source, "proxy.gate.keys")}
    assert set(found) == {"typing.TYPE_CHECKING", "a.b", "c", "proxy.gate.d", "proxy.e.f", "g", "h"}
    assert found["g"].for_types
    assert not found["h"].at_start


def test_the_rules_refuse_an_arrow_that_points_back() -> None:
    assert wrong_way(next(imports_in("from proxy.config import Config", "scheduler.core")))
    assert wrong_way(next(imports_in("import scheduler.core", "ext.sse")))
    assert wrong_way(next(imports_in("from tests.fakes import Clock", "proxy.app")))
    assert not wrong_way(next(imports_in("from scheduler.core import Core", "proxy.app")))


def test_a_cycle_is_named() -> None:
    assert cycle_in({"a": {"b"}, "b": {"c"}, "c": {"a"}}) == ["a", "b", "c", "a"]
    assert cycle_in({"a": {"b", "c"}, "b": {"c"}}) == []
