"""The cost of subnormal numbers: a training step with and without a vanishing gradient.

    OMP_NUM_THREADS=1 python benchmarks/subnormal.py [--rounds 9] [--steps 200]

With a loss on the last state only and the default initialisation, the gradient becomes subnormal
before it reaches the first step; with a loss on every output it stays normal. Both steps perform
the same operations, so a ratio above 1 in the last column is the cost of subnormal numbers.
Milliseconds are medians of interleaved rounds; the ratio is that of consecutive samples, with its
quartiles. xprnn runs with Numba, where it is installed, and with NumPy alone; torch, where it is
installed, with and without `torch.set_flush_denormal(True)`. To measure another version of xprnn,
run this script with that version's folder in PYTHONPATH.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

N, I, H = 32, 32, 64  # noqa: E741
VANISHING, NORMAL = "last state", "every output"
XPRNN = {"xprnn, Numba": "auto", "xprnn, NumPy": "reference"}  # values of XPRNN_KERNELS
TORCH = {"torch": False, "torch, flushing": True}  # arguments of set_flush_denormal

Step = Callable[[], Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=200)
    options = parser.parse_args()
    print(f"| T={options.steps} N={N} I={I} H={H} | {VANISHING}, ms | {NORMAL}, ms | ratio |")
    print("|---|---|---|---|")
    for kind in ("GRU", "LSTM"):
        for name, steps in _implementations(kind, options.steps):
            seconds = _samples(steps, options.rounds)
            first, second = seconds[VANISHING], seconds[NORMAL]
            ratios = [a / b for a, b in zip(first, second, strict=True)]
            low, middle, high = statistics.quantiles(ratios, n=4)
            columns = [f"{1e3 * statistics.median(column):.1f}" for column in (first, second)]
            ratio = f"{middle:.2f} ({low:.2f} to {high:.2f})"
            print(f"| {kind}, {name} | {' | '.join(columns)} | {ratio} |", flush=True)


def _implementations(kind: str, T: int) -> Iterator[tuple[str, dict[str, Step]]]:
    """The training steps of each implementation, by loss."""
    for name, kernels in XPRNN.items():
        if kernels == "reference" or importlib.util.find_spec("numba"):
            os.environ["XPRNN_KERNELS"] = kernels
            yield name, _xprnn_steps(kind, T)
    if importlib.util.find_spec("torch"):
        import torch

        for name, flushing in TORCH.items():
            torch.set_flush_denormal(flushing)
            yield name, _torch_steps(kind, T)
            torch.set_flush_denormal(False)


def _xprnn_steps(kind: str, T: int) -> dict[str, Step]:
    import numpy as np

    import xprnn

    layer = getattr(xprnn, kind)(I, H, seed=0).train()
    x = _inputs(T)
    doutput, dh_n = np.ones((T, N, H), np.float32), np.ones((1, N, H), np.float32)
    dhx = (dh_n, None) if kind == "LSTM" else dh_n

    def step(upstream: Any, dhx: Any) -> Any:
        layer.zero_grad()
        layer(x)
        return layer.backward(upstream, dhx)

    return {VANISHING: lambda: step(None, dhx), NORMAL: lambda: step(doutput, None)}


def _torch_steps(kind: str, T: int) -> dict[str, Step]:
    import torch

    torch.manual_seed(0)
    layer, x = getattr(torch.nn, kind)(I, H), torch.from_numpy(_inputs(T)).requires_grad_()
    doutput, dh_n = torch.ones(T, N, H), torch.ones(1, N, H)

    def step(last: bool) -> None:
        layer.zero_grad()
        output, states = layer(x)
        h_n = states[0] if kind == "LSTM" else states
        torch.autograd.backward(h_n if last else output, dh_n if last else doutput)

    return {VANISHING: lambda: step(True), NORMAL: lambda: step(False)}


def _inputs(T: int) -> Any:
    import numpy as np

    return np.random.default_rng(0).standard_normal((T, N, I), dtype=np.float32)


def _samples(steps: dict[str, Step], rounds: int) -> dict[str, list[float]]:
    """Seconds of a step by loss: `rounds` interleaved samples, after an untimed one."""
    samples: dict[str, list[float]] = {loss: [] for loss in steps}
    for _ in range(rounds + 1):
        for loss, step in steps.items():
            start = time.perf_counter()
            step()
            samples[loss].append(time.perf_counter() - start)
    return {loss: seconds[1:] for loss, seconds in samples.items()}


if __name__ == "__main__":
    main()
