"""The selected kernels on a CUDA backend, and the launches and allocations of a step."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

import xprnn
from tests.support.emulator.elementwise import needs_compiler
from tests.support.fake_cupy.cuda import BFLOAT16, LOG
from tests.support.implementations import SelectKernels
from tests.support.targets import LAYERS, MODULES, arguments, make
from xprnn.backend import Backend
from xprnn.kernels.cuda import pointwise

IMPLEMENTATIONS = (pytest.param("pointwise", marks=needs_compiler), "reference")
PRODUCTS = {"gru_reset_before": 2}  # per step; 1 for the others


def moved(backend: Backend, inputs: dict[str, np.ndarray]) -> dict[str, Any]:
    return {name: backend.from_host(array) for name, array in inputs.items()}


def call(module: Any, inputs: dict[str, Any], upstream: bool = True) -> tuple[Any, ...]:
    """Forward and backward; the counts of each: kernels, products, other launches, new arrays."""
    states = tuple(inputs[name] for name in ("h", "c", "h0", "c0") if name in inputs)
    counted = []
    for part in (
        lambda: module(inputs["x"], states if len(states) > 1 else states[0]),
        lambda: module.backward(inputs["doutput"] if upstream else None, dstates(inputs)),
    ):
        LOG.clear()
        part()
        counted.append(np.array([LOG.kernels, LOG.products, LOG.others, len(LOG.memory)]))
    return tuple(counted)


def dstates(inputs: dict[str, Any]) -> Any:
    gradients = tuple(inputs[name] for name in ("dh_n", "dc_n") if name in inputs)
    return gradients if len(gradients) > 1 else gradients[0]


def per_step(
    backend: Backend, name: str, upstream: bool = True, **options: Any
) -> tuple[np.ndarray, np.ndarray]:
    """What one more step adds to forward and to backward: a long call minus a short one."""
    counted = []
    for T in (9, 4):
        layer = make(name, backend=backend.name, **options)
        inputs = moved(backend, arguments(layer, T=T))
        for _ in range(3):  # until the workspace has its final size
            counts = call(layer, inputs, upstream)
        counted.append(counts)
    return tuple((long - short) / 5 for long, short in zip(*counted, strict=True))


def stated_launches(layer: Any) -> tuple[int, int, int]:
    """The launches of a step according to `explain`: forward, backward, and for the output."""
    text = layer.explain((4, 3, 3))
    match = re.search(r"takes (\d+) launches forward, (\d+) backward and (one) more", text)
    assert match, text
    return int(match[1]), int(match[2]), 1


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("compute_dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("name", LAYERS)
@needs_compiler
def test_a_fused_step_only_launches_kernels_and_products(
    name: str, compute_dtype: str, bias: bool, fake_cupy: Backend, select_kernels: SelectKernels
) -> None:
    if compute_dtype == "bfloat16" and BFLOAT16 is None:
        pytest.skip("ml_dtypes is not installed: NumPy has no bfloat16")
    select_kernels("pointwise")
    options = {"dtype": "float32", "compute_dtype": compute_dtype, "bias": bias}
    count = PRODUCTS.get(name, 1)
    per_forward, per_backward = per_step(fake_cupy, name, **options)
    assert per_forward.tolist() == [count, count, 0, 0]
    assert per_backward.tolist() == [count, count, 1, 0]
    _, per_backward = per_step(fake_cupy, name, upstream=False, **options)
    assert per_backward.tolist() == [count, count, 0, 0]


@needs_compiler
def test_an_allocating_step_is_detected(
    fake_cupy: Backend, monkeypatch: pytest.MonkeyPatch, select_kernels: SelectKernels
) -> None:
    def wasteful(xp: Any, name: str, shape: tuple[int, int], *arrays: Any) -> None:
        pointwise.launch(xp, name, shape, *[array.copy() for array in arrays[:1]], *arrays[1:])

    select_kernels("pointwise")
    monkeypatch.setattr("xprnn.kernels.cuda.cells.launch", wasteful)
    per_forward, per_backward = per_step(fake_cupy, "lstm")
    assert per_forward.tolist() == [1, 1, 1, 1]
    assert per_backward.tolist() == [1, 1, 2, 1]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", LAYERS)
def test_explain_states_the_launches_of_a_step(
    name: str, implementation: str, fake_cupy: Backend, select_kernels: SelectKernels
) -> None:
    select_kernels(implementation)
    forward, backward, output = stated_launches(make(name, backend=fake_cupy.name))
    per_forward, per_backward = per_step(fake_cupy, name)
    _, without = per_step(fake_cupy, name, upstream=False)
    assert per_forward[:3].sum() == forward
    assert per_backward[:3].sum() == backward + output
    assert without[:3].sum() == backward
    assert per_forward[3] == per_backward[3] == 0
    assert (per_forward[0] > 0) == (per_backward[0] > 0) == (implementation == "pointwise")


# -- the selected kernels


@pytest.mark.parametrize(
    ("forced", "expected", "reason"),
    [
        pytest.param("auto", "pointwise", "the fastest of 2", marks=needs_compiler),
        pytest.param("", "pointwise", "the fastest of 2", marks=needs_compiler),
        pytest.param("pointwise", "pointwise", "pointwise", marks=needs_compiler),
        ("reference", "reference", "reference"),
    ],
)
@pytest.mark.parametrize("name", MODULES)
def test_the_kernel_table_selects_by_name(
    name: str,
    forced: str,
    expected: str,
    reason: str,
    fake_cupy: Backend,
    select_kernels: SelectKernels,
) -> None:
    select_kernels(forced or "auto")
    module = make(name, backend=fake_cupy.name)
    inputs = arguments(module)
    lines = module.explain(inputs["x"].shape).splitlines()
    assert lines[0].endswith(f" N=3: {expected}") and re.search(f"  reason: .*{reason}", lines[1])
    assert any(re.match(f"  sequence: (no kernel|not yet run|.*{reason})", line) for line in lines)
    assert any(line.startswith("  pointwise: ") for line in lines) == (expected == "reference")
    LOG.clear()
    hx = [fake_cupy.from_host(inputs[key]) for key in ("h", "c", "h0", "c0") if key in inputs]
    module(fake_cupy.from_host(inputs["x"]), tuple(hx) if len(hx) > 1 else hx[0])
    assert (LOG.kernels > 0) == (expected == "pointwise")


@pytest.mark.parametrize("name", MODULES)
def test_sequence_kernels_cannot_be_forced(
    name: str, fake_cupy: Backend, select_kernels: SelectKernels
) -> None:
    module = make(name, backend=fake_cupy.name)
    inputs = arguments(module)
    x = fake_cupy.from_host(inputs["x"])
    select_kernels("sequence")
    LOG.clear()
    for attempt in (lambda: module(x), lambda: module.explain(x.shape)):
        with pytest.raises(xprnn.KernelUnavailableError, match=r"sequence\W*: [ft]"):
            attempt()
    assert not LOG.launches
