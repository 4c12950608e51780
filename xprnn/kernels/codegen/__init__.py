"""Source code of kernels, made from the programs of `cells/definition/program.py`."""
