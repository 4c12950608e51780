"""The built-in cells that have kernels; all definitions have those of sequences and of a step."""

SEQUENCE = ("rnn_tanh", "rnn_relu", "gru", "gru_reset_before", "lstm")
STEP = SEQUENCE  # one step of all layers
