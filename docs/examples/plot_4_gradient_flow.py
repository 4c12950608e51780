"""
The gradient of each state
==========================

The norm of the gradient that flows back through an Elman layer, from the last state to the first.
"""

import matplotlib.pyplot as plt
import numpy as np

import xprnn

rng = np.random.default_rng(0)
figure, axes = plt.subplots()
for radius in (0.8, 1.0, 1.3):
    rnn = xprnn.RNN(4, 32, dtype="float64", seed=0)
    weights = rng.standard_normal((32, 32))
    weights *= radius / abs(np.linalg.eigvals(weights)).max()
    rnn.load_state_dict({**rnn.state_dict(), "weight_hh_l0": weights})
    flow = xprnn.gradient_flow(rnn, rnn.xp.zeros((50, 1, 4)))
    axes.semilogy(flow.norms[0], label=f"radius {radius}")
axes.set(xlabel="step t", ylabel="‖dL/dh_t‖")
axes.legend()
plt.show()
