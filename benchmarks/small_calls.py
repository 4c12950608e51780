"""Small calls beside torch's and a stepper's step, in turns in one process.

    OMP_NUM_THREADS=1 python -m benchmarks.small_calls [--rounds 15]

First layers in eval mode called with one step at a time, as a port of `y, h = gru(x, h)` does it:
microseconds a call, torch's time by it, and it by that of a stepper's step. Then cells whose batch
shrinks from 8 rows to 1, as a decoder's does: microseconds for the eight calls, torch's time by
theirs, and theirs by that of eight cells each of which is called with one size only. float32,
medians of the rounds, with quartiles; with Numba where it is installed, and with NumPy alone. All
have the same weights and have to find the same results. Needs torch.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import statistics
from collections.abc import Callable
from typing import Any

from .stepper_vs_torch import OURS, Sides, beside, measure, median

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
        print("Numba is not installed: its rows are left out")
        del OURS["with Numba"]
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
    for side in OURS:
        pairs = zip(seconds[side], seconds[f"beside {side}"], strict=True)
        ratio = statistics.median([a / b for a, b in pairs])
        theirs, ours = median(seconds, "torch"), beside(seconds, side)
        print(f"| {name}, {side} | {theirs} | {ours} | {ratio:.2f} |", flush=True)


def _one_step(kind: str, H: int, L: int, N: int) -> Sides:
    """A call of each layer with one step, from the same states each time, and a stepper's step."""
    import numpy as np
    import torch

    import xprnn

    layer = getattr(xprnn, kind)(H, H, L, seed=0)
    other = _same(getattr(torch.nn, kind)(H, H, L), layer)
    x = np.random.default_rng(0).standard_normal((1, N, H), np.float32)
    _, hx = layer(x)
    theirs = torch.inference_mode()(lambda: other(lent, states))
    lent, states = torch.from_numpy(x), _lent(hx)
    sides: Sides = {"torch": theirs}
    for side, asked in OURS.items():
        call = sides[side] = _asking(asked, lambda: layer(x, hx))
        np.testing.assert_allclose(call()[0], theirs()[0].numpy(), atol=1e-5)
        stepper, out = _asking(asked, lambda: layer.stepper(N))(), np.empty((N, H), np.float32)
        sides[f"beside {side}"] = lambda stepper=stepper, out=out: stepper.step(x[0], out=out)
    return sides


def _shrinking(kind: str, H: int) -> Sides:
    """Calls of each cell with fewer and fewer rows, from the states of the call before."""
    import numpy as np
    import torch

    import xprnn

    cell = getattr(xprnn, f"{kind}Cell")(H, H, seed=0)
    alone = {N: getattr(xprnn, f"{kind}Cell")(H, H, seed=0) for N in ROWS}
    other = _same(getattr(torch.nn, f"{kind}Cell")(H, H), cell)
    x = np.random.default_rng(0).standard_normal((8, H), np.float32)
    lent = torch.from_numpy(x)

    def calls(cells: Any, given: Any) -> Any:
        hx = None
        for N in ROWS:
            if isinstance(hx, tuple):
                hx = tuple([state[:N] for state in hx])
            elif hx is not None:
                hx = hx[:N]
            hx = cells(N)(given[:N], hx)
        return hx

    theirs = torch.inference_mode()(lambda: calls(lambda N: other, lent))
    wanted = theirs()[0] if kind == "LSTM" else theirs()
    sides: Sides = {"torch": theirs}
    for side, asked in OURS.items():
        call = sides[side] = _asking(asked, lambda: calls(lambda N: cell, x))
        found = call()[0] if kind == "LSTM" else call()
        np.testing.assert_allclose(found, wanted.numpy(), atol=1e-5)
        sides[f"beside {side}"] = _asking(asked, lambda: calls(alone.__getitem__, x))
    return sides


def _asking(asked: str, call: Callable[[], Any]) -> Callable[[], Any]:
    """A call for which XPRNN_KERNELS says `asked`; to set it takes a microsecond."""

    def asking() -> Any:
        os.environ["XPRNN_KERNELS"] = asked
        return call()

    return asking


def _same(other: Any, module: Any) -> Any:
    """torch's module, with the parameters of xprnn's."""
    import torch

    values = module.state_dict()
    other.load_state_dict({name: torch.from_numpy(value) for name, value in values.items()})
    return other.eval()


def _lent(hx: Any) -> Any:
    import torch

    if isinstance(hx, tuple):
        return tuple([torch.from_numpy(state) for state in hx])
    return torch.from_numpy(hx)


if __name__ == "__main__":
    main()
