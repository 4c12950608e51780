"""RNN, GRU and LSTM with `activations` or `proj_size`: stacks of shipped definitions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ..cells.activations import check_activations
from ..core.checks import check_integer
from ..core.spec import StackSpec


def with_options(spec: StackSpec, options: Mapping[str, Any]) -> StackSpec:
    """The stack with `activations` and `proj_size`, cells of shipped definitions if it has any.

    The activations are those of one direction, for both, or of the two one after the other.
    """
    activations = options.get("activations")
    proj_size = _check_proj_size(options.get("proj_size", 0))
    if activations is None and not proj_size:
        return spec
    from ..cells import shipped  # traced where they are used

    (definition, _), sizes = shipped.BUILTIN[spec.cell.name], {}
    if proj_size:
        definition, sizes = shipped.projected_lstm, {"proj_size": proj_size}
    chosen = definition.signature.options["activations"]
    n = len(chosen)
    if activations is not None:
        chosen = check_activations(activations, *sorted({n, n * spec.num_directions}))
    cells = [
        definition.cell(spec.hidden_size, sizes, {"activations": each}, spec.bias)
        for each in (chosen[:n], chosen[-n:])
    ]
    return replace(spec, cell=cells[0], reverse_cell=cells[1] if cells[1] != cells[0] else None)


def plain(options: dict[str, Any]) -> dict[str, Any]:
    """Checked options, without those that are not used; activations as tuples; in place."""
    activations, proj_size = options.pop("activations", None), options.pop("proj_size", 0)
    if activations is not None:
        options["activations"] = check_activations(activations, len(activations))
    if proj_size:
        options["proj_size"] = int(proj_size)
    return options


def _check_proj_size(value: Any) -> int:
    if check_integer("proj_size", value) < 0:
        raise ValueError(f"proj_size: expected at least 1, or 0 for no projection, got {value}")
    return int(value)
