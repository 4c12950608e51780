"""The measured setting, and the weights and inputs that all libraries get."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from ...backend import BackendName, get_backend, to_numpy
from ...cells.definition import Definition
from ...diagnostics.verification.suite import LAYERS, PRECISIONS
from ...nn.defined import Recurrent

Results = dict[str, np.ndarray]


class PeerUnavailableError(RuntimeError):
    """A library cannot be measured; the message gives the reason."""


@dataclass(frozen=True)
class Setting:
    """One layer, T steps of N rows."""

    cell: str | Definition = "gru"  # a name of `LAYERS`, or a definition
    hidden: int = 128  # H
    input: int = 128  # I
    batch: int = 32  # N
    steps: int = 100  # T
    kind: str = "float32"  # a name of `PRECISIONS`
    backend: BackendName | None = None
    directions: int = 1  # D

    def built_in(self, peer: str) -> str:
        """The cell's name; PeerUnavailableError if it is a definition, which no peer has."""
        if isinstance(self.cell, str):
            return self.cell
        raise PeerUnavailableError(f"{peer}: has no layer of the cell {self.cell.name}")

    @property
    def operand_dtype(self) -> str:
        """The dtype in which operands of products are stored: that of the peers' layers."""
        return "float32" if self.kind == "tf32" else self.kind


@dataclass(frozen=True)
class Task:
    """The layer of a setting, in eval mode, and its inputs on the host."""

    setting: Setting
    layer: Any
    x: np.ndarray  # (T, N, I) in the layer's dtype, values representable in `setting.operand_dtype`
    doutput: np.ndarray  # (T, N, D*H), likewise
    states: tuple[np.ndarray, ...]  # (h,) or (h, c), each (N, H): the states before a single step

    @property
    def weights(self) -> Results:
        """Copies of the layer's parameters by name, on the host."""
        return {name: to_numpy(array).copy() for name, array in self.layer.parameters.items()}


@dataclass(frozen=True)
class Peer:
    """One library: its calls and its results."""

    name: str
    forward: Callable[[], Any]  # saves nothing for a gradient
    both: Callable[[], Any] | None  # forward and backward, all gradients; None: no gradients
    results: Results  # output, and with `both` dx and the gradients of the weights
    note: str  # version, device, dtypes and threads


def make_task(setting: Setting) -> Task:
    """Draw weights, x and the output's gradient from a fixed seed.

    :raises ValueError, BackendUnavailableError: the dtype or the backend cannot be used.
    :raises TypeError: the cell is a definition that needs sizes or inputs.
    """
    make, options = _constructor(setting.cell)
    layer = make(
        setting.input,
        setting.hidden,
        backend=get_backend(setting.backend).name,
        seed=0,
        bidirectional=setting.directions == 2,
        **options,
        **PRECISIONS[setting.kind],
    )
    rng = np.random.default_rng(0)

    def draw(width: int) -> np.ndarray:
        values = rng.standard_normal((setting.steps, setting.batch, width))
        return values.astype(layer.arithmetic.compute_dtype).astype(layer.dtype)

    x, doutput = draw(setting.input), draw(setting.directions * layer._spec.output_size)
    states = tuple([draw(size)[0] for size in layer._spec.state_sizes])
    return Task(setting, layer, x, doutput, states)


def _constructor(cell: str | Definition) -> tuple[Callable[..., Any], Mapping[str, Any]]:
    """What makes a layer of a cell, and more arguments for it."""
    if isinstance(cell, str):
        return LAYERS[cell]
    if names := cell.signature.inputs:
        raise TypeError(
            f"cell: {cell.name} has inputs beside x, {', '.join(names)}: it is not timed"
        )
    return partial(Recurrent, cell), {}
