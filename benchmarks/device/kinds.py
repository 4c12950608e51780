"""All kinds of kernels whose blocks wait for each other, with a problem of small, odd sizes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import product
from typing import Any, NamedTuple

from xprnn.backend import Backend
from xprnn.diagnostics.verification.suite import Problem, build
from xprnn.kernels import WAVE
from xprnn.kernels.cuda import plan as planner
from xprnn.kernels.cuda.stack_step import KINDS as STEP_TYPES
from xprnn.kernels.cuda.stack_step import UNITS
from xprnn.kernels.cuda.table import KERNELS, SequenceKernel

from ..common import use_kernels

T, N, I, H = 3, 3, 5, 43  # noqa: E741
LAYERS = 2  # of a stack
STREAMS = (1, 3, 7)  # one for each instantiation of the step
FROZEN = (CLUSTER, _) = ("cluster", WAVE)  # not developed further before a GPU has run the others
WAYS = (LAYER, BOTH, STEP, *FROZEN) = ("layer", "both directions", "step", *FROZEN)


class Kind(NamedTuple):
    """A kind of kernel by the calls that launch it: forward, recorded and backward."""

    way: str  # one of WAYS
    cell: str
    operand_type: str
    N: int = N

    def __str__(self) -> str:
        return f"{self.way} {self.cell} {self.operand_type} N={self.N}"

    def layer(self, backend: Backend) -> Any:
        """The layer that launches it, of the sizes above."""
        layers = LAYERS if self.way in (STEP, WAVE) else 1
        problem = Problem(T, self.N, I, H, layers, 2 if self.way == BOTH else 1)
        return build(self.cell, self.operand_type, problem, backend)

    def launch(self, backend: Backend) -> None:
        """Launch it once in each of its modes: forward, recorded and backward."""
        layer = self.layer(backend)
        with use_kernels(WAVE if self.way == WAVE else "sequence"), self.planned():
            x = backend.xp.full((T, self.N, I), 0.5, layer.dtype)
            if self.way == STEP:
                layer.stepper(self.N).step(x[0])
                return
            layer.eval()(x)
            output, _ = layer.train()(x)
            if self.way != WAVE:  # backward runs layer by layer, as for other kinds
                layer.backward(output)

    def planned(self) -> Any:
        """A context in which the planner chooses this kind."""
        return only_clusters(self.cell, self.operand_type) if self.way == CLUSTER else nullcontext()


def kinds(ways: Sequence[str] = WAYS) -> list[Kind]:
    """All kinds of these ways, in the order of `ways`."""
    cells = {cell: 0 for cell, _ in KERNELS}
    pairs = list(product(cells, planner.K_BLOCK_ELEMENTS))
    by_way = {
        LAYER: [Kind(LAYER, *pair) for pair in pairs],
        BOTH: [Kind(BOTH, *pair) for pair in pairs],
        STEP: [Kind(STEP, *one) for one in product(UNITS, STEP_TYPES, STREAMS)],
        CLUSTER: [Kind(CLUSTER, *pair) for pair in pairs if any(_clustered(*pair).values())],
        WAVE: [Kind(WAVE, *pair) for pair in pairs],
    }
    return [kind for way in ways for kind in by_way[way]]


def _clustered(cell: str, operand_type: str) -> dict[tuple[str, str], SequenceKernel]:
    """The kernels of a cell that have tilings with clusters, with these tilings only."""
    kernels = {}
    for key, kernel in KERNELS.items():
        clusters = tuple([t for t in kernel.tilings[operand_type] if t.cluster > 1])
        if key[0] == cell and clusters:
            kernels[key] = kernel._replace(tilings={**kernel.tilings, operand_type: clusters})
    return kernels


@contextmanager
def only_clusters(cell: str, operand_type: str) -> Iterator[None]:
    """The planner selects clusters where a kernel has them, however few words are polled."""
    before, usual = dict(KERNELS), planner.CLUSTER_MIN_BYTES
    KERNELS.update(_clustered(cell, operand_type))
    planner.CLUSTER_MIN_BYTES = 0
    planner.plan.cache_clear()
    try:
        yield
    finally:
        KERNELS.update(before)
        planner.CLUSTER_MIN_BYTES = usual
        planner.plan.cache_clear()
