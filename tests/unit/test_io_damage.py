"""Foreign and damaged files are check_refused by name; nothing in a file is ever executed."""

from __future__ import annotations

import json
import pickle
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import xprnn
from tests.support.targets import make, normal
from tests.unit.test_io import read


def rewrite(path: Path, metadata: dict[str, Any], **options: Any) -> None:
    """Change the metadata of a file, or options within them; None removes."""
    from safetensors.numpy import save_file

    old, arrays = read(path)
    changed = {**json.loads(old["options"]), **options}
    changed = {n: v for n, v in changed.items() if v is not None}
    merged = {**old, "options": json.dumps(changed), **metadata}
    save_file(arrays, path, {n: v for n, v in merged.items() if v is not None})


def check_refused(path: Path, match: str | None = None) -> None:
    with pytest.raises(ValueError, match=match) as caught:
        xprnn.load(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("metadata", "match"),
    [
        ({"format": "pt"}, "not one that xprnn wrote"),
        ({"format": None}, "not one that xprnn wrote"),
        ({"version": "2"}, "file version '2'; this xprnn reads version '1'"),
        ({"version": None}, "file version None"),
        ({"kind": "Transformer"}, "holds a 'Transformer'"),
        ({"kind": "_Layer"}, "holds a '_Layer'"),
        ({"kind": "LSTM"}, None),
        ({"kind": None}, "holds a ''"),
        ({"options": None}, "options in its header are damaged"),
        ({"options": "{"}, "options in its header are damaged"),
        ({"options": "[" * 100_000}, "options in its header are damaged"),
        ({"options": "[]"}, "options in its header are not a mapping"),
        ({"options": "NaN"}, "options in its header are not a mapping"),
        ({"options": "{}"}, "does not make a GRU"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_invalid_metadata_are_refused(metadata: Any, match: str | None, tmp_path: Path) -> None:
    path = tmp_path / "a"
    make("gru").save(path)
    rewrite(path, metadata)
    check_refused(path, match)


EXTRA = {"calls": 0, "frozen": []}


@pytest.mark.parametrize(
    "options",
    [
        {"hidden_size": 6},
        {"hidden_size": 0},
        {"hidden_size": None},
        {"hidden_size": "5"},
        {"hidden_size": 5.0},
        {"num_layers": 2},
        {"bias": False},
        {"bias": 1},
        {"bidirectional": True},
        {"dropout": 2.0},
        {"dropout": "much"},
        {"reset_after": [1]},
        {"seed": -1},
        {"dtype": "float16"},
        {"dtype": 5},
        {"backend": "numpy"},
        {"shell": "rm"},
        {"self": 1},
        {"extra": None},
        {"extra": {}},
        {"extra": "x"},
        {"extra": []},
        {"extra": {**EXTRA, "frozen": ["weight"]}},
        {"extra": {**EXTRA, "frozen": [["bias"]]}},
        {"extra": {**EXTRA, "frozen": "weight_ih_l0"}},
        {"extra": {**EXTRA, "frozen": 1}},
        {"extra": {**EXTRA, "calls": "many"}},
        {"extra": {**EXTRA, "calls": -1}},
        {"extra": {**EXTRA, "calls": 1.5}},
        {"extra": {**EXTRA, "calls": None}},
    ],
    ids=str,
)
def test_invalid_options_are_refused(options: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "a"
    make("gru").save(path)
    rewrite(path, {}, **options)
    check_refused(path)


@pytest.mark.parametrize("size", ["input_size", "hidden_size", "num_layers"])
def test_a_size_in_the_header_allocates_nothing(size: str, tmp_path: Path) -> None:
    """A file of 3 kB must not cause an allocation of the size that it claims to have."""
    path = tmp_path / "a"
    make("gru").save(path)
    rewrite(path, {}, **{size: 10**5 if size == "num_layers" else 10**15})
    check_refused(path)
    tracemalloc.start()
    try:
        check_refused(path)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("change", ["missing", "unexpected", "misshapen", "int32", "bfloat16"])
def test_wrong_arrays_are_refused(change: str, tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    path = tmp_path / "a"
    make("gru").save(path)
    metadata, arrays = read(path)
    if change == "missing":
        del arrays["bias_ih_l0"]
    if change == "unexpected":
        arrays["bias"] = normal(0, 3)
    if change == "misshapen":
        arrays["weight_hh_l0"] = np.ascontiguousarray(arrays["weight_hh_l0"].T)
    if change == "int32":
        arrays["weight_hh_l0"] = np.ones((15, 5), np.int32)
    if change == "bfloat16":
        torch = pytest.importorskip("torch")
        from safetensors.torch import save_file as save_tensors

        save_tensors({n: torch.tensor(a).bfloat16() for n, a in arrays.items()}, path, metadata)
    else:
        save_file(arrays, path, metadata)
    check_refused(path)


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 100, 500, -1, -100])
def test_truncated_files_are_refused(size: int, tmp_path: Path) -> None:
    path = tmp_path / "a"
    make("gru").save(path)
    path.write_bytes(path.read_bytes()[:size])
    check_refused(path, "not a readable safetensors file")


class Trap:
    """A pickle that leaves a mark when it is loaded."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


def test_files_of_other_formats_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a"
    mark = tmp_path / "mark"
    for content in (
        b"hello",
        bytes(1000),
        b"\xff" * 1000,
        struct.pack("<Q", 2**60) + b"{}",
        struct.pack("<Q", 2) + b"{}",
        struct.pack("<Q", 4) + b"null",
        pickle.dumps(Trap(mark)),
    ):
        path.write_bytes(content)
        check_refused(path)
    assert not mark.exists()
    for missing in (tmp_path / "none", tmp_path):
        with pytest.raises(FileNotFoundError) as caught:
            xprnn.load(missing)
        assert str(missing) in str(caught.value)


@settings(
    deadline=None,
    derandomize=True,
    max_examples=400,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_any_damaged_byte_is_refused_or_harmless(data: st.DataObject, tmp_path: Path) -> None:
    """Whatever byte is damaged, load raises a ValueError with the path, or loads a layer."""
    path = tmp_path / "a"
    make("gru", 1, 2).save(path)
    saved = path.read_bytes()
    (size,) = struct.unpack("<Q", saved[:8])
    # safetensors writes its header in another order every time
    header = json.dumps(json.loads(saved[8 : 8 + size]), sort_keys=True).encode()
    content = bytearray(struct.pack("<Q", len(header)) + header + saved[8 + size :])
    path.write_bytes(content)
    assert type(xprnn.load(path)) is xprnn.GRU
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, 7 + len(header)))] = data.draw(st.integers(32, 126))
    path.write_bytes(content)
    try:
        loaded = xprnn.load(path)
    except ValueError as error:
        assert str(path) in str(error)
    else:
        assert type(loaded) is xprnn.GRU
