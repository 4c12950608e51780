"""xprnn, torch and ONNX Runtime, with the same weights and the same x."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import numpy as np

from ...backend import asarray, optional, to_numpy
from ...backend.cupy import CupyBackend
from ...backend.processors import processors
from . import onnx
from .task import Peer, PeerUnavailableError, Results, Task

THREADS = "OMP_NUM_THREADS"


def xprnn_peer(task: Task) -> Peer:
    """xprnn's layer: in eval mode for forward, a copy in train mode for forward and backward."""
    layer, trained = task.layer, copy.deepcopy(task.layer).train()
    x, doutput = (asarray(a, backend=layer.backend.name) for a in (task.x, task.doutput))

    def both() -> tuple[Any, Any]:
        trained.zero_grad()
        output, _ = trained(x)
        return output, trained.backward(doutput)[0]

    output, dx = both()
    results = {"output": output, "dx": dx, **{f"d{n}": g for n, g in trained.grads.items()}}
    implementation = layer._plan(*layer._steps_and_batch(task.x.shape)).implementation
    notes = [f"xprnn: {implementation} on {layer.backend.name}, {layer.arithmetic}"]
    if layer.backend.name == "numpy":
        notes.append(f"NumPy's BLAS threads: {THREADS} is {os.environ.get(THREADS, 'not set')}")
    results = {name: to_numpy(array).copy() for name, array in results.items()}
    return Peer("xprnn", lambda: layer(x), both, results, "; ".join(notes))


def torch_peer(task: Task) -> Peer:
    """torch's layer of the same kind, on the same device, in the dtype of xprnn's operands.

    :raises PeerUnavailableError: torch is not installed, or has no such cell or device.
    """
    torch, device, dtype = torch_for(task)
    setting = task.setting
    family = {"rnn": torch.nn.RNN, "gru": torch.nn.GRU, "lstm": torch.nn.LSTM}
    kind, _, nonlinearity = setting.built_in("torch").partition("_")
    options: dict[str, Any] = {"nonlinearity": nonlinearity} if nonlinearity else {}
    options["bidirectional"] = setting.directions == 2
    layer = family[kind](setting.input, setting.hidden, **options).to(device, dtype)
    layer.load_state_dict({n: torch.from_numpy(w) for n, w in task.weights.items()})
    x = torch.from_numpy(task.x).to(device, dtype).requires_grad_()
    doutput = torch.from_numpy(task.doutput).to(device, dtype)

    def forward() -> Any:
        with torch.inference_mode():
            return layer(x)

    def both() -> Any:
        x.grad = None
        layer.zero_grad()
        output, _ = layer(x)
        output.backward(doutput)
        return output

    results = {"output": both(), "dx": x.grad}
    results |= {f"d{name}": parameter.grad for name, parameter in layer.named_parameters()}
    results = {name: to_numpy(array).copy() for name, array in results.items()}
    how = f"on {device}, threads: {torch.get_num_threads()}"
    if device.type == "cuda":
        how = f"on {device}, TF32 {'allowed' if setting.kind == 'tf32' else 'off'}"
    note = f"torch: {torch.__version__}, torch.nn.{family[kind].__name__} in {dtype} {how}"
    return Peer("torch", forward, both, results, note)


def torch_for(task: Task) -> tuple[Any, Any, Any]:
    """torch, the device of xprnn's layer, and the dtype of its products' operands.

    :raises PeerUnavailableError: torch is not installed, or has no such cell or device.
    """
    torch = imported("torch")
    setting, backend = task.setting, task.layer.backend
    if setting.built_in("torch") == "gru_reset_before":
        raise PeerUnavailableError("torch: has no GRU with the reset gate before the product")
    device = torch.device("cpu")
    if isinstance(backend, CupyBackend):
        if not torch.cuda.is_available():
            raise PeerUnavailableError(f"torch: {torch.__version__} has no usable CUDA device")
        device = torch.device("cuda", backend.device)
        _set_tf32(torch, setting.kind == "tf32")
    return torch, device, getattr(torch, setting.operand_dtype)


def _set_tf32(torch: Any, allowed: bool) -> None:
    if hasattr(torch.backends.cudnn, "rnn"):  # from 2.9 on; the older names are deprecated
        precision = "tf32" if allowed else "ieee"
        torch.backends.cudnn.rnn.fp32_precision = precision
        torch.backends.cuda.matmul.fp32_precision = precision
    else:
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = allowed


def onnxruntime_peer(task: Task) -> Peer:
    """ONNX Runtime on a model of one operator, forward only.

    :raises PeerUnavailableError: it is not installed, or does not support the dtype or device.
    """
    setting = task.setting
    cell = setting.built_in("onnxruntime")
    session, how = session_for(task, lambda weights: onnx.model(cell, weights, task.x.shape))
    forward, results = runner(session, {"x": task.x.astype(setting.operand_dtype)}, task)
    note = f"onnxruntime: {how}, forward only"
    return Peer("onnxruntime", forward, None, {"output": results()[0][:, 0]}, note)


def session_for(task: Task, model: Callable[[Results], bytes]) -> tuple[Any, str]:
    """A session of ONNX Runtime on the model of a task's weights, and its description.

    :raises PeerUnavailableError: it is not installed, or does not support the dtype or device.
    """
    ort = imported("onnxruntime")
    setting, backend = task.setting, task.layer.backend
    if setting.operand_dtype not in ("float16", "float32"):
        raise PeerUnavailableError(
            f"onnxruntime: its recurrent operators take no {setting.operand_dtype}"
        )
    options, threads = ort.SessionOptions(), int(os.environ.get(THREADS) or processors())
    options.intra_op_num_threads = threads
    provider: tuple[str, dict[str, str]] = ("CPUExecutionProvider", {})
    how = f"threads: {threads}"
    if isinstance(backend, CupyBackend):
        tf32 = setting.kind == "tf32"
        how = f"TF32 {'allowed' if tf32 else 'off'}, waits for each result"
        where = {"device_id": str(backend.device), "use_tf32": str(int(tf32))}
        provider = ("CUDAExecutionProvider", where)
    if provider[0] not in ort.get_available_providers():
        raise PeerUnavailableError(
            f"onnxruntime: this build has no {provider[0]}; pip install onnxruntime-gpu"
        )
    weights = {name: array.astype(setting.operand_dtype) for name, array in task.weights.items()}
    session = ort.InferenceSession(model(weights), options, providers=[provider])
    if session.get_providers()[0] != provider[0]:  # ONNX Runtime only warns
        raise PeerUnavailableError(f"onnxruntime: {provider[0]} does not start on this machine")
    return session, f"{ort.__version__}, {provider[0]}, {setting.operand_dtype}, {how}"


def runner(
    session: Any, inputs: Results, task: Task
) -> tuple[Callable[[], Any], Callable[[], list[np.ndarray]]]:
    """A call of a session with results on the task's device, and one that copies them to the host.

    :param inputs: on the host; they are copied to the device once, here.
    """
    backend, names = task.layer.backend, [output.name for output in session.get_outputs()]
    if not isinstance(backend, CupyBackend):
        return lambda: session.run(names, inputs), lambda: session.run(names, inputs)
    on_device = {name: asarray(array, backend=backend.name) for name, array in inputs.items()}
    binding = session.io_binding()
    for name, array in on_device.items():
        binding.bind_input(name, "cuda", backend.device, array.dtype, array.shape, array.data.ptr)
    for name in names:
        binding.bind_output(name, "cuda", backend.device)

    def results() -> list[np.ndarray]:
        session.run_with_iobinding(binding)
        return list(binding.copy_outputs_to_cpu())

    return lambda: (session.run_with_iobinding(binding), on_device), results


PEERS: dict[str, Callable[[Task], Peer]] = {"torch": torch_peer, "onnxruntime": onnxruntime_peer}


def installed() -> list[str]:
    """The names in `PEERS` of installed libraries."""
    return [name for name in PEERS if find_spec(name)]


def imported(name: str) -> Any:
    """The module of this name; PeerUnavailableError gives the reason why it is not available."""
    try:
        return optional.load(name)
    except optional.OptionalPackageError as error:
        raise PeerUnavailableError(str(error)) from error
