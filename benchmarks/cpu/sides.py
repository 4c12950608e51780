"""How each library is called, as well as we know how; every one gets the same numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from xprnn.bench.peers import ours, runtime, theirs
from xprnn.bench.steps import runtime_step, torch_step
from xprnn.bench.task import Peer, Task

from .jax_side import jax_layer, jax_step
from .products import products, step_products

Step = tuple[Callable[[], Any], Callable[[], np.ndarray] | None, str]  # takes it; fetches h; note


def _stepper(task: Task) -> Step:
    """xprnn's stepper, which goes on from the state that it left."""
    stepper = task.layer.stepper(len(task.x[0]))
    x, out = task.x[0], np.empty_like(task.states[0])

    def first() -> np.ndarray:
        states = tuple([state[None] for state in task.states])
        stepper.load(states if len(states) > 1 else states[0])
        return stepper.step(x, out=out).copy()

    return lambda: stepper.step(x, out=out), first, stepper.explain().splitlines()[0]


def _torch_step(task: Task) -> Step:
    return *torch_step(task), "torch.nn's cell under inference_mode, from the same state each time"


def _runtime_step(task: Task) -> Step:
    return *runtime_step(task), "a session of one operator, T=1, from the same state each time"


SIDES: dict[str, Callable[[Task], Peer]] = {
    "numpy": ours,
    "numba": ours,
    "torch": theirs,
    "onnxruntime": runtime,
    "jax": jax_layer,
    "products": products,
}
STEPS: dict[str, Callable[[Task], Step]] = {
    "numpy": _stepper,
    "numba": _stepper,
    "torch": _torch_step,
    "onnxruntime": _runtime_step,
    "jax": jax_step,
    "products": step_products,
}
