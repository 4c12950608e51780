"""Where an array of any library is, by the protocol that libraries lend arrays with, DLPack.

https://data-apis.org/array-api/latest/design_topics/data_interchange.html
"""

from __future__ import annotations

from typing import Any

CUDA, MANAGED = 2, 13  # DLPack's kinds of device; managed memory need not name its number
ON_CUDA = (CUDA, MANAGED)
_KINDS = {1: "the CPU", 2: "CUDA device {}", 3: "the CPU, page-locked", 13: "CUDA device {}"}


def place_of(array: Any) -> tuple[int, int] | None:
    """DLPack's kind and number of the device that `array` is on; None if it does not say."""
    ask = getattr(array, "__dlpack_device__", None)
    if ask is None:
        return None
    try:
        kind, number = ask()
    except (BufferError, RuntimeError, TypeError, ValueError):  # it has no memory, or in parts
        return None
    return int(kind), int(number)


def whereabouts(array: Any) -> str:
    """Where `array` is, in words that follow its name: " on CUDA device 1"; "" if unknown."""
    place = place_of(array)
    if place is None:
        return ""
    return " on " + _KINDS.get(place[0], f"DLPack device {place}").format(place[1])
