"""Times of layers as "auto" selects without and with a qualification, interleaved in one process.

    python -m benchmarks.qualified_vs_default FILE [--rounds 21]

FILE is written by `xprnn qualify -o FILE`, in the same environment. The calls are those of the CPU
report's shapes, those that FILE has measured, and these with 128 and 512 steps, which are more than
it has measured. A line has what both select, the median of the rounds' ratios, time without / time
with, with quartiles, and the ratio in FILE. Calls for which both select the same are only counted:
the same code runs.

Exit status: 0 no ratio is below 0.97, 1 one is, and is named.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

TURN = 0.02  # seconds of a sample
MORE_STEPS = 128, 512  # than were measured
LEAST = 0.97  # time without / time with


def calls(file: Any) -> Iterator[tuple[str, str, int, int, int, int]]:
    """Cell, pass, T, N, I and H of the calls."""
    from .cpu.problems import CELLS, SHAPES

    for cell in CELLS:
        for kind in ("forward", "training"):
            for T, N, I, H in SHAPES:  # noqa: E741
                yield cell, kind, T, N, I, H
    shapes = [(r.cell, r.kind, r.T, r.N, r.H) for r in file.rows if r.dtype == "float32"]
    for cell, kind, T, N, H in dict.fromkeys(shapes):
        yield cell, kind, T, N, H, H
        for more in MORE_STEPS if kind != "step" else ():
            yield cell, kind, more, N, H, H


def main() -> int:
    import numpy as np

    from xprnn.kernels import qualification

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--rounds", type=int, default=21)
    options = parser.parse_args()
    file = qualification.parse(options.file.read_bytes())
    same, ratios = 0, {}
    for cell, kind, T, N, I, H in dict.fromkeys(calls(file)):  # noqa: E741
        x = np.random.default_rng(0).standard_normal((T, N, I), dtype=np.float32)
        name, _, default = selected_by("off", cell, kind, x, H)
        other, reason, selected = selected_by(str(options.file), cell, kind, x, H)
        if name == other:
            same += 1
            continue
        warm("off", default)
        warm(str(options.file), selected)
        rounds = [sample(default) / sample(selected) for _ in range(options.rounds)]
        low, ratio, high = statistics.quantiles(rounds, n=4)
        call = f"{cell:16} {kind:8} {f'T={T} N={N} I={I} H={H}':26} {name:9} {other:9}"
        ratios[call] = ratio
        print(f"{call} {ratio:5.2f} ({low:.2f}, {high:.2f}) {reason.rpartition(', ')[2]}")
    least = min(ratios.values(), default=1.0)
    print(f"{same} calls select the same; {len(ratios)} others, least ratio {least:.2f}")
    slower = [call for call, ratio in ratios.items() if ratio < LEAST]
    for call in slower:
        print(f"below {LEAST}: {call} {ratios[call]:.2f}")
    return 1 if slower else 0


def selected_by(
    qualified: str, cell: str, kind: str, x: np.ndarray, H: int
) -> tuple[str, str, Callable[[], object]]:
    """What "auto" selects with this value of XPRNN_QUALIFIED, the reason, and the call."""
    from xprnn.diagnostics.verification.suite import LAYERS

    os.environ["XPRNN_QUALIFIED"] = qualified
    family, arguments = LAYERS[cell]
    layer = family(x.shape[2], H, seed=0, **arguments)
    if kind == "step":
        stepper = layer.stepper(x.shape[1])
        name, reason = (each.partition(": ")[2] for each in stepper.explain().splitlines()[:2])
        call: Callable[[], object] = lambda: stepper.step(x[0])  # noqa: E731
    else:
        layer.train() if kind == "training" else layer.eval()
        plan = layer._plan(*x.shape[:2])
        name, reason = plan.implementation, plan.reason
        call = training(layer, x) if kind == "training" else lambda: layer(x)
    return name, reason, call


def warm(qualified: str, call: Callable[[], object]) -> None:
    """The first calls, which make the plan, with this value of XPRNN_QUALIFIED."""
    os.environ["XPRNN_QUALIFIED"] = qualified
    for _ in range(3):
        call()


def training(layer: Any, x: np.ndarray) -> Callable[[], object]:
    import numpy as np

    doutput = np.ones((*x.shape[:2], layer.hidden_size), np.float32)

    def call() -> None:
        with layer.writable():  # as an optimiser: weights are packed anew
            pass
        layer(x)
        layer.backward(doutput, None)

    return call


def sample(call: Callable[[], object]) -> float:
    """Seconds of a call: the least of those of one turn."""
    best, end = float("inf"), time.perf_counter() + TURN
    while time.perf_counter() < end or best == float("inf"):
        start = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - start)
    return best


if __name__ == "__main__":
    sys.exit(main())
