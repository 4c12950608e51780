"""ONNX Runtime's RNN, GRU and LSTM with any attributes, on arrays in ONNX's layout."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any

import numpy as np

from xprnn.tools.bench.onnx import (
    IR_VERSION,
    OPSET,
    _attribute,
    _bytes,
    _number,
    _value,
    _varint,
)

FLOAT32 = 1
INPUTS = {
    "RNN": ("X", "W", "R", "B", "sequence_lens", "initial_h"),
    "GRU": ("X", "W", "R", "B", "sequence_lens", "initial_h"),
    "LSTM": ("X", "W", "R", "B", "sequence_lens", "initial_h", "initial_c", "P"),
}


def run(
    operator: str, attributes: Mapping[str, Any], arrays: Mapping[str, np.ndarray]
) -> list[np.ndarray]:
    """Y (T, D, N, H), Y_h (D, N, H) and for the LSTM Y_c, in float32.

    :param arrays: some of `INPUTS`, by name.
    """
    import onnxruntime

    given = {name: np.asarray(array, np.float32) for name, array in arrays.items()}
    if "sequence_lens" in given:
        raise ValueError("sequence_lens: not supported here")
    outputs = ["Y", "Y_h", "Y_c"][: 2 + (operator == "LSTM")]
    names = [name if name in given else "" for name in INPUTS[operator]]
    node = b"".join(
        [
            *(_bytes(1, name) for name in names),
            *(_bytes(2, name) for name in outputs),
            _bytes(4, operator),
            *(_bytes(5, _encoded(name, value)) for name, value in attributes.items()),
        ]
    )
    graph = b"".join(
        [
            _bytes(1, node),
            _bytes(2, "one_operator"),
            *(_bytes(11, _value(name, FLOAT32, array.shape)) for name, array in given.items()),
            *(_bytes(12, _bytes(1, name)) for name in outputs),
        ]
    )
    model = _number(1, IR_VERSION) + _bytes(7, graph) + _bytes(8, _number(2, OPSET))
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    results: list[np.ndarray] = session.run(outputs, given)
    return results


def _encoded(name: str, value: Any) -> bytes:
    """An AttributeProto."""
    if isinstance(value, float):
        return _bytes(1, name) + _float(2, value) + _number(20, 1)
    if isinstance(value, str):
        return _bytes(1, name) + _bytes(4, value) + _number(20, 3)
    if isinstance(value, list) and isinstance(value[0], float):
        return _bytes(1, name) + b"".join(_float(7, each) for each in value) + _number(20, 6)
    return _attribute(name, value)


def _float(field: int, value: float) -> bytes:
    return _varint(field << 3 | 5) + struct.pack("<f", value)
