"""Behaviour on a GPU: streams, synchronisation, launches, device memory, refused arguments."""

from __future__ import annotations

import copy
import json
import pickle
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import xprnn
from tests.support.cases import CELLS, LAYERS, Case, build, draw, move
from tests.support.implementations import SelectKernels
from tests.support.targets import arguments, make
from tests.unit.test_dropout import X, revealing
from xprnn.backend import Backend, to_numpy
from xprnn.kernels.cuda.cells import POINTWISE

pytestmark = [pytest.mark.gpu, pytest.mark.parametrize("backend", ["cupy"], indirect=True)]

SPIN = r"""
extern "C" __global__ void spin(unsigned long long nanoseconds) {
  unsigned long long start, now;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(start));
  do {
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now));
  } while (now - start < nanoseconds);
}
"""
SLOW = 0.5  # seconds that the device is kept busy; a call's launches take a hundredth of it
each_cell = pytest.mark.parametrize("cell", LAYERS)


@pytest.fixture
def keep_busy(backend: Backend) -> Callable[[], Any]:
    """Occupies the current stream for `SLOW` seconds; returns an event recorded after that work."""
    spin = backend.xp.RawKernel(SPIN, "spin")

    def start() -> Any:
        spin((1,), (1,), (np.uint64(SLOW * 1e9),))
        return backend.xp.cuda.get_current_stream().record()

    return start


# -- calls do not wait for the device


def trainer(cell: str, backend: Backend, lengths: Any) -> Callable[[], Any]:
    """A step of training on arrays of the device; it returns the loss on the device.

    It makes few launches: after a thousand queued ones the next launch blocks the host.
    """
    case = Case(cell, layers=2, dropout=0.25, dtype="float32", T=3, N=4)
    layer, problem = build(case, backend.name), draw(case)
    x, h0 = move(backend, problem.x, problem.initial[0])
    target = backend.xp.zeros((case.T, case.N, case.H), "float32")
    optimizer = xprnn.optim.Adam([layer])
    hx = (h0, h0) if cell == "lstm" else h0

    def step() -> Any:
        output, _ = layer(x, hx, lengths=lengths)
        loss, doutput = xprnn.mse_loss(output, target)
        optimizer.zero_grad()
        layer.backward(doutput)
        xprnn.optim.clip_grad_norm([layer], 1.0)
        optimizer.step()
        return loss

    return step


def check_returns_early(
    step: Callable[[], Any], backend: Backend, keep_busy: Callable[[], Any]
) -> None:
    """Fail if a step waits for work that was queued before it.

    Only the second round is checked: the first compiles kernels and allocates memory, also pinned
    memory, of which calls need more while earlier copies are pending.
    """
    with backend.xp.cuda.Stream(non_blocking=True) as stream:
        for _ in range(2):
            step()
            stream.synchronize()
            done = keep_busy()
            step()
            waited = done.done
            stream.synchronize()
    assert not waited, "the call returned after the work queued before it was done"


@pytest.mark.parametrize("lengths", [None, [1, 3, 0, 2]], ids=["full", "ragged"])
@each_cell
def test_a_step_of_training_does_not_wait(
    cell: str,
    lengths: Any,
    backend: Backend,
    keep_busy: Callable[[], Any],
    implementation: str,
) -> None:
    check_returns_early(trainer(cell, backend, lengths), backend, keep_busy)


@pytest.mark.parametrize("name", CELLS)
def test_a_step_of_a_cell_does_not_wait(
    name: str, backend: Backend, keep_busy: Callable[[], Any]
) -> None:
    kind, options = CELLS[name]
    cell = kind(3, 5, **options, backend=backend.name, dtype="float64", seed=0)
    x = backend.xp.ones((4, 3))
    check_returns_early(lambda: cell(x), backend, keep_busy)


def test_waiting_is_detected(backend: Backend, keep_busy: Callable[[], Any]) -> None:
    step = trainer("gru", backend, None)
    with pytest.raises(AssertionError, match="the call returned after"):
        check_returns_early(lambda: step().get(), backend, keep_busy)


# -- the current stream


@each_cell
def test_work_runs_on_the_current_stream(
    cell: str, backend: Backend, keep_busy: Callable[[], Any], implementation: str
) -> None:
    """x is filled by pending work of another stream: only calls on that stream read the values."""
    case = Case(cell, layers=2, directions=2)
    layer, problem = build(case, backend.name).eval(), draw(case)
    cupy, values = backend.xp, backend.from_host(problem.x)
    expected, _ = layer(values)
    x = cupy.full_like(values, cupy.nan)
    cupy.cuda.Device().synchronize()
    with cupy.cuda.Stream(non_blocking=True) as stream:
        keep_busy()
        x[...] = values
        actual, _ = layer(x)
    too_early, _ = layer(x)
    assert np.isnan(to_numpy(too_early)).all()
    stream.synchronize()
    assert to_numpy(actual).tobytes() == to_numpy(expected).tobytes()


# -- the selected implementation, and its launches


@each_cell
def test_the_pointwise_kernels_are_selected_unless_others_are_forced(
    cell: str, backend: Backend, monkeypatch: pytest.MonkeyPatch, select_kernels: SelectKernels
) -> None:
    layer = build(Case(cell), backend.name)
    for types in ({}, {"dtype": "float32"}, {"compute_dtype": "float16"}):
        assert layer.to(**types).explain((6, 4, 3)).splitlines()[0].endswith(": pointwise")
    for name in ("reference", "pointwise"):
        select_kernels(name)
        assert layer.explain((6, 4, 3)).splitlines()[0].endswith(f": {name}")
    select_kernels("sequence")
    layer.to(dtype="float64", compute_dtype="float64")  # no sequence kernel supports it
    with pytest.raises(xprnn.KernelUnavailableError, match="sequence"):
        layer(backend.xp.zeros((6, 4, 3), "float64"))


def launched(call: Callable[[], Any], folder: Path) -> Counter[str]:
    """The kernels that a call launches, by name, as CUDA's profiler reports them."""
    torch = pytest.importorskip("torch")
    profiler = torch.profiler
    if profiler.ProfilerActivity.CUDA not in profiler.supported_activities():
        pytest.skip(f"torch {torch.__version__} cannot profile CUDA")
    torch.zeros(1, device="cuda").sum().item()
    with profiler.profile(activities=[profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    profile.export_chrome_trace(str(folder / "trace.json"))
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    kernels = Counter(event["name"] for event in events if event.get("cat") == "kernel")
    if not kernels:
        pytest.skip("the profiler reports no kernels on this machine")
    return kernels


@each_cell
def test_a_step_launches_its_kernels_once(cell: str, backend: Backend, tmp_path: Path) -> None:
    """Each op of a cell is one launch per step, forward and backward."""
    case = Case(cell, T=7)
    layer, problem = build(case, backend.name), draw(case)

    def call() -> None:
        output, _ = layer(move(backend, problem.x))
        layer.backward(output)

    call()
    actual = launched(call, tmp_path)
    fused = Counter({name: count for name, count in actual.items() if name.startswith("xprnn_")})
    ops = POINTWISE[case.cell].pointwise_ops
    assert len(fused) == len(ops) and set(fused.values()) == {case.T}, actual


# -- memory


@each_cell
def test_repeated_calls_allocate_no_more_memory(
    cell: str, backend: Backend, implementation: str
) -> None:
    pool = backend.xp.get_default_memory_pool()
    step = trainer(cell, backend, [1, 3, 0, 2])
    for _ in range(5):
        step()
    before = pool.used_bytes(), pool.total_bytes()
    for _ in range(200):
        step()
    assert (pool.used_bytes(), pool.total_bytes()) == before


def test_a_memory_leak_is_detected(backend: Backend) -> None:
    pool, step = backend.xp.get_default_memory_pool(), trainer("gru", backend, None)
    step()
    before = pool.used_bytes()
    held = [step()]
    assert pool.used_bytes() > before and held


# -- what is refused


def test_host_arrays_are_refused(backend: Backend) -> None:
    layer = make("gru", backend=backend.name)
    inputs = arguments(layer)
    with pytest.raises(TypeError, match=r"x: .*xprnn\.asarray\(.*backend='cupy:0'"):
        layer(inputs["x"])
    x = backend.from_host(inputs["x"])
    with pytest.raises(TypeError, match=r"h0: .*xprnn\.asarray\(.*backend='cupy:0'"):
        layer(x, inputs["h0"])
    with pytest.raises(TypeError, match=r"x: .*on backend 'numpy'"):
        make("gru")(x)
    with pytest.raises(TypeError, match=r"lengths: expected host integers, got .*cupy:0"):
        layer(x, lengths=backend.xp.array([1, 2, 3]))
    output, _ = layer(xprnn.asarray(inputs["x"], backend=backend.name), lengths=[1, 2, 3])
    assert backend.owns(output)


# -- dropout


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("lengths", [None, [6, 0, 3, 1, 5]], ids=["full", "ragged"])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_masks_equal_numpys(p: float, lengths: Any, dtype: str, backend: Backend) -> None:
    layers = [revealing(2, 2, p, dtype=dtype, backend=name) for name in ("numpy", backend.name)]
    x = X.astype(dtype)
    for _ in range(2):
        on_host, _ = layers[0](x, lengths=lengths)
        on_device, _ = layers[1](backend.from_host(x), lengths=lengths)
        assert to_numpy(on_device).tobytes() == on_host.tobytes()
        assert 0.0 < np.mean(on_host == 0.0) < 1.0


# -- moving and copying


@each_cell
def test_moved_and_copied_layers_compute_the_same_bits(
    cell: str, backend: Backend, tmp_path: Path
) -> None:
    case = Case(cell, layers=2, directions=2, dropout=0.5)
    layer, problem = build(case, backend.name), draw(case)
    x = backend.from_host(problem.x)
    output, _ = layer(x)
    layer.backward(output)
    path = tmp_path / "m.safetensors"
    layer.save(path)
    state = {name: to_numpy(array).tobytes() for name, array in layer.parameters.items()}
    gradients = to_numpy(layer.grads.flat).tobytes()
    copies = {
        "pickle": pickle.loads(pickle.dumps(layer)),
        "copy": copy.deepcopy(layer),
        "there and back": copy.deepcopy(layer).to("numpy").to(backend.name),
        "file": xprnn.load(path, backend=backend.name),
        "file on the host": xprnn.load(path, backend="numpy").to(backend.name),
    }
    expected, _ = layer.train()(x)
    for what, other in copies.items():
        assert other.backend is backend, what
        actual = {name: to_numpy(array).tobytes() for name, array in other.parameters.items()}
        assert actual == state, what
        if "file" not in what:
            assert to_numpy(other.grads.flat).tobytes() == gradients, what
        output, _ = other.train()(x)  # the same call number, and so the same dropout mask
        assert to_numpy(output).tobytes() == to_numpy(expected).tobytes(), what
