"""
Cells of papers
===============

Eight cells that xprnn does not contain, each in a dozen lines. Copy one into your program, pass
it to :class:`xprnn.Recurrent` or :class:`xprnn.RecurrentCell`, and change it:
:doc:`/guide/your_own_cell` explains the functions. Each is tested against an implementation in
torch, in float64, with all its gradients.
"""

import math

import xprnn

# %%
# **Li-GRU**: no reset gate, and relu in place of tanh. M. Ravanelli, P. Brakel, M. Omologo, Y.
# Bengio, `Light gated recurrent units for speech recognition <https://arxiv.org/abs/1803.10225>`_
# (2018), here without batch norm.


@xprnn.cell(gates=("z", "n"))
def li_gru(f, x, s):
    """The light GRU."""
    gh = f.recurrent(s.h)
    z = f.sigmoid(x.z + gh.z)
    n = f.relu(x.n + gh.n)
    return n + z * (s.h - n)


# %%
# **Layer norm in an LSTM**: J. L. Ba, J. R. Kiros, G. E. Hinton, `Layer normalization
# <https://arxiv.org/abs/1607.06450>`_ (2016), equations 20 to 22. One norm is over all gates of a
# row together. The paper's bias b is the sum of b1 and b2, so build it with ``bias=False``. The
# gains a1, a2 and a3 begin as random numbers, as all parameters do: set them to 1, as below.


@xprnn.cell(
    gates=("i", "f", "g", "o"),
    states=("h", "c"),
    vectors=(
        *(f"{name}_{gate}" for name in ("a1", "b1", "a2", "b2") for gate in "ifgo"),
        "a3",
        "b3",
    ),
)
def layer_norm_lstm(f, x, s):
    """An LSTM with layer norm."""
    gh = f.recurrent(s.h, bias=False)
    a1, b1 = [f.a1_i, f.a1_f, f.a1_g, f.a1_o], [f.b1_i, f.b1_f, f.b1_g, f.b1_o]
    a2, b2 = [f.a2_i, f.a2_f, f.a2_g, f.a2_o], [f.b2_i, f.b2_f, f.b2_g, f.b2_o]
    both = zip(f.norm([*gh], a1, b1), f.norm([x.i, x.f, x.g, x.o], a2, b2), strict=True)
    i, forget, g, o = (recurrent + given for recurrent, given in both)
    c = f.sigmoid(forget) * s.c + f.sigmoid(i) * f.tanh(g)
    (normed,) = f.norm([c], [f.a3], [f.b3])
    return f.sigmoid(o) * f.tanh(normed), c


# %%
# **Layer norm in a GRU**, from the supplement of the same paper, with z and 1 - z exchanged, as
# in torch.


@xprnn.cell(
    gates=("r", "z", "n"),
    vectors=tuple(f"{name}_{gate}" for name in ("a1", "b1", "a2", "b2") for gate in "rzn"),
)
def layer_norm_gru(f, x, s):
    """A GRU with layer norm."""
    gh = f.recurrent(s.h, bias=False)
    hr, hz = f.norm([gh.r, gh.z], [f.a1_r, f.a1_z], [f.b1_r, f.b1_z])
    xr, xz = f.norm([x.r, x.z], [f.a2_r, f.a2_z], [f.b2_r, f.b2_z])
    (hn,), (xn,) = f.norm([gh.n], [f.a1_n], [f.b1_n]), f.norm([x.n], [f.a2_n], [f.b2_n])
    r, z = f.sigmoid(xr + hr), f.sigmoid(xz + hz)
    n = f.tanh(xn + r * hn)
    return n + z * (s.h - n)


# %%
# **Zoneout**: in training, units keep their value at random. D. Krueger et al., `Zoneout
# <https://arxiv.org/abs/1606.01305>`_ (2017). In eval mode ``f.keep(rate)`` is 1 - rate, the mean
# of the mask.


@xprnn.cell(
    gates=("i", "f", "g", "o"), states=("h", "c"), options={"zoneout_h": 0.1, "zoneout_c": 0.5}
)
def zoneout(f, x, s):
    """An LSTM with zoneout."""
    gh = f.recurrent(s.h)
    c = f.sigmoid(x.f + gh.f) * s.c + f.sigmoid(x.i + gh.i) * f.tanh(x.g + gh.g)
    h = f.sigmoid(x.o + gh.o) * f.tanh(c)
    return s.h + f.keep(f.zoneout_h) * (h - s.h), s.c + f.keep(f.zoneout_c) * (c - s.c)


# %%
# **Recurrent dropout** with one mask for all steps of a sequence: Y. Gal, Z. Ghahramani, `A
# theoretically grounded application of dropout in recurrent neural networks
# <https://arxiv.org/abs/1512.05287>`_ (2016), and the ``recurrent_dropout`` of Keras.


@xprnn.cell(gates=("i", "f", "g", "o"), states=("h", "c"), options={"rate": 0.3})
def recurrent_dropout(f, x, s):
    """An LSTM with dropout of h."""
    gh = f.recurrent(s.h * f.keep(f.rate, per="sequence") / (1 - f.rate))
    c = f.sigmoid(x.f + gh.f) * s.c + f.sigmoid(x.i + gh.i) * f.tanh(x.g + gh.g)
    return f.sigmoid(x.o + gh.o) * f.tanh(c), c


# %%
# **sLSTM**, with one head: exponential gates, which a state m, a running maximum of their
# logarithms that begins at -inf, keeps finite. M. Beck et al., `xLSTM: extended long short-term
# memory <https://arxiv.org/abs/2405.04517>`_ (2024).


@xprnn.cell(gates=("z", "i", "f", "o"), states={"h": 0.0, "c": 0.0, "n": 0.0, "m": -math.inf})
def slstm(f, x, s):
    """The sLSTM with one head."""
    gh = f.recurrent(s.h)
    z, o, i = f.tanh(x.z + gh.z), f.sigmoid(x.o + gh.o), x.i + gh.i
    kept = s.m - f.softplus(-(x.f + gh.f))  # m + log(sigmoid(f))
    m = f.maximum(kept, i)
    i, forget = f.exp(i - m), f.exp(kept - m)
    c, n = forget * s.c + i * z, forget * s.n + i
    return o * c / n, c, n, m


# %%
# **minGRU and minLSTM**: the gates read x alone, so that there is no W_hh. L. Feng et al., `Were
# RNNs all we needed? <https://arxiv.org/abs/2410.01201>`_ (2024).


@xprnn.cell(gates=("z", "n"))
def min_gru(f, x, s):
    """The minGRU."""
    return s.h + f.sigmoid(x.z) * (x.n - s.h)


@xprnn.cell(gates=("h", "f", "i"))
def min_lstm(f, x, s):
    """The minLSTM."""
    forget, i = f.sigmoid(x.f), f.sigmoid(x.i)
    return (forget * s.h + i * x.h) / (forget + i)


# %%
# How far a gradient reaches in each, before any training: the norm of the gradient of a loss at
# the last step, with respect to the state t steps before.

if __name__ == "__main__":
    import matplotlib.pyplot as plt
    import numpy as np

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    norms = (layer_norm_lstm, layer_norm_gru)
    for cell in (li_gru, *norms, zoneout, recurrent_dropout, slstm, min_gru, min_lstm):
        layer = xprnn.Recurrent(cell, 8, 32, seed=0)
        for name, value in layer.parameters.items():
            if name.startswith("a"):  # the gains of a norm
                layer.parameters[name] = layer.xp.ones_like(value)
        x = layer.asarray(np.random.default_rng(0).standard_normal((60, 16, 8)))
        flow = xprnn.gradient_flow(layer, x)
        axes.semilogy(flow.norms[0][::-1], label=repr(cell))
    axes.set(xlabel="steps before the end", ylabel="norm of the gradient")
    axes.legend()
    plt.show()
