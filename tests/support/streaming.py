"""Cases of streaming, and a layer's sequence taken one step at a time."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

import xprnn
from tests.support.cases import LAYERS, Case, Problem, build, draw, move, product, widened
from tests.support.targets import normal
from tests.support.tolerances import assert_close, error_of
from xprnn.diagnostics.tolerances import STEPWISE

EXACT = STEPWISE  # what streaming promises in float64, of the largest element
TYPES = (("float64", None), ("float32", None), ("float32", "float16"), ("float32", "bfloat16"))
MATRIX = tuple(
    replace(case, dtype=dtype, compute_dtype=narrow)
    for case in product(cell=LAYERS, layers=(1, 3), bias=(True, False), N=(1, 4))
    for dtype, narrow in TYPES
    if case.bias or case.cell != "rnn_relu" or not narrow  # rounding decides at its kink
)


def make(case: Case, backend: str = "numpy") -> Any:
    return build(case, backend).eval()


def states(given: Any) -> tuple[Any, ...]:
    return given if isinstance(given, tuple) else (given,)


def packed(given: tuple[Any, ...]) -> Any:
    return given if len(given) > 1 else given[0]


def on_host(stepper: Any, arrays: Any) -> list[np.ndarray]:
    return [np.array(stepper.backend.to_host(array)) for array in states(arrays)]


def sides(stepper: Any) -> list[np.ndarray]:
    """Every bit of a stepper's states, narrow ones as they are."""
    return on_host(stepper, stepper._steps.sides[stepper._side])


def assert_same(found: list[np.ndarray], expected: list[np.ndarray]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.tobytes() == other.tobytes()


def stream(stepper: Any, x: np.ndarray) -> np.ndarray:
    """The results (T, N, H) of x (T, N, I), on the host."""
    backend = stepper.backend
    return np.stack([backend.to_host(stepper.step(move(backend, x_t))) for x_t in x])


def expected(case: Case, layer: Any, problem: Problem) -> tuple[np.ndarray, ...]:
    """The layer's output, h_n and c_n in float64 on NumPy, from the same numbers."""
    wide = type(layer)(**layer.options, dtype="float64", backend="numpy")
    wide.load_state_dict(layer.state_dict())
    given = widened(problem)
    with xprnn.use_kernels("reference"):
        output, final = wide(given.x, packed(given.initial))
    return output, *states(final)


def assert_streams(case: Case, layer: Any) -> None:
    """Fail unless a stepper from h0 gives what the layer's sequence gives, and its final state."""
    problem = draw(case)
    stepper = layer.stepper(case.N)
    stepper.load(move(layer.backend, *problem.initial))
    found = [stream(stepper, problem.x)]
    found += [layer.backend.to_host(state) for state in states(stepper.state())]
    for name, one, other in zip(
        ("y", "h", "c"), found, expected(case, layer, problem), strict=False
    ):
        sizes = {"width": max(case.I, case.H) + case.H, "layers": case.layers}
        assert_close(one, other, case.dtype, name, case.compute_dtype, **sizes)
        if case.dtype == "float64":
            assert error_of(one, other) <= EXACT, name


# -- streams that come and go


def serve(layer: Any, x: list[np.ndarray], starts: list[int], steps: int) -> list[np.ndarray]:
    """Three streams in two rows: each enters a row that is reset for it, and waits now and then.

    Stream k of x[k] (T_k, I) begins at step starts[k] in row k % 2.
    """
    backend, stepper = layer.backend, layer.stepper(2)
    at, found = [0] * len(x), [[] for _ in x]
    for t in range(steps):
        batch, rows = np.full((2, x[0].shape[1]), np.inf, x[0].dtype), []
        serving = {}
        for k, own in enumerate(x):
            if t == starts[k]:
                stepper.reset([k % 2])
            here = t >= starts[k] and at[k] < len(own) and (t + k) % 3
            if here:
                batch[k % 2] = own[at[k]]
                rows.append(k % 2)
                serving[k % 2] = k
        y = backend.to_host(stepper.step(move(backend, batch), rows=rows))
        for row, k in serving.items():
            found[k].append(y[row])
            at[k] += 1
    return [np.stack(own) for own in found]


STARTS, LENGTHS, STEPS = [1, 0, 12], [5, 9, 6], 24


def assert_streams_apart(case: Case, layer: Any) -> None:
    """Fail unless each of three streams in two rows is a sequence of its own.

    Rows that wait hold infinities in x: nobody reads them.
    """
    x = [draw(case).x[:1].repeat(n, 0)[:, k % 4] * (1 + k) for k, n in enumerate(LENGTHS)]
    x = [a + normal(k, *a.shape).astype(a.dtype) for k, a in enumerate(x)]
    with np.errstate(over="ignore"):  # of the infinities, which narrow types round
        found = serve(layer, x, STARTS, STEPS)
    for own, y in zip(x, found, strict=True):
        alone = stream(layer.stepper(1), own[:, None])[:, 0]
        assert y.shape == alone.shape
        if case.compute_dtype:  # the products' sums may differ in a bit that rounding decides about
            np.testing.assert_allclose(y, alone, atol=2e-3)
        else:
            np.testing.assert_allclose(y, alone, rtol=1e-11, atol=1e-13)
