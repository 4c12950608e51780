"""The nouns of a call: sizes, passes, packed batches, precision, workspaces and checks."""
