"""Accuracy of float32 products by 3xTF32, on tensor cores that round sums toward zero.

The emulator's mma truncates as the hardware does. The bound is relative to sum |w_k| |h_k|, the
terms of a product, in units of u = 2^-24, for positive data, whose truncation errors all have one
sign:

- A value has 24 significant bits, its high part 11, its low part the other 13, of which a product
  reads 11. The product of the low parts is left out: a low part is uniform in 2^-10 of the value's
  power of two, and the mean value is 1.5 times that power, so 2^-22 / 2.25 = 1.8 u. The truncation
  of a low part is 3.5 / 4 of 2^-23 of that power on average, in each of two operands:
  2 * 0.875 / 1.5 * 2^-23 = 2.3 u.
- A k-block of 16 terms is two sums of parts of its high terms, each truncated to 24 bits, by half
  of 2^-23 of its power of two on average: 2/3 u for the second, half as much for the first; and 8
  products, truncated at two more bits: 8 / 2 * 2^-25 of a sum's power of two: 1.3 u. Total 2.3 u.
- The sums of P k-blocks and W warps are added with rounding: P + W errors, each within u of a
  partial sum, whose squares are u^2 / 3 times 1/3 of the total's: 6 deviations are
  2 sqrt(P + W) u.

So 6.4 u on average, and (6.4 + 2 sqrt(P + W)) u at most.
"""

from __future__ import annotations

import numpy as np
import pytest

from tests.support.emulated_sequences import run_forward
from tests.support.emulator.build import Faults
from tests.support.emulator.elementwise import needs_compiler
from tests.support.emulator.sequence import Tiling
from tests.support.sequence_cases import Case

pytestmark = needs_compiler
U = 2.0**-24


def error(tiling: Tiling, H: int, faults: Faults = ()) -> float:
    """The largest error of a GRU step's saved gh_n, relative to the sum of its terms, in U."""
    case = Case("gru", tiling.kind, H, (1,) * 8, bias=False)
    for name in ("weight_hh", "h0"):
        case.numbers[name] = np.abs(case.numbers[name])
    result = run_forward(case, tiling, faults=faults)
    assert result.outcome == "fine"
    weights, h0 = case.wide("weight_hh")[2 * H :], case.layout.sort(case.wide("h0"))
    exact = h0 @ weights.T
    return float(np.max(np.abs(result.arrays["saved"] - exact) / exact)) / U


@pytest.mark.parametrize(("warps", "k_blocks", "H"), [(1, 16, 256), (2, 8, 256), (4, 2, 128)])
def test_products_are_as_accurate_as_float32_allows(warps: int, k_blocks: int, H: int) -> None:
    tiling = Tiling("gru", "training", "TF32X3", warps, k_blocks, k_blocks, 1)
    actual, most = error(tiling, H), 6.4 + 2 * np.sqrt(k_blocks + warps)
    assert actual <= most, f"{actual:.1f} u, at most {most:.1f} u"


def test_a_sum_carried_from_block_to_block_is_detected() -> None:
    """It also shows that mma rounds toward zero: rounding to nearest would give 32 u."""
    tiling = Tiling("gru", "training", "TF32X3", 1, 16, 16, 1)
    carried_sum = (
        ("block_sum[i] = zero_after(before[i]);", "block_sum[i] = c[i];"),
        ("c[i] += block_sum[i];", "c[i] = block_sum[i];"),
    )
    assert error(tiling, 256, carried_sum) > 60
