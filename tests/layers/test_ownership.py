"""Ownership of memory: results belong to the caller, and writing them changes nothing else."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest

import xprnn
from tests.support.targets import (
    CELLS,
    FUNCTIONS,
    LAYERS,
    arguments,
    arrays,
    assert_same,
    backward,
    copies,
    forward,
    is_cell,
    make,
    module_of,
    normal,
    run,
)

SUBJECTS = (*LAYERS, *CELLS, *FUNCTIONS)
DEEP = {"num_layers": 2, "bidirectional": True, "dropout": 0.5}


def build(name: str) -> Any:
    """Layers with all options that keep buffers between calls: layers, directions, dropout."""
    return make(name, **(DEEP if name in LAYERS else {}))


def keywords(name: str, k: int) -> dict[str, Any]:
    """Lengths for every other call, unless the subject is a cell."""
    return {} if is_cell(name) or k % 2 else {"lengths": [2, 0, 4]}


# -- results


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", SUBJECTS)
def test_no_later_call_changes_a_result(name: str, training: bool, implementation: str) -> None:
    subject = build(name)
    module = module_of(subject)
    module.train() if training else module.eval()
    results: list[Any] = []
    for k in range(6):
        inputs = arguments(subject, seed=k)
        results += arrays(forward(subject, inputs, **keywords(name, k)))
        if training:
            results += arrays(backward(subject, inputs))
        results += module.state_dict().values()
        before = copies(results)
        other = arguments(subject, T=7, N=2, seed=9)
        forward(subject, other)
        if training:
            forward(subject, inputs)
            backward(subject, inputs)
            backward(subject, other)
        with module.writable() as flat:
            flat *= 1.125
        assert_same(results, before, f"call {k}")


@pytest.mark.parametrize("name", SUBJECTS)
def test_results_share_no_memory(name: str, implementation: str) -> None:
    """Not with each other, the arguments or the module; if no step ran, not with h0 either."""
    subject = build(name)
    module = module_of(subject)
    for T, N, lengths in ((4, 3, [4, 0, 2]), (4, 3, [0, 0, 0]), (0, 3, None), (4, 3, None)):
        inputs = arguments(subject, T, N)
        options = {} if is_cell(name) else {"lengths": lengths}
        results = arrays(forward(subject, inputs, **options)) + arrays(backward(subject, inputs))
        others = [*inputs.values(), module.parameters.flat, module.grads.flat]
        for k, result in enumerate(results):
            for other in [*results[:k], *others]:
                assert not np.shares_memory(result, other)


@pytest.mark.parametrize("name", SUBJECTS)
def test_backward_runs_in_reverse_order_of_the_calls(name: str, implementation: str) -> None:
    """The gradients are those of each call and its backward alone, to the bit."""
    together, alone = build(name), build(name)
    calls = [(arguments(together, T, N, k), k) for k, (T, N) in enumerate([(4, 3), (2, 3), (6, 3)])]
    outputs = [forward(together, inputs, **options(name, k)) for inputs, k in calls]
    for (inputs, k), output in zip(reversed(calls), reversed(outputs), strict=True):
        module_of(alone)._calls = k  # the same dropout mask
        assert_same(forward(alone, inputs, **options(name, k)), output)
        assert_same(backward(together, inputs), backward(alone, inputs), f"call {k}")
        grads = [module_of(subject).grads.flat for subject in (together, alone)]
        assert_same(*grads)
        assert np.abs(grads[0]).max() > 0.0


def options(name: str, k: int) -> dict[str, Any]:
    return {} if is_cell(name) or k != 1 else {"lengths": [1, 0, 2]}


@pytest.mark.parametrize("name", SUBJECTS)
def test_writing_arguments_and_results_does_not_change_backward(
    name: str, implementation: str
) -> None:
    subject = build(name)
    inputs = arguments(subject)
    lengths = {} if is_cell(name) else {"lengths": np.array([2, 0, 4])}
    module_of(subject)._calls = 0
    expected = run(subject, inputs, **copy.deepcopy(lengths))

    module_of(subject)._calls = 0
    called = {n: a.copy() for n, a in inputs.items()}
    results = arrays(forward(subject, called, **lengths))
    for array in [*called.values(), *results]:
        array[...] = np.nan
    for array in lengths.values():
        array[...] = 1
    actual = arrays(backward(subject, inputs))
    assert_same(actual, expected[len(results) : len(results) + len(actual)])
    for gradient in actual:  # nor does writing what backward returned change `grads`
        gradient[...] = np.nan
    grads = list(module_of(subject).grads.values())
    assert_same(grads, expected[-len(grads) :])


def test_state_dict_holds_copies() -> None:
    layer = make("gru")
    before = layer.parameters.flat.copy()
    for array in layer.state_dict().values():
        array[...] = 7.0
    assert_same(layer.parameters.flat, before)


def test_from_weights_copies(implementation: str) -> None:
    weights = [normal(k, *shape) for k, shape in enumerate([(15, 3), (15, 5), (15,), (15,)])]
    cell = xprnn.GRUCell.from_weights(*weights)
    x, h = normal(5, 2, 3), normal(6, 2, 5)
    expected = cell(x, h)
    for weight in weights:
        weight[...] = 0.0
    assert_same(cell(x, h), expected)
