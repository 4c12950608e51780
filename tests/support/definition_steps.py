"""The arrays of one step of a definition, and its results by plain evaluation."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from xprnn.cells.definition.derived_step import DerivedStep, Leaves

N, H = 3, 4


class Step(NamedTuple):
    """The arrays of one step."""

    leaves: Leaves
    upstream: tuple[np.ndarray, ...]


def draw(derived: DerivedStep, bias: bool, seed: int = 0) -> Step:
    """Normally distributed values; states and upstream gradients are not zero."""
    rng = np.random.default_rng(seed)
    signature, widths = derived.trace.signature, derived.widths

    def normal(*shape: Any) -> np.ndarray:
        return rng.standard_normal([widths.get(n, n) if isinstance(n, str) else n for n in shape])

    parameters = {name: normal("H") for name in signature.vectors}
    for name, matrix in derived.trace.matrices.items():
        if matrix.columns is None:
            parameters[name] = normal(matrix.rows)
        else:
            count = max(len(matrix.blocks), 1)
            rows = widths[matrix.rows] if isinstance(matrix.rows, str) else matrix.rows
            parameters[name] = normal(count * rows, matrix.columns)
        if bias and matrix.biased:
            parameters["bias_hh"] = normal(len(matrix.biased) * H)
    states = tuple(normal(N, signature.sizes.get(name, "H")) for name in signature.states)
    if "n" in signature.states:  # a divisor
        states = (*states[:2], abs(states[2]) + 0.5, *states[3:])
    leaves = Leaves(
        states,
        parameters,
        {name: normal(N, H) for name in signature.gates},
        {name: abs(normal(N, 1)) for name in signature.inputs},
        tuple((rng.random((N, H)) < 0.5) * 1.0 for _ in derived.masks),
    )
    return Step(leaves, tuple(normal(*state.shape) for state in states))


def ours(derived: DerivedStep, step: Step, xp: Any = np) -> dict[str, Any]:
    """The next states, and every gradient by name."""
    leaves, upstream = step
    leaves = leaves._replace(gates=with_folded(derived, leaves))
    kept = derived.forward(xp, leaves)
    gradients = derived.backward(xp, leaves._replace(gates={}), kept, upstream)
    results = {f"next {k}": state for k, state in enumerate(kept.next_states)}
    results |= {f"d{k}": d for k, d in enumerate(gradients.states)}
    results |= {f"dgx {name}": d for name, d in gradients.gates.items()}
    for name, d in gradients.vectors.items():
        results[f"d {name}"] = xp.sum(d, axis=0)
    for product, operand, parts in zip(
        derived.step.products, kept.operands, gradients.parts, strict=True
    ):
        for block, part in zip(product.blocks, parts, strict=True):
            results[f"d {product.matrix}.{block}"] = part.T @ operand
    for gate in derived.bias_folded:
        results[f"d b_hh.{gate}"] = xp.sum(gradients.gates[gate], axis=0)
    return results


def with_folded(derived: DerivedStep, leaves: Leaves) -> dict[str, Any]:
    """gx with the b_hh of the gates in which it is folded into b_ih."""
    gates = dict(leaves.gates)
    for gate in derived.bias_folded:
        k = derived.trace.matrices["weight_hh"].biased.index(gate)
        gates[gate] = gates[gate] + leaves.parameters["bias_hh"][k * H : (k + 1) * H]
    return gates
