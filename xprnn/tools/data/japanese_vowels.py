"""The data set of the demo: Japanese Vowels, nine speakers; README.md has source and licence."""

from __future__ import annotations

from importlib.resources import as_file, files
from typing import NamedTuple

import numpy as np

FILE = files(__package__) / "japanese_vowels.npz"


class Utterances(NamedTuple):
    """A set of recordings: padded frames, lengths and speakers."""

    x: np.ndarray  # (N, T, 12) float32, standardised, zero after the end of a recording
    lengths: np.ndarray  # (N,) int64, frames
    speakers: np.ndarray  # (N,) int64, 0 to 8


def japanese_vowels() -> tuple[Utterances, Utterances]:
    """The 270 training and 370 test utterances, standardised by the training frames.

    A frame is 12 linear-prediction coefficients; x -> (x - mean) / std per coefficient, mean
    and standard deviation taken over all training frames. Source: M. Kudo, J. Toyama,
    M. Shimbo (1999), UCI Machine Learning Repository, "Japanese Vowels", CC BY 4.0.

    >>> train, test = japanese_vowels()
    >>> train.x.shape, test.x.shape, sorted(set(train.speakers.tolist()))
    ((270, 29, 12), (370, 29, 12), [0, 1, 2, 3, 4, 5, 6, 7, 8])
    """
    with as_file(FILE) as path, np.load(path) as arrays:
        stored = dict(arrays)
    mean = stored["train_frames"].mean(axis=0)
    std = stored["train_frames"].std(axis=0)
    steps = int(max(stored["train_lengths"].max(), stored["test_lengths"].max()))
    train, test = (
        Utterances(
            _pad((stored[f"{part}_frames"] - mean) / std, stored[f"{part}_lengths"], steps),
            stored[f"{part}_lengths"].astype(np.int64),
            stored[f"{part}_speakers"].astype(np.int64),
        )
        for part in ("train", "test")
    )
    return train, test


def _pad(frames: np.ndarray, lengths: np.ndarray, steps: int) -> np.ndarray:
    """Frames (S, F) of consecutive utterances as (N, T, F), zero after each end."""
    x = np.zeros((lengths.size, steps, frames.shape[1]), np.float32)
    x[np.arange(steps)[None, :] < lengths[:, None]] = frames
    return x
