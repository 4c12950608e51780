"""What every trainable thing has: parameters, gradients, options, a place, a file."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, ClassVar, Self

import numpy as np

from . import io
from .arguments import split
from .attributes import Options, read_only, set_again, set_by_users, setting_own
from .backend import Array, Backend, asarray, get_backend, to_numpy
from .checks import (
    as_numpy_floats,
    check_dtype,
    check_flag,
    range_errors,
    shortened,
    state_errors,
)
from .memory import frees_memory
from .parameters import Gradients, Parameters, Shapes, reads_parameters
from .records import Records

# What a module is without the attributes that users set: the first part of its state.
CORE = ("options", "place", "training", "extra", "version", "parameters", "grads")


class Module:
    """The base of layers, cells and read-outs.

    `options` are the constructor's arguments that say what the module is (JSON values); the
    module's file holds them, the parameters and what `_extra` gives, a copy the gradients and
    the mode too. A subclass's constructor is one call of `_begin`.

    A user's subclass is copied and pickled as any Python object is: without a call of its
    constructor, with all attributes that were set, modules among them. `copy.copy` shares these
    and copies the module's own arrays; `copy.deepcopy` copies all. A file that `save` writes does
    not hold them.

    Threads: any number may call a module in eval mode, copy it, save it and read its `state_dict`,
    each stepper in one of them, while others write its parameters, in any of the ways there are.
    A write waits for the calls that run, and calls wait for the write, so that each call uses the
    parameters of one version; inside a `writable()` block do not wait for another thread's call.
    Views such as `parameters[name]` change while they are written. Recorded calls, `backward`,
    `grads`, `train`, `eval` and `freeze` are for one thread at a time, and `to` for one while no
    other uses the module. On a GPU this orders what is put on one stream; threads with streams of
    their own synchronise before they write.
    """

    _kinds: ClassVar[dict[str, type[Module]]] = {}
    _many_records: ClassVar[int | None] = None  # that wait, when a line is logged
    _own: frozenset[str] = frozenset()  # the names of the attributes that no user has set

    backend: Backend = read_only(
        "backend", "Where the module computes.", "move the module with to()"
    )
    dtype: np.dtype[Any] = read_only(
        "dtype", "Of parameters, gradients and results.", "change it with to(dtype=...)"
    )
    parameters: Parameters = read_only(
        "parameters",
        "The parameters by name, written only through `parameters[name] = array` and the like.",
        "write parameters[name] = array, or load_state_dict(mapping)",
    )
    grads: Gradients = read_only(
        "grads",
        "The gradients by name, accumulated by `backward`.",
        "write grads[name][...] = array",
    )
    frozen: frozenset[str] = read_only(
        "frozen",
        "The names of the parameters that get no gradient and that optimisers leave alone.",
        "use freeze(name) and unfreeze(name)",
    )

    _options: dict[str, Any]
    _set_up: Callable[..., None]  # builds it from options and place; its parameters are zero
    _bound: Callable[[], float]  # of the parameters that are drawn

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise TypeError(f"{type(self).__name__} is not built itself; use one of its subclasses")

    def __init_subclass__(cls, **arguments: Any) -> None:
        """Make xprnn's own modules loadable by name."""
        super().__init_subclass__(**arguments)
        if cls.__module__.startswith(f"{__package__}.") and not cls.__name__.startswith("_"):
            Module._kinds[cls.__name__] = cls

    @frees_memory
    def _build(
        self, shapes: Shapes, options: dict[str, Any], backend: str | None, dtype: Any
    ) -> None:
        """Allocate zero parameters and gradients."""
        self._options = options
        self._backend: Backend = get_backend(backend)
        self._dtype = check_dtype(dtype)
        parameters = Parameters(self._backend, self._dtype, shapes)
        grads = Gradients(self._backend, self._dtype, shapes)
        self._parameters, self._grads = parameters, grads
        self._training = False
        self._frozen: frozenset[str] = frozenset()
        self._records = Records(self._many_records)
        self._moved()

    @property
    def options(self) -> Options:
        """The constructor's arguments that say what the module is, JSON values; only read."""
        return Options(self._options)

    @property
    def training(self) -> bool:
        """Whether calls are recorded for `backward`: True after `train()`, False after `eval()`."""
        return self._training

    @training.setter
    def training(self, value: bool) -> None:
        self._training = check_flag("training", value)

    def _begin(self, options: dict[str, Any], *place: Any, **more: Any) -> None:
        """Set up and draw the parameters: a constructor."""
        self._prepare(options, *place, **more)
        self._draw()

    def _prepare(self, options: Mapping[str, Any], *place: Any, **more: Any) -> None:
        """Set up, and note which attributes are the module's own."""
        with setting_own(self):
            self._set_up(options, *place, **more)

    def _draw(self) -> None:
        """Fill the parameters with what they begin with."""
        self.parameters.draw(self._options["seed"], self._bound())

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

    @reads_parameters
    def state_dict(self) -> dict[str, Array]:
        """Copies of all parameters by name, on the module's backend."""
        with self.backend.activate():
            return {name: array.copy() for name, array in self.parameters.items()}

    def load_state_dict(self, mapping: Mapping[str, Any]) -> None:
        """Overwrite all parameters from NumPy, CuPy or torch arrays of any floating dtype.

        Those of ml_dtypes, as bfloat16, are floating dtypes too.

        :raises TypeError: `mapping` is not a mapping.
        :raises ValueError: names are missing or unexpected, shapes or dtypes do not fit, or
            values leave the range of the dtype; the first are listed and nothing is changed.
        """
        if isinstance(mapping, (str, os.PathLike)):
            raise TypeError(f"mapping: expected names and arrays, got {io.described(mapping)}")
        if not isinstance(mapping, Mapping):
            raise TypeError(
                f"mapping: expected names and arrays, got {type(mapping).__name__}; "
                "a layer's are its state_dict()"
            )
        values = {str(n): as_numpy_floats(to_numpy(value)) for n, value in mapping.items()}
        wrong = state_errors(self.parameters.shapes, values)
        beyond = [e for n, v in values.items() if not wrong for e in range_errors(n, v, self.dtype)]
        if wrong := wrong or shortened(beyond):
            raise ValueError(f"state of {type(self).__name__}: " + "; ".join(wrong))
        self.parameters.write(values)

    def train(self) -> Self:
        """From here on calls are recorded for `backward`."""
        self._training = True
        return self

    def eval(self) -> Self:
        """From here on calls are not recorded; records left are dropped."""
        self._training = False
        self._records.clear()
        return self

    @property
    def recorded_calls(self) -> int:
        """How many recorded calls wait for `backward`, each with its memory.

        One made before the parameters changed cannot be used and is not counted; its memory is
        free again when the next call is recorded.
        """
        return self._records.waiting(self.parameters.version)

    def _prepare_record(self) -> None:
        """Before a call is recorded: drop the memory of records that cannot be used any more."""
        self._parameters.refuse_open("a recorded call")
        self._records.drop_older(self._parameters.version)

    def _record(self, record: Any) -> None:
        """Add the record of a call, which has the `version` of its parameters."""
        self._records.add(record, type(self).__name__)

    def _last_record(self) -> Any:
        """The record that `backward` would undo; RuntimeError if none can be."""
        return self._records.last(type(self).__name__, self._parameters)

    def to(self, backend: str | None = None, *, dtype: Any = None) -> Self:
        """Move the module in place, parameters and gradients; None leaves backend or dtype.

        :raises RuntimeError: recorded calls are waiting for `backward`.
        :raises ValueError, BackendUnavailableError: as `get_backend`; nothing is changed.
        """
        if self.recorded_calls:
            raise RuntimeError(
                f"to: {self.recorded_calls} recorded calls wait for backward(); call it for "
                "each, or drop them with eval() first"
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
        self._backend, self._dtype = target, wanted
        self._parameters, self._grads = parameters, grads
        self._records.drop_older(parameters.version)
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
        with self.parameters.reading:
            arrays = self._host_copies(self.parameters)
        options = {**self._options, "dtype": self.dtype.name, "extra": self._extra()}
        # a user's subclass is saved as what it is derived from
        kind = next(base for base in type(self).__mro__ if base in Module._kinds.values())
        io.write(path, kind.__name__, options, arrays)

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, backend: str | None = None) -> Self:
        """The module that a file holds, in eval mode.

        :param backend: where to put it; as for `get_backend`.
        :raises FileNotFoundError: there is no such file.
        :raises ValueError: the file is not one that xprnn wrote, is damaged, is of another
            version or does not hold a `cls`. Nothing in it is executed.
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
            module._prepare(arguments, **place)
            module._restore(extra)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{os.fspath(path)}: does not make a {kind}: {error}") from error
        module.parameters.write(arrays)
        return module

    @classmethod
    def _shapes(cls, options: Mapping[str, Any]) -> Shapes:
        """The parameters that a module with these options has."""
        raise NotImplementedError

    @reads_parameters
    def __getstate__(self) -> dict[str, Any]:
        """Options, place, host copies of parameters and gradients, and what users set; no records.

        What users set, `attributes` and what is in `slots`, is given as it is.
        """
        return {
            "options": dict(self._options),
            "place": self._place(),
            "training": self._training,
            "extra": self._extra(),
            "version": self.parameters.version,
            "parameters": self._host_copies(self.parameters),
            "grads": self._host_copies(self.grads),
            **set_by_users(self),
        }

    def __reduce__(self) -> tuple[Any, ...]:
        """Rebuild the module first: attributes that refer to it come after."""
        state = core = self.__getstate__()  # a user's own, perhaps
        if not isinstance(state, dict) or not state.keys() >= set(CORE):
            core = Module.__getstate__(self)
        if isinstance(state, dict):
            own = {*CORE, *self._own}
            state = {name: value for name, value in state.items() if name not in own}
        return _rebuilt, (type(self), {name: core[name] for name in CORE}), state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Set what users set; a module that is not built yet is built first."""
        if state.keys() >= set(CORE):  # as xprnn 0.1.0 pickled it: all in one
            self._fill(state)
        set_again(self, {name: value for name, value in state.items() if name not in CORE})

    def _fill(self, state: Mapping[str, Any]) -> None:
        """Build the module on its backend and fill it."""
        self._prepare(state["options"], **state["place"])
        self.parameters.write(state["parameters"])
        grads = {n: self.backend.from_host(array) for n, array in state["grads"].items()}
        self._grads.update(grads)
        self.parameters.version = state["version"]
        self._training = state["training"]
        self._restore(state["extra"])

    def __repr__(self) -> str:
        """The constructor's call."""
        arguments = {**self._options, **self._place()}
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in arguments.items())})"


def _rebuilt(kind: type[Module], state: Mapping[str, Any]) -> Module:
    """A module from the first part of its state, without what users set."""
    module = kind.__new__(kind)
    module._fill(state)
    return module


def load(path: str | os.PathLike[str], *, backend: str | None = None) -> Any:
    """The layer, cell or read-out that a file holds: `Module.load` for any of them.

    >>> import tempfile, pathlib, xprnn
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = pathlib.Path(folder) / "gru.safetensors"
    ...     xprnn.GRU(3, 4, seed=0).save(path)
    ...     xprnn.load(path).hidden_size
    4
    """
    return Module.load(path, backend=backend)
