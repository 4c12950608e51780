"""One call of a stack of layers, forward and backward, and one step of it."""
