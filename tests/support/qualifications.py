"""Qualifications with chosen outcomes and times, and where a test's calls find them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from xprnn import kernels
from xprnn.backend import Backend
from xprnn.kernels import qualification
from xprnn.kernels.dispatch import _package
from xprnn.kernels.qualification import IMPLEMENTATIONS, PASSES, Qualification, Row, as_json

ROW = Row("gru", "float32", "forward", "pointwise", 8, 8, 16, 10, "right", 0.25, 100.0, 5.0, "h")
GRID = {"N": (1, 64), "H": (1, 512), "T": (1, 512)}
Rows = list[Row]


def row(**changes: Any) -> Row:
    """A row; an implementation that was not right was not timed."""
    if changes.get("outcome", "right") != "right":
        changes = {"error": None, "microseconds": None, **changes}
    return replace(ROW, **changes)


def corners(grid: Mapping[str, Iterable[int]] = GRID, **changes: Any) -> Rows:
    """A row for each shape of a grid."""
    shapes = product(*grid.values())
    return [row(**dict(zip(grid, shape, strict=True)), **changes) for shape in shapes]


def preferring(name: str, grid: Mapping[str, Iterable[int]] = GRID, **changes: Any) -> Rows:
    """Rows of all implementations and passes, in which one is fastest everywhere."""
    return [
        replace(each, microseconds=each.T * (10.0 if other == name else 20.0))
        for kind in PASSES
        for other in IMPLEMENTATIONS
        for each in corners(
            {**grid, "T": (1,)} if kind == "step" else grid,
            kind=kind,
            implementation=other,
            **changes,
        )
    ]


def make(rows: Iterable[Row] = (), **changes: Any) -> Qualification:
    fields: dict[str, Any] = {
        "identity": {"device": "a GPU", "driver": "1"},
        "facts": {"xprnn": "0.1.0"},
        "date": "2026-12-03",
        "seconds": 90.0,
    }
    return Qualification(**{**fields, **changes}, rows=tuple(rows))


def write(path: Path, qualified: Qualification) -> Path:
    path.write_text(as_json(qualified), "utf-8")
    return path


class Qualify:
    """Writes a file of this machine, and lets calls read it."""

    def __init__(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._path, self._monkeypatch = path, monkeypatch

    def __call__(self, backend: Backend, rows: Iterable[Row], **changes: Any) -> Qualification:
        identity = _package(backend.kernels).identity(backend)
        qualified = make(rows, **{"identity": identity, **changes})
        self.use(write(self._path, qualified))
        return qualified

    def use(self, value: object) -> None:
        """Set the environment variable; None: a user's folder without files."""
        if value is None:
            self._monkeypatch.delenv(qualification.ENVIRONMENT_VARIABLE)
            self._monkeypatch.setattr(qualification, "folder", lambda: None)
        else:
            self._monkeypatch.setenv(qualification.ENVIRONMENT_VARIABLE, str(value))
        kernels.forget_plans()


def selected(layer: Any, shape: tuple[int, ...]) -> tuple[str, str]:
    """The implementation that `explain` names, and the reason."""
    first, reason, *_ = layer.explain(shape).splitlines()
    return first.rpartition(": ")[2], reason.removeprefix("  reason: ")
