"""Modules in other forms: state dicts, `to`, pickles, copies, and text."""

from __future__ import annotations

import copy
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import xprnn
from tests.support.targets import (
    LAYERS,
    MODULES,
    arguments,
    assert_same,
    backward,
    copies,
    forward,
    is_cell,
    make,
    normal,
    run,
    state_of,
)

# -- state dicts


def test_a_state_that_does_not_fit_is_refused_completely() -> None:
    """Everything that is wrong is listed at once, and nothing is written."""
    layer = make("gru")
    before = state_of(layer)
    state = {n: a + 1.0 for n, a in layer.state_dict().items()}
    del state["weight_ih_l0"], state["bias_hh_l0"]
    state["weight_hh_l0"] = normal(0, 5, 15)
    state |= {"weight_ih_l1": normal(1, 2), "scale": normal(2, 3)}
    with pytest.raises(ValueError) as caught:
        layer.load_state_dict(state)
    message = str(caught.value)
    for part in (
        "missing weight_ih_l0 (15, 3)",
        "missing bias_hh_l0 (15,)",
        "weight_hh_l0: expected shape (15, 5), got (5, 15)",
        "unexpected weight_ih_l1 (2,)",
        "unexpected scale (3,)",
    ):
        assert part in message
    assert_same(state_of(layer), before)


@pytest.mark.parametrize("dtype", ["int64", "bool", "complex128", "object", "str"])
def test_a_state_of_another_kind_of_number_is_refused(dtype: str) -> None:
    layer = make("gru")
    before = state_of(layer)
    state = layer.state_dict()
    state["bias_ih_l0"] = state["bias_ih_l0"].astype(dtype)
    with pytest.raises(ValueError, match="bias_ih_l0: expected a real floating dtype"):
        layer.load_state_dict(state)
    assert_same(state_of(layer), before)


FORMS: dict[str, Callable[[np.ndarray], Any]] = {
    "float16": lambda a: a.astype(np.float16),
    "float64": lambda a: a.astype(np.float64),
    "big-endian": lambda a: a.astype(">f4"),
    "Fortran": np.asfortranarray,
    "reversed": lambda a: a[::-1].copy()[::-1],
    "list": lambda a: a.tolist(),
}


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("form", FORMS)
def test_a_state_in_other_forms(form: str, dtype: str) -> None:
    layer, seed = make("lstm", dtype=dtype), make("lstm", seed=5)
    values = {n: a.astype(np.float16) for n, a in seed.state_dict().items()}  # exact in all
    layer.load_state_dict({n: FORMS[form](a.astype("float32")) for n, a in values.items()})
    assert_same(list(layer.state_dict().values()), [a.astype(dtype) for a in values.values()])


def test_float64_is_rounded_to_float32() -> None:
    layer, double = make("gru", dtype="float32"), make("gru", seed=3)
    layer.load_state_dict(double.state_dict())
    assert_same(layer.parameters.flat[:5], double.parameters.flat[:5].astype(np.float32))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_a_state_of_torch_tensors(dtype: str) -> None:
    torch = pytest.importorskip("torch")
    theirs = torch.nn.GRU(3, 5, 2, bidirectional=True).to(getattr(torch, dtype))
    layer = make("gru", num_layers=2, bidirectional=True)
    layer.load_state_dict(theirs.state_dict())
    wanted = [p.detach().double().numpy() for p in theirs.parameters()]
    assert_same(list(layer.state_dict().values()), wanted)
    layer.load_state_dict(dict(theirs.named_parameters()))  # tensors that require gradients
    assert_same(list(layer.state_dict().values()), wanted)
    back = torch.nn.GRU(3, 5, 2, bidirectional=True).double()
    back.load_state_dict({n: torch.from_numpy(a) for n, a in layer.state_dict().items()})
    assert_same([p.detach().numpy() for p in back.parameters()], wanted)


@pytest.mark.parametrize(
    "name", ["bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e3m4", "float8_e8m0fnu"]
)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_state_in_the_floats_of_ml_dtypes(name: str, dtype: str) -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    layer = make("gru", dtype=dtype)
    state = {
        n: np.abs(normal(k, *a.shape)).astype(getattr(ml_dtypes, name))
        for k, (n, a) in enumerate(layer.state_dict().items())
    }
    layer.load_state_dict(state)
    actual = [*layer.parameters.values()]
    assert_same(actual, [a.astype(dtype) for a in state.values()])
    assert all(np.isfinite(array).all() and array.any() for array in actual)


@pytest.mark.parametrize("name", ["int4", "uint4"])
def test_integers_of_ml_dtypes_are_refused(name: str) -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    layer = make("gru")
    state = layer.state_dict()
    state["bias_ih_l0"] = np.ones(15, getattr(ml_dtypes, name))
    with pytest.raises(ValueError, match=f"bias_ih_l0: expected a real floating dtype, got {name}"):
        layer.load_state_dict(state)


@pytest.mark.parametrize("name", [*MODULES, "linear"])
def test_a_common_prefix_is_named_with_the_line_that_strips_it(name: str) -> None:
    module = xprnn.Linear(3, 5, seed=0) if name == "linear" else make(name)
    fresh = xprnn.Linear(3, 5, seed=1) if name == "linear" else make(name, seed=1)
    mapping = {f"model.rnn.{n}": array for n, array in fresh.state_dict().items()}
    mapping["model.other.scale"] = np.ones(3)
    with pytest.raises(ValueError, match=r"its names begin with 'model\.rnn\.'; strip") as caught:
        module.load_state_dict(mapping)
    line = str(caught.value).partition("strip that: ")[2]
    module.load_state_dict(eval(line, {"mapping": mapping}))
    assert_same(module.parameters.flat, fresh.parameters.flat)


def test_several_prefixes_are_named() -> None:
    mapping = {f"{p}.{n}": a for p in "abcd" for n, a in make("gru").state_dict().items()}
    with pytest.raises(ValueError, match=r"its names begin with 'a\.', 'b\.', 'c\.'; strip"):
        make("gru").load_state_dict(mapping)


def test_a_long_list_of_errors_is_cut() -> None:
    layer = make("gru", num_layers=9)
    with pytest.raises(ValueError) as caught:
        layer.load_state_dict({"x" * 10**6: np.ones(2)})
    message = str(caught.value)
    assert "missing weight_ih_l0 (15, 3); missing weight_hh_l0 (15, 5); " in message
    assert message.endswith("; and 29 more") and len(message) < 1000
    with pytest.raises(ValueError, match=r"; and 28 more$"):
        make("gru", num_layers=9, dtype="float32").load_state_dict(
            {n: a.astype("f8") * 0 + 1e300 for n, a in layer.state_dict().items()}
        )


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_a_file_of_torch_is_recognised_and_not_unpickled(legacy: bool, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    path = tmp_path / "model.pt"
    theirs = torch.nn.GRU(3, 5).state_dict()
    torch.save(theirs, path, _use_new_zipfile_serialization=not legacy)
    message = r"model\.pt: a file of torch\.save, a pickle, of which nothing is loaded"
    with pytest.raises(ValueError, match=message):
        xprnn.load(path)
    for path_like in (path, str(path)):
        with pytest.raises(TypeError, match=f"mapping: expected names and arrays, got .*{message}"):
            make("gru").load_state_dict(path_like)


def test_files_that_are_recognised_without_torch(tmp_path: Path) -> None:
    path = tmp_path / "model.pth"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model/data.pkl", pickle.dumps([]))
    with pytest.raises(ValueError, match=r"torch\.save"):
        xprnn.load(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model/other", b"")
    for content in (path.read_bytes(), path.read_bytes()[:9], b"PK\x03\x04", b""):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="not a readable safetensors file"):
            xprnn.load(path)


def test_a_path_is_not_a_state(tmp_path: Path) -> None:
    for path in (tmp_path / "absent", str(tmp_path)):
        with pytest.raises(TypeError, match=r"the path .*; safetensors\.numpy\.load_file"):
            make("gru").load_state_dict(path)


# -- to


@pytest.mark.parametrize("name", MODULES)
def test_to_another_dtype_moves_parameters_and_gradients(name: str, implementation: str) -> None:
    module = make(name)
    module.freeze(next(iter(module.parameters)))
    inputs = arguments(module)
    forward(module, inputs)
    backward(module, inputs)
    grads, parameters = (
        copies(list(module.grads.values())),
        copies(list(module.state_dict().values())),
    )
    assert module.to(dtype="float32") is module
    assert module.dtype == np.float32
    assert_same(list(module.parameters.values()), [a.astype("f4") for a in parameters])
    assert_same(list(module.grads.values()), [a.astype("f4") for a in grads])
    assert module.training
    assert len(module.frozen) == 1

    single = make(name, dtype="float32")
    single.freeze(*module.frozen)
    rounded = {n: a.astype(np.float32) for n, a in inputs.items()}
    assert_same(run(module, rounded), run(single, rounded))
    with pytest.raises(TypeError, match="x: expected dtype float32, got float64"):
        forward(module, inputs)
    module.to(dtype="float64")
    assert_same(list(module.parameters.values()), [a.astype("f4").astype("f8") for a in parameters])


@pytest.mark.parametrize("name", MODULES)
def test_to_another_backend_and_back(name: str, fake_cupy: Any) -> None:
    module = make(name)
    inputs = arguments(module)
    expected = run(module, inputs)
    forward(module, inputs)
    backward(module, inputs)
    grads = copies(list(module.grads.values()))
    module.to("fake_cupy")
    assert module.backend is fake_cupy
    assert all(fake_cupy.owns(a) for a in (*module.parameters.values(), *module.grads.values()))
    moved = {n: fake_cupy.from_host(a) for n, a in inputs.items()}
    with pytest.raises(TypeError, match=r"x: expected a float64 array .* on backend 'fake_cupy'"):
        forward(module, inputs)
    outputs = forward(module, moved)
    backward(module, moved)
    module.to("numpy")
    doubled = [grad + grad for grad in grads]
    assert_same(list(module.grads.values()), doubled)
    assert_same(run(module, inputs), expected)
    first = outputs if is_cell(name) else outputs[0]
    first = first[0] if isinstance(first, tuple) else first
    assert_same(xprnn.to_numpy(first), expected[0])


def test_to_is_refused_with_calls_that_wait_for_backward() -> None:
    layer = make("gru")
    inputs = arguments(layer)
    expected = run(layer, inputs)
    forward(layer, inputs)
    forward(layer, inputs)
    before = state_of(layer)
    with pytest.raises(RuntimeError, match="2 recorded calls wait for backward"):
        layer.to(dtype="float32")
    assert_same(state_of(layer), before)
    backward(layer, inputs)
    layer.zero_grad()
    actual = copies(backward(layer, inputs)) + list(layer.grads.values())
    assert_same(actual, expected[-len(actual) :])


@pytest.mark.parametrize("wrong", [{"backend": "tpu"}, {"backend": "numpy:1"}, {"dtype": "int"}])
def test_an_invalid_to_changes_nothing(wrong: dict[str, str]) -> None:
    layer = make("gru")
    inputs = arguments(layer)
    expected = run(layer, inputs)
    with pytest.raises(ValueError, match=r"expected|no devices"):
        layer.to(**wrong)
    assert_same(run(layer, inputs), expected)


# -- copies

COPIES: dict[str, Callable[[Any], Any]] = {
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
    "old pickle": lambda module: pickle.loads(pickle.dumps(module, protocol=2)),
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
}
DEEP = {"num_layers": 2, "bidirectional": True, "dropout": 0.5, "batch_first": True}


@pytest.mark.parametrize("way", COPIES)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", MODULES)
def test_a_copy_is_equal_and_independent(
    name: str, training: bool, way: str, implementation: str
) -> None:
    module = make(name, bias=False, **(DEEP if name in LAYERS else {}))
    inputs = arguments(module)
    with module.writable() as flat:
        flat *= 1.5  # not what the seed draws
    forward(module, inputs)
    backward(module, inputs)
    module.freeze(next(iter(module.parameters)))
    if training:
        forward(module, inputs)  # recorded calls stay with the original
    else:
        module.eval()
    before = state_of(module)

    twin = COPIES[way](module)
    assert type(twin) is type(module)
    assert repr(twin) == repr(module)
    assert twin.options is not module.options
    assert twin.frozen == module.frozen
    assert twin.training is training
    assert twin.dtype == module.dtype
    assert twin.backend is module.backend
    assert_same(list(twin.parameters.values()), list(module.parameters.values()))
    assert_same(list(twin.grads.values()), list(module.grads.values()))
    assert np.abs(twin.grads.flat).max() > 0.0
    for one in (twin.parameters.flat, twin.grads.flat):
        for other in (module.parameters.flat, module.grads.flat):
            assert not np.shares_memory(one, other)

    if training:
        with pytest.raises(RuntimeError, match="there is no recorded call"):
            backward(twin, inputs)
    result = copies(forward(twin, inputs))
    assert_same(forward(module, inputs), result, "the dropout masks continue from the same call")
    if training:
        backward(module, inputs)
        module.grads.flat[...] = before[1]
    with twin.writable() as flat:
        flat[...] = 0.0
    twin.grads.flat[...] = 0.0
    assert_same([module.parameters.flat, module.grads.flat], before[:2])


@pytest.mark.parametrize("name", MODULES)
def test_the_repr_of_a_module_builds_it(name: str) -> None:
    module = make(name, **(DEEP if name in LAYERS else {}))
    text = repr(module)
    kind = type(module).__name__
    assert text.startswith(f"{kind}(input_size=3, hidden_size=5, ")
    built = eval(text, {kind: getattr(xprnn, kind)})
    assert repr(built) == text
    assert_same(built.parameters.flat, module.parameters.flat)
