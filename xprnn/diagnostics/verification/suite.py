"""Every cell on a backend, in every type, on problems that expose errors of kernels."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import numpy as np

from ...backend import Backend, BackendName, get_backend, optional, to_numpy
from ...backend.floating_point import environment
from ...nn.layers import GRU, LSTM, RNN, _Layer
from ..tolerances import EPSILON
from .comparison import check
from .report import GRADCHECK, Absent, Row, VerifyReport, worst_of


class Problem(NamedTuple):
    """The sizes and options of a layer and its call."""

    T: int
    N: int
    I: int  # noqa: E741
    H: int
    layers: int = 1
    directions: int = 1
    bias: bool = True
    dropout: float = 0.0
    lengths: tuple[int, ...] | None = None


PROBLEMS = (
    Problem(1, 5, 6, 17),  # one step: errors do not accumulate, and limits are lowest
    Problem(6, 4, 3, 17, layers=2, directions=2, dropout=0.25, lengths=(2, 6, 0, 4)),
    Problem(4, 33, 20, 70, bias=False),
)
SMALL = Problem(4, 3, 3, 4, layers=2, directions=2, lengths=(2, 0, 4))  # for the gradcheck

LAYERS: dict[str, tuple[type[_Layer], dict[str, Any]]] = {
    "rnn_tanh": (RNN, {"nonlinearity": "tanh"}),
    "rnn_relu": (RNN, {"nonlinearity": "relu"}),
    "gru": (GRU, {"reset_after": True}),
    "gru_reset_before": (GRU, {"reset_after": False}),
    "lstm": (LSTM, {}),
}
PRECISIONS: dict[str, dict[str, str]] = {
    "float64": {"dtype": "float64"},
    "float32": {"dtype": "float32"},
    "tf32": {"precision": "tf32"},
    "float16": {"compute_dtype": "float16"},
    "bfloat16": {"compute_dtype": "bfloat16"},
}
KINKED = 2.0**-11  # from this ε on, rounding may decide on which side of relu's kink a value lies


def verify_cells(
    backend: BackendName | None = None,
    cells: Collection[str] = tuple(LAYERS),
    types: Collection[str] | None = None,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> VerifyReport:
    """Verify layers of every cell: what the command `xprnn verify` does.

    :param backend: as for `get_backend`.
    :param cells: names of `LAYERS`.
    :param types: names of `PRECISIONS`; None: all that apply to this backend.
    :param report: called with the number of layers done and their total.
    :raises ValueError, BackendUnavailableError: a type or the backend cannot be used here.

    >>> verify_cells("numpy", ["gru"], ["float32"]).ok
    True
    """
    resolved = get_backend(backend)
    kinds = types_of(resolved) if types is None else types
    rows: list[Row] = []
    absent: list[Absent] = []
    total = len(cells) * (len(kinds) * len(PROBLEMS) + 1)
    done = 0
    for cell in cells:
        tasks = [(kind, problem) for kind in kinds for problem in PROBLEMS]
        for kind, problem in [*tasks, ("float64", SMALL)]:
            layer, shape = build(cell, kind, problem, resolved), (problem.T, problem.N, problem.I)
            with environment():
                checked, missing = check(layer, shape, problem.lengths, 0, problem is SMALL)
            rows += [row for row in checked if row.check in (*kinds, GRADCHECK)]
            absent += [one for one in missing if one.check != "float64" or "float64" in kinds]
            done += 1
            report(done, total)
    return VerifyReport(f"every cell on {resolved.name}", worst_of(rows), tuple(absent))


def types_of(backend: Backend) -> list[str]:
    """The names of `PRECISIONS` that apply to a backend."""
    omitted = set()
    try:
        optional.load("ml_dtypes")
    except optional.OptionalPackageError:
        omitted.add("bfloat16")
    if not backend.on_gpu:  # tf32 is a mode of NVIDIA's tensor cores
        omitted.add("tf32")
    return [name for name in PRECISIONS if name not in omitted]


def build(cell: str, kind: str, problem: Problem, backend: Backend) -> _Layer:
    """The layer of a problem, with parameters drawn from a fixed seed."""
    family, options = LAYERS[cell]
    avoid_kink = cell == "rnn_relu" and EPSILON[kind] > KINKED
    layer = family(
        problem.I,
        problem.H,
        problem.layers,
        bias=problem.bias or avoid_kink,
        dropout=problem.dropout,
        bidirectional=problem.directions == 2,
        seed=0,
        backend=backend.name,
        **options,
        **PRECISIONS[kind],
    )
    if avoid_kink:
        layer.load_state_dict(
            {n: _away_from_0(n, to_numpy(p)) for n, p in layer.parameters.items()}
        )
    return layer


def _away_from_0(name: str, parameter: np.ndarray) -> np.ndarray:
    """A parameter that keeps relu's argument away from 0, and negative in every other unit.

    The gradient is discontinuous at 0, where rounding would decide.
    """
    if name.startswith("bias_ih"):
        return np.resize(np.array([1.0, -1.0]), parameter.shape)
    return parameter / 8
