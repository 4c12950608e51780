"""Compare small calls with torch's and with a stepper's step, interleaved in one process.

    OMP_NUM_THREADS=1 python -m benchmarks.small_calls [--rounds 15]

First, layers in eval mode called one step at a time, like code ported from `y, h = gru(x, h)`:
microseconds per call, torch / xprnn, and xprnn / a stepper's step. Then cells whose batch shrinks
from 8 rows to 1, as in a decoder: microseconds for the eight calls, torch / xprnn, and xprnn /
eight cells that are each called with one size only. float32, medians of the rounds with quartiles;
with Numba, where it is installed, and with NumPy alone. All use the same weights, and their results
are compared. Needs torch.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

from .stepper_vs_torch import XPRNN, Calls, measure, median, speedup

LAYERS = [(64, 1, 1), (64, 2, 1), (256, 1, 1), (64, 1, 8)]  # H, L, N
CELLS = [64, 256, 512]  # H
ROWS = range(8, 0, -1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    import torch

    torch.set_num_threads(1)
    if importlib.util.find_spec("numba") is None:
        print("Numba is not installed: its rows are omitted")
        del XPRNN["with Numba"]
    head = "|  | torch, µs | xprnn, µs | torch / xprnn | xprnn / {} |\n|---|---|---|---|---|"
    print(head.format("stepper"))
    for kind in ("GRU", "LSTM", "RNN"):
        for H, L, N in LAYERS:
            seconds = measure(_one_step(kind, H, L, N), rounds)
            _rows(f"{kind} H={H} L={L} N={N} T=1", seconds)
    print("\n" + head.format("cells of one size"))
    for kind in ("GRU", "LSTM"):
        for H in CELLS:
            seconds = measure(_shrinking(kind, H), rounds)
            _rows(f"{kind}Cell H={H} N=8 to 1", seconds)


def _rows(name: str, seconds: dict[str, list[float]]) -> None:
    for variant in XPRNN:
        pairs = zip(seconds[variant], seconds[f"{variant}, baseline"], strict=True)
        ratio = statistics.median([a / b for a, b in pairs])
        theirs, ours = median(seconds, "torch"), speedup(seconds, variant)
        print(f"| {name}, {variant} | {theirs} | {ours} | {ratio:.2f} |", flush=True)


def _one_step(kind: str, H: int, L: int, N: int) -> Calls:
    """Calls of each layer with one step, from the same states, and steps of a stepper."""
    import numpy as np
    import torch

    import xprnn

    layer = getattr(xprnn, kind)(H, H, L, seed=0)
    other = _same(getattr(torch.nn, kind)(H, H, L), layer)
    x = np.random.default_rng(0).standard_normal((1, N, H), np.float32)
    _, hx = layer(x)
    theirs = torch.inference_mode()(lambda: other(torch_x, states))
    torch_x, states = torch.from_numpy(x), _as_torch(hx)
    calls: Calls = {"torch": theirs}
    for variant, kernels in XPRNN.items():
        call = calls[variant] = _with_kernels(kernels, lambda: layer(x, hx))
        np.testing.assert_allclose(call()[0], theirs()[0].numpy(), atol=1e-5)
        stepper = _with_kernels(kernels, lambda: layer.stepper(N))()
        out = np.empty((N, H), np.float32)
        calls[f"{variant}, baseline"] = partial(stepper.step, x[0], out=out)
    return calls


def _shrinking(kind: str, H: int) -> Calls:
    """Calls of each cell with fewer and fewer rows, from the states of the previous call."""
    import numpy as np
    import torch

    import xprnn

    cell = getattr(xprnn, f"{kind}Cell")(H, H, seed=0)
    one_size = {N: getattr(xprnn, f"{kind}Cell")(H, H, seed=0) for N in ROWS}
    other = _same(getattr(torch.nn, f"{kind}Cell")(H, H), cell)
    x = np.random.default_rng(0).standard_normal((8, H), np.float32)
    torch_x = torch.from_numpy(x)

    def run(cells: Any, inputs: Any) -> Any:
        hx = None
        for N in ROWS:
            if isinstance(hx, tuple):
                hx = tuple([state[:N] for state in hx])
            elif hx is not None:
                hx = hx[:N]
            hx = cells(N)(inputs[:N], hx)
        return hx

    theirs = torch.inference_mode()(lambda: run(lambda N: other, torch_x))
    expected = theirs()[0] if kind == "LSTM" else theirs()
    calls: Calls = {"torch": theirs}
    for variant, kernels in XPRNN.items():
        call = calls[variant] = _with_kernels(kernels, lambda: run(lambda N: cell, x))
        actual = call()[0] if kind == "LSTM" else call()
        np.testing.assert_allclose(actual, expected.numpy(), atol=1e-5)
        baseline = _with_kernels(kernels, lambda: run(one_size.__getitem__, x))
        calls[f"{variant}, baseline"] = baseline
    return calls


def _with_kernels(kernels: str, call: Callable[[], Any]) -> Callable[[], Any]:
    """A call with XPRNN_KERNELS set to `kernels`; setting it takes a microsecond."""

    def run() -> Any:
        os.environ["XPRNN_KERNELS"] = kernels
        return call()

    return run


def _same(other: Any, module: Any) -> Any:
    """torch's module with the parameters of xprnn's."""
    import torch

    values = module.state_dict()
    other.load_state_dict({name: torch.from_numpy(value) for name, value in values.items()})
    return other.eval()


def _as_torch(hx: Any) -> Any:
    import torch

    if isinstance(hx, tuple):
        return tuple([torch.from_numpy(state) for state in hx])
    return torch.from_numpy(hx)


if __name__ == "__main__":
    main()
