"""A layer run one step at a time, on streams whose length is not known in advance."""

from __future__ import annotations

from threading import get_ident
from typing import Any

from .. import kernels
from ..backend import AnyArray, Array, Backend, Rows, States, StatesLike, StateTypes
from ..backend.exports import exported_from
from ..core.checks import check_array, check_rows, check_size, check_states
from ..core.oom import translate_out_of_memory
from ..core.precision import PrecisionPolicy
from ..engine.explain import explain_step
from ..engine.step import StepExecutor, bits
from .arguments import check_inputs, state_outer
from .attributes import internal_attributes, read_only, restore_user_attributes, user_attributes
from .locking import WRITER
from .recurrent import _Recurrent


@exported_from("xprnn.stepper")
class Stepper(StateTypes[StatesLike, States]):
    """The states of N streams, and the step that advances all layers of a stack by one.

    `layer.stepper(batch)` makes one. A step computes what the layer would at its next step in
    eval mode, h_t = layer(x_t, h_{t-1}), for every layer from the first to the last, in any mode of
    the layer: nothing is recorded, and dropout is not applied. Its memory is allocated once. It
    reads the layer's parameters: a write to them takes effect at the next step. After the layer is
    moved to another backend or other types, a new stepper is needed.

    A stepper is for one thread, and on a GPU for one stream; a layer may have any number of them,
    one per thread. `use_kernels` or `XPRNN_KERNELS` is read when a stepper is made.

    :param layer: an RNN, GRU or LSTM of one direction.
    :param batch: N, the number of streams, at least 1.
    :raises TypeError, ValueError: `batch` is not such a number, or the layer is bidirectional.
    :raises KernelUnavailableError: the implementation that `use_kernels` or `XPRNN_KERNELS` forces
        does not support a step of the layer.
    :raises MemoryError: there is not enough memory for the states and the step.

    >>> import numpy as np, xprnn
    >>> gru = xprnn.GRU(3, 4, num_layers=2, seed=0)
    >>> x = np.random.default_rng(0).standard_normal((5, 2, 3), dtype=np.float32)
    >>> stepper = gru.stepper(2)
    >>> y = [stepper.step(x_t) for x_t in x]
    >>> output, h_n = gru(x)
    >>> np.allclose(y, output, atol=1e-6), np.allclose(stepper.state(), h_n, atol=1e-6)
    (True, True)
    """

    batch: int = read_only("batch", "N, the number of streams.", "make another stepper")
    backend: Backend = read_only("backend", "Where it computes.", "make another stepper")
    arithmetic: PrecisionPolicy = read_only(
        "arithmetic", "The types in which it computes.", "make another stepper"
    )
    _internal: frozenset[str] = frozenset()  # the names of attributes not set by users

    def __init__(self, layer: _Recurrent, batch: int) -> None:
        with internal_attributes(self):
            self._configure(layer, batch)

    @translate_out_of_memory
    def _configure(self, layer: _Recurrent, batch: int) -> None:
        spec = layer._spec
        if spec.num_directions != 1:
            raise ValueError(
                "stepper: expected a layer of one direction, got a bidirectional one, which also "
                "reads every row from its end: the end of a stream is not known yet"
            )
        self._batch = check_size("batch", batch)
        self._x_shape = self._batch, spec.input_size
        self._out_shape = self._batch, spec.output_size
        self._backend, self._arithmetic = layer.backend, layer.arithmetic
        self._layer, self._spec = layer, spec
        self._side = 0  # index of the side that holds the states
        self._plan = kernels.plan_step(spec, layer.backend, layer.arithmetic, self.batch)
        with self.backend.activate():
            self._steps = StepExecutor(self._plan, spec, self.batch)
            self._bind()
        if any(self._spec.cell.initial_values):
            self.reset()

    @translate_out_of_memory
    def step(
        self,
        x: AnyArray,
        *,
        rows: Rows | None = None,
        out: Array | None = None,
        **inputs: AnyArray,
    ) -> Array:
        """Run one step of every stream, or of some.

        On a CPU a step with `out` allocates no array except a mask for `rows`; equal inputs give
        bitwise equal results.

        :param x: (N, I), the next input of each stream, whatever the layer's `batch_first` says;
            the layer's dtype and backend, any strides; only read.
        :param rows: the streams that have an input now: a boolean mask (N,), integers from 0 to
            N-1, on the host, or a slice. The others wait: their rows of x are ignored, and their
            states do not change. None: all.
        :param out: (N, H), the layer's dtype and backend: written and returned. None: a new array.
        :param inputs: the inputs of a defined cell besides x, by name, (N,) or (N, 1) each.
        :return: (N, H), the last layer's h of every stream; of a waiting one that of its last step.
        :raises TypeError, ValueError: an argument has another type, dtype, backend, shape or
            value, or the layer has been moved; no stream has advanced.
        :raises RuntimeError: it is called inside a `writable()` block of the layer.

        >>> import numpy as np, xprnn
        >>> rnn = xprnn.RNN(1, 1, nonlinearity="relu", bias=False, backend="numpy", seed=0)
        >>> rnn.load_state_dict({"weight_ih_l0": np.ones((1, 1)), "weight_hh_l0": np.eye(1)})
        >>> stepper = rnn.stepper(2)
        >>> stepper.step(np.array([[1.0], [2.0]], np.float32)).tolist()
        [[1.0], [2.0]]
        >>> stepper.step(np.array([[1.0], [2.0]], np.float32), rows=[1]).tolist()  # row 0 waits
        [[1.0], [4.0]]
        """
        A = self._arithmetic.dtype
        x = check_array("x", x, self._backend, A, self._x_shape)
        target = out if out is None else self._target(out)
        extra: tuple[Array, ...] = ()
        if inputs or self._spec.reads_extra:
            extra = check_inputs(self._spec, self._backend, A, (self._batch,), inputs)
        mask = None
        if rows is not None:
            waiting = ~check_rows(rows, self.batch)
            with self._backend.activate():
                mask = self._backend.from_host(waiting)[:, None]
        reading, me = self._layer._parameters.reading, get_ident()
        readers = reading.readers
        try:  # as `with reading:`, in less time
            readers.add(me)
            if WRITER in readers:
                reading.wait_for_writers(me)
            self._follow()
            result = self._steps.run(self._side, x, mask, target, extra)
            self._side = 1 - self._side  # the step is done
        finally:
            readers.discard(me)
            if WRITER in readers:
                reading.notify_writers()
        return result if out is None else out

    @translate_out_of_memory
    def state(self) -> States:
        """The states of all streams: h (L, N, H), for an LSTM (h, c), as the layer returns h_n.

        They are copies in the layer's dtype, which the layer and `load` accept.

        :return: h, or the pair (h, c), each (L, N, H), on the layer's backend.
        :raises MemoryError: there is not enough memory for the copies.

        >>> import numpy as np, xprnn
        >>> gru = xprnn.GRU(3, 4, backend="numpy", seed=0)
        >>> x = np.ones((2, 3), np.float32)
        >>> stepper = gru.stepper(2)
        >>> y = stepper.step(x)
        >>> h = stepper.state()
        >>> h.shape, bool((h[-1] == y).all())
        ((1, 2, 4), True)
        """
        with self.backend.activate():
            current, dtype = self._steps.sides[self._side], self.arithmetic.dtype
            states: Any = tuple([state.astype(dtype, order="C") for state in current])
        return states if len(states) > 1 else states[0]

    def load(self, state: StatesLike) -> None:
        """Continue from a state that `state` or the layer has returned.

        :param state: h (L, N, H), in the layer's dtype and on its backend; for an LSTM (h, c),
            either may be None: zeros. Only read.
        :raises TypeError, ValueError: `state` is invalid; nothing is changed.

        >>> import numpy as np, xprnn
        >>> stepper = xprnn.GRU(3, 1, backend="numpy", seed=0).stepper(2)
        >>> stepper.load(np.array([[[0.25], [0.5]]], np.float32))
        >>> stepper.state().tolist()
        [[[0.25], [0.5]]]
        """
        spec, dtype = self._spec, self.arithmetic.dtype
        names, outer = spec.cell.state_names, state_outer(spec, self.batch)
        values = check_states(names, state, self.backend, dtype, outer, spec.state_sizes)
        if values is None:
            raise TypeError(f"state: expected {' and '.join(names)}, got None; reset() sets zeros")
        with self.backend.activate():
            begin = self._spec.cell.initial_values
            for target, value, first in zip(
                self._steps.sides[self._side], values, begin, strict=True
            ):
                target[...] = first if value is None else value

    def reset(self, rows: Rows | None = None) -> None:
        """Restart some streams: their states become zero, or the cell's initial values.

        Ended streams need no other treatment.

        :param rows: as for `step`; None: all.
        :raises TypeError, ValueError: `rows` is invalid; nothing is changed.

        >>> import numpy as np, xprnn
        >>> stepper = xprnn.GRU(3, 1, backend="numpy", seed=0).stepper(2)
        >>> stepper.load(np.array([[[0.25], [0.5]]], np.float32))
        >>> stepper.reset([1])
        >>> stepper.state().tolist()
        [[[0.25], [0.0]]]
        """
        chosen = check_rows(slice(None) if rows is None else rows, self.batch)
        with self.backend.activate():
            mask = self.backend.from_host(chosen)[:, None]
            begin = self._spec.cell.initial_values
            for state, first in zip(self._steps.sides[self._side], begin, strict=True):
                if first:
                    self._plan.xp.copyto(state, first, "same_kind", mask)
                else:
                    self._plan.xp.copyto(bits(state), 0, "unsafe", mask)

    def explain(self) -> str:
        """Which implementation runs a step, why, and what a step costs.

        :return: lines of text.

        >>> import xprnn
        >>> lines = xprnn.GRU(3, 4, seed=0).stepper(2).explain().splitlines()
        >>> lines[0].rpartition(": ")[0]  # then the implementation, and why
        'GRU(3, 4) on numpy, float32, L=1 N=2, one step'
        """
        kind = type(self._layer).__name__
        return explain_step(kind, self._spec, self._plan, self.batch)

    def __getstate__(self) -> dict[str, Any]:
        """The layer, N, the states, and users' attributes.

        :raises ValueError: the layer has been moved, and would not accept the states.
        """
        self._check_not_moved()
        core = {"layer": self._layer, "batch": self._batch, "state": self.state()}
        return {**core, **user_attributes(self)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Make the stepper of the layer, and continue from the states."""
        rest = dict(state)
        Stepper.__init__(self, rest.pop("layer"), rest.pop("batch"))
        self.load(rest.pop("state"))
        restore_user_attributes(self, rest)

    def _follow(self) -> None:
        """Use the current parameters."""
        layer = self._layer
        parameters = layer._parameters
        parameters.check_not_in_writable_block("step")
        if parameters is not self._parameters:
            self._check_not_moved()
            with self._backend.activate():
                self._bind()
        self._steps.follow(parameters)

    def _check_not_moved(self) -> None:
        layer = self._layer
        if (layer.backend, layer.arithmetic) != (self.backend, self.arithmetic):
            raise ValueError(
                f"stepper: made on {self.backend.name} in {self.arithmetic}, the layer is on "
                f"{layer.backend.name} in {layer.arithmetic}; make another with stepper(batch)"
            )

    def _bind(self) -> None:
        parameters = self._layer.parameters
        self._steps.bind(parameters)
        self._parameters = parameters

    def _target(self, out: Any) -> Array:
        """`out` as an array that can be written."""
        array = check_array("out", out, self._backend, self._arithmetic.dtype, self._out_shape)
        if not getattr(array.flags, "writeable", True):  # CuPy's have no such flag
            raise ValueError("out: expected an array that can be written, got a read-only one")
        return array


def _rebuilt(layer: _Recurrent, batch: int, state: Any) -> Stepper:
    """The function that pickles of xprnn 0.1.0 name."""
    stepper = Stepper(layer, batch)
    stepper.load(state)
    return stepper
