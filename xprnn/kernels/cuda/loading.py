"""Source text of the files in this folder, and compilation with CuPy."""

from __future__ import annotations

from functools import cache
from importlib import resources
from typing import Any


@cache
def text(*parts: str) -> str:
    """The concatenated text of files; each file must follow those that it depends on."""
    folder = resources.files(__package__)
    return "\n".join([(folder / part).read_text("utf-8") for part in parts])


@cache
def kernel(cupy: Any, source: str, instantiation: str, cooperative: bool = True) -> Any:
    """An instantiation of a source; CuPy compiles it at its first use on a device.

    :param cooperative: whether CuPy makes cooperative launches of it: see backend/cooperative.py.
    """
    module = cupy.RawModule(
        code=source,
        options=("--std=c++17",),
        name_expressions=(instantiation,),
        enable_cooperative_groups=cooperative,
    )
    return module.get_function(instantiation)
