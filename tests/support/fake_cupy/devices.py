"""Device properties of the fake CuPy, as `getDeviceProperties` of CuPy's runtime returns them."""

from __future__ import annotations

from typing import Any

T4: dict[str, Any] = {  # too old for sequence kernels
    "name": b"Fake T4",
    "totalGlobalMem": 16 << 30,
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
H200: dict[str, Any] = {
    "name": b"Fake H200",
    "totalGlobalMem": 141 << 30,
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
    "driverGetVersion": lambda: 13000,
    "runtimeGetVersion": lambda: 12090,
    "getDeviceCount": lambda: 1,
    "getDeviceProperties": lambda device: T4,
}
