"""One recorded or unrecorded call of a stack and its inverse: what layers and cells share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from . import kernels, stack
from .arguments import Call
from .backend import Array
from .cells import Cell
from .checks import check_flag, check_probability, check_seed, check_size
from .module import Module
from .parameters import Shapes, views
from .scratch import FreeList, Workspace
from .stack import Stack


@dataclass(frozen=True)
class _Record:
    """A recorded call: what its inverse needs, and the memory that this stands in."""

    tape: stack.Tape
    workspace: Workspace
    version: int  # of the parameters
    batched: bool  # whether the caller's arrays had a batch


class _Recurrent(Module):
    """Runs a `Stack` on time-major arrays and undoes recorded runs; subclasses shape arguments."""

    _stack: Stack
    _seed: int

    def _set_up(self, options: dict[str, Any], backend: str | None, dtype: Any) -> None:
        options["seed"] = seed = check_seed(options["seed"])
        self._stack = self._make_stack(options)
        self._build(self._stack.shapes(), options, backend, dtype)
        self._seed = seed
        self._calls = 0  # recorded so far: the dropout masks' clock
        self._moved()
        self._draw(self._stack.hidden_size**-0.5, seed)

    @staticmethod
    def _cell(options: Mapping[str, Any]) -> Cell:
        """The cell that these options ask for."""
        raise NotImplementedError

    @classmethod
    def _make_stack(cls, options: dict[str, Any]) -> Stack:
        return Stack(
            cell=cls._cell(options),
            input_size=check_size("input_size", options["input_size"]),
            hidden_size=check_size("hidden_size", options["hidden_size"]),
            num_layers=check_size("num_layers", options.get("num_layers", 1)),
            num_directions=2
            if check_flag("bidirectional", options.get("bidirectional", False))
            else 1,
            bias=check_flag("bias", options["bias"]),
            dropout=check_probability(options.get("dropout", 0.0)),
            layer_suffixes="num_layers" in options,
        )

    @classmethod
    def _shapes(cls, options: dict[str, Any]) -> Shapes:
        return cls._make_stack(options).shapes()

    def _moved(self) -> None:
        self._free = FreeList(self.backend, self.dtype)
        self._weights = self._stack.weights(self.parameters)

    def _extra(self) -> dict[str, Any]:
        return {**super()._extra(), "calls": self._calls}

    def _restore(self, extra: Any) -> None:
        super()._restore(extra)
        calls = extra["calls"]
        if type(calls) is not int or calls < 0:
            raise ValueError(f"calls: expected a whole number from 0, got {calls!r}")
        self._calls = calls

    def _run(self, call: Call) -> tuple[Array, tuple[Array, ...]]:
        """Run a checked call: fresh output, laid out as x, and final states (L*D, N, H)."""
        kernels.choose(self._stack.cell.name, self.backend)
        workspace = self._free.take()
        with self.backend.activate():
            output, final, tape = stack.forward(
                self.backend,
                self._stack,
                self._weights,
                call.x,
                call.initial,
                call.lengths,
                call.batch_first,
                workspace,
                (self._seed, self._calls) if self.training else None,
            )
        if self.training:
            self._calls += 1
            version = self.parameters.version
            self._records.append(_Record(tape, workspace, version, call.batched))
        else:
            self._free.give(workspace)
        return output, final

    def _undo(
        self,
        doutput: Array | None,
        dfinal: tuple[Array | None, ...],
        need_dx: bool,
        flow: Array | None = None,
    ) -> tuple[Array | None, tuple[Array, ...]]:
        """Undo the last record with checked arguments; adds to `grads`, all or nothing."""
        record: _Record = self._last_record()
        with self.backend.activate():
            dflat = self.backend.xp.zeros(self.grads.flat.shape, self.dtype)
            dweights = views(dflat, self.parameters.shapes)
            for name in self._frozen:
                del dweights[name]
            self._records.pop()
            dx, dinitial = stack.backward(
                self.backend,
                self._stack,
                self._weights,
                record.tape,
                doutput,
                dfinal,
                self._stack.weights(dweights),
                need_dx,
                record.workspace,
                flow,
            )
            gradients = self.grads.flat
            gradients += dflat
        self._free.give(record.workspace)
        return dx, dinitial
