"""Plot why an Elman RNN's gradients vanish or explode, and the remedies.

Run `python benchmarks/gradient_flow_plot.py` (needs matplotlib, takes about a minute). It writes
results/gradient_flow.png and prints the numbers of docs/theory/exploding.md.

Left: `xprnn.gradient_flow` on networks whose recurrent matrices are orthogonal times a radius, so
that at rest (x = 0, where tanh has slope 1) the gradient's factor per step is exactly the radius.
Right: an Elman RNN with radius 1.3 learns to recall its first input 50 steps later, with and
without `clip_grad_norm`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    import xprnn

H, STEPS_BACK = 32, 60
I = 2  # noqa: E741
DELAY, ROWS, NOISE = 50, 64, 0.02  # the recall task
TRAINING_STEPS, LR, MOMENTUM, MAX_NORM, SEEDS = 400, 0.03, 0.9, 1.0, range(5)
MEAN_OF = 5  # training steps averaged in a point of the curves
GUESS = 1 / 3  # the loss of always answering 0: the variance of uniform(-1, 1)

BLUE, ORANGE, GREEN, RED, GREY = "#0072b2", "#d55e00", "#009e73", "#cc3377", "#666666"
PICTURE = Path(__file__).parent / "results" / "gradient_flow.png"


def orthogonal(seed: int) -> np.ndarray:
    """A random orthogonal matrix (H, H)."""
    import numpy as np

    q, _ = np.linalg.qr(np.random.default_rng(seed).standard_normal((H, H)))
    return q


def elman(radius: float) -> xprnn.RNN:
    """An Elman RNN whose recurrent matrix is orthogonal times `radius`, its biases 0."""
    import numpy as np

    import xprnn

    layer = xprnn.RNN(I, H, dtype="float64", seed=0)
    layer.parameters["weight_hh_l0"] = radius * orthogonal(0)
    for name in ("bias_ih_l0", "bias_hh_l0"):
        layer.parameters[name] = np.zeros(H)
    return layer


def gru(radius: float, update_bias: float) -> xprnn.GRU:
    """A GRU with three such recurrent blocks; all biases are 0 except the update gate's."""
    import numpy as np

    import xprnn

    layer = xprnn.GRU(I, H, dtype="float64", seed=0)
    layer.parameters["weight_hh_l0"] = radius * np.concatenate([orthogonal(s) for s in range(3)])
    layer.parameters["bias_hh_l0"] = np.zeros(3 * H)
    layer.parameters["bias_ih_l0"] = np.repeat([0.0, update_bias, 0.0], H)
    return layer


def relative_flow(layer: Any, size: float) -> np.ndarray:
    """The gradient's norm 0, 1, ... steps back from the last state, divided by the norm there.

    The inputs of the 16 rows are standard normal times `size`.
    """
    import numpy as np

    from xprnn.diagnostics.gradient_norms import gradient_flow

    x = size * np.random.default_rng(0).standard_normal((STEPS_BACK + 1, 16, I))
    norms: np.ndarray = gradient_flow(layer, x).norms[0, ::-1]
    return norms / norms[0]


def train(lr: float, max_norm: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Losses, and gradient norms before clipping, of an Elman RNN of radius 1.3 on the task."""
    import numpy as np

    import xprnn
    from xprnn.optim import SGD, clip_grad_norm

    rng = np.random.default_rng(seed)
    layer, readout = elman(1.3).train(), xprnn.Linear(H, 1, dtype="float64", seed=1).train()
    optimizer = SGD([layer, readout], lr=lr, momentum=MOMENTUM)
    losses, norms = [], []
    for _ in range(TRAINING_STEPS):
        x = NOISE * rng.standard_normal((DELAY + 1, ROWS, I))
        x[0] = rng.uniform(-1, 1, (ROWS, I))
        layer.zero_grad()
        readout.zero_grad()
        _, h_n = layer(x)
        loss, dprediction = xprnn.mse_loss(readout(h_n[0]), x[0, :, :1])
        dh_n = readout.backward(dprediction)
        layer.backward(None, dh_n[None], need_dx=False)
        norms.append(float(clip_grad_norm([layer, readout], max_norm)))
        losses.append(float(loss))
        optimizer.step()
    return np.array(losses), np.array(norms)


def draw_flow(axes: Any) -> None:
    """Draw the left panel and print its numbers."""
    at_rest, busy = 0.0, 1.0
    curves = [
        ("Elman 1.3", elman(1.3), at_rest, ORANGE, "-", (41, 5.0), "right"),
        ("Elman 1.3, inputs of size 1", elman(1.3), busy, ORANGE, ":", (59, 0.95), "right"),
        ("Elman 1.0", elman(1.0), at_rest, GREY, "-", (7, 0.3), "left"),
        ("GRU 1.3, update gate open", gru(1.3, 4.0), at_rest, GREEN, "-", (59, -1.2), "right"),
        ("GRU 1.3, gate half open", gru(1.3, 0.0), at_rest, GREEN, ":", (33, -4.5), "right"),
        ("Elman 0.8", elman(0.8), at_rest, BLUE, "-", (43, -3.6), "left"),
    ]
    print(f"gradient {STEPS_BACK} steps back / at the last state; inputs 0 unless stated")
    for name, layer, size, colour, style, (x, exponent), align in curves:
        flow = relative_flow(layer, size)
        axes.semilogy(flow, color=colour, linestyle=style)
        axes.text(x, 10**exponent, name, color=colour, ha=align)
        print(f"  {name:28} {flow[-1]:.3g}")
    axes.axhspan(1e2, 1e9, color=ORANGE, alpha=0.06, linewidth=0)
    axes.axhspan(1e-9, 1e-2, color=BLUE, alpha=0.06, linewidth=0)
    axes.text(1, 10**7.3, "exploding", color=ORANGE, style="italic")
    axes.text(1, 10**-6.7, "vanishing", color=BLUE, style="italic")
    axes.set(
        xlim=(0, STEPS_BACK),
        ylim=(1e-7, 1e8),
        xlabel="steps back from the last state",
        ylabel="gradient norm, by that at the last state",
        title="What reaches each step, by recurrent radius",
    )


def draw_training(axes: Any) -> None:
    """Draw the right panel and print its numbers."""
    import numpy as np

    print(f"recall after {DELAY} steps, Elman 1.3, loss of the last 20 of {TRAINING_STEPS} steps:")
    for lr in (0.003, 0.01, LR):
        for max_norm, colour, name in (
            (np.inf, ORANGE, "without clipping"),
            (MAX_NORM, GREEN, f"clip_grad_norm(..., {MAX_NORM:g})"),
        ):
            runs = [train(lr, max_norm, seed) for seed in SEEDS]
            losses = np.array([losses for losses, _ in runs])
            final = np.sort(losses[:, -20:].mean(axis=1))
            largest = max(norms.max() for _, norms in runs)
            print(
                f"  lr {lr:<5g} {name:24} {final[0]:.4f} to {final[-1]:.4f}, "
                f"median of {len(final)} {np.median(final):.4f}; largest gradient {largest:.1f}"
            )
            if lr == LR:
                smooth = losses.reshape(len(SEEDS), -1, MEAN_OF).mean(axis=2)
                at = MEAN_OF * (np.arange(smooth.shape[1]) + 0.5)
                axes.semilogy(at, smooth.T, color=colour, alpha=0.3, linewidth=0.8)
                axes.semilogy(at, np.median(smooth, axis=0), color=colour, linewidth=2, label=name)
    axes.axhline(GUESS, color=GREY, linestyle="--", linewidth=1, label="always answering 0")
    axes.set(
        xlim=(0, TRAINING_STEPS),
        ylim=(1e-4, 10),
        xlabel="training step",
        ylabel=f"mean squared error, {len(SEEDS)} seeds and their median",
        title=f"Recall after {DELAY} steps: Elman 1.3, SGD at {LR:g}",
    )
    axes.legend(frameon=False, fontsize=8)


def main() -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    figure, (left, right) = plt.subplots(1, 2, figsize=(8.2, 3.8), layout="constrained")
    draw_flow(left)
    draw_training(right)
    PICTURE.parent.mkdir(exist_ok=True)
    figure.savefig(PICTURE, dpi=110)
    print(f"wrote {PICTURE}")


if __name__ == "__main__":
    main()
