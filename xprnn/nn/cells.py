"""The cells as modules, one step a call: RNNCell, GRUCell and LSTMCell as in torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Self, overload

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
    States,
    StatesLike,
    StateTypes,
)
from ..backend.exports import exported_from
from ..cells import Weights
from ..core.checks import check_array, check_states
from ..core.passes import Call
from .arguments import check_inputs, check_weights, elman, gru, lstm
from .attributes import option
from .module import file_kind
from .parameters import reads_parameters
from .recurrent import _Recurrent

DEFAULTS: dict[str, Any] = {
    "nonlinearity": "tanh",
    "reset_after": True,
}  # of the options that choose a cell


class _CellModule(StateTypes[StatesLike, States], _Recurrent):
    """The calls of a cell: a layer of one step whose output is its next state."""

    _step_requests = ("auto", "reference", "sequence", "wave")

    def __call__(self, x: AnyArray, hx: StatesLike | None = None) -> States:
        """Run one step; in train mode it is recorded for `backward`.

        :param x: (N, I), unbatched (I,); the cell's dtype and backend; only read.
        :param hx: h (N, H), unbatched (H,); for an
            LSTMCell (h, c), either may be None. None: zeros.
        :return: the next h of h's shape, for an LSTMCell (h, c); fresh arrays.
        :raises TypeError, ValueError: an argument has another type, dtype, backend or shape.

        >>> import numpy as np, xprnn
        >>> cell = xprnn.RNNCell.from_weights(np.eye(1), np.eye(1), nonlinearity="relu")
        >>> cell(np.array([[2.0]]), np.array([[3.0]])).tolist()
        [[5.0]]
        """
        return self._call(x, hx)

    @reads_parameters
    def _call(self, x: Any, hx: Any, inputs: Mapping[str, Any] | None = None) -> Any:
        """Check the arguments of a call, and run it as a step or as a sequence."""
        spec = self._spec
        batched = getattr(x, "ndim", 2) != 1
        shape: tuple[Any, ...] = ("N", spec.input_size) if batched else (spec.input_size,)
        rows = check_array("x", x, self._backend, self._dtype, shape)
        if not batched:
            rows = rows[None]
        batch = rows.shape[0]
        outer = (batch,) if batched else ()
        names, sizes = spec.cell.state_names, spec.state_sizes
        states = check_states(names, hx, self._backend, self._dtype, outer, sizes)
        extra: tuple[Array, ...] = ()
        if inputs is not None:
            extra = check_inputs(spec, self._backend, self._dtype, (batch,), inputs, batched)
        size = self._step_size(batch)
        if size is None:
            if states is not None:
                states = _with_layer(states, batched)
            shared = tuple([each[None] for each in extra])
            call = Call(rows[None], states, None, False, batched, (1, batch), shared)
            results: Any = _unwrap(self._run(call)[1], batched)
        else:
            assert self._steps is not None
            results = self._steps.run_cell(size, self._parameters, rows, states, extra)
            results = results if batched else tuple([state[0] for state in results])
        return results if len(results) > 1 else results[0]

    @overload
    def backward(
        self, dnext: StatesLike, *, need_dx: Literal[True] = ...
    ) -> tuple[Array, States]: ...

    @overload
    def backward(self, dnext: StatesLike, *, need_dx: bool) -> tuple[Array | None, States]: ...

    def backward(self, dnext: Any, *, need_dx: bool = True) -> tuple[Array | None, Any]:
        """The backward pass of the last recorded step, from the gradient of the next state.

        The parameters' gradients are added to `grads`. Of several recorded steps the last one comes
        first; the dh that it returns, plus the direct gradient of that state, is the next dnext.

        :param dnext: dL/dh', of h's shape; for an LSTMCell (dh', dc'), either may be None: zeros.
        :param need_dx: False: dx is not computed, and None is returned in its place.
        :return: dx of x's shape, and dh of h's (for an LSTMCell (dh, dc)).
        :raises RuntimeError: there is no recorded step, or the parameters have changed since.
        :raises TypeError, ValueError: a gradient has another type or shape than its state.

        >>> import numpy as np, xprnn
        >>> W, U = np.array([[2.0]]), np.array([[3.0]])
        >>> cell = xprnn.RNNCell.from_weights(W, U, nonlinearity="relu").train()
        >>> cell(np.array([[5.0]]), np.array([[7.0]])).tolist()
        [[31.0]]
        >>> dx, dh = cell.backward(np.ones((1, 1)))
        >>> dx.item(), dh.item(), cell.grads["weight_ih"].item(), cell.grads["weight_hh"].item()
        (2.0, 3.0, 5.0, 7.0)
        """
        record = self._last_record()
        spec, batch = self._spec, record.tape.batch.batch
        outer, sizes = (batch,) if record.batched else (), spec.state_sizes
        names = tuple([f"d{name}_next" for name in spec.cell.state_names])
        gradients = check_states(names, dnext, self._backend, self._dtype, outer, sizes)
        dfinal = _with_layer(gradients or (None,) * len(names), record.batched)
        dx, dinitial = self._run_backward(record, None, dfinal, need_dx)
        if dx is not None:
            dx = dx[0] if record.batched else dx[0, 0]
        dstates = _unwrap(dinitial, record.batched)
        return dx, dstates if len(dstates) > 1 else dstates[0]

    def _steps_and_batch(self, shape: tuple[int, ...]) -> tuple[int, int]:
        if len(shape) not in (1, 2):
            raise ValueError(f"shape: expected (N, I) or (I,), got {shape}")
        return 1, shape[0] if len(shape) == 2 else 1


class _TorchCell(_CellModule[StatesLike, States]):
    """A cell of torch, whose parameters are two matrices and two biases."""

    @classmethod
    def from_weights(
        cls,
        weight_ih: AnyArray,
        weight_hh: AnyArray,
        bias_ih: AnyArray | None = None,
        bias_hh: AnyArray | None = None,
        **options: Any,
    ) -> Self:
        """A cell with copies of these weights, on their backend and in their dtype.

        :param weight_ih: (G*H, I), float32 or float64, gate order as torch's.
        :param weight_hh: (G*H, H), on the backend and in the dtype of `weight_ih`, as the biases.
        :param bias_ih: (G*H,); None: the cell has no biases.
        :param bias_hh: (G*H,), torch's second bias; None if and only if `bias_ih` is.
        :param options: `nonlinearity` or `reset_after`, as for the constructor.
        :return: the cell, in eval mode.
        :raises TypeError, ValueError: a weight has another type, dtype or shape, or an option is
            invalid.

        >>> import numpy as np, xprnn
        >>> cell = xprnn.RNNCell.from_weights(np.eye(2), np.zeros((2, 2)), nonlinearity="relu")
        >>> cell(np.array([3.0, -3.0])).tolist()
        [3.0, 0.0]
        """
        weights = Weights(weight_ih, weight_hh, bias_ih, bias_hh)
        backend, spec, weights = check_weights(cls._cell({**DEFAULTS, **options}), weights)
        cell = cls(
            spec.input_size,
            spec.hidden_size,
            spec.bias,
            **options,
            backend=backend.name,
            dtype=weights.weight_ih.dtype,
            seed=0,
        )
        cell.parameters.update({name: w for name, w in weights._asdict().items() if w is not None})
        return cell


def _with_layer(states: tuple[Array | None, ...], batched: bool) -> tuple[Array | None, ...]:
    """States, or their gradients, of a cell as those of a layer, (1, N, H); None stays."""
    axes = None if batched else (None, None)
    return tuple([None if state is None else state[axes] for state in states])


def _unwrap(states: tuple[Array, ...], batched: bool) -> tuple[Array, ...]:
    """States (1, N, H) as a cell returns them."""
    return tuple([state[0] if batched else state[0, 0] for state in states])


@exported_from("xprnn")
@file_kind("RNNCell")
class RNNCell(_TorchCell[AnyArray, Array]):
    """One Elman step, h' = tanh(x W_ih' + b_ih + h W_hh' + b_hh), or relu for tanh.

    As https://docs.pytorch.org/docs/stable/generated/torch.nn.RNNCell.html.

    :param input_size: I, features of x.
    :param hidden_size: H, features of the state.
    :param bias: whether there are b_ih and b_hh.
    :param nonlinearity: "tanh" or "relu".
    :param backend: "numpy", "cupy", "cupy:N" or "auto"; None: as for `xprnn.get_backend`.
    :param dtype: "float32" or "float64": of x, states, parameters and gradients.
    :param precision: "ieee" or, where a GPU may round products, "tf32"; see `xprnn.RNN`.
    :param compute_dtype: "float16" or "bfloat16": mixed precision; None: the dtype; see
        `xprnn.RNN`.
    :param seed: of the initial parameters; None draws one.
    :raises TypeError, ValueError: an argument is none of these.

    >>> import numpy as np, xprnn
    >>> cell = xprnn.RNNCell(3, 4, nonlinearity="relu", seed=0)
    >>> cell(np.ones((2, 3), np.float32)).shape
    (2, 4)
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        nonlinearity: Nonlinearity = "tanh",
        *,
        backend: BackendName | None = None,
        dtype: DTypeLike = "float32",
        precision: Precision = "ieee",
        compute_dtype: ComputeDTypeLike | None = None,
        seed: int | None = None,
    ) -> None:
        options = {
            "input_size": input_size,
            "hidden_size": hidden_size,
            "bias": bias,
            "nonlinearity": nonlinearity,
            "seed": seed,
        }
        self._construct(options, backend, dtype, precision, compute_dtype)

    nonlinearity: Nonlinearity = option("nonlinearity", '"tanh" or "relu".')
    _cell = staticmethod(elman)


@exported_from("xprnn")
@file_kind("GRUCell")
class GRUCell(_TorchCell[AnyArray, Array]):
    """One GRU step, h' = (1 - z) n + z h; the equations are at `xprnn.GRU`.

    As https://docs.pytorch.org/docs/stable/generated/torch.nn.GRUCell.html.

    :param input_size: I, features of x.
    :param hidden_size: H, features of the state.
    :param bias: whether there are b_ih and b_hh.
    :param reset_after: which of the two forms, see `xprnn.GRU`.
    :param backend: "numpy", "cupy", "cupy:N" or "auto"; None: as for `xprnn.get_backend`.
    :param dtype: "float32" or "float64": of x, states, parameters and gradients.
    :param precision: "ieee" or, where a GPU may round products, "tf32"; see `xprnn.RNN`.
    :param compute_dtype: "float16" or "bfloat16": mixed precision; None: the dtype; see
        `xprnn.RNN`.
    :param seed: of the initial parameters; None draws one.
    :raises TypeError, ValueError: an argument is none of these.

    >>> import numpy as np, xprnn
    >>> cell = xprnn.GRUCell(3, 4, seed=0).train()
    >>> x, h = np.ones((2, 3), np.float32), np.ones((2, 4), np.float32)
    >>> h_next = cell(x, h)
    >>> dx, dh = cell.backward(np.ones_like(h_next))
    >>> dx.shape, dh.shape
    ((2, 3), (2, 4))
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        *,
        reset_after: bool = True,
        backend: BackendName | None = None,
        dtype: DTypeLike = "float32",
        precision: Precision = "ieee",
        compute_dtype: ComputeDTypeLike | None = None,
        seed: int | None = None,
    ) -> None:
        options = {
            "input_size": input_size,
            "hidden_size": hidden_size,
            "bias": bias,
            "reset_after": reset_after,
            "seed": seed,
        }
        self._construct(options, backend, dtype, precision, compute_dtype)

    reset_after: bool = option("reset_after", "Which of the two forms of the GRU this is.")
    _cell = staticmethod(gru)


@exported_from("xprnn")
@file_kind("LSTMCell")
class LSTMCell(_TorchCell[PairLike, Pair]):
    """One LSTM step, c' = f c + i g, h' = o tanh(c'); the equations are at `xprnn.LSTM`.

    As https://docs.pytorch.org/docs/stable/generated/torch.nn.LSTMCell.html.

    :param input_size: I, features of x.
    :param hidden_size: H, features of the state.
    :param bias: whether there are b_ih and b_hh.
    :param backend: "numpy", "cupy", "cupy:N" or "auto"; None: as for `xprnn.get_backend`.
    :param dtype: "float32" or "float64": of x, states, parameters and gradients.
    :param precision: "ieee" or, where a GPU may round products, "tf32"; see `xprnn.RNN`.
    :param compute_dtype: "float16" or "bfloat16": mixed precision; None: the dtype; see
        `xprnn.RNN`.
    :param seed: of the initial parameters; None draws one.
    :raises TypeError, ValueError: an argument is none of these.

    >>> import numpy as np, xprnn
    >>> cell = xprnn.LSTMCell(3, 4, seed=0)
    >>> h, c = cell(np.ones(3, np.float32))
    >>> h.shape, c.shape
    ((4,), (4,))
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        *,
        backend: BackendName | None = None,
        dtype: DTypeLike = "float32",
        precision: Precision = "ieee",
        compute_dtype: ComputeDTypeLike | None = None,
        seed: int | None = None,
    ) -> None:
        options = {
            "input_size": input_size,
            "hidden_size": hidden_size,
            "bias": bias,
            "seed": seed,
        }
        self._construct(options, backend, dtype, precision, compute_dtype)

    _cell = staticmethod(lstm)
