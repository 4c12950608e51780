"""Cases of streaming, and checks of a layer's sequence run one step at a time."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

import xprnn
from tests.support.cases import LAYERS, Case, Problem, as_float64, build, draw, move, product
from tests.support.targets import normal
from tests.support.tolerances import assert_close, error_of
from xprnn.diagnostics.tolerances import STEPWISE

EXACT = STEPWISE  # documented error in float64, relative to the largest element
TYPES = (("float64", None), ("float32", None), ("float32", "float16"), ("float32", "bfloat16"))
MATRIX = tuple(
    replace(case, dtype=dtype, compute_dtype=compute_dtype)
    for case in product(cell=LAYERS, layers=(1, 3), bias=(True, False), N=(1, 4))
    for dtype, compute_dtype in TYPES
    if case.bias or case.cell != "rnn_relu" or not compute_dtype  # rounding decides there
)


def make(case: Case, backend: str = "numpy") -> Any:
    return build(case, backend).eval()


def states(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


def packed(arrays: tuple[Any, ...]) -> Any:
    return arrays if len(arrays) > 1 else arrays[0]


def on_host(stepper: Any, arrays: Any) -> list[np.ndarray]:
    return [np.array(stepper.backend.to_host(array)) for array in states(arrays)]


def sides(stepper: Any) -> list[np.ndarray]:
    """Copies of a stepper's states, in their own dtype."""
    return on_host(stepper, stepper._steps.sides[stepper._side])


def assert_same(actual: list[np.ndarray], expected: list[np.ndarray]) -> None:
    for one, other in zip(actual, expected, strict=True):
        assert one.tobytes() == other.tobytes()


def stream(stepper: Any, x: np.ndarray) -> np.ndarray:
    """The results (T, N, H) of x (T, N, I), on the host."""
    backend = stepper.backend
    return np.stack([backend.to_host(stepper.step(move(backend, x_t))) for x_t in x])


def expected(case: Case, layer: Any, problem: Problem) -> tuple[np.ndarray, ...]:
    """The layer's output, h_n and c_n in float64 on NumPy, from the same values."""
    reference_layer = type(layer)(**layer.options, dtype="float64", backend="numpy")
    reference_layer.load_state_dict(layer.state_dict())
    reference_problem = as_float64(problem)
    with xprnn.use_kernels("reference"):
        output, final = reference_layer(reference_problem.x, packed(reference_problem.initial))
    return output, *states(final)


def assert_streams(case: Case, layer: Any) -> None:
    """Fail unless a stepper from h0 gives the layer's outputs and final states."""
    problem = draw(case)
    stepper = layer.stepper(case.N)
    stepper.load(move(layer.backend, *problem.initial))
    actual = [stream(stepper, problem.x)]
    actual += [layer.backend.to_host(state) for state in states(stepper.state())]
    for name, one, other in zip(
        ("y", "h", "c"), actual, expected(case, layer, problem), strict=False
    ):
        sizes = {"width": max(case.I, case.H) + case.H, "layers": case.layers}
        assert_close(one, other, case.dtype, name, case.compute_dtype, **sizes)
        if case.dtype == "float64":
            assert error_of(one, other) <= EXACT, name


# -- streams that start and end


def run_streams(layer: Any, x: list[np.ndarray], starts: list[int], steps: int) -> list[np.ndarray]:
    """Three streams in two rows, with pauses; a row is reset when a stream starts in it.

    Stream k of x[k] (T_k, I) begins at step starts[k] in row k % 2.
    """
    backend, stepper = layer.backend, layer.stepper(2)
    at, outputs = [0] * len(x), [[] for _ in x]
    for t in range(steps):
        batch, rows = np.full((2, x[0].shape[1]), np.inf, x[0].dtype), []
        stream_of_row = {}
        for k, own in enumerate(x):
            if t == starts[k]:
                stepper.reset([k % 2])
            active = t >= starts[k] and at[k] < len(own) and (t + k) % 3
            if active:
                batch[k % 2] = own[at[k]]
                rows.append(k % 2)
                stream_of_row[k % 2] = k
        y = backend.to_host(stepper.step(move(backend, batch), rows=rows))
        for row, k in stream_of_row.items():
            outputs[k].append(y[row])
            at[k] += 1
    return [np.stack(own) for own in outputs]


STARTS, LENGTHS, STEPS = [1, 0, 12], [5, 9, 6], 24


def assert_streams_apart(case: Case, layer: Any) -> None:
    """Fail unless each of three streams in two rows equals a separate sequence.

    Rows of x that pause contain infinities, which must not be read.
    """
    x = [draw(case).x[:1].repeat(n, 0)[:, k % 4] * (1 + k) for k, n in enumerate(LENGTHS)]
    x = [a + normal(k, *a.shape).astype(a.dtype) for k, a in enumerate(x)]
    with np.errstate(over="ignore"):  # infinities are converted to the dtype
        outputs = run_streams(layer, x, STARTS, STEPS)
    for own, y in zip(x, outputs, strict=True):
        alone = stream(layer.stepper(1), own[:, None])[:, 0]
        assert y.shape == alone.shape
        if case.compute_dtype:  # sums of products may differ by rounding
            np.testing.assert_allclose(y, alone, atol=2e-3)
        else:
            np.testing.assert_allclose(y, alone, rtol=1e-11, atol=1e-13)
