"""The public names of commit 8003e28, with their signatures: none is gone, none has changed.

`data/public_names.txt` lists them as that commit has them: run there, this file prints the list.
Annotations are not compared; `test_typing.py` checks them.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import xprnn
import xprnn.stepper
from xprnn import feature_first, functional, optim
from xprnn.nn.module import Module

LIST = Path(__file__).parents[1] / "data" / "public_names.txt"
# what may have been added since, and nothing else
ADDED = {
    "xprnn.use_kernels(name)",
    "xprnn.qualify(backend=None, cells=None, *, quick=False, output=None, share=None, "
    "progress=None)",
    "xprnn.LSTM.proj_size: property",
}
ADDED_TO_MODULES = {".xp: property", ".asarray(self, value, dtype=None)"}
NEW = (
    "xprnn.cell(",
    "xprnn.cell_definitions",
    "xprnn.Recurrent",
    "xprnn.functional.recurrent",
)  # names that begin so did not exist
# optional ones, of names that are listed
LATER_ARGUMENTS = (", cells=()", ", **inputs", ", activations=None", ", proj_size=0")
SPECIAL = ("__call__", "__init__")


def listed() -> Iterator[str]:
    """Every public name with its signature, a line each."""
    yield from of_module(xprnn, xprnn.__all__)
    yield from of_module(optim, optim.__all__)
    for module in (functional, feature_first):
        yield from of_module(module, own_names(module))
    yield from of_class("xprnn.stepper.Stepper", xprnn.stepper.Stepper)


def own_names(module: ModuleType) -> list[str]:
    """The functions and classes that a module without `__all__` defines."""
    return [
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and getattr(value, "__module__", None) == module.__name__
    ]


def of_module(module: ModuleType, names: list[str]) -> Iterator[str]:
    for name in sorted(names):
        value, path = getattr(module, name), f"{module.__name__}.{name}"
        if inspect.isclass(value):
            yield from of_class(path, value)
        elif inspect.ismodule(value):
            yield f"{path}: module"
        else:
            yield path + signature_of(value)


def of_class(path: str, kind: type) -> Iterator[str]:
    if issubclass(kind, BaseException):
        yield f"{path}: {kind.__mro__[1].__name__}"
        return
    yield f"{path}: class"
    if kind.__name__ == "Cache":  # opaque: what a call leaves for its backward call
        return
    for name in sorted(dir(kind)):
        if name.startswith("_") and name not in SPECIAL:
            continue
        value = inspect.getattr_static(kind, name)
        if isinstance(value, (staticmethod, classmethod)) or inspect.isroutine(value):
            if value is not getattr(object, name, None):
                yield f"{path}.{name}{signature_of(getattr(kind, name))}"
        else:
            yield f"{path}.{name}: {'property' if hasattr(value, '__set__') else 'attribute'}"


def signature_of(function: Any) -> str:
    """Names, kinds and defaults of the parameters."""
    signature = inspect.signature(function)
    unannotated = [
        parameter.replace(annotation=inspect.Parameter.empty)
        for parameter in signature.parameters.values()
    ]
    return str(inspect.Signature(unannotated))


def test_all_names_are_there_as_they_were() -> None:
    names = [name for name in listed() if not name.startswith(NEW)]
    assert len(set(names)) == len(names) < len([*listed()])
    modules = [f"xprnn.{name}" for name in xprnn.__all__ if is_module(getattr(xprnn, name))]
    modules = [name for name in modules if not name.startswith(NEW)]
    added = ADDED | {name + member for name in modules for member in ADDED_TO_MODULES}
    added |= {f"xprnn.{kind}.activations: property" for kind in ("RNN", "GRU", "LSTM")}
    assert added <= set(names)
    listed_then = set(LIST.read_text("utf-8").splitlines())
    assert {without_later_arguments(name) for name in set(names) - added} == listed_then


def without_later_arguments(name: str) -> str:
    for argument in LATER_ARGUMENTS:
        name = name.replace(argument, "")
    return name


def is_module(value: Any) -> bool:
    return inspect.isclass(value) and issubclass(value, Module)


def test_dir_is_all() -> None:
    assert dir(xprnn) == sorted(xprnn.__all__)


def test_public_names_say_that_they_are_the_packages() -> None:
    for module in (xprnn, optim):
        for name in module.__all__:
            value = getattr(module, name)
            if not inspect.ismodule(value):
                assert value.__module__ == module.__name__, name
                assert getattr(module, value.__qualname__) is value


def test_the_source_of_functions_and_methods_is_found() -> None:
    """For a class Python looks in the file of `__module__`, where it is only imported."""
    assert "def gradcheck(" in inspect.getsource(xprnn.gradcheck)
    assert "def clip_grad_norm(" in inspect.getsource(optim.clip_grad_norm)
    assert "num_layers" in inspect.getsource(xprnn.GRU.__init__)


if __name__ == "__main__":
    print(*listed(), sep="\n")
