"""Files: xprnn and other libraries load what was saved, and a failed write leaves the old file."""

from __future__ import annotations

import copy
import json
import os
import stat
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open

import xprnn
from tests.support.targets import (
    LAYERS,
    MODULES,
    arguments,
    assert_same,
    forward,
    is_cell,
    make,
    normal,
)
from xprnn.nn import serialization as io
from xprnn.nn.parameters import Parameters


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
def test_saved_modules_are_loaded(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "module.safetensors"
    module = make(name, **options)
    with module.writable() as flat:
        flat *= 1.5  # not what the seed draws
    module.freeze("weight_ih" if is_cell(name) else "weight_ih_l0")
    inputs = arguments(module)
    forward(module, inputs)
    module.save(path)

    loaded = xprnn.load(path)
    assert type(loaded) is type(module)
    assert loaded.options == module.options
    assert loaded.dtype == module.dtype
    assert loaded.frozen == module.frozen
    assert loaded.training is False
    assert_same(list(loaded.parameters.values()), list(module.parameters.values()))
    np.testing.assert_array_equal(loaded.grads.flat, 0.0)
    assert_same(forward(loaded.train(), inputs), forward(module, inputs), "the same dropout mask")
    assert_same(forward(loaded.eval(), inputs), forward(module.eval(), inputs))


@pytest.mark.parametrize("name", MODULES)
def test_loading_and_copying_draw_no_initial_values(
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


def test_the_contents_of_a_file(tmp_path: Path) -> None:
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
def test_torch_loads_saved_modules(kind: str, tmp_path: Path) -> None:
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
    class CustomPath(os.PathLike[str]):
        def __fspath__(self) -> str:
            return str(tmp_path / "a b.safetensors")

    path = CustomPath() if form is os.fsencode else form(tmp_path / "a b.safetensors")
    layer = make("gru")
    layer.save(path)
    assert_same(xprnn.load(path).parameters.flat, layer.parameters.flat)


def test_load_as_a_class_and_on_a_backend(
    tmp_path: Path, fake_cupy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a"
    layer = make("gru")
    layer.save(path)
    assert type(xprnn.GRU.load(path)) is xprnn.GRU
    with pytest.raises(ValueError, match=r"a: holds a 'GRU', expected a LSTM"):
        xprnn.LSTM.load(path)
    assert xprnn.load(path).backend.name == "numpy"
    assert xprnn.load(path, backend="fake_cupy").backend is fake_cupy
    monkeypatch.setenv("XPRNN_BACKEND", "fake_cupy")
    assert xprnn.load(path).backend is fake_cupy
    assert xprnn.load(path, backend="numpy").backend.name == "numpy"
    with pytest.raises(ValueError, match="backend: expected"):
        xprnn.load(path, backend="tpu")
    loaded = xprnn.load(path)
    assert_same(xprnn.to_numpy(loaded.parameters.flat), layer.parameters.flat)
    loaded.save(path)
    assert_same(xprnn.load(path, backend="numpy").parameters.flat, layer.parameters.flat)


# -- atomic writes


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


def test_saving_to_unusable_paths(tmp_path: Path) -> None:
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


@pytest.mark.parametrize("character", ["a", "ä", "語"])  # 1, 2 and 3 bytes
def test_a_file_may_have_the_longest_possible_name(character: str, tmp_path: Path) -> None:
    size = len(os.fsencode(character))
    for length in range(238, 256):
        name = character * (length // size) + "b" * (length % size)
        with io.replacing(tmp_path / name) as part:
            part.write_bytes(b"new")
        assert (tmp_path / name).read_bytes() == b"new"
        (tmp_path / name).unlink()
    with pytest.raises(OSError, match="name too long"), io.replacing(tmp_path / ("a" * 256)):
        raise AssertionError("the block was entered")
    assert os.listdir(tmp_path) == []  # noqa: PTH208


@pytest.mark.skipif(sys.platform == "win32", reason="files have no such modes on Windows")
@pytest.mark.parametrize("mode", [0o600, 0o640, 0o644, 0o664, 0o755, 0o200])
def test_a_file_that_is_replaced_keeps_its_mode(mode: int, tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"old")
    path.chmod(mode)
    with io.replacing(path) as part:
        assert stat.S_IMODE(part.stat().st_mode) == 0o600  # nothing of it can be read meanwhile
        part.write_bytes(b"new")
    assert stat.S_IMODE(path.stat().st_mode) == mode
    if mode & 0o400:
        assert path.read_bytes() == b"new"
    make("gru").save(path)
    assert stat.S_IMODE(path.stat().st_mode) == mode


@pytest.mark.skipif(sys.platform == "win32", reason="there is no umask on Windows")
@pytest.mark.parametrize("umask", [0o022, 0o077, 0o027])
def test_a_new_file_follows_the_umask_without_changing_it(
    umask: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = os.umask(umask)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(os, "umask", lambda mask: pytest.fail("it affects other threads"))
            make("gru").save(tmp_path / "a")
    finally:
        assert os.umask(before) == umask
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o666 & ~umask


@pytest.mark.skipif(getattr(os, "geteuid", lambda: 1)() != 0, reason="only root may change owners")
def test_a_file_that_is_replaced_keeps_its_owner(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"old")
    os.chown(path, 1234, 2345)
    path.chmod(0o4750)
    with io.replacing(path) as part:
        part.write_bytes(b"new")
    status = path.stat()
    assert (status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode)) == (1234, 2345, 0o4750)


@pytest.mark.skipif(sys.platform == "win32", reason="files have no owners on Windows")
def test_a_file_is_replaced_if_its_owner_cannot_be_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"old")
    path.chmod(0o4750)
    status = list(path.stat())
    status[4] += 1  # st_uid
    calls: list[tuple[int, int]] = []

    def refused(part: Path, uid: int, gid: int) -> None:
        calls.append((uid, gid))
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "chown", refused)
    part = tmp_path / "part"
    part.write_bytes(b"new")
    io._copy_attributes(part, os.stat_result(status))
    assert calls == [(status[4], status[5]), (-1, status[5])]
    assert stat.S_IMODE(part.stat().st_mode) == 0o750


def test_a_read_only_file_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"old")
    path.chmod(0o444)
    with pytest.raises(PermissionError, match="a: exists and is read-only"):
        make("gru").save(path)
    assert (path.read_bytes(), os.listdir(tmp_path)) == (b"old", ["a"])  # noqa: PTH208


@pytest.mark.skipif(not Path("/sys/kernel").is_dir(), reason="no unwritable folder here")
def test_an_unwritable_folder_is_named() -> None:
    with pytest.raises(OSError, match=r"/sys/kernel/a: cannot be written in its folder"):
        make("gru").save("/sys/kernel/a")


def test_a_link_stays_and_its_target_is_written(tmp_path: Path) -> None:
    (tmp_path / "target").mkdir()
    (tmp_path / "old").write_bytes(b"old")
    for name, target in (("a", "old"), ("b", "target/new"), ("c", "a")):
        (tmp_path / name).symlink_to(target)
        with io.replacing(tmp_path / name) as part:
            assert part.parent == (tmp_path / target).resolve().parent
            part.write_bytes(name.encode())
        assert (tmp_path / name).is_symlink()
        assert (tmp_path / target).read_bytes() == name.encode()
    (tmp_path / "d").symlink_to("gone/new")
    with (
        pytest.raises(FileNotFoundError, match=r"no such folder: .*gone"),
        io.replacing(tmp_path / "d"),
    ):
        raise AssertionError("the block was entered")
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(OSError, match="symbolic links"), io.replacing(tmp_path / "loop"):
        raise AssertionError("the block was entered")
    assert sorted(os.listdir(tmp_path)) == ["a", "b", "c", "d", "loop", "old", "target"]  # noqa: PTH208


# -- which files may be written


def test_an_output_differs_from_inputs_and_other_outputs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "target").write_bytes(b"x")
    (tmp_path / "link").symlink_to("target")
    (tmp_path / "hard").hardlink_to("target")
    (tmp_path / "dangling").symlink_to("new")
    (tmp_path / "same").symlink_to(".")
    of_target = ["target", "./target", "folder/../target", tmp_path / "target", "link", "hard"]
    of_new = ["new", "folder/../new", tmp_path / "new", "dangling", "same/new"]
    for names in (of_target, of_new):
        for a in names:
            for b in names:
                with pytest.raises(ValueError, match="expected another file to write to than"):
                    io.check_outputs([a, "else", b])
                if names is of_target:
                    with pytest.raises(ValueError, match=f"{a}: expected .* {b}: it is read"):
                        io.check_outputs(["else", a], ["other", b])
    io.check_outputs(["target", "new"], ["folder/target", "else", "target2"])
