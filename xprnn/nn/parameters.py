"""Named arrays in one flat buffer: an optimiser step, a norm or a save is one operation.

Each named array starts on a 64-byte boundary of the buffer; the padding between them is always
zero.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from math import prod
from threading import get_ident
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

import numpy as np

from ..backend import ALIGNMENT, AnyArray, Array, Backend, asarray
from ..core.checks import check_array
from ..core.oom import translate
from ..core.passes import PackedWeightsCache
from .locking import WRITER, ReadersWriterLock

Shapes = dict[str, tuple[int, ...]]


def offsets(shapes: Shapes, itemsize: int) -> dict[str, int]:
    """The start of each array in the flat buffer, in elements; under "" the buffer's size."""
    alignment = ALIGNMENT // itemsize
    starts, end = {}, 0
    for name, shape in shapes.items():
        starts[name] = end
        end += -(-prod(shape) // alignment) * alignment
    return {**starts, "": end}


def views(flat: Array, shapes: Shapes) -> dict[str, Array]:
    """Each named array as a view into the flat buffer."""
    starts = offsets(shapes, flat.dtype.itemsize)
    return {
        name: flat[starts[name] : starts[name] + prod(shape)].reshape(shape)
        for name, shape in shapes.items()
    }


class Gradients(Mapping[str, Array]):
    """The gradients of a module's parameters, accumulated by `backward`.

    `gradients[name]` is an array of the parameter's shape and dtype, `flat` the buffer of all in
    the parameters' layout. The arrays may be written in place, for example to clip them.
    """

    def __init__(self, backend: Backend, dtype: np.dtype[Any], shapes: Shapes) -> None:
        self._backend = backend
        self._flat: Array = backend.zeros_aligned(offsets(shapes, dtype.itemsize)[""], dtype)
        self._arrays = views(self._flat, shapes)

    @property
    def flat(self) -> Array:
        """All gradients and the padding between them, 1-D; writable in place."""
        return self._flat

    @flat.setter
    def flat(self, value: Array) -> None:
        if value is not self._flat:  # it is the same after `grads.flat *= 2`
            raise AttributeError("flat cannot be set: write flat[...] = array")

    def update(self, values: Mapping[str, AnyArray]) -> None:
        """Overwrite gradients.

        :param values: arrays of the gradients' shapes, on their backend, by name.
        """
        with self._backend.activate():
            for name, value in values.items():
                self._arrays[name][...] = value

    def __getitem__(self, name: str) -> Array:
        """The gradient of parameter `name`."""
        return self._arrays[name]

    def __iter__(self) -> Iterator[str]:
        """The names, in torch's order."""
        return iter(self._arrays)

    def __len__(self) -> int:
        """The number of parameters."""
        return len(self._arrays)


class Parameters(Mapping[str, Array]):
    """The parameters of a module, readable by name; every write increments `version`.

    `parameters[name]` is a read-only view on NumPy; CuPy has no read-only arrays, but there it must
    not be written either. Parameters are written by `parameters[name] = value` and `writable()`.
    A write waits until no other thread holds the lock `reading`, as calls do, and blocks new
    readers until it ends: a call uses the values of one version.
    """

    version: int
    starts: dict[str, int]  # in the flat buffer; "" gives its size
    reading: ReadersWriterLock  # `with parameters.reading:` they do not change

    def __init__(self, backend: Backend, dtype: np.dtype[Any], shapes: Shapes) -> None:
        self.backend = backend
        self.dtype = dtype
        self.shapes = shapes
        self.version = 0
        self.starts = offsets(shapes, dtype.itemsize)  # in the flat buffer; under "" its size
        self._flat = backend.zeros_aligned(self.starts[""], dtype)
        backend.set_writable(self._flat, False)
        self._arrays = views(self._flat, shapes)
        starts = [*self.starts.values()]
        gaps = [
            np.arange(start + prod(shape), following)
            for start, shape, following in zip(starts, shapes.values(), starts[1:], strict=False)
        ]
        self._padding = backend.from_host(np.concatenate(gaps))
        self._zero = backend.zeros_aligned(1, dtype)  # CuPy would transfer a number each time
        self.reading = ReadersWriterLock()  # held for reading, the values do not change
        self._open = 0  # the number of active `writable` blocks
        self._retired = False  # whether the module has been moved to other parameters
        self._packed_weights = PackedWeightsCache()

    def views(self, flat: Array) -> dict[str, Array]:
        """Each name as a view into a buffer laid out as `flat`."""
        starts = self.starts
        return {
            name: flat[starts[name] : starts[name] + prod(shape)].reshape(shape)
            for name, shape in self.shapes.items()
        }

    @property
    def flat(self) -> Array:
        """All parameters and the padding between them, 1-D; read-only like the named views."""
        return self._flat

    @contextmanager
    def writable(self) -> Iterator[Array]:
        """The flat buffer, writable until the block ends; later, views must not be written."""
        with self.reading.writing():
            if self._retired:
                raise RuntimeError("parameters: the module was moved; use module.parameters again")
            with self.backend.activate():
                flat = self._flat[:]
            self.backend.set_writable(flat, True)
            self._open += 1
            try:
                yield flat
            finally:
                self.version += 1
                # before another call can use weights packed from these values
                self._packed_weights = self._packed_weights.invalidated()
                self._open -= 1
                with self.backend.activate():
                    flat[self._padding] = self._zero
                self.backend.set_writable(flat, False)

    def retire(self) -> None:
        """Make every later write raise RuntimeError: the module uses other parameters."""
        self._retired = True

    @property
    def in_writable_block(self) -> bool:
        """Whether the calling thread is in a `writable` block, where values have no version."""
        return self._open > 0 and self.reading.held_for_writing

    @property
    def packed_weights(self) -> PackedWeightsCache:
        """The kernels' cache of packed weights, valid until the next write.

        Inside a `writable` block values may change at any time: the cache is for one call.
        """
        return (
            PackedWeightsCache() if self._open and self.in_writable_block else self._packed_weights
        )

    def drop_packed_weights(self) -> None:
        """Release the memory of packed weights; calls in progress continue to use theirs."""
        self._packed_weights = PackedWeightsCache()

    def check_not_in_writable_block(self, what: str) -> None:
        """RuntimeError inside a `writable` block of this thread: the values are incomplete."""
        if self._open and self.in_writable_block:
            raise RuntimeError(f"{what}: not inside a writable() block; end the block first")

    def update(self, values: Mapping[str, Any]) -> None:
        """Overwrite parameters with arrays on their backend, all or none; dtypes are converted.

        :param values: arrays of the parameters' shapes, by name; other parameters do not change.
        :raises KeyError, TypeError, ValueError: a name, a backend or a shape does not match.
        """
        self._check(values)
        with self.backend.activate():
            self._assign({name: value.copy() for name, value in values.items()})  # they may overlap

    def write(self, values: Mapping[str, np.ndarray]) -> None:
        """Overwrite parameters with arrays on the host, as `update` does."""
        host = {n: asarray(value, backend="numpy", dtype=self.dtype) for n, value in values.items()}
        arrays = {name: self.backend.from_host(array) for name, array in host.items()}
        self._check(arrays)
        self._assign(arrays)

    def _check(self, values: Mapping[str, Any]) -> None:
        for name, value in values.items():
            if not self.backend.owns(value):
                kind = type(value).__name__
                raise TypeError(
                    f"parameter {name!r}: expected an array on {self.backend.name!r}, got {kind}"
                )
            if value.shape != self._shape_of(name):
                raise ValueError(
                    f"parameter {name!r}: expected shape {self.shapes[name]}, got {value.shape}"
                )

    def _assign(self, values: Mapping[str, Array]) -> None:
        with self.writable() as flat, self.backend.activate():
            arrays = views(flat, self.shapes)
            for name, value in values.items():
                arrays[name][...] = value

    def draw(self, seed: int, bound: float) -> None:
        """Draw all from uniform(-bound, bound), on the host: the same values on every backend."""
        rng = np.random.Generator(np.random.PCG64(seed))
        self.write({n: rng.uniform(-bound, bound, shape) for n, shape in self.shapes.items()})

    def _shape_of(self, name: str) -> tuple[int, ...]:
        if name not in self.shapes:
            raise KeyError(f"parameter {name!r}: expected one of {', '.join(self.shapes)}")
        return self.shapes[name]

    def parts_without(self, names: frozenset[str]) -> list[tuple[int, int]]:
        """The parts [start, stop) of the flat buffer without `names`; adjacent parts are joined."""
        parts: list[tuple[int, int]] = []
        starts = [*self.starts.values()]
        for name, start, stop in zip(self.shapes, starts, starts[1:], strict=False):
            if name in names:
                continue
            if parts and parts[-1][1] == start:
                start = parts.pop()[0]
            parts.append((start, stop))
        return parts

    def __getitem__(self, name: str) -> Array:
        """The parameter `name`, read-only."""
        return self._arrays[name]

    def __setitem__(self, name: str, value: AnyArray) -> None:
        """Copy an array of the same shape, dtype and device into parameter `name`."""
        shape = self._shape_of(name)
        value = check_array(f"parameter {name!r}", value, self.backend, self.dtype, shape)
        self.update({name: value})

    def __iter__(self) -> Iterator[str]:
        """The names, in torch's order."""
        return iter(self._arrays)

    def __len__(self) -> int:
        """The number of parameters."""
        return len(self._arrays)


class _Owner(Protocol):
    _parameters: Parameters


M = TypeVar("M", bound=_Owner)
P = ParamSpec("P")
R = TypeVar("R")


def reads_parameters(
    method: Callable[Concatenate[M, P], R],
) -> Callable[Concatenate[M, P], R]:
    """Make a method of a module see one version of its parameters, and translate out of memory.

    Other threads that write wait for it; for the errors see `translate_out_of_memory`.
    """

    @wraps(method)
    def reading(module: M, /, *args: P.args, **kwargs: P.kwargs) -> R:
        lock, thread = module._parameters.reading, get_ident()
        readers = lock.readers
        try:  # as `with lock:`, in less time
            readers.add(thread)
            if WRITER in readers:
                lock.wait_for_writers(thread)
            return method(module, *args, **kwargs)
        except (MemoryError, RuntimeError) as error:
            translate(error, method, (module, *args))
            raise
        finally:
            readers.discard(thread)
            if WRITER in readers:
                lock.notify_writers()

    return reading
