"""Roofline bounds: the least time of a call on a device, from its measured peaks."""

from __future__ import annotations

from xprnn.cells import CELLS

from .peaks import Peaks
from .problems import FORWARD, AnyProblem, Problem, StackProblem, StepProblem

ITEMSIZE = {"float32": 4, "tf32": 4, "float16": 2, "bfloat16": 2, "float64": 8}


def weights(problem: AnyProblem) -> int:
    """The number of weights of all layers and directions."""
    G, H = CELLS[problem.cell].gates, problem.H
    return problem.layers * problem.directions * G * H * (H + H)


def operations(problem: Problem | StackProblem, what: str) -> int:
    """Multiplications and additions of x W_ih' + h W_hh', and twice as many for backward."""
    forward = 2 * weights(problem) * problem.N * problem.T
    return forward if what == FORWARD else 3 * forward


def bytes_moved(problem: Problem | StackProblem, what: str) -> int:
    """The bytes that must be read or written at least once, in the operands' type.

    Forward: x, both weights and the output; backward: these four again, the output's gradient, dx
    and the weights' gradients.
    """
    elements = problem.T * problem.N * problem.H  # of x, and of one direction's output
    sequences, read = (1 + problem.directions) * elements, weights(problem)
    forward = sequences + read
    count = forward if what == FORWARD else 2 * forward + sequences + read
    return count * ITEMSIZE[problem.dtype]


def call_bound(
    problem: Problem | StackProblem, what: str, peaks: Peaks, computing: float | None
) -> tuple[float, str]:
    """The least seconds of a call, and the limiting resource.

    The largest of: "operations" / the rate of a large product, "bytes" / the bandwidth of a large
    copy, and "steps": a step depends on the complete previous step (both directions run side by
    side) and on the layer below, so that L layers take L - 1 steps more; between multiprocessors a
    word must cross L2 in each. `computing`, where measured, is added: the seconds of all steps
    without waiting. It includes the successful poll, which is counted once.
    """
    parts = {
        "operations": operations(problem, what) / peaks.rate(problem.dtype),
        "bytes": bytes_moved(problem, what) / peaks.bandwidth,
    }
    if peaks.latency is not None and peaks.poll is not None:
        forward = problem.T + problem.layers - 1
        steps = forward if what == FORWARD else 2 * forward
        waiting = peaks.latency if computing is None else peaks.latency - peaks.poll
        parts["steps"] = steps * max(waiting, 0.0) + (computing or 0.0)
    longest = max(parts, key=lambda name: parts[name])
    return parts[longest], longest


def step_bound(problem: StepProblem, peaks: Peaks, reading: float) -> tuple[float, str]:
    """The least seconds of a step of a stack, and the limiting resource.

    The largest of: "operations" as above; "bytes": every weight is read once, from the cache level
    where the previous step left it; "layers": each depends on the complete layer below, and a word
    must cross L2; and "launch": one kernel is launched.

    :param reading: the seconds in which the device reads as many bytes as the weights have.
    """
    parts = {
        "operations": 2 * problem.N * weights(problem) / peaks.rate(problem.dtype),
        "bytes": reading,
        "layers": (problem.layers - 1) * (peaks.latency or 0.0),
        "launch": peaks.launch or 0.0,
    }
    longest = max(parts, key=lambda name: parts[name])
    return parts[longest], longest
