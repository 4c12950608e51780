"""The base of layers and cells: recorded and unrecorded calls of a stack, and backward."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Self

from .. import kernels
from ..backend import Array, BackendName, ComputeDTypeLike, DTypeLike, Precision
from ..cells import Cell
from ..core.checks import (
    check_count,
    check_flag,
    check_probability,
    check_seed,
    check_shape,
    check_size,
)
from ..core.packing import PackedBatch, make_packed_batch
from ..core.passes import Call, StackWeights
from ..core.precision import PrecisionPolicy, check_precision_policy
from ..core.spec import StackSpec
from ..core.workspace import Workspace, WorkspacePool
from ..engine import stack
from ..engine.explain import explain, explain_step
from ..kernels import CallContext, CallShape, ExecutionPlan
from .attributes import option, read_only
from .module import Module
from .parameters import Shapes, reads_parameters
from .step_pool import StepPool


@dataclass(slots=True)
class RecordedCall:
    """A recorded call: its tape, and the memory of the tape's activations."""

    tape: stack.Tape
    memory: Workspace
    version: int  # of the parameters
    batched: bool  # whether the caller's arrays had a batch dimension


class _Recurrent(Module):
    """Runs the forward and backward passes of a `StackSpec`; subclasses check arguments."""

    arithmetic: PrecisionPolicy = read_only(
        "arithmetic",
        "The types in which it computes.",
        "change them with to(compute_dtype=..., precision=...)",
    )
    input_size: int = option("input_size", "I, features of x.")
    hidden_size: int = option("hidden_size", "H, features of the state.")
    bias: bool = option("bias", "Whether there are b_ih and b_hh.")

    _spec: StackSpec
    _recompute: int | None = None  # steps between checkpoints
    _calls: int  # recorded so far: selects the dropout masks
    _step_requests: tuple[str, ...] = ("auto", "reference")  # for which a call may be run as a step
    _only_short_steps = False  # whether large calls of one step are run as sequences
    _step_hint = ""  # what `explain` adds to a call that is run as a step

    def _configure(
        self,
        options: dict[str, Any],
        backend: BackendName | None,
        dtype: Any,
        precision: str = "ieee",
        compute_dtype: Any = None,
    ) -> None:
        self._arithmetic = check_precision_policy(dtype, compute_dtype, precision)
        self._spec = self._make_spec(options)
        self._calls = 0
        self._allocate(self._spec.shapes(), self._plain(options), backend, dtype)

    def _construct(self, options: dict[str, Any], *execution: Any, **more: Any) -> None:
        super()._construct(options, *execution, **more)
        if self._spec.dropout and self._spec.num_layers == 1:
            warnings.warn(
                f"dropout={self._spec.dropout:g} has no effect with num_layers=1: it acts on what "
                "one layer passes to the next",
                stacklevel=3,  # the line that calls the constructor
            )

    def _bound(self) -> float:
        return float(self._spec.hidden_size**-0.5)

    @staticmethod
    def _cell(options: Mapping[str, Any]) -> Cell:
        """The cell that the options define."""
        raise NotImplementedError

    @classmethod
    def _make_spec(cls, options: Mapping[str, Any]) -> StackSpec:
        both = check_flag("bidirectional", options.get("bidirectional", False))
        return StackSpec(
            cell=cls._cell(options),
            input_size=check_size("input_size", options["input_size"]),
            hidden_size=check_size("hidden_size", options["hidden_size"]),
            num_layers=check_size("num_layers", options.get("num_layers", 1)),
            num_directions=2 if both else 1,
            bias=check_flag("bias", options["bias"]),
            dropout=check_probability(options.get("dropout", 0.0)),
            layer_suffixes="num_layers" in options,
        )

    def _plain(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """The options as JSON values, with the seed that is used."""
        checked = {field.name: getattr(self._spec, field.name) for field in fields(StackSpec)}
        plain = {name: checked.get(name, value) for name, value in options.items()}
        for name in ("batch_first", "bidirectional", "reset_after"):
            if name in plain:
                plain[name] = check_flag(name, plain[name])
        return {**plain, "seed": check_seed(options["seed"])}

    @classmethod
    def _shapes(cls, options: Mapping[str, Any]) -> Shapes:
        return cls._make_spec(options).shapes()

    def to(
        self,
        backend: BackendName | None = None,
        *,
        dtype: DTypeLike | None = None,
        compute_dtype: ComputeDTypeLike | None = None,
        precision: Precision | None = None,
    ) -> Self:
        """Move the module in place, or change the types in which it computes; None keeps a setting.

        A `compute_dtype` equal to the dtype ends mixed precision; a new dtype that cannot be
        combined with the current settings requires `compute_dtype` or `precision` too. An optimiser
        or a stepper built before cannot be used if the backend or a type it uses has changed.

        :param backend: "numpy", "cupy", "cupy:N" or "auto", as for `xprnn.get_backend`.
        :param dtype: "float32" or "float64", to which parameters and gradients are converted.
        :param compute_dtype: "float16" or "bfloat16" with "float32", or the dtype.
        :param precision: "ieee" or "tf32"; see `xprnn.RNN`.
        :return: the module itself.
        :raises RuntimeError: recorded calls are waiting for `backward`, or it is called inside a
            `writable()` block.
        :raises TypeError, ValueError, BackendUnavailableError: as the constructor; nothing is
            changed.

        >>> import xprnn
        >>> gru = xprnn.GRU(3, 4, backend="numpy", seed=0)
        >>> str(gru.to(compute_dtype="float16").arithmetic)
        'float32 with float16'
        >>> str(gru.to(dtype="float64", compute_dtype="float64").arithmetic)
        'float64'
        """
        current = self._arithmetic
        if compute_dtype is None and current.is_mixed:
            compute_dtype = current.compute_dtype
        policy = check_precision_policy(
            current.dtype if dtype is None else dtype,
            compute_dtype,
            current.precision if precision is None else precision,
        )
        super().to(backend, dtype=dtype)
        self._arithmetic = policy
        self._plans = kernels.Plans()
        self._steps = self._new_steps()
        return self

    def _execution_options(self) -> dict[str, Any]:
        precision, compute_dtype = self._arithmetic.precision, self._arithmetic.compute_dtype.name
        return {
            **super()._execution_options(),
            "precision": precision,
            "compute_dtype": compute_dtype,
        }

    def _plan(self, steps: int, batch: int) -> ExecutionPlan:
        """The plan of a call with T steps of N rows, all of one length."""
        return self._plan_of(make_packed_batch(self._backend, steps, batch, None))

    def _plan_of(self, batch: PackedBatch) -> ExecutionPlan:
        """The plan of a call, cached by size, mode and request."""
        record, request = self._training, kernels.requested()
        recompute = self._recompute if record else None
        shape = CallShape(batch.steps, batch.batch, batch.running, record, recompute)
        key = shape, request
        plan = self._plans.get(key)
        if plan is None:
            plan = stack.plan_call(self._spec, self._backend, self._arithmetic, shape, request)
            if len(self._plans) >= kernels.MAX_PLANS:
                self._plans.clear()
            self._plans[key] = plan
        return plan

    def _backend_changed(self) -> None:
        self._weights = self._spec.weights(self._parameters)
        self._plans = kernels.Plans()
        self._steps = self._new_steps()
        self._scratch = WorkspacePool(self._backend, self._dtype)
        self._memory = WorkspacePool(self._backend, self._dtype)

    def eval(self) -> Self:
        """Switch to eval mode: calls are not recorded; drop recorded calls and unused memory.

        :return: the module itself.

        >>> import numpy as np, xprnn
        >>> gru = xprnn.GRU(3, 4, backend="numpy", seed=0).train()
        >>> output, h_n = gru(np.ones((5, 2, 3), np.float32))
        >>> gru.recorded_calls, gru.eval().recorded_calls
        (1, 0)
        """
        self._scratch = WorkspacePool(self._backend, self._dtype)
        self._memory = WorkspacePool(self._backend, self._dtype)
        self._steps = self._new_steps()
        self._parameters.drop_packed_weights()
        return super().eval()

    def _extra_state(self) -> dict[str, Any]:
        return {**super()._extra_state(), "calls": self._calls}

    def _restore_extra_state(self, extra: Any) -> None:
        super()._restore_extra_state(extra)
        self._calls = check_count("calls", extra["calls"])

    def explain(self, shape: tuple[int, ...]) -> str:
        """Which implementation runs a call with x of `shape`, why, and what a step costs.

        :param shape: x's shape, as for a call.
        :return: lines of text.
        :raises TypeError, ValueError: the module does not take such an x.

        >>> import xprnn
        >>> lines = xprnn.GRU(3, 4, seed=0).explain((10, 2, 3)).splitlines()
        >>> lines[0].rpartition(": ")[0]  # then the implementation, and why
        'GRU(3, 4) on numpy, float32, T=10 N=2'
        >>> lines[2]
        '  a step moves at least 672 bytes forward, 640 backward'
        """
        spec = self._spec
        steps, batch = self._steps_and_batch(check_shape(shape, spec.input_size))
        if steps == 1 and self._step_size(batch) is not None:
            assert self._steps is not None
            text = explain_step(type(self).__name__, spec, self._steps.plan(batch), batch)
            return text + self._step_hint.format(batch)
        plan = self._plan(steps, batch)
        memory = self._memory_of(plan, steps, batch)
        return explain(type(self).__name__, spec, plan, (steps, batch), self._training, memory)

    def _memory_of(self, plan: ExecutionPlan, steps: int, batch: int) -> list[str]:
        """What `explain` says about the memory of a training step."""
        return []

    def _steps_and_batch(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """T and N of an x of this shape; ValueError if its number of dimensions is wrong."""
        raise NotImplementedError

    def _new_steps(self) -> StepPool | None:
        """The executors for unrecorded calls of one step; None if no call is run as a step."""
        if self._backend.on_gpu or self._arithmetic.is_mixed or self._spec.num_directions != 1:
            return None
        requests, only_short = self._step_requests, self._only_short_steps
        return StepPool(self._spec, self._backend, self._arithmetic, requests, only_short)

    def _step_size(self, batch: int) -> Any:
        """The executors for a call of one step of N rows; None: it is run as a sequence.

        Inside a `writable` block the parameters may change without a new version.
        """
        if self._steps is None or self._training or self._parameters.in_writable_block:
            return None
        return self._steps.size(batch)

    def _run(self, call: Call) -> tuple[Array, tuple[Array, ...]]:
        """Run a checked call as a sequence; the caller excludes writes of the parameters.

        :return: a new output, laid out as x, and final states (L*D, N, H).
        """
        batch = make_packed_batch(self._backend, *call.sizes, call.lengths)
        plan, record = self._plan_of(batch), self._training
        if record:
            self._prepare_record()
        with self._backend.activate():
            scratch = self._scratch.acquire()
            saved = self._memory.acquire() if record else scratch
            output, final, tape = stack.forward(
                self._spec,
                StackWeights(self._weights, self._parameters.packed_weights),
                call,
                CallContext(plan, batch, saved, scratch, record),
                (self._options["seed"], self._calls),
            )
            self._scratch.release(scratch)
        if record:
            self._calls += 1
            self._record(RecordedCall(tape, saved, self._parameters.version, call.batched))
        return output, final

    def _last_record(self) -> RecordedCall:
        record: RecordedCall = super()._last_record()
        if record.tape.spent:
            raise RuntimeError(
                "backward: it was interrupted by an error in the last recorded call, whose "
                "activations are partly overwritten; drop recorded calls with eval()"
            )
        return record

    @reads_parameters
    def _run_backward(
        self,
        record: RecordedCall,
        doutput: Array | None,
        dfinal: tuple[Array | None, ...],
        need_dx: bool,
        norms: Array | None = None,
    ) -> tuple[Array | None, tuple[Array, ...]]:
        """The backward pass of the last recorded call; adds to `grads`, all or nothing."""
        if record.version != self._parameters.version:  # another thread has written since
            self._last_record()
        if need_dx is not True:
            need_dx = check_flag("need_dx", need_dx)
        with self._backend.activate():
            gradients = self._grads.flat
            dflat = self._backend.xp.zeros(gradients.shape, self._dtype)
            dweights = self._parameters.views(dflat)
            for name in self._frozen:
                del dweights[name]
            scratch = self._scratch.acquire()
            dx, dinitial = stack.backward(
                self._spec,
                record.tape,
                (doutput, dfinal),
                self._spec.weights(dweights),
                need_dx,
                scratch,
                norms,
            )
            self._scratch.release(scratch)  # may fail, so before `grads` are changed
            self._memory.release(record.memory)
            gradients += dflat
            self._records.pop()
        return dx, dinitial
