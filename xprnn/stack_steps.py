"""All that a step of a stack works on: the states twice, the weights, and the calls between.

Who serves is the engine's to say: recorded calls of the plain code on NumPy, kernels and products
layer by layer, or one call or launch for all layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from . import sequence
from .backend import Array
from .cells import Buffers, Weights
from .directions import PackedWeightsCache
from .kernels import ExecutionPlan
from .network import StackSpec
from .parameters import Parameters
from .program import Constants, Program, record

if TYPE_CHECKING:
    from .kernels.cuda.stack_step import FusedStep as Launched
    from .kernels.numba.step import FusedStep as Called


SIZES = 64  # numbers of rows whose captured calls are kept; with one more the oldest are dropped


class _Captured(NamedTuple):
    """What steps of one number of rows work on, and their calls."""

    sides: list[tuple[Array, ...]]
    # the rest is for steps that are taken call by call
    x: Any = None  # (N, I)
    biases: tuple[tuple[Array, Array], ...] = ()  # (N, G*H) each, and what is copied to each row
    programs: tuple[Program, ...] = ()  # from side 0 to 1, and back


class StepExecutor:
    """The steps of N rows through a stack of one direction.

    `sides` are the states (L, N, H) each, twice: a step reads one side and writes the other, so
    that one that fails has changed nothing. h has the compute dtype, c that of the engine.

    `resize` changes N. All sizes share the buffers of the largest so far and the copies of the
    weights; each has views of its own, laid out as if there were no other size, so that its results
    are the same to the last bit.
    """

    def __init__(self, engine: ExecutionPlan, stack: StackSpec, batch: int) -> None:
        self._engine, self._net, self._backend = engine, stack, engine.backend
        self._one_by_one = engine.implementation != "sequence"
        self._most = self.batch = batch
        self._memory: dict[str, Array] = {}  # by use, for `_most` rows
        self._constants: Constants = {}
        self.sides: list[tuple[Array, ...]] = self._states(batch)

    def bind(self, arrays: Mapping[str, Array]) -> None:
        """Capture the steps from side 0 to 1 and back, on these parameters of the stack."""
        self._version = -1  # of the parameters that the steps have taken up
        self._called: Called | None = None
        self._launched: Launched | None = None
        self._copies: list[tuple[Array, Array]] = []
        self._given = [given for (given,) in self._net.weights(arrays)]
        if self._one_by_one or self._engine.backend.on_gpu:
            self._read = [self._copied(given) for given in self._given]
        self._input_biases: list[Array] = []
        if self._one_by_one:
            xp, T, biased = self._engine.xp, self._engine.compute_dtype, self._net.bias
            self._input_biases = [xp.empty(len(w.weight_ih), T) for w in self._given if biased]
        elif self._engine.backend.on_gpu:
            self._launched = self._launches()
        else:
            self._called = self._calls()
        # whether a step sets the control bits of subnormal numbers itself
        self._flushes = self._called is not None and self._called.flushes
        self._captured: dict[int, _Captured] = {}
        self._work_on(self._capture(self.batch))

    def resize(self, batch: int) -> None:
        """Go on with steps of so many rows; their states have to be written first."""
        if batch > self._most:
            self._most, self._memory, self._constants, self._captured = batch, {}, {}, {}
        captured = self._captured.get(batch) or self._capture(batch)
        if self._called is not None:
            self._called.resize(batch)
        self.batch = batch
        self._work_on(captured)

    def follow(self, parameters: Parameters) -> None:
        """Take up what was written to the parameters, which nothing writes meanwhile."""
        version = parameters.version
        if version != self._version:
            with self._engine.backend.activate():
                self._refresh(parameters.packed_weights)
            self._version = version

    def _refresh(self, packs: PackedWeightsCache) -> None:
        """Copy what is written in the parameters now, or take what others have packed of it."""
        if self._called is not None:
            self._called.refresh(packs[0, 0])
        for place, matrix in self._copies:
            place[...] = matrix
        for bias, given in zip(self._input_biases, self._given, strict=False):
            bias[...] = self._net.cell.input_bias(given, bias.dtype)
        for rows, bias in self._biases:
            rows[...] = bias

    def _work_on(self, captured: _Captured) -> None:
        self.sides, self._x, self._biases, self._programs = captured
        for rows, bias in self._biases:  # another size has written its own there
            rows[...] = bias

    def take(self, side: int, x: Array, waiting: Array | None, out: Array | None) -> Array:
        """Take all layers from `side` to the other one; the last layer's h, in `out` if given.

        x (N, I) is read, and `waiting` (N, 1), bool: the rows that keep their states.
        """
        if self._flushes and self._called is not None and waiting is None:
            # to enter a call's floating-point environment from Python takes a fifth of its time
            written: Any = self._fresh() if out is None else out
            self._called.launch(x, self.sides[side], self.sides[1 - side], written)
            return written
        with self._backend.activate():
            now, after = self.sides[side], self.sides[1 - side]
            written = None
            if self._called is not None:
                written = self._fresh() if out is None else out
                self._called.launch(x, now, after, written)
            elif self._launched is not None:
                xp = self._engine.xp
                # blocks write `out` while others still read x
                direct = (
                    out is not None and out.flags.c_contiguous and not xp.may_share_memory(x, out)
                )
                written = out if direct else self._fresh()
                self._launched.launch(xp.ascontiguousarray(x), now, after, written)
            else:
                self._repeat(side, x, waiting)
            if waiting is None and written is not None and (out is None or out is written):
                return written
            if waiting is not None:
                for kept, state in zip(now, after, strict=True):
                    self._engine.xp.copyto(bits(state), bits(kept), "unsafe", waiting)
            h = after[0][-1]
            if out is None:
                return h.astype(self._engine.dtype, order="C")
            out[...] = h
            return out

    def _fresh(self) -> Array:
        return self._engine.xp.empty((self.batch, self._net.hidden_size), self._engine.dtype)

    def _repeat(self, side: int, x: Array, waiting: Array | None) -> None:
        """Take all layers from `side` to the other one, call by call."""
        self._x[...] = x
        if waiting is not None:
            self._engine.xp.copyto(bits(self._x), 0, "unsafe", waiting)
        for call in self._programs[side]:
            call()

    def _capture(self, batch: int) -> _Captured:
        """The views and the calls of steps of so many rows, from here on kept."""
        if len(self._captured) >= SIZES:
            del self._captured[next(iter(self._captured))]
        sides = self._states(batch)
        captured = self._calls_of(batch, sides) if self._one_by_one else _Captured(sides)
        self._captured[batch] = captured
        return captured

    def _calls_of(self, batch: int, sides: list[tuple[Array, ...]]) -> _Captured:
        """The steps that are taken call by call.

        But for states, weights and biases the arrays serve layer after layer. NumPy adds a bias
        that is there for every row without a buffer of its own.
        """
        engine, cell, H = self._engine, self._engine.cell, self._net.hidden_size
        A, T = engine.dtype, engine.compute_dtype
        x = self._empty("x", batch, self._net.input_size, T)
        gates = self._empty("gates", batch, cell.gates * H, T)
        saved = self._empty("saved", batch, cell.saved * H, T)
        widths = enumerate(cell.forward_scratch)
        scratch = tuple([self._empty(f"scratch{k}", batch, w * H, A) for k, w in widths])
        read, biases = self._read, self._input_biases
        filled: list[tuple[Array, Any]] = []
        if engine.repeats and biases:
            for k, weights in enumerate(read):
                for name, bias in (("ih", biases[k]), ("hh", weights.bias_hh)):
                    filled.append((self._empty(f"b_{name}{k}", batch, cell.gates * H, T), bias))
            biases = [rows for rows, _ in filled[::2]]
            read = [
                weights._replace(bias_hh=rows)
                for weights, (rows, _) in zip(read, filled[1::2], strict=True)
            ]
        programs: list[Program] = []
        for now, after in (sides, sides[::-1]):
            program: Program = []
            below = x
            for k, weights in enumerate(read):
                states, ahead = (tuple([state[k] for state in side]) for side in (now, after))
                step = Buffers(gates, saved, states, ahead, (), scratch)
                arguments = cell, weights, biases[k] if biases else None, below, step
                if engine.repeats:
                    program += record(sequence.step, *arguments, constants=self._constants)
                else:
                    program.append(partial(sequence.step, engine.xp, *arguments))
                below = ahead[0]
            programs.append(program)
        return _Captured(sides, x, tuple(filled), tuple(programs))

    def _states(self, batch: int) -> list[tuple[Array, ...]]:
        """The states of so many rows, on both sides."""
        net, engine = self._net, self._engine
        names = engine.cell.state_names
        types = [engine.compute_dtype, *[engine.dtype] * (len(names) - 1)]
        return [
            tuple(
                [
                    self._empty(f"{name}{side}", batch, net.hidden_size, dtype, net.num_layers)
                    for name, dtype in zip(names, types, strict=True)
                ]
            )
            for side in range(2)
        ]

    def _empty(self, use: str, rows: int, width: int, dtype: Any, layers: int = 0) -> Array:
        """An array (rows, width), or (layers, rows, width); zeros where it is the first of its use.

        It is the beginning of a buffer for the most rows, with contiguous rows or, in recorded
        calls, columns: then each gate is one piece of memory, which saves more than half of a small
        call.
        """
        size = max(layers, 1) * width
        flat = self._memory.get(use)
        if flat is None:
            flat = self._engine.backend.zeros_aligned(size * self._most, dtype)
            self._memory[use] = flat
        outer = (layers,) if layers else ()
        if self._engine.repeats:
            return flat[: size * rows].reshape(*outer, width, rows).swapaxes(-1, -2)
        return flat[: size * rows].reshape(*outer, rows, width)

    def _copied(self, given: Weights) -> Weights:
        """A layer's weights as its step reads them.

        `refresh` fills what is a copy: narrow weights, and for recorded calls all of them. BLAS on
        a CPU reads weights with contiguous columns up to twice as fast, for one row too.
        """
        T = self._engine.compute_dtype
        copies: dict[str, Array] = {}
        for name in ("weight_ih", "weight_hh"):
            matrix = getattr(given, name)
            rows, columns = matrix.shape
            if self._engine.repeats:
                flat = self._engine.backend.zeros_aligned(rows * columns, T)
                copies[name] = flat.reshape(columns, rows).T
            elif matrix.dtype != T:
                copies[name] = self._engine.xp.empty(matrix.shape, T)
        self._copies += [(place, getattr(given, name)) for name, place in copies.items()]
        return given._replace(**copies)

    def _calls(self) -> Called:
        """What takes a step of all layers in one call of compiled code."""
        from .kernels.numba.step import FusedStep

        engine = self._engine
        return FusedStep(engine.backend, engine.cell.name, engine.dtype, self._given, self.batch)

    def _launches(self) -> Launched:
        """What takes a step of all layers in one launch."""
        from .kernels.cuda.stack_step import FusedStep, Sizes

        net = self._net
        sizes = Sizes(net.num_layers, self.batch, net.input_size, net.hidden_size)
        engine = self._engine
        return FusedStep(engine.backend, net.cell.name, engine.arithmetic, sizes, self._read)


def bits(array: Array) -> Array:
    """An array's memory as whole numbers: every type can be chosen from, bit by bit."""
    return array.view(f"u{array.dtype.itemsize}")
