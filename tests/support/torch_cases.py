"""The configurations of `cases.py` run through torch's layers, in float64."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import wraps
from typing import Any

import numpy as np
import pytest

from tests.support.cases import LAYERS, Case, Problem, Results, by_name, parameters_of
from xprnn.backend import Backend


def torch_device(backend: Backend) -> str:
    """The device on which torch computes the reference for a backend.

    CUDA for CuPy, with TF32 off; the test is skipped if torch has no CUDA.
    """
    if backend.kind != "cupy":
        return "cpu"
    import torch

    if not torch.cuda.is_available():
        pytest.skip(f"torch {torch.__version__} has no CUDA device to compare with")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # newer versions of torch deprecate these names
        for kind in (torch.backends.cuda.matmul, torch.backends.cudnn):
            kind.allow_tf32 = False
            assert not kind.allow_tf32
    return "cuda"


def on_one_thread(function: Callable[..., Any]) -> Callable[..., Any]:
    """Run torch on one thread: for such small cases several take a hundred times as long."""

    @wraps(function)
    def call(*args: Any) -> Any:
        import torch

        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return function(*args)
        finally:
            torch.set_num_threads(threads)

    return call


@on_one_thread
def torch_run(case: Case, layer: Any, problem: Problem) -> Results:
    """As `run`, with torch's layer in float64, from the same values."""
    import torch

    device = torch_device(layer.backend)
    kinds = {"rnn": torch.nn.RNN, "gru": torch.nn.GRU, "lstm": torch.nn.LSTM}
    _, options = LAYERS[case.cell]
    other = kinds[case.cell.partition("_")[0]](
        case.I,
        case.H,
        case.layers,
        bias=case.bias,
        batch_first=case.batch_first,
        bidirectional=case.directions == 2,
        **options,
    ).double()
    other.load_state_dict({name: torch.tensor(p) for name, p in parameters_of(layer).items()})
    other.to(device)

    def leaf(array: np.ndarray) -> Any:
        return torch.tensor(array.astype(np.float64), device=device, requires_grad=True)

    x = leaf(problem.x)
    initial = [leaf(state if case.states else np.zeros_like(state)) for state in problem.initial]
    given = x
    if problem.lengths is not None:
        given = torch.nn.utils.rnn.pack_padded_sequence(
            x, torch.tensor(problem.lengths), case.batch_first, enforce_sorted=False
        )
    output, final = other(given, tuple(initial) if len(initial) > 1 else initial[0])
    if problem.lengths is not None:
        output, _ = torch.nn.utils.rnn.pad_packed_sequence(
            output, case.batch_first, total_length=case.T
        )
    ends = final if isinstance(final, tuple) else (final,)
    given = [d.astype(np.float64) for d in (problem.doutput, *problem.dfinal)]
    upstream = [torch.tensor(d, device=device) for d in given]
    torch.autograd.backward([output, *ends], upstream)
    results = {"output": output, "dx": x.grad}
    results |= by_name(case, tuple(ends), tuple(state.grad for state in initial))
    results |= {f"d{name}": parameter.grad for name, parameter in other.named_parameters()}
    return {name: tensor.detach().cpu().numpy() for name, tensor in results.items()}
