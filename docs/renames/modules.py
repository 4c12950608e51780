"""Rewrite the imports of a source file whose own module, or those that it imports, have moved."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping

# modules by whose dotted name a text means the function
FUNCTIONS = ("xprnn.gradcheck", "xprnn.gradient_flow", "xprnn.verify")


def rewritten(text: str, old_path: str, moved: Mapping[str, str], modules: frozenset[str]) -> str:
    """The text with its import statements and dotted names after the moves.

    :param old_path: of the file before the moves.
    :param moved: old dotted name of a module -> new one.
    :param modules: the dotted names of all modules before the moves.
    """
    if not old_path.endswith(".py"):
        return _named(text, moved)
    here = dotted(old_path)
    package = here if old_path.endswith("__init__.py") else here.rpartition(".")[0]
    target = moved.get(here, here)
    stays_package = old_path.endswith("__init__.py") and here not in moved
    new_package = target if stays_package else target.rpartition(".")[0]
    lines = text.splitlines(keepends=True)
    for node in sorted(_imports(ast.parse(text)), key=lambda each: -each.lineno):
        source = _base(node, package)
        parts: dict[str, list[ast.alias]] = {}
        for alias in node.names:
            full = f"{source}.{alias.name}"
            if full in modules:  # a module by its package's name
                new = moved.get(full, full)
                parent, _, name = new.rpartition(".")
                if name != alias.name and alias.asname is None:
                    alias = ast.alias(name, alias.name)
                parts.setdefault(parent, []).append(ast.alias(name, alias.asname))
            else:
                parts.setdefault(moved.get(source, source), []).append(alias)
        indent = " " * node.col_offset
        start, stop = node.lineno - 1, node.end_lineno
        comment = re.search(r"  #.*$", lines[start].rstrip("\n"))
        new_lines = []
        for module, names in parts.items():
            name = _relative(module, new_package) if node.level else module
            imported = ", ".join(a.name + (f" as {a.asname}" if a.asname else "") for a in names)
            new_lines.append(f"{indent}from {name} import {imported}")
        if comment:
            new_lines[0] += comment.group()
        if parts.keys() == {source} and (not node.level or new_package == package):
            continue
        lines[start:stop] = ["\n".join(new_lines) + "\n"]
    return _named("".join(lines), moved)


def dotted(path: str) -> str:
    """The module in a file."""
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def _imports(tree: ast.AST) -> list[ast.ImportFrom]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]


def _base(node: ast.ImportFrom, package: str) -> str:
    if not node.level:
        return node.module or ""
    base = package.split(".")
    base = base[: len(base) - (node.level - 1)]
    return ".".join([*base, *([node.module] if node.module else [])])


def _relative(module: str, package: str) -> str:
    """A module as an import statement inside a package names it."""
    here, there = package.split("."), module.split(".")
    shared = 0
    while shared < min(len(here), len(there)) and here[shared] == there[shared]:
        shared += 1
    return "." * (len(here) - shared + 1) + ".".join(there[shared:])


def _named(text: str, moved: Mapping[str, str]) -> str:
    """The text with dotted names and paths of modules after the moves."""
    for old, new in sorted(moved.items(), key=lambda pair: -len(pair[0])):
        if old not in FUNCTIONS:
            text = re.sub(rf"(?<![\w.]){re.escape(old)}(?!\w)", new, text)
        path, after = old.replace(".", "/"), new.replace(".", "/")
        text = re.sub(rf"(?<!\w){re.escape(path)}(?=\.py\b)", after, text)
    return text
