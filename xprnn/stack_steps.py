"""All that a step of a stack works on: the states twice, the weights, and the calls between.

Who serves is the engine's to say: recorded calls of the plain code on NumPy, kernels and products
layer by layer, or one call or launch for all layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from math import prod
from typing import TYPE_CHECKING, Any

from . import sequence
from .backend import Array
from .cells import Buffers, Weights
from .directions import PacksOfAll
from .kernels import Engine
from .network import Stack
from .program import Program, record

if TYPE_CHECKING:
    from .kernels.cuda.stack_step import StackStep as Launched
    from .kernels.numba.step import StackStep as Called


class StackSteps:
    """The steps of N rows through a stack of one direction.

    `sides` are the states (L, N, H) each, twice: a step reads one side and writes the other, so
    that one that fails has changed nothing. h has the compute dtype, c that of the engine.
    """

    def __init__(self, engine: Engine, stack: Stack, batch: int) -> None:
        self._engine, self._net, self.batch = engine, stack, batch
        self._allocate()

    def bind(self, arrays: Mapping[str, Array]) -> None:
        """Write down the steps from side 0 to 1 and back, on these parameters of the stack."""
        self._version = -1  # of the parameters that the steps have taken up
        self._called: Called | None = None
        self._launched: Launched | None = None
        self._copies: list[tuple[Array, Array]] = []
        self._biases: list[tuple[Array, Weights]] = []
        self._programs: list[Program] = []
        weights = [given for (given,) in self._net.weights(arrays)]
        if self._engine.implementation != "sequence":
            read = [self._read(given) for given in weights]
            self._programs = [self._program(read, side) for side in range(2)]
        elif self._engine.backend.on_gpu:
            self._launched = self._launches([self._read(given)[0] for given in weights])
        else:
            self._called = self._calls(weights)

    def follow(self, version: int, packs: PacksOfAll) -> None:
        """Take up what was written to the parameters up to a version; both were read before."""
        if version != self._version:
            with self._engine.backend.activate():
                self._refresh(packs)
            self._version = version

    def _refresh(self, packs: PacksOfAll) -> None:
        """Copy what is written in the parameters now, or take what others have packed of it."""
        if self._called is not None:
            self._called.refresh(packs[0, 0])
        for place, matrix in self._copies:
            place[...] = matrix
        for bias, given in self._biases:
            bias[...] = self._net.cell.input_bias(given, bias.dtype)

    def take(self, side: int, x: Array, waiting: Array | None, out: Array | None) -> Array:
        """Take all layers from `side` to the other one; the last layer's h, in `out` if given.

        x (N, I) is read, and `waiting` (N, 1), bool: the rows that keep their states.
        """
        now, after = self.sides[side], self.sides[1 - side]
        written = None
        if self._called is not None:
            written = self._fresh() if out is None else out
            self._called.launch(x, now, after, written)
        elif self._launched is not None:
            xp = self._engine.xp
            # blocks write `out` while others still read x
            direct = out is not None and out.flags.c_contiguous and not xp.may_share_memory(x, out)
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

    def activate(self) -> AbstractContextManager[Any]:
        """The context of `take`: the backend's, but for compiled steps that see to it themselves.

        To enter a call's floating-point environment from Python takes a fifth of their time.
        """
        if self._called is not None and self._called.flushes:
            return nullcontext()
        return self._engine.backend.activate()

    def _fresh(self) -> Array:
        return self._engine.xp.empty((self.batch, self._net.hidden_size), self._engine.dtype)

    def _repeat(self, side: int, x: Array, waiting: Array | None) -> None:
        """Take all layers from `side` to the other one, call by call."""
        self._x[...] = x
        if waiting is not None:
            self._engine.xp.copyto(bits(self._x), 0, "unsafe", waiting)
        for call in self._programs[side]:
            call()

    def _empty(self, rows: int, width: int, dtype: Any, stack: tuple[int, ...] = ()) -> Array:
        """Zeros (*stack, rows, width), with contiguous rows or, in recorded calls, columns.

        With columns each gate is one piece of memory, which saves more than half of a small call.
        """
        flat = self._engine.backend.zeros_aligned(prod(stack) * rows * width, dtype)
        if self._engine.repeats:
            return flat.reshape(*stack, width, rows).swapaxes(-1, -2)
        return flat.reshape(*stack, rows, width)

    def _allocate(self) -> None:
        """All arrays but those of the weights; but for the states they serve layer after layer."""
        net, N, H = self._net, self.batch, self._net.hidden_size
        A, T = self._engine.dtype, self._engine.compute_dtype
        cell, whole = self._engine.cell, self._engine.implementation == "sequence"
        types = [T, *[A] * (len(cell.state_names) - 1)]
        self.sides = [
            tuple([self._empty(N, H, dtype, (net.num_layers,)) for dtype in types])
            for _ in range(2)
        ]
        if whole:
            return
        self._x: Array = self._empty(N, net.input_size, T)
        self._gates = self._empty(N, cell.gates * H, T)
        self._saved = self._empty(N, cell.saved * H, T)
        self._scratch = tuple([self._empty(N, w * H, A) for w in cell.forward_scratch])

    def _read(self, given: Weights) -> tuple[Weights, Array | None]:
        """A layer's weights, and the bias of its input side, as its step reads them.

        `refresh` fills what is a copy: narrow weights, and for recorded calls all of them. BLAS on
        a CPU reads weights with contiguous columns up to twice as fast, for one row too, and NumPy
        adds a bias that is there for every row without a buffer of its own.
        """
        T, repeats = self._engine.compute_dtype, self._engine.repeats
        copies: dict[str, Array] = {}
        for name in ("weight_ih", "weight_hh"):
            matrix = getattr(given, name)
            rows, columns = matrix.shape
            if repeats:
                flat = self._engine.backend.zeros_aligned(rows * columns, T)
                copies[name] = flat.reshape(columns, rows).T
            elif matrix.dtype != T:
                copies[name] = self._engine.xp.empty(matrix.shape, T)
        bias = None
        if given.bias_ih is not None:
            width = given.bias_ih.shape[0]
            bias = self._empty(self.batch if repeats else 1, width, T)
            self._biases.append((bias, given))
            if repeats:
                copies["bias_hh"] = self._empty(self.batch, width, T)
        self._copies += [(place, getattr(given, name)) for name, place in copies.items()]
        return given._replace(**copies), bias

    def _program(self, read: list[tuple[Weights, Array | None]], side: int) -> Program:
        """The calls that take all layers from one side to the other."""
        engine, program, x = self._engine, Program(), self._x
        for layer, (weights, bias) in enumerate(read):
            here, ahead = (
                tuple([state[layer] for state in self.sides[k]]) for k in (side, 1 - side)
            )
            step = Buffers(self._gates, self._saved, here, ahead, (), self._scratch)
            arguments = engine.cell, weights, bias, x, step
            if self._engine.repeats:
                program += record(sequence.step, *arguments)
            else:
                program.append(partial(sequence.step, engine.xp, *arguments))
            x = ahead[0]
        return program

    def _calls(self, weights: list[Weights]) -> Called:
        """What takes a step of all layers in one call of compiled code."""
        from .kernels.numba.step import StackStep

        engine = self._engine
        return StackStep(engine.backend, engine.cell.name, engine.dtype, weights, self.batch)

    def _launches(self, weights: list[Weights]) -> Launched:
        """What takes a step of all layers in one launch."""
        from .kernels.cuda.stack_step import Sizes, StackStep

        net = self._net
        sizes = Sizes(net.num_layers, self.batch, net.input_size, net.hidden_size)
        engine = self._engine
        return StackStep(engine.backend, net.cell.name, engine.arithmetic, sizes, weights)


def bits(array: Array) -> Array:
    """An array's memory as whole numbers: every type can be chosen from, bit by bit."""
    return array.view(f"u{array.dtype.itemsize}")
