"""Fused kernels for NVIDIA GPUs: a header of arithmetic per cell, and what launches it.

`POINTWISE` has the cells whose parts are one kernel each, by name.
"""

from .cells import POINTWISE

__all__ = ["POINTWISE"]
