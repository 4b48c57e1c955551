"""What each module of the repository imports, read from its source with ast; nothing is run."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tests.architecture.tree import ROOT, tracked

PACKAGES = ("proxy", "scheduler", "ext")


class Import(NamedTuple):
    """One import: who, what (dotted), where, whether it runs when the module is imported and is not for types only."""

    importer: str
    imported: str
    line: int
    at_start: bool
    for_types: bool

    def __str__(self) -> str:
        return f"{self.importer}:{self.line} imports {self.imported}"


def module_name(path: Path, root: Path = ROOT) -> str:
    """The dotted name of a source file (`.pyx` too)."""
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def is_type_checking(node: ast.AST) -> bool:
    """Whether this is `if TYPE_CHECKING:`."""
    if not isinstance(node, ast.If):
        return False
    return "TYPE_CHECKING" in {getattr(node.test, "id", None), getattr(node.test, "attr", None)}


def absolute(importer: str, is_package: bool, node: ast.ImportFrom) -> str:
    """The dotted module of a `from` import, relative ones resolved."""
    if not node.level:
        return node.module or ""
    parts = importer.split(".")
    kept = parts[: len(parts) - node.level + (1 if is_package else 0)]
    return ".".join([*kept, node.module] if node.module else kept)


def imports_in(source: str, importer: str, is_package: bool = False) -> Iterator[Import]:
    """Every import of a module. `from a import b` counts as `a.b`, because b may be a module."""

    def walk(node: ast.AST, at_start: bool, for_types: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                for alias in child.names:
                    yield Import(importer, alias.name, child.lineno, at_start, for_types)
            elif isinstance(child, ast.ImportFrom):
                base = absolute(importer, is_package, child)
                for alias in child.names:
                    yield Import(importer, f"{base}.{alias.name}", child.lineno, at_start, for_types)
            else:
                inside = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
                yield from walk(child, at_start and not inside, for_types or is_type_checking(child))

    yield from walk(ast.parse(source), True, False)


def imports_of(path: Path) -> list[Import]:
    """The imports of one file of the repository."""
    return list(imports_in(path.read_text(encoding="utf-8"), module_name(path), path.name == "__init__.py"))


def sources(package: str, *suffixes: str) -> list[Path]:
    """The files of a package that end so; the Python files, `.pyi` included, if nothing is said."""
    wanted = suffixes or (".py", ".pyi")
    return [path for path in tracked() if path.suffix in wanted and path.is_relative_to(ROOT / package)]


def top(name: str) -> str:
    """The outermost package of a dotted name."""
    return name.split(".", 1)[0]


def module_files(name: str) -> list[Path]:
    """The files that an import of this dotted name runs: the module's and its packages' `__init__`; [] if not ours.

    The last part may be a name inside a module: then the module counts.
    """
    parts = name.split(".")
    found = []
    for depth in range(1, len(parts) + 1):
        base = ROOT.joinpath(*parts[:depth])
        found += [path for path in (base / "__init__.py", base.with_suffix(".py")) if path.exists()]
    return found


def reached(start: Path) -> dict[Path, list[Import]]:
    """Every file of ours that importing `start` runs, with the imports that each runs."""
    found: dict[Path, list[Import]] = {}
    waiting = [start]
    while waiting:
        path = waiting.pop()
        if path in found:
            continue
        found[path] = [each for each in imports_of(path) if each.at_start and not each.for_types]
        waiting += [
            file for each in found[path] if top(each.imported) in PACKAGES for file in module_files(each.imported)
        ]
    return found
