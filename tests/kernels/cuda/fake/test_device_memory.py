"""Out-of-memory errors: they name the call and the size, leak nothing and change nothing."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import xprnn
from tests.support.failing_memory import CupyMemory, FakeMemory
from tests.support.implementations import SelectKernels
from tests.support.on_device import backward, forward, run
from tests.support.operations import moved
from tests.support.targets import (
    CELLS,
    FUNCTIONS,
    LAYERS,
    arguments,
    arrays,
    assert_same,
    make,
    module_of,
    normal,
    state_of,
)
from xprnn import feature_first, optim
from xprnn.backend import Backend
from xprnn.core.oom import OutOfMemoryError
from xprnn.nn.layers import _Layer

SUBJECTS = (*LAYERS, *CELLS, *FUNCTIONS)


@pytest.fixture(params=["fake_cupy", pytest.param("cupy", marks=pytest.mark.gpu)])
def memory(
    request: pytest.FixtureRequest, fake_cupy: Backend, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Any]:
    """The memory of the fake CuPy, and that of a GPU."""
    if request.param == "fake_cupy":
        yield FakeMemory(fake_cupy, monkeypatch)
        return
    try:
        backend = xprnn.get_backend("cupy")
    except xprnn.BackendUnavailableError as error:
        pytest.skip(str(error))
    allocator = CupyMemory(backend)
    with backend.xp.cuda.using_allocator(allocator):
        yield allocator


def check_failure(memory: Any, error: MemoryError, source: str, before: int, exact: bool) -> None:
    """Fail unless the error names its source, and no array is leaked while the error is alive."""
    text = rf"{source} on {memory.backend.name}: Out of memory allocating [\d,]+ bytes"
    assert re.match(text, str(error)), error
    held_after = memory.held()
    assert held_after == before if exact else held_after <= before, (
        f"{held_after - before} bytes are held"
    )


def on_host(memory: Any, results: Any) -> list[np.ndarray]:
    return [memory.backend.to_host(array) for array in arrays(results)]


def name_of(subject: Any) -> str:
    is_function = module_of(subject) is not subject
    return r"xprnn\.functional\S*" if is_function else type(subject).__name__


def state(memory: Any, subject: Any) -> list[np.ndarray]:
    *flat, counts = state_of(subject)
    return [*on_host(memory, flat), counts]


class Trials:
    """A subject for each allocation of a call, new or used before, and the expected results."""

    def __init__(self, name: str, memory: Any, used: bool) -> None:
        layer_options = {"num_layers": 2, "bidirectional": True} if name in LAYERS else {}
        self._make = lambda: make(name, backend=memory.backend.name, **layer_options)
        self._memory, self._used = memory, used
        first = self._make()
        self.inputs = moved(memory.backend, arguments(first))
        self.expected = on_host(memory, run(first, self.inputs))

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        for k in range(1, 1000):
            subject = self._make()
            if self._used:
                run(subject, self.inputs)
            yield k, subject

    def check(self, subject: Any) -> None:
        """Fail unless the subject works as if nothing had happened."""
        module_of(subject).train()
        assert_same(on_host(self._memory, run(subject, self.inputs)), self.expected)


CASES = (  # subject, kernels, whether it was called before
    *((name, "reference", used) for name in SUBJECTS for used in (False, True)),
    *((name, "auto", False) for name in ("rnn_relu", "gru", "gru_reset_before", "lstm")),
)
each_case = pytest.mark.parametrize(
    ("name", "kernels", "used"), CASES, ids=[f"{n}-{k}{'-used' * u}" for n, k, u in CASES]
)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@each_case
def test_forward(
    name: str, kernels: str, used: bool, training: bool, memory: Any, select_kernels: SelectKernels
) -> None:
    select_kernels(kernels)
    check_forward(Trials(name, memory, used), training, memory, exact=not used)


def check_forward(trials: Trials, training: bool, memory: Any, exact: bool) -> None:
    for k, subject in trials:
        if not training:
            module_of(subject).eval()
        unchanged, before = state(memory, subject), memory.held()
        with memory.failing(k):
            try:
                forward(subject, trials.inputs)
                break
            except MemoryError as error:
                check_failure(memory, error, name_of(subject), before, exact)
        assert_same(state(memory, subject), unchanged)
        trials.check(subject)
    assert k > 2


@each_case
def test_backward(
    name: str, kernels: str, used: bool, memory: Any, select_kernels: SelectKernels
) -> None:
    """Afterwards backward works or, if saved arrays were overwritten, refuses the call."""
    select_kernels(kernels)
    trials, repeated = Trials(name, memory, used), []
    for _, subject in trials:
        module = module_of(subject)
        forward(subject, trials.inputs)
        unchanged, before = state(memory, subject), memory.held()
        with memory.failing(len(repeated) + 1):
            try:
                backward(subject, trials.inputs)
                break
            except MemoryError as error:
                check_failure(memory, error, name_of(subject), before, exact=False)
        assert_same(state(memory, subject), unchanged)
        try:
            results = on_host(memory, backward(subject, trials.inputs))
        except RuntimeError as error:
            assert re.search("was interrupted|has been used", str(error))
            repeated.append(False)
            module.eval()
        else:
            results += on_host(memory, list(module.grads.values()))
            assert_same(results, trials.expected[-len(results) :])
            repeated.append(True)
        trials.check(subject)
    assert len(repeated) > 2
    assert repeated[0], "nothing had been written yet"


def test_a_leak_is_detected(fake_cupy: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """The injected fault: a correct error that keeps the call's arrays alive."""
    memory, original = FakeMemory(fake_cupy, monkeypatch), _Layer._call.__wrapped__

    def leaking(self: Any, call: Any) -> Any:
        try:
            return original(self, call)
        except MemoryError as error:
            raise OutOfMemoryError(f"GRU on fake_cupy: {error}") from error

    monkeypatch.setattr(_Layer, "_call", leaking)
    with pytest.raises(AssertionError, match="bytes are held"):
        check_forward(Trials("gru", memory, False), True, memory, exact=True)


# -- other calls

LINEAR = {"dtype": "float64", "seed": 0}


def other_calls(memory: Any) -> dict[str, tuple[str, Callable[[], Any]]]:
    """The name in the error, and a call that can be repeated."""
    name, device = memory.backend.name, memory.backend
    x, y = device.from_host(normal(0, 4, 3)), device.from_host(normal(1, 4, 5))
    linear = xprnn.Linear(3, 5, backend=name, **LINEAR)
    trained = xprnn.Linear(3, 5, backend=name, **LINEAR).train()
    trained(x)
    table = xprnn.Embedding(5, 3, backend=name, **LINEAR)
    embedding = xprnn.Embedding(5, 3, backend=name, **LINEAR).train()
    embedding([1, 1, 0, 4])
    shapes = {"Wax": (5, 3), "Waa": (5, 5), "Wya": (2, 5), "ba": (5, 1), "by": (2, 1)}
    W = {key: device.from_host(normal(k, *s)) for k, (key, s) in enumerate(shapes.items())}
    sequence, a0 = device.from_host(normal(5, 3, 4, 6)), device.from_host(normal(6, 5, 4))
    first = r"xprnn\.(functional|feature_first\.rnn_forward)"
    losses = r"xprnn\."
    return {
        "Linear": ("Linear", lambda: linear(x)),
        "Linear.backward": ("Linear", lambda: trained.backward(y)),
        "Embedding": ("Embedding", lambda: table([1, 1, 0, 4])),
        "Embedding.backward": ("Embedding", lambda: embedding.backward(x)),
        "softmax_cross_entropy": (
            f"{losses}softmax_cross_entropy",
            lambda: xprnn.softmax_cross_entropy(y, [0] * 4),
        ),
        "mse_loss": (f"{losses}mse_loss", lambda: xprnn.mse_loss(y, y)),
        "rnn_forward": (first, lambda: feature_first.rnn_forward(sequence, a0, W)),
        "Adam": (r"xprnn\.optim\.optimizer", lambda: optim.Adam([trained], lr=0.1)),
        "clip_grad_norm": (
            r"xprnn\.optim\.clip_grad_norm",
            lambda: optim.clip_grad_norm([trained], 1.0),
        ),
    }


OTHER_CALLS = (
    *("Linear", "Linear.backward", "softmax_cross_entropy", "mse_loss", "rnn_forward"),
    *("Embedding", "Embedding.backward", "Adam", "clip_grad_norm"),
)


@pytest.mark.parametrize("what", OTHER_CALLS)
def test_other_calls(what: str, memory: Any) -> None:
    source, call = other_calls(memory)[what]
    for k in range(1, 1000):
        before = memory.held()
        with memory.failing(k):
            try:
                call()
                break
            except MemoryError as error:
                check_failure(memory, error, source, before, exact=True)
    assert k > 1


def test_the_callers_allocator_is_used(memory: Any) -> None:
    layer = make("gru", backend=memory.backend.name)
    default_pool_before, before = default_pool_bytes(memory), memory.held()
    output = forward(layer, moved(memory.backend, arguments(layer)))[0]
    assert memory.held() - before >= output.nbytes
    assert default_pool_bytes(memory) == default_pool_before


def default_pool_bytes(memory: Any) -> int:
    """The bytes used in CuPy's default pool."""
    xp = memory.backend.xp
    return xp.get_default_memory_pool().used_bytes() if memory.backend.kind == "cupy" else 0


# -- a full GPU


@pytest.mark.gpu
@pytest.mark.parametrize("name", LAYERS)
def test_a_full_gpu(name: str) -> None:
    try:
        backend = xprnn.get_backend("cupy")
    except xprnn.BackendUnavailableError as error:
        pytest.skip(str(error))
    layer = make(name, 64, 64, backend="cupy", dtype="float32")
    inputs = moved(backend, arguments(layer, T=200, N=128))
    expected = on_host(SimpleNamespace(backend=backend), run(layer, inputs))
    layer.eval().train()
    pool = backend.xp.get_default_memory_pool()
    pool.free_all_blocks()
    before = pool.used_bytes()
    pool.set_limit(size=pool.total_bytes() + (8 << 20))
    try:
        forward(layer, inputs)
    except MemoryError as error:
        text = rf"{type(layer).__name__} on cupy:0: Out of memory allocating [\d,]+ bytes"
        assert re.match(text, str(error))
        assert pool.used_bytes() <= before
        small = {key: array[:1] if array.ndim == 3 else array for key, array in inputs.items()}
        forward(layer, {**small, **{n: inputs[n] for n in inputs if n.endswith("0")}})
        layer.eval().train()
    else:
        pytest.fail("the memory was sufficient")
    finally:
        pool.set_limit(size=0)
    assert_same(on_host(SimpleNamespace(backend=backend), run(layer, inputs)), expected)
