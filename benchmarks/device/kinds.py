"""Every kind of kernel whose blocks wait for each other, each on a problem of small, odd sizes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import product
from typing import Any, NamedTuple

from xprnn import use_kernels
from xprnn.backend import Backend
from xprnn.kernels import WAVE
from xprnn.kernels.cuda import plan as planner
from xprnn.kernels.cuda.stack_step import KINDS as STEP_NUMBERS
from xprnn.kernels.cuda.stack_step import UNITS
from xprnn.kernels.cuda.table import KERNELS, Kernel
from xprnn.verify.suite import Problem, build

T, N, I, H = 3, 3, 5, 43  # noqa: E741
LAYERS = 2  # of a stack
STREAMS = (1, 3, 7)  # an instantiation of the step each
FROZEN = (CLUSTER, _) = ("cluster", WAVE)  # until a GPU has run the others
WAYS = (LAYER, BOTH, STEP, *FROZEN) = ("layer", "both directions", "step", *FROZEN)


class Kind(NamedTuple):
    """A kernel by what launches it, forward, recorded and backward."""

    way: str  # of WAYS
    cell: str
    numbers: str  # what products read
    N: int = N

    def __str__(self) -> str:
        return f"{self.way} {self.cell} {self.numbers} N={self.N}"

    def layer(self, backend: Backend) -> Any:
        """What is called, of the sizes above."""
        layers = LAYERS if self.way in (STEP, WAVE) else 1
        directions = 2 if self.way == BOTH else 1
        return build(self.cell, self.numbers, Problem(T, self.N, I, H, layers, directions), backend)

    def launch(self, backend: Backend) -> None:
        """Launch it once for each kind of work that it does."""
        layer = self.layer(backend)
        with use_kernels(WAVE if self.way == WAVE else "sequence"), self.planned():
            x = backend.xp.full((T, self.N, I), 0.5, layer.dtype)
            if self.way == STEP:
                layer.stepper(self.N).step(x[0])
                return
            layer.eval()(x)
            output, _ = layer.train()(x)
            if self.way != WAVE:  # its layers go back one by one, as other kinds do
                layer.backward(output)

    def planned(self) -> Any:
        """A context in which the planner chooses this kind."""
        return only_clusters(self.cell, self.numbers) if self.way == CLUSTER else nullcontext()


def kinds(ways: Sequence[str] = WAYS) -> list[Kind]:
    """All there are of these, as `WAYS` has them."""
    cells = {cell: 0 for cell, _ in KERNELS}
    pairs = list(product(cells, planner.CHUNK))
    found = {
        LAYER: [Kind(LAYER, *pair) for pair in pairs],
        BOTH: [Kind(BOTH, *pair) for pair in pairs],
        STEP: [Kind(STEP, *one) for one in product(UNITS, STEP_NUMBERS, STREAMS)],
        CLUSTER: [Kind(CLUSTER, *pair) for pair in pairs if any(_clustered(*pair).values())],
        WAVE: [Kind(WAVE, *pair) for pair in pairs],
    }
    return [kind for way in ways for kind in found[way]]


def _clustered(cell: str, numbers: str) -> dict[tuple[str, str], Kernel]:
    """The kernels of a cell, with those tilings alone that make clusters, if there are any."""
    found = {}
    for key, kernel in KERNELS.items():
        clusters = tuple([t for t in kernel.tilings[numbers] if t.cluster > 1])
        if key[0] == cell and clusters:
            found[key] = kernel._replace(tilings={**kernel.tilings, numbers: clusters})
    return found


@contextmanager
def only_clusters(cell: str, numbers: str) -> Iterator[None]:
    """The planner takes clusters where a kernel has them, however little is polled for."""
    before, usual = dict(KERNELS), planner.SHARED_FROM
    KERNELS.update(_clustered(cell, numbers))
    planner.SHARED_FROM = 0
    planner.plan.cache_clear()
    try:
        yield
    finally:
        KERNELS.update(before)
        planner.SHARED_FROM = usual
        planner.plan.cache_clear()
