"""The command line, the demo, and what else runs from a terminal."""
