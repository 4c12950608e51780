"""One step of a cell from given states, as in streaming, by each peer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ...backend import to_numpy
from . import onnx
from .peers import runner, session_for, torch_for
from .task import Task

# runs the step; runs it and returns h (N, H) on the host
Step = tuple[Callable[[], Any], Callable[[], np.ndarray]]


def torch_step(task: Task) -> Step:
    """A step of torch's cell, from `task.states` with x[0].

    :raises PeerUnavailableError: torch is not installed, or has no such cell or device.
    """
    torch, device, dtype = torch_for(task)
    setting = task.setting
    kind, _, nonlinearity = setting.built_in("torch").partition("_")
    family = {"rnn": torch.nn.RNNCell, "gru": torch.nn.GRUCell, "lstm": torch.nn.LSTMCell}[kind]
    options = {"nonlinearity": nonlinearity} if nonlinearity else {}
    cell = family(setting.input, setting.hidden, **options).to(device, dtype)
    cell.load_state_dict(
        {name.removesuffix("_l0"): torch.from_numpy(w) for name, w in task.weights.items()}
    )
    x, *states = (torch.from_numpy(a).to(device, dtype) for a in (task.x[0], *task.states))
    hx = tuple(states) if len(states) > 1 else states[0]

    def step() -> Any:
        with torch.inference_mode():
            return cell(x, hx)

    def result() -> np.ndarray:
        h = step()
        return to_numpy(h[0] if isinstance(h, tuple) else h)

    return step, result


def onnxruntime_step(task: Task) -> Step:
    """A step of ONNX Runtime, from `task.states` with x[0].

    :raises PeerUnavailableError: it is not installed, or does not support the dtype or device.
    """
    setting = task.setting
    cell = setting.built_in("onnxruntime")
    names = ("h", "c")[: len(task.states)]
    arrays = {"x": task.x[:1], **{n: s[None] for n, s in zip(names, task.states, strict=True)}}
    session, _ = session_for(task, lambda w: onnx.step_model(cell, w, task.x.shape[1:], names))
    inputs = {name: array.astype(setting.operand_dtype) for name, array in arrays.items()}
    step, results = runner(session, inputs, task)
    return step, lambda: results()[0][0]


STEPS: dict[str, Callable[[Task], Step]] = {"torch": torch_step, "onnxruntime": onnxruntime_step}
