"""From files of this folder to kernels: their text, and what CuPy compiles of it."""

from __future__ import annotations

from functools import cache
from importlib import resources
from typing import Any


@cache
def text(*parts: str) -> str:
    """That of files of this folder, in the order given: each behind those that it stands on."""
    folder = resources.files(__package__)
    return "\n".join([(folder / part).read_text("utf-8") for part in parts])


@cache
def kernel(cupy: Any, source: str, instantiation: str, cooperative: bool = True) -> Any:
    """An instantiation of a source; CuPy compiles it when it is first asked for on a device.

    :param cooperative: CuPy launches it as cooperative: see backend/resident.py.
    """
    module = cupy.RawModule(
        code=source,
        options=("--std=c++17",),
        name_expressions=(instantiation,),
        enable_cooperative_groups=cooperative,
    )
    return module.get_function(instantiation)
