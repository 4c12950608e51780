"""Compare a stepper's step with torch's cells and ONNX Runtime, interleaved in one process.

    OMP_NUM_THREADS=1 python benchmarks/stepper_vs_torch.py [--rounds 15] [--dtype float32]

First three layers and three of torch's cells; then one layer of 128 units and one stream, also with
ONNX Runtime's session of one operator and with xprnn's cell. Microseconds per step on the CPU,
medians of the rounds, and torch / xprnn, round by round, with quartiles: with Numba, where it is
installed, and with NumPy alone. All use the same weights, and their results are compared. Needs
torch.
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
COMPARED = 20  # steps whose results are compared
XPRNN = {"with Numba": "auto", "NumPy alone": "reference"}  # values of XPRNN_KERNELS

Calls = dict[str, Callable[[], Any]]  # by implementation


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float32")
    options = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    if importlib.util.find_spec("numba") is None:
        print("Numba is not installed: its column is omitted")
        del XPRNN["with Numba"]
    columns = " | ".join(f"{variant}, us | torch / xprnn" for variant in XPRNN)
    print(f"| cell | H | N | torch's three cells, us | {columns} |")
    print("|---" * (4 + 2 * len(XPRNN)) + "|")
    for kind in ("GRU", "LSTM", "RNN"):
        for H, N in SIZES:
            seconds = measure(_three_layers(kind, H, N, options.dtype), options.rounds)
            speedups = " | ".join(speedup(seconds, variant) for variant in XPRNN)
            torch_us = median(seconds, "torch")
            print(f"| {kind} | {H} | {N} | {torch_us} | {speedups} |", flush=True)
    print("\n| cell, one layer, H=128 N=1 | us | torch / this |\n|---|---|---|")
    for cell in ("gru", "lstm", "rnn_tanh"):
        seconds = measure(_one_layer(cell, options.dtype), options.rounds)
        for name in seconds:
            print(f"| {cell}: {name} | {speedup(seconds, name)} |", flush=True)


def _three_layers(kind: str, H: int, N: int, dtype: str) -> Calls:
    """Steps with the same weights, after a few whose results are compared."""
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
    torch_x = torch.from_numpy(x)
    states: list[Any] = [None] * LAYERS

    def theirs() -> Any:
        with torch.inference_mode():
            y = torch_x
            for k, cell in enumerate(cells):
                states[k] = cell(y, states[k])
                y = states[k][0] if kind == "LSTM" else states[k]
        return y

    calls: Calls = {variant: _step(layer, x, kernels) for variant, kernels in XPRNN.items()}
    for _ in range(COMPARED):
        expected = theirs().numpy()
        for ours in calls.values():
            np.testing.assert_allclose(ours(), expected, atol=1e-5)
    return {"torch": theirs, **calls}


def _one_layer(cell: str, dtype: str) -> Calls:
    """Steps of all; the peers and xprnn's cell start from the same state each time."""
    import numpy as np

    import xprnn
    from xprnn.tools.bench.steps import onnxruntime_step, torch_step
    from xprnn.tools.bench.task import PeerUnavailableError, Setting, make_task

    task = make_task(Setting(cell, 128, 128, batch=1, steps=1, kind=dtype))
    theirs, result = torch_step(task)
    calls: Calls = {"torch": theirs}
    try:
        calls["ONNX Runtime's session"] = onnxruntime_step(task)[0]
    except PeerUnavailableError as error:
        print(f"ONNX Runtime: {error}")
    kind = {"gru": xprnn.GRUCell, "lstm": xprnn.LSTMCell, "rnn_tanh": xprnn.RNNCell}[cell]
    weights = {name.removesuffix("_l0"): weight for name, weight in task.weights.items()}
    x, states = task.x[0], task.states if len(task.states) > 1 else task.states[0]
    for variant, kernels in XPRNN.items():
        calls[f"stepper, {variant}"] = _step(task.layer, x, kernels)
        call = _cell_call(kind.from_weights(**weights), x, states, kernels)
        calls[f"cell, {variant}"] = call
        h = call()
        np.testing.assert_allclose(h[0] if cell == "lstm" else h, result(), atol=1e-5)
    return calls


def _cell_call(cell: Any, x: Any, states: Any, kernels: str) -> Callable[[], Any]:
    """A cell's call; it sets the variable, which takes a microsecond."""

    def call() -> Any:
        os.environ["XPRNN_KERNELS"] = kernels
        return cell(x, states)

    return call


def _step(layer: Any, x: Any, kernels: str) -> Callable[[], Any]:
    """A step of a new stepper that uses these kernels."""
    import numpy as np

    with _environment(kernels):
        stepper = layer.stepper(len(x))
    out = np.empty((len(x), layer.options["hidden_size"]), x.dtype)
    return lambda: stepper.step(x, out=out)


@contextmanager
def _environment(kernels: str) -> Iterator[None]:
    previous = os.environ.get("XPRNN_KERNELS", "auto")
    os.environ["XPRNN_KERNELS"] = kernels
    yield
    os.environ["XPRNN_KERNELS"] = previous


def measure(calls: Calls, rounds: int) -> dict[str, list[float]]:
    """Seconds per call: `rounds` interleaved samples of each implementation."""
    counts = {name: max(2, int(SAMPLE / _seconds(call, 5))) for name, call in calls.items()}
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            samples[name].append(_seconds(call, counts[name]))
    return samples


def _seconds(call: Callable[[], Any], count: int) -> float:
    start = time.perf_counter()
    for _ in range(count):
        call()
    return (time.perf_counter() - start) / count


def median(seconds: dict[str, list[float]], name: str) -> str:
    return f"{1e6 * statistics.median(seconds[name]):.1f}"


def speedup(seconds: dict[str, list[float]], name: str) -> str:
    """An implementation's microseconds, and torch's time / its time."""
    pairs = zip(seconds["torch"], seconds[name], strict=True)
    low, middle, high = statistics.quantiles([a / b for a, b in pairs], n=4)
    return f"{median(seconds, name)} | {middle:.2f} ({low:.2f} to {high:.2f})"


if __name__ == "__main__":
    main()
