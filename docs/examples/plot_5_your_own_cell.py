"""
Your own cell
=============

The Li-GRU of speech recognition, typed into this file, learns to distinguish nine speakers, is
saved, loaded, and run frame by frame. Its gradient is derived from its equations:
:doc:`/guide/your_own_cell` has the rules.
"""

import tempfile

import matplotlib.pyplot as plt
import numpy as np

import xprnn
from xprnn.tools.data.japanese_vowels import japanese_vowels


@xprnn.cell(gates=("z", "n"))
def ligru(f, x, s):
    """M. Ravanelli et al. (2018), without batch norm."""
    gh = f.recurrent(s.h)  # h W_hh' + b_hh, by gate
    z = f.sigmoid(x.z + gh.z)  # x: the input side by gate, b_ih included
    n = f.relu(x.n + gh.n)
    return n + z * (s.h - n)


# %%
# A layer of it has the arguments and methods of the other layers, and torch's names of parameters.

layer = xprnn.Recurrent(ligru, 12, 64, seed=0)
readout = xprnn.Linear(64, 9, seed=1)
print({name: array.shape for name, array in layer.parameters.items()})

# %%
# The derived gradient, compared with differences in float64:

print(xprnn.gradcheck(layer, layer.asarray(np.random.default_rng(0).standard_normal((5, 2, 12)))))

# %%
# Training, as for a built-in layer. The recordings are (N, T, 12), of different lengths; the layer
# has time first.

train, test = japanese_vowels()
optimizer = xprnn.optim.Adam([layer.train(), readout.train()], lr=3e-3)
rng, losses = np.random.default_rng(0), []
for _ in range(20):
    for rows in np.array_split(rng.permutation(len(train.speakers)), 9):
        _, h_n = layer(layer.asarray(train.x[rows].swapaxes(0, 1)), lengths=train.lengths[rows])
        loss, dscores = xprnn.softmax_cross_entropy(readout(h_n[0]), train.speakers[rows])
        optimizer.zero_grad()
        layer.backward(None, readout.backward(dscores)[None])
        xprnn.optim.clip_grad_norm([layer, readout], 1.0)
        optimizer.step()
        losses.append(xprnn.to_numpy(loss))

# %%
# A file holds the numbers, and of the cell its name and a hash of its equations: the code is passed
# when it is loaded, and other equations than those that were trained are refused.

with tempfile.TemporaryDirectory() as folder:
    layer.save(f"{folder}/ligru.safetensors")
    loaded = xprnn.load(f"{folder}/ligru.safetensors", cells=[ligru])

# %%
# Streaming: ten recordings at once, each frame as it arrives. The scores after each frame are those
# that the loaded layer would compute from the recording up to there.

count = 10
stepper, lengths = loaded.stepper(count), test.lengths[:count]
readout.eval()
certainty = []
for t in range(lengths.max()):
    frames = loaded.asarray(test.x[:count, t])
    scores = xprnn.to_numpy(readout(stepper.step(frames, rows=t < lengths)))
    p = np.exp(scores - scores.max(axis=1, keepdims=True))
    certainty.append((p / p.sum(axis=1, keepdims=True))[range(count), test.speakers[:count]])

_, h_n = loaded(loaded.asarray(test.x.swapaxes(0, 1)), lengths=test.lengths)
predicted = xprnn.to_numpy(readout(h_n[0])).argmax(axis=1)
accuracy = (predicted == test.speakers).mean()
print(f"test accuracy {100 * accuracy:.1f} %")
assert (scores.argmax(axis=1) == predicted[:count]).all()
assert accuracy > 0.85

figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
left.semilogy(losses)
left.set(xlabel="training step", ylabel="cross-entropy", title="Training")
right.plot(np.array(certainty), color="C0", alpha=0.6)
right.set(xlabel="frame", ylabel="probability of the speaker", title="Ten recordings, streamed")
plt.show()
