"""The layers as functions of explicit weights: one layer, one direction, no state kept.

`gru(...)` runs a layer; `gru_forward(...)` also returns a cache, from which `gru_backward(doutput,
dh_n, cache)` computes a dict of all gradients; likewise for `rnn` and `lstm`, and with a definition
`recurrent`. The equations are at `xprnn.RNN`, `xprnn.GRU` and `xprnn.LSTM`. All of them share:

- `x` (T, N, I), with `batch_first` (N, T, I), unbatched (T, I);
- `h0` (1, N, H), unbatched (1, H), for the LSTM a pair (h0, c0), either of which may be None;
  None: zeros;
- `weight_ih` (G*H, I), `weight_hh` (G*H, H), `bias_ih` and `bias_hh` (G*H,) or both None, in
  torch's gate order (https://docs.pytorch.org/docs/stable/nn.html#recurrent-layers);
- `lengths` as for a layer's call;
- `output` (T, N, H), laid out as x, and `h_n` (1, N, H), for the LSTM (h_n, c_n).

All arrays are float32 or all are float64, and are on one backend, that of
`weight_ih`. TypeError or ValueError names the invalid argument.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from . import kernels
from .backend import AnyArray, Array, Backend, Lengths, Nonlinearity, PairLike
from .cells import CELLS, Weights
from .cells.definition import Definition
from .core.checks import check_flag
from .core.oom import translate_out_of_memory
from .core.packing import make_packed_batch
from .core.passes import Call, PackedWeightsCache, StackWeights
from .core.precision import check_precision_policy
from .core.spec import StackSpec
from .core.workspace import Workspace
from .engine import stack
from .kernels import CallContext, CallShape
from .nn import arguments
from .nn.arguments import check_call, check_inputs, check_upstream, unwrap
from .nn.defined import check_parameters


@dataclass
class Cache:
    """What a forward call saves for its backward call; opaque, and used once."""

    _spec: StackSpec
    _scratch: Workspace
    _batched: bool
    _tape: stack.Tape = field(repr=False)


def rnn(
    x: AnyArray,
    h0: AnyArray | None,
    weight_ih: AnyArray,
    weight_hh: AnyArray,
    bias_ih: AnyArray | None = None,
    bias_hh: AnyArray | None = None,
    *,
    batch_first: bool = False,
    lengths: Lengths | None = None,
    nonlinearity: Nonlinearity = "tanh",
) -> tuple[Array, Array]:
    """Run an Elman layer, h_t = tanh(x_t W_ih' + b_ih + h_{t-1} W_hh' + b_hh), or relu.

    :param x: (T, N, I), with `batch_first` (N, T, I), unbatched (T, I); only read.
    :param h0: (1, N, H), unbatched (1, H); None: zeros.
    :param weight_ih: (H, I), float32 or float64: the dtype and backend of all arrays.
    :param weight_hh: (H, H).
    :param bias_ih: (H,); None: there are no biases.
    :param bias_hh: (H,), the second bias; None if and only if `bias_ih` is.
    :param batch_first: whether x and output are (N, T, ...).
    :param lengths: N integers on the host, the number of steps of each row; None: all T.
    :param nonlinearity: "tanh" or "relu".
    :return: output (T, N, H), laid out as x, and h_n (1, N, H); new arrays.
    :raises TypeError, ValueError: an argument is invalid; the message names it.
    :raises KernelUnavailableError: a forced implementation does not support the call.
    :raises MemoryError: there is not enough memory.

    >>> import numpy as np, xprnn
    >>> x, h0 = np.ones((5, 2, 3)), np.zeros((1, 2, 4))
    >>> output, h_n = xprnn.functional.rnn(x, h0, np.ones((4, 3)), np.eye(4))
    >>> output.shape
    (5, 2, 4)
    """
    weights = Weights(weight_ih, weight_hh, bias_ih, bias_hh)
    cell = arguments.elman({"nonlinearity": nonlinearity})
    checked = arguments.check_weights(cell, weights)
    return _forward(checked, x, h0, batch_first, lengths, record=False)[:2]


def rnn_forward(
    x: AnyArray,
    h0: AnyArray | None,
    weight_ih: AnyArray,
    weight_hh: AnyArray,
    bias_ih: AnyArray | None = None,
    bias_hh: AnyArray | None = None,
    *,
    batch_first: bool = False,
    lengths: Lengths | None = None,
    nonlinearity: Nonlinearity = "tanh",
) -> tuple[Array, Array, Cache]:
    """As `rnn`, and returns a cache for `rnn_backward` as third.

    The arguments and exceptions are those of `rnn`. The weights may be written before the
    backward call: it uses copies.

    :return: output, h_n and the cache, which can be used once.

    >>> import numpy as np
    >>> output, h_n, cache = rnn_forward(np.ones((5, 2, 3)), None, np.ones((4, 3)), np.eye(4))
    >>> sorted(rnn_backward(output, h_n, cache))
    ['dh0', 'dweight_hh', 'dweight_ih', 'dx']
    """
    cell = arguments.elman({"nonlinearity": nonlinearity})
    weights = Weights(weight_ih, weight_hh, bias_ih, bias_hh)
    checked = arguments.check_weights(cell, weights)
    return _forward(checked, x, h0, batch_first, lengths, record=True)


def gru(
    x: AnyArray,
    h0: AnyArray | None,
    weight_ih: AnyArray,
    weight_hh: AnyArray,
    bias_ih: AnyArray | None = None,
    bias_hh: AnyArray | None = None,
    *,
    batch_first: bool = False,
    lengths: Lengths | None = None,
    reset_after: bool = True,
) -> tuple[Array, Array]:
    """Run a GRU layer, h_t = (1 - z) n + z h_{t-1}; gate order r z n.

    :param x: (T, N, I), with `batch_first` (N, T, I), unbatched (T, I); only read.
    :param h0: (1, N, H), unbatched (1, H); None: zeros.
    :param weight_ih: (3*H, I), float32 or float64: the dtype and backend of all arrays.
    :param weight_hh: (3*H, H).
    :param bias_ih: (3*H,); None: there are no biases.
    :param bias_hh: (3*H,), the second bias; None if and only if `bias_ih` is.
    :param batch_first: whether x and output are (N, T, ...).
    :param lengths: N integers on the host, the number of steps of each row; None: all T.
    :param reset_after: which of the two forms, see `xprnn.GRU`.
    :return: output (T, N, H), laid out as x, and h_n (1, N, H); new arrays.
    :raises TypeError, ValueError: an argument is invalid; the message names it.
    :raises KernelUnavailableError: a forced implementation does not support the call.
    :raises MemoryError: there is not enough memory.

    >>> import numpy as np, xprnn
    >>> x, h0 = np.ones((5, 2, 3)), np.zeros((1, 2, 4))
    >>> output, h_n = xprnn.functional.gru(x, h0, np.ones((12, 3)), np.ones((12, 4)))
    >>> output.shape
    (5, 2, 4)
    """
    cell = arguments.gru({"reset_after": reset_after})
    weights = Weights(weight_ih, weight_hh, bias_ih, bias_hh)
    checked = arguments.check_weights(cell, weights)
    return _forward(checked, x, h0, batch_first, lengths, record=False)[:2]


def gru_forward(
    x: AnyArray,
    h0: AnyArray | None,
    weight_ih: AnyArray,
    weight_hh: AnyArray,
    bias_ih: AnyArray | None = None,
    bias_hh: AnyArray | None = None,
    *,
    batch_first: bool = False,
    lengths: Lengths | None = None,
    reset_after: bool = True,
) -> tuple[Array, Array, Cache]:
    """As `gru`, and returns a cache for `gru_backward` as third.

    The arguments and exceptions are those of `gru`. The weights may be written before the
    backward call: it uses copies.

    :return: output, h_n and the cache, which can be used once.

    >>> import numpy as np
    >>> x, W, U = np.ones((5, 2, 3)), np.ones((12, 3)), np.ones((12, 4))
    >>> output, h_n, cache = gru_forward(x, None, W, U)
    >>> gru_backward(np.ones_like(output), None, cache)["dx"].shape
    (5, 2, 3)
    """
    cell = arguments.gru({"reset_after": reset_after})
    weights = Weights(weight_ih, weight_hh, bias_ih, bias_hh)
    checked = arguments.check_weights(cell, weights)
    return _forward(checked, x, h0, batch_first, lengths, record=True)


def lstm(
    x: AnyArray,
    hx: PairLike | None,
    weight_ih: AnyArray,
    weight_hh: AnyArray,
    bias_ih: AnyArray | None = None,
    bias_hh: AnyArray | None = None,
    *,
    batch_first: bool = False,
    lengths: Lengths | None = None,
) -> tuple[Array, tuple[Array, Array]]:
    """Run an LSTM layer, c_t = f c_{t-1} + i g, h_t = o tanh(c_t); gate order i f g o.

    :param x: (T, N, I), with `batch_first` (N, T, I), unbatched (T, I); only read.
    :param hx: (h0, c0), each (1, N, H), unbatched (1, H); either or both may be None: zeros.
    :param weight_ih: (4*H, I), float32 or float64: the dtype and backend of all arrays.
    :param weight_hh: (4*H, H).
    :param bias_ih: (4*H,); None: there are no biases.
    :param bias_hh: (4*H,), the second bias; None if and only if `bias_ih` is.
    :param batch_first: whether x and output are (N, T, ...).
    :param lengths: N integers on the host, the number of steps of each row; None: all T.
    :return: output (T, N, H), laid out as x, and (h_n, c_n), each (1, N, H); new arrays.
    :raises TypeError, ValueError: an argument is invalid; the message names it.
    :raises KernelUnavailableError: a forced implementation does not support the call.
    :raises MemoryError: there is not enough memory.

    >>> import numpy as np, xprnn
    >>> W, U = np.ones((16, 3)), np.ones((16, 4))
    >>> output, (h_n, c_n) = xprnn.functional.lstm(np.ones((5, 2, 3)), None, W, U)
    >>> c_n.shape
    (1, 2, 4)
    """
    weights = Weights(weight_ih, weight_hh, bias_ih, bias_hh)
    checked = arguments.check_weights(CELLS["lstm"], weights)
    return _forward(checked, x, hx, batch_first, lengths, record=False)[:2]


def lstm_forward(
    x: AnyArray,
    hx: PairLike | None,
    weight_ih: AnyArray,
    weight_hh: AnyArray,
    bias_ih: AnyArray | None = None,
    bias_hh: AnyArray | None = None,
    *,
    batch_first: bool = False,
    lengths: Lengths | None = None,
) -> tuple[Array, tuple[Array, Array], Cache]:
    """As `lstm`, and returns a cache for `lstm_backward` as third.

    The arguments and exceptions are those of `lstm`. The weights may be written before the
    backward call: it uses copies.

    :return: output, (h_n, c_n) and the cache, which can be used once.

    >>> import numpy as np
    >>> x, W, U = np.ones((5, 2, 3)), np.ones((16, 3)), np.ones((16, 4))
    >>> output, (h_n, c_n), cache = lstm_forward(x, None, W, U)
    >>> lstm_backward(None, (h_n, c_n), cache)["dc0"].shape
    (1, 2, 4)
    """
    weights = Weights(weight_ih, weight_hh, bias_ih, bias_hh)
    checked = arguments.check_weights(CELLS["lstm"], weights)
    return _forward(checked, x, hx, batch_first, lengths, record=True)


def recurrent(
    definition: Definition,
    x: AnyArray,
    hx: Any,
    parameters: Mapping[str, AnyArray],
    *,
    batch_first: bool = False,
    lengths: Lengths | None = None,
    **settings: Any,
) -> tuple[Array, Any]:
    """Run a layer of a cell that `xprnn.cell` defines.

    :param definition: what `xprnn.cell` made of a function.
    :param x: (T, N, I), with `batch_first` (N, T, I), unbatched (T, I); only read.
    :param hx: a state (1, N, H), unbatched (1, H), or a tuple of all, any of which may be None.
        None: the initial values.
    :param parameters: the parameters by name, without a suffix: `weight_ih`, `p_i`; float32 or
        float64: the dtype and backend of all arrays.
    :param batch_first: whether x and output are (N, T, ...).
    :param lengths: N integers on the host, the number of steps of each row; None: all T.
    :param settings: the sizes, options and inputs of the definition, by name.
    :return: output (T, N, H), laid out as x, and the final states, (1, N, H) each; new arrays.
    :raises TypeError, ValueError: an argument is invalid; the message names it.
    :raises KernelUnavailableError: a forced implementation does not support the call.
    :raises MemoryError: there is not enough memory.

    >>> import numpy as np, xprnn
    >>> @xprnn.cell(gates=("z", "n"))
    ... def min_gru(f, x, s):
    ...     return s.h + f.sigmoid(x.z) * (x.n - s.h)
    >>> parameters = {"weight_ih": np.ones((8, 3))}
    >>> output, h_n = xprnn.functional.recurrent(min_gru, np.ones((5, 2, 3)), None, parameters)
    >>> output.shape
    (5, 2, 4)
    """
    layout = batch_first, lengths
    return _forward_defined(definition, x, hx, parameters, layout, settings, record=False)[:2]


def recurrent_forward(
    definition: Definition,
    x: AnyArray,
    hx: Any,
    parameters: Mapping[str, AnyArray],
    *,
    batch_first: bool = False,
    lengths: Lengths | None = None,
    **settings: Any,
) -> tuple[Array, Any, Cache]:
    """As `recurrent`, and returns a cache for `recurrent_backward` as third.

    The arguments and exceptions are those of `recurrent`.

    :raises ValueError: the cell has random masks, which only `xprnn.Recurrent` draws.

    >>> import numpy as np, xprnn
    >>> @xprnn.cell(gates=("z", "n"))
    ... def min_gru(f, x, s):
    ...     return s.h + f.sigmoid(x.z) * (x.n - s.h)
    >>> parameters = {"weight_ih": np.ones((8, 3))}
    >>> output, h_n, cache = recurrent_forward(min_gru, np.ones((5, 2, 3)), None, parameters)
    >>> sorted(recurrent_backward(output, h_n, cache))
    ['dh0', 'dweight_ih', 'dx']
    """
    layout = batch_first, lengths
    return _forward_defined(definition, x, hx, parameters, layout, settings, record=True)


@translate_out_of_memory
def backward(
    doutput: AnyArray | None,
    dhx: AnyArray | PairLike | None,
    cache: Cache,
    *,
    need_dx: bool = True,
) -> dict[str, Array]:
    """The backward pass of a forward call, named `rnn_backward`, `gru_backward`, `lstm_backward`.

    :param doutput: dL/doutput, of the output's shape; None: zeros.
    :param dhx: dL/dh_n, of h_n's shape, for the LSTM the pair (dh_n, dc_n); None: zeros. At least
        one gradient must be given.
    :param cache: what the forward call returned; it can be used once.
    :param need_dx: False omits dx.
    :return: new arrays dx, dh0 (and dc0), dweight_ih, dweight_hh and, where there are biases,
        dbias_ih, dbias_hh, each of the shape of its argument.
    :raises RuntimeError: the cache has been used.
    :raises TypeError, ValueError: a gradient has another type or shape than its result, or none is
        passed; the cache can still be used.

    >>> import numpy as np
    >>> output, h_n, cache = rnn_forward(np.ones((5, 3)), None, np.ones((4, 3)), np.eye(4))
    >>> backward(output, None, cache, need_dx=False)["dweight_ih"].shape
    (4, 3)
    """
    if not isinstance(cache, Cache):
        raise TypeError(f"cache: expected what a forward call returned, got {type(cache).__name__}")
    tape, spec = cache._tape, cache._spec
    backend, weights = tape.plan.backend, tape.weights.arrays[0][0]
    if tape.spent:
        raise RuntimeError("cache: it has been used; call the forward function again")
    dtype, batched = cache._scratch.dtype, cache._batched
    need_dx = check_flag("need_dx", need_dx)
    doutput, dfinal = check_upstream(spec, backend, dtype, tape, batched, doutput, dhx)
    if doutput is None and all(dstate is None for dstate in dfinal):
        raise ValueError(
            "backward: expected doutput or dhx, got None for every gradient; all results would be "
            "zero"
        )
    with backend.activate():
        xp = tape.plan.xp
        zeros = [None if w is None else xp.zeros(w.shape, dtype) for w in weights]
        dweights = type(weights)(*zeros)
        dx, dinitial = stack.backward(
            spec, tape, (doutput, dfinal), [[dweights]], need_dx, cache._scratch
        )
    dx, _ = unwrap(dx, dinitial, batched)
    gradients = {} if dx is None else {"dx": dx}
    for name, dstate in zip(spec.cell.state_names, dinitial, strict=True):
        gradients[f"d{name}0"] = dstate if batched else dstate[:, 0]
    for name, dweight in dweights._asdict().items():
        if dweight is not None:
            gradients[f"d{name}"] = dweight
    return gradients


rnn_backward = backward
gru_backward = backward
lstm_backward = backward
recurrent_backward = backward


@translate_out_of_memory
def _forward(
    checked: tuple[Backend, StackSpec, Weights],
    x: AnyArray,
    hx: Any,
    batch_first: bool,
    lengths: Any,
    record: bool,
    inputs: Mapping[str, AnyArray] | None = None,
) -> tuple[Array, Any, Cache]:
    """Run a call with checked weights; `inputs`: those of a definition besides x."""
    backend, spec, weights = checked
    dtype = weights.weight_ih.dtype
    batch_first = check_flag("batch_first", batch_first)
    call = check_call(spec, backend, dtype, x, hx, lengths, batch_first)
    if inputs is not None:
        extra = check_inputs(spec, backend, dtype, call.x.shape[:2], inputs, call.batched)
        call = call._replace(inputs=extra)
    with backend.activate():
        scratch = Workspace(backend, dtype)
        context = _context(spec, backend, call, scratch, record)
        if record:  # the caller may write the weights before the backward call
            weights = type(weights)(*[None if w is None else w.copy() for w in weights])
        else:  # kernels read contiguous rows
            contiguous = context.plan.xp.ascontiguousarray
            weights = type(weights)(*[None if w is None else contiguous(w) for w in weights])
        both = StackWeights([[weights]], PackedWeightsCache())
        output, final, tape = stack.forward(spec, both, call, context)
    cache = Cache(spec, scratch, call.batched, tape)
    output, states = unwrap(output, final, call.batched)
    return output, states, cache


def _forward_defined(
    definition: Definition,
    x: AnyArray,
    hx: Any,
    parameters: Mapping[str, AnyArray],
    layout: tuple[bool, Any],
    settings: Mapping[str, Any],
    record: bool,
) -> tuple[Array, Any, Cache]:
    names = definition.signature.inputs
    inputs = {name: value for name, value in settings.items() if name in names}
    others = {name: value for name, value in settings.items() if name not in names}
    checked = check_parameters(definition, parameters, others)
    if record and checked[1].cell.masks:
        raise ValueError(f"definition: {definition.name} has random masks; use xprnn.Recurrent")
    return _forward(checked, x, hx, *layout, record, inputs)


def _context(
    spec: StackSpec, backend: Backend, call: Call, scratch: Workspace, record: bool
) -> CallContext:
    """The context of a call in new memory."""
    dtype, lengths = scratch.dtype, call.lengths
    batch = make_packed_batch(backend, *call.sizes, lengths)
    shape = CallShape(batch.steps, batch.batch, batch.running, record)
    precision = check_precision_policy(dtype, None, "ieee")
    plan = stack.plan_call(spec, backend, precision, shape, kernels.requested())
    return CallContext(plan, batch, Workspace(backend, dtype), scratch, record)
