"""Compare the demo's training with the same training in torch: time, ratio and test accuracy.

    python benchmarks/demo_vs_torch.py [--cell gru] [--rounds 5] [--epochs 40] [--threads 1]

Each library runs in its own process (two thread pools in one process slow each other down), in
interleaved rounds; the seconds are those of the training alone, after one warm-up epoch. Needs
torch.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from xprnn.tools.data.japanese_vowels import Utterances

CELLS = ("gru", "lstm", "rnn")


def main() -> None:
    options = _options()
    if options.library:
        print(*LIBRARIES[options.library](options.cell, options.epochs, options.seed))
        return
    seconds: dict[str, list[float]] = {library: [] for library in LIBRARIES}
    accuracies: dict[str, list[float]] = {library: [] for library in LIBRARIES}
    for seed in range(options.rounds):
        for library in LIBRARIES:
            taken, accuracy = _measure(library, seed, options)
            seconds[library].append(taken)
            accuracies[library].append(accuracy)
    print(f"{options.cell}, {options.epochs} epochs, {options.rounds} rounds, medians")
    for library in LIBRARIES:
        print(
            f"{library:6} {statistics.median(seconds[library]):6.2f} s "
            f"({min(seconds[library]):.2f} to {max(seconds[library]):.2f}), "
            f"test accuracy {100 * statistics.median(accuracies[library]):.1f} %"
        )
    ratios = [t / x for t, x in zip(seconds["torch"], seconds["xprnn"], strict=True)]
    print(
        f"torch / xprnn, round by round: median {statistics.median(ratios):.2f} "
        f"({min(ratios):.2f} to {max(ratios):.2f})"
    )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cell", choices=CELLS, default="gru")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--threads", type=int, help="of each library; default: its own")
    parser.add_argument("--seed", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--library", choices=sorted(LIBRARIES), help=argparse.SUPPRESS)
    return parser.parse_args()


def _measure(library: str, seed: int, options: argparse.Namespace) -> tuple[float, float]:
    """The seconds and the test accuracy of one training in a new process."""
    command = [sys.executable, __file__, "--library", library, "--seed", str(seed)]
    command += ["--cell", options.cell, "--epochs", str(options.epochs)]
    environment = dict(os.environ)
    if options.threads:
        for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
            environment[name] = str(options.threads)
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    taken, accuracy = done.stdout.split()
    return float(taken), float(accuracy)


def train_xprnn(cell: str, epochs: int, seed: int) -> tuple[float, float]:
    """Train the demo's model; returns the seconds and the test accuracy."""
    from xprnn.tools.data.japanese_vowels import japanese_vowels

    demo = _demo()
    train, test = japanese_vowels()
    demo.train(demo.build(cell, seed, "numpy"), train, 1, seed, _silent)
    model = demo.build(cell, seed, "numpy")
    start = time.perf_counter()
    demo.train(model, train, epochs, seed, _silent)
    taken = time.perf_counter() - start
    return taken, float((model.predict(test) == test.speakers).mean())


def _silent(epoch: int, loss: float, accuracy: float) -> None:
    pass


def train_torch(cell: str, epochs: int, seed: int) -> tuple[float, float]:
    """The same with torch: same model, data, batch order, optimiser, schedule and clipping."""
    import torch

    from xprnn.tools.data.japanese_vowels import japanese_vowels

    torch.manual_seed(seed)
    train, test = japanese_vowels()
    train_in_torch(cell, train, 1, seed)
    start = time.perf_counter()
    logits = train_in_torch(cell, train, epochs, seed)
    taken = time.perf_counter() - start
    with torch.no_grad():
        predicted = logits(torch.from_numpy(test.x), torch.from_numpy(test.lengths)).argmax(1)
    return taken, float((predicted.numpy() == test.speakers).mean())


def train_in_torch(cell: str, data: Utterances, epochs: int, seed: int, device: str = "cpu") -> Any:
    """Build the model, train it, and return the function that computes its logits."""
    import numpy as np
    import torch

    demo = _demo()
    kind = {"gru": torch.nn.GRU, "lstm": torch.nn.LSTM, "rnn": torch.nn.RNN}[cell]
    layer = kind(12, demo.HIDDEN, bidirectional=True, batch_first=True).to(device)
    readout = torch.nn.Linear(2 * demo.HIDDEN, demo.SPEAKERS).to(device)
    parameters = [*layer.parameters(), *readout.parameters()]
    x, lengths, speakers = (torch.from_numpy(array) for array in data)
    x, speakers = x.to(device), speakers.to(device)  # packing needs lengths on the host
    count = len(speakers)
    optimizer = torch.optim.Adam(parameters, lr=demo.LEARNING_RATE)
    batches = epochs * -(-count // demo.BATCH)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, batches)

    def logits(x, lengths):
        packed = torch.nn.utils.rnn.pack_padded_sequence(
            x, lengths, batch_first=True, enforce_sorted=False
        )
        _, final = layer(packed)
        h_n = final[0] if isinstance(final, tuple) else final
        return readout(torch.cat([h_n[0], h_n[1]], dim=1))

    rng = np.random.default_rng(seed)
    for _ in range(epochs):
        order = torch.from_numpy(rng.permutation(count))
        losses, correct = 0.0, 0
        for rows in order.split(demo.BATCH):
            scores = logits(x[rows], lengths[rows])
            loss = torch.nn.functional.cross_entropy(scores, speakers[rows])
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, demo.MAX_NORM)
            optimizer.step()
            decay.step()
            losses += loss.item() * len(rows)
            correct += int((scores.argmax(1) == speakers[rows]).sum())
    return logits


def _demo() -> Any:
    """xprnn's demo, also that of older versions: asv trains with this function too."""
    try:
        from xprnn.tools import demo
    except ImportError:
        from xprnn import demo
    return demo


LIBRARIES = {"xprnn": train_xprnn, "torch": train_torch}

if __name__ == "__main__":
    main()
