"""`recompute=k`: gradient checkpointing gives the results of a layer that saves everything.

`test_footprint.py` measures that less memory is kept.
"""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import xprnn
from tests.support.cases import TORCH_CELLS, Case, Results, build, draw, product, run
from tests.support.implementations import each
from tests.support.numba_cases import SEQUENCE, needs_numba
from tests.support.targets import LAYERS, assert_same, make, normal, state_of
from tests.support.tolerances import assert_close, error_of
from tests.support.torch_cases import torch_run
from xprnn.backend import Backend
from xprnn.diagnostics.gradient_check import gradcheck
from xprnn.diagnostics.gradient_norms import gradient_flow
from xprnn.diagnostics.tolerances import REORDERED
from xprnn.engine import checkpointing

T = Case("gru").T
STEPS = (1, 4, T, T + 3)  # per segment: one, no divisor of T, all, more than T
MATRIX = tuple(
    product(
        cell=tuple(LAYERS),
        layers=(1, 2),
        directions=(1, 2),
        batch_first=(False, True),
        bias=(True, False),
        lengths=("full", "ragged", "zero"),
        states=(True, False),
    )
)


def run_in_segments(case: Case, k: int | None, backend: str = "numpy") -> Results:
    """A case run in segments of k steps."""
    layer = build(case, backend)
    layer.recompute = k
    return run(layer, case, draw(case))


def assert_equal(actual: Results, expected: Results, what: str, bound: float = REORDERED) -> None:
    assert actual.keys() == expected.keys()
    for name, values in expected.items():
        error = error_of(actual[name], values)
        assert error <= bound, f"{what}: {name}: relative error {error:.2e}"


def check(case: Case, steps: tuple[int, ...] = STEPS, backend: str = "numpy") -> None:
    """Fail unless segments change only the order of sums."""
    expected = run_in_segments(case, None, backend)
    assert expected["output"].any() and expected["dx"].any()
    for k in steps:
        assert_equal(run_in_segments(case, k, backend), expected, f"{case} in {k}")


@each(MATRIX, backend=False)
def test_only_the_order_of_sums_changes(case: Case, implementation: str) -> None:
    check(case)


@pytest.mark.parametrize(
    "case", [*product(cell=tuple(LAYERS), layers=(3,), directions=(1, 2))], ids=str
)
@pytest.mark.parametrize("lengths", ["full", "ragged"])
def test_the_same_elements_are_dropped(case: Case, lengths: str, implementation: str) -> None:
    check(replace(case, dropout=0.5, lengths=lengths))


@pytest.mark.parametrize("k", [1, 4])
@pytest.mark.parametrize(
    "case",
    [*product(cell=TORCH_CELLS, layers=(2,), directions=(2,), lengths=("full", "ragged"))],
    ids=str,
)
def test_segments_equal_torch(case: Case, k: int, implementation: str) -> None:
    pytest.importorskip("torch")
    layer, problem = build(case), draw(case)
    layer.recompute = k
    expected = torch_run(case, layer, problem)
    for name, values in run(layer, case, problem).items():
        assert_close(values, expected[name], "float64", f"{case}: {name}")


@needs_numba
@pytest.mark.parametrize("kernels", ["pointwise", "sequence"])
@pytest.mark.parametrize("cell", SEQUENCE)
def test_segments_with_numba_kernels(cell: str, kernels: str) -> None:
    with xprnn.use_kernels(kernels):
        for lengths in ("full", "ragged", "zero"):
            check(Case(cell, 2, 2, lengths=lengths, dropout=0.5), (1, 4))


@pytest.mark.parametrize("compute_dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("cell", LAYERS)
def test_segments_in_low_precision(cell: str, compute_dtype: str) -> None:
    """States in the compute dtype are passed from segment to segment unchanged."""
    if compute_dtype == "bfloat16":
        pytest.importorskip("ml_dtypes", reason="bfloat16 needs ml_dtypes")
    case = Case(cell, 2, 2, dtype="float32", lengths="ragged", compute_dtype=compute_dtype)
    expected = run_in_segments(case, None)
    for name, values in run_in_segments(case, 4).items():
        reference = expected[name].astype(np.float64)
        assert_close(values, reference, "float32", f"{case}: {name}", compute_dtype)


@pytest.mark.parametrize("cell", LAYERS)
def test_segments_on_another_backend(cell: str, any_backend: Backend) -> None:
    check(Case(cell, 2, 2, lengths="ragged", dropout=0.5), (4,), any_backend.name)


@pytest.mark.parametrize("cell", ["rnn_tanh", "gru", "lstm"])
def test_segments_with_the_sequence_kernels_of_a_gpu(cell: str, device: Backend) -> None:
    case = Case(cell, 2, 2, dtype="float32", lengths="ragged", dropout=0.5)
    expected = run_in_segments(case, None)
    for name, values in run_in_segments(case, 4, device.name).items():
        assert_close(values, expected[name].astype(np.float64), "float32", f"{case}: {name}")


# -- bits


def exact(layer: Any) -> Any:
    """A layer whose input products are exact in any order, for an x of small integers."""
    for name, array in layer.state_dict().items():
        if name.startswith("weight_ih"):
            layer.parameters[name] = np.round(8 * array) / 8
    return layer


def assert_same_bits(cell: str, directions: int) -> None:
    x = np.round(4 * normal(0, 7, 3, 3))
    layer = exact(make(cell, bias=False, bidirectional=directions == 2))
    expected = layer(x, lengths=[7, 5, 7])
    for k in STEPS:
        layer.recompute = k
        assert_same(layer(x, lengths=[7, 5, 7]), expected)


@pytest.mark.usefixtures("reference")
@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("cell", LAYERS)
def test_results_have_the_same_bits(cell: str, directions: int) -> None:
    assert_same_bits(cell, directions)


@needs_numba
@pytest.mark.parametrize("cell", SEQUENCE)
def test_compiled_results_have_the_same_bits(cell: str) -> None:
    with xprnn.use_kernels("sequence"):
        assert_same_bits(cell, 2)


def test_two_runs_have_the_same_bits(implementation: str) -> None:
    case = Case("gru", 2, 2, lengths="ragged", dropout=0.5)
    first, second = run_in_segments(case, 4), run_in_segments(case, 4)
    assert_same(list(first.values()), list(second.values()))


# -- recorded calls


def test_backward_uses_the_segments_of_its_call(implementation: str) -> None:
    """Each call records its segments: `recompute` may change between calls and before backward."""
    gradients = []
    for steps in ((None, None, None), (2, None, 3)):
        layer = make("lstm", num_layers=2)
        outputs = []
        for k, T in zip(steps, (5, 1, 8), strict=True):
            layer.recompute = k
            outputs.append(layer(normal(T, T, 3, 3))[0])
        layer.recompute = 1
        gradients.append([layer.backward(output)[0] for output in outputs[::-1]])
        gradients[-1] += layer.grads.values()
    for one, other in zip(*gradients, strict=True):
        assert error_of(one, other) <= REORDERED


def test_gradients_are_accumulated(implementation: str) -> None:
    case = Case("gru", 2, 2)
    once, twice = build(case), build(case)
    once.recompute = twice.recompute = 4
    problem = draw(case)
    run(once, case, problem)
    for _ in range(2):
        run(twice, case, problem)
    for name, gradient in once.grads.items():
        assert error_of(twice.grads[name], 2 * gradient) <= REORDERED


def test_frozen_parameters_and_no_dx(implementation: str) -> None:
    layer, other = make("gru", num_layers=2), make("gru", num_layers=2, recompute=2)
    x = normal(0, 5, 3, 3)
    for one in (layer, other):
        one.freeze("weight_hh_l0", "bias_ih_l1")
        output, _ = one(x)
        assert one.backward(output, need_dx=False)[0] is None
        assert not one.grads["weight_hh_l0"].any() and not one.grads["bias_ih_l1"].any()
    assert error_of(other.grads.flat, layer.grads.flat) <= REORDERED


@pytest.mark.parametrize(("steps", "rows"), [(0, 3), (4, 0), (0, 0)])
@pytest.mark.parametrize("name", LAYERS)
def test_calls_without_steps_or_rows(name: str, steps: int, rows: int, implementation: str) -> None:
    layer = make(name, bidirectional=True, recompute=2)
    start = normal(0, 2, rows, 5)
    hx = (start, start + 1.0) if name == "lstm" else start
    output, final = layer(normal(1, steps, rows, 3), hx)
    dx, dinitial = layer.backward(output, final)
    assert dx.shape == (steps, rows, 3)
    assert_same(final, hx)
    assert_same(dinitial, hx)
    assert not layer.grads.flat.any()


def test_eval_mode_uses_no_segments(monkeypatch: pytest.MonkeyPatch, implementation: str) -> None:
    layer = make("gru", recompute=2).eval()
    monkeypatch.setattr(checkpointing.Checkpointed, "_forward", None)
    assert layer(normal(0, 5, 3, 3))[0].shape == (5, 3, 5)
    with pytest.raises(TypeError):
        layer.train()(normal(0, 5, 3, 3))


@pytest.mark.parametrize("cell", LAYERS)
def test_gradients_equal_finite_differences(cell: str, implementation: str) -> None:
    layer = make(cell, num_layers=2, bidirectional=True, dropout=0.3, recompute=2)
    gradcheck(layer, normal(0, 5, 3, 3), lengths=[5, 2, 4])  # raises where one differs


def test_gradient_flow_is_the_same(implementation: str) -> None:
    layer = make("lstm", num_layers=2, bidirectional=True, recompute=3)
    x = normal(0, 7, 3, 3)
    checkpointed = gradient_flow(layer, x, lengths=[7, 2, 5])
    layer.recompute = None
    saved_all = gradient_flow(layer, x, lengths=[7, 2, 5])
    assert error_of(checkpointed.norms, saved_all.norms) <= REORDERED


# -- the option


@pytest.mark.parametrize("kind", [xprnn.RNN, xprnn.GRU, xprnn.LSTM])
def test_copies_keep_the_option_and_files_do_not(kind: Any, tmp_path: Path) -> None:
    layer = kind(3, 4, recompute=np.int64(7), seed=0)
    assert layer.recompute == 7 and type(layer.recompute) is int
    assert "recompute=7" in repr(layer) and eval(repr(layer), {kind.__name__: kind}).recompute == 7
    for other in (copy.copy(layer), copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert other.recompute == 7
    assert layer.to(dtype="float64").recompute == 7
    assert "recompute" not in layer.options
    layer.save(tmp_path / "layer.safetensors")
    assert xprnn.load(tmp_path / "layer.safetensors").recompute is None
    assert "recompute=None" in repr(kind(3, 4, seed=0))


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (0, ValueError, "recompute: expected at least 1, got 0"),
        (-3, ValueError, "recompute: expected at least 1, got -3"),
        (2.0, TypeError, r"recompute: expected an integer, got 2\.0"),
        (True, TypeError, "recompute: expected an integer, got True"),
        ("all", TypeError, "recompute: expected an integer, got 'all'"),
    ],
)
def test_recompute_must_be_a_positive_integer(value: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=f"^{message}$"):
        xprnn.GRU(3, 4, recompute=value)
    layer = make("gru", recompute=2)
    before = state_of(layer)
    with pytest.raises(error, match=f"^{message}$"):
        layer.recompute = value
    assert layer.recompute == 2
    assert_same(state_of(layer), before)
