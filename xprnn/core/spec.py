"""The static description of a recurrent network: its sizes, and the names of its parameters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from ..backend import Array
from .cell import Cell, Weights


@dataclass(frozen=True)
class StackSpec:
    """Layers of one cell, each in one or two directions."""

    cell: Cell
    input_size: int  # I
    hidden_size: int  # H
    num_layers: int = 1  # L
    num_directions: int = 1  # D
    bias: bool = True
    dropout: float = 0.0
    layer_suffixes: bool = True  # names end in _l0, _l0_reverse, _l1, ...; a cell's do not
    reverse_cell: Cell | None = None  # of the reverse direction, if it is another one
    # computed once, because every call reads them
    state_sizes: tuple[int, ...] = field(init=False, compare=False)
    output_size: int = field(init=False, compare=False)  # of a direction: the first state's
    reads_extra: bool = field(init=False, compare=False)  # whether steps read inputs or masks

    def __post_init__(self) -> None:
        """Compute the values that every call reads."""
        sizes = self.cell.state_sizes(self.hidden_size)
        extra = any(cell.extra_inputs or cell.masks for cell in self.cells)
        self.__dict__.update(state_sizes=sizes, output_size=sizes[0], reads_extra=extra)

    @property
    def cells(self) -> tuple[Cell, ...]:
        """The cell of each direction; their weights and states have the same names and sizes."""
        return (self.cell, self.reverse_cell or self.cell)[: self.num_directions]

    @property
    def widest_input(self) -> int:
        """The largest input size of a layer."""
        upper = self.num_directions * self.output_size if self.num_layers > 1 else 0
        return max(self.input_size, upper)

    def weights(self, arrays: Mapping[str, Array]) -> list[list[Weights]]:
        """Named arrays as `Weights` by layer and direction; an absent name gives None."""
        return [
            [self.cell.weights_type(*[arrays.get(name) for name in names]) for names in pair]
            for pair in self._names
        ]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The name and shape of every parameter, torch's, in torch's order."""
        shapes: dict[str, tuple[int, ...]] = {}
        for layer in range(self.num_layers):
            width = self.num_directions * self.output_size if layer else self.input_size
            of_direction = self.cell.weight_shapes(width, self.hidden_size, self.bias)
            for d in range(self.num_directions):
                suffix = self._suffix(layer, d)
                shapes |= {f"{name}{suffix}": shape for name, shape in of_direction.items()}
        return shapes

    @cached_property
    def _names(self) -> list[list[list[str]]]:
        """The names of the weights by layer and direction, those of absent biases too."""
        return [
            [
                [f"{kind}{self._suffix(layer, d)}" for kind in self.cell.weights_type._fields]
                for d in range(self.num_directions)
            ]
            for layer in range(self.num_layers)
        ]

    def _suffix(self, layer: int, direction: int) -> str:
        if not self.layer_suffixes:
            return ""
        return f"_l{layer}" + ("_reverse" if direction else "")
