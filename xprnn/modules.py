"""The layers: RNN, GRU and LSTM with torch's arguments, names, shapes and gate order."""

from __future__ import annotations

from typing import Any

from .arguments import check_call, check_upstream, elman, gru, lstm, unwrap
from .backend import Array
from .recurrent import _Recurrent
from .stepper import Stepper


class _Layer(_Recurrent):
    """The calls of a layer: any number of steps, layers and directions."""

    def __call__(self, x: Array, hx: Any = None, *, lengths: Any = None) -> tuple[Array, Any]:
        """Run the layer over a batch of sequences.

        In train mode the call is recorded for `backward`. The arrays returned are the caller's.

        :param x: (T, N, I), with `batch_first` (N, T, I), unbatched (T, I); the layer's dtype
            and backend (CuPy takes what another library lends on its device by DLPack), any
            strides; only read.
        :param hx: h0 (L*D, N, H), unbatched (L*D, H); for an LSTM (h0, c0). None: zeros.
        :param lengths: N host integers from 0 to T, in any order: how many steps each row has.
            Past a row's end x is not read and the output is zero; the reverse direction starts
            at each row's own end. None: all T.
        :return: output (T, N, D*H), laid out as x, and h_n (L*D, N, H), for an LSTM (h_n, c_n):
            the state of each row after its own last step; h0 where it has none.
        :raises TypeError: an argument has another type, dtype or backend.
        :raises ValueError: an argument has another shape, or lengths leave 0..T.
        :raises MemoryError: there is not enough; nothing is recorded, and what the call took is
            free again though the error is kept.
        """
        call = check_call(
            self._stack, self.backend, self.dtype, x, hx, lengths, self.options["batch_first"]
        )
        output, final = self._run(call)
        return unwrap(output, final, call.batched)

    def backward(
        self, doutput: Array | None = None, dhx: Any = None, *, need_dx: bool = True
    ) -> tuple[Array | None, Any]:
        """Undo the last recorded call: gradients of a scalar L given those of its results.

        The parameters' gradients are added to `grads`. Several recorded calls are undone last
        one first. An error in the arguments leaves the record in place.

        :param doutput: dL/doutput, of the output's shape; None: zeros. Only read.
        :param dhx: dL/dh_n, of h_n's shape; for an LSTM (dh_n, dc_n), either may be None: zeros.
        :param need_dx: False: dx is not computed, and None is returned in its place.
        :return: dx of x's shape, zero past a row's end, and dh0 (for an LSTM (dh0, dc0)).
        :raises RuntimeError: no recorded call is left, or the parameters have changed since.
        :raises TypeError, ValueError: a gradient has not the type or shape of what it belongs to.

        >>> import numpy as np, xprnn
        >>> rnn = xprnn.RNN(1, 1, nonlinearity="relu", bias=False, dtype="float64").train()
        >>> rnn.load_state_dict({"weight_ih_l0": np.ones((1, 1)), "weight_hh_l0": np.eye(1) / 2})
        >>> output, h_n = rnn(np.ones((3, 1)))
        >>> output.ravel().tolist()
        [1.0, 1.5, 1.75]
        >>> dx, dh0 = rnn.backward(None, np.ones_like(h_n))
        >>> dx.ravel().tolist(), rnn.grads["weight_hh_l0"].item()
        ([0.25, 0.5, 1.0], 2.0)
        """
        record = self._last_record()
        tape, batched = record.tape, record.batched
        doutput, dfinal = check_upstream(
            self._stack,
            self.backend,
            self.dtype,
            tape.shape,
            tape.layout.batch,
            batched,
            doutput,
            dhx,
        )
        return unwrap(*self._undo(doutput, dfinal, need_dx), batched)

    def stepper(self, batch: int) -> Stepper:
        """The layer one step at a time, for streams: see `xprnn.stepper.Stepper`.

        :param batch: N, how many streams go side by side, each begun and ended on its own.
        :raises ValueError: the layer is bidirectional.

        >>> import numpy as np, xprnn
        >>> stepper = xprnn.LSTM(3, 4, num_layers=2, seed=0).stepper(2)
        >>> for _ in range(5):
        ...     y = stepper.step(np.ones((2, 3), np.float32))  # y_t (2, 4)
        >>> stepper.reset([1])  # another stream begins in row 1
        >>> h, c = stepper.state()
        >>> h.shape, bool(h[:, 0].any()), bool(h[:, 1].any())
        ((2, 2, 4), True, False)
        """
        return Stepper(self, batch)

    def _steps_and_batch(self, shape: tuple[int, ...]) -> tuple[int, int]:
        if len(shape) not in (2, 3):
            raise ValueError(f"shape: expected (T, N, I) or (T, I), got {shape}")
        first, second = (*shape[:-1], 1)[:2]
        swapped = self.options["batch_first"] and len(shape) == 3
        return (second, first) if swapped else (first, second)


class RNN(_Layer):
    """Elman layers, h_t = tanh(x_t W_ih' + b_ih + h_{t-1} W_hh' + b_hh), or relu for tanh.

    Arguments, names, shapes and initialisation (uniform within 1/sqrt(H)) are those of
    https://docs.pytorch.org/docs/stable/generated/torch.nn.RNN.html; in eval mode until
    `train()`. The equations of the gradient stand in `xprnn.cells`.

    :param input_size: I, features of x.
    :param hidden_size: H, features of the state.
    :param num_layers: L; layer k > 0 reads the output of layer k-1.
    :param nonlinearity: "tanh" or "relu".
    :param bias: whether there are b_ih and b_hh.
    :param batch_first: x and output are (N, T, ...) instead of (T, N, ...); states never are.
    :param dropout: probability with which, in train mode, an element of the output of every
        layer but the last is set to zero (the others are divided by 1 - dropout).
    :param bidirectional: D = 2: a second direction reads each row from its end.
    :param backend: "numpy", "cupy", "cupy:N" or "auto"; None: as for `xprnn.get_backend`.
    :param dtype: "float32" or "float64": of x, states, output, parameters and gradients.
    :param precision: "ieee": float32 products are exact to rounding; "tf32" allows a GPU to
        round their operands to 11 significant bits. Other dtypes and the CPU are always exact.
    :param compute_dtype: "float16" or "bfloat16" beside dtype "float32" is mixed precision:
        products read x, h, the gates and copies of the weights in the narrow type, everything
        else, the arithmetic between products too, stays float32. None: the dtype. On NumPy it
        computes the same, slowly; float16 gradients below 6e-8 vanish, so scale the gradients
        that go into `backward` up and those that come out down. See `xprnn.arithmetic`.
    :param seed: of the initial parameters and the dropout masks; None draws one.
    :raises TypeError, ValueError: an argument is none of these.

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
        nonlinearity: str = "tanh",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        *,
        backend: str | None = None,
        dtype: Any = "float32",
        precision: str = "ieee",
        compute_dtype: Any = None,
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
        self._begin(options, backend, dtype, precision, compute_dtype)

    _cell = staticmethod(elman)


class GRU(_Layer):
    """Gated recurrent layers: h_t = (1 - z) n + z h_{t-1}, in one of two forms.

    With σ the logistic function and ⊙ the product by elements::

        r = σ(x W_ir' + b_ir + h W_hr' + b_hr)
        z = σ(x W_iz' + b_iz + h W_hz' + b_hz)
        n = tanh(x W_in' + b_in + r ⊙ (h W_hn' + b_hn))      reset_after=True, as torch
        n = tanh(x W_in' + b_in + (r ⊙ h) W_hn' + b_hn)      reset_after=False, Cho et al. 2014

    Names, shapes, gate order r z n and initialisation are those of
    https://docs.pytorch.org/docs/stable/generated/torch.nn.GRU.html; the second form is the
    default of https://onnx.ai/onnx/operators/onnx__GRU.html (`linear_before_reset=0`).

    :param reset_after: which form, see above.

    The other parameters, and what is raised, are those of `RNN`.

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
        backend: str | None = None,
        dtype: Any = "float32",
        precision: str = "ieee",
        compute_dtype: Any = None,
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
        self._begin(options, backend, dtype, precision, compute_dtype)

    _cell = staticmethod(gru)


class LSTM(_Layer):
    """Long short-term memory layers; the state is a pair (h, c).

    With σ the logistic function and ⊙ the product by elements::

        i, f, o = σ(x W_i*' + b_i* + h W_h*' + b_h*)      g = tanh(the same with its own weights)
        c_t = f ⊙ c_{t-1} + i ⊙ g                         h_t = o ⊙ tanh(c_t)

    Names, shapes, gate order i f g o and initialisation are those of
    https://docs.pytorch.org/docs/stable/generated/torch.nn.LSTM.html. The parameters, and
    what is raised, are those of `RNN` without `nonlinearity`.

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
        backend: str | None = None,
        dtype: Any = "float32",
        precision: str = "ieee",
        compute_dtype: Any = None,
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
        self._begin(options, backend, dtype, precision, compute_dtype)

    _cell = staticmethod(lstm)
