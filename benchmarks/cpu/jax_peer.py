"""JAX: a jitted `lax.scan` over the steps, and `value_and_grad` of it for the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from xprnn.tools.bench.task import Peer, Task

Weights = dict[str, Any]
NAMES = ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")


def jax_layer(task: Task) -> Peer:
    """The layer, from zero states."""
    import jax

    weights = {name: jax.numpy.asarray(task.weights[name]) for name in NAMES}
    x, doutput = jax.numpy.asarray(task.x), jax.numpy.asarray(task.doutput)
    states = tuple([jax.numpy.zeros_like(state) for state in task.states])
    step = _step_of(task.setting.cell)

    def layer(weights: Weights, x: Any) -> Any:
        gx = x @ weights["weight_ih_l0"].T + weights["bias_ih_l0"]
        weight_hh, bias_hh = weights["weight_hh_l0"].T, weights["bias_hh_l0"]

        def body(states: Any, gx: Any) -> Any:
            states = step(gx, states, states[0] @ weight_hh + bias_hh)
            return states, states[0]

        return jax.lax.scan(body, states, gx)[1]

    def loss(weights: Weights, x: Any, doutput: Any) -> Any:
        output = layer(weights, x)
        return (output * doutput).sum(), output

    jax.clear_caches()
    forward = jax.jit(layer)
    both = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    (_, output), (dweights, dx) = both(weights, x, doutput)
    results = {"output": output, "dx": dx, **{f"d{n}": dweights[n] for n in NAMES}}
    return Peer(
        "jax",
        lambda: jax.block_until_ready(forward(weights, x)),
        lambda: jax.block_until_ready(both(weights, x, doutput)),
        {name: np.asarray(array) for name, array in results.items()},
        f"jax {jax.__version__}: jit of lax.scan, and of value_and_grad of it",
    )


def jax_step(task: Task) -> tuple[Callable[[], Any], Callable[[], np.ndarray], str]:
    """One step, from the same states in every call."""
    import jax

    weights = {name: jax.numpy.asarray(task.weights[name]) for name in NAMES}
    x = jax.numpy.asarray(task.x[0])
    states = tuple([jax.numpy.asarray(state) for state in task.states])
    step = _step_of(task.setting.cell)

    def full_step(weights: Weights, x: Any, states: Any) -> Any:
        gx = x @ weights["weight_ih_l0"].T + weights["bias_ih_l0"]
        gh = states[0] @ weights["weight_hh_l0"].T + weights["bias_hh_l0"]
        return step(gx, states, gh)

    jitted = jax.jit(full_step)

    def call() -> Any:
        return jax.block_until_ready(jitted(weights, x, states))

    return call, lambda: np.asarray(call()[0]), "a jitted step"


def _step_of(cell: str) -> Callable[[Any, Any, Any], Any]:
    """A function of gx, the states before a step and gh that returns the states after it."""
    from jax import nn
    from jax import numpy as jnp

    def rnn_tanh(gx: Any, states: Any, gh: Any) -> Any:
        return (jnp.tanh(gx + gh),)

    def gru(gx: Any, states: Any, gh: Any) -> Any:
        (h,) = states
        (xr, xz, xn), (hr, hz, hn) = jnp.split(gx, 3, -1), jnp.split(gh, 3, -1)
        z = nn.sigmoid(xz + hz)
        n = jnp.tanh(xn + nn.sigmoid(xr + hr) * hn)
        return ((1 - z) * n + z * h,)

    def lstm(gx: Any, states: Any, gh: Any) -> Any:
        i, f, g, o = jnp.split(gx + gh, 4, -1)
        c = nn.sigmoid(f) * states[1] + nn.sigmoid(i) * jnp.tanh(g)
        return nn.sigmoid(o) * jnp.tanh(c), c

    return {"rnn_tanh": rnn_tanh, "gru": gru, "lstm": lstm}[cell]
