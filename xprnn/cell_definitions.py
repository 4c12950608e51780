"""The definitions of cells that are part of xprnn, because files ask for them.

They are the built-in cells with other activation functions, a clipping threshold, peepholes,
coupled gates or a projection. `RNN`, `GRU` and `LSTM` run them where they have `activations` or a
`proj_size`; `xprnn.Recurrent` and `xprnn.RecurrentCell` run all of them, with these options:

`activations` (tuple)
    The functions f, g and h of https://onnx.ai/onnx/operators/onnx__LSTM.html, names in snake case:
    of the RNN f; of the GRU f for r and z, g for n; of the LSTM f for i, f and o, g for g, h for c
    where it makes the output. A name with parameters is a tuple: ("leaky_relu", 0.2),
    ("hard_sigmoid", 0.25, 0.5), ("thresholded_relu", 1.0), ("elu", 1.0), ("affine", 2.0, 0.5),
    ("scaled_tanh", 1.7159, 0.6667).
`clip_threshold` (float)
    The arguments of f and g are clipped to within -threshold and threshold, as ONNX Runtime does.
    0: no clipping. The specification says that clipping is applied to the input of activations,
    which can also be read as clipping c, the argument of h: here c is not clipped.

Files of such layers are loaded without `cells=`.
"""

from .cells.shipped import (  # noqa: F401
    coupled_lstm,
    coupled_peephole_lstm,
    gru,
    gru_reset_before,
    lstm,
    peephole_lstm,
    projected_lstm,
    rnn,
)
