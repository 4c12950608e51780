"""Files: what is saved is what is loaded, by us and by others, and damage is refused by name."""

from __future__ import annotations

import copy
import json
import os
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from subjects import LAYERS, MODULES, arguments, assert_same, forward, is_cell, make, normal

import xprnn
from xprnn import io
from xprnn.parameters import Parameters


def read(path: Path) -> tuple[dict[str, str], dict[str, np.ndarray]]:
    """Metadata and arrays as safetensors itself reads them."""
    with safe_open(path, framework="np") as file:
        return file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


OPTIONS: list[dict[str, Any]] = [
    {},
    {"bias": False, "dtype": "float32"},
    {"num_layers": 3, "bidirectional": True, "batch_first": True, "dropout": 0.5},
]


def cases() -> list[tuple[str, dict[str, Any]]]:
    return [
        (name, options)
        for name in MODULES
        for options in OPTIONS
        if not (is_cell(name) and "num_layers" in options)
    ]


@pytest.mark.parametrize(("name", "options"), cases(), ids=str)
def test_what_is_saved_is_loaded(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "module.safetensors"
    module = make(name, **options)
    with module.writable() as flat:
        flat *= 1.5  # not what the seed draws
    module.freeze("weight_ih" if is_cell(name) else "weight_ih_l0")
    given = arguments(module)
    forward(module, given)
    module.save(path)

    loaded = xprnn.load(path)
    assert type(loaded) is type(module)
    assert loaded.options == module.options
    assert loaded.dtype == module.dtype
    assert loaded.frozen == module.frozen
    assert loaded.training is False
    assert_same(list(loaded.parameters.values()), list(module.parameters.values()))
    np.testing.assert_array_equal(loaded.grads.flat, 0.0)
    assert_same(forward(loaded.train(), given), forward(module, given), "the same dropout mask")
    assert_same(forward(loaded.eval(), given), forward(module.eval(), given))


@pytest.mark.parametrize("name", MODULES)
def test_nothing_is_drawn_for_values_that_are_there(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = make(name)
    module.save(tmp_path / "a")
    monkeypatch.delattr(Parameters, "draw")
    with pytest.raises(AttributeError, match="draw"):
        make(name)
    for other in (xprnn.load(tmp_path / "a"), copy.copy(module)):
        assert_same(other.parameters.flat, module.parameters.flat)


@pytest.mark.parametrize("name", MODULES)
def test_options_given_as_numpy_scalars(name: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"bias": np.bool_(True), "seed": np.int64(3)}
    if name in LAYERS:
        options |= {"num_layers": np.int32(2), "dropout": np.float32(0.5)}
        options |= {"batch_first": np.bool_(False), "bidirectional": np.bool_(True)}
    module = make(name, np.int64(3), np.uint8(5), **options)
    module.save(tmp_path / "a")
    loaded = xprnn.load(tmp_path / "a")
    assert repr(loaded) == repr(module)
    assert_same(loaded.parameters.flat, module.parameters.flat)


def test_what_a_file_says(tmp_path: Path) -> None:
    layer = make("gru", num_layers=2, dropout=0.25)
    layer.freeze("bias_hh_l1")
    forward(layer, arguments(layer))
    layer.save(tmp_path / "a")
    metadata, arrays = read(tmp_path / "a")
    assert set(metadata) == {"format", "version", "kind", "options"}
    assert metadata["format"] == "xprnn"
    assert metadata["version"] == "1"
    assert metadata["kind"] == "GRU"
    extra = {"calls": 1, "frozen": ["bias_hh_l1"]}
    assert json.loads(metadata["options"]) == {**layer.options, "dtype": "float64", "extra": extra}
    assert sorted(arrays) == sorted(layer.parameters)
    assert_same([arrays[n] for n in layer.parameters], list(layer.parameters.values()))


@pytest.mark.parametrize("kind", ["RNN", "GRU", "LSTM", "RNNCell", "GRUCell", "LSTMCell"])
def test_torch_loads_what_we_save(kind: str, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file

    ours = getattr(xprnn, kind)(3, 5, dtype="float64", seed=0)
    ours.save(tmp_path / "a")
    theirs = getattr(torch.nn, kind)(3, 5).double()
    theirs.load_state_dict(load_file(tmp_path / "a"))
    assert_same([p.detach().numpy() for p in theirs.parameters()], list(ours.parameters.values()))


@pytest.mark.parametrize("layout", ["C", "Fortran", "reversed", "strided", "big-endian"])
def test_write_stores_values_not_memory(layout: str, tmp_path: Path) -> None:
    array = normal(0, 4, 6)
    arranged = {
        "C": array,
        "Fortran": np.asfortranarray(array),
        "reversed": array[::-1, ::-1],
        "strided": array[::2, 1::3],
        "big-endian": array.astype(">f8"),
    }[layout]
    io.write(tmp_path / "a", "GRU", {"b": 1}, {"w": arranged, "wt": arranged.T})
    kind, options, arrays = io.read(tmp_path / "a")
    assert (kind, options) == ("GRU", {"b": 1})
    plain = np.array(arranged, "float64")
    assert_same([arrays["w"], arrays["wt"]], [plain, plain.T])
    assert_same(list(read(tmp_path / "a")[1].values()), [plain, plain.T])


@pytest.mark.parametrize("form", [str, Path, os.fsencode], ids=["str", "Path", "PathLike"])
def test_paths(form: Any, tmp_path: Path) -> None:
    class Place(os.PathLike[str]):
        def __fspath__(self) -> str:
            return str(tmp_path / "a b.safetensors")

    path = Place() if form is os.fsencode else form(tmp_path / "a b.safetensors")
    layer = make("gru")
    layer.save(path)
    assert_same(xprnn.load(path).parameters.flat, layer.parameters.flat)


def test_load_as_a_class_and_on_a_backend(
    tmp_path: Path, strict: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a"
    layer = make("gru")
    layer.save(path)
    assert type(xprnn.GRU.load(path)) is xprnn.GRU
    with pytest.raises(ValueError, match=r"a: holds a 'GRU', expected a LSTM"):
        xprnn.LSTM.load(path)
    assert xprnn.load(path).backend.name == "numpy"
    assert xprnn.load(path, backend="strict").backend is strict
    monkeypatch.setenv("XPRNN_BACKEND", "strict")
    assert xprnn.load(path).backend is strict
    assert xprnn.load(path, backend="numpy").backend.name == "numpy"
    with pytest.raises(ValueError, match="backend: expected"):
        xprnn.load(path, backend="tpu")
    there = xprnn.load(path)
    assert_same(xprnn.to_numpy(there.parameters.flat), layer.parameters.flat)
    there.save(path)
    assert_same(xprnn.load(path, backend="numpy").parameters.flat, layer.parameters.flat)


# -- writing whole or not at all


def test_a_failed_save_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a"
    make("gru").save(path)
    before = path.read_bytes()
    for wrong in (normal(0, 3).astype(complex), np.array([None])):
        with pytest.raises(ValueError, match=str(path)):
            io.write(path, "GRU", {}, {"w": wrong})
    with pytest.raises(TypeError):
        io.write(path, "GRU", {"b": object()}, {})
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["a"]  # noqa: PTH208


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"old")
    for error in (KeyboardInterrupt, OSError, MemoryError):
        with pytest.raises(error), io.replacing(path) as part:
            part.write_bytes(b"half")
            assert part.parent == tmp_path
            assert path.read_bytes() == b"old"
            raise error
        assert path.read_bytes() == b"old"
        assert os.listdir(tmp_path) == ["a"]  # noqa: PTH208
    with io.replacing(path) as part:
        part.write_bytes(b"new")
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["a"]  # noqa: PTH208


def test_where_nothing_can_be_saved(tmp_path: Path) -> None:
    layer = make("gru")
    with pytest.raises(OSError, match="no folder"):
        layer.save(tmp_path / "no folder" / "a")
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="folder"):
        layer.save(tmp_path / "folder")
    assert os.listdir(tmp_path) == ["folder"]  # noqa: PTH208


def test_a_saved_file_has_the_mode_of_any_new_file(tmp_path: Path) -> None:
    make("gru").save(tmp_path / "a")
    (tmp_path / "b").touch()
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in "ab"]
    assert modes[0] == modes[1]
