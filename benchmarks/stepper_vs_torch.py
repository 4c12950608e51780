"""A stepper's step of three layers beside three of torch's cells, in turns in one process.

    OMP_NUM_THREADS=1 python benchmarks/stepper_vs_torch.py [--rounds 15] [--dtype float32]

Microseconds a step on the CPU, medians of the rounds, and torch's time by xprnn's, round by round,
with its quartiles; both have the same weights and have to find the same results. Needs torch.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

LAYERS = 3
SIZES = [(H, N) for N in (1, 8) for H in (32, 64, 128, 512)]
SAMPLE = 8e-3  # seconds
STREAMED = 20  # steps that are compared


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float32")
    options = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    print("| cell | H | N | torch's three cells, µs | a stepper's step, µs | torch / xprnn |")
    print("|---|---|---|---|---|---|")
    for kind in ("GRU", "LSTM", "RNN"):
        for H, N in SIZES:
            ours, theirs = _sides(kind, H, N, options.dtype)
            seconds = _measure({"xprnn": ours, "torch": theirs}, options.rounds)
            pairs = zip(seconds["torch"], seconds["xprnn"], strict=True)
            low, middle, high = statistics.quantiles([a / b for a, b in pairs], n=4)
            one, other = (1e6 * statistics.median(seconds[side]) for side in ("torch", "xprnn"))
            ratio = f"{middle:.2f} ({low:.2f} to {high:.2f})"
            print(f"| {kind} | {H} | {N} | {one:.0f} | {other:.0f} | {ratio} |", flush=True)


def _sides(kind: str, H: int, N: int, dtype: str) -> tuple[Callable[[], Any], Callable[[], Any]]:
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
    lent, out, stepper = torch.from_numpy(x), np.empty((N, H), dtype), layer.stepper(N)
    states: list[Any] = [None] * LAYERS

    def theirs() -> Any:
        with torch.inference_mode():
            y = lent
            for k, cell in enumerate(cells):
                states[k] = cell(y, states[k])
                y = states[k][0] if kind == "LSTM" else states[k]
        return y

    def ours() -> Any:
        return stepper.step(x, out=out)

    for _ in range(STREAMED):
        np.testing.assert_allclose(ours(), theirs().numpy(), atol=1e-5)
    return ours, theirs


def _measure(sides: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
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


if __name__ == "__main__":
    main()
