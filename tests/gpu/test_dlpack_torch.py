"""DLPack on a GPU: CUDA tensors of torch are used without a copy, and torch accepts the results."""

from __future__ import annotations

from typing import Any

import pytest

import xprnn
from tests.support.on_device import run
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
)
from xprnn.backend import Backend

pytestmark = pytest.mark.gpu

SUBJECTS = (*LAYERS, *CELLS, *FUNCTIONS)


def on_host(backend: Backend, results: Any) -> list[Any]:
    return [backend.to_host(array) for array in arrays(results)]


@pytest.fixture
def torch() -> Any:
    """The module torch, if it has CUDA and CuPy is usable."""
    module = pytest.importorskip("torch")
    if not module.cuda.is_available():
        pytest.skip("this torch has no CUDA device")
    try:
        xprnn.get_backend("cupy")
    except xprnn.BackendUnavailableError as error:
        pytest.skip(str(error))
    return module


@pytest.mark.parametrize("name", SUBJECTS)
def test_torch_tensors_give_the_same_bits(name: str, torch: Any) -> None:
    subject = make(name, backend="cupy", dtype="float32")
    inputs = arguments(subject)
    backend = module_of(subject).backend
    expected = run(subject, moved(backend, inputs))
    tensors = {name: torch.tensor(array, device="cuda:0") for name, array in inputs.items()}
    results = run(subject, tensors)
    assert_same(on_host(backend, results), on_host(backend, expected))
    for array in results:
        tensor = torch.from_dlpack(array)
        assert tensor.data_ptr() == array.data.ptr or not array.size
        assert_same(tensor.cpu().numpy(), backend.to_host(array))


def test_torch_tensors_are_not_copied(torch: Any) -> None:
    backend = xprnn.get_backend("cupy")
    tensor = torch.ones((3, 4), device="cuda:0", requires_grad=True)
    same = xprnn.asarray(tensor, backend="cupy")
    assert same.data.ptr == tensor.data_ptr() and backend.owns(same)
    with pytest.raises(TypeError, match=r"x: .*got Tensor.*pass it with \.detach\(\)"):
        xprnn.Linear(4, 2, backend="cupy")(tensor)
    xprnn.Linear(4, 2, backend="cupy")(tensor.detach())
    for other, text in (
        (torch.ones((3, 4)), "got Tensor on the CPU"),
        (tensor.detach().half(), "expected dtype float32, got float16"),
        (tensor.detach().double(), "expected dtype float32, got float64"),
        (torch.ones((3, 4), device="meta"), "got Tensor; convert"),
    ):
        with pytest.raises(TypeError, match=f"x: .*{text}"):
            xprnn.Linear(4, 2, backend="cupy")(other)


def test_torch_and_cupy_wait_for_each_other_on_the_device(torch: Any) -> None:
    """On separate streams, without synchronisation, exchanged arrays are complete."""
    layer = xprnn.Linear(512, 512, bias=False, backend="cupy", seed=0)
    weight = torch.from_dlpack(layer.parameters["weight"]).double().cpu()
    cupy = layer.backend.xp
    theirs, ours = torch.cuda.Stream(), cupy.cuda.Stream(non_blocking=True)
    torch.cuda.synchronize()
    for k in range(20):
        with torch.cuda.stream(theirs), ours:
            x = torch.full((2048, 512), float(k), device="cuda:0")
            for _ in range(50):  # keep the stream busy before x has its final value
                x = x @ torch.eye(512, device="cuda:0")
            y = torch.from_dlpack(layer(x + 1)) - 1
        expected = (k + 1) * weight.sum(1) - 1
        torch.testing.assert_close(y[-1].double().cpu(), expected, rtol=0, atol=1e-4 * (k + 1))
