"""
Forecast from histories of different lengths
============================================

Hourly demand with a daily and a weekly pattern: a GRU reads 24 to 96 hours of history, as many as
there are of each series, and forecasts the next 24. Rows of different lengths are one call.
"""

import matplotlib.pyplot as plt
import numpy as np

import xprnn

rng = np.random.default_rng(0)
HORIZON, LONGEST, SERIES = 24, 96, 256


def make_series(count, hours):
    """Demand (count, hours): a daily and a weekly pattern, with random phases and sizes."""
    t = np.arange(hours) + rng.integers(0, 168, (count, 1))
    daily = rng.uniform(0.5, 1.5, (count, 1)) * np.sin(2 * np.pi * t / 24)
    weekend = rng.uniform(0.2, 0.8, (count, 1)) * (t // 24 % 7 >= 5)
    return daily * (1 - weekend) + 0.05 * rng.standard_normal((count, hours))


series = make_series(SERIES, LONGEST + HORIZON)
lengths = rng.integers(24, LONGEST + 1, SERIES)

# %%
# A row of the batch begins with the first hour of its history; what is beyond its length is not
# read and may be anything, here zero. The targets are the 24 hours that follow.

x = np.zeros((LONGEST, SERIES, 1))
targets = np.zeros((SERIES, HORIZON))
for row, length in enumerate(lengths):
    x[:length, row, 0] = series[row, :length]
    targets[row] = series[row, length : length + HORIZON]

layer = xprnn.GRU(1, 48, seed=0)
readout = xprnn.Linear(48, HORIZON, seed=1)
x, targets = layer.asarray(x), layer.asarray(targets)
train, test = slice(0, 192), slice(192, SERIES)

# %%
# ``h_n`` is the state of each row after its own last hour.

layer.train(), readout.train()
optimizer = xprnn.optim.Adam([layer, readout], lr=1e-2)
decay = xprnn.optim.CosineDecay(optimizer, steps=80)
losses = []
for _ in range(80):
    _, h_n = layer(x[:, train], lengths=lengths[train])
    loss, dforecast = xprnn.mse_loss(readout(h_n[0]), targets[train])
    optimizer.zero_grad()
    layer.backward(None, readout.backward(dforecast)[None])
    xprnn.optim.clip_grad_norm([layer, readout], 1.0)
    optimizer.step()
    decay.step()
    losses.append(xprnn.to_numpy(loss))

# %%
# Against a simple forecast on series that were not seen: the last 24 hours again.

layer.eval(), readout.eval()
_, h_n = layer(x[:, test], lengths=lengths[test])
forecast = xprnn.to_numpy(readout(h_n[0]))
actual = xprnn.to_numpy(targets[test])
yesterday = np.stack(
    [row[length - 24 : length] for row, length in zip(series[test], lengths[test], strict=True)]
)
error = np.sqrt(((forecast - actual) ** 2).mean())
simple = np.sqrt(((yesterday - actual) ** 2).mean())
print(f"root mean square error: GRU {error:.3f}, the last 24 hours again {simple:.3f}")
assert error < simple

# %%

figure, panels = plt.subplots(1, 3, figsize=(10, 3), sharey=True, layout="constrained")
for row, axes in zip((0, 1, 2), panels, strict=True):
    length = lengths[test][row]
    future = np.arange(HORIZON)
    axes.plot(np.arange(-length, 0), series[test][row, :length], color="grey", label="history")
    axes.plot(future, actual[row], color="black", label="actual")
    axes.plot(future, forecast[row], color="tab:orange", label="forecast")
    axes.set(xlabel="hours from now", title=f"{length} hours of history")
panels[0].set_ylabel("demand")
panels[0].legend()
plt.show()
