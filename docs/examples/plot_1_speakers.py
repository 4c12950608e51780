"""
Classify recordings of different lengths
========================================

A bidirectional GRU distinguishes nine speakers by two Japanese vowels: 270 training recordings of 7
to 26 frames, 370 test recordings, 12 numbers a frame. This is what ``xprnn demo`` does, spelt out;
to train on your own data, replace the arrays (:doc:`/guide/layers` shows how sequences are padded).
"""

import matplotlib.pyplot as plt
import numpy as np

import xprnn
from xprnn.tools.data.japanese_vowels import japanese_vowels

train, test = japanese_vowels()
print(train.x.shape, train.lengths[:5], train.speakers[:5])

# %%
# A layer, and a linear read-out of its two last states: the forward direction's at the end of each
# recording, and the reverse direction's at its beginning. Padding is neither read nor computed.

layer = xprnn.GRU(12, 64, bidirectional=True, batch_first=True, seed=0)
readout = xprnn.Linear(128, 9, seed=1)
xp = layer.xp


def scores(x, lengths):
    """The scores (N, 9) of recordings x (N, T, 12)."""
    _, h_n = layer(layer.asarray(x), lengths=lengths)
    return readout(xp.concatenate([h_n[0], h_n[1]], axis=1))


# %%
# Training in batches of 30. The gradient of the scores goes back through the read-out, and its two
# halves are the gradients of the two last states.

layer.train(), readout.train()
optimizer = xprnn.optim.Adam([layer, readout], lr=3e-3)
rng = np.random.default_rng(0)
losses = []
for _ in range(15):
    order = rng.permutation(len(train.speakers))
    for rows in np.array_split(order, 9):
        loss, dscores = xprnn.softmax_cross_entropy(
            scores(train.x[rows], train.lengths[rows]), train.speakers[rows]
        )
        optimizer.zero_grad()
        dfeatures = readout.backward(dscores)
        layer.backward(None, xp.stack([dfeatures[:, :64], dfeatures[:, 64:]]))
        xprnn.optim.clip_grad_norm([layer, readout], 1.0)
        optimizer.step()
        losses.append(xprnn.to_numpy(loss))

# %%
# The test set, in eval mode:

layer.eval(), readout.eval()
predicted = xprnn.to_numpy(scores(test.x, test.lengths)).argmax(axis=1)
accuracy = (predicted == test.speakers).mean()
print(f"test accuracy {100 * accuracy:.1f} %")
assert accuracy > 0.9

confusion = np.zeros((9, 9), int)
np.add.at(confusion, (test.speakers, predicted), 1)

figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
left.semilogy(losses)
left.set(xlabel="training step", ylabel="cross-entropy", title="Training")
image = right.imshow(confusion, cmap="Blues")
right.set(xlabel="predicted speaker", ylabel="speaker", title=f"Test: {100 * accuracy:.1f} %")
figure.colorbar(image, ax=right, label="recordings")
plt.show()
