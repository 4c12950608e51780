"""Parameters are written while other threads call: a call uses the values of one version."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from threading import Barrier, Event, Thread
from typing import Any

import numpy as np
import pytest

import xprnn
from tests.support.implementations import new_thread
from xprnn.nn.locking import WRITER, ReadersWriterLock

THREADS, WRITES, CALLS = 4, 150, 20
T, N, I, H = 4, 2, 64, 192  # noqa: E741
X = np.random.default_rng(0).standard_normal((T, N, I)).astype(np.float32)


@pytest.fixture(autouse=True)
def frequent_switches() -> Iterator[None]:
    """Switch between threads often."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)


def step(module: Any) -> Callable[[], Any]:
    """A stepper's first step; each thread has its own."""
    stepper = module.stepper(N)

    def call() -> Any:
        stepper.reset()
        return stepper.step(X[0])

    return call


def flat_state(module: Any) -> np.ndarray:
    return np.concatenate([array.ravel() for array in module.state_dict().values()])


def saved(module: Any, folder: Path) -> Callable[[], Any]:
    path = folder / f"{len([*folder.iterdir()])}"
    path.touch()

    def call() -> Any:
        module.save(path)
        return xprnn.load(path).parameters.flat.copy()

    return call


# For each case the class, and what gives a thread its call.
CASES: dict[str, tuple[Any, Callable[[Any, Path], Callable[[], Any]]]] = {
    "RNN": (xprnn.RNN, lambda m, _: lambda: m(X)[0]),
    "GRU": (xprnn.GRU, lambda m, _: lambda: m(X)[0]),
    "LSTM": (xprnn.LSTM, lambda m, _: lambda: m(X)[0]),
    "one step": (xprnn.GRU, lambda m, _: lambda: m(X[:1, :1])[0]),
    "GRUCell": (xprnn.GRUCell, lambda m, _: lambda: m(X[0])),
    "LSTMCell": (xprnn.LSTMCell, lambda m, _: lambda: m(X[0])[1]),
    "Linear": (xprnn.Linear, lambda m, _: lambda: m(X)),
    "stepper": (xprnn.LSTM, lambda m, _: step(m)),
    "state_dict": (xprnn.GRU, lambda m, _: lambda: flat_state(m)),
    "deepcopy": (xprnn.GRU, lambda m, _: lambda: copy.deepcopy(m).parameters.flat),
    "save": (xprnn.GRU, saved),
}


def started(target: Callable[[], None]) -> Thread:
    new = new_thread(target)
    new.start()
    return new


def build(case: str, folder: Path) -> tuple[Any, list[Any], list[Callable[[], Any]], list[Any]]:
    """A module, two states of it, a call for each thread, and what a call gives in each state."""
    kind, caller = CASES[case]
    module = kind(I, H, seed=0)
    states = [kind(I, H, seed=seed).state_dict() for seed in (0, 1)]
    calls = [caller(module, folder) for _ in range(THREADS)]
    expected = []
    for state in states:
        module.load_state_dict(state)
        expected.append(np.array(calls[0]()))
    assert np.abs(expected[0] - expected[1]).max() > 0.1
    return module, states, calls, expected


def matches_one_state(result: Any, expected: list[Any]) -> bool:
    return sum([np.allclose(result, wanted, atol=1e-5) for wanted in expected]) == 1


@pytest.mark.parametrize("case", CASES)
def test_a_call_during_a_write_sees_none_of_it(
    case: str, tmp_path: Path, implementation: str
) -> None:
    module, states, calls, expected = build(case, tmp_path)
    written = module.parameters.flat.copy()
    module.load_state_dict(states[0])
    results: list[Any] = []
    with module.writable() as flat:
        half = flat.size // 2
        flat[:half] = written[:half]
        thread = started(lambda: results.append(calls[0]()))
        thread.join(0.1)  # a call that does not wait ends meanwhile
        flat[half:] = written[half:]
    thread.join()
    assert matches_one_state(results[0], expected), "it belongs to neither state"


@pytest.mark.parametrize("case", ["GRU", "GRUCell", "stepper", "deepcopy"])
def test_every_result_belongs_to_one_version(
    case: str, tmp_path: Path, implementation: str
) -> None:
    module, states, calls, expected = build(case, tmp_path)
    start, done = Barrier(THREADS + 1), Event()
    counts, wrong = [0] * THREADS, [0] * THREADS

    def call_repeatedly(k: int) -> None:
        start.wait()
        while not done.is_set():
            result = calls[k]()
            wrong[k] += not matches_one_state(result, expected)
            counts[k] += 1

    threads = [started(partial(call_repeatedly, k)) for k in range(THREADS)]
    start.wait()
    written = 0
    while (written < WRITES or min(counts) < CALLS) and all(t.is_alive() for t in threads):
        module.load_state_dict(states[written % 2])
        written += 1
    done.set()
    for thread in threads:
        thread.join()
    assert sum(wrong) == 0, f"{sum(wrong)} of {sum(counts)} results belong to neither state"


def test_backward_uses_the_version_of_its_call_or_is_refused(implementation: str) -> None:
    layers = [xprnn.GRU(I, H, seed=0).train() for _ in range(2)]
    output, h_n = layers[0](X)
    expected = np.array(layers[0].backward(output, h_n)[0])
    layer, state = layers[1], layers[0].state_dict()
    other = xprnn.GRU(I, H, seed=1).state_dict()
    done = Event()

    def write() -> None:
        while not done.is_set():
            layer.load_state_dict(other)
            layer.load_state_dict(state)

    writer = started(write)
    refused = 0
    try:
        for _ in range(100):
            result = layer(X)[0]
            if not np.allclose(result, output, atol=1e-5):
                continue
            try:
                dx, _ = layer.backward(output, h_n)
            except RuntimeError as error:
                assert "parameters were changed" in str(error)
                refused += 1
            else:
                np.testing.assert_allclose(dx, expected, atol=1e-4 * np.abs(expected).max())
    finally:
        done.set()
        writer.join()


def test_calls_of_other_threads_wait_for_a_block_and_those_inside_do_not(
    implementation: str,
) -> None:
    layer = xprnn.GRU(I, H, seed=0).train()
    results: list[Any] = []
    with layer.writable() as flat:
        flat *= 0.5
        thread = started(lambda: results.append(layer(X)[0]))
        while not layer.parameters.reading._waiting_readers:
            assert thread.is_alive()
        layer.training = False
        inside = layer(X)[0]
        layer.training = True
        flat *= 0.5
        assert not results
    thread.join()
    assert layer.recorded_calls == 1, "the other thread is outside the block: its call is recorded"
    after = layer.eval()(X)[0]
    np.testing.assert_allclose(results[0], after, atol=1e-5)
    assert not np.allclose(inside, after, atol=1e-3)


# -- the lock


def until(condition: Callable[[], bool]) -> None:
    while not condition():
        pass


def test_a_writer_waits_for_readers_and_they_wait_for_it() -> None:
    lock, order = ReadersWriterLock(), list[str]()

    def write(name: str) -> None:
        with lock.writing(), lock.writing(), lock:  # nested, which the thread itself may do
            order.append(f"{name} alone")

    def read() -> None:
        with lock:
            order.append("shares")

    with lock:
        first = started(lambda: write("first"))
        until(lambda: len(lock._writers) == 1)
        reader = started(read)
        until(lambda: lock._waiting_readers == 1)
        second = started(lambda: write("second"))
        until(lambda: len(lock._writers) == 2)
        assert order == []
        order.append("ends")
    for thread in (first, reader, second):
        thread.join()
    assert order[0] == "ends" and order[1].endswith("alone")
    last = {"first alone", "second alone"} - {order[1]}
    assert order[2:] == ["shares", *last]
    assert not lock.readers and lock._active_writer is None


def test_a_thread_does_not_wait_for_itself() -> None:
    """As when a signal handler writes during a call; a lost share does not block it either."""
    lock = ReadersWriterLock()
    with lock, lock.writing():
        assert lock.held_for_writing
    lock.acquire_read()  # an interrupt came before the release
    with lock.writing():
        pass
    with lock:
        pass
    assert not lock.readers


def test_an_interrupted_writer_lets_others_continue(monkeypatch: pytest.MonkeyPatch) -> None:
    lock, held, free = ReadersWriterLock(), Event(), Event()

    def share() -> None:
        with lock:
            held.set()
            free.wait()

    thread = started(share)
    held.wait()

    def interrupted(timeout: float | None = None) -> bool:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(lock._changed, "wait", interrupted)
        with pytest.raises(KeyboardInterrupt), lock.writing():
            pass
    assert WRITER not in lock.readers and not lock._writers
    with lock:
        free.set()
    thread.join()
    with pytest.raises(ValueError, match="inside"), lock.writing():
        raise ValueError("inside")
    with lock.writing():
        pass


FORK = """
import os, sys, threading, time, warnings
import numpy as np, xprnn
warnings.simplefilter("ignore", DeprecationWarning)  # about forks of processes with threads
layer = xprnn.GRU(3, 4, seed=0)
other = {name: 2 * array for name, array in layer.state_dict().items()}
entered, end = threading.Event(), threading.Event()

def stay(context):
    with context:
        entered.set()
        end.wait()

thread = threading.Thread(target=stay, args=(INSIDE,))
thread.start()
entered.wait()
child = os.fork()
if child == 0:
    layer.load_state_dict(other)
    right = np.array_equal(layer.parameters["weight_hh_l0"], other["weight_hh_l0"])
    layer(np.ones((2, 1, 3), np.float32))
    os._exit(0 if right else 1)
for _ in range(600):  # a minute
    done, status = os.waitpid(child, os.WNOHANG)
    if done:
        break
    time.sleep(0.1)
else:
    os.kill(child, 9)
    status = -1
end.set()
thread.join()
sys.exit(0 if status == 0 else f"the child ended with {status}")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.parametrize("inside", ["reading", "writable()"])
def test_a_fork_removes_other_threads_from_the_lock(inside: str) -> None:
    """A child writes and calls, though a thread of its parent was calling or writing."""
    script = FORK.replace("INSIDE", f"layer.parameters.{inside}")
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


class Interrupted(set[int]):
    """A set that raises an interrupt with the first writer, as a signal may."""

    def add(self, value: int) -> None:
        super().add(value)
        if value == WRITER:
            raise KeyboardInterrupt


def test_an_interrupted_write_leaves_the_lock_to_others() -> None:
    module = xprnn.Linear(2, 2, seed=0)
    lock = module.parameters.reading
    lock.readers = Interrupted()
    with pytest.raises(KeyboardInterrupt):
        module.parameters["weight"] = np.ones((2, 2), np.float32)
    assert not lock.readers
    lock.readers = set()
    called = Thread(target=module, args=(np.ones((1, 2), np.float32),), daemon=True)
    called.start()
    called.join(60)
    assert not called.is_alive()
    module.parameters["weight"] = np.ones((2, 2), np.float32)


def test_a_thread_that_waits_to_write_may_read_in_a_signal_handler() -> None:
    """It would wait for itself: the handler is called while the thread waits."""
    lock, entered, end = ReadersWriterLock(), Event(), Event()

    def stay() -> None:
        with lock:
            entered.set()
            end.wait()

    class Handling(type(lock._changed)):  # type: ignore[misc]
        handled = False

        def wait(self, timeout: float | None = None) -> bool:
            if not Handling.handled:
                Handling.handled = True
                with lock:  # as a handler that saves the module does
                    pass
                end.set()
            return super().wait(timeout)

    reader = Thread(target=stay)
    reader.start()
    entered.wait()
    lock._changed = Handling()
    writer = Thread(target=lambda: lock.writing().__enter__(), daemon=True)
    writer.start()
    writer.join(60)
    reader.join(60)
    assert not writer.is_alive() and Handling.handled


@pytest.mark.parametrize("way", [copy.deepcopy, lambda p: pickle.loads(pickle.dumps(p))])
def test_parameters_are_copied_with_a_lock_of_their_own(way: Callable[[Any], Any]) -> None:
    module = xprnn.GRU(3, 4, seed=0)
    copied = way(module.parameters)
    assert copied.reading is not module.parameters.reading
    with module.writable() as flat:
        flat *= 2.0
    np.testing.assert_array_equal(2 * copied["weight_hh_l0"], module.parameters["weight_hh_l0"])
