"""ONNX models of one recurrent layer, encoded directly: the protobuf message has a dozen fields.

https://onnx.ai/onnx/operators/ (RNN, GRU, LSTM), https://github.com/onnx/onnx/blob/main/onnx/onnx.proto
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

OPSET, IR_VERSION = 14, 8  # RNN, GRU and LSTM with the inputs and outputs used here
ELEMENT_TYPES = {"float32": 1, "float16": 10, "float64": 11}
FLOAT, INT, STRING, STRINGS = 1, 2, 3, 8  # of attributes
OPERATORS: dict[str, tuple[str, tuple[int, ...], dict[str, Any]]] = {
    # cell: operator, its gates' indices in torch's order (r z n; i f g o), attributes
    "rnn_tanh": ("RNN", (0,), {"activations": ["Tanh"]}),
    "rnn_relu": ("RNN", (0,), {"activations": ["Relu"]}),
    "gru": ("GRU", (1, 0, 2), {"linear_before_reset": 1}),
    "gru_reset_before": ("GRU", (1, 0, 2), {"linear_before_reset": 0}),
    "lstm": ("LSTM", (0, 3, 1, 2), {}),
}


def model(cell: str, weights: Mapping[str, np.ndarray], shape: tuple[int, int, int]) -> bytes:
    """A model from x, of `shape` (T, N, I), to y (T, 1, N, H), in the weights' dtype.

    :param cell: a key of `OPERATORS`.
    :param weights: weight_ih_l0 (G*H, I), weight_hh_l0 (G*H, H), bias_ih_l0 and bias_hh_l0
        (G*H,), in torch's gate order; float16, float32 or float64.
    """
    T, N, _ = shape
    H = weights["weight_hh_l0"].shape[1]
    return _model(cell, weights, {"x": shape}, ("y",), (T, 1, N, H))


def step_model(
    cell: str, weights: Mapping[str, np.ndarray], shape: tuple[int, int], states: Sequence[str]
) -> bytes:
    """A model of one step: from x (1, N, I) and the states to the next states, each (1, N, H).

    :param shape: (N, I).
    :param states: ("h",) or ("h", "c"); the results are named "h_next" and "c_next".
    """
    H = weights["weight_hh_l0"].shape[1]
    state = (1, shape[0], H)
    inputs = {"x": (1, *shape), **dict.fromkeys(states, state)}
    return _model(cell, weights, inputs, ("", *(f"{name}_next" for name in states)), state)


def _model(
    cell: str,
    weights: Mapping[str, np.ndarray],
    inputs: Mapping[str, Sequence[int]],
    outputs: Sequence[str],
    result: Sequence[int],
) -> bytes:
    """A model of one operator; outputs have the shape `result`, unnamed ones are omitted."""
    operator, order, attributes = OPERATORS[cell]
    H = weights["weight_hh_l0"].shape[1]

    def reordered(name: str) -> np.ndarray:
        blocks = np.split(weights[name], len(order))
        return np.concatenate([blocks[gate] for gate in order])[None]

    biases = np.concatenate([reordered("bias_ih_l0"), reordered("bias_hh_l0")], axis=1)
    tensors = {"W": reordered("weight_ih_l0"), "R": reordered("weight_hh_l0"), "B": biases}
    element = ELEMENT_TYPES[biases.dtype.name]
    x, *states = inputs
    operands = [x, *tensors, *(["", *states] if states else [])]  # "": no sequence_lens
    node = b"".join(
        [
            *(_bytes(1, name) for name in operands),
            *(_bytes(2, name) for name in outputs),
            _bytes(4, operator),
            *(_bytes(5, _attribute(k, v)) for k, v in {"hidden_size": H, **attributes}.items()),
        ]
    )
    graph = b"".join(
        [
            _bytes(1, node),
            _bytes(2, cell),
            *(_bytes(5, _tensor(name, array)) for name, array in tensors.items()),
            *(_bytes(11, _value(name, element, shape)) for name, shape in inputs.items()),
            *(_bytes(12, _value(name, element, result)) for name in outputs if name),
        ]
    )
    return _number(1, IR_VERSION) + _bytes(7, graph) + _bytes(8, _number(2, OPSET))


def _tensor(name: str, array: np.ndarray) -> bytes:
    """A TensorProto with little-endian data."""
    little = array.astype(array.dtype.newbyteorder("<"))
    head = _numbers(1, array.shape) + _number(2, ELEMENT_TYPES[array.dtype.name])
    return head + _bytes(8, name) + _bytes(9, little.tobytes())


def _value(name: str, element: int, shape: Sequence[int]) -> bytes:
    """A ValueInfoProto: the type and shape of an input or output."""
    dimensions = b"".join(_bytes(1, _number(1, length)) for length in shape)
    tensor = _number(1, element) + _bytes(2, dimensions)
    return _bytes(1, name) + _bytes(2, _bytes(1, tensor))


def _attribute(name: str, value: int | list[str]) -> bytes:
    """An AttributeProto of an integer or a list of names."""
    if isinstance(value, int):
        return _bytes(1, name) + _number(3, value) + _number(20, INT)
    return _bytes(1, name) + b"".join(_bytes(9, item) for item in value) + _number(20, STRINGS)


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _numbers(field: int, values: Iterable[int]) -> bytes:
    return b"".join(_number(field, value) for value in values)


def _bytes(field: int, value: bytes | str) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return _varint(field << 3 | 2) + _varint(len(raw)) + raw


def _varint(value: int) -> bytes:
    """Seven bits per byte, the lowest first, the top bit set in all bytes but the last."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
