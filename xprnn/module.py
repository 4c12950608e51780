"""What every trainable thing has: parameters, gradients, options, a place, a file."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, ClassVar, Self

import numpy as np

from . import io
from .arguments import split
from .backend import Array, Backend, asarray, get_backend, to_numpy
from .checks import check_dtype, range_errors, state_errors
from .memory import frees_memory
from .parameters import Gradients, Parameters, Shapes
from .records import Records


class Module:
    """The base of layers, cells and read-outs.

    `options` are the constructor's arguments that say what the module is (JSON values); the
    module's file holds them, the parameters and what `_extra` gives, a copy the gradients and
    the mode too. A subclass's constructor is one call of `_begin`.
    """

    _kinds: ClassVar[dict[str, type[Module]]] = {}

    options: dict[str, Any]
    training: bool
    _set_up: Callable[..., None]  # builds it from options and place; its parameters are zero
    _bound: Callable[[], float]  # of the parameters that are drawn

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise TypeError(f"{type(self).__name__} is not built itself; use one of its subclasses")

    def __init_subclass__(cls) -> None:
        """Make xprnn's own modules loadable by name."""
        if cls.__module__.startswith(f"{__package__}.") and not cls.__name__.startswith("_"):
            Module._kinds[cls.__name__] = cls

    @frees_memory
    def _build(
        self, shapes: Shapes, options: dict[str, Any], backend: str | None, dtype: Any
    ) -> None:
        """Allocate zero parameters and gradients."""
        self.options = options
        self.backend: Backend = get_backend(backend)
        self.dtype = check_dtype(dtype)
        parameters = Parameters(self.backend, self.dtype, shapes)
        grads = Gradients(self.backend, self.dtype, shapes)
        self._parameters, self._grads = parameters, grads
        self.training = False
        self._frozen: frozenset[str] = frozenset()
        self._records = Records()
        self._moved()

    @property
    def parameters(self) -> Parameters:
        """The parameters by name, written only through `parameters[name] = array` and the like."""
        return self._parameters

    @property
    def grads(self) -> Gradients:
        """The gradients by name, accumulated by `backward`."""
        return self._grads

    def _begin(self, options: dict[str, Any], *place: Any, **more: Any) -> None:
        """Set up and draw the parameters: a constructor."""
        self._set_up(options, *place, **more)
        self.parameters.draw(self.options["seed"], self._bound())

    def writable(self) -> AbstractContextManager[Array]:
        """The flat parameter buffer (1-D, the module's dtype), writable inside the block.

        It is how an optimiser writes. After the block the buffer raises ValueError when it is
        written (on NumPy); a view cut from it cannot be taken back and must not be written.

        >>> import xprnn
        >>> layer = xprnn.RNN(2, 3, seed=0)
        >>> with layer.writable() as flat:
        ...     flat *= 0.5
        """
        return self.parameters.writable()

    def zero_grad(self) -> None:
        """Set every gradient to zero."""
        with self.backend.activate():
            self.grads.flat[...] = 0.0

    @property
    def frozen(self) -> frozenset[str]:
        """The names of the parameters that get no gradient and that optimisers leave alone."""
        return self._frozen

    def freeze(self, *names: str) -> None:
        """Freeze parameters by name, all of them if none is named; their gradients become zero.

        :raises KeyError: a name is not a parameter's; nothing is frozen then.
        """
        chosen = self._named(names)
        with self.backend.activate():
            for name in chosen:
                self.grads[name][...] = 0.0
        self._frozen |= chosen

    def unfreeze(self, *names: str) -> None:
        """Undo `freeze` for these names, for all of them if none is named."""
        self._frozen -= self._named(names)

    def _named(self, names: tuple[str, ...]) -> frozenset[str]:
        known = list(self.parameters)
        if unknown := [str(name) for name in names if name not in known]:
            raise KeyError(f"no parameter named {', '.join(unknown)}; there are {', '.join(known)}")
        return frozenset(names or self.parameters)

    def trainable(self) -> list[tuple[int, int]]:
        """The parts [start, stop) of the flat buffers that are not frozen."""
        return self.parameters.parts_without(self._frozen)

    def _host_copies(self, arrays: Mapping[str, Array]) -> dict[str, np.ndarray]:
        return {name: np.array(self.backend.to_host(array)) for name, array in arrays.items()}

    def state_dict(self) -> dict[str, Array]:
        """Copies of all parameters by name, on the module's backend."""
        with self.backend.activate():
            return {name: array.copy() for name, array in self.parameters.items()}

    def load_state_dict(self, mapping: Mapping[str, Any]) -> None:
        """Overwrite all parameters from NumPy, CuPy or torch arrays of any floating dtype.

        :raises TypeError: `mapping` is not a mapping.
        :raises ValueError: names are missing or unexpected, shapes or dtypes do not fit, or
            values leave the range of the dtype; all are listed and nothing is changed.
        """
        if not isinstance(mapping, Mapping):
            raise TypeError(
                f"mapping: expected names and arrays, got {type(mapping).__name__}; "
                "a layer's are its state_dict()"
            )
        values = {str(name): to_numpy(value) for name, value in mapping.items()}
        wrong = state_errors(self.parameters.shapes, values)
        if wrong := wrong or [e for n, v in values.items() for e in range_errors(n, v, self.dtype)]:
            raise ValueError(f"state of {type(self).__name__}: " + "; ".join(wrong))
        self.parameters.write(values)

    def train(self) -> Self:
        """From here on calls are recorded for `backward`."""
        self.training = True
        return self

    def eval(self) -> Self:
        """From here on calls are not recorded; records left are dropped."""
        self.training = False
        self._records.clear()
        return self

    def _last_record(self) -> Any:
        """The record that `backward` would undo; RuntimeError if none can be."""
        return self._records.last(type(self).__name__, self._parameters)

    def to(self, backend: str | None = None, *, dtype: Any = None) -> Self:
        """Move the module in place, parameters and gradients; None leaves backend or dtype.

        :raises RuntimeError: recorded calls are waiting for `backward`.
        :raises ValueError, BackendUnavailableError: as `get_backend`; nothing is changed.
        """
        if self._records:
            raise RuntimeError(
                f"to: {len(self._records)} recorded calls wait for backward(); undo them or "
                "drop them with eval() first"
            )
        self.parameters.refuse_open("to")
        target = self.backend if backend is None else get_backend(backend)
        wanted = self.dtype if dtype is None else check_dtype(dtype)
        shapes = self.parameters.shapes
        parameters = Parameters(target, wanted, shapes)
        grads = Gradients(target, wanted, shapes)
        for new, old in ((parameters, self.parameters), (grads, self.grads)):
            new.update({n: asarray(a, backend=target.name, dtype=wanted) for n, a in old.items()})
        parameters.version = self.parameters.version + 1
        self.parameters.retire()
        self.backend, self.dtype = target, wanted
        self._parameters, self._grads = parameters, grads
        self._moved()
        return self

    def _moved(self) -> None:
        """Drop what depends on the place."""

    def _place(self) -> dict[str, Any]:
        """The constructor's arguments that say where, in which types and how it computes."""
        return {"backend": self.backend.name, "dtype": self.dtype.name}

    def _extra(self) -> dict[str, Any]:
        """What a copy must keep beside options and parameters (JSON values)."""
        return {"frozen": sorted(self._frozen)}

    def _restore(self, extra: Mapping[str, Any]) -> None:
        """Take back what `_extra` gave."""
        frozen = extra["frozen"]
        if not isinstance(frozen, list):
            raise TypeError(f"frozen: expected a list of names, got {frozen!r}")
        self._frozen = self._named(tuple(frozen)) if frozen else frozenset()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write parameters and options to a safetensors file, whole or not at all.

        Where and how a layer computes, `precision`, `compute_dtype` and `recompute`, is not in it.
        A file that is replaced keeps its mode, and through a symbolic link its target is replaced.

        :raises OSError: the file cannot be written, or is there and read-only.
        """
        arrays = self._host_copies(self.parameters)
        options = {**self.options, "dtype": self.dtype.name, "extra": self._extra()}
        # a user's subclass is saved as what it is derived from
        kind = next(base for base in type(self).__mro__ if base in Module._kinds.values())
        io.write(path, kind.__name__, options, arrays)

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, backend: str | None = None) -> Self:
        """The module that a file holds, in eval mode.

        :param backend: where to put it; as for `get_backend`.
        :raises FileNotFoundError: there is no such file.
        :raises ValueError: the file is not one that xprnn wrote, is damaged, is of another
            version or does not hold a `cls`.
        """
        backend = get_backend(backend).name
        kind, options, arrays = io.read(path)
        found = Module._kinds.get(kind)
        if found is None or not issubclass(found, cls):
            raise ValueError(f"{os.fspath(path)}: holds a {kind!r}, expected a {cls.__name__}")
        try:
            extra = options.pop("extra")
            if options.get("num_layers", 0) > len(arrays):
                raise ValueError(f"{options['num_layers']} layers with {len(arrays)} arrays")
            # before a module of the size that the header states is allocated
            if wrong := state_errors(found._shapes(options), arrays):
                raise ValueError("; ".join(wrong))
            arguments, place = split(found, backend=backend, **options)
            module = found.__new__(found)
            module._set_up(arguments, **place)
            module._restore(extra)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{os.fspath(path)}: does not make a {kind}: {error}") from error
        module.parameters.write(arrays)
        return module

    @classmethod
    def _shapes(cls, options: Mapping[str, Any]) -> Shapes:
        """The parameters that a module with these options has."""
        raise NotImplementedError

    def __getstate__(self) -> dict[str, Any]:
        """Options, place and host copies of parameters and gradients; no records."""
        return {
            "options": self.options,
            "place": self._place(),
            "training": self.training,
            "extra": self._extra(),
            "version": self.parameters.version,
            "parameters": self._host_copies(self.parameters),
            "grads": self._host_copies(self.grads),
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Build the module anew on its backend and fill it."""
        self._set_up(state["options"], **state["place"])
        self.parameters.write(state["parameters"])
        grads = {n: self.backend.from_host(array) for n, array in state["grads"].items()}
        self._grads.update(grads)
        self.parameters.version = state["version"]
        self.training = state["training"]
        self._restore(state["extra"])

    def __copy__(self) -> Self:
        """A deep copy: two modules never share a buffer."""
        return copy.deepcopy(self)

    def __repr__(self) -> str:
        """The constructor's call."""
        arguments = {**self.options, **self._place()}
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in arguments.items())})"


def load(path: str | os.PathLike[str], *, backend: str | None = None) -> Any:
    """The layer, cell or read-out that a file holds: `Module.load` for any of them.

    >>> import tempfile, pathlib, xprnn
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = pathlib.Path(folder) / "gru.safetensors"
    ...     xprnn.GRU(3, 4, seed=0).save(path)
    ...     xprnn.load(path).options["hidden_size"]
    4
    """
    return Module.load(path, backend=backend)
