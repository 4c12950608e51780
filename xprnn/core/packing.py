"""How a batch of sequences of different lengths is packed, and in which order it is processed.

Rows are ordered by length once, longest first, so the rows still active at step t are the
first n_t. Everything that has a row per (t, row) is packed into (S, ...) arrays, S = Σ n_t:
step after step, at step t its n_t rows. Nothing is padded or masked, and with full lengths
the packed array is the time-major (T*N, ...) one.

The states of one direction are in one array of n_0 + S rows that holds every state once.
With base(t) = n_0 + start(t) and base(-1) = 0, a forward step t reads the block at
base(t-1) and writes the one at base(t); the reverse direction swaps the two. Both ways the
rows from n_0 on are aligned with the packed arrays: they are the outputs of the forward
direction and the previous states of the reverse one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from ..backend import Array, Backend


class StepRun(NamedTuple):
    """Consecutive steps with the same active rows; where their blocks start in packed arrays."""

    rows: int  # n_t: the first n_t rows are active
    joined: int  # rows active at the step before the first of these, in the direction's order
    times: Sequence[int]  # t of each
    gates: Sequence[int]  # first row in packed arrays
    before: Sequence[int]  # first row of the previous states
    after: Sequence[int]  # first row of the next states


@dataclass(frozen=True)
class RaggedIndices:
    """The index arrays of a batch with rows of different lengths, intp on the backend."""

    order: Array  # (N,) the caller's row at each position, longest first
    inverse: Array  # (N,) the position of each of the caller's rows
    time: Array  # (S,) t of each packed row
    row: Array  # (S,) the caller's row of each packed row
    shifted: Array  # (S,) where the state blocks at base(t-1) hold each packed row
    last: Array  # (n_0,) where the forward direction wrote the final state of each position
    counts: Array  # (T,), the rows active at each step


@dataclass(frozen=True)
class PackedBatch:
    """T steps of N rows, of which the first `counts[t]` are active at step t."""

    steps: int  # T
    batch: int  # N
    running: int  # n_0, the rows that run at least one step
    total: int  # S, the number of packed rows
    counts: Sequence[int]  # (T,)
    starts: Sequence[int]  # (T+1,) first packed row of each step, then S
    ragged: RaggedIndices | None  # None: every row runs all T steps
    splits: dict[int, Any] = field(default_factory=dict, compare=False, repr=False)  # checkpointing
    _runs: dict[tuple[bool, bool], list[StepRun]] = field(
        default_factory=dict, compare=False, repr=False
    )

    def walk(self, reverse: bool, backward: bool = False) -> list[StepRun]:
        """The steps in the order in which a pass over a direction runs them."""
        key = reverse, backward
        if key not in self._runs:
            self._runs[key] = [*self._walk(reverse, reverse != backward)]
        return self._runs[key]

    def _walk(self, reverse: bool, descending: bool) -> Iterator[StepRun]:
        counts, T, N = self.counts, self.steps, self.batch
        high: Sequence[int]
        base: Sequence[int]
        if self.ragged is None and N:
            high, base = range(N, (T + 2) * N, N), range(0, (T + 2) * N, N)
        else:
            high = [self.running + start for start in self.starts]
            base = [0, *high]
        before, after = (high, base) if reverse else (base, high)
        order = slice(None, None, -1 if descending else 1)
        joined = 0
        # a run ends where the number of active rows changes
        bounds = (
            [t for t in range(T) if not t or counts[t] != counts[t - 1]] if self.ragged else [0]
        )
        for k in range(len(bounds))[order] if T else ():
            first, stop = bounds[k], bounds[k + 1] if k + 1 < len(bounds) else T
            rows = int(counts[first])
            times, gates = range(first, stop)[order], self.starts[first:stop][order]
            blocks = before[first:stop][order], after[first:stop][order]
            yield StepRun(rows, joined, times, gates, *blocks)
            joined = rows

    def outputs(self, states: Array, reverse: bool) -> Array:
        """The states (S, H) that the steps of a direction wrote; read from (n_0 + S, H)."""
        if not reverse:
            return states[self.running :]
        return states[: self.total] if self.ragged is None else states[self.ragged.shifted]

    def previous(self, states: Array, reverse: bool) -> Array:
        """The states (S, H) that the steps of a direction read; read from (n_0 + S, H)."""
        if reverse:
            return states[self.running :]
        return states[: self.total] if self.ragged is None else states[self.ragged.shifted]

    def final(self, states: Array, reverse: bool) -> Array:
        """The last state (n_0, H) of each active position; read from (n_0 + S, H)."""
        if reverse:
            return states[: self.running]
        if self.ragged is None:
            return states[self.total :]
        return states[self.ragged.last]

    def sort(self, rows: Array) -> Array:
        """Rows (..., N, H) in the caller's order, reordered longest first."""
        return rows if self.ragged is None else rows[..., self.ragged.order, :]

    def unsort_in_place(self, arrays: tuple[Array, ...]) -> None:
        """Reorder rows of arrays (..., N, H) from longest first to the caller's order."""
        if self.ragged is not None:
            for rows in arrays:
                rows[...] = rows[..., self.ragged.inverse, :]

    def pack(self, x: Array, packed: Array) -> None:
        """Write x (T, N, F), any strides, into `packed` (S, F)."""
        if self.ragged is None:
            packed.reshape(x.shape)[...] = x
        else:
            packed[...] = x[self.ragged.time, self.ragged.row]

    def unpack(self, packed: Array, x: Array) -> None:
        """Write `packed` (S, F) into x (T, N, F), any strides; past a row's end x is untouched."""
        if self.ragged is None:
            x[...] = packed.reshape(x.shape)
        else:
            x[self.ragged.time, self.ragged.row] = packed.astype(x.dtype, copy=False)

    def time_and_row(self, xp: Any) -> tuple[Array, Array]:
        """The step and the caller's row of each packed row, intp (S,) each."""
        if self.ragged is not None:
            return self.ragged.time, self.ragged.row
        index = xp.arange(self.total)
        return index // max(self.batch, 1), index % max(self.batch, 1)


def make_packed_batch(
    backend: Backend, steps: int, batch: int, lengths: np.ndarray | None
) -> PackedBatch:
    """`batch` rows over `steps` steps; `lengths` intp (N,), None = all full."""
    if lengths is None or bool((lengths == steps).all()):
        return _full_batch(steps, batch)

    order = np.argsort(-lengths, kind="stable")
    ordered = lengths[order]
    counts = batch - np.searchsorted(ordered[::-1], np.arange(steps), side="right")
    starts = np.concatenate([[0], np.cumsum(counts)])
    time = np.repeat(np.arange(steps), counts)
    position = np.arange(time.size) - starts[time]
    running = int(counts[0]) if steps else 0
    base = np.concatenate([[0], running + starts])  # base[t + 1] = base(t)
    indices = [
        order,
        np.argsort(order, kind="stable"),
        time,
        order[position],
        base[time] + position,
        base[ordered[:running]] + np.arange(running),
        counts,
    ]
    moved = backend.from_host(np.concatenate(indices))  # one transfer for all
    ends = np.cumsum([index.size for index in indices]).tolist()
    parts = [moved[a:b] for a, b in zip([0, *ends], ends, strict=False)]
    return PackedBatch(
        steps,
        batch,
        running,
        time.size,
        counts.tolist(),
        starts.tolist(),
        RaggedIndices(*parts),
    )


@lru_cache(256)
def _full_batch(steps: int, batch: int) -> PackedBatch:
    """A batch of rows of one length, in memory that does not grow with the steps."""
    counts: Any = np.broadcast_to(np.intp(batch), steps)
    starts: Sequence[int] = [0] * (steps + 1)
    if batch:
        starts = range(0, (steps + 1) * batch, batch)
    return PackedBatch(steps, batch, batch if steps else 0, steps * batch, counts, starts, None)
