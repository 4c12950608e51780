"""A stepper's step beside torch's cells and ONNX Runtime's session, in turns in one process.

    OMP_NUM_THREADS=1 python benchmarks/stepper_vs_torch.py [--rounds 15] [--dtype float32]

First three layers beside three of torch's cells, then one layer of 128 units and one stream, for
which ONNX Runtime has a session of one operator and xprnn a cell too. Microseconds a step on the
CPU, medians of the rounds, and torch's time by xprnn's, round by round, with its quartiles: with
Numba where it is installed, and with NumPy alone. All have the same weights and have to find the
same results. Needs torch.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

LAYERS = 3
SIZES = [(H, N) for N in (1, 8) for H in (32, 64, 128, 512)]
SAMPLE = 5e-3  # seconds
STREAMED = 20  # steps that are compared
OURS = {"with Numba": "auto", "NumPy alone": "reference"}  # what XPRNN_KERNELS says

Sides = dict[str, Callable[[], Any]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float32")
    options = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    if importlib.util.find_spec("numba") is None:
        print("Numba is not installed: its column is left out")
        del OURS["with Numba"]
    columns = " | ".join(f"{side}, us | torch / xprnn" for side in OURS)
    print(f"| cell | H | N | torch's three cells, us | {columns} |")
    print("|---" * (4 + 2 * len(OURS)) + "|")
    for kind in ("GRU", "LSTM", "RNN"):
        for H, N in SIZES:
            seconds = measure(_three_layers(kind, H, N, options.dtype), options.rounds)
            found = " | ".join(beside(seconds, side) for side in OURS)
            torch_s = median(seconds, "torch")
            print(f"| {kind} | {H} | {N} | {torch_s} | {found} |", flush=True)
    print("\n| cell, one layer, H=128 N=1 | us | torch / it |\n|---|---|---|")
    for cell in ("gru", "lstm", "rnn_tanh"):
        seconds = measure(_one_layer(cell, options.dtype), options.rounds)
        for side in seconds:
            print(f"| {cell}: {side} | {beside(seconds, side)} |", flush=True)


def _three_layers(kind: str, H: int, N: int, dtype: str) -> Sides:
    """A step of each, with the same weights, after a few that found the same."""
    import numpy as np
    import torch

    import xprnn

    layer = getattr(xprnn, kind)(H, H, LAYERS, dtype=dtype, seed=0)
    cells = []
    for k in range(LAYERS):
        cell = getattr(torch.nn, f"{kind}Cell")(H, H).to(getattr(torch, dtype))
        named = {name: layer.parameters[f"{name}_l{k}"].copy() for name in cell.state_dict()}
        cell.load_state_dict({name: torch.from_numpy(weight) for name, weight in named.items()})
        cells.append(cell)
    x = np.random.default_rng(0).standard_normal((N, H)).astype(dtype)
    lent = torch.from_numpy(x)
    states: list[Any] = [None] * LAYERS

    def theirs() -> Any:
        with torch.inference_mode():
            y = lent
            for k, cell in enumerate(cells):
                states[k] = cell(y, states[k])
                y = states[k][0] if kind == "LSTM" else states[k]
        return y

    sides: Sides = {side: _stepping(layer, x, asked) for side, asked in OURS.items()}
    for _ in range(STREAMED):
        expected = theirs().numpy()
        for ours in sides.values():
            np.testing.assert_allclose(ours(), expected, atol=1e-5)
    return {"torch": theirs, **sides}


def _one_layer(cell: str, dtype: str) -> Sides:
    """A step of each, those of the peers and of xprnn's cell from the same state each time."""
    import numpy as np

    import xprnn
    from xprnn.bench.steps import runtime_step, torch_step
    from xprnn.bench.task import PeerUnavailableError, Setting, make_task

    task = make_task(Setting(cell, 128, 128, batch=1, steps=1, kind=dtype))
    theirs, result = torch_step(task)
    sides: Sides = {"torch": theirs}
    try:
        sides["ONNX Runtime's session"] = runtime_step(task)[0]
    except PeerUnavailableError as error:
        print(f"ONNX Runtime: {error}")
    kind = {"gru": xprnn.GRUCell, "lstm": xprnn.LSTMCell, "rnn_tanh": xprnn.RNNCell}[cell]
    weights = {name.removesuffix("_l0"): weight for name, weight in task.weights.items()}
    x, states = task.x[0], task.states if len(task.states) > 1 else task.states[0]
    for side, asked in OURS.items():
        sides[f"stepper, {side}"] = _stepping(task.layer, x, asked)
        one = sides[f"cell, {side}"] = _calling(kind.from_weights(**weights), x, states, asked)
        h = one()
        np.testing.assert_allclose(h[0] if cell == "lstm" else h, result(), atol=1e-5)
    return sides


def _calling(cell: Any, x: Any, states: Any, asked: str) -> Callable[[], Any]:
    """A cell's call; the variable is set within it, which takes a microsecond."""

    def call() -> Any:
        os.environ["XPRNN_KERNELS"] = asked
        return cell(x, states)

    return call


def _stepping(layer: Any, x: Any, asked: str) -> Callable[[], Any]:
    """A stepper's step, the first one taken, by those who serve where `asked` is asked for."""
    import numpy as np

    with _kernels(asked):
        stepper = layer.stepper(len(x))
    out = np.empty((len(x), layer.options["hidden_size"]), x.dtype)
    return lambda: stepper.step(x, out=out)


@contextmanager
def _kernels(asked: str) -> Iterator[None]:
    before = os.environ.get("XPRNN_KERNELS", "auto")
    os.environ["XPRNN_KERNELS"] = asked
    yield
    os.environ["XPRNN_KERNELS"] = before


def measure(sides: Sides, rounds: int) -> dict[str, list[float]]:
    """Seconds a call, `rounds` samples of each side in turns."""
    counts = {side: max(2, int(SAMPLE / _seconds(call, 5))) for side, call in sides.items()}
    found: dict[str, list[float]] = {side: [] for side in sides}
    for _ in range(rounds):
        for side, call in sides.items():
            found[side].append(_seconds(call, counts[side]))
    return found


def _seconds(call: Callable[[], Any], count: int) -> float:
    start = time.perf_counter()
    for _ in range(count):
        call()
    return (time.perf_counter() - start) / count


def median(seconds: dict[str, list[float]], side: str) -> str:
    return f"{1e6 * statistics.median(seconds[side]):.1f}"


def beside(seconds: dict[str, list[float]], side: str) -> str:
    """A side's microseconds, and torch's time by its."""
    pairs = zip(seconds["torch"], seconds[side], strict=True)
    low, middle, high = statistics.quantiles([a / b for a, b in pairs], n=4)
    return f"{median(seconds, side)} | {middle:.2f} ({low:.2f} to {high:.2f})"


if __name__ == "__main__":
    main()
