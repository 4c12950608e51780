"""Apply a saved layer to an array on disk, in batches, without loading it whole."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from .backend import asarray, to_numpy
from .checks import check_lengths, check_size
from .io import replacing
from .layer import _Layer
from .module import load

Report = Callable[[int, int], None]  # rows done, rows in all


def apply(
    model: str | os.PathLike[str],
    x_path: str | os.PathLike[str],
    y_path: str | os.PathLike[str],
    *,
    lengths_path: str | os.PathLike[str] | None = None,
    batch: int = 64,
    backend: str | None = None,
    report: Report = lambda done, total: None,
) -> tuple[int, ...]:
    """Write the output of the layer in file `model` for the array in `x_path` to `y_path`.

    :param x_path: .npy, (T, N, I) or as the layer's `batch_first` says (N, T, I), or (T, I),
        in the layer's dtype; memory-mapped.
    :param y_path: .npy, written whole or not at all; (T, N, D*H), laid out as x.
    :param lengths_path: .npy, (N,) integers: the steps of each row; None: all.
    :param batch: rows a time.
    :param backend: where to compute; as for `xprnn.get_backend`.
    :param report: called after each batch with the rows done and the rows in all.
    :return: the shape of the output.
    :raises FileNotFoundError, ValueError, TypeError: a file is not there or not what it should be.
    """
    batch = check_size("batch", batch)
    layer = load(model, backend=backend)
    if not isinstance(layer, _Layer):
        raise ValueError(f"{os.fspath(model)}: holds a {type(layer).__name__}, expected a layer")
    x = _open_input(x_path, layer)
    target = Path(y_path)
    if target.exists() and any(target.samefile(path) for path in (x_path, model)):
        raise ValueError(f"{os.fspath(y_path)}: expected another file than the inputs to write to")
    rows_axis = 0 if layer.options["batch_first"] else 1
    batched = x if x.ndim == 3 else np.expand_dims(x, rows_axis)
    total, steps = batched.shape[rows_axis], batched.shape[1 - rows_axis]
    given = None if lengths_path is None else np.asarray(_open(lengths_path))
    lengths = check_lengths(given, steps, total)

    width = layer.options["hidden_size"] * (2 if layer.options["bidirectional"] else 1)
    shape = (*x.shape[:-1], width)
    with replacing(y_path) as part:
        y = _create(part, layer.dtype, shape)
        y_batched = y if y.ndim == 3 else np.expand_dims(y, rows_axis)
        for start in range(0, max(total, 1), batch):  # an empty x is checked too
            rows = slice(start, min(start + batch, total))
            at = (rows, slice(None)) if rows_axis == 0 else (slice(None), rows)
            output, _ = layer(
                asarray(batched[at], backend=layer.backend.name),
                lengths=None if lengths is None else lengths[rows],
            )
            y_batched[at] = to_numpy(output)
            report(rows.stop, total)
        if isinstance(y, np.memmap):
            y.flush()
    return shape


def _open_input(path: str | os.PathLike[str], layer: _Layer) -> np.ndarray:
    """The array in a .npy file, if it is one that the layer takes."""
    x, features = _open(path), layer.options["input_size"]
    if x.ndim not in (2, 3) or x.dtype != layer.dtype or x.shape[-1] != features:
        raise ValueError(
            f"{os.fspath(path)}: expected a {layer.dtype} array of 2 or 3 dimensions, the last "
            f"of {features}, got {x.dtype} {x.shape}"
        )
    return x


def _open(path: str | os.PathLike[str]) -> np.ndarray:
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


def _create(path: Path, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    """A new .npy file as a writable array; OSError now if the disk has no room for it."""
    if 0 in shape:  # nothing to map
        empty = np.empty(shape, dtype)
        with path.open("wb") as file:
            np.save(file, empty)
        return empty
    mapped = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
    if hasattr(os, "posix_fallocate"):  # else a full disk would kill the process later
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return mapped
