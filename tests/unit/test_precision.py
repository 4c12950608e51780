"""The arguments `precision` and `compute_dtype`: accepted values, and what preserves them."""

from __future__ import annotations

import copy
import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import xprnn
from tests.support.targets import make
from xprnn.core.precision import check_precision_policy

pytest.importorskip("ml_dtypes")

LOW_PRECISION = ("float16", "bfloat16")


@pytest.mark.parametrize("name", LOW_PRECISION)
def test_copies_keep_the_types_and_files_do_not(name: str, tmp_path: Path) -> None:
    layer = make("gru", dtype="float32", compute_dtype=name)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert other.arithmetic == layer.arithmetic
    assert f"compute_dtype='{name}'" in repr(layer)
    layer.save(tmp_path / "m.safetensors")
    loaded = xprnn.load(tmp_path / "m.safetensors")
    assert not loaded.arithmetic.is_mixed
    assert loaded.to(compute_dtype=name).arithmetic == layer.arithmetic


def test_to_changes_the_types() -> None:
    layer = make("gru", dtype="float32", compute_dtype="bfloat16")
    assert str(layer.arithmetic) == "float32 with bfloat16"
    assert str(layer.to(compute_dtype="float16").arithmetic) == "float32 with float16"
    assert str(layer.to("numpy").arithmetic) == "float32 with float16"
    assert str(layer.to(compute_dtype="float32", precision="tf32").arithmetic) == (
        "float32 with tf32"
    )
    assert str(layer.to(precision="ieee", dtype="float64").arithmetic) == "float64"
    layer.to(dtype="float32")
    layer(np.ones((2, 1, 3), np.float32))
    with pytest.raises(RuntimeError, match="recorded calls wait"):
        layer.to(compute_dtype="float16")
    assert str(layer.arithmetic) == "float32"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"compute_dtype": "int8"}, "compute_dtype: expected 'float32' or 'float16' or 'bfloat16'"),
        ({"compute_dtype": 16}, "compute_dtype: expected .*got 16"),
        ({"compute_dtype": "float64"}, "compute_dtype: expected 'float32' or"),
        ({"dtype": "float64", "compute_dtype": "float16"}, "compute_dtype: expected 'float64'"),
        ({"precision": "high"}, "precision: expected 'ieee' or 'tf32', got 'high'"),
        ({"precision": None}, "precision: expected 'ieee' or 'tf32', got None"),
        ({"precision": ""}, "precision: expected 'ieee' or 'tf32', got ''"),
        ({"dtype": "float64", "precision": "tf32"}, "precision: 'tf32' requires float32 products"),
        ({"compute_dtype": "float16", "precision": "tf32"}, "precision: 'tf32' requires float32"),
        ({"dtype": "float16"}, "dtype: expected dtype float32 or float64"),
    ],
)
def test_invalid_types_and_combinations_are_refused(options: dict[str, Any], message: str) -> None:
    for name in ("gru", "lstm_cell"):
        with pytest.raises(ValueError, match=message):
            make(name, **{"dtype": "float32", **options})
    layer = make("gru", dtype="float32")
    if options.get("precision", "") is not None:  # `to` leaves it unchanged for None
        with pytest.raises(ValueError, match=message):
            layer.to(**options)
    assert str(layer.arithmetic) == "float32"


def test_compute_dtype_may_be_a_type_or_a_dtype() -> None:
    for dtype in (np.float16, np.dtype("float16"), "float16"):
        assert str(make("gru", dtype="float32", compute_dtype=dtype).arithmetic.compute_dtype) == (
            "float16"
        )
    bfloat16 = check_precision_policy("float32", "bfloat16", "ieee").compute_dtype
    for dtype in (bfloat16, bfloat16.type):
        layer = make("gru", dtype="float32", compute_dtype=dtype)
        assert layer.arithmetic.compute_dtype == bfloat16


def test_bfloat16_without_its_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    with pytest.raises(ValueError, match="pip install ml_dtypes"):
        make("gru", dtype="float32", compute_dtype="bfloat16")
    assert make("gru", dtype="float32", compute_dtype="float16").arithmetic.is_mixed


def test_tf32_changes_nothing_on_the_cpu() -> None:
    x = np.random.default_rng(0).standard_normal((4, 3, 3), np.float32)
    exact, allowed = (make("gru", dtype="float32", precision=p)(x)[0] for p in ("ieee", "tf32"))
    assert np.array_equal(exact, allowed)
