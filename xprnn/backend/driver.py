"""What CUDA's driver says and CuPy has no name for: how many clusters of blocks a device holds.

Multiprocessors stand in groups of unlike sizes, and a cluster lies within one of them; so it is
not the sum of what the multiprocessors hold, and only the driver knows.
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
    """The driver's library, which CuPy has loaded already."""
    driver = CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    driver.cuOccupancyMaxActiveClusters.argtypes = (POINTER(c_int), c_void_p, POINTER(LaunchConfig))
    return driver


def active_clusters(kernel: int, grid: tuple[int, ...], threads: int, shared: int) -> int:
    """How many clusters of a kernel the current device holds at once.

    :param kernel: the address of a `CUfunction` that was compiled for clusters of one size.
    :param grid: blocks of a launch, in up to three sizes.
    :param threads: of a block.
    :param shared: bytes of dynamic shared memory of a block.
    :raises RuntimeError: the driver refuses to say.
    """
    config = LaunchConfig(*(*grid, 1, 1)[:3], threads, 1, 1, shared)
    count = c_int()
    error = _library().cuOccupancyMaxActiveClusters(byref(count), kernel, byref(config))
    if error:
        raise RuntimeError(f"cuOccupancyMaxActiveClusters: error {error} of the CUDA driver")
    return count.value
