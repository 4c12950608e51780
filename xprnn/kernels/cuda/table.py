"""The table of sequence kernels: which cell has which, what it is given and what it takes.

To add a cell: its header and its two .cu files, and its rows in `KERNELS`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class Tiling(NamedTuple):
    """The sizes that are compiled into a kernel."""

    warps: int
    chunks: int  # of the reduction, a warp
    held: int  # those whose weights stay in registers
    tiles: int  # of rows, in a pass
    cluster: int = 1  # blocks that share what they poll for; more than 1 from sm_90 on


class Kernel(NamedTuple):
    """What a kernel is given, and what it needs in units of its tiling."""

    template: str  # its name in C++, with a place for what comes before `tiles` and after it
    arrays: tuple[str, ...]  # of a direction, in the order of the struct in its file
    reduction: int  # its length, in units of the padded H
    weights: int  # registers a thread for each chunk that is held; bytes a thread are 4 times that
    sums: int  # bytes of shared memory for each warp and tile
    carried: int  # bytes of shared memory for each tile and pass
    tilings: Mapping[str, tuple[Tiling, ...]]  # by numbers

    @property
    def file(self) -> str:
        """The name of its file, without the ending, and in C++."""
        return self.template.partition("<")[0]


def _tilings(held: int, *sizes: tuple[int, tuple[int, ...]]) -> tuple[Tiling, ...]:
    """Tilings of 8 warps from (chunks, (tiles, ...)); as many chunks are held as may be."""
    return tuple([Tiling(8, c, min(c, held), t) for c, tiles in sizes for t in tiles])


def _pairs(held: int, chunks: int) -> tuple[Tiling, ...]:
    """One for clusters of two, which leave no multiprocessor idle: larger ones may."""
    return (Tiling(8, chunks, min(chunks, held), 4, cluster=2),)


def _by_numbers(
    float32: tuple[Tiling, ...], tf32: tuple[Tiling, ...], narrow: tuple[Tiling, ...]
) -> dict[str, tuple[Tiling, ...]]:
    return {"float32": float32, "tf32": tf32, "bfloat16": narrow, "float16": narrow}


_SMALL, _MEDIUM = (1, 4), (1, 2, 4)  # tiles
_GRU_FORWARD = _by_numbers(
    _tilings(5, (2, _SMALL), (4, _MEDIUM), (6, (1,)), (8, _MEDIUM), (13, (1,))),
    _tilings(6, (2, _SMALL), (4, _MEDIUM), (8, _MEDIUM), (14, (1,))) + _pairs(6, 8),
    _tilings(6, (1, _SMALL), (2, _MEDIUM), (4, _MEDIUM), (10, (1,))) + _pairs(6, 4),
)
_GRU_BACKWARD = _by_numbers(
    _tilings(15, (6, _SMALL), (12, _MEDIUM), (24, _MEDIUM), (39, (1,))) + _pairs(15, 24),
    _tilings(18, (6, _SMALL), (12, _MEDIUM), (24, _MEDIUM), (42, (1,))) + _pairs(18, 24),
    _tilings(18, (3, _SMALL), (6, _MEDIUM), (12, _MEDIUM), (30, (1,))) + _pairs(18, 12),
)
_LSTM_FORWARD = _by_numbers(
    _tilings(4, (2, _SMALL), (4, _MEDIUM), (6, (1,)), (8, (1, 2)), (9, (1,))),
    _tilings(5, (2, _SMALL), (4, _MEDIUM), (6, (1,)), (8, (1, 2)), (10, (1,))),
    _tilings(4, (1, _SMALL), (2, _MEDIUM), (4, _MEDIUM), (6, (1,))) + _pairs(3, 4),
)
_LSTM_BACKWARD = _by_numbers(
    _tilings(15, (8, _SMALL), (16, _MEDIUM), (32, _MEDIUM), (40, (1,))) + _pairs(15, 32),
    _tilings(18, (8, _SMALL), (16, _MEDIUM), (32, _MEDIUM), (40, (1,))) + _pairs(18, 32),
    _tilings(18, (4, _SMALL), (8, _MEDIUM), (16, _MEDIUM), (32, (1,))) + _pairs(18, 16),
)
_RNN = _by_numbers(
    _tilings(15, (2, _SMALL), (4, _MEDIUM), (8, _MEDIUM), (17, (1,))) + _pairs(15, 8),
    _tilings(18, (2, _SMALL), (4, _MEDIUM), (8, _MEDIUM), (17, (1,))) + _pairs(18, 8),
    _tilings(18, (1, _SMALL), (2, _MEDIUM), (4, _MEDIUM), (9, (1,))) + _pairs(18, 4),
)

BELOW = "weight_ih", "below"  # of the upper layers of a wave, else null: its W_ih, a mailbox
_GRU = "weight_hh", "bias_hh", "gates", "saved", "h", "mail", *BELOW
_GRU_BACK = "weight_hh", "h", "doutput", "gates", "saved", "dh", "mail"
_LSTM = "weight_hh", "gates", "saved", "h", "c", "mail", *BELOW
_LSTM_BACK = "weight_hh", "c", "doutput", "gates", "saved", "dh", "dc", "mail"
_ELMAN = "weight_hh", "gates", "h", "mail", *BELOW
_ELMAN_BACK = "weight_hh", "h", "doutput", "gates", "dh", "mail"
_TANH = Kernel("rnn_forward<{}, false>", _ELMAN, 1, 8, 1280, 0, _RNN)
_RELU = Kernel("rnn_forward<{}, true>", _ELMAN, 1, 8, 1280, 0, _RNN)

KERNELS: dict[tuple[str, str], Kernel] = {  # by cell and work
    ("gru", "forward"): Kernel("gru_forward<{}, false>", _GRU, 1, 24, 3840, 0, _GRU_FORWARD),
    ("gru", "training"): Kernel("gru_forward<{}, true>", _GRU, 1, 24, 3840, 0, _GRU_FORWARD),
    ("gru", "backward"): Kernel("gru_backward<{}>", _GRU_BACK, 3, 8, 1280, 512, _GRU_BACKWARD),
    ("lstm", "forward"): Kernel("lstm_forward<{}, false>", _LSTM, 1, 32, 5120, 0, _LSTM_FORWARD),
    ("lstm", "training"): Kernel("lstm_forward<{}, true>", _LSTM, 1, 32, 5120, 0, _LSTM_FORWARD),
    ("lstm", "backward"): Kernel("lstm_backward<{}>", _LSTM_BACK, 4, 8, 1280, 1024, _LSTM_BACKWARD),
    ("rnn_tanh", "forward"): _TANH,
    ("rnn_tanh", "training"): _TANH,  # there is nothing more to keep
    ("rnn_tanh", "backward"): Kernel("rnn_backward<{}, false>", _ELMAN_BACK, 1, 8, 1280, 512, _RNN),
    ("rnn_relu", "forward"): _RELU,
    ("rnn_relu", "training"): _RELU,
    ("rnn_relu", "backward"): Kernel("rnn_backward<{}, true>", _ELMAN_BACK, 1, 8, 1280, 512, _RNN),
}
NO_KERNEL = {  # by cell: why
    "gru_reset_before": "reset_after=False takes two products that wait for each other a step, "
    "which no sequence kernel does"
}

LAYERS = 8  # of a wave, at most: `LAYERS` of exchange.h
ALONE = {  # cell, numbers, chunks that in a wave take more registers than there are, for 10.0
    *(("lstm", "float32", 9), ("lstm", "bfloat16", 6), ("lstm", "float16", 6)),
}


def in_waves(cell: str, numbers: str, tiling: Tiling) -> bool:
    """Whether a tiling of a forward kernel also serves a wave."""
    return tiling.cluster == 1 and (cell, numbers, tiling.chunks) not in ALONE
