"""The same work in each implementation: what asv's benchmarks of layers time.

xprnn is used by its public face alone, because older versions are measured too.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

from .common import Clock, UnusableError, clock, numbers, usable_backend

LAYERS: dict[str, tuple[str, dict[str, Any]]] = {
    "gru": ("GRU", {}),
    "gru_reset_before": ("GRU", {"reset_after": False}),
    "lstm": ("LSTM", {}),
    "rnn_tanh": ("RNN", {"nonlinearity": "tanh"}),
    "rnn_relu": ("RNN", {"nonlinearity": "relu"}),
}
ARITHMETIC = {
    "float32": {"dtype": "float32"},
    "float64": {"dtype": "float64"},
    "tf32": {"precision": "tf32"},
    "float16": {"compute_dtype": "float16"},
    "bfloat16": {"compute_dtype": "bfloat16"},
}
BACKENDS = {"cpu": "numpy", "cuda": "cupy"}  # of a peer's device
CHOSEN = "auto"  # in place of kernels: those that xprnn chooses by itself
ON_A_CPU = ("float32", "float64")
WORK_ON_A_CPU = 2**34  # multiplications of a forward pass: larger ones are for GPUs


class Name(NamedTuple):
    """An implementation's name in its parts."""

    library: str
    backend: str  # of xprnn, on the device that the library computes on
    kernels: str  # of xprnn, else ""


def parts(implementation: str) -> Name:
    """("xprnn", "cupy", "pointwise") of "xprnn-cupy-pointwise".

    :raises UnusableError: it is not of that form.
    """
    library, _, rest = implementation.partition("-")
    place, _, kernels = rest.partition("-")
    if library == "xprnn" and kernels:
        return Name(library, place, kernels)
    if library == "xprnn" or place not in BACKENDS:
        raise UnusableError(
            f"{implementation}: expected xprnn-BACKEND-KERNELS or PEER-DEVICE, with one of the "
            f"devices {', '.join(BACKENDS)}"
        )
    return Name(library, BACKENDS[place], "")


class Prepared(NamedTuple):
    """One implementation, warm, and the clock of its device."""

    call: Callable[[], Any]
    clock: Clock
    backend: Any


def prepare(task: str, cell: str, implementation: str, dtype: str, size: str) -> Prepared:
    """Build and warm up, once: `task` is "forward", "training", "step" or "stepper".

    asv prepares before each sample; what is built is kept.

    :raises UnusableError: the implementation cannot do this here.
    """
    if kernels := parts(implementation).kernels:
        os.environ["XPRNN_KERNELS"] = kernels  # xprnn reads it at each call
    return _built(task, cell, implementation, dtype, size)


@cache
def _built(task: str, cell: str, implementation: str, dtype: str, size: str) -> Prepared:
    library, place, kernels = parts(implementation)
    if place == "numpy":
        _check_cpu(cell, dtype, size)
        if kernels == CHOSEN and importlib.util.find_spec("numba") is None:
            raise UnusableError("Numba is not installed, and without it the plain code is chosen")
    backend = usable_backend(place)
    if library == "xprnn":
        call = OURS[task](cell, backend, kernels, dtype, size)
    else:
        call = _peer(task, library, cell, backend, dtype, size)
    call()  # compiles, allocates, chooses algorithms
    return Prepared(call, clock(backend), backend)


def _check_cpu(cell: str, dtype: str, size: str) -> None:
    if dtype not in ON_A_CPU:
        raise UnusableError(f"{dtype}: on a CPU xprnn's is a reference and not made to be fast")
    n = numbers(size)
    gates = {"gru": 3, "lstm": 4}.get(cell.partition("_")[0], 1)
    if 2 * gates * n["T"] * n["N"] * n["H"] ** 2 > WORK_ON_A_CPU:
        raise UnusableError(f"{size}: a size for GPUs")


def _layer(cell: str, backend: Any, kernels: str, dtype: str, size: str, suffix: str = "") -> Any:
    """xprnn's layer, or with the suffix "Cell" its cell, served by these kernels."""
    import xprnn

    n, (name, options) = numbers(size), LAYERS[cell]
    options = {**options, **ARITHMETIC[dtype], "backend": backend.name, "seed": 0}
    try:
        layer = getattr(xprnn, name + suffix)(n["H"], n["H"], **options)
    except (TypeError, ValueError) as error:  # an older version; a type that is not there
        raise UnusableError(f"{dtype}: {error}") from error
    if kernels not in ("reference", CHOSEN):  # older versions have no others
        _check_kernels(layer, kernels, (n["N"], n["H"]) if suffix else (n["T"], n["N"], n["H"]))
    return layer


def _check_kernels(layer: Any, kernels: str, shape: tuple[int, ...]) -> None:
    from xprnn.kernels import IMPLEMENTATIONS, KernelUnavailableError

    if kernels not in IMPLEMENTATIONS:
        raise UnusableError(f"{kernels}: expected one of the kernels {', '.join(IMPLEMENTATIONS)}")
    try:
        served = layer.explain(shape).splitlines()[0]
    except KernelUnavailableError as error:
        raise UnusableError(str(error)) from error
    if not served.endswith(f": {kernels}"):
        raise UnusableError(f"{kernels}: this version of xprnn has no such kernels")


def _drawn(layer: Any, *shape: int, seed: int = 0) -> Any:
    import numpy as np

    import xprnn

    values = np.random.default_rng(seed).standard_normal(shape)
    return xprnn.asarray(values.astype(layer.dtype), backend=layer.backend.name)


def _forward(cell: str, backend: Any, kernels: str, dtype: str, size: str) -> Callable[[], Any]:
    layer, n = _layer(cell, backend, kernels, dtype, size), numbers(size)
    x = _drawn(layer, n["T"], n["N"], n["H"])
    return lambda: layer(x)


def _training(cell: str, backend: Any, kernels: str, dtype: str, size: str) -> Callable[[], Any]:
    layer, n = _layer(cell, backend, kernels, dtype, size).train(), numbers(size)
    x, doutput = (_drawn(layer, n["T"], n["N"], n["H"], seed=seed) for seed in (0, 1))

    def call() -> Any:
        layer.zero_grad()
        layer(x)
        return layer.backward(doutput)

    return call


def _step(cell: str, backend: Any, kernels: str, dtype: str, size: str) -> Callable[[], Any]:
    layer, n = _layer(cell, backend, kernels, dtype, size, "Cell"), numbers(size)
    x, h, c = (_drawn(layer, n["N"], n["H"], seed=seed) for seed in range(3))
    hx = (h, c) if cell == "lstm" else h
    return lambda: layer(x, hx)


def _stepper(cell: str, backend: Any, kernels: str, dtype: str, size: str) -> Callable[[], Any]:
    import xprnn

    n, (name, options) = numbers(size), LAYERS[cell]
    options = {**options, **ARITHMETIC[dtype], "backend": backend.name, "seed": 0}
    layer = getattr(xprnn, name)(n["H"], n["H"], 3, **options)
    if not hasattr(layer, "stepper"):
        raise UnusableError("this version of xprnn has no stepper")
    try:
        stepper = layer.stepper(n["N"])
    except xprnn.KernelUnavailableError as error:
        raise UnusableError(str(error)) from error
    x, out = (_drawn(layer, n["N"], n["H"], seed=seed) for seed in range(2))
    return lambda: stepper.step(x, out=out)


OURS = {"forward": _forward, "training": _training, "step": _step, "stepper": _stepper}


def _peer(task: str, library: str, cell: str, backend: Any, dtype: str, size: str) -> Any:
    """The call of a peer, on the numbers that `xprnn bench` compares it by."""
    if task == "stepper":
        raise UnusableError(f"{library}: benchmarks/stepper_vs_torch.py compares steppers")
    try:
        from xprnn.bench.peers import PEERS
        from xprnn.bench.task import PeerUnavailableError, Setting, make_task

        if task == "step":
            from xprnn.bench.steps import STEPS
    except ModuleNotFoundError as error:  # an older version
        raise UnusableError(f"{library}: this version of xprnn cannot build it") from error
    if library not in PEERS:
        raise UnusableError(f"{library}: expected xprnn, {', '.join(PEERS)}")
    n = numbers(size)
    setting = Setting(cell, n["H"], n["H"], n["N"], n["T"], dtype, backend.name)
    try:
        numbers_for_all = make_task(setting)
    except ValueError as error:  # a type that is not there
        raise UnusableError(f"{dtype}: {error}") from error
    try:
        if task == "step":
            return STEPS[library](numbers_for_all)[0]
        peer = PEERS[library](numbers_for_all)
    except PeerUnavailableError as error:
        raise UnusableError(str(error)) from error
    call = peer.forward if task == "forward" else peer.both
    if call is None:
        raise UnusableError(f"{library}: it has no gradients")
    return call
