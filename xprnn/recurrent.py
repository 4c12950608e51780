"""One recorded or unrecorded call of a stack and its inverse: what layers and cells share."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Self

from . import kernels, stack
from .arguments import Call
from .arithmetic import PrecisionPolicy, check_precision_policy
from .attributes import option, read_only
from .backend import Array, BackendName, ComputeDTypeLike, DTypeLike, Precision
from .cell_steps import StepPool
from .cells import Cell
from .checks import check_count, check_flag, check_probability, check_seed, check_shape, check_size
from .explain import explain, explain_step
from .layout import steps_and_batch
from .memory import translate_out_of_memory
from .module import Module
from .network import StackSpec
from .parameters import Shapes, reads_parameters, views
from .scratch import Workspace, WorkspacePool


@dataclass
class RecordedCall:
    """A recorded call: what its inverse needs, and the memory that this stands in."""

    tape: stack.Tape
    memory: Workspace
    version: int  # of the parameters
    batched: bool  # whether the caller's arrays had a batch


class _Recurrent(Module):
    """Runs a `StackSpec` on time-major arrays and undoes recorded runs; subclasses shape arguments."""

    arithmetic: PrecisionPolicy = read_only(
        "arithmetic",
        "The types in which it computes.",
        "change them with to(compute_dtype=..., precision=...)",
    )
    input_size: int = option("input_size", "I, features of x.")
    hidden_size: int = option("hidden_size", "H, features of the state.")
    bias: bool = option("bias", "Whether there are b_ih and b_hh.")

    _stack: StackSpec
    _recompute: int | None = None  # steps of a segment that `backward` computes again
    _calls: int  # recorded so far: the dropout masks' clock
    _ready_hint = ""  # what `explain` adds to a step that is kept ready

    def _configure(
        self,
        options: dict[str, Any],
        backend: BackendName | None,
        dtype: Any,
        precision: str = "ieee",
        compute_dtype: Any = None,
    ) -> None:
        self._arithmetic = check_precision_policy(dtype, compute_dtype, precision)
        self._stack = self._make_stack(options)
        self._calls = 0
        self._allocate(self._stack.shapes(), self._plain(options), backend, dtype)

    def _construct(self, options: dict[str, Any], *execution: Any, **more: Any) -> None:
        super()._construct(options, *execution, **more)
        if self._stack.dropout and self._stack.num_layers == 1:
            warnings.warn(
                f"dropout={self._stack.dropout:g} has no effect with num_layers=1: it acts on what "
                "one layer passes to the next",
                stacklevel=3,  # the line that calls the constructor
            )

    def _bound(self) -> float:
        return float(self._stack.hidden_size**-0.5)

    @staticmethod
    def _cell(options: Mapping[str, Any]) -> Cell:
        """The cell that these options ask for."""
        raise NotImplementedError

    @classmethod
    def _make_stack(cls, options: Mapping[str, Any]) -> StackSpec:
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
        """The options as Python's own types, and the seed as drawn: what a file can hold."""
        checked = {field.name: getattr(self._stack, field.name) for field in fields(StackSpec)}
        plain = {name: checked.get(name, value) for name, value in options.items()}
        for name in ("batch_first", "bidirectional", "reset_after"):
            if name in plain:
                plain[name] = check_flag(name, plain[name])
        return {**plain, "seed": check_seed(options["seed"])}

    @classmethod
    def _shapes(cls, options: Mapping[str, Any]) -> Shapes:
        return cls._make_stack(options).shapes()

    def to(
        self,
        backend: BackendName | None = None,
        *,
        dtype: DTypeLike | None = None,
        compute_dtype: ComputeDTypeLike | None = None,
        precision: Precision | None = None,
    ) -> Self:
        """Move the module in place, or change in which types it computes; None leaves as it is.

        A `compute_dtype` equal to the dtype ends mixed precision; a new dtype that does not go
        with the present ones needs `compute_dtype` or `precision` beside it.

        :raises RuntimeError: recorded calls are waiting for `backward`.
        :raises ValueError, BackendUnavailableError: as the constructor; nothing is changed.
        """
        now = self._arithmetic
        if compute_dtype is None and now.narrow:
            compute_dtype = now.compute_dtype
        arithmetic = check_precision_policy(
            now.dtype if dtype is None else dtype,
            compute_dtype,
            now.precision if precision is None else precision,
        )
        super().to(backend, dtype=dtype)
        self._arithmetic = arithmetic
        self._steps = self._new_steps()
        return self

    def _execution_options(self) -> dict[str, Any]:
        precision, compute_dtype = self._arithmetic.precision, self._arithmetic.compute_dtype.name
        return {
            **super()._execution_options(),
            "precision": precision,
            "compute_dtype": compute_dtype,
        }

    def _engine(self, steps: int, batch: int) -> kernels.ExecutionPlan:
        net = self._stack
        if self._training and self._recompute is not None:
            steps = min(steps, self._recompute)
        sizes = batch, net.widest_input, net.hidden_size, steps
        return kernels.choose(net.cell, self._backend, self._arithmetic, sizes, self._training)

    def _backend_changed(self) -> None:
        self._weights = self._stack.weights(self._parameters)
        self._steps = self._new_steps()
        self._scratch = WorkspacePool(self._backend, self._dtype)
        self._memory = WorkspacePool(self._backend, self._dtype)

    def eval(self) -> Self:
        """From here on calls are not recorded; records left are dropped, and free memory is too."""
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
        """Who would serve a call with x of `shape`, why, why nobody faster, and what a step costs.

        :param shape: x's shape, as for a call.
        :raises TypeError, ValueError: the module does not take such an x.

        >>> import xprnn
        >>> lines = xprnn.GRU(3, 4, seed=0).explain((10, 2, 3)).splitlines()
        >>> lines[0].rpartition(": ")[0]  # then who serves, and why
        'GRU(3, 4) on numpy, float32, T=10 N=2'
        >>> lines[2]
        '  a step moves at least 672 bytes forward, 640 backward'
        """
        net = self._stack
        steps, batch = self._steps_and_batch(check_shape(shape, net.input_size))
        if steps == 1 and self._goes_by_step(batch, kernels.asked()):
            assert self._steps is not None
            engine = self._steps.engine(self._arithmetic, batch)
            text = explain_step(type(self).__name__, net, engine, batch)
            return text + self._ready_hint.format(batch)
        engine = self._engine(steps, batch)
        memory, segments = self._memory_of(engine, steps, batch), self._recompute is not None
        return explain(
            type(self).__name__, net, engine, steps, batch, self._training, memory, segments
        )

    def _memory_of(self, engine: kernels.ExecutionPlan, steps: int, batch: int) -> list[str]:
        """What `explain` says of the memory that a training step takes."""
        return []

    def _steps_and_batch(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """T and N of an x of this shape; ValueError if it has not the right dimensions."""
        raise NotImplementedError

    def _new_steps(self) -> StepPool | None:
        """What keeps steps ready for calls of one; None where there cannot be any."""
        if self._backend.on_gpu or self._arithmetic.narrow or self._stack.num_directions != 1:
            return None
        return StepPool(self._stack, self._backend)

    def _ready_steps(self) -> StepPool | None:
        """What keeps steps ready, if a call may take one now.

        Inside a `writable` block the numbers may change without a new version.
        """
        return None if self._training or self._parameters.in_writable_block else self._steps

    def _goes_by_step(self, batch: int, forced: str) -> bool:
        """Whether a call of one step of so many rows takes such a step.

        `forced` is what `kernels.asked` gives now.
        """
        raise NotImplementedError

    @translate_out_of_memory
    def _take(
        self, x: Array, initial: tuple[Array | None, ...] | None, forced: str, cell: bool = False
    ) -> tuple[Array, ...]:
        """Take a step that is kept ready: see `StepPool.take`."""
        assert self._steps is not None
        return self._steps.take(self._arithmetic, self._parameters, x, initial, forced, cell)

    @translate_out_of_memory
    @reads_parameters
    def _run(self, call: Call) -> tuple[Array, tuple[Array, ...]]:
        """Run a checked call: fresh output, laid out as x, and final states (L*D, N, H)."""
        engine = self._engine(*steps_and_batch(call.x, call.batch_first))
        if self._training:
            self._parameters.check_not_in_writable_block("a recorded call")
            self._records.drop_older(self._parameters.version)
        with self._backend.activate():
            scratch = self._scratch.acquire()
            memory = self._memory.acquire() if self._training else scratch
            output, final, tape = stack.forward(
                engine,
                self._stack,
                self._weights,
                self._parameters.packed_weights,
                call.x,
                call.initial,
                call.lengths,
                call.batch_first,
                memory,
                scratch,
                (self._options["seed"], self._calls) if self._training else None,
                self._recompute,
            )
            self._scratch.release(scratch)
        if self._training:
            self._calls += 1
            record = RecordedCall(tape, memory, self._parameters.version, call.batched)
            self._records.add(record, type(self).__name__)
        return output, final

    def _last_record(self) -> RecordedCall:
        record: RecordedCall = super()._last_record()
        if record.tape.spent:
            raise RuntimeError(
                "backward: an error ended it half way through the last recorded call, which "
                "cannot be undone any more; drop the records with eval()"
            )
        return record

    @translate_out_of_memory
    @reads_parameters
    def _undo(
        self,
        doutput: Array | None,
        dfinal: tuple[Array | None, ...],
        need_dx: bool,
        flow: Array | None = None,
    ) -> tuple[Array | None, tuple[Array, ...]]:
        """Undo the last record with checked arguments; adds to `grads`, all or nothing."""
        record = self._last_record()
        need_dx = check_flag("need_dx", need_dx)
        with self._backend.activate():
            dflat = self._backend.xp.zeros(self.grads.flat.shape, self._dtype)
            dweights = views(dflat, self._parameters.shapes)
            for name in self._frozen:
                del dweights[name]
            scratch = self._scratch.acquire()
            dx, dinitial = stack.backward(
                self._stack,
                record.tape,
                doutput,
                dfinal,
                self._stack.weights(dweights),
                need_dx,
                scratch,
                flow,
            )
            self._scratch.release(scratch)  # may fail: before anything counts
            self._memory.release(record.memory)
            gradients = self.grads.flat
            gradients += dflat
            self._records.pop()
        return dx, dinitial
