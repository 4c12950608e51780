"""Several threads call one layer in eval mode at once, each with its own shapes."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from threading import Barrier

import numpy as np
import pytest

from tests.support.implementations import Pool
from tests.support.targets import (
    FUNCTIONS,
    MODULES,
    arguments,
    arrays,
    assert_same,
    copies,
    forward,
    is_cell,
    make,
    module_of,
    run,
)

THREADS, ROUNDS = 8, 25


@pytest.fixture(autouse=True)
def frequent_switches() -> Iterator[None]:
    """Switch between threads as often as Python can."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


@pytest.mark.parametrize("name", [*MODULES, *FUNCTIONS])
def test_threads_get_the_results_of_one_thread(name: str, implementation: str) -> None:
    subject = make(name)
    module_of(subject).eval()
    calls = [arguments(subject, T=2 + k, N=1 + k % 3, seed=k) for k in range(THREADS)]
    options = [
        {"lengths": [k % (3 + k), 2 + k, 0][: 1 + k % 3]} if k % 2 and not is_cell(name) else {}
        for k in range(THREADS)
    ]
    expected = [copies(forward(subject, c, **o)) for c, o in zip(calls, options, strict=True)]
    start = Barrier(THREADS)

    def call_repeatedly(k: int) -> list[list[np.ndarray]]:
        start.wait()
        return [arrays(forward(subject, calls[k], **options[k])) for _ in range(ROUNDS)]

    with Pool(THREADS) as pool:
        outputs = list(pool.map(call_repeatedly, range(THREADS)))
    for k in range(THREADS):
        for results in outputs[k]:
            assert_same(results, expected[k], f"thread {k}")


@pytest.mark.parametrize("name", ["gru", "lstm_cell"])
def test_threads_train_layers_of_their_own(name: str, implementation: str) -> None:
    calls = [arguments(make(name), T=2 + k, seed=k) for k in range(THREADS)]
    expected = [run(make(name, seed=k), inputs) for k, inputs in enumerate(calls)]

    def train(k: int) -> list[list[np.ndarray]]:
        subject = make(name, seed=k)
        return [run(subject, calls[k]) for _ in range(ROUNDS)]

    with Pool(THREADS) as pool:
        for k, results in enumerate(pool.map(train, range(THREADS))):
            for outputs in results:
                assert_same(outputs, expected[k], f"thread {k}")
