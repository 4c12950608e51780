"""The rows of stacks: compared with float64, then timed interleaved with torch's.

On a GPU: as a wavefront in one launch, and layer by layer in one launch each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from xprnn.backend import Backend, asarray, to_numpy
from xprnn.backend.cupy import CupyBackend
from xprnn.diagnostics.tolerances import error_of, tolerance
from xprnn.diagnostics.verification.equations import flat, packed
from xprnn.kernels import WAVE, KernelUnavailableError
from xprnn.tools.bench.clock import measure, timer
from xprnn.tools.bench.peers import torch_for
from xprnn.tools.bench.run import DisagreementError
from xprnn.tools.bench.task import Setting, Task

from ..common import use_kernels
from .bounds import call_bound
from .peaks import Peaks
from .problems import FORWARD, StackProblem
from .rows import CHECKED, Row, described, fill, layer_of, one_line, poisoned, row_of, with_error
from .steps import equations, named, rounded_layer, values

BUDGET = 0.15  # seconds after which no new round begins


def candidates(backend: Backend) -> tuple[str, ...]:
    """The values of `XPRNN_KERNELS` to measure on a backend."""
    return (WAVE, "sequence") if isinstance(backend, CupyBackend) else ("reference",)


# -- compared


def compared(problem: StackProblem, backend: Backend) -> tuple[list[Row], list[Row]]:
    """The rows of a problem without times, and kernels that do not support it."""
    layer = rounded_layer(problem, backend)
    x = values(problem, CHECKED, 0, layer)
    count = len(layer._spec.cell.state_names)
    states = [values(problem, problem.layers, 1 + k, layer) for k in range(count)]
    expected = equations(layer, x, states)
    limits = dict.fromkeys(expected, _tolerance(problem, CHECKED))
    arguments = [asarray(a, backend=backend.name) for a in (x, *states)]
    rows: list[Row] = []
    absent: list[Row] = []
    for name in candidates(backend):
        try:
            with poisoned(backend), use_kernels(name):
                output, *final = flat(layer(arguments[0], packed(arguments[1:])))
                results = named(to_numpy(output), [to_numpy(state) for state in final])
        except KernelUnavailableError as error:
            absent.append({**described(problem), "kernels": name, "reason": str(error)})
        except (RuntimeError, MemoryError) as error:  # fails this row, not the report
            rows.append(row_of(problem, FORWARD, name, wrong=one_line(error)))
        else:
            rows.append(with_error(row_of(problem, FORWARD, name), results, expected, limits))
    return rows, absent


def _tolerance(problem: StackProblem, steps: int) -> float:
    return tolerance(problem.dtype, steps=steps, width=2 * problem.H, layers=problem.layers)


# -- timed


def timed(problem: StackProblem, rows: Sequence[Row], backend: Backend, peaks: Peaks) -> None:
    """Add times to the problem's correct rows, interleaved with torch's stack."""
    for row in rows:
        row["not_timed"] = "wrong" if row["wrong"] else None
    correct = [row for row in rows if not row["wrong"]]
    if not correct:
        return
    try:
        layer = layer_of(problem, backend)
        x = values(problem, problem.T, 0, layer)
        theirs = torch_stack(problem, layer, x)
        expected = to_numpy(theirs()[0]).astype(np.float64)
        mine = [_call(row["kernels"], layer, asarray(x, backend=backend.name)) for row in correct]
        for row, call in zip(correct, mine, strict=True):
            _check_agreement(problem, row["kernels"], call, expected)
        fill(correct, measure([*mine, theirs], timer(backend), BUDGET))
        bound, resource = call_bound(problem, FORWARD, peaks, None)
        for row in correct:
            row["floor_us"], row["floor_of"] = 1e6 * bound, resource
    except (DisagreementError, RuntimeError, MemoryError) as error:
        for row in correct:
            row["wrong"] = row["not_timed"] = one_line(error)


def _call(name: str, layer: Any, x: Any) -> Callable[[], Any]:
    """The layer's call with forced kernels."""

    def run() -> Any:
        with use_kernels(name):
            return layer(x)

    return run


def torch_stack(problem: StackProblem, layer: Any, x: np.ndarray) -> Callable[[], Any]:
    """A call of torch's stack with the same weights; it returns output (T, N, H) and states."""
    sizes = problem.H, problem.H, problem.N, problem.T
    setting = Setting(problem.cell, *sizes, problem.dtype, layer.backend.name)
    torch, device, dtype = torch_for(Task(setting, layer, x, x, ()))
    family = getattr(torch.nn, problem.cell.upper())
    stack = family(problem.H, problem.H, problem.layers).to(device, dtype)
    weights = {name: to_numpy(array).copy() for name, array in layer.parameters.items()}
    stack.load_state_dict({name: torch.from_numpy(array) for name, array in weights.items()})
    torch_x = torch.from_numpy(x).to(device, dtype)

    def run() -> Any:
        with torch.inference_mode():
            return stack(torch_x)

    return run


def _check_agreement(
    problem: StackProblem, name: str, call: Callable[[], Any], expected: np.ndarray
) -> None:
    """DisagreementError if the output differs from torch's by more than twice the tolerance."""
    limit = 2 * _tolerance(problem, problem.T)
    error = error_of(to_numpy(call()[0]), expected)
    if not error <= limit:
        raise DisagreementError(
            f"{name}: its output differs from that of torch's stack by {error:.2g} of the largest "
            f"element, expected at most {limit:.2g}"
        )
