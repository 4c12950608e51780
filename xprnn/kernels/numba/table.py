"""The cells that have kernels."""

SEQUENCE = ("rnn_tanh", "rnn_relu", "gru", "lstm")
STEP = (*SEQUENCE, "gru_reset_before")  # one step of all layers
