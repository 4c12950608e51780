"""RNN, GRU and LSTM layers with torch's arguments, names, shapes and gate order."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, overload

from ..backend import (
    AnyArray,
    Array,
    BackendName,
    ComputeDTypeLike,
    DTypeLike,
    Lengths,
    Nonlinearity,
    Pair,
    PairLike,
    Precision,
    States,
    StatesLike,
    StateTypes,
)
from ..backend.exports import exported_from
from ..cells.activations import Activation, Activations
from ..core.checks import check_size
from ..core.passes import Call
from ..core.spec import StackSpec
from ..engine.footprint import Footprint, training_step
from ..kernels import ExecutionPlan
from . import variants
from .arguments import check_call, check_upstream, elman, gru, lstm, unwrap
from .attributes import option
from .module import file_kind
from .parameters import reads_parameters
from .recurrent import _Recurrent
from .stepper import Stepper


class _NotGiven:
    """The default of an argument for which None has a meaning."""

    def __repr__(self) -> str:
        """As `help` shows it."""
        return "<not given>"


NOT_GIVEN: Any = _NotGiven()


class _Layer(StateTypes[StatesLike, States], _Recurrent):
    """The calls of a layer: any number of steps, layers and directions."""

    _warn_at_calls = 100
    _only_short_steps = True
    _step_hint = "\n  layer.stepper({}) is faster still: it keeps the states"
    num_layers: int = option("num_layers", "L, the number of layers.")
    batch_first: bool = option("batch_first", "Whether x and output are (N, T, ...).")
    dropout: float = option(
        "dropout", "The probability with which an element between layers is dropped."
    )
    bidirectional: bool = option(
        "bidirectional", "Whether a second direction reads each row from its end."
    )

    def __call__(
        self, x: AnyArray, hx: StatesLike | None = None, *, lengths: Lengths | None = None
    ) -> tuple[Array, States]:
        """Run the layer over a batch of sequences.

        In train mode the call is recorded for `backward`. The results are new arrays.
        In eval mode a short call of one step, of a layer of one direction on a CPU, is run as a
        stepper's step instead of a sequence of one step, unless pointwise or sequence kernels are
        forced. In float64 the results differ by at most `xprnn.diagnostics.tolerances.STEPWISE`.

        :param x: (T, N, I), with `batch_first` (N, T, I), unbatched (T, I); the layer's dtype
            and backend (CuPy accepts arrays of other libraries on its device by DLPack), any
            strides; only read.
        :param hx: h0 (L*D, N, H), unbatched (L*D, H); for an LSTM (h0, c0), either may be None.
            None: zeros.
        :param lengths: N host integers from 0 to T, in any order: the number of steps of each row.
            Past a row's end x is not read and the output is zero; the reverse direction starts
            at each row's own end. None: all T.
        :return: output (T, N, D*H), laid out as x, and h_n (L*D, N, H), for an LSTM (h_n, c_n):
            the state of each row after its own last step; h0 where it has none.
        :raises TypeError: an argument has another type, dtype or backend.
        :raises ValueError: an argument has another shape, or lengths are not within 0 to T.
        :raises MemoryError: there is not enough memory; nothing is recorded, and the call's
            memory is freed even while the error is referenced.

        >>> import numpy as np, xprnn
        >>> rnn = xprnn.RNN(1, 1, nonlinearity="relu", bias=False, backend="numpy", seed=0)
        >>> rnn.load_state_dict({"weight_ih_l0": np.ones((1, 1)), "weight_hh_l0": np.eye(1)})
        >>> output, h_n = rnn(np.ones((3, 2, 1), np.float32), lengths=[3, 2])
        >>> output[:, :, 0].tolist(), h_n.ravel().tolist()
        ([[1.0, 1.0], [2.0, 2.0], [3.0, 0.0]], [3.0, 2.0])
        """
        batch_first = self._options["batch_first"]
        return self._call(
            check_call(self._spec, self._backend, self._dtype, x, hx, lengths, batch_first)
        )

    @reads_parameters
    def _call(self, call: Call) -> tuple[Array, Any]:
        """Run a checked call, as a step or as a sequence."""
        steps, batch = call.sizes
        size = None
        if steps == 1 and (call.lengths is None or call.lengths.all()):
            size = self._step_size(batch)
        if size is None:
            output, final = self._run(call)
        else:
            assert self._steps is not None
            x_0 = call.x[:, 0] if call.batch_first else call.x[0]
            h, final = self._steps.run_layers(
                size, self._parameters, x_0, call.initial, call.inputs
            )
            output = h[:, None] if call.batch_first else h[None]
        return unwrap(output, final, call.batched)

    @overload
    def backward(
        self,
        doutput: AnyArray | None = ...,
        dhx: StatesLike | None = ...,
        *,
        need_dx: Literal[True] = ...,
    ) -> tuple[Array, States]: ...

    @overload
    def backward(
        self, doutput: AnyArray | None = ..., dhx: StatesLike | None = ..., *, need_dx: bool
    ) -> tuple[Array | None, States]: ...

    def backward(
        self, doutput: AnyArray | None = NOT_GIVEN, dhx: Any = None, *, need_dx: bool = True
    ) -> tuple[Array | None, Any]:
        """The backward pass of the last recorded call, from the gradients of its results.

        The parameters' gradients are added to `grads`. Of several recorded calls the last one comes
        first. After an error in the arguments the recorded call can still be used.

        :param doutput: dL/doutput, of the output's shape; None: zeros. Only read.
        :param dhx: dL/dh_n, of h_n's shape; for an LSTM (dh_n, dc_n), either may be None: zeros.
            At least one must be passed: `backward(None, None)` states that both are zero.
        :param need_dx: False: dx is not computed, and None is returned in its place.
        :return: dx of x's shape, zero past a row's end, and dh0 (for an LSTM (dh0, dc0)).
        :raises RuntimeError: there is no recorded call, or the parameters have changed since.
        :raises TypeError, ValueError: a gradient has another type or shape than its result,
            or none is passed.

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
        if doutput is NOT_GIVEN:
            if dhx is None:
                raise ValueError(
                    "backward: expected the gradient of the loss with respect to the output, "
                    "doutput, or the final states, dhx, got neither; for zeros call "
                    "backward(None, None)"
                )
            doutput = None
        doutput, dfinal = check_upstream(
            self._spec, self._backend, self._dtype, record.tape, record.batched, doutput, dhx
        )
        return unwrap(*self._run_backward(record, doutput, dfinal, need_dx), record.batched)

    def stepper(self, batch: int) -> Stepper[StatesLike, States]:
        """A stepper, which runs the layer one step at a time: see `xprnn.stepper.Stepper`.

        :param batch: N, the number of streams, which start and end independently.
        :return: the stepper; all states are zero.
        :raises TypeError, ValueError: `batch` is not an integer of at least 1, or the layer is
            bidirectional.
        :raises KernelUnavailableError: as `xprnn.stepper.Stepper`.

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

    def _configure(
        self, options: dict[str, Any], *execution: Any, recompute: Any = None, **more: Any
    ) -> None:
        self.recompute = recompute
        super()._configure(options, *execution, **more)

    @property
    def recompute(self) -> int | None:
        """The number of steps between saved states, or None: see `RNN`."""
        return self._recompute

    @recompute.setter
    def recompute(self, k: int | None) -> None:
        self._recompute = None if k is None else check_size("recompute", k)

    def _execution_options(self) -> dict[str, Any]:
        return {**super()._execution_options(), "recompute": self.recompute}

    def _memory_of(self, plan: ExecutionPlan, steps: int, batch: int) -> list[str]:
        if plan.precision.is_mixed and plan.implementation == "reference":
            return ["the memory of the plain code in low precision is not counted"]
        batch_first = self._options["batch_first"]

        def footprint(k: int | None) -> Footprint:
            return training_step(self._spec, plan, (steps, batch), batch_first, k)

        if self.recompute is None:
            return [f"a training step takes about {footprint(None)}"]
        return [
            f"a training step takes about {footprint(self.recompute)}",
            f"without recompute={self.recompute} about {sum(footprint(None)):,}",
        ]

    def _steps_and_batch(self, shape: tuple[int, ...]) -> tuple[int, int]:
        if len(shape) not in (2, 3):
            raise ValueError(f"shape: expected (T, N, I) or (T, I), got {shape}")
        first, second = (*shape[:-1], 1)[:2]
        swapped = self._options["batch_first"] and len(shape) == 3
        return (second, first) if swapped else (first, second)


class _BuiltIn(_Layer[StatesLike, States]):
    """A layer of a cell of xprnn, or of the definition of one with other functions or sizes."""

    activations: tuple[Activation, ...] | None = option(
        "activations", "The activation functions, where they are not the usual ones."
    )

    @classmethod
    def _make_spec(cls, options: Mapping[str, Any]) -> StackSpec:
        return variants.with_options(super()._make_spec(options), options)

    def _plain(self, options: Mapping[str, Any]) -> dict[str, Any]:
        return variants.plain(super()._plain(options))


@exported_from("xprnn")
@file_kind("RNN")
class RNN(_BuiltIn[AnyArray, Array]):
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
    :param activations: one function in place of `nonlinearity`, such as ("softsign",); with
        parameters (("leaky_relu", 0.2),). A bidirectional layer may have two, the second one of the
        reverse direction. For the names see `xprnn.cell_definitions`. The layer then runs that
        definition, instead of the kernels of the cell.
    :param backend: "numpy", "cupy", "cupy:N" or "auto"; None: as for `xprnn.get_backend`.
    :param dtype: "float32" or "float64": of x, states, output, parameters and gradients.
    :param precision: "ieee": float32 products are full float32; "tf32" allows a GPU to round their
        operands to 11 significant bits. It has no effect on other dtypes and on the CPU.
    :param compute_dtype: "float16" or "bfloat16" with dtype "float32" is mixed precision: the
        operands of products (x, h, the gates and copies of the weights) have this dtype,
        everything else, such as the arithmetic between products, is float32. None: the dtype. On
        NumPy it computes the same, slowly. float16 gradients below 6e-8 underflow, so scale up the
        gradients passed to `backward` and scale down its results.
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
        activations: Activations | None = None,
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
            "activations": activations,
            "seed": seed,
        }
        self._construct(options, backend, dtype, precision, compute_dtype, recompute=recompute)

    nonlinearity: Nonlinearity = option("nonlinearity", '"tanh" or "relu".')
    _cell = staticmethod(elman)


@exported_from("xprnn")
@file_kind("GRU")
class GRU(_BuiltIn[AnyArray, Array]):
    """Gated recurrent layers: h_t = (1 - z) n + z h_{t-1}, in one of two forms.

    With σ the logistic function and ⊙ the element-wise product::

        r = σ(x W_ir' + b_ir + h W_hr' + b_hr)
        z = σ(x W_iz' + b_iz + h W_hz' + b_hz)
        n = tanh(x W_in' + b_in + r ⊙ (h W_hn' + b_hn))   reset_after=True
        n = tanh(x W_in' + b_in + (r ⊙ h) W_hn' + b_hn)   reset_after=False

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
    :param activations: (f, g): f in place of σ, g in place of tanh, such as ("hard_sigmoid",
        "relu") or ("sigmoid", ("leaky_relu", 0.2)). A bidirectional layer may have four, the last
        two of the reverse direction. None: the usual ones; see `RNN`.
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
        activations: Activations | None = None,
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
            "activations": activations,
            "seed": seed,
        }
        self._construct(options, backend, dtype, precision, compute_dtype, recompute=recompute)

    reset_after: bool = option("reset_after", "Which form of the GRU this is.")
    _cell = staticmethod(gru)


@exported_from("xprnn")
@file_kind("LSTM")
class LSTM(_BuiltIn[PairLike, Pair]):
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
    :param proj_size: P, the width of h: h_t = (o ⊙ tanh(c_t)) W_hr', with parameters weight_hr_l0
        (P, H), and weight_hh_l0 (4*H, P), as in torch. 0: no projection, and h has width H.
    :param activations: (f, g, h): f in place of σ, g and h in place of the tanh of g and of c_t. A
        bidirectional layer may have six, the last three of the reverse direction. None: the usual
        ones; see `GRU` and `RNN`.
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
        proj_size: int = 0,
        activations: Activations | None = None,
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
            "proj_size": proj_size,
            "activations": activations,
            "seed": seed,
        }
        self._construct(options, backend, dtype, precision, compute_dtype, recompute=recompute)

    proj_size: int = option("proj_size", "The width of h, or 0: the hidden size.", absent=0)
    _cell = staticmethod(lstm)
