"""The planner of sequence kernels: its plans fit the device, and rejected problems do not."""

from __future__ import annotations

import itertools
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.support.fake_cupy import devices
from xprnn.cells import CELLS
from xprnn.core.precision import check_precision_policy
from xprnn.kernels import Unsupported
from xprnn.kernels.cuda import plan as planner
from xprnn.kernels.cuda.plan import (
    DeviceProperties,
    LaunchPlan,
    SequenceProblem,
    instantiations,
    math_mode_of,
    padded,
    plan,
)
from xprnn.kernels.cuda.table import KERNELS

CELLS_WITH_KERNELS = tuple(dict(KERNELS.keys()))  # cells
WORK = ("forward", "training", "backward")
MATH_MODES = ("float32", "tf32", "bfloat16", "float16")
GRID = [  # (N, H, T) of the speed table
    *((1, 256, 512), (8, 512, 512), (32, 512, 512), (64, 1024, 256)),
    *((256, 1024, 128), (1, 1024, 1024), (16, 768, 1024)),
]
H200 = DeviceProperties((9, 0), 132)
KINDS = {  # of devices, without their number of multiprocessors
    "A100": DeviceProperties((8, 0), 1, shared=167936, shared_block=166912),
    "A10": DeviceProperties((8, 6), 1, threads=1536, blocks=16, shared=102400, shared_block=101376),
    "L4": DeviceProperties((8, 9), 1, threads=1536, blocks=24, shared=102400, shared_block=101376),
    "H200": DeviceProperties((9, 0), 1),
    "twice the size": DeviceProperties((10, 0), 1, registers=131072, shared=466944),
}
PROCESSORS = (16, 41, 84, 132, 148)
ROWS = (1, 7, 8, 9, 31, 64, 256, 1000, 20_000)
UNITS = (
    *(1, 8, 15, 16, 17, 64, 100, 128, 256, 257, 511, 512, 513, 768, 1000, 1024, 1025, 1300),
    *(1536, 1664, 1665, 1792, 1800, 2048, 2112, 2113, 2368, 2369, 2560, 2561),
)


NAMED = {"float32": "TF32X3", "tf32": "TF32", "bfloat16": "BF16", "float16": "F16"}
FLAGS = {"forward": ", false>", "training": ", true>", "backward": ">"}


def problems_of(
    chosen: LaunchPlan, device: DeviceProperties, problem: SequenceProblem
) -> list[str]:
    """Problems of a plan, from an independent calculation of the kernels' resources."""
    warps, k_blocks, in_registers, row_tiles, cluster = chosen.tiling
    backward, single = problem.work == "backward", problem.math_mode in ("float32", "tf32")
    cell = CELLS[problem.cell]
    gates = 1 if backward else cell.gates  # with separate sums
    spare = (
        135 if problem.math_mode == "float32" else 111
    )  # what the compiler needs besides weights
    spare = 95 if gates == 4 and single else spare  # five k-blocks are in registers
    weights = 8 * gates * in_registers  # of a lane: 8 words per k-block and gate
    if cluster > 1 and problem.math_mode != "float32":
        spare = min(spare + 9, 255 - weights)  # it uses fewer if no more are available
    partial = 2 * warps * gates * 8 * row_tiles * 20 * 4
    rest = (k_blocks - in_registers) * warps * 32 * 4 * 8 * gates
    carried = 16 * 4 * 8 * row_tiles * chosen.passes * len(cell.state_names) if backward else 0
    shared = 128 + partial + rest + carried + warps * staged_bytes(chosen)
    registers = -(-(weights + spare) // 8) * 8
    per_row = 16 // (4 if single else 2)
    H = -(-problem.H // per_row) * per_row
    length = cell.gates * H if backward else problem.H * (1 + (problem.layers > 1))
    units = Counter(u for s in range(chosen.slices) for u in range(16 * s, 16 * s + 16))
    own, resident = 8 * row_tiles * chosen.passes, chosen.blocks_per_processor
    allocated = -(-shared // 128) * 128 + device.shared_reserved
    slots = problem.directions * problem.layers
    blocks, processors = chosen.slices * chosen.groups * slots, device.processors
    step = blocks * -(-problem.N // chosen.groups) * length * (4 if single else 2)
    family, _, relu = problem.cell.partition("_")
    kernel = f"xprnn::{family}_{'backward' if backward else 'forward'}"
    mode, sizes = NAMED[problem.math_mode], f"{warps}, {k_blocks}, {in_registers}, {row_tiles}"
    wanted = f"{kernel}<xprnn::{mode}, {sizes}"
    wanted += {"tanh": ", false>", "relu": ", true>"}.get(relu, FLAGS[problem.work])
    broken = {
        "name": chosen.name != wanted,
        "in registers": not 0 <= in_registers <= k_blocks,
        "a thread's registers": weights + spare > 255 or chosen.registers < weights + spare,
        "registers": registers * 32 * warps * resident > device.registers,
        "threads": 32 * warps * resident > device.threads or chosen.threads != 32 * warps,
        "blocks": resident > device.blocks or blocks > processors * resident,
        "clusters": chosen.cluster != cluster or (cluster > 1 and device.capability < (9, 0)),
        "complete clusters": chosen.slices % cluster
        or blocks // cluster > processors // cluster * resident,
        "little to share": cluster > 1 and step < chosen.passes * 6 * 2**20,
        "shared memory of a block": chosen.shared != shared or shared > device.shared_block,
        "shared memory": allocated * resident > device.shared,
        "reduction": warps * k_blocks * (16 if single else 32) < length,
        "units": set(range(problem.H)) - units.keys() or max(units.values()) > 1,
        "idle units": (chosen.slices - cluster) * 16 >= problem.H,
        "rows": chosen.groups * own < problem.N,
        "idle groups": (chosen.groups - 1) * own >= problem.N,
        "directions": chosen.directions != problem.directions,
        "layers": chosen.layers != problem.layers,
        "clusters of a wavefront": chosen.layers > 1 and cluster > 1,
        "grid": chosen.grid != (chosen.slices, chosen.groups, slots) or min(chosen.grid) < 1,
    }
    return [name for name, wrong in broken.items() if wrong]


def staged_bytes(chosen: LaunchPlan) -> int:
    """Shared memory of a warp for data of its cluster: two barriers, and the received k-blocks."""
    _, k_blocks, _, row_tiles, cluster = chosen.tiling
    if cluster == 1:
        return 0
    parts = -(-k_blocks // (8 * cluster))
    own = k_blocks / parts / cluster
    assert own == int(own) <= 8
    pieces = own * (1 if parts > 1 else min(row_tiles, 8 // own))
    assert pieces <= 8
    return 16 + (cluster - 1) * int(pieces) * 32 * 16


def sweep(
    processors: tuple[int, ...] = PROCESSORS, cell: str = "gru", directions: int = 1
) -> Iterator[tuple[DeviceProperties, SequenceProblem]]:
    """Devices and problems of every kind; T, which has no effect, cycles."""
    times = itertools.cycle((1, 17, 100_000))
    for base, count, work, mode in itertools.product(KINDS.values(), processors, WORK, MATH_MODES):
        device = base._replace(processors=count)
        for N, H in itertools.product(ROWS, UNITS):
            yield device, SequenceProblem(cell, work, mode, N, H, next(times), directions)


def decide(device: DeviceProperties, problem: SequenceProblem) -> LaunchPlan | str:
    """As `plan`, without its cache."""
    return plan.__wrapped__(device, problem)


def first_wrong_plan(cell: str = "gru", directions: int = 1) -> list[str]:
    """Problems of the first plan that does not fit, in a smaller sweep, or []."""
    for device, problem in sweep((16, 132), cell, directions):
        chosen = decide(device, problem)
        if isinstance(chosen, LaunchPlan) and (wrong := problems_of(chosen, device, problem)):
            return wrong
    return []


@pytest.mark.parametrize("cell", CELLS_WITH_KERNELS)
def test_every_choice_fits(cell: str) -> None:
    taken, refused, chosen = Counter(), Counter(), set()
    for device, problem in sweep(PROCESSORS if cell == "gru" else (16, 132), cell):
        answer = decide(device, problem)
        if isinstance(answer, LaunchPlan):
            assert not problems_of(answer, device, problem), (device, problem, answer)
            if answer.blocks_per_processor > 1:  # as few as possible
                assert isinstance(
                    decide(device._replace(blocks=answer.blocks_per_processor - 1), problem),
                    Unsupported,
                )
            taken[answer.blocks_per_processor] += 1
            chosen.add((answer.name, answer.cluster))
        else:
            assert re.match(r"[HN]=\d+: .*\d", answer.reason), answer
            refused[answer.reason[0]] += 1
    assert taken[1] > 10_000 and taken[2] > 200 and refused["H"] > 1000 and refused["N"] > 10
    listed = {
        (name, cluster)
        for work in WORK
        for cluster in (1, 2)
        for name, _ in instantiations(cell, work, cluster)
    }
    assert chosen == listed  # no unused and no missing instantiation


FAULTS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "UNITS": ("blocks of 32 units", lambda original: 32),
    "TILE": ("tiles of 16 rows", lambda original: 16),
    "SHARED_HEADER": ("no header", lambda original: 0),
    "K_BLOCK_ELEMENTS": (
        "double k-blocks",
        lambda original: {name: 2 * size for name, size in original.items()},
    ),
    "MODE_NAMES": ("modes swapped", lambda original: {**original, "tf32": "TF32X3"}),
    "BASE_REGISTERS": (
        "few registers",
        lambda original: {name: size // 2 for name, size in original.items()},
    ),
    "occupancy": ("one block too many", lambda original: lambda *args: original(*args) + 1),
    "_shared": ("a pass too few", lambda original: lambda k, t, passes: original(k, t, passes - 1)),
    "_registers": ("weights not counted", lambda original: lambda k, mode, t: 96),
    "WARP": ("warps of 16", lambda original: 16),
    "_has": ("clusters on all devices", lambda original: lambda device, cluster: True),
    "CLUSTER_MIN_BYTES": ("clusters for little", lambda original: 1 << 20),
    "_staged": ("no memory for clusters", lambda original: lambda tiling: 0),
    "K_BLOCK_BYTES": ("k-blocks of half the size", lambda original: 256),
    "MAX_REGISTERS": ("half of the registers", lambda original: original // 2),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_in_the_planner_is_detected(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _, fault = FAULTS[name]
    monkeypatch.setattr(planner, name, fault(getattr(planner, name)))
    assert first_wrong_plan()


TABLE_FAULTS: dict[str, dict[str, Any]] = {
    "length": {"reduction": 1},
    "weights": {"weights": 4},
    "sums": {"sums": 640},
    "carried": {"carried": 0},
}


@pytest.mark.parametrize("change", TABLE_FAULTS.values(), ids=TABLE_FAULTS)
@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_a_fault_in_the_table_is_detected(
    cell: str, change: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    key = cell, "backward"
    monkeypatch.setitem(KERNELS, key, KERNELS[key]._replace(**change))
    assert first_wrong_plan(cell)


def test_a_larger_device_fits_everything_that_a_smaller_one_does() -> None:
    rng = random.Random(0)
    cases = list(sweep((16, 84)))
    lost = []
    for device, problem in rng.sample(cases, 3000):
        if isinstance(decide(device, problem), Unsupported):
            continue
        grown = device._replace(
            capability=(9, 0),
            processors=device.processors + rng.choice([0, 1, 7, 60]),
            registers=device.registers + rng.choice([0, 4096]),
            threads=device.threads + rng.choice([0, 512]),
            blocks=device.blocks + rng.choice([0, 8]),
            shared=device.shared + rng.choice([0, 1024, 131072]),
            shared_block=device.shared_block + rng.choice([0, 1024, 131072]),
        )
        fewer = problem._replace(N=rng.randint(1, problem.N))
        for better, requested in ((grown, problem), (device, fewer), (grown, fewer)):
            answer = decide(better, requested)
            lost += [(device, better, requested, answer)] if isinstance(answer, Unsupported) else []
    assert not lost


@pytest.mark.parametrize("mode", MATH_MODES)
@pytest.mark.parametrize("work", WORK)
@pytest.mark.parametrize("cell", CELLS_WITH_KERNELS)
def test_the_speed_table_has_plans(cell: str, work: str, mode: str) -> None:
    for N, H, T in GRID:
        chosen = plan(H200, SequenceProblem(cell, work, mode, N, H, T))
        assert isinstance(chosen, LaunchPlan), chosen
        assert chosen.blocks_per_processor == 1
        # the weights of four gates leave memory for half of the sums only
        half = cell == "lstm" and work != "backward" and mode in ("float32", "tf32")
        assert chosen.passes == {256: 4, 64: 1}.get(N, 1) * (1 + (half and H == 1024 and N > 16))


@pytest.mark.parametrize("work", WORK)
@pytest.mark.parametrize("cell", CELLS_WITH_KERNELS)
def test_instantiations_are_few_and_differ(cell: str, work: str) -> None:
    count = 0
    for cluster in (1, 2):
        listed = dict(instantiations(cell, work, cluster))
        assert len(listed) == len(list(instantiations(cell, work, cluster)))
        assert max(listed.values()) <= 255
        count += len(listed)
    assert count <= 40


def test_clusters_are_chosen_where_blocks_poll_much_data() -> None:
    big = SequenceProblem("gru", "backward", "float32", 256, 1024, 128)
    for N, H, cluster in ((64, 1024, 2), (256, 1000, 2), (32, 512, 1), (1, 1024, 1)):
        assert plan(H200, big._replace(N=N, H=H)).cluster == cluster
    odd = plan(H200, big._replace(H=1000))  # 63 of the 64 blocks have units
    assert odd.grid == (64, 2, 1)
    for capability, cluster in (((8, 0), 1), ((10, 0), 2), ((10, 3), 2), ((12, 0), 1)):
        assert plan(H200._replace(capability=capability), big).cluster == cluster
    assert plan(H200._replace(processors=63), big._replace(H=1000)).cluster == 1  # no 32nd pair


def test_device_properties_are_read_from_cupy() -> None:
    runtime = SimpleNamespace(getDeviceProperties=lambda number: devices.H200)
    cupy = SimpleNamespace(cuda=SimpleNamespace(runtime=runtime))
    assert DeviceProperties.of(cupy, 0) == H200


@pytest.mark.parametrize(("H", "half", "single"), [(1, 8, 4), (4, 8, 4), (9, 16, 12), (16, 16, 16)])
def test_exchange_rows_are_multiples_of_16_bytes(H: int, half: int, single: int) -> None:
    assert [padded(H, mode) for mode in MATH_MODES] == [single, single, half, half]


def test_the_math_mode_follows_the_operand_dtype() -> None:
    assert math_mode_of(check_precision_policy("float32", None, "ieee")) == "float32"
    assert math_mode_of(check_precision_policy("float32", None, "tf32")) == "tf32"
    assert math_mode_of(check_precision_policy("float32", np.float16, "ieee")) == "float16"
    assert math_mode_of(check_precision_policy("float64", None, "ieee")) == "float64"
