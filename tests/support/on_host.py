"""The calls of `targets.py` on a module of any backend, with NumPy arrays in and out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from tests.support import targets
from xprnn.backend import to_numpy


def forward(subject: Any, given: dict[str, np.ndarray], **options: Any) -> Any:
    """Call with x and the initial states; what it returns."""
    return _there_and_back(targets.forward, subject, given, **options)


def backward(subject: Any, given: dict[str, np.ndarray], **options: Any) -> Any:
    """Undo the last call with the upstream gradients; what it returns."""
    return _there_and_back(targets.backward, subject, given, **options)


def run(subject: Any, given: dict[str, np.ndarray], **options: Any) -> list[np.ndarray]:
    """Call and undo: every result and every gradient; `grads` are zero before and after."""
    found: list[np.ndarray] = _there_and_back(targets.run, subject, given, **options)
    return found


def _there_and_back(
    call: Callable[..., Any], subject: Any, given: dict[str, np.ndarray], **options: Any
) -> Any:
    place = targets.module_of(subject).backend
    if place.kind == "numpy":
        return call(subject, given, **options)
    moved = {name: place.from_host(array) for name, array in given.items()}
    return _on_host(call(subject, moved, **options))


def _on_host(results: Any) -> Any:
    if isinstance(results, (tuple, list)):
        return type(results)([_on_host(result) for result in results])
    return None if results is None else to_numpy(results)
