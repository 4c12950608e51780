"""Short samples of a call's time, and the machine's peaks, from which a bound follows."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import numpy as np

from ...backend import Backend, asarray
from ...cells import CELLS
from ..verification.suite import Problem, build
from .grid import Case

SAMPLE = 1e-3  # seconds that a sample lasts at least, so that reading the clock is negligible
PEAK_ROUNDS = 20  # the fastest counts: other processes only make them slower
CPU_SIZES = (512, 1 << 26)  # order of the matrices of a product, bytes of a copy
GPU_SIZES = (4096, 1 << 28)


class Timer:
    """Samples of calls; the layers of the latest cell and type are kept."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._of: tuple[str, str] = ("", "")
        self._calls: dict[Case, tuple[Callable[[], object], int]] = {}

    def sample(self, case: Case) -> float:
        """Seconds of a call, after an untimed one so that caches hold its data."""
        if case not in self._calls:
            if self._of != case[:2]:
                self._of, self._calls = case[:2], {}
            function = call_of(self._backend, case)
            self._seconds(function, 2)  # compile, allocate
            repeats = math.ceil(SAMPLE / max(self._seconds(function, 1), 1e-7))
            self._calls[case] = function, min(repeats, 10_000)
        function, repeats = self._calls[case]
        function()
        return self._seconds(function, repeats) / repeats

    def _seconds(self, function: Callable[[], object], repeats: int) -> float:
        self._backend.synchronize()
        start = time.perf_counter()
        for _ in range(repeats):
            function()
        self._backend.synchronize()
        return time.perf_counter() - start

    def peaks(self, dtype: str) -> tuple[float, float]:
        """Multiply-adds per second of a plain product, and bytes per second of a plain copy."""
        backend = self._backend
        order, nbytes = GPU_SIZES if backend.on_gpu else CPU_SIZES
        layer = build("gru", dtype, Problem(1, 1, 1, 1), backend)
        policy = layer.arithmetic
        xp = backend.module(policy.precision, policy.is_mixed)
        with backend.activate():
            a, b = (
                backend.from_host(np.full((order, order), 0.5, policy.compute_dtype))
                for _ in range(2)
            )
            out = backend.from_host(np.zeros((order, order), policy.compute_dtype))
            source = backend.zeros_aligned(nbytes // 8, np.dtype(np.float64))
            target = backend.zeros_aligned(nbytes // 8, np.dtype(np.float64))

            def copy() -> None:
                target[...] = source

            functions = (lambda: xp.matmul(a, b, out)), copy
            product_s, copy_s = (
                min(self._seconds(function, 1) for _ in range(PEAK_ROUNDS))
                for function in functions
            )
        return order**3 / product_s, 2 * nbytes / copy_s


def call_of(backend: Backend, case: Case) -> Callable[[], object]:
    """A function that makes one call, with the kernels that are requested when it is called."""
    N, H, T = case.shape
    layer = build(case.cell, case.dtype, Problem(T, N, H, H), backend)
    values = np.random.default_rng(0).standard_normal((T, N, H)).astype(layer.dtype)
    x = asarray(values, backend=backend.name)
    if case.kind == "step":
        stepper, x_t = layer.stepper(N), x[0]
        return lambda: stepper.step(x_t)
    if case.kind == "forward":
        layer.eval()
        return lambda: layer(x)
    layer.train()

    def training() -> None:
        with layer.writable():  # as an optimiser does: what is kept of the weights is stale
            pass
        layer.zero_grad()
        layer(x)
        layer.backward(x)

    return training


def multiply_adds(case: Case) -> int:
    """Of a call's products, with I = H; a backward pass has twice those of a forward pass."""
    N, H, T = case.shape
    return (3 if case.kind == "training" else 1) * 2 * N * T * CELLS[case.cell].gates * H * H


def least_bytes(case: Case, itemsize: int) -> int:
    """Bytes that a call reads and writes at least: the weights once, x and the output.

    Training reads the weights twice, reads doutput, and writes dx and the weights' gradients.
    """
    N, H, T = case.shape
    weights, rows = 2 * CELLS[case.cell].gates * H * H, 2 * N * T * H
    return itemsize * (3 * weights + 2 * rows if case.kind == "training" else weights + rows)
