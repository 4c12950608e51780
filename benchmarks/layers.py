"""asv's benchmarks of one layer on a CPU: forward, forward with backward, and streaming steps.

Each takes (cell, implementation, dtype, size). `gpu.py` has the same for GPUs.
"""

from __future__ import annotations

from .common import CPU, UnusableError, skip
from .implementations import prepare


class LayerBenchmark:
    """Prepares one combination, or skips it with a reason."""

    task = "forward"
    params = CPU.params(task)
    param_names = ("cell", "implementation", "dtype", "size")
    version = "1"  # of the work: asv shows results of one version only
    repeat = (5, 40, 0.3)  # minimum and maximum number of samples, and their seconds
    rounds = 2  # processes over which the samples are spread
    warmup_time = 0.05
    timeout = 300

    def setup(self, cell: str, implementation: str, dtype: str, size: str) -> None:
        """Build, move, compile and warm up."""
        parameters = (cell, implementation, dtype, size)
        try:
            self.work = prepare(self.task, *parameters)
            self.measure_once(size)
        except UnusableError as error:
            skip(self, parameters, str(error))
        self.timer = self.work.clock

    def measure_once(self, size: str) -> None:
        """Measure anything but time; raise UnusableError if that is not possible."""


class Forward(LayerBenchmark):
    """Forward in eval mode: nothing is saved for a gradient."""

    def time_forward(self, cell: str, implementation: str, dtype: str, size: str) -> None:
        self.work.call()


class Training(LayerBenchmark):
    """Forward and backward, with the gradients of x and of every weight."""

    task = "training"
    params = CPU.params(task)

    def time_training(self, cell: str, implementation: str, dtype: str, size: str) -> None:
        self.work.call()


class DefinitionForward(Forward):
    """Forward of cells whose steps are generated from a definition."""

    params = CPU.defined()


class DefinitionTraining(Training):
    """Forward and backward of cells whose steps are generated from a definition."""

    params = CPU.defined()


class TrainingMemory(LayerBenchmark):
    """The peak memory of a training process, interpreter and library included."""

    task = "training"
    params = CPU.params(task)

    def peakmem_training(self, cell: str, implementation: str, dtype: str, size: str) -> None:
        self.work.call()


class Step(LayerBenchmark):
    """A hundred calls of a cell, each one step from the same states, as in streaming.

    asv runs the setup before each sample; a single step would mostly measure cold caches.
    """

    task = "step"
    params = CPU.params(task)

    def time_100_steps(self, cell: str, implementation: str, dtype: str, size: str) -> None:
        for _ in range(100):
            self.work.call()


class Stepper(LayerBenchmark):
    """A hundred steps of a stepper of three layers, each from the state of the step before."""

    task = "stepper"
    params = CPU.params(task)

    def time_100_steps(self, cell: str, implementation: str, dtype: str, size: str) -> None:
        for _ in range(100):
            self.work.call()
