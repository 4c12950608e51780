"""What is measured, and the numbers that everybody gets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..backend import BackendName, get_backend, to_numpy
from ..verify.suite import ARITHMETIC, LAYERS

Results = dict[str, np.ndarray]


class PeerUnavailableError(RuntimeError):
    """A library cannot be measured; the message says why."""


@dataclass(frozen=True)
class Setting:
    """One layer, T steps of N rows."""

    cell: str = "gru"  # a name of `LAYERS`
    hidden: int = 128
    input: int = 128
    batch: int = 32
    steps: int = 100
    kind: str = "float32"  # a name of `ARITHMETIC`
    backend: BackendName | None = None
    directions: int = 1  # D

    @property
    def stored(self) -> str:
        """The dtype of what a product reads, which is that of the peers' layers."""
        return "float32" if self.kind == "tf32" else self.kind


@dataclass(frozen=True)
class Task:
    """The layer of a setting, in eval mode, and on the host what it gets."""

    setting: Setting
    layer: Any
    x: np.ndarray  # (T, N, I) in the layer's dtype, values that `setting.stored` holds
    doutput: np.ndarray  # (T, N, D*H), likewise
    states: tuple[np.ndarray, ...]  # (h,) or (h, c), each (N, H): what a single step starts from

    @property
    def weights(self) -> Results:
        """Copies of the layer's parameters by name, on the host."""
        return {name: to_numpy(array).copy() for name, array in self.layer.parameters.items()}


@dataclass(frozen=True)
class Peer:
    """One library: what it can run, and what it computes."""

    name: str
    forward: Callable[[], Any]  # keeps nothing for a gradient
    both: Callable[[], Any] | None  # forward and backward, every gradient; None: it has none
    results: Results  # of both: output, dx and the weights' gradients; else output alone
    note: str  # version, device, types and threads


def make_task(setting: Setting) -> Task:
    """Draw weights, x and gradient, from the same seed every time.

    :raises ValueError, BackendUnavailableError: the type or the backend cannot be used.
    """
    family, options = LAYERS[setting.cell]
    layer = family(
        setting.input,
        setting.hidden,
        backend=get_backend(setting.backend).name,
        seed=0,
        bidirectional=setting.directions == 2,
        **options,
        **ARITHMETIC[setting.kind],
    )
    rng = np.random.default_rng(0)

    def drawn(width: int) -> np.ndarray:
        wide = rng.standard_normal((setting.steps, setting.batch, width))
        return wide.astype(layer.arithmetic.compute_dtype).astype(layer.dtype)

    x, doutput = drawn(setting.input), drawn(setting.directions * setting.hidden)
    names = layer._stack.cell.state_names
    return Task(setting, layer, x, doutput, tuple([drawn(setting.hidden)[0] for _ in names]))
