"""
A language model with carried state
===================================

An LSTM reads English text character by character in windows of 40. The state at the end of a window
is the initial state of the next one, so the model remembers more than a window; the gradient stays
within it (truncated back-propagation through time). Then the model generates text: a stepper runs
it one character at a time.
"""

from pydoc_data.topics import topics  # the reference manual that comes with Python

import matplotlib.pyplot as plt
import numpy as np

import xprnn

text = " ".join(" ".join(topics.values()).split())[:48_000]
alphabet = sorted(set(text))
index = {character: k for k, character in enumerate(alphabet)}
print(f"{len(text)} characters, {len(alphabet)} different ones")

# %%
# The text is cut into 32 streams that are read side by side: inputs are (steps, streams). Targets
# are the characters that follow.

STREAMS, WINDOW = 32, 40
symbols = np.array([index[character] for character in text])
steps = (len(symbols) - 1) // STREAMS // WINDOW * WINDOW
inputs = symbols[: STREAMS * steps].reshape(STREAMS, steps).T
targets = symbols[1 : STREAMS * steps + 1].reshape(STREAMS, steps).T

embedding = xprnn.Embedding(len(alphabet), 24, seed=0)
layer = xprnn.LSTM(24, 96, seed=1)
readout = xprnn.Linear(96, len(alphabet), seed=2)
model = [embedding, layer, readout]

# %%
# A recorded call for each window. The carried state is passed as an array: no gradient flows into
# it, and what ``backward`` returns for it is not used.

for module in model:
    module.train()
optimizer = xprnn.optim.Adam(model, lr=1e-2)
bits = []
for _ in range(4):
    state = None
    for start in range(0, steps, WINDOW):
        window = slice(start, start + WINDOW)
        output, state = layer(embedding(inputs[window]), state)
        loss, dlogits = xprnn.softmax_cross_entropy(readout(output), targets[window])
        optimizer.zero_grad()
        dx, _ = layer.backward(readout.backward(dlogits), None)
        embedding.backward(dx)
        xprnn.optim.clip_grad_norm(model, 1.0)
        optimizer.step()
        bits.append(float(xprnn.to_numpy(loss)) / np.log(2))

# %%
# Generate text. The stepper keeps the state; each character is drawn from the predicted
# distribution, with a temperature of 0.6.

for module in model:
    module.eval()
stepper = layer.stepper(1)
rng = np.random.default_rng(0)
generated = "The "
for k in range(200):
    # the first characters are given, the others are those that the model has generated
    output = stepper.step(embedding([index[generated[k]]]))
    if k + 1 == len(generated):
        logits = xprnn.to_numpy(readout(output))[0].astype(float) / 0.6
        p = np.exp(logits - logits.max())
        generated += alphabet[rng.choice(len(alphabet), p=p / p.sum())]
print(generated)

# %%
# Bits per character, beside those of a model that knows only how frequent each character is:

frequency = np.bincount(symbols) / len(symbols)
unigram = -(frequency * np.log2(frequency)).sum()
print(f"{np.mean(bits[-30:]):.2f} bits a character, {unigram:.2f} by frequency alone")
assert np.mean(bits[-30:]) < 0.75 * unigram

figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
axes.plot(bits, label="LSTM, carried state")
axes.axhline(unigram, color="grey", linestyle="--", label="frequency of characters")
axes.set(xlabel="training step", ylabel="bits per character", ylim=(0, None))
axes.legend()
plt.show()
