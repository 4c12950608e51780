"""The rows of a stepper: a stack's step, compared with float64, then timed against torch's.

On a GPU: layer by layer with the pointwise kernels, all layers in one launch, and that launch as a
CUDA graph, which is the step without the overhead of Python.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from xprnn.backend import Backend, asarray, to_numpy
from xprnn.backend.cupy import CupyBackend
from xprnn.diagnostics.tolerances import error_of, tolerance
from xprnn.diagnostics.verification.equations import flat, packed
from xprnn.kernels import KernelUnavailableError
from xprnn.tools.bench.clock import measure, timer
from xprnn.tools.bench.peers import torch_for
from xprnn.tools.bench.run import DisagreementError
from xprnn.tools.bench.task import Setting, Task

from ..common import use_kernels
from .bounds import ITEMSIZE, step_bound, weights
from .graphs import NotCapturedError, replayed
from .peaks import Peaks, measure_read
from .problems import STEP, StackProblem, StepProblem
from .rows import Row, described, drawn, fill, layer_of, one_line, poisoned, row_of, with_error

GRAPH = "graph"
COMPARED = 4  # steps whose results are compared; even, as a graph requires
BUDGET = 0.3  # seconds after which no new round begins


def candidates(backend: Backend) -> tuple[str, ...]:
    """The values of a row's "kernels" to measure on a backend."""
    on_gpu = isinstance(backend, CupyBackend)
    return ("sequence", GRAPH, "pointwise") if on_gpu else ("reference",)


class Streams:
    """A stepper, and `run_step` for its next step, on fixed arrays: `x` (in), `out` (out)."""

    def __init__(self, name: str, layer: Any, problem: StepProblem) -> None:
        backend, shape = layer.backend, (problem.N, problem.H)
        with use_kernels("sequence" if name == GRAPH else name):
            self.stepper = layer.stepper(problem.N)
        self.x, self.out = (backend.xp.zeros(shape, layer.dtype) for _ in range(2))
        self.run_step: Callable[[], Any] = partial(self.stepper.step, self.x, out=self.out)
        if name == GRAPH:
            self.run_step = replayed(self.run_step, backend)
        self.name, self._backend = name, backend.name

    def run(self, x: np.ndarray, states: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
        """The results of steps x (T, N, H) from states (L, N, H); T is even."""
        self.stepper.load(packed([asarray(a, backend=self._backend) for a in states]))
        outputs = []
        for x_t in x:
            self.x[...] = asarray(x_t, backend=self._backend)
            self.run_step()
            outputs.append(to_numpy(self.out).copy())
        return named(np.stack(outputs), [to_numpy(a) for a in flat(self.stepper.state())])


def named(output: np.ndarray, states: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    """Output and states by name."""
    names = "h", "c"
    return {"output": output, **dict(zip(names, states, strict=False))}


# -- compared


def compared(problem: StepProblem, backend: Backend) -> tuple[list[Row], list[Row]]:
    """The rows of a problem without times, and kernels that do not support it."""
    layer = rounded_layer(problem, backend)
    x = values(problem, COMPARED, 0, layer)
    count = len(layer._spec.cell.state_names)
    states = [values(problem, problem.layers, 1 + k, layer) for k in range(count)]
    expected = equations(layer, x, states)
    limits = dict.fromkeys(expected, _tolerance(problem))
    rows: list[Row] = []
    absent: list[Row] = []
    for name in candidates(backend):
        try:
            with poisoned(backend):
                results = Streams(name, layer, problem).run(x, states)
        except (KernelUnavailableError, NotCapturedError) as error:
            absent.append({**described(problem), "kernels": name, "reason": str(error)})
        except (RuntimeError, MemoryError) as error:  # fails this row, not the report
            rows.append(row_of(problem, STEP, name, wrong=one_line(error)))
        else:
            rows.append(with_error(row_of(problem, STEP, name), results, expected, limits))
    return rows, absent


def rounded_layer(problem: StackProblem | StepProblem, backend: Backend) -> Any:
    """The layer of a problem, its weights rounded to the compute dtype."""
    layer = layer_of(problem, backend)
    compute_dtype = layer.arithmetic.compute_dtype
    rounded = {n: to_numpy(p).astype(compute_dtype) for n, p in layer.parameters.items()}
    layer.load_state_dict({n: p.astype(layer.dtype) for n, p in rounded.items()})
    return layer


def values(problem: StackProblem | StepProblem, count: int, seed: int, layer: Any) -> np.ndarray:
    """Normal values (count, N, H), rounded to the compute dtype, in the layer's dtype."""
    float32 = drawn(count, problem.N, problem.H, seed)
    return float32.astype(layer.arithmetic.compute_dtype).astype(layer.dtype)


def _tolerance(problem: StepProblem) -> float:
    return tolerance(problem.dtype, steps=COMPARED, width=2 * problem.H, layers=problem.layers)


def equations(layer: Any, x: np.ndarray, states: Sequence[np.ndarray]) -> Mapping[str, np.ndarray]:
    """The results of the float64 equations on NumPy."""
    float64 = {"dtype": "float64", "compute_dtype": "float64", "precision": "ieee"}
    with use_kernels("reference"):
        reference = copy.deepcopy(layer).to("numpy", **float64).eval()
        hx = packed([state.astype(np.float64) for state in states])
        output, *final = flat(reference(x.astype(np.float64), hx))
    return named(output, final)


# -- timed


def timed(problem: StepProblem, rows: Sequence[Row], backend: Backend, peaks: Peaks) -> None:
    """Add times to the problem's correct rows, interleaved with torch's cells."""
    for row in rows:
        row["not_timed"] = "wrong" if row["wrong"] else None
    correct = [row for row in rows if not row["wrong"]]
    if not correct:
        return
    try:
        layer = layer_of(problem, backend)
        x = values(problem, 1, 0, layer)[0]
        theirs = torch_cells(problem, layer, x)
        expected = np.stack([to_numpy(theirs()).astype(np.float64) for _ in range(COMPARED)])
        mine = [Streams(row["kernels"], layer, problem) for row in correct]
        for row, streams in zip(correct, mine, strict=True):
            _check_agreement(streams, x, expected, row["limit"])
        calls = [streams.run_step for streams in mine]
        samples = measure([*calls, theirs], timer(backend), BUDGET)
        if not all(np.isfinite(to_numpy(streams.out)).all() for streams in mine):
            raise RuntimeError("h became NaN while it was timed: a block timed out")
        fill(correct, samples)
        bound, resource = step_bound(problem, peaks, _read_time(problem, backend, peaks))
        for row in correct:
            row["floor_us"], row["floor_of"] = 1e6 * bound, resource
    except (DisagreementError, RuntimeError, MemoryError) as error:
        for row in correct:
            row["wrong"] = row["not_timed"] = one_line(error)


def _read_time(problem: StepProblem, backend: Backend, peaks: Peaks) -> float:
    """The seconds in which every weight is read once."""
    nbytes = weights(problem) * ITEMSIZE[problem.dtype]
    on_gpu = isinstance(backend, CupyBackend)
    return measure_read(backend, nbytes) if on_gpu else nbytes / peaks.bandwidth


def torch_cells(problem: StepProblem, layer: Any, x: np.ndarray) -> Callable[[], Any]:
    """A call that runs the next step of stacked torch cells; it returns h (N, H)."""
    setting = Setting(
        problem.cell, problem.H, problem.H, problem.N, 1, problem.dtype, layer.backend.name
    )
    torch, device, dtype = torch_for(Task(setting, layer, x, x, ()))
    kind, _, nonlinearity = problem.cell.partition("_")
    family = getattr(torch.nn, f"{kind.upper()}Cell")
    options = {"nonlinearity": nonlinearity} if nonlinearity else {}
    cells = []
    for k in range(problem.layers):
        cell = family(problem.H, problem.H, **options).to(device, dtype)
        named = {name: to_numpy(layer.parameters[f"{name}_l{k}"]) for name in cell.state_dict()}
        cell.load_state_dict({name: torch.from_numpy(a.copy()) for name, a in named.items()})
        cells.append(cell)
    torch_x, states = torch.from_numpy(x).to(device, dtype), [None] * len(cells)

    def step() -> Any:
        with torch.inference_mode():
            h = torch_x
            for k, cell in enumerate(cells):
                states[k] = cell(h, states[k])
                h = flat(states[k])[0]
        return h

    return step


def _check_agreement(streams: Streams, x: np.ndarray, expected: np.ndarray, limit: float) -> None:
    """DisagreementError if h differs from torch's by more than twice the limit."""
    states = [np.zeros_like(to_numpy(a)) for a in flat(streams.stepper.state())]
    error = error_of(streams.run(np.stack([x] * COMPARED), states)["output"], expected)
    if not error <= 2 * limit:
        raise DisagreementError(
            f"{streams.name}: its h differs from that of torch's cells by {error:.2g} of the "
            f"largest element, expected at most {2 * limit:.2g}"
        )
