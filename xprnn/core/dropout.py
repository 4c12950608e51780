"""Dropout between layers: N. Srivastava et al., "Dropout" (JMLR 15, 2014), inverted scaling.

Whether an element is kept depends only on (seed, call, layer, t, the caller's row, feature),
by integer hashing. The mask is the same on every backend, in every order of rows and in every
run, so `backward` recomputes it instead of storing it.
"""

from __future__ import annotations

from typing import Any

from ..backend import Array

_MASK = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15
ROW_FINALISER = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1))  # of 64 bits
FEATURE = 0x9E3779B9
FINALISER = ((16, 0x7FEB352D), (15, 0x846CA68B), (16, 1))  # shifts and factors, of 32 bits
BLOCK = 1 << 20  # elements hashed at a time, 16 bytes each; a smaller block means more launches


def _mix_host(value: int) -> int:
    """The finaliser of SplitMix64 (G. L. Steele et al., 2014) on one 64-bit integer."""
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB & _MASK
    return value ^ (value >> 31)


def _mix(xp: Any, value: Array) -> Array:
    """`_mix_host` on an array of uint64, in place; products wrap around."""
    shifted = xp.empty_like(value)
    for shift, factor in ROW_FINALISER:
        xp.right_shift(value, xp.uint64(shift), out=shifted)
        value ^= shifted
        value *= xp.uint64(factor)
    return value


def apply(xp: Any, x: Array, p: float, key: tuple[int, int, int], time: Array, row: Array) -> None:
    """Overwrite x (S, F) with x * kept / (1 - p), kept with probability 1 - p.

    `key` is (seed, call, layer); `time` and `row` (S,) are the step and the batch row of each row
    of x. The operation is its own backward pass: apply it to the upstream gradient.
    """
    if x.dtype.itemsize < 4:  # float16 and bfloat16 are computed in float32
        upcast = x.astype(xp.float32)
        apply(xp, upcast, p, key, time, row)
        x[...] = upcast
        return
    if p >= 1.0:
        x[...] = 0.0
        return
    root, rows = root_of(key), max(BLOCK // max(x.shape[1], 1), 1)
    for start in range(0, x.shape[0], rows):
        block = slice(start, start + rows)
        _apply(xp, x[block], p, root, time[block], row[block])


def workspace_bytes(S: int, F: int) -> int:
    """The bytes that `apply` to x (S, F) needs in addition to x, including `time` and `row`."""
    block = min(S * F, BLOCK)
    return 16 * (block + S)


def keep(
    xp: Any,
    rate: float,
    key: tuple[int, ...],
    at: tuple[Array, Array],
    width: int,
    dtype: Any,
) -> Array:
    """A new mask (S, width), 0 with probability `rate` and else 1.

    :param at: the step and the batch row of each row of the mask.
    """
    mask = xp.empty((at[0].shape[0], width), dtype)
    rows = max(BLOCK // max(width, 1), 1)
    for start in range(0, mask.shape[0], rows):
        block = slice(start, start + rows)
        mask[block] = _is_kept(xp, *row_keys(xp, key, at[0][block], at[1][block]), width, rate)
    return mask


def drawing_bytes(S: int, F: int) -> int:
    """The bytes that `keep` needs in addition to its mask (S, F): two hashes and a bool of each."""
    return 9 * min(S * F, BLOCK)


def row_keys(xp: Any, key: tuple[int, ...], time: Array, row: Array) -> tuple[Array, Array]:
    """The two keys (S,), uint32, of the rows of a mask."""
    h = _mix(xp, time.astype(xp.uint64) * xp.uint64(GOLDEN) + xp.uint64(root_of(key)))
    h = _mix(xp, h ^ (row.astype(xp.uint64) * xp.uint64(GOLDEN)))
    return h.astype(xp.uint32), (h >> xp.uint64(32)).astype(xp.uint32)


def threshold(rate: float) -> int:
    """The least hash of 32 bits of an element that is kept; 24 bits decide."""
    return min(round(rate * (1 << 24)) << 8, (1 << 32) - 1)


def _is_kept(xp: Any, low: Array, high: Array, width: int, rate: float) -> Array:
    """Whether each element is kept, bool (S, width): a hash of 32 bits of its row's keys.

    The finaliser is `lowbias32` of C. Wellons, "Prospecting for hash functions" (2018).
    """
    feature = xp.arange(width).astype(xp.uint32) * xp.uint32(FEATURE)
    h = low[:, None] ^ feature[None, :]
    shifted = xp.empty_like(h)
    for shift, factor in FINALISER:
        xp.right_shift(h, xp.uint32(shift), out=shifted)
        h ^= shifted
        h *= xp.uint32(factor)
    h ^= high[:, None]
    return h >= xp.uint32(threshold(rate))


def root_of(key: tuple[int, ...]) -> int:
    """The hash of a key."""
    root = 0
    for part in key:
        root = _mix_host((root ^ (part & _MASK)) + GOLDEN & _MASK)
    return root


def _apply(xp: Any, x: Array, p: float, root: int, time: Array, row: Array) -> None:
    """`apply`, given the hash of its key."""
    x *= _kept(xp, p, root, time, row, x.shape[1])
    x *= 1.0 / (1.0 - p)


def _kept(xp: Any, p: float, root: int, time: Array, row: Array, width: int) -> Array:
    """Whether each element is kept, bool (S, width)."""
    h = _mix(xp, time.astype(xp.uint64) * xp.uint64(GOLDEN) + xp.uint64(root))
    h = _mix(xp, h ^ (row.astype(xp.uint64) * xp.uint64(GOLDEN)))
    feature = xp.arange(width).astype(xp.uint64) * xp.uint64(GOLDEN)
    h = _mix(xp, h[:, None] ^ feature[None, :])
    return h >= xp.uint64(round(p * (1 << 24)) << 40)  # 24 bits decide
