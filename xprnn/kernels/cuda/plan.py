"""How a whole sequence is cut into the blocks of one launch, or why a device cannot hold it.

A block keeps the recurrent weights of 16 units for the whole sequence: those of its `held`
chunks in registers, the rest in shared memory. Its warps share the reduction. Slices of units
times groups of rows make the grid, and as all blocks wait for each other, all of them must be on
the device at once. Larger batches take several passes a step. Where very much is polled for,
blocks share that in clusters, if the device has them. Both directions of a layer go side by side
if all their blocks fit and that is estimated to take no longer, the layers of a wave wherever they
fit. Plain Python, no GPU needed.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any, NamedTuple

from ...arithmetic import Arithmetic
from .table import KERNELS, LAYERS, NO_KERNEL, Kernel, Tiling, in_waves

UNITS, TILE, WARP = 16, 8, 32  # units of a block, rows of a tile, threads of a warp
COUNTABLE = 2**31  # packed rows that the kernels' 32-bit counters do not reach

# What waiting for other blocks costs a pass, in products of a chunk with a tile: an estimate
LATENCY = 12

# Bytes that all blocks poll for in a pass from which on clusters share them; N=64, H=1024 of narrow
# numbers makes 8 MiB. An estimate: L2 takes 0.6 us for the half of 6 MiB, handing it over 0.3 us
SHARED_FROM = 6 << 20

# By what a product reads: elements of a chunk, those of 16 bytes, the kernels' name for it
CHUNK = {"float32": 16, "tf32": 16, "bfloat16": 32, "float16": 32}
GRAIN = {"float32": 4, "tf32": 4, "bfloat16": 8, "float16": 8}
KIND = {"float32": "TF32X3", "tf32": "TF32", "bfloat16": "BF16", "float16": "F16"}


class Device(NamedTuple):
    """What a GPU has; of a multiprocessor where nothing else is said."""

    capability: tuple[int, int]  # of the GPU
    processors: int  # multiprocessors of the GPU
    registers: int = 65536
    threads: int = 2048
    blocks: int = 32
    shared: int = 233472  # bytes
    shared_block: int = 232448  # bytes that a block can have
    shared_reserved: int = 1024  # bytes that each block takes besides
    cooperative: bool = True  # whether it launches blocks that wait for each other

    @classmethod
    def of(cls, cupy: Any, number: int) -> Device:
        """What CuPy says of a device."""
        facts = cupy.cuda.runtime.getDeviceProperties(number)
        return cls(
            (facts["major"], facts["minor"]),
            facts["multiProcessorCount"],
            facts["regsPerMultiprocessor"],
            facts["maxThreadsPerMultiProcessor"],
            facts["maxBlocksPerMultiProcessor"],
            facts["sharedMemPerMultiprocessor"],
            facts["sharedMemPerBlockOptin"],
            facts["reservedSharedMemPerBlock"],
            bool(facts["cooperativeLaunch"]),
        )


class Problem(NamedTuple):
    """One sequence kernel on one layer."""

    cell: str  # in cells.CELLS
    work: str  # "forward", "training" (forward, recorded) or "backward"
    numbers: str  # what products read: "float32", "tf32", "bfloat16", "float16" or "float64"
    N: int  # rows that take at least one step
    H: int
    T: int
    directions: int = 1  # 2: both, side by side
    layers: int = 1  # more: of one direction, in a wave


class Plan(NamedTuple):
    """One launch that fits."""

    name: str  # of the instantiation, in C++
    tiling: Tiling
    slices: int  # of 16 units, in whole clusters: the grid's first size
    groups: int  # of rows: the grid's second
    directions: int  # the grid's third, or
    layers: int  # of a wave
    passes: int  # of `tiles` tiles: a group's rows
    shared: int  # bytes a block
    registers: int  # a thread, at most
    resident: int  # blocks that share a multiprocessor

    @property
    def threads(self) -> int:
        """The threads of a block."""
        return self.tiling.warps * WARP

    @property
    def grid(self) -> tuple[int, int, int]:
        """The blocks, all of which are resident."""
        return self.slices, self.groups, self.directions * self.layers

    @property
    def cluster(self) -> int:
        """Blocks of a cluster, neighbours in the grid's first size."""
        return self.tiling.cluster


HEAD = 128  # bytes of shared memory in front of everything
AHEAD, PIECE = 8, 512  # pieces that a lane polls for at once, bytes of one of a warp
MOST = 255  # registers that a thread can have
# Registers a thread besides the weights: what the compiler takes at most. For float32 it takes all
# there are, to split weights once instead of at each step.
SPARE = {"float32": MOST, "tf32": 111, "bfloat16": 111, "float16": 111}


def numbers_of(arithmetic: Arithmetic) -> str:
    """What products read, as a `Problem` has it."""
    return "tf32" if arithmetic.precision == "tf32" else arithmetic.compute_dtype.name


@lru_cache(4096)
def plan(device: Device, problem: Problem) -> Plan | str:
    """The launch that serves a problem on a device, or the reason why there is none.

    For two directions that is also said where one after the other takes less.
    """
    if reason := _refusal(device, problem):
        return reason
    kernel, wave = KERNELS[problem.cell, problem.work], problem.layers > 1
    times = kernel.reduction * (1 + wave)  # a wave reduces what is below as well
    length = times * padded(problem.H, problem.numbers)
    reach = {
        t: t.warps * t.chunks * CHUNK[problem.numbers] for t in kernel.tilings[problem.numbers]
    }
    able = [t for t in reach if _has(device, t.cluster)]
    able = [t for t in able if not wave or in_waves(problem.cell, problem.numbers, t)]
    fitting = [t for t in able if reach[t] >= length]
    if not fitting:
        grain = GRAIN[problem.numbers]
        most = max([reach[t] for t in able]) // times // grain * grain
        held = f"hold at most H={most}{' and as many inputs' if wave else ''}"
        return f"H={problem.H}: the kernels for {problem.numbers} {held}"
    attempts = [_attempt(device, problem, kernel, tiling) for tiling in fitting]
    plans = [attempt for attempt in attempts if isinstance(attempt, Plan)]
    if not plans:
        return attempts[0]
    best = min(plans, key=_cost)
    alone = plan(device, problem._replace(directions=1)) if problem.directions > 1 else best
    if isinstance(alone, Plan) and _time(best) > problem.directions * _time(alone):
        return (
            f"N={problem.N}: side by side they take {best.passes} passes a step, which is "
            f"estimated at more than {alone.passes} for one after the other"
        )
    return best


def padded(H: int, numbers: str) -> int:
    """P: H as the mailbox has it, rounded up to 16 bytes."""
    return -(-H // GRAIN[numbers]) * GRAIN[numbers]


def instantiations(
    cell: str, work: str, cluster: int = 1, wave: bool = False
) -> Iterator[tuple[str, int]]:
    """All of a cluster size that `plan` can choose for a kernel: names, and registers a thread."""
    kernel = KERNELS[cell, work]
    for numbers, tilings in kernel.tilings.items():
        for tiling in tilings:
            if tiling.cluster == cluster and (not wave or in_waves(cell, numbers, tiling)):
                yield _name(kernel, numbers, tiling), _registers(kernel, numbers, tiling)


def _refusal(device: Device, problem: Problem) -> str:
    """Why no device of this kind serves such a problem, or ""."""
    if (problem.cell, problem.work) not in KERNELS:
        return NO_KERNEL.get(problem.cell, f"no sequence kernel for cell '{problem.cell}'")
    if problem.numbers not in CHUNK:
        return f"{problem.numbers}: sequence kernels multiply {', '.join(CHUNK)}"
    if device.capability < (8, 0):
        major, minor = device.capability
        return f"compute capability {major}.{minor}: sequence kernels need 8.0"
    if not device.cooperative:
        return "the device cannot launch blocks that wait for each other"
    if not problem.T or not problem.N:
        return f"T={problem.T} N={problem.N}: there is nothing to launch"
    if problem.layers > LAYERS:
        return f"{problem.layers} layers: a wave has at most {LAYERS}"
    if problem.N * (problem.T + 1) >= COUNTABLE:
        rows = problem.N * (problem.T + 1)
        return f"N * (T + 1) = {rows:,}: sequence kernels count less than {COUNTABLE:,} rows"
    return ""


def _has(device: Device, cluster: int) -> bool:
    """Whether the device has clusters of that size; those of desktops, 12.x, refuse some."""
    return cluster == 1 or device.capability[0] in (9, 10)


def _attempt(device: Device, problem: Problem, kernel: Kernel, tiling: Tiling) -> Plan | str:
    """The launch with a tiling and as few blocks on a multiprocessor as will do, or why not."""
    registers = _registers(kernel, problem.numbers, tiling)
    cluster, tiles = tiling.cluster, -(-problem.N // TILE)
    slices = -(-problem.H // (UNITS * cluster)) * cluster
    blocks = slices * problem.directions * problem.layers  # of a group
    processors = device.processors // cluster * cluster  # they come in pairs
    least = _shared(kernel, tiling, 1)
    if least > device.shared_block:
        return (
            f"H={problem.H}: a block takes {least:,} bytes of shared memory, this device has "
            f"{device.shared_block:,}"
        )
    together = occupancy(device, tiling, registers, least)
    if blocks > processors * together:
        each = " of each layer" if problem.layers > 1 else ""
        each = " of each direction" if problem.directions > 1 else each
        return (
            f"H={problem.H}: {blocks} blocks must run at once, one for {UNITS} units{each}; this "
            f"device holds {processors * together}"
        )
    for resident in range(-(-blocks // processors), together + 1):
        groups = processors * resident // blocks
        passes = -(-tiles // (groups * tiling.tiles))
        if cluster > 1 and _polled(kernel, problem, blocks) < SHARED_FROM * passes:
            return "so little is polled for that sharing it would not pay"
        shared = _shared(kernel, tiling, passes)
        if shared <= device.shared_block and (
            occupancy(device, tiling, registers, shared) >= resident
        ):
            groups = -(-tiles // (tiling.tiles * passes))
            name = _name(kernel, problem.numbers, tiling)
            grid = slices, groups, problem.directions, problem.layers
            return Plan(name, tiling, *grid, passes, shared, registers, resident)
    return (
        f"N={problem.N}: a block takes {shared:,} bytes of shared memory for {passes} passes; this "
        f"device has {device.shared_block:,} for one, {device.shared:,} for {resident}"
    )


def _polled(kernel: Kernel, problem: Problem, blocks: int) -> int:
    """Bytes that all blocks poll for in a step."""
    row = kernel.reduction * padded(problem.H, problem.numbers) * 16 // GRAIN[problem.numbers]
    return blocks * problem.N * row


def _cost(plan: Plan) -> tuple[int, int, int]:
    """What is better has less; blocks share a multiprocessor only where they must."""
    return plan.resident, _time(plan), -plan.cluster


def _time(plan: Plan) -> int:
    """What a step takes, in products of a chunk with a tile; an estimate until a GPU has run it."""
    return plan.passes * (LATENCY + plan.resident * plan.tiling.chunks * plan.tiling.tiles)


def occupancy(device: Device, tiling: Tiling, registers: int, shared: int) -> int:
    """How many blocks a multiprocessor holds."""
    per_warp = -(-registers // 8) * 8 * WARP  # handed out in eights
    whole = -(-shared // 128) * 128 + device.shared_reserved
    return min(
        device.blocks,
        device.threads // (tiling.warps * WARP),
        device.registers // (per_warp * tiling.warps),
        device.shared // whole,
    )


def _registers(kernel: Kernel, numbers: str, tiling: Tiling) -> int:
    if tiling.cluster > 1:  # one of its blocks to a multiprocessor is enough, and has them all
        return MOST
    return min(MOST, kernel.weights * tiling.held + SPARE[numbers])


def _shared(kernel: Kernel, tiling: Tiling, passes: int) -> int:
    """Bytes: what clusters share, weights that are not held, the warps' sums, what is carried."""
    weights = 4 * kernel.weights * WARP * tiling.warps * (tiling.chunks - tiling.held)
    sums = kernel.sums * tiling.warps * tiling.tiles
    carried = kernel.carried * tiling.tiles * passes
    return HEAD + tiling.warps * _staged(tiling) + weights + sums + carried


def _staged(tiling: Tiling) -> int:
    """Bytes in which a warp gets what others poll for: `Stage` and `Batch` of staging.h."""
    if tiling.cluster == 1:
        return 0
    parts = -(-tiling.chunks // (AHEAD * tiling.cluster))
    own = tiling.chunks // parts // tiling.cluster
    tiles = 1 if parts > 1 else min(AHEAD // own, tiling.tiles)
    return 16 + (tiling.cluster - 1) * own * tiles * PIECE


def _name(kernel: Kernel, numbers: str, tiling: Tiling) -> str:
    sizes = tiling.warps, tiling.chunks, tiling.held, tiling.tiles
    arguments = ", ".join([f"xprnn::{KIND[numbers]}", *map(str, sizes)])
    return f"xprnn::{kernel.template.format(arguments)}"
