"""An embedding table: rows looked up by index, as input of a layer for words or symbols."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..backend import AnyArray, Array, BackendName, DTypeLike, Integers
from ..backend.exports import exported_from
from ..core.checks import check_array, check_indices, check_integer, check_seed, check_size
from .attributes import option
from .module import Module, file_kind
from .parameters import Shapes, reads_parameters


@dataclass(frozen=True)
class _RecordedCall:
    indices: Array  # a copy, of the caller's shape
    version: int  # of the parameters


@exported_from("xprnn")
@file_kind("Embedding")
class Embedding(Module):
    """A table of rows looked up by index, y = W[indices]; dW[i] = Σ dy over the positions of i.

    Names, shapes and initialisation (normal, of mean 0 and variance 1) are those of
    https://docs.pytorch.org/docs/stable/generated/torch.nn.Embedding.html.

    :param num_embeddings: V, the number of rows.
    :param embedding_dim: E, the width of a row.
    :param padding_idx: a row that is initialised to zeros and gets no gradient, from -V to V-1,
        negative values count from the end; None: no row.
    :param backend: "numpy", "cupy", "cupy:N" or "auto"; None: as for `xprnn.get_backend`.
    :param dtype: "float32" or "float64".
    :param seed: of the initial parameters; None draws one.
    :raises TypeError, ValueError: an argument is invalid.

    >>> import numpy as np, xprnn
    >>> embedding = xprnn.Embedding(5, 2, padding_idx=0, seed=0).train()
    >>> y = embedding([[1, 3, 3, 0]])
    >>> embedding.backward(np.ones_like(y))
    >>> y.shape, embedding.grads["weight"][:, 0].tolist()
    ((1, 4, 2), [0.0, 1.0, 0.0, 2.0, 0.0])
    """

    num_embeddings: int = option("num_embeddings", "V, the number of rows.")
    embedding_dim: int = option("embedding_dim", "E, the width of a row.")
    padding_idx: int | None = option("padding_idx", "The row without a gradient, counted from 0.")

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        *,
        backend: BackendName | None = None,
        dtype: DTypeLike = "float32",
        seed: int | None = None,
    ) -> None:
        options = {
            "num_embeddings": num_embeddings,
            "embedding_dim": embedding_dim,
            "padding_idx": padding_idx,
            "seed": seed,
        }
        self._construct(options, backend, dtype)

    def _configure(self, options: dict[str, Any], backend: BackendName | None, dtype: Any) -> None:
        shapes = self._shapes(options)
        rows, width = shapes["weight"]
        plain = {
            "num_embeddings": rows,
            "embedding_dim": width,
            "padding_idx": _check_padding(options["padding_idx"], rows),
        }
        self._allocate(shapes, {**plain, "seed": check_seed(options["seed"])}, backend, dtype)

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
    def __call__(self, indices: Integers) -> Array:
        """Look up y = W[indices]; in train mode the call is recorded for `backward`.

        :param indices: (...) integers from 0 to V-1, on the host or on the module's backend. On a
            device the range is not checked: an index out of range gives a row of NaN.
        :return: y (..., E), a new array.
        :raises TypeError, ValueError: `indices` is invalid.

        >>> import numpy as np, xprnn
        >>> embedding = xprnn.Embedding(3, 2, backend="numpy", seed=0)
        >>> embedding.load_state_dict({"weight": np.arange(6.0).reshape(3, 2)})
        >>> embedding([2, 0]).tolist()
        [[4.0, 5.0], [0.0, 1.0]]
        """
        backend, xp = self.backend, self.backend.xp
        indices = check_indices("indices", indices, backend, self.options["num_embeddings"])
        with backend.activate():
            if not backend.on_gpu:
                y = self.parameters["weight"].take(indices, axis=0)
            else:
                in_range = self._in_range(indices)
                rows = self.parameters["weight"].take(xp.where(in_range, indices, 0), axis=0)
                y = xp.where(in_range[..., None], rows, xp.nan)
            if self.training:
                self._prepare_record()
                self._record(_RecordedCall(indices, self.parameters.version))
            return y

    @reads_parameters
    def backward(self, dy: AnyArray) -> None:
        """The backward pass of the last recorded call: adds to `grads`; indices have no gradient.

        Rows of the same index are added pairwise, in an order that depends only on the indices:
        results are bitwise reproducible, on a GPU too.

        :param dy: dL/dy, of y's shape and dtype; only read.
        :raises RuntimeError: there is no recorded call, or the parameters have changed since.
        :raises TypeError, ValueError: dy has not y's type or shape; the recorded call is kept.

        >>> import numpy as np, xprnn
        >>> embedding = xprnn.Embedding(3, 2, backend="numpy", seed=0).train()
        >>> y = embedding([2, 0, 2])
        >>> embedding.backward(np.ones_like(y))
        >>> embedding.grads["weight"].tolist()
        [[1.0, 1.0], [0.0, 0.0], [2.0, 2.0]]
        """
        call: _RecordedCall = self._last_record()
        width = self.options["embedding_dim"]
        shape = (*call.indices.shape, width)
        dy = check_array("dy", dy, self.backend, self.dtype, shape)
        with self.backend.activate():
            if dy.size and "weight" not in self.frozen:
                self._add(call.indices.reshape(-1), dy.reshape(-1, width))
            self._records.pop()

    def _in_range(self, indices: Array) -> Array:
        """The mask of the indices of existing rows."""
        return (indices >= 0) & (indices < self.options["num_embeddings"])

    def _add(self, indices: Array, rows: Array) -> None:
        """Add rows (S, E) to the gradient, each at its index (S,).

        CuPy's `add.at` adds in no fixed order, and its `add.reduceat` subtracts cumulative sums,
        which loses accuracy.
        """
        xp, padding = self.backend.xp, self.options["padding_idx"]
        used = self._in_range(indices)
        if padding is not None:
            used &= indices != padding
        indices = xp.where(used, indices, 0)
        order = xp.argsort(indices, kind="stable")
        indices, rows = indices[order], xp.where(used[:, None], rows, 0.0)[order]
        span = 1  # each row holds the sum of the `span` rows from it on that have its index
        while span < indices.size:
            same = (indices[span:] == indices[:-span])[:, None]
            rows[:-span] += xp.where(same, rows[span:], 0.0)
            span *= 2
        sums = rows[xp.searchsorted(indices, indices)]  # at the first row of each index
        gradient = self.grads["weight"]
        gradient[indices] = gradient[indices] + sums  # the same for all rows of one index


def _check_padding(value: Any, rows: int) -> int | None:
    """`padding_idx` counted from 0, or None; TypeError or ValueError if it is invalid."""
    if value is None:
        return None
    if not -rows <= check_integer("padding_idx", value) < rows:
        raise ValueError(f"padding_idx: expected {-rows} to {rows - 1}, got {value}")
    return int(value) % rows
