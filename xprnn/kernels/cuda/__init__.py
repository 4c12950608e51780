"""Fused kernels for NVIDIA GPUs: headers of arithmetic for each cell, and their launches."""
