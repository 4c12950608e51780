"""The base of layers, cells, embeddings and linear layers: parameters, gradients, modes, files."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar, Self, TypeVar

import numpy as np
from numpy.typing import ArrayLike

from ..backend import (
    AnyArray,
    AnyDTypeLike,
    Array,
    Backend,
    BackendName,
    DTypeLike,
    asarray,
    get_backend,
    to_numpy,
)
from ..backend.exports import exported_from
from ..cells.definition import Definition
from ..core.checks import (
    as_numpy_floats,
    check_dtype,
    check_flag,
    range_errors,
    shortened,
    state_errors,
)
from ..core.oom import translate_out_of_memory
from . import serialization as io
from .arguments import split
from .attributes import (
    Options,
    internal_attributes,
    read_only,
    restore_user_attributes,
    user_attributes,
)
from .parameters import Gradients, Parameters, Shapes, reads_parameters
from .recorded_calls import RecordedCalls

# The keys of a module's pickled state, without users' attributes; pickles contain these names.
# "place" holds the execution options
CORE = ("options", "place", "training", "extra", "version", "parameters", "grads")

FILE_KINDS: dict[str, type[Module]] = {}  # by the names that files hold; see `file_kind`
M = TypeVar("M", bound="Module")


class Module:
    """The base of layers, cells, embeddings and linear layers.

    `options` are the constructor's arguments that define the module (JSON values). The module's
    file holds them, the parameters and the result of `_extra_state`; a copy holds the gradients
    and the mode as well. A subclass's constructor is one call of `_construct`.

    Users' subclasses are copied and pickled like other Python objects: without a call of their
    constructor, with all attributes that were set, including modules. `copy.copy` shares these
    and copies the module's own arrays; `copy.deepcopy` copies all. `save` does not write them.

    Thread safety: any number of threads may call a module in eval mode, copy it, save it and read
    its `state_dict`, and step (each stepper in one thread), while others write its parameters in
    any way. A write waits for the calls in progress, and calls wait for the write, so each call
    uses the parameters of one version. Inside a `writable()` block do not wait for another
    thread's call. Views such as `parameters[name]` change during a write. Recorded calls,
    `backward`, `grads`, `train`, `eval` and `freeze` are for one thread at a time, and `to` for one
    thread while no other uses the module. On a GPU this holds for work on one stream; threads
    with streams of their own must synchronise before they write.
    """

    _kind: ClassVar[str]  # in the files of this class and of its users' subclasses
    _warn_at_calls: ClassVar[int | None] = None  # recorded calls that wait for `backward`
    _internal: frozenset[str] = frozenset()  # the names of attributes not set by users

    backend: Backend = read_only(
        "backend", "The array module and device of the module.", "move the module with to()"
    )
    dtype: np.dtype[Any] = read_only(
        "dtype", "The dtype of parameters, gradients and results.", "change it with to(dtype=...)"
    )
    parameters: Parameters = read_only(
        "parameters",
        "The parameters by name, written only by assignment and by methods of the module.",
        "write parameters[name] = array, or load_state_dict(mapping)",
    )
    grads: Gradients = read_only(
        "grads",
        "The gradients by name, to which `backward` adds.",
        "write grads[name][...] = array",
    )
    frozen: frozenset[str] = read_only(
        "frozen",
        "The names of the parameters that get no gradient and are not updated by optimisers.",
        "use freeze(name) and unfreeze(name)",
    )

    _options: dict[str, Any]
    _configure: Callable[..., None]  # checks all options and calls `_allocate`
    _bound: Callable[[], float]  # of the distribution of initial parameters

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise TypeError(f"{type(self).__name__} is a base class; use one of its subclasses")

    @translate_out_of_memory
    def _allocate(
        self, shapes: Shapes, options: dict[str, Any], backend: BackendName | None, dtype: Any
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
        self._records = RecordedCalls(self._warn_at_calls)
        self._backend_changed()

    @property
    def xp(self) -> Any:
        """The array module of `backend`: `numpy` on the CPU, `cupy` on a GPU.

        A program that calls its functions runs on every backend without a change.

        >>> import xprnn
        >>> layer = xprnn.RNN(2, 3, backend="numpy", seed=0)
        >>> layer.xp.zeros(2)
        array([0., 0.])
        """
        return self.backend.xp

    def asarray(self, value: ArrayLike | AnyArray, dtype: AnyDTypeLike | None = None) -> Array:
        """The values of any array on the module's backend, as its calls accept them.

        This is `xprnn.asarray` for the backend of the module, and copies as little.

        :param value: NumPy, CuPy, torch or JAX array of any shape, or nested numbers.
        :param dtype: None: the module's for floating-point numbers; indices, masks and other
            values keep theirs.
        :return: the array, of the shape of `value`; `value` itself if nothing changes.
        :raises TypeError: `value` has a mask.

        >>> import xprnn
        >>> layer = xprnn.RNN(2, 3, backend="numpy", seed=0)
        >>> layer.asarray([[[0.5, 1.0]]]).dtype, layer.asarray([3, 1]).dtype
        (dtype('float32'), dtype('int64'))
        """
        array = asarray(value, backend=self.backend.name, dtype=dtype)
        if dtype is None and array.dtype.kind in "fV":  # "V": bfloat16
            return asarray(array, backend=self.backend.name, dtype=self.dtype)
        return array

    @property
    def options(self) -> Options:
        """The constructor's arguments that define the module, JSON values; read-only."""
        return Options(self._options)

    @property
    def training(self) -> bool:
        """Whether calls are recorded for `backward`: True after `train()`, False after `eval()`."""
        return self._training

    @training.setter
    def training(self, value: bool) -> None:
        self._training = check_flag("training", value)

    def _construct(self, options: dict[str, Any], *execution: Any, **more: Any) -> None:
        """Construct the module and draw its parameters."""
        self._construct_zeroed(options, *execution, **more)
        self._draw()

    def _construct_zeroed(self, options: Mapping[str, Any], *execution: Any, **more: Any) -> None:
        """Construct the module with zero parameters, and note its internal attributes."""
        with internal_attributes(self):
            self._configure(options, *execution, **more)

    def _draw(self) -> None:
        """Draw the initial parameters."""
        self.parameters.draw(self._options["seed"], self._bound())

    def writable(self) -> AbstractContextManager[Array]:
        """The flat parameter buffer (1-D, the module's dtype), writable inside the block.

        Optimisers write in this way. After the block, writing the buffer raises ValueError (on
        NumPy); views of it remain writable, but must not be written.

        :return: a context manager of the buffer, in which each parameter begins on a 64-byte
            boundary, in the order of `parameters`.
        :raises RuntimeError: at the start of the block, the module was moved after this call.

        >>> import xprnn
        >>> layer = xprnn.RNN(2, 3, seed=0)
        >>> with layer.writable() as flat:
        ...     flat *= 0.5
        """
        return self.parameters.writable()

    def zero_grad(self) -> None:
        """Set every gradient to zero.

        >>> import xprnn
        >>> linear = xprnn.Linear(2, 1, backend="numpy", seed=0)
        >>> linear.grads["weight"][...] = 5.0
        >>> linear.zero_grad()
        >>> linear.grads["weight"].tolist()
        [[0.0, 0.0]]
        """
        with self.backend.activate():
            self.grads.flat[...] = 0.0

    def freeze(self, *names: str) -> None:
        """Freeze the named parameters, or all without names; their gradients become zero.

        :param names: keys of `parameters`.
        :raises KeyError: there is no parameter of this name; nothing is frozen.

        >>> import xprnn
        >>> linear = xprnn.Linear(2, 1, backend="numpy", seed=0)
        >>> linear.freeze("bias")
        >>> sorted(linear.frozen)
        ['bias']
        """
        selected = self._check_names(names)
        with self.backend.activate():
            for name in selected:
                self.grads[name][...] = 0.0
        self._frozen |= selected

    def unfreeze(self, *names: str) -> None:
        """Unfreeze the named parameters, or all without names.

        :param names: keys of `parameters`, frozen or not.
        :raises KeyError: there is no parameter of this name; nothing is changed.

        >>> import xprnn
        >>> linear = xprnn.Linear(2, 1, backend="numpy", seed=0)
        >>> linear.freeze()
        >>> linear.unfreeze("weight")
        >>> sorted(linear.frozen)
        ['bias']
        """
        self._frozen -= self._check_names(names)

    def _check_names(self, names: tuple[str, ...]) -> frozenset[str]:
        known = list(self.parameters)
        if unknown := [str(name) for name in names if name not in known]:
            raise KeyError(f"no parameter named {', '.join(unknown)}; there are {', '.join(known)}")
        return frozenset(names or self.parameters)

    def trainable(self) -> list[tuple[int, int]]:
        """The parts [start, stop) of the flat buffers that are not frozen.

        :return: positions in `parameters.flat` and `grads.flat`, ascending, with the padding after
            each parameter; adjacent parts are joined.

        >>> import xprnn
        >>> linear = xprnn.Linear(2, 1, backend="numpy", seed=0)
        >>> linear.trainable()
        [(0, 32)]
        >>> linear.freeze("weight")
        >>> linear.trainable()
        [(16, 32)]
        """
        return self.parameters.parts_without(self._frozen)

    def _host_copies(self, arrays: Mapping[str, Array]) -> dict[str, np.ndarray]:
        return {name: np.array(self.backend.to_host(array)) for name, array in arrays.items()}

    @reads_parameters
    def state_dict(self) -> dict[str, Array]:
        """Copies of all parameters by name, on the module's backend.

        :return: arrays of the parameters' shapes and dtype, in torch's order.
        :raises MemoryError: there is not enough memory for the copies.

        >>> import xprnn
        >>> linear = xprnn.Linear(2, 1, backend="numpy", seed=0)
        >>> state = linear.state_dict()
        >>> {name: array.shape for name, array in state.items()}
        {'weight': (1, 2), 'bias': (1,)}
        >>> other = xprnn.Linear(2, 1, backend="numpy", seed=1)
        >>> other.load_state_dict(state)
        >>> bool((other.parameters["weight"] == state["weight"]).all())
        True
        """
        with self.backend.activate():
            return {name: array.copy() for name, array in self.parameters.items()}

    def load_state_dict(self, mapping: Mapping[str, AnyArray]) -> None:
        """Overwrite all parameters, from a state of a module of the same sizes.

        :param mapping: for each name in `parameters` an array of the parameter's shape: of NumPy,
            CuPy or torch, in any real floating dtype, also those of ml_dtypes, such as bfloat16.
            Values are converted to the module's dtype.
        :raises TypeError: `mapping` is not a mapping, or an array has a mask; nothing is changed.
        :raises ValueError: names are missing or unexpected, shapes or dtypes do not match, or
            values overflow; the message lists the first ones, and nothing is changed.

        >>> import numpy as np, xprnn
        >>> linear = xprnn.Linear(2, 1, backend="numpy", seed=0)
        >>> linear.load_state_dict({"weight": np.ones((1, 2)), "bias": np.zeros(1)})
        >>> linear.parameters["weight"]
        array([[1., 1.]], dtype=float32)
        """
        if isinstance(mapping, (str, os.PathLike)):
            raise TypeError(f"mapping: expected names and arrays, got {io.describe_path(mapping)}")
        if not isinstance(mapping, Mapping):
            raise TypeError(
                f"mapping: expected names and arrays, got {type(mapping).__name__}; "
                "a layer's are its state_dict()"
            )
        values = {str(n): as_numpy_floats(to_numpy(value)) for n, value in mapping.items()}
        errors = state_errors(self.parameters.shapes, values)
        if not errors:
            lines = [e for n, v in values.items() for e in range_errors(n, v, self.dtype)]
            errors = shortened(lines)
        if errors:
            raise ValueError(f"state of {type(self).__name__}: " + "; ".join(errors))
        self.parameters.write(values)

    def train(self) -> Self:
        """Switch to train mode, in which calls are recorded for `backward`.

        :return: the module itself.

        >>> import xprnn
        >>> linear = xprnn.Linear(2, 1, backend="numpy", seed=0)
        >>> linear.training, linear.train().training
        (False, True)
        """
        self._training = True
        return self

    def eval(self) -> Self:
        """Switch to eval mode, in which calls are not recorded, and drop recorded calls.

        :return: the module itself.

        >>> import numpy as np, xprnn
        >>> linear = xprnn.Linear(2, 1, backend="numpy", seed=0).train()
        >>> y = linear(np.ones((3, 2), np.float32))
        >>> linear.recorded_calls, linear.eval().recorded_calls
        (1, 0)
        """
        self._training = False
        self._records.clear()
        return self

    @property
    def recorded_calls(self) -> int:
        """The number of recorded calls that wait for `backward`, each with its memory.

        Calls recorded before the parameters changed are unusable and are not counted; their memory
        is released when the next call is recorded.
        """
        return self._records.waiting(self.parameters.version)

    def _prepare_record(self) -> None:
        """Before a call is recorded, drop recorded calls that can no longer be used."""
        self._parameters.check_not_in_writable_block("a recorded call")
        self._records.drop_older(self._parameters.version)

    def _record(self, record: Any) -> None:
        """Add a recorded call, which has the `version` of its parameters."""
        self._records.add(record, type(self).__name__)

    def _last_record(self) -> Any:
        """The recorded call that `backward` uses next; RuntimeError if there is none."""
        return self._records.last(type(self).__name__, self._parameters)

    def to(self, backend: BackendName | None = None, *, dtype: DTypeLike | None = None) -> Self:
        """Move parameters and gradients, in place; None keeps the backend or the dtype.

        An optimiser built before the move cannot be used after it.

        :param backend: "numpy", "cupy", "cupy:N" or "auto", as for `xprnn.get_backend`.
        :param dtype: "float32" or "float64", to which all values are converted.
        :return: the module itself.
        :raises RuntimeError: recorded calls are waiting for `backward`, or it is called inside a
            `writable()` block.
        :raises TypeError, ValueError, BackendUnavailableError: `backend` or `dtype` is invalid, or
            the backend cannot be used; nothing is changed.

        >>> import xprnn
        >>> linear = xprnn.Linear(2, 1, backend="numpy", seed=0)
        >>> linear.to(dtype="float64").parameters["weight"].dtype
        dtype('float64')
        """
        if self.recorded_calls:
            raise RuntimeError(
                f"to: {self.recorded_calls} recorded calls wait for backward(); call it for "
                "each, or drop them with eval() first"
            )
        self.parameters.check_not_in_writable_block("to")
        target = self.backend if backend is None else get_backend(backend)
        target_dtype = self.dtype if dtype is None else check_dtype(dtype)
        shapes = self.parameters.shapes
        parameters = Parameters(target, target_dtype, shapes)
        grads = Gradients(target, target_dtype, shapes)
        for new, old in ((parameters, self.parameters), (grads, self.grads)):
            new.update(
                {n: asarray(a, backend=target.name, dtype=target_dtype) for n, a in old.items()}
            )
        parameters.version = self.parameters.version + 1
        self.parameters.retire()
        self._backend, self._dtype = target, target_dtype
        self._parameters, self._grads = parameters, grads
        self._records.drop_older(parameters.version)
        self._backend_changed()
        return self

    def _backend_changed(self) -> None:
        """Called when backend or dtype are set: recreate what depends on them."""

    def _execution_options(self) -> dict[str, Any]:
        """The constructor's arguments that define backend, dtypes and the way of computing."""
        return {"backend": self.backend.name, "dtype": self.dtype.name}

    def _extra_state(self) -> dict[str, Any]:
        """State of copies and files besides options and parameters (JSON values)."""
        return {"frozen": sorted(self._frozen)}

    def _restore_extra_state(self, extra: Mapping[str, Any]) -> None:
        """Set what `_extra_state` returned."""
        frozen = extra["frozen"]
        if not isinstance(frozen, list):
            raise TypeError(f"frozen: expected a list of names, got {frozen!r}")
        self._frozen = self._check_names(tuple(frozen)) if frozen else frozenset()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write parameters and options to a safetensors file, atomically.

        `backend`, `precision`, `compute_dtype` and `recompute` are not written. A replaced file
        keeps its mode; if `path` is a symbolic link, its target is replaced.

        :param path: the file; its folder must exist.
        :raises OSError: the file cannot be written, or exists and is read-only.

        >>> import pathlib, tempfile, xprnn
        >>> linear = xprnn.Linear(2, 1, backend="numpy", seed=0)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder) / "linear.safetensors"
        ...     linear.save(path)
        ...     loaded = xprnn.Linear.load(path, backend="numpy")
        >>> bool((loaded.parameters["weight"] == linear.parameters["weight"]).all())
        True
        """
        with self.parameters.reading:
            arrays = self._host_copies(self.parameters)
        options = {**self._file_options(), "dtype": self.dtype.name, "extra": self._extra_state()}
        io.write(path, self._kind, options, arrays)

    def _file_options(self) -> dict[str, Any]:
        """The options as a file contains them, JSON values."""
        return self._options

    @classmethod
    def _options_of_file(
        cls, options: dict[str, Any], cells: Sequence[Definition]
    ) -> dict[str, Any]:
        """The options of a module from what `_file_options` returned."""
        return options

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        backend: BackendName | None = None,
        cells: Sequence[Definition] = (),
    ) -> Self:
        """Load a module from a file, in eval mode; an example is at `save`.

        :param path: a file that `save` wrote.
        :param backend: the backend of the module; as for `xprnn.get_backend`.
        :param cells: definitions of cells, of which a layer of a defined cell needs its own: a file
            has only the name and a hash of the equations, and nothing is imported.
        :return: a module of the class of xprnn that was saved.
        :raises TypeError, ValueError, BackendUnavailableError: `backend` is invalid, or cannot be
            used.
        :raises FileNotFoundError: there is no such file.
        :raises ValueError: the file was not written by xprnn, is damaged, has another version or
            does not hold a `cls`. No content of a file is executed.
        """
        backend = get_backend(backend).name
        kind, options, arrays = io.read(path)
        loaded_class = FILE_KINDS.get(kind)
        if loaded_class is None or not issubclass(loaded_class, cls):
            raise ValueError(f"{os.fspath(path)}: holds a {kind!r}, expected a {cls.__name__}")
        try:
            extra = options.pop("extra")
            options = loaded_class._options_of_file(options, cells)
            if options.get("num_layers", 0) > len(arrays):
                raise ValueError(f"{options['num_layers']} layers with {len(arrays)} arrays")
            # before memory of the size in the header is allocated
            if errors := state_errors(loaded_class._shapes(options), arrays):
                raise ValueError("; ".join(errors))
            arguments, execution = split(loaded_class, backend=backend, **options)
            module = loaded_class.__new__(loaded_class)
            module._construct_zeroed(arguments, **execution)
            module._restore_extra_state(extra)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{os.fspath(path)}: does not make a {kind}: {error}") from error
        module.parameters.write(arrays)
        return module

    @classmethod
    def _shapes(cls, options: Mapping[str, Any]) -> Shapes:
        """The parameters of a module with these options."""
        raise NotImplementedError

    @reads_parameters
    def __getstate__(self) -> dict[str, Any]:
        """Options, host copies of parameters and gradients, and users' attributes.

        Users' `attributes` and `slots` are not copied. Recorded calls are not included.
        """
        return {
            "options": dict(self._options),
            "place": self._execution_options(),
            "training": self._training,
            "extra": self._extra_state(),
            "version": self.parameters.version,
            "parameters": self._host_copies(self.parameters),
            "grads": self._host_copies(self.grads),
            **user_attributes(self),
        }

    def __reduce__(self) -> tuple[Any, ...]:
        """Rebuild the module before its users' attributes, which may refer to it."""
        state = core = self.__getstate__()  # possibly of a user's subclass
        if not isinstance(state, dict) or not state.keys() >= set(CORE):
            core = Module.__getstate__(self)
        if isinstance(state, dict):
            internal = {*CORE, *self._internal}
            state = {name: value for name, value in state.items() if name not in internal}
        return type(self)._rebuilt, ({name: core[name] for name in CORE},), state

    @classmethod
    def _rebuilt(cls, state: Mapping[str, Any]) -> Self:
        """A module from its core state, without users' attributes."""
        module = cls.__new__(cls)
        module._restore_core(state)
        return module

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore users' attributes; build the module first if it is not built yet."""
        if state.keys() >= set(CORE):  # a pickle of xprnn 0.1.0, with everything in one state
            self._restore_core(state)
        users = {name: value for name, value in state.items() if name not in CORE}
        restore_user_attributes(self, users)

    def _restore_core(self, state: Mapping[str, Any]) -> None:
        """Build the module on its backend and restore its core state."""
        self._construct_zeroed(state["options"], **state["place"])
        self.parameters.write(state["parameters"])
        grads = {n: self.backend.from_host(array) for n, array in state["grads"].items()}
        self._grads.update(grads)
        self.parameters.version = state["version"]
        self._training = state["training"]
        self._restore_extra_state(state["extra"])

    def __repr__(self) -> str:
        """The constructor's call."""
        arguments = {**self._options, **self._execution_options()}
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in arguments.items())})"


def _rebuilt(kind: type[Module], state: Mapping[str, Any]) -> Module:
    """A module from its core state: the function that pickles of xprnn 0.1.0 name."""
    return kind._rebuilt(state)


def file_kind(name: str) -> Callable[[type[M]], type[M]]:
    """Register a class of modules under the name that its files contain."""

    def register(kind: type[M]) -> type[M]:
        FILE_KINDS[name] = kind
        kind._kind = name
        return kind

    return register


@exported_from("xprnn")
def load(
    path: str | os.PathLike[str],
    *,
    backend: BackendName | None = None,
    cells: Sequence[Definition] = (),
) -> Any:
    """Load a layer, cell, embedding or linear layer from a file, in eval mode.

    :param path: a file that a module's `save` wrote.
    :param backend: the backend of the module; as for `get_backend`.
    :param cells: definitions of cells, of which a layer of a defined cell needs its own: a file has
        only the name and a hash of the equations, and nothing is imported.
    :return: a module of the class of xprnn that was saved.
    :raises TypeError, ValueError, BackendUnavailableError: `backend` is invalid, or cannot be used.
    :raises FileNotFoundError: there is no such file.
    :raises ValueError: the file was not written by xprnn, is damaged, has another version or does
        not hold a module. No content of a file is executed.

    >>> import tempfile, pathlib, xprnn
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = pathlib.Path(folder) / "gru.safetensors"
    ...     xprnn.GRU(3, 4, backend="numpy", seed=0).save(path)
    ...     xprnn.load(path, backend="numpy").hidden_size
    4
    """
    return Module.load(path, backend=backend, cells=cells)
