"""`elementary.h` and `rows.h`, compiled for the host: accuracy, special values, sums over rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.support.emulator.elementwise import HostElementwiseKernel, needs_compiler, with_fault
from xprnn.kernels.cuda import loading

pytestmark = needs_compiler

SOURCE = loading.text("common.h", "elementary.h")
ROWS = loading.text("common.h", "elementary.h", "rows.h")
Elementwise = type[HostElementwiseKernel]
FUNCTIONS: dict[str, tuple[str, Any]] = {  # the expression of a, and the same in NumPy
    "log": ("log_of(a < 0 ? -a : a)", lambda a: np.log(abs(a))),
    "log1p": ("log1p_of(a < 0 ? -a : a)", lambda a: np.log1p(abs(a))),
    "expm1": ("expm1_of(a)", np.expm1),
    "sqrt": ("sqrt_of(a < 0 ? -a : a)", lambda a: np.sqrt(abs(a))),
    "abs": ("abs_of(a)", np.abs),
    "minimum": ("minimum(a, A(0.25))", lambda a: np.minimum(a, 0.25)),
    "minimum of NaN": ("minimum(A(0.25), a)", lambda a: np.minimum(0.25, a)),
    "maximum": ("maximum(a, A(0.25))", lambda a: np.maximum(a, 0.25)),
    "maximum of NaN": ("maximum(A(0.25), a)", lambda a: np.maximum(0.25, a)),
    "clip": ("clip(a, A(-0.5), A(1.5))", lambda a: np.clip(a, -0.5, 1.5)),
    "relu": ("relu(a)", lambda a: np.maximum(a, 0)),
    "leaky_relu": ("leaky_relu(a, A(0.125))", lambda a: np.where(a > 0, a, 0.125 * a)),
    "elu": ("elu(a, A(1.5))", lambda a: np.where(a > 0, a, 1.5 * np.expm1(np.minimum(a, 0)))),
    "softplus": ("softplus(a)", lambda a: np.logaddexp(a, 0)),
    "softsign": ("softsign(a)", lambda a: a / (abs(a) + 1)),
    "hard_sigmoid": (
        "hard_sigmoid(a, A(0.25), A(0.5))",
        lambda a: np.clip(0.25 * a + 0.5, 0, 1),
    ),
}
SPECIAL = [np.nan, np.inf, -np.inf, 0.0, -0.0, 1e3, -1e3]


def check_function(name: str, dtype: str, elementwise: Elementwise = HostElementwiseKernel) -> None:
    """The function to four units in the last place, and NumPy's result for special values."""
    expression, exact = FUNCTIONS[name]
    operation = f"const A a = x[i]; using namespace xprnn; y[i] = {expression}"
    kernel = elementwise("raw A x", "raw A y", operation, "kernel", preamble=SOURCE, no_return=True)
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.normal(0, 3, 2000), rng.uniform(-80, 80, 500), SPECIAL]).astype(dtype)
    actual = np.empty_like(x)
    kernel(x, actual, size=x.size)
    with np.errstate(all="ignore"):
        expected = exact(x.astype(np.longdouble))
        limits = np.finfo(dtype)
        same = (actual == expected) | (np.isnan(actual) & np.isnan(expected))
        close = abs(actual - expected) <= 4 * limits.eps * abs(expected) + limits.tiny
        overflow = np.isinf(actual) & (abs(expected) > limits.max)
    wrong = ~(same | close | overflow)
    assert not wrong.any(), f"{name}: {x[wrong][:3]}, {actual[wrong][:3]}, {expected[wrong][:3]}"


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(name: str, dtype: str) -> None:
    check_function(name, dtype)


FAULTS = {
    "softplus": [
        ("relu(a) + log1p_of(exp_of(-abs_of(a)))", "log1p_of(exp_of(a))"),
        ("relu(a) + log1p_of(exp_of(-abs_of(a)))", "relu(a) + log_of(1 + exp_of(-abs_of(a)))"),
    ],
    "expm1": [("expm1f(a); }", "expf(a) - 1; }")],
    "elu": [("a > 0 ? a : alpha * expm1_of(a)", "a > 0 ? a : alpha * (exp_of(a) - 1)")],
    "relu": [("a < 0 ? A(0) : a", "a > 0 ? a : A(0)")],
    "minimum": [("a < b || a != a ? a : b", "a < b ? a : b")],
    "minimum of NaN": [("a < b || a != a ? a : b", "b < a ? b : a")],
    "maximum": [("a > b || a != a ? a : b", "a > b ? a : b")],
    "leaky_relu": [("a > 0 ? a : slope * a", "a > 0 ? a : slope")],
    "clip": [("minimum(maximum(a, low), high)", "maximum(minimum(a, high), high)")],
    "softsign": [("a / (abs_of(a) + 1)", "a / (a + 1)")],
    "hard_sigmoid": [("clip(alpha * a + beta, A(0), A(1))", "alpha * a + beta")],
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_detected(name: str) -> None:
    for old, new in FAULTS[name]:
        with pytest.raises(AssertionError, match=name):
            check_function(name, "float32", with_fault(old, new))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_sums_over_rows(dtype: str) -> None:
    """Each column once, and one thread that stores the result."""
    operation = (
        "{ using namespace xprnn; A share = 0; "
        "for (int j = first_column(i); j < n; j += STEP) share += x[i / THREADS * n + j]; "
        "sync_row(); const A sum = sum_over_row(share); "
        "if (first_column(i) == 0) y[i / THREADS] += sum; }"
    )
    kernel = HostElementwiseKernel(
        *("int32 n, raw A x", "raw A y", operation, "kernel"), preamble=ROWS, no_return=True
    )
    for N, width in ((1, 1), (3, 7), (2, 300)):
        x = np.arange(N * width, dtype=dtype).reshape(N, width)
        y = np.zeros(N, dtype)
        kernel(width, x, y, size=N * 128, block_size=128)
        np.testing.assert_array_equal(y, x.sum(axis=1))
    for size, block_size in ((128, 64), (100, 128)):
        with pytest.raises(ValueError, match="threads in blocks"):
            kernel(width, x, y, size=size, block_size=block_size)
