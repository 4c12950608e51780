"""`xprnn run`, and the files that the demo writes: contents, overwritten files, open files."""

from __future__ import annotations

import re
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import xprnn
from xprnn.tools import cli, demo
from xprnn.tools.apply import Applied, Inputs, apply
from xprnn.tools.data.japanese_vowels import FILE

WIDTH, CLASSES = 4, 3


def write_files(folder: Path, **options: Any) -> tuple[Any, Any, np.ndarray]:
    """Write a layer, a read-out, x, lengths and labels to `folder`; returns the first three."""
    kind = options.pop("kind", xprnn.GRU)
    layer = kind(3, WIDTH, seed=0, **options)
    features = WIDTH * (2 if layer.options["bidirectional"] else 1)
    readout = xprnn.Linear(features, CLASSES, dtype=layer.dtype, seed=1)
    layer.save(folder / "m.safetensors")
    readout.save(folder / "r.safetensors")
    shape = (5, 6, 3) if layer.options["batch_first"] else (6, 5, 3)
    x = np.random.default_rng(0).standard_normal(shape).astype(layer.dtype)
    np.save(folder / "x.npy", x)
    np.save(folder / "lengths.npy", np.array([6, 0, 2, 5, 1]))
    np.save(folder / "labels.npy", np.array([0, 2, 1, 1, 0]))
    return layer, readout, x


def inputs(folder: Path, *names: str) -> Inputs:
    files = {"readout": "r.safetensors", "lengths": "lengths.npy", "labels": "labels.npy"}
    chosen = {name: folder / files[name] for name in names}
    return Inputs(folder / "m.safetensors", folder / "x.npy", **chosen)


LAYERS: list[dict[str, Any]] = [
    {},
    {"batch_first": True, "bidirectional": True, "num_layers": 2},
    {"kind": xprnn.LSTM, "bidirectional": True, "dtype": "float64"},
    {"kind": xprnn.RNN, "num_layers": 2, "batch_first": True, "dtype": "float64"},
]


@pytest.mark.parametrize("batch", [1, 2, 64])
@pytest.mark.parametrize("lengths", [True, False])
@pytest.mark.parametrize("options", LAYERS, ids=str)
def test_it_writes_every_steps_output_final_states_and_their_scores(
    options: dict[str, Any], lengths: bool, batch: int, tmp_path: Path
) -> None:
    layer, readout, x = write_files(tmp_path, **options)
    output, final = layer(x, lengths=[6, 0, 2, 5, 1] if lengths else None)
    h_n = final[0] if isinstance(final, tuple) else final
    final_states = np.concatenate(list(h_n[-layer._spec.num_directions :]), axis=1)
    scores = readout(output)
    if lengths:  # no scores after the end of a row
        by_row = scores if layer.options["batch_first"] else scores.swapaxes(0, 1)
        for row, length in enumerate([6, 0, 2, 5, 1]):
            by_row[row, length:] = 0
    names = ["lengths"] if lengths else []
    close = {"rtol": 1e-5, "atol": 1e-6}
    for wanted, more, last in (
        (output, [], False),
        (scores, ["readout"], False),
        (final_states, [], True),
        (readout(final_states), ["readout"], True),
    ):
        y = tmp_path / "y.npy"
        written = apply(inputs(tmp_path, *names, *more), y, last=last, batch=batch)
        assert written == Applied(wanted.shape, None)
        actual = np.load(y)
        assert (actual.dtype, actual.flags.c_contiguous) == (layer.dtype, True)
        np.testing.assert_allclose(actual, wanted, **close)


@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("shape", [(6, 3), (6, 0, 3), (0, 5, 3)])
def test_unbatched_and_empty(shape: tuple[int, ...], last: bool, tmp_path: Path) -> None:
    layer, readout, _ = write_files(tmp_path)
    x = np.random.default_rng(1).standard_normal(shape, dtype=np.float32)
    np.save(tmp_path / "x.npy", x)
    output, h_n = layer(x)
    wanted = readout(h_n[-1] if last else output)
    written = apply(inputs(tmp_path, "readout"), tmp_path / "y.npy", last=last)
    assert written.shape == wanted.shape
    np.testing.assert_allclose(np.load(tmp_path / "y.npy"), wanted, rtol=1e-5, atol=1e-6)


def test_accuracy_is_the_share_of_rows_with_the_labels_score_largest(tmp_path: Path) -> None:
    layer, readout, x = write_files(tmp_path)
    predicted = readout(layer(x)[1][-1]).argmax(axis=1)
    for wrong in range(6):
        labels = predicted.copy()
        labels[:wrong] = (labels[:wrong] + 1) % CLASSES
        np.save(tmp_path / "labels.npy", labels)
        files = inputs(tmp_path, "readout", "labels")
        actual = apply(files, tmp_path / "y.npy", last=True, batch=2).accuracy
        assert actual == (5 - wrong) / 5


@pytest.mark.parametrize(
    ("what", "make", "match"),
    [
        ("readout", lambda: xprnn.Linear(WIDTH + 1, 2), "of 4 features in float32, got one of 5"),
        ("readout", lambda: xprnn.Linear(WIDTH, 2, dtype="float64"), "in float32, got one of 4 in"),
        ("readout", lambda: xprnn.GRU(WIDTH, 2), "holds a GRU, expected a Linear"),
        ("labels", lambda: np.array([0, 1, 2, 0]), r"expected \(5,\) integers, got int64 \(4,\)"),
        ("labels", lambda: np.zeros(5), r"expected \(5,\) integers, got float64"),
        ("labels", lambda: np.array([0, 1, 2, 3, 0]), "expected 0 to 2, got 0 to 3"),
        ("labels", lambda: np.array([0, 1, 2, -1, 0]), "expected 0 to 2, got -1 to 2"),
        ("labels", lambda: np.array([{}] * 5), "not a readable .npy file"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_by_name(
    what: str, make: Any, match: str, tmp_path: Path
) -> None:
    write_files(tmp_path)
    (tmp_path / "y.npy").write_bytes(b"old")
    name = {"readout": "r.safetensors", "labels": "labels.npy"}[what]
    value = make()
    if what == "readout":
        value.save(tmp_path / name)
    else:
        np.save(tmp_path / name, value)
    with pytest.raises(ValueError, match=f"{name}: .*{match}"):
        apply(inputs(tmp_path, "readout", "labels"), tmp_path / "y.npy", last=True)
    assert (tmp_path / "y.npy").read_bytes() == b"old"


def test_labels_need_scores_of_final_states(tmp_path: Path) -> None:
    write_files(tmp_path)
    for names, last in ((["labels"], True), (["labels", "readout"], False)):
        with pytest.raises(ValueError, match="labels: expected together with a read-out"):
            apply(inputs(tmp_path, *names), tmp_path / "y.npy", last=last)
    assert not (tmp_path / "y.npy").exists()


# -- which files are written


def command(folder: Path, output: str | Path, files: dict[str, str]) -> list[str]:
    line = ["run", files["model"], files["x"], "-o", str(output), "--last"]
    for name in ("lengths", "readout", "labels"):
        line += [f"--{name}", files[name]]
    return line


@pytest.mark.parametrize("spelling", ["same", "dotted", "absolute", "hard link", "link"])
@pytest.mark.parametrize("name", ["model", "x", "lengths", "readout", "labels"])
def test_no_input_is_overwritten(
    name: str,
    spelling: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    write_files(tmp_path)
    files = {"model": "m.safetensors", "readout": "r.safetensors", "x": "x.npy"}
    files |= {"lengths": "lengths.npy", "labels": "labels.npy"}
    before = {path: (tmp_path / path).read_bytes() for path in files.values()}
    output: str | Path = files[name]
    if spelling == "dotted":
        output = f"../{tmp_path.name}/./{output}"
    if spelling == "absolute":
        output = tmp_path / output
    if spelling == "hard link":
        Path("other").hardlink_to(output)
        output = "other"
    if spelling == "link":
        Path("other").symlink_to(output)
        output = "other"
    assert cli.main(command(tmp_path, output, files)) == 1
    wanted = f"{re.escape(str(output))}: expected another file to write to than {files[name]}"
    assert re.search(wanted, capsys.readouterr().err)
    assert {path: (tmp_path / path).read_bytes() for path in files.values()} == before
    assert cli.main(command(tmp_path, "y.npy", files)) == 0


@pytest.mark.parametrize("link", ["hard", "symbolic", "to the data", "dangling"])
def test_the_demo_does_not_write_two_outputs_to_one_file(
    link: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = Path(str(FILE)).read_bytes()
    lengths = tmp_path / "test_lengths.npy"
    (tmp_path / "model.safetensors").write_bytes(b"old")
    if link == "hard":
        lengths.hardlink_to(tmp_path / "model.safetensors")
    elif link == "to the data":
        lengths.symlink_to(str(FILE))
    else:
        lengths.symlink_to("model.safetensors" if link == "symbolic" else "test_x.npy")
    assert cli.main(["demo", "--epochs", "1", "--out", str(tmp_path)]) == 1
    assert "expected another file to write to than" in capsys.readouterr().err
    assert (tmp_path / "model.safetensors").read_bytes() == b"old"
    assert Path(str(FILE)).read_bytes() == data
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"model.safetensors", "test_lengths.npy"}


def test_an_interrupted_demo_leaves_no_partial_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = np.save

    def interrupted(file: Any, array: Any) -> None:
        original(file, array[:3])
        raise KeyboardInterrupt

    (tmp_path / "test_x.npy").write_bytes(b"old")
    monkeypatch.setattr(np, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        demo.run("rnn", 1, 0, "numpy", tmp_path, lambda *_: None)
    assert (tmp_path / "test_x.npy").read_bytes() == b"old"
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"model.safetensors", "readout.safetensors", "test_x.npy"}


# -- open files and memory in use


def opened(name: str) -> set[str]:
    """The open files and the mapped files of this process whose paths contain `name`."""
    handles = set()
    for handle in Path("/proc/self/fd").iterdir():
        try:
            target = str(handle.readlink())
        except FileNotFoundError:  # the descriptor of this listing
            continue
        if name in target:
            handles.add(f"open: {target}")
    for line in Path("/proc/self/maps").read_text().splitlines():
        if name in line:
            handles.add(f"mapped: {line}")
    return handles


@pytest.mark.skipif(
    not Path("/proc/self/maps").exists(), reason="open files are listed by Linux only"
)
@pytest.mark.parametrize("options", LAYERS[:2], ids=str)
def test_the_output_is_not_open_when_it_is_replaced(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_files(tmp_path, **options)
    original, seen = Path.replace, []

    def watched(self: Path, target: Any) -> Path:
        seen.append((self.name, opened(self.name)))
        return original(self, target)

    monkeypatch.setattr(Path, "replace", watched)
    line = ["run", "m.safetensors", "x.npy", "-o", "y.npy", "--batch", "2"]
    more = ["--readout", "r.safetensors", "--lengths", "lengths.npy", "--labels", "labels.npy"]
    monkeypatch.chdir(tmp_path)
    for arguments in (line, [*line, "--last", *more]):
        assert cli.main(arguments) == 0
        assert opened(str(tmp_path)) == set()  # the inputs are closed too
    assert [handles for _, handles in seen] == [set(), set()]
    assert all(name.endswith(".part") for name, _ in seen)
    with (tmp_path / "x.npy").open("rb"):  # an open file is detected
        assert opened(str(tmp_path)) == {f"open: {tmp_path / 'x.npy'}"}
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    assert any(handle.startswith("mapped") for handle in opened(str(tmp_path))) and mapped.size


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("last", [True, False])
def test_memory_in_use_is_that_of_a_batch(batch_first: bool, last: bool, tmp_path: Path) -> None:
    T, N, H = 50, 2000, 64
    xprnn.GRU(2, H, batch_first=batch_first, seed=0).save(tmp_path / "m.safetensors")
    shape = (N, T, 2) if batch_first else (T, N, 2)
    np.save(tmp_path / "x.npy", np.ones(shape, np.float32))
    files, y = Inputs(tmp_path / "m.safetensors", tmp_path / "x.npy"), tmp_path / "y.npy"
    tracemalloc.start()
    try:
        apply(files, y, last=last, batch=10)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < T * N * H * 4 / 4  # a quarter of the outputs of all steps, 25.6 MB
    actual = np.load(y, mmap_mode="r")
    one = xprnn.load(files.model)(np.ones((1, T, 2) if batch_first else (T, 1, 2), np.float32))
    wanted = one[1][0, 0] if last else (one[0][0] if batch_first else one[0][:, 0])
    for row in (0, N // 2, N - 1):
        at = actual[row] if last or batch_first else actual[:, row]
        np.testing.assert_allclose(at, wanted, rtol=1e-5, atol=1e-6)
