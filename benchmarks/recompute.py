"""Memory and time of a GRU's training step, with and without `recompute`.

    OMP_NUM_THREADS=1 python benchmarks/recompute.py [--every 32] [--rounds 5]

One layer, I = H, float32: T steps of N rows, forward and backward with a gradient on every output.
Seconds are medians of interleaved rounds in one process. The peak memory is tracemalloc's, of a
later step, without x; it is printed with the estimate of `explain`.
"""

from __future__ import annotations

import argparse
import re
import statistics
import time
import tracemalloc
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

    import xprnn

T, N, H = 1000, 32, 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--every", type=int, default=32, help="k: every k-th state is saved")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    import numpy as np

    import xprnn

    x = np.random.default_rng(0).standard_normal((T, N, H), dtype=np.float32)
    layers = {k: xprnn.GRU(H, H, seed=0, recompute=k).train() for k in (None, options.every)}
    seconds: dict[int | None, list[float]] = {k: [] for k in layers}
    for layer in layers.values():
        train(layer, x)  # compile and allocate
    for _ in range(options.rounds):
        for k, layer in layers.items():
            start = time.perf_counter()
            train(layer, x)
            seconds[k].append(time.perf_counter() - start)
    print(layers[None].explain(x.shape).splitlines()[0])
    for k in layers:
        estimate = f"estimated {estimated(layers[k]) / 1e6:.0f} MB"
        memory = f"peak {peak(k, x) / 1e6:.0f} MB, {estimate}"
        print(f"recompute={k}: {statistics.median(seconds[k]):.2f} s, {memory}")
    pairs = zip(seconds[None], seconds[options.every], strict=True)
    print(f"time with / without: {statistics.median([b / a for a, b in pairs]):.2f}")


def train(layer: xprnn.GRU, x: np.ndarray) -> None:
    """A training step without the optimizer."""
    output, _ = layer(x)
    layer.backward(output)


def peak(k: int | None, x: np.ndarray) -> int:
    """The peak bytes of a new layer's third step."""
    import xprnn

    tracemalloc.start()
    layer = xprnn.GRU(H, H, seed=0, recompute=k).train()
    for _ in range(3):
        tracemalloc.reset_peak()
        train(layer, x)
    return tracemalloc.get_traced_memory()[1]


def estimated(layer: xprnn.GRU) -> int:
    """The bytes of a training step according to `explain`."""
    (text,) = re.findall("a training step takes about ([0-9,]+) bytes", layer.explain((T, N, H)))
    return int(text.replace(",", ""))


if __name__ == "__main__":
    main()
