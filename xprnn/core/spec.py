"""The static description of a recurrent network: its sizes, and the names of its parameters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
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

    @property
    def widest_input(self) -> int:
        """The largest input size of a layer."""
        upper = self.num_directions * self.hidden_size if self.num_layers > 1 else 0
        return max(self.input_size, upper)

    def weights(self, arrays: Mapping[str, Array]) -> list[list[Weights]]:
        """Named arrays as `Weights` by layer and direction; an absent name gives None."""
        return [
            [Weights(*[arrays.get(name) for name in names]) for names in pair]
            for pair in self._names
        ]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The name and shape of every parameter, torch's, in torch's order."""
        gates, H = self.cell.gates * self.hidden_size, self.hidden_size
        shapes: dict[str, tuple[int, ...]] = {}
        for layer in range(self.num_layers):
            width = self.num_directions * H if layer else self.input_size
            for d in range(self.num_directions):
                suffix = self._suffix(layer, d)
                shapes[f"weight_ih{suffix}"] = (gates, width)
                shapes[f"weight_hh{suffix}"] = (gates, H)
                if self.bias:
                    shapes[f"bias_ih{suffix}"] = (gates,)
                    shapes[f"bias_hh{suffix}"] = (gates,)
        return shapes

    @cached_property
    def _names(self) -> list[list[list[str]]]:
        """The names of the weights by layer and direction, those of absent biases too."""
        return [
            [
                [f"{kind}{self._suffix(layer, d)}" for kind in Weights._fields]
                for d in range(self.num_directions)
            ]
            for layer in range(self.num_layers)
        ]

    def _suffix(self, layer: int, direction: int) -> str:
        if not self.layer_suffixes:
            return ""
        return f"_l{layer}" + ("_reverse" if direction else "")
