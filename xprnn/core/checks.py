"""Checks of arguments; errors name the argument, what was passed and what was expected."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any, Generic, Self, TypeVar, overload

import numpy as np

from ..backend import Array, Backend, backend_of, device_text, owning_backend

DTYPES = ("float32", "float64")
T = TypeVar("T")


class Checked(Generic[T]):
    """An attribute whose value is checked and converted to a Python type whenever it is set.

    :param check: takes the attribute's name and the value; returns the value to store, or raises.
    :param doc: the attribute's docstring.
    """

    def __init__(self, check: Callable[[str, Any], T], doc: str) -> None:
        self._check = check
        self.__doc__ = doc

    def __set_name__(self, owner: type, name: str) -> None:
        """Store the attribute's name, the key of its value in the instance's dict."""
        self._name = name

    if TYPE_CHECKING:  # without __get__ Python reads the instance's dict directly

        @overload
        def __get__(self, instance: None, owner: type) -> Self: ...

        @overload
        def __get__(self, instance: object, owner: type) -> T: ...

        def __get__(self, instance: object | None, owner: type) -> Self | T:
            """The value of an instance; for the class, this descriptor."""

    def __set__(self, instance: object, value: Any) -> None:
        """Check and store the value; nothing is changed if the check raises."""
        instance.__dict__[self._name] = self._check(self._name, value)


def check_dtype(dtype: Any, name: str = "dtype") -> np.dtype[Any]:
    """`dtype` as a NumPy dtype; ValueError naming `name` unless it is float32 or float64."""
    try:
        parsed = None if dtype is None else np.dtype(dtype)
    except TypeError:
        parsed = None
    if parsed is None or parsed.name not in DTYPES or not parsed.isnative:
        raise ValueError(f"{name}: expected dtype {' or '.join(DTYPES)}, got {dtype!r}")
    return np.dtype(str(parsed.name))


def check_integer(name: str, value: Any) -> int:
    """`value` as an int; TypeError if it is not an integer."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name}: expected an integer, got {value!r}")
    return int(value)


def check_size(name: str, value: Any) -> int:
    """`value` as a positive int; TypeError or ValueError otherwise."""
    if check_integer(name, value) < 1:
        raise ValueError(f"{name}: expected at least 1, got {value}")
    return int(value)


def check_flag(name: str, value: Any) -> bool:
    """`value` if it is a bool; TypeError otherwise."""
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name}: expected True or False, got {value!r}")
    return bool(value)


def check_shape(shape: Any, width: int) -> tuple[int, ...]:
    """`shape` as a tuple of ints, the last one `width`; TypeError or ValueError otherwise."""
    if not isinstance(shape, (tuple, list)) or not all(
        isinstance(length, (int, np.integer)) for length in shape
    ):
        raise TypeError(f"shape: expected a tuple of integers, got {shape!r}")
    if not shape or min(shape) < 0 or shape[-1] != width:
        raise ValueError(f"shape: expected lengths from 0, the last {width}, got {tuple(shape)}")
    return tuple([int(length) for length in shape])


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> str:
    """`value` if it is one of `choices`; ValueError otherwise."""
    if value not in choices:
        raise ValueError(f"{name}: expected {' or '.join(map(repr, choices))}, got {value!r}")
    return str(value)


def check_seed(seed: Any) -> int:
    """`seed` as an int in [0, 2^63); None: one from the operating system's entropy."""
    if seed is None:
        return int.from_bytes(np.random.SeedSequence().generate_state(2).tobytes(), "little") >> 1
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)):
        raise TypeError(f"seed: expected an integer or None, got {seed!r}")
    if not 0 <= seed < 1 << 63:
        raise ValueError(f"seed: expected 0 to 2**63 - 1, got {seed}")
    return int(seed)


def check_probability(p: Any) -> float:
    """`p` as a float in [0, 1]."""
    if isinstance(p, bool) or not isinstance(p, (int, float, np.floating)):
        raise TypeError(f"dropout: expected a number from 0 to 1, got {p!r}")
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"dropout: expected a probability from 0 to 1, got {p}")
    return float(p)


def check_count(name: str, value: Any) -> int:
    """`value` if it is an int from 0 to 2^63 - 1; TypeError or ValueError otherwise."""
    if type(value) is not int:
        raise TypeError(f"{name}: expected an integer, got {value!r}")
    if not 0 <= value < 1 << 63:
        raise ValueError(f"{name}: expected a number from 0 to 2**63 - 1, got {value}")
    return value


def check_number(name: str, value: Any, low: float, high: float) -> float:
    """`value` as a float in [low, high); TypeError or ValueError otherwise."""
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise TypeError(f"{name}: expected a number, got {value!r}")
    try:
        number = float(value)
    except OverflowError:  # a large int
        number = math.inf
    if not low <= number < high:
        raise ValueError(f"{name}: expected a number from {low} to below {high}, got {value!r}")
    return number


def check_array(
    name: str, array: Any, backend: Backend, dtype: np.dtype[Any], shape: tuple[Any, ...]
) -> Array:
    """The array to use for argument `name`: `array`, or CuPy's view of another library's array.

    Nothing is copied. A str in `shape` matches any length and is its name in the message.

    :raises TypeError, ValueError: it is not on `backend`, or not of `dtype` and `shape`.
    """
    # the common case first: a step of a small cell takes only microseconds
    if type(array) is backend.xp.ndarray and (not backend.on_gpu or backend.owns(array)):
        usable = array
    else:
        special = isinstance(array, (np.ma.MaskedArray, np.matrix))
        usable = None if special else _import_array(name, array, backend)
    if usable is None:
        raise TypeError(
            f"{name}: expected a {dtype} array {_shape_text(shape)} on backend {backend.name!r}"
            f"{_actual_text(name, array, backend, dtype)}"
        )
    if usable.dtype != dtype:
        advice = f".astype('{dtype}')" if usable is array else _asarray_text(name, backend, dtype)
        raise TypeError(
            f"{name}: expected dtype {dtype}, got {usable.dtype}; convert it with {advice}"
        )
    if usable.shape != shape and not _shape_matches(usable.shape, shape):
        raise ValueError(
            f"{name}: expected shape {_shape_text(shape)}, got {_shape_text(usable.shape)}"
        )
    return usable


def _shape_matches(actual: tuple[int, ...], shape: tuple[Any, ...]) -> bool:
    expected = [b if isinstance(b, int) else a for a, b in zip(actual, shape, strict=False)]
    return len(actual) == len(shape) and [*actual] == expected


def check_reference_array(name: str, array: Any, shape: tuple[Any, ...]) -> tuple[Backend, Array]:
    """The backend of the argument that decides where a function computes, and the array to use.

    :raises TypeError, ValueError: it is not a float32 or float64 array of `shape`.
    """
    backend = owning_backend(array)
    if backend is None:
        raise TypeError(
            f"{name}: expected an array {_shape_text(shape)}, got {_kind(array)}"
            f"{device_text(array)}; xprnn.asarray({name}) converts it"
        )
    imported = _import_array(name, array, backend)
    dtype = check_dtype(getattr(imported, "dtype", None), name)
    return backend, check_array(name, imported, backend, dtype, shape)


def _import_array(name: str, array: Any, backend: Backend) -> Array | None:
    """`Backend.from_dlpack`; TypeError if the library that owns the array does not export it."""
    try:
        return backend.from_dlpack(array)
    except (BufferError, NotImplementedError) as error:
        detached = "; pass it with .detach()" if getattr(array, "requires_grad", False) else ""
        raise TypeError(
            f"{name}: expected an array that DLPack can export to CuPy, "
            f"got {_kind(array)}: {error}{detached}"
        ) from error


def _actual_text(name: str, array: Any, backend: Backend, dtype: np.dtype[Any]) -> str:
    """What was passed instead of an array on `backend`, and how to convert it."""
    if isinstance(array, np.ma.MaskedArray):
        return " without a mask; convert it with .filled(0.0)"
    owner = backend_of(array)
    where = f" on backend {owner.name!r}" if owner else device_text(array)
    return f", got {_kind(array)}{where}; convert it with {_asarray_text(name, backend, dtype)}"


def _asarray_text(name: str, backend: Backend, dtype: np.dtype[Any]) -> str:
    value = name if name.isidentifier() else "value"
    return f"xprnn.asarray({value}, backend={backend.name!r}, dtype='{dtype}')"


def _shape_text(shape: tuple[Any, ...]) -> str:
    return f"({', '.join(map(str, shape))}{',' if len(shape) == 1 else ''})"


def check_lengths(lengths: Any, steps: int, batch: int) -> np.ndarray | None:
    """`lengths` as intp (N,), or None; integers from 0 to T on the host, in any order."""
    if lengths is None:
        return None
    array = _host_array("lengths", lengths, "integers", f"of {batch} integers")
    if array.shape != (batch,):
        raise ValueError(f"lengths: expected shape ({batch},), got {_shape_text(array.shape)}")
    if batch and array.dtype.kind not in "iu":
        raise TypeError(f"lengths: expected integers, got dtype {array.dtype}")
    if batch and (array.min() < 0 or array.max() > steps):
        raise ValueError(
            f"lengths: expected 0 to {steps}, the number of steps in x; "
            f"got {array.min()} to {array.max()}"
        )
    return array.astype(np.intp)


def check_rows(rows: Any, batch: int) -> np.ndarray:
    """`rows` as a new mask, bool (N,); it is a slice, a mask (N,) or integers from 0 to N-1."""
    chosen = np.zeros(batch, np.bool_)
    if isinstance(rows, slice):
        try:
            chosen[rows] = True
        except (TypeError, ValueError) as error:  # not numbers, or a step of 0
            raise type(error)(f"rows: {error}, got {rows}") from error
        return chosen
    array = _host_array("rows", rows, "integers or a mask", "of integers or bools, or a slice")
    if array.dtype.kind == "b" and array.shape != (batch,):
        raise ValueError(f"rows: expected a mask ({batch},), got {_shape_text(array.shape)}")
    if array.ndim != 1:
        raise ValueError(f"rows: expected one dimension, got shape {_shape_text(array.shape)}")
    if array.size and array.dtype.kind not in "iub":
        raise TypeError(f"rows: expected integers or bools, got dtype {array.dtype}")
    if array.size and array.dtype.kind != "b" and (array.min() < 0 or array.max() >= batch):
        raise ValueError(f"rows: expected 0 to {batch - 1}, got {array.min()} to {array.max()}")
    if array.size:  # NumPy converts an empty list to floats
        chosen[array] = True
    return chosen


def check_indices(
    name: str,
    value: Any,
    backend: Backend,
    high: int,
    shape: tuple[int, ...] | None = None,
    ignored: int | None = None,
) -> Array:
    """Integers from 0 to high-1, or `ignored`, as a new int64 array on `backend`.

    The range is checked on the host only. Values on a device are not read back: the caller must
    make values out of range visible in its results.

    :param shape: the required shape; None: any.
    """
    expected = "integers" if shape is None else f"{_shape_text(shape)} integers"
    array = None if backend.kind == "numpy" else backend.from_dlpack(value)
    on_host = array is None
    if array is None:
        if not isinstance(value, (list, tuple, np.ndarray)) or np.ma.isMaskedArray(value):
            raise TypeError(
                f"{name}: expected {'' if shape is None else f'{math.prod(shape)} '}integers, "
                f"got {type(value).__name__}{device_text(value)}; convert them with "
                f"xprnn.asarray({name}, backend={backend.name!r})"
            )
        try:
            array = np.asarray(value)
        except ValueError as error:  # lists of different lengths
            raise ValueError(f"{name}: expected {expected}: {error}") from error
        if array.size == 0:  # NumPy converts an empty list to floats
            array = array.astype(np.int64)
    if array.dtype.kind not in "iu" or (shape is not None and array.shape != shape):
        actual = f"{array.dtype} {_shape_text(array.shape)}"
        raise ValueError(f"{name}: expected {expected}, got {actual}")
    if not on_host:
        with backend.activate():
            return array.astype(backend.xp.int64)
    chosen = array if ignored is None else array[array != ignored]
    if chosen.size and (chosen.min() < 0 or chosen.max() >= high):
        or_ignored = "" if ignored is None else f"; ignored ones are {ignored}"
        raise ValueError(
            f"{name}: expected 0 to {high - 1}, got {chosen.min()} to {chosen.max()}{or_ignored}"
        )
    return backend.from_host(array.astype(np.int64))


def _host_array(name: str, value: Any, content: str, details: str) -> np.ndarray:
    """A list, tuple or NumPy array as a NumPy array; TypeError for arrays of other backends."""
    owner = backend_of(value)
    if owner is not None and owner.kind != "numpy":
        raise TypeError(
            f"{name}: expected host {content}, got an array on backend {owner.name!r}; kernel "
            f"launches depend on them, so copy them first with xprnn.to_numpy({name})"
        )
    if not isinstance(value, (list, tuple, np.ndarray)) or np.ma.isMaskedArray(value):
        raise TypeError(
            f"{name}: expected a list or NumPy array {details}, got {type(value).__name__}"
            f"{device_text(value)}; xprnn.to_numpy({name}) converts it"
        )
    try:
        return np.asarray(value)
    except (TypeError, ValueError) as error:  # nested, or with numbers on a device
        raise type(error)(f"{name}: expected a list {details}: {error}") from error


def check_states(
    names: tuple[str, ...],
    states: Any,
    backend: Backend,
    dtype: np.dtype[Any],
    outer: tuple[int, ...],
    sizes: tuple[int, ...],
) -> tuple[Array | None, ...] | None:
    """The states passed by the caller, or their gradients, as a tuple, each (*outer, its size).

    With one name `states` is the array, with several a tuple of all, any of which may be None.
    None if `states` is None.
    """
    if states is None:
        return None
    if len(names) == 1:
        states = (states,)
    elif not isinstance(states, (tuple, list)) or len(states) != len(names):
        raise TypeError(
            f"{', '.join(names)}: expected a tuple ({', '.join(names)}) of arrays "
            f"{' and '.join(dict.fromkeys(_shape_text((*outer, size)) for size in sizes))}, "
            f"got {_kind(states)}"
        )
    checked = []
    for k, state in enumerate(states):  # `zip` takes longer
        if state is not None:
            state = check_array(names[k], state, backend, dtype, (*outer, sizes[k]))
        checked.append(state)
    return tuple(checked)


def state_errors(
    shapes: Mapping[str, tuple[int, ...]], values: Mapping[str, np.ndarray]
) -> list[str]:
    """Messages on why `values` are not floating-point arrays of `shapes`; empty if they are."""
    if prefixes := _prefixes(shapes, values):
        prefix = repr(prefixes[0])
        return [
            f"its names begin with {', '.join(map(repr, prefixes[:3]))}; strip that: {{name"
            f".removeprefix({prefix}): array for name, array in mapping.items() "
            f"if name.startswith({prefix})}}"
        ]
    errors = [f"missing {name} {shape}" for name, shape in shapes.items() if name not in values]
    for name, value in values.items():
        if name not in shapes:
            errors.append(f"unexpected {name} {value.shape}")
        elif value.shape != shapes[name]:
            errors.append(f"{name}: expected shape {shapes[name]}, got {value.shape}")
        elif value.dtype.kind != "f":
            errors.append(f"{name}: expected a real floating dtype, got {value.dtype}")
    return shortened(errors)


def _prefixes(names: Collection[str], keys: Collection[str]) -> list[str]:
    """The prefixes with which all of `names` are in `keys`, as in a larger model's state dict."""
    if not names or any(name in keys for name in names):
        return []
    first = next(iter(names))
    prefixes = [key.removesuffix(first) for key in keys if key.endswith(first)]
    return [prefix for prefix in prefixes if all(prefix + name in keys for name in names)]


def shortened(lines: list[str]) -> list[str]:
    """The first lines of a list for a message, truncated, and the number of the others."""
    first = [line if len(line) <= 200 else f"{line[:200]}..." for line in lines[:8]]
    return first + ([f"and {len(lines) - 8} more"] if len(lines) > 8 else [])


def as_numpy_floats(array: np.ndarray) -> np.ndarray:
    """An array in one of ml_dtypes' floating dtypes, such as bfloat16, converted to float32."""
    kind = array.dtype.type
    convert = kind.__module__ == "ml_dtypes" and kind.__name__.startswith(("bfloat", "float"))
    return array.astype(np.float32) if convert else array


def range_errors(name: str, value: np.ndarray, dtype: np.dtype[Any]) -> list[str]:
    """A message if finite elements of `value` overflow in `dtype`; else empty."""
    finite = np.abs(value[np.isfinite(value)])
    if value.dtype.itemsize <= dtype.itemsize or not finite.size:
        return []
    overflows = finite.max() > np.finfo(dtype).max
    return [f"{name}: expected values within {dtype}, got {finite.max():.3g}"] if overflows else []


def _kind(value: Any) -> str:
    size = f" of {len(value)}" if isinstance(value, (tuple, list)) else ""
    return f"{type(value).__name__}{size}"
