"""The device of an array of any library, by the DLPack protocol.

https://data-apis.org/array-api/latest/design_topics/data_interchange.html
"""

from __future__ import annotations

from typing import Any

CUDA, MANAGED = 2, 13  # DLPack's device types; managed memory may omit its device number
ON_CUDA = (CUDA, MANAGED)
_DEVICE_TYPES = {1: "the CPU", 2: "CUDA device {}", 3: "the CPU, page-locked", 13: "CUDA device {}"}


def dlpack_device(array: Any) -> tuple[int, int] | None:
    """DLPack's type and number of the device of `array`; None if it does not support DLPack."""
    method = getattr(array, "__dlpack_device__", None)
    if method is None:
        return None
    try:
        kind, number = method()
    except (BufferError, RuntimeError, TypeError, ValueError):  # no memory, or distributed memory
        return None
    return int(kind), int(number)


def device_text(array: Any) -> str:
    """The device of `array` as text to follow its name: " on CUDA device 1"; "" if unknown."""
    device = dlpack_device(array)
    if device is None:
        return ""
    return " on " + _DEVICE_TYPES.get(device[0], f"DLPack device {device}").format(device[1])
