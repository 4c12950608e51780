"""The demo: a bidirectional layer learns to distinguish nine speakers in real recordings."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..backend import Array, BackendName, asarray, to_numpy
from ..nn.layers import GRU, LSTM, RNN
from ..nn.linear import Linear
from ..nn.losses import softmax_cross_entropy
from ..nn.module import load
from ..nn.serialization import check_outputs, replacing
from ..optim import Adam, CosineDecay, clip_grad_norm
from .data.japanese_vowels import FILE, Utterances, japanese_vowels

HIDDEN, BATCH, LEARNING_RATE, MAX_NORM = 64, 30, 3e-3, 1.0
SPEAKERS = 9
LAYERS: dict[str, Any] = {"gru": GRU, "lstm": LSTM, "rnn": RNN}

Report = Callable[[int, float, float], None]  # epoch, mean loss, training accuracy (0 to 1)


@dataclass(frozen=True)
class Classifier:
    """A bidirectional layer and a linear read-out of class scores from its two final states."""

    layer: Any
    readout: Linear

    def logits(self, x: np.ndarray, lengths: np.ndarray) -> Array:
        """Scores (N, 9) of utterances x (N, T, 12) of these lengths."""
        backend = self.layer.backend
        _, final = self.layer(asarray(x, backend=backend.name), lengths=lengths)
        h_n = final[0] if isinstance(final, tuple) else final
        with backend.activate():
            return self.readout(backend.xp.concatenate([h_n[0], h_n[1]], axis=1))

    def backward(self, dlogits: Array) -> None:
        """Add the gradients of all parameters for dL/dlogits (N, 9)."""
        dfeatures = self.readout.backward(dlogits)
        with self.layer.backend.activate():
            halves = [dfeatures[:, :HIDDEN], dfeatures[:, HIDDEN:]]
            dh_n = self.layer.backend.xp.stack(halves)
        dhx = (dh_n, None) if isinstance(self.layer, LSTM) else dh_n
        self.layer.backward(None, dhx, need_dx=False)

    def predict(self, utterances: Utterances) -> np.ndarray:
        """The predicted speaker of each utterance, (N,); in eval mode."""
        self.layer.eval()
        self.readout.eval()
        scores = to_numpy(self.logits(utterances.x, utterances.lengths))
        return np.asarray(scores.argmax(axis=1))


def build(cell: str, seed: int, backend: BackendName | None) -> Classifier:
    """An untrained classifier; `cell` is a key of `LAYERS`."""
    layer = LAYERS[cell](
        12, HIDDEN, bidirectional=True, batch_first=True, backend=backend, seed=seed
    )
    # another seed: with the same, both modules would draw the same numbers
    next_seed = (seed + 1) % 2**63
    readout = Linear(2 * HIDDEN, SPEAKERS, backend=layer.backend.name, seed=next_seed)
    return Classifier(layer, readout)


def train(model: Classifier, data: Utterances, epochs: int, seed: int, report: Report) -> None:
    """Train with Adam and cosine decay on shuffled batches of 30, gradients clipped to norm 1."""
    modules = [model.layer.train(), model.readout.train()]
    optimizer = Adam(modules, lr=LEARNING_RATE)
    count = len(data.speakers)
    decay = CosineDecay(optimizer, epochs * -(-count // BATCH))
    rng = np.random.default_rng(seed)
    for epoch in range(epochs):
        losses, predictions = [], []  # copied once per epoch: a copy waits for the GPU
        order = rng.permutation(count)
        for start in range(0, count, BATCH):
            rows = order[start : start + BATCH]
            speakers = data.speakers[rows]
            logits = model.logits(data.x[rows], data.lengths[rows])
            loss, dlogits = softmax_cross_entropy(logits, speakers)
            optimizer.zero_grad()
            model.backward(dlogits)
            clip_grad_norm(modules, MAX_NORM)
            optimizer.step()
            decay.step()
            losses.append((loss, rows.size))
            predictions.append(logits)
        predicted = np.concatenate([to_numpy(logits).argmax(axis=1) for logits in predictions])
        accuracy = float((predicted == data.speakers[order]).mean())
        total = sum(float(to_numpy(loss)) * size for loss, size in losses)
        report(epoch + 1, total / count, accuracy)


@dataclass(frozen=True)
class Outcome:
    """The results of a run of the demo."""

    backend: str
    seconds: float  # of training
    utterances_per_second: float  # in training
    accuracy: float  # on the test set, 0 to 1
    folder: Path


def run(
    cell: str, epochs: int, seed: int, backend: BackendName | None, folder: Path, report: Report
) -> Outcome:
    """Train, save, load, check that the loaded model makes the same predictions, and test.

    Written to `folder`: model.safetensors, readout.safetensors, and the test set as
    test_x.npy (370, 29, 12), test_lengths.npy (370,) and test_y.npy (370,), for `xprnn run`.

    :raises ValueError: links in `folder` make two of these files one, or one of them the data file.
    :raises RuntimeError: the loaded model's predictions differ from those of the trained one.
    """
    model = build(cell, seed, backend)
    training, test = japanese_vowels()
    arrays = {"test_x.npy": test.x, "test_lengths.npy": test.lengths, "test_y.npy": test.speakers}
    folder.mkdir(parents=True, exist_ok=True)
    layer_file, readout_file = folder / "model.safetensors", folder / "readout.safetensors"
    check_outputs([layer_file, readout_file, *(folder / name for name in arrays)], [str(FILE)])
    resolved = model.layer.backend
    start = time.perf_counter()
    train(model, training, epochs, seed, report)
    resolved.synchronize()
    seconds = time.perf_counter() - start

    predicted = model.predict(test)
    model.layer.save(layer_file)
    model.readout.save(readout_file)
    for name, array in arrays.items():
        with replacing(folder / name) as part, part.open("wb") as file:
            np.save(file, array)
    layer, readout = (load(path, backend=resolved.name) for path in (layer_file, readout_file))
    if not np.array_equal(Classifier(layer, readout).predict(test), predicted):
        raise RuntimeError(
            f"{folder}: the loaded model's predictions differ from the trained one's"
        )
    rate = epochs * len(training.speakers) / seconds
    accuracy = float((predicted == test.speakers).mean())
    return Outcome(resolved.name, seconds, rate, accuracy, folder)
