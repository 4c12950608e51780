"""Benchmarks: asv's suite (`layers`, `programs`, `gpu`), its runner and result store, and reports.

asv imports every file here, forks after that, and runs them with older versions of xprnn: numpy,
xprnn, peers and devices are used in `setup` and later, never at import.
"""
