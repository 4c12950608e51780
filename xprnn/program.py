"""A function's array calls, written down once and repeated: on small arrays Python is what costs.

What `record` takes down are the calls themselves, with the views that they work on, so that to
repeat them makes no view, no array and no decision. The function runs as it stands, on arrays
that note what is asked of them; nothing is computed meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import repeat
from typing import Any

import numpy as np

from .blas import calls

Program = list[partial[Any]]
Constants = dict[tuple[float, np.dtype[Any]], np.ndarray]  # numbers as arrays, one for each element

# `out` by position saves a third of a small call; for these two NumPy advises against it
BY_NAME = (np.minimum, np.maximum)


def record(
    function: Callable[..., None], *arguments: Any, constants: Constants | None = None
) -> Program:
    """The calls that function(np, *arguments) makes, to be repeated on the same arrays.

    :param function: takes an array module and `arguments`. It works in place: ufuncs and products
        with `out=`, `+=` and the like, `a[...] = b`, slices, `.T`. What it asks of the values
        themselves cannot be recorded and raises AttributeError or TypeError.
    :param arguments: NumPy arrays, in tuples or not, and anything else, which is passed as it is.
    :param constants: arrays that programs share, read and added to; None: this one has its own.

    >>> a = np.ones(2)
    >>> def twice(xp, a):
    ...     a += a
    >>> program = record(twice, a)
    >>> a.tolist()
    [1.0, 1.0]
    >>> for call in program + program:
    ...     _ = call()
    >>> a.tolist()
    [4.0, 4.0]
    """
    program: Program = []
    module = _Module(program, {} if constants is None else constants)
    function(module, *[_recorded(argument, program) for argument in arguments])
    return program


def repeated(program: Program) -> list[Iterator[Any]]:
    """For each call an iterator that makes it whenever it is asked for the next item.

    Asked in turn, by `zip` for one, they make all calls without a step of Python's between them.
    """
    found: list[Iterator[Any]] = []
    for call in program:
        function = partial(call.func, **call.keywords) if call.keywords else call.func
        found.append(map(function, *[repeat(operand) for operand in call.args]))
    return found


def _recorded(item: Any, program: Program) -> Any:
    if isinstance(item, np.ndarray):
        return _Recorded(item, program)
    if isinstance(item, tuple):
        parts = [_recorded(part, program) for part in item]
        return type(item)(*parts) if hasattr(item, "_fields") else tuple(parts)
    return item


def _constant(item: float, target: np.ndarray, constants: Constants) -> np.ndarray:
    """A number for each element of `target`: the minimum with a single one takes three times."""
    key = item, target.dtype
    flat = constants.get(key)
    if flat is None or flat.size < target.size:
        flat = constants[key] = np.full(target.size, item, target.dtype)
    order: Any = "F" if target.flags.f_contiguous else "C"
    return flat[: target.size].reshape(target.shape, order=order)


class _Module:
    """NumPy as far as it writes into arrays that are there."""

    def __init__(self, program: Program, constants: Constants) -> None:
        self._program, self._constants = program, constants

    def _operand(self, item: Any, target: np.ndarray, fully: bool) -> np.ndarray:
        """What a call reads; a number would become an array at each call.

        `fully`: one that has it for each element.
        """
        if isinstance(item, _Recorded):
            return item.array
        return _constant(item, target, self._constants) if fully else np.array(item, target.dtype)

    def __getattr__(self, name: str) -> Callable[..., None]:
        function: np.ufunc = getattr(np, name)

        def note(*operands: Any, out: _Recorded) -> None:
            target = out.array
            inner = [self._operand(item, target, function in BY_NAME) for item in operands]
            if function is np.matmul:
                left, right = inner
                if target.flags.f_contiguous:
                    # the same product, as BLAS takes it without a copy: (A B)' = B' A'
                    left, right, target = right.T, left.T, target.T
                self._program += calls(left, right, target)
            elif function in BY_NAME:
                self._program.append(partial(function, *inner, out=target))
            else:
                self._program.append(partial(function, *inner, target))

        return note


class _Recorded:
    """An array, or a view of one, that notes what would be written to it."""

    def __init__(self, array: np.ndarray, program: Program) -> None:
        self.array = array
        self.shape, self.dtype = array.shape, array.dtype
        self._program = program

    @property
    def T(self) -> _Recorded:  # noqa: N802
        """As of an array."""
        return _Recorded(self.array.T, self._program)

    def __getitem__(self, key: Any) -> _Recorded:
        view = self.array[key]
        if view.size and not np.may_share_memory(view, self.array):
            raise TypeError(f"record: expected a view, got a copy by index {key!r}")
        return _Recorded(view, self._program)

    def __setitem__(self, key: Any, value: _Recorded) -> None:
        self._program.append(partial(np.copyto, self[key].array, value.array))

    def _in_place(self, name: str, other: Any) -> _Recorded:
        getattr(_Module(self._program, {}), name)(self, other, out=self)
        return self

    def __iadd__(self, other: Any) -> _Recorded:
        return self._in_place("add", other)

    def __isub__(self, other: Any) -> _Recorded:
        return self._in_place("subtract", other)

    def __imul__(self, other: Any) -> _Recorded:
        return self._in_place("multiply", other)
