"""Fused kernels for NVIDIA GPUs: a header of arithmetic per cell, and what launches it."""
