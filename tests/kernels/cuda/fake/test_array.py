"""The fake CuPy: the operations that it must reject, and those that it must accept."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import xprnn
from tests.support.cases import Case, build, draw, run
from tests.support.fake_cupy.array import FakeArray, FakeModule
from xprnn.backend import Backend

HOST = np.arange(1.0, 7.0).reshape(2, 3)
xp = FakeModule()


def device(array: Any = HOST) -> FakeArray:
    return FakeArray(np.array(array))


def in_place(left: Any, right: Any) -> None:
    left += right


def write(target: Any, key: Any, value: Any) -> None:
    target[key] = value


Attempts = dict[str, Callable[[FakeArray], Any]]

TO_NUMPY: Attempts = {
    "asarray": lambda a: np.asarray(a),
    "array": lambda a: np.array(a),
    "write into a NumPy array": lambda a: write(HOST.copy(), ..., a),
    "ufunc": lambda a: np.tanh(a),
    "ufunc of two": lambda a: np.add(HOST, a),
    "ufunc out": lambda a: np.add(HOST, HOST, out=a),
    "ufunc method": lambda a: np.add.reduce(a),
    "matmul": lambda a: np.matmul(HOST.T, a),
    "function": lambda a: np.sum(a),
    "function of a list": lambda a: np.concatenate([a, a]),
    "get": lambda a: a.get(),
    "item": lambda a: a[0, 0].item(),
    "tolist": lambda a: a.tolist(),
}
NUMPY_OPERANDS: Attempts = {
    "on the right": lambda a: a + HOST,
    "on the left": lambda a: HOST + a,
    "compared": lambda a: a == HOST,
    "added in place": lambda a: in_place(a, HOST),
    "added to in place": lambda a: in_place(HOST.copy(), a),
    "of a ufunc": lambda a: xp.add(a, HOST),
    "out of a ufunc": lambda a: xp.add(a, a, out=HOST.copy()),
    "of a function": lambda a: xp.sum(HOST),
    "in a list": lambda a: xp.concatenate([a, HOST]),
    "a list": lambda a: xp.add(a, [1.0, 2.0, 3.0]),
    "written": lambda a: write(a, ..., HOST),
    "converted": lambda a: xp.asarray(HOST),
    "as an index": lambda a: a[np.array([0, 1])],
    "as an index among others": lambda a: a[:, np.array([0, 1])],
    "as an index to write": lambda a: write(a, np.array([0]), 0.0),
    "a list as an index": lambda a: a[[0, 1]],
    "reshaped by": lambda a: a.reshape(np.array([3, 2])),
}
WAITING: Attempts = {
    "bool": lambda a: bool(a[0, 0]),
    "if": lambda a: 1 if a[0, 0] > 0 else 2,
    "float": lambda a: float(a[0, 0]),
    "int": lambda a: int(a[0, 0]),
    "complex": lambda a: complex(a[0, 0]),
    "index": lambda a: operator.index(device(1)),
    "slice": lambda a: a[: device(1)],
    "range": lambda a: range(device(3)),
    "iteration": lambda a: list(a),
    "unpacking": lambda a: [*a],
    "max": lambda a: max(a),
    "contains": lambda a: 1.0 in a,
    "boolean index": lambda a: a[a > 2],
}
ARGUMENTS: Attempts = {
    "ufunc where": lambda a: xp.add(a, a, where=a > 2),
    "ufunc where=True": lambda a: xp.add(a, a, where=True),
    "ufunc order": lambda a: xp.add(a, a, order="F"),
    "sum where": lambda a: xp.sum(a, where=a > 2),
    "sum initial": lambda a: a.sum(initial=1.0),
    "zeros like": lambda a: xp.zeros(3, like=a),
}
PRODUCTS: Attempts = {
    "matmul": lambda a: xp.matmul(a.T, a),
    "operator": lambda a: a.T @ a,
    "operator, reflected": lambda a: HOST.T @ a,
    "operator in place": lambda a: operator.imatmul(a, xp.zeros((3, 3))),
    "einsum": lambda a: xp.einsum("ij,ij->i", a, a),
    "tensordot": lambda a: xp.tensordot(a.T, a, axes=1),
}
MISSING: Attempts = {
    "an unknown name": lambda a: xp.nonexistent,
    "a NumPy name that CuPy lacks": lambda a: xp.errstate,
    "another": lambda a: xp.longdouble,
    "a CuPy name that NumPy lacks": lambda a: xp.asnumpy,
    "a submodule": lambda a: xp.linalg,
    "an unknown attribute": lambda a: a.nonexistent,
    "an ndarray attribute that CuPy lacks": lambda a: a.ctypes,
    "an ndarray method that CuPy lacks": lambda a: a.setflags(write=False),
}


def cases(attempts: Attempts) -> Any:
    return pytest.mark.parametrize("attempt", attempts.values(), ids=attempts.keys())


@cases(TO_NUMPY | NUMPY_OPERANDS | WAITING | ARGUMENTS)
def test_rejected_with_type_error(attempt: Callable[[FakeArray], Any]) -> None:
    with pytest.raises(TypeError):
        attempt(device())


@cases(PRODUCTS)
def test_cupys_own_products_are_rejected(attempt: Callable[[FakeArray], Any]) -> None:
    with pytest.raises(TypeError, match=r"depend on CUPY_TF32 and copy; use Backend.module"):
        attempt(device())


@cases(MISSING)
def test_unknown_names_raise_attribute_error(attempt: Callable[[FakeArray], Any]) -> None:
    with pytest.raises(AttributeError):
        attempt(device())


ALLOWED: dict[str, Callable[[Any, Any], Any]] = {
    "Python numbers": lambda m, a: (2 * a - 1) / 3.0,
    "NumPy scalars": lambda m, a: np.float64(2) * a + np.float32(1),
    "powers": lambda m, a: (-a) ** 2 % 3,
    "bits": lambda m, a: (a.astype(m.uint64) >> m.uint64(1)) ^ m.uint64(5),
    "comparisons": lambda m, a: (a >= 2.0) & (a != 4.0),
    "slices": lambda m, a: a[:, 1:][..., None],
    "one row": lambda m, a: a[1],
    "an array as index": lambda m, a: a[m.arange(2), m.arange(2) + 1],
    "ufunc": lambda m, a: m.maximum(a, 3.0, out=m.zeros((2, 3))),
    "positional out": lambda m, a: m.tanh(a, m.zeros((2, 3))),
    "sum": lambda m, a: m.sum(a, axis=0, out=m.zeros(3)),
    "sum of all": lambda m, a: a.sum() ** 0.5,
    "concatenate": lambda m, a: m.concatenate([a, a], axis=1),
    "methods": lambda m, a: a.transpose(1, 0).reshape(-1).copy(),
}


@pytest.mark.parametrize("expression", ALLOWED.values(), ids=ALLOWED.keys())
def test_allowed_and_equal_to_numpy(expression: Callable[[Any, Any], Any]) -> None:
    actual, expected = expression(xp, device()), np.asarray(expression(np, HOST))
    assert isinstance(actual, FakeArray)
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    assert actual._inner.tobytes() == expected.tobytes()


def test_writes_match_numpy() -> None:
    actual, expected = device(), HOST.copy()
    for m, array in ((xp, actual), (np, expected)):
        array *= 2.0
        array[:, 1] += array[:, 0]
        row = array[0]
        row -= 1.0
        array[m.arange(2), m.arange(2)] = 0.5
        m.tanh(array, out=array)
    assert actual._inner.tobytes() == expected.tobytes()


def test_new_memory_is_poisoned() -> None:
    for dtype in ("float32", "float64"):
        assert np.isnan(xp.empty((2, 3), dtype)._inner).all()
        assert np.isnan(xp.empty_like(device(np.ones(3, dtype)))._inner).all()


def test_the_backend_converts_and_recognises_its_arrays(fake_cupy: Backend) -> None:
    a = xprnn.asarray(HOST, backend="fake_cupy")
    assert isinstance(a, FakeArray) and fake_cupy.owns(a)
    assert not fake_cupy.owns(HOST) and not xprnn.get_backend("numpy").owns(a)
    assert np.array_equal(xprnn.to_numpy(a), HOST)
    layer = build(Case("gru"), "fake_cupy")
    output, h_n = layer(a.reshape(2, 1, 3))
    for array in (output, h_n, *layer.parameters.values(), *layer.grads.values()):
        assert isinstance(array, FakeArray)
    with pytest.raises(TypeError, match="backend 'fake_cupy'"):
        layer(HOST.reshape(2, 1, 3))


def test_a_cell_that_calls_numpy_is_detected(fake_cupy: Backend, monkeypatch: Any) -> None:
    monkeypatch.setattr("xprnn.cells.gru.sigmoid", lambda xp, a: np.tanh(a, out=a))
    case = Case("gru")
    run(build(case), case, draw(case))
    with pytest.raises(TypeError):
        run(build(case, "fake_cupy"), case, draw(case))


def test_a_cell_that_leaves_its_state_unwritten_is_detected(
    fake_cupy: Backend, monkeypatch: Any
) -> None:
    monkeypatch.setattr("xprnn.cells.gru._update", lambda *arrays: None)
    case = Case("gru")
    assert np.isnan(run(build(case, "fake_cupy"), case, draw(case))["output"]).all()
