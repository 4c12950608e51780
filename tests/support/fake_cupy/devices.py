"""Device properties of the fake CuPy, as `getDeviceProperties` of CuPy's runtime returns them."""

from __future__ import annotations

from typing import Any

T4 = {  # too old for sequence kernels
    "major": 7,
    "minor": 5,
    "multiProcessorCount": 40,
    "regsPerMultiprocessor": 65536,
    "maxThreadsPerMultiProcessor": 1024,
    "maxBlocksPerMultiProcessor": 16,
    "sharedMemPerMultiprocessor": 65536,
    "sharedMemPerBlockOptin": 65536,
    "reservedSharedMemPerBlock": 0,
    "cooperativeLaunch": 1,
}
H200 = {
    "major": 9,
    "minor": 0,
    "multiProcessorCount": 132,
    "regsPerMultiprocessor": 65536,
    "maxThreadsPerMultiProcessor": 2048,
    "maxBlocksPerMultiProcessor": 32,
    "sharedMemPerMultiprocessor": 233472,
    "sharedMemPerBlockOptin": 232448,
    "reservedSharedMemPerBlock": 1024,
    "cooperativeLaunch": 1,
}
RUNTIME: dict[str, Any] = {  # of `cupy.cuda.runtime`
    "CUDA_R_16F": 2,
    "CUDA_R_16BF": 14,
    "CUDA_R_32F": 0,
    "CUDA_R_64F": 1,
    "getDeviceCount": lambda: 1,
    "getDeviceProperties": lambda device: T4,
}
