"""The rows of a stepper: a step of a stack, first compared with float64, then timed beside torch's.

On a GPU: layer by layer with the pointwise kernels, all layers in one launch, and that launch as a
CUDA graph, which is what is left of the step without Python.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from xprnn import use_kernels
from xprnn.backend import Backend, asarray, to_numpy
from xprnn.backend.cupy import CupyBackend
from xprnn.bench import DisagreementError
from xprnn.bench.clock import measure, timer
from xprnn.bench.peers import torch_for
from xprnn.bench.task import Setting, Task
from xprnn.kernels import KernelUnavailableError
from xprnn.tolerances import error_of, tolerance
from xprnn.verify.equations import flat, packed

from .ceilings import Ceilings, reading
from .floor import ITEMSIZE, step_floor, weights
from .graphs import NotCapturedError, replayed
from .problems import STEP, StackProblem, StepProblem
from .rows import Row, described, drawn, fill, judged, layer_of, poisoned, row_of, said

GRAPH = "graph"
TAKEN = 4  # steps that are compared: of a graph, an even number
BUDGET = 0.3  # seconds after which no round begins


def candidates(backend: Backend) -> tuple[str, ...]:
    """What is tried on a backend, in a row's words."""
    on_gpu = isinstance(backend, CupyBackend)
    return ("sequence", GRAPH, "pointwise") if on_gpu else ("reference",)


class Streams:
    """A stepper, and `take` for its next step, on arrays that stay: `x` is read, `out` written."""

    def __init__(self, name: str, layer: Any, problem: StepProblem) -> None:
        backend, shape = layer.backend, (problem.N, problem.H)
        with use_kernels("sequence" if name == GRAPH else name):
            self.stepper = layer.stepper(problem.N)
        self.x, self.out = (backend.xp.zeros(shape, layer.dtype) for _ in range(2))
        self.take: Callable[[], Any] = partial(self.stepper.step, self.x, out=self.out)
        if name == GRAPH:
            self.take = replayed(self.take, backend)
        self.name, self._place = name, backend.name

    def run(self, x: np.ndarray, states: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
        """The results of steps x (T, N, H) from (L, N, H) each; T is even."""
        self.stepper.load(packed([asarray(a, backend=self._place) for a in states]))
        outputs = []
        for x_t in x:
            self.x[...] = asarray(x_t, backend=self._place)
            self.take()
            outputs.append(to_numpy(self.out).copy())
        return named(np.stack(outputs), [to_numpy(a) for a in flat(self.stepper.state())])


def named(output: np.ndarray, states: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    names = "h", "c"
    return {"output": output, **dict(zip(names, states, strict=False))}


# -- compared


def compared(problem: StepProblem, backend: Backend) -> tuple[list[Row], list[Row]]:
    """The rows of a problem without times, and who cannot serve it: as `rows.compared`."""
    layer = rounded_layer(problem, backend)
    x = numbers(problem, TAKEN, 0, layer)
    count = len(layer._stack.cell.state_names)
    states = [numbers(problem, problem.layers, 1 + k, layer) for k in range(count)]
    expected = equations(layer, x, states)
    limits = dict.fromkeys(expected, _tolerance(problem))
    rows: list[Row] = []
    absent: list[Row] = []
    for name in candidates(backend):
        try:
            with poisoned(backend):
                found = Streams(name, layer, problem).run(x, states)
        except (KernelUnavailableError, NotCapturedError) as error:
            absent.append({**described(problem), "kernels": name, "reason": str(error)})
        except (RuntimeError, MemoryError) as error:  # one of them, not the whole report
            rows.append(row_of(problem, STEP, name, wrong=said(error)))
        else:
            rows.append(judged(row_of(problem, STEP, name), found, expected, limits))
    return rows, absent


def rounded_layer(problem: StackProblem | StepProblem, backend: Backend) -> Any:
    """The layer of a problem with such weights as its products read."""
    layer = layer_of(problem, backend)
    narrow = layer.arithmetic.compute_dtype
    rounded = {n: to_numpy(p).astype(narrow) for n, p in layer.parameters.items()}
    layer.load_state_dict({n: p.astype(layer.dtype) for n, p in rounded.items()})
    return layer


def numbers(problem: StackProblem | StepProblem, count: int, seed: int, layer: Any) -> np.ndarray:
    """Normal numbers (count, N, H), such as products read, in the layer's dtype."""
    wide = drawn(count, problem.N, problem.H, seed)
    return wide.astype(layer.arithmetic.compute_dtype).astype(layer.dtype)


def _tolerance(problem: StepProblem) -> float:
    return tolerance(problem.dtype, steps=TAKEN, width=2 * problem.H, layers=problem.layers)


def equations(layer: Any, x: np.ndarray, states: Sequence[np.ndarray]) -> Mapping[str, np.ndarray]:
    """What the float64 equations on NumPy find."""
    wide = {"dtype": "float64", "compute_dtype": "float64", "precision": "ieee"}
    with use_kernels("reference"):
        equations = copy.deepcopy(layer).to("numpy", **wide).eval()
        given = packed([state.astype(np.float64) for state in states])
        output, *final = flat(equations(x.astype(np.float64), given))
    return named(output, final)


# -- timed


def timed(problem: StepProblem, rows: Sequence[Row], backend: Backend, ceilings: Ceilings) -> None:
    """Add the times of a problem to those of its rows that are right, beside torch's cells."""
    for row in rows:
        row["not_timed"] = "wrong" if row["wrong"] else None
    right = [row for row in rows if not row["wrong"]]
    if not right:
        return
    try:
        layer = layer_of(problem, backend)
        x = numbers(problem, 1, 0, layer)[0]
        theirs = torch_cells(problem, layer, x)
        expected = np.stack([to_numpy(theirs()).astype(np.float64) for _ in range(TAKEN)])
        mine = [Streams(row["kernels"], layer, problem) for row in right]
        for row, one in zip(right, mine, strict=True):
            _check_agreement(one, x, expected, row["limit"])
        samples = measure([*[one.take for one in mine], theirs], timer(backend), BUDGET)
        if not all(np.isfinite(to_numpy(one.out)).all() for one in mine):
            raise RuntimeError("h became NaN meanwhile: a block waited too long for another")
        fill(right, samples)
        least, which = step_floor(problem, ceilings, _reading(problem, backend, ceilings))
        for row in right:
            row["floor_us"], row["floor_of"] = 1e6 * least, which
    except (DisagreementError, RuntimeError, MemoryError) as error:
        for row in right:
            row["wrong"] = row["not_timed"] = said(error)


def _reading(problem: StepProblem, backend: Backend, ceilings: Ceilings) -> float:
    """The seconds in which every weight is read once."""
    nbytes = weights(problem) * ITEMSIZE[problem.dtype]
    on_gpu = isinstance(backend, CupyBackend)
    return reading(backend, nbytes) if on_gpu else nbytes / ceilings.bandwidth


def torch_cells(problem: StepProblem, layer: Any, x: np.ndarray) -> Callable[[], Any]:
    """A call that takes the next step of torch's cells, one above the other; it gives h (N, H)."""
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
    given, states = torch.from_numpy(x).to(device, dtype), [None] * len(cells)

    def step() -> Any:
        with torch.inference_mode():
            h = given
            for k, cell in enumerate(cells):
                states[k] = cell(h, states[k])
                h = flat(states[k])[0]
        return h

    return step


def _check_agreement(one: Streams, x: np.ndarray, expected: np.ndarray, limit: float) -> None:
    """DisagreementError unless it finds what torch finds; each may be wrong by `limit`."""
    states = [np.zeros_like(to_numpy(a)) for a in flat(one.stepper.state())]
    error = error_of(one.run(np.stack([x] * TAKEN), states)["output"], expected)
    if not error <= 2 * limit:
        raise DisagreementError(
            f"{one.name}: its h differs from that of torch's cells by {error:.2g} of the largest "
            f"element, expected at most {2 * limit:.2g}"
        )
