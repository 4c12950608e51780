"""Layers and cells of a definition, made by `xprnn.cell`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..backend import (
    AnyArray,
    Array,
    Backend,
    BackendName,
    ComputeDTypeLike,
    DTypeLike,
    Lengths,
    Precision,
)
from ..backend.exports import exported_from
from ..cells import Cell, Weights
from ..cells.definition import Definition
from ..core.checks import check_array, check_flag, check_reference_array, check_size
from ..core.passes import Call
from ..core.spec import StackSpec
from .arguments import check_call, check_inputs
from .attributes import option
from .cells import _CellModule
from .layers import _Layer
from .module import file_kind

States = Any  # an array, or a tuple of arrays


class _Defined:
    """The options of a layer or cell of a definition: its sizes, and the values of its options."""

    definition: Definition = option("definition", "The definition of the cell.")
    _options: dict[str, Any]

    @staticmethod
    def _cell(options: Mapping[str, Any]) -> Cell:
        definition = options["definition"]
        values = {name: options[name] for name in definition.signature.options}
        sizes = {
            name: check_size(name, options[name]) for name in definition.trace(values).arguments
        }
        hidden_size = check_size("hidden_size", options["hidden_size"])
        bias = check_flag("bias", options["bias"])
        return definition.cell(hidden_size, sizes, values, bias)

    def _file_options(self) -> dict[str, Any]:
        definition = self.definition
        values = {name: self._options[name] for name in definition.signature.options}
        named = {"name": definition.name, "digest": definition.digest(values)}
        return {**self._options, "definition": named}

    @classmethod
    def _options_of_file(
        cls, options: dict[str, Any], cells: Sequence[Definition]
    ) -> dict[str, Any]:
        name, digest = options["definition"]["name"], options["definition"]["digest"]
        from ..cells.shipped import DEFINITIONS

        distinct = dict.fromkeys(each for each in cells if isinstance(each, Definition))
        matching = [each for each in distinct if each.name == name]
        matching = matching or [each for each in DEFINITIONS if each.name == name]
        if len(matching) != 1:
            passed = ", ".join(map(repr, cells)) or "none"
            raise ValueError(
                f"its cell is defined by {name!r}, which is not in a file; pass it with "
                f"cells=[{name}] (got {passed})"
            )
        (definition,) = matching
        values = _values(definition, options)
        if (actual := definition.digest(values)) != digest:
            raise ValueError(
                f"its cell is defined by other equations than those of the {name!r} in cells "
                f"(digest {str(digest)[:14]}, got {actual[:14]})"
            )
        return {**options, **values, "definition": definition}


def _settings(definition: Any, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The sizes and options of a definition, with defaults; TypeError for others."""
    if not isinstance(definition, Definition):
        raise TypeError(
            f"definition: expected what xprnn.cell makes of a function, got "
            f"{type(definition).__name__}"
        )
    options = _values(definition, settings)
    sizes = definition.trace(options).arguments
    if missing := [name for name in sizes if name not in settings]:
        raise TypeError(f"{missing[0]}: expected a size, an argument of the cell {definition.name}")
    if unknown := [name for name in settings if name not in (*sizes, *options)]:
        raise TypeError(f"{unknown[0]}: the cell {definition.name} has no such argument")
    return {**{name: settings[name] for name in sizes}, **options}


def _values(definition: Definition, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a definition's options, of the types of their defaults."""
    options = dict(definition.signature.options)
    for name, default in options.items():
        value, kind = settings.get(name, default), type(default)
        if kind is tuple:
            value = _as_tuples(value)
        if type(value) is not kind and not (kind is float and type(value) is int):
            raise TypeError(f"{name}: expected {kind.__name__}, got {value!r}")
        options[name] = kind(value)
    return options


def _as_tuples(value: Any) -> Any:
    """Lists, such as those of files, as tuples."""
    return tuple(map(_as_tuples, value)) if isinstance(value, (list, tuple)) else value


def check_parameters(
    definition: Definition, parameters: Mapping[str, AnyArray], settings: Mapping[str, Any]
) -> tuple[Backend, StackSpec, Weights]:
    """The backend of the parameters of a layer, the stack they define, and those to use.

    :param settings: the sizes and options of the definition, by name.
    """
    checked = _settings(definition, settings)
    backend, weight_ih = check_reference_array(
        "weight_ih", parameters.get("weight_ih"), ("G*H", "I")
    )
    gates, rows = len(definition.signature.gates), weight_ih.shape[0]
    if rows == 0 or rows % gates:
        raise ValueError(f"weight_ih: expected {gates}*H rows, got {rows}")
    H, bias = rows // gates, "bias_ih" in parameters
    cell = _Defined._cell({"definition": definition, "hidden_size": H, "bias": bias, **checked})
    spec = StackSpec(cell, weight_ih.shape[1], H, bias=bias, layer_suffixes=False)
    shapes = spec.shapes()
    if parameters.keys() != shapes.keys():
        raise ValueError(
            f"parameters: expected {', '.join(shapes)}, got {', '.join(map(str, parameters))}"
        )
    arrays = {
        name: check_array(name, parameters[name], backend, weight_ih.dtype, shape)
        for name, shape in shapes.items()
    }
    ((weights,),) = spec.weights(arrays)
    return backend, spec, weights


@exported_from("xprnn")
@file_kind("Recurrent")
class Recurrent(_Defined, _Layer[Any, Any]):
    """Layers of a cell that `xprnn.cell` defines; everything else is as for `xprnn.GRU`.

    The parameters have torch's names as far as the cell has them: `weight_ih_l0`, `weight_hh_l0`
    (the blocks that are read, in the order of the gates), `bias_ih_l0`, `bias_hh_l0` (the blocks
    with a bias); then vectors and matrices by their own names, `p_i_l0`. States go in and come out
    as a tuple in their order, a single one bare; where none is passed, the initial values of the
    definition hold.

    :param definition: what `xprnn.cell` made of a function.
    :param input_size: I, the number of features of x.
    :param hidden_size: H, the width of the gates, and of states without another size.
    :param num_layers: L; layer k > 0 reads the output of layer k-1.
    :param bias: whether there are b_ih and b_hh.
    :param batch_first: x and output are (N, T, ...) instead of (T, N, ...); states are the same.
    :param dropout: the probability with which, in train mode, an element of the output of each
        layer except the last is set to zero; see `RNN`.
    :param bidirectional: D = 2: a second direction processes each row from its end.
    :param backend: "numpy", "cupy", "cupy:N" or "auto"; None: as for `xprnn.get_backend`.
    :param dtype: "float32" or "float64": of x, states, output, parameters and gradients.
    :param precision: "ieee" or, to allow a GPU to round operands, "tf32"; see `RNN`.
    :param compute_dtype: "float16" or "bfloat16" for mixed precision; None: the dtype; see `RNN`.
    :param recompute: k: `backward` recomputes k steps at a time, to save memory; see `RNN`.
    :param seed: of the initial parameters and the masks; None draws one.
    :param settings: the sizes and options of the definition, by name.
    :raises TypeError, ValueError: an argument is invalid.

    >>> import numpy as np, xprnn
    >>> @xprnn.cell(gates=("z", "n"))
    ... def ligru(f, x, s):
    ...     gh = f.recurrent(s.h)
    ...     z = f.sigmoid(x.z + gh.z)
    ...     n = f.relu(x.n + gh.n)
    ...     return n + z * (s.h - n)
    >>> layer = xprnn.Recurrent(ligru, 3, 4, num_layers=2, bidirectional=True, seed=0).train()
    >>> output, h_n = layer(np.ones((5, 2, 3), np.float32), lengths=[5, 0])
    >>> output.shape, h_n.shape, layer.parameters["weight_hh_l0"].shape
    ((5, 2, 8), (4, 2, 4), (8, 4))
    >>> dx, dh0 = layer.backward(np.ones_like(output))
    """

    def __init__(
        self,
        definition: Definition,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        *,
        backend: BackendName | None = None,
        dtype: DTypeLike = "float32",
        precision: Precision = "ieee",
        compute_dtype: ComputeDTypeLike | None = None,
        recompute: int | None = None,
        seed: int | None = None,
        **settings: Any,
    ) -> None:
        options = {
            "definition": definition,
            "input_size": input_size,
            "hidden_size": hidden_size,
            "num_layers": num_layers,
            "bias": bias,
            "batch_first": batch_first,
            "dropout": dropout,
            "bidirectional": bidirectional,
            "seed": seed,
            **_settings(definition, settings),
        }
        self._construct(options, backend, dtype, precision, compute_dtype, recompute=recompute)

    def __call__(
        self,
        x: AnyArray,
        hx: States | None = None,
        *,
        lengths: Lengths | None = None,
        **inputs: AnyArray,
    ) -> tuple[Array, States]:
        """Run the layer over a batch of sequences, as `xprnn.GRU`.

        :param x: (T, N, I), with `batch_first` (N, T, I), unbatched (T, I).
        :param hx: a state (L*D, N, H), or a tuple of all, any of which may be None. None: the
            initial values.
        :param lengths: N host integers from 0 to T; None: all T.
        :param inputs: the inputs of the definition, (T, N) or (T, N, 1) each, laid out as x.
        :return: output (T, N, D*H) and the final states.
        """
        spec, backend, dtype = self._spec, self._backend, self._dtype
        call = check_call(spec, backend, dtype, x, hx, lengths, self._options["batch_first"])
        extra = check_inputs(spec, backend, dtype, call.x.shape[:2], inputs, call.batched)
        return self._call(call._replace(inputs=extra))


@exported_from("xprnn")
@file_kind("RecurrentCell")
class RecurrentCell(_Defined, _CellModule[Any, Any]):
    """One step of a cell that `xprnn.cell` defines; everything else is as for `xprnn.GRUCell`.

    :param definition: what `xprnn.cell` made of a function.
    :param input_size: I, features of x.
    :param hidden_size: H, the width of the gates, and of states without another size.
    :param bias: whether there are b_ih and b_hh.
    :param backend: "numpy", "cupy", "cupy:N" or "auto"; None: as for `xprnn.get_backend`.
    :param dtype: "float32" or "float64": of x, states, parameters and gradients.
    :param precision: "ieee" or, where a GPU may round products, "tf32"; see `xprnn.RNN`.
    :param compute_dtype: "float16" or "bfloat16": mixed precision; None: the dtype; see
        `xprnn.RNN`.
    :param seed: of the initial parameters and the masks; None draws one.
    :param settings: the sizes and options of the definition, by name.
    :raises TypeError, ValueError: an argument is invalid.

    >>> import numpy as np, xprnn
    >>> @xprnn.cell(gates=("z", "n"))
    ... def min_gru(f, x, s):
    ...     return s.h + f.sigmoid(x.z) * (x.n - s.h)
    >>> cell = xprnn.RecurrentCell(min_gru, 3, 4, seed=0)
    >>> cell(np.ones((2, 3), np.float32)).shape
    (2, 4)
    """

    _sequences: int | None  # begun so far, after the first; None: none

    def __init__(
        self,
        definition: Definition,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        *,
        backend: BackendName | None = None,
        dtype: DTypeLike = "float32",
        precision: Precision = "ieee",
        compute_dtype: ComputeDTypeLike | None = None,
        seed: int | None = None,
        **settings: Any,
    ) -> None:
        options = {
            "definition": definition,
            "input_size": input_size,
            "hidden_size": hidden_size,
            "bias": bias,
            "seed": seed,
            **_settings(definition, settings),
        }
        self._construct(options, backend, dtype, precision, compute_dtype)

    def _configure(self, options: dict[str, Any], *execution: Any, **more: Any) -> None:
        self._sequences = None
        super()._configure(options, *execution, **more)

    def __call__(self, x: AnyArray, hx: States | None = None, **inputs: AnyArray) -> States:
        """Run one step; in train mode it is recorded for `backward`.

        :param x: (N, I), unbatched (I,).
        :param hx: a state (N, H), or a tuple of all, any of which may be None. None: the initial
            values.
        :param inputs: the inputs of the definition, (N,) or (N, 1) each.
        :return: the next states.
        :raises RuntimeError: a mask holds for a sequence, and `new_sequence` was not called.
        """
        return self._call(x, hx, inputs)

    def new_sequence(self) -> None:
        """Begin a sequence: from here on `f.keep(rate, per="sequence")` draws new masks."""
        self._sequences = 0 if self._sequences is None else self._sequences + 1

    def _run(self, call: Call) -> tuple[Array, tuple[Array, ...]]:
        per_sequence = any(mask.per_sequence for mask in self._spec.cell.masks)
        if per_sequence and self._sequences is None and self._training:
            raise RuntimeError(
                f"{self.definition.name}: a mask is the same for all steps of a sequence; call "
                "new_sequence() where one begins"
            )
        return super()._run(call._replace(sequence=self._sequences))

    def _extra_state(self) -> dict[str, Any]:
        return {**super()._extra_state(), "sequences": self._sequences}

    def _restore_extra_state(self, extra: Any) -> None:
        super()._restore_extra_state(extra)
        sequences = extra["sequences"]
        self._sequences = None if sequences is None else int(sequences)
