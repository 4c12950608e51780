"""How a batch of sequences of different lengths is packed, and how a direction walks over it.

Rows are ordered by length once, longest first, so the rows still running at step t are the
first n_t. Everything that has a row per (t, row) is packed into (S, ...) arrays, S = Σ n_t:
step after step, at step t its n_t rows. Nothing is masked and nothing is wasted, and with
full lengths the packed array simply is the time-major (T*N, ...) one.

The states of one direction stand in one array of n_0 + S rows that holds every state once.
With base(t) = n_0 + start(t) and base(-1) = 0, a forward step t reads the block at
base(t-1) and writes the one at base(t); the reverse direction swaps the two. Both ways the
rows from n_0 on are aligned with the packed arrays: they are the outputs of the forward
direction and the previous states of the reverse one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from .backend import Array, Backend


class Run(NamedTuple):
    """Steps of a walk, one after the other, with the same active rows; where their blocks start."""

    rows: int  # n_t: the first n_t rows are active
    joined: int  # rows active at the step walked before the first of these
    times: Sequence[int]  # t of each
    gates: Sequence[int]  # first row in packed arrays
    before: Sequence[int]  # first row of the previous states
    after: Sequence[int]  # first row of the next states


@dataclass(frozen=True)
class RaggedIndices:
    """The index arrays of a batch whose lengths differ, intp on the backend."""

    order: Array  # (N,) the caller's row at each place, longest first
    inverse: Array  # (N,) the place of each of the caller's rows
    time: Array  # (S,) t of each packed row
    row: Array  # (S,) the caller's row of each packed row
    shifted: Array  # (S,) where the state blocks at base(t-1) keep each packed row
    last: Array  # (n_0,) where the forward direction left each place's final state
    counts: Array  # (T,), the rows active at each step


@dataclass(frozen=True)
class PackedBatch:
    """T steps of N rows, of which the first `counts[t]` are active at step t."""

    steps: int  # T
    batch: int  # N
    counts: Sequence[int]  # (T,)
    starts: Sequence[int]  # (T+1,) first packed row of each step, then S
    ragged: RaggedIndices | None  # None: every row runs all T steps

    @property
    def total(self) -> int:
        """S, the number of packed rows."""
        return self.starts[self.steps]

    @property
    def running(self) -> int:
        """n_0, the rows that take at least one step."""
        return self.counts[0] if self.steps else 0

    def walk(self, reverse: bool, undo: bool = False) -> Iterator[Run]:
        """The steps in the order in which a direction takes them; with `undo`, last step first."""
        counts, T, running = self.counts, self.steps, self.running
        high = [running + start for start in self.starts]
        before, after = (high, [0, *high]) if reverse else ([0, *high], high)
        turn = -1 if reverse != undo else 1
        joined = 0
        # where the rows change a run ends
        bounds = (
            [t for t in range(T) if not t or counts[t] != counts[t - 1]] if self.ragged else [0]
        )
        for k in range(len(bounds))[::turn] if T else ():
            first, stop = bounds[k], bounds[k + 1] if k + 1 < len(bounds) else T
            times = range(first, stop)[::turn]
            gates = self.starts[first:stop][::turn]
            blocks = before[first:stop][::turn], after[first:stop][::turn]
            yield Run(counts[first], joined, times, gates, *blocks)
            joined = counts[first]

    def outputs(self, states: Array, reverse: bool) -> Array:
        """The states (S, H) that the steps of a direction wrote; read from (n_0 + S, H)."""
        return self._low(states) if reverse else states[self.running :]

    def previous(self, states: Array, reverse: bool) -> Array:
        """The states (S, H) that the steps of a direction read; read from (n_0 + S, H)."""
        return states[self.running :] if reverse else self._low(states)

    def _low(self, states: Array) -> Array:
        return states[: self.total] if self.ragged is None else states[self.ragged.shifted]

    def final(self, states: Array, reverse: bool) -> Array:
        """The last state (n_0, H) of each running place; read from (n_0 + S, H)."""
        if reverse:
            return states[: self.running]
        if self.ragged is None:
            return states[self.total :]
        return states[self.ragged.last]

    def sort(self, rows: Array) -> Array:
        """Rows (..., N, H) in the caller's order, put longest first."""
        return rows if self.ragged is None else rows[..., self.ragged.order, :]

    def unsort_in_place(self, arrays: tuple[Array, ...]) -> None:
        """Put the rows of arrays (..., N, H) that stand longest first back in caller's order."""
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
        places = xp.arange(self.total)
        return places // max(self.batch, 1), places % max(self.batch, 1)


def steps_and_batch(x: Array, batch_first: bool) -> tuple[int, int]:
    """T and N of x (T, N, I) or, batch first, (N, T, I)."""
    first, second = x.shape[:2]
    return (second, first) if batch_first else (first, second)


def make_packed_batch(
    backend: Backend, steps: int, batch: int, lengths: np.ndarray | None
) -> PackedBatch:
    """The layout of `batch` rows over `steps` steps; `lengths` intp (N,), None = all full."""
    if lengths is None or bool((lengths == steps).all()):
        starts: Sequence[int] = range(0, (steps + 1) * batch, batch) if batch else [0] * (steps + 1)
        return PackedBatch(steps, batch, [batch] * steps, starts, None)

    order = np.argsort(-lengths, kind="stable")
    ordered = lengths[order]
    counts = batch - np.searchsorted(ordered[::-1], np.arange(steps), side="right")
    starts_array = np.concatenate([[0], np.cumsum(counts)])
    time = np.repeat(np.arange(steps), counts)
    place = np.arange(time.size) - starts_array[time]
    first = int(counts[0]) if steps else 0
    base = np.concatenate([[0], first + starts_array])  # base[t + 1] = base(t)
    indices = [
        order,
        np.argsort(order, kind="stable"),
        time,
        order[place],
        base[time] + place,
        base[ordered[:first]] + np.arange(first),
        counts,
    ]
    moved = backend.from_host(np.concatenate(indices))  # one transfer for all
    ends = np.cumsum([index.size for index in indices]).tolist()
    parts = [moved[a:b] for a, b in zip([0, *ends], ends, strict=False)]
    ragged = RaggedIndices(*parts)
    return PackedBatch(steps, batch, counts.tolist(), starts_array.tolist(), ragged)
