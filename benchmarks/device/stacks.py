"""The rows of stacks: all steps of all layers, compared with float64, then timed beside torch's.

On a GPU in one launch, the layers in a wave, and layer by layer, a launch each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from xprnn import use_kernels
from xprnn.backend import Backend, asarray, to_numpy
from xprnn.backend.cupy import CupyBackend
from xprnn.bench import DisagreementError
from xprnn.bench.clock import measure, timer
from xprnn.bench.peers import torch_for
from xprnn.bench.task import Setting, Task
from xprnn.kernels import WAVE, KernelUnavailableError
from xprnn.tolerances import error_of, tolerance
from xprnn.verify.equations import flat, packed

from .ceilings import Ceilings
from .floor import floor
from .problems import FORWARD, StackProblem
from .rows import CHECKED, Row, described, fill, judged, layer_of, poisoned, row_of, said
from .steps import equations, named, numbers, rounded_layer

BUDGET = 0.15  # seconds after which no round begins


def candidates(backend: Backend) -> tuple[str, ...]:
    """What is tried on a backend, by `XPRNN_KERNELS`."""
    return (WAVE, "sequence") if isinstance(backend, CupyBackend) else ("reference",)


# -- compared


def compared(problem: StackProblem, backend: Backend) -> tuple[list[Row], list[Row]]:
    """The rows of a problem without times, and who cannot serve it: as `rows.compared`."""
    layer = rounded_layer(problem, backend)
    x = numbers(problem, CHECKED, 0, layer)
    count = len(layer._stack.cell.state_names)
    states = [numbers(problem, problem.layers, 1 + k, layer) for k in range(count)]
    expected = equations(layer, x, states)
    limits = dict.fromkeys(expected, _tolerance(problem, CHECKED))
    given = [asarray(a, backend=backend.name) for a in (x, *states)]
    rows: list[Row] = []
    absent: list[Row] = []
    for name in candidates(backend):
        try:
            with poisoned(backend), use_kernels(name):
                output, *final = flat(layer(given[0], packed(given[1:])))
                found = named(to_numpy(output), [to_numpy(state) for state in final])
        except KernelUnavailableError as error:
            absent.append({**described(problem), "kernels": name, "reason": str(error)})
        except (RuntimeError, MemoryError) as error:  # one of them, not the whole report
            rows.append(row_of(problem, FORWARD, name, wrong=said(error)))
        else:
            rows.append(judged(row_of(problem, FORWARD, name), found, expected, limits))
    return rows, absent


def _tolerance(problem: StackProblem, steps: int) -> float:
    return tolerance(problem.dtype, steps=steps, width=2 * problem.H, layers=problem.layers)


# -- timed


def timed(problem: StackProblem, rows: Sequence[Row], backend: Backend, ceilings: Ceilings) -> None:
    """Add the times of a problem to those of its rows that are right, beside torch's stack."""
    for row in rows:
        row["not_timed"] = "wrong" if row["wrong"] else None
    right = [row for row in rows if not row["wrong"]]
    if not right:
        return
    try:
        layer = layer_of(problem, backend)
        x = numbers(problem, problem.T, 0, layer)
        theirs = torch_stack(problem, layer, x)
        expected = to_numpy(theirs()[0]).astype(np.float64)
        mine = [_call(row["kernels"], layer, asarray(x, backend=backend.name)) for row in right]
        for row, call in zip(right, mine, strict=True):
            _check_agreement(problem, row["kernels"], call, expected)
        fill(right, measure([*mine, theirs], timer(backend), BUDGET))
        least, which = floor(problem, FORWARD, ceilings, None)
        for row in right:
            row["floor_us"], row["floor_of"] = 1e6 * least, which
    except (DisagreementError, RuntimeError, MemoryError) as error:
        for row in right:
            row["wrong"] = row["not_timed"] = said(error)


def _call(name: str, layer: Any, x: Any) -> Callable[[], Any]:
    """The layer's call with what serves it forced."""

    def run() -> Any:
        with use_kernels(name):
            return layer(x)

    return run


def torch_stack(problem: StackProblem, layer: Any, x: np.ndarray) -> Callable[[], Any]:
    """A call of torch's stack of the same weights; it gives the output (T, N, H) and the states."""
    sizes = problem.H, problem.H, problem.N, problem.T
    setting = Setting(problem.cell, *sizes, problem.dtype, layer.backend.name)
    torch, device, dtype = torch_for(Task(setting, layer, x, x, ()))
    family = getattr(torch.nn, problem.cell.upper())
    stack = family(problem.H, problem.H, problem.layers).to(device, dtype)
    weights = {name: to_numpy(array).copy() for name, array in layer.parameters.items()}
    stack.load_state_dict({name: torch.from_numpy(array) for name, array in weights.items()})
    given = torch.from_numpy(x).to(device, dtype)

    def run() -> Any:
        with torch.inference_mode():
            return stack(given)

    return run


def _check_agreement(
    problem: StackProblem, name: str, call: Callable[[], Any], expected: np.ndarray
) -> None:
    """DisagreementError unless it finds what torch finds; each may be wrong by the tolerance."""
    limit = 2 * _tolerance(problem, problem.T)
    error = error_of(to_numpy(call()[0]), expected)
    if not error <= limit:
        raise DisagreementError(
            f"{name}: its output differs from that of torch's stack by {error:.2g} of the largest "
            f"element, expected at most {limit:.2g}"
        )
