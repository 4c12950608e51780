"""Cells of definitions by generated kernels on the fake CuPy, against plain evaluation in float64.

The kernels are compiled for the host, and products are computed by the fake gemmEx.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

import xprnn
from tests.layers import test_defined_layers as layers
from tests.layers.test_defined_layers import NAMES, Case, Problem, build, check, run
from tests.support.definitions import DEFINITIONS
from tests.support.emulator.elementwise import needs_compiler
from tests.support.fake_cupy.cuda import BFLOAT16, LOG
from tests.support.implementations import SelectKernels
from tests.support.tolerances import assert_close
from tests.unit.test_random_definitions import random_definition
from xprnn.backend import Backend

pytestmark = needs_compiler

TYPES = (("float64", None), ("float32", None), ("float32", "float16"), ("float32", "bfloat16"))


@pytest.fixture(autouse=True)
def generated(fake_cupy: Backend, select_kernels: SelectKernels) -> None:
    """Generated kernels on the fake CuPy."""
    select_kernels("pointwise")


@pytest.mark.parametrize("name", NAMES)
def test_forward_and_gradients_equal_torch(name: str, fake_cupy: Backend) -> None:
    case = Case(name, layers=2, directions=2)
    check(case, fake_cupy.name)
    assert LOG.kernels > 0
    check(replace(case, lengths=None, bias=False, states=False), fake_cupy.name)
    check(replace(case, batch_first=True, directions=1), fake_cupy.name)
