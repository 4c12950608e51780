"""The calls that asv's benchmarks of layers time: one task in each implementation.

xprnn is used through its public interface, because older versions are measured too.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

from .common import Clock, UnusableError, clock, module_of, numbers, usable_backend

LAYERS: dict[str, tuple[str, dict[str, Any]]] = {
    "gru": ("GRU", {}),
    "gru_reset_before": ("GRU", {"reset_after": False}),
    "li_gru": ("Recurrent", {}),
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
BACKENDS = {"cpu": "numpy", "cuda": "cupy"}  # by a peer's device
AUTO = "auto"  # as `kernels`: xprnn selects them


class Name(NamedTuple):
    """The parts of an implementation's name."""

    library: str
    backend: str  # xprnn's backend for the device on which the library computes
    kernels: str  # xprnn's, "" for peers


def parts(implementation: str) -> Name:
    """("xprnn", "cupy", "pointwise") for "xprnn-cupy-pointwise".

    :raises UnusableError: the name does not have that form.
    """
    library, _, rest = implementation.partition("-")
    device, _, kernels = rest.partition("-")
    if library == "xprnn" and kernels:
        return Name(library, device, kernels)
    if library == "xprnn" or device not in BACKENDS:
        raise UnusableError(
            f"{implementation}: expected xprnn-BACKEND-KERNELS or PEER-DEVICE, with one of the "
            f"devices {', '.join(BACKENDS)}"
        )
    return Name(library, BACKENDS[device], "")


def force(implementation: str) -> Name:
    """Force an implementation's kernels in this process; returns the parts of its name.

    :raises UnusableError: "auto" would select what "reference" names.
    """
    name = parts(implementation)
    if name[1:] == ("numpy", AUTO) and importlib.util.find_spec("numba") is None:
        raise UnusableError("Numba is not installed, and without it the plain code is chosen")
    if name.kernels:
        os.environ["XPRNN_KERNELS"] = name.kernels  # xprnn reads it at each call
    return name


class Prepared(NamedTuple):
    """One implementation after its warm-up, and the clock of its device."""

    call: Callable[[], Any]
    clock: Clock
    backend: Any


def prepare(task: str, cell: str, implementation: str, dtype: str, size: str) -> Prepared:
    """Build and warm up: `task` is "forward", "training", "step" or "stepper".

    asv runs the setup before each sample; built implementations are cached.

    :raises UnusableError: the implementation cannot run this task on this machine.
    """
    force(implementation)
    return _built(task, cell, implementation, dtype, size)


@cache
def _built(task: str, cell: str, implementation: str, dtype: str, size: str) -> Prepared:
    library, backend_name, kernels = parts(implementation)
    backend = usable_backend(backend_name)
    if library == "xprnn":
        call = XPRNN_CALLS[task](cell, backend, kernels, dtype, size)
    else:
        call = _peer(task, library, cell, backend, dtype, size)
    call()  # compile, allocate, choose algorithms
    return Prepared(call, clock(backend), backend)


@cache
def li_gru() -> Any:
    """The light GRU of M. Ravanelli et al. (2018), https://arxiv.org/abs/1803.10225.

    :raises UnusableError: this version of xprnn has no definitions of cells.
    """
    import xprnn

    if not hasattr(xprnn, "cell"):
        raise UnusableError("this version of xprnn has no definitions of cells")

    @xprnn.cell(gates=("z", "n"))
    def li_gru(f: Any, x: Any, s: Any) -> Any:
        gh = f.recurrent(s.h)
        z, n = f.sigmoid(x.z + gh.z), f.relu(x.n + gh.n)
        return n + z * (s.h - n)

    return li_gru


def _constructor(cell: str, backend: Any, dtype: str) -> tuple[str, dict[str, Any]]:
    """The name of xprnn's layer, and its options."""
    name, options = LAYERS[cell]
    return name, {**options, **ARITHMETIC[dtype], "backend": backend.name, "seed": 0}


def _layer(cell: str, backend: Any, kernels: str, dtype: str, size: str, suffix: str = "") -> Any:
    """xprnn's layer, or its cell with the suffix "Cell", checked to run these kernels."""
    import xprnn

    n, (name, options) = numbers(size), _constructor(cell, backend, dtype)
    definition = [li_gru()] if cell == "li_gru" else []
    try:
        layer = getattr(xprnn, name + suffix)(*definition, n["H"], n["H"], **options)
    except (TypeError, ValueError) as error:  # an older version; an unknown dtype
        raise UnusableError(f"{dtype}: {error}") from error
    if kernels not in ("reference", AUTO):  # the oldest versions have no others
        _check_kernels(layer, kernels, (n["N"], n["H"]) if suffix else (n["T"], n["N"], n["H"]))
    return layer


def _check_kernels(layer: Any, kernels: str, shape: tuple[int, ...]) -> None:
    dispatch = module_of("xprnn.kernels.dispatch", "xprnn.kernels")
    if kernels not in dispatch.IMPLEMENTATIONS:
        names = ", ".join(dispatch.IMPLEMENTATIONS)
        raise UnusableError(f"{kernels}: expected one of the kernels {names}")
    try:
        selected = layer.explain(shape).splitlines()[0]
    except dispatch.KernelUnavailableError as error:
        raise UnusableError(str(error)) from error
    if not selected.endswith(f": {kernels}"):
        raise UnusableError(f"{kernels}: this version of xprnn has no such kernels")


def _draw(layer: Any, *shape: int, seed: int = 0) -> Any:
    import numpy as np

    import xprnn

    values = np.random.default_rng(seed).standard_normal(shape)
    return xprnn.asarray(values.astype(layer.dtype), backend=layer.backend.name)


def _forward(cell: str, backend: Any, kernels: str, dtype: str, size: str) -> Callable[[], Any]:
    layer, n = _layer(cell, backend, kernels, dtype, size), numbers(size)
    x = _draw(layer, n["T"], n["N"], n["H"])
    return lambda: layer(x)


def _training(cell: str, backend: Any, kernels: str, dtype: str, size: str) -> Callable[[], Any]:
    layer, n = _layer(cell, backend, kernels, dtype, size).train(), numbers(size)
    x, doutput = (_draw(layer, n["T"], n["N"], n["H"], seed=seed) for seed in (0, 1))

    def call() -> Any:
        layer.zero_grad()
        layer(x)
        return layer.backward(doutput)

    return call


def _step(cell: str, backend: Any, kernels: str, dtype: str, size: str) -> Callable[[], Any]:
    layer, n = _layer(cell, backend, kernels, dtype, size, "Cell"), numbers(size)
    x, h, c = (_draw(layer, n["N"], n["H"], seed=seed) for seed in range(3))
    hx = (h, c) if cell == "lstm" else h
    return lambda: layer(x, hx)


def _stepper(cell: str, backend: Any, kernels: str, dtype: str, size: str) -> Callable[[], Any]:
    import xprnn

    n, (name, options) = numbers(size), _constructor(cell, backend, dtype)
    layer = getattr(xprnn, name)(n["H"], n["H"], 3, **options)
    if not hasattr(layer, "stepper"):
        raise UnusableError("this version of xprnn has no stepper")
    try:
        stepper = layer.stepper(n["N"])
    except xprnn.KernelUnavailableError as error:
        raise UnusableError(str(error)) from error
    x, out = (_draw(layer, n["N"], n["H"], seed=seed) for seed in range(2))
    return lambda: stepper.step(x, out=out)


XPRNN_CALLS = {
    "forward": _forward,
    "training": _training,
    "step": _step,
    "stepper": _stepper,
}


def _peer(task: str, library: str, cell: str, backend: Any, dtype: str, size: str) -> Any:
    """The call of a peer, on the inputs that `xprnn bench` uses."""
    if task == "stepper":
        raise UnusableError(f"{library}: benchmarks/stepper_vs_torch.py compares steppers")
    try:
        peers, tasks = _bench_module("peers"), _bench_module("task")
        steps = _bench_module("steps") if task == "step" else None
    except ModuleNotFoundError as error:  # an older version
        raise UnusableError(f"{library}: this version of xprnn cannot build it") from error
    if library not in peers.PEERS:
        raise UnusableError(f"{library}: expected xprnn, {', '.join(peers.PEERS)}")
    n = numbers(size)
    setting = tasks.Setting(cell, n["H"], n["H"], n["N"], n["T"], dtype, backend.name)
    try:
        inputs = tasks.make_task(setting)
    except ValueError as error:  # an unknown dtype
        raise UnusableError(f"{dtype}: {error}") from error
    try:
        if steps is not None:
            return steps.STEPS[library](inputs)[0]
        peer = peers.PEERS[library](inputs)
    except tasks.PeerUnavailableError as error:
        raise UnusableError(str(error)) from error
    call = peer.forward if task == "forward" else peer.both
    if call is None:
        raise UnusableError(f"{library}: it has no gradients")
    return call


def _bench_module(name: str) -> Any:
    return module_of(f"xprnn.tools.bench.{name}", f"xprnn.bench.{name}")
