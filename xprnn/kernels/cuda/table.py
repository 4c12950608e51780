"""The table of sequence kernels: which cells have one, with which arguments and tilings.

To add a cell: its header, its two .cu files and its rows in `KERNELS`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class Tiling(NamedTuple):
    """The sizes that are compiled into a kernel."""

    warps: int
    k_blocks: int  # of the reduction, per warp
    in_registers: int  # k-blocks whose weights are held in registers
    row_tiles: int  # in a pass
    cluster: int = 1  # blocks that share what they poll; more than 1 needs sm_90


class SequenceKernel(NamedTuple):
    """The arguments of a kernel, and its resources as multiples of its tiling's sizes."""

    template: str  # its name in C++; {} stands for the arguments up to `row_tiles`
    arrays: tuple[str, ...]  # of a direction, in the order of the struct in its file
    reduction: int  # length of the reduction, in units of the padded H
    weights: int  # registers per thread for each k-block in registers; 4 bytes each if not
    sums: int  # bytes of shared memory for each warp and tile
    carried: int  # bytes of shared memory for the state gradients of each tile and pass
    tilings: Mapping[str, tuple[Tiling, ...]]  # by math mode

    @property
    def file(self) -> str:
        """The name of its file without suffix, which is also its name in C++."""
        return self.template.partition("<")[0]


def _tilings(in_registers: int, *sizes: tuple[int, tuple[int, ...]]) -> tuple[Tiling, ...]:
    """Tilings of 8 warps from (k_blocks, (row_tiles, ...)); `in_registers` at most."""
    return tuple([Tiling(8, k, min(k, in_registers), t) for k, tiles in sizes for t in tiles])


def _pairs(in_registers: int, k_blocks: int) -> tuple[Tiling, ...]:
    """One tiling of clusters of two; larger clusters may leave multiprocessors idle."""
    return (Tiling(8, k_blocks, min(k_blocks, in_registers), 4, cluster=2),)


def _by_math_mode(
    float32: tuple[Tiling, ...], tf32: tuple[Tiling, ...], low_precision: tuple[Tiling, ...]
) -> dict[str, tuple[Tiling, ...]]:
    return {"float32": float32, "tf32": tf32, "bfloat16": low_precision, "float16": low_precision}


_SMALL, _MEDIUM = (1, 4), (1, 2, 4)  # row tiles
_GRU_FORWARD = _by_math_mode(
    _tilings(5, (2, _SMALL), (4, _MEDIUM), (6, (1,)), (8, _MEDIUM), (13, (1,))),
    _tilings(6, (2, _SMALL), (4, _MEDIUM), (8, _MEDIUM), (14, (1,))) + _pairs(6, 8),
    _tilings(6, (1, _SMALL), (2, _MEDIUM), (4, _MEDIUM), (10, (1,))) + _pairs(6, 4),
)
_GRU_BACKWARD = _by_math_mode(
    _tilings(15, (6, _SMALL), (12, _MEDIUM), (24, _MEDIUM), (39, (1,))) + _pairs(15, 24),
    _tilings(18, (6, _SMALL), (12, _MEDIUM), (24, _MEDIUM), (42, (1,))) + _pairs(18, 24),
    _tilings(18, (3, _SMALL), (6, _MEDIUM), (12, _MEDIUM), (30, (1,))) + _pairs(18, 12),
)
_LSTM_FORWARD = _by_math_mode(
    _tilings(4, (2, _SMALL), (4, _MEDIUM), (6, (1,)), (8, (1, 2)), (9, (1,))),
    _tilings(5, (2, _SMALL), (4, _MEDIUM), (6, (1,)), (8, (1, 2)), (10, (1,))),
    _tilings(4, (1, _SMALL), (2, _MEDIUM), (4, _MEDIUM), (6, (1,))) + _pairs(3, 4),
)
_LSTM_BACKWARD = _by_math_mode(
    _tilings(15, (8, _SMALL), (16, _MEDIUM), (32, _MEDIUM), (40, (1,))) + _pairs(15, 32),
    _tilings(18, (8, _SMALL), (16, _MEDIUM), (32, _MEDIUM), (40, (1,))) + _pairs(18, 32),
    _tilings(18, (4, _SMALL), (8, _MEDIUM), (16, _MEDIUM), (32, (1,))) + _pairs(18, 16),
)
_RNN = _by_math_mode(
    _tilings(15, (2, _SMALL), (4, _MEDIUM), (8, _MEDIUM), (17, (1,))) + _pairs(15, 8),
    _tilings(18, (2, _SMALL), (4, _MEDIUM), (8, _MEDIUM), (17, (1,))) + _pairs(18, 8),
    _tilings(18, (1, _SMALL), (2, _MEDIUM), (4, _MEDIUM), (9, (1,))) + _pairs(18, 4),
)

# Of the upper layers of a wavefront, else null: W_ih, and the exchange buffer of the layer below
LOWER_LAYER = "weight_ih", "lower_exchange"
_GRU = "weight_hh", "bias_hh", "gates", "saved", "h", "exchange", *LOWER_LAYER
_GRU_BACK = "weight_hh", "h", "doutput", "gates", "saved", "dh", "exchange"
_LSTM = "weight_hh", "gates", "saved", "h", "c", "exchange", *LOWER_LAYER
_LSTM_BACK = "weight_hh", "c", "doutput", "gates", "saved", "dh", "dc", "exchange"
_ELMAN = "weight_hh", "gates", "h", "exchange", *LOWER_LAYER
_ELMAN_BACK = "weight_hh", "h", "doutput", "gates", "dh", "exchange"
_TANH = SequenceKernel("rnn_forward<{}, false>", _ELMAN, 1, 8, 1280, 0, _RNN)
_RELU = SequenceKernel("rnn_forward<{}, true>", _ELMAN, 1, 8, 1280, 0, _RNN)

KERNELS: dict[tuple[str, str], SequenceKernel] = {  # by cell and work
    ("gru", "forward"): SequenceKernel(
        "gru_forward<{}, false>", _GRU, 1, 24, 3840, 0, _GRU_FORWARD
    ),
    ("gru", "training"): SequenceKernel(
        "gru_forward<{}, true>", _GRU, 1, 24, 3840, 0, _GRU_FORWARD
    ),
    ("gru", "backward"): SequenceKernel(
        "gru_backward<{}>", _GRU_BACK, 3, 8, 1280, 512, _GRU_BACKWARD
    ),
    ("lstm", "forward"): SequenceKernel(
        "lstm_forward<{}, false>", _LSTM, 1, 32, 5120, 0, _LSTM_FORWARD
    ),
    ("lstm", "training"): SequenceKernel(
        "lstm_forward<{}, true>", _LSTM, 1, 32, 5120, 0, _LSTM_FORWARD
    ),
    ("lstm", "backward"): SequenceKernel(
        "lstm_backward<{}>", _LSTM_BACK, 4, 8, 1280, 1024, _LSTM_BACKWARD
    ),
    ("rnn_tanh", "forward"): _TANH,
    ("rnn_tanh", "training"): _TANH,  # it saves nothing but the states
    ("rnn_tanh", "backward"): SequenceKernel(
        "rnn_backward<{}, false>", _ELMAN_BACK, 1, 8, 1280, 512, _RNN
    ),
    ("rnn_relu", "forward"): _RELU,
    ("rnn_relu", "training"): _RELU,
    ("rnn_relu", "backward"): SequenceKernel(
        "rnn_backward<{}, true>", _ELMAN_BACK, 1, 8, 1280, 512, _RNN
    ),
}
NO_KERNEL = {  # the reason, by cell
    "gru_reset_before": "reset_after=False takes two dependent products per step, which no "
    "sequence kernel supports"
}

MAX_WAVEFRONT_LAYERS = 8  # as in exchange.h
# Cell, math mode and k-blocks of tilings that need too many registers in a wavefront, on 10.0
NOT_IN_WAVEFRONTS = {
    *(("lstm", "float32", 9), ("lstm", "bfloat16", 6), ("lstm", "float16", 6)),
}


def in_wavefronts(cell: str, math_mode: str, tiling: Tiling) -> bool:
    """Whether a tiling of a forward kernel can also run a wavefront."""
    return tiling.cluster == 1 and (cell, math_mode, tiling.k_blocks) not in NOT_IN_WAVEFRONTS
