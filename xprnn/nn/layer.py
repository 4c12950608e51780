"""The calls of a layer: what RNN, GRU and LSTM have in common."""

from __future__ import annotations

from typing import Any, Literal, overload

from ..backend import AnyArray, Array, Lengths, States, StatesLike, StateTypes
from ..core.checks import check_size
from ..core.oom import translate_out_of_memory
from ..engine.footprint import Footprint, training_step
from ..kernels import ExecutionPlan
from .arguments import check_call, check_upstream, unwrap
from .attributes import option
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
        """
        call = check_call(
            self._spec, self._backend, self._dtype, x, hx, lengths, self._options["batch_first"]
        )
        steps, batch = call.sizes
        size = None
        if steps == 1 and (call.lengths is None or call.lengths.all()):
            size = self._step_size(batch)
        if size is None:
            output, final = self._run(call)
        else:
            x_0 = call.x[:, 0] if call.batch_first else call.x[0]
            h, final = self._run_step(size, x_0, call.initial)
            output = h[:, None] if call.batch_first else h[None]
        return unwrap(output, final, call.batched)

    @translate_out_of_memory
    def _run_step(
        self, size: Any, x: Array, initial: tuple[Array | None, ...] | None
    ) -> tuple[Array, tuple[Array, ...]]:
        """Run a prepared step: see `StepPool.run_layers`."""
        assert self._steps is not None
        return self._steps.run_layers(size, self._parameters, x, initial)

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
        """A stepper, which runs the layer one step at a time: see `xprnn.nn.stepper.Stepper`.

        :param batch: N, the number of streams, which start and end independently.
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
