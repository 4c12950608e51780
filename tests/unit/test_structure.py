"""The package's own imports go downwards, in few levels and without cycles; no name hides a module.

The tests read the source; only the last one imports all modules. Imports inside functions and under
`TYPE_CHECKING` count too.
"""

from __future__ import annotations

import ast
import importlib
import sys
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

import pytest

import xprnn

ROOT = Path(xprnn.__file__).parent
# Each may import from later ones.
ORDER = (
    "tools",
    "io",
    "",  # functional.py and feature_first.py
    "diagnostics",
    "distributed",
    "optim",
    "nn",
    "engine",
    "kernels",
    "cells",
    "core",
    "backend",
)
LATER = {"io", "distributed"}
LEVELS = 12
PUBLIC_FILES = {"__init__.py", "__main__.py", "functional.py", "feature_first.py"}
# Module paths of earlier versions, in pickles and documentation; each re-exports names.
ALIASES = {"modules", "cell_modules", "readout", "module", "embedding", "stepper", "optim.updates"}
# Public modules whose contents are lower down, because other packages use them too
FACES = {"cell_definitions"}

Edge = tuple[str, str, int]  # a module, a module that it imports, and the line


@cache
def modules() -> dict[str, Path]:
    """The path of every module by its name without "xprnn."; "" is the package itself."""
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name] = path
    return found


@cache
def tree(name: str) -> ast.Module:
    return ast.parse(modules()[name].read_text("utf-8"))


def is_package(name: str) -> bool:
    return modules()[name].name == "__init__.py"


def package_of(name: str) -> str:
    """The part of `ORDER` that a module belongs to."""
    first, dot, _ = name.partition(".")
    return first if dot or is_package(name) else ""


def imports(node: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    """The import statements in a tree."""
    for child in ast.walk(node):
        if isinstance(child, (ast.Import, ast.ImportFrom)):
            yield child


def source_of(name: str, statement: ast.ImportFrom) -> str | None:
    """The module of the package that `from ... import` names, or None for other packages."""
    where = statement.module or ""
    if statement.level == 0:
        first, _, rest = where.partition(".")
        return rest if first == "xprnn" else None
    parts = name.split(".") if name else []
    above = statement.level - is_package(name)
    base = parts[: len(parts) - above]
    return ".".join([*base, *filter(None, [where])])


def defining(module: str, name: str, seen: frozenset[str] = frozenset()) -> str:
    """The module that defines a name, through `__init__` files that re-export it."""
    inner = f"{module}.{name}".lstrip(".")
    if inner in modules():
        return inner
    if not is_package(module) or module in seen:
        return module
    for statement in imports(tree(module)):
        if not isinstance(statement, ast.ImportFrom):
            continue
        for alias in statement.names:
            if (alias.asname or alias.name) == name:
                source = source_of(module, statement)
                if source is not None:
                    return defining(source, alias.name, seen | {module})
    return module


@cache
def edges() -> tuple[Edge, ...]:
    """The imports of each module from the package, without `__init__` files and aliases."""
    found: list[Edge] = []
    for name in modules():
        if is_package(name) or name in ALIASES | FACES:
            continue
        for statement in imports(tree(name)):
            if isinstance(statement, ast.Import):
                wanted = [a.name.partition(".")[2] for a in statement.names if _ours(a.name)]
            elif (source := source_of(name, statement)) is None:
                continue
            else:
                named = [a.name for a in statement.names if a.name != "__version__"]
                wanted = [defining(source, one) for one in named]
            found += [(name, one, statement.lineno) for one in wanted if one != name]
    return tuple(found)


def _ours(name: str) -> bool:
    return name.partition(".")[0] == "xprnn"


def longest_chain(pairs: Iterable[tuple[str, str]]) -> list[str]:
    """The longest chain of imports downwards; AssertionError if there is a cycle."""
    below: dict[str, set[str]] = {}
    for name, imported in pairs:
        below.setdefault(name, set()).add(imported)
    chains: dict[str, list[str]] = {}

    def walk(name: str, path: tuple[str, ...]) -> list[str]:
        assert name not in path, (
            f"an import cycle: {' -> '.join((*path[path.index(name) :], name))}"
        )
        if name not in chains:
            rest = [walk(one, (*path, name)) for one in sorted(below.get(name, ()))]
            chains[name] = [name, *max(rest, key=len, default=[])]
        return chains[name]

    return max((walk(name, ()) for name in sorted(below)), key=len)


def top_level(name: str) -> str:
    """The package or public file that a module belongs to."""
    return package_of(name) or name


def test_packages_and_public_files() -> None:
    folders = {path.name for path in ROOT.iterdir() if (path / "__init__.py").is_file()}
    assert set(ORDER) - {""} - LATER <= folders <= set(ORDER)
    aliases = {f"{name}.py" for name in ALIASES | FACES if "." not in name}
    assert {path.name for path in ROOT.glob("*.py")} == PUBLIC_FILES | aliases


def test_nothing_is_imported_upwards() -> None:
    rank = {name: k for k, name in enumerate(ORDER)}
    wrong = [
        f"xprnn/{name}:{line} imports {wanted or 'xprnn'}"
        for name, wanted, line in edges()
        if name != "__main__"
        and (wanted == "" or rank[package_of(wanted)] < rank[package_of(name)])
    ]
    assert not wrong, "\n".join(wrong)


def test_no_import_cycles() -> None:
    longest_chain((name, imported) for name, imported, _ in edges())


def test_few_levels_of_packages() -> None:
    """And no cycles, where each package and each public file is one node."""
    pairs = [(top_level(name), top_level(imported)) for name, imported, _ in edges()]
    longest = longest_chain(pair for pair in pairs if pair[0] != pair[1])
    assert len(longest) <= LEVELS, " -> ".join(longest)


@pytest.mark.parametrize("name", sorted(ALIASES | FACES))
def test_aliases_are_one_import(name: str) -> None:
    docstring, *rest = tree(name).body
    assert isinstance(docstring, ast.Expr)
    assert [type(statement) for statement in rest] == [ast.ImportFrom]


@pytest.mark.parametrize("name", [name for name in modules() if is_package(name)])
def test_init_files_only_export_names(name: str) -> None:
    wrong = [ast.unparse(node)[:60] for node in tree(name).body if not _only_exports(node)]
    assert not wrong, f"xprnn/{name}: {wrong}"


def _only_exports(node: ast.stmt) -> bool:
    match node:
        case ast.Import() | ast.ImportFrom() | ast.Expr(value=ast.Constant()):
            return True
        case ast.Assign(targets=[ast.Name(id="__all__" | "__version__")]):
            return True
        case ast.FunctionDef(name="__getattr__" | "__dir__"):
            return True
        case ast.If(test=test) if "TYPE_CHECKING" in ast.unparse(test):
            return all(_only_exports(inner) for inner in [*node.body, *node.orelse])
    return False


def test_no_name_hides_a_module() -> None:
    """After all imports, each module is the attribute of that name of its package."""
    hidden = []
    for name in filter(None, modules()):
        path = f"xprnn.{name}"
        if name.endswith("__main__"):
            continue
        try:
            importlib.import_module(path)
        except ImportError:  # an optional package is not installed
            continue
        parent, _, last = path.rpartition(".")
        if getattr(sys.modules[parent], last) is not sys.modules[path]:
            hidden.append(path)
    assert not hidden
