"""The calls of `targets.py` on a module of any backend, with NumPy arrays in and out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from tests.support import targets
from xprnn.backend import to_numpy


def forward(subject: Any, inputs: dict[str, np.ndarray], **options: Any) -> Any:
    """The result of a call with x and the initial states."""
    return _with_numpy_arrays(targets.forward, subject, inputs, **options)


def backward(subject: Any, inputs: dict[str, np.ndarray], **options: Any) -> Any:
    """The result of backward of the last call with the upstream gradients."""
    return _with_numpy_arrays(targets.backward, subject, inputs, **options)


def run(subject: Any, inputs: dict[str, np.ndarray], **options: Any) -> list[np.ndarray]:
    """All results and gradients of forward and backward; `grads` are zero before and after."""
    results: list[np.ndarray] = _with_numpy_arrays(targets.run, subject, inputs, **options)
    return results


def _with_numpy_arrays(
    call: Callable[..., Any], subject: Any, inputs: dict[str, np.ndarray], **options: Any
) -> Any:
    backend = targets.module_of(subject).backend
    if backend.kind == "numpy":
        return call(subject, inputs, **options)
    moved = {name: backend.from_host(array) for name, array in inputs.items()}
    return _on_host(call(subject, moved, **options))


def _on_host(results: Any) -> Any:
    if isinstance(results, (tuple, list)):
        return type(results)([_on_host(result) for result in results])
    return None if results is None else to_numpy(results)
