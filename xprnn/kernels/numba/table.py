"""The built-in cells that have kernels; definitions have sequence kernels, none for a step."""

SEQUENCE = ("rnn_tanh", "rnn_relu", "gru", "gru_reset_before", "lstm")
STEP = SEQUENCE  # one step of all layers
