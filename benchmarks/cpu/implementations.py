"""How each implementation is called: its fastest documented way, on the same weights and inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from xprnn.tools.bench.peers import onnxruntime_peer, torch_peer, xprnn_peer
from xprnn.tools.bench.steps import onnxruntime_step, torch_step
from xprnn.tools.bench.task import Peer, Task

from .jax_peer import jax_layer, jax_step
from .products import products, step_products

# runs a step; runs it and returns h (N, H) on the host; a note for the report
Step = tuple[Callable[[], Any], Callable[[], np.ndarray] | None, str]


def _stepper(task: Task) -> Step:
    """xprnn's stepper; each step continues from the state of the step before."""
    stepper = task.layer.stepper(len(task.x[0]))
    x, out = task.x[0], np.empty_like(task.states[0])

    def first() -> np.ndarray:
        states = tuple([state[None] for state in task.states])
        stepper.load(states if len(states) > 1 else states[0])
        return stepper.step(x, out=out).copy()

    return lambda: stepper.step(x, out=out), first, stepper.explain().splitlines()[0]


def _torch_step(task: Task) -> Step:
    return *torch_step(task), "torch.nn's cell under inference_mode, from the same state each time"


def _onnxruntime_step(task: Task) -> Step:
    return *onnxruntime_step(task), "a session of one operator, T=1, from the same state each time"


IMPLEMENTATIONS: dict[str, Callable[[Task], Peer]] = {
    "numpy": xprnn_peer,
    "numba": xprnn_peer,
    "torch": torch_peer,
    "onnxruntime": onnxruntime_peer,
    "jax": jax_layer,
    "products": products,
}
STEPS: dict[str, Callable[[Task], Step]] = {
    "numpy": _stepper,
    "numba": _stepper,
    "torch": _torch_step,
    "onnxruntime": _onnxruntime_step,
    "jax": jax_step,
    "products": step_products,
}
