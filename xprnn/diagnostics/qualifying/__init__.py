"""Comparison and timing of every kernel on the user's machine, in processes of their own."""
