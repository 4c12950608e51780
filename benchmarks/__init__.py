"""Benchmarks: asv's suite (`layers`, `programs`), what runs and files it, and single reports.

asv imports every file here, forks after that, and runs them with older versions of xprnn: numpy,
xprnn, peers and devices are touched in `setup` and later, never at import.
"""
