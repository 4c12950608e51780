"""The least time that a call could take on a device, from its ceilings."""

from __future__ import annotations

from xprnn.cells import CELLS

from .ceilings import Ceilings
from .problems import FORWARD, AnyProblem, Problem, StackProblem, StepProblem

ITEMSIZE = {"float32": 4, "tf32": 4, "float16": 2, "bfloat16": 2, "float64": 8}


def weights(problem: AnyProblem) -> int:
    """Numbers in the weights of all layers and directions."""
    G, H = CELLS[problem.cell].gates, problem.H
    return problem.layers * problem.directions * G * H * (H + H)


def operations(problem: Problem | StackProblem, what: str) -> int:
    """Multiplications and additions of the products: x W_ih' + h W_hh', backward twice as many."""
    forward = 2 * weights(problem) * problem.N * problem.T
    return forward if what == FORWARD else 3 * forward


def moved(problem: Problem | StackProblem, what: str) -> int:
    """Bytes that have to be read or written once, as narrow as products read them.

    Forward x, both weights and the output; backward these four again, the output's gradient, dx
    and the weights' gradients.
    """
    numbers = problem.T * problem.N * problem.H  # of x, and of a direction's output
    sequences, read = (1 + problem.directions) * numbers, weights(problem)
    forward = sequences + read
    count = forward if what == FORWARD else 2 * forward + sequences + read
    return count * ITEMSIZE[problem.dtype]


def floor(
    problem: Problem | StackProblem, what: str, ceilings: Ceilings, unpolled: float | None
) -> tuple[float, str]:
    """The seconds that a call takes at least, and what sets them.

    That is the largest of: "operations" over the rate of a large product, "bytes" over the
    bandwidth of a large copy, and "steps": a step needs all of the step before it, in both
    directions side by side, and all of the layer below, so that L layers take L - 1 more; where
    several multiprocessors share one, a word of each has to cross L2. To that comes `unpolled`,
    what the steps take without waiting, where that was measured; the poll that finds its word is
    in both and counts once.
    """
    parts = {
        "operations": operations(problem, what) / ceilings.rate(problem.dtype),
        "bytes": moved(problem, what) / ceilings.bandwidth,
    }
    if ceilings.latency is not None and ceilings.look is not None:
        forward = problem.T + problem.layers - 1
        steps = forward if what == FORWARD else 2 * forward
        waited = ceilings.latency if unpolled is None else ceilings.latency - ceilings.look
        parts["steps"] = steps * max(waited, 0.0) + (unpolled or 0.0)
    longest = max(parts, key=lambda name: parts[name])
    return parts[longest], longest


def step_floor(problem: StepProblem, ceilings: Ceilings, reading: float) -> tuple[float, str]:
    """The seconds that a step of a stack takes at least, and what sets them.

    That is the largest of: "operations" as above, "bytes": every weight is read once, from wherever
    the step before has left it, "layers": each needs all of the one below, and a word of it has to
    cross L2, and "launch": there is one.

    :param reading: the seconds in which the device reads as many bytes as the weights have.
    """
    parts = {
        "operations": 2 * problem.N * weights(problem) / ceilings.rate(problem.dtype),
        "bytes": reading,
        "layers": (problem.layers - 1) * (ceilings.latency or 0.0),
        "launch": ceilings.launch or 0.0,
    }
    longest = max(parts, key=lambda name: parts[name])
    return parts[longest], longest
