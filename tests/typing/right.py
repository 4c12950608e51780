"""Users' code that type checkers must accept; see `test_typing.py`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import xprnn
import xprnn.nn.stepper
from xprnn import feature_first, functional, optim
from xprnn.backend import Array, BackendName

x: NDArray[np.float32] = np.ones((5, 2, 3), np.float32)

# Layers
rnn = xprnn.RNN(3, 4, 2, "relu", dropout=0.5, precision="tf32", recompute=2)
gru = xprnn.GRU(3, 4, backend="numpy", dtype="float32", compute_dtype="bfloat16", seed=0).train()
lstm = xprnn.LSTM(3, 4, backend="cupy:1", dtype=np.float64)
xprnn.GRU(3, 4, backend="auto", dtype=np.dtype("float32"), compute_dtype=np.float16)
xprnn.GRU(3, 4, backend=None, compute_dtype=None, seed=None, recompute=None)

output, h_n = gru(x)
output, h_n = gru(x, h_n, lengths=[5, 3])
output, h_n = gru(output, None, lengths=np.array([5, 3]))
dx, dh0 = gru.backward(output, h_n)
dx, dh0 = gru.backward(None, h_n)
dx, dh0 = gru.backward(output)
print(dx.shape, dh0.shape)
no_dx, _ = gru.backward(output, need_dx=False)
assert no_dx is None

output, (h, c) = lstm(x)
output, (h, c) = lstm(x, (h, c), lengths=(5, 3))
output, (h, c) = lstm(x, (h, None))
dx, (dh, dc) = lstm.backward(None, (h, None))

# Results are arrays, with the attributes of NumPy's
first, last, length = output[0], output[-1, :, 2:], len(output)
steps, batch, width = output.shape
total: float = output.sum()
largest = output.max(axis=2, keepdims=True)
shifted = 2.0 * output - (output + 1) / 3 + output @ output.T
output *= 2
output[0] = 0.0
positive = (output > 0).any() and (output == output).all()
moved = output.astype(np.float64).reshape(-1, width).transpose(1, 0).copy()
print(output.dtype.name, output.ndim, output.size, output.tolist(), float(output[0, 0, 0]))
annotated: Array = output

# and NumPy's functions accept them
np.linalg.norm(output)
np.concatenate([h[-1], c[-1]], axis=1)
np.stack([h, c])
np.tanh(output)
np.zeros_like(output)
np.argmax(output, axis=-1)
np.testing.assert_allclose(output, 0.0)
np.save("output.npy", output)
on_host: NDArray[np.float32] = xprnn.to_numpy(output)
same: Array = np.zeros(3)

# Cells
cell, lstm_cell = xprnn.GRUCell(3, 4, reset_after=False), xprnn.LSTMCell(3, 4)
h_next = cell(x[0], h[0])
dx, dh = cell.backward(np.ones_like(h_next))
h_1, c_1 = lstm_cell(x[0], (h[0], None))
dx, (dh, dc) = lstm_cell.backward((h_1, c_1))
xprnn.RNNCell(3, 4, nonlinearity="relu")(x[0]).mean()
xprnn.RNNCell.from_weights(np.eye(2), np.eye(2), nonlinearity="relu")

# Read-outs, losses, optimisers
linear, embedding = xprnn.Linear(4, 2, bias=False).train(), xprnn.Embedding(10, 3, padding_idx=0)
logits = linear(h_n[-1])
loss, dlogits = xprnn.softmax_cross_entropy(logits, [0, 1], ignore_index=-1)
loss, dprediction = xprnn.mse_loss(logits, np.zeros_like(logits))
dfeatures = linear.backward(dlogits)
print(embedding([[0, 1], [2, 3]]).shape)
embedding(np.array([0, 1]))
embedding.backward(dfeatures)
adam = optim.Adam([gru, linear], lr=1e-3, betas=(0.9, 0.99))
adam.lr = 0.1
decay = xprnn.optim.CosineDecay(adam, steps=10)
norm = optim.clip_grad_norm([gru], 1.0) * 2
rate: float = decay.lr_max

# Parameters, files, backends
gru.parameters["weight_ih_l0"] = np.ones((12, 3))
gru.grads["weight_ih_l0"][...] *= 0.5
weights: Mapping[str, Array] = gru.state_dict()
gru.load_state_dict(weights)
gru.load_state_dict({"weight_ih_l0": np.ones((12, 3))})
with gru.writable() as flat:
    flat *= 0.5
gru.save(Path("gru.safetensors"))
loaded: xprnn.GRU = xprnn.GRU.load("gru.safetensors", backend="cupy")
anything = xprnn.load("gru.safetensors")
anything(x)
lstm.to("cupy:0", dtype="float32").to(precision="ieee", compute_dtype="float16").eval()
xprnn.asarray(x, backend=gru.backend.name, dtype="int64")
xprnn.asarray([[1.0, 2.0]])


def choose(device: int | None) -> BackendName:
    return "numpy" if device is None else "cupy"


with xprnn.use_backend(choose(0)) as selected:
    print(selected.name, xprnn.get_backend().describe())

# Streams
stepper = gru.stepper(2)
y = stepper.step(x[0], rows=[0])
y = stepper.step(x[0], rows=np.array([True, False]), out=y)
state: Array = stepper.state()
stepper.load(state)
h_last, c_last = lstm.stepper(1).state()
either: xprnn.nn.stepper.Stepper = lstm.stepper(1)

# Functions
output, h_n = functional.gru(x, None, np.ones((12, 3)), np.ones((12, 4)), lengths=[1, 2])
output, (h, c) = functional.lstm(x, (h, None), np.ones((16, 3)), np.ones((16, 4)))
output, h_n, cache = functional.rnn_forward(x, h_n, np.eye(4), np.eye(4), nonlinearity="tanh")
gradients = functional.rnn_backward(output, None, cache)
print(gradients["dx"].shape)
a, y_pred, caches = feature_first.rnn_forward(x, h_n, {"Wax": np.eye(3)})

# Checks
print(xprnn.gradcheck(gru, x).worst.excess, xprnn.gradcheck(lstm, x, (h, c), lengths=[5, 1]).rows)
print(xprnn.gradient_flow(lstm, x, dhx=(h, None)).norms.shape)
print(xprnn.verify(gru, (5, 2, 3)).ok)


class Tagger(xprnn.GRU):
    """A subclass with modules of its own."""

    def __init__(self, tags: list[str]) -> None:
        super().__init__(3, 4, batch_first=True)
        self.head = xprnn.Linear(4, len(tags))

    def tag(self, x: NDArray[np.float32]) -> Array:
        return self.head(self(x)[0])
