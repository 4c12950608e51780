"""Code that type checkers must reject: one error on each marked line, and no others."""

from __future__ import annotations

from pathlib import Path

import numpy as np

import xprnn
from xprnn import functional, optim

x = np.ones((5, 2, 3), np.float32)
gru, lstm, cell, lstm_cell = (
    xprnn.GRU(3, 4),
    xprnn.LSTM(3, 4),
    xprnn.GRUCell(3, 4),
    xprnn.LSTMCell(3, 4),
)
output, h_n = gru(x)

# Results are arrays
text: str = gru(x)[0]  # error
text = output  # error
text = cell(x[0])  # error
text = xprnn.Linear(3, 4)(x)  # error
text = gru.state_dict()["weight_ih_l0"]  # error
text = gru.stepper(2).step(x[0])  # error
number: int = xprnn.to_numpy(output)  # error
output.no_such_method()  # error
Path(output)  # error

# Tuples have a fixed length
output, h, c = lstm(x)  # error
lstm(x)[1].sum()  # error
lstm.stepper(2).state().sum()  # error
lstm_cell(x[0]).sum()  # error
gru.backward(output, need_dx=False)[0].sum()  # error

# Backends and dtypes
xprnn.GRU(3, 4, backend="gpu")  # error
xprnn.GRU(3, 4, backend="cuda:0")  # error
xprnn.GRU(3, 4, dtype="float23")  # error
xprnn.GRU(3, 4, dtype="float16")  # error
xprnn.GRU(3, 4, dtype=None)  # error
xprnn.LSTM(3, 4, precision="tf64")  # error
xprnn.LSTM(3, 4, compute_dtype="float8")  # error
xprnn.LSTM(3, 4, nonlinearity="relu")  # error
xprnn.RNN(3, 4, nonlinearity="sigmoid")  # error
xprnn.RNNCell(3, 4, nonlinearity="gelu")  # error
xprnn.Linear(3, 4, backend="torch")  # error
xprnn.Embedding(3, 4, dtype="int32")  # error
xprnn.GRU("3", 4)  # error
xprnn.GRU(3, 4, batchfirst=True)  # error
gru.to("gpu")  # error
gru.to(dtype="double")  # error
xprnn.load("gru.safetensors", backend="gpu")  # error
xprnn.get_backend("tpu")  # error
xprnn.use_backend("tpu")  # error
xprnn.asarray(x, dtype="float23")  # error
functional.rnn(x, None, x, x, nonlinearity="gelu")  # error

# Arguments are arrays
gru("abc")  # error
gru([[1.0, 2.0]])  # error
gru(x, (h_n, h_n))  # error
gru(x, lengths="52")  # error
lstm(x, h_n)  # error
lstm(x, (h_n, h_n, h_n))  # error
lstm.backward(output, h_n)  # error
lstm_cell.backward(h_n)  # error
gru.stepper("2")  # error
gru.stepper(2).step("abc")  # error
lstm.stepper(2).load(h_n)  # error
functional.lstm(x, h_n, x, x)  # error
functional.gru("abc", None, x, x)  # error
xprnn.mse_loss(output, 1.0)  # error
xprnn.gradcheck(lstm, x, "abc")  # error
xprnn.verify(xprnn.Linear(3, 4), (5, 2, 3))  # error
gru.load_state_dict({"weight_ih_l0": "abc"})  # error
gru.parameters["weight_ih_l0"] = "abc"  # error
optim.SGD([gru], lr="0.1")  # error
optim.SGD([x], lr=0.1)  # error
optim.clip_grad_norm(gru, 1.0)  # error

# Only public names exist
xprnn.GRUcell(3, 4)  # error
xprnn.optim.Adagrad([gru])  # error
