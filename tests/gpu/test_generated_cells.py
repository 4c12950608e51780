"""Generated kernels on a GPU: the host's tests with the same bounds.

On the host there is one thread for each row, without barriers, and exp, log and tanh differ.
"""

from __future__ import annotations

import pytest

from tests.kernels.cuda.fake.test_generated_cells import TYPES, by_plain_code, test_every_type
from tests.layers.test_defined_layers import NAMES, Case, Problem, assert_equal, build, run
from tests.support.implementations import SelectKernels
from xprnn.backend import Backend

pytestmark = [pytest.mark.gpu, pytest.mark.parametrize("backend", ["cupy"], indirect=True)]
every_type = test_every_type
del test_every_type  # which is collected here, with the backend of the host's tests


@pytest.mark.parametrize(("dtype", "compute_dtype"), TYPES)
@pytest.mark.parametrize("name", NAMES)
def test_every_definition_in_every_type(
    name: str,
    dtype: str,
    compute_dtype: str | None,
    backend: Backend,
    select_kernels: SelectKernels,
) -> None:
    select_kernels("pointwise")
    every_type(name, dtype, compute_dtype, backend)


@pytest.mark.parametrize("name", NAMES)
def test_rows_with_more_columns_than_threads(
    name: str, backend: Backend, select_kernels: SelectKernels
) -> None:
    """In two calls, with equal bits."""
    select_kernels("pointwise")
    case = Case(name, N=33, H=301, lengths=None)
    problem = Problem(case, build(case, backend.name))
    results = [run(case, build(case, backend.name), problem) for _ in range(2)]
    assert_equal(results[0], by_plain_code(case, build(case, backend.name), problem), 1e-9)
    assert_equal(results[1], results[0], 0.0)
