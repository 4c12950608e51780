"""RNN, GRU and LSTM layers with torch's arguments, names, shapes and gate order."""

from __future__ import annotations

from ..backend import (
    AnyArray,
    Array,
    BackendName,
    ComputeDTypeLike,
    DTypeLike,
    Nonlinearity,
    Pair,
    PairLike,
    Precision,
)
from ..backend.exports import exported_from
from .arguments import elman, gru, lstm
from .attributes import option
from .layer import _Layer
from .module import file_kind


@exported_from("xprnn")
@file_kind("RNN")
class RNN(_Layer[AnyArray, Array]):
    """Elman layers, h_t = tanh(x_t W_ih' + b_ih + h_{t-1} W_hh' + b_hh), or relu for tanh.

    Arguments, names, shapes and initialisation (uniform within 1/sqrt(H)) are those of
    https://docs.pytorch.org/docs/stable/generated/torch.nn.RNN.html. A layer is in eval mode
    until `train()`. The equations of the gradients are in `xprnn.cells`.

    If inputs arrive one step at a time, `layer.stepper(batch)` is fastest, as it keeps the states;
    a call with T = 1 in eval mode, with one direction on a CPU, computes as a stepper does.

    :param input_size: I, the number of features of x.
    :param hidden_size: H, the number of features of a state.
    :param num_layers: L; layer k > 0 reads the output of layer k-1.
    :param nonlinearity: "tanh" or "relu".
    :param bias: whether there are biases b_ih and b_hh.
    :param batch_first: x and output are (N, T, ...) instead of (T, N, ...); states are the same.
    :param dropout: the probability with which, in train mode, an element of the output of each
        layer except the last is set to zero (the others are divided by 1 - dropout). With one
        layer it has no effect and warns with UserWarning.
    :param bidirectional: D = 2: a second direction processes each row from its end.
    :param backend: "numpy", "cupy", "cupy:N" or "auto"; None: as for `xprnn.get_backend`.
    :param dtype: "float32" or "float64": of x, states, output, parameters and gradients.
    :param precision: "ieee": float32 products are full float32; "tf32" allows a GPU to round their
        operands to 11 significant bits. It has no effect on other dtypes and on the CPU.
    :param compute_dtype: "float16" or "bfloat16" with dtype "float32" is mixed precision: the
        operands of products (x, h, the gates and copies of the weights) have this dtype,
        everything else, such as the arithmetic between products, is float32. None: the dtype. On
        NumPy it computes the same, slowly. float16 gradients below 6e-8 underflow, so scale up the
        gradients passed to `backward` and scale down its results. See `xprnn.core.precision`.
    :param recompute: k, for gradient checkpointing: a recorded call saves the input of each layer
        and the states before every k-th step; `backward` recomputes the rest, k steps at a time.
        None: everything is saved. It changes memory and time (see `explain`) and the order of sums
        in gradients. It may be set between calls, `layer.recompute = k`, and is not saved to files.
    :param seed: of the initial parameters and the dropout masks; None draws one.
    :raises TypeError, ValueError: an argument is invalid.

    >>> import numpy as np, xprnn
    >>> rnn = xprnn.RNN(3, 4, seed=0).train()
    >>> output, h_n = rnn(np.ones((5, 2, 3), np.float32))
    >>> output.shape, h_n.shape
    ((5, 2, 4), (1, 2, 4))
    >>> dx, dh0 = rnn.backward(np.ones_like(output))
    >>> dx.shape, rnn.grads["weight_hh_l0"].shape
    ((5, 2, 3), (4, 4))
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: Nonlinearity = "tanh",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        *,
        backend: BackendName | None = None,
        dtype: DTypeLike = "float32",
        precision: Precision = "ieee",
        compute_dtype: ComputeDTypeLike | None = None,
        recompute: int | None = None,
        seed: int | None = None,
    ) -> None:
        options = {
            "input_size": input_size,
            "hidden_size": hidden_size,
            "num_layers": num_layers,
            "nonlinearity": nonlinearity,
            "bias": bias,
            "batch_first": batch_first,
            "dropout": dropout,
            "bidirectional": bidirectional,
            "seed": seed,
        }
        self._construct(options, backend, dtype, precision, compute_dtype, recompute=recompute)

    nonlinearity: Nonlinearity = option("nonlinearity", '"tanh" or "relu".')
    _cell = staticmethod(elman)


@exported_from("xprnn")
@file_kind("GRU")
class GRU(_Layer[AnyArray, Array]):
    """Gated recurrent layers: h_t = (1 - z) n + z h_{t-1}, in one of two forms.

    With σ the logistic function and ⊙ the element-wise product::

        r = σ(x W_ir' + b_ir + h W_hr' + b_hr)
        z = σ(x W_iz' + b_iz + h W_hz' + b_hz)
        n = tanh(x W_in' + b_in + r ⊙ (h W_hn' + b_hn))      reset_after=True, as torch
        n = tanh(x W_in' + b_in + (r ⊙ h) W_hn' + b_hn)      reset_after=False, Cho et al. 2014

    Names, shapes, gate order r z n and initialisation are those of
    https://docs.pytorch.org/docs/stable/generated/torch.nn.GRU.html; the second form is the
    default of https://onnx.ai/onnx/operators/onnx__GRU.html (`linear_before_reset=0`).

    :param input_size: I, the number of features of x.
    :param hidden_size: H, the number of features of a state.
    :param num_layers: L; layer k > 0 reads the output of layer k-1.
    :param bias: whether there are biases b_ih and b_hh.
    :param batch_first: x and output are (N, T, ...) instead of (T, N, ...); states are the same.
    :param dropout: the probability with which, in train mode, an element of the output of each
        layer except the last is set to zero; see `RNN`.
    :param bidirectional: D = 2: a second direction processes each row from its end.
    :param reset_after: selects the form, see above.
    :param backend: "numpy", "cupy", "cupy:N" or "auto"; None: as for `xprnn.get_backend`.
    :param dtype: "float32" or "float64": of x, states, output, parameters and gradients.
    :param precision: "ieee" or, to allow a GPU to round operands, "tf32"; see `RNN`.
    :param compute_dtype: "float16" or "bfloat16" for mixed precision; None: the dtype; see `RNN`.
    :param recompute: k: `backward` recomputes k steps at a time, to save memory; see `RNN`.
    :param seed: of the initial parameters and the dropout masks; None draws one.
    :raises TypeError, ValueError: an argument is invalid.

    If inputs arrive one step at a time, `layer.stepper(batch)` is fastest: see `RNN`.

    >>> import numpy as np, xprnn
    >>> gru = xprnn.GRU(3, 4, bidirectional=True, batch_first=True, seed=0)
    >>> output, h_n = gru(np.ones((2, 5, 3), np.float32), lengths=[5, 3])
    >>> output.shape, h_n.shape, bool((output[1, 3:] == 0).all())
    ((2, 5, 8), (2, 2, 4), True)
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        *,
        reset_after: bool = True,
        backend: BackendName | None = None,
        dtype: DTypeLike = "float32",
        precision: Precision = "ieee",
        compute_dtype: ComputeDTypeLike | None = None,
        recompute: int | None = None,
        seed: int | None = None,
    ) -> None:
        options = {
            "input_size": input_size,
            "hidden_size": hidden_size,
            "num_layers": num_layers,
            "bias": bias,
            "batch_first": batch_first,
            "dropout": dropout,
            "bidirectional": bidirectional,
            "reset_after": reset_after,
            "seed": seed,
        }
        self._construct(options, backend, dtype, precision, compute_dtype, recompute=recompute)

    reset_after: bool = option("reset_after", "Which form of the GRU this is.")
    _cell = staticmethod(gru)


@exported_from("xprnn")
@file_kind("LSTM")
class LSTM(_Layer[PairLike, Pair]):
    """Long short-term memory layers; the state is a pair (h, c).

    With σ the logistic function and ⊙ the element-wise product::

        i, f, o = σ(x W_i*' + b_i* + h W_h*' + b_h*)      g = tanh(x W_ig' + b_ig + h W_hg' + b_hg)
        c_t = f ⊙ c_{t-1} + i ⊙ g                         h_t = o ⊙ tanh(c_t)

    Names, shapes, gate order i f g o and initialisation are those of
    https://docs.pytorch.org/docs/stable/generated/torch.nn.LSTM.html.

    :param input_size: I, the number of features of x.
    :param hidden_size: H, the number of features of a state.
    :param num_layers: L; layer k > 0 reads the output of layer k-1.
    :param bias: whether there are biases b_ih and b_hh.
    :param batch_first: x and output are (N, T, ...) instead of (T, N, ...); states are the same.
    :param dropout: the probability with which, in train mode, an element of the output of each
        layer except the last is set to zero; see `RNN`.
    :param bidirectional: D = 2: a second direction processes each row from its end.
    :param backend: "numpy", "cupy", "cupy:N" or "auto"; None: as for `xprnn.get_backend`.
    :param dtype: "float32" or "float64": of x, states, output, parameters and gradients.
    :param precision: "ieee" or, to allow a GPU to round operands, "tf32"; see `RNN`.
    :param compute_dtype: "float16" or "bfloat16" for mixed precision; None: the dtype; see `RNN`.
    :param recompute: k: `backward` recomputes k steps at a time, to save memory; see `RNN`.
    :param seed: of the initial parameters and the dropout masks; None draws one.
    :raises TypeError, ValueError: an argument is invalid.

    If inputs arrive one step at a time, `layer.stepper(batch)` is fastest: see `RNN`.

    >>> import numpy as np, xprnn
    >>> lstm = xprnn.LSTM(3, 4, num_layers=2, dropout=0.1, seed=0).train()
    >>> output, (h_n, c_n) = lstm(np.ones((5, 2, 3), np.float32))
    >>> dx, (dh0, dc0) = lstm.backward(None, (np.ones_like(h_n), None))
    >>> dc0.shape
    (2, 2, 4)
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        *,
        backend: BackendName | None = None,
        dtype: DTypeLike = "float32",
        precision: Precision = "ieee",
        compute_dtype: ComputeDTypeLike | None = None,
        recompute: int | None = None,
        seed: int | None = None,
    ) -> None:
        options = {
            "input_size": input_size,
            "hidden_size": hidden_size,
            "num_layers": num_layers,
            "bias": bias,
            "batch_first": batch_first,
            "dropout": dropout,
            "bidirectional": bidirectional,
            "seed": seed,
        }
        self._construct(options, backend, dtype, precision, compute_dtype, recompute=recompute)

    _cell = staticmethod(lstm)
