"""Inside a caller's stream capture every call is refused, before it has any effect."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import xprnn
from tests.support.fake_cupy.cuda import LOG
from tests.support.on_device import backward, forward, run
from tests.support.operations import PARTS, Case, moved
from tests.support.targets import (
    CELLS,
    FUNCTIONS,
    LAYERS,
    arguments,
    arrays,
    assert_same,
    make,
    module_of,
    state_of,
)
from xprnn import feature_first, functional, optim
from xprnn.backend import Backend
from xprnn.nn.module import Module

SUBJECTS = (*LAYERS, *CELLS, *FUNCTIONS)
CAPTURE_ERROR = r"backend '{}': the current stream is being captured.*cuBLAS.*nothing has been done"
WITHOUT_LAUNCHES = {  # public names that launch nothing, or whose members are called below
    *("BackendUnavailableError", "GradientError", "KernelStoppedError", "KernelUnavailableError"),
    *("feature_first", "functional", "optim", "get_backend", "use_backend"),
    *("cell", "cell_definitions", "use_kernels"),
    "qualify",  # its calls run in processes of their own
    *("__version__",),
}


@pytest.fixture(params=["fake_cupy", pytest.param("cupy", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest, fake_cupy: Backend) -> Backend:
    """The fake CuPy, and CuPy if there is a usable GPU."""
    try:
        return xprnn.get_backend(request.param)
    except xprnn.BackendUnavailableError as error:
        pytest.skip(str(error))


def attempt(device: Backend, call: Callable[[], Any]) -> None:
    """Call inside a capture; fail unless it is refused with nothing launched."""
    cupy = device.xp
    stream = (
        cupy.cuda.Stream() if device.kind == "fake_cupy" else cupy.cuda.Stream(non_blocking=True)
    )
    with stream:
        stream.begin_capture()
        LOG.clear()
        try:
            with pytest.raises(RuntimeError, match=CAPTURE_ERROR.format(device.name)):
                call()
        finally:
            stream.end_capture()  # on a GPU this raises if the capture was invalidated
    assert not LOG.launches and not LOG.memory


def on_host(device: Backend, results: Any) -> list[np.ndarray]:
    return [device.to_host(a) if device.owns(a) else a for a in arrays(results)]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", SUBJECTS)
def test_calls_and_their_backward(name: str, training: bool, device: Backend) -> None:
    subject = make(name, backend=device.name)
    inputs = moved(device, arguments(subject))
    expected = on_host(device, run(subject, inputs))
    forward(subject, inputs)
    if not training:
        module_of(subject).eval()
    before = on_host(device, state_of(subject))
    attempt(device, lambda: forward(subject, inputs))
    if training or name in FUNCTIONS:
        attempt(device, lambda: backward(subject, inputs))
    assert_same(on_host(device, state_of(subject)), before)
    if training:
        backward(subject, inputs)
    module_of(subject).train()
    assert_same(on_host(device, run(subject, inputs)), expected)


# -- all other public names


@pytest.fixture(params=PARTS, ids=lambda part: part.__name__)
def case(request: pytest.FixtureRequest, device: Backend, tmp_path: Path) -> Case:
    return request.param(device, tmp_path)


def test_every_operation_is_refused(case: Case, device: Backend, tmp_path: Path) -> None:
    module, calls = case
    before = _state(device, module)
    files = sorted(path.name for path in tmp_path.iterdir())
    for name, call in calls.items():
        try:
            attempt(device, call)
        except BaseException as error:
            raise AssertionError(name) from error
        assert_same(_state(device, module), before, name)
        assert sorted(path.name for path in tmp_path.iterdir()) == files, name
    for call in calls.values():  # afterwards all of them work, in this order
        call()


def _state(device: Backend, module: Module) -> list[np.ndarray]:
    flat = [module.parameters.flat, module.grads.flat]
    counts = [module.parameters.version, len(module._records), int(module.training)]
    counts += [getattr(module, "_calls", 0), len(module.frozen), module.parameters._open]
    return [*on_host(device, flat), np.array(counts)]


def test_the_list_of_operations_is_complete(fake_cupy: Backend, tmp_path: Path) -> None:
    """A new public name must be among the operations, or known to launch nothing."""
    names = {name for part in PARTS for name in part(fake_cupy, tmp_path)[1]}
    assert set(xprnn.__all__) - WITHOUT_LAUNCHES <= names, "xprnn"
    assert set(optim.__all__) - {"CosineDecay", "Optimizer"} <= names, "xprnn.optim"
    steps = {name for name in dir(feature_first) if name.startswith("rnn_")}
    assert steps <= names, "xprnn.feature_first"
    silent = {"unfreeze", "trainable", "train", "eval", "explain"}
    silent |= {"to"}  # attempted under other names
    silent |= {name for name, value in inspect.getmembers(xprnn.GRU) if isinstance(value, property)}
    assert _methods(xprnn.GRU) - silent <= names, "layers"
    own = _methods(optim.Adam)
    assert {f"Adam.{name}" for name in own} <= names, "optimisers"


def _methods(kind: type) -> set[str]:
    names = {name for name in dir(kind) if not name.startswith("_")}
    return {name for name in names if callable(getattr(kind, name))}


def test_operations_without_launches_are_allowed(device: Backend) -> None:
    layer = make("gru", backend=device.name)
    stream = device.xp.cuda.Stream(non_blocking=True) if device.kind == "cupy" else None
    stream = stream or device.xp.cuda.Stream()
    with stream:
        stream.begin_capture()
        layer.explain((4, 3, 3))
        layer.eval().train().unfreeze()
        assert layer.trainable() and repr(layer)
        layer.recompute = 2
        stream.end_capture()


def test_a_missing_check_is_detected(
    fake_cupy: Backend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The injected fault: if `activate` does not refuse, the tests above fail."""
    for part in PARTS:
        _, calls = part(fake_cupy, tmp_path)
        with monkeypatch.context() as patched:
            patched.setattr(type(fake_cupy), "activate", lambda self: nullcontext())
            for name, call in calls.items():
                if name == "synchronize":
                    continue  # the fake CuPy has nothing to wait for
                with pytest.raises((AssertionError, pytest.fail.Exception, NotImplementedError)):
                    attempt(fake_cupy, call)


def test_a_block_that_ends_in_a_capture(fake_cupy: Backend) -> None:
    """`writable`, entered outside, cannot clear its padding inside; it raises and is closed."""
    layer = make("gru", backend="fake_cupy")
    stream, block = fake_cupy.xp.cuda.Stream(), layer.writable()
    block.__enter__()
    with stream:
        stream.begin_capture()
        with pytest.raises(RuntimeError, match=CAPTURE_ERROR.format("fake_cupy")):
            block.__exit__(None, None, None)
        stream.end_capture()
    run(layer, moved(fake_cupy, arguments(layer)))
    with layer.writable():
        pass


def test_functions_keep_their_cache_after_a_refused_call(fake_cupy: Backend) -> None:
    subject = make("gru_function", backend="fake_cupy")
    inputs = moved(fake_cupy, arguments(subject))
    output, h_n, cache = functional.gru_forward(inputs["x"], inputs["h0"], *subject.weights)
    attempt(fake_cupy, lambda: functional.gru_backward(output, h_n, cache))
    functional.gru_backward(output, h_n, cache)


@pytest.mark.gpu
def test_a_capture_continues_after_a_refused_call() -> None:
    """The graph runs what the caller captured before and after the refused call."""
    try:
        device = xprnn.get_backend("cupy")
    except xprnn.BackendUnavailableError as error:
        pytest.skip(str(error))
    cupy = device.xp
    layer = make("gru", backend=device.name)
    inputs = moved(device, arguments(layer))
    a = cupy.ones(5)
    a *= 1.0  # compiled
    a += 1.0
    cupy.cuda.Device().synchronize()
    a[...] = 3.0
    cupy.cuda.Device().synchronize()
    with cupy.cuda.Stream(non_blocking=True) as stream:
        stream.begin_capture()
        a *= 2.0
        with pytest.raises(RuntimeError, match=CAPTURE_ERROR.format(device.name)):
            forward(layer, inputs)
        a += 1.0
        graph = stream.end_capture()
        graph.launch()
        stream.synchronize()
    assert cupy.asnumpy(a).tolist() == [7.0] * 5
