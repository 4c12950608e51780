"""The definitions that are part of xprnn; see `xprnn.cells.shipped`."""

from .cells.shipped import (  # noqa: F401
    coupled_lstm,
    coupled_peephole_lstm,
    gru,
    gru_reset_before,
    lstm,
    peephole_lstm,
    projected_lstm,
    rnn,
)
