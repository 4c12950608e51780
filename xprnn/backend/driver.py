"""An occupancy query of the CUDA driver that CuPy does not wrap: resident clusters of blocks.

A cluster runs within one group of multiprocessors, and groups differ in size, so the number of
clusters does not follow from the occupancy of a multiprocessor. Only the driver can compute it.
"""

from __future__ import annotations

import sys
from ctypes import CDLL, POINTER, Structure, byref, c_int, c_uint, c_void_p
from functools import cache


class LaunchConfig(Structure):
    """`CUlaunchConfig` of cuda.h."""

    _fields_ = (
        *[(f"{part}Dim{axis}", c_uint) for part in ("grid", "block") for axis in "XYZ"],
        ("sharedMemBytes", c_uint),
        ("hStream", c_void_p),
        ("attrs", c_void_p),
        ("numAttrs", c_uint),
    )


@cache
def _library() -> CDLL:
    """The driver's library, already loaded by CuPy."""
    driver = CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    driver.cuOccupancyMaxActiveClusters.argtypes = (POINTER(c_int), c_void_p, POINTER(LaunchConfig))
    return driver


def active_clusters(kernel: int, grid: tuple[int, ...], threads: int, shared: int) -> int:
    """The maximum number of resident clusters of a kernel on the current device.

    :param kernel: the address of a `CUfunction`, compiled for a fixed cluster size.
    :param grid: blocks of the launch, in up to three dimensions.
    :param threads: threads per block.
    :param shared: bytes of dynamic shared memory per block.
    :raises RuntimeError: the driver returns an error.
    """
    config = LaunchConfig(*(*grid, 1, 1)[:3], threads, 1, 1, shared)
    count = c_int()
    error = _library().cuOccupancyMaxActiveClusters(byref(count), kernel, byref(config))
    if error:
        raise RuntimeError(f"cuOccupancyMaxActiveClusters: error {error} of the CUDA driver")
    return count.value
