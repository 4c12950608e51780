"""Every name that the plain code takes from `xp` exists in CuPy and in NumPy."""

from __future__ import annotations

import ast
import functools
import operator
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

import xprnn
from tests.support.fake_cupy.array import NAMES

PACKAGE = Path(xprnn.__file__).parent
# code of a specific array module: backends, descriptions of devices, kernels
SPECIFIC_CODE = {
    PACKAGE / "tools/info.py",
    *PACKAGE.glob("backend/*.py"),
    *(p for p in PACKAGE.glob("kernels/**/*.py") if p.name != "shared.py"),
}
SOURCES = tuple(path for path in sorted(PACKAGE.rglob("*.py")) if path not in SPECIFIC_CODE)
# file: how many different names it takes from `xp` at least
PLAIN_CODE = {
    "cells/gru.py": 5,
    "cells/lstm.py": 3,
    "cells/numerics.py": 4,
    "cells/rnn.py": 5,
    "core/cell.py": 1,
    "core/packing.py": 1,
    "core/workspace.py": 1,
    "core/dropout.py": 2,
    "engine/stack.py": 2,
    "kernels/shared.py": 1,
    "nn/embedding.py": 4,
    "nn/recurrent.py": 1,
}


def names_used(source: str) -> set[str]:
    """The dotted names taken from something called `xp`: `xp.add`, `backend.xp.linalg.norm`.

    What would hide a name, `getattr(xp, ...)` or an alias of `xp`, is returned as written.
    """
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and (name := _after_xp(node)):
            names.add(name)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "getattr":
            if _is_xp(node.args[0]):
                names.add(ast.unparse(node))
        elif isinstance(node, ast.Assign):
            names |= set(_other_names(node))
    return names


def _is_xp(node: ast.expr) -> bool:
    name = getattr(node, "id", None) or getattr(node, "attr", "")
    return name in ("xp", "_xp")


def _after_xp(node: ast.expr) -> str:
    """The dotted names between `xp` and the end of `node`; "" if `node` does not come from it."""
    names: list[str] = []
    while isinstance(node, ast.Attribute) and not _is_xp(node):
        names.insert(0, node.attr)
        node = node.value
    return ".".join(names) if _is_xp(node) else ""


def _other_names(node: ast.Assign) -> Iterator[str]:
    values = node.value.elts if isinstance(node.value, ast.Tuple) else [node.value]
    for target in node.targets:
        targets = target.elts if isinstance(target, ast.Tuple) else [target]
        for name, value in zip(targets, values, strict=False):
            if _is_xp(value) and not _is_xp(name):
                yield f"{ast.unparse(name)} = {ast.unparse(value)}"


@functools.cache
def in_cupy() -> Callable[[str], bool]:
    """Whether CuPy has a dotted name: the installed one, or the list of CuPy 14.2."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about drivers, which names do not need
            import cupy
    except ImportError:
        return NAMES.__contains__
    return functools.partial(has, cupy)


def has(module: object, name: str) -> bool:
    """Whether `module` has the dotted attribute `name`."""
    try:
        operator.attrgetter(name)(module)
    except AttributeError:
        return False
    return True


def unknown(source: str) -> set[str]:
    return {name for name in names_used(source) if not (in_cupy()(name) and has(np, name))}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_every_name_exists(path: Path) -> None:
    assert unknown(path.read_text("utf-8")) == set()


@pytest.mark.parametrize("file", PLAIN_CODE)
def test_the_walk_finds_the_names(file: str) -> None:
    assert PACKAGE / file in SOURCES
    assert len(names_used((PACKAGE / file).read_text("utf-8"))) >= PLAIN_CODE[file]


def test_the_walk_finds_exactly_the_names() -> None:
    source = """
def f(xp, backend, a):
    xp.add(a, 1, out=a)
    other = self._backend.xp.empty(xp.linalg.norm(a).shape, np.float32)
    expand.xp_names, a.xpose, xp
"""
    assert names_used(source) == {"add", "empty", "linalg", "linalg.norm"}


@pytest.mark.parametrize(
    "line",
    [
        "xp.nonexistent(a)",  # in neither
        "backend.xp.nonexistent",
        "xp.errstate()",  # NumPy only
        "xp.asnumpy(a)",  # CuPy only
        "xp.add.nonexistent",
        "getattr(xp, name)(a)",
        "getattr(backend.xp, 'add')(a)",
        "np = backend.xp",
        "module, layout = self.xp, tape.layout",
    ],
)
def test_an_unknown_name_is_detected(line: str) -> None:
    source = (PACKAGE / "cells/gru.py").read_text("utf-8")
    assert not unknown(source)
    assert len(unknown(f"{source}\n{line}\n")) == 1


def test_the_cells_and_the_loop_do_not_use_numpy() -> None:
    others = ("core/cell.py", "engine/loop.py", "kernels/shared.py")
    for path in (*PACKAGE.glob("cells/*.py"), *(PACKAGE / name for name in others)):
        tree = ast.parse(path.read_text("utf-8"))
        imports = [n for n in ast.walk(tree) if isinstance(n, (ast.Import, ast.ImportFrom))]
        assert not any("numpy" in ast.unparse(node) for node in imports), path
