"""Fused kernels for the CPU, compiled by Numba, which is imported when one of them is used."""
