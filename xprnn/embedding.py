"""Rows of a table by number: what goes into a layer where the input is words or symbols."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from .attributes import option
from .backend import Array
from .checks import check_array, check_indices, check_seed, check_size, check_whole
from .module import Module
from .parameters import Shapes, reads_parameters


@dataclass(frozen=True)
class _Record:
    indices: Array  # of the caller's shape, the module's own copy
    version: int  # of the parameters


class Embedding(Module):
    """A table of rows that are looked up by number, y = W[indices]; dW[i] = Σ dy where i is.

    Names, shapes and initialisation (normal, of mean 0 and variance 1) are those of
    https://docs.pytorch.org/docs/stable/generated/torch.nn.Embedding.html.

    :param num_embeddings: V, rows of the table.
    :param embedding_dim: E, width of a row.
    :param padding_idx: a row that begins as zeros and gets no gradient, from -V to V-1, below 0
        counted from the end; None: no row.
    :param backend: "numpy", "cupy", "cupy:N" or "auto"; None: as for `xprnn.get_backend`.
    :param dtype: "float32" or "float64".
    :param seed: of the initial parameters; None draws one.
    :raises TypeError, ValueError: an argument is none of these.

    >>> import numpy as np, xprnn
    >>> embedding = xprnn.Embedding(5, 2, padding_idx=0, seed=0).train()
    >>> y = embedding([[1, 3, 3, 0]])
    >>> embedding.backward(np.ones_like(y))
    >>> y.shape, embedding.grads["weight"][:, 0].tolist()
    ((1, 4, 2), [0.0, 1.0, 0.0, 2.0, 0.0])
    """

    num_embeddings: int = option("num_embeddings", "V, rows of the table.")
    embedding_dim: int = option("embedding_dim", "E, width of a row.")
    padding_idx: int | None = option("padding_idx", "The row that gets no gradient, from 0.")

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        *,
        backend: str | None = None,
        dtype: Any = "float32",
        seed: int | None = None,
    ) -> None:
        options = {
            "num_embeddings": num_embeddings,
            "embedding_dim": embedding_dim,
            "padding_idx": padding_idx,
            "seed": seed,
        }
        self._begin(options, backend, dtype)

    def _set_up(self, options: dict[str, Any], backend: str | None, dtype: Any) -> None:
        shapes = self._shapes(options)
        rows, width = shapes["weight"]
        plain = {
            "num_embeddings": rows,
            "embedding_dim": width,
            "padding_idx": _check_padding(options["padding_idx"], rows),
        }
        self._build(shapes, {**plain, "seed": check_seed(options["seed"])}, backend, dtype)

    def _draw(self) -> None:
        rng = np.random.Generator(np.random.PCG64(self.options["seed"]))
        weight = rng.standard_normal(self.parameters.shapes["weight"])
        if self.options["padding_idx"] is not None:
            weight[self.options["padding_idx"]] = 0.0
        self.parameters.write({"weight": weight})

    @classmethod
    def _shapes(cls, options: Mapping[str, Any]) -> Shapes:
        rows = check_size("num_embeddings", options["num_embeddings"])
        return {"weight": (rows, check_size("embedding_dim", options["embedding_dim"]))}

    @reads_parameters
    def __call__(self, indices: Any) -> Array:
        """y (..., E), a new array; in train mode recorded for `backward`.

        :param indices: (...) integers from 0 to V-1, on the host or on the module's backend; on a
            device they are not read back to be checked, one out of range gives a row of NaN.
        :raises TypeError, ValueError: they are not that.
        """
        backend, xp = self.backend, self.backend.xp
        indices = check_indices("indices", indices, backend, self.options["num_embeddings"])
        with backend.activate():
            if not backend.on_gpu:
                y = self.parameters["weight"].take(indices, axis=0)
            else:
                known = self._known(indices)
                rows = self.parameters["weight"].take(xp.where(known, indices, 0), axis=0)
                y = xp.where(known[..., None], rows, xp.nan)
            if self.training:
                self._prepare_record()
                self._record(_Record(indices, self.parameters.version))
            return y

    @reads_parameters
    def backward(self, dy: Array) -> None:
        """Backward of the last recorded call: adds to `grads`; indices have no gradient.

        Rows of one index are added up pairwise, in an order that depends on the indices alone:
        the same numbers give the same bits, on a GPU too.

        :param dy: dL/dy, of y's shape; only read.
        :raises RuntimeError: no recorded call is left, or the parameters have changed since.
        :raises TypeError, ValueError: dy has not y's type or shape; the record stays in place.
        """
        record: _Record = self._last_record()
        width = self.options["embedding_dim"]
        shape = (*record.indices.shape, width)
        dy = check_array("dy", dy, self.backend, self.dtype, shape)
        with self.backend.activate():
            if dy.size and "weight" not in self.frozen:
                self._add(record.indices.reshape(-1), dy.reshape(-1, width))
            self._records.pop()

    def _known(self, indices: Array) -> Array:
        """Which indices are those of a row."""
        return (indices >= 0) & (indices < self.options["num_embeddings"])

    def _add(self, indices: Array, rows: Array) -> None:
        """Add rows (S, E) to the gradient, each at its index (S,).

        With plain operations: CuPy's `add.at` adds in no fixed order, and its `add.reduceat`
        takes differences of running sums, which cost digits.
        """
        xp, padding = self.backend.xp, self.options["padding_idx"]
        counts = self._known(indices)
        if padding is not None:
            counts &= indices != padding
        indices = xp.where(counts, indices, 0)
        order = xp.argsort(indices, kind="stable")
        indices, rows = indices[order], xp.where(counts[:, None], rows, 0.0)[order]
        span = 1  # of the rows, from each on, that are in its sum if they have its index
        while span < indices.size:
            same = (indices[span:] == indices[:-span])[:, None]
            rows[:-span] += xp.where(same, rows[span:], 0.0)
            span *= 2
        sums = rows[xp.searchsorted(indices, indices)]  # at the first row of each index
        gradient = self.grads["weight"]
        gradient[indices] = gradient[indices] + sums  # the same for all rows of one index


def _check_padding(value: Any, rows: int) -> int | None:
    """`padding_idx` as a number from 0, or None; TypeError or ValueError otherwise."""
    if value is None:
        return None
    if not -rows <= check_whole("padding_idx", value) < rows:
        raise ValueError(f"padding_idx: expected {-rows} to {rows - 1}, got {value}")
    return int(value) % rows
