"""The cells, step by step forward and in reverse order backward, against torch's cells."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.support.cases import CELLS, TORCH_CELLS, Results, parameters_of, unroll
from tests.support.tolerances import assert_close
from tests.support.torch_cases import on_one_thread, torch_device
from xprnn.backend import Backend

torch = pytest.importorskip("torch")

STEPS, BATCH, I, H = 3, 4, 3, 5  # noqa: E741


@on_one_thread
def torch_unroll(
    cell: Any,
    x: np.ndarray,
    initial: tuple[np.ndarray, ...],
    upstream: tuple[np.ndarray, ...],
    device: str,
) -> Results:
    """As `cases.unroll`, through a torch cell and autograd, in float64."""

    def leaf(array: np.ndarray, requires_grad: bool = True) -> Any:
        float64 = array.astype(np.float64)
        return torch.tensor(float64, device=device, requires_grad=requires_grad)

    xs, starts = leaf(x), tuple(leaf(state) for state in initial)
    hx = starts if len(starts) > 1 else starts[0]
    states = []
    for x_t in xs:
        hx = cell(x_t, hx)
        states.append(hx if isinstance(hx, tuple) else (hx,))
    outputs = [torch.stack(steps) for steps in zip(*states, strict=True)]
    torch.autograd.backward(outputs, [leaf(d, False) for d in upstream])
    results = dict(zip(("h", "c"), outputs, strict=False))
    results |= {f"d{name}0": start.grad for name, start in zip(("h", "c"), starts, strict=False)}
    results |= {f"d{name}": parameter.grad for name, parameter in cell.named_parameters()}
    return {n: tensor.detach().cpu().numpy() for n, tensor in (results | {"dx": xs.grad}).items()}


@pytest.mark.parametrize("batched", [True, False], ids=["batched", "unbatched"])
@pytest.mark.parametrize("with_state", [True, False], ids=["h0", "no h0"])
@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("name", TORCH_CELLS)
def test_cell_equals_torch(
    name: str,
    bias: bool,
    dtype: str,
    with_state: bool,
    batched: bool,
    backend: Backend,
    implementation: str,
) -> None:
    kind, options = CELLS[name]
    cell = kind(I, H, bias, **options, backend=backend.name, dtype=dtype, seed=3).train()
    rng = np.random.default_rng(4)
    rows = (BATCH,) if batched else ()
    count = 2 if name == "lstm" else 1
    x = rng.standard_normal((STEPS, *rows, I)).astype(dtype)
    initial = tuple(rng.standard_normal((*rows, H)).astype(dtype) for _ in range(count))
    upstream = tuple(rng.standard_normal((STEPS, *rows, H)).astype(dtype) for _ in range(count))
    if not with_state:
        initial = tuple(np.zeros_like(state) for state in initial)

    kinds = {"rnn": torch.nn.RNNCell, "gru": torch.nn.GRUCell, "lstm": torch.nn.LSTMCell}
    other = kinds[name.partition("_")[0]](I, H, bias, **options).double()
    other.load_state_dict({n: torch.tensor(p) for n, p in parameters_of(cell).items()})
    device = torch_device(backend)
    expected = torch_unroll(other.to(device), x, initial, upstream, device)
    results = unroll(cell, x, initial if with_state else None, upstream)
    assert results.keys() == expected.keys()
    for what, reference in expected.items():
        assert np.abs(reference).max() > 0
        assert_close(results[what], reference, dtype, what)
