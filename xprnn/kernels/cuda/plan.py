"""How a sequence is divided among the blocks of one launch, or why it does not fit a device.

A block holds the recurrent weights of 16 units for all steps: those of `in_registers`
k-blocks in registers, the others in shared memory. Its warps split the reduction. The grid is
slices of units times groups of rows; since the blocks wait for each other, all must be resident at
once. Larger batches take several passes per step. Where blocks poll large amounts of
data, they share it in clusters, if the device has them. Both directions of a layer share a launch
if all their blocks fit and that is estimated to take no longer; the layers of a wavefront do
whenever they fit. Plain Python; needs no GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any, NamedTuple

from ...core.precision import PrecisionPolicy
from ..interface import Unsupported
from .table import (
    KERNELS,
    MAX_WAVEFRONT_LAYERS,
    NO_KERNEL,
    SequenceKernel,
    Tiling,
    in_wavefronts,
)

UNITS, TILE, WARP = 16, 8, 32  # units of a block, rows of a tile, threads of a warp
MAX_PACKED_ROWS = 2**31  # limit of the kernels' 32-bit counters, exclusive

# Cost of waiting for other blocks in a pass, in products of a k-block and a tile: an estimate
LATENCY = 12

# Bytes that all blocks poll in a pass from which clusters share them; N=64, H=1024 in 16-bit
# dtypes makes 8 MiB. An estimate: half of 6 MiB takes L2 0.6 us, passing it on takes 0.3 us
CLUSTER_MIN_BYTES = 6 << 20

# By math mode: elements of a k-block, elements of 16 bytes, and the name in the kernels
K_BLOCK_ELEMENTS = {"float32": 16, "tf32": 16, "bfloat16": 32, "float16": 32}
VECTOR_ELEMENTS = {"float32": 4, "tf32": 4, "bfloat16": 8, "float16": 8}
MODE_NAMES = {"float32": "TF32X3", "tf32": "TF32", "bfloat16": "BF16", "float16": "F16"}


class DeviceProperties(NamedTuple):
    """Properties of a GPU; of one multiprocessor unless stated otherwise."""

    capability: tuple[int, int]  # of the GPU
    processors: int  # multiprocessors of the GPU
    registers: int = 65536
    threads: int = 2048
    blocks: int = 32
    shared: int = 233472  # bytes
    shared_block: int = 232448  # bytes, maximum of a block
    shared_reserved: int = 1024  # bytes that each block takes in addition
    cooperative: bool = True  # whether it supports cooperative launches

    @classmethod
    def of(cls, cupy: Any, number: int) -> DeviceProperties:
        """The properties that CuPy reports of a device."""
        properties = cupy.cuda.runtime.getDeviceProperties(number)
        return cls(
            (properties["major"], properties["minor"]),
            properties["multiProcessorCount"],
            properties["regsPerMultiprocessor"],
            properties["maxThreadsPerMultiProcessor"],
            properties["maxBlocksPerMultiProcessor"],
            properties["sharedMemPerMultiprocessor"],
            properties["sharedMemPerBlockOptin"],
            properties["reservedSharedMemPerBlock"],
            bool(properties["cooperativeLaunch"]),
        )


class SequenceProblem(NamedTuple):
    """One sequence kernel on one layer."""

    cell: str  # in cells.CELLS
    work: str  # "forward", "training" (forward, recorded) or "backward"
    math_mode: str  # "float32", "tf32", "bfloat16", "float16" or "float64"
    N: int  # rows that run at least one step
    H: int
    T: int
    directions: int = 1  # 2: both in one launch
    layers: int = 1  # more than 1: a wavefront, of one direction


class LaunchPlan(NamedTuple):
    """A launch that fits the device."""

    name: str  # of the instantiation, in C++
    tiling: Tiling
    slices: int  # of 16 units, in complete clusters: the grid's x size
    groups: int  # of rows: the grid's y size
    directions: int  # the grid's z size, or
    layers: int  # of a wavefront
    passes: int  # of `row_tiles` tiles, over the rows of a group
    shared: int  # bytes per block
    registers: int  # per thread, at most
    blocks_per_processor: int  # that share a multiprocessor

    @property
    def threads(self) -> int:
        """The threads of a block."""
        return self.tiling.warps * WARP

    @property
    def grid(self) -> tuple[int, int, int]:
        """The blocks, all of which are resident at once."""
        return self.slices, self.groups, self.directions * self.layers

    @property
    def cluster(self) -> int:
        """Blocks of a cluster, adjacent in x."""
        return self.tiling.cluster


SHARED_HEADER = 128  # bytes at the start of shared memory
POLL_DEPTH, K_BLOCK_BYTES = 8, 512  # k-blocks that a lane polls at once, bytes of one for a warp
MAX_REGISTERS = 255  # per thread
# Registers per thread besides the weights, at most. For float32 the compiler uses all that there
# are, to split weights once instead of at every step.
BASE_REGISTERS = {"float32": MAX_REGISTERS, "tf32": 111, "bfloat16": 111, "float16": 111}


def math_mode_of(precision: PrecisionPolicy) -> str:
    """The math mode of products, as in `SequenceProblem`."""
    return "tf32" if precision.precision == "tf32" else precision.compute_dtype.name


@lru_cache(4096)
def plan(device: DeviceProperties, problem: SequenceProblem) -> LaunchPlan | Unsupported:
    """The launch for a problem on a device, or the reason why there is none.

    For two directions, one reason is that a launch for each of them takes less time.
    """
    if unsupported := _unsupported(device, problem):
        return unsupported
    kernel, wavefront = KERNELS[problem.cell, problem.work], problem.layers > 1
    times = kernel.reduction * (1 + wavefront)  # a wavefront also reduces over the layer below
    length = times * padded(problem.H, problem.math_mode)
    reach = {
        t: t.warps * t.k_blocks * K_BLOCK_ELEMENTS[problem.math_mode]
        for t in kernel.tilings[problem.math_mode]
    }
    usable = [t for t in reach if _has(device, t.cluster)]
    if wavefront:
        usable = [t for t in usable if in_wavefronts(problem.cell, problem.math_mode, t)]
    fitting = [t for t in usable if reach[t] >= length]
    if not fitting:
        grain = VECTOR_ELEMENTS[problem.math_mode]
        most = max([reach[t] for t in usable]) // times // grain * grain
        limit = f"hold at most H={most}{' and as many inputs' if wavefront else ''}"
        return Unsupported(f"H={problem.H}: the kernels for {problem.math_mode} {limit}")
    attempts = [_attempt(device, problem, kernel, tiling) for tiling in fitting]
    plans = [attempt for attempt in attempts if isinstance(attempt, LaunchPlan)]
    if not plans:
        return attempts[0]
    best = min(plans, key=_cost)
    single = plan(device, problem._replace(directions=1)) if problem.directions > 1 else best
    if isinstance(single, LaunchPlan) and _time(best) > problem.directions * _time(single):
        return Unsupported(
            f"N={problem.N}: {best.passes} passes per step for both directions in one launch are "
            f"estimated to take longer than two launches with {single.passes} each"
        )
    return best


def padded(H: int, math_mode: str) -> int:
    """H rounded up to 16 bytes: the length of a row of an exchange buffer."""
    return -(-H // VECTOR_ELEMENTS[math_mode]) * VECTOR_ELEMENTS[math_mode]


def instantiations(
    cell: str, work: str, cluster: int = 1, wavefront: bool = False
) -> Iterator[tuple[str, int]]:
    """Names, and registers per thread, of all that `plan` can choose of a cluster size."""
    kernel = KERNELS[cell, work]
    for math_mode, tilings in kernel.tilings.items():
        for tiling in tilings:
            if tiling.cluster == cluster and (
                not wavefront or in_wavefronts(cell, math_mode, tiling)
            ):
                yield _name(kernel, math_mode, tiling), _registers(kernel, math_mode, tiling)


def _unsupported(device: DeviceProperties, problem: SequenceProblem) -> Unsupported | None:
    """Why no sequence kernel runs problems of this kind on the device."""
    if (problem.cell, problem.work) not in KERNELS:
        return Unsupported(
            NO_KERNEL.get(problem.cell, f"no sequence kernel for cell '{problem.cell}'")
        )
    if problem.math_mode not in K_BLOCK_ELEMENTS:
        return Unsupported(
            f"{problem.math_mode}: sequence kernels support {', '.join(K_BLOCK_ELEMENTS)}"
        )
    if device.capability < (8, 0):
        major, minor = device.capability
        return Unsupported(f"compute capability {major}.{minor}: sequence kernels need 8.0")
    if not device.cooperative:
        return Unsupported("the device does not support cooperative launches")
    if not problem.T or not problem.N:
        return Unsupported(f"T={problem.T} N={problem.N}: there is nothing to launch")
    if problem.layers > MAX_WAVEFRONT_LAYERS:
        return Unsupported(
            f"{problem.layers} layers: a wavefront has at most {MAX_WAVEFRONT_LAYERS}"
        )
    if problem.N * (problem.T + 1) >= MAX_PACKED_ROWS:
        rows = problem.N * (problem.T + 1)
        return Unsupported(
            f"N * (T + 1) = {rows:,}: sequence kernels count less than {MAX_PACKED_ROWS:,} rows"
        )
    return None


def _has(device: DeviceProperties, cluster: int) -> bool:
    """Whether the device has clusters of that size; desktop GPUs, 12.x, lack some features."""
    return cluster == 1 or device.capability[0] in (9, 10)


def _attempt(
    device: DeviceProperties, problem: SequenceProblem, kernel: SequenceKernel, tiling: Tiling
) -> LaunchPlan | Unsupported:
    """The launch of a tiling with as few blocks per multiprocessor as possible, or why not."""
    registers = _registers(kernel, problem.math_mode, tiling)
    cluster, tiles = tiling.cluster, -(-problem.N // TILE)
    slices = -(-problem.H // (UNITS * cluster)) * cluster
    blocks = slices * problem.directions * problem.layers  # of a group
    processors = device.processors // cluster * cluster  # in complete clusters
    least = _shared(kernel, tiling, 1)
    if least > device.shared_block:
        return Unsupported(
            f"H={problem.H}: a block takes {least:,} bytes of shared memory, this device has "
            f"{device.shared_block:,}"
        )
    resident = occupancy(device, tiling, registers, least)
    if blocks > processors * resident:
        each = " of each layer" if problem.layers > 1 else ""
        each = " of each direction" if problem.directions > 1 else each
        return Unsupported(
            f"H={problem.H}: {blocks} blocks must run at once, one for {UNITS} units{each}; this "
            f"device holds {processors * resident}"
        )
    for per_processor in range(-(-blocks // processors), resident + 1):
        groups = processors * per_processor // blocks
        passes = -(-tiles // (groups * tiling.row_tiles))
        if cluster > 1 and _polled(kernel, problem, blocks) < CLUSTER_MIN_BYTES * passes:
            return Unsupported("the blocks poll too little data for a cluster to pay")
        shared = _shared(kernel, tiling, passes)
        if shared <= device.shared_block and (
            occupancy(device, tiling, registers, shared) >= per_processor
        ):
            groups = -(-tiles // (tiling.row_tiles * passes))
            name = _name(kernel, problem.math_mode, tiling)
            grid = slices, groups, problem.directions, problem.layers
            return LaunchPlan(name, tiling, *grid, passes, shared, registers, per_processor)
    return Unsupported(
        f"N={problem.N}: a block takes {shared:,} bytes of shared memory for {passes} passes; this "
        f"device has {device.shared_block:,} for one, {device.shared:,} for {per_processor}"
    )


def _polled(kernel: SequenceKernel, problem: SequenceProblem, blocks: int) -> int:
    """Bytes that all blocks poll in a step."""
    grain = VECTOR_ELEMENTS[problem.math_mode]
    row = kernel.reduction * padded(problem.H, problem.math_mode) * 16 // grain
    return blocks * problem.N * row


def _cost(plan: LaunchPlan) -> tuple[int, int, int]:
    """Lower is better; blocks share a multiprocessor only where they must."""
    return plan.blocks_per_processor, _time(plan), -plan.cluster


def _time(plan: LaunchPlan) -> int:
    """Duration of a step, in products of a k-block and a tile; an estimate, not measured."""
    products = plan.blocks_per_processor * plan.tiling.k_blocks * plan.tiling.row_tiles
    return plan.passes * (LATENCY + products)


def occupancy(device: DeviceProperties, tiling: Tiling, registers: int, shared: int) -> int:
    """The number of blocks that fit on a multiprocessor."""
    per_warp = -(-registers // 8) * 8 * WARP  # allocated in units of eight
    allocated = -(-shared // 128) * 128 + device.shared_reserved
    return min(
        device.blocks,
        device.threads // (tiling.warps * WARP),
        device.registers // (per_warp * tiling.warps),
        device.shared // allocated,
    )


def _registers(kernel: SequenceKernel, math_mode: str, tiling: Tiling) -> int:
    if tiling.cluster > 1:  # planned with one block per multiprocessor, which has all registers
        return MAX_REGISTERS
    return min(MAX_REGISTERS, kernel.weights * tiling.in_registers + BASE_REGISTERS[math_mode])


def _shared(kernel: SequenceKernel, tiling: Tiling, passes: int) -> int:
    """Bytes: cluster buffers, weights not in registers, partial sums, and state gradients."""
    k_blocks = tiling.k_blocks - tiling.in_registers
    weights = 4 * kernel.weights * WARP * tiling.warps * k_blocks
    sums = kernel.sums * tiling.warps * tiling.row_tiles
    carried = kernel.carried * tiling.row_tiles * passes
    return SHARED_HEADER + tiling.warps * _staged(tiling) + weights + sums + carried


def _staged(tiling: Tiling) -> int:
    """Bytes of a warp for data received from its cluster: `Stage` and `Batch` of staging.h."""
    if tiling.cluster == 1:
        return 0
    parts = -(-tiling.k_blocks // (POLL_DEPTH * tiling.cluster))
    own = tiling.k_blocks // parts // tiling.cluster
    tiles = 1 if parts > 1 else min(POLL_DEPTH // own, tiling.row_tiles)
    return 16 + (tiling.cluster - 1) * own * tiles * K_BLOCK_BYTES


def _name(kernel: SequenceKernel, math_mode: str, tiling: Tiling) -> str:
    sizes = tiling.warps, tiling.k_blocks, tiling.in_registers, tiling.row_tiles
    arguments = ", ".join([f"xprnn::{MODE_NAMES[math_mode]}", *map(str, sizes)])
    return f"xprnn::{kernel.template.format(arguments)}"
