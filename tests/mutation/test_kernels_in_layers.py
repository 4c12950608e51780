"""A fault in any one kernel shows in a layer's results, on the fake CuPy and on a GPU.

This shows that the parity suite runs every kernel, and on a GPU the kernels of the table.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import xprnn
from tests.support.cases import Case, build, draw, numpy_run, run
from tests.support.emulator.elementwise import COMPILER
from tests.support.tolerances import assert_close
from xprnn.backend import Backend
from xprnn.kernels.cuda import pointwise


@pytest.fixture(params=["fake_cupy", pytest.param("cupy", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """The fake CuPy, and CuPy if there is a usable GPU, with no kernel built yet."""
    if request.param == "fake_cupy" and COMPILER is None:
        pytest.skip("no g++ to compile the kernels for the host")
    pointwise.build.cache_clear()
    try:
        if request.param == "fake_cupy":
            yield request.getfixturevalue("fake_cupy")
        else:
            yield xprnn.get_backend(request.param)
    except xprnn.BackendUnavailableError as error:
        pytest.skip(str(error))
    finally:
        pointwise.build.cache_clear()


def compare(
    kernel: pointwise.PointwiseKernel, device: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compare all results of a layer of the kernel's cell with NumPy."""
    bias = kernel.name != "gru_forward_gates"  # the kernel for layers without bias
    case = Case(kernel.cell, bias=bias, T=3)
    layer, problem = build(case, device.name), draw(case)
    expected = numpy_run(case, layer, problem)
    with xprnn.use_kernels("pointwise"):
        actual = run(layer, case, problem)
    for name, array in actual.items():
        assert_close(array, expected[name], "float64", name)


@pytest.mark.parametrize("kernel", pointwise.KERNELS, ids=lambda kernel: kernel.name)
def test_a_wrong_kernel_is_detected(
    kernel: pointwise.PointwiseKernel, device: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    compare(kernel, device, monkeypatch)
    written = kernel.outputs[-1].name
    operation = f"{kernel.operation}; {written}[i] = {written}[i] * 1.001"
    monkeypatch.setitem(pointwise.TABLE, kernel.name, kernel._replace(operation=operation))
    pointwise.build.cache_clear()
    with pytest.raises(AssertionError, match="relative error"):
        compare(kernel, device, monkeypatch)
