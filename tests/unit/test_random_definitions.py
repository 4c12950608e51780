"""Random definitions: derived gradients against central differences in float64."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import xprnn
from tests.support.definition_steps import H, Step, draw
from xprnn.cells.definition import Definition
from xprnn.cells.definition.derived_step import DerivedStep, Leaves, evaluate

STEP, BOUND = 1e-5, 1e-6  # of the difference, and of its error relative to the sum of its terms
KINK = 1e-3  # values at least this far from a kink

UNARY: dict[str, Any] = {
    "sigmoid": lambda f, a: f.sigmoid(a),
    "tanh": lambda f, a: f.tanh(a),
    "relu": lambda f, a: f.relu(a),
    "leaky_relu": lambda f, a: f.leaky_relu(a, 0.1),
    "hard_sigmoid": lambda f, a: f.hard_sigmoid(a),
    "softsign": lambda f, a: f.softsign(a),
    "softplus": lambda f, a: f.softplus(a),
    "elu": lambda f, a: f.elu(a, 0.7),
    "exp": lambda f, a: f.exp(f.tanh(a)),
    "log": lambda f, a: f.log(f.softplus(a) + 0.3),
    "sqrt": lambda f, a: f.sqrt(f.abs(a) + 0.3),
    "abs": lambda f, a: f.abs(a),
    "clip": lambda f, a: f.clip(a, -0.6, 0.4),
    "neg": lambda f, a: -a,
    "scaled": lambda f, a: 0.5 * a - 0.25,
    "norm": lambda f, a: f.norm([a], [f.v])[0],
}
BINARY: dict[str, Any] = {
    "add": lambda f, a, b: a + b,
    "sub": lambda f, a, b: a - b,
    "mul": lambda f, a, b: a * f.tanh(b),
    "div": lambda f, a, b: a / (1.3 + b * f.tanh(b)),
    "minimum": lambda f, a, b: f.minimum(a, b),
    "maximum": lambda f, a, b: f.maximum(a, b),
    "where": lambda f, a, b: f.where(a > b, f.sigmoid(b), a),
    "where_number": lambda f, a, b: f.where(b <= 0.1, a * b, f.tanh(a)),
}


def random_definition(chosen: random.Random) -> Definition:
    """One to four gates, one to three states, and up to twelve more operations."""
    gates = [f"g{k}" for k in range(chosen.randint(1, 4))]
    states = [f"s{k}" for k in range(chosen.randint(1, 3))]

    def step(f: Any, x: Any, s: Any) -> Any:
        free = [getattr(x, gate) for gate in gates]
        values = [*free, *[getattr(s, state) for state in states], f.v]
        products = [*gates]
        chosen.shuffle(products)
        for _ in range(chosen.randint(2, 12)):
            kind = chosen.choice(["unary", "binary", "binary", "product"])
            rows = [value for value in values if value.has_rows]
            if kind == "product" and products:
                gate, bias = products.pop(), chosen.random() < 0.5
                values += f.recurrent(f.tanh(chosen.choice(rows)), gate, bias=bias)
            elif kind == "unary":
                values.append(UNARY[chosen.choice([*UNARY])](f, chosen.choice(rows)))
            else:
                function = BINARY[chosen.choice([*BINARY])]
                values.append(function(f, chosen.choice(rows), chosen.choice(values)))
        # everything is read: a result is the mean of all values
        total = sum(values[1:], values[0]) / len(values)
        return tuple([total * (0.5 + k) + f.tanh(values[-1 - k]) for k in range(len(states))])

    return xprnn.cell(gates=gates, states=states, vectors=("v",))(step)


def distance_to_kinks(derived: DerivedStep, leaves: Leaves) -> float:
    """The smallest distance of a value from one at which a function has a kink."""
    values: Any = {}
    derived._read(values, derived.forward_nodes, leaves, np)
    evaluate(np, derived.forward_nodes, values, np.float64)
    distances = [1.0]
    for node in derived.forward_nodes:
        at = [values[arg] for arg in node.args]
        if node.op in ("relu", "leaky_relu", "abs", "elu"):
            distances.append(abs(at[0]).min())
        elif node.op in ("gt", "le", "minimum", "maximum"):
            distances.append(abs(at[0] - at[1]).min())
        elif node.op == "clip":
            distances += [abs(at[0] - bound).min() for bound in at[1:]]
        elif node.op == "hard_sigmoid":
            alpha, beta = node.detail
            distances += [abs(alpha * at[0] + beta - bound).min() for bound in (0.0, 1.0)]
    return float(min(distances))


def check(seed: int) -> None:
    definition = random_definition(random.Random(seed))
    derived = DerivedStep(definition.trace({}), {"H": H}, bias=False)
    step: Step = draw(derived, bias=False, seed=seed)
    leaves, upstream = step
    assume(distance_to_kinks(derived, leaves) > KINK)
    kept = derived.forward(np, leaves)
    gradients = derived.backward(np, leaves._replace(gates={}), kept, upstream)
    rng = np.random.default_rng(seed)
    by_name: dict[str, Any] = dict(gradients.vectors)
    for product, operand, parts in zip(
        derived.step.products, kept.operands, gradients.parts, strict=True
    ):
        for gate, part in zip(product.blocks, parts, strict=True):
            k = derived.trace.matrices["weight_hh"].blocks.index(gate)
            dweight = by_name.setdefault(
                "weight_hh", np.zeros(leaves.parameters["weight_hh"].shape)
            )
            dweight[k * H : (k + 1) * H] = (part + np.zeros((1, H))).T @ operand
    terms = []

    def moved(value: Any, gradient: Any) -> Any:
        """A random direction; adds the term of its derivative."""
        direction = rng.standard_normal(value.shape)
        terms.append((gradient * direction).sum() + 0.0)
        return direction

    directions = Leaves(
        tuple(moved(a, d) for a, d in zip(leaves.states, gradients.states, strict=True)),
        {n: moved(a, by_name[n]) for n, a in leaves.parameters.items()},
        {n: moved(a, gradients.gates[n]) for n, a in leaves.gates.items()},
    )

    def at(distance: float) -> float:
        there = Leaves(
            tuple(a + distance * d for a, d in zip(leaves.states, directions.states, strict=True)),
            {n: a + distance * directions.parameters[n] for n, a in leaves.parameters.items()},
            {n: a + distance * directions.gates[n] for n, a in leaves.gates.items()},
        )
        results = derived.forward(np, there).next_states
        return sum(float((u * r).sum()) for u, r in zip(upstream, results, strict=True))

    difference = (at(STEP) - at(-STEP)) / (2 * STEP)
    size = 1.0 + sum(map(abs, terms))
    assert abs(difference - sum(terms)) <= BOUND * size, derived.forward_nodes


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(0, 1 << 32))
def test_gradients_of_random_definitions(seed: int) -> None:
    check(seed)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.integers(0, 1 << 40))
def test_gradients_of_many_random_definitions(seed: int) -> None:
    check(seed)
