"""Apply a saved layer, and optionally a saved read-out, to an array on disk in batches."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple
from zipfile import BadZipFile

import numpy as np

from ..backend import BackendName, asarray, to_numpy
from ..core.checks import check_lengths, check_size
from ..nn.layers import _Layer
from ..nn.linear import Linear
from ..nn.module import load
from ..nn.serialization import Location, check_outputs, replacing

Report = Callable[[int, int], None]  # rows done, rows in all


@dataclass(frozen=True)
class Inputs:
    """The input files; None for optional ones that are not used."""

    model: Location  # safetensors, a layer
    x: Location  # .npy in the layer's layout: (T, N, I), batch first (N, T, I), or (T, I)
    lengths: Location | None = None  # .npy, (N,) integers: the steps of each row
    readout: Location | None = None  # safetensors, a `Linear` from D*H features to K scores
    labels: Location | None = None  # .npy, (N,) integers: the correct one of the K classes


class Applied(NamedTuple):
    """The result of `apply`."""

    shape: tuple[int, ...]  # of the array written
    accuracy: float | None  # fraction of rows whose largest score is the label's; None: no labels


def apply(
    inputs: Inputs,
    y_path: Location,
    *,
    last: bool = False,
    batch: int = 64,
    backend: BackendName | None = None,
    report: Report = lambda done, total: None,
) -> Applied:
    """Write the output of a saved layer for the array in file `inputs.x` to file `y_path`.

    This is the last layer's output at every step, both directions concatenated: (T, N, D*H), batch
    first (N, T, D*H), or (T, D*H), in the layout of x, zero after the end of a row. With a read-out
    it is K scores of the D*H features, also zero after the end of a row. Arrays are read and
    written in batches.

    :param inputs: x is in the layer's dtype. Labels require a read-out and `last`.
    :param y_path: .npy, written atomically, in the layer's dtype.
    :param last: write each row's final state of the last layer instead, (N, D*H), or its scores,
        (N, K): the state after the row's last step, for the reverse direction after its first.
    :param batch: rows per batch.
    :param backend: where to compute; as for `xprnn.get_backend`.
    :param report: called after each batch with the number of rows done and their total.
    :raises FileNotFoundError, ValueError, TypeError: a file is missing or invalid, or `y_path` is
        one of the inputs.
    """
    batch = check_size("batch", batch)
    check_outputs([y_path], [path for path in astuple(inputs) if path is not None])
    layer, readout = _layer(inputs.model, backend), None
    if inputs.readout is not None:
        readout = _readout(inputs.readout, layer)
    x = _open_input(inputs.x, layer)
    rows_axis = 0 if layer.options["batch_first"] else 1
    batched = x if x.ndim == 3 else np.expand_dims(x, rows_axis)
    total, steps = batched.shape[rows_axis], batched.shape[1 - rows_axis]
    lengths = None if inputs.lengths is None else np.array(_open(inputs.lengths))
    lengths = check_lengths(lengths, steps, total)
    labels = None
    if inputs.labels is not None:
        if readout is None or not last:
            raise ValueError(
                "labels: expected together with a read-out and the last states (--readout, --last)"
            )
        labels = _labels(inputs.labels, total, readout.options["out_features"])

    features = _width(layer) if readout is None else readout.options["out_features"]
    batched_shape = (total, features) if last else (*batched.shape[:2], features)
    axis, correct = 0 if last else rows_axis, 0
    shape = batched_shape if x.ndim == 3 else batched_shape[:axis] + batched_shape[axis + 1 :]
    with replacing(y_path) as part, _created(part, layer.dtype, shape) as file:
        first = file.tell()
        for start in range(0, max(total, 1), batch):  # an empty x is checked too
            rows = slice(start, min(start + batch, total))
            at = (rows, slice(None)) if rows_axis == 0 else (slice(None), rows)
            ends = None if lengths is None else lengths[rows]
            block = _results(layer, readout, batched[at], ends, last)
            _write(file, first, batched_shape[axis], start, block if axis else block[None])
            if labels is not None:
                correct += int((block.argmax(axis=1) == labels[rows]).sum())
            report(rows.stop, total)
    if labels is None:
        return Applied(shape, None)
    return Applied(shape, correct / total if total else math.nan)


def _results(
    layer: _Layer, readout: Linear | None, x: np.ndarray, lengths: Any, last: bool
) -> np.ndarray:
    """The output for a batch of rows, on the host."""
    output, final = layer(asarray(x, backend=layer.backend.name), lengths=lengths)
    if last:
        h_n = (final[0] if isinstance(final, tuple) else final)[-layer._spec.num_directions :]
        with layer.backend.activate():
            output = h_n.transpose(1, 0, 2).reshape(-1, _width(layer))
    if readout is None:
        return to_numpy(output)
    scores = to_numpy(readout(output))
    if not last and lengths is not None:  # no scores after the end of a row
        by_row = scores if layer.options["batch_first"] else scores.swapaxes(0, 1)
        by_row[np.arange(by_row.shape[1]) >= np.asarray(lengths)[:, None]] = 0
    return scores


def _width(layer: _Layer) -> int:
    """D*H."""
    return layer._spec.num_directions * layer._spec.hidden_size


# -- inputs


def _layer(path: Location, backend: BackendName | None) -> _Layer:
    layer = load(path, backend=backend)
    if not isinstance(layer, _Layer):
        raise ValueError(f"{os.fspath(path)}: holds a {type(layer).__name__}, expected a layer")
    return layer


def _readout(path: Location, layer: _Layer) -> Linear:
    """The read-out in a file; ValueError unless it fits the layer's features."""
    readout = load(path, backend=layer.backend.name)
    if not isinstance(readout, Linear):
        raise ValueError(f"{os.fspath(path)}: holds a {type(readout).__name__}, expected a Linear")
    features, dtype = readout.options["in_features"], readout.dtype
    if (features, dtype) != (_width(layer), layer.dtype):
        raise ValueError(
            f"{os.fspath(path)}: expected a Linear of {_width(layer)} features in {layer.dtype}, "
            f"got one of {features} in {dtype}"
        )
    return readout


def _labels(path: Location, rows: int, classes: int) -> np.ndarray:
    labels = np.array(_open(path))
    if labels.shape != (rows,) or labels.dtype.kind not in "iu":
        raise ValueError(
            f"{os.fspath(path)}: expected ({rows},) integers, got {labels.dtype} {labels.shape}"
        )
    if rows and (labels.min() < 0 or labels.max() >= classes):
        raise ValueError(
            f"{os.fspath(path)}: expected 0 to {classes - 1}, got {labels.min()} to {labels.max()}"
        )
    return labels


def _open_input(path: Location, layer: _Layer) -> np.ndarray:
    """The array in a .npy file; ValueError unless the layer accepts it."""
    x, features = _open(path), layer.options["input_size"]
    if x.ndim not in (2, 3) or x.dtype != layer.dtype or x.shape[-1] != features:
        raise ValueError(
            f"{os.fspath(path)}: expected a {layer.dtype} array of 2 or 3 dimensions, the last "
            f"of {features}, got {x.dtype} {x.shape}"
        )
    return x


def _open(path: Location) -> np.ndarray:
    """The array in a .npy file, memory-mapped, never unpickled."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"no such file: {os.fspath(path)}")
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OverflowError, BadZipFile) as error:
        raise ValueError(f"{os.fspath(path)}: not a readable .npy file: {error}") from error
    if not isinstance(array, np.ndarray):
        array.close()
        raise ValueError(f"{os.fspath(path)}: an archive of arrays, expected one .npy array")
    return array


# -- output, without a memory map, which would have to be closed before the file is replaced


@contextmanager
def _created(path: Path, dtype: np.dtype, shape: tuple[int, ...]) -> Iterator[IO[bytes]]:
    """A new .npy file, positioned at the first element; OSError if the disk has no space."""
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        file.flush()
        size = file.tell() + dtype.itemsize * math.prod(shape)
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)
        else:
            file.truncate(size)
        yield file


def _write(file: IO[bytes], first: int, rows: int, start: int, block: np.ndarray) -> None:
    """Write a block (T, n, K) at row `start` of the array (T, `rows`, K) at file offset `first`."""
    for t, at_step in enumerate(np.ascontiguousarray(block)):
        row = math.prod(at_step.shape[1:]) * block.itemsize
        file.seek(first + (t * rows + start) * row)
        file.write(at_step.tobytes())
